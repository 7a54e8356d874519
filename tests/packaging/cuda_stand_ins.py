"""Libraries with the names of CUDA's that hold no CUDA: every function of theirs returns "no device".

A torch that is built for CUDA loads with them and runs on the CPU, without gigabytes of packages. Its own libraries say
which functions, under which versions, they look for.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice; registrations while a library loads return 0, which they take for success
THEIRS = re.compile(r"^lib(cu|nccl|nvshmem|nvrtc|nvtx)")
OUTSIDE = re.compile(r"^(__)?(cu|nccl|nvshmem)")


def said_by(*command: str | Path) -> list[str]:
    """The lines that a command prints."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()


def function(name: str) -> str:
    """The C of one function."""
    if name == "__cudaRegisterFatBinary":
        return f"void *{name}(void) {{ static long handle[8]; return handle; }}"
    return f"int {name}(void) {{ return {0 if name.startswith('__cuda') else NO_DEVICE}; }}"


def make_stand_ins(libraries: Path, folder: Path) -> None:
    """Compiles the stand-ins that the libraries of one folder need into another, which LD_LIBRARY_PATH is to name."""
    folder.mkdir(parents=True, exist_ok=True)
    own = sorted(libraries.glob("*.so"))
    wanted: dict[str, set[str]] = {}  # library -> versions
    functions: defaultdict[str, set[str]] = defaultdict(set)  # version, or "" -> names
    for library in own:
        for line in said_by("readelf", "--dynamic", "--wide", library):
            if (needed := re.search(r"NEEDED.*\[(.+)\]", line)) and THEIRS.match(needed[1]):
                wanted.setdefault(needed[1], set())
        of = ""
        for line in said_by("readelf", "--version-info", "--wide", library):
            if file := re.search(r"File: (\S+)", line):
                of = file[1]
            if of in wanted and (version := re.search(r"Name: (\S+) +Flags", line)):
                wanted[of].add(version[1])
        for line in said_by("nm", "--dynamic", "--undefined-only", library):
            name, _, version = line.split()[-1].partition("@")
            if OUTSIDE.match(name):
                functions[version.lstrip("@")].add(name)
    loose = functions.pop("", set())  # asked of no library by name: the first one has them all
    for name, versions in wanted.items():
        parts = {version: functions[version] for version in sorted(versions)}
        source = folder / f"{name}.c"
        source.write_text("\n".join(function(each) for each in sorted(set().union(loose, *parts.values()))))
        script = folder / f"{name}.map"
        script.write_text(
            "".join(
                f"{version} {{ global: {'; '.join(sorted(names | loose)) or '_'}; }};\n"
                for version, names in parts.items()
            )
        )
        options = ["-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{name}"]
        options += [f"-Wl,--version-script,{script}"] if parts else []
        said_by("cc", *options, "-o", folder / name, source)
        loose = set()
