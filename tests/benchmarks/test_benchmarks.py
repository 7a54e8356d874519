"""The suites under benchmarks/: their nets are energies, their workloads run, committed results are readable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks.harness import nets, plots, table
from benchmarks.harness import readme_sections as marks
from benchmarks.harness.base import Worker, WorkerError
from benchmarks.harness.workloads import Workload, ours
from benchmarks.studies import calibrated_flow, one_pass, seeds, stages
from fastebm.build_extension import cpp_compiler
from fastebm.evaluation.speed import Row, Run, machine_facts, read_runs, write_runs
from fastebm.models import VAE, Flow, MultiScaleEnergy
from fastebm.sampling.schedules import evaluate
from fastebm.training import ECVAEConfig

ROOT = Path(__file__).resolve().parents[2]
SUITES = sorted(f"{path.parent.name}.{path.stem}" for path in (ROOT / "benchmarks").glob("*/test_*.py"))
SHAPES = {"UvA tutorial": (1, 28, 28)}


def workloads(suite: str, device: str, full: bool) -> Sequence[Workload]:
    return import_module(f"benchmarks.{suite}").workloads(device, full)


@pytest.mark.parametrize("name", nets.NETS)
def test_nets_are_energies_whose_samples_do_not_influence_each_other(name: str) -> None:
    if name == "wide residual 28-10":
        pytest.skip("36 million weights; its twin of width 2 is the same code")
    shape = SHAPES.get(name, (3, 32, 32))
    net = nets.made(name, shape, "cpu")
    x = torch.rand(2, *shape, requires_grad=True)
    energies = net(x)
    assert energies.shape == (2,)
    (slope,) = torch.autograd.grad(energies[0], x)
    assert slope[0].any()
    assert not slope[1].any()
    torch.testing.assert_close(nets.made(name, shape, "cpu")(x), energies)


def test_wide_nets_have_the_depth_and_width_of_their_names() -> None:
    net = nets.WideResidual(28, 2)
    convolutions = [part for part in net.modules() if isinstance(part, torch.nn.Conv2d) and part.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 28 - 2  # three shortcuts of 1x1 are counted as layers, too, and the linear one
    assert max(part.out_channels for part in convolutions) == 128
    with pytest.raises(ValueError, match="6n \\+ 4"):
        nets.WideResidual(27, 2)


@pytest.mark.parametrize("suite", SUITES)
def test_workloads_have_names_of_their_own_and_known_nets(suite: str) -> None:
    for device in ("cpu", "cuda"):
        for full in (False, True):
            found = workloads(suite, device, full)
            names = [work.name for work in found]
            assert len(set(names)) == len(names) > 0
            assert {work.suite for work in found} == {suite.partition(".test_")[2]}
            energies = suite.startswith("end_to_end")
            assert not energies or {work.case for work in found} <= set(nets.NETS)
            assert all(work == Workload.from_json(work.to_json()) for work in found)


TINY = {
    "energy_gradient": Workload("energy_gradient", "UvA tutorial", (1, 28, 28), 2, "float32", num_steps=2),
    "chains": Workload("chains", "CF-EBM", (1, 8, 8), 2, "bfloat16", num_steps=2),
    "cascade": Workload("cascade", "CF-EBM", (1, 16, 16), 2, "bfloat16", num_steps=1),
    "training": Workload("training", "CF-EBM", (1, 16, 16), 2, "bfloat16", num_steps=1),
    "langevin": Workload("langevin", "noise", (1, 4, 4), 2, "float32"),
    "block_tail": Workload("block_tail", "channels-last, forward and backward", (4, 4, 4), 2, "float32"),
    "expand_blend": Workload("expand_blend", "scalar beta", (4, 4, 4), 2, "float32"),
    "normal": Workload("normal", "float32", (1, 4, 4), 2, "float32"),
    "uniform": Workload("uniform", "float32", (1, 4, 4), 2, "float32"),
}


@pytest.mark.parametrize("name", TINY)
def test_ours_runs_more_than_once(name: str) -> None:
    run = ours(TINY[name])
    run()
    run()


def test_a_worker_measures_and_says_what_fails() -> None:
    worker = Worker([ROOT], ROOT)
    try:
        with pytest.raises(WorkerError, match="nothing was prepared"):
            worker.ask({"repeats": 1})
        assert worker.ask({"prepare": TINY["normal"].to_json()}) > 0
        assert worker.ask({"repeats": 3}) > 0
        unknown = TINY["chains"].to_json() | {"engine": "steam"}
        with pytest.raises(WorkerError, match="ValueError: engine is 'steam'"):
            worker.ask({"prepare": unknown})
    finally:
        worker.stop()


def test_a_worker_that_finds_another_fastebm_says_so(tmp_path: Path) -> None:
    worker = Worker([ROOT], tmp_path)
    try:
        with pytest.raises(WorkerError, match=f"not from {tmp_path}"):
            worker.ask({"prepare": TINY["normal"].to_json()})
    finally:
        worker.stop()


def suite_run(tmp_path: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "--rounds", "2", "--budget", "0.1", "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler: torch.compile can't run")
def test_a_suite_prints_its_table_and_saves_its_rows(tmp_path: Path) -> None:
    printed = suite_run(tmp_path, "benchmarks/ops/test_uniform.py", "-k", "64x3", "--save", str(tmp_path))
    assert "uniform: float32, 64x3x32x32, float32, time of one call" in printed
    assert "torch.compile of rand" in printed
    (path,) = tmp_path.rglob("uniform.json")
    (run,) = read_runs(path)
    assert path.parent.name == run.machine["name"]
    assert [row.baseline for row in run.rows] == ["fastebm", "torch.rand", "torch.compile of rand"]
    assert run.rows[0].achieved is not None


def test_committed_results_are_readable() -> None:
    found = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    assert found
    for path in found:
        assert table.page(path).count("|---") > 0


def test_a_page_of_the_earlier_format_is_what_was_committed() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.md"):
        assert table.page(path.with_suffix(".json")) == path.read_text()


def measured(suite: str, size: int, baselines: Sequence[str], quantity: str = "seconds") -> list[Row]:
    seconds = [0.01 * size, 0.011 * size]
    made = [
        Row(suite, "CF-EBM", baseline, "", (3, size, size), "bfloat16", 4, "step", quantity) for baseline in baselines
    ]
    return [row.with_values([value * (i + 1) for value in seconds], seconds) for i, row in enumerate(made)]


def test_pages_and_plots_are_made_of_what_is_there(tmp_path: Path) -> None:
    baselines = ["fastebm", "eager, research code", "eager, tuned", "torch.compile", "torchebm"]
    rows = [row for size in (8, 16) for row in measured("chains", size, baselines)]
    rows[-1] = Row("chains", "CF-EBM", "torchebm", "", (3, 16, 16), "bfloat16", 4, "step", note="skipped: not there")
    results, docs = tmp_path / "results", tmp_path / "docs"
    write_runs(results / "cpu-any" / "chains.json", [Run(machine_facts("cpu"), tuple(rows))])
    memory = measured("memory", 256, ["fastebm", "eager, tuned"], "bytes")
    write_runs(results / "cpu-any" / "memory.json", [Run(machine_facts("cpu"), tuple(memory))])
    (results / "cpu-none").mkdir()

    drawn = plots.draw(results, docs)
    assert [path.name for path in drawn] == [f"cpu-any.{kind}.png" for kind in ("ratios", "chains", "memory")]
    (page,) = table.write_pages(results, docs)
    text = page.read_text()
    assert all(f"]({path.name})" in text for path in drawn)
    assert "skipped: not there" in text
    assert text.count("| peer | median |") == 3


def test_stages_are_measured_computed_and_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(setting: stages.Setting, size: int, part: str) -> dict[str, list[float] | int]:
        return {"seconds": [0.01 * size, 0.03 * size, 0.02 * size], "bytes": 2**20 * size}

    def work(setting: stages.Setting, size: int) -> stages.Work:
        return stages.Work(program_flops=2 * size, update_flops=3 * size, numbers=size)

    monkeypatch.setattr(stages, "measured", measured)
    monkeypatch.setattr(stages.Work, "of", work)
    rows = stages.all_rows(stages.Setting(4, 2, "bfloat16", 3), 64, say=lambda line: None)
    found = {(row.shape[-1], row.unit, row.quantity): row for row in rows}
    assert found[64, "step", "seconds"].note == found[8, "update", "bytes"].note == "measured"
    assert found[128, "step", "bytes"].note == "computed: 2 times 64x64"
    assert found[512, "update", "seconds"].median == pytest.approx(0.02 * 512)
    chain = stages.STEPS * 0.02 * (8 + 16 + 32)
    assert found[32, "sample", "seconds"].median == pytest.approx(chain / 2)
    assert found[32, "iteration, recomputed", "seconds"].median == pytest.approx(chain + 0.02 * 32)

    write_runs(tmp_path / "cpu-any" / "stages.json", [Run(machine_facts("cpu"), tuple(rows))])
    text = stages.page(tmp_path)
    assert text.count("**m**") == 1 + 4 * 6
    assert text.count("**c**") == 1 + 3 * 6 + 7 * 3
    assert "step, seconds: 1.00" in text  # the rule, which is exact here


def test_a_part_of_a_stage_is_measured() -> None:
    setting = stages.Setting(4, 1, "bfloat16", 1)
    for part in stages.PARTS:
        figures = stages.measured_here(setting, 8, part)
        assert figures["bytes"] >= 0
        assert figures["seconds"][0] > 0
    low, high = (stages.Work.of(setting, size) for size in (8, 16))
    assert high.ratio(low, "step", "seconds") > 1
    assert high.ratio(low, "update", "bytes") == pytest.approx((16 * 16 + 8 * 8 + 4 * 4) / (8 * 8 + 4 * 4))


def test_rows_of_one_table_have_one_config_and_sizes_have_their_own(tmp_path: Path) -> None:
    trained: list[tuple[str, int, int]] = []

    def train(config: ECVAEConfig, images: object, run: Path) -> None:
        trained.append((run.name, config.size, config.iterations))

    ways: dict[str, dict[str, object]] = {"plain": {"lambda_start": 0.0}, "calibrated": {}}
    presets = {"digits": ECVAEConfig(size=8, channels=1, iterations=5, energy_depth=2)}
    comparison = seeds.Comparison(
        "calibration.py",
        "A page",
        presets,
        ways,
        train,
        lambda run, config, evaluate_samples: {"distance": 1.0},
        lambda name, stored: f"{len(stored['rows'])} rows of {name} at {stored['config']['size']}",
        lambda page, name, runs: None,
    )

    def call(*arguments: str) -> None:
        page = tmp_path / "page"
        comparison.run(comparison.parser("", str(tmp_path / "runs")).parse_args(["digits", str(page), *arguments]))

    call("--seeds", "1", "--size", "8")
    call("--seeds", "1", "--size", "8")  # nothing is missing
    assert trained == [("digits-8-plain-0", 8, 5), ("digits-8-calibrated-0", 8, 5)]
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"digits-8.json", "README.md"}
    assert "2 rows of digits at 8" in (tmp_path / "page" / "README.md").read_text()
    with pytest.raises(SystemExit, match="has rows with iterations 5, not 6: give the same settings"):
        call("--seeds", "2", "--size", "8", "--set", "iterations=6")
    assert len(trained) == 2


def test_one_pass_and_chains_are_measured_side_by_side() -> None:
    tiny = one_pass.Nets(size=8, channels=1, latent=4, width=2, max_width=4, energy_width=2, base_width=1)
    rows = one_pass.measured(tiny, batch=2, rounds=1, device="cpu", slice_seconds=0.0)
    chains = [row["way"] for row in rows if row["gradients"]]
    assert [way.split(",")[0] for way in chains] == ["CF-EBM", "like VAEBM", "like NCSN"]
    assert rows[0]["way"] == one_pass.ONE_PASS
    assert rows[0]["ratio"] == 1
    assert all(row["seconds"][0] > 0 for row in rows)
    assert one_pass.table(rows).count("\n") == 1 + len(rows)


def test_noise_falls_in_ten_levels_of_a_hundred_steps_and_step_sizes_with_its_square() -> None:
    sampler = one_pass.annealed(torch.nn.Flatten())
    num_steps, noise = (evaluate(schedule, 1000) for schedule in (sampler.step_size, sampler.noise_std))
    levels, counts = noise.unique_consecutive(return_counts=True)
    assert counts.tolist() == [100] * 10
    torch.testing.assert_close(levels, torch.logspace(0, -2, 10, dtype=torch.float64) * 0.2**0.5)
    torch.testing.assert_close(num_steps, noise.square() / 2)


def test_latents_and_noise_move_together_under_the_energy_of_the_noisy_image() -> None:
    vae = VAE(8, 1, latent=3, width=2, max_width=4, variance=0.09).eval().requires_grad_(False)
    energy = one_pass.JointEnergy(vae, MultiScaleEnergy(8, 1, width=2).eval()).requires_grad_(False)
    z, noise = torch.randn(2, 3), torch.randn(2, 1, 8, 8)
    state = torch.cat((noise, torch.zeros(2, 1, 8, 8)), 1).requires_grad_()
    with torch.no_grad():
        state[:, 1].flatten(1)[:, :3] = z
    image = vae.decode(z) + 0.3 * noise
    expected = energy.energy(image) + 0.5 * (z.square().sum(1) + noise.square().sum((1, 2, 3)))
    torch.testing.assert_close(energy(state), expected)
    (slope,) = torch.autograd.grad(energy(state).sum(), state)
    assert slope[:, 0].all()
    assert slope[:, 1].flatten(1)[:, :3].all()
    assert not slope[:, 1].flatten(1)[:, 3:].any()  # idle at 0


def test_how_far_a_flow_is_from_its_inverse_is_measured_and_shown() -> None:
    flow = Flow((1, 4, 4), levels=1, num_steps=1, width=2)
    images = torch.rand(3, 1, 4, 4)
    assert calibrated_flow.inverse_error(flow, images) < 1e-5
    decode = flow.decode
    flow.decode = lambda latents: decode(latents) + 0.25  # type: ignore[method-assign]
    assert calibrated_flow.inverse_error(flow, images) == pytest.approx(0.25, abs=1e-5)
    stored = json.loads((ROOT / "docs" / "results" / "ec-flow" / "digits.json").read_text())
    stored["rows"][0]["inverse"] = 2.5e-6
    assert calibrated_flow.table("digits", stored).count("| 2.5e-06 |") == 1


def test_a_page_gets_marks_for_another_table_once_and_keeps_its_words(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    marks.add(page, "a", "one.py")
    assert not page.exists()
    marks.fill(page, "Title", "a", "one.py", "first")
    for table_of_b in ("second", "third"):
        marks.add(page, "b", "one.py")
        marks.fill(page, "Title", "b", "one.py", table_of_b)
    text = page.read_text()
    assert text.startswith("# Title")
    assert (text.count("first"), text.count("second"), text.count("third")) == (1, 0, 1)
