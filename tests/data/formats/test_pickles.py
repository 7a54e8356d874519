"""Pickles: arrays and plain containers come back, and no program in a pickle is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastebm.data import DataError, open_images
from fastebm.data.formats.pickles import read_pickle
from tests.data.image_files import WRITERS, noise, npz_bytes


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "content",
    [
        {"a": 1, "b": [-1, 2**40, True, None, 1.5], "c": ("text", ()), 7: {}},
        [],
        "é",
        [[[]]] * 3,
        list(range(2000)),
    ],
)
def test_plain_data_come_back(content: Any, protocol: int) -> None:
    assert read_pickle("p", pickle.dumps(content, protocol)) == content


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["u1", "<i4", ">i8", "f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back(dtype: str, order: Any, protocol: int) -> None:
    array = np.asarray(noise(0, 3, 5, 2).astype(dtype), order=order)
    content = read_pickle("p", pickle.dumps({"data": array, "again": array}, protocol))
    assert content["data"].dtype == array.dtype
    assert np.array_equal(content["data"], array)
    assert np.array_equal(content["again"], array)


def test_bytes_come_back_as_text() -> None:
    for protocol in (2, 3, 4, 5):
        assert read_pickle("p", pickle.dumps({b"key": b"\xff\0"}, protocol)) == {"key": "\xff\0"}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def hostile(path: Path) -> dict[str, bytes]:
    """Programs that make a folder at `path`, by every instruction that calls something."""
    name = str(path).encode()
    line, text = name + b"\n", b"X" + len(name).to_bytes(4, "little") + name
    programs = {f"protocol {protocol}": pickle.dumps(Touch(path), protocol) for protocol in range(6)}
    return programs | {
        "in a dict": pickle.dumps({"data": [Touch(path)], "labels": []}),
        "before an innocent object": b"cos\nmkdir\n(V" + line + b"tR0" + pickle.dumps({})[2:],
        "INST": b"(V" + line + b"ios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\nV" + line + b"o.",
        "NEWOBJ": b"\x80\x02cos\nmkdir\n" + text + b"\x85\x81.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + text + b"\x85R.",
        "getattr": b"c__builtin__\ngetattr\n(cos\nmkdir\nV__call__\ntRV" + line + b"\x85R.",
        "numpy's own loader": b"cnumpy\nload\n(V" + line + b"tR.",
        "a state for what is no array": b"c_codecs\nencode\n}V__call__\ncos\nmkdir\nsb.",
    }


@pytest.mark.parametrize("name", hostile(Path("x")))
def test_no_code_runs(name: str, tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(DataError, match="p: is no pickle of arrays and plain containers"):
        read_pickle("p", hostile(target)[name])
    assert not target.exists()


def test_the_programs_are_hostile(tmp_path: Path) -> None:
    """The standard unpickler does run them; or the test above would show nothing."""
    ran = 0
    for number, name in enumerate(hostile(tmp_path)):
        target = tmp_path / str(number)
        try:
            pickle.loads(hostile(target)[name])
        except Exception:
            continue
        ran += target.exists()
    assert ran >= 12


def test_no_code_runs_out_of_a_data_set(tmp_path: Path) -> None:
    target = tmp_path / "made"
    written = WRITERS["cifar10-python"](tmp_path)
    for name in ("data_batch_1", "batches.meta"):
        before = (written.path / name).read_bytes()
        (written.path / name).write_bytes(pickle.dumps(Touch(target), 2))
        with pytest.raises(DataError, match=rf"{name}: .*posix\.mkdir|nt\.mkdir"):
            open_images(written.path)
        (written.path / name).write_bytes(before)
    objects = np.empty(2, dtype=object)
    objects[:] = Touch(target)
    for arrays in ({"x_train": objects}, {"x_train": noise(0, 2, 4, 4), "y_train": objects}, {"images": objects}):
        (tmp_path / "set.npz").write_bytes(npz_bytes(arrays))
        with pytest.raises(DataError, match=r"Python objects, which are never unpickled|no array is uint8"):
            open_images(tmp_path / "set.npz")
    np.save(tmp_path / "set.npy", objects, allow_pickle=True)
    with pytest.raises(DataError, match=r"set\.npy: holds Python objects"):
        open_images(tmp_path / "set.npy")
    assert not target.exists()


def array_state(shape: bytes, code: bytes, content: bytes, again: int = 1) -> bytes:
    """An array's program, with `again` copies that share the bytes."""
    dtype = b"cnumpy\ndtype\nX" + len(code).to_bytes(4, "little") + code + b"\x89\x88\x87Rq\x01"
    raw = b"B" + len(content).to_bytes(4, "little") + content + b"q\x02"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    first = empty + b"(K\x01" + shape + dtype + b"\x89" + raw + b"tb"
    return b"\x80\x03](" + first + (empty + b"(K\x01" + shape + b"h\x01\x89h\x02tb") * (again - 1) + b"e."


def test_array_programs_are_as_meant() -> None:
    array = read_pickle("p", b"\x80\x03" + array_state(b"K\x03\x85", b"u1", b"abc")[4:-2] + b".")
    assert array.tolist() == [97, 98, 99]


@pytest.mark.parametrize(
    ("program", "saying"),
    [
        (array_state(b"K\x04\x85", b"u1", b"abc"), "comes with 3 bytes"),
        (array_state(b"J\xff\xff\xff\xff\x85", b"u1", b"abc"), "impossible shape"),
        (array_state(b"(" + b"K\x01" * 9 + b"t", b"u1", b"a"), "impossible shape"),
        (array_state(b"K\x01", b"u1", b"a"), "no type or no shape"),
        (array_state(b"K\x01\x85", b"O8", b"abcdefgh"), "'O8' is not one of numbers"),
        (array_state(b"K\x01\x85", b"V8", b"abcdefgh"), "'V8' is not one of numbers"),
        (array_state(b"M\x10\x27\x85", b"u1", bytes(10000), again=50), "arrays are larger than the file"),
        (b"\x80\x02}(K\x01\x85K\x02u.", "neither text nor number"),
        (b"\x80\x02(K\x01.", "does not end with a single object"),
        (b"\x80\x02(.", "unexpected MARK"),
        (b"\x80\x02e.", "a mark is missing"),
        (b"\x80\x02K\x01(a.", "unexpected MARK"),
        (b"\x80\x02}K\x01a.", "no attribute 'append'"),
        (b"\x80\x02}(K\x01u.", "odd number of items"),
        (b"\x80\x02K\x01K\x02R.", "argument list must be a tuple"),
        (b"\x80\x02cnumpy\nndarray\n.", "no plain data"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(tR.", "makes an array in an unknown way"),
        (b"\x80\x02}}b.", "no attribute '__dict__'"),
        (b"\x80\x02h\x05.", "5"),
        (b"\x80\x02(q\x01.", "unexpected MARK"),
        (b"\x80\x02a.", "stack underflow"),
        (b"\x80\x02\x8a\x09" + b"\x01" * 9 + b".", "a number is too large"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "a number is too large"),
        (b"c_codecs\nencode\n}V__dict__\nI1\nsb.", "sets a state of what is no array"),
        (b"\x80\x02N2.", "the instruction DUP is not one of plain data"),
        (b"P1\n.", "PERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02T\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
        (b"\x80\x02", "pickle exhausted before"),
        (b"", "pickle exhausted before"),
        (b"\x80\x02" + b"N" * 2_000_001 + b".", "more than 2,000,000 instructions"),
    ],
)
def test_what_is_no_plain_data(program: bytes, saying: str) -> None:
    with pytest.raises(DataError, match=saying):
        read_pickle("p", program)


def test_deep_nesting_is_no_recursion() -> None:
    depth = 100_000
    nested = read_pickle("p", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
    for _ in range(depth - 1):
        (nested,) = nested
    assert nested == []
    with pytest.raises(DataError, match="neither text nor number"):
        read_pickle("p", b"\x80\x02})" + b"\x85" * depth + b"Ns.")


@pytest.mark.parametrize(("pair", "kind"), [(b"h\0h\0\x86", "tuple"), (b"(h\0h\0l", "list")])
def test_objects_that_contain_another_twice_take_no_time(pair: bytes, kind: str) -> None:
    """Of 200 objects, each of which contains the one before twice, the last would take 2^200 steps to hash or print."""
    last = b"\x80\x02(Nq\0" + (pair + b"q\0") * 200 + b"t"
    with pytest.raises(DataError, match="neither text nor number"):
        read_pickle("p", last + b"}h\0Ns\x86.")
    with pytest.raises(DataError, match=f"an array of type {kind} is not one of numbers"):
        read_pickle("p", last + b"cnumpy\ndtype\nh\0\x85R\x86.")
