"""What the tests of commands share: one thread, tiny runs that are trained once, and the form of an error."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastebm.cli import main
from fastebm.training import CoarseToFineRun, DigitsSource, ECVAEConfig, train

pytest.register_assert_rewrite("tests.cli.tiny_runs")  # so that its asserts say what was compared


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""


@pytest.fixture(scope="session")
def _trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.cli.tiny_runs import TRAIN

    torch.set_num_threads(1)  # before the fixture above
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([*TRAIN, "--iterations", "3", "4", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def trained(_trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a coarse-to-fine run of 7 updates on digits, 8x8: a copy for the tests of one file."""
    return Path(shutil.copytree(_trained_once, tmp_path_factory.mktemp("runs") / "tiny"))


@pytest.fixture(scope="module")
def run(trained: Path) -> CoarseToFineRun:
    """The same, opened."""
    return CoarseToFineRun.load(trained)


@pytest.fixture(scope="session")
def vae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an EC-VAE run of two updates on digits, 8x8. Tests write nothing into it."""
    config = ECVAEConfig(size=8, channels=1, iterations=2, batch_size=4, latent=4, width=4, energy_width=4)
    out = tmp_path_factory.mktemp("runs") / "vae"
    train(config, DigitsSource(), out, progress=False, save_pictures=False)
    return out


@pytest.fixture
def refusal(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    """Runs a command, RUN being the folder of the run; it has to end with exit code 2, one line and no new file."""
    monkeypatch.chdir(tmp_path)

    def refuse(arguments: list[str]) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([str(trained) if argument == "RUN" else argument for argument in arguments]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("fastebm: ")
        assert errors.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return errors

    return refuse
