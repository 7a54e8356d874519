"""`fastebm translate`: by a cascade and by the energy of an EC-VAE, and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.tiny_runs import check_task


@pytest.mark.parametrize(("kind", "iteration"), [("trained", 7), ("vae_run", 2)])
def test_images_of_another_domain_are_translated(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, iteration: int
) -> None:
    np.savez(tmp_path / "data.npz", images=np.full((3, 8, 8), 200, np.uint8))
    command = ["translate", str(request.getfixturevalue(kind)), "--data", str(tmp_path / "data.npz")]
    command += ["--num-steps", "4", "--count", "3", "--out", str(tmp_path / "out")]
    numbers = check_task(command, {"translated.png", "translated.npz"}, capsys)
    assert numbers["iteration"] == iteration


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["translate", "RUN"], "--data is needed"),
        (["translate", "RUN", "--data", "x.npz", "--num-steps", "1" + "0" * 20], "num_steps must be at most"),
        (["translate", "RUN", "--data", "x.npz", "--num-steps", "0"], "num_steps must be at least 1"),
        (["translate", "RUN", "--data", "x.npz", "--seed", "1" + "0" * 20], "seed must be in"),
    ],
)
def test_wrong_arguments(refusal: Callable[[list[str]], str], arguments: list[str], message: str) -> None:
    assert message in refusal([*arguments, "--out", "out"])
