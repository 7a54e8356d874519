"""The command `fastebm`.

What a user gave wrongly is one line on stderr and exit code 2, a run that diverged or a build that failed exit code 1.
A run that SIGTERM stopped, with its last update saved, is exit code 143, and one that Ctrl-C stopped 130.
FASTEBM_TRACEBACK=1 shows the traceback behind such a line.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import fastebm
from fastebm.data import digits
from fastebm.evaluation import judge_digits
from fastebm.ops import backends
from fastebm.training import (
    DIGITS,
    PRESETS,
    CoarseToFineConfig,
    CoarseToFineRun,
    DigitsSource,
    DivergedError,
    ImageSource,
    RunError,
    StoppedError,
    load_coarse_to_fine,
    resume_coarse_to_fine,
    train_coarse_to_fine,
)
from fastebm.training.files import replacing, write_json
from fastebm.training.image_source import source_from_json
from fastebm.training.pictures import save_grid
from fastebm.training.presets import SHAPING
from fastebm.training.run import LOCK, RunFolder

VERDICT = "evaluation.json"


@dataclass(frozen=True)
class Demo:
    """Train on handwritten digits, sample, and judge the samples: minutes on two CPU cores.

    A demo that was stopped goes on where it was; a finished one stays, and the new one goes to a folder with a number.
    """

    out: Path = Path("runs/demo")
    """folder of the run"""
    count: int = 1000
    """samples to draw and judge"""
    iterations: tuple[int, ...] = DIGITS.iterations
    """updates of the weights at 4x4 and at 8x8; fewer are faster and worse"""
    seed: int = DIGITS.seed
    """of weights and all noise"""
    threads: int = 1
    """CPU threads; more make so small a net somewhat faster on idle cores, and many times slower on busy ones"""

    def __call__(self) -> int:
        _check_count(self.count)
        if self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}")
        torch.set_num_threads(self.threads)
        config = dataclasses.replace(DIGITS, iterations=self.iterations, seed=self.seed)
        images, _ = digits("train")
        out = _demo_folder(self.out, config)
        print(
            f"Training an energy model on {len(images)} handwritten digits, coarse to fine, at "
            f"{' and then '.join(f'{size}x{size}' for size in config.sizes)}, in {out}.\n"
            "gap: mean energy of samples minus that of real digits; near 0 the model can't tell them apart.",
            flush=True,
        )
        run = train_coarse_to_fine(config, DigitsSource(), out)
        samples = run.sample(self.count)
        _write_images(out / "samples.npz", samples)
        print("Judging the samples ...", flush=True)
        verdict = judge_digits(samples)
        last = RunFolder.existing(out).log.lines()[-1]
        write_json(out / VERDICT, {**verdict.to_json(), "training_seconds": last["seconds"]})
        print(
            f"\nIn {out}:\n"
            "  samples.png      samples beside real digits: look here first\n"
            "  strip.png        each row a chain, from noise to its digit\n"
            "  curves.png       energies, loss and gradient norm over training\n"
            f"  samples.npz      all {self.count} samples\n"
            f"  {VERDICT}  the numbers below\n"
            "  config.json, log.jsonl, checkpoints/\n\n"
            f"Training took {last['seconds']:.0f} s. In the end the mean energy of real digits was "
            f"{last['energy_data']:.2f}, that of samples {last['energy_samples']:.2f}.\n"
            f"{verdict.explain()}\n\n"
            f"More samples: fastebm sample {out} --count 100 --seed 1 --out more.png"
        )
        # Settings of the user's own promise nothing.
        return int(self == dataclasses.replace(Demo(), out=self.out, threads=self.threads) and not verdict.passed)


@dataclass(frozen=True)
class Train:
    """Train an energy model on your images. A run that was stopped goes on where it was, with the same bits.

    Without --data it learns scikit-learn's digits, in minutes.

    With --data and no preset it takes colour images at 32x32.

    Presets other than digits are the paper's settings on the side of caution. They were not run: they are meant for a
    GPU and many hours.
    """

    method: tyro.conf.Positional[Literal["coarse-to-fine"]]
    """CF-EBM: one energy per resolution, each grown out of the one below"""
    data: Path | None = None
    """a file or folder of images: .npz, CIFAR, STL-10, IDX (MNIST), ImageNet-32, or pictures of any size"""
    preset: Literal["digits", "mnist", "cifar10", "celeba64", "church128", "celebahq256", "celebahq512"] = "digits"
    """settings to start from (not run, but for digits); the flags below change single ones"""
    split: str | None = None
    """part of the data; by default "train", or all where it has no parts"""
    fit: Literal["resize", "pad"] | None = None
    """how images get the size of the last stage: the largest square resized, or black around them; by default as the
    preset has it, or resize"""
    crop: int | None = None
    """side of a square that is cut out of the middle before; by default as the preset has it"""
    key: str | None = None
    """array of an .npz file that holds the images, where its names don't say"""
    out: Path | None = None
    """folder of the run; by default runs/ and the name of the data or the preset"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""
    config: tyro.conf.OmitArgPrefixes[CoarseToFineConfig] = field(default_factory=lambda: DIGITS)

    def __call__(self) -> int:
        source = self._source()
        name = self.preset if self.data is None else self.data.resolve().name.split(".")[0]
        out = Path("runs") / name if self.out is None else self.out
        before = RunFolder(out).checkpoints.iterations()[-1:]
        with _short_warnings():
            run = train_coarse_to_fine(self.config, source, out, device=_device(self.device))
        return _report(run, before)

    def _source(self) -> ImageSource | DigitsSource:
        if self.data is None:
            if self.preset != "digits":
                raise ValueError(f"--preset {self.preset} needs --data, a file or folder of images")
            return DigitsSource()
        shaping = SHAPING.get(self.preset, {}) | {
            name: value for name, value in (("fit", self.fit), ("crop", self.crop)) if value is not None
        }
        size, channels = self.config.sizes[-1], self.config.channels
        return ImageSource(self.data, size, channels, self.split, key=self.key, **shaping)


@dataclass(frozen=True)
class Resume:
    """Take up a run that was stopped, on its own images and with its own settings, to the same bits."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    data: Path | None = None
    """where its images lie now, if they were moved; other images are refused"""
    retries: int | None = None
    """times in all that the guard may go back; more of them give a run that was given up another chance"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""

    def __call__(self) -> int:
        folder = RunFolder.existing(self.run)
        if threads := folder.threads():
            torch.set_num_threads(threads)  # library convolutions on a CPU may sum in another order with others
        before = folder.checkpoints.iterations()[-1:]
        source = self._moved(folder)
        with _short_warnings():
            run = resume_coarse_to_fine(self.run, source, retries=self.retries, device=_device(self.device))
        return _report(run, before)

    def _moved(self, folder: RunFolder) -> ImageSource | None:
        if self.data is None:
            return None
        stored = source_from_json(folder.images() or {"path": str(self.data)})
        if not isinstance(stored, ImageSource):
            raise ValueError(f"{self.run} learns scikit-learn's digits, which lie in no file: leave --data out")
        return dataclasses.replace(stored, path=self.data)


def _report(run: CoarseToFineRun, before: list[int]) -> int:
    if before == [run.iteration]:
        print(f"{run.path} was finished before: {run.iteration} iterations. Another --out makes a new run.")
    else:
        pictures = "samples.png, strip.png and curves.png show the result"
        print(f"{run.path}: trained {run.iteration} iterations. {pictures}.")
    print(f"fastebm sample {run.path} draws more samples.")
    return 0


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Within the block a warning is one line without its place in the code, each as often as it comes."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"\nfastebm: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = show
        yield


@dataclass(frozen=True)
class Sample:
    """Draw samples from a run, finished or not."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
    count: int = 100
    """how many"""
    seed: int | None = None
    """other seeds, other samples; by default always the same ones"""
    out: Path | None = None
    """.npz ("images", float32 in [-1, 1], N x channels x S x S) or .png; by default an .npz in the run's folder"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""

    def __call__(self) -> int:
        _check_count(self.count)
        RunFolder.existing(self.run)
        name = f"samples-{self.count}.npz" if self.seed is None else f"samples-{self.count}-seed-{self.seed}.npz"
        out = self.run / name if self.out is None else self.out
        if out.suffix not in (".npz", ".png"):
            raise ValueError(f"--out must end in .npz or .png, got {out}")
        if not out.parent.is_dir():
            raise ValueError(f"the folder {out.parent} of --out does not exist")
        run = load_coarse_to_fine(self.run, _device(self.device))
        samples = run.sample(self.count, self.seed, progress=True)
        _write_images(out, samples)
        print(f"{out}: {self.count} samples of {run.size}x{run.size} from iteration {run.iteration} of {self.run}")
        return 0


@dataclass(frozen=True)
class Info:
    """Say which versions, devices and backends run here, and test the random numbers; or describe a run."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """folder of a run"""

    def __call__(self) -> int:
        facts = _facts() if self.run is None else _run_facts(self.run)
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:{width}}  {value}")
        return 0


@dataclass(frozen=True)
class Build:
    """Compile the fused operators in place, where the package was installed without them."""

    verbose: bool = False
    """show the compiler's output"""

    def __call__(self) -> int:
        from fastebm.compile import build

        try:
            written = build(verbose=self.verbose)
        except RuntimeError as error:
            _complain(error)
            return 1
        for path in written:
            print(f"built {path}")
        return 0


@dataclass(frozen=True)
class Bench:
    """Measure Langevin chains of an energy, yours or CF-EBM's, against eager PyTorch and torch.compile."""

    energy: str | None = None
    """package.module:factory, a function without arguments that returns an energy (the current folder is searched as
    well); by default the CF-EBM net"""
    shape: str = "3,32,32"
    """of a sample"""
    batch: int = 64
    """chains at a time"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """in which the energy runs"""
    steps: int = 20
    """updates of a chain"""
    rounds: int = 20
    """of the measurement; each runs everything once, in an order of its own"""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """of our gradients"""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one"""
    out: Path | None = None
    """a .json file for the rows, with machine and versions"""

    def __call__(self) -> int:
        from fastebm.evaluation import speed

        device = _device(self.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run = speed.bench(
            self.energy,
            speed.parsed_shape(self.shape),
            batch=self.batch,
            dtype=getattr(torch, self.dtype),
            steps=self.steps,
            rounds=self.rounds,
            engine=self.engine,
            device=device.type,
            out=self.out,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        print(speed.printed(run.rows))
        if self.out is not None:
            print(f"\n{self.out}: the same with machine, versions and each round's figure")
        return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    try:
        command = _parse(sys.argv[1:] if arguments is None else list(arguments))
        return command()
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RunError, OSError) as error:
        _complain(error)
        return 2
    except DivergedError as error:
        _complain(error)
        return 1
    except StoppedError as error:
        _complain(error)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("\nstopped; a run goes on from its last checkpoint when its command is given again", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> Any:
    preset = _preset(arguments)
    train = tyro.conf.subcommand("train", default=Train(tyro.MISSING, preset=preset, config=PRESETS[preset]))
    commands = Demo | Annotated[Train, train] | Resume | Sample | Bench | Info | Build
    description = "Energy-based image models: train, sample, measure, and see what runs here."
    return tyro.cli(commands, prog="fastebm", description=description, args=arguments)  # type: ignore


def _preset(arguments: list[str]) -> Any:
    """The preset that the arguments name, found before they are parsed because it sets the defaults of the others."""
    for given, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = given.partition("=")
        if flag == "--preset" and (name := value if equals else following) in PRESETS:
            return name
    return "cifar10" if any(given.partition("=")[0] == "--data" for given in arguments) else "digits"


def _complain(error: BaseException) -> None:
    if os.environ.get("FASTEBM_TRACEBACK", "0") not in ("", "0"):
        raise error
    print(f"fastebm: {error}", file=sys.stderr)


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not a device: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was given, but there is no CUDA GPU here")
    return device


def _demo_folder(wanted: Path, config: CoarseToFineConfig) -> Path:
    """`wanted`, if it is new or holds this very demo, unfinished; else the first such folder with a number behind."""
    folder, number = wanted, 1
    while not _is_free(folder, config):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    if folder != wanted:
        print(f"{wanted} holds something else, which stays: this run goes to {folder}.")
    return folder


def _is_free(folder: Path, config: CoarseToFineConfig) -> bool:
    if not RunFolder.is_run(folder):
        return not folder.exists() or (folder.is_dir() and all(entry.name == LOCK for entry in folder.iterdir()))
    try:
        stored = CoarseToFineConfig.from_json(RunFolder.existing(folder).config("coarse_to_fine"))
    except RunError:
        return False
    return stored == config and not (folder / VERDICT).exists()


def _write_images(path: Path, images: Tensor) -> None:
    if path.suffix == ".png":
        save_grid(path, images)
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, images=images.cpu().numpy())


def _facts() -> dict[str, Any]:
    """Versions, devices and backends; with the known-answer test of the random numbers that operators use here."""
    report = backends.report()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = {
        "fastebm": fastebm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "CPU": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "GPU": ", ".join(gpus) or "none",
        "operators on the CPU": report.pop("cpu"),
        "operators on a GPU": report.pop("cuda"),
        "random numbers": _known_answer(),
    }
    return facts | {name.replace("_", " "): "none" if value is None else value for name, value in report.items()}


def _known_answer() -> str:
    """Whether the chosen backend gives Random123's answer for Philox4x32-10 with a counter and key of zeros."""
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], dtype=torch.float64)
    expected = (words.float().double() * 2**-32 + 2**-33).float()  # u = fma(float(r), 2^-32, 2^-33)
    try:
        given = fastebm.uniform((1, 4), seed=0)
    except RuntimeError as error:
        return f"not tested: {error}"
    return (
        "known answer given" if torch.equal(given[0], expected) else f"WRONG: {given.tolist()}, not {expected.tolist()}"
    )


def _run_facts(path: Path) -> dict[str, Any]:
    folder = RunFolder.existing(path)
    config = CoarseToFineConfig.from_json(folder.config("coarse_to_fine"))
    facts: dict[str, Any] = {"run": path, "kind": "coarse_to_fine"}
    facts |= dataclasses.asdict(config)
    facts["images"] = folder.images() or "unknown"
    facts["checkpoints"] = ", ".join(map(str, folder.checkpoints.iterations())) or "none"
    lines = folder.log.lines()
    if lines:
        facts["state"] = (
            f"{lines[-1]['iteration']} of {config.total_iterations} iterations, {lines[-1]['seconds']:.0f} s"
        )
        health = ("energy_data", "energy_samples", "gap", "gradient_norm", "displacement", "clamped")
        facts |= {name: f"{lines[-1][name]:.4g}" for name in health if name in lines[-1]}
    return facts


if __name__ == "__main__":
    sys.exit(main())
