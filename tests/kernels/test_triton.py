"""The contract under Triton: on a GPU where there is one, else in Triton's interpreter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import OpsContract
from contract_attention import MANY_TOKENS, WEIGHTED_MANY
from contracting import DEVICES

from clipfast.kernels import reference

DRIVER = Path("/dev/nvidiactl")


def slow_if_long(cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The cases, those of more than 2000 tokens as slow ones."""
    return [pytest.param(*case, marks=[pytest.mark.slow] if case[0] > 2000 else []) for case in cases]


class TestTriton(OpsContract):
    backend = "triton"
    device = DEVICES.get("triton", "cpu")
    float64 = False
    grad_modes = (False, True) if device == "cuda" else (True,)  # interpreted, one mode takes minutes already

    # The longest take the interpreter half a minute.

    @pytest.mark.parametrize(("tokens", "head_dim", "row"), slow_if_long(MANY_TOKENS))
    def test_attention_of_many_tokens(self, tokens: int, head_dim: int, row: reference.Row) -> None:
        super().test_attention_of_many_tokens(tokens, head_dim, row)

    @pytest.mark.parametrize(("tokens", "head_dim", "groups"), slow_if_long(WEIGHTED_MANY))
    def test_weighted_rows_of_many_tokens(self, tokens: int, head_dim: int, groups: int) -> None:
        super().test_weighted_rows_of_many_tokens(tokens, head_dim, groups)


@pytest.mark.skipif(torch.version.cuda is None or not DRIVER.exists(), reason="no GPU: the contract is interpreted")
def test_the_contract_runs_on_the_gpu_where_there_is_one() -> None:
    """Whether there is one, the driver says: a torch that does not find it, or an interpreter, is a failure."""
    from clipfast.kernels.launch import INTERPRETED

    assert not INTERPRETED
    assert TestTriton().draw(0, 1).is_cuda
