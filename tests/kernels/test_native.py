"""The contract under the library in C++, once per instruction set that this CPU has."""

from collections.abc import Iterator

import pytest
import torch
from contract import OpsContract
from contract_layers import EVERY_ACTIVATION
from contracting import LOW

from clipfast.kernels import native, ops, reference


class NativeContract(OpsContract):
    """Not collected; a class per instruction set inherits it."""

    backend = "native"
    not_in_float64 = frozenset({"add_layer_norm", "attention", "linear_activation"})
    isa: str

    @pytest.fixture(autouse=True)
    def _capped(self) -> Iterator[None]:
        before = native.limit(native.ISAS[-1])
        if native.limit(self.isa) != self.isa:
            native.limit(before)
            pytest.skip(f"this CPU has no {self.isa}")
        yield
        native.limit(before)

    @pytest.mark.parametrize("dtype", LOW)
    def test_every_number_of_16_bits_is_read_and_rounded_as_torch_does(self, dtype: torch.dtype) -> None:
        """Denormals, infinities and NaN among them: sums of each with numbers of its own size and of any other."""
        everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        weight = torch.ones(256)
        for delta in (everything * 0.37, everything.roll(4321), everything.flip(0)):
            x, delta = everything.clone().view(256, 256), delta.view(256, 256)
            want = x + delta
            ops.add_layer_norm(x, delta, weight, weight, 1e-5, backend="native")
            torch.testing.assert_close(x, want, rtol=0, atol=0, equal_nan=True)

    @EVERY_ACTIVATION
    def test_activations_at_the_ends_of_float32(self, activation: reference.Activation) -> None:
        """As the definition in float64: −∞ · 0 is NaN there, too."""
        inf = torch.inf
        x = torch.tensor([inf, -inf, 3e38, -3e38, 1e-38, -1e-38, 1e-40, -1e-40, 1e-45, -1e-45])[:, None]
        have = ops.linear_activation(x, torch.ones(1, 1), torch.zeros(1), activation, backend="native")
        want = torch.sigmoid(1.702 * x.double()) * x.double()
        if activation != "quick_gelu":
            want = torch.nn.functional.gelu(x.double(), approximate="tanh" if activation == "gelu_tanh" else "none")
        torch.testing.assert_close(have.double(), want, rtol=3e-7, atol=1.5e-45, equal_nan=True)


class TestGeneric(NativeContract):
    isa = "generic"


class TestAvx2(NativeContract):
    isa = "avx2"


class TestAvx512(NativeContract):
    isa = "avx512"


class TestAvx512Bf16(NativeContract):
    isa = "avx512_bf16"
