"""Which cuts of TEXTSPAN's kernel are worth timing on which GPU."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from clipfast.kernels import launch
from clipfast.kernels.span import triton as span


@pytest.mark.parametrize("gpu", [launch.AMD, 80, 86, 89, 90, 100, 103, 120])
def test_there_is_a_cut_for_every_gpu_and_it_fits(gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span, "INTERPRETED", False)
    result = span.configs(gpu)
    assert result
    for config in result:
        ahead = config.blocks["STAGES"] - 1
        assert 4 * ahead * config.blocks["BLOCK_T"] * config.blocks["BLOCK_R"] + span.SUMS <= launch.shared_memory(gpu)
    assert (result == span.CONFIGS) == (gpu in (80, 90, 100, 103))  # GPUs of data centres hold every cut


def test_amds_gpus_have_no_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch calls MI300 9.4, which is no Hopper."""
    tensor = SimpleNamespace(is_cuda=True, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert launch.capability(tensor) == 94
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launch.capability(tensor) == launch.AMD
