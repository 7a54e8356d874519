"""Small lowered programs for tests, which end in random projections: energies and a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastebm.ops.instructions import Buffer, Epilogue, EpilogueOp, Instruction, Kind
from fastebm.ops.program import DENSE, CompiledProgram, Constant, LoweredProgram

Image = tuple[int, int, int]
PROJECTIONS = 7


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class ProgramBuilder:
    """A recipe under construction for samples of an image's shape, which buffer 0 holds from the start."""

    sample: Image
    buffers: list[Buffer] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    epilogues: list[Epilogue] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        channels, height, width = self.sample
        load = Instruction(Kind.LOAD, source_channels=channels, channels=channels, height=height, width=width)
        self.add(load, Epilogue(EpilogueOp.STORE, self.buffer(self.sample)))

    def buffer(self, image: Image) -> int:
        self.buffers.append(Buffer(*image, bytes=0))
        return len(self.buffers) - 1

    def number(self, *values: float) -> int:
        self.numbers += values
        return len(self.numbers) - len(values)

    def image(self, *shape: int) -> int:
        """A random constant image (channels, height or 1, width or 1)."""
        return self._constant(Constant("image"), 1 + 0.5 * normal(*shape, seed=len(self.values)))

    def add(self, instruction: Instruction, *num_steps: Epilogue) -> None:
        self.instructions.append(replace(instruction, first=len(self.epilogues), count=len(num_steps)))
        self.epilogues += num_steps

    def convolution(
        self, source: int, image: Image, kernel: tuple[int, int], *num_steps: Epilogue, **fields: int
    ) -> None:
        """A convolution with random weights, to a grid of `image`."""
        inputs = fields.pop("source_channels", self.buffers[source].channels)
        weight = normal(image[0], inputs, *kernel, seed=len(self.values)) / math.sqrt(inputs * math.prod(kernel))
        number = self._constant(Constant("convolution"), weight)
        grid = {
            "channels": image[0],
            "height": image[1],
            "width": image[2],
            "kernel_y": kernel[0],
            "kernel_x": kernel[1],
        }
        self.add(
            Instruction(Kind.CONVOLUTION, source, source_channels=inputs, constant=number, **grid, **fields), *num_steps
        )

    def stored(self, instruction: Instruction, *num_steps: Epilogue) -> int:
        """The instruction with steps behind it, into a new buffer."""
        target = self.buffer((instruction.channels, instruction.height, instruction.width))
        self.add(instruction, *num_steps, Epilogue(EpilogueOp.STORE, target))
        return target

    def finish(self, result: int) -> ProgramBuilder:
        """Energies and gradient as random maps of a buffer, so that each of its numbers counts."""
        image = self.buffers[result]
        projections = self.buffer((PROJECTIONS, 1, 1))
        cover = (image.height, image.width)
        self.convolution(result, (PROJECTIONS, 1, 1), cover, Epilogue(EpilogueOp.STORE, projections))
        self.convolution(projections, (1, 1, 1), (1, 1), Epilogue(EpilogueOp.STORE_ENERGIES))
        _, height, width = self.sample
        pad = {"pad_y": height - 1, "pad_x": width - 1}
        self.convolution(projections, self.sample, (height, width), Epilogue(EpilogueOp.STORE_GRADIENT), **pad)
        return self

    def recipe(self, size: int) -> LoweredProgram:
        """For numbers of `size` bytes; buffers of few channels are dense where lowering makes them so."""
        convolutions = [i for i in self.instructions if i.kind == Kind.CONVOLUTION]
        wide = {i.source for i in convolutions if i.kernel_x > 8 or i.dilation_x > 1 or i.source_channel}
        dense = {b for b, buffer in enumerate(self.buffers) if buffer.channels <= DENSE and b not in wide}
        buffers = tuple(
            replace(b, bytes=size, pixel_stride=DENSE if k in dense else 0) for k, b in enumerate(self.buffers)
        )
        constants = list(self.constants)
        for i in convolutions:
            constants[i.constant - 1] = replace(constants[i.constant - 1], dense=i.source in dense)
        parts = (buffers, tuple(self.instructions), tuple(self.epilogues), tuple(constants))
        return LoweredProgram(self.sample, size, *parts)

    def fused(self, size: int, device: str) -> CompiledProgram:
        """It all, ready to run on the backend that is chosen now."""
        ready = CompiledProgram(self.recipe(size), torch.device(device))
        numbers = [torch.tensor(n, dtype=torch.float64) if size == 8 else n for n in self.numbers]
        if size == 8:
            numbers.append(torch.zeros((), dtype=torch.float64))
        ready.refresh(numbers, [value.to(device) for value in self.values])
        return ready

    def _constant(self, constant: Constant, value: Tensor) -> int:
        self.constants.append(constant)
        self.values.append(value)
        return len(self.constants)
