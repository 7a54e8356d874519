"""`fastebm train` and `fastebm resume`."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, cast

import torch
import tyro

from fastebm.cli.arguments import parsed_device
from fastebm.data.sources import source_from_json
from fastebm.runs.folder import RunFolder
from fastebm.training import (
    DIGITS,
    PRESETS,
    CoarseToFineConfig,
    DigitsSource,
    ECFlowConfig,
    ECPosteriorConfig,
    ECVAEConfig,
    ImageSource,
    Run,
    resume,
    train,
)
from fastebm.training.coarse_to_fine.presets import SHAPING
from fastebm.training.ec_flow.presets import EC_FLOW_DIGITS, EC_FLOW_PRESETS
from fastebm.training.ec_posterior.presets import EC_POSTERIOR_DIGITS, EC_POSTERIOR_PRESETS
from fastebm.training.ec_vae.presets import EC_VAE_DIGITS, EC_VAE_PRESETS


@dataclass(frozen=True)
class _Images:
    """Which images a run learns, and where it lies."""

    data: Path | None = None
    """a file or folder of images: .npz, CIFAR, STL-10, IDX (MNIST), ImageNet-32, or pictures of any size"""
    split: str | None = None
    """part of the data; by default "train", or all where it has no parts"""
    fit: Literal["resize", "pad"] | None = None
    """how images get the size of the (last stage's) net: the largest square resized, or black around them; by default
    as the preset has it, or resize"""
    crop: int | None = None
    """side of a square that is cut out of the middle before; by default as the preset has it"""
    key: str | None = None
    """array of an .npz file that holds the images, where its names don't say"""
    out: Path | None = None
    """folder of the run; by default runs/ and the name of the data or the preset"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""

    def source(self, preset: str, size: int, channels: int) -> ImageSource | DigitsSource:
        if self.data is None:
            if preset != "digits":
                raise ValueError(f"--preset {preset} needs --data, a file or folder of images")
            return DigitsSource()
        shaping = SHAPING.get(preset, {}) | {
            name: value for name, value in (("fit", self.fit), ("crop", self.crop)) if value is not None
        }
        return ImageSource(self.data, size, channels, self.split, key=self.key, **shaping)

    def folder(self, name: str) -> Path:
        """The folder of the run; by default named after the data, or else `name`."""
        named = name if self.data is None else self.data.resolve().name.split(".")[0]
        return Path("runs") / named if self.out is None else self.out


@dataclass(frozen=True)
class CoarseToFine(_Images):
    """CF-EBM: one energy per resolution, each grown out of the one below.

    Without --data it learns scikit-learn's digits, in minutes.

    With --data and no preset it takes colour images at 32x32.

    Presets other than digits and mnist are the paper's settings on the side of caution. They were not run: they are
    meant for a GPU and many hours.
    """

    preset: Literal["digits", "mnist", "cifar10", "celeba64", "church128", "celebahq256", "celebahq512"] = "digits"
    """settings to start from (not run, but for digits and mnist); the flags below change single ones"""
    config: tyro.conf.OmitArgPrefixes[CoarseToFineConfig] = field(default_factory=lambda: DIGITS)

    def __call__(self) -> int:
        source = self.source(self.preset, self.config.sizes[-1], self.config.channels)
        out = self.folder(self.preset)
        return _trained(train, self.config, source, out, self.device)


@dataclass(frozen=True)
class ECVAE(_Images):
    """EC-VAE: a variational autoencoder, calibrated by an energy while it is trained; a sample is one decoder pass.

    Without --data it learns scikit-learn's digits, in minutes.

    With --data and no preset it takes colour images at 32x32.

    With --lambda-start 0 it is a plain VAE, for comparison.

    Presets other than digits were not run: those in colour are meant for a GPU and many hours.
    """

    preset: Literal["digits", "mnist", "cifar10", "stl10-32", "imagenet32", "celeba64", "church64", "celebahq256"] = (
        "digits"
    )
    """settings to start from (not run, but for digits); the flags below change single ones"""
    config: tyro.conf.OmitArgPrefixes[ECVAEConfig] = field(default_factory=lambda: EC_VAE_DIGITS)

    def __call__(self) -> int:
        source = self.source(self.preset, self.config.size, self.config.channels)
        out = self.folder(f"{self.preset}-ec-vae")
        return _trained(train, self.config, source, out, self.device)


@dataclass(frozen=True)
class ECPosterior(_Images):
    """The calibrated posterior: a VAE whose latent vectors are refined by short chains while it is trained.

    Without --data it learns scikit-learn's digits.

    With --data and no preset it takes colour images at 32x32.

    With --num-steps 0 it is a plain VAE, for comparison.

    Presets other than digits were not run; cifar10 is meant for a GPU and many hours.
    """

    preset: Literal["digits", "mnist", "cifar10"] = "digits"
    """settings to start from (not run, but for digits); the flags below change single ones"""
    config: tyro.conf.OmitArgPrefixes[ECPosteriorConfig] = field(default_factory=lambda: EC_POSTERIOR_DIGITS)

    def __call__(self) -> int:
        source = self.source(self.preset, self.config.size, self.config.channels)
        out = self.folder(f"{self.preset}-ec-posterior")
        return _trained(train, self.config, source, out, self.device)


@dataclass(frozen=True)
class ECFlow(_Images):
    """A normalising flow, calibrated by an energy while it is trained; a sample is one pass of its inverse.

    Without --data it learns scikit-learn's digits, in minutes.

    With --data and no preset it takes colour images at 32x32.

    With --lambda-start 0 it is a plain flow, for comparison.

    Presets other than digits were not run.
    """

    preset: Literal["digits", "mnist", "cifar10"] = "digits"
    """settings to start from (not run, but for digits); the flags below change single ones"""
    config: tyro.conf.OmitArgPrefixes[ECFlowConfig] = field(default_factory=lambda: EC_FLOW_DIGITS)

    def __call__(self) -> int:
        source = self.source(self.preset, self.config.size, self.config.channels)
        out = self.folder(f"{self.preset}-ec-flow")
        return _trained(train, self.config, source, out, self.device)


Method = TypeVar("Method")


@dataclass(frozen=True)
class Train(Generic[Method]):
    """Train a model on your images. A run that was stopped goes on where it was, with the same bits."""

    method: Method

    def __call__(self) -> int:
        return cast(CoarseToFine | ECVAE | ECPosterior | ECFlow, self.method)()


@dataclass(frozen=True)
class Resume:
    """Take up a run that was stopped, on its own images and with its own settings, to the same bits."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    data: Path | None = None
    """where its images lie now, if they were moved; other images are refused"""
    retries: int | None = None
    """times in all that the guard may go back; more of them give a run that was given up another chance"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""

    def __call__(self) -> int:
        folder = RunFolder.existing(self.run)
        _restore_num_threads(folder)
        before = folder.checkpoints.iterations()[-1:]
        source = self._moved(folder)
        with _short_warnings():
            run = resume(self.run, source, retries=self.retries, device=parsed_device(self.device))
        return _report(run, before)

    def _moved(self, folder: RunFolder) -> ImageSource | None:
        if self.data is None:
            return None
        stored = source_from_json(folder.images() or {"path": str(self.data)})
        if not isinstance(stored, ImageSource):
            raise ValueError(f"{self.run} learns scikit-learn's digits, which lie in no file: leave --data out")
        return dataclasses.replace(stored, path=self.data)


def _trained(train: Callable[..., Run], config: Any, source: Any, out: Path, device: str | None) -> int:
    """Trains in the folder `out`, or takes up the run that is there, and says what came of it."""
    folder = RunFolder(out)
    if RunFolder.is_run(out):
        _restore_num_threads(folder)
    before = folder.checkpoints.iterations()[-1:]
    with _short_warnings():
        run = train(config, source, out, device=parsed_device(device))
    return _report(run, before)


def _restore_num_threads(folder: RunFolder) -> None:
    """Sets as many threads as the run began with: with others, library convolutions may sum in another order."""
    if threads := folder.threads():
        torch.set_num_threads(threads)


def _report(run: Run, before: list[int]) -> int:
    if before == [run.iteration]:
        print(f"{run.path} was finished before: {run.iteration} iterations. Another --out makes a new run.")
    else:
        pictures = "samples.png and curves.png show the result"
        print(f"{run.path}: trained {run.iteration} iterations. {pictures}.")
    print(f"fastebm sample {run.path} draws more samples.")
    return 0


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Within the block a warning is one line without its place in the code, each as often as it comes."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"\nfastebm: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = show
        yield


def train_command(arguments: list[str]) -> Any:
    """`Train` over all methods, with the defaults of the preset that the arguments name, as tyro wants it."""
    fine, vae = preset_of(arguments, PRESETS), preset_of(arguments, EC_VAE_PRESETS)
    posterior = preset_of(arguments, EC_POSTERIOR_PRESETS)
    flow = preset_of(arguments, EC_FLOW_PRESETS)
    subcommand, unprefixed = tyro.conf.subcommand, tyro.conf.OmitArgPrefixes
    methods = (
        Annotated[CoarseToFine, subcommand("coarse-to-fine", default=CoarseToFine(preset=fine, config=PRESETS[fine]))]
        | Annotated[ECVAE, subcommand("ec-vae", default=ECVAE(preset=vae, config=EC_VAE_PRESETS[vae]))]
        | Annotated[ECPosterior, subcommand("ec-posterior", default=_posterior_default(posterior))]
        | Annotated[ECFlow, subcommand("ec-flow", default=ECFlow(preset=flow, config=EC_FLOW_PRESETS[flow]))]
    )
    return Annotated[Train[tyro.conf.OmitSubcommandPrefixes[unprefixed[methods]]], subcommand("train")]  # type: ignore


def _posterior_default(preset: Any) -> ECPosterior:
    return ECPosterior(preset=preset, config=EC_POSTERIOR_PRESETS[preset])


def preset_of(arguments: list[str], presets: Collection[str]) -> Any:
    """The preset that the arguments name, found before they are parsed because it sets the defaults of the others."""
    for given, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = given.partition("=")
        if flag == "--preset" and (name := value if equals else following) in presets:
            return name
    return "cifar10" if any(given.partition("=")[0] == "--data" for given in arguments) else "digits"
