"""Images that a command can't work on: exit code 2 and one line, which says what was given and what is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastebm.cli import main

COMMANDS = {
    "denoise": ["--tuning-images", "0", "--num-steps", "1", "--data"],
    "inpaint": ["--restarts", "1", "--data"],
    "translate": ["--num-steps", "6", "--data"],
    "interpolate": ["--points", "3", "--iterations", "1", "--data"],
    "detect": ["--engine", "autograd", "--data"],
    "detect --ood-data": ["--engine", "autograd", "--ood-data"],
}
WRONG = {
    "small.npz": (["1x4x4", "1x8x8", "--convert"], ["4x4", "8x8", "--fit"]),
    "large": (["1x20x20", "1x8x8", "--convert"], ["20x20", "8x8", "--fit"]),
    "colour.npz": (["3x8x8", "1x8x8", "--convert"], ["3 channels", "the run 1", "--convert-colours"]),
    "empty": (["empty: no data set that is known here, and no pictures in it"],) * 2,
    "broken": (["broken/2.png: damaged picture: it ends after"],) * 2,
    "broken/2.png": (["broken/2.png: damaged picture: it ends after"], ["2.png: is a single picture: give a folder"]),
    "nan.npz": (["nan.npz: no array is uint8", "float32 (4, 8, 8)"],) * 2,
    "infinite.npy": (["infinite.npy: is float32 (4, 8, 8)", "must be uint8"],) * 2,
    "missing": (["missing: there is no such file or folder"],) * 2,
}
"""Names of what is given, with words of the line: of the tasks, and of `detect`."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with all that can't be worked on."""
    monkeypatch.chdir(tmp_path)
    np.savez("small.npz", images=np.zeros((4, 4, 4), np.uint8))
    np.savez("colour.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    np.savez("nan.npz", images=np.full((4, 8, 8), np.nan, np.float32))
    np.save("infinite.npy", np.where(np.arange(256).reshape(4, 8, 8) == 99, np.inf, 0.5).astype(np.float32))
    for folder, size in {"large": 20, "broken": 8, "empty": 0}.items():
        Path(folder).mkdir()
        for number in range(4 if size else 0):
            Image.new("L", (size, size), 40 * number).save(f"{folder}/{number}.png")
    whole = Path("broken/2.png").read_bytes()
    Path("broken/2.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], here: Path, words: list[str]) -> str:
    """The one line of a command that ends with 2, and leaves everything as it was."""
    before = sorted(here.rglob("*"))
    assert main([*words, "--out", "out"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("fastebm: ")
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert sorted(here.rglob("*")) == before
    return line


@pytest.mark.parametrize("given", WRONG)
@pytest.mark.parametrize("command", COMMANDS)
def test_images_that_do_not_fit_are_refused(
    digits_run: Path, here: Path, capsys: pytest.CaptureFixture[str], command: str, given: str
) -> None:
    detects = command.startswith("detect")
    path = f"odd={given}" if command.endswith("--ood-data") else given
    line = refusal(capsys, here, [command.split()[0], str(digits_run), *COMMANDS[command], path])
    for word in WRONG[given][detects]:
        assert word in line


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("large/0.png", ["large/0.png: the mask is 20x20, and the images are 8x8"]),
        ("wide.png", ["wide.png: the mask is 4x8, and the images are 8x8"]),
        ("broken/2.png", ["broken/2.png: damaged picture: it ends after"]),
        ("small.npz", ["small.npz: is no picture that can be read"]),
        ("missing.png", ["missing.png: is no file"]),
        ("black.png", ["no hole"]),
        ("white.png", ["nothing but hole"]),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    digits_run: Path, here: Path, capsys: pytest.CaptureFixture[str], mask: str, words: list[str]
) -> None:
    Image.new("L", (8, 4), 255).save("wide.png")
    Image.new("L", (8, 8), 0).save("black.png")
    Image.new("L", (8, 8), 255).save("white.png")
    line = refusal(capsys, here, ["inpaint", str(digits_run), "--mask", mask, "--restarts", "1"])
    for word in words:
        assert word in line


def test_what_a_refusal_offers_is_taken(digits_run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (given, offer) in enumerate({"small.npz": "--fit pad", "large": "--fit resize"}.items()):
        words = ["detect", str(digits_run), *COMMANDS["detect"], given, "--count", "4", *offer.split()]
        assert main([*words, "--out", str(here / f"detected-{number}")]) == 0, capsys.readouterr().err
    for command in ("denoise", "inpaint", "translate", "interpolate"):
        words = [command, str(digits_run), *COMMANDS[command], "large", "--count", "2", "--convert"]
        assert main([*words, "--out", str(here / command)]) == 0, capsys.readouterr().err


def test_a_single_picture_of_another_size_is_refused(
    digits_run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("denoise", "inpaint", "translate"):
        line = refusal(capsys, here, [command, str(digits_run), *COMMANDS[command], "large/1.png"])
        assert "large/1.png: its images are 1x20x20, and the run takes 1x8x8: convert (--convert)" in line
