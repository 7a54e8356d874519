"""The command line as a whole: its help, its exit codes, and what it imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastebm.cli import COMMANDS, main
from tests.cli.tiny_runs import ROOT, TRAIN, start


def test_help_names_the_commands(tmp_path: Path) -> None:
    process = start("--help", cwd=tmp_path)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    commands = {"demo", "train", "resume", "sample", "generate", "denoise", "inpaint", "translate", "interpolate"}
    commands |= {"diagnose", "flight", "detect", "restore", "evaluate", "report", "bench", "info", "build"}
    assert set(re.findall(r"^    (\w+)", printed, re.MULTILINE)) == commands


def test_help_needs_neither_matplotlib_nor_scikit_learn() -> None:
    program = "import sys, fastebm.cli; print([m for m in ('matplotlib', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_of_all_commands_needs_no_pytorch() -> None:
    """Only the file of the command that is asked for is imported: `fastebm --help` is there at once."""
    program = (
        "import sys, fastebm.cli\n"
        "assert fastebm.cli.main(['--help']) == 0\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_has_a_file_of_its_name() -> None:
    files = {path.stem for path in (ROOT / "fastebm" / "cli").glob("*.py")}
    assert set(COMMANDS) <= files
    for name in COMMANDS:
        tree = ast.parse((ROOT / "fastebm" / "cli" / f"{name}.py").read_text())
        assert name.capitalize() in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    process = start("sample", "nowhere", cwd=tmp_path)
    printed, errors = process.communicate(timeout=300)
    assert (process.returncode, printed) == (2, "")
    assert errors == "fastebm: nowhere is not a run of fastebm: it has no config.json\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "fastebm needs a command; there are demo, train, "),
        (["trian"], "fastebm has no command 'trian'; there are demo, "),
        (["train", "ec-vea"], "coarse-to-fine, ec-vae, ec-posterior, ec-flow: did you mean ec-vae?"),
        (["sample", "x", "--cuont", "3"], "there is no option --cuont: did you mean --count?"),
        (["generate", "x", "--cuont", "3"], "there is no option --cuont: did you mean --count?"),
        (["generate", "x"], "the following arguments are required: --count, --out"),
        (["sample", "x", "--count", "9" * 5000], "--count needs an integer, got '999"),
        (["sample", "x", "--count", "1.5"], "--count needs an integer, got '1.5'"),
        (["sample", "x", "--temperature", "nan"], "--temperature needs a finite number, got 'nan'"),
        (["sample", "x", "--temperature"], "--temperature needs one value"),
        (["sample", "x", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, got 'int8'"),
        (["sample", "x", "y"], "unrecognized arguments: y"),
        (["train", "coarse-to-fine", "--adam-betas", "0.5"], "--adam-betas needs 2 values"),
        (["train", "coarse-to-fine", "--num-steps", "0"], "num_steps must lie in [1, 1e+06], got 0"),
        (["train", "coarse-to-fine", "--num-steps", "2.5"], "--num-steps needs an integer, got '2.5'"),
        (["train", "coarse-to-fine", "--step-size", "-1e-3"], "step_size must lie in [1e-12, 1e+12], got -0.001"),
        (["info", "a\nb"], "fastebm: a b is not a run"),
    ],
)
def test_an_argument_error_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert line in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("FASTEBM_CPU", "x", "fastebm: FASTEBM_CPU: "),
        ("FASTEBM_BACKEND", "x", "fastebm: FASTEBM_BACKEND must be one of auto, reference, "),
        ("FASTEBM_BACKEND", "cuda", "fastebm: FASTEBM_BACKEND: backend 'cuda' was asked for but can't run: "),
    ],
)
def test_a_wrong_environment_variable_is_one_line(
    trained: Path, tmp_path: Path, variable: str, value: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    process = start("sample", str(trained), "--count", "1", "--device", "cpu", "--out", "x.npz", cwd=tmp_path)
    printed, errors = process.communicate(timeout=300)
    assert (process.returncode, printed, list(tmp_path.iterdir())) == (2, "", [])
    assert errors.startswith(line)
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory: 1\nError code 12")]
)
def test_too_little_memory_is_one_line_and_a_bug_has_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("fastebm.cli.info.Info.__call__", fail)
    assert main(["info"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("fastebm: not enough memory: ")
    assert errors.count("\n") == 1
    error = RuntimeError("sizes don't match")
    with pytest.raises(RuntimeError, match="sizes don't match"):
        main(["info"])


@pytest.mark.parametrize(
    "arguments", [["paint"], ["train"], ["train", "fine-to-coarse"], ["sample", "x", "--count", "q"]]
)
def test_what_does_not_parse_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed, errors = capsys.readouterr()
    assert (printed, errors.count("\n")) == ("", 1)
    assert errors.startswith("fastebm: ")


def test_a_diverged_run_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--max-energy", "0.001", "--out", str(tmp_path / "run")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fastebm: training stopped at iteration 1: ")


def test_the_traceback_of_an_error_is_there_for_the_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEBM_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="has no config"):
        main(["info", "missing"])
