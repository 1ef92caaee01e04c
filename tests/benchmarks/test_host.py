"""The Python of a decomposition: as many functions are called as in every run, and no more than allowed."""

import pytest

from benchmarks import host
from benchmarks.host import Cost, Report, Row
from clipfast.kernels import dispatch, launch

MOST_PER_OPERATION = {"cpu": 16, "gpu": 18}
"""Functions in Python that an operation enters, on average over a forward."""
MOST_PER_CALL = {"cpu": 2600, "gpu": 2200, "graph": 90}
"""Functions in Python that a decomposition of twelve layers enters; the module's own forward enters 1,200."""


@pytest.fixture(scope="module", params=host.PATHS)
def report(request: pytest.FixtureRequest) -> Report:
    return host.report(request.param, repeats=0)


def test_no_more_functions_are_called_than_allowed(report: Report) -> None:
    assert report.decompose.python <= MOST_PER_CALL[report.path]
    if report.path == "graph":
        assert not report.rows
        return
    assert (
        sum(row.calls * row.cost.python for row in report.rows) <= MOST_PER_OPERATION[report.path] * report.operations
    )


def test_every_operation_of_a_forward_is_counted(report: Report) -> None:
    if report.path != "graph":
        calls = {row.operation: row.calls for row in report.rows}
        assert calls["attention"] == host.LAYERS - 1
        assert calls["linear_activation"] == host.LAYERS


def test_counts_are_the_same_in_every_run(report: Report) -> None:
    assert host.report(report.path, repeats=0) == report


def test_nothing_is_left_as_if_on_a_gpu(report: Report) -> None:
    assert [backend.name for backend in dispatch.BACKENDS] == ["cuda", "triton", "native", "eager"]
    assert launch._thread.launcher is None


def test_a_function_more_is_seen() -> None:
    def one() -> None:
        two()

    def two() -> None:
        len("")

    assert host.counted(one) == (2, 1)
    assert host.counted(two) == (1, 1)


@pytest.mark.parametrize(
    ("microseconds", "over", "kept"), [(25.0, 300.0, True), (25.1, 300.0, False), (25.0, 301.0, False)]
)
def test_the_budget_is_of_time(microseconds: float, over: float, kept: bool) -> None:
    own = Cost(0, 0, 1000.0)
    rows = (Row("linear", 2, Cost(1, 1, microseconds)),)
    reports = [Report("gpu", rows, own, own), Report("graph", (), own, Cost(0, 0, 1000.0 + over))]
    assert host.within_budget(reports) is kept
