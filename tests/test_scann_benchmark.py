import pathlib

import pytest
from retrieval_data import config_for

from mlpmem_jax.retrieval import scann_backend, scann_benchmark
from mlpmem_jax.retrieval.key_shards import Search


@pytest.mark.skipif(bool(scann_backend.unavailable()), reason="ScaNN has no wheel for this machine")
def test_rows(tmp_path, monkeypatch):
    for name, value in (("KEYS", 8000), ("TRAINED_ON", 5000), ("WIDTHS", (16,)), ("NEIGHBORS", 32), ("QUERIES", 64)):
        monkeypatch.setattr(scann_benchmark, name, value)
    rows = {row["name"]: row for row in scann_benchmark.rows(config_for(tmp_path))}
    assert all(set(row) == {"name", "value", "unit", "detail"} for row in rows.values())
    assert rows["ScaNN, 8,000 keys of width 16: build"]["value"] > 0
    assert rows["ScaNN, width 16: a query"]["value"] > 0


def search_in(dimensions):
    return Search.create(scann_backend.Backend, {"k": 1024, "search_dimensions": dimensions})


def test_hours_follow_from_the_rates():
    rates = scann_benchmark.Rates(scanned=2e-12, reordered=3e-9, whole=5e-9)
    hours, detail = scann_benchmark.core_hours(search_in(0), 1_000_000, 100, 500_000, rates)
    # Two shards of 500,000 keys: 707 leaves; ceil(40 (1024 x 707 / 500000)^0.4) = 47 searched; 1.28 x 1,024 reordered.
    seconds = 47 * 500_000 / 707 * 100 * 2e-12 + 1311 * 100 * 3e-9
    assert hours == pytest.approx(2 * 1_000_000 * seconds / 3600)
    assert detail.startswith("2 shards")
    reduced, _ = scann_benchmark.core_hours(search_in(10), 1_000_000, 100, 500_000, rates)
    # 1,536 candidates wanted: ceil(40 (1536 x 707 / 500000)^0.4) = 55 searched; 1.23 x 1,536 reordered.
    seconds = 55 * 500_000 / 707 * 10 * 2e-12 + 1889 * 10 * 3e-9 + 1536 * 100 * 5e-9
    assert reduced == pytest.approx(2 * 1_000_000 * seconds / 3600)


def test_the_rates_of_plans_are_the_documented_ones():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "neighbors.md").read_text()
    rates = scann_benchmark.MEASURED
    for value in (
        f"({1e12 * rates.scanned:.1f} ps)",
        f"({1e9 * rates.reordered:.2f} ns)",
        f"({1e9 * rates.whole:.2f} ns)",
    ):
        assert value in page
    documented = (0.116, 1342, 946)  # from the rates before they were rounded
    for hours, (positions, width, shard_rows, dimensions) in zip(documented, scann_benchmark._LARGE, strict=True):
        assert f"| {hours:,} |" in page
        actual, _ = scann_benchmark.core_hours(search_in(dimensions), positions, width, shard_rows)
        assert actual == pytest.approx(hours, rel=5e-3)
