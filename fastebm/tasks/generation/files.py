"""Where many samples go, chunk by chunk: pictures in a folder, one array, one grid; whole after a kill at any moment.

Beside what they make, outputs keep a folder of their own work, hidden: what was asked for (`request.json`), and a mark
or the samples of each chunk that is done. Chunks may be written in any order and by several processes. Last come the
numbers, for people: `numbers.json` in a folder of pictures, NAME.npz.json or NAME.png.json beside a file.
"""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import math
import os
import re
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastebm.data import to_float
from fastebm.data.formats.pictures import IMAGE_SUFFIXES
from fastebm.plotting import GRID, save_grid
from fastebm.runs.files import PART, replacing, sync, write_json
from fastebm.tasks.outputs import NUMBERS
from fastebm.training import RunError

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Request:
    """All that samples depend on.

    Attributes:
        iteration: of the checkpoint.
        weights: a digest of the energies.
        sampler: the cascade with its settings, in words.
        seed, first_chain: of their noise; chain `first_chain + i` makes sample i.
        count: how many samples.
        chunk: how many of them in a chunk; the last may have fewer.
        channels, size: of a sample.
    """

    iteration: int
    weights: str
    sampler: str
    seed: int
    first_chain: int
    count: int
    chunk: int
    channels: int
    size: int

    @property
    def chunks(self) -> int:
        return -(-self.count // self.chunk)

    def rows(self, chunk: int) -> range:
        """The numbers of a chunk's samples."""
        return range(chunk * self.chunk, min(self.count, (chunk + 1) * self.chunk))


class Output(ABC):
    """One place for the samples of a request. Samples are uint8 (N, S, S, C)."""

    mark: ClassVar[str] = ".npy"

    def __init__(self, path: Path, work: Path, numbers: Path) -> None:
        self.path = path
        self.work = work
        self.numbers = numbers

    @abstractmethod
    def write(self, request: Request, chunk: int, pixels: Pixels) -> None:
        """Writes a chunk so that it is done, or as if nothing had been written."""

    @abstractmethod
    def finish(self, request: Request) -> None:
        """Makes of all chunks what was asked for. May be called again after a kill."""

    @abstractmethod
    def close(self, numbers: dict[str, Any]) -> None:
        """Leaves the numbers, and removes what only the work needed. May be called again after a kill."""

    @abstractmethod
    def check_free(self, overwrite: bool) -> None:
        """Raises ValueError where something else is in the place of a new output, or an older one without leave."""

    @abstractmethod
    def clear(self) -> None:
        """Removes an older output."""

    def done(self) -> set[int]:
        """The chunks that are done."""
        return {int(path.stem.removeprefix("chunk-")) for path in self.work.glob(f"chunk-*{self.mark}")}

    def begun(self, overwrite: bool = False) -> dict[str, Any] | None:
        """The request that was begun here, as JSON, if there is one.

        Raises RunError where it is damaged, unless it may be overwritten.
        """
        path = self.work / "request.json"
        if not path.is_file():
            return None
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            if overwrite:
                return {}
            raise RunError(f"{path} is damaged: {error}. --overwrite begins anew") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps the output for this process until the end of the block. Raises RunError where another one has it."""
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"another process is writing to {self.path}: wait for it, or choose another") from None
            for part in self.work.glob(f".*{PART}"):  # what a killed process had half written
                part.unlink(missing_ok=True)
            yield

    def begin(self, request: Request, overwrite: bool) -> None:
        """Takes up the request where it was begun here before, or begins it. Raises as `check`."""
        self.check(request, overwrite)
        wanted = dataclasses.asdict(request)
        if self.begun(overwrite) != wanted:
            self.clear()
            write_json(self.work / "request.json", wanted)

    def check(self, request: Request, overwrite: bool) -> None:
        """Raises ValueError as `check_free`, and where another request was begun, with the difference."""
        wanted, there = dataclasses.asdict(request), self.begun(overwrite)
        if there == wanted:
            return
        if there is not None and not overwrite:
            differences = [
                f"{name} is {there.get(name)!r} there and {value!r} here"
                for name, value in wanted.items()
                if there.get(name) != value
            ]
            raise ValueError(
                f"{self.path} was begun with something else ({'; '.join(differences)}): --overwrite begins anew"
            )
        self.check_free(overwrite)

    def _marked(self, chunk: int) -> Path:
        return self.work / f"chunk-{chunk:06d}{self.mark}"

    def _clear_work(self) -> None:
        for path in self.work.iterdir():
            if path.name != "lock":
                path.unlink()


class PictureFolder(Output):
    """A folder of PNGs, 000000.png and so on. What was asked for stays in it, hidden, as a note of their origin."""

    mark = ".done"

    def __init__(self, path: Path) -> None:
        super().__init__(path, path / ".generate", path / NUMBERS)

    def write(self, request: Request, chunk: int, pixels: Pixels) -> None:
        from PIL import Image

        paths = [self.path / name for name in _names(request, chunk)]
        for path, image in zip(paths, pixels, strict=True):
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            coded = io.BytesIO()
            picture.save(coded, "png")
            temporary = self.work / f".{path.name}.{os.getpid()}{PART}"
            temporary.write_bytes(coded.getvalue())
            os.replace(temporary, path)
        for path in (*paths, self.path):  # before the mark: after a power cut, what is marked has its content
            sync(path)
        with replacing(self._marked(chunk)):
            pass

    def finish(self, request: Request) -> None:
        pass

    def close(self, numbers: dict[str, Any]) -> None:
        # A call that found all pictures there has nothing to say about how they were drawn.
        if numbers["drawn"] or not self.numbers.exists():
            write_json(self.numbers, numbers)

    def check_free(self, overwrite: bool) -> None:
        others = [path.name for path in self.path.glob("*") if path != self.work]
        if others and (self.begun(overwrite) is None or not overwrite):
            raise ValueError(f"{self.path} has other files in it, such as {min(others)}: choose another folder")

    def clear(self) -> None:
        for entry in self.path.iterdir():
            if re.fullmatch(r"\d{6,}\.png", entry.name) or entry == self.numbers:
                entry.unlink()
        self._clear_work()


class ArrayFile(Output):
    """One .npz with "images", uint8 (N, S, S, C), stored as they are."""

    def __init__(self, path: Path) -> None:
        # With its whole name in front: samples.npz and samples.png have numbers of their own.
        super().__init__(path, path.parent / f".{path.name}.generate", path.parent / f"{path.name}.json")

    def write(self, request: Request, chunk: int, pixels: Pixels) -> None:
        coded = io.BytesIO()  # straight to a file, numpy writes by a way that is silent about a full disk
        np.save(coded, pixels)
        with replacing(self._marked(chunk)) as temporary:
            temporary.write_bytes(coded.getvalue())

    def close(self, numbers: dict[str, Any]) -> None:
        write_json(self.numbers, numbers)
        shutil.rmtree(self.work)

    def finish(self, request: Request) -> None:
        shape = (request.count, request.size, request.size, request.channels)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        # The time in the archive is that of its format's beginning, so that equal samples are equal files.
        entry = zipfile.ZipInfo("images.npy")
        with (
            replacing(self.path) as temporary,
            zipfile.ZipFile(temporary, "w") as archive,
            archive.open(entry, "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
            for chunk in range(request.chunks):
                member.write(self._chunk(chunk).tobytes())

    def check_free(self, overwrite: bool) -> None:
        for path in (self.path, self.numbers):
            if path.is_dir():
                raise ValueError(f"{path} is a folder, and a file is to be written: choose another name")
            if path.exists() and not overwrite:
                raise ValueError(f"{path} exists: --overwrite replaces it, or choose another name")

    def clear(self) -> None:
        self._clear_work()  # the file itself and its numbers stay until they are replaced

    def _chunk(self, chunk: int) -> Pixels:
        pixels: Pixels = np.load(self._marked(chunk))
        return pixels


class GridFile(ArrayFile):
    """One PNG of all samples."""

    def finish(self, request: Request) -> None:
        pixels = np.concatenate([self._chunk(chunk) for chunk in range(request.chunks)])
        images = to_float(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        save_grid(self.path, images, max(GRID, math.isqrt(request.count - 1) + 1))


def output_for(path: Path) -> Output:
    """What a path asks for, by its ending: .npz, .png, or none for a folder. Raises ValueError for another."""
    if path.suffix == ".npz":
        return ArrayFile(path)
    if path.suffix == ".png":
        return GridFile(path)
    if path.suffix.lower() in (*IMAGE_SUFFIXES, ".npy", ".pt", ".zip"):
        raise ValueError(f"{path} is neither a folder nor ends in .npz or .png")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; name a folder, or a file that ends in .npz or .png")
    return PictureFolder(path)


def _names(request: Request, chunk: int) -> list[str]:
    width = max(6, len(str(request.count - 1)))
    return [f"{number:0{width}d}.png" for number in request.rows(chunk)]
