"""The benchmarks of samplers: rows of small runs, the estimate of effective samples, the targets' truth, the page."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.samplers import bench_effective_samples, bench_samplers, page
from benchmarks.samplers.autocorrelation import autocorrelation_time, quality
from benchmarks.samplers.targets import TARGETS
from fastebm.evaluation.speed import Run, read_runs, write_runs
from fastebm.evaluation.speed.baselines import RESEARCH, TORCHEBM

TINY = ["--threads", "1", "--warm-up", "30", "--traced-steps", "80", "--traced-chains", "20", "--lengths", "4"]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("rows") / "samplers.json"
    cell = ["--cases", "mixture", "--chains", "500", "--seconds", "0.01", "--threads", "1", "--cpu-time"]
    bench_samplers.main([*cell, "--out", str(out)])
    (run,) = read_runs(out)
    return run


@pytest.fixture(scope="module")
def effective(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("rows") / "effective_samples.json"
    cell = ["--targets", "correlated", "--chains", "10,20", "--rounds", "2", "--seconds", "0.001"]
    bench_effective_samples.main([*TINY, *cell, "--out", str(out)])
    (run,) = read_runs(out)
    return run


def test_each_sampler_has_a_row_for_fastebm_and_for_each_peer(steps: Run) -> None:
    for sampler in bench_samplers.SAMPLERS:
        rows = [row for row in steps.rows if row.case.startswith(f"{sampler}: ")]
        assert [row.baseline for row in rows] == ["fastebm", RESEARCH, TORCHEBM]
        assert all(row.ratio is not None for row in rows[:2])
        assert rows[2].ratio is not None or rows[2].note.startswith("skipped")
        assert ("accepts" in rows[0].note) == (sampler in ("MALA", "HMC"))


@pytest.mark.parametrize("sampler", bench_samplers.SAMPLERS)
@pytest.mark.parametrize("make", [bench_samplers.ours, bench_samplers.eager])
def test_moments_tell_right_implementations_from_wrong_ones(make, sampler: str) -> None:
    assert bench_samplers.wrong(make, sampler) == ""

    def warmer(energy, sampler: str, step_size: float) -> bench_samplers.Implementation:
        return make(lambda x: 0.9 * energy(x), sampler, step_size)

    assert bench_samplers.wrong(warmer, sampler).startswith("wrong: variance")


def test_a_wrong_implementation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_samplers, "wrong", lambda make, sampler: "wrong: mean" if make is bench_samplers.eager else ""
    )
    rows = bench_samplers.measure(bench_samplers.CASES[0], "Langevin", 100, 0.01, bench_samplers.time.process_time)
    assert [row.note for row in rows if row.baseline == RESEARCH] == ["wrong: mean"]
    assert [row.median is None for row in rows[:2]] == [False, True]


def test_different_acceptance_stops_a_cell() -> None:
    case = bench_samplers.CASES[1]
    energy, x = case.build(), torch.randn(2000, case.dim)
    loop = bench_samplers.eager(energy, "MALA", 3 * case.step_size("MALA"))
    with pytest.raises(ValueError, match=r"accepts 0\.\d+, the eager loop 0\.\d+"):
        bench_samplers.checked_acceptance(energy, "MALA", case.step_size("MALA"), x, loop)


def test_the_autocorrelation_time_of_an_autoregression_is_known() -> None:
    generator = np.random.default_rng(0)
    for correlation in (-0.5, 0.0, 0.8):
        x = np.empty((4000, 100))
        x[0] = generator.standard_normal(100)
        noise = math.sqrt(1 - correlation**2) * generator.standard_normal(x.shape)
        for i in range(1, len(x)):
            x[i] = correlation * x[i - 1] + noise[i]
        assert autocorrelation_time(x) == pytest.approx((1 + correlation) / (1 - correlation), rel=0.05)
    assert autocorrelation_time(np.ones((10, 3))) == math.inf
    assert autocorrelation_time(np.full((10, 3), np.nan)) == math.inf


@pytest.mark.parametrize("name", TARGETS)
def test_draws_of_a_target_are_of_its_density(name: str) -> None:
    """By the identity E[x_i dE/dx_i] = 1, which holds for draws of exp(-E) alone."""
    target = TARGETS[name]
    x = torch.from_numpy(target.draw(40_000, np.random.default_rng(5))).requires_grad_(True)
    constants = {key: torch.from_numpy(value) for key, value in target.constants.items()}
    (gradient,) = torch.autograd.grad(target.energy(x, constants, bench_effective_samples.Torch).sum(), x)
    virial = (x * gradient).detach()
    error = virial.std(0) / math.sqrt(len(x))
    assert ((virial.mean(0) - 1).abs() / error).max() < 5
    np.testing.assert_allclose(
        target.energies(x.detach().numpy()),
        target.energy(x, constants, bench_effective_samples.Torch).detach().numpy(),
        rtol=1e-9,
    )


def test_a_bias_is_found_and_independent_draws_have_none() -> None:
    target = TARGETS["banana, 10-D"]
    x = target.draw(400 * 50, np.random.default_rng(7)).reshape(400, 50, -1)
    found = quality(target, target.summaries(x), 1, 1.0)
    assert found.effective == pytest.approx(1, rel=0.1)
    assert not found.biased
    assert quality(target, target.summaries(1.03 * x), 1, 1.0).biased
    assert quality(target, target.summaries(np.full_like(x, np.nan)), 1, 1.0).biased


def test_each_sampler_has_seconds_and_gradients_for_an_effective_sample(effective: Run) -> None:
    mine = {row.variant for row in effective.rows if row.baseline == "fastebm"}
    assert {"MALA", "HMC", "MALT"} <= mine
    for row in effective.rows:
        assert row.batch in (10, 20)
        if row.baseline == "fastebm":
            assert row.median is not None
            assert row.median > 0
            assert "gradients a step" in row.note
        else:
            assert row.note == "skipped: no --jax-python was given"
    gradients = [row for row in effective.rows if row.quantity == "gradients"]
    assert min(row.ratio for row in gradients if row.ratio is not None) == 1


def test_a_sampler_that_fails_leaves_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no such energy")

    monkeypatch.setattr(bench_effective_samples, "ours", lambda: {"MALA": broken})
    target = TARGETS["correlated Gaussian, 10-D"]
    rows = bench_effective_samples.run([target], [5], bench_effective_samples.Settings(), None, None)
    (mine,) = (row for row in rows if row.baseline == "fastebm")
    assert "no such energy" in mine.note
    assert mine.median is None


def test_the_page_marks_what_is_lost_missed_and_biased(steps: Run, effective: Run, tmp_path: Path) -> None:
    eager = next(row for row in steps.rows if row.baseline == RESEARCH)
    rows = [dataclasses.replace(row, ratio=0.5) if row is eager else row for row in steps.rows]
    peer = next(row for row in effective.rows if row.baseline == "fastebm" and row.quantity == "seconds")
    peers = [
        dataclasses.replace(peer, baseline="blackjax", variant="mala", median=peer.median, ratio=2.0),
        dataclasses.replace(
            peer, baseline="numpyro", variant="hmc", median=1e-12, note="x, biased: 1 standard deviations"
        ),
    ]
    results = tmp_path / "cpu-any"
    write_runs(results / "samplers.json", [Run(steps.machine, tuple(rows))])
    machine = dict(effective.machine) | {"peers": {"jax": "0.0"}}
    write_runs(results / "effective_samples.json", [Run(machine, (*effective.rows, *peers))])
    text = page.filled(page.PAGE.read_text(), tmp_path)
    assert "| **0.50** (aim 5) |" in text
    assert "Peers: jax 0.0." in text
    assert "| numpyro hmc * |" in text
    lines = [line for line in text.splitlines() if line.startswith("| correlated Gaussian, 10-D | 10 |")]
    (best,) = lines
    assert "blackjax mala" in best
    assert best.endswith("| 2.00 |")


def test_the_page_says_that_nothing_is_measured(tmp_path: Path) -> None:
    assert page.filled(page.PAGE.read_text(), tmp_path).count(f"\n{page.NOT_MEASURED}\n") == 4


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (bench_samplers.main, ["--samplers", "MALAA"], "--samplers: there is no MALAA; there are"),
        (bench_samplers.main, ["--cases", "x"], "--cases: there is no x; there are"),
        (bench_samplers.main, ["--chains", "many"], "--chains must be positive whole numbers"),
        (bench_effective_samples.main, ["--targets", "x"], "--targets: there is no x; there are"),
        (bench_effective_samples.main, ["--chains", "0"], "--chains must be positive whole numbers"),
        (bench_effective_samples.main, ["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (bench_effective_samples.main, ["--jax-python", "nowhere/python"], "--jax-python can't be started"),
    ],
)
def test_wrong_options_are_refused_in_one_line(main, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(options)


def test_a_python_without_jax_is_refused_in_one_line() -> None:
    with pytest.raises(SystemExit, match="it needs jax, blackjax and numpyro"):
        bench_effective_samples.main(["--jax-python", sys.executable, *TINY, "--targets", "banana"])


def test_targets_need_neither_pytorch_nor_jax() -> None:
    code = "import sys, benchmarks.samplers.autocorrelation; sys.exit('torch' in sys.modules or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=page.ROOT, check=False).returncode == 0
