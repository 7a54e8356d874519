"""The settings of a run that trains an energy-calibrated flow, or a plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastebm.training.calibration.config import CalibratedConfig
from fastebm.training.trainer.config import Precision, Ranges


@dataclass(frozen=True, kw_only=True)
class ECFlowConfig(CalibratedConfig):
    """All settings of a run of the calibrated flow; together with the images they determine its result.

    The paper names calibrated flows among its extensions and publishes no code for them: every default is our choice.

    With `lambda_start=0` and `dual_rate=0` it is a plain flow: no energy is trained and no chain is run.
    """

    kind: ClassVar[str] = "ec_flow"
    method_name: ClassVar[str] = "a calibrated flow"
    ranges: ClassVar[Ranges] = {
        "brightnesses": (2, 2**16),
        "levels": (1, 8),
        "flow_steps": (1, 2**10),
        "bound": (1e-6, 1e6),
        "flow_betas": (0, 1 - 1e-9),
        "max_gradient_norm": (0, 1e30),
    }

    batch_size: int = 64
    brightnesses: int = 256
    """number of brightness values of a pixel, to which images are rounded; likelihoods are those of discrete images"""
    levels: int = 3
    """number of times that the flow halves the resolution"""
    flow_steps: int = 16
    """number of flow steps (activation norm, 1x1 convolution, coupling) in a level"""
    width: int = 128
    """number of channels of the hidden layers in a coupling's net"""
    bound: float = 1.5
    """largest magnitude of a coupling's log-scale"""
    learning_rate: float = 1e-3
    flow_betas: tuple[float, float] = (0.9, 0.999)
    """decay rates of Adam's two moments for the flow; adam_betas are those for the energy"""
    max_gradient_norm: float = 10.0
    """norm to which a longer gradient of the flow is scaled down; 0 leaves gradients as they are"""
    lambda_start: float = 10.0
    """weight of the calibration loss at the start, in bits per squared distance of 1"""
    lambda_max: float = 1000.0
    update_dtype: Precision = "float32"
    """autocast dtype of the energy's convolutions in an update; the flow is always in float32, to be invertible"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 2**self.levels > self.size:
            raise ValueError(f"images of size {self.size} can't be halved {self.levels} times, as levels wants")
