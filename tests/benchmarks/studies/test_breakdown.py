"""The study of where a program's time goes measures programs that run."""

from __future__ import annotations

import json

from benchmarks.studies import breakdown


def test_an_entry_for_this_machine_joins_those_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(breakdown, "NETS", {"wide residual 28-2": (3, 32, 32)})
    monkeypatch.setattr(breakdown, "SIDE", 128)  # one of 2048 takes minutes where torch has no kernel for bfloat16
    path = tmp_path / "breakdown.json"
    path.write_text('{"another": {}}')
    breakdown.main(path, batch=2, rounds=3)
    found = json.loads(path.read_text())
    assert "another" in found
    (entry,) = (entry for name, entry in found.items() if name != "another")
    net = entry["nets"]["wide residual 28-2"]
    assert set(net["median_seconds"]) == {"program", "products", "matrix_product"}
    assert net["rate_of_products"] == net["flops_of_products"] / net["median_seconds"]["products"]
    assert net["flops_of_products"] > 1e9  # 15.5 GFLOP for 16 images
