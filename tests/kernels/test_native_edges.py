"""The library in C++ at its edges: denormals, infinities, axes of length 1, any memory layout, any number of threads.

Expected results are known in advance, or those of another call to the bit; the contract and the fuzz test compare with
the definition.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contracting import LOW, draw, poisoned
from fuzzing import KINDS, between_elements, bits, lay, numbers
from instructions import CORES, THREADS, capped, isa_parameters, native_operations, threads
from measures import error, relative_error
from tolerances import OP_FLOAT32
from torch import Tensor

from clipfast.kernels import dispatch, native, ops, reference
from clipfast.kernels.linear import eager as eager_linear
from clipfast.kernels.linear import native as native_linear
from clipfast.kernels.registration import mutated_arguments

pytestmark = pytest.mark.skipif(bool(native.unsupported_reasons()), reason="; ".join(native.unsupported_reasons()))
FORMATS = [pytest.param(torch.float32, id="fp32"), *LOW]
INF, NAN = torch.inf, torch.nan


@pytest.fixture(autouse=True, params=isa_parameters())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test runs under every instruction set."""
    with capped(request.param) as used, poisoned("cpu"):
        if not used:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param


def added(*shape: int) -> Tensor:
    return draw(9, *shape, dtype=torch.float64)


# Enough of everything that threads share it.
ARGUMENTS: dict[str, Callable[[torch.dtype], list[Any]]] = {
    "add_layer_norm": lambda dtype: [
        *(draw(seed, 60, 700, dtype=dtype) for seed in (0, 1)),
        *(draw(seed, 700, dtype=dtype) for seed in (2, 3)),
        1e-5,
    ],
    "attention": lambda dtype: [draw(0, 3, 19, 3, 2, 24, dtype=dtype), "mean"],
    "layered_text_maps": lambda dtype: [
        draw(0, 3, 2, 2, 19),
        [draw(seed, 3, 19, 2, 24, dtype=dtype) for seed in (1, 2)],
        draw(3, 2, 2, 24, 20),
        None,
    ],
    "linear": lambda dtype: [*(draw(at, *shape, dtype=dtype) for at, shape in enumerate(((60, 3), (700, 3), (700,))))],
    "linear_activation": lambda dtype: [
        draw(0, 60, 3, dtype=dtype),
        draw(1, 700, 3, dtype=dtype),
        draw(2, 700, dtype=dtype),
        "gelu",
    ],
    "moments": lambda dtype: [
        draw(0, 300, 7, 20, dtype=dtype),
        draw(1, 300, 3, dtype=dtype),
        draw(2, 7, 23, dtype=dtype),
        added(7, 23),
        added(7, 23, 23),
    ],
    "query_row": lambda dtype: [
        draw(0, 3, 2, 24, dtype=dtype),
        *(draw(seed, 3, 19, 2, 24, dtype=dtype) for seed in (1, 2)),
    ],
    "rotate": lambda dtype: [
        draw(0, 30, 40, 2, 3, 36, dtype=dtype),
        draw(1, 3, 40, 36, dtype=dtype),
        draw(2, 3, 40, 36, dtype=dtype),
        False,
    ],
    "span": lambda dtype: [draw(0, 5, 100, 12, dtype=dtype), draw(1, 5, 12, 12, dtype=dtype), 12, 1e-10],
    "text_maps": lambda dtype: [
        draw(0, 3, 2, 19),
        draw(1, 3, 19, 2, 24, dtype=dtype),
        draw(2, 2, 24, 20),
        draw(3, 3, 19, 20),
        None,
    ],
    "text_maps_from_tokens": lambda dtype: [
        draw(0, 3, 2, 19),
        draw(1, 3, 19, 12, dtype=dtype),
        draw(2, 2, 6, 12, dtype=dtype),
        draw(3, 2, 6, dtype=dtype),
        draw(4, 2, 6, 20),
        draw(5, 3, 19, 20),
    ],
    "weighted_rows": lambda dtype: [draw(0, 3, 19, 3, 2, 24, dtype=dtype), draw(1, 3, 7, 19)],
}
"""Of every operation, in a format."""
TAKES: dict[str, tuple[torch.dtype, ...]] = {
    name: (torch.float32, torch.float64) if name == "span" else (torch.float32, torch.bfloat16, torch.float16)
    for name in ARGUMENTS
} | {"linear": (torch.bfloat16, torch.float16), "moments": (torch.float32, torch.float64, torch.bfloat16)}
PRODUCTS = ("linear", "linear_activation", "text_maps_from_tokens")
"""What has a product of torch's in it, whose sums depend on how memory is laid out."""
OWN = [name for name in TAKES if name != "text_maps_from_tokens"]
"""Those whose sums are formed here; torch's may depend on the number of threads."""
CALLS = [pytest.param(name, dtype, id=f"{name}-{dtype}") for name in TAKES for dtype in TAKES[name]]
EVERY_CALL = pytest.mark.parametrize(("name", "dtype"), CALLS)


def compute(name: str, arguments: list[Any]) -> list[Tensor]:
    """Everything that a call returns and changes."""
    returned = getattr(ops, name)(*arguments, backend="native")
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [each for each in (*returned, *(arguments[at] for at in mutated_arguments(name))) if each is not None]


def assert_same(have: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(have, expected, strict=True):
        assert torch.equal(bits(one), bits(other))


def test_every_operation_has_arguments_here() -> None:
    assert ARGUMENTS.keys() == native_operations()


# ------------------------------------------------------------------------------------------------ one answer


@pytest.mark.parametrize(("name", "dtype"), [call for call in CALLS if call.values[0] in OWN])
def test_results_do_not_depend_on_the_number_of_threads(name: str, dtype: torch.dtype) -> None:
    with threads(1):
        expected = compute(name, ARGUMENTS[name](dtype))
    for count in THREADS[1:]:
        with threads(count):
            assert_same(compute(name, ARGUMENTS[name](dtype)), expected)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_results_of_extreme_values_do_not_depend_on_the_number_of_threads(kind: str) -> None:
    for name in OWN:
        dtype = TAKES[name][0]
        if name in PRODUCTS and native_linear.multiplies(dtype):  # by torch's product
            continue
        given = [
            numbers(tuple(each.shape), each.dtype, kind, at) if isinstance(each, Tensor) else each
            for at, each in enumerate(ARGUMENTS[name](dtype))
        ]
        results = []
        for count in (1, CORES + 1):
            with threads(count):
                results.append(compute(name, [each.clone() if isinstance(each, Tensor) else each for each in given]))
        assert_same(*results)


@EVERY_CALL
def test_results_do_not_depend_on_where_memory_starts(name: str, dtype: torch.dtype) -> None:
    """A tensor may start at any element of a vector's width."""
    expected = compute(name, ARGUMENTS[name](dtype))
    for offset in (1, 2, 3, 5, 8, 15):
        assert_same(compute(name, [laid(each, offset, 1) for each in ARGUMENTS[name](dtype)]), expected)


@EVERY_CALL
def test_results_do_not_depend_on_strides(name: str, dtype: torch.dtype) -> None:
    """Axes in reverse order in memory and with gaps; an argument that is changed must be contiguous."""
    expected = compute(name, ARGUMENTS[name](dtype))
    given = ARGUMENTS[name](dtype)
    spread = [each if at in mutated_arguments(name) else laid(each, 3, 2) for at, each in enumerate(given)]
    have = compute(name, spread)
    if name in PRODUCTS:
        assert relative_error(have[0], expected[0]) <= 4 * torch.finfo(dtype).eps
    else:
        assert_same(have, expected)


def laid(each: Any, offset: int, step: int) -> Any:
    """A tensor in memory of its own, contiguous but for where it starts, or turned round and spread."""
    if not isinstance(each, Tensor):
        return each
    axes = list(range(each.ndim))
    return lay(each, axes if step == 1 else axes[::-1], [step] * each.ndim, [step - 1] * each.ndim, offset)


@EVERY_CALL
def test_unaligned_tensors_are_left_to_other_backends(name: str, dtype: torch.dtype) -> None:
    """An array in a file may be unaligned, say. C++ must not read it there; `auto` takes another backend."""
    given = ARGUMENTS[name](dtype)
    for at, each in enumerate(given):
        if isinstance(each, Tensor):
            arguments = [*given[:at], between_elements(each), *given[at + 1 :]]
            with pytest.raises(dispatch.BackendUnavailable, match=r" is not aligned to its elements$"):
                compute(name, arguments)


# ------------------------------------------------------------------------------------------------ length 1 and 0


@pytest.mark.parametrize("dtype", FORMATS)
def test_attention_of_one_token_is_its_value(dtype: torch.dtype) -> None:
    for width in (1, 7, 64):
        qkv = draw(0, 1, 1, 3, 1, width, dtype=dtype)
        out, alpha = ops.attention(qkv, backend="native")
        assert torch.equal(out, qkv[:, :, 2])
        assert alpha is not None
        assert alpha.tolist() == [[[1.0]]]


@pytest.mark.parametrize("dtype", FORMATS)
def test_layer_norm_of_width_1_is_the_bias(dtype: torch.dtype) -> None:
    x, bias = draw(0, 5, 1, dtype=dtype), draw(1, 1, dtype=dtype)
    for row in (x, x[0]):
        out = ops.add_layer_norm(row.clone(), row.clone(), bias, bias, 1e-5, backend="native")
        assert torch.equal(out, bias.expand_as(row))


def test_moments_of_one_entry() -> None:
    total, second = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    ops.moments(torch.tensor([[[5.0]]]), torch.zeros(1, 0), torch.tensor([[2.0]]), total, second, backend="native")
    assert (total.item(), second.item()) == (3, 9)


def test_span_of_one_text_and_one_coordinate() -> None:
    picks, variance, directions = ops.span(torch.tensor([[[-2.0]]]), torch.tensor([[[3.0]]]), 2, backend="native")
    assert picks.tolist() == [[0, -1]]
    assert variance.tolist() == [[36, 0]]
    assert directions.tolist() == [[[-1], [0]]]


def test_empty_tensors_and_missing_axes() -> None:
    for shape in ((0,), (3, 0), (0, 3, 0), (2, 0, 3, 0)):
        empty = torch.zeros(shape)
        width = torch.ones(shape[-1])
        assert ops.add_layer_norm(empty, empty, width, width, 1e-5, backend="native").shape == shape
    with pytest.raises(ValueError, match=r"^x has shape \[\], expected \[\?\]$"):
        ops.add_layer_norm(torch.ones(()), None, torch.ones(3), torch.ones(3), 1e-5, backend="native")
    with pytest.raises(ValueError, match=r"^qkv has shape \[1, 2, 3, 2, 0\], expected \[\?, \?, 3, \?, 1 or more\]$"):
        ops.attention(torch.ones(1, 2, 3, 2, 0), backend="native")


# ---------------------------------------------------------------------------------------------------- denormals


@pytest.mark.parametrize("dtype", FORMATS)
def test_attention_of_denormal_values(isa: str, dtype: torch.dtype) -> None:
    """Weights are equal; values are not flushed to zero and rounded once.

    AVX512-BF16's products of pairs are the exception: they flush denormal values to zero.
    """
    unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    qkv = (torch.randint(-99, 99, (1, 16, 3, 2, 20), generator=torch.Generator().manual_seed(0)) * unit).to(dtype)
    assert qkv.abs().max() < torch.finfo(dtype).smallest_normal
    out, alpha = ops.attention(qkv, backend="native")
    assert alpha is not None
    assert torch.equal(alpha, torch.full_like(alpha, 1 / 16))
    if isa == "avx512_bf16" and dtype == torch.bfloat16:
        assert not out.any()
        return
    expected = qkv.double()[:, :, 2].mean(1, keepdim=True).expand_as(out)
    assert (
        error(out, expected) <= (4 if dtype == torch.float32 else 0.5) * unit
    )  # of float32 all sums are denormal, too
    assert out.any()


@pytest.mark.parametrize("dtype", FORMATS)
def test_layer_norm_of_denormal_values(dtype: torch.dtype) -> None:
    """The sum is exact, and the variance vanishes beside eps."""
    unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x, delta = (torch.randint(-50, 50, (4, 37), generator=torch.Generator().manual_seed(s)).float() for s in (0, 1))
    weight, bias = draw(0, 37, dtype=dtype), draw(1, 37, dtype=dtype)
    stream = (x.double() * unit).to(dtype)
    out = ops.add_layer_norm(stream, (delta.double() * unit).to(dtype), weight, bias, 1e-5, backend="native")
    assert torch.equal(stream.double(), (x + delta).double() * unit)
    _, expected = reference.add_layer_norm(stream.double(), None, weight.double(), bias.double(), 1e-5)
    assert error(out, expected) <= torch.finfo(dtype).eps * float(expected.abs().max())


def test_moments_of_denormal_values_are_exact() -> None:
    unit = 2.0**-149
    codes = torch.randint(-99, 99, (40, 2, 7), generator=torch.Generator().manual_seed(0)).double()
    small, zero = (codes * unit).float(), torch.zeros(2, 7)
    total, second = torch.zeros(2, 7, dtype=torch.float64), torch.zeros(2, 7, 7, dtype=torch.float64)
    ops.moments(small, torch.zeros(40, 0), zero, total, second, backend="native")
    assert torch.equal(total, codes.sum(0) * unit)
    assert torch.equal(second, torch.einsum("bgi,bgj->gij", codes, codes) * unit**2)


def test_span_picks_the_same_of_denormal_texts_as_of_scaled_ones() -> None:
    texts = torch.randint(-99, 99, (2, 50, 6), generator=torch.Generator().manual_seed(0)).double()
    factor = draw(1, 2, 6, 6)
    expected = ops.span(texts.float(), factor, 6, backend="native")
    have = ops.span((texts * 2.0**-149).float(), factor * 2.0**100, 6, backend="native")
    assert torch.equal(have[0], expected[0])
    assert error(have[2], expected[2]) <= OP_FLOAT32


@pytest.mark.parametrize("dtype", FORMATS)
def test_gelu_halves_denormal_values(dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = (torch.arange(-100, 101).double() * unit).to(dtype)[:, None]
    have = ops.linear_activation(x, x.new_ones(1, 1), x.new_zeros(1), "gelu", backend="native")
    by_amx = dtype == torch.bfloat16 and eager_linear._reads_whole_tiles()  # which takes denormal numbers for zero
    assert error(have, x.double() / 2) <= (torch.finfo(dtype).smallest_normal if by_amx else unit / 2)


# --------------------------------------------------------------------------------------------------- infinities


@pytest.mark.parametrize("dtype", FORMATS)
def test_infinities_in_attention_stay_in_their_head_and_column(dtype: torch.dtype) -> None:
    """An infinite value makes its column infinite, a logit of −∞ has weight 0, and one of +∞ makes the softmax NaN."""
    qkv = draw(0, 3, 9, 3, 2, 20, dtype=dtype)
    qkv[:, :, 0] = 1
    qkv[0, 4, 2, 0, 3] = INF
    qkv[1, 5, 1, 1, 7] = -INF
    qkv[2, 2, 1, 0, 0] = INF
    out, alpha = ops.attention(qkv, backend="native")
    assert alpha is not None
    expected_out, expected_alpha = reference.attention(qkv.double())
    for have, expected in ((out, expected_out), (alpha, expected_alpha)):
        assert torch.equal(have.isnan(), expected.isnan())
        assert torch.equal(have.isinf(), expected.isinf())
        finite = expected.isfinite()
        assert error(have[finite], expected[finite]) <= 2 * torch.finfo(have.dtype).eps * float(
            expected[finite].abs().max()
        )
    assert bool((out[0, :, 0, 3] == INF).all())
    assert bool((alpha[1, 1, 5] == 0).all())
    assert bool(alpha[2, 0].isnan().all())
    assert bool(alpha[2, 1].isfinite().all())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("hard", [INF, -INF, NAN])
def test_layer_norm_of_a_row_with_infinity_or_nan_is_nan_in_that_row_alone(dtype: torch.dtype, hard: float) -> None:
    x, weight = draw(0, 7, 50, dtype=dtype), draw(1, 50, dtype=dtype)
    expected = ops.add_layer_norm(x.clone(), None, weight, weight, 1e-5, backend="native")
    x[3, 48] = hard
    have = ops.add_layer_norm(x, None, weight, weight, 1e-5, backend="native")
    assert bool(have[3].isnan().all())
    others = torch.arange(7) != 3
    assert torch.equal(have[others], expected[others])


@pytest.mark.parametrize("hard", [INF, -INF, NAN])
def test_moments_of_infinity_or_nan_are_not_finite_in_its_row_and_column_alone(hard: float) -> None:
    codes, shared, centre = draw(0, 40, 2, 20), draw(1, 40, 3), draw(2, 2, 23)
    total, second = torch.zeros(2, 23, dtype=torch.float64), torch.zeros(2, 23, 23, dtype=torch.float64)
    codes[7, 1, 18] = hard
    ops.moments(codes, shared, centre, total, second, backend="native")
    wrong = torch.zeros(2, 23, dtype=torch.bool)
    wrong[1, 18] = True
    assert torch.equal(total.isfinite(), ~wrong)
    assert torch.equal(second.isfinite(), ~(wrong[:, :, None] | wrong[:, None]))


@pytest.mark.parametrize("hard", [INF, -INF, NAN])
@pytest.mark.parametrize("at", [0, 1])
def test_span_picks_nothing_in_a_head_with_infinity_or_nan(at: int, hard: float) -> None:
    given = [draw(0, 2, 40, 9), draw(1, 2, 9, 9)]
    expected = ops.span(*given, 5, backend="native")
    given[at][0, 8, 8] = hard
    have = ops.span(*given, 5, backend="native")
    assert have[0][0].tolist() == [-1] * 5
    assert not have[1][0].any()
    assert not have[2][0].any()
    assert_same([each[1] for each in have], [each[1] for each in expected])
