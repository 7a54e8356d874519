"""The commands of tasks: their folders, numbers and pictures, and one line for what was given wrongly."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from fastebm.cli import main
from fastebm.training import CoarseToFineRun


@pytest.mark.parametrize(
    ("command", "files"),
    [
        (["denoise", "--tune", "2", "--num-steps", "1"], {"denoised.png", "denoised.npz"}),
        (["inpaint", "--restarts", "3"], {"inpainted.png", "inpainted.npz"}),
        (["translate", "--data", "DATA", "--num-steps", "4"], {"translated.png", "translated.npz"}),
        (
            ["interpolate", "--points", "3", "--iterations", "2"],
            {"images.png", "images.npz", "noise.png", "coarse.png", "neighbours.png"},
        ),
    ],
)
def test_a_command_leaves_pictures_and_numbers(
    run: CoarseToFineRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    files: set[str],
) -> None:
    np.savez(tmp_path / "data.npz", images=np.full((3, 8, 8), 200, np.uint8))
    out = tmp_path / "out"
    given = [str(tmp_path / "data.npz") if word == "DATA" else word for word in command]
    words = [given[0], str(run.path), *given[1:], "--count", "3", "--out", str(out)]
    assert main(words) == 0, capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == files | {"numbers.json"}
    numbers = json.loads((out / "numbers.json").read_text())
    assert (numbers["iteration"], numbers["seed"]) == (7, 0)
    for name in files:
        if name.endswith(".png"):
            assert imread(out / name).std() > 0.05
    if command[0] == "denoise":
        assert set(numbers["quality"]) == {"noisy", "restored", "non-local means", "total variation"}
        assert numbers["quality"]["noisy"]["psnr"] == pytest.approx(20 * np.log10(2 / 0.2), abs=0.5)

    # What is there stays, unless asked otherwise.
    before = (out / "numbers.json").stat().st_mtime_ns
    assert main(words) == 2
    assert "has files in it, which stay" in capsys.readouterr().err
    assert (out / "numbers.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["denoise", "missing"], "no config.json"),
        (["denoise", "RUN", "--noise", "0"], "noise must be positive"),
        (["denoise", "RUN", "--tune", "-1"], "--tune must not be negative"),
        (["inpaint", "RUN", "--mask", "none.png"], "none.png: is no file"),
        (["inpaint", "RUN", "--count", "0"], "--count must be at least 1"),
        (["inpaint", "RUN", "--data", "none"], "there is no such file"),
        (["translate", "RUN"], "--data is needed"),
        (["interpolate", "RUN", "--count", "1"], "a path needs two images"),
        (["interpolate", "RUN", "--points", "2"], "points >= 3"),
    ],
)
def test_wrong_arguments_are_one_line(
    run: CoarseToFineRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    words = [str(run.path) if word == "RUN" else word for word in arguments]
    assert main([*words, "--out", str(out)]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not out.exists()
