"""The comparison of libraries that multiply: its shapes, its checks and its table."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gemm, table
from clipfast.bench.measuring import WrongResult

TINY = gemm.Shape("ViT-B-32", "qkv", 8, 40, 24, 56)


def test_shapes_are_those_of_the_towers() -> None:
    by_name = {(shape.model, shape.product, shape.batch): shape for shape in gemm.shapes()}
    assert len(by_name) == len(gemm.MODELS) * len(gemm.BATCHES) * 6
    first = by_name["ViT-B-32", "qkv", 8]
    assert (first.rows, first.depth, first.columns) == (400, 768, 2304)
    assert first.flop == 2 * 400 * 768 * 2304
    out = by_name["ViT-L-14", "MLP out", 1]
    assert (out.rows, out.depth, out.columns) == (257, 4096, 1024)
    assert by_name["ViT-B-16", "last MLP in", 32].rows == 32


@pytest.mark.parametrize("threads", [1, 2])
def test_every_library_is_checked_and_timed(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        entry = gemm.measure(TINY, threads, "best", 3)
    finally:
        torch.set_num_threads(before)
    names = list(entry["seconds"])
    assert names[0] == "torch"
    assert [check["name"] for check in entry["checks"]] == [f"{name} against float64" for name in names]
    assert all(len(times) == 3 for times in entry["seconds"].values())
    assert entry["times_as_fast_as_torch"]["torch"] == 1
    assert entry["gflops"].keys() == entry["seconds"].keys()


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that writes nothing finds NaN, one that leaves out a row does not pass either."""

    def wrong(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, **others: bool) -> dict[str, object]:
        return {"idle": (lambda: None, lambda: out)}

    monkeypatch.setattr(gemm, "libraries", wrong)
    with pytest.raises(WrongResult, match="idle against float64"):
        gemm.measure(TINY, 1, "best", 1)

    def short(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, **others: bool) -> dict[str, object]:
        return {"short": (lambda: torch.mm(x, weight.T, out=out), lambda: out.index_fill(0, torch.tensor([39]), 0))}

    monkeypatch.setattr(gemm, "libraries", short)
    with pytest.raises(WrongResult, match="short against float64"):
        gemm.measure(TINY, 1, "best", 1)


def test_the_peak_is_that_of_a_loop_that_is_not_optimised_away() -> None:
    loop = gemm.peak_loop(8)
    if loop is None:
        pytest.skip("no compiler, or another CPU than x86-64")
    values = {loop(rounds) for rounds in (1, 2, 1000)}
    assert len(values) == 3


@pytest.mark.slow
def test_results_become_a_table(tmp_path: Path) -> None:
    assert table.tables("gemm", tmp_path) == "*Not measured yet: `python -m benchmarks.gemm`.*"
    settings = {"models": ["ViT-B-32"], "batches": [1], "threads": [1], "rounds": 1, "instructions": "best"}
    before = torch.get_num_threads()
    try:
        gemm.work(settings | {"folder": str(tmp_path), "commit": None})
    finally:
        torch.set_num_threads(before)
    (file,) = tmp_path.glob("gemm-*.json")
    document = json.loads(file.read_text(encoding="utf-8"))
    assert len(document["cases"]) == 6
    text = table.tables("gemm", tmp_path)
    assert "The CPU's best instructions, 1 thread" in text
    assert "| torch | " in text
    assert "| 1.00 (1.00–1.00) | 1.00 (1.00–1.00) |" in text
