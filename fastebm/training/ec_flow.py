"""Training of a normalising flow whose samples are calibrated by an energy while it is trained.

Named as an extension by Luo, Qiu, Tao, Cai and Tang, "Energy-Calibrated VAE with Test Time Free Lunch", arXiv
2311.04071; there is no public code, and the design is ours. Likelihood spreads a flow over everything that it can't
exclude, so that many of its samples look like nothing; an energy sees that. In an update:

- the flow minimises, for one dimension, `-log2 p(x) + lambda * ||chain end - x(z)||^2`, where x are dequantised images
  and the chain starts at the flow's own sample `x(z) = decode(z)`, `z ~ N(0, I)`, and runs a few Langevin steps down
  the energy. The gradient of the second term flows through the inverse of the flow, but not through the chain;
- the energy minimises `mean E(data) - mean E(chain ends)`, on the same dequantised images;
- `lambda` is fixed, or follows the distance that chains go (`DualUpdate`).

Chains start at samples as they are, not clamped: what lies outside of the range of images is what the energy learns
first, and a clamp would count the way back into it as the energy's doing. At test time a sample is one pass of the
inverse. Everything an iteration draws is a pure function of the seed and of how many images came before, so that a
resumed run ends with the weights of an uninterrupted one, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastebm.training.ec_flow_config import FREE, EcFlowConfig
from fastebm.training.ec_flow_run import KIND, EcFlowRun, load_ec_flow
from fastebm.training.ec_flow_trainer import EcFlowTrainer
from fastebm.training.loop import Given, OnLog, chosen_device, resume_folder, train_folder


def train_ec_flow(
    config: EcFlowConfig,
    images: Given,
    run_dir: str | Path,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    save_pictures: bool = True,
    on_log: OnLog | None = None,
) -> EcFlowRun:
    """Trains on `images` in the folder `run_dir`, or takes up the unfinished run that is there.

    Args:
        images: as read by `fastebm.data.open_images`, or float32 `(N, channels, S, S)` in [-1, 1], with S the config's
            size or a power of two above; or an `ImageSource`, which is opened and kept with the run, so that
            `resume_ec_flow` finds it. They are rounded to the config's `brightnesses`.
        device: of nets and chains; the images stay where they are. By default a GPU if there is one.
        progress: shows a bar with bits per dimension, the distance that chains go, and the energy gap.
        save_pictures: at the end, and at the config's intervals, writes samples.png (beside real images),
            temperatures.png (the same latents, shortened) and curves.png.
        on_log: called with every line of the log.

    Raises as `train_coarse_to_fine`.

    Example:
        >>> import torch, tempfile
        >>> from fastebm.training import EcFlowConfig, train_ec_flow
        >>> config = EcFlowConfig(
        ...     size=8, channels=1, iterations=2, batch_size=4, levels=2, flow_steps=1, width=4, energy_width=4
        ... )
        >>> run = train_ec_flow(config, torch.zeros(9, 1, 8, 8), tempfile.mkdtemp() + "/run", progress=False)
        >>> run.sample(3, seed=1).shape
        torch.Size([3, 1, 8, 8])
    """
    device = chosen_device(device)
    given: dict[str, Any] = {"progress": progress, "save_pictures": save_pictures, "on_log": on_log}
    train_folder(EcFlowTrainer, config, images, run_dir, KIND, FREE, device=device, **given)
    return load_ec_flow(run_dir, device)


def resume_ec_flow(
    run_dir: str | Path, images: Given | None = None, *, retries: int | None = None, **options: Any
) -> EcFlowRun:
    """Takes up the unfinished run in `run_dir` with its own config, on the images that it was begun with.

    A finished one is only loaded: nothing is left to train, so that its images need not be there any more.

    Args:
        images: the same, where the run doesn't know where they lie or they were moved.
        retries: lets the guard go back more often than the config does.
        options: device, progress, save_pictures and on_log of `train_ec_flow`.

    Raises as `train_ec_flow`; also RunError where there is no run, or nobody knows its images.
    """
    return resume_folder(run_dir, KIND, EcFlowConfig, load_ec_flow, train_ec_flow, images, retries, options)
