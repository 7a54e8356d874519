"""`fastebm inpaint`: by a cascade and by the energy of an EC-VAE, and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.tiny_runs import check_task


def test_holes_are_filled(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["inpaint", str(trained), "--restarts", "3", "--count", "3", "--out", str(tmp_path / "out")]
    numbers = check_task(command, {"inpainted.png", "inpainted.npz"}, capsys)
    assert (numbers["iteration"], numbers["pattern"]) == (7, "square")


def test_an_ec_vae_fills_holes(vae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["inpaint", str(vae_run), "--mask-pattern", "half", "--restarts", "2", "--count", "2", "--num-steps", "2"]
    numbers = check_task([*command, "--out", str(tmp_path / "out")], {"inpainted.png", "inpainted.npz"}, capsys)
    assert (numbers["iteration"], numbers["pattern"], numbers["options"]["coarse"]) == (2, "half", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inpaint", "RUN", "--mask", "none.png"], "none.png: is no file"),
        (["inpaint", "RUN", "--count", "0"], "--count must be at least 1"),
        (["inpaint", "RUN", "--count", "-1"], "--count must be at least 1"),
        (["inpaint", "RUN", "--count", "1" + "0" * 20], "count must be at most"),
        (["inpaint", "RUN", "--restarts", "1" + "0" * 14], "100,000,000,000,000 chains of each image would need"),
        (["inpaint", "RUN", "--num-steps", "1" + "0" * 20], "num_steps must be at most 16,777,216"),
        (["inpaint", "RUN", "--mask", "none.png", "--mask-pattern", "half"], "--mask and --mask-pattern both"),
        (["inpaint", "RUN", "--data", "none"], "there is no such file"),
    ],
)
def test_wrong_arguments(refusal: Callable[[list[str]], str], arguments: list[str], message: str) -> None:
    assert message in refusal([*arguments, "--out", "out"])
