"""Keeps what commands of tasks left as a page: `python -m benchmarks.studies.tasks_page FOLDER docs/results/tasks`.

FOLDER holds a folder of each command's call (`denoise-0.2`, `inpaint-square` and so on, as the page says). Their
pictures and numbers are copied, and the README's tables filled between marks. Words around them are written by a
person, and stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import readme_sections as marks
from fastebm.runs.files import write_json

Numbers = dict[str, Any]
DENOISED = ("denoise-0.2", "denoise-0.4", "cifar10-denoise-0.1", "cifar10-denoise-0.2")
INPAINTED = tuple(
    f"{images}inpaint-{hole}-{start}"
    for images in ("", "cifar10-")
    for hole in ("square", "half", "pixels")
    for start in ("coarse", "full")
)
INPAINT_ERRORS = ("best", "chain_ids", "nearest", "mean", "neighbour_mean")
PATHS = ("images.png", "noise.png", "coarse.png", "neighbours.png")


def rows(head: str, lines: Iterable[str]) -> str:
    """A table whose first column is words and whose others are numbers."""
    return "\n".join([f"| {head} |", "|---|" + "---:|" * head.count("|"), *(f"| {line} |" for line in lines)])


def set_of(name: str) -> str:
    """The images of a call, by the name of its folder."""
    return "CIFAR-10" if name.startswith("cifar10-") else "MNIST"


def denoise_table(of: dict[str, Numbers]) -> str:
    lines = []
    for call in (call for call in DENOISED if call in of):
        numbers = of[call]
        options = numbers["options"]
        how = (
            f"start {options['start_size'] or 'full size'}, {options['chains']} chains of {options['steps']} steps of "
            f"{options['step_size']:g} a level, temperature {options['temperature']:g}, noise {options['noise_std']:g}"
        )
        for name, reached in numbers["quality"].items():
            settings, way = how if name == "restored" else "", f"{set_of(call)}, {numbers['noise']:g}, {name}"
            lines.append(f"{way} | {reached['psnr']:.2f} | {reached['ssim']:.3f} | {settings}")
    return rows("images, noise, way | PSNR, dB | SSIM | settings", lines)


def inpaint_table(of: dict[str, Numbers]) -> str:
    lines = []
    for name in (name for name in INPAINTED if name in of):
        error, numbers = of[name]["error"], of[name]
        start = "lowest resolution" if numbers["options"]["coarse"] else "full size"
        reached = " | ".join(f"{error[of_what]:.3f}" for of_what in INPAINT_ERRORS)
        lines.append(
            f"{set_of(name)}, {numbers['pattern']}, {numbers['images']} images, from {start} | {numbers['hole']:.2f} | "
            f"{reached} | {numbers['diversity']:.3f}"
        )
    head = "images, hole, start | share | lowest energy | all chains | nearest chain | mean of chains"
    return rows(f"{head} | mean of surroundings | spread of chains", lines)


def interpolate_table(of: dict[str, Numbers]) -> str:
    numbers = of["interpolate"]
    images, near = numbers["images"], numbers["neighbours"]
    lines = [
        f"energy at the ends of paths between images | {images['energy_ends']:.2f}",
        f"highest energy of straight paths | {images['highest_energy_straight']:.2f}",
        f"highest energy of relaxed paths | {images['highest_energy_relaxed']:.2f}",
        f"paths that became lower | {images['paths_that_became_lower']} of {images['pairs']}",
    ]
    for between in ("noise", "coarse"):
        path = numbers[between]
        lines.append(f"between {between}: energy at the ends | {path['energy_ends']:.2f}")
        lines.append(f"between {between}: energy in between | {path['energy_between']:.2f}")
        lines.append(f"between {between}: largest step, as a share of the way | {path['largest_step']:.2f}")
    lines += [
        f"distance of samples to the nearest training image | {near['samples']:.2f}",
        f"the smallest of these | {near['samples_smallest']:.2f}",
        f"distance of images that were not learned | {near['unseen_images']:.2f}",
    ]
    return rows("what | value", lines)


TABLES: dict[str, Callable[[dict[str, Numbers]], str]] = {
    "denoise": denoise_table,
    "inpaint": inpaint_table,
    "interpolate": interpolate_table,
}


def filled(text: str, of: dict[str, Numbers]) -> str:
    """`text` with each table between its marks. Raises SystemExit where marks are missing."""
    for name, table in TABLES.items():
        text = marks.filled(text, name, Path(__file__).name, table(of))
    return text


def to_floats(page: Path) -> dict[str, Numbers]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(page.glob("*.json"))}


def keep(folder: Path, page: Path) -> None:
    """Copies pictures and numbers of `folder` to `page`, and renews its tables; calls not made there are left out."""
    page.mkdir(parents=True, exist_ok=True)
    made = [name for name in (*DENOISED, *INPAINTED, "interpolate") if (folder / name).is_dir()]
    for name in made:
        numbers = json.loads((folder / name / "numbers.json").read_text())
        write_json(page / f"{name}.json", numbers | {"run": Path(numbers["run"]).name})
        for picture in ("denoised.png", "inpainted.png"):
            if (folder / name / picture).exists():
                shutil.copyfile(folder / name / picture, page / f"{name}.png")
    for picture in PATHS:
        shutil.copyfile(folder / "interpolate" / picture, page / f"interpolate-{picture}")
    shutil.copyfile(folder / "grid.png", page / "generate.png")
    readme = page / "README.md"
    readme.write_text(filled(readme.read_text(), to_floats(page)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", type=Path)
    given = parser.parse_args()
    keep(given.folder, given.page)


if __name__ == "__main__":
    main()
