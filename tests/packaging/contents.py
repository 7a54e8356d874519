"""What a source distribution and a wheel hold, by rule, and the copy of the tree that they are built from."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (".h", ".cpp", ".cu")

# Only the repository needs them. All else is needed to build, to test, or is read by people.
OF_THE_REPOSITORY = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")
# What setuptools adds to a source distribution.
ADDED = {
    "PKG-INFO",
    "setup.cfg",
    *(
        f"fastebm.egg-info/{name}"
        for name in (
            *("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt"),
            "top_level.txt",
        )
    ),
}
DIST_INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


def source_files(root: Path = ROOT) -> set[str]:
    """The files of a tree, without what builds, tests and runs left there.

    In a checkout they are those that git knows or would add. An unpacked source distribution names its own.
    """
    if (root / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    else:
        listed = (root / "fastebm.egg-info" / "SOURCES.txt").read_text().splitlines()
    return {name for name in listed if (root / name).is_file()} - ADDED


def copied_tree(target: Path, root: Path = ROOT) -> Path:
    """A copy of the tree's files; returns its folder."""
    for name in source_files(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)
    return target


def expected_in_sdist(files: Iterable[str]) -> set[str]:
    """What the source distribution of a tree with these files holds, below its one folder."""
    return {name for name in files if not name.startswith(OF_THE_REPOSITORY)} | ADDED


def expected_in_wheel(files: Iterable[str], version: str) -> set[str]:
    """What the wheel of a tree with these files holds, beside compiled libraries."""
    modules = {name for name in files if name.startswith("fastebm/") and name.endswith((".py", "/py.typed", ".html"))}
    sources = {f"fastebm/{name}" for name in files if name.startswith("csrc/") and name.endswith(SOURCES)}
    return modules | sources | {f"fastebm-{version}.dist-info/{name}" for name in DIST_INFO}


def names_in_sdist(archive: Path) -> set[str]:
    """The files of a source distribution, below its one folder."""
    with tarfile.open(archive) as held:
        files = [member.name for member in held.getmembers() if not member.isdir()]
    assert {name.partition("/")[0] for name in files} == {archive.name.removesuffix(".tar.gz")}
    return {name.partition("/")[2] for name in files}


def names_in_wheel(wheel: Path) -> set[str]:
    """The files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def libraries(names: Iterable[str]) -> set[str]:
    """Those of the names that are compiled libraries."""
    return {name for name in names if name.endswith((".so", ".pyd"))}
