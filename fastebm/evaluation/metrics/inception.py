"""FID, KID and Inception score by torchmetrics, in the features of Inception weights from the user's own file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastebm.data import Images
from fastebm.data.value_range import SIGNED, ValueRange, to_signed
from fastebm.distributed import together
from fastebm.evaluation.metrics.comparison import (
    Comparison,
    Distances,
    RealImages,
    compare,
    equal_precision_recall,
)
from fastebm.evaluation.metrics.features import Features, described, image_bytes
from fastebm.runs.interrupts import uninterrupted

WIDTH = 2048
SPLITS = 10
_SEED = 0


@dataclass(frozen=True, eq=False)
class Inception:
    """The Inception-v3 of FID, read from a file of the user's; nothing is ever downloaded.

    Attributes:
        path: of the file.
        format: the format that `load` recognised.
        run: gives features (B, 2048) and class probabilities of uint8 images (B, 3, H, W).
        device: where it runs.
    """

    path: Path
    format: str
    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    device: torch.device

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> Inception:
        """Reads one of two formats, recognised by content:

        - TorchScript, such as `inception-2015-12-05.pt` of StyleGAN: a module that takes uint8 (B, 3, H, W), resizes
          them itself, and has the arguments `return_features` (then it gives 2048 features) and `no_output_bias` (then
          it gives probabilities). A TorchScript file is a program that is run: use only files that you trust.
        - a state dict, such as `weights-inception-2015-12-05-6726825d.pth` (also `pt_inception-2015-12-05...pth`),
          through torch-fidelity, which has to be installed. It is read as plain tensors; no code in it is run.

        Raises ValueError for another file and for a missing torch-fidelity, FileNotFoundError for a missing file.
        """
        path, device = Path(path), torch.device(device or "cpu")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file of Inception weights")
        if _is_torchscript(path):
            return cls(path, "TorchScript", _from_torchscript(path, device), device)
        return cls(path, "state dict, through torch-fidelity", _from_state_dict(path, device), device)

    @functools.cached_property
    def label(self) -> str:
        """Identifies these features in files of statistics by a digest of the weights file."""
        with self.path.open("rb") as file:
            return f"Inception weights {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"

    @torch.no_grad()
    def __call__(self, images: Tensor | Images, batch_size: int = 50) -> Features:
        """Features float32 (N, 2048) and class probabilities of images (N, 1 or 3, H, W): floats in [-1, 1] or bytes.

        Floats become bytes by `image_bytes`. Gray becomes three equal channels. Raises ValueError for other shapes, and
        as `image_bytes`.
        """
        shape = images.pixels.shape if isinstance(images, Images) else images.shape
        if len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape:
            raise ValueError(f"Inception takes images (N, 1 or 3, H, W), got {tuple(shape)}")
        pixels = image_bytes(images)
        return together(described, self._describe, pixels, batch_size)

    def _describe(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.run(pixels.to(self.device).expand(-1, 3, -1, -1))

    def __reduce__(self) -> tuple[Any, ...]:
        return Inception.load, (self.path, self.device.type)  # TorchScript can't be pickled


@dataclass(frozen=True)
class InceptionMetrics:
    """FID and KID of samples, and Inception scores of samples and of real images.

    Attributes:
        weights: path of the weights file.
        comparison: its Fréchet distances are FID, its kernel distances KID.
        score, score_std: Inception score of the samples, mean and standard deviation over ten parts.
        score_real: Inception score of held-out real images.
    """

    weights: str
    comparison: Comparison
    score: float
    score_std: float
    score_real: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def inception_metrics(
    samples: Tensor, real: RealImages, inception: Inception, *, value_range: ValueRange | None = None
) -> InceptionMetrics:
    """FID, KID, Inception score, precision and recall of samples (N, C, H, W) against all train images.

    `value_range` says which values of the samples are black and white, as in `fastebm.data.value_range.to_signed`.

    FID, KID and score are those of torchmetrics. Published FID mostly has 50,000 samples; fewer give higher values, so
    compare with the `reference` of as many real images. Precision and recall are of as many of both, 5,000 at most.

    Raises ValueError where torchmetrics is missing, and as `compare` and `to_signed`.
    """
    require_torchmetrics()
    samples = to_signed(samples, value_range, "samples")
    compared = compare(samples, real, inception, inception_distances, all_real=True, value_range=SIGNED)
    score, score_std = inception_score(compared.samples.probabilities)
    score_real, _ = inception_score(compared.held_out.probabilities)
    return InceptionMetrics(str(inception.path), compared.comparison, score, score_std, score_real)


def inception_distances(samples: Tensor, real: Tensor) -> Distances:
    """FID and KID by torchmetrics, precision and recall by this package, of features (N, D) and (M, D) in float64."""
    fid, kid, _ = require_torchmetrics()
    with _seeded():
        frechet = fid.FrechetInceptionDistance(feature=_PrecomputedFeatures(real.shape[1]))
        kernel = kid.KernelInceptionDistance(
            feature=_PrecomputedFeatures(real.shape[1]), subset_size=min(1000, len(real), len(samples))
        )
        for metric in (frechet, kernel):
            metric.update(real.double(), real=True)
            metric.update(samples.double(), real=False)
        mean, std = kernel.compute()
        shares = equal_precision_recall(samples, real)
        return Distances(len(samples), len(real), float(frechet.compute()), float(mean), float(std), *shares)


def inception_score(probabilities: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """Mean and standard deviation over ten parts of the Inception score of class probabilities (N, K).

    Source: Salimans et al., 2016.
    """
    _, _, inception = require_torchmetrics()
    with _seeded():
        feature = _PrecomputedFeatures(probabilities.shape[1])
        metric = inception.InceptionScore(feature=feature, splits=min(splits, len(probabilities)))
        # torchmetrics takes logits: the softmax of log probabilities gives the probabilities. log(0) is not finite.
        metric.update(probabilities.double().clamp(min=1e-300).log())
        mean, std = metric.compute()
        return float(mean), float(std)


class _PrecomputedFeatures(torch.nn.Identity):
    """A net for torchmetrics that takes features as its input: images then go through Inception once, not thrice."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


@contextmanager
def _seeded() -> Iterator[None]:
    """Fixes the seed of the subsets that torchmetrics draws from torch's generator, and restores the generator."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that features stay in memory
        torch.default_generator.manual_seed(_SEED)
        yield


def require_torchmetrics() -> tuple[Any, Any, Any]:
    """The modules fid, kid and inception of torchmetrics. Raises ValueError, saying what to install, without them."""
    try:
        with uninterrupted():
            from torchmetrics.image import fid, inception, kid
    except ImportError as error:
        raise ValueError(
            f"FID, KID and Inception score need torchmetrics (pip install 'fastebm[evaluation]'): {error}"
        ) from error
    return fid, kid, inception


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _from_torchscript(path: Path, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the common file has this format
        try:
            module = torch.jit.load(path, map_location=device).eval()
            arguments = {argument.name for argument in module.forward.schema.arguments}
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: can't be read as TorchScript ({str(error).splitlines()[0]})") from error
    if missing := {"return_features", "no_output_bias"} - arguments:
        raise ValueError(
            f"{path}: is TorchScript whose forward lacks the argument {' and '.join(sorted(missing))}: the file "
            "inception-2015-12-05.pt has them"
        )

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return module(pixels, return_features=True), module(pixels, no_output_bias=True)

    return run


def _from_state_dict(path: Path, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: is neither TorchScript nor a state dict ({reason})") from error
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(
            f"{path}: is a state dict, which torch-fidelity reads (pip install torch-fidelity); the TorchScript file "
            "inception-2015-12-05.pt needs no other package"
        ) from error
    try:
        net = FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(WIDTH), "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except RuntimeError as error:
        raise ValueError(f"{path}: holds no weights of Inception: {str(error).splitlines()[0]}") from error
    net = net.to(device).eval()

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = net(pixels)
        return features.flatten(1), logits.softmax(dim=1)

    return run
