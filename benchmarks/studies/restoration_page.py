"""Keeps what `fastebm restore` left as a page.

FOLDER holds a folder of each call, `SET-TASK`. Their numbers and grids are copied, and the table of the README filled
between marks. Words around it are written by a person, and stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.harness.readme_sections import fill
from fastebm.runs.files import write_json


def table(of: dict[str, dict[str, Any]]) -> str:
    """A row for each way of each call."""
    lines = ["| images, task | way | PSNR, dB | SSIM | misfit | seconds |", "|---|---|---:|---:|---:|---:|"]
    for name, result in of.items():
        for way, reached in result["measures"].items():
            seconds = f"{result['seconds']:.1f}" if way == "restored" else ""
            lines.append(
                f"| {result['images']} of {name} | {way} | {reached['psnr']:.2f} | {reached['ssim']:.3f} | "
                f"{reached['residual_rms']:.1e} | {seconds} |"
            )
    return "\n".join(lines)


def keep(folder: Path, page: Path) -> None:
    """Writes or renews the page."""
    page.mkdir(parents=True, exist_ok=True)
    for call in sorted(path for path in folder.iterdir() if (path / "results.json").exists()):
        result = json.loads((call / "results.json").read_text())
        result["settings"]["out"] = call.name
        write_json(page / f"{call.name}.json", result)
        shutil.copyfile(call / "grid.png", page / f"{call.name}.png")
    results = {path.stem: json.loads(path.read_text()) for path in sorted(page.glob("*.json"))}
    fill(page / "README.md", page.name, "table", Path(__file__).name, table(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", type=Path)
    given = parser.parse_args()
    keep(given.folder, given.page)


if __name__ == "__main__":
    main()
