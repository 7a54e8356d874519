"""Many samples to files: the sampler's own, the same after kills and for any number of processes."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastebm.cli import main
from fastebm.data import open_images, to_pixels
from fastebm.runs.folder import RunFolder
from fastebm.sampling.cascade import LevelSampler
from fastebm.tasks import generate
from fastebm.tasks.generation.files import ArrayFile, PictureFolder, Request
from fastebm.training import CoarseToFineRun, RunError
from tests.tasks.generation.stopping import StopError, stop_after

ROOT = Path(__file__).resolve().parents[3]


def digests(path: Path) -> dict[str, str]:
    """Of all files of an output, hidden ones too, but not of its numbers, which have the time; names begin at it."""
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    files = [file for file in files if file.name != "numbers.json"]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def expected(run: Path, count: int, seed: int | None = None) -> torch.Tensor:
    return to_pixels(CoarseToFineRun.load(run).sample(count, seed))


@pytest.fixture(scope="module")
def fused_run(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with the engine that people get by default."""
    run = tmp_path_factory.mktemp("runs") / "fused"
    shutil.copytree(digits_run, run)
    config = json.loads((run / "config.json").read_text())
    config["config"]["engine"] = "fused"
    (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.mark.parametrize("seed", [None, 3])
def test_an_array_has_the_samples_of_the_run(fused_run: Path, tmp_path: Path, seed: int | None) -> None:
    made = generate(fused_run, 11, tmp_path / "a.npz", seed=seed, chunk=4)
    assert made.drawn == 11
    with np.load(tmp_path / "a.npz") as archive:
        images = archive["images"]
    assert (images.shape, images.dtype) == ((11, 8, 8, 1), np.uint8)
    assert torch.equal(torch.from_numpy(images).permute(0, 3, 1, 2), expected(fused_run, 11, seed))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.npz.json"]


def test_bytes_are_rounded_and_clamped() -> None:
    values = torch.tensor([-1.2, -1.0, -0.997, 0.0, 0.25, 1.0, 1.3])
    assert to_pixels(values).tolist() == [round((max(-1, min(1, x)) + 1) * 127.5) for x in values.tolist()]


def test_pictures_are_read_back_as_the_same_bytes(digits_run: Path, tmp_path: Path) -> None:
    generate(digits_run, 11, tmp_path / "pictures", chunk=4)
    names = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    assert names == [f"{number:06d}.png" for number in range(11)]
    images = open_images(tmp_path / "pictures")
    assert torch.equal(images.pixels, expected(digits_run, 11))
    assert Image.open(tmp_path / "pictures" / "000003.png").mode == "L"


def test_colours_are_colours(tmp_path: Path) -> None:
    output = PictureFolder(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    request = Request(0, "", {}, 0, 0, count=3, chunk=8, channels=3, size=4)
    with output.begun(request, overwrite=False):
        output.write(request, 0, pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "000002.png")), pixels[2])


def test_a_grid_shows_all(digits_run: Path, tmp_path: Path) -> None:
    generate(digits_run, 130, tmp_path / "grid.png", chunk=50)
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert picture.shape == ((11 * 9 + 1) * 4, (12 * 9 + 1) * 4, 3)  # 12 columns, 11 rows, lines, enlarged four times
    last = expected(digits_run, 130)[129, 0].int().numpy()  # at row 10, column 9
    shown = picture[10 * 36 + 4 : 10 * 36 + 36 : 4, 9 * 36 + 4 : 9 * 36 + 36 : 4, 0].astype(int)
    assert np.abs(shown - last).max() <= 1  # matplotlib cuts where we round


@pytest.mark.parametrize("name", ["out", "out.npz", "out.png"])
def test_a_call_that_failed_goes_on_and_ends_with_the_same_files(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole, broken = tmp_path / "whole" / name, tmp_path / "broken" / name
    whole.parent.mkdir()
    broken.parent.mkdir()
    generate(digits_run, 23, whole, chunk=4)
    drawn: list[int] = []
    sample = LevelSampler.sample

    def counted(self: LevelSampler, count: int, *arguments: Any, **options: Any) -> torch.Tensor:
        if len(drawn) == 3:
            raise StopError
        drawn.append(count)
        return sample(self, count, *arguments, **options)

    monkeypatch.setattr(LevelSampler, "sample", counted)
    with pytest.raises(StopError):
        generate(digits_run, 23, broken, chunk=4)
    monkeypatch.undo()
    assert drawn == [4, 4, 4]
    assert generate(digits_run, 23, broken, chunk=4).drawn == 23 - 12
    assert digests(broken) == digests(whole)


def test_several_processes_make_the_same_files(fused_run: Path, tmp_path: Path) -> None:
    generate(fused_run, 23, tmp_path / "one", chunk=4)
    assert generate(fused_run, 23, tmp_path / "two", chunk=4, processes=2).drawn == 23
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_killed_and_taken_up_it_ends_with_the_same_files(digits_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = ["generate", str(digits_run), "--count", "60000", "--chunk", "20", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastebm", *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    marks = out / ".generate"
    while process.poll() is None and len(list(marks.glob("*.done"))) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    done = len(list(marks.glob("*.done")))
    assert 5 <= done < 3000

    # The rest of 60,000 would take too long here: the same request for a few chunks more than are done.
    count = 20 * (done + 4) - 7
    request = json.loads((marks / "request.json").read_text())
    (marks / "request.json").write_text(json.dumps(request | {"count": count}))
    for path in out.glob("*.png"):  # beyond that, what the kill left of the chunks at hand
        if int(path.stem) >= count:
            path.unlink()
    for path in marks.glob("*.done"):
        if int(path.stem.removeprefix("chunk-")) >= done + 3:
            path.unlink()
    assert generate(digits_run, count, out, chunk=20).drawn == 20 * 4 - 7
    generate(digits_run, count, tmp_path / "whole", chunk=20)
    there, whole = digests(out), digests(tmp_path / "whole")
    note = ".generate/request.json"
    assert json.loads((out / note).read_text()) == json.loads((tmp_path / "whole" / note).read_text())
    del there[note], whole[note]
    assert there == whole


def test_what_processes_say_is_passed_on() -> None:
    """How many samples were written, errors, and that one ended without a word."""
    follow = sys.modules["fastebm.tasks.generation.generate"]._follow  # type: ignore[attr-defined]
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    written: list[int] = []
    for said, (_, sender) in zip(((4, 4, None), (3, None)), pipes, strict=True):
        for word in said:
            sender.send(word)
        sender.close()
    follow([receiver for receiver, _ in pipes], written.append)
    assert sorted(written) == [3, 4, 4]

    receiver, sender = multiprocessing.Pipe(duplex=False)
    sender.send(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        follow([receiver], written.append)
    sender.close()
    with pytest.raises(RunError, match="was killed"):
        follow([receiver], written.append)


def test_samples_that_are_not_finite_are_an_error(digits_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "run")
    checkpoints = RunFolder.existing(tmp_path / "run").checkpoints
    newest = checkpoints.load_newest()
    assert newest is not None
    # Finite weights, as those that are not are refused before, whose energies overflow.
    tensors = {name: tensor.sign() * 1e38 for name, tensor in newest.tensors.items() if tensor.is_floating_point()}
    checkpoints.save(newest.iteration, newest.tensors | tensors, newest.state)
    with pytest.raises(RunError, match="are not finite"):
        generate(tmp_path / "run", 8, tmp_path / "out.npz", chunk=4)
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("name", ["out", "out.npz", "out.png"])
def test_a_finished_call_is_not_repeated_nor_overwritten(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / name
    generate(digits_run, 5, out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert generate(digits_run, 5, out).drawn == 0
    assert main(["generate", str(digits_run), "--count", "5", "--out", str(out)]) == 0
    assert f"{out}: all 5 samples were there before" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"count is 5 there and 6 here.*--overwrite"):
        generate(digits_run, 6, out)
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        generate(digits_run, 5, out, seed=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert generate(digits_run, 5, out, overwrite=True).drawn == 5
    assert generate(digits_run, 3, out, seed=1, overwrite=True).drawn == 3
    if name != "out.png":
        assert torch.equal(open_images(out).pixels, expected(digits_run, 3, 1))


def test_a_file_that_is_another_one_by_now_is_not_taken_for_finished(digits_run: Path, tmp_path: Path) -> None:
    generate(digits_run, 5, tmp_path / "out.npz")
    (tmp_path / "out.npz").write_bytes(b"of mine")
    with pytest.raises(ValueError, match="exists: --overwrite"):
        generate(digits_run, 5, tmp_path / "out.npz")
    (tmp_path / "out.npz").unlink()
    with pytest.raises(ValueError, match=r"out.npz.json exists: --overwrite"):
        generate(digits_run, 5, tmp_path / "out.npz")
    assert generate(digits_run, 5, tmp_path / "out.npz", overwrite=True).drawn == 5


@pytest.mark.parametrize("suffix", [".npz", ".png"])
def test_a_file_of_the_same_size_with_other_bytes_is_another_one(digits_run: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    generate(digits_run, 5, out)
    content = out.read_bytes()
    generate(digits_run, 5, tmp_path / "other.npz", seed=1)
    other = (tmp_path / "other.npz").read_bytes() if suffix == ".npz" else content[:-20] + bytes(20)
    assert len(other) == len(content)
    out.write_bytes(other)
    with pytest.raises(ValueError, match="exists: --overwrite"):
        generate(digits_run, 5, out)
    assert out.read_bytes() == other
    out.write_bytes(content)
    assert generate(digits_run, 5, out).drawn == 0


@pytest.mark.parametrize("damage", ["cut", "bit", "exchanged", "gone", "mark"])
def test_the_chunks_of_damaged_pictures_are_drawn_again(digits_run: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    generate(digits_run, 11, out, chunk=4)
    before = digests(out)
    picture = out / "000005.png"
    content = picture.read_bytes()
    if damage == "cut":
        picture.write_text("x")
    elif damage == "bit":
        picture.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    elif damage == "exchanged":
        picture.write_bytes((out / "000000.png").read_bytes())
    elif damage == "gone":
        picture.unlink()
    else:
        (out / ".generate" / "chunk-000001.done").write_bytes(b"\xff\xff")
    assert generate(digits_run, 11, out, chunk=4).drawn == 4
    assert digests(out) == before
    assert generate(digits_run, 11, out, chunk=4).drawn == 0


def test_a_repair_that_fails_loses_no_picture(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(digits_run, 5, tmp_path / "out")
    (tmp_path / "out" / "000003.png").write_text("x")
    before = digests(tmp_path / "out")
    monkeypatch.setattr(LevelSampler, "sample", _raise(StopError()))
    with pytest.raises(StopError):
        generate(digits_run, 5, tmp_path / "out")
    assert digests(tmp_path / "out") == before


def test_damaged_numbers_of_a_folder_are_written_again(digits_run: Path, tmp_path: Path) -> None:
    made = generate(digits_run, 5, tmp_path / "out")
    made.numbers.write_text("{")
    assert generate(digits_run, 5, tmp_path / "out").drawn == 0
    assert json.loads(made.numbers.read_text())["count"] == 5


def test_outputs_without_digests_are_known_by_names_and_size(digits_run: Path, tmp_path: Path) -> None:
    """As older versions left them."""
    generate(digits_run, 5, tmp_path / "out")
    for mark in (tmp_path / "out" / ".generate").glob("*.done"):
        mark.write_text("")
    made = generate(digits_run, 5, tmp_path / "out.npz")
    numbers = json.loads(made.numbers.read_text())
    del numbers["crc32"]
    made.numbers.write_text(json.dumps(numbers))
    for name in ("out", "out.npz"):
        assert generate(digits_run, 5, tmp_path / name).drawn == 0
    (tmp_path / "out" / "000003.png").unlink()
    assert generate(digits_run, 5, tmp_path / "out").drawn == 5


@pytest.mark.parametrize("content", [None, b"", b"x", b"of mine"])
def test_a_damaged_chunk_of_a_file_is_drawn_again(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    out = tmp_path / "out.npz"
    stop_after(monkeypatch, 2)
    with pytest.raises(StopError):
        generate(digits_run, 11, out, chunk=4)
    monkeypatch.undo()
    chunk = tmp_path / ".out.npz.generate" / "chunk-000001.npy"
    before = chunk.read_bytes()
    chunk.write_bytes(before[:150] + bytes([before[150] ^ 1]) + before[151:] if content is None else content)
    assert generate(digits_run, 11, out, chunk=4).drawn == 7
    assert torch.equal(open_images(out).pixels, expected(digits_run, 11))


def test_pictures_that_are_gone_are_drawn_again(digits_run: Path, tmp_path: Path) -> None:
    generate(digits_run, 11, tmp_path / "out", chunk=4)
    before = digests(tmp_path / "out")
    (tmp_path / "out" / "000005.png").unlink()
    assert generate(digits_run, 11, tmp_path / "out", chunk=4).drawn == 4
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["out", "out.npz", "out.png"])
def test_a_call_that_fails_before_a_chunk_leaves_nothing(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(LevelSampler, "sample", _raise(StopError()))
    with pytest.raises(StopError):
        generate(digits_run, 5, tmp_path / name, chunk=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out", "out.npz", "out.png"])
def test_what_a_killed_call_left_half_written_goes(digits_run: Path, tmp_path: Path, name: str) -> None:
    def killed() -> list[Path]:
        parts = [tmp_path / f".{name}.json.a1.part", tmp_path / f".{name}.a1.part"]
        if name == "out":
            parts = [tmp_path / name / ".numbers.json.a1.part", tmp_path / name / ".generate" / ".000002.png.7.part"]
        for part in parts:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_text("half")
        return parts

    generate(digits_run, 5, tmp_path / name, chunk=2)
    other = tmp_path / ".other.npz.a1.part"
    other.write_text("of another command")
    parts = killed()
    assert generate(digits_run, 6, tmp_path / name, chunk=2, overwrite=True).drawn == 6
    assert not any(part.exists() for part in parts)
    assert other.exists()


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (10**12, {}, r"1,000,000,000,000 samples of 8x8 need about .* TiB on the disk of .*, and .* are free"),
        (10**20, {}, "count must be at most 72,057,594,037,927,936, got 100000000000000000000"),
        (5, {"processes": 99999999999}, "processes must be at most"),
        (5, {"seed": 2**64}, r"seed must be in \[-2\^63, 2\^64\)"),
        (5, {"seed": -(2**63) - 1}, "seed must be in"),
        (10**7, {"chunk": 10**12}, "a chunk of 10,000,000 samples would need .* of memory"),
    ],
)
@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_absurd_numbers_are_refused_at_once(
    digits_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    count: int,
    options: dict[str, int],
    message: str,
) -> None:
    monkeypatch.setattr("fastebm.memory.free_memory", lambda *_: 2**30)
    monkeypatch.setattr(LevelSampler, "sample", _raise(AssertionError("it was to be refused")))
    with pytest.raises(ValueError, match=message):
        generate(digits_run, count, tmp_path / name, **options)
    flags = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    assert main(["generate", str(digits_run), "--count", str(count), "--out", str(tmp_path / name), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_chunks_are_counted_without_a_list_of_them() -> None:
    request = Request(0, "", {}, 0, 0, count=10**15, chunk=256, channels=1, size=8)
    missing = request.missing({0, 2})
    assert [next(missing) for _ in range(3)] == [1, 3, 4]
    assert request.samples_of({0, 2, 10**14}) == 512


def test_generate_needs_a_coarse_to_fine_run(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="needs a coarse-to-fine run or its folder, got function"):
        generate(lambda x: x.sum((1, 2, 3)), 5, tmp_path / "out")  # type: ignore[arg-type]


def test_a_run_that_is_trained_on_meanwhile_is_taken_up_where_it_was(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    newest = max((run / "checkpoints").glob("*.json"))
    held_back = [(path, path.read_bytes()) for path in (newest, newest.with_suffix(".safetensors"))]
    for path, _ in held_back:
        path.unlink()
    stop_after(monkeypatch, 1)
    with pytest.raises(StopError):
        generate(run, 8, tmp_path / "out.npz", chunk=4)
    monkeypatch.undo()
    for path, content in held_back:
        path.write_bytes(content)
    request = generate(run, 8, tmp_path / "out.npz", chunk=4).request
    assert request.iteration == CoarseToFineRun.load(run, iteration=request.iteration).iteration < 7

    # Where that checkpoint has gone, it is an error.
    stop_after(monkeypatch, 1)
    with pytest.raises(StopError):
        generate(run, 8, tmp_path / "other.npz", chunk=4)
    monkeypatch.undo()
    for path, _ in held_back:
        path.unlink()
    with pytest.raises(RunError, match=r"no good checkpoint of iteration 7.*--overwrite"):
        generate(run, 8, tmp_path / "other.npz", chunk=4)


def _raise(error: BaseException) -> Any:
    def raises(*_: Any, **__: Any) -> None:
        raise error

    return raises


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_clear_error_and_the_call_goes_on(digits_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    with file_limit(600), pytest.raises(RunError, match=r"could not be written.*0 of 40 samples are whole.*goes on"):
        generate(digits_run, 40, out, chunk=20)
    assert not out.exists()
    # 20 images of 64 bytes fit, the file of them all does not.
    with file_limit(2000), pytest.raises(RunError, match="40 of 40 samples are whole"):
        generate(digits_run, 40, out, chunk=20)
    assert not out.exists()
    assert generate(digits_run, 40, out, chunk=20).drawn == 0
    assert torch.equal(open_images(out).pixels, expected(digits_run, 40))


def test_an_error_of_the_writer_ends_the_drawing(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ArrayFile, "write", _raise(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(RunError, match="No space left"):
        generate(digits_run, 10_000, tmp_path / "out.npz", chunk=4)


def test_few_chunks_wait_to_be_written(digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawing goes on while a chunk is being written, but not without bound."""
    free, drawn, write, sample = threading.Event(), [], PictureFolder.write, LevelSampler.sample

    def waiting(*arguments: Any) -> None:
        assert free.wait(60)
        write(*arguments)

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        drawn.append(free.is_set())
        if len(drawn) == 3:
            threading.Timer(0.3, free.set).start()  # if a fourth were not held back, it would come before
        return sample(*arguments, **options)

    monkeypatch.setattr(PictureFolder, "write", waiting)
    monkeypatch.setattr(LevelSampler, "sample", counted)
    generate(digits_run, 20, tmp_path / "out", chunk=4)
    assert drawn == [False, False, False, True, True]


def test_two_calls_at_a_time_are_refused(digits_run: Path, tmp_path: Path) -> None:
    with PictureFolder(tmp_path / "out").lock(), pytest.raises(RunError, match="another process is writing"):
        generate(digits_run, 5, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0", "--out", "x"], "--count must be at least 1"),
        (["--count", "5", "--out", "x.jpg"], "neither a folder nor ends in .npz or .png"),
        (["--count", "5", "--out", "missing/x.png"], "does not exist"),
        (["--count", "5", "--out", "x", "--processes", "0"], "processes must be at least 1"),
        (["--count", "5", "--out", "x", "--chunk", "0"], "chunk must be at least 1"),
        (["--count", "5", "--out", "x", "--device", "banana"], "'banana' is not a device"),
        (["--count", "5", "--out", "x", "--seed", str(2**70)], "seed must be in"),
        (["--count", "10001", "--out", "x.png"], "at most 10,000"),
        (["--count", "5", "--out", "letters"], "has other files in it, such as letter"),
        (["--count", "5", "--out", "letters", "--overwrite"], "has other files in it"),
        (["--count", "5", "--out", "letters/letter"], "is a file"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(
    digits_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("")
    (tmp_path / "letters" / "letter").write_text("")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert main(["generate", str(digits_run), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_says_what_it_made(digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.npz"
    assert main(["generate", str(digits_run), "--count", "5", "--out", str(out)]) == 0
    speed = json.loads((tmp_path / "out.npz.json").read_text())["images_per_second"]
    said = f"5 samples of 8x8 from iteration 7 of {digits_run}, {speed:.4g} a second; see {out}.json"
    assert capsys.readouterr().out == f"{out}: {said}\n"
    assert main(["generate", "nowhere", "--count", "5", "--out", str(tmp_path / "b.npz")]) == 2
    assert "nowhere is not a run" in capsys.readouterr().err


def test_a_damaged_note_is_an_error(digits_run: Path, tmp_path: Path) -> None:
    generate(digits_run, 5, tmp_path / "out")
    (tmp_path / "out" / ".generate" / "request.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        generate(digits_run, 5, tmp_path / "out")
    assert generate(digits_run, 5, tmp_path / "out", overwrite=True).drawn == 5


def test_rows_of_chunks_cover_all_samples_once() -> None:
    request = Request(0, "", {}, 0, 0, count=23, chunk=4, channels=1, size=8)
    assert [number for chunk in range(request.chunks) for number in request.rows(chunk)] == list(range(23))
    assert dataclasses.replace(request, count=24).chunks == 6
