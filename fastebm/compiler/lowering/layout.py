"""Memory layout of lowered programs: every result is stored as an image, every weight as that of a convolution."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastebm.compiler.lazy_tensors import LazyTensor, Shape, lazy
from fastebm.compiler.lowering.groups import POINTWISE, Image, LoweringError
from fastebm.compiler.operations import Input, Reshape
from fastebm.compiler.program import Program


def assign_images(program: Program) -> dict[str, Image]:
    """The image (C, H, W) as which each result lies in memory; without a reason for another one, a vector is (C, 1, 1).

    A vector that is reshaped from or to an image, or meets such a vector in a pointwise operation, lies as that image.
    No data is moved then: the linear maps before and after the vector permute their weights instead.
    """
    images = {node.name: _as_image(node.shape) for node in program}
    changed = True
    while changed:
        changed = False
        for node in program:
            if not isinstance(node.operation, (Reshape, *POINTWISE)):
                continue
            names = [node.name, *node.inputs]
            shaped = {images[n] for n in names if images[n][1:] != (1, 1)}
            if len(shaped) > 1:
                raise LoweringError(f"{node.name}: one vector is several images")
            for n in names:
                if shaped and images[n][1:] == (1, 1):
                    images[n], changed = next(iter(shaped)), True
    return images


def _as_image(shape: Shape) -> Image:
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (math.prod(shape), 1, 1)


def flatten_samples(program: Program) -> Program:
    """The program on vectors instead of images, if the energy starts by flattening its images.

    A linear map of a vector is a matrix product. A linear map of an image would be a convolution that covers the image,
    which for images of few channels does many times the work.
    """
    image = program.nodes[0]
    gradient = program[program.outputs[1]] if len(program.outputs) > 1 else None
    users = program.users(image.name)
    flat = (math.prod(image.shape),)
    if len(image.shape) != 3 or not users or image.name in program.outputs:
        return program
    if any(not isinstance(node.operation, Reshape) or node.shape != flat for node in users):
        return program
    if gradient is not None:
        if not isinstance(gradient.operation, Reshape) or program[gradient.inputs[0]].shape != flat:
            return program
        if program.users(gradient.name) or gradient.inputs[0] == image.name or gradient in users:
            return program
    removed = {node.name for node in users}
    nodes = [replace(image, operation=Input(flat), shape=flat)]
    for node in program.nodes[1:]:
        if node.name not in removed and node is not gradient:
            inputs = tuple(image.name if name in removed else name for name in node.inputs)
            nodes.append(replace(node, inputs=inputs))
    outputs = program.outputs[:1] if gradient is None else (program.outputs[0], gradient.inputs[0])
    return Program(tuple(nodes), outputs)


# ---- weights


def phase(start: int, kernel: int, stride: int, padding: int, size: int) -> tuple[int, int, int, int]:
    """(first tap, taps, padding, length) along one axis of the outputs start, start + stride, ... of a transposed
    convolution; `rewrites/polyphase.py` derives them."""
    first, shift = (start + padding) % stride, (start + padding) // stride
    taps = max(0, -(-(kernel - first) // stride))
    return first, taps, taps - 1 - shift, -(-(size - start) // stride)


def flip_weight(weight: Tensor) -> Tensor:
    """(in, out, K, K) of a transposed convolution to (out, in, K, K) of a plain one."""
    return weight.transpose(0, 1).flip(2, 3)


def phase_weight(weight: Tensor, first: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """The plain convolution's weight for one phase of a transposed convolution."""
    return flip_weight(weight[:, :, first[0] :: stride[0], first[1] :: stride[1]])


def weight_from_image(weight: Tensor, image: Image) -> Tensor:
    """A linear map of a flattened image, as a convolution that covers the image."""
    return weight.reshape(-1, *image)


def weight_to_image(weight: Tensor, image: Image) -> Tensor:
    """A linear map to a flattened image, as a convolution of one padded pixel."""
    return weight.reshape(*image, -1).permute(0, 3, 1, 2).flip(2, 3)


def bias_image(bias: LazyTensor, image: Image) -> LazyTensor:
    """A bias as (C, 1, 1), or, where it has a number for each pixel, as the image that it is added to."""
    by_pixel = image[1:] != (1, 1) and bias.shape[0] != image[0]
    return lazy(Tensor.reshape, bias, image if by_pixel else (-1, 1, 1))


def broadcast_to_image(value: Tensor, image: Image, shape: Shape) -> Tensor:
    """A tensor that broadcasts over samples of `shape`, as (C, H or 1, W or 1) of the image as which they lie."""
    if len(shape) == 2 or (len(shape) == 1 and image[1:] != (1, 1)):
        return value.expand(shape).reshape(image)
    if len(shape) == 0:
        return value.reshape(1, 1, 1)
    value = value.reshape((1,) * max(0, len(shape) - value.dim()) + tuple(value.shape))
    value = value.reshape(value.shape[-len(shape) :])
    return (value[:, None, None] if len(shape) == 1 else value).expand(image[0], -1, -1)


def ones_weight(channels: int, height: int, width: int, device: Callable[[], torch.device]) -> Tensor:
    """The weight of a convolution that sums over channels and pixels."""
    return torch.ones(1, channels, height, width, device=device())
