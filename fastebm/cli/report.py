"""The command `fastebm report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """Write one HTML page about a run of any method, finished or not, or about the runs of `fastebm train --seeds`.

    It shows what the run is, its samples, how they were judged, curves, chains, what the guard did, and its settings.
    The page needs no other file and no network. What is missing or damaged is said in it.
    """

    run: Path
    """folder of the run, or of the runs of several seeds"""
    out: Path | None = None
    """.html file to write; by default report.html in the folder"""
    overwrite: bool = False
    """replace a file of that name"""

    def __call__(self) -> int:
        from fastebm.report.page import size_in_words, write_report

        if self.out is not None and self.out.suffix != ".html":
            raise ValueError(f"--out must end in .html, got {self.out}")
        path = write_report(self.run, self.out, overwrite=self.overwrite)
        print(f"{path}: {size_in_words(path.stat().st_size)}, one page that any browser opens, without a network")
        return 0
