"""`fastebm denoise`: by a cascade and by the energy of an EC-VAE, and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastebm.cli import main
from fastebm.training import ECVAEConfig, train
from tests.cli.tiny_runs import check_task


def test_noise_is_removed(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["denoise", str(trained), "--tuning-images", "2", "--num-steps", "1", "--count", "3"]
    numbers = check_task([*command, "--out", str(tmp_path / "out")], {"denoised.png", "denoised.npz"}, capsys)
    assert numbers["iteration"] == 7
    assert set(numbers["quality"]) == {"noisy", "restored", "non-local means", "total variation"}
    assert numbers["quality"]["noisy"]["psnr"] == pytest.approx(20 * np.log10(2 / 0.2), abs=0.5)


def test_an_ec_vae_denoises(vae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["denoise", str(vae_run), "--tuning-images", "0", "--num-steps", "1", "--count", "2", "--num-chains", "1"]
    numbers = check_task([*command, "--out", str(tmp_path / "out")], {"denoised.png", "denoised.npz"}, capsys)
    assert (numbers["iteration"], set(numbers["quality"])) == (2, {"noisy", "restored"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["denoise", "missing"], "no config.json"),
        (["denoise", "RUN", "--noise", "0"], "noise must be positive"),
        (["denoise", "RUN", "--step-size", "1"], "--step-size: such settings are tuned"),
        (["denoise", "RUN", "--temperature", "0", "--start-size", "4"], "--temperature, --start-size: such settings"),
        (["denoise", "RUN", "--num-steps", "1" + "0" * 20], "num_steps must be at most 16,777,216"),
        (["denoise", "RUN", "--num-chains", "1" + "0" * 20], "num_chains must be at most"),
        (["denoise", "RUN", "--num-chains", "1" + "0" * 14, "--tuning-images", "0"], "would need"),
        (["denoise", "RUN", "--seed", "1" + "0" * 20], "seed must be in"),
        (["denoise", "RUN", "--seed", "-1" + "0" * 20], "seed must be in"),
        (["denoise", "RUN", "--tuning-images", "-1"], "--tuning-images must not be negative"),
    ],
)
def test_wrong_arguments(refusal: Callable[[list[str]], str], arguments: list[str], message: str) -> None:
    assert message in refusal([*arguments, "--out", "out"])


def test_tuning_takes_what_the_run_was_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A set without parts tunes as well; a run of tensors knows no images to tune on, and says what to do."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "whole.npz", pixels)
    config = ECVAEConfig(
        size=8, channels=1, iterations=1, batch_size=4, latent=4, width=4, energy_width=4, engine="autograd"
    )
    quiet = {"progress": False, "save_pictures": False}
    train(config, tmp_path / "whole.npz", tmp_path / "of_file", **quiet)
    train(config, torch.zeros(9, 1, 8, 8), tmp_path / "of_tensors", **quiet)
    options = ["--tuning-images", "2", "--num-steps", "1", "--count", "2", "--num-chains", "1"]
    assert main(["denoise", str(tmp_path / "of_file"), *options]) == 0
    capsys.readouterr()
    data = ["--data", str(tmp_path / "whole.npz")]
    assert main(["denoise", str(tmp_path / "of_tensors"), *data, *options]) == 2
    assert "where its images come from: give data, and --tuning-images 0" in capsys.readouterr().err
