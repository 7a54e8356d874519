"""Damaged and forged run folders: they work with the right bits, or one line says what is wrong, and files stay."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastebm
from fastebm.data import digits
from fastebm.runs.checkpoints import Checkpoints
from fastebm.training import RunError, StoppedError
from tests.runs.small_configs import SILENT, small_configs

CONFIGS = small_configs(checkpoint_every=1, log_every=2)
LARGEST = 2**24
"""Bytes of a tensor; the largest of these runs are a hundredth of it."""
WRONG: list[Any] = [
    None,
    "8",
    -1,
    2.5,
    True,
    10**30,
    10**9,
    [],
    {},
    "x" * 999,
    [[1]],
    float("nan"),
    float("inf"),
    "ä\n",
]


@dataclasses.dataclass
class Original:
    """A run with a checkpoint of each iteration, and the samples of each, which a fallback has to give too."""

    path: Path
    samples: dict[int, Tensor]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return digits("train")[0][:50]


@pytest.fixture(scope="module")
def originals(images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Original]:
    """A run of each kind, finished and stopped after its second update."""
    torch.set_num_threads(1)
    made = {}
    for kind, config in CONFIGS.items():
        for finished in (True, False):
            path = tmp_path_factory.mktemp(kind) / "run"

            def stop(line: dict[str, Any], finished: bool = finished) -> None:
                if not finished and line["iteration"] == 3:
                    raise StoppedError

            with contextlib.suppress(StoppedError):
                fastebm.train(config, images, path, on_log=stop, **SILENT)
            samples = {}
            for iteration in Checkpoints(path / "checkpoints").iterations():
                part = tmp_path_factory.mktemp("part") / "run"
                shutil.copytree(path, part)
                for newer in range(iteration + 1, 4):
                    (part / "checkpoints" / f"iteration-{newer:09d}.json").unlink(missing_ok=True)
                samples[iteration] = fastebm.load(part).sample(2, seed=1)
            made[kind, finished] = Original(path, samples)
        assert 3 in made[kind, True].samples
        assert 3 not in made[kind, False].samples
    return made


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that is made within the block, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.largest = max(self.largest, leaf.nbytes)
        return result


# ---- damage: each changes one thing, at random, in a run folder


def any_file(chance: random.Random, run: Path) -> Path:
    group = chance.choice(["config.json", "log.jsonl", "checkpoints/*.json", "checkpoints/*.safetensors"])
    return chance.choice(sorted(run.glob(group)))


def flip(chance: random.Random, run: Path, others: list[Path]) -> None:
    path = any_file(chance, run)
    content = bytearray(path.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(chance: random.Random, run: Path, others: list[Path]) -> None:
    path = any_file(chance, run)
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size + 1)])


def insert(chance: random.Random, run: Path, others: list[Path]) -> None:
    path = any_file(chance, run)
    content = path.read_bytes()
    place = chance.randrange(len(content) + 1)
    path.write_bytes(content[:place] + chance.randbytes(chance.choice([1, 8, 300])) + content[place:])


def replace(chance: random.Random, run: Path, others: list[Path]) -> None:
    path = any_file(chance, run)
    texts = [b"", b"[]", b"null", b"{}", b"3", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{\x00}\x00", bytes(5000)]
    texts += [b"1" * 5000, b"NaN", b'"\\ud800"', (run / "config.json").read_text().encode("utf-16"), b"\xef\xbb\xbf{}"]
    path.write_bytes(chance.choice(texts))


def become_a_folder(chance: random.Random, run: Path, others: list[Path]) -> None:
    path = any_file(chance, run)
    path.unlink()
    path.mkdir()


def vanish(chance: random.Random, run: Path, others: list[Path]) -> None:
    path = chance.choice([any_file(chance, run), run / "checkpoints"])
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def swap(chance: random.Random, run: Path, others: list[Path]) -> None:
    """A file of another run, or of another iteration of this one."""
    path = any_file(chance, run)
    source = chance.choice([run, *others])
    shutil.copyfile(chance.choice(sorted(source.rglob(f"*{path.suffix}"))), path.with_name("new"))
    path.with_name("new").replace(path)


def checkpoints_of_another_run(chance: random.Random, run: Path, others: list[Path]) -> None:
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(chance.choice(others) / "checkpoints", run / "checkpoints")


def wrong_entry(chance: random.Random, run: Path, others: list[Path]) -> None:
    """An entry of config.json or of a line of the log: of a wrong type, missing, unknown, or given twice."""
    path = chance.choice([run / "config.json", run / "log.jsonl"])
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = chance.randrange(len(lines))
    content = json.loads(lines[number])
    change_entry(chance, content["config"] if chance.random() < 0.8 and "config" in content else content)
    lines[number] = json.dumps(content)
    if chance.random() < 0.1:
        lines[number] = lines[number].replace("{", '{"iteration": 1, "kind": "ec_vae", "iteration": 1,', 1)
    path.write_text("\n".join(lines) + "\n")


def change_entry(chance: random.Random, content: dict[str, Any]) -> None:
    name = chance.choice(sorted(content))
    kind = chance.randrange(4)
    if kind == 0:
        del content[name]
    elif kind == 1:
        content[chance.choice(["", "unknown", "sizes ", "size", "__class__"])] = chance.choice(WRONG)
    else:
        content[name] = chance.choice(WRONG)


def forged(chance: random.Random, run: Path, others: list[Path]) -> None:
    """Checkpoints with digests that match, and a tensor or an entry of their state that does not belong there."""
    checkpoints = Checkpoints(run / "checkpoints", keep=100)
    for iteration in checkpoints.iterations()[-chance.choice([1, 100]) :]:
        found = checkpoints._load(iteration)
        tensors, state = dict(found.tensors), copy.deepcopy(found.state)
        name = chance.choice(sorted(tensors))
        tensor = tensors[name]
        kind = chance.randrange(9)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[chance.choice(["", "net.", "optimizer.x.step", "vae", "ä", "net.head.linear.more"])] = (
                tensor.clone()
            )
        elif kind == 2:
            tensors[name] = tensor.new_zeros(chance.choice([(0,), (77,), (1, 2, 3), (*tensor.shape, 1)]))
        elif kind == 3:
            kinds = [torch.float64, torch.int64, torch.bool, torch.float16, torch.uint8, torch.float8_e4m3fn]
            tensors[name] = tensor.to(chance.choice(kinds))
        elif kind == 4:
            value = chance.choice([float("nan"), float("inf"), -float("inf")])
            tensors[name] = tensor * value if tensor.is_floating_point() else tensor.float() + value
        elif kind == 5:
            # Without all of Adam's moments a checkpoint is one from before the first update.
            prefix = chance.choice(sorted(key.split(".")[0] for key in tensors if "optimizer" not in key))
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
        elif kind == 6:
            tensors = {}
        else:
            change_entry(chance, state.get("config", state) if kind == 8 else state)
        try:
            checkpoints.save(iteration, tensors, state)
        except ValueError:  # JSON has no NaN
            checkpoints.save(iteration, {name: tensor * float("nan")}, found.state)


def lying_header(chance: random.Random, run: Path, others: list[Path]) -> None:
    """A header of a safetensors file that promises more or other than there is, with digests that match."""
    checkpoints = Checkpoints(run / "checkpoints", keep=100)
    iteration = checkpoints.iterations()[-1]
    found = checkpoints._load(iteration)
    weights, _ = checkpoints._paths(iteration)
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header[chance.choice(sorted(header))]
    if chance.random() < 0.5:
        entry["shape"] = chance.choice([[2**40], [-1], [2**62, 4], [1] * 100, ["a"], None])
    else:
        entry["data_offsets"] = chance.choice([[0, 2**50], [8, 4], [-4, 4], [0], [0, 0]])
    text = json.dumps(header).encode()
    claimed = chance.choice([len(text), 2**63, 0, len(text) + 10**9])
    weights.write_bytes(claimed.to_bytes(8, "little") + text + content[8 + length :])
    checkpoints._describe(iteration, hashlib.sha256(weights.read_bytes()).hexdigest(), found.state)


DAMAGES: list[Callable[[random.Random, Path, list[Path]], None]] = [
    flip, flip, flip, cut, insert, replace, become_a_folder, vanish, swap, checkpoints_of_another_run, wrong_entry,
    wrong_entry, wrong_entry, forged, forged, forged, lying_header,
]  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def judged(act: Callable[[], fastebm.training.Run], original: Original, run: Path) -> Iterator[str]:
    """What is wrong with the end of an action on a damaged run."""
    before = contents(run)
    with warnings.catch_warnings(record=True) as warned, Sizes() as sizes:
        warnings.simplefilter("always")
        try:
            found = act()
            samples = found.sample(2, seed=1)
        except (RunError, ValueError) as error:
            if "\n" in str(error) or len(str(error)) > 1500:
                yield f"not one line: {error}"
            if contents(run) != before:
                yield f"a failure changed files: {error}"
            return
        except Exception as error:
            yield f"{type(error).__name__}: {error}"
            return
        finally:
            if sizes.largest > LARGEST:
                yield f"a tensor of {sizes.largest} bytes was made"
    newest = max(original.samples)
    settings = [
        {name: value for name, value in dataclasses.asdict(config).items() if name in ("engine", "max_batch")}
        for config in (found.config, CONFIGS[found.config.kind])
    ]
    if settings[0] != settings[1]:  # which may be changed, and change the rounding
        return
    if found.iteration not in original.samples or not torch.equal(samples, original.samples[found.iteration]):
        yield f"other samples, of iteration {found.iteration}"
    if found.iteration < newest and not any("is damaged" in str(warning.message) for warning in warned):
        missing = not (run / "checkpoints" / f"iteration-{newest:09d}.json").exists()
        if not missing:
            yield f"iteration {found.iteration} in place of {newest} without a word"


def test_damaged_runs_work_or_say_why(
    originals: dict[tuple[str, bool], Original], images: Tensor, tmp_path: Path, tries: int
) -> None:
    findings = []
    for number in range(tries):
        chance = random.Random(number)
        kind, finished = chance.choice(sorted(CONFIGS)), chance.random() < 0.5
        original, whole = originals[kind, finished], originals[kind, True]
        run = tmp_path / str(number)
        shutil.copytree(original.path, run)
        damage = chance.choice(DAMAGES)
        damage(chance, run, [other.path for key, other in originals.items() if key[0] != kind])
        actions: list[tuple[Callable[[], fastebm.training.Run], Original]] = [
            (lambda run=run: fastebm.load(run), original),
            (lambda run=run: fastebm.resume(run, images, **SILENT), whole),
        ]
        for name, (act, expected) in zip(("load", "resume"), actions, strict=True):
            findings += [f"{number} {kind} {damage.__name__} {name}: {fault}" for fault in judged(act, expected, run)]
        shutil.rmtree(run)
    assert not findings, "\n".join(findings)


def test_each_flipped_bit_of_weights_is_noticed(originals: dict[tuple[str, bool], Original], tmp_path: Path) -> None:
    original = originals["ec_posterior", True]
    shutil.copytree(original.path, tmp_path / "run")
    (weights,) = (tmp_path / "run" / "checkpoints").glob("*3.safetensors")
    content = weights.read_bytes()
    chance = random.Random(0)
    for _ in range(20):
        spoiled = bytearray(content)
        spoiled[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        weights.write_bytes(spoiled)
        with pytest.warns(RuntimeWarning, match="000000003.safetensors is damaged"):
            assert fastebm.load(tmp_path / "run").iteration == 2
