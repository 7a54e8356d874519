"""Average pools move in front of what works on every pixel alike, where there is less to do afterwards.

    avgpool(conv1x1(h)) = conv1x1(avgpool(h))
    avgpool(a * h1 + b * h2) = a * avgpool(h1) + b * avgpool(h2)
    avgpool(scale * h + shift) = scale * avgpool(h) + shift

for windows without padding; scale and shift have one number a channel. The sums pay twice where another rewrite then
takes a pool into a convolution.
"""

from collections.abc import Iterator

from fastebm.compiler.operations import Affine, AveragePool, Convolution, LinearCombination, Operation
from fastebm.compiler.program import Program, Rewriter


def hoist_pooling(program: Program) -> Iterator[Program]:
    """Programs in which one pool comes before the operation that it came after."""
    for node in program:
        pool = node.operation
        if not isinstance(pool, AveragePool) or pool.padding != (0, 0) or pool.ceil_mode or pool.divisor is not None:
            continue
        source = program[node.inputs[0]]
        if not _same_on_every_pixel(source.operation):
            continue
        edit = Rewriter(program, node)
        pooled = [edit.add(pool, name) for name in source.inputs]
        yield edit.finish(source.operation, *pooled)


def _same_on_every_pixel(operation: Operation) -> bool:
    if isinstance(operation, Affine):
        return all(value.shape in ((), (1,)) or value.shape[-2:] == (1, 1) for value in operation.weights())
    return isinstance(operation, LinearCombination) or (isinstance(operation, Convolution) and operation.pointwise)
