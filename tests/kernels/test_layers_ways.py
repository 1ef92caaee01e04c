"""Every way the Triton kernels of the layers can be cut, and what they promise beyond the contract."""

from math import pi

import pytest
import torch
from contracting import DEVICES, draw, floor, in_double
from measures import error, relative_error
from tolerances import LOW_PRECISION_FACTOR, OP_FLOAT32
from torch import Tensor

from clipfast.kernels import reference
from clipfast.kernels.dispatch import BACKENDS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
arithmetic = pytest.importorskip("clipfast.kernels.arithmetic")
layer_norm = pytest.importorskip("clipfast.kernels.layer_norm.triton")
mlp = pytest.importorskip("clipfast.kernels.linear.triton")

DEVICE = DEVICES.get("triton", "cpu")
DIRECT = [config for config in mlp.CONFIGS if "DEFERRED" not in config.blocks]
# Rows, K and columns: tiles that end outside, more products than are deferred and, on a GPU, several tiles a program.
SIZES = (5000, 584, 2056) if DEVICE == "cuda" else (140, 520, 264)
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
LIMITS = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}  # bits after the first; the smallest normal exponent


@pytest.fixture(autouse=True)
def _runs_here() -> None:
    refused = next(backend for backend in BACKENDS if backend.name == "triton").unsupported_reasons()
    if refused:
        pytest.skip(", ".join(refused))


def draw_layer(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = draw(0, rows, inner), draw(1, columns, inner) * inner**-0.5, draw(2, columns)
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)


@pytest.mark.parametrize("config", mlp.CONFIGS, ids=str)
@pytest.mark.slow
def test_every_cut_of_the_mlp(config: "mlp.Config") -> None:
    arguments = draw_layer(*SIZES, torch.bfloat16)
    have = mlp.run(*arguments, "gelu", config)
    plain = reference.linear_activation(*arguments, "gelu")
    expected = reference.linear_activation(*in_double(*arguments), "gelu")
    assert error(have, expected) <= LOW_PRECISION_FACTOR * error(plain, expected) + floor(expected)


@pytest.mark.parametrize("config", DIRECT, ids=str)
def test_every_cut_of_the_mlp_by_pointers(config: "mlp.Config") -> None:
    """An odd number of columns is nothing that a tensor descriptor describes."""
    arguments = draw_layer(150, 67, 131, torch.float32)
    launch, have = mlp.plan(*arguments, "quick_gelu", config)
    assert not launch.constants["DESCRIPTORS"]
    launch.run()
    assert relative_error(have, reference.linear_activation(*in_double(*arguments), "quick_gelu")) <= OP_FLOAT32


@triton.jit
def _activate_kernel(p_x, p_out, N, ACTIVATION: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    b_out = mlp.activate(b_x, ACTIVATION, EXACT)
    tl.store(p_out + o_n, arithmetic.rounded(b_out, p_out.dtype.element_ty), mask=o_n < N)


def activated(x: Tensor, activation: str, exact: bool) -> tuple[Tensor, Tensor]:
    """What the kernels make of x, and what is right: below -6 1 + erf and 1 + tanh lose it in float64, too."""
    out = torch.empty_like(x)
    _activate_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), activation, exact, 1024)
    wide = x.double()
    logit = 1.702 * wide if activation == "quick_gelu" else (8 / pi) ** 0.5 * (wide + 0.044715 * wide**3)
    share = torch.special.erfc(-wide * 0.5**0.5) / 2 if activation == "gelu" else torch.sigmoid(logit)
    return out, wide * share


def defined(x: Tensor, activation: str) -> Tensor:
    """The definition, of a layer that changes nothing before it."""
    return reference.linear_activation(x[:, None], x.new_ones(1, 1), x.new_zeros(1), activation)[:, 0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("exact", "near"), [(True, 1e-6), (False, 5e-6)])
def test_activations_are_right_in_their_tails(activation: str, exact: bool, near: float) -> None:
    """Relative to themselves, not to x: gelu(-10) is -8e-23, and what computes 1 + erf has no digit of it left.

    Further out float32 loses some, too: it has the exponent of two, up to 125, to no better than 1e-5.
    """
    x = torch.linspace(-10, 10, 20001, device=DEVICE)
    have, expected = activated(x, activation, exact)
    off = (have.double() - expected).abs() / expected.abs().clamp_min(1e-300)
    assert float(off[x.abs() <= 3].max()) <= near
    assert float(off.max()) <= 1.5e-5
    assert error(expected, defined(x.double(), activation)) <= 1e-14


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_activations_are_rounded_once(activation: str, dtype: torch.dtype) -> None:
    """Every number there is from -9 to 60,000: half a unit in the last place, and 2 % more for what six terms miss."""
    x = torch.arange(-(1 << 15), 1 << 15, device=DEVICE).to(torch.int16).view(dtype)
    x = x[(x >= -9) & (x <= 6e4) & ((x == 0) | (x.abs() > 1e-30))]  # float32 has no more digits below
    have, expected = activated(x, activation, False)
    bits, smallest = LIMITS[dtype]
    unit = 2.0 ** (expected.abs().clamp_min(1e-300).log2().floor().clamp_min(smallest) - bits)
    assert bool(((have.double() - expected).abs() <= 0.52 * unit).all())
    assert error(have, expected) <= error(defined(x, activation), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_activations_of_huge_numbers(activation: str) -> None:
    largest, infinite = torch.finfo(torch.float32).max, torch.inf
    x = torch.tensor([-infinite, -largest, -3e38, -1e4, 0, 1e4, 3e38, largest, infinite, torch.nan], device=DEVICE)
    for exact in (True, False):
        have, _ = activated(x, activation, exact)
        expected = torch.tensor([0, 0, 0, 0, 0, 1e4, 3e38, largest, infinite], device=DEVICE)
        assert torch.equal(have[:-1], expected)
        assert bool(have[-1].isnan())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("config", mlp.CONFIGS, ids=str)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_an_mlp_whose_hidden_layer_is_beyond_float16(activation: str, config: "mlp.Config") -> None:
    """±80,000 before the activation: the negative side is 0 whatever cut of the kernel rounds it to float16 first."""
    x = torch.full((128, 640), 1.0, dtype=torch.float16, device=DEVICE)
    sign = torch.tensor([-125.0, 125.0], device=DEVICE).repeat(64)[:, None]
    weight, bias = sign.expand(128, 640).to(torch.float16).contiguous(), x.new_zeros(128)
    have = mlp.run(x, weight, bias, activation, config)
    assert bool((have[:, 0::2] == 0).all())
    assert bool((have[:, 1::2] == torch.inf).all())


@pytest.mark.parametrize("width", [48, 1001, 1664, 5000])
@pytest.mark.parametrize("offset", [0.0, 100.0, -3000.0])
def test_large_means_do_not_matter_to_the_layer_norm(width: int, offset: float) -> None:
    """Float32, where the contract allows what the definition loses to the rounding of the mean."""
    x, weight, bias = draw(3, 4, width).to(DEVICE) + offset, draw(4, width).to(DEVICE), draw(5, width).to(DEVICE)
    _, expected = reference.add_layer_norm(x.double(), None, weight.double(), bias.double(), 1e-5)
    for config in layer_norm.configs(width):
        assert relative_error(layer_norm.run(x, None, weight, bias, 1e-5, config=config), expected) <= OP_FLOAT32


@pytest.mark.parametrize("value", [3.7, -1e4])
def test_equal_numbers_have_no_variance(value: float) -> None:
    """Even where their mean is not one of the numbers that float32 has."""
    x = torch.full((2, 1001), value, device=DEVICE)
    weight, bias = draw(4, 1001).to(DEVICE), draw(5, 1001).to(DEVICE)
    have = layer_norm.run(x, None, weight, bias, 1e-5)
    assert relative_error(have, bias.expand_as(have)) <= OP_FLOAT32


def test_a_variance_as_small_as_the_rounding_of_the_mean() -> None:
    """Numbers that are one bit apart: the mean is rounded by as much as they deviate from it."""
    weight, bias = draw(4, 1001).to(DEVICE), draw(5, 1001).to(DEVICE)
    x = 1000 + 2.0**-14 * (draw(6, 8, 1001).to(DEVICE) > torch.linspace(-1, 1, 8, device=DEVICE)[:, None])
    _, expected = reference.add_layer_norm(x.double(), None, weight.double(), bias.double(), 1e-12)
    assert relative_error(layer_norm.run(x, None, weight, bias, 1e-12), expected) <= OP_FLOAT32


def test_every_reason_is_told() -> None:
    row = torch.zeros(1 << 15)
    x = row.double().expand(3, 1 << 15)  # three rows in one place
    assert layer_norm.unsupported_reasons(x, None, row, row.to(torch.int8), 1e-5) == [
        "x is float64",
        "bias is int8",
        "x has strides [0, 1]: its rows are not contiguous, or not at one distance",
        "width 32768 is more than 16384",
    ]
    assert layer_norm.unsupported_reasons(row[None, :8], None, row[:8], row[:8], 1e-5) == []
    x, weight = torch.zeros(3, 0, dtype=torch.float64), torch.zeros(5, 0)
    assert mlp.unsupported_reasons(x, weight, weight[:, 0:].sum(1), "gelu") == [
        "x is float64",
        "x is float64, weight float32 and bias float32",
        "x has no columns",
    ]


# ------------------------------------------------------------------------------------- what would run on which GPU


def planned(gpu: int, rows: int, inner: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> list["mlp.Config"]:
    x = torch.empty(rows, inner, dtype=dtype, device="meta")
    return list(mlp.configs(x, torch.empty(columns, inner, dtype=dtype, device="meta"), gpu))


@pytest.mark.parametrize(
    ("gpu", "sizes", "dtype", "first"),
    [
        (90, (65792, 1024, 4096), torch.bfloat16, mlp.DEFERRED),
        (90, (65792, 512, 2048), torch.bfloat16, mlp.PAIRED),  # too few products to defer eight slices
        (90, (256, 1024, 4096), torch.float16, mlp.FEW_ROWS),  # the class token alone
        (100, (65792, 1024, 4096), torch.bfloat16, mlp.WIDE),
        (80, (65792, 1024, 4096), torch.bfloat16, mlp.SMALL),
        (120, (65792, 1024, 4096), torch.bfloat16, mlp.SMALL),
        (90, (65792, 1020, 4096), torch.bfloat16, mlp.UNALIGNED),
        (90, (65792, 1024, 4096), torch.float32, mlp.FLOAT32),
    ],
)
def test_the_cut_follows_from_the_gpu_and_the_sizes(
    gpu: int, sizes: tuple[int, int, int], dtype: torch.dtype, first: "mlp.Config", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp, "INTERPRETED", False)
    assert planned(gpu, *sizes, dtype)[0] == first


def test_a_plan_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors give the very launch that an H200 gets: one or two programs for each of 132 multiprocessors."""
    monkeypatch.setattr(mlp, "INTERPRETED", False)
    mlp._multiprocessors.cache_clear()
    x, weight, bias = (
        torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((256, 257, 1024), (4096, 1024), (4096,))
    )
    grids = []
    for config in mlp.configs(x, weight):
        launch, out = mlp.plan(x, weight, bias, "gelu", config)
        assert out.shape == (256, 257, 4096)
        assert launch.arguments["p_x"].block_shape == [128, 64]
        grids.append(launch.grid)
    mlp._multiprocessors.cache_clear()
    assert grids == [(132,), (264,), (132,)]
