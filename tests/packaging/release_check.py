"""`make release-check`: builds what a release consists of, installs it as a stranger would, and runs it there.

    python tests/packaging/release_check.py [--final] [--stand-ins | --cuda] [--out FOLDER]

Everything is made from the last commit, in a folder of its own: the source distribution from an export of the tree, the
wheel from the source distribution. The wheel is installed into new environments, one with the pinned torch and the
newest Triton, one with the oldest of both. What they run stands outside of any source tree.
"""

from __future__ import annotations

import argparse
import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.packaging import contents, machine_code, statements  # noqa: E402
from tests.packaging.cuda_stand_ins import make_stand_ins  # noqa: E402

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
DROPPED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "FASTEBM_BACKEND", "FASTEBM_CPU", "TRITON_INTERPRET")
# No Triton kernel needs a GPU in the interpreter; its noise is that of C++ but for fused multiply-adds.
INTERPRETED = """
import os, torch, fastebm
with fastebm.ops.backend("cpp"):
    expected = fastebm.ops.normal((4, 33), seed=1)
with fastebm.ops.backend("triton"):
    torch.testing.assert_close(fastebm.ops.normal((4, 33), seed=1), expected, rtol=1e-5, atol=1e-5)
"""


@dataclass
class Table:
    """What was checked where, and how it ended; lines are printed as they come."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, where: str, what: str, outcome: str, note: str = "") -> bool:
        """Adds a row; returns whether it is not a failure."""
        first, *rest = note.strip().splitlines() or [""]
        self.rows.append((where, what, outcome, first))
        print(f"  {outcome:8} {where}: {what}{f': {first}' if first else ''}", *rest, sep="\n    ", flush=True)
        return outcome != FAILED

    def verdict(self, where: str, what: str, faults: Sequence[str], note: str = "") -> bool:
        """Adds a row that passed where there are no faults."""
        return self.add(where, what, FAILED if faults else PASSED, "\n".join(faults) if faults else note)

    def text(self) -> str:
        """The table, as text."""
        widths = [max(len(row[column]) for row in self.rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in self.rows
        )

    def failures(self) -> int:
        """How many rows failed."""
        return sum(outcome == FAILED for _, _, outcome, _ in self.rows)


def clean(**changes: str) -> dict[str, str]:
    """This process's environment without what would lead a child back to a checkout, and with changes."""
    return {name: value for name, value in os.environ.items() if name not in DROPPED} | changes


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> tuple[bool, str]:
    """Whether a command succeeded, and what it printed on both streams."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=dict(env or clean()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode == 0, done.stdout


def end(text: str, lines: int = 12) -> str:
    """The last lines of a log, the very last one first, which says most."""
    kept = [line for line in text.strip().splitlines() if line.strip()][-lines:]
    return "\n".join([kept[-1], *kept[:-1]]) if kept else "it printed nothing"


# --- what is built ---------------------------------------------------------------------------------------------------


def export(table: Table, out: Path, final: bool) -> Path:
    """The tree of the last commit, and whether it is what a release needs."""
    tree = out / "tree"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=tree, input=archive, check=True)
    commit = run("git", "rev-parse", "--short", "HEAD", cwd=ROOT)[1].strip()
    changed = run("git", "status", "--porcelain", cwd=ROOT)[1].splitlines()
    note = f"commit {commit}" + (f", without {len(changed)} changed files of the working tree" if changed else "")
    table.verdict("tree", "export of the last commit", [note] if changed and final else [], note)
    try:
        newest, faults = statements.releases(tree)[0], statements.faults(tree, final)
    except ValueError as error:
        sys.exit(str(error))
    table.verdict("tree", "versions agree", faults, f"{newest.version}, {newest.day or 'unreleased'}")
    return tree


def build_sdist(table: Table, tree: Path, out: Path) -> Path | None:
    """The source distribution of the tree, unpacked: its folder."""
    files = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    built, log = run(sys.executable, "-c", program, cwd=tree)
    if not table.verdict("sdist", "is built", [] if built else [end(log)]):
        return None
    (archive,) = out.glob("*.tar.gz")
    compare(table, "sdist", contents.names_in_sdist(archive), contents.expected_in_sdist(files), archive)
    with tarfile.open(archive) as held:
        held.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


def build_wheel(table: Table, tree: Path, unpacked: Path, out: Path) -> Path | None:
    """The wheel of the source distribution, compared with the tree."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir", "--verbose", "--wheel-dir", out)
    built, log = run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=unpacked)
    if built and "WITHOUT its compiled operators" in log:
        built, log = False, "it has no compiled operators: torch or a C++ compiler is missing here"
    if not table.verdict("wheel", "is built from the sdist", [] if built else [end(log)]):
        return None
    (wheel,) = out.glob("*.whl")
    names = contents.names_in_wheel(wheel)
    files = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    expected = contents.expected_in_wheel(files, statements.package_version(tree))
    compare(table, "wheel", names - contents.libraries(names), expected, wheel)
    folder = out / "wheel"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    changed = [name for name in sorted(expected) if ".dist-info/" not in name and not same(folder, name, tree)]
    table.verdict("wheel", "its files are those of the tree", [f"other bytes: {', '.join(changed)}"] if changed else [])
    check_machine_code(table, [folder / name for name in contents.libraries(names)])
    return wheel


def same(folder: Path, name: str, tree: Path) -> bool:
    """Whether a file of the wheel is the tree's."""
    return filecmp.cmp(folder / name, tree / name.replace("fastebm/csrc/", "csrc/", 1), shallow=False)


def compare(table: Table, where: str, names: set[str], expected: set[str], archive: Path) -> None:
    """A row for the files of a distribution against those of the rule."""
    faults = [f"missing: {name}" for name in sorted(expected - names)] + [
        f"surplus: {name}" for name in sorted(names - expected)
    ]
    table.verdict(
        where,
        "holds what it should",
        faults,
        f"{archive.name}, {len(names)} files, {archive.stat().st_size / 2**20:.1f} MiB",
    )


def check_machine_code(table: Table, libraries: Sequence[Path]) -> None:
    """A row for each library: no wide instruction outside of its variant."""
    objdump = shutil.which("objdump")
    for library in libraries:
        if objdump is None:
            table.add("wheel", f"instructions of {library.name}", SKIPPED, "objdump is not installed")
            continue
        count, faults = machine_code.read(machine_code.disassembly(objdump, library).splitlines())
        missing = [] if not library.name.startswith("_C.") else [isa for isa in ISAS if isa not in count]
        told = [f"{symbol}: {text}" for symbol, text in faults.items()] + [f"no variant {isa}" for isa in missing]
        note = ", ".join(f"{isa} {number}" for isa, number in count.items())
        table.verdict("wheel", f"instructions of {library.name}", told, note)


def check_with_tools(table: Table, out: Path, tree: Path, archives: Sequence[Path]) -> None:
    """What tools of others say of the wheel and the metadata; they get an environment of their own."""
    names = ("auditwheel", "twine", "cffconvert")
    pip = new_environment(out / "tools")
    for name in names:
        installed, log = run(*pip, "install", "--quiet", name, cwd=out)
        if not installed:
            table.add("tools", name, SKIPPED, f"it is not to be had: {end(log, 1)}")
            continue
        tool = out / "tools" / "bin" / name
        if name == "auditwheel":
            audit(table, tool, [path for path in archives if path.suffix == ".whl"], out)
        elif name == "twine":
            done, log = run(tool, "check", "--strict", *archives, cwd=out)
            table.verdict("tools", "twine: the metadata and the description", [] if done else [end(log)])
        else:
            done, log = run(tool, "--validate", "-i", tree / "CITATION.cff", cwd=out)
            table.verdict("tools", "cffconvert: CITATION.cff", [] if done else [end(log)], end(log, 1))


def audit(table: Table, tool: Path, wheels: Sequence[Path], out: Path) -> None:
    """The manylinux policy that the symbols of a wheel meet, those that decide it, and whose libraries it needs."""
    for wheel in wheels:
        done, log = run(tool, "show", "--json", wheel, cwd=out)
        if not done:
            table.add("tools", "auditwheel", FAILED, end(log))
            continue
        told = json.loads(log[log.index("{") : log.rindex("}") + 1])
        versions = sorted({version for found in told["versioned_symbols"].values() for version in found}, key=by_number)
        newest = {version.partition("_")[0]: version for version in versions}
        others = [name for name in told["external_libs"] if not name.startswith(("libtorch", "libc10"))]
        faults = [f"needs {name}, which neither the system nor torch brings" for name in others]
        table.verdict("tools", "auditwheel", faults, f"{told['sym_tag']}, but for torch's libraries")
        for library in (out / "wheel").rglob("*.so"):
            deciding = symbols_of(library, [newest[name] for name in ("GLIBC", "GLIBCXX") if name in newest])
            table.add("tools", f"what decides it in {library.name}", PASSED, deciding)


def by_number(version: str) -> list[int]:
    """The order of versions such as GLIBC_2.9 and GLIBC_2.27."""
    return [int(part) for part in re.findall(r"\d+", version)]


def symbols_of(library: Path, versions: Sequence[str]) -> str:
    """The symbols that a library takes in these versions."""
    if shutil.which("nm") is None:
        return f"{', '.join(versions)}; nm is not installed, which names their symbols"
    listed = run("nm", "--dynamic", "--demangle", "--undefined-only", library, cwd=library.parent)[1].splitlines()
    found = [line.split(maxsplit=1)[1] for line in listed if line.rpartition("@")[2] in versions]
    return ", ".join(found)


# --- where it is installed -------------------------------------------------------------------------------------------


def new_environment(folder: Path) -> tuple[str, ...]:
    """Makes a virtual environment that inherits nothing; returns its pip."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"


def planned(pip: Sequence[str], out: Path, *requirements: str | Path) -> tuple[dict[str, str], str]:
    """What pip would install for requirements, as its own requirements by name; nothing, and why, where it can't."""
    report = out / "plan.json"
    words = ("--dry-run", "--ignore-installed", "--quiet", "--report", report)
    found, log = run(*pip, "install", *words, *requirements, cwd=out)
    if not found:
        return {}, end(log, 1)
    items = json.loads(report.read_text())["install"]
    told = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in items}
    return {name: f"{name}=={version}" for name, version in told.items()}, ""


def install(table: Table, where: str, wheel: Path, torch: str, triton: str, of_cuda: str, out: Path) -> dict | None:
    """Installs the wheel into a new environment; returns the variables that it needs, or None where there is none."""
    pip = new_environment(out / where)
    wanted: tuple[str | Path, ...] = (torch, triton, wheel)
    plan, reason = planned(pip, out, *wanted)
    if not plan:
        # Triton has wheels for Linux on x86_64 only.
        table.add(where, triton, SKIPPED, f"it is not to be had beside {torch}: {reason}")
        wanted = (torch, wheel)
        plan, reason = planned(pip, out, *wanted)
    if not plan:
        table.add(where, f"install with {torch}", SKIPPED, f"it is not to be had: {reason}")
        return None
    cuda = [name for name in plan if name.startswith(("nvidia-", "cuda-"))]
    note = ", ".join(plan[name] for name in ("torch", "triton") if name in plan)
    if cuda and of_cuda == "skip":
        reason = f"{plan['torch']} is to be had only for CUDA, with {len(cuda)} packages: see --stand-ins and --cuda"
        table.add(where, f"install with {torch}", SKIPPED, reason)
        return None
    variables = {}
    if cuda and of_cuda == "stand-ins":
        wanted = ("--no-deps", wheel, *(plan[name] for name in plan if name not in {*cuda, "fastebm"}))
        variables["LD_LIBRARY_PATH"] = str(out / f"stand-ins-{where}")
        note += ", with stand-ins for the libraries of CUDA"
    installed, log = run(*pip, "install", "--quiet", *wanted, cwd=out)
    if variables and installed:
        (libraries,) = (out / where).glob("lib/python*/site-packages/torch/lib")
        make_stand_ins(libraries, Path(variables["LD_LIBRARY_PATH"]))
    if not table.verdict(where, f"install with {torch}", [] if installed else [end(log)], note):
        return None
    if not variables:
        checked, log = run(*pip, "check", cwd=out)
        table.verdict(where, "requirements of all packages are met", [] if checked else [end(log)])
    return variables


def check_installed(
    table: Table, where: str, home: Path, variables: dict[str, str], play: Path, examples: Path
) -> None:
    """All rows of one environment."""
    play.mkdir()
    env = clean(**variables)
    check_commands(table, where, home, play, env, statements.package_version(examples.parent))
    for example in sorted(examples.glob("*.py")):
        check_example(table, where, home, play, env, example)


def check_commands(table: Table, where: str, home: Path, play: Path, env: dict[str, str], version: str) -> None:
    """Rows for the import, `fastebm info` by each instruction set, Triton's interpreter and the demo."""
    python, command = home / "bin" / "python", home / "bin" / "fastebm"
    done, log = run(python, "-W", "error", "-c", "import fastebm; print(fastebm.__file__)", cwd=play, env=env)
    table.verdict(where, "import without a warning", [] if done and log.startswith(str(home)) else [end(log)])
    for isa in ("", *ISAS):
        done, log = run(command, "info", cwd=play, env=env | {"FASTEBM_CPU": isa})
        facts = dict(re.findall(r"^(\S.*?)  +(.*)$", log, re.MULTILINE))
        what = f"fastebm info{f', FASTEBM_CPU={isa}' if isa else ''}"
        if not done and isa and "asked for, but this CPU runs at most" in log:
            table.add(where, what, SKIPPED, end(log, 1))
            continue
        expected = {"fastebm": version, "operators on the CPU": "cpp", "self test": "passed", "cpu variant": isa}
        wrong = [f"{name}: {facts.get(name)}" for name, value in expected.items() if value and facts.get(name) != value]
        note = f"torch {facts.get('torch')}, triton {facts.get('triton')}, {facts.get('cpu variant')}"
        table.verdict(where, what, wrong if done else [end(log)], note)
    if run(python, "-c", "import triton", cwd=play, env=env)[0]:
        done, log = run(python, "-c", INTERPRETED, cwd=play, env=env | {"TRITON_INTERPRET": "1"})
        table.verdict(where, "a kernel in Triton's interpreter", [] if done else [end(log)])
    else:
        table.add(where, "a kernel in Triton's interpreter", SKIPPED, "Triton is not installed")
    demo = (command, "demo", "--iterations", "8", "16", "--count", "64", "--out", play / "demo")
    done, log = run(*demo, cwd=play, env=env)
    made = all((play / "demo" / name).is_file() for name in ("samples.png", "strip.png", "curves.png", "verdict.json"))
    table.verdict(where, "fastebm demo with 24 updates", [] if done and made else [end(log)])


def check_example(table: Table, where: str, home: Path, play: Path, env: dict[str, str], example: Path) -> None:
    """A row for an example with few iterations, in a folder of its own."""
    text = example.read_text()
    needed = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    python = home / "bin" / "python"
    program = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n) is None))"
    if missing := run(python, "-c", program, *sorted(needed), cwd=play, env=env)[1].strip():
        table.add(where, f"examples/{example.name}", SKIPPED, f"it needs more than fastebm does: {missing}")
        return
    folder = play / example.stem
    folder.mkdir()
    few = ("--quick",) if '"--quick"' in text else ("--iterations", "6")
    done, log = run(python, example, *few, cwd=folder, env=env)
    table.verdict(where, f"examples/{example.name}", [] if done else [end(log)], " ".join(few))


def main() -> int:
    """Exit code 1 where something failed, or where the wheel could be installed nowhere."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--final", action="store_true", help="of a release: no changed files, and a day in CHANGELOG.md"
    )
    parser.add_argument(
        "--cuda",
        dest="of_cuda",
        action="store_const",
        const="take",
        default="skip",
        help="install builds of torch for CUDA, too, of gigabytes",
    )
    parser.add_argument(
        "--stand-ins",
        dest="of_cuda",
        action="store_const",
        const="stand-ins",
        help="install them alone, half a gigabyte, with stand-ins for the libraries of CUDA",
    )
    parser.add_argument("--out", type=Path, help="a new folder that keeps all that is built (default: none is kept)")
    parser.add_argument("--torch", default="torch", help="pip's requirement of the newest torch")
    parser.add_argument("--oldest-torch", default="torch==2.11.0")
    parser.add_argument("--triton", default="triton>=3.6", help="pip's requirement of the newest Triton")
    parser.add_argument("--oldest-triton", default="triton==3.6.0")
    options = parser.parse_args()
    table = Table()
    with tempfile.TemporaryDirectory(prefix="fastebm-release-") as scratch:
        out = options.out.resolve() if options.out else Path(scratch)
        if options.out and out.exists():
            parser.error(f"--out: {out} is there already")
        out.mkdir(parents=True, exist_ok=True)
        tree = export(table, out, options.final)
        unpacked = build_sdist(table, tree, out)
        wheel = build_wheel(table, tree, unpacked, out) if unpacked else None
        somewhere = False
        if unpacked and wheel:
            check_with_tools(table, out, tree, [*out.glob("*.tar.gz"), wheel])
            pairs = {"newest": (options.torch, options.triton), "oldest": (options.oldest_torch, options.oldest_triton)}
            for where, (torch, triton) in pairs.items():
                variables = install(table, where, wheel, torch, triton, options.of_cuda, out)
                if variables is not None:
                    somewhere = True
                    check_installed(table, where, out / where, variables, out / f"play-{where}", unpacked / "examples")
            if not somewhere:
                table.add("wheel", "is installed", FAILED, "no environment for it could be made")
    print(f"\n{table.text()}\n\n{table.failures()} of {len(table.rows)} checks failed")
    return 1 if table.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
