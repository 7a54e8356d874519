"""The smallest configs of a run of each kind, of three updates."""

from __future__ import annotations

from typing import Any

from fastebm.training import CoarseToFineConfig, ECFlowConfig, ECPosteriorConfig, ECVAEConfig

SILENT: dict[str, Any] = {"progress": False, "save_pictures": False}


def small_configs(**settings: Any) -> dict[str, Any]:
    """A config by kind, with these settings of all kinds."""
    small: dict[str, Any] = {"channels": 1, "num_steps": 2, "engine": "autograd", **settings}
    single: dict[str, Any] = {"size": 8, "iterations": 3, "batch_size": 4, "width": 2, "warmup": 1, **small}
    stages: dict[str, Any] = {"iterations": (1, 2), "batch_sizes": (4, 4), "learning_rates": (1e-3, 1e-3), **small}
    return {
        "coarse_to_fine": CoarseToFineConfig(sizes=(4, 8), base_width=1, **stages),
        "ec_vae": ECVAEConfig(latent=3, energy_width=2, energy_depth=1, **single),
        "ec_posterior": ECPosteriorConfig(latent=3, **single),
        "ec_flow": ECFlowConfig(levels=1, flow_steps=1, energy_width=2, energy_depth=1, **single),
    }
