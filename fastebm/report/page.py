"""The page itself: what it is made of, how texts and numbers are written in it, and where it is written."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import fastebm
from fastebm.report.pictures import Pictures
from fastebm.report.run import RunPart, describe_run, shell_argument
from fastebm.report.seeds import SeedsPart, describe_seeds
from fastebm.report.tables import Spread
from fastebm.runs.files import check_writable, replacing
from fastebm.runs.folder import RunFolder
from fastebm.runs.names import REPORT, SEEDS

PICTURE_BYTES = 5 * 2**20
"""Bytes of all pictures of a page, as they are written in it."""
LONGEST_TEXT = 4000


def write_report(run: str | Path, out: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Writes one HTML page about a run of any method, finished or not, or about the runs of `fastebm train --seeds`.

    The page needs no other file and no network. What is missing or damaged in the folder is said in it.

    Args:
        run: the folder of the run, or the folder above runs of several seeds.
        out: the file to write, completely or not at all; by default report.html in the folder.
        overwrite: replace a file of that name.

    Returns the path of the page.

    Raises RunError where there is no run, ValueError where the file can't be written.

    Example:
        >>> import tempfile, torch, fastebm
        >>> config = fastebm.training.ECVAEConfig(size=8, channels=1, iterations=2, latent=4, width=4, energy_width=4)
        >>> folder = tempfile.mkdtemp() + "/run"
        >>> trained = fastebm.train(config, torch.zeros(9, 1, 8, 8), folder, progress=False)
        >>> fastebm.report.write_report(folder).name
        'report.html'
    """
    run = Path(run)
    is_seeds = not RunFolder.is_run(run) and (run / SEEDS).is_file()
    if not is_seeds:
        RunFolder.existing(run)
    path = check_writable(run / REPORT if out is None else out, overwrite=overwrite)
    pictures = Pictures(PICTURE_BYTES)
    seeds = describe_seeds(run, path) if is_seeds else None
    parts = [describe_run(folder, pictures, path) for folder in (seeds.runs if seeds else [run])]
    text = render(parts, seeds, datetime.datetime.now(datetime.UTC))
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render(runs: list[RunPart], seeds: SeedsPart | None, date: datetime.datetime) -> str:
    """The text of the page. All texts of runs are escaped: what they hold is shown and never obeyed."""
    environment = Environment(
        loader=PackageLoader("fastebm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size_in_words, "argument": shell_argument}
    template = environment.get_template("page.html")
    return template.render(runs=runs, seeds=seeds, date=date, version=fastebm.__version__)


def finalized(value: Any) -> Any:
    """What the page shows for a value: numbers to four digits with all of them in an attribute, and printable text."""
    if isinstance(value, Markup) or callable(value):
        return value
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Spread):
        return finalized(value.value) + Markup(" ± ") + finalized(value.deviation)
    if isinstance(value, int | float):
        shown = f"{value:,}" if isinstance(value, int) and abs(value) < 10**15 else f"{_as_float(value):.4g}"
        return Markup('<data value="{}">{}</data>').format(_digits(value), shown)
    if isinstance(value, list | tuple):
        return printable(", ".join(str(entry) for entry in value))
    return printable(str(value))


def printable(text: str) -> str:
    """The text without characters that can't be seen or written, which are escaped as Python does, and not too long."""
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}..."
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def size_in_words(count: int) -> str:
    """A number of bytes in words: 700 bytes, 1.2 KiB, 3.4 MiB."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):  # noqa: B007
        if size < 1000:
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _digits(value: float) -> str:
    return repr(value) if not isinstance(value, int) or abs(value) < 10**300 else "a larger number"
