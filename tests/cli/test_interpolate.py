"""`fastebm interpolate`: by a cascade and by the energy of an EC-VAE, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastebm.cli import main
from fastebm.training import ECVAEConfig, train
from tests.cli.tiny_runs import check_task

PATH = ["--points", "3", "--iterations", "2", "--count", "3", "--out"]


def test_paths_between_images_and_samples(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"images.png", "images.npz", "noise.png", "coarse.png", "neighbours.png"}
    numbers = check_task(["interpolate", str(trained), *PATH, str(tmp_path / "out")], files, capsys)
    assert numbers["iteration"] == 7
    assert set(numbers["neighbours"]) == {"samples", "samples_smallest", "unseen_images"}


def test_paths_of_an_ec_vae(vae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"images.png", "images.npz", "neighbours.png"}
    numbers = check_task(["interpolate", str(vae_run), *PATH, str(tmp_path / "out")], files, capsys)
    assert numbers["iteration"] == 2


def test_distances_of_unseen_images_only_where_there_are_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "whole.npz", np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8))
    config = ECVAEConfig(
        size=8, channels=1, iterations=1, batch_size=4, latent=4, width=4, energy_width=4, engine="autograd"
    )
    train(config, tmp_path / "whole.npz", tmp_path / "run", progress=False, save_pictures=False)
    assert main(["interpolate", str(tmp_path / "run"), *PATH, str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "so these are images that it was trained on" in told.err
    assert "; none are known that were not learned, to compare with." in told.out
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert set(numbers["neighbours"]) == {"samples", "samples_smallest"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["interpolate", "RUN", "--count", "1"], "a path needs two images"),
        (["interpolate", "RUN", "--points", "2"], "points must be at least 3"),
        (["interpolate", "RUN", "--count", "1" + "0" * 20], "--count must be at most 10,000"),
        (["interpolate", "RUN", "--iterations", "1" + "0" * 20], "iterations must be at most 16,777,216"),
        (["interpolate", "RUN", "--points", "1" + "0" * 14], "paths of 100,000,000,000,000 points would need"),
        (["interpolate", "RUN", "--seed", "1" + "0" * 20], "seed must be in"),
    ],
)
def test_wrong_arguments(refusal: Callable[[list[str]], str], arguments: list[str], message: str) -> None:
    assert message in refusal([*arguments, "--out", "out"])
