"""The benchmark of a LayerNorm folded into the product after it: its algebra, and what it prints."""

import pytest
import torch

from benchmarks import folded_norm
from clipfast.towers.tower import LayerNorm


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_folded_is_as_exact_unless_the_mean_drowns_the_sums() -> None:
    norm = LayerNorm(1 + 0.3 * drawn(0, 96), drawn(1, 96), 1e-5)
    weight, bias = drawn(2, 64, 96) / 96**0.5, drawn(3, 64)
    apart, folded, centred = folded_norm.errors(drawn(4, 50, 96), norm, weight, bias)
    assert max(apart, folded, centred) <= 2**-8
    apart, folded, centred = folded_norm.errors(drawn(4, 50, 96) + 64, norm, weight, bias)
    assert max(apart, folded) <= 2**-8  # a mean of 64 standard deviations drops out
    assert centred > 2**-8  # of weights that were rounded after they were centred it does not


def test_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert folded_norm.main(["--images", "2", "--model", "ViT-B-32"]) == 0
    printed = capsys.readouterr().out
    assert "12 products, 2 scenes" in printed
    assert "ViT-B-32, batch 256: 23 LayerNorms" in printed
    assert "| h200 |" in printed
