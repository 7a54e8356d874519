"""`fastebm diagnose`: its verdict, its table and its picture, and what it refuses."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from fastebm.cli import main
from fastebm.training import CoarseToFineRun


def test_a_verdict_a_table_and_a_picture(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(trained), "--count", "12"]) == 0
    printed = capsys.readouterr().out
    assert f"{trained}, iteration 7: 12 chains from noise" in printed
    _, low, high = re.split(r"\n\n(?:4x4|8x8)\n", printed)
    for level in (low, high):
        assert "  - Step size and noise imply a temperature that goes from " in level
        assert "  12 chains, 2 updates" in level
        assert re.search(r"^  energy +-?[\d.]", level, re.MULTILINE)
        assert "No number from these chains shows a mode that none of them visited." in level
    assert printed.endswith(
        f"{trained / 'diagnose.png'}: the traces of energy, mean, norm, projection 1, projection 2, projection 3\n"
    )
    assert imread(trained / "diagnose.png").std() > 0.05


def test_the_numbers_are_of_the_chains_that_sample_draws(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their means at the ends; whatever the number of chains in a batch."""
    drawn = []
    monkeypatch.setattr("fastebm.plotting.save_traces", lambda path, traces, places: drawn.append(traces["8x8"]))
    command = ["diagnose", str(trained), "--count", "5", "--seed", "3", "--out", str(tmp_path / "a.png")]
    assert main(command) == 0
    monkeypatch.setattr("fastebm.cli.diagnose.BATCH_PIXELS", 2 * 32**2)
    assert main(command) == 0
    ends = CoarseToFineRun.load(trained).cascade().sample(5, 3, channels=1).double().mean((1, 2, 3))
    for traces in drawn:
        assert traces["mean"].shape == (2, 5)
        torch.testing.assert_close(traces["mean"][-1], ends, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(drawn[0]["energy"], drawn[1]["energy"], rtol=1e-5, atol=1e-6)
    assert "5 chains, 2 updates" in capsys.readouterr().out


def test_longer_chains_of_one_temperature_are_judged(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.png"
    command = ["diagnose", str(trained), "--num-steps", "60", "--noise-std", "0.2", "--count", "9", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.count("9 chains, 60 updates") == 2
    assert printed.count("temperature implied by step size and noise 0.02\n") == 2
    assert "R-hat is" in printed
    assert list(tmp_path.iterdir()) == [out]


def test_chains_that_are_not_finite_are_one_line_and_exit_code_1(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = CoarseToFineRun.load(trained)
    steep = {size: lambda x: 1e30 * x.square().sum((1, 2, 3)) for size in run.levels}
    broken = dataclasses.replace(run, levels=steep, config=dataclasses.replace(run.config, engine="autograd"))
    monkeypatch.setattr(CoarseToFineRun, "load", lambda *_: broken)
    assert main(["diagnose", str(trained), "--out", str(tmp_path / "a.png")]) == 1
    errors = capsys.readouterr().err
    assert "64 of 64 chains are not finite" in errors
    assert errors.splitlines()[-1].startswith("fastebm: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mine.png", None])
def test_a_file_is_replaced_only_if_asked(
    trained: Path, tmp_path: Path, name: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained / "diagnose.json").unlink(missing_ok=True)
    out = trained / "diagnose.png" if name is None else tmp_path / name
    out.write_text("precious")
    command = ["diagnose", str(trained), "--count", "3", *([] if name is None else ["--out", str(out)])]
    with monkeypatch.context() as patch:  # it is refused before any work
        patch.setattr(CoarseToFineRun, "load", None)
        assert main(command) == 2
    assert f"{out} exists: --overwrite replaces it" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert main([*command, "--overwrite"]) == 0
    assert out.stat().st_size > 100


def test_a_run_whose_samples_take_no_chain_is_refused(vae_run: Path, refusal: Callable[[list[str]], str]) -> None:
    error = refusal(["diagnose", str(vae_run), "--out", "a.png"])
    assert "holds a run of kind ec_vae, whose samples take no chain that could be judged" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--count", "0"], "--count must be at least 1, got 0"),
        (["RUN", "--count", "10001"], "--count must be at most 10,000, got 10001"),
        (["RUN", "--num-steps", "0"], "--num-steps must be at least 1, got 0"),
        (["RUN", "--num-steps", str(2**40)], "--num-steps must be at most 1,000,000"),
        (["RUN", "--noise-std", "-1"], "--noise-std must be finite and not negative, got -1.0"),
        (["RUN", "--seed", str(2**70)], "seed must be in"),
        (["RUN", "--out", "x.npz"], "--out must end in .png, got x.npz"),
        (["RUN", "--out", "missing/x.png"], "does not exist"),
        (["RUN", "--device", "banana", "--out", "x.png"], "'banana' is not a device"),
        (["nowhere"], "nowhere is not a run of fastebm"),
        ([], "required: RUN"),
    ],
    ids=str,
)
def test_wrong_arguments(refusal: Callable[[list[str]], str], arguments: list[str], message: str) -> None:
    assert message in refusal(["diagnose", *arguments])
