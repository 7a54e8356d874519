"""Inception's distances, with a small TorchScript module in the place of Inception, which nobody can download here."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from fastebm.data import Images, to_pixels
from fastebm.evaluation import (
    FeatureStatistics,
    Inception,
    RealImages,
    frechet_distance,
    inception_metrics,
    kernel_distance,
)
from fastebm.evaluation.metrics.inception import inception_distances, inception_score
from fastebm.evaluation.report import Report
from tests.evaluation.metrics.small_inception import Bare, SmallInception, script


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Inception:
    return Inception.load(script(SmallInception, tmp_path_factory.mktemp("weights") / "inception.pt"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_floats_become_the_nearest_bytes_and_gray_three_channels(inception: Inception, images: Tensor) -> None:
    features, probabilities = inception(images)
    assert features.shape == (120, 12)
    assert probabilities.shape == (120, 5)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(120))
    for same in (to_pixels(images), to_pixels(images).expand(-1, 3, -1, -1), Images(to_pixels(images))):
        assert torch.equal(inception(same, batch_size=50).features, features)
    assert inception.format == "TorchScript"


def test_the_bytes_of_the_fixed_mapping() -> None:
    # Clamped; 2 / 255 from one level to the next, halves to even.
    given = torch.tensor([-2.0, -1.0, -1 + 0.9 / 255, -1 + 1.1 / 255, 0.0, 1.0, 2.0])
    assert to_pixels(given).tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_distances_of_torchmetrics_agree_with_ours(inception: Inception, images: Tensor) -> None:
    pytest.importorskip("torchmetrics")
    a, b = inception(images).features, inception(images * 0.5).features
    state = torch.get_rng_state()
    found = inception_distances(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == inception_distances(a, b)
    assert found.frechet == pytest.approx(frechet_distance(a, b), abs=1e-6)
    whole = kernel_distance(a, b, subsets=1)  # all 120 in each subset
    assert (found.kernel, found.kernel_std) == (pytest.approx(whole.mean, abs=1e-6), pytest.approx(0, abs=1e-6))


def test_the_score_is_the_exponential_of_the_mean_divergence() -> None:
    pytest.importorskip("torchmetrics")
    probabilities = torch.rand(2000, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    p = probabilities.double().numpy()
    expected = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert inception_score(probabilities, splits=1)[0] == pytest.approx(expected, abs=1e-6)
    # The mean over ten parts, each with a marginal of its own, in the order that torchmetrics shuffles them to.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        parts = np.split(p[torch.randperm(2000).numpy()], 10)
    scores = [np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()) for part in parts]
    found = inception_score(probabilities)
    assert found == (pytest.approx(np.mean(scores), abs=1e-6), pytest.approx(np.std(scores, ddof=1), abs=1e-6))
    even, deviation = inception_score(torch.eye(5).repeat(200, 1))  # certainty, and zeros whose log is not finite
    assert even == pytest.approx(5, rel=0.02)
    assert deviation < 0.1


def test_fid_is_of_all_samples_from_all_train_images(inception: Inception, images: Tensor) -> None:
    """Also where there are more samples than real images, and from the statistics that a file has of them."""
    pytest.importorskip("torchmetrics")
    train, test = Images(to_pixels(images[:60] * 0.5)), Images(to_pixels(images[60:] * 0.5))
    for count in (40, 120):
        samples = images[:count] * 0.6
        comparison = inception_metrics(samples, RealImages(train, test), inception).comparison
        assert (comparison.samples.count, comparison.samples.num_reference) == (count, 60)
        statistics = FeatureStatistics.of(inception(train).features)
        expected = frechet_distance(inception(samples).features, statistics)
        assert comparison.samples.frechet == pytest.approx(expected, abs=1e-6)
        few = min(count, 60)
        assert (comparison.reference.count, comparison.reference.num_reference) == (few, 60)
        unseen, _ = RealImages(train, test).held_out(count)
        expected = frechet_distance(inception(unseen).features[:few], statistics)
        assert comparison.reference.frechet == pytest.approx(expected, abs=1e-6)
    # Without test images the reference is the distance of one half from the other.
    halves = inception_metrics(images[:20], RealImages(train), inception).comparison
    rows = (halves.samples, halves.samples_at_reference_count, halves.reference)
    assert [row.num_reference for row in rows] == [60, 60, 40]


def test_samples_are_compared_beside_real_images_and_noise(inception: Inception, images: Tensor) -> None:
    pytest.importorskip("torchmetrics")
    real = RealImages(Images(to_pixels(images * 0.5)))
    metrics = inception_metrics(images[:60] * 0.6, real, inception)
    rows = dict(metrics.comparison.rows())
    assert rows["reference: train images of the other half"].frechet < rows["uniform noise"].frechet
    assert metrics.score >= 1
    report = Report("a", "b", inception=metrics)
    assert json.loads(json.dumps(report.to_json()))["inception"]["comparison"]["samples"]["count"] == 60
    assert "FID" in report.explain()


def test_wrong_images_are_refused(inception: Inception) -> None:
    for wrong in (torch.zeros(1, 2, 8, 8), torch.zeros(0, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan)):
        with pytest.raises(ValueError, match=r"Inception takes images|finite"):
            inception(wrong)


def test_wrong_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no such file of Inception weights"):
        Inception.load(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(ValueError, match=r"text\.pt: is neither TorchScript nor a state dict"):
        Inception.load(tmp_path / "text.pt")
    with pytest.raises(ValueError, match="lacks the argument no_output_bias and return_features"):
        Inception.load(script(Bare, tmp_path / "bare.pt"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="which torch-fidelity reads"):
        Inception.load(tmp_path / "state.pth")


def test_a_state_dict_goes_through_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in with the signature of torch-fidelity's extractor, which is not installed here.
    class Extractor(torch.nn.Module):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            assert (name, features_list) == ("inception-v3-compat", ["2048", "logits_unbiased"])
            self.weight = torch.nn.Parameter(torch.load(feature_extractor_weights_path)["weight"])

        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            flat = pixels.float().flatten(1)
            return flat * self.weight, flat[:, :4]

    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    torch.save({"weight": torch.tensor(2.0)}, tmp_path / "state.pth")
    features, probabilities = Inception.load(tmp_path / "state.pth")(torch.full((2, 1, 1, 2), 1.0))
    assert features.tolist() == [[510.0] * 6] * 2
    torch.testing.assert_close(probabilities, torch.full((2, 4), 0.25))


def test_without_torchmetrics_it_says_what_to_install(
    inception: Inception, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ValueError, match=r"need torchmetrics \(pip install 'fastebm\[evaluation\]'\)"):
        inception_metrics(images, RealImages(Images(to_pixels(images))), inception)
