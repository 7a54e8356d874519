"""The numbers of a JSON file as tables of a page: the numbers as they are, the names in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEEPEST = 4
LONGEST_LIST = 20
MOST_TABLES = 50
TITLES = {
    "in_features": "In the features of a small classifier",
    "inception": "In the features of Inception",
    "statistics": "Distance from stored statistics",
    "distances": "Distances from real images",
    "comparison": "Distances from real images",
    "classes": "Predicted classes",
    "nearest": "Distance to the nearest training image",
    "energy_metrics": "Energy, and what its chains do",
    "calibration_metrics": "Energy, and what its chains still change",
    "long_chains_in_features": "Samples after more steps, in the features of the classifier",
    "short_chains_in_features": "Samples after short chains, in the features of the classifier",
}
WORDS = {
    "count": "number of samples",
    "num_reference": "number of real images",
    "frechet": "Fréchet distance",
    "kernel": "kernel distance",
    "samples_at_reference_count": "samples, as many as the reference",
    "reference": "reference: other real images",
    "reference_kind": "the reference is of",
    "noise": "uniform noise",
    "names": "classes",
    "median": "median distance",
    "first_percentile": "first percentile (copies are near 0)",
    "found": "classes found",
    "found_start": "classes found, before",
    "found_end": "classes found, after",
    "frechet_start": "Fréchet distance, before",
    "frechet_end": "Fréchet distance, after",
    "confident_start": "share with a confidence of at least 0.9, before",
    "confident_end": "share with a confidence of at least 0.9, after",
    "accuracy": "accuracy of the classifier on held-out images",
    "acceptance_samples": "Metropolis acceptance, from samples",
    "acceptance_data": "Metropolis acceptance, from real images",
    "temperature": "temperature of the last updates",
    "num_steps": "steps of a chain",
    "long_num_steps": "more steps",
    "long_finite_share": "share of chains that stay finite over them",
    "long_motion": "mean change of a pixel by them",
    "long_energy_start": "mean energy before them",
    "long_energy_end": "mean energy after them",
    "confident_share": "share with a confidence of at least 0.9",
    "largest_share": "share of the most frequent class",
    "entropy": "entropy of the classes",
    "counts": "samples of each class",
    "energy_data": "mean energy of real images",
    "energy_samples": "mean energy of samples",
    "energy_ends": "mean energy at the ends of chains",
    "gap": "gap, samples minus real images",
    "gap_ends": "gap at the ends of chains",
    "distance": "squared distance of chains from their starts",
    "noise_floor": "squared distance by noise alone",
    "passed": "all requirements are met",
}
"""Names that need other words than their own."""


@dataclass(frozen=True)
class Table:
    """A table of a page. Cells are texts, numbers, True, False or None, which stands for nothing."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Spread:
    """A number and the standard deviation beside it."""

    value: float
    deviation: float


def words(name: str) -> str:
    """A name of a JSON file as a person would say it."""
    return WORDS.get(name, name.replace("_", " "))


def tables(content: Mapping[str, Any], title: str = "") -> list[Table]:
    """All numbers of a JSON object, with a table for each object in it."""
    found = list(_tables(content, title, DEEPEST))
    unique = [table for number, table in enumerate(found) if table not in found[:number]]
    return unique[:MOST_TABLES]


def _tables(content: Mapping[str, Any], title: str, deepest: int) -> Iterator[Table]:
    inner = {name: value for name, value in content.items() if isinstance(value, Mapping) and value}
    plain = {name: value for name, value in content.items() if name not in inner and name != "note"}
    note = str(content.get("note") or "")
    alike = list(inner.values())
    is_matrix = len(alike) > 1 and all(value.keys() == alike[0].keys() for value in alike) and deepest > 0
    if is_matrix and all(isinstance(value, str) for value in plain.values()):
        note = "; ".join([*filter(None, [note]), *(f"{words(name)} {value}" for name, value in plain.items())])
        plain = {}
    if table := _of_plain(plain, title, note):
        yield table
        note = ""
    if is_matrix:
        yield _matrix(inner, title, note)
    elif deepest:
        for name, value in inner.items():
            yield from _tables(value, TITLES.get(name, words(name)), deepest - 1)
    elif inner:
        yield Table(title, ("", "value"), [(words(name), json.dumps(value)) for name, value in inner.items()], note)


def _of_plain(plain: Mapping[str, Any], title: str, note: str) -> Table | None:
    """Rows of names and values, with those of real images beside those of samples."""
    beside = {name for name in plain if name.endswith("_real") and name.removesuffix("_real") in plain}
    spreads = {name for name in plain if name.endswith("_std") and name.removesuffix("_std") in plain}
    rows = []
    for name, value in plain.items():
        if name in beside or name in spreads:
            continue
        cells = [words(name), _cell(value, plain.get(f"{name}_std"))]
        if beside:
            cells.append(_cell(plain[f"{name}_real"]) if f"{name}_real" in beside else "")
        rows.append(cells)
    columns = ("", "samples", "real images") if beside else ("", "value")
    return Table(title, columns, rows, note) if rows else None


def _matrix(rows: Mapping[str, Mapping[str, Any]], title: str, note: str) -> Table:
    """Objects with the same names, one a row. A row of the samples that says the same once more is left out."""
    first = next(iter(rows.values()))
    names = [name for name in first if not (name.endswith("_std") and name.removesuffix("_std") in first)]
    kept = {
        name: row for name, row in rows.items() if name != "samples_at_reference_count" or row != rows.get("samples")
    }
    cells = [[words(name), *(_cell(row[n], row.get(f"{n}_std")) for n in names)] for name, row in kept.items()]
    return Table(title, ("", *map(words, names)), cells, note)


def _cell(value: Any, deviation: Any = None) -> Any:
    """A value that a page can show. A deviation that is nothing but rounding is left out, as by `fastebm evaluate`."""
    if _is_number(value) and _is_number(deviation) and deviation > 1e-9 * abs(value):
        return Spread(value, deviation)
    if isinstance(value, list | tuple):
        shown = [f"{entry:.4g}" if isinstance(entry, float) else str(entry) for entry in value[:LONGEST_LIST]]
        return ", ".join([*shown, "..."] if len(value) > LONGEST_LIST else shown)
    return json.dumps(value) if isinstance(value, Mapping) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
