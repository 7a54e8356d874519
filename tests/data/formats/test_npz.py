"""Image sets in .npz and .npy files: names and axes of arrays, and files whose headers lie about their content."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fastebm.data import DataError, open_images
from tests.data.image_files import imagenet_part, labels_of, noise, npz_bytes, npz_files


def opened(folder: Path, content: bytes, name: str = "set.npz", **options):
    (folder / name).write_bytes(content)
    return open_images(folder / name, **options)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("size", "channels"), [((6, 6), 3), ((6, 6), 1), ((5, 7), 3), ((3, 3), 1), ((1, 1), 3)])
def test_layouts(channels_last: bool, size: tuple[int, int], channels: int, tmp_path: Path) -> None:
    arrays, splits = npz_files(channels_last=channels_last, size=size, channels=channels)
    images = opened(tmp_path, npz_bytes(arrays))
    assert torch.equal(images.pixels, torch.from_numpy(splits["train"][0]))


def test_grey_images_without_an_axis_for_it(tmp_path: Path) -> None:
    for shape in ((5, 8, 8), (5, 7, 9), (5, 4, 4), (5, 3, 3)):
        pixels = noise(0, *shape)
        assert torch.equal(opened(tmp_path, npz_bytes({"a": pixels})).pixels[:, 0], torch.from_numpy(pixels))


@pytest.mark.parametrize(
    ("shape", "saying"),
    [
        ((5, 3, 3, 3), "could have its channels in two places"),
        ((5, 1, 7, 1), "could have its channels in two places"),
        ((5, 8, 8, 4), "has no axis of 1 or 3 channels"),
        ((64, 60, 3), "looks like one image"),
        ((64, 0, 60), "has images without pixels"),
        ((2**40, 0, 60), "has images without pixels"),
        ((0, 8, 8), "holds no images"),
    ],
)
def test_layouts_that_nobody_can_know(shape: tuple[int, ...], saying: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"set\.npz, x_train: .*{saying}"):
        opened(tmp_path, npz_bytes({"x_train": np.zeros(shape, np.uint8)}))


def test_fortran_order_and_the_second_version_of_the_header(tmp_path: Path) -> None:
    pixels = noise(0, 4, 6, 5, 3)
    np.savez(tmp_path / "f.npz", images=np.asfortranarray(pixels))
    assert np.array_equal(open_images(tmp_path / "f.npz").pixels.numpy().transpose(0, 2, 3, 1), pixels)
    with (tmp_path / "two.npy").open("wb") as file:
        np.lib.format.write_array(file, pixels, version=(2, 0))
    assert np.array_equal(open_images(tmp_path / "two.npy").pixels.numpy().transpose(0, 2, 3, 1), pixels)
    with (tmp_path / "three.npy").open("wb") as file:
        np.lib.format.write_array(file, pixels, version=(3, 0))
    with pytest.raises(DataError, match=r"three\.npy: is of version \(3, 0\)"):
        open_images(tmp_path / "three.npy")


def test_more_than_a_piece(tmp_path: Path) -> None:
    """2 MiB: several pieces of rows, and of the compressed file."""
    pixels = noise(0, 700, 32, 32, 3)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        images = opened(tmp_path, npz_bytes({"images": pixels}, method))
        assert np.array_equal(images.pixels.numpy().transpose(0, 2, 3, 1), pixels)


def test_names_of_arrays(tmp_path: Path) -> None:
    pixels, labels = noise(0, 4, 8, 8), labels_of(0, 4, 9)
    medical = {"train_images": pixels, "train_labels": labels[:, None], "val_images": pixels[:2]}
    images = opened(tmp_path, npz_bytes(medical))
    assert torch.equal(images.labels, torch.from_numpy(labels))
    assert len(opened(tmp_path, npz_bytes(medical), split="val")) == 2
    single = {"whatever": pixels, "mean": np.zeros(3), "label": labels.astype("<u2")}
    images = opened(tmp_path, npz_bytes(single))
    assert (images.format, images.split) == ("npz, array whatever", "")
    assert torch.equal(images.labels, torch.from_numpy(labels))
    assert opened(tmp_path, npz_bytes({"x_test": pixels})).split == "test"


def test_choosing_by_key(tmp_path: Path) -> None:
    several = {"a": noise(0, 4, 8, 8), "b": noise(1, 5, 8, 8), "c": np.zeros(3)}
    with pytest.raises(DataError, match=r"several arrays .* by key; it has a: uint8 \(4, 8, 8\), b: uint8 \(5, 8, 8\)"):
        opened(tmp_path, npz_bytes(several))
    images = opened(tmp_path, npz_bytes(several), key="b")
    assert torch.equal(images.pixels[:, 0], torch.from_numpy(several["b"]))
    for options, saying in (
        ({"key": "d"}, "has no array 'd'; it has a: uint8"),
        ({"key": "c"}, r"set\.npz, c: is float64 \(3,\); images must be uint8"),
        ({"key": "a", "split": "train"}, "no split 'train'; it is one piece"),
    ):
        with pytest.raises(DataError, match=saying):
            opened(tmp_path, npz_bytes(several), **options)


@pytest.mark.parametrize("dtype", ["u1", ">i2", "i8", "u8", "?", "f2", ">f4", "f8", "g"])
def test_whole_numbers_of_any_type_are_labels(dtype: str, tmp_path: Path) -> None:
    arrays = {"x_train": noise(0, 3, 4, 4), "y_train": np.array([0, 1, 1], dtype)}
    assert opened(tmp_path, npz_bytes(arrays)).labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("arrays", "saying"),
    [
        ({"x_train": np.zeros((2, 4, 4), np.float32)}, r"x_train: is float32 \(2, 4, 4\); images must be uint8"),
        ({"x_train": np.uint8(3)}, "x_train: is a single number"),
        ({"c": np.zeros(3)}, "no array is uint8 with 3 or 4 axes, as images are; it has c: float64"),
        ({"x_train": noise(0, 2, 4, 4), "y_train": np.zeros(3, int)}, "y_train: .* are no labels of 2 images"),
        ({"x_train": noise(0, 2, 4, 4), "y_train": np.zeros((2, 9), int)}, "y_train: .* are no labels of 2 images"),
        ({"x_train": noise(0, 2, 4, 4), "y_train": np.array([1, 0.5])}, r"y_train: the label 0\.5 is not whole"),
        ({"x_train": noise(0, 2, 4, 4), "y_train": np.full(2, np.nan)}, "y_train: the label nan is not whole"),
        ({"x_train": noise(0, 2, 4, 4), "y_train": np.full(2, 2.0**63)}, "y_train: .* does not fit in int64"),
        (
            {"x_train": noise(0, 2, 4, 4), "y_train": np.array(["a", "b"])},
            "y_train: the labels are <U1; a class number",
        ),
        ({"x_train": noise(0, 2, 4, 4), "y_train": np.zeros(2, complex)}, "y_train: the labels are complex128"),
        (
            {"x_train": noise(0, 2, 4, 4), "y_train": np.full(2, 2**63, "u8")},
            "label 9223372036854775808 .* does not fit",
        ),
        ({"images": np.zeros(2, [("a", "u1")])}, "no array is uint8"),
    ],
)
def test_arrays_that_are_no_images(arrays: dict, saying: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=saying):
        opened(tmp_path, npz_bytes(arrays))


def test_imagenet_parts(tmp_path: Path) -> None:
    arrays, pixels, labels = imagenet_part(0, 5, size=16)
    images = opened(tmp_path, npz_bytes(arrays), name="train_data_batch_3.npz")
    assert torch.equal(images.pixels, torch.from_numpy(pixels))
    assert torch.equal(images.labels, torch.from_numpy(labels))
    for wrong in (0, 1001):
        with pytest.raises(DataError, match=rf"labels: the label {wrong} is not in 1 to 1000"):
            opened(tmp_path, npz_bytes({**arrays, "labels": np.array([5, 6, wrong, 7, 8])}))
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "train_data_batch_1.npz").write_bytes(npz_bytes(arrays))
    (folder / "train_data_batch_2.npz").write_bytes(npz_bytes(imagenet_part(1, 2, size=8)[0]))
    with pytest.raises(DataError, match="parts: its parts hold images of several sizes"):
        open_images(folder)
    (folder / "train_data_batch_2.npz").write_bytes(npz_bytes({"data": noise(0, 2, 3072)}))
    with pytest.raises(DataError, match=r"train_data_batch_2\.npz: has no data .* it has data: uint8 \(2, 3072\)"):
        open_images(folder)


# Files that lie -------------------------------------------------------------------------------------------------------


def npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


@pytest.mark.parametrize(
    ("content", "saying"),
    [
        (
            npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 4)}", bytes(31)),
            "but 31 follow",
        ),
        (
            npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 4)}", bytes(33)),
            "but 33 follow",
        ),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -4, 4)}", bytes(32)), "impossible shape"),
        (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (True, 4, 4)}", bytes(16)), "impossible shape"),
        (npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**62}, {2**62}, 4)}}"), "but 0 follow"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 4, 4)}", bytes(256)), "holds Python objects"),
        (npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (2,)}", bytes(16)), "holds Python objects"),
        (npy("{'descr': '|u1', 'fortran_order': False}"), "is no array of numpy"),
        (npy("__import__('os').mkdir('made')"), "is no array of numpy"),
        (npy("(" * 117), "is no array of numpy"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "its header claims 4,294,967,295 bytes"),
        (b"\x93NUMPY\x01\x00", "ends after 8 bytes"),
        (b"\x93NUMPY\x07\x00\x01\x00a", r"version \(7, 0\)"),
    ],
)
def test_headers_that_lie(content: bytes, saying: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"set\.npy: .*{saying}"):
        opened(tmp_path, content, name="set.npy")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", content)
    with pytest.raises(DataError, match=rf"set\.npz, x_train: .*{saying}"):
        opened(tmp_path, packed.getvalue())
    assert not (tmp_path / "made").exists()


METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]


def directory_field(content: bytes, offset: int, value: int, form: str = "<I") -> bytes:
    """A zip file whose directory has another value at an offset within the entry of its (only) member."""
    changed = bytearray(content)
    struct.pack_into(form, changed, content.rindex(b"PK\x01\x02") + offset, value)
    return bytes(changed)


@pytest.mark.parametrize("method", METHODS)
def test_directories_that_lie(method: int, tmp_path: Path) -> None:
    content = npz_bytes({"images": noise(0, 3, 8, 8, 3)}, method)
    (info,) = zipfile.ZipFile(io.BytesIO(content)).infolist()
    for offset, value, saying in (
        (24, info.file_size + 1, r"take 576 bytes, but 577 follow"),
        (24, info.file_size - 1, r"Bad CRC-32|take 576 bytes, but 575 follow"),
        (24, 50, r"set\.npz, images: "),
        (24, 2**32 - 2, r"decompression bomb|take 576 bytes, but"),
        (20, info.compress_size - 9, r"set\.npz, images: .*(fewer bytes|damaged)"),
        (20, 2**31, r"reach beyond the end of the file"),
        (16, info.CRC ^ 1, r"Bad CRC-32|the checksum does not fit"),
        (42, 7, r"cannot be opened: Bad magic number"),
        (42, 2**31, r"reach beyond the end of the file"),
    ):
        with pytest.raises(DataError, match=saying):
            opened(tmp_path, directory_field(content, offset, value))
    with pytest.raises(DataError, match=r"is encrypted"):
        opened(tmp_path, directory_field(content, 8, 1, "<H"))
    with pytest.raises(DataError, match=r"is compressed by method 12; stored, deflated and LZMA"):
        opened(tmp_path, directory_field(content, 10, zipfile.ZIP_BZIP2, "<H"))


def test_members_of_one_name_and_none(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.npy", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", b"")
    with pytest.raises(DataError, match=r"set\.npz: has two arrays of one name"):
        opened(tmp_path, packed.getvalue())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("notes.txt", b"")
    with pytest.raises(DataError, match=r"set\.npz: is a zip file without arrays"):
        opened(tmp_path, packed.getvalue())


def peak_of_refusal(path: Path, saying: str) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=saying):
            open_images(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_member_that_expands_without_end(method: int, tmp_path: Path) -> None:
    """Zeros in a few kilobytes: 68 MiB that the directory declares and 32 MiB that it does not. None are unpacked."""
    content = npz_bytes({"images": np.zeros((2**16, 33, 33), np.uint8)}, method)
    assert len(content) < 2**19
    (tmp_path / "bomb.npz").write_bytes(content)
    assert peak_of_refusal(tmp_path / "bomb.npz", "refused as a decompression bomb") < 2**24
    header = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 64, 64)}")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        archive.writestr("images.npy", header + bytes(2**25))
    lying = directory_field(packed.getvalue(), 24, len(header) + 2 * 64 * 64)
    (tmp_path / "bomb.npz").write_bytes(lying)
    assert peak_of_refusal(tmp_path / "bomb.npz", "more bytes than|Bad CRC-32|checksum does not fit") < 2**24


def test_members_that_hold_more_than_the_directory_says(tmp_path: Path) -> None:
    """The directory's length and checksum are those of an array, after which the packed bytes go on."""
    pixels = noise(0, 3, 6, 6)
    array = npz_bytes({"x": pixels}, zipfile.ZIP_STORED)
    with zipfile.ZipFile(io.BytesIO(array)) as archive:
        member = archive.read("x.npy")
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", method) as archive:
            archive.writestr("x.npy", member + b"more")
        changed = bytearray(packed.getvalue())
        directory = changed.rindex(b"PK\1\2")
        changed[directory + 16 : directory + 20] = struct.pack("<I", zlib.crc32(member))
        changed[directory + 24 : directory + 28] = struct.pack("<I", len(member))
        with pytest.raises(DataError, match=r"set\.npz, x: damaged after .*: more bytes than the .* of the directory"):
            opened(tmp_path, bytes(changed))


def test_compressed_bytes_that_belong_to_nothing(tmp_path: Path) -> None:
    content = npz_bytes({"x": noise(0, 3, 6, 6)})
    local, directory = content.index(b"x.npy") + 5, content.rindex(b"PK\1\2")
    (size,) = struct.unpack_from("<I", content, directory + 20)
    changed = bytearray(content[: local + size] + b"more" + content[local + size :])
    changed[directory + 4 + 20 : directory + 4 + 24] = struct.pack("<I", size + 4)
    end = changed.rindex(b"PK\5\6")
    changed[end + 16 : end + 20] = struct.pack("<I", directory + 4)
    with pytest.raises(DataError, match="more compressed bytes than belong to it"):
        opened(tmp_path, bytes(changed))


def test_a_directory_that_has_lost_arrays(tmp_path: Path) -> None:
    """Without its name or behind a long comment an array would be missing, and x_test be taken for the set."""
    content = npz_bytes(npz_files()[0])
    first = content.index(b"PK\1\2")
    for place, value, saying in (
        (first + 46 + len("x_train."), b"\0", "File name in directory"),
        (first + 33, b"\1", "its directory has 1 of 4 members"),
    ):
        changed = bytearray(content)
        changed[place : place + 1] = value
        with pytest.raises(DataError, match=f"is no complete zip file: {saying}"):
            opened(tmp_path, bytes(changed))


def test_packed_again_by_a_desktop(tmp_path: Path) -> None:
    """With the folder's name before each array, and files of the desktop's own."""
    arrays, splits = npz_files()
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(npz_bytes(arrays))) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        target.writestr("faces/", b"")
        for info in source.infolist():
            target.writestr(f"faces/{info.filename}", source.read(info))
            target.writestr(f"__MACOSX/faces/._{info.filename}", b"?")
        target.writestr("faces/.DS_Store", b"?")
    images = opened(tmp_path, packed.getvalue())
    assert torch.equal(images.pixels, torch.from_numpy(splits["train"][0]))
    assert torch.equal(images.labels, torch.from_numpy(splits["train"][1]))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as target:
        target.writestr("pets/cats/a.png", b"?")
    with pytest.raises(DataError, match=r"without arrays .* unpack it and give the folder"):
        opened(tmp_path, packed.getvalue())
