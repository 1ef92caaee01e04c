"""More of timm's models for :mod:`hooked`: relative positions, several norms or classifiers, stems, parallel blocks."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from families import TIMM, Read, attention, made, mean, normed_mean, project, row, timm_layers
from hooked import Hooked, Layer, Tokens, frozen_norm
from timm.models import vision_transformer as vits
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn


def two_norms(norm: Any, after: Any, first: int, last: int | None, projection: Any) -> Read:
    """The mean of some tokens' norms, and a norm after it."""

    def read(x: Tensor) -> tuple[Tokens, None]:
        normed = frozen_norm(norm, x)
        again = frozen_norm(after, normed(x)[:, first:last].mean(1))
        return (lambda y: project(projection)(again(normed(y)[:, first:last].mean(1)))), None

    return read


def two_classifiers(norm: Any, heads: tuple[Any, Any]) -> Read:
    """The mean of what two classifiers give for two tokens."""

    def read(x: Tensor) -> tuple[Tokens, None]:
        normed = frozen_norm(norm, x)
        return (lambda y: sum(project(head)(normed(y)[:, i]) for i, head in enumerate(heads)) / 2), None

    return read


def pool(model: Any, *, post: Any = None) -> Read:
    """timm's attention pool of all tokens."""
    pool = model.attn_pool
    (key, value), (key_bias, value_bias) = pool.kv.weight.chunk(2), pool.kv.bias.chunk(2)
    query, heads = pool.q(pool.latent[0, 0]), pool.num_heads
    mlp, projection = (lambda o: pool.mlp(pool.norm(o))), model.head
    pair, values = (key, key_bias), (value, value_bias)
    return attention(model.norm, query, pair, values, pool.proj, heads, mlp=mlp, post=post, projection=projection)


def relpos_class_token() -> Hooked:
    """A table of relative positions per block."""
    model = made(
        VisionTransformerRelPos(**TIMM, num_classes=20, class_token=True, global_pool="token", rel_pos_type="bias")
    )
    return Hooked(model, timm_layers(model), 2, row(model.norm, model.head), model)


def relpos_mean() -> Hooked:
    """Relative positions by an MLP that all blocks share."""
    model = made(VisionTransformerRelPos(**TIMM, num_classes=20, shared_rel_pos=True, fc_norm=True))
    return Hooked(model, timm_layers(model), 2, mean(model.fc_norm, 0, model.head), model)


def relpos_normed_mean() -> Hooked:
    model = made(VisionTransformerRelPos(**TIMM, num_classes=20, class_token=True))
    return Hooked(model, timm_layers(model), 2, normed_mean(model.norm, 1, model.head), model)


def beit() -> Hooked:
    model = made(Beit(**TIMM, num_classes=20, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1))
    return Hooked(model, timm_layers(model), 2, mean(model.fc_norm, 1, model.head), model)


def deit_distilled() -> Hooked:
    model = made(VisionTransformerDistilled(**TIMM, num_classes=20))
    read = two_classifiers(model.norm, (model.head, model.head_dist))
    return Hooked(model, timm_layers(model), 2, read, model)


def norm_mean_norm() -> Hooked:
    model = made(Eva(**TIMM, num_classes=20, use_post_transformer_norm=True, use_fc_norm=True))
    read = two_norms(model.norm, model.fc_norm, 1, None, model.head)
    return Hooked(model, timm_layers(model), 2, read, model)


def norm_token_norm() -> Hooked:
    model = made(Eva(**TIMM, num_classes=20, use_post_transformer_norm=True, use_fc_norm=True, global_pool="token"))
    read = two_norms(model.norm, model.fc_norm, 0, 1, model.head)
    return Hooked(model, timm_layers(model), 2, read, model)


def pe_core() -> Hooked:
    """Rotary positions, a class token, a norm before the blocks, an attention pool with an MLP, a classifier."""
    sizes = {**TIMM, "attn_pool_num_heads": 4, "ref_feat_shape": (3, 3)}
    model = made(timm.create_model("vit_pe_core_base_patch16_224", **sizes, num_classes=20))
    return Hooked(model, timm_layers(model), 2, pool(model), model)


def pool_mlp_norm() -> Hooked:
    """A norm after the MLP of an attention pool."""
    model = made(
        Eva(
            **TIMM,
            num_classes=20,
            global_pool="map",
            attn_pool_mlp_ratio=2.0,
            use_post_transformer_norm=True,
            use_fc_norm=True,
        )
    )
    return Hooked(model, timm_layers(model), 2, pool(model, post=model.fc_norm), model)


def post_norm_pool() -> Hooked:
    """Norms before and after the output projection, and an attention pool that reads what they give."""
    model = made(
        Eva(
            **TIMM,
            num_classes=20,
            global_pool="map",
            attn_pool_mlp_ratio=2.0,
            use_post_norm=True,
            scale_attn_inner=True,
            qkv_fused=False,
            use_post_transformer_norm=True,
        )
    )
    return Hooked(model, timm_layers(model, post_norm=True), 2, pool(model), model)


def scaled_pool() -> Hooked:
    """Layer scale before an attention pool, whose classifier follows a norm."""
    model = made(
        vits.VisionTransformer(
            **TIMM, num_classes=20, global_pool="map", class_token=False, init_values=0.5, fc_norm=True, final_norm=True
        )
    )
    return Hooked(model, timm_layers(model), 2, pool(model, post=model.fc_norm), model)


def several_queries() -> Hooked:
    """The mean of what three queries and their MLP give."""
    model = made(vits.VisionTransformer(**TIMM, num_classes=20, global_pool="map", class_token=False))
    settings = {"num_heads": 4, "latent_len": 3, "pool_type": "avg", "norm_layer": timm.layers.LayerNorm}
    model.attn_pool = pool = made(timm.layers.AttentionPoolLatent(32, **settings))

    def read(x: Tensor) -> tuple[Tokens, Tensor]:
        normed = frozen_norm(model.norm, x)
        keys = pool.kv(normed(x)).unflatten(-1, (2, 4, -1))[:, :, 0]
        query = pool.q(pool.latent[0]).unflatten(-1, (4, -1))
        weights = (torch.einsum("qhe,bnhe->bqhn", query, keys) * keys.shape[-1] ** -0.5).softmax(-1)

        def each(y: Tensor) -> Tensor:
            values = pool.kv(normed(y)).unflatten(-1, (2, 4, -1))[:, :, 1]
            return pool.proj(torch.einsum("bqhn,bnhe->bqhe", weights, values).flatten(2))

        added = pool.mlp(pool.norm(each(x))).mean(1)
        return (lambda y: model.head(each(y).mean(1))), added @ model.head.weight.T

    return Hooked(model, timm_layers(model), 2, read, model)


def refined_patches() -> Hooked:
    """The mean of what all tokens read of each other, without weights."""
    model = made(vits.VisionTransformer(**TIMM, num_classes=20, global_pool="prr", class_token=False, reg_tokens=1))

    def read(x: Tensor) -> tuple[Tokens, None]:
        normed = frozen_norm(model.norm, x)
        tokens = normed(x).unflatten(-1, (2, -1))
        logits = torch.einsum("bqhe,bnhe->bhqn", tokens, tokens) * tokens.shape[-1] ** -0.5
        weights = logits.softmax(-1).mean(2)

        def pooled(y: Tensor) -> Tensor:
            return torch.einsum("bhn,bnhe->bhe", weights, normed(y).unflatten(-1, (2, -1))).flatten(1)

        return (lambda y: model.head(pooled(y))), None

    return Hooked(model, timm_layers(model), 2, read, model)


def aimv2() -> Hooked:
    """RMS norms, gated MLPs, no biases, and a norm after the convolution."""
    model = made(timm.create_model("aimv2_large_patch14_224", **TIMM, num_classes=20))
    return Hooked(model, timm_layers(model), 2, normed_mean(model.norm, 0, model.head), model)


def parallel_scaling() -> Hooked:
    """Attention and MLP that read one norm."""
    model = made(
        vits.VisionTransformer(
            **TIMM, num_classes=20, block_fn=vits.ParallelScalingBlock, qk_norm=True, init_values=0.5
        )
    )
    layers = [
        Layer(block, block.attn_out_proj, block.mlp_out_proj, block.ls.gamma, block.ls.gamma) for block in model.blocks
    ]
    return Hooked(model, layers, 2, row(model.norm, model.head), model)


@torch.no_grad()
def convolutional_stem() -> Hooked:
    """Several convolutions with batch norms before the blocks, as in MobileCLIP-B."""
    stem = ConvStem(channels=(8, 8, 32), stride=(2, 2, 2), kernel_size=2, padding=0, act_layer=nn.GELU)

    def embed(**settings: Any) -> HybridEmbed:
        return HybridEmbed(stem, proj=False, **{**settings, "patch_size": 1})

    model = made(vits.VisionTransformer(**TIMM, num_classes=20, embed_layer=embed, no_embed_class=True))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(torch.linspace(0.5, 2.0, len(buffer)))
    return Hooked(model, timm_layers(model), 2, row(model.norm, model.head), model)


@torch.no_grad()
def convnext() -> tuple[Any, Read]:
    """A network without blocks, and the way from its last feature map ``[B, N, W]`` to the embedding."""
    model = made(timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 24), num_classes=20))
    return model, mean(model.head.norm, 0, model.head.fc)


TIMM_FAMILIES: dict[str, Callable[[], Hooked]] = {
    make.__name__: make
    for make in (
        *(relpos_class_token, relpos_mean, relpos_normed_mean, beit, deit_distilled, norm_mean_norm, norm_token_norm),
        *(
            pe_core,
            pool_mlp_norm,
            post_norm_pool,
            scaled_pool,
            several_queries,
            refined_patches,
            aimv2,
            parallel_scaling,
            convolutional_stem,
        ),
    )
}
