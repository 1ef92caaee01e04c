"""Rows in float8 by hand, wrong arguments, and every way their kernel can be cut."""

import pytest
import torch
from contracting import DEVICES, draw
from opchecking import Calls, cases, opcheck
from opchecking import draw as draw_small
from torch import Tensor

from clipfast.kernels import ops, reference
from clipfast.kernels.dispatch import BACKENDS

LOW = torch.bfloat16
BITS = reference.quantize_rows(draw_small(2, 3, 16))
WEIGHT = reference.quantize_rows(draw_small(32, 16))
CALLS: Calls = {
    "quantize_rows": {
        "bf16": (draw_small(2, 3, 16, dtype=LOW), "gelu"),
        "strided": (draw_small(2, 16, 3).mT, None),
        "no images": (draw_small(0, 3, 16), "quick_gelu"),
    },
    "scaled_linear": {
        "without a bias": (*BITS, *WEIGHT, None),
        "strided": (BITS[0].mT.contiguous().mT, BITS[1], *WEIGHT, draw_small(32, 2, dtype=LOW)[:, 0]),
        "no images": (BITS[0][:0], BITS[1][:0], *WEIGHT, None),
    },
}


@pytest.mark.parametrize(("name", "case", "backend"), cases(CALLS))
def test_schema_and_fake(name: str, case: str, backend: str) -> None:
    opcheck(name, CALLS[name][case], backend)


@pytest.mark.parametrize("quantize", [reference.quantize_rows, ops.quantize_rows], ids=["definition", "called"])
def test_a_row_by_hand(quantize: object) -> None:
    """896 is the largest, so the scale is 2: 448, −1, 17.5 → 18 (steps of 2), 2⁻⁹ (the smallest), 0."""
    values, scale = quantize(torch.tensor([896.0, -2, 35, 2**-8, 0]))  # type: ignore[operator]
    assert float(scale) == 2
    assert values.view(torch.float8_e4m3fn).float().tolist() == [448, -1, 18, 2**-9, 0]


@pytest.mark.parametrize("multiply", [reference.scaled_linear, ops.scaled_linear], ids=["definition", "called"])
def test_a_product_by_hand(multiply: object) -> None:
    """(2 · (3, 1)) · (0.5 · (4, −8)) + 10 = (6, 2) · (2, −4) + 10 = 14, and (6, 2) · (1, 1) − 1 = 7."""
    values, weight = (
        torch.tensor(each).to(torch.float8_e4m3fn).view(torch.uint8) for each in ([[3.0, 1]], [[4.0, -8], [1, 1]])
    )
    scale, weight_scale, bias = torch.tensor([2.0]), torch.tensor([0.5, 1]), torch.tensor([10.0, -1]).bfloat16()
    have = multiply(values, scale, weight, weight_scale, bias)  # type: ignore[operator]
    assert have.tolist() == [[14, 7]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((torch.ones(3, 0),), r"x has shape \[3, 0\], expected \[\?, 1 or more\]"),
        ((torch.ones(3, 5, dtype=torch.int32),), "x is torch.int32, expected floats"),
        ((torch.ones(3, 5), "relu"), "activation is 'relu', expected None or one of gelu, gelu_tanh, quick_gelu"),
    ],
)
def test_wrong_arguments_of_quantize_rows(given: tuple[object, ...], told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}$"):
        ops.quantize_rows(*given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"values": torch.ones(2, 5, dtype=torch.uint8)}, r"values has shape \[2, 5\], expected \[\?, 7\]"),
        ({"values": torch.ones(2, 7)}, "values is torch.float32, expected torch.uint8"),
        ({"scale": torch.ones(3)}, r"scale has shape \[3\], expected \[2\]"),
        ({"scale": torch.ones(2).half()}, "scale is torch.float16, expected torch.float32"),
        ({"weight": torch.ones(6, 7)}, "weight is torch.float32, expected torch.uint8"),
        ({"weight_scale": torch.ones(7)}, r"weight_scale has shape \[7\], expected \[6\]"),
        ({"bias": torch.ones(6)}, "bias is torch.float32, expected torch.bfloat16"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_wrong_arguments_of_scaled_linear(change: dict[str, object], told: str) -> None:
    bits: dict[str, Tensor] = {
        "values": torch.ones(2, 7, dtype=torch.uint8),
        "scale": torch.ones(2),
        "weight": torch.ones(6, 7, dtype=torch.uint8),
        "weight_scale": torch.ones(6),
        "bias": torch.ones(6).bfloat16(),
    }
    with pytest.raises(ValueError, match=f"^{told}"):
        ops.scaled_linear(**{**bits, **change})  # type: ignore[arg-type]


def test_every_cut_of_the_kernel() -> None:
    fp8 = pytest.importorskip("clipfast.kernels.fp8.triton")
    refused = next(backend for backend in BACKENDS if backend.name == "triton").unsupported_reasons()
    if refused:
        pytest.skip(", ".join(refused))
    x = draw(0, 5, 3000, dtype=torch.bfloat16).to(DEVICES.get("triton", "cpu"))
    assert len(fp8.configs(3000)) > 1
    first = fp8.run(x, "gelu")
    for config in fp8.configs(3000):
        for got, expected in zip(fp8.run(x, "gelu", config), first, strict=True):
            assert torch.equal(got, expected)


def test_what_the_kernel_refuses() -> None:
    fp8 = pytest.importorskip("clipfast.kernels.fp8.triton")
    assert fp8.unsupported_reasons(torch.zeros(1, 8)) == []
    assert fp8.unsupported_reasons(torch.zeros(1, 1 << 15).double()) == [
        "x is float64",
        "width 32768 is more than 16384",
    ]
