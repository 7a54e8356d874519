"""The help of every command: each option with a group, a text and a name for its value; and the rules behind it."""

import dataclasses
import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from fastebm.cli import COMMANDS, METHODS, main
from fastebm.cli.parser import GROUPS, Option, options, parse
from fastebm.cli.restore import Search
from fastebm.cli.train import METHODS as TRAIN_METHODS
from fastebm.cli.train import Train
from fastebm.tasks.restoration import LatentSearch

HELPS = [[name] for name in COMMANDS] + [["train", method] for method in METHODS]


def options_of(command: list[str]) -> list[Option]:
    if command[0] == "train":
        preset = TRAIN_METHODS[command[1]][0]["digits"]
        return list(options(Train, {"config": preset}, {"config": type(preset)}))
    name = command[0]
    return list(options(getattr(importlib.import_module(f"fastebm.cli.{name}"), name.capitalize()), {}, {}))


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_every_option_has_a_line_with_its_value_its_text_and_its_default(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert main([*command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: fastebm {' '.join(command)} [")
    assert "None" not in printed
    shown = in_one_line(printed)
    for option in options_of(command) if command != ["train"] else ():
        if option.name in ("run", "samples"):
            name = rf"\[?{option.name.upper()}\]?"
        else:
            name = rf"--{option.name.replace('_', '-')}(, --no-\S+| [A-Z{{\[][^a-z]*| {{[^}}]*}})"
        text, _, default = option.text.partition("; by default ")
        last = re.escape(default) or "[^)]+"
        assert re.search(rf" {name} {re.escape(text)} \((required|default: {last})\) ", shown), option
        assert len(text.split()) > 1
        assert text.split()[0] not in ("of", "in", "on", "by", "and", "where", "with", "at", "how"), option


def in_one_line(printed: str) -> str:
    """The words of a help on one line."""
    return " ".join(printed.split()) + " "


@pytest.mark.parametrize("method", TRAIN_METHODS)
def test_every_setting_of_a_method_is_in_a_group(method: str) -> None:
    found = options_of(["train", method])
    config = type(TRAIN_METHODS[method][0]["digits"])
    assert {field.name for field in dataclasses.fields(config) if field.init} <= {option.name for option in found}
    assert {option.name for option in found if not option.group} == {"preset", "seed", "seeds", "judge_count"}


def test_the_search_of_restore_has_the_defaults_of_the_library() -> None:
    """They are None, so that a setting without effect is told from one that was not given; its text has the number."""
    said = {option.name: option.text.partition("; by default ")[2] for option in options_of(["restore"])}
    for setting in dataclasses.fields(LatentSearch):
        default = setting.default if isinstance(setting.default, str) else f"{setting.default:g}"
        own = getattr(Search(), setting.name)
        assert (said[setting.name] if own is None else str(own)) == default


@dataclass(frozen=True)
class Inner:
    """Settings inside of a command."""

    rate: float = 0.5
    """rate of something, in units"""


@dataclass(frozen=True)
class Outer:
    """A command of three lines,
    of which this is the second.

    And this the third.
    """

    run: Path
    """folder of the run"""
    out: Path | None = None
    """file to write; by default none at all"""
    fit: Literal["resize", "pad"] | None = None
    """way to fit"""
    flip: bool = False
    """mirror each image"""
    coarse: bool | None = None
    """start low"""
    names: tuple[str, ...] = field(default=(), metadata={"metavar": "NAME"})
    """names of sets"""
    seed: int = 0
    """seed of the noise"""
    count: int = 1
    """number of samples"""
    batch_size: int = field(default=4, metadata={"group": "compute"})
    """number of images at a time"""
    split: str | None = None
    """split of the data"""
    inner: Inner = field(default_factory=Inner)
    unseen: int = field(default=7, init=False)


def test_arguments_become_the_dataclass() -> None:
    arguments = ["a", "--fit", "pad", "--no-coarse", "--names", "x", "y", "--rate", "2", "--batch-size", "1"]
    given = parse(Outer, "outer", arguments)
    expected = Outer(Path("a"), None, "pad", coarse=False, names=("x", "y"), batch_size=1, inner=Inner(2.0))
    assert given == expected
    assert parse(Outer, "outer", ["a"]) == Outer(Path("a"))
    changed = parse(Outer, "outer", ["a"], defaults={"seed": 3, "inner": Inner(4.0)})
    assert changed == Outer(Path("a"), seed=3, inner=Inner(4.0))


def test_options_are_shown_in_groups_and_defaults_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as stopped:
        parse(Outer, "outer", ["--help"])
    assert stopped.value.code == 0
    shown = in_one_line(capsys.readouterr().out)
    assert "A command of three lines, of which this is the second." in shown
    for line in (
        "usage: outer [-h] [OPTIONS] RUN",
        "RUN folder of the run (required)",
        "--out PATH file to write (default: none at all)",
        "--fit {resize,pad} way to fit (default: none)",
        "--flip, --no-flip mirror each image (default: off)",
        "--names NAME [NAME ...] names of sets (default: none)",
        "--split SPLIT split of the data (default: none)",
        "--rate FLOAT rate of something, in units (default: 0.5)",
    ):
        assert line in shown
    groups = re.findall(r"(\w+) options: --", shown)
    assert groups == ["inner", *(name for name in GROUPS if name in ("image", "chain", "compute", "output"))]


def test_without_sources_commands_work_and_have_no_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", gone)
    assert parse(Outer, "outer", ["a", "--seed", "2"]) == Outer(Path("a"), seed=2)
