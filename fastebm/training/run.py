"""A run folder, its log, the guard that stops a run before it ends exploded, and the progress bar.

config.json       what was asked for, and by which versions
log.jsonl         one line of health every few iterations
checkpoints/      see `fastebm.training.checkpoints`
*.png             pictures
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastebm.training.checkpoints import Checkpoint, Checkpoints
from fastebm.training.files import replacing, write_json


class RunError(RuntimeError):
    """A run folder that can't be used as asked: another run's, incomplete, or damaged."""


class DivergedError(RuntimeError):
    """Training was stopped because energies exploded or were not finite. Checkpoints made before are good."""


class Guard:
    """Stops a run as soon as an energy is not finite or exceeds `max_energy` in magnitude.

    It looks before every update of the weights, and at the weights themselves before they are saved. Healthy energies
    of CF-EBM nets are about 1 to 20 (2 to 17 in the logs of YangNaruto/ProEBM at 32x32).
    """

    def __init__(self, max_energy: float) -> None:
        self.max_energy = max_energy

    def check(self, iteration: int, health: Mapping[str, float]) -> None:
        """Raises DivergedError if an energy or the gradient is not healthy.

        Args:
            iteration: for the message.
            health: "largest_energy_data" and "largest_energy_samples" (magnitudes) and "gradient_norm" of the weights.
        """
        stopped = f"training stopped at iteration {iteration}"
        for source in ("data", "samples"):
            largest = health[f"largest_energy_{source}"]
            if not math.isfinite(largest):
                raise DivergedError(f"{stopped}: an energy of {source} is {largest}")
            if largest > self.max_energy:
                limit = f"more than max_energy = {self.max_energy:g}"
                raise DivergedError(f"{stopped}: an energy of {source} has the magnitude {largest:.4g}, {limit}")
        if not math.isfinite(health["gradient_norm"]):
            raise DivergedError(f"{stopped}: the gradient of the weights has the norm {health['gradient_norm']}")


class RunFolder:
    """The folder of one run. `open` makes it or takes up the run that is in it; `existing` only reads."""

    def __init__(self, path: Path, keep_checkpoints: int = 3) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", keep_checkpoints)
        self.log = RunLog(path / "log.jsonl")

    @classmethod
    def open(cls, path: str | Path, kind: str, config: Mapping[str, Any], *, keep_checkpoints: int = 3) -> RunFolder:
        """The folder at `path` for a run of `kind` with `config`, new or begun before.

        Raises RunError where it holds another kind of run or one with another config (naming the difference), or files
        of something else.
        """
        folder = cls(Path(path), keep_checkpoints)
        if not folder.is_run(folder.path):
            if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
                raise RunError(f"{path} exists and is not a run of fastebm: choose another folder")
            folder.path.mkdir(parents=True, exist_ok=True)
            write_json(folder._config, {"kind": kind, "config": dict(config), "versions": _versions()})
            return folder
        stored = folder.config(kind)
        # Through JSON, because that makes lists of tuples.
        differences = [
            f"{name} is {stored.get(name)!r} there and {value!r} here"
            for name, value in json.loads(json.dumps(dict(config))).items()
            if stored.get(name) != value
        ]
        if differences:
            raise RunError(f"{path} holds a run with another config ({'; '.join(differences)}): choose another folder")
        return folder

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The folder of a run that was begun before. Raises RunError where there is none."""
        if not cls.is_run(path):
            raise RunError(f"{path} is not a run of fastebm: it has no config.json")
        return cls(Path(path))

    @staticmethod
    def is_run(path: str | Path) -> bool:
        return (Path(path) / "config.json").is_file()

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest good checkpoint, or None where none was saved yet. Raises RunError if all are damaged."""
        saved = self.checkpoints.iterations()
        checkpoint = self.checkpoints.load_newest()
        if checkpoint is None and saved:
            where = self.checkpoints.folder
            raise RunError(f"all {len(saved)} checkpoints in {where} are damaged: choose another folder")
        return checkpoint

    def config(self, kind: str) -> dict[str, Any]:
        """The stored config. Raises RunError if the run is not of `kind`, or the file is damaged."""
        try:
            content = json.loads(self._config.read_text())
            stored_kind, config = content["kind"], dict(content["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self._config} is damaged: {error!r}") from error
        if stored_kind != kind:
            raise RunError(f"{self.path} holds a run of kind {stored_kind!r}, not {kind!r}")
        return config

    @property
    def _config(self) -> Path:
        return self.path / "config.json"


class RunLog:
    """`log.jsonl`: one JSON object a line, in the order of their "iteration"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All lines but a last one that a kill cut short."""
        if not self.path.is_file():
            return []
        complete = [text for text in self.path.read_text().splitlines(keepends=True) if text.endswith("\n")]
        return [json.loads(text) for text in complete]

    def rewind(self, iteration: int) -> None:
        """Removes lines of iterations after `iteration`, which a resumed run is going to write again."""
        kept = [line for line in self.lines() if line["iteration"] <= iteration]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))


class Progress:
    """A bar over all iterations of a run: rate, time left, and what `show` is given."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    @classmethod
    @contextmanager
    def over(cls, total: int, done: int, shown: bool) -> Iterator[Progress]:
        """A bar that stands at `done` of `total`; silent if not `shown`, and seldom redrawn where nobody watches."""
        from tqdm import tqdm

        watched = sys.stderr.isatty()
        with tqdm(
            total=total,
            initial=done,
            disable=not shown,
            unit="it",
            mininterval=0.2 if watched else 10.0,
            ncols=None if watched else 110,
            dynamic_ncols=watched,
        ) as bar:
            yield cls(bar)

    def advance(self, title: str, **numbers: float) -> None:
        self._bar.set_description(title, refresh=False)
        self._bar.set_postfix({name: f"{value:+.3f}" for name, value in numbers.items()}, refresh=False)
        self._bar.update()


def _versions() -> dict[str, str]:
    try:
        own = version("fastebm")
    except PackageNotFoundError:
        own = "not installed"
    return {"fastebm": own, "torch": torch.__version__, "python": platform.python_version()}
