"""Every way the Triton kernels of maps and contributions can be cut, and what they promise beyond the contract."""

from collections.abc import Iterable

import pytest
import torch
from contracting import DEVICES, draw, floor, in_double
from measures import error, relative_error
from tolerances import LOW_PRECISION_FACTOR, OP_FLOAT32
from torch import Tensor

from clipfast.kernels import reference
from clipfast.kernels.dispatch import BACKENDS

pytest.importorskip("triton")
text_maps = pytest.importorskip("clipfast.kernels.text_maps.triton")
token_contributions = pytest.importorskip("clipfast.kernels.token_contributions.triton")
launch = pytest.importorskip("clipfast.kernels.launch")

DEVICE = DEVICES.get("triton", "cpu")
GPUS = (launch.AMD, 80, 86, 90, 100, 120)
LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _runs_here() -> None:
    refused = next(backend for backend in BACKENDS if backend.name == "triton").unsupported_reasons()
    if refused:
        pytest.skip(", ".join(refused))


def blocks(*tables: dict[int, tuple[tuple[int, ...], ...]]) -> Iterable[tuple[int, int, int]]:
    """Every pair of tile sizes in tables of configurations, and its warps."""
    return sorted({way[:3] for table in tables for ways in table.values() for way in ways})


def draw_values(tokens: int, head_dim: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    alpha = draw(0, 2, 3, tokens).softmax(-1)
    value, matrix = draw(1, 2, tokens, 3, 3, head_dim, dtype=dtype)[:, :, 2], draw(2, 3, head_dim, columns)
    return alpha.to(DEVICE), value.to(DEVICE), matrix.to(DEVICE)


def near(have: Tensor, low: Tensor, expected: Tensor) -> bool:
    return error(have, expected) <= LOW_PRECISION_FACTOR * error(low, expected) + floor(expected)


@pytest.mark.parametrize("texts", [5, 70])
@pytest.mark.parametrize("cut", blocks(text_maps.TILES, text_maps.AMPERE, text_maps.FLOAT32), ids=str)
@pytest.mark.slow
def test_every_cut_of_the_text_maps(cut: tuple[int, int, int], texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NaN where a GPU has columns of U that nobody wrote."""
    lay_out = text_maps._cut

    def poisoned(basis: Tensor, dtype: torch.dtype, block: int) -> Tensor:
        laid_out: Tensor = lay_out(basis, dtype, block)
        laid_out[-1, ..., (texts - 1) % block + 1 :] = torch.nan
        return laid_out

    monkeypatch.setattr(text_maps, "_cut", poisoned)
    config = launch.Config({"BLOCK_M": cut[0], "BLOCK_T": cut[1]}, warps=cut[2], stages=2)
    arguments = draw_values(50, 80, texts, torch.bfloat16)
    for listed in (None, torch.tensor([2, 0], device=DEVICE)):
        have = torch.zeros(2, 50, texts, device=DEVICE)
        text_maps.run(*arguments, have, listed, config)
        low = reference.text_maps(*(tensor.bfloat16() for tensor in arguments), listed)
        assert near(have, low, reference.text_maps(*in_double(*arguments), listed))


@pytest.mark.parametrize("columns", [70])
@pytest.mark.parametrize("cut", blocks(token_contributions.TILES, token_contributions.FLOAT32), ids=str)
@pytest.mark.slow
def test_every_cut_of_the_contributions(cut: tuple[int, int, int], columns: int) -> None:
    config = launch.Config({"BLOCK_M": cut[0], "BLOCK_D": cut[1]}, warps=cut[2], stages=2)
    arguments = draw_values(50, 80, columns, torch.bfloat16)
    have = token_contributions.run(*arguments, None, None, config)
    low = reference.token_contributions(*(tensor.bfloat16() for tensor in arguments))
    assert near(have, low, reference.token_contributions(*in_double(*arguments)))
    maps = token_contributions.run_maps(*arguments, config)
    assert torch.equal(maps.transpose(1, 2), have)


@pytest.mark.parametrize("columns", [5, 64, 70])
def test_nothing_is_written_beside_the_contributions(columns: int) -> None:
    """The last image last: what runs over into the next image is overwritten by its own, and would not be seen."""
    alpha, value, matrix = draw_values(70, 64, columns, torch.float32)
    around = torch.zeros(4, 70, 3, columns, device=DEVICE)
    token_contributions.launch_into(around[1:3], alpha, value, matrix).run()
    assert relative_error(around[1:3], reference.token_contributions(*in_double(alpha, value, matrix))) <= OP_FLOAT32
    assert not around[::3].any()


@pytest.mark.parametrize(
    ("value", "matrix", "parts"),
    [
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, False),  # one part holds it
        (torch.float32, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
    ],
)
def test_a_matrix_is_in_two_parts_where_one_would_round_it(
    value: torch.dtype, matrix: torch.dtype, parts: bool
) -> None:
    alpha, values, basis = draw_values(3, 16, 5, value)
    assert token_contributions.plan(alpha, values, basis.to(matrix))[0].constants["TWO_PARTS"] == parts


# ------------------------------------------------------------------------------------- what would run on which GPU


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("texts", [0, 1, 16, 17, 64, 100, 1000])
def test_there_is_a_cut_for_every_gpu_and_it_fits(gpu: int, texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_maps, "INTERPRETED", False)
    for head_dim in range(1, text_maps.LARGEST_HEAD + 1):
        for dtype in (*LOW, torch.float32):
            result = text_maps.configs(texts, head_dim, dtype, gpu)
            assert result
            assert len({str(config) for config in result}) == len(result)
            width = sum(text_maps.split_head(head_dim)) * dtype.itemsize
            for config in result:
                assert config.stages >= 2 or head_dim > 64, "nothing would be fetched ahead"
                memory = config.stages * width * sum(config.blocks.values())
                assert 0 < memory <= launch.shared_memory(gpu)


def test_a_head_is_cut_so_that_little_is_padding() -> None:
    cut = [text_maps.split_head(head_dim) for head_dim in (64, 72, 80, 88, 96, 104, 112, 128)]
    assert cut == [(64, 0), (64, 16), (64, 16), (64, 32), (64, 32), (128, 0), (128, 0), (128, 0)]
    for head_dim in range(1, 129):
        first, second = text_maps.split_head(head_dim)
        assert head_dim <= first + second < head_dim + max(16, head_dim / 2)
        assert {first, second} <= {0, 16, 32, 64, 128}, "the tensor cores take 16 at a time"


def test_a_plan_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors give the very launch that an H200 gets: a program for every 128 of the batch's tokens."""
    monkeypatch.setattr(text_maps, "INTERPRETED", False)
    meta = {"device": "meta"}
    value = torch.empty(256, 257, 3, 16, 64, dtype=torch.bfloat16, **meta)[:, :, 2]
    alpha, basis = torch.empty(256, 16, 257, **meta), torch.empty(16, 64, 100, **meta)
    plan = text_maps.plan(alpha, value, basis, torch.empty(256, 257, 100, **meta))
    assert plan.grid == (514,)
    assert plan.arguments["p_basis"].shape == (1, 16, 64, 128)
    assert plan.arguments["p_basis"].dtype == torch.bfloat16
    assert (plan.constants["ALIGNED"], plan.constants["UNIT"]) == (16, 4)  # 16-byte loads and stores
    plan, out = token_contributions.plan(alpha, value, torch.empty(16, 64, 768, **meta))
    assert (plan.grid, out.shape) == ((256 * 16 * 12,), (256, 257, 16, 768))
    plan, out = token_contributions.plan_maps(alpha, value, basis)
    assert (plan.grid, out.shape) == ((256 * 16 * 2,), (256, 16, 257, 100))


def test_loads_are_as_wide_as_the_strides_allow() -> None:
    """Head_dim 88 and 104 are multiples of 8 but not of 16: still 16 bytes at a time."""
    meta = {"device": "meta"}
    for head_dim, aligned in ((80, 16), (88, 8), (104, 8), (68, 4)):
        value = torch.empty(2, 17, 3, 5, head_dim, dtype=torch.bfloat16, **meta)[:, :, 2]
        alpha, basis = torch.empty(2, 5, 17, **meta), torch.empty(5, head_dim, 30, **meta)
        assert text_maps.plan(alpha, value, basis, torch.empty(2, 17, 30, **meta)).constants["ALIGNED"] == aligned
        assert token_contributions.plan(alpha, value, basis)[0].constants["ALIGNED"] == aligned


# ------------------------------------------------------------------------------------------------ what is not copied


def test_layers_of_one_buffer_are_read_where_they_are() -> None:
    """Every layer's values in one piece, or inside packed queries, keys and values: no copy is made."""
    alpha, basis = draw(0, 2, 4, 3, 17).softmax(-1).to(DEVICE), draw(2, 4, 3, 80, 5).to(DEVICE)
    packed = draw(1, 4, 2, 17, 3, 3, 80).to(DEVICE)
    for values in (list(packed[:, :, :, 2]), list(packed[:, :, :, 2].contiguous()), [packed[0, :, :, 2]] * 4):
        plan, out = text_maps.plan_layered(alpha, values, basis)
        assert plan.arguments["p_value"].data_ptr() == values[0].data_ptr()
        assert plan.arguments["s_value_l"] == (values[1].data_ptr() - values[0].data_ptr()) // 4
        assert len(plan.grid) == 1
        plan.run()
        expected = reference.layered_text_maps(alpha.double(), [value.double() for value in values], basis.double())
        assert relative_error(out, expected) <= OP_FLOAT32


def test_layers_apart_are_copied_together() -> None:
    alpha, basis = draw(0, 2, 2, 3, 17).to(DEVICE), draw(2, 2, 3, 80, 5).to(DEVICE)
    values = [draw(seed, 2, 17, 3, 80).to(DEVICE) for seed in (1, 2)]
    plan, _ = text_maps.plan_layered(alpha, values, basis)
    assert plan.arguments["p_value"].data_ptr() not in [value.data_ptr() for value in values]
    assert plan.arguments["s_value_l"] == values[0].numel()


def test_a_basis_that_is_laid_out_already_is_not_copied() -> None:
    config = launch.Config({"BLOCK_M": 64, "BLOCK_T": 32})
    alpha, value, basis = draw_values(17, 64, 32, torch.bfloat16)
    laid_out, out = basis.bfloat16(), torch.zeros(2, 17, 32, device=DEVICE)
    plan = text_maps.plan(alpha, value, laid_out, out, None, config)
    assert plan.arguments["p_basis"].data_ptr() == laid_out.data_ptr()
    plan.run()
    again = torch.zeros_like(out)
    text_maps.run(alpha, value, basis, again, None, config)
    assert torch.equal(out, again)


@pytest.mark.parametrize("texts", [5, 32, 70])
def test_a_basis_is_laid_out_once(texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not per batch: the second batch with the same texts copies nothing."""
    cuts, lay_out = [], text_maps._cut

    def counted(basis: Tensor, dtype: torch.dtype, block: int) -> Tensor:
        cuts.append(block)
        return lay_out(basis, dtype, block)

    monkeypatch.setattr(text_maps, "_cut", counted)
    alpha, value, basis = draw_values(17, 64, texts, torch.bfloat16)
    first, second = (torch.zeros(2, 17, texts, device=DEVICE) for _ in range(2))
    plan = text_maps.plan(alpha, value, basis, first)
    plan.run()
    again = text_maps.plan(alpha, value, basis, second)
    again.run()
    assert len(cuts) == 1
    assert again.arguments["p_basis"].data_ptr() == plan.arguments["p_basis"].data_ptr()
    assert torch.equal(first, second)
    basis.mul_(2)  # a weight that changes is laid out again
    third = torch.zeros_like(first)
    text_maps.run(alpha, value, basis, third)
    assert torch.equal(third, 2 * first)


def test_layers_together_lay_their_basis_out_once() -> None:
    alpha, basis = draw(0, 2, 2, 3, 17).softmax(-1).to(DEVICE), draw(2, 2, 3, 80, 5).to(DEVICE)
    values = list(draw(1, 2, 2, 17, 3, 80).to(DEVICE))
    pointers = {text_maps.plan_layered(alpha, values, basis)[0].arguments["p_basis"].data_ptr() for _ in range(2)}
    assert len(pointers) == 1
