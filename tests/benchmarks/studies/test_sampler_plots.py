"""Every sampler's picture is drawn, is small, and stands on its page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import sampler_plots


def test_pictures_are_drawn_and_small(tmp_path: Path) -> None:
    written = sampler_plots.draw(tmp_path, chains=200, steps=20)
    assert [path.stem for path in written] == list(sampler_plots.PICTURES)
    assert all(0 < path.stat().st_size < 40_000 for path in written)


@pytest.mark.parametrize("name", sampler_plots.PICTURES)
def test_pictures_stand_on_their_pages(name: str) -> None:
    assert f"]({name}.png)" in (sampler_plots.FOLDER / f"{name}.md").read_text()
    assert (sampler_plots.FOLDER / f"{name}.png").stat().st_size < 40_000


def test_the_density_is_normalized() -> None:
    x, density = sampler_plots.exact(sampler_plots.LOW)
    assert np.trapezoid(density, x) == pytest.approx(1)
    assert density[len(x) // 2] < density.max() / 2
