"""`fastebm train ... --seeds N`: the same run with several seeds, one after another, judged, with mean and spread."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastebm.cli.evaluate import Evaluate
from fastebm.distributed import ranks
from fastebm.evaluation.metrics.features import FEATURES_FILE, UNLABELLED
from fastebm.evaluation.sources import open_real
from fastebm.report.seeds import HEADINGS
from fastebm.runs.fields import checked
from fastebm.runs.files import finite_json, is_leftover, read_json, write_json
from fastebm.runs.folder import RunError, RunFolder, config_differences
from fastebm.runs.names import JUDGED, SEEDS
from fastebm.training import DigitsSource, DivergedError, ImageSource, train
from fastebm.training.trainer.config import TrainerConfig
from fastebm.training.trainer.flight import read_summary, records
from fastebm.training.trainer.guard import saved_rollbacks

TAIL = 0.1
"""Share of the lines of a log, the last ones, that say how a run ended."""
JUDGEMENT = ("judged_count", "judged_iteration", "frechet", "reference", "ratio")
"""What is known of a run that was judged; the last three are numbers of as many samples as the first one says."""
SHOWN = HEADINGS | {"ratio": "over the reference"}
"""The numbers of a run that are summarised, and their headings."""


@dataclass(frozen=True)
class Seeds:
    """Runs of `config` with the seeds from its own on, each in a folder `seed-N` of `folder`.

    Finished runs are not trained again, an unfinished one goes on to the same bits, and one that the guard gave up
    stays as it is unless `config` has more retries now. `seeds.json` is written after each run.

    Attributes:
        judge_count: samples that are drawn and compared with real images, as `fastebm evaluate --train-features` does;
            all runs share one classifier, features.safetensors in `folder`. 0 judges none.
    """

    config: TrainerConfig
    source: ImageSource | DigitsSource
    folder: Path
    count: int
    judge_count: int
    device: torch.device

    def __call__(self) -> int:
        if (size := ranks().size) > 1:
            raise ValueError(f"--seeds trains one run after another in one process, and {size} were started")
        dataclasses.replace(self.config, seed=self.config.seed + self.count - 1)  # raises where it is too large
        before = self._check_folder()
        entries: list[dict[str, Any]] = []
        self._write(entries, before)  # a command that is killed in its first run then knows its folder
        for seed in range(self.config.seed, self.config.seed + self.count):
            path = self.folder / f"seed-{seed}"
            known = next((entry for entry in before if entry.get("seed") == seed), {})
            entry = self._trained(seed, path, known)
            if entry["finished"]:
                entry |= self._judged(path, known, entry["iteration"])
            entries.append(entry)
            self._write(entries, before)
            print(self._line(entry), flush=True)
        print(
            f"\n{table(entries)}\n\n{self.folder / SEEDS} has these numbers.\n"
            f"fastebm report {self.folder} makes one page of all runs."
        )
        return 0 if all(entry["finished"] for entry in entries) else 1

    def _check_folder(self) -> list[dict[str, Any]]:
        """The entries that are there already. Raises RunError where the folder holds something else."""
        if RunFolder.is_run(self.folder):
            raise RunError(f"{self.folder} is a single run: --seeds needs a folder of its own for its runs")
        if not (self.folder / SEEDS).exists():
            if self.folder.exists() and any(not is_leftover(entry.name, SEEDS) for entry in self.folder.iterdir()):
                raise RunError(f"{self.folder} exists and holds no runs of --seeds: choose another folder")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunError(f"{self.folder} can't be written to: {error.strerror or error}") from error
            return []
        try:
            content = read_json(self.folder / SEEDS)
            stored = checked("config", content["config"], dict[str, Any])
            entries = [_entry(each) for each in checked("runs", content["runs"], list[Any])]
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise RunError(f"{self.folder / SEEDS} is damaged: {reason}") from error
        differing = {*self.config.mutable_fields, "seed"}
        if differences := config_differences(stored, json.loads(json.dumps(self._settings())), differing):
            raise RunError(f"{self.folder} holds runs with another config ({differences}): choose another folder")
        return entries

    def _settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)

    def _trained(self, seed: int, path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
        """Trains a run to its end, unless it is there, and says how it went."""
        gave_up = known.get("stopped")
        if gave_up is None or known.get("retries", 0) < self.config.retries:
            gave_up = None
            config = dataclasses.replace(self.config, seed=seed)
            if RunFolder.is_run(path) and (threads := RunFolder(path).threads()):
                torch.set_num_threads(threads)
            print(f"{path}: seed {seed}", file=sys.stderr, flush=True)
            try:
                train(config, self.source, path, device=self.device)
            except DivergedError as error:
                gave_up = str(error)
        return {"seed": seed, "run": path.name, "retries": self.config.retries, "stopped": gave_up} | facts(
            path, self.config.total_iterations
        )

    def _judged(self, path: Path, known: Mapping[str, Any], iteration: int) -> dict[str, Any]:
        """The distances of a run's samples from real images, beside those of other real images."""
        wanted = {"judged_count": self.judge_count or known.get("judged_count"), "judged_iteration": iteration}
        if all(known.get(name) == value for name, value in wanted.items()) and (path / JUDGED).is_file():
            return {name: known.get(name) for name in JUDGEMENT}
        if not self.judge_count:
            return {}
        if getattr(self.config, "domain", -1) >= 0:
            return {"not_judged": "a run of one domain is compared with a set of that domain alone"}
        try:
            real = open_real(self.source, self.config.sizes[-1])
            labels = real.train.labels
            Evaluate(
                samples=path,
                count=self.judge_count,
                features=self.folder / FEATURES_FILE,
                train_features=True,
                rotations=labels is None or not bool((labels != UNLABELLED).any()),
                out=path / JUDGED,
                overwrite=True,
                device=str(self.device),
            )()
        except ValueError as error:  # too few images, for instance: the runs are there all the same
            print(f"fastebm: warning: {path} is not judged: {error}", file=sys.stderr, flush=True)
            return {"not_judged": str(error)}
        distances = read_json(path / JUDGED)["in_features"]["distances"]
        samples, reference = distances["samples"], distances.get("reference")
        found: dict[str, Any] = {"frechet": samples["frechet"], "reference": None, "ratio": None}
        if reference is not None:
            beside = distances["samples_at_reference_count"]
            found |= {"reference": reference["frechet"], "ratio": beside["frechet"] / reference["frechet"]}
        return wanted | found

    def _write(self, entries: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> None:
        """Writes all entries that are known, those of seeds that this command did not reach too."""
        done = {entry["seed"] for entry in entries}
        runs = [*entries, *(entry for entry in before if entry.get("seed") not in done)]
        content = {"config": self._settings(), "runs": runs, "summary": summary(runs)}
        try:
            write_json(self.folder / SEEDS, finite_json(content))
        except OSError as error:
            raise RunError(f"{self.folder / SEEDS} could not be written: {error}") from error

    @staticmethod
    def _line(entry: Mapping[str, Any]) -> str:
        if entry["stopped"] is not None:
            return f"seed {entry['seed']}: {entry['stopped']}"
        ratio = f", {entry['ratio']:.2f} times the reference" if entry.get("ratio") is not None else ""
        return f"seed {entry['seed']}: {entry['iteration']} iterations, {entry['rollbacks']} rollbacks{ratio}"


def last_tenth(lines: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The lines of a log, or of one stage, that say how it ended."""
    return lines[-max(1, round(TAIL * len(lines))) :]


def largest_energy(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """The largest magnitude of an energy in lines of a log; None where they have none."""
    names = ("largest_energy_data", "largest_energy_samples")
    return max((line[name] for line in lines for name in names if name in line), default=None)


def facts(path: Path, iterations: int) -> dict[str, Any]:
    """What the log, the checkpoints and the flight records of a run say."""
    folder = RunFolder.existing(path)
    lines = folder.log.lines()
    last = lines[-1] if lines else {}
    tail = last_tenth(lines)
    gaps = [line["gap"] for line in tail if "gap" in line]
    saved = folder.checkpoints.iterations()
    reached = saved[-1] if saved else 0
    return {
        "iteration": reached,
        "finished": reached == iterations,
        "rollbacks": max(int(last.get("attempt", 0)), saved_rollbacks(folder)),
        "minutes": round(last.get("seconds", 0.0) / 60, 2),
        "gap_end": statistics.fmean(gaps) if gaps else None,
        "largest_energy": largest_energy(lines),
        "largest_energy_end": largest_energy(tail),
        "diagnoses": [read_summary(record)["diagnosis"] for record in records(path)],
    }


def _entry(value: Any) -> dict[str, Any]:
    """The entry of a run in seeds.json. Raises KeyError, TypeError, ValueError for another value."""
    entry = checked("a run", value, dict[str, Any])
    for name, hint in {"seed": int, "run": str, "finished": bool, "retries": int, "stopped": str | None}.items():
        entry[name] = checked(f"{name} of a run", entry[name], hint)
    for name in (*SHOWN, *JUDGEMENT):
        checked(f"{name} of a run", entry.get(name), float | None)
    return entry


def summary(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (of one number less than there are) of the numbers of finished runs.

    Those of samples are of the runs that were judged by as many as the first one.
    """
    found: dict[str, Any] = {"runs": len(entries), "finished": sum(bool(entry["finished"]) for entry in entries)}
    for name in SHOWN:
        there = [entry for entry in entries if entry["finished"] and entry.get(name) is not None]
        if name in JUDGEMENT:
            there = [entry for entry in there if entry.get("judged_count") == there[0].get("judged_count")]
        values = [entry[name] for entry in there]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            found[name] = {"mean": statistics.fmean(values), "spread": spread, "count": len(values)}
    return found


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The runs, one a line, and their mean and spread."""
    found = summary(entries)
    names = [name for name in SHOWN if any(entry.get(name) is not None for entry in entries)]
    widths = {name: max(len(SHOWN[name]), 9) for name in names}

    def row(first: str, values: Mapping[str, Any]) -> str:
        cells = (f"{'' if values.get(n) is None else f'{values[n]:.3g}':>{widths[n]}}" for n in names)
        return "  ".join((f"{first:12}", *cells))

    lines = ["  ".join((f"{'seed':12}", *(f"{SHOWN[name]:>{widths[name]}}" for name in names)))]
    lines += [row(f"{e['seed']}" if e["finished"] else f"{e['seed']} (stopped)", e) for e in entries]
    lines += [row(word, {n: found[n][word] for n in names if n in found}) for word in ("mean", "spread")]
    if found["finished"] < len(entries):
        lines.append(f"Mean and spread are of the {found['finished']} runs of {len(entries)} that came to their end.")
    return "\n".join(lines)
