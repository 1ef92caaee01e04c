"""Every way that attention can be cut, not only the one that is preferred here: same numbers."""

import pytest
import torch
from contracting import DEVICES, draw, floor
from measures import error, relative_error, relative_norm
from tolerances import LOW_PRECISION_FACTOR, OP_FLOAT32
from torch.nn.attention import SDPBackend

from clipfast.kernels import dispatch, reference
from clipfast.kernels.attention import mean_row, sdpa, tiles
from clipfast.kernels.attention import triton as attention
from clipfast.kernels.launch import INTERPRETED, Config
from clipfast.kernels.query_row import triton as query_row
from clipfast.kernels.query_row import triton_from_tokens as query_row_from_tokens

TRITON = next(backend for backend in dispatch.BACKENDS if backend.name == "triton")
pytestmark = pytest.mark.skipif(bool(TRITON.unsupported_reasons()), reason=", ".join(TRITON.unsupported_reasons()))
DEVICE = DEVICES.get("triton", "cpu")

SMALL = {"BLOCK_M": 32, "BLOCK_N": 16}
WAYS = [
    pytest.param({**SMALL, "DESCRIPTORS": 0, "WITH_TILE": 0}, id="pointers"),
    pytest.param({**SMALL, "DESCRIPTORS": 1, "WITH_TILE": 0}, id="descriptors"),
    pytest.param({**SMALL, "DESCRIPTORS": 1, "WITH_TILE": 1}, id="with-tile"),
]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result has to be written: what ``new_empty`` gives is NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        made = new_empty(self, *args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("row", ["cls", "mean", None])
@pytest.mark.parametrize("blocks", WAYS)
@pytest.mark.parametrize(
    ("tokens", "head_dim"),
    [(33, 64), (33, 16), (49, 16), (49, 80), (17, 104), (1, 64), (2, 16), (40, 24), (36, 72)],
)
@pytest.mark.slow
def test_attention(tokens: int, head_dim: int, blocks: dict[str, int], row: reference.Row | None) -> None:
    """In several tiles; with the class token apart from them (33, 17), apart and not whole (49), or among them."""
    if row == "mean" and tokens == 1:
        return
    config = Config(blocks, warps=4, stages=2)
    assert tiles.apart(tokens, config) == (tokens in (33, 49, 17))
    qkv = draw(0, 2, tokens, 3, 2, head_dim).to(DEVICE)
    out, alpha = attention.run(qkv, row, config)
    expected_out, expected_alpha = reference.attention(qkv.double(), row or "cls")
    assert relative_error(out, expected_out) <= OP_FLOAT32
    assert out.is_contiguous()
    assert alpha.is_contiguous()
    if row is None:
        assert alpha.shape == (2, 2, 0)
    else:
        assert relative_error(alpha, expected_alpha) <= OP_FLOAT32


@pytest.mark.parametrize("row", ["cls", "mean", None])
@pytest.mark.parametrize("blocks", WAYS)
@pytest.mark.parametrize("tokens", [33, 49, 40])
@pytest.mark.slow
def test_the_class_tokens_row_of_bfloat16_is_exact(
    tokens: int, blocks: dict[str, int], row: reference.Row | None
) -> None:
    """Its weights to float32, wherever it is computed; its output to the rounding of the result."""
    qkv = draw(0, 2, tokens, 3, 2, 64, dtype=torch.bfloat16).to(DEVICE)
    out, alpha = attention.run(qkv, row, Config(blocks, warps=4, stages=2))
    exact, weights = reference.attention(qkv.double())
    plain, _ = reference.attention(qkv)
    limit = LOW_PRECISION_FACTOR * relative_norm(plain[:, 0], exact[:, 0]) + OP_FLOAT32
    assert relative_norm(out[:, 0], exact[:, 0]) <= limit
    if row == "cls":
        assert relative_error(alpha, weights) <= OP_FLOAT32


@pytest.mark.parametrize("blocks", WAYS)
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits_in_several_tiles(sign: int, blocks: dict[str, int]) -> None:
    qkv = draw(0, 1, 33, 3, 2, 64)
    qkv[:, :, :2] = 0
    qkv[:, :, 0, :, 0] = 8
    qkv[:, :, 1, :, 0] = sign * 1e4 - torch.arange(33.0)[:, None]
    for row in ("cls", "mean"):
        have = attention.run(qkv.to(DEVICE), row, Config(blocks, warps=4, stages=2))
        for got, expected in zip(have, reference.attention(qkv.double(), row), strict=True):
            assert relative_error(got.cpu(), expected) <= OP_FLOAT32


@pytest.mark.parametrize("row", ["cls", None])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_torchs_own_attention_with_a_row_of_ours(head_dim: int, row: reference.Row | None) -> None:
    qkv = draw(0, 2, 33, 3, 2, head_dim).to(DEVICE)
    out, alpha = sdpa.through_torch(qkv, row)
    expected_out, expected_alpha = reference.attention(qkv.double())
    assert relative_error(out, expected_out) <= OP_FLOAT32
    assert out.is_contiguous()
    assert alpha.shape == (2, 2, 33 if row else 0)
    if row:
        assert relative_error(alpha, expected_alpha) <= OP_FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "head_dim"), [(50, 64), (197, 64), (33, 80), (2, 16)])
def test_the_mean_row_from_torchs_logarithms(tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    """The attention as exact as the definition in this dtype, and the row as exact as the logarithms are."""
    qkv = draw(0, 1, tokens, 3, 2, head_dim, dtype=dtype).to(DEVICE)
    out, alpha = sdpa.mean_through_torch(qkv, "mean", SDPBackend.FLASH_ATTENTION)
    exact = reference.attention(qkv.double(), "mean")
    for got, plain, expected in zip((out, alpha), reference.attention(qkv, "mean"), exact, strict=True):
        assert error(got, expected) <= LOW_PRECISION_FACTOR * error(plain, expected) + floor(expected)
    assert out.dtype == dtype
    assert out.is_contiguous()
    query, key, _ = qkv.double().transpose(1, 3).unbind(2)  # [B, H, N, E]
    logarithm = torch.logsumexp(query @ key.transpose(-1, -2) * head_dim**-0.5, -1)
    launch, alpha = sdpa.plan_mean(qkv, logarithm.float())
    launch.run()
    assert alpha.dtype == torch.float32
    assert relative_error(alpha, exact[1]) <= OP_FLOAT32


def test_logarithms_are_natural_and_of_scaled_scores() -> None:
    """Scores of 8 and 16 over √16: ln(e² + e⁴); every query's."""
    qkv = torch.zeros(1, 2, 3, 1, 16, dtype=torch.bfloat16)
    qkv[..., 0, :, 0], qkv[0, :, 1, 0, 0] = 4, torch.tensor([2.0, 4.0])
    _, logarithm = sdpa.with_logsumexp(qkv.to(DEVICE), SDPBackend.FLASH_ATTENTION)
    expected = torch.logsumexp(torch.tensor([2.0, 4.0]), 0).expand(1, 1, 2)
    assert relative_error(logarithm.cpu(), expected) <= OP_FLOAT32


@pytest.mark.skipif(INTERPRETED, reason="an interpreter times nothing")
def test_every_mean_row_that_is_timed_runs() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens, head_dim in ((50, 64), (197, 64), (257, 64), (197, 80)):
            qkv = draw(0, 2, tokens, 3, 2, head_dim, dtype=dtype).to(DEVICE)
            expected, plain = reference.attention(qkv.double(), "mean"), reference.attention(qkv, "mean")
            for label, run in attention.variants(qkv, "mean"):
                for got, low, right in zip(run(qkv, "mean"), plain, expected, strict=True):
                    limit = LOW_PRECISION_FACTOR * relative_norm(low, right) + OP_FLOAT32
                    assert relative_norm(got, right) <= limit, label


@pytest.mark.skipif(INTERPRETED, reason="an interpreter times nothing")
def test_every_way_that_is_timed_runs() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens, head_dim in ((50, 64), (257, 64), (257, 80), (577, 64), (197, 104)):
            qkv = draw(0, 2, tokens, 3, 2, head_dim, dtype=dtype).to(DEVICE)
            expected, plain = reference.attention(qkv.double()), reference.attention(qkv)
            limit = LOW_PRECISION_FACTOR * relative_norm(plain[0], expected[0]) + OP_FLOAT32
            for label, run in attention.variants(qkv, "cls"):
                out, alpha = run(qkv, "cls")
                assert relative_norm(out, expected[0]) <= limit, label
                assert relative_error(alpha, expected[1]) <= OP_FLOAT32, label


@pytest.mark.parametrize("config", query_row.CONFIGS)
def test_query_row(config: Config) -> None:
    query, key, value = draw(0, 2, 2, 64), draw(1, 2, 150, 2, 64), draw(2, 2, 150, 2, 64)
    have = query_row.run(*(tensor.to(DEVICE) for tensor in (query, key, value)), config)
    for got, expected in zip(have, reference.query_row(query.double(), key.double(), value.double()), strict=True):
        assert relative_error(got.cpu(), expected) <= OP_FLOAT32


def test_alpha_alone_is_the_alpha_of_query_row() -> None:
    query, key = draw(0, 2, 2, 64).to(DEVICE), draw(1, 2, 150, 2, 64).to(DEVICE)
    assert torch.equal(query_row.alpha_alone(query, key), query_row.run(query, key, key)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cut", range(2))
def test_query_row_from_tokens_is_exact_in_low_precision(cut: int, dtype: torch.dtype) -> None:
    """The tokens are as they are; whatever multiplies them has the accuracy of float32."""
    shapes = [(2, 3, 20), (2, 70, 150), (3, 20, 150), (3, 20, 150), (3, 20)]
    arguments = [draw(i, *shape).to(dtype).to(DEVICE) for i, shape in enumerate(shapes)]
    arguments[2] *= 0.1
    cuts = query_row_from_tokens.cuts(arguments[1])
    if cut >= len(cuts):
        return
    have = query_row_from_tokens.run(*arguments, cuts[cut])
    expected = reference.query_row_from_tokens(*(argument.double() for argument in arguments))
    for got, exact in zip(have, expected, strict=True):
        assert relative_error(got, exact) <= OP_FLOAT32


def test_rows_of_the_mean_are_weighted_by_what_the_attention_keeps() -> None:
    """Two queries whose maxima and sums are known: 1/2 · (¼ + ½) on the first key, 1/2 · (¾ + ½) on the second."""
    qkv = torch.zeros(1, 3, 3, 1, 16)
    qkv[0, 1, 0, 0, 0] = 1  # query 1 sees exponents (0, 0, log₂ 3); the third key is far away
    qkv[0, :, 1, 0, 0] = torch.tensor([0.0, 1.0, -1e6])
    scale = float(torch.tensor(3.0).log2())
    kept = {"p_max": torch.tensor([[[0.0, scale, 0.0]]]), "p_inverse": torch.tensor([[[0.0, 0.75, 0.5]]])}
    alpha = torch.full((1, 1, 3), torch.nan)
    strides = dict(zip(("s_b", "s_n", "s_part", "s_h"), qkv.stride(), strict=False))
    shared = {"heads": 1, "N": 3, **strides, "scale_log2": scale}
    constants = {"HEAD_DIM": 16, "FIRST": 16, "SECOND": 0, "ALIGNED": 16, "PRECISION": "ieee", "EXACT": False}
    on_device = {name: tensor.to(DEVICE) for name, tensor in kept.items()}
    filled = alpha.to(DEVICE)
    mean_row.plan(qkv.to(DEVICE), on_device, filled, shared, constants).run()
    expected = torch.tensor([[[(1 / 4 + 1 / 2) / 2, (3 / 4 + 1 / 2) / 2, (0 + 1 / 2) / 2]]])
    assert relative_error(filled.cpu(), expected) <= OP_FLOAT32
