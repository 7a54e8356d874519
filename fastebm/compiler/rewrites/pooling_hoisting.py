"""Average pools move before operations that act on every pixel alike, which then have fewer pixels.

    avgpool(conv1x1(h)) = conv1x1(avgpool(h))
    avgpool(a * h1 + b * h2) = a * avgpool(h1) + b * avgpool(h2)
    avgpool(scale * h + shift) = scale * avgpool(h) + shift

This holds for windows without padding, and scale and shift with one number per channel. The second line pays again
if another rewrite then fuses one of the pools into a convolution.
"""

from collections.abc import Iterator

from fastebm.compiler.operations import Affine, AveragePool, Convolution, LinearCombination, Operation
from fastebm.compiler.program import Program, Rewriter


def hoist_pooling(program: Program) -> Iterator[Program]:
    """Programs in which one pool moves before the operation whose result it pooled."""
    for node in program:
        pool = node.operation
        if not isinstance(pool, AveragePool) or pool.padding != (0, 0) or pool.ceil_mode or pool.divisor is not None:
            continue
        source = program[node.inputs[0]]
        if isinstance(source.operation, LinearCombination) or is_affine_per_pixel(source.operation):
            rewriter = Rewriter(program, node)
            pooled = [rewriter.add(pool, name) for name in source.inputs]
            yield rewriter.finish(source.operation, *pooled)


def is_affine_per_pixel(operation: Operation) -> bool:
    """Whether the operation is the same affine map of the channels at every pixel."""
    if isinstance(operation, Affine):
        return all(weight.shape in ((), (1,)) or weight.shape[-2:] == (1, 1) for weight in operation.weights())
    return isinstance(operation, Convolution) and operation.pointwise
