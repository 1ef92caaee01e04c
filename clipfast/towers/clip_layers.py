"""What open_clip's and OpenAI's modules have in common: residual blocks, LayerNorms, and checks of what they hold."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipfast.towers.patches import plain_type, replacement
from clipfast.towers.tower import Activation, Block, LayerNorm

LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
Places = list[tuple[str, str]]  # (key of a package's REFUSALS, place)


@dataclass(frozen=True)
class Classes:
    """The classes that a package makes residual blocks of.

    Attributes:
        blocks: residual blocks.
        norms: LayerNorms.
        attentions: attention layers.
        quick_gelu: its QuickGELU.
        scales: layer scales; None where a block has none.
        custom: blocks that may have a LayerNorm after the attention and one inside the MLP.
    """

    blocks: tuple[type, ...]
    norms: tuple[type, ...]
    attentions: tuple[type, ...]
    quick_gelu: type
    scales: tuple[type, ...] | None = None
    custom: tuple[type, ...] = ()


def expect(module: Any, kinds: tuple[type, ...], place: str) -> Places:
    """A reason, with its place, when a module is of none of the expected classes."""
    if isinstance(module, nn.Module) and plain_type(module) in kinds:
        return []
    kind, expected = type(module), kinds[0].__name__
    name = f"{kind.__module__}.{kind.__name__}" if kind.__name__ == expected else kind.__name__
    return [(replacement(module), f"{place}: {name} in place of {expected}")]


def expect_norm(module: Any, classes: Classes, place: str) -> Places:
    """The same for a LayerNorm, which must have a weight."""
    wrong = expect(module, classes.norms, place)
    if not wrong and module.weight is None:
        wrong.append(("replaced", f"{place}: no weight"))
    return wrong


def expect_patches(conv: Any, patch_size: tuple[int, int], place: str = "conv1") -> Places:
    """The same for the convolution that embeds patches, which must not overlap."""
    wrong = expect(conv, (nn.Conv2d,), place)
    if not wrong:
        settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        if settings != (patch_size, patch_size, (0, 0), (1, 1), 1):
            wrong.append(("replaced", f"{place}: does not embed patches of {patch_size[0]} × {patch_size[1]} pixels"))
    return wrong


def expect_attention(attention: nn.Module, place: str) -> Places:
    """What is wrong in one of torch's attention layers, or in one that has the same parameters."""
    attn = cast(Any, attention)
    wrong = expect(attn.out_proj, LINEARS, f"{place}.out_proj")
    if getattr(attn, "bias_k", None) is not None or getattr(attn, "add_zero_attn", False):
        wrong.append(("replaced", f"{place}: a learned or zero key"))
    return wrong


def replaced_in_block(block: Any, place: str, classes: Classes) -> Places:
    """Layers of a block that are not those of its package: adapters, quantised layers, other classes."""
    wrong = expect(block, classes.blocks, place)
    if wrong:
        return wrong
    is_custom = plain_type(block) in classes.custom
    expected = {"ln_1", "attn", "ln_2", "mlp"} | ({"ls_1", "ls_2"} if classes.scales else set())
    children = {name for name, _ in block.named_children()} - ({"ln_attn"} if is_custom else set())
    if children - {"parametrizations"} != expected:
        return [("replaced", f"{place}: has the layers {', '.join(sorted(children))}")]
    inner = [name for name, _ in block.mlp.named_children()]
    if inner not in (["c_fc", "gelu", "c_proj"], ["c_fc", "gelu", "ln", "c_proj"] if is_custom else []):
        return [("replaced", f"{place}.mlp: has the layers {', '.join(inner)}")]
    wrong += expect(block.mlp, (nn.Sequential,), f"{place}.mlp")
    attention = expect(block.attn, classes.attentions, f"{place}.attn")
    if not attention:
        attention = expect_attention(block.attn, f"{place}.attn")
        if getattr(block.attn, "in_proj_weight", None) is None:
            attention.append(("replaced", f"{place}.attn: separate weights for query, key and value"))
    wrong += attention
    for name in ("c_fc", "c_proj"):
        wrong += expect(getattr(block.mlp, name), LINEARS, f"{place}.mlp.{name}")
    wrong += expect_norm(block.ln_1, classes, f"{place}.ln_1") + expect_norm(block.ln_2, classes, f"{place}.ln_2")
    optional = {"mlp.ln": getattr(block.mlp, "ln", None), "ln_attn": getattr(block, "ln_attn", None)}
    optional |= {f"attn.{name}": getattr(block.attn, name, None) for name in ("ln_q", "ln_k", "ln_inner")}
    for name, norm_module in optional.items():
        if norm_module is not None and type(norm_module) is not nn.Identity:
            wrong += expect_norm(norm_module, classes, f"{place}.{name}")
    for name in ("ls_1", "ls_2") if classes.scales else ():
        wrong += expect(getattr(block, name), (*cast(tuple[type, ...], classes.scales), nn.Identity), f"{place}.{name}")
    return wrong


def have_equal_settings(blocks: Iterable[Any], classes: Classes) -> bool:
    """Whether all blocks have the same number of heads and the same activation, as in a tower."""
    return len({(block.attn.num_heads, activation(block.mlp.gelu, classes)) for block in blocks}) <= 1


def activation(module: Any, classes: Classes) -> Activation | None:
    """The name of an activation, None for one that is not read."""
    if type(module) is classes.quick_gelu:
        return "quick_gelu"
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return "silu" if type(module) is nn.SiLU else None


def norm(module: Any) -> LayerNorm:
    """A LayerNorm as plain tensors."""
    return LayerNorm(module.weight, bias_of(module), module.eps)


def optional_norm(module: Any) -> LayerNorm | None:
    """The same; None for none, or for an ``nn.Identity`` in its place."""
    return None if module is None or isinstance(module, nn.Identity) else norm(module)


def bias_of(module: Any) -> Tensor:
    """A layer's bias; zeros where it has none."""
    bias: Tensor | None = module.bias
    return module.weight.new_zeros(len(module.weight)) if bias is None else bias


def block_of(block: Any) -> tuple[Block, tuple[Tensor, ...]]:
    """A residual block as plain tensors, and the parameters that some of them are computed from."""
    attn = block.attn
    in_weight, in_bias = attn.in_proj_weight, attn.in_proj_bias
    sources: tuple[Tensor, ...] = ()
    if getattr(attn, "head_scale", None) is not None:
        in_weight, in_bias, sources = _scaled_values(attn)
    made = Block(
        ln_1=norm(block.ln_1),
        in_weight=in_weight,
        in_bias=in_bias,
        out_weight=attn.out_proj.weight,
        out_bias=bias_of(attn.out_proj),
        attention_scale=_scale(block, "ls_1"),
        ln_2=norm(block.ln_2),
        mlp_in_weight=block.mlp.c_fc.weight,
        mlp_in_bias=bias_of(block.mlp.c_fc),
        mlp_out_weight=block.mlp.c_proj.weight,
        mlp_out_bias=bias_of(block.mlp.c_proj),
        mlp_scale=_scale(block, "ls_2"),
        query_norm=optional_norm(getattr(attn, "ln_q", None)),
        key_norm=optional_norm(getattr(attn, "ln_k", None)),
        inner_norm=optional_norm(getattr(attn, "ln_inner", None)),
        attention_post_norm=optional_norm(getattr(block, "ln_attn", None)),
        mlp_norm=optional_norm(getattr(block.mlp, "ln", None)),
    )
    return made, sources


def _scale(block: Any, name: str) -> Tensor | None:
    return getattr(getattr(block, name, None), "gamma", None)


@torch.no_grad()
def _scaled_values(attn: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, tuple[Tensor, ...]]:
    """Weights and biases of query, key and value with each head's scale in its values, and what they are made of.

    A scale of a head's output is one of its values, whatever comes after them.
    """
    scale = attn.head_scale.flatten().repeat_interleave(attn.head_dim)  # [H·E]
    query, key, value = attn.in_proj_weight.chunk(3)
    weights = (query, key, value * scale[:, None])
    if attn.in_proj_bias is None:
        return weights, None, (attn.head_scale, attn.in_proj_weight)
    query_bias, key_bias, value_bias = attn.in_proj_bias.chunk(3)
    sources = (attn.head_scale, attn.in_proj_weight, attn.in_proj_bias)
    return weights, (query_bias, key_bias, value_bias * scale), sources
