"""The decomposed forward where sizes differ that are often equal, and what a request keeps."""

from dataclasses import replace

import pytest
import torch
from builders import directions, pixels, vision_tower
from measures import error, relative_norm
from tolerances import FLOAT64, SUM_BFLOAT16
from torch import Tensor

from clipfast import NotKept, wrap
from clipfast.basis import fold
from clipfast.forward import Request, decompose
from clipfast.forward.stream import _running_sums
from clipfast.kernels import ops


@pytest.mark.parametrize(
    ("image_size", "patch_size", "grid"),
    [((27, 30), (8, 4), (3, 7)), ((24, 21), (8, 8), (3, 2)), ((31, 12), (4, 6), (7, 2))],
)
def test_pixels_beside_the_last_whole_patch_are_not_read(
    image_size: tuple[int, int], patch_size: tuple[int, int], grid: tuple[int, int]
) -> None:
    visual = vision_tower(dtype=torch.float64, image_size=image_size, patch_size=patch_size)
    images = pixels(visual, dtype=torch.float64)
    contributions = wrap(visual).decompose(images)
    assert contributions.grid == grid
    with torch.no_grad():
        assert error(contributions.embedding, visual(images)) <= FLOAT64
    read = images.clone()
    read[:, :, grid[0] * patch_size[0] :] = 9
    read[:, :, :, grid[1] * patch_size[1] :] = 9
    assert torch.equal(wrap(visual).decompose(read).embedding, contributions.embedding)


def test_a_request_keeps_codes_alone_by_default() -> None:
    visual = vision_tower()
    tower = wrap(visual).tower
    contributions = decompose(tower, pixels(visual), Request(layers=(0, 2)), fold(tower, "uniform"))
    assert contributions.layers == (0, 2)
    for name in ("attention", "maps", "class_codes"):
        with pytest.raises(NotKept):
            getattr(contributions, name)
    with pytest.raises(NotKept):
        contributions.tokens(0)


def test_attention_rows_are_computed_for_kept_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    visual, rows, attention = vision_tower(), [], ops.attention

    def noting(qkv: Tensor, row: str | None, **options: object) -> object:
        rows.append(row)
        return attention(qkv, row, **options)

    monkeypatch.setattr(ops, "attention", noting)
    tower = wrap(visual).tower
    for layers, expected in (((1,), [None, "cls"]), ((0, 2), ["cls", None]), ((2,), [None, None])):
        rows.clear()
        decompose(tower, pixels(visual), Request(layers=layers, attention=True), fold(tower, "uniform"))
        assert rows == expected  # the last of three blocks gives its row in another way


def test_the_last_blocks_values_are_formed_only_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    visual, folded, from_tokens = vision_tower(), [], ops.text_maps_from_tokens

    def noting(*arguments: object, **options: object) -> None:
        folded.append(True)
        from_tokens(*arguments, **options)

    monkeypatch.setattr(ops, "text_maps_from_tokens", noting)
    model, texts = wrap(visual), directions(3, visual.output_dim)
    for expected, options in ((1, {}), (0, {"tokens": True}), (0, {"layers": [0, 1]})):
        folded.clear()
        model.decompose(pixels(visual), texts=texts, maps="summed", **options)
        assert len(folded) == expected
    folded.clear()
    model.decompose(pixels(visual), texts=texts, maps="per_head")
    assert not folded


def test_equal_requests_share_a_key() -> None:
    """CUDA graphs are kept by request."""
    assert len({Request(layers=(0, 1)), Request(layers=(0, 1)), Request(layers=(0, 1), tokens=True)}) == 2


def test_no_result_of_the_forward_requires_gradients() -> None:
    visual = vision_tower()
    tower = wrap(visual).tower
    assert any(tensor.requires_grad for tensor in tower.tensors())
    contributions = decompose(tower, pixels(visual), Request(layers=(0, 1, 2)), fold(tower, "uniform"))
    for name in ("embedding", "norm", "mean", "std", "codes", "start", "mlps", "rest"):
        assert not getattr(contributions, name).requires_grad, name


@pytest.mark.parametrize("pooling", [{}, {"pool_type": "avg", "final_ln_after_pool": True}], ids=["class", "average"])
@pytest.mark.parametrize("layers", [None, [0], [1, 2]])
def test_all_kept_at_once_is_what_is_kept_alone(pooling: dict[str, object], layers: list[int] | None) -> None:
    visual = vision_tower(dtype=torch.float64, **pooling)
    images, texts = pixels(visual, dtype=torch.float64), directions(3, 20, dtype=torch.float64)
    model = wrap(visual)
    together = model.decompose(
        images, texts=texts, maps="per_head", attention=True, tokens=True, class_token=True, layers=layers
    )
    kept = together.layers
    maps = model.decompose(images, texts=texts, maps="per_head", layers=layers).maps
    assert error(together.maps, maps) <= FLOAT64
    assert error(model.decompose(images, texts=texts, layers=layers).maps, maps.sum((1, 2))) <= FLOAT64
    assert error(together.attention, model.decompose(images, attention=True, layers=layers).attention) <= FLOAT64
    class_codes = model.decompose(images, class_token=True, layers=layers).class_codes
    assert error(together.class_codes, class_codes) <= FLOAT64
    tokens = model.decompose(images, tokens=True, layers=layers)
    for layer in kept:
        assert error(together.tokens(layer), tokens.tokens(layer)) <= FLOAT64
    assert together.max_error() <= FLOAT64


POOLING = pytest.mark.parametrize(
    "changes",
    [{}, {"pool_type": "avg", "final_ln_after_pool": True}, {"layers": 1}],
    ids=["class", "average", "one layer"],
)


@POOLING
def test_products_that_add_themselves_give_the_same_terms(changes: dict[str, object]) -> None:
    """As on a GPU: biases are carried past the stream, and the MLP terms are computed for the pooled row alone."""
    visual = vision_tower(dtype=torch.float64, **changes)
    tower, images = wrap(visual).tower, pixels(visual, dtype=torch.float64)
    apart, added = (
        decompose(tower, images, Request(tuple(range(tower.layers)), adds_products=adds), fold(tower, "uniform"))
        for adds in (False, True)
    )
    for name in ("embedding", "codes", "start", "mlps", "mean", "std"):
        assert error(getattr(added, name), getattr(apart, name)) <= FLOAT64, name
    assert added.max_error() <= FLOAT64


@POOLING
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_that_add_themselves_round_no_more(changes: dict[str, object], dtype: torch.dtype) -> None:
    """Of a random tower errors are random, too: over 256 images their norm is no larger."""
    visual = vision_tower(dtype=torch.float64, **changes).to(dtype)
    images = pixels(visual, 256, dtype=dtype)
    exactly = wrap(vision_tower(**changes).to(dtype).double()).decompose(images.double())
    tower = wrap(visual).tower
    off = []
    for adds in (False, True):
        request = Request(tuple(range(tower.layers)), adds_products=adds)
        have = decompose(tower, images, request, fold(tower, "uniform"))
        assert have.max_error() <= SUM_BFLOAT16
        off.append({name: relative_norm(getattr(have, name), getattr(exactly, name)) for name in ("embedding", "mlps")})
    assert all(off[1][name] <= off[0][name] for name in off[0]), off


def test_a_layer_scale_stands_between_product_and_sum() -> None:
    visual = vision_tower(dtype=torch.float64, ls_init_value=0.5)
    tower, images = wrap(visual).tower, pixels(visual, dtype=torch.float64)
    apart, asked = (
        decompose(tower, images, Request((0, 1, 2), adds_products=adds), fold(tower, "uniform"))
        for adds in (False, True)
    )
    assert torch.equal(asked.embedding, apart.embedding)
    assert torch.equal(asked.mlps, apart.mlps)


def test_the_cpu_forms_every_term() -> None:
    """Its bits are those of a stream to which terms with their biases are added, one after the other."""
    visual = vision_tower()
    tower, images = wrap(visual).tower, pixels(visual)
    request = Request((0, 1, 2))
    have, apart = (
        decompose(tower, images, asked, fold(tower, "uniform"))
        for asked in (request, replace(request, adds_products=False))
    )
    assert torch.equal(have.embedding, apart.embedding)
    assert torch.equal(have.mlps, apart.mlps)


def test_running_sums_of_biases() -> None:
    vectors = [
        torch.tensor([1.0, 10]).bfloat16(),
        torch.tensor([2.0, 20]).bfloat16(),
        torch.tensor([4.0, 0.125]).bfloat16(),
    ]
    sums = _running_sums(vectors, torch.float32)
    assert [vector.tolist() for vector in sums] == [[1, 10], [3, 30], [7, 30.125]]
    assert {vector.dtype for vector in sums} == {torch.float32}
