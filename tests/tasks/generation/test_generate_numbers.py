"""What `fastebm generate` leaves beside its samples: what they are of, and how fast they were drawn."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from fastebm.cli import main
from fastebm.tasks import generate
from fastebm.training import CoarseToFineRun, RunError
from tests.tasks.generation.stopping import StopError, stop_after

NUMBERS = {"out": "out/numbers.json", "out.npz": "out.npz.json", "out.png": "out.png.json"}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_say_what_was_drawn_by_what(digits_run: Path, tmp_path: Path, name: str) -> None:
    made = generate(digits_run, 5, tmp_path / name, seed=3, chunk=2)
    assert made.numbers == tmp_path / NUMBERS[name]
    run, numbers = CoarseToFineRun.load(digits_run), json.loads(made.numbers.read_text())
    assert numbers.pop("seconds") == made.seconds > 0
    assert numbers.pop("images_per_second") == made.images_per_second == pytest.approx(5 / made.seconds)
    assert numbers.pop("weights") == made.request.weights
    digest = f"{zlib.crc32(made.path.read_bytes()):08x}" if made.path.is_file() else None
    assert numbers.pop("crc32", None) == digest
    assert numbers.pop("bytes", None) == (made.path.stat().st_size if made.path.is_file() else None)
    assert numbers == {
        "run": str(digits_run),
        "iteration": 7,
        "count": 5,
        "resolution": 8,
        "channels": 1,
        "seed": 3,
        "first_chain": 0,
        "sampler": {
            "variant": "cascade",
            "levels": [4, 8],
            "num_steps": 2,
            "step_size": run.config.step_size,
            "noise_start": run.config.noise_start,
            "noise_end": run.config.noise_end,
            "dtype": "float32",
            "engine": "autograd",
        },
        "chunk": 2,
        "processes": 1,
        "threads": 1,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "drawn": 5,
    }


def test_outputs_of_one_name_have_numbers_of_their_own(digits_run: Path, tmp_path: Path) -> None:
    made = {generate(digits_run, count, tmp_path / name).numbers: count for count, name in enumerate(NUMBERS, 1)}
    assert {path: json.loads(path.read_text())["count"] for path in made} == made
    assert len(made) == len(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_call_that_goes_on_says_how_fast_its_own_part_was(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stop_after(monkeypatch, 2)
    with pytest.raises(StopError):
        generate(digits_run, 10, tmp_path / name, chunk=3)
    assert not (tmp_path / NUMBERS[name]).exists()  # they are there when all is
    monkeypatch.undo()
    made = generate(digits_run, 10, tmp_path / name, chunk=3)
    numbers = json.loads(made.numbers.read_text())
    assert (numbers["count"], numbers["drawn"]) == (10, 4)
    assert numbers["images_per_second"] == pytest.approx(4 / numbers["seconds"])


def test_a_call_that_finds_all_there_leaves_the_numbers(digits_run: Path, tmp_path: Path) -> None:
    made = generate(digits_run, 5, tmp_path / "out")
    before = made.numbers.read_bytes()
    again = generate(digits_run, 5, tmp_path / "out")
    assert (again.drawn, again.images_per_second) == (0, None)
    assert made.numbers.read_bytes() == before
    # A kill between the last picture and the numbers: nobody knows how long it took.
    made.numbers.unlink()
    generate(digits_run, 5, tmp_path / "out")
    numbers = json.loads(made.numbers.read_text())
    assert (numbers["count"], numbers["drawn"], numbers["images_per_second"]) == (5, 0, None)


@pytest.mark.parametrize("name", ["out.npz", "out.png"])
def test_a_file_in_the_place_of_the_numbers_stays(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    letter = tmp_path / NUMBERS[name]
    letter.write_text("of mine")
    command = ["generate", str(digits_run), "--count", "5", "--out", str(tmp_path / name)]
    assert main(command) == 2
    assert capsys.readouterr().err == f"fastebm: {letter} exists: --overwrite replaces it, or choose another name\n"
    assert letter.read_text() == "of mine"
    assert list(tmp_path.iterdir()) == [letter]
    assert main([*command, "--overwrite"]) == 0
    assert json.loads(letter.read_text())["count"] == 5


def test_a_folder_in_the_place_of_the_numbers_stays_even_so(digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / "out.npz.json").mkdir()
    with pytest.raises(ValueError, match=r"out\.npz\.json is a folder"):
        generate(digits_run, 5, tmp_path / "out.npz", overwrite=True)


def test_begun_anew_a_folder_has_no_numbers_of_before(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = generate(digits_run, 5, tmp_path / "out").numbers
    stop_after(monkeypatch, 1)
    with pytest.raises(StopError):
        generate(digits_run, 9, tmp_path / "out", chunk=4, overwrite=True)
    assert not numbers.exists()


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_can_not_be_written_are_written_by_the_next_call(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import fastebm.tasks.generation.files as files

    write_json = files.write_json

    def full(path: Path, content: Any) -> None:
        if path == tmp_path / NUMBERS[name]:
            raise OSError("No space left on device")
        write_json(path, content)

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(RunError, match=r"No space left.*5 of 5 samples are whole"):
        generate(digits_run, 5, tmp_path / name)
    monkeypatch.undo()
    assert generate(digits_run, 5, tmp_path / name).drawn == 0
    assert json.loads((tmp_path / NUMBERS[name]).read_text())["count"] == 5
