"""The parts of transformers' vision transformers under one name each, whatever their layout and version.

Three layouts are read: that of CLIP, that of SigLIP (no class token, an attention pool) and that of ViT. Within them
the names of layers differ between classes, and between the versions of transformers since 4.57.
"""

from functools import partial
from math import isqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipfast.errors import InputError
from clipfast.towers.tower import Activation, AttentionPool, Block, LayerNorm, Linear, Pooling, PoolMlp, Rotary

CLIP_LIKE = (
    *(f"{family}{kind}" for family in ("CLIP", "MetaClip2") for kind in ("VisionModel", "VisionModelWithProjection")),
    *(f"{family}{kind}" for family in ("AltCLIP", "ChineseCLIP") for kind in ("VisionModel",)),
    *("CLIPModel", "MetaClip2Model", "AltCLIPModel", "ChineseCLIPModel"),
    "CLIPVisionTransformer",  # before transformers 5
)
SIGLIP_LIKE = (
    *(f"{family}{kind}" for family in ("Siglip", "Siglip2") for kind in ("Model", "VisionModel")),
    *("SiglipVisionTransformer", "Siglip2VisionTransformer"),  # before transformers 5
)
VIT_LIKE = (
    *("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"),
    *("ViTModel", "DeiTModel", "ViTMSNModel", "IJepaModel"),
)
"""Classes that are read, by layout."""

CLASSES = (*CLIP_LIKE, *SIGLIP_LIKE, *VIT_LIKE)
"""Classes that are read."""

_ACTIVATIONS: dict[str, Activation] = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",  # before transformers 5
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
}
"""Classes of ``transformers.activations``."""


class Parts:
    """The parts of a vision transformer.

    Attributes:
        vision: all of it.
        start: its output is the start of the residual stream.
        patches: the convolution over patches, or the linear layer of patches that are given as rows.
        class_embedding: ``[W]``, None for none.
        registers: tokens between it and the patches, ``[registers, W]``.
        position_table: of ``image_size``, ``[positions, W]``; None for rotary positions.
        rope: the module of rotary positions, None for none.
        head: SigLIP's attention pool, None for none.
        image_size: of the images that the positions are for, height and width.
        takes_patches: the forward takes patches as rows with the shape of their grid (SigLIP 2, NaFlex).
    """

    def __init__(self, vision: Any) -> None:
        self.vision: nn.Module = vision
        embeddings = vision.embeddings
        encoder = first(vision, "encoder", "model") or vision
        self._embeddings = embeddings
        self._always_interpolates = type(embeddings).__name__.startswith("Dinov2")  # also from a rectangular grid
        self.layers: list[Any] = list(first(encoder, "layers", "layer"))
        self.is_clip = hasattr(embeddings, "class_embedding")
        self.ln_pre: Any = getattr(vision, "pre_layrnorm", None)
        self.ln_post: Any = first(vision, "post_layernorm", "layernorm", "norm")
        self.start: Any = embeddings if self.ln_pre is None else self.ln_pre
        self.rope: Any = getattr(vision, "rope_embeddings", None)
        self.head: Any = getattr(vision, "head", None)
        patches = first(embeddings, "patch_embedding", "patch_embeddings")
        self.patches: Any = getattr(patches, "projection", patches)
        self.takes_patches = hasattr(embeddings, "position_embedding_size")
        self.class_embedding: Tensor | None = getattr(embeddings, "class_embedding", None)
        if hasattr(embeddings, "cls_token"):
            self.class_embedding = embeddings.cls_token[0, 0]
        registers = first(embeddings, "register_tokens", "distillation_token")
        self.registers: Tensor | None = None if registers is None or not registers.shape[1] else registers[0]
        table = first(embeddings, "position_embedding", "position_embeddings")
        self.position_table: Tensor | None = getattr(table, "weight", table)
        if self.position_table is not None and self.position_table.ndim == 3:
            self.position_table = self.position_table[0]
        if self.takes_patches:
            self.patch_size = pair(embeddings.patch_size)
            side = isqrt(embeddings.num_patches)
            self.image_size = (side * self.patch_size[0], side * self.patch_size[1])
        else:
            self.patch_size = pair(getattr(self.patches, "base_layer", self.patches).kernel_size)  # within peft's LoRA
            size = first(embeddings, "image_size") or getattr(patches, "image_size", None) or vision.config.image_size
            self.image_size = pair(size)

    @property
    def pooling(self) -> Pooling:
        """Where there is neither a class token nor a pool, the embedding is the mean of ``last_hidden_state``."""
        if self.head is not None:
            return "attention"
        return "normed_mean" if self.class_embedding is None else "cls"

    @property
    def patch_weight(self) -> Tensor:
        """``[W, 3, height, width]``; rows of patches hold the colours of a pixel side by side."""
        weight: Tensor = self.patches.weight
        return weight.unflatten(1, (*self.patch_size, 3)).permute(0, 3, 1, 2) if self.takes_patches else weight

    def positions(self, image_size: tuple[int, int]) -> Tensor | None:
        """Positions for images of a size, ``[positions, W]``, interpolated by the module's own method.

        Raises:
            InputError: images smaller than a patch, or of SigLIP 2 (NaFlex) not divided into patches evenly.
        """
        rows, columns = self._grid(image_size)
        if self.position_table is None:
            return None
        table, own = self.position_table, type(self._embeddings)
        if self.takes_patches:
            if image_size == self.image_size and table.dtype is not torch.float64:  # which it rounds to float32
                return table
            shapes = torch.tensor([[rows, columns]], device=table.device)
            square = table.unflatten(0, (isqrt(len(table)), -1))
            return cast(Tensor, own.resize_positional_embeddings(square, shapes, rows * columns)[0])
        if image_size == self.image_size and not self._always_interpolates:
            return table
        high, wide = self._grid(self.image_size)
        tokens = table.new_empty(1, len(table) - high * wide + rows * columns, table.shape[1])  # read for its shape
        return cast(Tensor, own.interpolate_pos_encoding(self._embeddings, tokens, *image_size)[0])

    def _grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        (height, width), (high, wide) = image_size, self.patch_size
        if height < high or width < wide:
            raise InputError(f"images of {height} × {width} pixels are smaller than a patch, {high} × {wide}")
        if self.takes_patches and (height % high or width % wide):
            raise InputError(f"images of {height} × {width} pixels are not whole patches of {high} × {wide}")
        return height // high, width // wide

    def rotary(self, image_size: tuple[int, int]) -> Rotary | None:
        """Rotary positions of the patches of images of a size."""
        if self.rope is None:
            return None
        pixels = self.patches.weight.new_empty(1).expand(1, 3, *image_size)  # read for its shape and dtype
        cos, sin = type(self.rope).forward(self.rope, pixels)
        return Rotary(cos[None], sin[None], halves=True)

    @property
    def has_random_positions(self) -> bool:
        """Whether rotary positions are moved at random, as in training mode."""
        changes = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
        return self.rope is not None and self.rope.training and first(self.rope.config, *changes) is not None

    def pool(self) -> AttentionPool | None:
        """SigLIP's attention pool, its query projected."""
        if self.head is None:
            return None
        attention, mlp = self.head.attention, self.head.mlp
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        return AttentionPool(
            query=nn.functional.linear(self.head.probe[0, 0], weights[0], biases[0]),
            key_weight=weights[1],
            key_bias=biases[1],
            value_weight=weights[2],
            value_bias=biases[2],
            out_weight=attention.out_proj.weight,
            out_bias=attention.out_proj.bias,
            heads=attention.num_heads,
            mlp=PoolMlp(
                norm=norm(self.head.layernorm),
                in_weight=mlp.fc1.weight,
                in_bias=mlp.fc1.bias,
                out_weight=mlp.fc2.weight,
                out_bias=mlp.fc2.bias,
                activation=cast(Activation, activation(mlp.activation_fn)),
            ),
        )

    def sources(self, positions: Tensor | None) -> tuple[Tensor, ...]:
        """Parameters that tensors of the tower are computed from.

        The patches' weight stands for all others where zeros or tables are made, which follow its dtype and device.
        """
        sources: list[Tensor] = []
        made = self.takes_patches or self.rope is not None or any(Layer(layer).lacks_biases for layer in self.layers)
        if made:
            sources.append(self.patches.weight)
        if self.rope is not None:
            sources.append(self.rope.inv_freq)
        table = self.position_table
        if table is not None and positions is not None and positions.data_ptr() != table.data_ptr():
            sources.append(table)
        if self.head is not None:
            sources += [self.head.probe, self.head.attention.in_proj_weight, self.head.attention.in_proj_bias]
        return tuple(sources)


class Layer:
    """The parts of one layer: linear layers by name, norms, scales.

    Attributes:
        gate: of a gated MLP. Where one layer packs it with ``mlp_in``, ``packed`` is that layer and both are None.
    """

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
        inner = getattr(attention, "attention", attention)  # before transformers 5
        self.query, self.key, self.value = (first(inner, short, long) for short, long in _PROJECTIONS)
        self.out: Any = first(attention, "out_proj", "o_proj") or attention.output.dense
        self.heads = int(first(inner, "num_heads", "num_attention_heads"))
        self.head_dim: int | None = first(inner, "head_dim", "attention_head_size")
        self.is_causal = bool(getattr(inner, "is_causal", False))
        self.scale = float(first(inner, "scaling", "scale", "attention_scale") or 0)  # of logits, 0 for none named
        self.ln_1: Any = first(layer, "layer_norm1", "norm1", "layernorm_before")
        self.ln_2: Any = first(layer, "layer_norm2", "norm2", "layernorm_after")
        mlp: Any = getattr(layer, "mlp", None)
        old = mlp is None  # ViT's, before transformers 5
        self.mlp_in: Any = layer.intermediate.dense if old else first(mlp, "fc1", "up_proj")
        self.mlp_out: Any = layer.output.dense if old else first(mlp, "fc2", "down_proj", "weights_out")
        self.gate: Any = None if old else first(mlp, "gate_proj")
        self.packed: Any = None if old else first(mlp, "weights_in")  # of Dinov2, before transformers 5
        of = layer.intermediate if old else mlp
        self.activation: Any = first(of, "activation_fn", "activation", "intermediate_act_fn", "act_fn")
        if self.packed is not None:
            self.activation = nn.functional.silu
        self.scales = tuple(getattr(getattr(layer, f"layer_scale{i}", None), "lambda1", None) for i in (1, 2))

    def linears(self) -> dict[str, Any]:
        """The layers that multiply, by name."""
        names = ("query", "key", "value", "out", "mlp_in", "mlp_out", "gate", "packed")
        found = {name: getattr(self, name) for name in names}
        return {name: linear for name, linear in found.items() if linear is not None}

    @property
    def lacks_biases(self) -> bool:
        """Whether zeros stand for a bias."""
        return any(linear.bias is None for linear in (self.out, self.mlp_in or self.packed, self.mlp_out))

    def block(self, rotary: Rotary | None) -> Block:
        """The same as plain tensors."""
        projections = (self.query, self.key, self.value)
        query, key, value = (Linear(each.weight, each.bias) for each in projections)
        gate, mlp_in = self._mlp_in()
        return Block(
            ln_1=norm(self.ln_1),
            in_weight=(query.weight, key.weight, value.weight),
            in_bias=(query.bias, key.bias, value.bias),
            out_weight=self.out.weight,
            out_bias=_bias(self.out),
            attention_scale=self.scales[0],
            ln_2=norm(self.ln_2),
            mlp_in_weight=mlp_in.weight,
            mlp_in_bias=_bias(mlp_in),
            mlp_out_weight=self.mlp_out.weight,
            mlp_out_bias=_bias(self.mlp_out),
            mlp_scale=self.scales[1],
            mlp_gate_weight=None if gate is None else gate.weight,
            mlp_gate_bias=None if gate is None else gate.bias,
            rotary=rotary,
        )

    def _mlp_in(self) -> tuple[Linear | None, Linear]:
        """Gate, if there is one, and input layer of the MLP."""
        if self.packed is None:
            gate = None if self.gate is None else Linear(self.gate.weight, self.gate.bias)
            return gate, Linear(self.mlp_in.weight, self.mlp_in.bias)
        weights, biases = self.packed.weight.chunk(2), (None, None)
        if self.packed.bias is not None:
            biases = self.packed.bias.chunk(2)
        return Linear(weights[0], biases[0]), Linear(weights[1], biases[1])


_PROJECTIONS = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))


def _bias(linear: Any) -> Tensor:
    bias: Tensor | None = linear.bias
    return linear.weight.new_zeros(len(linear.weight)) if bias is None else bias


def first(module: Any, *names: str) -> Any:
    """The first of these attributes that there is and is not None; None for none."""
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)


def norm(module: Any) -> LayerNorm:
    """A LayerNorm as plain tensors."""
    return LayerNorm(module.weight, module.bias, module.eps)


def pair(size: Any) -> tuple[int, int]:
    """Height and width of a size that may be given as one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _is_gelu_tanh(act: Any, kind: type) -> bool:
    """Whether what an activation of that class calls is the one it is made with."""
    if act is None:  # the class computes it by itself
        return True
    if isinstance(act, partial):
        return act.func is nn.functional.gelu and act.keywords == {"approximate": "tanh"}
    return getattr(act, "__func__", act) is getattr(kind, "_gelu_tanh_python", kind)


def activation(function: Any) -> Activation | None:
    """The name of an activation of transformers, None for one that is not read."""
    if type(function).__module__ == "transformers.activations":
        name = _ACTIVATIONS.get(type(function).__name__)
        own = getattr(type(function), "_gelu_python", None)
        if name == "gelu" and getattr(function.act, "__func__", function.act) not in (nn.functional.gelu, own):
            return None
        if name == "gelu_tanh" and not _is_gelu_tanh(getattr(function, "act", None), type(function)):
            return None
        return name
    if type(function) is nn.SiLU or function is nn.functional.silu:
        return "silu"
    return "gelu" if function is nn.functional.gelu else None
