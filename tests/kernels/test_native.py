"""The contract under the library in C++, once per instruction set that this CPU has."""

from collections.abc import Iterator

import pytest
from contract import OpsContract

from clipfast.kernels import native


class NativeContract(OpsContract):
    """Not collected; a class per instruction set inherits it."""

    backend = "native"
    isa: str

    @pytest.fixture(autouse=True)
    def _capped(self) -> Iterator[None]:
        before = native.limit(native.ISAS[-1])
        if native.limit(self.isa) != self.isa:
            native.limit(before)
            pytest.skip(f"this CPU has no {self.isa}")
        yield
        native.limit(before)


class TestGeneric(NativeContract):
    isa = "generic"


class TestAvx2(NativeContract):
    isa = "avx2"


class TestAvx512(NativeContract):
    isa = "avx512"


class TestAvx512Bf16(NativeContract):
    isa = "avx512_bf16"
