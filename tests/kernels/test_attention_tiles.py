"""How attention is cut into tiles: what padding costs, and which ways are worth timing."""

import pytest
import torch
from contracting import DEVICES

from clipfast.kernels import dispatch, ops, reference
from clipfast.kernels.attention import kernel, mean_row, tiles
from clipfast.kernels.attention import triton as attention
from clipfast.kernels.launch import AMD, DTYPES, Config

SQUARE = Config({"BLOCK_M": 64, "BLOCK_N": 64})
TALL = Config({"BLOCK_M": 128, "BLOCK_N": 64})


def qkv(tokens: int, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(2, tokens, 3, 2, head_dim, dtype=dtype, device="meta")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be timed on a GPU, whether there is one or not."""
    for module in (tiles, attention):
        monkeypatch.setattr(module, "INTERPRETED", False)


@pytest.mark.parametrize(
    ("tokens", "config", "expected"),
    [(1, SQUARE, 64 * 64), (64, SQUARE, 64 * 64), (65, SQUARE, 128 * 128), (65, TALL, 128 * 128), (0, TALL, 0)],
)
def test_scores_are_of_whole_tiles(tokens: int, config: Config, expected: int) -> None:
    assert tiles.scores(tokens, config) == expected


@pytest.mark.parametrize(
    ("tokens", "config", "expected"),
    [
        (257, SQUARE, True),  # 256² against 320²
        (257, TALL, True),  # 256² against 384 · 320
        (577, SQUARE, True),
        (577, TALL, True),  # 640 queries either way, but 576 keys against 640
        (65, SQUARE, True),
        (50, SQUARE, False),
        (197, SQUARE, False),
        (64, SQUARE, False),
        (1, SQUARE, False),  # no patches, no tile for it to go with
        (0, SQUARE, False),
    ],
)
def test_the_class_token_is_apart_where_that_computes_less(tokens: int, config: Config, expected: bool) -> None:
    assert tiles.apart(tokens, config) == expected


@pytest.mark.parametrize(
    ("tokens", "head_dim", "row", "with_tile", "expected"),
    [
        (257, 64, "cls", 1, tiles.WITH_TILE),
        (257, 64, "mean", 1, tiles.WITH_TILE),  # its output is computed nowhere else
        (257, 64, None, 1, tiles.WITH_TILE),
        (257, 64, "cls", 0, tiles.OWN_PROGRAM),
        (257, 80, "cls", 1, tiles.OWN_PROGRAM),
        (257, 128, "cls", 1, tiles.OWN_PROGRAM),
        (197, 128, "cls", 1, tiles.WITH_TILE),  # it is one of the tile's queries
        (197, 64, "cls", 0, tiles.OWN_PROGRAM),
        (197, 64, "mean", 1, 0),
        (197, 64, None, 0, 0),
    ],
)
def test_where_the_class_tokens_row_is_computed(
    tokens: int, head_dim: int, row: reference.Row | None, with_tile: int, expected: int
) -> None:
    config = Config({"BLOCK_M": 64, "BLOCK_N": 64, "DESCRIPTORS": 1, "WITH_TILE": with_tile})
    (launch, *_), _, _ = kernel.plan(qkv(tokens, head_dim), row, config)
    assert launch.constants["ROW"] == expected
    of_tiles = -(-(tokens - tiles.apart(tokens, config)) // 64)
    assert launch.grid == (2 * 2 * (of_tiles + (expected == tiles.OWN_PROGRAM)),)


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [
        (1, (16, 0)),
        (16, (16, 0)),
        (20, (32, 0)),
        (32, (32, 0)),
        (40, (32, 16)),
        (64, (64, 0)),
        (72, (64, 16)),
        (80, (64, 16)),
        (88, (64, 32)),
        (96, (64, 32)),
        (104, (128, 0)),
        (128, (128, 0)),
        (160, (128, 32)),
        (256, (256, 0)),
    ],
)
def test_a_head_is_cut_into_the_fewest_columns(head_dim: int, expected: tuple[int, int]) -> None:
    assert tiles.head_parts(head_dim, torch.bfloat16) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_parts_hold_the_head(dtype: torch.dtype) -> None:
    for head_dim in range(1, 257):
        first, second = tiles.head_parts(head_dim, dtype)
        assert max(head_dim, 16) <= first + second < 2 * max(head_dim, 16)
        assert all(part & (part - 1) == 0 for part in (first, second))
        assert second <= first < 256 or dtype != torch.float32


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("arch", [AMD, 75, 80, 86, 90, 100, 103, 110, 120])
@pytest.mark.parametrize("tokens", [1, 17, 50, 197, 257, 577])
def test_what_is_timed_computes_few_scores(tokens: int, arch: int) -> None:
    result = tiles.configs(qkv(tokens), arch)
    computed = [tiles.scores(tokens - tiles.apart(tokens, config), config) for config in result]
    assert 1 <= len(result) <= 4
    assert computed == sorted(computed)
    assert computed[-1] <= tiles.CLOSE * computed[0]
    assert arch >= 90 or not any(config.blocks["DESCRIPTORS"] for config in result)


@pytest.mark.usefixtures("on_gpu")
def test_descriptors_need_steps_of_16_bytes() -> None:
    whole = qkv(257)
    assert any(config.blocks["DESCRIPTORS"] for config in tiles.configs(whole, 90))
    odd = torch.empty(2, 257, 3, 2, 65, dtype=torch.bfloat16, device="meta")[..., :64]
    assert not tiles.describable(odd)
    assert not any(config.blocks["DESCRIPTORS"] for config in tiles.configs(odd, 90))


@pytest.mark.usefixtures("on_gpu")
def test_cudnn_is_not_asked_for_float32() -> None:
    """It refuses, so timing it would fail."""
    labels = {dtype: [name for name, _ in attention.variants(qkv(257, dtype=dtype), "cls")] for dtype in DTYPES}
    assert all("sdpa" in names for names in labels.values())
    assert [dtype for dtype in DTYPES if "sdpa-cudnn" in labels[dtype]] == [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("row", ["cls", "mean"])
def test_offsets_within_a_tile_have_32_bits(row: str) -> None:
    """Tokens that are too far apart for that are copied together; one step less and they are read where they are."""
    configurations = [*(c for group in tiles.CONFIGS.values() for c in group), tiles.FLOAT32_CONFIG]
    configurations += [*tiles._INTERPRETED_CONFIGS, mean_row.CONFIG, mean_row.FLOAT32_CONFIG]
    assert max(max(c.blocks["BLOCK_M"], c.blocks["BLOCK_N"]) for c in configurations) <= tiles.LARGEST_TILE
    far = 2**31 // tiles.LARGEST_TILE
    for step, expected in ((far - 1, far - 1), (far, 3 * 2 * 64)):
        wide = torch.empty_strided((1, 5, 3, 2, 64), (5 * step, step, 128, 64, 1), dtype=torch.float16, device="meta")
        launches, _, _ = kernel.plan(wide, row)
        assert [launch.arguments["s_n"] for launch in launches] == [expected] * len(launches)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype", "expected"),
    [
        (197, 64, torch.bfloat16, ["sdpa-flash", "sdpa-cudnn"]),
        (50, 64, torch.float16, ["sdpa-flash", "sdpa-cudnn"]),
        (257, 64, torch.bfloat16, []),  # with the class token apart our own computes less
        (197, 60, torch.bfloat16, []),
        (197, 64, torch.float32, []),
    ],
)
def test_torchs_attention_is_timed_for_the_mean_row_where_no_token_is_apart(
    tokens: int, head_dim: int, dtype: torch.dtype, expected: list[str]
) -> None:
    labels = [label for label, _ in attention.variants(qkv(tokens, head_dim, dtype), "mean")]
    assert [label for label in labels if label.startswith("sdpa")] == expected
    assert len(labels) > len(expected)


def test_a_head_that_is_too_large_is_refused_with_the_reason() -> None:
    refused = next(backend for backend in dispatch.BACKENDS if backend.name == "triton").unsupported_reasons()
    if refused:
        pytest.skip(", ".join(refused))
    large = torch.zeros(1, 2, 3, 1, 257, device=DEVICES.get("triton", "cpu"))
    with pytest.raises(ValueError, match=r"triton cannot compute attention: head_dim 257 is not between 1 and 256"):
        ops.attention(large, backend="triton")
