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
    again = tmp_path / "again.npz"
    assert main(["sample", str(trained), "--count", "7", "--seed", "3", "--out", str(again)]) == 0
    np.testing.assert_array_equal(np.load(again)["images"], seeded)

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


@pytest.mark.parametrize("name", ["mine.npz", "mine.png", None])
def test_a_file_is_replaced_only_if_asked(
    trained: Path, tmp_path: Path, name: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained / "samples-5.npz" if name is None else tmp_path / name
    out.write_text("precious")
    command = ["sample", str(trained), "--count", "5", *([] if name is None else ["--out", str(out)])]
    with monkeypatch.context() as patch:  # it is refused before any work
        patch.setattr("fastebm.training.load", None)
        assert main(command) == 2
    assert f"{out} exists: --overwrite replaces it" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert main([*command, "--overwrite"]) == 0
    assert out.stat().st_size > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "RUN", "--count", "0"], "--count must be at least 1, got 0"),
        (["sample", "RUN", "--count", str(10**12)], "--count must be at most 1,000,000,000, got 1000000000000"),
        (["sample", "RUN", "--count", str(2**64)], "--count must be at most 1,000,000,000, got 18446744073709551616"),
        (["sample", "RUN", "--count", str(10**9), "--out", "x.npz"], "1,000,000,000 samples would need 238.4 GiB of"),
        (["sample", "RUN", "--count", "10001", "--out", "x.png"], "a grid shows at most 10,000 samples"),
        (["sample", "RUN", "--out", "x" * 300 + ".npz"], "can't be written: File name too long"),
        (["sample", "RUN", "--out", ""], "--out needs a path, got an empty text"),
        (["sample", "RUN", "--device", "meta"], "--device must be cpu, cuda or cuda:NUMBER, got 'meta'"),
        (["sample", "RUN", "--device", "mps"], "--device must be cpu, cuda or cuda:NUMBER, got 'mps'"),
        (["sample", "RUN", "--device", "cpu:1"], "--device must be cpu, cuda or cuda:NUMBER, got 'cpu:1'"),
        (["sample", "RUN", "--out", "x.jpg"], "must end in .npz or .png"),
        (["sample", "RUN", "--out", "missing/x.png"], "does not exist"),
        (["sample", "RUN", "--dtype", "bfloat16"], "--dtype is of a VAE's decoder, and"),
        (["sample", "RUN", "--device", "banana"], "'banana' is not a device"),
        (["sample", "RUN", "--seed", str(2**70)], "seed must be in"),
    ],
)
def test_wrong_arguments(refusal: Callable[[list[str]], str], arguments: list[str], message: str) -> None:
    assert message in refusal(arguments)
