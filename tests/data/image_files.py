"""Small image sets for the tests, written in each real format, with the pixels and labels that readers must return."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_NAMES = tuple(f"kind_{number}" for number in range(100))


@dataclass(frozen=True)
class Written:
    """A set on disk: its path, the format that must be recognised, and pixels (N, C, H, W) and labels by split."""

    path: Path
    format: str
    splits: Mapping[str, tuple[Pixels, NDArray[np.int64] | None]]
    classes: tuple[str, ...] = ()


def noise(seed: int, *shape: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels_of(seed: int, count: int, classes: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 1]).integers(0, classes, count)


def tar_of(path: Path, files: Mapping[str, bytes], folder: str) -> None:
    """A .tar.gz with a folder and files in it, as `tar czf` makes one. A fixed time makes equal bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive:
        entry = tarfile.TarInfo(f"{folder}/")
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    path.write_bytes(gzip.compress(packed.getvalue(), mtime=0))


def folder_of(path: Path, files: Mapping[str, bytes]) -> None:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)


# numpy ----------------------------------------------------------------------------------------------------------------


def npz_files(
    *, channels_last: bool = True, size: tuple[int, int] = (6, 6), channels: int = 3
) -> tuple[dict[str, NDArray[Any]], dict[str, tuple[Pixels, NDArray[np.int64] | None]]]:
    """Arrays as Keras and our own sets name them, and what is in them."""
    arrays: dict[str, NDArray[Any]] = {}
    splits: dict[str, tuple[Pixels, NDArray[np.int64] | None]] = {}
    for seed, (split, count) in enumerate({"train": 9, "test": 4}.items()):
        pixels, labels = noise(seed, count, channels, *size), labels_of(seed, count, 10)
        arrays[f"x_{split}"] = pixels.transpose(0, 2, 3, 1) if channels_last else pixels
        arrays[f"y_{split}"] = labels.astype(np.uint8)
        splits[split] = pixels, labels
    return arrays, splits


def npz_bytes(arrays: Mapping[str, NDArray[Any]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(array))
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), method)
    return packed.getvalue()


def write_npz(folder: Path, method: int = zipfile.ZIP_DEFLATED) -> Written:
    arrays, splits = npz_files()
    path = folder / "set.npz"
    path.write_bytes(npz_bytes(arrays, method))
    return Written(path, "npz, array x_{}", splits)


def imagenet_part(seed: int, count: int, size: int = 8) -> tuple[dict[str, NDArray[Any]], Pixels, NDArray[np.int64]]:
    """A part as the downsampled ImageNet has it: rows of pixels, labels from 1, and a mean that is not needed."""
    pixels, labels = noise(seed, count, 3, size, size), labels_of(seed, count, 1000)
    arrays = {"data": pixels.reshape(count, -1), "labels": labels + 1, "mean": np.zeros(3 * size * size)}
    return arrays, pixels, labels


def write_imagenet(folder: Path) -> Written:
    path = folder / "imagenet"
    path.mkdir()
    parts = [imagenet_part(number, 2 + number % 3) for number in range(1, 11)]
    for number, (arrays, _, _) in enumerate(parts, start=1):
        np.savez(path / f"train_data_batch_{number}.npz", **arrays)
    arrays, pixels, labels = imagenet_part(99, 3)
    np.savez(path / "val_data.npz", **arrays)
    train = np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])
    return Written(path, "downsampled ImageNet (8x8), npz parts", {"train": train, "test": (pixels, labels)})


# CIFAR ----------------------------------------------------------------------------------------------------------------


def python2_pickle(data: Pixels, labels: list[int], labels_key: bytes) -> bytes:
    """A batch as Python 2's cPickle wrote those of CIFAR: protocol 2, text as bytes, long strings for arrays."""

    def text(content: bytes) -> bytes:
        return b"U" + bytes([len(content)]) + content

    def integer(number: int) -> bytes:
        return b"K" + bytes([number]) if number < 256 else b"J" + struct.pack("<i", number)

    raw = data.tobytes()
    shape = integer(data.shape[0]) + integer(data.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\nq\x05" + text(b"u1") + b"K\x00K\x01\x87Rq\x06(K\x03" + text(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    numbers = b"]q\x07(" + b"".join(integer(label) for label in labels) + b"e"
    names = b"]q\x08(" + b"".join(text(b"image_%d.png" % number) for number in range(len(labels))) + b"e"
    items = text(b"data") + array + text(labels_key) + numbers
    items += text(b"batch_label") + text(b"training batch 1 of 5") + text(b"filenames") + names
    return b"\x80\x02}q\x01(" + items + b"u."


def python3_pickle(protocol: int) -> Callable[[Pixels, list[int], bytes], bytes]:
    def batch(data: Pixels, labels: list[int], labels_key: bytes) -> bytes:
        return pickle.dumps({b"data": data, labels_key: labels, b"batch_label": b"training"}, protocol)

    return batch


def cifar_binary(pixels: Pixels, *label_columns: NDArray[np.int64]) -> bytes:
    columns = [column.astype(np.uint8)[:, None] for column in label_columns]
    return np.concatenate([*columns, pixels.reshape(len(pixels), -1)], axis=1).tobytes()


def cifar10_files(
    batch: Callable[[Pixels, list[int], bytes], bytes] | None,
) -> tuple[dict[str, bytes], dict[str, tuple[Pixels, NDArray[np.int64] | None]]]:
    """CIFAR-10 in the python version with batches pickled by `batch`, or in the binary version without one."""
    files: dict[str, bytes] = {}
    parts: dict[str, tuple[Pixels, NDArray[np.int64]]] = {}
    for seed, name in enumerate(("data_batch_4", "test_batch", *(f"data_batch_{i}" for i in (1, 2, 3, 5)))):
        pixels, labels = noise(seed, 2 + seed % 2, 3, 32, 32), labels_of(seed, 2 + seed % 2, 10)
        parts[name] = pixels, labels
        if batch is None:
            files[f"{name}.bin"] = cifar_binary(pixels, labels)
        else:
            files[name] = batch(pixels.reshape(len(pixels), -1), labels.tolist(), b"labels")
    files["readme.html"] = b'<meta HTTP-EQUIV="REFRESH">\n'
    if batch is None:
        files["batches.meta.txt"] = "\n".join([*CIFAR10_NAMES, "", ""]).encode()
    else:
        names = "".join(f"S'{name}'\np{number}\na" for number, name in enumerate(CIFAR10_NAMES, start=4))
        meta = f"(dp1\nS'num_cases_per_batch'\np2\nI10000\nsS'label_names'\np3\n(lp30\n{names}sS'num_vis'\nI3072\ns."
        files["batches.meta"] = meta.encode()  # protocol 0, as Python 2 wrote this one
    train = [parts[f"data_batch_{number}"] for number in range(1, 6)]
    joined = np.concatenate([pixels for pixels, _ in train]), np.concatenate([labels for _, labels in train])
    return files, {"train": joined, "test": parts["test_batch"]}


def cifar100_files(
    batch: Callable[[Pixels, list[int], bytes], bytes] | None,
) -> tuple[dict[str, bytes], dict[str, tuple[Pixels, NDArray[np.int64] | None]]]:
    files: dict[str, bytes] = {}
    splits: dict[str, tuple[Pixels, NDArray[np.int64] | None]] = {}
    for seed, split in enumerate(("test", "train")):
        pixels, labels = noise(seed, 4 + seed, 3, 32, 32), labels_of(seed, 4 + seed, 100)
        splits[split] = pixels, labels
        if batch is None:
            files[f"{split}.bin"] = cifar_binary(pixels, labels // 5, labels)
        else:
            files[split] = batch(pixels.reshape(len(pixels), -1), labels.tolist(), b"fine_labels")
    if batch is None:
        files["fine_label_names.txt"] = "\n".join(CIFAR100_NAMES).encode()
        files["coarse_label_names.txt"] = "\n".join(CIFAR100_NAMES[:20]).encode()
    else:
        files["meta"] = pickle.dumps({b"fine_label_names": list(CIFAR100_NAMES)}, 2)
    return files, splits


def write_cifar10_binary(folder: Path) -> Written:
    files, splits = cifar10_files(None)
    folder_of(folder / "cifar-10-batches-bin", files)
    return Written(folder / "cifar-10-batches-bin", "CIFAR-10, binary version", splits, CIFAR10_NAMES)


def write_cifar10_binary_archive(folder: Path) -> Written:
    files, splits = cifar10_files(None)
    tar_of(folder / "cifar-10-binary.tar.gz", files, "cifar-10-batches-bin")
    return Written(folder / "cifar-10-binary.tar.gz", "CIFAR-10, binary version", splits, CIFAR10_NAMES)


def write_cifar10_python(folder: Path) -> Written:
    files, splits = cifar10_files(python2_pickle)
    folder_of(folder / "cifar-10-batches-py", files)
    return Written(folder / "cifar-10-batches-py", "CIFAR-10, python version", splits, CIFAR10_NAMES)


def write_cifar10_python_archive(folder: Path) -> Written:
    files, splits = cifar10_files(python2_pickle)
    tar_of(folder / "cifar-10-python.tar.gz", files, "cifar-10-batches-py")
    return Written(folder / "cifar-10-python.tar.gz", "CIFAR-10, python version", splits, CIFAR10_NAMES)


def write_cifar100_binary_archive(folder: Path) -> Written:
    files, splits = cifar100_files(None)
    tar_of(folder / "cifar-100-binary.tar.gz", files, "cifar-100-binary")
    return Written(folder / "cifar-100-binary.tar.gz", "CIFAR-100, binary version", splits, CIFAR100_NAMES)


def write_cifar100_python(folder: Path) -> Written:
    files, splits = cifar100_files(python2_pickle)
    folder_of(folder / "cifar-100-python", files)
    return Written(folder / "cifar-100-python", "CIFAR-100, python version", splits, CIFAR100_NAMES)


# STL-10 ---------------------------------------------------------------------------------------------------------------


def stl10_files() -> tuple[dict[str, bytes], dict[str, tuple[Pixels, NDArray[np.int64] | None]]]:
    files: dict[str, bytes] = {}
    splits: dict[str, tuple[Pixels, NDArray[np.int64] | None]] = {}
    for seed, (split, count) in enumerate({"test": 2, "train": 3, "unlabeled": 2}.items()):
        pixels, labels = noise(seed, count, 3, 96, 96), labels_of(seed, count, 10)
        files[f"{split}_X.bin"] = pixels.swapaxes(2, 3).tobytes()
        if split != "unlabeled":
            files[f"{split}_y.bin"] = (labels + 1).astype(np.uint8).tobytes()
        splits[split] = pixels, None if split == "unlabeled" else labels
    files["class_names.txt"] = "\n".join(CIFAR10_NAMES).encode()
    files["fold_indices.txt"] = b"0 1 2\n"
    return files, splits


def write_stl10(folder: Path) -> Written:
    files, splits = stl10_files()
    folder_of(folder / "stl10_binary", files)
    return Written(folder / "stl10_binary", "STL-10, binary version", splits, CIFAR10_NAMES)


def write_stl10_archive(folder: Path) -> Written:
    files, splits = stl10_files()
    tar_of(folder / "stl10_binary.tar.gz", files, "stl10_binary")
    return Written(folder / "stl10_binary.tar.gz", "STL-10, binary version", splits, CIFAR10_NAMES)


# MNIST ----------------------------------------------------------------------------------------------------------------


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _write_mnist(folder: Path, pack: Callable[[bytes], bytes], end: str) -> Written:
    path = folder / "mnist"
    path.mkdir()
    splits: dict[str, tuple[Pixels, NDArray[np.int64] | None]] = {}
    for seed, (split, prefix) in enumerate({"train": "train", "test": "t10k"}.items()):
        pixels, labels = noise(seed, 7 - seed, 1, 28, 28), labels_of(seed, 7 - seed, 10)
        (path / f"{prefix}-images-idx3-ubyte{end}").write_bytes(pack(idx(pixels[:, 0])))
        (path / f"{prefix}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels.astype(np.uint8))))
        splits[split] = pixels, labels
    return Written(path, "IDX (MNIST)", splits)


def write_mnist(folder: Path) -> Written:
    return _write_mnist(folder, bytes, "")


def write_mnist_gz(folder: Path) -> Written:
    return _write_mnist(folder, lambda content: gzip.compress(content, mtime=0), ".gz")


# Pictures -------------------------------------------------------------------------------------------------------------


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_pictures(folder: Path) -> Written:
    """Two classes of pictures in lossless formats, nested, with other files as they occur in such folders."""
    path = folder / "pictures"
    places = ("cats/a.png", "cats/more/b.bmp", "dogs/c.tiff", "dogs/d.webp", "dogs/e.ppm")
    pixels = noise(3, len(places), 3, 8, 8)
    for place, image in zip(places, pixels, strict=True):
        target = path / place
        target.parent.mkdir(parents=True, exist_ok=True)
        options = {"lossless": True} if target.suffix == ".webp" else {}
        Image.fromarray(image.transpose(1, 2, 0)).save(target, **options)
    (path / "dogs" / "notes.txt").write_text("none of them bites")
    (path / ".cache").mkdir()
    (path / ".cache" / "thumb.png").write_bytes(b"no picture")
    labels = np.array([0, 0, 1, 1, 1])
    return Written(path, "folder of pictures", {"": (pixels, labels)}, ("cats", "dogs"))


WRITERS: dict[str, Callable[[Path], Written]] = {
    "npz": write_npz,
    "npz-stored": lambda folder: write_npz(folder, zipfile.ZIP_STORED),
    "npz-lzma": lambda folder: write_npz(folder, zipfile.ZIP_LZMA),
    "imagenet": write_imagenet,
    "cifar10-binary": write_cifar10_binary,
    "cifar10-binary-archive": write_cifar10_binary_archive,
    "cifar10-python": write_cifar10_python,
    "cifar10-python-archive": write_cifar10_python_archive,
    "cifar100-binary-archive": write_cifar100_binary_archive,
    "cifar100-python": write_cifar100_python,
    "stl10": write_stl10,
    "stl10-archive": write_stl10_archive,
    "mnist": write_mnist,
    "mnist-gz": write_mnist_gz,
    "pictures": write_pictures,
}
