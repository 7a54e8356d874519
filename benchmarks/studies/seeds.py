"""The same net trained in several ways, with the same budget and some seeds, and judged alike.

What `calibration.py`, `calibrated_flow.py` and `posterior.py` share: arguments, the loop over rows, and what their
tables have in common.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.readme_sections import add, fill
from benchmarks.studies.sample_metrics import Judge, Row, at_size, labelled_images
from fastebm.data import Images
from fastebm.evaluation import train_features
from fastebm.evaluation.speed.machine import machine_facts
from fastebm.runs.files import write_json


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        script: whose page it is.
        title: of a new page.
        presets: configs by name.
        ways: of training, each by the fields that it changes, the plain one first.
        train: of a config, its images and the run's folder.
        judged: the numbers of a row, from the run's folder and its config.
        table: of a name and what is stored of it.
        pictured: draws the runs of seed 0 that are there, by way, on a page under a name; called after each of them.
    """

    script: str
    title: str
    presets: Mapping[str, Any]
    ways: Mapping[str, Mapping[str, Any]]
    train: Callable[[Any, Images, Path], object]
    judged: Callable[[Path, Any, Judge], Row]
    table: Callable[[str, dict[str, Any]], str]
    pictured: Callable[[Path, str, dict[str, Path]], None]

    def parser(self, description: str | None, runs: str) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("name", choices=sorted(self.presets))
        parser.add_argument("page", type=Path)
        parser.add_argument("--data", type=Path)
        parser.add_argument("--runs", type=Path, default=Path(runs))
        parser.add_argument("--seeds", type=int, default=3)
        parser.add_argument("--size", type=int, help="takes the images at half their size or less")
        parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="changes fields of the preset")
        return parser

    def run(self, given: argparse.Namespace) -> None:
        """Trains and judges what `NAME.json` of the page has no row of, keeps it there, and renews the page's table.

        Under `--size` the name is `NAME-SIZE`. Raises SystemExit where rows are there that had other settings.
        """
        torch.set_num_threads(1)
        given.page.mkdir(parents=True, exist_ok=True)
        name = f"{given.name}-{given.size}" if given.size else given.name
        path = given.page / f"{name}.json"
        stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
        done = {(row["seed"], row["way"]) for row in stored["rows"]}
        missing = [(seed, way) for seed in range(given.seeds) for way in self.ways if (seed, way) not in done]
        if missing:
            self._add_rows(stored, missing, given, path)
        readme = given.page / "README.md"
        add(readme, name, self.script)
        fill(readme, self.title, name, self.script, self.table(given.name, stored))

    def _add_rows(
        self, stored: dict[str, Any], missing: Sequence[tuple[int, str]], given: argparse.Namespace, path: Path
    ) -> None:
        config = self.presets[given.name]
        shape = config.size, config.channels
        if given.size:
            config = dataclasses.replace(config, size=given.size)
        config = changed(config, given.set)
        check_same(stored.get("config", {}), config, path)
        train, test = labelled_images(given.name, given.data, *shape)
        if given.size:
            train, test = (at_size(images, given.size) for images in (train, test))
        features = train_features(train, test, images_seen=100_000 if len(train) > 10_000 else 40_000)
        evaluate_samples = Judge(features, train, test)
        stored |= {"reference": evaluate_samples.reference(), "config": dataclasses.asdict(config)}
        runs = {way: given.runs / f"{path.stem}-{way}-0" for way in self.ways}
        for seed, way in missing:
            run = given.runs / f"{path.stem}-{way}-{seed}"
            self.train(dataclasses.replace(config, seed=seed, **self.ways[way]), train, run)
            stored["rows"].append({"seed": seed, "way": way, **self.judged(run, config, evaluate_samples)})
            print(stored["rows"][-1], flush=True)
            if seed == 0:
                self.pictured(given.page, path.stem, {way: run for way, run in runs.items() if run.exists()})
            write_json(path, stored | {"machine": machine_facts("cpu")})


def changed(config: Any, settings: Sequence[str]) -> Any:
    """The config with fields as `name=value` has them."""
    values = dict(setting.split("=", 1) for setting in settings)
    return dataclasses.replace(
        config, **{n: v if isinstance(getattr(config, n), str) else json.loads(v) for n, v in values.items()}
    )


def check_same(stored: Mapping[str, Any], config: Any, path: Path) -> None:
    """Rows of one table have one config. Raises SystemExit where `stored` has other values in fields of `config`."""
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    others = [f"{name} {stored[name]}, not {now[name]}" for name in now if stored.get(name, now[name]) != now[name]]
    if others:
        raise SystemExit(f"{path} has rows with {'; '.join(others)}: give the same settings, or another page")


def other_size(stored: Mapping[str, Any], preset: Any) -> str:
    """The size of images for a table's first words, where it is not the preset's."""
    return "" if stored["size"] == preset.size else f" at {stored['size']}x{stored['size']}"


def in_order(rows: Sequence[Row]) -> list[Row]:
    """By seed, the plain way first."""
    return sorted(rows, key=lambda row: (row["seed"], row["way"] != "plain"))


def pairs(rows: Sequence[Row], way: str) -> list[tuple[Row, Row]]:
    """The plain row and that of `way` of each seed that has both."""
    by_seed = {name: {row["seed"]: row for row in rows if row["way"] == name} for name in ("plain", way)}
    return [(plain, by_seed[way][seed]) for seed, plain in by_seed["plain"].items() if seed in by_seed[way]]


def gain(pairs: Sequence[tuple[Row, Row]], column: str, *, larger_is_better: bool = False) -> str:
    """On how many of several seeds the second of each pair is better, and by how much beside the spread of seeds."""
    sign = 1 if larger_is_better else -1
    gains = [sign * (row[column] - plain[column]) for plain, row in pairs]
    spread = max(statistics.stdev(row[column] for row in side) for side in zip(*pairs, strict=True))
    return (
        f"on {sum(gain > 0 for gain in gains)} of {len(pairs)} seeds, by {statistics.fmean(gains):.3g} on average; the "
        f"larger of the two standard deviations between seeds is {spread:.3g}"
    )
