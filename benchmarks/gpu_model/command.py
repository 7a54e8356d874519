"""The command line of a table on docs/results/gpu-model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu_model.instructions import triton_version
from benchmarks.harness import pages


def count(name: str, doc: str | None, rows: Callable[[], list[dict[str, Any]]], arguments: Sequence[str] | None) -> int:
    """Prints the rows, and with --write puts them on the page as the entry `name`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table on docs/results/gpu-model")
    given = parser.parse_args(arguments)
    entry = {"counted with": triton_version(), "rows": rows()}
    for row in entry["rows"]:
        print("; ".join(f"{column} {value}" for column, value in row.items()))
    if given.write:
        pages.add_entry(pages.RESULTS / "gpu-model", name, entry, pages.PAGES["gpu-model"])
    return 0
