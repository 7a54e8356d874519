"""The output of many samples, written chunk by chunk: a folder of pictures, one array, or one grid.

An output keeps its state in a hidden folder: the request (`request.json`), and for each finished chunk a mark or its
samples. So it resumes after a kill at any moment, and several processes may write chunks in any order. The numbers are
written last: `numbers.json` in a folder of pictures, NAME.npz.json or NAME.png.json beside a file. There they stand for
the request of a finished file, whose hidden folder is gone.
"""

from __future__ import annotations

import dataclasses
import glob
import io
import json
import math
import os
import re
import shutil
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastebm.data import to_float
from fastebm.data.formats.pictures import IMAGE_SUFFIXES
from fastebm.memory import size_in_words
from fastebm.plotting import GRID, save_grid
from fastebm.runs.files import PART, check_writable, read_json, replacing, sync, write_json
from fastebm.tasks.outputs import NUMBERS, check_folder, locked, make_folders, remove_empty
from fastebm.training import RunError

Pixels = NDArray[np.uint8]
IN_NUMBERS = {"size": "resolution"}
"""What fields of a request are called in the numbers, where it is another name."""


@dataclass(frozen=True)
class Request:
    """Everything that the samples depend on.

    Attributes:
        iteration: of the checkpoint.
        weights: a digest of the energies.
        sampler: the settings of the cascade.
        seed, first_chain: of the noise; sample i is the end of chain `first_chain + i`.
        count: number of samples.
        chunk: samples in a chunk; the last chunk may have fewer.
        channels, size: of a sample.
    """

    iteration: int
    weights: str
    sampler: dict[str, Any]
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
        """The indices of a chunk's samples."""
        return range(chunk * self.chunk, min(self.count, (chunk + 1) * self.chunk))

    def missing(self, finished: Collection[int]) -> Iterator[int]:
        """The numbers of the chunks that are not finished."""
        return (chunk for chunk in range(self.chunks) if chunk not in finished)

    def samples_of(self, chunks: Iterable[int]) -> int:
        """The number of samples in chunks, of which those beyond the request have none."""
        return sum(len(self.rows(chunk)) for chunk in chunks if chunk < self.chunks)


class Output(ABC):
    """Where the samples of a request are written. Samples are uint8 (N, S, S, C).

    Attributes:
        path: the folder or file.
        state: the hidden folder of the output's state.
        numbers: the file of the numbers.
    """

    suffix: ClassVar[str] = ".npy"

    def __init__(self, path: Path, state: Path, numbers: Path) -> None:
        self.path = path
        self.state = state
        self.numbers = numbers

    @abstractmethod
    def write(self, request: Request, chunk: int, pixels: Pixels) -> None:
        """Writes a chunk. It counts as finished only when all of it is on the disk."""

    @abstractmethod
    def finish(self, request: Request) -> None:
        """Assembles the output from all chunks. May be called again after a kill."""

    @abstractmethod
    def close(self, numbers: dict[str, Any]) -> None:
        """Writes the numbers and removes state that is no longer needed. May be called again after a kill."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raises ValueError where the output can't be written, whatever it holds."""

    @abstractmethod
    def bytes_needed(self, request: Request, finished: Collection[int]) -> int:
        """About how many bytes the missing chunks and the output take on the disk."""

    @abstractmethod
    def complete(self, request: Request) -> bool:
        """Whether all of the request is there, with its numbers."""

    @abstractmethod
    def check_free(self, overwrite: bool) -> None:
        """Raises ValueError where other files are in the way, or an older output unless `overwrite` is set."""

    @abstractmethod
    def clear(self) -> None:
        """Removes an older output."""

    @abstractmethod
    def finished_chunks(self) -> set[int]:
        """The numbers of the finished chunks, of which all bytes are as they were written."""

    def _begun_chunks(self) -> set[int]:
        """The numbers of the chunks that were finished once, whatever became of them."""
        names = os.listdir(self.state) if self.state.is_dir() else []
        found = (re.fullmatch(rf"chunk-(\d+){re.escape(self.suffix)}", name) for name in names)
        return {int(match[1]) for match in found if match}

    def check_space(self, request: Request) -> None:
        """Raises ValueError where the disk has less room than the missing samples need."""
        needed = self.bytes_needed(request, self.finished_chunks())
        free = shutil.disk_usage(self.path if self.path.is_dir() else self.path.parent).free
        if needed > free:
            raise ValueError(
                f"{request.count:,} samples of {request.size}x{request.size} need about {size_in_words(needed)} on the "
                f"disk of {self.path}, and {size_in_words(free)} are free"
            )

    def stored_request(self, overwrite: bool = False) -> dict[str, Any] | None:
        """The request that was begun here, as JSON, if there is one.

        Raises RunError if its file is damaged; with `overwrite` the result is then empty.
        """
        return self._request_in_state(overwrite)

    def _request_in_state(self, overwrite: bool) -> dict[str, Any] | None:
        path = self.state / "request.json"
        if not path.is_file():
            return None
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            if overwrite:
                return {}
            raise RunError(f"{path} is damaged: {error}. --overwrite begins anew") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the output for this process until the end of the block. Raises RunError if another process has it."""
        make_folders(self.state)
        with locked(self.state):
            # Files that a killed process had not finished.
            parts = [*self.state.glob(f".*{PART}")]
            for file in (self.path, self.numbers):
                parts += file.parent.glob(f".{glob.escape(file.name)}.*{PART}")
            for part in parts:
                part.unlink(missing_ok=True)
            yield

    @contextmanager
    def begun(self, request: Request, overwrite: bool) -> Iterator[None]:
        """Resumes the request if it was begun here before, or begins it, for a block that writes it.

        If the block fails before a chunk is finished, nothing is left. Raises as `check` does.
        """
        made = make_folders(self.state)
        with self.lock():
            try:
                self.check(request, overwrite)
                wanted = dataclasses.asdict(request)
                if self._request_in_state(overwrite) != wanted or (overwrite and self.complete(request)):
                    self.clear()
                    write_json(self.state / "request.json", wanted)
                try:
                    yield
                except BaseException:
                    if not self._begun_chunks():
                        self.clear()
                    raise
            finally:
                remove_empty([self.state, *made])

    def check(self, request: Request, overwrite: bool) -> None:
        """Raises ValueError as `check_free` does, and with the differences if another request was begun here."""
        wanted, there = dataclasses.asdict(request), self.stored_request(overwrite)
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

    def _chunk_path(self, chunk: int) -> Path:
        return self.state / f"chunk-{chunk:06d}{self.suffix}"

    def _clear_state(self) -> None:
        for path in self.state.iterdir():
            path.unlink()


class PictureFolder(Output):
    """A folder of PNGs, 000000.png and so on. The hidden request stays in it and records their origin.

    The mark of a finished chunk has the digests of its pictures; those of older outputs are empty.
    """

    suffix = ".done"

    def __init__(self, path: Path) -> None:
        super().__init__(path, path / ".generate", path / NUMBERS)

    def write(self, request: Request, chunk: int, pixels: Pixels) -> None:
        from PIL import Image

        paths = [self.path / name for name in _names(request, chunk)]
        digests = []
        for path, image in zip(paths, pixels, strict=True):
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            coded = io.BytesIO()
            picture.save(coded, "png")
            temporary = self.state / f".{path.name}.{os.getpid()}{PART}"
            temporary.write_bytes(coded.getvalue())
            digests.append(f"{zlib.crc32(coded.getvalue()):08x}")
            os.replace(temporary, path)
        for path in (*paths, self.path):  # before the mark, so that marked pictures are complete after a power cut
            sync(path)
        with replacing(self._chunk_path(chunk)) as temporary:
            temporary.write_text("\n".join(digests))

    def finish(self, request: Request) -> None:
        pass

    def check_writable(self) -> None:
        if not self.path.parent.is_dir():
            raise ValueError(f"the folder {self.path.parent} of {self.path.name} does not exist")
        check_folder(self.path, [self.numbers.name], overwrite=True)

    def bytes_needed(self, request: Request, finished: Collection[int]) -> int:
        # Compressed pictures differ: half of the pixels is what smooth ones take, and no PNG is without a header.
        each = 100 + request.channels * request.size**2 // 2
        return each * (request.count - request.samples_of(finished))

    def complete(self, request: Request) -> bool:
        if self._request_in_state(True) != dataclasses.asdict(request) or not self._has_numbers():
            return False
        return len(self.finished_chunks()) >= request.chunks

    def finished_chunks(self) -> set[int]:
        """Those whose pictures are all there still, as they were written."""
        marked, stored = self._begun_chunks(), self._request_in_state(True)
        try:
            request = Request(**(stored or {}))
            there = set(os.listdir(self.path)) if marked else set()
        except (OSError, TypeError):
            return set()
        return {
            chunk for chunk in marked if there.issuperset(_names(request, chunk)) and self._is_unchanged(request, chunk)
        }

    def _is_unchanged(self, request: Request, chunk: int) -> bool:
        """Whether a chunk's pictures have the digests in its mark, or the mark is an older one without digests."""
        try:
            digests = self._chunk_path(chunk).read_text().split()
            paths = [self.path / name for name in _names(request, chunk)]
            return not digests or digests == [_digest(path) for path in paths]
        except (OSError, ValueError):
            return False

    def _has_numbers(self) -> bool:
        try:
            read_json(self.numbers)
        except (OSError, ValueError):
            return False
        return True

    def close(self, numbers: dict[str, Any]) -> None:
        # A call that found all pictures finished did not measure how fast they were drawn.
        if numbers["drawn"] or not self._has_numbers():
            write_json(self.numbers, numbers)

    def check_free(self, overwrite: bool) -> None:
        check_folder(self.path, [self.numbers.name], overwrite=True)
        others = [path.name for path in self.path.glob("*") if path != self.state]
        if others and (self.stored_request(overwrite) is None or not overwrite):
            raise ValueError(f"{self.path} has other files in it, such as {min(others)}: choose another folder")

    def clear(self) -> None:
        for entry in self.path.iterdir():
            if re.fullmatch(r"\d{6,}\.png", entry.name) or entry == self.numbers:
                entry.unlink()
        self._clear_state()


class ArrayFile(Output):
    """One uncompressed .npz with the array "images", uint8 (N, S, S, C).

    The file of a finished chunk ends with a digest of what is before it; numpy does not read so far.
    """

    def __init__(self, path: Path) -> None:
        # Named after the whole file name, so that samples.npz and samples.png have different numbers.
        super().__init__(path, path.parent / f".{path.name}.generate", path.parent / f"{path.name}.json")

    def write(self, request: Request, chunk: int, pixels: Pixels) -> None:
        coded = io.BytesIO()  # numpy does not report a full disk when it writes to a file itself
        np.save(coded, pixels)
        with replacing(self._chunk_path(chunk)) as temporary:
            temporary.write_bytes(coded.getvalue() + zlib.crc32(coded.getvalue()).to_bytes(4, "big"))

    def finished_chunks(self) -> set[int]:
        return {chunk for chunk in self._begun_chunks() if _ends_with_digest(self._chunk_path(chunk))}

    def check_writable(self) -> None:
        for path in (self.path, self.numbers):
            check_writable(path, overwrite=True)
        check_folder(self.state, overwrite=True)

    def bytes_needed(self, request: Request, finished: Collection[int]) -> int:
        # The chunks stay until the file of them all is there.
        missing = request.count - request.samples_of(finished)
        return request.channels * request.size**2 * (request.count + missing)

    def stored_request(self, overwrite: bool = False) -> dict[str, Any] | None:
        begun = self._request_in_state(overwrite)
        return self._finished_request() if begun is None else begun

    def complete(self, request: Request) -> bool:
        return not self.state.exists() and self._finished_request() == dataclasses.asdict(request)

    def _finished_request(self) -> dict[str, Any] | None:
        """The request of the finished file, from the numbers beside it, if these are of this file."""
        try:
            numbers = json.loads(self.numbers.read_text())
            if numbers["bytes"] != self.path.stat().st_size:
                return None
            if "crc32" in numbers and numbers["crc32"] != _digest(self.path):  # older numbers have none
                return None
            return {
                field.name: numbers[IN_NUMBERS.get(field.name, field.name)] for field in dataclasses.fields(Request)
            }
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def close(self, numbers: dict[str, Any]) -> None:
        write_json(self.numbers, numbers | {"bytes": self.path.stat().st_size, "crc32": _digest(self.path)})
        shutil.rmtree(self.state)

    def finish(self, request: Request) -> None:
        shape = (request.count, request.size, request.size, request.channels)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        # ZipInfo's default time is fixed, so that equal samples give equal files.
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
            check_writable(path, overwrite=overwrite)

    def clear(self) -> None:
        self._clear_state()  # the file and its numbers stay until they are replaced

    def _chunk(self, chunk: int) -> Pixels:
        pixels: Pixels = np.load(self._chunk_path(chunk))
        return pixels


class GridFile(ArrayFile):
    """One PNG of all samples."""

    def finish(self, request: Request) -> None:
        pixels = np.concatenate([self._chunk(chunk) for chunk in range(request.chunks)])
        images = to_float(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        save_grid(self.path, images, max(GRID, math.isqrt(request.count - 1) + 1))


def output_for(path: Path) -> Output:
    """The kind of output by the suffix of a path: .npz, .png, or a folder. Raises ValueError for other suffixes."""
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


def _digest(path: Path) -> str:
    """CRC-32 of a file's bytes, in hexadecimal; raises OSError for what is no file."""
    if not path.is_file():  # opening a pipe would wait for a writer
        raise OSError(f"{path} is no file")
    digest = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest = zlib.crc32(block, digest)
    return f"{digest:08x}"


def _ends_with_digest(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content[-4:] == zlib.crc32(content[:-4]).to_bytes(4, "big")
