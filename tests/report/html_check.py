"""Reads a page and says what is wrong with it: tags, nesting, ids, pictures, and whatever a browser would fetch."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

VOID = {"br", "col", "hr", "img", "input", "link", "meta"}
BLOCKS = {"div", "dl", "figure", "h1", "h2", "h3", "h4", "nav", "ol", "p", "pre", "section", "table", "ul", "details"}
PARENTS = {
    "li": {"ul", "ol"},
    "tr": {"thead", "tbody"},
    "td": {"tr"},
    "th": {"tr"},
    "thead": {"table"},
    "tbody": {"table"},
    "figcaption": {"figure"},
    "summary": {"details"},
    "dt": {"dl", "div"},
    "dd": {"dl", "div"},
}
FETCHING = {"src", "srcset", "href", "data", "action", "poster", "background", "formaction", "xlink:href"}


class Page(HTMLParser):
    """A page and its `faults`; `text` is what a person reads, `images` the attributes of pictures."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.faults: list[str] = []
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.images: list[dict[str, str]] = []
        self.headings: list[str] = []
        self.tags: set[str] = set()
        self._texts: list[str] = []
        if not source.startswith("<!DOCTYPE html>\n<html lang="):
            self.faults.append("it does not begin as a page of HTML")
        self.feed(source)
        self.close()
        self.faults += [f"{tag} is never closed" for tag in self.stack]
        self.faults += [f"the id {i} occurs twice" for i in set(self.ids) if self.ids.count(i) > 1]
        self.faults += [f"a link leads to no id {target}" for target in self.targets if target not in self.ids]
        levels = [int(heading[1]) for heading in self.headings]
        if levels[:1] != [1] or levels.count(1) != 1:
            self.faults.append(f"headings {levels} have not one h1, at their beginning")
        if any(after > before + 1 for before, after in itertools.pairwise(levels)):
            self.faults.append(f"headings {levels} leave a level out")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if len(given) < len(attrs):
            self.faults.append(f"{tag} has an attribute twice: {attrs}")
        self.tags.add(tag)
        if tag in BLOCKS and "p" in self.stack:
            self.faults.append(f"{tag} inside of p")
        if tag in PARENTS and (self.stack or [""])[-1] not in PARENTS[tag]:
            self.faults.append(f"{tag} inside of {self.stack[-1:]}")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(tag)
        for name, value in given.items():
            if name.startswith("on"):
                self.faults.append(f"{tag} has the handler {name}")
            if name in FETCHING and not value.startswith(("data:", "#")):
                self.faults.append(f"{tag} fetches {name}={value[:80]}")
            if name == "style":
                self.faults.append(f"{tag} has a style of its own")
        if "id" in given:
            self.ids.append(given["id"])
            if not given["id"] or re.search(r"\s", given["id"]):
                self.faults.append(f"the id {given['id']!r} is none")
        if given.get("href", "").startswith("#"):
            self.targets.append(given["href"][1:])
        if tag == "img":
            self.images.append(given)
            if not given.get("alt", "").strip():
                self.faults.append("a picture has no words for those who can't see it")
            if not given.get("src", "").startswith(
                ("data:image/png;base64,", "data:image/jpeg;base64,", "data:image/svg")
            ):
                self.faults.append("a picture is none that a page can hold")
        if tag in ("script", "iframe", "object", "embed", "form", "base", "audio", "video"):
            self.faults.append(f"{tag} has no place in the page")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID or not self.stack or self.stack[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.stack[-1:]}")
        else:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "style":
            if re.search(r"url\(|@import|https?:", data):
                self.faults.append("the styles fetch something")
        elif "title" not in self.stack:
            self._texts.append(data)


def without_date(source: str) -> str:
    """The page without the moment at which it was written."""
    text, count = re.subn("<time datetime=.*?</time>", "", source)
    assert count == 1
    return text
