"""The command `fastebm diagnose`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastebm.cli.arguments import check_range, select_device

MOST_CHAINS, MOST_STEPS = 10_000, 1_000_000
BATCH_PIXELS = 100 * 32**2
"""That run at a time, in images of 32x32 at least."""


@dataclass(frozen=True)
class Diagnose:
    """Run the chains of a coarse-to-fine run, and say what they tell about themselves: mixing, drift, temperature."""

    run: Path
    """folder of the run"""
    count: int = 64
    """number of chains, at most 10,000"""
    num_steps: int | None = None
    """number of Langevin steps at each resolution, at most 1,000,000, over which the noise falls as in training; by
    default as in training"""
    noise_std: float | None = None
    """standard deviation of the noise of each Langevin step, the same in all, so that the chains have a temperature; by
    default that of training, which falls"""
    seed: int | None = None
    """seed of all noise; by default noise that training has not used, always the same"""
    out: Path | None = None
    """.png file for the traces; by default diagnose.png in the run's folder, with diagnose.json beside it"""
    device: str | None = None
    """device that chains run on, cpu or cuda; by default a GPU if there is one"""
    overwrite: bool = False
    """replace a file of that name"""

    def __call__(self) -> int:
        from fastebm.plotting import save_traces
        from fastebm.rng import make_key
        from fastebm.runs.files import check_writable, write_json
        from fastebm.runs.folder import RunFolder
        from fastebm.runs.names import DIAGNOSIS
        from fastebm.sampling.diagnostics import Diagnostics, LevelDiagnostics
        from fastebm.training import CoarseToFineRun

        check_range("--count", self.count, 1, MOST_CHAINS)
        if self.num_steps is not None:
            check_range("--num-steps", self.num_steps, 1, MOST_STEPS)
        if self.noise_std is not None and not 0 <= self.noise_std < math.inf:
            raise ValueError(f"--noise-std must be finite and not negative, got {self.noise_std}")
        if self.seed is not None:
            make_key(self.seed)
        if (kind := RunFolder.existing(self.run).kind()) != "coarse_to_fine":
            raise ValueError(f"{self.run} holds a run of kind {kind}, whose samples take no chain that could be judged")
        found = self.run / DIAGNOSIS if self.out is None else None
        out = self.out or (self.run / DIAGNOSIS).with_suffix(".png")
        if out.suffix != ".png":
            raise ValueError(f"--out must end in .png, got {out}")
        for path in (out, found):
            if path is not None:
                check_writable(path, overwrite=self.overwrite)
        run = CoarseToFineRun.load(self.run, select_device(self.device))
        changed: dict[str, Any] = {} if self.num_steps is None else {"num_steps": self.num_steps}
        if self.noise_std is not None:
            changed |= {"noise_start": self.noise_std, "noise_end": self.noise_std}
        cascade = dataclasses.replace(run, config=dataclasses.replace(run.config, **changed)).cascade()
        key = (run.config.seed, run.config.total_chains) if self.seed is None else (self.seed, 0)
        levels = LevelDiagnostics(Diagnostics(keep_scalars=True), cascade.level_temperatures())
        cascade.sample(
            self.count,
            *key,
            channels=run.config.channels,
            batch_size=max(1, BATCH_PIXELS // max(32, run.size) ** 2),
            on_level_start=levels.start,
            keep=levels.callback,
            progress=True,
        )
        summaries = levels.summaries()
        traces = {
            f"{size}x{size}": {name: summary.scalars[:, :, at] for at, name in enumerate(summary.names)}
            for size, summary in summaries.items()
            if summary.scalars is not None
        }
        places = {f"{size}x{size}": levels.places(size) for size in summaries}
        save_traces(out, traces, places)
        if found is not None:
            told = {f"{size}x{size}": {"verdict": s.verdict(), "table": str(s)} for size, s in summaries.items()}
            write_json(found, {"iteration": run.iteration, "chains": self.count, "levels": told})
        print(f"{self.run}, iteration {run.iteration}: {self.count:,} chains from noise")
        for size, summary in summaries.items():
            print(f"\n{size}x{size}")
            print("\n".join(f"  - {sentence}" for sentence in summary.verdict()))
            print("\n".join(f"  {line}" for line in str(summary).splitlines()))
        print(f"\n{out}: the traces of {', '.join(next(iter(traces.values())))}")
        return 0
