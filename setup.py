"""The build of fastebm: pyproject.toml says what the package is, this file adds the compiled operators.

The list of what is compiled, and how, is fastebm/build_extension.py, which `fastebm build` uses too. Where it can't
compile (torch can't be imported here, or there is no C++ compiler), the package has no compiled operators and warns.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
import warnings
from pathlib import Path
from types import ModuleType

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def load_build_list() -> ModuleType:
    """Loads fastebm/build_extension.py by its path, since importing the package may need torch."""
    spec = importlib.util.spec_from_file_location("fastebm_compile", ROOT / "fastebm" / "build_extension.py")
    if spec is None or spec.loader is None:
        raise RuntimeError(f"fastebm/build_extension.py is missing under {ROOT}: these sources are incomplete")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def boxed(lines: list[str]) -> str:
    """The lines in a frame that is seen even in a long build log."""
    width = max(len(line) for line in lines)
    rule = "+" + "=" * (width + 2) + "+"
    return "\n".join(["", rule, *(f"| {line:<{width}} |" for line in lines), rule, ""])


def compiled_part() -> dict:
    """What setup() needs for the compiled operators: nothing, with a notice, where they can't be built."""
    build_list = load_build_list()
    reason = build_list.unavailable_reason()
    if reason is None:
        return {"ext_modules": build_list.extensions(), "cmdclass": build_list.command_class()}
    notice = [
        "fastebm is being built WITHOUT its compiled operators.",
        "",
        *(f"Reason: {reason}".splitlines()),
        "",
        "It will work, but every operator runs as plain PyTorch, several times slower.",
        "To add the compiled operators once it is installed, beside torch and a C++ compiler:",
        "",
        "    fastebm build",
    ]
    print(boxed(notice), file=sys.stderr, flush=True)
    return {}


def readme_for_an_index() -> str:
    """README.md with its links into the tree as addresses: a page of a package index has no tree beside it."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    inside = r"(?!https?:|#|mailto:)([^)\s\"]+)"
    parts = re.split(r"(^```.*?^```$)", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    for index in range(0, len(parts), 2):  # those between are code
        text = re.sub(rf"(!\[[^\]]*\]\(| src=\"){inside}", rf"\1{urls['Source']}/raw/main/\2", parts[index])
        parts[index] = re.sub(rf"(\]\(| href=\"){inside}", rf"\1{urls['Source']}/blob/main/\2", text)
    return "".join(parts)


# The sources of the kernels travel as the folder fastebm/csrc, so that `fastebm build` finds them in an installed
# package too. setuptools wants each of its folders named as a package, though no Python stands in them.
folders = {"fastebm.csrc": "csrc"} | {
    f"fastebm.csrc.{path.name}": f"csrc/{path.name}" for path in ROOT.glob("csrc/[a-z]*/")
}

# Said of every editable install whose package stands at the root of its repository, as ours is meant to.
warnings.filterwarnings("ignore", message="Editable installation")

setup(
    packages=[*find_packages(include=["fastebm", "fastebm.*"]), *folders],
    package_dir={"fastebm": "fastebm", **folders},
    package_data={
        "fastebm": ["py.typed"],
        "fastebm.report": ["page.html"],
        **{folder: ["*.h", "*.cpp", "*.cu"] for folder in folders},
    },
    include_package_data=False,
    long_description=readme_for_an_index(),
    long_description_content_type="text/markdown",
    **compiled_part(),
)
