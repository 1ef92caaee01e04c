"""The cost model: by hand, and against torch's counter on open_clip's modules and on clipfast's own forward."""

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
from benchmarks.costs_decomposed import Wanted, decomposed, plain_same_kernels, saved_by_last_block
from clipfast import basis, contributions, forward
from clipfast.kernels.dispatch import EAGER
from clipfast.towers import openclip, openclip_models
from clipfast.towers.tower import Tower

IMAGES = 2

# -------------------------------------------------------------------------------------------------------------- by hand

# Four patches of one pixel, so five tokens; two layers of two heads.
HAND = Shape(grid=(2, 2), patch=(1, 1), layers=2, width=4, heads=2, hidden=8, embed_dim=3)
ONE = Batch(HAND, images=1, element=2)


def test_flops_of_a_tiny_tower_by_hand() -> None:
    start, end = 2 * 4 * 3 * 4, 2 * 4 * 3  # four patches of three numbers; one row into the joint space
    block = 2 * 5 * 4 * 12 + 4 * 5 * 5 * 4 + 2 * 5 * 4 * 4 + 2 * (2 * 5 * 4 * 8)
    assert (start, block, end) == (96, 1680, 24)
    for plain in (plain_eager, plain_fused, plain_same_kernels):
        assert products(plain(ONE)) == 96 + 2 * 1680 + 24 == 3480
    # Query, keys into it, logits, mixed tokens, codes, output projection, MLP: all for one row.
    last = 32 + 32 + 2 * 2 * 5 * 4 + 2 * 2 * 5 * 4 + 32 + 32 + 2 * (2 * 4 * 8)
    terms = 2 * 4 * 4 * 3  # the start, two MLPs, what is not kept
    assert products(decomposed(ONE)) == 96 + 1680 + last + 24 + terms == 2312
    assert saved_by_last_block(ONE) == 1680 - last == 1264


def test_bytes_of_a_tiny_tower_by_hand() -> None:
    # Numbers moved by: LayerNorm, queries keys values, attention, output projection, add, LayerNorm, MLP in,
    # activation, MLP out, add. The residual stream has 5 · 4 = 20 numbers.
    block = 40 + (20 + 48 + 60) + 80 + (20 + 16 + 20) + 60 + 40 + (20 + 32 + 40) + 80 + (40 + 32 + 20) + 60
    start = (12 + 12 + 16) + (16 + 20) + (20 + 20 + 20) + 40
    end = 40 + (4 + 12 + 3)
    assert moved(plain_eager(ONE)) == 2 * (start + 2 * block + end) == 3382
    quick = moved(plain_eager(replace(ONE, shape=replace(HAND, quick_gelu=True))))
    assert quick - moved(plain_eager(ONE)) == 2 * 2 * (7 - 2) * 5 * 8  # seven passes over the hidden layer, not two
    fused = 40 + 128 + 80 + (56 + 20) + 40 + 92 + (92 + 20)
    assert moved(plain_fused(ONE)) == 2 * ((12 + 12 + 20 + 20) + 40 + 2 * fused + 8 + 19) == 2534
    same = 40 + 128 + 80 + 56 + 80 + 92 + 92  # in the second block, the first add is part of ln_1
    assert moved(plain_same_kernels(ONE)) == 2 * (24 + 40 + 56 + same + (same + 40) + 12 + 8 + 19) == 2670


def test_bytes_of_a_decomposed_tiny_tower_by_hand() -> None:
    start = 24 + 40 + (16 + 20 + 20) + 4
    block = 40 + 128 + 80 + 4 + 56 + 80 + 92 + 92 + 4
    last = 64 + 24 + 20 + 20 + 20 + 16 + 24 + 16 + 44 + 44 + 12
    end = 8 + 19
    kept = 4 + (4 + 4) + (8 + 18 + 18 + 12 + 4) + (28 + 12)  # float32
    assert moved(decomposed(ONE)) == 2 * (start + block + last + end) + 4 * kept == 2510
    assert (
        moved(decomposed(ONE, Wanted(alpha=True))) - 2510 == 4 * 2 * 5
    )  # written in the first layer, there in the last


def test_a_mean_over_patches_by_hand() -> None:
    batch = replace(ONE, shape=replace(HAND, pooling="mean", norm_after_pool=True))
    assert products(decomposed(batch)) == 96 + 2 * 1680 + 24 + 96  # no block is for one token alone
    assert saved_by_last_block(batch) == 0
    start = 24 + 40 + (16 + 20 + 20) + 16  # the mean reads the 16 numbers of four patches
    block = 40 + 128 + 80 + 16 + 56 + 80 + 92 + 92 + 16
    end = (2 * 16) + 8 + 19
    kept = 4 + 2 * (4 + 4) + 4 + (28 + 12)  # float32
    assert moved(decomposed(batch)) == 2 * (start + block + (block + 40) + end) + 4 * kept == 3126
    alpha = Wanted(alpha=True)  # scores of four queries and five keys once more, in both layers
    assert products(decomposed(batch, alpha)) - products(decomposed(batch)) == 2 * (2 * 4 * 5 * 4)
    assert moved(decomposed(batch, alpha)) - 3126 == 2 * (2 * (20 + 20) + 4 * 2 * 5)
    padding = [step.padding for step in decomposed(batch, alpha) if step.name == "alpha"]
    assert padding == 2 * [2 * 4 * (128 * 64 - 4 * 5)]


def test_text_maps_by_hand() -> None:
    def extra(texts: int) -> int:
        return products(decomposed(ONE, Wanted(texts=texts))) - 2312

    # One text: 2 · N · W in the first layer; in the last the values (4 × 4 and a bias) fold into two columns.
    assert extra(1) == 2 * 5 * 4 + (2 * 4 * 4 + 2 * 4) + 2 * 5 * 4 * 2
    # Two texts: as many columns as values, so these are formed instead.
    assert extra(2) == 2 * (2 * 5 * 4 * 2) + 2 * 5 * 4 * 4
    assert sum(step.pointwise for step in decomposed(ONE, Wanted(texts=2))) == 2 * (2 * 5 * 2 * 2)
    assert sum(step.pointwise for step in decomposed(ONE, Wanted(alpha=True))) == 0


@pytest.mark.parametrize(
    ("tokens", "flash", "split"),
    [(50, 128 * 64, 128 * 64), (65, 128 * 128, 128 * 64), (197, 256**2, 256**2), (257, 384 * 320, 256 * 256)],
)
def test_tiles_by_hand(tokens: int, flash: int, split: int) -> None:
    assert padded_scores(tokens, tokens, Tile(128, 64)) == flash
    assert padded_scores(tokens - 1, tokens - 1, Tile(128, 64)) == split


def test_the_class_token_costs_nearly_twice_the_tiles_of_257_tokens() -> None:
    batch = Batch(roofline.shape_of("ViT-L-14"), images=1, tile=Tile(128, 64))
    (flash, *_), (split, *_) = (
        [step for step in steps if step.name == "attention"] for steps in (plain_eager(batch), decomposed(batch))
    )
    assert flash.products == split.products == 4 * 257**2 * 1024
    assert flash.executed == 4 * 384 * 320 * 1024
    assert split.executed == 4 * (256 * 256 + 2 * 256 + 1) * 1024  # the class token's row and column are no tiles
    assert (384 * 320) / (256 * 256) == 1.875


# ---------------------------------------------------------------------------------------------------- torch's counter


def counted(call: Callable[[], object]) -> dict[str, int]:
    """FLOPs by kind of operation, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return {str(key): value for key, value in counter.get_flop_counts()["Global"].items()}


def on_meta(name: str) -> VisionTransformer:
    """A named tower: shapes without weights."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        build = open_clip.model._build_vision_tower
        return build(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)).eval()


def cut(name: str) -> tuple[VisionTransformer, Shape]:
    """A named tower and its shape, both cut to two blocks after comparing their depth: meta tensors are slow."""
    visual, shape = on_meta(name), roofline.shape_of(name)
    assert len(visual.transformer.resblocks) == shape.layers
    visual.transformer.resblocks = visual.transformer.resblocks[:2]
    return visual, replace(shape, layers=2)


@pytest.fixture(scope="module")
def shapes() -> dict[Shape, list[str]]:
    return roofline.supported()


@pytest.fixture(scope="module")
def names(shapes: dict[Shape, list[str]]) -> list[str]:
    """One name per config, as it is written; an activation is nothing that the counter sees."""
    written = {
        json.dumps([openclip_models.vision_config(name), open_clip.get_model_config(name)["embed_dim"]]): name
        for alike in shapes.values()
        for name in alike
    }
    assert len(written) > 30
    return list(written.values())


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


def test_every_model_has_a_shape_or_is_refused(shapes: dict[Shape, list[str]]) -> None:
    found = [name for alike in shapes.values() for name in alike]
    assert len(found) == len(set(found))
    assert all(openclip_models.supports(name) for name in set(openclip_models.names()) - set(found))
    assert all(roofline.shape_of(name) == shape for shape, alike in shapes.items() for name in alike)


def count_plain(visual: VisionTransformer) -> tuple[int, int, int]:
    """FLOPs of convolution, matrix products, and attention, which the counter sees as one or as two operations."""
    images = torch.empty(IMAGES, 3, *visual.image_size, device="meta")
    found = counted(lambda: visual(images))
    return found.pop("aten.convolution"), found.pop("aten.mm") + found.pop("aten.addmm"), sum(found.values())


def by_kind(steps: Steps) -> tuple[int, int, int]:
    """The same of the model."""
    convolution = products(step for step in steps if step.name == "patch convolution")
    attention = products(step for step in steps if step.name == "attention")
    return convolution, products(steps) - convolution - attention, attention


def test_plain_flops_are_what_the_counter_counts_for_every_model(names: list[str]) -> None:
    wrong = {}
    for name in names:
        visual, shape = cut(name)
        found, model = count_plain(visual), by_kind(plain_eager(Batch(shape, IMAGES)))
        if found != model:
            wrong[name] = (model, found)
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
    """Lets the counter look into a decomposition, on meta tensors as well."""
    for module in (forward, contributions):
        monkeypatch.setattr(module, "ops", Eager())
    for module in (forward, basis, contributions):  # there is no autocast of meta tensors to switch off
        monkeypatch.setattr(module, "autocast_disabled", lambda like: contextlib.nullcontext(), raising=False)


def count_decomposed(tower: Tower, images: Tensor, wanted: Wanted) -> int:
    """FLOPs of clipfast's forward, and of every token's contributions where they are wanted."""
    folded = basis.fold(tower, "uniform")
    texts = torch.ones(wanted.texts, tower.embed_dim, device=tower.device)
    text_basis = basis.fold(tower, "uniform", texts) if wanted.texts else None
    layers = tuple(range(tower.layers))[-(wanted.last or tower.layers) :]
    for layer in layers if text_basis else ():
        text_basis.values(layer)  # folded once per set of texts, not per batch
    for layer in layers if wanted.tokens else ():
        folded.values(layer)
    request = forward.Request(layers, text_basis, "summed" if wanted.texts else None, wanted.alpha, wanted.tokens)

    def run() -> None:
        found = forward.decompose(tower, images, request, folded)
        for layer in layers if wanted.tokens else ():
            found.tokens(layer)

    with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention has no formula
        return sum(counted(run).values())


@pytest.mark.usefixtures("transparent")
def test_decomposed_flops_are_what_the_counter_counts_for_every_model(names: list[str]) -> None:
    """One block for all tokens, one for the class token, and alpha."""
    wanted, wrong = Wanted(alpha=True), {}
    for name in names:
        visual, shape = cut(name)
        images = torch.empty(IMAGES, 3, *visual.image_size, device="meta")
        found = count_decomposed(openclip.read(visual), images, wanted)
        model = products(decomposed(Batch(shape, IMAGES), wanted))
        if found != model:
            wrong[name] = (model, found)
    assert wrong == {}


TINY = {"image_size": 24, "patch_size": 8, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 3.0, "output_dim": 20}
TINY_SHAPE = Shape(grid=(3, 3), patch=(8, 8), layers=3, width=32, heads=2, hidden=96, embed_dim=20)
POOLED = {"pool_type": "avg", "final_ln_after_pool": True}


@pytest.mark.usefixtures("transparent")
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(),
        Wanted(alpha=True),
        Wanted(texts=5),
        Wanted(texts=15),  # 30 columns, fewer than the 32 of the values
        Wanted(texts=16),
        Wanted(tokens=True),
        Wanted(alpha=True, texts=5, tokens=True),
        Wanted(alpha=True, texts=5, last=2),
        Wanted(last=1),
        Wanted(tokens=True, last=1),
    ],
    ids=str,
)
def test_whatever_is_wanted_is_counted(wanted: Wanted, pooling: str) -> None:
    tower = openclip.read(VisionTransformer(**TINY, **(POOLED if pooling == "mean" else {})).eval())
    found = count_decomposed(tower, torch.randn(IMAGES, 3, 24, 24), wanted)
    shape = replace(TINY_SHAPE, pooling=pooling, norm_after_pool=pooling == "mean")
    assert found == products(decomposed(Batch(shape, IMAGES), wanted))


@pytest.mark.usefixtures("transparent")
def test_the_class_tokens_alpha_is_no_matrix_product() -> None:
    tower, images = openclip.read(VisionTransformer(**TINY).eval()), torch.randn(IMAGES, 3, 24, 24)
    assert count_decomposed(tower, images, Wanted(alpha=True)) == count_decomposed(tower, images, Wanted())


class ByteCounter(TorchDispatchMode):
    """Bytes of every kernel's matrices: inputs once, the first output once; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    @staticmethod
    def size(tensor: object) -> int:
        """Bytes of a tensor; of a vector, or one repeated along an axis, none."""
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
    ("built", "shaped"),
    [
        ({}, {}),
        ({"act_layer": open_clip.transformer.QuickGELU}, {"quick_gelu": True}),
        ({"ls_init_value": 0.1}, {"layer_scale": True}),
        ({"no_ln_pre": True, "final_ln_after_pool": True}, {"ln_pre": False, "norm_after_pool": True}),
        (POOLED, {"pooling": "mean", "norm_after_pool": True}),
    ],
    ids=["gelu", "quick_gelu", "layer_scale", "no_ln_pre", "mean"],
)
def test_plain_bytes_are_those_of_the_kernels_that_eager_torch_runs(
    built: dict[str, Any], shaped: dict[str, Any]
) -> None:
    # Blocks of the custom type: torch's own multi-head attention is one opaque operation on a CPU.
    visual = VisionTransformer(**TINY, block_type="custom", **built).eval()
    images = torch.randn(IMAGES, 3, 24, 24)
    with ByteCounter() as counter, torch.no_grad():
        visual(images)
    assert counter.moved == moved(plain_eager(Batch(replace(TINY_SHAPE, **shaped), IMAGES, element=4)))
