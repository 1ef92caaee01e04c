"""The model of TEXTSPAN on an H200: by hand where that can be done, and what holds however the latencies turn out."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import span_costs
from benchmarks.span_costs import FLOAT32, FLOAT64, H200, best_cluster, cluster, shared_bytes, triton

PAGE = Path(span_costs.__file__).resolve().parents[1] / "docs" / "kernels" / "index.md"


def test_shared_memory_by_hand() -> None:
    """Five blocks for 3,500 texts of rank 67: 700 texts, 14 rows of two matrices, and what a pick needs."""
    texts, left, matrices, vectors, best = 700 * 67 * 4, 700 * 8, 2 * 14 * 67 * 8, 4 * 67 * 8, 5 * 8 * 12
    assert shared_bytes(3500, 67, 5, FLOAT32) == texts + left + matrices + vectors + best
    assert shared_bytes(3500, 67, 5, FLOAT64) == 2 * texts + left + matrices + vectors + best


def test_how_many_heads_are_worked_on_at_once() -> None:
    """Five blocks have a multiprocessor each: three clusters in a group of 16 or 18. Four do not hold the texts."""
    found = cluster(H200, 1, 5)
    assert found is not None
    assert found.at_once == 8 * 3
    assert cluster(H200, 1, 4) is None


def test_conversions_are_what_a_block_takes_longest_for() -> None:
    """Of 64 texts and 67 coordinates: two conversions each for 32 threads, at 16 a clock; nothing without them."""
    assert span_costs.CLUSTER.clocks(H200, FLOAT32) == 1 / 16
    assert span_costs.CLUSTER.clocks(H200, FLOAT64) < 1 / 16
    assert span_costs.CLUSTER.clocks(replace(H200, conversions=1e9), FLOAT32) < 1 / 16


def test_more_of_anything_takes_longer() -> None:
    for more in ({"texts": 7000}, {"rank": 83}, {"size": 61}):
        assert triton(H200, 48, **more).seconds > triton(H200, 48).seconds
        larger, before = cluster(H200, 48, 16, **more), cluster(H200, 48, 16)
        assert larger is not None
        assert before is not None
        assert larger.seconds > before.seconds
    assert best_cluster(H200, 384)[1].seconds > best_cluster(H200, 144)[1].seconds


@pytest.mark.parametrize("barrier", [0.5, 1, 2])
@pytest.mark.parametrize(("name", "heads", "together"), span_costs.CASES)
def test_the_case_for_clusters_does_not_hang_on_the_barriers(
    name: str, heads: int, together: int, barrier: float
) -> None:
    device = replace(H200, barrier=int(barrier * H200.barrier))
    for call in (together, heads):
        for loop in (span_costs.TRITON, span_costs.CLUSTER):
            assert triton(device, call, loop=loop).seconds > 1.5 * best_cluster(device, call)[1].seconds


def test_the_page_has_the_table_that_the_command_prints() -> None:
    assert span_costs.markdown() in PAGE.read_text(encoding="utf-8")
