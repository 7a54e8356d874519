"""Every format, written in small sets and read back exactly; damaged and unknown files are refused with their name."""

from __future__ import annotations

import doctest
import gzip
import importlib
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastebm.data import DataError, image_format, open_images
from fastebm.data.formats.image_format import split_of
from tests.data.image_files import (
    WRITERS,
    Written,
    cifar10_files,
    cifar100_files,
    folder_of,
    idx,
    noise,
    python3_pickle,
    tar_of,
)


@pytest.mark.parametrize("name", WRITERS)
def test_comes_back_exactly(name: str, tmp_path: Path) -> None:
    written = WRITERS[name](tmp_path)
    for split, (pixels, labels) in written.splits.items():
        images = open_images(written.path, split=split or None)
        assert torch.equal(images.pixels, torch.from_numpy(pixels))
        assert (images.labels is None) == (labels is None)
        if labels is not None:
            assert torch.equal(images.labels, torch.from_numpy(labels))
        assert images.format == written.format.format(split)
        assert (images.name, images.split, images.classes) == (str(written.path), split, written.classes)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "pictures"])
def test_the_training_split_by_default_and_no_split_that_is_not_there(name: str, tmp_path: Path) -> None:
    written = WRITERS[name](tmp_path)
    assert open_images(str(written.path)).split == "train"
    with pytest.raises(DataError, match=rf"{written.path.name}: has no split 'night'; it has train, test"):
        open_images(written.path, split="night")


@pytest.mark.parametrize("name", WRITERS)
def test_size_and_channels_of_every_format(name: str, tmp_path: Path) -> None:
    images = open_images(WRITERS[name](tmp_path).path, size=4, channels=1)
    assert images.pixels.shape == (len(images), 1, 4, 4)


@pytest.mark.parametrize("files", [cifar10_files, cifar100_files])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_pickled_again_by_python_3(files: Callable, protocol: int, tmp_path: Path) -> None:
    content, splits = files(python3_pickle(protocol))
    folder_of(tmp_path / "py", content)
    images = open_images(tmp_path / "py")
    assert torch.equal(images.pixels, torch.from_numpy(splits["train"][0]))
    assert torch.equal(images.labels, torch.from_numpy(splits["train"][1]))


def test_a_tar_without_gzip_and_with_pax_headers(tmp_path: Path) -> None:
    """As Python's own tarfile writes them by default: every file is preceded by a header with its time."""
    files, splits = cifar10_files(None)
    folder_of(tmp_path / "bin", files)
    with tarfile.open(tmp_path / "cifar.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(tmp_path / "bin", "bin")
    assert b"mtime=" in (tmp_path / "cifar.tar").read_bytes()
    images = open_images(tmp_path / "cifar.tar")
    assert torch.equal(images.pixels, torch.from_numpy(splits["train"][0]))


def test_a_batch_that_begins_as_gzip_files_do(tmp_path: Path) -> None:
    """The first two pixels of STL-10's first image may be 0x1f and 0x8b by chance."""
    written = WRITERS["stl10"](tmp_path)
    path = written.path / "unlabeled_X.bin"
    path.write_bytes(b"\x1f\x8b" + path.read_bytes()[2:])
    assert open_images(written.path, split="unlabeled").pixels[0, 0, :2, 0].tolist() == [0x1F, 0x8B]


def test_the_classes_of_cifar_may_be_missing(tmp_path: Path) -> None:
    written = WRITERS["cifar10-binary"](tmp_path)
    (written.path / "batches.meta.txt").unlink()
    assert open_images(written.path).classes == ()


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_single_idx_file(end: str, tmp_path: Path) -> None:
    written = WRITERS["mnist-gz" if end else "mnist"](tmp_path)
    images = open_images(written.path / f"t10k-images-idx3-ubyte{end}")
    assert images.split == "test"
    assert torch.equal(images.labels, torch.from_numpy(written.splits["test"][1]))
    with pytest.raises(DataError, match="no split 'train'; it has test"):
        open_images(written.path / f"t10k-images-idx3-ubyte{end}", split="train")
    (tmp_path / "digits").write_bytes(idx(noise(0, 3, 5, 4)))
    images = open_images(tmp_path / "digits")
    assert (images.pixels.shape, images.labels, images.split) == ((3, 1, 5, 4), None, "")


def test_it_says_what_it_took(tmp_path: Path) -> None:
    written = WRITERS["cifar10-binary"](tmp_path)
    assert repr(open_images(written.path)).endswith(
        "cifar-10-batches-bin, train: CIFAR-10, binary version: 12 images of 3x32x32, 10 classes, 0.0 MiB"
    )


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module("fastebm.data.formats.open_images"))
    assert (results.failed, results.attempted > 0) == (0, True)


# Folders above, and other names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "cifar10-python", "stl10", "imagenet", "cifar10-binary"])
@pytest.mark.parametrize("above", ["", "raw", "MNIST/raw"])
def test_the_folder_above_is_enough(name: str, above: str, tmp_path: Path) -> None:
    """As torchvision's root: cifar-10-batches-py and stl10_binary in it, MNIST/raw and FashionMNIST/raw below."""
    written = WRITERS[name](tmp_path)
    root = tmp_path / "root"
    inner = root / above / written.path.name if above != "raw" else root / "raw"
    inner.parent.mkdir(parents=True, exist_ok=True)
    written.path.rename(inner)
    if above.count("/"):
        root /= "MNIST"
    (root / "._more").mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(b"the archive that was unpacked")
    for split, (pixels, _) in written.splits.items():
        images = open_images(root, split=split)
        assert torch.equal(images.pixels, torch.from_numpy(pixels))
        assert images.name == str(inner)
        assert split_of(root, split) == images.split
    assert image_format(root)[0] == written.splits["train"][0].shape[1]
    assert split_of(root) == open_images(root).split == "train"


def test_several_data_sets_below_are_named(tmp_path: Path) -> None:
    for name in ("MNIST", "FashionMNIST"):
        (tmp_path / name).mkdir()
        WRITERS["mnist"](tmp_path / name).path.rename(tmp_path / name / "raw")
    refused(tmp_path, "holds several data sets, give one: .*FashionMNIST/raw, .*MNIST/raw")
    refused(tmp_path, "holds several data sets", split="test")


def test_a_file_in_a_folder_is_found(tmp_path: Path) -> None:
    written = WRITERS["cifar10-binary-archive"](tmp_path)
    assert open_images(tmp_path).name == str(written.path)
    WRITERS["npz"](tmp_path)
    refused(tmp_path, r"holds several data sets, give one: .*cifar-10-binary\.tar\.gz, .*set\.npz")


def test_pictures_come_before_what_is_below(tmp_path: Path) -> None:
    written = WRITERS["pictures"](tmp_path)
    WRITERS["mnist"](written.path)
    with pytest.raises(DataError, match="no split 'train'; it has cats, dogs, mnist"):
        open_images(written.path, split="train")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_emnist_stands_upright_with_classes_from_0(end: str, tmp_path: Path) -> None:
    pack = gzip.compress if end else bytes
    pixels, labels = noise(0, 5, 28, 28), np.array([1, 26, 3, 2, 1], np.uint8)
    for kind in ("letters", "digits"):
        for split in ("train", "test"):
            stem = f"emnist-{kind}-{split}"
            (tmp_path / f"{stem}-images-idx3-ubyte{end}").write_bytes(pack(idx(pixels.swapaxes(1, 2))))
            (tmp_path / f"{stem}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels % 10)))
    for split in ("train", "test"):
        (tmp_path / f"emnist-letters-{split}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels)))
    refused(tmp_path, "no split 'train'; it has digits-train, digits-test, letters-train, letters-test")
    images = open_images(tmp_path, split="letters-test")
    assert np.array_equal(images.pixels[:, 0].numpy(), pixels)
    assert images.labels.tolist() == [0, 25, 2, 1, 0]
    assert open_images(tmp_path, split="digits-train").labels.tolist() == (labels % 10).tolist()
    for path in tmp_path.glob("emnist-digits*"):
        path.unlink()
    assert open_images(tmp_path).split == "train"
    images = open_images(tmp_path / f"emnist-letters-test-images-idx3-ubyte{end}")
    assert (images.split, np.array_equal(images.pixels[:, 0].numpy(), pixels)) == ("test", True)


def test_labels_of_qmnist(tmp_path: Path) -> None:
    pixels, labels = noise(0, 4, 28, 28), (np.arange(32).reshape(4, 8) * 1000).astype(">i4")
    labels[:, 0] = [7, 0, 9, 2]
    path = tmp_path / "qmnist-test-labels-idx2-int"
    (tmp_path / "qmnist-test-images-idx3-ubyte").write_bytes(idx(pixels))
    path.write_bytes(bytes([0, 0, 12, 2]) + struct.pack(">2I", 4, 8) + labels.tobytes())
    assert open_images(tmp_path).labels.tolist() == [7, 0, 9, 2]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="qmnist-test-labels-idx2-int: has 139 bytes, 140 are needed"):
        open_images(tmp_path)
    path.write_bytes(bytes([0, 0, 12, 2]) + struct.pack(">2I", 4, 7) + labels[:, :7].tobytes())
    with pytest.raises(DataError, match="has 4 labels of 7 numbers each, where 8 are needed, for 4 images"):
        open_images(tmp_path)


def test_pickled_parts_of_imagenet(tmp_path: Path) -> None:
    def write(name: str, seed: int, side: int = 4) -> None:
        content = {
            "data": noise(seed, 3, 3 * side * side),
            "labels": [1, 1000, seed],
            "mean": np.zeros(3 * side * side),
        }
        (tmp_path / name).write_bytes(pickle.dumps(content))

    write("train_data_batch_1", 1)
    write("train_data_batch_2", 2)
    images = open_images(tmp_path)
    assert torch.equal(images.pixels.flatten(1), torch.from_numpy(np.concatenate([noise(1, 3, 48), noise(2, 3, 48)])))
    assert images.labels.tolist() == [0, 999, 0, 0, 999, 1]
    assert image_format(tmp_path) == (3, 4, 4)
    refused(tmp_path / "train_data_batch_1", "part of a data set: give the folder")
    write("val_data", 5)
    assert len(open_images(tmp_path, split="test")) == 3
    write("train_data_batch_4", 4)
    with pytest.raises(DataError, match="without train_data_batch_3: incomplete"):
        open_images(tmp_path)
    write("train_data_batch_3", 3, side=8)
    with pytest.raises(DataError, match="parts hold images of several sizes"):
        open_images(tmp_path)
    assert len(open_images(tmp_path, size=2)) == 12


# What is wrong, by name -----------------------------------------------------------------------------------------------


def refused(path: Path, saying: str, **options) -> None:
    with pytest.raises(DataError, match=saying) as caught:
        open_images(path, **options)
    assert str(caught.value).startswith(str(path.parent)), "the message begins with the file's name"


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "missing", "missing: there is no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no data set that is known here, and no pictures")
    (tmp_path / "nothing").write_bytes(b"")
    refused(tmp_path / "nothing", "is empty")
    refused(tmp_path / ("n" * 5000), "cannot be read: .*File name too long")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes as files are a thing of Unix")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "neither a file nor a folder")
    refused(tmp_path, "pipe.png: is no file")


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Dear diary")
    refused(tmp_path / "notes.txt", "begins with 44 65 61 72 20 64 69 61, which is none of npz, npy, IDX, or a tar")
    (tmp_path / "notes.gz").write_bytes(gzip.compress(b"Dear diary"))
    refused(tmp_path / "notes.gz", "begins with 44 65 61 72 20 64 69 61 when unpacked, which is none of")
    for content in (b"<!DOCTYPE html>\n<html>", b"\n <html>", b"<HTML lang=en>"):
        for name in ("mnist.gz", "train-images-idx3-ubyte", "cifar.tar.gz", "set.npz"):
            (tmp_path / name).write_bytes(content)
            refused(tmp_path / name, "is a web page, not the file it should be: download it again$")
    (tmp_path / "page.gz").write_bytes(gzip.compress(b"<html>"))
    refused(tmp_path / "page.gz", r"is a web page, .* \(seen when unpacked\)")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"<!DOCTYPE html>")
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "train-images-idx3-ubyte.gz").rename(tmp_path / "folder" / "train-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: is a web page"):
        open_images(tmp_path / "folder")
    (tmp_path / "set.tar.xz").write_bytes(b"\xfd7zXZ\0")
    refused(tmp_path / "set.tar.xz", "is packed by xz: unpack it first")
    refused(WRITERS["pictures"](tmp_path).path / "cats" / "a.png", "is a single picture: give a folder")
    refused(WRITERS["cifar10-python"](tmp_path).path / "data_batch_1", "part of a data set: give the folder")


def test_a_tar_of_something_else(tmp_path: Path) -> None:
    tar_of(tmp_path / "else.tar.gz", {"a.txt": b"a"}, "else")
    refused(tmp_path / "else.tar.gz", "has none of the files of CIFAR-10, binary version, .*STL-10")


Damage = Callable[[Written], None]


def cut(name: str, by: int = 1) -> Damage:
    def damage(written: Written) -> None:
        path = written.path / name if name else written.path
        path.write_bytes(path.read_bytes()[:-by])

    return damage


def longer(name: str) -> Damage:
    return lambda written: (written.path / name).write_bytes((written.path / name).read_bytes() + b"\0")


def without(name: str) -> Damage:
    return lambda written: (written.path / name).unlink()


def put(name: str, content: bytes) -> Damage:
    return lambda written: (written.path / name).write_bytes(content)


def set_byte(name: str, position: int, value: int) -> Damage:
    def damage(written: Written) -> None:
        content = bytearray((written.path / name).read_bytes())
        content[position] = value
        (written.path / name).write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "saying"),
    [
        ("npz", cut(""), r"set\.npz: is no complete zip file"),
        ("npz", lambda w: w.path.write_bytes(w.path.read_bytes()[:200]), r"set\.npz: is no complete zip file"),
        ("imagenet", without("train_data_batch_4.npz"), r"train_data_batch_4\.npz is missing"),
        ("imagenet", put("train_data_batch_4.npz", b"PK"), r"train_data_batch_4\.npz: is no complete zip file"),
        ("cifar10-binary", cut("data_batch_3.bin"), r"data_batch_3\.bin: 6,145 bytes are not a multiple of the 3,073"),
        ("cifar10-binary", without("data_batch_3.bin"), r"CIFAR-10, binary version without data_batch_3\.bin"),
        ("cifar10-binary", set_byte("data_batch_2.bin", 0, 10), r"data_batch_2\.bin: the label 10 is not in 0 to 9"),
        ("cifar10-binary", put("batches.meta.txt", b"a\nb"), r"batches\.meta\.txt: names 2 classes, .* has 10"),
        ("cifar10-binary", put("data_batch_1.bin", b""), r"data_batch_1\.bin: 0 bytes"),
        ("cifar10-python", cut("data_batch_3"), "data_batch_3: .*pickle"),
        (
            "cifar10-python",
            put("data_batch_3", pickle.dumps([1])),
            "data_batch_3: holds a list, where a dict is needed",
        ),
        ("cifar10-python", put("data_batch_3", pickle.dumps({"data": 1})), "data_batch_3: has no uint8 array"),
        (
            "cifar10-python",
            put("data_batch_3", pickle.dumps({"data": noise(0, 2, 3072), "labels": [1]})),
            "data_batch_3: has no list of 2 integers under 'labels'",
        ),
        ("cifar10-python", put("batches.meta", pickle.dumps({"label_names": 3})), "no list of names"),
        ("cifar10-binary-archive", cut("", 30), r"cifar-10-binary\.tar\.gz: damaged after .* bytes"),
        ("stl10", cut("train_X.bin"), r"train_X\.bin: .* are not a multiple of the 27,648"),
        ("stl10", cut("train_y.bin"), r"stl10_binary: has 3 images but 2 labels of split 'train'"),
        ("stl10", set_byte("train_y.bin", 1, 0), r"train_y\.bin: the label 0 is not in 1 to 10"),
        ("stl10", without("train_y.bin"), r"without train_y\.bin"),
        ("mnist", cut("train-images-idx3-ubyte"), "train-images-idx3-ubyte: has 5,503 bytes, 5,504 are needed"),
        ("mnist", longer("train-images-idx3-ubyte"), "train-images-idx3-ubyte: more follows"),
        ("mnist", longer("train-labels-idx1-ubyte"), "train-labels-idx1-ubyte: more follows"),
        ("mnist", cut("train-labels-idx1-ubyte"), "train-labels-idx1-ubyte: has 14 bytes, 15 are needed"),
        ("mnist", set_byte("train-images-idx3-ubyte", 2, 13), "begins with 00000d03, not with 00000803 as images"),
        ("mnist", put("train-labels-idx1-ubyte", idx(noise(0, 6))), "has 6 labels for 7 images"),
        ("mnist-gz", cut("train-images-idx3-ubyte.gz"), r"train-images-idx3-ubyte\.gz: damaged after"),
        ("mnist-gz", set_byte("train-images-idx3-ubyte.gz", -6, 1), r"train-images-idx3-ubyte\.gz: damaged after"),
        ("pictures", cut("dogs/c.tiff"), r"dogs/c\.tiff: "),
        ("pictures", cut("cats/a.png", 40), r"cats/a\.png: damaged picture"),
        ("pictures", put("cats/a.png", b"Dear diary"), r"cats/a\.png: is no picture that can be read"),
    ],
)
def test_damaged_and_mislabelled_files(name: str, damage: Damage, saying: str, tmp_path: Path) -> None:
    written = WRITERS[name](tmp_path)
    damage(written)
    with pytest.raises(DataError, match=saying) as caught:
        open_images(written.path)
    assert str(caught.value).startswith(str(written.path))


def test_arguments(tmp_path: Path) -> None:
    path = WRITERS["mnist"](tmp_path).path
    for options in ({"size": 0}, {"crop": -1}, {"channels": 2}, {"fit": "stretch"}, {"max_bytes": 0}, {"key": "x"}):
        with pytest.raises(ValueError, match=next(iter(options))) as caught:
            open_images(path, **options)
        assert not isinstance(caught.value, DataError)


def test_memory_is_limited(tmp_path: Path) -> None:
    path = WRITERS["mnist"](tmp_path).path
    refused(path, "7 images of 1x28x28 take 5,488 bytes of memory, more than max_bytes = 5,487", max_bytes=5487)
    assert open_images(path, max_bytes=5488).pixels.numel() == 5488
    assert open_images(path, size=14, max_bytes=1372).pixels.numel() == 1372


# The real sets --------------------------------------------------------------------------------------------------------

REAL = Path(os.environ.get("FASTEBM_TEST_DATA") or Path(__file__).resolve().parents[3].parent / "shared" / "data")


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("mnist.npz", {"split": "test", "size": 32, "fit": "pad"}, (10_000, 1, 32, 32)),
        ("cifar10_lossless.npz", {"split": "test"}, (1_017, 3, 32, 32)),
        ("cifar100_partial.npz", {"key": "x_train_jpeg75"}, (486, 3, 32, 32)),
        ("svhn_partial.npz", {"channels": 1}, (1_083, 1, 32, 32)),
        ("noto_emoji64.npz", {"split": "test"}, (300, 3, 64, 64)),
    ],
)
def test_real_sets(name: str, options: dict, shape: tuple[int, ...]) -> None:
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not here: FASTEBM_TEST_DATA names the folder with the real image sets")
    images = open_images(REAL / name, **options)
    assert images.pixels.shape == shape
    with np.load(REAL / name) as arrays:
        stored = arrays[options.get("key") or f"x_{images.split}"]
    if "channels" not in options:
        inner = images.pixels[:, :, 2:-2, 2:-2] if "fit" in options else images.pixels
        assert np.array_equal(inner.numpy().transpose(0, 2, 3, 1), stored)
