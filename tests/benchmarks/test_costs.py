"""The cost model against values by hand, and against torch's FLOP counter on open_clip's and clipfast's forward."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.costs import Batch, Shape, Steps, Tile, moved, padded_scores, plain_eager, plain_fused, products
from benchmarks.costs_decomposed import Options, decomposed, plain_same_kernels, saved_by_last_block
from clipfast import basis, contributions, forward
from clipfast.forward import Maps, blocks, collector, embedding, pooling, rows, stream
from clipfast.kernels.dispatch import EAGER
from clipfast.towers import openclip, openclip_models
from clipfast.towers.tower import Tower

IMAGES = 2

# -------------------------------------------------------------------------------------------------------------- by hand

# Four patches of one pixel, so five tokens; two layers of two heads.
HAND = Shape(grid=(2, 2), patch=(1, 1), layers=2, width=4, heads=2, hidden=8, embed_dim=3)
ONE = Batch(HAND, images=1, element=2)


def test_flops_of_a_tiny_tower_by_hand() -> None:
    start, end = 2 * 4 * 3 * 4, 2 * 4 * 3  # four patches of three values; one row into the joint space
    block = 2 * 5 * 4 * 12 + 4 * 5 * 5 * 4 + 2 * 5 * 4 * 4 + 2 * (2 * 5 * 4 * 8)
    assert (start, block, end) == (96, 1680, 24)
    for plain in (plain_eager, plain_fused, plain_same_kernels):
        assert products(plain(ONE)) == 96 + 2 * 1680 + 24 == 3480
    # Query, keys into query, logits, mixed tokens, codes, output projection, MLP: all for one row.
    last = 32 + 32 + 2 * 2 * 5 * 4 + 2 * 2 * 5 * 4 + 32 + 32 + 2 * (2 * 4 * 8)
    terms = 2 * 4 * 4 * 3  # the start, two MLPs, the rest
    again = 2 * 8 * 4  # the first MLP went to the stream at once, so its term is computed for one row
    assert products(decomposed(ONE)) == 96 + 1680 + again + last + 24 + terms == 2376
    assert saved_by_last_block(ONE) == 1680 - last == 1264


def test_bytes_of_a_tiny_tower_by_hand() -> None:
    # Values moved by LayerNorm, queries keys values, attention, output projection, add, LayerNorm, MLP in,
    # activation, MLP out, add. The residual stream has 5 · 4 = 20 values.
    block = 40 + (20 + 48 + 60) + 80 + (20 + 16 + 20) + 60 + 40 + (20 + 32 + 40) + 80 + (40 + 32 + 20) + 60
    start = (12 + 12 + 16) + (16 + 20) + (20 + 20 + 20) + 40
    end = 40 + (4 + 12 + 3)
    assert moved(plain_eager(ONE)) == 2 * (start + 2 * block + end) == 3382
    quick = moved(plain_eager(replace(ONE, shape=replace(HAND, quick_gelu=True))))
    assert quick - moved(plain_eager(ONE)) == 2 * 2 * (7 - 2) * 5 * 8  # seven passes over the hidden layer, not two
    fused = 40 + 128 + 80 + (56 + 20) + 40 + 92 + (92 + 20)
    assert moved(plain_fused(ONE)) == 2 * ((12 + 12 + 20 + 20) + 40 + 2 * fused + 8 + 19) == 2534
    start = 24 + 40 + 56
    assert moved(plain_same_kernels(ONE)) == 2 * (start + 2 * fused + 8 + 19) == 2566
    scaled = replace(ONE, shape=replace(HAND, layer_scale=True))  # in the second block, the first add is part of ln_1
    apart = 40 + 128 + 80 + (56 + 40) + 80 + 92 + (92 + 40)
    assert moved(plain_same_kernels(scaled)) == 2 * (start + apart + (apart + 40) + 12 + 8 + 19) == 2990


def test_bytes_of_a_decomposed_tiny_tower_by_hand() -> None:
    start = 24 + 40 + (16 + 20 + 20) + 4
    block = 40 + 128 + 80 + 4 + (56 + 20) + 40 + 92 + (92 + 20) + (8 + 32)
    last = 40 + 24 + 20 + 20 + 20 + 16 + 24 + 16 + 44 + 44 + 12
    end = 8 + 19
    kept = 4 + (4 + 4) + (8 + 18 + 18 + 12 + 4) + (28 + 12)  # float32
    assert moved(decomposed(ONE)) == 2 * (start + block + last + end) + 4 * kept == 2534
    assert (
        moved(decomposed(ONE, Options(alpha=True))) - 2534 == 4 * 2 * 5
    )  # written in the first layer; the last computes it anyway


def test_a_mean_over_patches_by_hand() -> None:
    batch = replace(ONE, shape=replace(HAND, pooling="mean", norm_after_pool=True))
    assert products(decomposed(batch)) == 96 + 2 * 1680 + 24 + 96  # no block for the class token alone
    assert saved_by_last_block(batch) == 0
    start = 24 + 40 + (16 + 20 + 20) + 16  # the mean reads the 16 values of four patches
    block = 40 + 128 + 80 + 16 + (56 + 20) + 40 + 92 + 92 + 16  # attention goes to the stream at once, the MLP does not
    end = (2 * 16) + 8 + 19
    kept = 4 + 2 * (4 + 4) + 4 + (28 + 12)  # float32
    assert moved(decomposed(batch)) == 2 * (start + block + (block + 40) + end) + 4 * kept == 3046
    alpha = Options(alpha=True)  # computes the scores of four queries and five keys again, in both layers
    assert products(decomposed(batch, alpha)) - products(decomposed(batch)) == 2 * (2 * 4 * 5 * 4)
    assert moved(decomposed(batch, alpha)) - 3046 == 2 * (2 * (20 + 20) + 4 * 2 * 5)
    padding = [step.padding for step in decomposed(batch, alpha) if step.name == "alpha"]
    assert padding == 2 * [2 * 4 * (128 * 64 - 4 * 5)]


def test_text_maps_by_hand() -> None:
    def extra(texts: int) -> int:
        return products(decomposed(ONE, Options(texts=texts))) - 2376

    # One text: 2 · N · W in the first layer; in the last the values (4 × 4 and a bias) fold into two columns.
    assert extra(1) == 2 * 5 * 4 + (2 * 4 * 4 + 2 * 4) + 2 * 5 * 4 * 2
    # Two texts: as many columns as values, so the values are computed instead.
    assert extra(2) == 2 * (2 * 5 * 4 * 2) + 2 * 5 * 4 * 4
    assert sum(step.pointwise for step in decomposed(ONE, Options(texts=2))) == 2 * (2 * 5 * 2 * 2)
    assert sum(step.pointwise for step in decomposed(ONE, Options(alpha=True))) == 0


@pytest.mark.parametrize(
    ("tokens", "flash", "split"),
    [(50, 128 * 64, 128 * 64), (65, 128 * 128, 128 * 64), (197, 256**2, 256**2), (257, 384 * 320, 256 * 256)],
)
def test_tiles_by_hand(tokens: int, flash: int, split: int) -> None:
    assert padded_scores(tokens, tokens, Tile(128, 64)) == flash
    assert padded_scores(tokens - 1, tokens - 1, Tile(128, 64)) == split


def test_class_token_nearly_doubles_the_tiles_of_257_tokens() -> None:
    batch = Batch(roofline.shape_of("ViT-L-14"), images=1, tile=Tile(128, 64))
    (flash, *_), (split, *_) = (
        [step for step in steps if step.name == "attention"] for steps in (plain_eager(batch), decomposed(batch))
    )
    assert flash.products == split.products == 4 * 257**2 * 1024
    assert flash.executed == 4 * 384 * 320 * 1024
    assert split.executed == 4 * (256 * 256 + 2 * 256 + 1) * 1024  # the class token's row and column are not tiled
    assert (384 * 320) / (256 * 256) == 1.875


# ---------------------------------------------------------------------------------------------------- torch's counter


def counted(call: Callable[[], object]) -> dict[str, int]:
    """FLOPs by kind of operation, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return {str(key): value for key, value in counter.get_flop_counts()["Global"].items()}


def on_meta(name: str) -> VisionTransformer:
    """A named tower on the meta device."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        build = open_clip.model._build_vision_tower
        return build(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)).eval()


def cut(name: str) -> tuple[VisionTransformer, Shape]:
    """A named tower and its shape, cut to two blocks because meta tensors are slow; compares their depth first."""
    visual, shape = on_meta(name), roofline.shape_of(name)
    assert len(visual.transformer.resblocks) == shape.layers
    visual.transformer.resblocks = visual.transformer.resblocks[:2]
    return visual, replace(shape, layers=2)


@pytest.fixture(scope="module")
def shapes() -> dict[Shape, list[str]]:
    return roofline.supported()


@pytest.fixture(scope="module")
def names(shapes: dict[Shape, list[str]]) -> list[str]:
    """One name per vision config; the counter does not see activations."""
    by_config = {
        json.dumps([openclip_models.vision_config(name), open_clip.get_model_config(name)["embed_dim"]]): name
        for alike in shapes.values()
        for name in alike
    }
    assert len(by_config) > 30
    return list(by_config.values())


def test_shapes_of_models_that_differ() -> None:
    assert roofline.shape_of("ViT-H-14-CLIPA-336") == Shape(
        grid=(24, 24),
        patch=(14, 14),
        layers=32,
        width=1280,
        heads=16,
        hidden=5120,
        embed_dim=1024,
        pooling="mean",
        ln_pre=False,
        norm_after_pool=True,
    )
    plain = roofline.shape_of("ViT-B-32")
    assert (plain.pooling, plain.ln_pre, plain.layer_scale, plain.norm_after_pool) == ("cls", True, False, False)
    assert roofline.shape_of("ViT-B-32-quickgelu") == replace(plain, quick_gelu=True)
    assert roofline.shape_of("ViT-M-16-alt").layer_scale


def test_every_model_has_a_shape_or_is_unsupported(shapes: dict[Shape, list[str]]) -> None:
    supported = [name for alike in shapes.values() for name in alike]
    assert len(supported) == len(set(supported))
    left_out = set(openclip_models.names()) - set(supported)
    assert all(openclip_models.supports(name) for name in left_out if roofline.is_modelled(name))
    assert len(supported) >= 50
    assert all(roofline.shape_of(name) == shape for shape, alike in shapes.items() for name in alike)


def count_plain(visual: VisionTransformer) -> tuple[int, int, int]:
    """FLOPs of convolution, matrix products, and attention, which is one or two operations of the counter."""
    images = torch.empty(IMAGES, 3, *visual.image_size, device="meta")
    flops = counted(lambda: visual(images))
    return flops.pop("aten.convolution"), flops.pop("aten.mm") + flops.pop("aten.addmm"), sum(flops.values())


def by_kind(steps: Steps) -> tuple[int, int, int]:
    """The same FLOPs of the cost model."""
    convolution = products(step for step in steps if step.name == "patch convolution")
    attention = products(step for step in steps if step.name == "attention")
    return convolution, products(steps) - convolution - attention, attention


def test_plain_flops_equal_the_counters_for_every_model(names: list[str]) -> None:
    wrong = {}
    for name in names:
        visual, shape = cut(name)
        counts, model = count_plain(visual), by_kind(plain_eager(Batch(shape, IMAGES)))
        if counts != model:
            wrong[name] = (model, counts)
    assert wrong == {}


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-bigG-14"])
def test_plain_flops_at_full_depth(name: str) -> None:
    assert count_plain(on_meta(name)) == by_kind(plain_eager(Batch(roofline.shape_of(name), IMAGES)))


class Eager:
    """``clipfast.kernels.ops`` without dispatch, so that the counter sees the products of the eager backend."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, backend="auto", **options: EAGER.implementation(name).run(*arguments, **options)


@pytest.fixture
def transparent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the operations of a decomposition visible to the counter, also on meta tensors."""
    for module in (contributions, blocks, collector, embedding, pooling, rows, stream):
        monkeypatch.setattr(module, "ops", Eager())
    for module in (forward, basis, contributions):  # autocast does not know meta tensors
        monkeypatch.setattr(module, "autocast_disabled", lambda like: contextlib.nullcontext(), raising=False)


def count_decomposed(tower: Tower, images: Tensor, options: Options) -> int:
    """FLOPs of clipfast's forward, with every token's contributions if ``options.tokens``."""
    folded = basis.fold(tower, "uniform")
    texts = torch.ones(options.texts, tower.embed_dim, device=tower.device)
    text_basis = basis.fold(tower, "uniform", texts) if options.texts else None
    layers = tuple(range(tower.layers))[-(options.last or tower.layers) :]
    for layer in layers if text_basis else ():
        text_basis.values(layer)  # folded once per set of texts, not per batch
    for layer in layers if options.tokens else ():
        folded.values(layer)
    maps: Maps | None = "summed" if options.texts else None
    request = forward.Request(
        layers, text_basis, maps, options.alpha, options.tokens, adds_products=True
    )  # as on a GPU

    def run() -> None:
        result = forward.decompose(tower, images, request, folded)
        for layer in layers if options.tokens else ():
            result.tokens(layer)

    with sdpa_kernel(SDPBackend.MATH):  # the counter has no formula for the CPU's fused attention
        return sum(counted(run).values())


@pytest.mark.usefixtures("transparent")
def test_decomposed_flops_equal_the_counters_for_every_model(names: list[str]) -> None:
    """One block for all tokens, one for the class token, and alpha."""
    options, wrong = Options(alpha=True), {}
    for name in names:
        visual, shape = cut(name)
        images = torch.empty(IMAGES, 3, *visual.image_size, device="meta")
        counts = count_decomposed(openclip.read(visual), images, options)
        model = products(decomposed(Batch(shape, IMAGES), options))
        if counts != model:
            wrong[name] = (model, counts)
    assert wrong == {}


TINY = {"image_size": 24, "patch_size": 8, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 3.0, "output_dim": 20}
TINY_SHAPE = Shape(grid=(3, 3), patch=(8, 8), layers=3, width=32, heads=2, hidden=96, embed_dim=20)
POOLED = {"pool_type": "avg", "final_ln_after_pool": True}


@pytest.mark.usefixtures("transparent")
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(alpha=True),
        Options(texts=5),
        Options(texts=15),  # 30 columns, fewer than the 32 values
        Options(texts=16),
        Options(tokens=True),
        Options(alpha=True, texts=5, tokens=True),
        Options(alpha=True, texts=5, last=2),
        Options(last=1),
        Options(tokens=True, last=1),
    ],
    ids=str,
)
def test_decomposed_flops_equal_the_counters_for_all_options(options: Options, pooling: str) -> None:
    tower = openclip.read(VisionTransformer(**TINY, **(POOLED if pooling == "mean" else {})).eval())
    counts = count_decomposed(tower, torch.randn(IMAGES, 3, 24, 24), options)
    shape = replace(TINY_SHAPE, pooling=pooling, norm_after_pool=pooling == "mean")
    assert counts == products(decomposed(Batch(shape, IMAGES), options))


@pytest.mark.usefixtures("transparent")
def test_alpha_of_the_class_token_adds_no_matrix_product() -> None:
    tower, images = openclip.read(VisionTransformer(**TINY).eval()), torch.randn(IMAGES, 3, 24, 24)
    assert count_decomposed(tower, images, Options(alpha=True)) == count_decomposed(tower, images, Options())


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of every kernel's matrices: inputs and first output once each, nothing for views."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    @staticmethod
    def size(tensor: object) -> int:
        """Bytes of a tensor; 0 for vectors and expanded tensors."""
        if not isinstance(tensor, Tensor):
            return 0
        axes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride and size > 1]
        return tensor.element_size() * tensor.numel() if len(axes) > 1 and 0 not in tensor.stride() else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            inputs = {id(leaf): leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs))}
            first = out[0] if isinstance(out, tuple) else out
            self.moved += sum(map(self.size, inputs.values())) + self.size(first)
        return out


@pytest.mark.parametrize(
    ("tower_options", "shape_options"),
    [
        ({}, {}),
        ({"act_layer": open_clip.transformer.QuickGELU}, {"quick_gelu": True}),
        ({"ls_init_value": 0.1}, {"layer_scale": True}),
        ({"no_ln_pre": True, "final_ln_after_pool": True}, {"ln_pre": False, "norm_after_pool": True}),
        (POOLED, {"pooling": "mean", "norm_after_pool": True}),
    ],
    ids=["gelu", "quick_gelu", "layer_scale", "no_ln_pre", "mean"],
)
def test_plain_bytes_equal_those_of_eager_torch(tower_options: dict[str, Any], shape_options: dict[str, Any]) -> None:
    # The custom block type, because torch's multi-head attention is one opaque operation on a CPU.
    visual = VisionTransformer(**TINY, block_type="custom", **tower_options).eval()
    images = torch.randn(IMAGES, 3, 24, 24)
    with ByteCounter() as counter, torch.no_grad():
        visual(images)
    assert counter.moved == moved(plain_eager(Batch(replace(TINY_SHAPE, **shape_options), IMAGES, element=4)))
