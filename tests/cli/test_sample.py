"""`fastebm sample`: arrays, pictures, seeds, and what it refuses."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from fastebm.cli import main
from fastebm.training import CoarseToFineRun


def test_sample_writes_arrays_and_pictures(trained: Path, tmp_path: Path) -> None:
    assert main(["sample", str(trained), "--count", "7"]) == 0
    images = np.load(trained / "samples-7.npz")["images"]
    assert (images.shape, images.dtype) == ((7, 1, 8, 8), np.float32)
    np.testing.assert_array_equal(images, CoarseToFineRun.load(trained).sample(7).numpy())

    out = tmp_path / "a.npz"
    assert main(["sample", str(trained), "--count", "7", "--seed", "3", "--out", str(out)]) == 0
    seeded = np.load(out)["images"]
    assert not np.array_equal(seeded, images)
    assert main(["sample", str(trained), "--count", "7", "--seed", "3", "--out", str(out)]) == 0
    np.testing.assert_array_equal(np.load(out)["images"], seeded)

    assert main(["sample", str(trained), "--count", "7", "--out", str(tmp_path / "a.png")]) == 0
    assert imread(tmp_path / "a.png").shape[:2] == (10 * 4, (7 * 9 + 1) * 4)


def test_chains_that_are_not_finite_are_one_line_and_exit_code_1(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = CoarseToFineRun.load(trained)
    steep = {size: lambda x: 1e30 * x.square().sum((1, 2, 3)) for size in run.levels}
    config = dataclasses.replace(run.config, engine="autograd")
    broken = dataclasses.replace(run, levels=steep, config=config)
    monkeypatch.setattr("fastebm.training.load", lambda *_: broken)
    assert main(["sample", str(trained), "--count", "3", "--out", str(tmp_path / "a.npz")]) == 1
    errors = capsys.readouterr().err
    assert "3 of 3 chains are not finite" in errors
    assert errors.splitlines()[-1].startswith("fastebm: ")
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "RUN", "--count", "0"], "--count must be at least 1"),
        (["sample", "RUN", "--out", "x.jpg"], "must end in .npz or .png"),
        (["sample", "RUN", "--out", "missing/x.png"], "does not exist"),
        (["sample", "RUN", "--dtype", "bfloat16"], "--dtype is of a VAE's decoder, and"),
        (["sample", "RUN", "--device", "banana"], "'banana' is not a device"),
        (["sample", "RUN", "--seed", str(2**70)], "seed must be in"),
    ],
)
def test_wrong_arguments(refusal: Callable[[list[str]], str], arguments: list[str], message: str) -> None:
    assert message in refusal(arguments)
