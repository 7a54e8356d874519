"""What the site adds to the pages of docs/, which stay readable without it; mkdocs.yml names this file.

- Pages of files outside of docs/: `PAGES`, examples, the gallery. Other links that leave docs/ lead to the repository.
- The commands and their options, from the parsers of the command line.
- A picture that stands alone is a figure, with its alternative text as the caption.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import logging
import os
import posixpath
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from PIL import Image

from benchmarks.studies import gallery

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
BRANCH = "main"
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Pages of the site for files outside of docs/, by their path in the repository."""
PAGES |= {f"examples/{file.name}": f"examples/{file.stem}.md" for file in sorted((ROOT / "examples").glob("*.py"))}
PAGES |= {f"examples/gallery/{file.name}": f"gallery/{file.stem}.md" for file in sorted(gallery.SCRIPTS.glob("*.py"))}
SOURCES = {page: source for source, page in PAGES.items() if source != "README.md"}
"""The files that pages are made of, by the path of the page."""
COMMANDS = "<!-- commands: made from the parsers when the site is built -->"

STRIP = 6
"""A picture so many times as wide as it is high scrolls in its place: shrunk, it would be a line."""

log = logging.getLogger("mkdocs.hooks.site")


def on_config(config: MkDocsConfig) -> None:
    config.repo_url, config.repo_name = REPOSITORY, "fastebm"
    if "MIKE_DOCS_VERSION" in os.environ:  # mike builds one of several versions, between which a menu chooses
        config.extra["version"] = {"provider": "mike"}


def on_files(files: Files, config: MkDocsConfig) -> None:
    for page, source in SOURCES.items():
        files.append(File.generated(config, page, content=text_of(ROOT / source)))


def text_of(source: Path) -> str:
    """The Markdown of a file outside of docs/."""
    if source.parent == gallery.SCRIPTS:
        try:
            return f"---\nhide: [toc]\n---\n\n{gallery.page(source)}"  # it has no sections, and code likes the room
        except ValueError as error:
            raise PluginError(str(error)) from error
    text = source.read_text()
    return example(source.name, text) if source.suffix == ".py" else text


def example(name: str, program: str) -> str:
    """The page of an example: what its docstring says, and the program below it."""
    docstring = ast.get_docstring(ast.parse(program)) or ""
    words, _, rest = docstring.partition("\n\n")
    body = program.split('"""\n', 1)[1].strip()
    return f"# {name}\n\n{words}\n\n```\n{rest}\n```\n\n```python\n{body}\n```\n"


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    markdown = outside_of_code(lambda text: moved_links(text, source, page.file.src_uri), markdown)
    markdown = re.sub(r"^::: (\S+)$", entry, markdown, flags=re.MULTILINE)
    return markdown.replace(COMMANDS, "\n".join(commands())) if COMMANDS in markdown else markdown


def entry(line: re.Match[str]) -> str:
    """An entry of the reference; a function in a module of its own name, which hides it, by its full name."""
    path = line[1]
    if not (ROOT / Path(*path.split("."))).with_suffix(".py").exists():
        return line[0]
    package, _, name = path.rpartition(".")
    value = getattr(importlib.import_module(package), name)
    return f"::: {value.__module__}.{value.__qualname__}\n    options: {{heading: {path}, toc_label: {name}}}"


def outside_of_code(change: Callable[[str], str], markdown: str) -> str:
    """`markdown` with everything changed but its fenced blocks."""
    parts = re.split(r"^(```.*?^```[^\n]*$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def moved_links(markdown: str, source: str, page: str) -> str:
    """The relative links of the file `source` of the repository as links of `page` of the site."""

    def moved(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if (ROOT / path / "README.md").exists() and path.startswith("docs/"):
            path += "/README.md"
        if path in PAGES or path.startswith("docs/"):
            inside = PAGES.get(path, path.removeprefix("docs/"))
            return f"]({posixpath.relpath(inside, posixpath.dirname(page) or '.')}{anchor})"
        if not (ROOT / path).exists():
            return link[0]  # mkdocs complains of it
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/{BRANCH}/{path}{anchor})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", moved, markdown)


def on_page_content(content: str, page: Page, **_: Any) -> str:
    if "doc-object doc-module" in content:
        log.warning("%s: an entry shows a module", page.file.src_uri)

    def figures(paragraph: re.Match[str]) -> str:
        return "\n".join(figure(picture, page) for picture in re.findall("<img [^>]*>", paragraph[1]))

    return re.sub(r"<p>((?:<img [^>]*>\s*)+)</p>", figures, content)


def figure(picture: str, page: Page) -> str:
    """A picture with its alternative text as its caption, and its size, so that no page jumps as it loads."""
    alt, src = (re.search(rf'{name}="([^"]*)"', picture) for name in ("alt", "src"))
    caption = alt[1] if alt else ""
    if not caption or not src:
        log.warning("%s: a picture without alternative text: %s", page.file.src_uri, picture)
        return picture
    file = ROOT / "docs" / posixpath.normpath(posixpath.join(page.url, src[1]))
    if not file.is_file():
        log.warning("%s: there is no picture %s", page.file.src_uri, src[1])
        return picture
    width, height = size_of(file)
    kind = ' class="strip"' if width > STRIP * height else ""
    sized = picture.replace("<img ", f'<img width="{width}" height="{height}" loading="lazy" ', 1)
    return f"<figure{kind}>{sized}<figcaption>{caption[:1].upper()}{caption[1:]}</figcaption></figure>"


def size_of(picture: Path) -> tuple[int, int]:
    """Width and height of a picture in pixels; of a drawing (.svg) those that its first element names."""
    if picture.suffix == ".svg":
        drawing = ElementTree.parse(picture).getroot()
        return int(drawing.attrib["width"]), int(drawing.attrib["height"])
    with Image.open(picture) as opened:
        return opened.size


def commands() -> Iterator[str]:
    """A section for each command of the command line, with the options that its own parser has."""
    from fastebm import cli

    shapes = [[name] for name in cli.COMMANDS if name != "train"]
    at = list(cli.COMMANDS).index("train")
    shapes[at:at] = [["train", method] for method in cli.METHODS]
    for words in shapes:
        yield from command_section(" ".join(words), parser_of(words))


def parser_of(words: list[str]) -> argparse.ArgumentParser:
    """The parser of a command, caught where it would parse."""
    from fastebm import cli

    class CaughtError(Exception):
        pass

    caught: list[argparse.ArgumentParser] = []

    def catch(parser: argparse.ArgumentParser, *_: Any) -> None:
        caught.append(parser)
        raise CaughtError

    with mock.patch.object(cli.Parser, "parse_args", catch), contextlib.suppress(CaughtError):
        cli._parse([*words, "--help"])
    return caught[0]


def command_section(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """The description of a command and a definition list of its options, in their groups."""
    usage = (parser.usage or "").replace("%%", "%")
    yield from ("", f"## {name}", "", "```", usage, "```", "")
    yield from (in_markdown(parser.description or ""), "")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions and group.title not in ("options", "positional arguments"):
            yield from (f"**{(group.title or '').capitalize()}**", "")
        for action in actions:
            metavar = [action.metavar] if isinstance(action.metavar, str) else list(action.metavar or ())
            flags = ", ".join(action.option_strings)
            shape = " ".join(filter(None, [flags, *metavar, "..." if action.nargs == "+" else ""]))
            yield from (f"`{shape}`", f":   {in_markdown((action.help or '').replace('%%', '%'))}", "")


def in_markdown(text: str) -> str:
    """Plain text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]#])", r"\\\1", text).replace("<", "&lt;")
