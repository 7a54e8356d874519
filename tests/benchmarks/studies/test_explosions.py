"""The study of runs that explode: each dtype has an entry, finished rows stay, and an explosion ends its row alone."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from benchmarks.harness.pages import read_entries
from benchmarks.studies import explosions

REFERENCE = {"accuracy": 0.9, "distance": 1.0, "confident": 0.5, "noise": 30.0}


def judge(samples: Tensor) -> dict[str, float]:
    assert samples.shape == (explosions.SAMPLES, 3, 8, 8)
    assert float(samples.abs().max()) <= 1
    return {"distance": 2.0}


def test_rows_of_a_dtype_are_kept_and_only_missing_ones_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny: dict[str, Any] = {"sizes": (8,), "iterations": (3,), "batch_sizes": (4,), "learning_rates": (1e-3,)}
    monkeypatch.setattr(explosions, "BASE", dataclasses.replace(explosions.BASE, **tiny, num_steps=2, log_every=1))
    monkeypatch.setitem(explosions.VARIANTS, "sure to explode", {"max_energy": 1e-6})
    monkeypatch.setattr(explosions, "train_features", lambda images: None)
    evaluator = SimpleNamespace(samples=judge, reference=lambda: REFERENCE)
    monkeypatch.setattr(explosions, "SampleEvaluator", lambda *given: evaluator)
    data, page = tmp_path / "data.npz", tmp_path / "page"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(12) % 2
    np.savez(data, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    page.mkdir()
    sections = [
        f"<!-- {name}: filled by benchmarks/harness/pages.py -->\n<!-- {name}: end -->"
        for name in explosions.ENTRIES.values()
    ]
    (page / "README.md").write_text("\n".join(sections))

    def call(dtype: str, seeds: int) -> dict[str, Any]:
        variants = ["as it was", "sure to explode"]
        given = [str(data), "--page", str(page), "--seeds", str(seeds), "--variants", *variants, "--dtype", dtype]
        monkeypatch.setattr(sys, "argv", ["explosions", *given])
        explosions.main()
        return read_entries(page)

    first = call("float32", seeds=1)["explosions-float32"]
    ended, exploded = first["rows"]
    assert (ended["exploded"], ended["distance"], ended["seed"]) == (None, 2.0, 0)
    assert exploded["distance"] is None
    assert exploded["exploded"]["iteration"] <= 3
    assert exploded["exploded"]["diagnosis"]
    assert first["config"]["dtype"] == first["config"]["update_dtype"] == "float32"
    both = call("float32", seeds=2)
    assert both["explosions-float32"]["rows"][:2] == first["rows"]
    assert len(both["explosions-float32"]["rows"]) == 4
    assert set(both) == {"explosions-float32"}
    assert set(call("bfloat16", seeds=1)) == {"explosions-float32", "explosions"}
    table = (page / "README.md").read_text()
    assert "| sure to explode | 2 | 2 |" in table
    assert "| as it was | 2 | 0 |" in table
