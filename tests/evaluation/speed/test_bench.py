"""The command `fastebm bench` on somebody's own tiny energy, and what it says about wrong ones."""

import sys
from pathlib import Path

import pytest

from fastebm.cli import main
from fastebm.compiler.lanes import executor as lanes_executor
from fastebm.evaluation.speed import baselines, parse_shape, read_runs
from fastebm.evaluation.speed.baselines import RESEARCH, TORCH_COMPILE, TUNED

OWN = """
import functools
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 64, 1))

def function():
    return lambda x: x.square().sum((1, 2, 3))

def flat(): return nn.Flatten()
def number(): return 3
def fails(): raise RuntimeError("no such file\\nat all")
def constant(): return lambda x: torch.zeros(len(x))
def text(): return lambda x: "energy"
def coupled(): return lambda x: x.square().sum((1, 2, 3)) * x.sum()
class Holder:
    net = staticmethod(net)
value = 3
"""
TINY = ["--shape", "1,8,8", "--batch", "3", "--num-steps", "2", "--rounds", "2", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A name of its own for each test, because an imported module stays.
    (tmp_path / "own_energies.py").write_text(OWN)
    (tmp_path / "broken_energies.py").write_text("import missing_library\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_energies", raising=False)


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "cpp_compiler", lambda: None)


@pytest.mark.parametrize("name", ["net", "function", "Holder.net"])
@pytest.mark.usefixtures("_no_compiler")
def test_an_own_energy_makes_a_table_and_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    assert main(["bench", "--energy", f"own_energies:{name}", *TINY, "--out", str(out)]) == 0
    said = capsys.readouterr()
    for baseline in ("fastebm", RESEARCH, TUNED):
        assert baseline in said.out
    assert "torch.compile: skipped: torch.compile needs a C++ compiler, and none was found" in said.out
    assert "preparing a variant" in said.err
    (run,) = read_runs(out)
    rows = {row.baseline: row for row in run.rows}
    assert (rows["fastebm"].shape, rows["fastebm"].batch, rows["fastebm"].dtype) == ((1, 8, 8), 3, "float32")
    assert len(rows[TUNED].values) == 2
    assert rows[TUNED].gradient_error < 1e-4
    assert rows[TORCH_COMPILE].median is None
    assert run.machine["torch"]


@pytest.mark.filterwarnings("default")
def test_a_fault_of_the_compiler_is_no_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object) -> None:
        raise TypeError("a list where a tuple was expected")

    monkeypatch.setattr(lanes_executor, "lower", fails)
    assert main(["bench", "--energy", "own_energies:net", *TINY, "--engine", "auto"]) == 2
    said = capsys.readouterr().err
    assert "fastebm: own_energies:net can't be measured: FaultWarning: the compiler failed for Sequential" in said
    assert "TypeError: a list where a tuple was expected" in said


@pytest.mark.usefixtures("_no_compiler")
def test_without_an_energy_it_is_our_own_net(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["bench", "--shape", "1,4,4", "--batch", "2", "--num-steps", "1", "--rounds", "1", "--engine", "fused"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "bench: CF-EBM 4x4, 2x1x4x4, bfloat16, time of one step" in printed
    assert "fused, bfloat16" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--energy", "own_energies"], "must be package.module:factory, got 'own_energies'"),
        (["--energy", "nowhere_at_all:net"], "nowhere_at_all can't be imported: ModuleNotFoundError"),
        (["--energy", "broken_energies:net"], "broken_energies can't be imported: ModuleNotFoundError"),
        (["--energy", "own_energies:missing"], "own_energies has no missing"),
        (["--energy", "own_energies:value"], "is a int; it must be a function that makes the energy"),
        (["--energy", "own_energies:number"], "returned a int; it must be a module or a function"),
        (["--energy", "own_energies:fails"], "the factory failed: RuntimeError: no such file at all"),
        (
            ["--energy", "own_energies:flat"],
            "returned shape (2, 64) for x of 2x1x8x8",
        ),
        (["--energy", "own_energies:text"], "returned a str for x of 2x1x8x8, not a tensor"),
        (["--energy", "own_energies:net", "--shape", "5"], "fails on samples of 2x5: "),
        (["--energy", "own_energies:constant"], "own_energies:constant can't be measured: RuntimeError: "),
        (["--energy", "own_energies:coupled"], "changes with the other samples of its batch"),
        (["--shape", "3,32"], "must be square images, like 3,32,32"),
        (["--shape", "3,20,20"], "image_size is 20"),
        (["--shape", "3,x"], "--shape must be positive numbers with commas between"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--num-steps", "0"], "--num-steps must be at least 1, got 0"),
        (["--rounds", "-1"], "--rounds must be at least 1, got -1"),
        (["--shape", "0,8,8"], "--shape must be positive numbers with commas between"),
        (["--shape=-1,8,8"], "--shape must be positive numbers with commas between"),
        (["--shape", "1000000000000,8,8"], "--shape must be positive numbers with commas between"),
        (["--shape", "1,100000,100000"], "--shape must be positive numbers with commas between"),
        (["--shape", f"1,{'9' * 5000},8"], "--shape must be positive numbers with commas between"),
        (["--batch", "1000000000"], "would need"),
        (["--batch", "1000000000000"], "--batch must be at most 1,000,000,000"),
        (["--batch", "99999999999999999999"], "--batch must be at most 1,000,000,000"),
        (["--num-steps", "99999999999999999999"], "--num-steps must be at most 1,000,000"),
        (["--rounds", "99999999999999999999"], "--rounds must be at most 1,000,000"),
        (["--out", "kept.json"], "kept.json exists: --overwrite replaces it"),
        (["--out", "folder.json"], "folder.json is a folder"),
        (["--out", "kept.json/r.json"], "can't be written"),
        (["--out", f"{'n' * 300}.json"], "can't be written: File name too long"),
        (["--out", "r.txt"], "--out must end in .json"),
        (["--out", "missing/r.json"], "does not exist"),
        (["--device", "banana"], "'banana' is not a device"),
    ],
)
@pytest.mark.usefixtures("_no_compiler")
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "kept.json").write_text("precious")
    (tmp_path / "folder.json").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir() if path.suffix)
    assert main(["bench", *TINY, *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("bench: ", "  "))]
    assert len(lines) == 1
    assert lines[0].startswith("fastebm: ")
    assert message in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == before
    assert (tmp_path / "kept.json").read_text() == "precious"


def test_shapes() -> None:
    assert parse_shape("3,32,32") == (3, 32, 32)
    assert parse_shape(" 7 ") == (7,)
    for text in ("", "3,,4", "3,-1", "0", "3 4", "9999999,9999999"):
        with pytest.raises(ValueError, match="--shape must be positive numbers"):
            parse_shape(text)


@pytest.mark.usefixtures("_no_compiler")
def test_a_file_is_replaced_when_asked(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("an earlier measurement")
    assert main(["bench", "--energy", "own_energies:function", *TINY, "--out", "r.json", "--overwrite"]) == 0
    assert read_runs(tmp_path / "r.json")
