"""`make sanitize`: builds the operators with AddressSanitizer and UBSan in build/sanitize, and runs their tests there.

    python tests/sanitize.py [--tries N] [arguments of pytest]

Matrix units (AMX) are emulated in that build, so that the kernels for them are checked, too.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "sanitize"
LIBRARIES = ("libasan.so", "libubsan.so")
# Triton is not compiled by us, and torch.compile would compile without sanitizers.
TESTS = (
    "tests/ops/test_program.py",
    "tests/ops/test_lanes.py",
    "tests/ops/test_chain.py",
    "tests/ops/test_langevin.py",
    "tests/ops/test_underdamped.py",
    "tests/ops/test_mala.py",
    "tests/ops/test_mclmc.py",
    "tests/ops/test_normal.py",
)
TESTS += ("tests/ops/test_uniform.py", "tests/ops/test_block_tail.py", "tests/ops/test_expand_blend.py")
TESTS += ("tests/ops/test_weight_gradients.py",)
SKIPPED = "not compiles and not opcheck and not statistics"


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    from fastebm.build_extension import cpp_compiler, unavailable_reason

    reason = unavailable_reason() or without_sanitizers(cpp_compiler() or [])
    if reason is not None:
        sys.exit(f"make sanitize can't run: {reason}")
    copy_sources()
    checked = {**os.environ, "PYTHONPATH": str(COPY)}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=COPY, env={**checked, "FASTEBM_SANITIZE": "1"}, capture_output=True, text=True)
    if built.returncode:
        sys.exit(f"make sanitize can't run: the build failed\n{built.stdout[-4000:]}{built.stderr[-4000:]}")
    checked |= {
        "LD_PRELOAD": " ".join(path_of(cpp_compiler() or [], name) for name in LIBRARIES),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    found = 0
    for given in (["-k", SKIPPED, *TESTS], ["tests/fuzz/test_operators.py"]):
        found |= subprocess.run([*tests, *given, *arguments], cwd=COPY, env=checked).returncode
    return found


def path_of(compiler: list[str], library: str) -> str:
    """Where the compiler has the library of a sanitizer; the bare name if it has none."""
    said = subprocess.run([*compiler, f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()
    return said or library


def without_sanitizers(compiler: list[str]) -> str | None:
    """Why programs of this compiler can't be checked here, or None."""
    if sys.platform != "linux":
        return "its libraries are loaded by LD_PRELOAD, which is Linux's"
    lacking = [name for name in LIBRARIES if not Path(path_of(compiler, name)).is_file()]
    if lacking:
        return f"{shlex.join(compiler)} has no {' and no '.join(lacking)}; GCC has them (CXX=g++)"
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "one.cpp"
        source.write_text("int main() {}")
        command = [*compiler, "-fsanitize=address,undefined", str(source), "-o", str(source.with_suffix(""))]
        if subprocess.run(command, capture_output=True).returncode:
            return f"{shlex.join(compiler)} does not link with -fsanitize=address,undefined"
    return None


def copy_sources() -> None:
    """What changed, with its dates, so that only that is compiled again; what was deleted goes."""
    for name in ("fastebm", "csrc", "tests"):
        for stale in COPY.glob(f"{name}/**/*"):
            if stale.is_file() and stale.suffix != ".so" and not (ROOT / stale.relative_to(COPY)).is_file():
                stale.unlink()
        shutil.copytree(
            ROOT / name, COPY / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, COPY / name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
