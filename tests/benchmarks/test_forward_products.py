"""The forward by the library that multiplies: what is measured, and its table."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks import forward_products, gemm, table
from benchmarks.results import Results
from clipfast.kernels.linear import libraries


def test_a_row_has_the_medians_of_the_rounds_ratios() -> None:
    case = {
        "settings": {"model": "ViT-B-32", "instructions": "avx2", "threads": 1},
        "seconds": {"plain": [1.0, 2.0, 3.0], "torch": [1.0, 2.0, 3.0], "onednn": [0.5, 0.5, 3.0]},
        "peak_mb": {"plain": 100.0, "torch": 110.0, "onednn": 120.0},
    }
    cells = forward_products.row(case)
    assert dict(zip(forward_products.HEADER, cells, strict=True)) == {
        "model": "ViT-B-32",
        "instructions": "avx2",
        "threads": "1",
        "plain": "2 s",
        "torch": "1.00 (1.00–1.00)",
        "onednn": "2.00 (1.50–3.00)",
        "openblas": "",
        "peak memory over plain": "torch 1.10, onednn 1.20",
    }


def test_results_become_a_table(tmp_path: Path) -> None:
    assert table.tables("products", tmp_path) == "*Not measured yet: `python -m benchmarks.forward_products`.*"
    seconds = {"plain": [1.0, 1.0], "torch": [1.0, 1.0]}
    settings = {"model": "ViT-B-32", "instructions": "best", "threads": 2}
    results = Results(forward_products.QUESTION, forward_products.SENTENCE, folder=tmp_path)
    results.write("a case", {"settings": settings, "seconds": seconds})
    assert "| ViT-B-32 | best | 2 | 1 s | 1.00 (1.00–1.00) |  |  |  |" in table.tables("products", tmp_path)


@pytest.mark.slow
def test_every_setting_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(libraries.VARIABLE, os.environ[libraries.VARIABLE])  # restored afterwards
    before = torch.get_num_threads()
    try:
        entry = forward_products.measure(gemm.MODELS[0], 2, 1, with_memory=False)
    finally:
        torch.set_num_threads(before)
        libraries.forget()
    assert list(entry["seconds"]) == ["plain", *forward_products.settings_here()]
    assert len(entry["checks"]) >= len(forward_products.settings_here())
