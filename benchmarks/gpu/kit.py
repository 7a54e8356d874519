"""`make gpu-kit`: the compiled operators for a GPU machine that has PyTorch, so that no minute there is spent on them.

The extensions use torch's stable headers only, so that those of this torch serve: what differs is the Python that
loads them. CUDA operators are compiled where nvcc is on the PATH, and need no GPU for that; its major version must be
that of the CUDA of the GPU machine's torch, whose libcudart they load. The file `commit` says what was compiled.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastebm import build_extension as build
from fastebm.evaluation.speed import machine_facts

ROOT = Path(__file__).resolve().parents[2]
# PTX of the newest is added, for GPUs that come after.
IMAGES = build.CUDA_ARCHITECTURES.replace(";", " ")
ARCHITECTURES = [int(image.replace(".", "").removesuffix("+PTX")) for image in IMAGES.split()]
MOST_BYTES = 32 << 20
_ASK = (
    "import json, sysconfig; print(json.dumps({'include': sysconfig.get_path('include'), "
    "'suffix': sysconfig.get_config_var('EXT_SUFFIX'), 'version': sysconfig.get_python_version()}))"
)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m benchmarks.gpu.kit FOLDER [PYTHON]")
    folder = Path(sys.argv[1])
    python = asked(sys.argv[2] if len(sys.argv) == 3 else sys.executable)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastebm-kit-") as scratch:
        made = [cpp_library(Path(scratch), python["include"], python["suffix"])]
        of_cuda = "no CUDA operators, as nvcc is not on the PATH: the GPU machine builds all operators"
        if nvcc := shutil.which("nvcc"):
            made.append(cuda_library(Path(scratch), nvcc))
            of_cuda = f"a torch with CUDA {cuda_major(nvcc)}, GPUs {IMAGES}"
        for old in folder.glob("_*.so"):
            old.unlink()
        for library in made:
            shutil.copy2(library, folder / library.name)
    facts = machine_facts("cpu")
    (folder / "commit").write_text(f"{facts['commit']}{' and changes' if facts['dirty'] else ''}\n")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}, {size / 2**20:.1f} MiB")
    print(f"for Python {python['version']}, {of_cuda}")
    if size > MOST_BYTES:
        sys.exit(f"the kit is larger than {MOST_BYTES >> 20} MiB")


def asked(python: str) -> dict[str, str]:
    """Where the headers of a Python are, the suffix of its extensions and its version; exits where it has none."""
    if shutil.which(python) is None:
        sys.exit(f"KIT_PYTHON: there is no Python {python!r} here; the kit needs the headers of the GPU machine's")
    found: dict[str, str] = json.loads(_run([python, "-c", _ASK]))
    if not (Path(found["include"]) / "Python.h").is_file():
        sys.exit(f"KIT_PYTHON: {python} has no headers ({found['include']}/Python.h); its development package has them")
    return found


def cuda_major(nvcc: str) -> str:
    """The major version of the CUDA toolkit."""
    release = re.search(r"release (\d+)\.", _run([nvcc, "--version"]))
    assert release is not None
    return release[1]


def cpp_library(scratch: Path, include: str, suffix: str) -> Path:
    from torch.utils.cpp_extension import include_paths

    flags = [*build.CPP_FLAGS, "-fPIC", "-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_C", "-I", include]
    flags += [flag for path in include_paths() for flag in ("-isystem", path)]
    compiler = build.cpp_compiler() or ["c++"]
    sources = [build.source_folder() / name for name in build.CPP_SOURCES]
    objects = _compiled([*compiler, *flags], sources, scratch / "cpp")
    return _linked(compiler, objects, scratch / f"_C{suffix}", ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"])


def cuda_library(scratch: Path, nvcc: str) -> Path:
    from torch.utils.cpp_extension import include_paths

    torch_headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    compiler = build.cpp_compiler() or ["c++"]
    kernels = [build.source_folder() / name for name in build.CUDA_SOURCES if name.endswith(".cu")]
    others = [build.source_folder() / name for name in build.CUDA_SOURCES if not name.endswith(".cu")]
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    codes.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    own = ["-I", str(build.source_folder())]
    objects = _compiled([nvcc, *build.NVCC_FLAGS, *codes, *own, "-Xcompiler", "-fPIC"], kernels, scratch / "cuda")
    flags = [*build.CPP_FLAGS, "-fPIC", "-DUSE_CUDA", f'-DFASTEBM_CUDA_IMAGES="{IMAGES}"', *torch_headers, *own]
    objects += _compiled([*compiler, *flags], others, scratch / "register")
    # Found by their names when the operators are loaded, which is after torch has loaded them.
    stubs = [_stub(compiler, scratch, name) for name in (f"libcudart.so.{cuda_major(nvcc)}", "libtorch_cuda.so")]
    return _linked(compiler, objects, scratch / "_cuda.so", ["-Wl,--no-as-needed", *stubs, "-ltorch_cpu", "-lc10"])


def _stub(compiler: list[str], scratch: Path, name: str) -> str:
    """An empty library of this name, to link against where the real one is not installed."""
    _run([*compiler, "-shared", f"-Wl,-soname,{name}", "-x", "c", "/dev/null", "-o", str(scratch / name)])
    return str(scratch / name)


def _compiled(command: list[str], sources: list[Path], folder: Path) -> list[Path]:
    folder.mkdir()

    def one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        prefix = [] if source.suffix == ".cu" else [f"-ffile-prefix-map={build.source_folder()}=csrc"]
        _run([*command, *prefix, "-I", str(build.source_folder()), "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def _linked(compiler: list[str], objects: list[Path], target: Path, libraries: list[str]) -> Path:
    from torch.utils.cpp_extension import library_paths

    paths = [f"-L{path}" for path in library_paths()]
    _run([*compiler, "-shared", *map(str, objects), "-o", str(target), *paths, *libraries])
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command[:1])} failed:\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
