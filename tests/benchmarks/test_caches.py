"""The comparison of one head of a cache with all heads: it is checked, and a wrong head is not timed."""

import pytest
import torch
from builders import vision_tower
from torch import Tensor

import clipfast
from benchmarks.caches import against_decomposing, one_head
from clipfast.bench.measuring import WrongResult
from clipfast.compat.transformer_lens import ActivationCache, run_with_cache


def test_both_comparisons_check_and_time() -> None:
    model, images = clipfast.wrap(vision_tower()), torch.randn(2, 3, 24, 24)
    _, cache = run_with_cache(model, images)
    for measured in (one_head(cache, 1, 1, 2), against_decomposing(model, images, 2)):
        assert len(measured.ratios) == 2
        assert all(check.passed for check in measured.checks)


def test_a_wrong_head_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, cache = run_with_cache(clipfast.wrap(vision_tower()), torch.randn(2, 3, 24, 24))
    right = ActivationCache.head_result

    def wrong(self: ActivationCache, layer: int, head: int) -> Tensor:
        return right(self, layer, 1 - head)

    monkeypatch.setattr(ActivationCache, "head_result", wrong)
    with pytest.raises(WrongResult, match="L1H1 is that of the stack"):
        one_head(cache, 1, 1, 2)
