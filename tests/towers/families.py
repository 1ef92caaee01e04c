"""One model of every family, random and in float64, with what :mod:`hooked` needs to know of it."""

from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers
from builders import randomise
from hooked import Hooked, Layer, Tokens, frozen_norm
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

Read = Callable[[Tensor], tuple[Tokens, Tensor | None]]


def made(module: nn.Module, seed: int = 0) -> Any:
    """A model, random, in float64."""
    return randomise(module, seed).double().eval()


def project(projection: Any) -> Tokens:
    """A linear layer, a matrix ``[W, D]`` or nothing."""
    if projection is None or isinstance(projection, nn.Identity):
        return lambda y: y
    if isinstance(projection, Tensor):
        return lambda y: y @ projection
    return lambda y: nn.functional.linear(y, projection.weight, projection.bias)


def row(norm: Any, projection: Any = None) -> Read:
    """The class token's row."""
    return lambda x: ((lambda n: lambda y: project(projection)(n(y[:, 0])))(frozen_norm(norm, x[:, 0])), None)


def mean(norm: Any, first: int, projection: Any = None) -> Read:
    """The mean of the tokens from ``first`` on, before the norm."""

    def read(x: Tensor) -> tuple[Tokens, None]:
        normed = frozen_norm(norm, x[:, first:].mean(1))
        return (lambda y: project(projection)(normed(y[:, first:].mean(1)))), None

    return read


def normed_mean(norm: Any, first: int, projection: Any = None) -> Read:
    """The mean of the tokens' norms."""

    def read(x: Tensor) -> tuple[Tokens, None]:
        normed = frozen_norm(norm, x)
        return (lambda y: project(projection)(normed(y)[:, first:].mean(1))), None

    return read


def attention(
    norm: Any,
    query: Tensor,
    key: tuple[Tensor, Tensor],
    value: tuple[Tensor, Tensor],
    out: nn.Linear,
    heads: int,
    *,
    mlp: Callable[[Tensor], Tensor] | None = None,
    post: Any = None,
    projection: Any = None,
) -> Read:
    """What a learned query reads of the tokens' norms, with its attention weights frozen."""

    def read(x: Tensor) -> tuple[Tokens, Tensor | None]:
        normed = frozen_norm(norm, x)
        keys = nn.functional.linear(normed(x), *key).unflatten(-1, (heads, -1))
        weights = (torch.einsum("he,bnhe->bhn", query.view(heads, -1), keys) * keys.shape[-1] ** -0.5).softmax(-1)

        def pooled(y: Tensor) -> Tensor:
            values = nn.functional.linear(normed(y), *value).unflatten(-1, (heads, -1))
            return out(torch.einsum("bhn,bnhe->bhe", weights, values).flatten(1))

        added = None if mlp is None else mlp(pooled(x))
        last = frozen_norm(post, pooled(x) if added is None else pooled(x) + added)

        def embedded(o: Tensor) -> Tensor:
            return project(projection)(last(o))

        other = None if added is None else embedded(added) - embedded(torch.zeros_like(added))
        return (lambda y: embedded(pooled(y))), other

    return read


def _hf_layers(blocks: Any, *, attention: str) -> list[Layer]:
    layers = []
    for block in blocks:
        attn = getattr(block, attention)
        out = attn.out_proj if hasattr(attn, "out_proj") else attn.o_proj
        scales = [getattr(getattr(block, f"layer_scale{i}", None), "lambda1", 1.0) for i in (1, 2)]
        layers.append(Layer(block, out, block.mlp, *scales))
    return layers


_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}


def clip() -> Hooked:
    config = transformers.CLIPVisionConfig(**_SIZES, intermediate_size=64, projection_dim=20)
    model = made(transformers.CLIPVisionModelWithProjection(config))
    vision = model.vision_model
    layers = _hf_layers(vision.encoder.layers, attention="self_attn")
    read = row(vision.post_layernorm, model.visual_projection)
    return Hooked(model, layers, 2, read, lambda images: model(images).image_embeds)


def dinov2_with_registers() -> Hooked:
    config = transformers.Dinov2WithRegistersConfig(**_SIZES, num_register_tokens=3)
    model = made(transformers.Dinov2WithRegistersModel(config))
    layers = _hf_layers(model.encoder.layer, attention="attention")
    return Hooked(model, layers, 2, row(model.layernorm), lambda images: model(images).last_hidden_state[:, 0])


def dinov2_giant() -> Hooked:
    """A gated MLP, packed."""
    model = made(transformers.Dinov2Model(transformers.Dinov2Config(**_SIZES, use_swiglu_ffn=True)))
    layers = _hf_layers(model.encoder.layer, attention="attention")
    return Hooked(model, layers, 2, row(model.layernorm), lambda images: model(images).last_hidden_state[:, 0])


def dinov3() -> Hooked:
    config = transformers.DINOv3ViTConfig(**_SIZES, intermediate_size=64, num_register_tokens=3, use_gated_mlp=True)
    model = made(transformers.DINOv3ViTModel(config))
    layers = _hf_layers(model.model.layer, attention="attention")
    return Hooked(model, layers, 2, row(model.norm), lambda images: model(images).pooler_output)


def ijepa() -> Hooked:
    model = made(transformers.IJepaModel(transformers.IJepaConfig(**_SIZES, intermediate_size=64)))
    layers = _hf_layers(model.layers, attention="attention")
    read = normed_mean(model.layernorm, 0)
    return Hooked(model, layers, 2, read, lambda images: model(images).last_hidden_state.mean(1))


def siglip() -> Hooked:
    model = made(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_SIZES, intermediate_size=64)))
    head = model.head
    weights, biases = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
    read = attention(
        model.post_layernorm,
        nn.functional.linear(head.probe[0, 0], weights[0], biases[0]),
        (weights[1], biases[1]),
        (weights[2], biases[2]),
        head.attention.out_proj,
        2,
        mlp=lambda o: head.mlp(head.layernorm(o)),
    )
    layers = _hf_layers(model.encoder.layers, attention="self_attn")
    return Hooked(model, layers, 2, read, lambda images: model(images).pooler_output)


def timm_layers(model: Any, *, post_norm: bool = False) -> list[Layer]:
    """The blocks of a transformer of timm."""
    layers = []
    for block in model.blocks:
        attn = block.attn
        scales = [
            value
            for i in (1, 2)
            for value in [getattr(block, f"gamma_{i}", None), getattr(getattr(block, f"ls{i}", None), "gamma", None)]
            if value is not None
        ] or [1.0, 1.0]
        norm = getattr(attn, "norm", None)
        inner = None if norm is None or isinstance(norm, nn.Identity) else norm
        after = (block.norm1, block.norm2) if post_norm else (None, None)
        layers.append(Layer(block, attn.proj, block.mlp, scales[0], scales[1], inner, *after))
    return layers


TIMM = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def eva02() -> Hooked:
    """Rotary positions, a norm before the output projection, a gated MLP with a norm in it."""
    model = made(
        timm.models.eva.Eva(
            **TIMM,
            num_classes=20,
            global_pool="token",
            qkv_fused=False,
            mlp_ratio=4 * 2 / 3,
            swiglu_mlp=True,
            scale_mlp=True,
            scale_attn_inner=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(3, 3),
        )
    )
    return Hooked(model, timm_layers(model), 2, row(model.norm, model.head), model)


def eva_post_norm() -> Hooked:
    """A norm after the attention and after the MLP, as in EVA02-CLIP E."""
    model = made(timm.models.eva.Eva(**TIMM, num_classes=20, global_pool="token", use_post_norm=True))
    return Hooked(model, timm_layers(model, post_norm=True), 2, row(model.norm, model.head), model)


def eva_post_norm_mean() -> Hooked:
    """The same with a mean of the patches and a norm before the output projection: every token's own statistics."""
    model = made(
        timm.models.eva.Eva(
            **TIMM, num_classes=20, global_pool="avg", use_post_norm=True, scale_attn_inner=True, qkv_fused=False
        )
    )
    return Hooked(
        model, timm_layers(model, post_norm=True), 2, mean(model.fc_norm, model.num_prefix_tokens, model.head), model
    )


def timm_gap() -> Hooked:
    """A mean before the final norm, registers, norms of queries and keys, layer scale."""
    model = made(
        timm.models.vision_transformer.VisionTransformer(
            **TIMM, num_classes=20, global_pool="avg", reg_tokens=2, class_token=False, qk_norm=True, init_values=0.5
        )
    )
    assert not isinstance(model.fc_norm, nn.Identity)
    return Hooked(model, timm_layers(model), 2, mean(model.fc_norm, 2, model.head), model)


def timm_normed_mean() -> Hooked:
    """A mean of final norms, and a norm before the output projection."""
    model = made(
        timm.models.vision_transformer.VisionTransformer(
            **TIMM, num_classes=20, global_pool="avg", fc_norm=False, scale_attn_norm=True
        )
    )
    return Hooked(model, timm_layers(model), 2, normed_mean(model.norm, 1, model.head), model)


def timm_map() -> Hooked:
    """SigLIP as timm has it."""
    model = made(
        timm.models.vision_transformer.VisionTransformer(
            **TIMM, num_classes=0, global_pool="map", class_token=False, scale_attn_norm=True
        )
    )
    pool = model.attn_pool
    (key, value), (key_bias, value_bias) = pool.kv.weight.chunk(2), pool.kv.bias.chunk(2)
    read = attention(
        model.norm,
        pool.q(pool.latent[0, 0]),
        (key, key_bias),
        (value, value_bias),
        pool.proj,
        2,
        mlp=lambda o: pool.mlp(pool.norm(o)),
    )
    return Hooked(model, timm_layers(model), 2, read, model)


def coca() -> Hooked:
    """open_clip's CoCa: the pool has a norm before and one after; blocks whose output projection is called."""
    model = made(
        VisionTransformer(
            image_size=24,
            patch_size=8,
            width=32,
            layers=3,
            heads=2,
            mlp_ratio=2,
            output_dim=20,
            attentional_pool=True,
            attn_pooler_queries=4,
            attn_pooler_heads=2,
            block_type="custom",
        )
    )
    pool = model.attn_pool
    biases = pool.attn.in_proj_bias.chunk(3)
    read = attention(
        pool.ln_k,
        nn.functional.linear(pool.ln_q(pool.query[0]), pool.attn.q_proj_weight, biases[0]),
        (pool.attn.k_proj_weight, biases[1]),
        (pool.attn.v_proj_weight, biases[2]),
        pool.attn.out_proj,
        2,
        post=model.ln_post,
        projection=model.proj,
    )
    layers = [Layer(block, block.attn.out_proj, block.mlp) for block in model.transformer.resblocks]
    return Hooked(model, layers, 2, read, lambda images: _first(model(images)))


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


FAMILIES: dict[str, Callable[[], Hooked]] = {
    make.__name__: make
    for make in (
        *(clip, dinov2_with_registers, dinov2_giant, dinov3, ijepa, siglip),
        *(eva02, eva_post_norm, eva_post_norm_mean, timm_gap, timm_normed_mean, timm_map, coca),
    )
}
