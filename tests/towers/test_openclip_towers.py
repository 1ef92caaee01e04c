"""open_clip's towers of every kind: the module's own embedding as a sum, and the module as it was."""

from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from builders import pixels, randomise, vision_tower
from measures import error, relative_error
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import LayerNorm, LayerNormFp32
from tolerances import FLOAT64, SUM_FLOAT32
from torch import nn

from clipfast import UnsupportedTower, wrap

COCA = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}
EVERY = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}


def resnet(dtype: torch.dtype = torch.float32, size: int = 64, **changes: Any) -> Any:
    """CLIP's ResNet with 2 × 2 positions, random, in eval mode."""
    sizes = {"layers": (1, 2, 1, 1), "output_dim": 20, "heads": 4, "width": 8, **changes}
    return randomise(ModifiedResNet(**sizes, image_size=size), 0).to(dtype).eval()


def without(name: str, **changes: Any) -> Callable[..., nn.Module]:
    """A tower whose layer of this name is gone."""

    def made(dtype: torch.dtype = torch.float32) -> nn.Module:
        visual = vision_tower(dtype=dtype, **changes)
        setattr(visual, name, None if name == "proj" else nn.Identity())
        return visual

    return made


def without_biases(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Layers that may have no bias."""
    visual: Any = vision_tower(dtype=dtype)
    for block in visual.transformer.resblocks:
        block.attn.in_proj_bias = block.attn.out_proj.bias = block.mlp.c_fc.bias = None
    visual.ln_pre = randomise(nn.LayerNorm(32, bias=False), 1).to(dtype)
    return visual


def with_a_patch_bias(dtype: torch.dtype = torch.float32) -> nn.Module:
    visual: Any = vision_tower(dtype=dtype)
    visual.conv1 = randomise(nn.Conv2d(3, 32, 8, stride=8), 1).to(dtype)
    return visual


def activated(dtype: torch.dtype = torch.float32) -> nn.Module:
    return vision_tower(dtype=dtype, act_layer=nn.SiLU)


TOWERS: dict[str, Callable[..., Any]] = {
    "class token": vision_tower,
    "mean": partial(vision_tower, pool_type="avg", final_ln_after_pool=True),
    "mean of norms": partial(vision_tower, pool_type="avg"),
    "mean of norms, no ln_pre": partial(vision_tower, pool_type="avg", no_ln_pre=True),
    "rectangle": partial(vision_tower, image_size=(16, 32), patch_size=(8, 16), pool_type="avg"),
    "CoCa": partial(vision_tower, **COCA),
    "CoCa as wide as the stream": partial(vision_tower, **{**COCA, "output_dim": 32}),
    "CoCa, one query": partial(vision_tower, **{**COCA, "attn_pooler_queries": 1}),
    "CoCa with tokens": partial(vision_tower, **COCA, output_tokens=True),
    "CoCa, no last norm": without("ln_post", **COCA),
    "CoCa, no projection": without("proj", **COCA),
    "no projection": without("proj"),
    "no last norm": without("ln_post"),
    "mean without norm": without("ln_post", pool_type="avg"),
    "no biases": without_biases,
    "bias of the patches": with_a_patch_bias,
    "SiLU": activated,
    "layer scale": partial(vision_tower, ls_init_value=0.3),
    "sine positions": partial(vision_tower, pos_embed_type="sin_cos_2d"),
    "every flag": partial(vision_tower, **EVERY),
    "every flag and layer scale": partial(vision_tower, **EVERY, ls_init_value=0.3, pool_type="avg"),
    "every flag, CoCa": partial(vision_tower, **EVERY, **COCA),
    "custom blocks": partial(vision_tower, block_type="custom"),
    **{flag: partial(vision_tower, **{flag: True}) for flag in EVERY},
    "ResNet": resnet,
    "ResNet, one position": partial(resnet, size=32),
    "ResNet, many heads": partial(resnet, size=96, heads=16, layers=(2, 1, 1, 2)),
}


def own(visual: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = visual(images)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", TOWERS)
def test_the_sum_is_the_modules_own_embedding(name: str) -> None:
    visual = TOWERS[name](dtype=torch.float64)
    images = pixels(visual, dtype=torch.float64)
    model = wrap(visual)
    depths = ["all"] if model.tower.blocks else []
    depths += ["pool"] if model.tower.pooling != "cls" else []
    assert depths
    for depth in depths:
        contributions = model.decompose(images, depth=depth)
        assert contributions.max_error() <= FLOAT64, depth
        assert relative_error(contributions.embedding, own(visual, images)) <= FLOAT64, depth
    assert model.verify(images).ok


@pytest.mark.parametrize("name", TOWERS)
def test_nothing_of_the_module_changes(name: str) -> None:
    visual = TOWERS[name]()
    images = pixels(visual)
    before, embedding = {key: tensor.clone() for key, tensor in visual.state_dict().items()}, own(visual, images)
    flags = [(part.training, len(vars(part)), len(part._forward_hooks)) for part in visual.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = wrap(visual)
    contributions = model.decompose(images)
    assert contributions.max_error() <= SUM_FLOAT32
    model.verify(images)
    assert torch.equal(torch.get_rng_state(), state)
    after = visual.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert [(part.training, len(vars(part)), len(part._forward_hooks)) for part in visual.modules()] == flags
    assert torch.equal(own(visual, images), embedding)


@pytest.mark.parametrize("name", ["every flag", "CoCa", "ResNet"])
def test_weights_that_others_are_computed_from_are_followed(name: str) -> None:
    visual = TOWERS[name](dtype=torch.float64)
    images = pixels(visual, dtype=torch.float64)
    model = wrap(visual)
    model.decompose(images)
    for parameter in visual.parameters():
        with torch.no_grad():
            parameter.mul_(1.05).add_(0.01)
        assert relative_error(model.decompose(images).embedding, own(visual, images)) <= FLOAT64


@pytest.mark.parametrize("norm", [LayerNorm, LayerNormFp32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pool_in_half_precision(norm: type[nn.Module], dtype: torch.dtype) -> None:
    """As open_clip keeps them: LayerNorms in float32 where they compute in it."""
    visual = vision_tower(dtype=dtype, norm_layer=norm, **COCA)
    if norm is LayerNormFp32:
        for part in visual.modules():
            if isinstance(part, LayerNormFp32 | LayerNorm):
                part.float()
        visual.attn_pool.ln_q = randomise(LayerNormFp32(20), 1)
        visual.attn_pool.ln_k = randomise(LayerNormFp32(32), 2)
    images = pixels(visual, dtype=dtype)
    assert wrap(visual).verify(images).ok
    assert relative_error(wrap(visual).decompose(images).embedding, own(visual, images)) <= 3e-2


# --------------------------------------------------------------------------------------------------- term by term


def heard(module: nn.Module, visual: nn.Module, images: torch.Tensor) -> Any:
    """What a module of the tower reads and gives."""
    kept: list[Any] = []
    handle = module.register_forward_hook(lambda _, inputs, output: kept.append((inputs, output)))
    own(visual, images)
    handle.remove()
    return kept[0]


def test_heads_and_positions_of_a_resnet() -> None:
    visual = resnet(torch.float64)
    images = pixels(visual, dtype=torch.float64)
    (features,), embedding = heard(visual.attnpool, visual, images)
    pool = visual.attnpool
    x = features.flatten(2).mT
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding
    query, key, value = (layer(x).unflatten(-1, (4, -1)).detach() for layer in (pool.q_proj, pool.k_proj, pool.v_proj))
    weights = (torch.einsum("bhe,bnhe->bhn", query[:, 0], key) / query.shape[-1] ** 0.5).softmax(-1)
    out = pool.c_proj.weight.detach().unflatten(1, (4, -1))
    parts = torch.einsum("bhn,bnhe,dhe->bnhd", weights, value, out)  # [B, N, H, D]
    assert error((parts.sum((1, 2)) + pool.c_proj.bias).detach(), embedding.detach()) <= FLOAT64
    share = pool.c_proj.bias / 4
    contributions = wrap(visual).decompose(
        images, attention=True, tokens=True, texts=torch.eye(20, dtype=torch.float64)
    )
    norm = embedding.norm(dim=-1)
    expected = (parts.sum(1) + share) / norm[:, None, None]
    assert contributions.heads().shape == (2, 1, 4, 20)
    assert error(contributions.heads()[:, 0], expected.detach()) <= FLOAT64
    assert error(contributions.attention[:, 0], weights) <= FLOAT64
    by_token = (parts + share / 5) / norm[:, None, None, None]
    assert error(contributions.tokens(0), by_token.detach()) <= FLOAT64
    assert error(contributions.maps, by_token.sum(2).detach()) <= FLOAT64
    assert contributions.patch_maps().shape == (2, 2, 2, 20)


def test_heads_of_cocas_pooler() -> None:
    visual = vision_tower(dtype=torch.float64, **COCA)
    images = pixels(visual, dtype=torch.float64)
    (x,), pooled = heard(visual.attn_pool, visual, images)
    pool = visual.attn_pool
    attn, normed = pool.attn, pool.ln_k(x)
    biases = attn.in_proj_bias.chunk(3)
    query = F.linear(pool.ln_q(pool.query[:1]), attn.q_proj_weight, biases[0]).unflatten(-1, (2, -1))[0]
    key = F.linear(normed, attn.k_proj_weight, biases[1]).unflatten(-1, (2, -1))
    value = F.linear(normed, attn.v_proj_weight, biases[2]).unflatten(-1, (2, -1))
    weights = (torch.einsum("he,bnhe->bhn", query, key) / query.shape[-1] ** 0.5).softmax(-1)
    heads = torch.einsum("bhn,bnhe,whe->bhw", weights, value, attn.out_proj.weight.unflatten(1, (2, -1)))
    row = pooled[:, 0]
    assert error((heads.sum(1) + attn.out_proj.bias).detach(), row.detach()) <= FLOAT64
    last, mean, std = visual.ln_post, row.mean(-1), (row.var(-1, unbiased=False) + visual.ln_post.eps).sqrt()
    embedding = last(row) @ visual.proj
    parts = heads + attn.out_proj.bias / 2 - mean[:, None, None] / 2
    expected = (
        (parts / std[:, None, None] * last.weight + last.bias / 2) @ visual.proj / embedding.norm(dim=-1)[:, None, None]
    )
    contributions = wrap(visual).decompose(images, attention=True)
    assert error(contributions.embedding, embedding.detach()) <= FLOAT64
    assert error(contributions.attention[:, 0], weights.detach()) <= FLOAT64
    assert error(contributions.heads()[:, 0].sum(1), expected.detach().sum(1)) <= FLOAT64


# --------------------------------------------------------------------------------------------------------- whole models


def test_a_whole_coca() -> None:
    config = {"context_length": 15, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "embed_cls": True}
    vision = {"image_size": 24, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2, "mlp_ratio": 2.0}
    clip = open_clip.coca_model.CoCa(
        20,
        multimodal_cfg={"context_length": 15, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        text_cfg={**config, "output_tokens": True},
        vision_cfg=vision | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    )
    clip = randomise(clip, 0).eval()
    images = pixels(clip.visual)
    model = wrap(clip)
    contributions = model.decompose(images, texts=["a forest"])
    with torch.no_grad():
        expected = clip.encode_image(images)
        texts = clip.encode_text(model.tokenize(["a forest"]))
    assert error(F.normalize(contributions.embedding, dim=-1), expected) <= SUM_FLOAT32
    assert error(model.encode_text(["a forest"]), texts) <= SUM_FLOAT32
    assert contributions.maps.shape == (2, 10, 1)
    clip.encode_image = lambda images: images
    with pytest.raises(UnsupportedTower, match=r"CoCa\.encode_image"):
        wrap(clip)
