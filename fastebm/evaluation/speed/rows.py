"""Result rows, one for each case and baseline, and the JSON files that keep them with facts about the machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastebm.compiler.cost_model import Cost
from fastebm.compiler.roofline import Rates
from fastebm.evaluation.speed.measurement import Summary, ratios
from fastebm.runs.files import replacing

FORMAT = 2

# The implementation with which all baselines are compared.
OURS = "fastebm"


@dataclass(frozen=True)
class AchievedRates:
    """Rates that fastebm reached, by its program's count of operations, and those that the machine can reach.

    Attributes:
        flops_per_second, bytes_per_second: the program's own count over the median time.
        gemm_flops_per_second, copy_bytes_per_second: of a large matrix product and a large copy in the same run.
        roofline_share: the least time at those two rates over the median time. Bytes are counted as if each result went
            through memory; a cache can make the share more than 1.
    """

    flops_per_second: float
    bytes_per_second: float
    gemm_flops_per_second: float
    copy_bytes_per_second: float
    roofline_share: float

    @classmethod
    def of(cls, cost: Cost, batch: int, median: float, rates: Rates) -> AchievedRates:
        """For a `cost` a sample and the `median` seconds of `batch` samples."""
        return cls(
            batch * cost.flops / median,
            batch * cost.bytes / median,
            rates.flops,
            rates.bytes,
            batch * rates.seconds(cost) / median,
        )


@dataclass(frozen=True)
class Row:
    """The figures of fastebm or of one baseline in one case.

    Attributes:
        suite, case: names.
        baseline: name of the baseline, or "fastebm".
        variant: how it was run: precision, layout, where its noise was drawn.
        shape: of a sample.
        dtype: that of the comparison, which research code may not follow (see `variant`).
        batch: number of samples.
        unit: what a figure is of: "gradient", "step", "cascade", "iteration", "call".
        quantity: "seconds", or "bytes" for peak memory.
        values: the figure of each round; empty where nothing was measured.
        median, low, high: of the values, with their 20 % and 80 % quantiles.
        ratio, ratio_low, ratio_high: the same of the rounds' ratios to fastebm; above 1 fastebm is better.
        gradient_error: norm of the gradient's difference from float64 autograd over that gradient's norm.
        achieved: for fastebm, where it runs as a program.
        note: further facts, such as the reason why there are no figures.
    """

    suite: str
    case: str
    baseline: str
    variant: str
    shape: tuple[int, ...]
    dtype: str
    batch: int
    unit: str
    quantity: str = "seconds"
    values: tuple[float, ...] = ()
    median: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    gradient_error: float | None = None
    achieved: AchievedRates | None = None
    note: str = ""

    def with_values(self, values: Sequence[float], ours: Sequence[float]) -> Row:
        """The row with its figures, and their ratios to those of fastebm in the same rounds."""
        own, relative = Summary.of(values), Summary.of(ratios(values, ours))
        return dataclasses.replace(
            self,
            values=tuple(float(f"{value:.6g}") for value in values),
            median=own.median,
            low=own.low,
            high=own.high,
            ratio=relative.median,
            ratio_low=relative.low,
            ratio_high=relative.high,
        )

    @property
    def comparison(self) -> tuple[Any, ...]:
        """The fields that rows of one comparison have in common."""
        return self.suite, self.case, self.shape, self.dtype, self.batch, self.unit, self.quantity

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Row:
        """The stored row. Raises ValueError for other fields than a row has."""
        try:
            fields = dict(stored)
            achieved = fields.pop("achieved", None)
            fields["shape"], fields["values"] = tuple(fields["shape"]), tuple(fields["values"])
            return cls(**fields, achieved=None if achieved is None else AchievedRates(**achieved))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a result row: {error}") from error


@dataclass(frozen=True)
class Run:
    """Rows that were measured in one process, and `machine_facts` of it."""

    machine: Mapping[str, Any]
    rows: tuple[Row, ...]


def dtype_name(dtype: torch.dtype | None) -> str:
    """ "bfloat16" for `torch.bfloat16`, "any" for None."""
    return "any" if dtype is None else str(dtype).removeprefix("torch.")


def read_runs(path: Path) -> list[Run]:
    """The runs in a file of results. Raises ValueError where it is not one, OSError where it can't be read."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} holds no results of format {FORMAT}")
    return [Run(run["machine"], tuple(Row.from_json(row) for row in run["rows"])) for run in content["runs"]]


def write_runs(path: Path, runs: Iterable[Run]) -> None:
    """Writes a file of results, all or nothing, a line for each row; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = ",\n".join(_run_text(run) for run in runs)
    with replacing(path) as temporary:
        temporary.write_text(f'{{"format": {FORMAT}, "runs": [\n{stored}\n]}}\n')


def _run_text(run: Run) -> str:
    rows = ",\n".join(json.dumps(dataclasses.asdict(row), allow_nan=False) for row in run.rows)
    return f'{{"machine": {json.dumps(dict(run.machine), allow_nan=False)},\n"rows": [\n{rows}\n]}}'


def record(path: Path, run: Run) -> None:
    """Adds a run to the file at `path`: earlier rows of the same comparisons go, all others stay."""
    fresh = {row.comparison for row in run.rows}
    kept = []
    for earlier in read_runs(path) if path.exists() else []:
        rows = tuple(row for row in earlier.rows if row.comparison not in fresh)
        if rows and earlier.machine == run.machine:
            run = Run(run.machine, (*rows, *run.rows))
        elif rows:
            kept.append(Run(earlier.machine, rows))
    write_runs(path, [*kept, run])
