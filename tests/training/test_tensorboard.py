"""TensorBoard gets the log and the samples; without it a run goes on, after one line that says so."""

import dataclasses
import sys
from pathlib import Path

import pytest
from torch import Tensor

from fastebm.training import CoarseToFineConfig, train
from fastebm.training.tensorboard import MISSING
from tests.training.resumed_runs import log


def test_numbers_and_samples_arrive(tiny: CoarseToFineConfig, images: Tensor, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(dataclasses.replace(tiny, tensorboard=True), images, tmp_path, progress=False)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = log(tmp_path)
    for name in ("gap", "energy_data", "displacement", "clamped", "gradient_norm"):
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == [line["iteration"] for line in lines]
        assert [event.value for event in scalars] == pytest.approx([line[name] for line in lines])
    assert [event.step for event in events.Images("samples/8")] == [13]


def test_without_tensorboard_one_line_says_so(
    tiny: CoarseToFineConfig,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = dataclasses.replace(tiny, tensorboard=True)
    assert train(config, images, tmp_path, progress=False, save_pictures=False).finished
    assert capsys.readouterr().err == f"{MISSING}\n"
    assert not (tmp_path / "tensorboard").exists()
