"""The contract under the library in C++, once per instruction set that this CPU has.

``make sanitize`` runs it, too, with a library whose AVX-512 needs no CPU that has it.
"""

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from contract import OpsContract
from contract_layers import EVERY_ACTIVATION, LayersContract
from contract_linear import LinearContract
from contracting import LOW, draw
from instructions import capped, is_repetition

from clipfast.kernels import ops, reference
from clipfast.kernels.linear import native as native_linear


class NativeContract(OpsContract):
    """Not collected; a class per instruction set inherits it."""

    backend = "native"
    not_in_float64 = frozenset(
        {
            "add_layer_norm",
            "attention",
            "layered_text_maps",
            "linear_activation",
            "query_row",
            "rotate",
            "text_maps",
            "weighted_rows",
        }
    )
    isa: str

    @pytest.fixture(autouse=True)
    def _capped(self) -> Iterator[None]:
        with capped(self.isa) as used:
            if not used:
                pytest.skip(f"this CPU has no {self.isa}")
            yield

    @pytest.mark.parametrize("dtype", LOW)
    def test_every_16_bit_value_is_read_and_rounded_as_torch_does(self, dtype: torch.dtype) -> None:
        """Denormals, infinities and NaN among them: sums of each with values of its own size and of other sizes."""
        everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        weight = torch.ones(256)
        for delta in (everything * 0.37, everything.roll(4321), everything.flip(0)):
            x, delta = everything.clone().view(256, 256), delta.view(256, 256)
            expected = x + delta
            ops.add_layer_norm(x, delta, weight, weight, 1e-5, backend="native")
            torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)

    @EVERY_ACTIVATION
    def test_activations_at_the_limits_of_float32(self, activation: reference.Activation) -> None:
        """They agree with the definition in float64, where −∞ · 0 is NaN, too."""
        inf = torch.inf
        x = torch.tensor([inf, -inf, 3e38, -3e38, 1e-38, -1e-38, 1e-40, -1e-40, 1e-45, -1e-45])[:, None]
        have = ops.linear_activation(x, torch.ones(1, 1), torch.zeros(1), activation, backend="native")
        expected = torch.sigmoid(1.702 * x.double()) * x.double()
        if activation != "quick_gelu":
            expected = torch.nn.functional.gelu(x.double(), approximate="tanh" if activation == "gelu_tanh" else "none")
        torch.testing.assert_close(have.double(), expected, rtol=3e-7, atol=1.5e-45, equal_nan=True)


class TestGeneric(NativeContract):
    isa = "generic"


class TestAvx2(NativeContract):
    isa = "avx2"


class TestAvx512(NativeContract):
    isa = "avx512"
    pytestmark: ClassVar[list[pytest.MarkDecorator]] = [pytest.mark.slow] if is_repetition(isa) else []


class TestAvx512Bf16(NativeContract):
    isa = "avx512_bf16"


@pytest.fixture
def no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without products of 16 bits, in chunks of a few rows of the weight."""
    monkeypatch.setattr(native_linear, "multiplies", lambda dtype: dtype not in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(native_linear, "CHUNK_NUMEL", 500)


@pytest.mark.usefixtures("no_product")
class TestWidened(LinearContract, LayersContract):
    """The contract without products of 16 bits, whatever this CPU has."""

    backend = "native"
    not_in_float64 = NativeContract.not_in_float64

    @pytest.mark.parametrize("dtype", LOW)
    def test_results_are_rounded_once(self, dtype: torch.dtype) -> None:
        """The result is that of float32, rounded at the end."""
        x, weight, bias = draw(0, 7, 40, dtype=dtype), draw(1, 90, 40, dtype=dtype), draw(2, 90, dtype=dtype)
        expected = reference.linear(x.float(), weight.float(), bias.float())
        have = ops.linear(x, weight, bias, backend="native")
        torch.testing.assert_close(have, expected.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=0)
        assert (have != expected.to(dtype)).float().mean() < 0.01  # float32's own rounding may cross an edge
