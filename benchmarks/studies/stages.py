"""Memory and time of CF-EBM's stages, 8x8 to 512x512: measured where that is feasible, and estimated above.

    python -m benchmarks.studies.stages                            measures up to 256x256, writes the rows and the page
    python -m benchmarks.studies.stages --largest 64 --batch 2     measures less
    python -m benchmarks.studies.stages --page-only                writes the page again from the stored rows

Every measured figure comes from a fresh process (see `peak_memory`): one Langevin update by the fused gradient, or one
update of the weights (real images and as many samples, forward, backward, Adam), with and without recomputation. An
iteration and a sampled image are sums of these over all levels. Above the largest measured stage, time is estimated
from the FLOPs of the captured net and of its gradient's program, and memory from the numbers that go into the blocks.
The estimate of the largest measured stage from the one below is compared with its measurement.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastebm
from benchmarks.harness.pages import ROOT
from benchmarks.harness.peak_memory import ResidentMemory, in_fresh_process
from fastebm.compiler.autodiff import differentiate
from fastebm.compiler.capture import capture
from fastebm.compiler.cost_model import Machine, cost
from fastebm.compiler.rewrites import WITHOUT_POLYPHASE, build_gradient_program
from fastebm.evaluation.speed import Row, Run, Summary, machine_facts, read_runs, record
from fastebm.evaluation.speed.measurement import seconds
from fastebm.evaluation.speed.table import amount, machine_line, markdown_table
from fastebm.models import CoarseToFineEnergy
from fastebm.models.coarse_to_fine import WIDTHS
from fastebm.runs.files import replacing
from fastebm.training.coarse_to_fine.presets import CELEBAHQ512
from fastebm.training.coarse_to_fine.trainer import recompute_blocks

SIZES = CELEBAHQ512.sizes
STEPS = CELEBAHQ512.num_steps
PARTS = ("step", "update", "update, recomputed")
CHAIN = 3  # Langevin updates in a measured chain, which reads the weights once


@dataclass(frozen=True)
class Setting:
    """The settings of all stages: `base_width` of the net, images in a `batch`, `dtype` of nets and updates."""

    base_width: int
    batch: int
    dtype: str
    rounds: int

    def net(self, size: int) -> CoarseToFineEnergy:
        torch.manual_seed(0)
        return CoarseToFineEnergy(size, CELEBAHQ512.channels, base_width=self.base_width)

    @property
    def precision(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def row(self, size: int, unit: str, quantity: str, value: float, note: str) -> Row:
        case, shape = f"CF-EBM, base width {self.base_width}", (CELEBAHQ512.channels, size, size)
        median = float(f"{value:.6g}")
        row = Row("stages", case, "fastebm", "", shape, self.dtype, self.batch, unit, quantity, median=median)
        return replace(row, note=note)


# ---- measured, in a process of its own


def measure_here(setting: Setting, size: int, part: str) -> dict[str, Any]:
    """Bytes at the peak, beyond net and images, and seconds of each round, of one part at one size."""
    net = setting.net(size)
    images = fastebm.ops.uniform((2 * setting.batch, CELEBAHQ512.channels, size, size), seed=0) * 2 - 1
    _case("step", setting, setting.net(8), images[:2, :, :8, :8].contiguous())()  # loads libraries, starts threads
    gc.collect()  # memory that earlier code left must not be freed while we measure
    memory = ResidentMemory()
    before = memory.now()
    case = _case(part, setting, net, images)
    case()  # captures, or makes Adam's moments
    memory.reset_peak()
    case()
    peak = memory.peak() - before
    per = CHAIN if part == "step" else 1
    return {"bytes": peak, "seconds": [seconds(case, 1, "cpu") / per for _ in range(setting.rounds)]}


def _case(part: str, setting: Setting, net: CoarseToFineEnergy, images: torch.Tensor) -> Callable[[], Any]:
    if part == "step":
        sampler = fastebm.Langevin(net.frozen(net.image_size), 1.0, 0.015, dtype=setting.precision, engine="fused")
        x = images[: len(images) // 2]
        return lambda: sampler.sample(x, CHAIN, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), 1e-9, betas=CELEBAHQ512.adam_betas)
    return lambda: _update(net, optimizer, images, setting.precision, part.endswith("recomputed"))


def _update(
    net: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, dtype: torch.dtype, again: bool
) -> None:
    """An update as the trainer makes it; with recomputed blocks the spectral norms make their iteration first."""
    if again:
        with torch.no_grad():
            net.train()(images[:1])
        net.eval()
    x = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
    optimizer.zero_grad()
    with recompute_blocks(net, True) if again else nullcontext():  # type: ignore[arg-type]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            energies = net(x).float()
        half = len(energies) // 2
        (energies[:half].mean() - energies[half:].mean()).backward()
    optimizer.step()
    net.train()


def measure(setting: Setting, size: int, part: str) -> dict[str, Any]:
    """The same from a fresh process. Raises RuntimeError with its error output where it fails."""
    question = json.dumps({"setting": vars(setting), "size": size, "part": part})
    return in_fresh_process("benchmarks.studies.stages", "--one", question)


# ---- estimated


@dataclass(frozen=True)
class Work:
    """The quantities, for one image, from which a stage's figures are estimated.

    Attributes:
        program_flops: FLOPs of the gradient's program.
        update_flops: FLOPs of the net and its derivative as they are written.
        numbers: that go into the blocks.
    """

    program_flops: int
    update_flops: int
    numbers: int

    @classmethod
    def of(cls, setting: Setting, size: int) -> Work:
        net = setting.net(size).frozen(size)
        captured = capture(net, net, torch.zeros(2, CELEBAHQ512.channels, size, size))
        machine = Machine.of(torch.device("cpu"), setting.precision)
        program = build_gradient_program(captured, machine, WITHOUT_POLYPHASE)
        numbers = sum(int(width * setting.base_width) * s * s for s, width in WIDTHS.items() if s <= size)
        return cls(cost(program).flops, cost(differentiate(captured)).flops, numbers)

    def ratio(self, below: Work, part: str, quantity: str) -> float:
        if quantity == "bytes":
            return self.numbers / below.numbers
        if part == "step":
            return self.program_flops / below.program_flops
        return self.update_flops / below.update_flops


def all_rows(setting: Setting, largest: int, log: Callable[[str], None] = print) -> list[Row]:
    """The rows of all stages: parts measured up to `largest` and estimated above, and sums of them over the levels."""
    work = {size: Work.of(setting, size) for size in SIZES}
    found: dict[tuple[int, str, str], Row] = {}

    def median(size: int, part: str, quantity: str = "seconds") -> float:
        return found[size, part, quantity].median or 0.0

    def estimate(size: int, below: int, part: str, quantity: str) -> tuple[float, float]:
        factor = work[size].ratio(work[below], part, quantity)
        return factor, factor * median(below, part, quantity)

    for size, part in itertools.product(SIZES, PARTS):
        measured = measure(setting, size, part) if size <= largest else {}
        for quantity in ("seconds", "bytes"):
            if size <= largest:
                values = measured[quantity] if quantity == "seconds" else [measured[quantity]]
                summary = Summary.of(values)
                row = setting.row(size, part, quantity, summary.median, "measured")
                rounded = tuple(float(f"{value:.6g}") for value in values)
                row = replace(row, values=rounded, median=summary.median, low=summary.low, high=summary.high)
            else:
                factor, value = estimate(size, largest, part, quantity)
                row = setting.row(size, part, quantity, value, f"computed: {factor:.3g} times {largest}x{largest}")
            found[size, part, quantity] = row
        log(f"{size}x{size}, {part}: {amount(median(size, part), 'seconds')}")
    rows = list(found.values())
    for size in SIZES:  # the chain that makes an image runs through all levels up to its size
        chain = STEPS * sum(median(level, "step") for level in SIZES if level <= size)
        rows.append(setting.row(size, "sample", "seconds", chain / setting.batch, "computed: a sum"))
        for part in PARTS[1:]:
            total, unit = chain + median(size, part), part.replace("update", "iteration")
            rows.append(setting.row(size, unit, "seconds", total, "computed: a sum"))
    if largest > SIZES[0]:  # the estimate of the largest measured stage from the one below
        below = largest // 2
        for part, quantity in itertools.product(PARTS, ("seconds", "bytes")):
            value = estimate(largest, below, part, quantity)[1]
            unit = f"{part}, by the rule"
            rows.append(setting.row(largest, unit, quantity, value, f"computed: from {below}x{below}"))
    return rows


# ---- the page

COLUMNS = (
    ("step", "seconds", "Langevin update"),
    ("step", "bytes", "its memory"),
    ("update", "seconds", "update of weights"),
    ("update", "bytes", "its memory"),
    ("update, recomputed", "seconds", "recomputed"),
    ("update, recomputed", "bytes", "its memory"),
    ("iteration", "seconds", "iteration"),
    ("iteration, recomputed", "seconds", "recomputed"),
    ("sample", "seconds", "an image"),
)


def page(results: Path) -> str:
    """The Markdown page of all machines that have `stages.json` under `results`."""
    parts = [
        "# Stages, 8x8 to 512x512",
        "Made by `python -m benchmarks.studies.stages` from `benchmarks/results/*/stages.json`.",
        "A *Langevin update* is one update of a batch at that size. An *update of weights* takes a batch of real "
        "images and as many samples; *recomputed* is the same with `recompute_from`. An *iteration* is "
        f"{STEPS} Langevin updates at each size up to that one and an update of the weights; *an image* is its share "
        "of those Langevin updates. Memory is the peak of resident memory beyond net and images. **m** is measured, "
        "each in a fresh process, medians; **c** is computed: estimated from the largest measured stage by FLOPs "
        "(time) or by numbers that go into the blocks (memory), or a sum.",
    ]
    for path in sorted(results.glob("*/stages.json")):
        for run in read_runs(path):
            parts.append(f"## {path.parent.name}\n\n{machine_line(run)}")
            for case in dict.fromkeys((row.case, row.batch, row.dtype) for row in run.rows):
                rows = [row for row in run.rows if (row.case, row.batch, row.dtype) == case]
                parts += [f"**{case[0]}, batch {case[1]}, {case[2]}**", _table(rows), _check(rows)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(rows: Sequence[Row]) -> str:
    cells = {
        (row.shape[-1], row.unit, row.quantity): f"{amount(row.median, row.quantity)} **{row.note[0]}**" for row in rows
    }
    head = ("size", *(title for _, _, title in COLUMNS))
    return markdown_table(
        head, [(s, *(cells.get((s, unit, quantity), "-") for unit, quantity, _ in COLUMNS)) for s in SIZES]
    )


def _check(rows: Sequence[Row]) -> str:
    """The rule over what was measured, as a ratio for each part."""
    known = {(row.shape[-1], row.unit, row.quantity): row.median for row in rows}
    found = []
    for (size, unit, quantity), value in known.items():
        part = unit.removesuffix(", by the rule")
        base = known.get((size, part, quantity))
        if part != unit and value and base:
            found.append(f"{part}, {quantity}: {value / base:.2f}")
    return f"The rule over what was measured, at the largest measured stage: {'; '.join(found)}." if found else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-width", type=int, default=32, help=f"the preset for 512 has {CELEBAHQ512.base_width}")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=int, choices=SIZES, default=256, help="the largest stage that is measured")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "stages" / "README.md")
    parser.add_argument("--page-only", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        question = json.loads(options.one)
        print(json.dumps(measure_here(Setting(**question["setting"]), question["size"], question["part"])))
        return
    if not options.page_only:
        facts = machine_facts("cpu")
        setting = Setting(options.base_width, options.batch, options.dtype, options.rounds)
        rows = all_rows(setting, options.largest)
        record(options.results / facts["name"] / "stages.json", Run(facts, tuple(rows)))
    options.page.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.page) as temporary:
        temporary.write_text(page(options.results))
    print(f"written: {options.page}")


if __name__ == "__main__":
    main()
