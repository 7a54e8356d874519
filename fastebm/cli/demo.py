"""The command `fastebm demo`."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fastebm.cli.arguments import check_count, check_range, select_device, write_images
from fastebm.data import digits
from fastebm.distributed import ranks
from fastebm.evaluation import evaluate_digits
from fastebm.memory import check_memory
from fastebm.report import write_report
from fastebm.runs.files import write_json
from fastebm.runs.folder import LOCK, RunFolder
from fastebm.runs.names import REPORT, VERDICT
from fastebm.training import DIGITS, CoarseToFineConfig, DigitsSource, RunError, train


@dataclass(frozen=True)
class Demo:
    """Train on handwritten digits, sample, and judge the samples: minutes on two CPU cores.

    A demo that was stopped continues. A finished one stays as it is, and the next one gets a folder with a number.
    """

    out: Path = Path("runs/demo")
    """folder of the run"""
    count: int = 1000
    """number of samples to draw and judge"""
    iterations: tuple[int, int] = (DIGITS.iterations[0], DIGITS.iterations[1])
    """numbers of updates of the weights at 4x4 and at 8x8; fewer are faster and give worse samples"""
    seed: int = DIGITS.seed
    """seed of the weights and of all noise"""
    threads: int = 1
    """number of CPU threads; more are somewhat faster on idle cores, and many times slower on busy ones"""

    def __call__(self) -> int:
        if (size := ranks().size) > 1:
            raise ValueError(f"the demo is for one process, and {size} were started: fastebm train works with several")
        check_count(self.count)
        check_range("--threads", self.threads, 1, max(64, os.cpu_count() or 1))
        check_memory(f"{self.count:,} samples", 4 * self.count * DIGITS.channels * DIGITS.sizes[-1] ** 2)
        if not self.out.name:
            raise ValueError(f"--out must name a folder, got {self.out}")
        device = select_device(None)
        torch.set_num_threads(self.threads)
        config = dataclasses.replace(DIGITS, iterations=self.iterations, seed=self.seed)
        images, _ = digits("train")
        out = _demo_folder(self.out, config)
        print(
            f"Training an energy model on {len(images)} handwritten digits, coarse to fine, at "
            f"{' and then '.join(f'{size}x{size}' for size in config.sizes)}, in {out}.\n"
            "gap is the mean energy of samples minus that of real digits; near 0 the model can't tell them apart.",
            flush=True,
        )
        run = train(config, DigitsSource(), out, device=device)
        samples = run.sample(self.count)
        write_images(out / "samples.npz", samples)
        print("Judging the samples ...", flush=True)
        verdict = evaluate_digits(samples)
        last = RunFolder.existing(out).log.lines()[-1]
        write_json(out / VERDICT, {**verdict.to_json(), "training_seconds": last["seconds"]})
        page = write_report(out, overwrite=True)
        print(
            f"\nIn {out}:\n"
            "  samples.png      samples beside real digits: look here first\n"
            "  strip.png        chains from noise to digits, one a row\n"
            "  curves.png       energies, loss and gradient norm over training\n"
            f"  samples.npz      all {self.count} samples\n"
            f"  {VERDICT}     the numbers below\n"
            f"  {REPORT}      one page of all this, for any browser\n"
            "  config.json, log.jsonl, checkpoints/\n\n"
            f"Training took {last['seconds']:.0f} s. At its end the mean energy of real digits was "
            f"{last['energy_data']:.2f}, and that of samples {last['energy_samples']:.2f}.\n"
            f"{verdict.explain()}\n\n"
            f"More samples: fastebm sample {out} --count 100 --seed 1 --out more.png\n"
            f"All of it in a browser: {page}"
        )
        # Only the settings of the demo are known to pass; with others the exit code is always 0.
        return int(self == dataclasses.replace(Demo(), out=self.out, threads=self.threads) and not verdict.passed)


def _demo_folder(wanted: Path, config: CoarseToFineConfig) -> Path:
    """`wanted` if it is new or holds the same demo, unfinished; else the first such folder with a number behind it."""
    folder, number = wanted, 1
    while not _is_free(folder, config):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    if folder != wanted:
        print(f"{wanted} holds something else, which stays as it is: this run goes to {folder}.")
    return folder


def _is_free(folder: Path, config: CoarseToFineConfig) -> bool:
    if not RunFolder.is_run(folder):
        return not folder.exists() or (folder.is_dir() and all(entry.name == LOCK for entry in folder.iterdir()))
    try:
        stored = CoarseToFineConfig.from_json(RunFolder.existing(folder).config("coarse_to_fine"))
    except RunError:
        return False
    return stored == config and not (folder / VERDICT).exists()
