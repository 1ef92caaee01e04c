"""Blocks of timm's vision transformers as plain tensors."""

from typing import Any, cast

import torch
from timm import layers
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from timm.models import beit, vision_transformer
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from clipfast.towers.timm_parts import Parts, classes, halves, zeros
from clipfast.towers.timm_positions import score_bias
from clipfast.towers.tower import Block, LayerNorm, Linear, Rotary

ATTENTIONS = (Attention, AttentionRope, EvaAttention, RelPosAttention, beit.Attention)
BLOCKS = (
    *(TimmBlock, EvaBlock, RelPosBlock, beit.Block),
    *(ResPostBlock, EvaBlockPostNorm, ResPostRelPosBlock, ParallelScalingBlock, ParallelThingsBlock),
)
_POST_NORM = (ResPostBlock, EvaBlockPostNorm, ResPostRelPosBlock)
_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm", "inner_norm": "norm"}
_NONE = nn.Identity()

DIFFERENTIAL = (*classes(layers, "DiffAttention"), *classes(vision_transformer, "DiffParallelScalingBlock"))

Fields = dict[str, Any]
"""Arguments of :class:`Block`."""


def is_differential(block: nn.Module) -> bool:
    """Whether a block's weights of a token are the difference of two attentions."""
    return isinstance(block, DIFFERENTIAL) or isinstance(getattr(block, "attn", None), DIFFERENTIAL)


def block(
    parts: Parts, block: Any, place: str, rotary: Rotary | None = None, shared: Tensor | None = None
) -> Block | None:
    """One block; None if anything of it was noted.

    Args:
        parts: notes what cannot be read.
        block: of one of :data:`BLOCKS`.
        place: its path.
        rotary: the rotary positions that the model passes to it.
        shared: the relative positions that the model passes to it, ``[heads, N, N]``.
    """
    if is_differential(block):
        parts.note("differential", place)
        return None
    if not parts.expect(block, BLOCKS, place):
        return None
    before = parts.notes
    if isinstance(block, ParallelThingsBlock):
        fields = _parallel_things(parts, block, place)
    elif isinstance(block, ParallelScalingBlock):
        fields = _parallel_scaling(parts, block, place)
    else:
        fields = _residual(parts, block, place, rotary, shared)
    return Block(**fields) if parts.notes == before else None


def _residual(parts: Parts, block: Any, place: str, rotary: Rotary | None, shared: Tensor | None) -> Fields:
    """Attention, then the MLP, each with a norm before or after it."""
    parts.idle(place, drop_path1=block.drop_path1, drop_path2=block.drop_path2)
    norms = [parts.norm(getattr(block, name), f"{place}.{name}") for name in ("norm1", "norm2")]
    if isinstance(block, _POST_NORM):
        fields: Fields = {"ln_1": None, "ln_2": None, "attention_post_norm": norms[0], "mlp_post_norm": norms[1]}
    else:
        fields = {"ln_1": norms[0], "ln_2": norms[1]}
    scales: list[Tensor | None] = [None, None]
    if isinstance(block, EvaBlock | beit.Block):
        scales = [block.gamma_1, block.gamma_2]
    elif isinstance(block, TimmBlock | RelPosBlock):
        scales = [parts.scale(getattr(block, name), f"{place}.{name}") for name in ("ls1", "ls2")]
    fields |= {"attention_scale": scales[0], "mlp_scale": scales[1], "rotary": rotary}
    fields |= _attention(parts, block.attn, f"{place}.attn", shared)
    return fields | _mlp(parts, block.mlp, f"{place}.mlp")


def _attention(parts: Parts, attn: Any, place: str, shared: Tensor | None = None) -> Fields:
    if not parts.expect(attn, ATTENTIONS, place):
        return {}
    parts.heads.add(attn.num_heads)
    parts.idle(place, attn_drop=attn.attn_drop, proj_drop=attn.proj_drop)
    if getattr(attn, "gate", None) is not None:
        parts.note("gate", place)
    before = parts.notes
    out = parts.linear(attn.proj, f"{place}.proj")
    head_dim = out.weight.shape[1] // attn.num_heads
    if parts.notes == before and attn.scale != head_dim**-0.5:
        parts.note("replaced", f"{place}: a scale of its own")
    fields = {
        **{field: parts.norm(getattr(attn, name, _NONE), f"{place}.{name}") for field, name in _NORMS.items()},
        "score_bias": score_bias(parts, attn, place, shared),
        "out_weight": out.weight,
        "out_bias": zeros(out.weight) if out.bias is None else out.bias,
    }
    if getattr(attn, "qkv", None) is not None:
        packed = parts.linear(attn.qkv, f"{place}.qkv")
        bias = packed.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        return fields | {"in_weight": packed.weight, "in_bias": bias}
    names = ("q_proj", "k_proj", "v_proj")
    projections = [parts.linear(getattr(attn, name), f"{place}.{name}") for name in names]
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1 and parts.notes == before:
        projections[1:] = [_repeated(layer, head_dim, groups) for layer in projections[1:]]
    weights, biases = zip(*projections, strict=True)
    return fields | {"in_weight": weights, "in_bias": biases}


def _mlp(parts: Parts, mlp: Any, place: str) -> Fields:
    if not parts.expect(mlp, (Mlp, GluMlp, SwiGLU, GeGluMlp), place):
        return {}
    parts.idle(place, drop1=mlp.drop1, drop2=mlp.drop2)
    parts.activations.add(parts.activation(mlp.act, f"{place}.act"))
    norm = parts.norm(mlp.norm, f"{place}.norm")
    before = parts.notes
    gate: Linear | None = None
    if isinstance(mlp, GeGluMlp):
        gate, into, out = (parts.linear(getattr(mlp, name), f"{place}.{name}") for name in ("w0", "w1", "w2"))
        return _mlp_fields(into, out, gate) | {"mlp_in_norm": norm}
    if isinstance(mlp, SwiGLU):
        gate, into = (parts.linear(getattr(mlp, name), f"{place}.{name}") for name in ("fc1_g", "fc1_x"))
    else:
        into = parts.linear(mlp.fc1, f"{place}.fc1")
        if isinstance(mlp, GluMlp) and parts.notes == before:
            first, second = halves(into)
            into, gate = (first, second) if mlp.gate_last else (second, first)
    return _mlp_fields(into, parts.linear(mlp.fc2, f"{place}.fc2"), gate) | {"mlp_norm": norm}


def _parallel_scaling(parts: Parts, block: Any, place: str) -> Fields:
    """Attention and MLP beside each other, which share one norm and one first product."""
    parts.heads.add(block.num_heads)
    parts.activations.add(parts.activation(block.mlp_act, f"{place}.mlp_act"))
    parts.idle(place, attn_drop=block.attn_drop, mlp_drop=block.mlp_drop, drop_path=block.drop_path)
    if block.scale != block.head_dim**-0.5:
        parts.note("replaced", f"{place}: a scale of its own")
    before = parts.notes
    first = parts.linear(block.in_proj, f"{place}.in_proj")
    fused = getattr(block, "out_proj", None) is not None
    names = ("out_proj",) if fused else ("attn_out_proj", "mlp_out_proj")
    outs = [parts.linear(getattr(block, name), f"{place}.{name}") for name in names]
    scale = parts.scale(block.ls, f"{place}.ls")
    fields: Fields = {
        "ln_1": parts.norm(block.in_norm, f"{place}.in_norm"),
        "ln_2": None,
        "query_norm": parts.norm(block.q_norm, f"{place}.q_norm"),
        "key_norm": parts.norm(block.k_norm, f"{place}.k_norm"),
        "attention_scale": scale,
        "mlp_scale": scale,
        "parallel": True,
    }
    if fields["ln_1"] is None:
        parts.note("replaced", f"{place}.in_norm: no norm before attention and MLP")
    if parts.notes != before:
        return fields
    hidden = block.in_split[0]
    if fused:
        weight, bias = outs[0]
        inner = block.num_heads * block.head_dim
        outs = [Linear(weight[:, :inner].contiguous(), bias), Linear(weight[:, inner:].contiguous(), None)]
    attention, mlp = outs
    bias = first.bias
    if bias is None:
        rest = zeros(first.weight[hidden:])
        is_last = getattr(block, "qkv_bias", None) is not None  # in early versions of timm
        bias = torch.cat((rest, block.mlp_bias) if is_last else (block.mlp_bias, rest))
    into = Linear(first.weight[:hidden], bias[:hidden])
    return fields | {
        "in_weight": first.weight[hidden:],
        "in_bias": bias[hidden:],
        "out_weight": attention.weight,
        "out_bias": zeros(attention.weight) if attention.bias is None else attention.bias,
        **_mlp_fields(into, mlp, None),
    }


def _parallel_things(parts: Parts, block: Any, place: str) -> Fields:
    """Several attentions beside each other, then several MLPs, as one of each.

    Norms of one input differ in weight and bias alone, which are folded into the product after them. What is then
    left of a norm is common to all.
    """
    before = parts.notes
    attentions = [_branch(parts, branch, "attn", f"{place}.attns.{i}") for i, branch in enumerate(block.attns)]
    mlps = [_branch(parts, branch, "mlp", f"{place}.ffns.{i}") for i, branch in enumerate(block.ffns)]
    if parts.notes != before:
        return {}
    heads = {branch.attn.num_heads for branch in block.attns}
    norms = {(norm.eps, norm.rms) for norm, _, _ in (*attentions, *mlps)}
    inner = ("query_norm", "key_norm", "score_bias", "inner_norm", "mlp_norm", "mlp_in_norm")
    have_inner = any(fields.get(name) is not None for _, fields, _ in (*attentions, *mlps) for name in inner)
    if len(heads) > 1 or len(norms) > 1 or have_inner:
        parts.note("branches", place)
        return {}
    parts.heads = (parts.heads - heads) | {heads.pop() * len(attentions)}
    (eps, rms), width = norms.pop(), len(attentions[0][0].weight)
    weight = attentions[0][1]["out_weight"]
    plain = LayerNorm(weight.new_ones(width), weight.new_zeros(width), eps, rms)
    inputs = [_query_key_value(norm, fields) for norm, fields, _ in attentions]
    packed = [_concatenated([each[i] for each in inputs]) for i in range(3)]
    hidden = _concatenated([_folded(norm, fields, "mlp_in") for norm, fields, _ in mlps])
    gate = None
    if "mlp_gate_weight" in mlps[0][1]:
        gate = _concatenated([_folded(norm, fields, "mlp_gate") for norm, fields, _ in mlps])
    out, mlp_out = _joined(attentions, "out"), _joined(mlps, "mlp_out")
    return {
        "ln_1": plain,
        "ln_2": plain,
        "in_weight": torch.cat([part.weight for part in packed]),
        "in_bias": torch.cat([cast(Tensor, part.bias) for part in packed]),
        "out_weight": out.weight,
        "out_bias": out.bias,
        "attention_scale": None,
        "mlp_scale": None,
        **_mlp_fields(hidden, mlp_out, gate),
    }


def _branch(parts: Parts, branch: Any, kind: str, place: str) -> tuple[LayerNorm, Fields, Tensor | None]:
    """One attention or MLP of several: its norm, its weights, its layer scale."""
    parts.idle(place, drop_path=branch.drop_path)
    read = _attention if kind == "attn" else _mlp
    fields = read(parts, getattr(branch, kind), f"{place}.{kind}")
    norm = parts.norm(branch.norm, f"{place}.norm")
    if norm is None:
        parts.note("branches", place)
        norm = LayerNorm(torch.ones(0), torch.zeros(0), 0.0)
    return norm, fields, parts.scale(branch.ls, f"{place}.ls")


def _mlp_fields(into: Linear, out: Linear, gate: Linear | None) -> Fields:
    fields = {
        "mlp_in_weight": into.weight,
        "mlp_in_bias": zeros(into.weight) if into.bias is None else into.bias,
        "mlp_out_weight": out.weight,
        "mlp_out_bias": zeros(out.weight) if out.bias is None else out.bias,
    }
    if gate is None:
        return fields
    bias = zeros(gate.weight) if gate.bias is None else gate.bias
    return fields | {"mlp_gate_weight": gate.weight, "mlp_gate_bias": bias}


def _repeated(layer: Linear, head_dim: int, times: int) -> Linear:
    """Keys or values of every head where several heads share them."""

    def repeat(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, head_dim)).repeat_interleave(times, 0).flatten(0, 1)

    return Linear(repeat(layer.weight), None if layer.bias is None else repeat(layer.bias))


def _fold(norm: LayerNorm, layer: Linear) -> Linear:
    """``layer(x·γ + β)`` as a layer of ``x``."""
    bias = layer.weight @ norm.bias
    return Linear(layer.weight * norm.weight, bias if layer.bias is None else bias + layer.bias)


def _folded(norm: LayerNorm, fields: Fields, name: str) -> Linear:
    return _fold(norm, Linear(fields[f"{name}_weight"], fields[f"{name}_bias"]))


def _query_key_value(norm: LayerNorm, fields: Fields) -> tuple[Linear, ...]:
    """A branch's three projections of the stream, normed without weight and bias."""
    weights, biases = fields["in_weight"].chunk(3), (None, None, None)
    if fields["in_bias"] is not None:
        biases = fields["in_bias"].chunk(3)
    return tuple(_fold(norm, Linear(*pair)) for pair in zip(weights, biases, strict=True))


def _concatenated(layers: list[Linear]) -> Linear:
    """Layers of one input, one below the other."""
    biases = [zeros(layer.weight) if layer.bias is None else layer.bias for layer in layers]
    return Linear(torch.cat([layer.weight for layer in layers]), torch.cat(biases))


def _joined(branches: list[tuple[LayerNorm, Fields, Tensor | None]], name: str) -> Linear:
    """The sum of all branches' output projections, as one layer of their inputs side by side."""
    weights, biases = [], []
    for _, fields, scale in branches:
        weight, bias = fields[f"{name}_weight"], fields[f"{name}_bias"]
        weights.append(weight if scale is None else weight * scale[:, None])
        biases.append(bias if scale is None else bias * scale)
    return Linear(torch.cat(weights, 1), torch.stack(biases).sum(0))
