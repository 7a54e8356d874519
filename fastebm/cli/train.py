"""The command `fastebm train`, one for all methods: what to learn, by which config, into which folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from fastebm.cli.arguments import LARGEST_COUNT, check_range, select_device
from fastebm.cli.parser import parse
from fastebm.cli.training_report import report_training
from fastebm.runs.folder import RunFolder
from fastebm.training import PRESETS, DigitsSource, ImageSource, train
from fastebm.training.coarse_to_fine.presets import SHAPING
from fastebm.training.ec_flow.presets import EC_FLOW_PRESETS
from fastebm.training.ec_posterior.presets import EC_POSTERIOR_PRESETS
from fastebm.training.ec_vae.presets import EC_VAE_PRESETS

MOST_SEEDS = 1000
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "coarse-to-fine": (
        PRESETS,
        "Train CF-EBM: one energy per resolution, each grown out of the one below. The presets for a GPU are the "
        "paper's settings, made more cautious.",
    ),
    "ec-vae": (
        EC_VAE_PRESETS,
        "Train EC-VAE: a variational autoencoder that an energy calibrates; a sample is one pass of its decoder. With "
        "--lambda-start 0 it is a plain VAE.",
    ),
    "ec-posterior": (
        EC_POSTERIOR_PRESETS,
        "Train a variational autoencoder whose latent vectors short chains refine. With --num-steps 0 it is a plain "
        "VAE.",
    ),
    "ec-flow": (
        EC_FLOW_PRESETS,
        "Train a normalising flow that an energy calibrates; a sample is one pass of its inverse. With --lambda-start "
        "0 it is a plain flow.",
    ),
}
"""The presets of each method, and its description."""
EVERY_METHOD = (
    "The presets digits, mnist and pictures are for a CPU, the others for a GPU and many hours. Without --data it "
    "learns scikit-learn's digits, in minutes. With --data and no --preset it takes the preset pictures: colour images "
    "at 32x32. The same command continues a run that was stopped, to the same bits."
)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model by one of the methods."""

    on_every_rank: ClassVar[bool] = True

    data: Path | None = None
    """file or folder of images: .npz, CIFAR, STL-10, IDX (MNIST), ImageNet-32, or pictures of any size; by default
    scikit-learn's digits"""
    split: str | None = None
    """split of the data; by default train, or all images where there are no splits"""
    fit: Literal["resize", "pad"] | None = None
    """fit of images to the size of the net: resize the largest square, or pad with black; by default as in the preset,
    or resize"""
    crop: int | None = None
    """side in pixels of a square that is cut out of the middle of each image first; by default as in the preset"""
    key: str | None = None
    """name of the array of an .npz file that holds the images; by default found by its name and shape"""
    out: Path | None = None
    """folder of the run, which is continued if it is there; by default runs/ and the name of the data
    or preset, with the method unless that is coarse-to-fine"""
    device: str | None = None
    """device that the run trains on, cpu or cuda; by default a GPU if there is one"""
    seeds: int = 1
    """number of runs, with the seeds from --seed on, that are trained one after another in folders of --out and judged;
    the same command takes them up again"""
    judge_count: int = 1000
    """number of samples of each of several runs that are compared with real images, as fastebm evaluate
    --train-features does; 0 judges none"""
    preset: Any
    """name of the settings that all other options have their defaults from"""
    config: Any

    def __call__(self) -> int:
        check_range("--seeds", self.seeds, 1, MOST_SEEDS)
        check_range("--judge-count", self.judge_count, 0, LARGEST_COUNT)
        source, folder, device = self._source(), RunFolder(self._folder()), select_device(self.device)
        if self.seeds > 1:
            from fastebm.cli.seeds import Seeds

            return Seeds(self.config, source, folder.path, self.seeds, self.judge_count, device)()
        return report_training(folder, lambda: train(self.config, source, folder.path, device=device))

    def _source(self) -> ImageSource | DigitsSource:
        if self.data is None:
            if self.preset != "digits":
                raise ValueError(f"--preset {self.preset} needs --data, a file or folder of images")
            return DigitsSource()
        shaping = dict(SHAPING.get(self.preset, {}))
        shaping |= {name: value for name in ("fit", "crop") if (value := getattr(self, name)) is not None}
        return ImageSource(self.data, self.config.sizes[-1], self.config.channels, self.split, key=self.key, **shaping)

    def _folder(self) -> Path:
        if self.out is not None:
            return self.out
        name = (
            self.preset
            if self.data is None
            else os.path.basename(os.path.realpath(self.data)).lstrip(".").split(".")[0]
        )
        method = self.config.kind.replace("_", "-")
        name += f"-{self.seeds}-seeds" if self.seeds > 1 else ""
        return Path("runs") / (name if method == "coarse-to-fine" else f"{name}-{method}")


def parse_train(method: str, arguments: Sequence[str]) -> Train:
    """The command for a method, with the defaults of the preset that the arguments name."""
    presets, description = METHODS[method]
    preset = _preset(arguments, presets)
    found: Train = parse(
        Train,
        f"fastebm train {method}",
        arguments,
        description=f"{description}\n\n{EVERY_METHOD}",
        defaults={"preset": preset, "config": presets[preset]},
        types={"preset": Literal[tuple(presets)], "config": type(presets[preset])},
    )
    return found


def _preset(arguments: Sequence[str], presets: Any) -> str:
    """The preset that the arguments name, found before they are parsed because it sets the defaults of the others."""
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        flag, equals, value = argument.partition("=")
        if flag == "--preset" and (name := value if equals else following) in presets:
            return name
    return "pictures" if any(argument.partition("=")[0] == "--data" for argument in arguments) else "digits"
