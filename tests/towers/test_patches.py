"""What is done to a module before or after wrapping is refused with its place; wrappers are looked through."""

import os
from collections.abc import Callable
from types import MethodType
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed
import torch.utils.flop_counter
from builders import clip_model, pixels, vision_tower
from measures import relative_error
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from tolerances import EMBEDDING_FLOAT32
from torch import nn
from torch.nn.utils import prune

import clipfast
from clipfast import InputError, UnsupportedTower, wrap


def double(module: nn.Module, *rest: object) -> object:
    """A forward hook or pre-hook that doubles its last argument."""
    values = rest[-1]
    if isinstance(values, tuple):
        return tuple(2 * value if isinstance(value, torch.Tensor) else value for value in values)
    return 2 * values


def double_forward(module: nn.Module) -> None:
    """Replaces a module's ``forward`` on the instance."""
    original = module.forward
    module.forward = lambda *arguments, **options: double(module, original(*arguments, **options))


def block(visual: Any) -> Any:
    return visual.transformer.resblocks[1]


def loud_attention(self: Any, q_x: torch.Tensor, **options: object) -> torch.Tensor:
    return 2 * ResidualAttentionBlock.attention(self, q_x, **options)


PATCHES: dict[str, tuple[Callable[[Any], object], str]] = {
    "hook on the tower": (lambda v: v.register_forward_hook(double), "VisionTransformer: double"),
    "pre-hook on the tower": (lambda v: v.register_forward_pre_hook(double), "VisionTransformer: double"),
    "hook on a block": (lambda v: block(v).register_forward_hook(double), "transformer.resblocks.1: double"),
    "hook on an attention": (lambda v: block(v).attn.register_forward_hook(double), "resblocks.1.attn: double"),
    "pre-hook on an MLP": (lambda v: block(v).mlp.register_forward_pre_hook(double), "resblocks.1.mlp: double"),
    "hook on an MLP's layer": (lambda v: block(v).mlp.c_fc.register_forward_hook(double), "resblocks.1.mlp.c_fc"),
    "hook on the patches": (lambda v: v.conv1.register_forward_hook(double), "conv1: double"),
    "forward of the tower": (double_forward, "(forward)"),
    "forward of a block": (lambda v: double_forward(block(v)), "transformer.resblocks.1.forward"),
    "forward of an attention": (lambda v: double_forward(block(v).attn), "transformer.resblocks.1.attn.forward"),
    "forward of a norm": (lambda v: double_forward(v.ln_post), "(ln_post.forward)"),
    "forward of a layer": (lambda v: double_forward(block(v).mlp.c_proj), "transformer.resblocks.1.mlp.c_proj.forward"),
    "attention of a block": (
        lambda v: setattr(block(v), "attention", MethodType(loud_attention, block(v))),
        "transformer.resblocks.1.attention",
    ),
    "pooling of the tower": (lambda v: setattr(v, "_pool", lambda x: (2 * x[:, 0], x[:, 1:])), "(_pool)"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_patched_tower_is_refused_before_and_after_wrapping(name: str) -> None:
    patch, place = PATCHES[name]
    visual = vision_tower()
    images = pixels(visual)
    with torch.no_grad():
        before = visual(images)
        model = wrap(visual)
        model.decompose(images)
        patch(visual)
        assert relative_error(visual(images), before) > EMBEDDING_FLOAT32, "this patch changes nothing"
    for work in (lambda: wrap(visual), lambda: model.decompose(images)):
        with pytest.raises(UnsupportedTower) as caught:
            work()
        assert len(caught.value.reasons) == 1
        assert place in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_removed_hook_is_forgotten() -> None:
    visual = vision_tower()
    model, images = wrap(visual), pixels(visual)
    expected = model.decompose(images).embedding
    handle = visual.ln_pre.register_forward_hook(double)
    with pytest.raises(UnsupportedTower):
        model.decompose(images)
    handle.remove()
    assert torch.equal(model.decompose(images).embedding, expected)


def test_every_patch_is_listed_and_long_lists_are_cut() -> None:
    visual = vision_tower(layers=5)
    for layer in visual.transformer.resblocks:
        layer.register_forward_hook(double)
    double_forward(visual.ln_post)
    prune.l1_unstructured(visual.transformer.resblocks[2].attn.out_proj, "weight", 0.5)
    with pytest.raises(UnsupportedTower) as caught:
        wrap(visual)
    pruning, hooks, forward = sorted(caught.value.reasons, key=lambda reason: reason[:12])
    assert hooks.endswith("transformer.resblocks.2: double and 2 more)")
    assert pruning.endswith("(transformer.resblocks.2.attn.out_proj: a weight that a hook computes)")
    assert forward.endswith("(ln_post.forward)")


def test_hooks_that_only_read_are_accepted_when_asked_for() -> None:
    visual = vision_tower()
    seen: list[torch.Size] = []
    block(visual).register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    images = pixels(visual)
    with pytest.raises(UnsupportedTower, match="ignore_hooks=True"):
        wrap(visual)
    model = wrap(visual, ignore_hooks=True)
    assert (
        relative_error(model.decompose(images).embedding, model.encode_image(images, normalize=False))
        <= EMBEDDING_FLOAT32
    )
    assert seen == [torch.Size([2, 10, 32])]
    double_forward(visual.ln_post)
    with pytest.raises(UnsupportedTower, match=r"ln_post\.forward"):
        model.decompose(images)


def test_a_loaded_model_takes_hooks_that_only_read() -> None:
    model = clipfast.load("scenes", device="cpu", ignore_hooks=True)
    model.module.visual.ln_post.register_forward_hook(lambda module, inputs, output: None)
    assert model.verify(torch.randn(1, 3, *model.tower.image_size)).ok


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_on_all_modules_are_refused(register: str) -> None:
    visual = vision_tower()
    model, images = wrap(visual), pixels(visual)
    handle = getattr(nn.modules.module, register)(double)
    try:
        with pytest.raises(UnsupportedTower, match=r"a forward hook on all modules: .*\(double\)"):
            model.decompose(images)
        with pytest.raises(UnsupportedTower):
            wrap(visual)
        assert len(wrap(visual, ignore_hooks=True).decompose(images)) == 2
    finally:
        handle.remove()
    assert len(model.decompose(images)) == 2


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (VisionTransformer, "forward"),
        (VisionTransformer, "_pool"),
        (ResidualAttentionBlock, "forward"),
        (ResidualAttentionBlock, "attention"),
        (nn.MultiheadAttention, "forward"),
        (nn.Linear, "forward"),
    ],
)
def test_a_method_replaced_on_its_class_is_refused(kind: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    visual = vision_tower()
    model, images = wrap(visual), pixels(visual)
    original = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *arguments, **options: double(self, original(self, *arguments)))
    with pytest.raises(UnsupportedTower, match=rf"\({kind.__name__}\.{name}\)"):
        wrap(visual)
    with pytest.raises(UnsupportedTower):
        model.decompose(images)


def test_a_clip_that_encodes_images_its_own_way_is_refused() -> None:
    class Normalised(open_clip.CLIP):
        def encode_image(self, image: torch.Tensor, normalize: bool = True) -> torch.Tensor:
            return super().encode_image(image, normalize)

    clip = clip_model()
    clip.encode_image = lambda images: 2 * clip.visual(images)
    with pytest.raises(UnsupportedTower, match=r"CLIP\.encode_image"):
        wrap(clip)
    clip = clip_model()
    clip.__class__ = Normalised
    with pytest.raises(UnsupportedTower, match=r"Normalised\.encode_image"):
        wrap(clip)


def test_methods_that_compute_nothing_may_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as initialisation, which is often switched off, and ``train``, which keeps a frozen tower in eval mode."""
    visual = vision_tower()
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)
    visual.train = lambda mode=True: visual
    assert len(wrap(visual).decompose(pixels(visual))) == 2


def test_backward_hooks_are_accepted() -> None:
    visual = vision_tower()
    visual.ln_post.register_full_backward_hook(lambda module, inputs, outputs: None)
    visual.proj.register_hook(lambda gradient: gradient)
    assert len(wrap(visual).decompose(pixels(visual))) == 2


def set_eps(visual: Any) -> None:
    visual.ln_post.eps = 0.5


def set_eps_in_a_block(visual: Any) -> None:
    block(visual).ln_2.eps = 0.5


def set_pooling(visual: Any) -> None:
    visual.pool_type, visual.final_ln_after_pool = "avg", True


def set_activation(visual: Any) -> None:
    for layer in visual.transformer.resblocks:
        layer.mlp.gelu.approximate = "tanh"


@pytest.mark.parametrize("change", [set_eps, set_eps_in_a_block, set_pooling, set_activation])
def test_settings_changed_after_wrapping_are_followed(change: Callable[[Any], None]) -> None:
    visual = vision_tower()
    model, images = wrap(visual), pixels(visual)
    before = model.decompose(images).embedding
    change(visual)
    after = model.decompose(images).embedding
    with torch.no_grad():
        assert relative_error(after, visual(images)) <= EMBEDDING_FLOAT32
    assert relative_error(after, before) > EMBEDDING_FLOAT32


def set_heads(visual: Any) -> None:
    block(visual).attn.num_heads, block(visual).attn.head_dim = 4, 8


def drop_attention(visual: Any) -> None:
    block(visual).attn.dropout = 0.5
    block(visual).attn.train()


@pytest.mark.parametrize(
    ("change", "reason"), [(set_heads, "blocks with different heads"), (drop_attention, "dropout in training mode")]
)
def test_settings_that_cannot_be_followed_are_refused(change: Callable[[Any], None], reason: str) -> None:
    visual = vision_tower()
    model, images = wrap(visual), pixels(visual)
    model.decompose(images)
    change(visual)
    for work in (lambda: wrap(visual), lambda: model.decompose(images)):
        with pytest.raises(UnsupportedTower, match=reason):
            work()


@pytest.mark.parametrize("thing", [None, "ViT-B-32", torch.ones(2), {"state_dict": 1}])
def test_only_modules_are_wrapped(thing: Any) -> None:
    with pytest.raises(InputError, match=r"^wrap takes a torch\.nn\.Module, not a \w+: clipfast\.load takes names$"):
        wrap(thing)


# -------------------------------------------------------------------------------------------- wrappers around modules


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "torch.compile": compiled,
    "both": lambda module: compiled(nn.DataParallel(module)),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("inner", ["clip", "visual", "visual alone"])
def test_wrappers_are_looked_through(name: str, inner: str) -> None:
    clip, wrapper = clip_model(), WRAPPERS[name]
    images = pixels(clip.visual)
    expected = wrap(clip).decompose(images, texts=wrap(clip).encode_text(["a forest"]))
    if inner == "clip":
        model = wrap(wrapper(clip))
    elif inner == "visual":
        clip.visual = wrapper(clip.visual)
        model = wrap(clip)
    else:
        model = wrap(wrapper(clip.visual))
    contributions = model.decompose(images)
    assert torch.equal(contributions.embedding, expected.embedding)
    assert relative_error(model.encode_image(images, normalize=False), expected.embedding) <= EMBEDDING_FLOAT32
    if inner != "visual alone":
        assert torch.equal(model.decompose(images, texts=["a forest"]).maps, expected.maps)


def test_a_visual_compiled_in_place_is_accepted() -> None:
    clip = clip_model()
    clip.visual.compile(backend="eager")
    images = pixels(clip.visual)
    model = wrap(clip)
    assert (
        relative_error(model.decompose(images).embedding, model.encode_image(images, normalize=False))
        <= EMBEDDING_FLOAT32
    )


# ------------------------------------------------------------------------------------------------- weights' devices


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(InputError, match=r"^weights of VisionTransformer are on the meta device and have no values"):
        wrap(vision_tower().to("meta"))
    offloaded = vision_tower()
    block(offloaded).mlp.to("meta")
    with pytest.raises(InputError, match="meta device"):
        wrap(offloaded)


def test_weights_that_lose_their_values_later_are_refused() -> None:
    visual = vision_tower()
    model, images = wrap(visual), pixels(visual)
    visual.to("meta")
    for work in (lambda: model.decompose(images), lambda: model.fingerprint()):
        with pytest.raises(InputError, match=r"are on the meta device and have no values"):
            work()


def test_weights_in_two_dtypes_are_refused() -> None:
    mixed = vision_tower()
    block(mixed).mlp.half()
    with pytest.raises(InputError, match=r"are in float16 and float32: convert them to one dtype$"):
        wrap(mixed)


@pytest.mark.skipif(os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not torch.cuda.is_available(), reason="no GPU")
def test_weights_on_two_devices_are_refused() -> None:
    divided = vision_tower()
    block(divided).to("cuda")
    with pytest.raises(InputError, match=r"are on cpu, cuda:0: move them to one device$"):
        wrap(divided)


def test_counting_operations_is_no_patch() -> None:
    """torch's counter registers hooks on all modules, which only follow where the forward is."""
    visual = vision_tower()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        assert len(wrap(visual).decompose(pixels(visual))) == 2
    assert counter.get_total_flops() > 0
