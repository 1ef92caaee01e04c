"""The contract under Triton: on a GPU where there is one, else in Triton's interpreter."""

from pathlib import Path

import pytest
import torch
from contract import OpsContract
from contracting import DEVICES

DRIVER = Path("/dev/nvidiactl")


class TestTriton(OpsContract):
    backend = "triton"
    device = DEVICES.get("triton", "cpu")
    float64 = False
    grad_modes = (False, True) if device == "cuda" else (True,)  # interpreted, one mode takes minutes already


@pytest.mark.skipif(torch.version.cuda is None or not DRIVER.exists(), reason="no GPU: the contract is interpreted")
def test_the_contract_runs_on_the_gpu_where_there_is_one() -> None:
    """Whether there is one, the driver says: a torch that does not find it, or an interpreter, is a failure."""
    from clipfast.kernels.launch import INTERPRETED

    assert not INTERPRETED
    assert TestTriton().draw(0, 1).is_cuda
