"""Hostile and careless arguments for every command, which ends with its result and 0, or with one line and 1 or 2."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from PIL import Image

from fastebm.cli import COMMANDS
from fastebm.cli.parser import Option, kind_of, options
from fastebm.cli.train import METHODS, Train
from fastebm.training import CoarseToFineConfig, DigitsSource, ECFlowConfig, ECVAEConfig, train

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120
"""A try that takes longer has not ended: each takes a second or two."""
QUICK: dict[str, list[str]] = {
    "demo": ["--iterations", "1", "1", "--count", "10", "--out", "demo"],
    "resume": ["run"],
    "sample": ["run", "--count", "3", "--out", "out.npz"],
    "generate": ["run", "--count", "3", "--out", "out"],
    "denoise": ["run", "--count", "2", "--num-steps", "2", "--tuning-images", "0", "--out", "out"],
    "inpaint": ["run", "--count", "2", "--num-steps", "2", "--out", "out"],
    "translate": ["run", "--data", "pictures", "--convert", "--count", "2", "--num-steps", "2", "--out", "out"],
    "interpolate": ["run", "--count", "2", "--points", "3", "--iterations", "2", "--out", "out"],
    "diagnose": ["run", "--count", "3", "--num-steps", "2", "--out", "out.png"],
    "flight": ["run"],
    "detect": ["run", "--engine", "autograd", "--count", "8", "--out", "out"],
    "restore": ["run", "--count", "2", "--task", "inpaint-box", "--out", "out"],
    "evaluate": ["run", "--count", "12", "--no-energy-metrics"],
    "report": ["run"],
    "bench": ["--shape", "1,4,4", "--batch", "2", "--out", "out.json"],
    "info": ["run"],
    "build": [],
}
"""Arguments with which a command ends soon."""
REFUSED = {"bench": ["--device", "meta"], "build": ["--no-such-option"]}
"""Arguments with which commands that start compilers, for minutes, are always refused."""
SMALL_NET = ["--iterations", "1", "--batch-size", "4", "--width", "2"]
TRAIN = ["--engine", "autograd", "--log-every", "1", "--out", "new"]
STAGES = ["--base-width", "1", "--num-steps", "2", "--batch-sizes", "4", "4", "--iterations", "1", "1"]
QUICK |= {
    "train coarse-to-fine": [*STAGES, *TRAIN],
    "train ec-vae": [*SMALL_NET, "--latent", "2", "--energy-width", "2", *TRAIN],
    "train ec-posterior": [*SMALL_NET, "--latent", "2", "--num-steps", "1", *TRAIN],
    "train ec-flow": [*SMALL_NET, "--energy-width", "2", "--flow-steps", "1", *TRAIN],
}
INTEGERS = ["0", "-1", "1", "2", "3", "7", "1000", str(10**12), str(2**63), str(2**64), "9" * 40]
FLOATS = ["-1", "0", "0.1", "0.5", "1", "2", "1e-300", "-1e-3", "1e30", "1e300"]
UNREADABLE = ["9" * 5000, "nan", "-inf", "1e400", "1e3x", "0x10", "1,5", "q", ""]
PATHS = [
    *(
        "",
        ".",
        "/",
        "-",
        "~",
        "missing",
        "missing/x.npz",
        "notes.txt",
        "notes.txt/x.npz",
        "empty",
        "pictures",
        "run",
        "vae",
    ),
    *(
        "flow",
        "run/config.json",
        "images.npz",
        "x" * 300,
        "x" * 300 + ".npz",
        "a\nb.npz",
        "ü.npz",
        "\udcff.png",
        "out.png",
    ),
    *("/dev/null", "/dev/full/x.npz", "loop", "loop/x.png", "dangling", "nothing.png", "nothing.npz", "picture.png"),
]
WORDS = [
    "",
    "q",
    "train",
    "test",
    "cpu",
    "cpu:1",
    "cuda",
    "cuda:99",
    "meta",
    "mps",
    "xpu",
    "a=b",
    "a=images.npz",
    "1,8,8",
    "x" * 300,
]
MARKS = ("Traceback", "__tyro", "terminate called", "Segmentation fault", "Exception ignored")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small runs of three methods, images, and files and links that are none of these."""
    folder = tmp_path_factory.mktemp("world") / "world"
    folder.mkdir()
    small: dict[str, Any] = {"size": 8, "channels": 1, "iterations": 1, "batch_size": 4, "width": 2, "energy_width": 2}
    stages: dict[str, Any] = {
        "sizes": (4, 8),
        "iterations": (1, 1),
        "batch_sizes": (4, 4),
        "learning_rates": (1e-3, 1e-3),
    }
    for name, config in {
        "run": CoarseToFineConfig(**stages, channels=1, base_width=1, num_steps=2, engine="autograd"),
        "vae": ECVAEConfig(**small, latent=2, engine="autograd"),
        "flow": ECFlowConfig(**small, flow_steps=1, engine="autograd"),
    }.items():
        train(config, DigitsSource(), folder / name, progress=False, save_pictures=False)
    draws = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(6):
        pixels = draws.integers(0, 256, (9 + number, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    shutil.copy(folder / "pictures" / "0.png", folder / "picture.png")
    np.savez(folder / "images.npz", images=draws.integers(0, 256, (12, 8, 8), dtype=np.uint8))
    (folder / "notes.txt").write_text("precious\n")
    (folder / "nothing.png").touch()
    (folder / "nothing.npz").touch()
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    return folder


class Server:
    """The process that forks for each try."""

    def __init__(self) -> None:
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "100", "MPLBACKEND": "agg"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forking_server.py"))],
            env=os.environ | threads | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def run(self, folder: Path, arguments: list[str]) -> int | None:
        assert self.process.stdin is not None
        order = {"folder": str(folder), "arguments": arguments, "seconds": SECONDS}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        code: int | None = json.loads(self._answer())
        return code

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server ended"
        return line.strip()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.kill()
    server.process.communicate()


def options_of(command: str) -> list[Option]:
    name, *method = command.split()
    if method:
        preset = METHODS[method[0]][0]["digits"]
        types = {"preset": Literal["digits"], "config": type(preset)}
        return list(options(Train, {"preset": "digits", "config": preset}, types))
    return list(options(getattr(importlib.import_module(f"fastebm.cli.{name}"), name.capitalize()), {}, {}))


def values(draw: random.Random, option: Option) -> list[str]:
    """Values for an option of its type, mostly hostile."""
    kind, count = kind_of(option.type)
    if kind is bool:
        return []
    pools = {int: INTEGERS, float: FLOATS, Path: PATHS, str: WORDS}
    pool = [*map(str, get_args(kind))] if get_origin(kind) is Literal else pools[kind]
    pool = UNREADABLE if kind not in (Path, str) and draw.random() < 0.1 else pool
    number = draw.choice([1, 1, 1, 2, 3]) if count == "+" else int(count or 1)
    return draw.choices(pool, k=number)


def hostile(draw: random.Random) -> list[str]:
    """The arguments of a try."""
    command = draw.choice([*QUICK])
    arguments, known = list(QUICK[command]), options_of(command)
    for _ in range(draw.choice([1, 1, 2, 3])):
        option = draw.choice(known)
        given = values(draw, option)
        flag = "--" + option.name.replace("_", "-")
        way = draw.randrange(30)  # mostly a value of an option, which gets further than a wrong form
        if way == 0:
            wrong = list(flag + "x")
            del wrong[draw.randrange(2, len(wrong))]
            arguments += ["".join(wrong), *given]
        elif way == 1 and arguments:
            del arguments[draw.randrange(len(arguments))]
        elif way == 2:
            arguments.insert(
                draw.randrange(len(arguments) + 1), draw.choice(["--", "-x", "extra", "", "--=", "x" * 3000, "\n"])
            )
        elif way == 3 and arguments:
            arguments[draw.randrange(len(arguments))] = draw.choice(PATHS)
        elif way == 4:
            arguments += [flag.replace("-", "_").replace("__", "--", 1), *given]
        elif way == 5 and len(given) == 1:
            arguments.append(f"{flag}={given[0]}")
        elif way == 6 and option.name not in ("run", "samples"):
            arguments += [draw.choice(["--no-" + flag[2:], flag])]
        elif option.name in ("run", "samples"):
            arguments[:1] = given
        else:
            arguments += [flag, *given]
    return [*command.split(), *arguments, *REFUSED.get(command, [])]


def contents(folder: Path) -> dict[str, str]:
    """Digests of a user's own files."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def faults(folder: Path, arguments: list[str], code: int | None, before: dict[str, str]) -> list[str]:
    """What is wrong with the end of a try."""
    printed = (folder.parent / "stdout").read_text(errors="replace")
    errors = (folder.parent / "stderr").read_text(errors="replace")
    if code is None:
        return [f"did not end in {SECONDS} s: {errors[-300:]}"]
    found = [f"{mark}: {errors[-1500:]}" for mark in MARKS if mark in errors or mark in printed]
    if code not in (0, 1, 2):
        found.append(f"exit code {code}: {errors[-500:]}")
    after = contents(folder)
    found += [f"left {name}" for name in after if name.endswith(".part")]
    own = [line for line in errors.splitlines() if line.startswith("fastebm: ")]
    lines = [line for line in own if not line.startswith("fastebm: warning: ")]
    if code:
        if (
            not errors.splitlines()
            or not errors.splitlines()[-1].startswith("fastebm: ")
            or (code == 2 and len(lines) > 1)
        ):
            found.append(f"exit code {code} without one line: {errors[-500:]!r}")
    elif not printed.strip():
        found.append("exit code 0 and nothing printed")
    elif arguments[0] not in ("flight", "info", "resume") and after == before and "usage: " not in printed:
        found.append("exit code 0 and no file is new")
    own = [name for name in before if not name.startswith(("run/", "vae/", "flow/")) or "config.json" in name]
    found += [
        f"{name} was changed" for name in own if after.get(name) != before[name] and "--overwrite" not in arguments
    ]
    return found


def test_every_command_is_tried() -> None:
    assert {command.split()[0] for command in QUICK} == set(COMMANDS)
    assert {command.split()[1] for command in QUICK if " " in command} == set(METHODS)


def test_the_quick_arguments_work(world: Path, server: Server, tmp_path: Path) -> None:
    """Without any hostile one the commands end with 0: else the tries would show nothing."""
    found = {}
    for command, arguments in QUICK.items():
        if command in REFUSED:
            continue
        folder = Path(shutil.copytree(world, tmp_path / command / "world", symlinks=True))
        code = server.run(folder, [*command.split(), *arguments])
        errors = faults(folder, command.split(), code, contents(world))
        if code or errors:
            found[command] = code, errors, (folder.parent / "stderr").read_text()[-500:]
    assert found == {}


def test_hostile_arguments(tries: int, world: Path, server: Server, tmp_path: Path) -> None:
    before, found = contents(world), {}
    for number in range(tries):
        arguments = hostile(random.Random(number))
        folder = Path(shutil.copytree(world, tmp_path / "try" / "world", symlinks=True))
        code = server.run(folder, arguments)
        if wrong := faults(folder, arguments, code, before):
            found[number] = ([argument[:60] for argument in arguments], wrong)
        shutil.rmtree(folder.parent)
    assert not found, "\n".join(f"try {number}: {arguments}: {wrong}" for number, (arguments, wrong) in found.items())
