"""The checks before a forward is timed: the right result passes, and every wrong one is seen."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import clipfast
from benchmarks import gpu_checks
from benchmarks.gpu_checks import Witness, grouped
from benchmarks.gpu_inputs import draw_images, random_model
from clipfast.bench.inputs import unit_texts

PARTS = ("heads", "attention", "maps", "embedding")
BATCH = 6
Result = dict[str, Tensor]


class Timed:
    """A model, the timed batch, the right result in bfloat16, and what it is checked against."""

    def __init__(self) -> None:
        self.module = random_model("ViT-S-32-alt", "cpu")
        self.images = draw_images(cast(Any, self.module).visual.image_size, BATCH, "cpu")
        self.texts = unit_texts(cast(Any, self.module).visual.output_dim, count=20)
        self.witness = Witness.of(self.module, self.images, self.texts)
        self.result = self.decomposed(self.module)

    def decomposed(self, module: nn.Module) -> Result:
        # of another implementation than the one that the bounds are from
        model = clipfast.wrap(module, backend="auto")
        return gpu_checks.parts_of(model.decompose(self.images, attention=True, texts=self.texts, maps="summed"))

    def failed(self, result: Result) -> set[str]:
        """The parts with a failed check."""
        checks = self.witness.checks(result)
        assert {check.name.split()[0] for check in checks} == set(result)
        return {check.name.split()[0] for check in checks if not check.passed}


@pytest.fixture(scope="module")
def timed() -> Timed:
    return Timed()


def test_the_right_result_passes(timed: Timed) -> None:
    assert timed.failed(timed.result) == set()
    model = clipfast.wrap(timed.module)
    contributions = model.decompose(timed.images, attention=True, texts=timed.texts)
    checks = gpu_checks.check_decomposed(timed.witness, contributions, contributions.heads())
    assert [check.name for check in checks if not check.passed] == []
    with torch.inference_mode():
        plain = gpu_checks.check_plain(timed.witness, cast(Any, timed.module).encode_image(timed.images))
    assert [check.name for check in plain] == ["plain embedding against float64, per image"]
    assert plain[0].passed


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda part: torch.full_like(part, torch.nan)], ids=["0", "NaN"])
def test_results_that_are_empty_fail(timed: Timed, part: str, wrong: Callable[[Tensor], Tensor]) -> None:
    assert timed.failed({**timed.result, part: wrong(timed.result[part])}) == {part}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("row", [0, -1])
def test_a_row_of_zeros_at_either_end_fails(timed: Timed, part: str, row: int) -> None:
    result = timed.result[part].clone()
    result[row] = 0
    assert timed.failed({**timed.result, part: result}) == {part}


@pytest.mark.parametrize("part", ["heads", "attention"])
@pytest.mark.parametrize("layers", [slice(None), slice(3, 4), slice(-1, None)], ids=["all", "one", "last"])
def test_swapped_heads_fail(timed: Timed, part: str, layers: slice) -> None:
    result = timed.result[part].clone()
    result[:, layers, [0, 1]] = result[:, layers, [1, 0]]
    assert timed.failed({**timed.result, part: result}) == {part}


@pytest.mark.parametrize("part", PARTS)
def test_images_that_are_shifted_by_one_row_fail(timed: Timed, part: str) -> None:
    assert timed.failed({**timed.result, part: timed.result[part].roll(1, 0)}) == {part}


@pytest.mark.parametrize(("part", "axis"), [("attention", -1), ("maps", 1), ("maps", 2), ("heads", -1)])
def test_tokens_texts_and_columns_that_are_shifted_by_one_fail(timed: Timed, part: str, axis: int) -> None:
    assert timed.failed({**timed.result, part: timed.result[part].roll(1, axis)}) == {part}


def test_maps_with_swapped_heads_fail(timed: Timed) -> None:
    """The sum over heads with each head's weights on another head's values."""
    module = copy.deepcopy(timed.module)
    attention = cast(Any, module).visual.transformer.resblocks[0].attn
    size = attention.embed_dim // attention.num_heads
    with torch.no_grad():
        values = attention.in_proj_weight[-attention.embed_dim :]
        values[: 2 * size] = values[: 2 * size].view(2, size, -1).flip(0).reshape(2 * size, -1).clone()
    assert set(PARTS) <= timed.failed(timed.decomposed(module)) | {"attention"}


BIASES: dict[str, Callable[[Any], Tensor]] = {
    "queries, keys and values": lambda block: block.attn.in_proj_bias,
    "attention out": lambda block: block.attn.out_proj.bias,
    "MLP in": lambda block: block.mlp.c_fc.bias,
    "MLP out": lambda block: block.mlp.c_proj.bias,
    "LayerNorm before attention": lambda block: block.ln_1.bias,
    "LayerNorm before the MLP": lambda block: block.ln_2.bias,
}


@pytest.mark.parametrize("layer", [0, -2, -1])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.slow
def test_a_dropped_bias_fails(timed: Timed, bias: str, layer: int) -> None:
    module = copy.deepcopy(timed.module)
    with torch.no_grad():
        BIASES[bias](cast(Any, module).visual.transformer.resblocks[layer]).zero_()
    failed = timed.failed(timed.decomposed(module))
    assert "embedding" in failed
    if layer == 0:
        assert failed == set(PARTS)


def test_a_dropped_constant_fails(timed: Timed) -> None:
    """Heads without their share of the output bias, and maps without what does not depend on the token."""
    basis = clipfast.wrap(timed.module).basis()
    model = clipfast.wrap(timed.module)
    contributions = model.decompose(timed.images)
    scale = 1 / (contributions.std * contributions.norm)
    heads = timed.result["heads"] - (basis.biases * 1.0)[None, :, None] * scale[:, None, None, None]
    assert timed.failed({**timed.result, "heads": heads}) == {"heads"}
    maps = timed.result["maps"] - timed.result["maps"].mean(1, keepdim=True)
    assert timed.failed({**timed.result, "maps": maps}) == {"maps"}


def test_rows_are_the_first_and_the_last() -> None:
    assert gpu_checks.rows(256) == [0, 1, 254, 255]
    assert gpu_checks.rows(3) == [0, 1, 2]
    assert gpu_checks.rows(1) == [0]


def test_errors_are_those_of_the_worst_group() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 100.0]])
    actual = torch.tensor([[3.0, 4.0], [10.0, 100.0]])
    assert grouped(actual, expected, (0,)) == 0.1
    assert grouped(expected + torch.tensor([[5.0], [0.0]]), expected, (0,)) == pytest.approx(2**0.5)
    assert grouped(expected, expected) == 0
    assert grouped(torch.zeros(2, 2), expected) == 1
    assert grouped(expected[:1], expected) != grouped(expected[:1], expected)  # NaN
    assert torch.tensor(grouped(expected, torch.zeros(2, 2))).isnan()
