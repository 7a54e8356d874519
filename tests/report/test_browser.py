"""The page in a real browser, at the widths of a desk and of a phone, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastebm.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser can be driven")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if BROWSER is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)

BEYOND_THE_EDGE = """[...document.querySelectorAll('p, h1, h2, h3, h4, dd, img')]
    .filter(e => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.mark.parametrize("kind", ["coarse_to_fine", "ec_flow"])
def test_it_fits_fetches_nothing_and_says_nothing(
    browser: Any, run_of: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    page_path = write_report(run_of(kind), tmp_path / "page.html")
    said: list[str] = []
    fetched: list[str] = []
    colours = set()
    context = browser.new_context()
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(page_path.as_uri())
    for scheme in ("light", "dark"):
        for width in (1280, 390):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 800})
            page.wait_for_function("[...document.images].every(image => image.complete)")
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate("[...document.images].filter(image => !image.naturalWidth).length") == 0
            assert page.evaluate("document.images.length") >= 5
            assert page.evaluate(BEYOND_THE_EDGE) == []
            colours.add((scheme, page.evaluate("getComputedStyle(document.body).backgroundColor")))
            for opened in (True, False):
                page.locator("summary").first.click()
                assert page.locator("details").first.evaluate("e => e.open") == opened
                assert page.evaluate("document.documentElement.scrollWidth") == width
    context.close()
    assert said == []
    assert [url for url in fetched if not url.startswith("data:")] == [page_path.as_uri()]
    assert colours == {("light", "rgb(255, 255, 255)"), ("dark", "rgb(13, 17, 23)")}


def test_drawings_have_the_colours_of_the_page(browser: Any, run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The brightest text of a drawing on a dark page is brighter than its background, and on a light one darker."""
    from io import BytesIO

    import numpy as np
    from PIL import Image

    page_path = write_report(run_of("coarse_to_fine"), tmp_path / "page.html")
    means = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 800, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        page.goto(page_path.as_uri())
        shot = page.locator(".curve img").first.screenshot()
        pixels = np.asarray(Image.open(BytesIO(shot)).convert("L"), np.float64)
        means[scheme] = pixels.mean() - np.median(pixels)
        assert (np.median(pixels) > 200) == (scheme == "light")
        context.close()
    assert means["light"] < 0 < means["dark"]
