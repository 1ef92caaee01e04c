"""The time model of TEXTSPAN on an H200: values computed by hand, and results that do not depend on the latencies."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import span_costs
from benchmarks.span_costs import FLOAT32, FLOAT64, H200, best_cluster, cluster, shared_bytes, triton

PAGE = Path(span_costs.__file__).resolve().parents[1] / "docs" / "kernels" / "index.md"


def test_shared_memory_by_hand() -> None:
    """Five blocks for 3,500 texts of rank 67: 700 texts, 14 rows of two matrices, and the vectors of a pick."""
    texts, left, matrices, vectors, best = 700 * 67 * 4, 700 * 8, 2 * 14 * 67 * 8, 4 * 67 * 8, 5 * 8 * 12
    assert shared_bytes(3500, 67, 5, FLOAT32) == texts + left + matrices + vectors + best
    assert shared_bytes(3500, 67, 5, FLOAT64) == 2 * texts + left + matrices + vectors + best


def test_number_of_concurrent_heads() -> None:
    """A cluster of five blocks fits three times in a GPC of 16 or 18; one of four cannot hold the texts."""
    cost = cluster(H200, 1, 5)
    assert cost is not None
    assert cost.at_once == 8 * 3
    assert cluster(H200, 1, 4) is None


def test_conversions_are_the_bottleneck_of_a_block() -> None:
    """A multiprocessor converts 16 values per clock; with float64 texts or free conversions it is faster."""
    assert span_costs.CLUSTER.clocks(H200, FLOAT32) == 1 / 16
    assert span_costs.CLUSTER.clocks(H200, FLOAT64) < 1 / 16
    assert span_costs.CLUSTER.clocks(replace(H200, conversions=1e9), FLOAT32) < 1 / 16


def test_time_grows_with_every_size() -> None:
    for more in ({"texts": 7000}, {"rank": 83}, {"size": 61}):
        assert triton(H200, 48, **more).seconds > triton(H200, 48).seconds
        larger, before = cluster(H200, 48, 16, **more), cluster(H200, 48, 16)
        assert larger is not None
        assert before is not None
        assert larger.seconds > before.seconds
    assert best_cluster(H200, 384)[1].seconds > best_cluster(H200, 144)[1].seconds


@pytest.mark.parametrize("barrier", [0.5, 1, 2])
@pytest.mark.parametrize(("name", "heads", "together"), span_costs.CASES)
def test_clusters_are_faster_whatever_the_barriers_cost(name: str, heads: int, together: int, barrier: float) -> None:
    device = replace(H200, barrier=int(barrier * H200.barrier))
    for call in (together, heads):
        for loop in (span_costs.TRITON, span_costs.CLUSTER):
            assert triton(device, call, loop=loop).seconds > 1.5 * best_cluster(device, call)[1].seconds


def test_page_has_the_current_table() -> None:
    assert span_costs.markdown() in PAGE.read_text(encoding="utf-8")
