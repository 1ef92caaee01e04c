"""The speed of the C++ operations against the same operations in torch.

Sizes are those of a layer of ViT-B-32, B-16 and L-14 (at 224 and 336 pixels), at batch 8 except for the longest. The
bars are for a CPU with bfloat16 instructions, on which torch is also fast in that format. TEXTSPAN and moments are in
``bench_textspan.py``.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import cases
from benchmarks.results import Results
from clipfast.bench.inputs import DTYPES
from clipfast.bench.measuring import Bar, Check, compare
from clipfast.kernels import native, ops, reference
from clipfast.kernels.linear import native as native_linear

QUESTION = "native"
SENTENCE = "How much faster are the operations in C++ than the same in torch?"
ATTENTION, ACTIVATION, NORM = 3.5, 8.0, 2.0
"""Least speed relative to torch in bfloat16: attention with α over SDPA, bias + QuickGELU, residual + LayerNorm."""
ERROR = 1.05
"""Largest error against float64 relative to torch's error."""
TOKENS = {50: (8, 12), 197: (8, 12), 257: (4, 16), 577: (1, 16)}
"""Tokens → images and heads."""
HEAD_DIM = 64

pytestmark = pytest.mark.skipif(bool(native.unsupported_reasons()), reason="; ".join(native.unsupported_reasons()))
EVERY_DTYPE = pytest.mark.parametrize("dtype", ["bf16", "fp32"])


def draw(seed: int, *shape: int, dtype: str = "fp32") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).square().mean().sqrt())


class Measure:
    """Checks, times and records one comparison of C++ with torch."""

    def __init__(self, benchmark: BenchmarkFixture, results: Results, settings: dict[str, Any], count: int, say: Any):
        self.benchmark, self.results, self.settings, self.count, self.say = benchmark, results, settings, count, say
        torch.set_num_threads(settings["threads"])

    @torch.inference_mode()
    def __call__(
        self,
        name: str,
        fast: Callable[[], Any],
        plain: Callable[[], Any],
        verify: Callable[[], list[Check]],
        shape: dict[str, Any],
        *,
        at_least: float | None = None,
        repeat: int = 1,
    ) -> None:
        """Compares ``fast`` with ``plain``, ``repeat`` calls per timing, after the checks of ``verify``."""

        def repeated(call: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                for _ in range(repeat):
                    call()

            return run

        comparison = compare(repeated(fast), repeated(plain), verify, count=self.count)
        bars = () if at_least is None else (Bar(f"{name}: times as fast", comparison.ratio, at_least, at_least=True),)
        settings = shape | {"calls": repeat} | self.settings | cases.instructions()
        self.results.compared(name, comparison, a="C++", b="torch", settings=settings, bars=bars)
        self.say(*bars, f"{name}: {comparison.ratio:.3g} times as fast, largest error {comparison.error:.1e}")
        self.benchmark.extra_info |= {"ratio": comparison.ratio, "error": comparison.error}
        self.benchmark.pedantic(repeated(fast), rounds=1)  # type: ignore[no-untyped-call]


@pytest.fixture
def measure(benchmark: BenchmarkFixture, results: Results, settings: dict[str, Any], pairs: int, say: Any) -> Measure:
    return Measure(benchmark, results, settings, pairs, say)


@EVERY_DTYPE
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention(measure: Measure, tokens: int, dtype: str) -> None:
    """Attention with α against SDPA, which returns no α."""
    images, heads = TOKENS[tokens]
    qkv = draw(0, images, tokens, 3, heads, HEAD_DIM, dtype=dtype)
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def verify() -> list[Check]:
        expected, weights = reference.attention(qkv.double(), "cls")
        out, alpha = ops.attention(qkv, "cls", backend="native")
        assert alpha is not None
        torch_error = error(sdpa().transpose(1, 2), expected)
        return [
            Check("out against float64", error(out, expected), ERROR * torch_error),
            Check("alpha against float64", float((alpha - weights).abs().max()), 1e-6),
        ]

    measure(
        f"attention + α, {tokens} tokens, {dtype}",
        lambda: ops.attention(qkv, "cls", backend="native"),
        sdpa,
        verify,
        {"images": images, "tokens": tokens, "heads": heads, "head_dim": HEAD_DIM, "dtype": dtype},
        at_least=ATTENTION if dtype == "bf16" else None,
        repeat=5,
    )


@EVERY_DTYPE
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_activation(measure: Measure, activation: reference.Activation, dtype: str) -> None:
    """Bias and activation of ``[400, 3072]`` against the same as written in a torch module."""
    rows, columns = 400, 3072
    hidden, bias = draw(0, rows, columns, dtype=dtype), draw(1, columns, dtype=dtype)
    out, shift = torch.empty_like(hidden), bias.float()

    def plain() -> Tensor:
        biased = hidden + bias
        return biased * torch.sigmoid(1.702 * biased) if activation == "quick_gelu" else F.gelu(biased)

    def fast() -> Tensor:
        native_linear.activate(hidden, shift, activation, out)
        return out

    def verify() -> list[Check]:
        biased = hidden.double() + bias.double()
        expected = biased * torch.sigmoid(1.702 * biased) if activation == "quick_gelu" else F.gelu(biased)
        return [Check("against float64", error(fast(), expected), ERROR * error(plain(), expected))]

    shape = {"rows": rows, "columns": columns, "dtype": dtype}
    bar = ACTIVATION if (activation, dtype) == ("quick_gelu", "bf16") else None
    measure(f"bias + {activation}, {dtype}", fast, plain, verify, shape, at_least=bar, repeat=10)


@EVERY_DTYPE
@pytest.mark.parametrize("rows", [400, 1576])
def test_add_layer_norm(measure: Measure, rows: int, dtype: str) -> None:
    """Adding to the residual stream and normalising it, ``[rows, 768]``."""
    width = 768
    start, weight, bias = draw(0, rows, width, dtype=dtype), draw(1, width, dtype=dtype), draw(2, width, dtype=dtype)
    delta = (draw(3, rows, width) * 1e-3).to(DTYPES[dtype])
    stream = start.clone()

    def plain(x: Tensor = stream) -> Tensor:
        return F.layer_norm(x.add_(delta), (width,), weight, bias, 1e-5)

    def fast(x: Tensor = stream) -> Tensor:
        return ops.add_layer_norm(x, delta, weight, bias, 1e-5, backend="native")

    def verify() -> list[Check]:
        expected = F.layer_norm((start + delta).double(), (width,), weight.double(), bias.double(), 1e-5)
        bound = ERROR * error(plain(start.clone()), expected) + 1e-8
        return [Check("against float64", error(fast(start.clone()), expected), bound)]

    shape = {"rows": rows, "width": width, "dtype": dtype}
    bar = NORM if dtype == "bf16" else None
    measure(f"residual + LayerNorm, {rows} rows, {dtype}", fast, plain, verify, shape, at_least=bar, repeat=20)


@EVERY_DTYPE
def test_query_row(measure: Measure, dtype: str) -> None:
    """Attention of the class token alone against the same in torch."""
    images, tokens, heads = 8, 197, 12
    query, key, value = draw(0, images, tokens, 3, heads, HEAD_DIM, dtype=dtype).unbind(2)
    query = query[:, 0]

    def verify() -> list[Check]:
        references = reference.query_row(query.double(), key.double(), value.double())
        results = ops.query_row(query, key, value, backend="native")
        return [
            Check(f"{name} against float64", float((result - expected).abs().max()), 1e-5)
            for name, result, expected in zip(("z", "alpha"), results, references, strict=True)
        ]

    measure(
        f"attention of one query, {dtype}",
        lambda: ops.query_row(query, key, value, backend="native"),
        lambda: ops.query_row(query, key, value, backend="eager"),
        verify,
        {"images": images, "tokens": tokens, "heads": heads, "head_dim": HEAD_DIM, "dtype": dtype},
        repeat=20,
    )


@EVERY_DTYPE
def test_weighted_rows(measure: Measure, dtype: str) -> None:
    """What twelve pooling heads read of one layer's tokens, as in SigLIP B/16, against products in torch."""
    images, tokens, heads = 8, 196, 12
    qkv, weights = draw(0, images, tokens, 3, heads, HEAD_DIM, dtype=dtype), draw(1, images, 12, tokens)

    def verify() -> list[Check]:
        expected = reference.weighted_rows(qkv.double(), weights.double())
        rows = ops.weighted_rows(qkv, weights, backend="native")
        return [Check("against float64", float((rows - expected).abs().max()), 1e-5)]

    measure(
        f"weighted attention rows, {dtype}",
        lambda: ops.weighted_rows(qkv, weights, backend="native"),
        lambda: ops.weighted_rows(qkv, weights, backend="eager"),
        verify,
        {"images": images, "tokens": tokens, "heads": heads, "head_dim": HEAD_DIM, "weightings": 12, "dtype": dtype},
        repeat=20,
    )


@EVERY_DTYPE
@pytest.mark.parametrize("texts", [1, 16, 64])
def test_text_maps(measure: Measure, texts: int, dtype: str) -> None:
    """Maps of one layer, summed over its heads, against batched products in torch."""
    images, tokens, heads = 8, 197, 12
    value = draw(0, images, tokens, 3, heads, HEAD_DIM, dtype=dtype)[:, :, 2]
    alpha, basis = draw(1, images, heads, tokens).softmax(-1), draw(2, heads, HEAD_DIM, texts)
    out = torch.zeros(images, tokens, texts)

    def verify() -> list[Check]:
        expected = reference.text_maps(alpha.double(), value.double(), basis.double())
        result = ops.text_maps(alpha, value, basis, torch.zeros_like(out), backend="native")
        return [Check("against float64", cases.relative(result, expected), 1e-5)]

    measure(
        f"maps of {texts} texts, {dtype}",
        lambda: ops.text_maps(alpha, value, basis, out, backend="native"),
        lambda: ops.text_maps(alpha, value, basis, out, backend="eager"),
        verify,
        {"images": images, "tokens": tokens, "heads": heads, "head_dim": HEAD_DIM, "texts": texts, "dtype": dtype},
        repeat=10,
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_linear(measure: Measure, dtype: str) -> None:
    """A layer in 16 bits, ``[400, 768] → [400, 3072]``; the speed is equal where the operation calls torch."""
    rows, inner, columns = 400, 768, 3072
    x, weight = draw(0, rows, inner, dtype=dtype), (draw(1, columns, inner) * inner**-0.5).to(DTYPES[dtype])
    bias = draw(2, columns, dtype=dtype)

    def verify() -> list[Check]:
        expected = reference.linear(x.double(), weight.double(), bias.double())
        result = ops.linear(x, weight, bias, backend="native")
        return [Check("against float64", error(result, expected), ERROR * error(F.linear(x, weight, bias), expected))]

    measure(
        f"linear layer, {dtype}",
        lambda: ops.linear(x, weight, bias, backend="native"),
        lambda: F.linear(x, weight, bias),
        verify,
        {"rows": rows, "inner": inner, "columns": columns, "dtype": dtype},
    )
