"""benchmarks/gpu.sh runs to its end on a CPU: all steps in small sizes, so that no minute of a GPU is lost to them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import kit, warm

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def rehearsed(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), str(out), sys.executable],
        env=os.environ | {"FASTEBM_REHEARSAL": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def rows(out: Path, step: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows" / f"{step}.jsonl").read_text().splitlines()]


def stand_in(folder: Path, *steps: str) -> Path:
    """A program in the place of Python, by what it does for each step: `python -m benchmarks.gpu STEP OUT`."""
    program = folder / "python"
    program.write_text("\n".join(["#!/bin/bash", 'case "$3" in', *(f"{step};;" for step in steps), "esac", ""]))
    program.chmod(0o755)
    return program


def scripted(out: Path | str, python: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), str(out), str(python)],
        env=os.environ | {"FASTEBM_REHEARSAL": "1"} | environment,
        cwd=python.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended may stay until somebody asks for its status."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


REFUSED = {
    "a file": ({}, r"OUT must be a folder that can be written to, got '.*/file'"),
    "below a file": ({}, r"OUT must be a folder that can be written to, got '.*/file/out'"),
    "earlier": ({}, r"OUT has rows of an earlier run, which stay as they are; give another folder than .*/earlier"),
    "unknown step": ({"STEPS": "facts bitz"}, r"there is no step 'bitz'; steps are build facts .* scale"),
    "time": ({"SECONDS_IN_ALL": "8 minutes"}, r"SECONDS_IN_ALL must be a whole number of seconds, got '8 minutes'"),
    "no Python": ({}, r"there is no Python '.*/python'"),
    "no kit": ({"KIT": "kit/none"}, r"KIT has no compiled operators: .*/kit/none"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_before_any_step(tmp_path, what):
    environment, message = REFUSED[what]
    python = stand_in(tmp_path, 'facts) touch "$4/begun"')
    if what == "no Python":
        python.unlink()
    (tmp_path / "file").touch()
    (tmp_path / "earlier" / "rows").mkdir(parents=True)
    (tmp_path / "earlier" / "rows" / "facts.jsonl").write_text('{"a": 1}\n')
    out = {"a file": "file", "below a file": "file/out", "earlier": "earlier"}.get(what, "out")
    script = scripted(tmp_path / out, python, **{"STEPS": "facts"} | environment)
    said, complaint = script.communicate()
    assert (script.returncode, said) == (2, "")
    assert re.fullmatch(rf"benchmarks/gpu\.sh: {message}\n", complaint), complaint
    assert (tmp_path / "earlier" / "rows" / "facts.jsonl").read_text() == '{"a": 1}\n'
    assert not list(tmp_path.rglob("begun"))


def test_a_step_that_fails_prints_rubbish_or_leaves_work_running_stops_no_other(tmp_path):
    """OUT is one of the caller's folder, and its name has a space."""
    python = stand_in(
        tmp_path,
        "facts) printf 'rubbish \\377\\000'; exit 3",
        'bits) (sleep 600 & echo $! >"$4/left")',
        'replay) rm -f "$4/gpu.tar.gz.new"; ln -s /dev/full "$4/gpu.tar.gz.new"',  # no space left
        'programs) rm "$4/gpu.tar.gz.new"; echo \'{"a": 1}\' >"$4/rows/programs.jsonl"',
    )
    script = scripted("an out", python, STEPS="facts bits replay programs")
    said, _ = script.communicate(timeout=60)
    out = tmp_path / "an out"
    os.kill(int((out / "left").read_text()), signal.SIGKILL)
    assert script.returncode == 1
    assert "failed: facts replay\n" in said
    assert [(row["step"], row["exit"]) for row in rows(out, "steps")] == [
        *(("facts", 3), ("bits", 0), ("replay", 0), ("programs", 0)),
    ]
    with tarfile.open(out / "gpu.tar.gz") as packed:
        assert {"rows/steps.jsonl", "rows/programs.jsonl", "logs/bits.log"} <= {*packed.getnames()}


def test_a_cut_off_step_keeps_its_rows(tmp_path):
    """The first step hangs until the limit of all together; the other one has no time left."""
    python = stand_in(tmp_path, """bits) echo '{"a": 1}' >"$4/rows/bits.jsonl"; sleep 600""", 'scale) touch "$4/begun"')
    script = scripted(tmp_path / "out", python, STEPS="bits scale", SECONDS_IN_ALL="15")
    said, _ = script.communicate(timeout=120)
    assert script.returncode == 1, said
    assert "== scale: no time left" in said
    assert "failed: bits scale\n" in said
    assert rows(tmp_path / "out", "bits") == [{"a": 1}]
    assert [(row["step"], row["exit"]) for row in rows(tmp_path / "out", "steps")] == [("bits", 124)]
    assert not (tmp_path / "out" / "begun").exists()
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as packed:
        assert "rows/bits.jsonl" in packed.getnames()


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stop_ends_the_step_and_packs_what_there_is(tmp_path, with_signal):
    """Also one that hangs and takes no signal but the last."""
    hanging = "trap '' TERM INT; (sleep 600) & echo $! >\"$4/left\"; echo '{}' >\"$4/rows/facts.jsonl\"; wait; wait"
    python = stand_in(tmp_path, f"facts) {hanging}", 'bits) touch "$4/begun"')
    script = scripted(tmp_path / "out", python, STEPS="facts bits")
    rows_of_step = tmp_path / "out" / "rows" / "facts.jsonl"
    while not rows_of_step.exists():
        assert script.poll() is None
        time.sleep(0.05)
    script.send_signal(with_signal)
    said, _ = script.communicate(timeout=60)
    assert script.returncode == 130, said
    assert not (tmp_path / "out" / "begun").exists()
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as packed:
        assert "rows/facts.jsonl" in packed.getnames()
    assert not is_alive(int((tmp_path / "out" / "left").read_text()))


def test_processes_that_warm_up_may_print_anything():
    assert warm._row('{"launched": "a", "kernels": 3}') == {"launched": "a", "kernels": 3}
    for line in ("ptxas info: 0 bytes stack frame", "3", "", "{"):
        assert warm._row(line) == {"said": line}


def test_the_kits_library_says_what_it_was_built_for(tmp_path, monkeypatch):
    """tests/gpu/test_host_build.py reads the answer from a library."""
    commands: list[list[str]] = []
    monkeypatch.setattr(kit, "_run", lambda command: commands.append(command) or "release 13.0, V13.0.88")
    kit.cuda_library(tmp_path, "nvcc")
    images = {match[1] for c in commands for a in c if (match := re.match(r'-DFASTEBM_CUDA_IMAGES="(.*)"', a))}
    assert images == {"7.5 8.0 9.0+PTX"}
    codes = {argument.rsplit("code=")[-1] for c in commands for argument in c if argument.startswith("-gencode")}
    assert codes == {"sm_75", "sm_80", "sm_90", "compute_90"}


@pytest.mark.parametrize("nvcc", [None, "nvcc"])
def test_the_kit_says_what_it_is_for(tmp_path, monkeypatch, capsys, nvcc):
    """Operators of CUDA of an earlier kit do not stay in one that has none."""

    def library(name):
        (tmp_path / name).write_text("compiled")
        return tmp_path / name

    monkeypatch.setattr(kit.shutil, "which", lambda name: nvcc if name == "nvcc" else name)
    monkeypatch.setattr(kit, "cpp_library", lambda scratch, include, suffix: library(f"_C{suffix}"))
    monkeypatch.setattr(kit, "cuda_library", lambda scratch, nvcc: library("_cuda.so"))
    monkeypatch.setattr(kit, "cuda_major", lambda nvcc: "13")
    folder = tmp_path / "kit"
    folder.mkdir()
    (folder / "_cuda.so").write_text("earlier")
    monkeypatch.setattr(sys, "argv", ["kit", str(folder), sys.executable])
    kit.main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"for Python {sys.version_info.major}.{sys.version_info.minor}, ")
    assert ("a torch with CUDA 13, GPUs 7.5 8.0 9.0+PTX" in last) == bool(nvcc)
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {"_C", "commit"} | ({"_cuda"} if nvcc else set())
    assert not nvcc or (folder / "_cuda.so").read_text() == "compiled"


def test_the_kit_asks_for_its_python_before_it_compiles(tmp_path):
    with pytest.raises(SystemExit, match=r"KIT_PYTHON: there is no Python 'python9\.99' here"):
        kit.asked("python9.99")
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho \'{"include": "/nowhere", "suffix": ".so", "version": "3.12"}\'\n')
    bare.chmod(0o755)
    with pytest.raises(SystemExit, match=r"has no headers \(/nowhere/Python\.h\)"):
        kit.asked(str(bare))
    assert kit.asked(sys.executable)["version"] == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_without_a_gpu_it_says_so(tmp_path):
    done = rehearsed(tmp_path, FASTEBM_REHEARSAL="0", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "finds no CUDA GPU" in done.stderr


def test_help_is_the_head_of_the_script():
    done = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "benchmarks/gpu.sh OUT [PYTHON]" in done.stdout
    assert "pipefail" not in done.stdout


def test_what_python_lacks_is_one_line(tmp_path):
    """A Python with nothing but its own library."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out"), str(tmp_path / "bare" / "bin" / "python")],
        env=os.environ | {"STEPS": "facts core", "FASTEBM_REHEARSAL": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.endswith("python -m pip install torch numpy safetensors tqdm pytest scipy\n")
    assert done.stderr.count("\n") == 1


def test_an_unknown_step_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "speed", "out"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "STEP one of facts, " in done.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="done without it")
def test_rehearsal(tmp_path):
    done = rehearsed(tmp_path, SECONDS_IN_ALL="1800", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = {row["step"]: row["exit"] for row in rows(tmp_path, "steps")}
    assert set(found.values()) == {0}
    checks = [row for step in found if step not in ("core", "sanitizer", "build") for row in rows(tmp_path, step)]
    assert sum("ok" in row for row in checks) > 20
    assert all(row.get("ok", True) for row in checks)
    assert not [row for row in checks if "ok" in row and (row.get("calls") == 0 or "skipped" in row)]
