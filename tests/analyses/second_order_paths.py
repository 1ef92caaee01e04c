"""Second-order effects written out in float64: every token, neuron, head and dimension, one step per line.

Read from an open_clip ``VisionTransformer`` through forward hooks; shares no code with what is tested. ``B`` images,
``N`` tokens, ``W`` width, ``M`` neurons, ``H`` heads, ``D`` embed_dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def scale(module: nn.Module) -> Tensor:
    """A layer scale, 1 for none."""
    return module.gamma if hasattr(module, "gamma") else torch.ones((), dtype=torch.float64)


@dataclass
class Recorded:
    """Of one forward of some images.

    Attributes:
        streams: the residual stream before every block and after the last one, ``[B, N, W]`` each.
        attention: ``[B, H, N, N]`` of every layer.
        hidden: ``[B, N, M]`` of every layer, after the activation.
        embedding: ``[B, D]``.
    """

    visual: Any
    streams: list[Tensor]
    attention: list[Tensor]
    hidden: list[Tensor]
    embedding: Tensor

    @property
    def norm(self) -> Tensor:
        return self.embedding.norm(dim=-1)

    def pooled(self, x: Tensor) -> Tensor:
        """The row that is read, ``[B, N, ...] → [B, ...]``."""
        return x[:, 0] if self.visual.pool_type == "tok" else x[:, 1:].mean(1)

    def frozen(self, norm: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return mean, (var + norm.eps).sqrt()

    def through_attention(self, layer: int, source: Tensor, share: float, centring: str) -> Tensor:
        """What a part of the tokens gives the pooled row through one layer's frozen attention, ``[B, N, W] → [B, W]``.

        Args:
            layer: whose attention.
            source: the part of the residual stream before it.
            share: of the means and biases on the way.
            centring: whether the source is centred, or gets a share of the means.
        """
        block = self.visual.transformer.resblocks[layer]
        mean, std = self.frozen(block.ln_1, self.streams[layer])
        x = source - source.mean(-1, keepdim=True) if centring == "termwise" else source - share * mean
        x = x / std * block.ln_1.weight + share * block.ln_1.bias
        heads, width = block.attn.num_heads, x.shape[-1]
        value = x @ block.attn.in_proj_weight[2 * width :].T + share * block.attn.in_proj_bias[2 * width :]
        mixed = torch.einsum("bhqn,bnhe->bqhe", self.attention[layer], value.unflatten(-1, (heads, -1))).flatten(2)
        out = mixed @ block.attn.out_proj.weight.T + share * block.attn.out_proj.bias
        return self.pooled(out * scale(block.ls_1))

    def read_out(self, row: Tensor, share: float, centring: str) -> Tensor:
        """What a part of the pooled row gives the embedding over its norm, ``[B, W] → [B, D]``."""
        norm = self.visual.ln_post
        mean, std = self.frozen(norm, self.pooled(self.streams[-1]))
        x = row - row.mean(-1, keepdim=True) if centring == "termwise" else row - share * mean
        x = x / std * norm.weight + share * norm.bias
        return x @ self.visual.proj / self.norm[:, None]

    def effect(self, layer: int, source: Tensor, share: float, centring: str) -> Tensor:
        """The second-order effect of what a layer's MLP added, or of a part of it, ``[B, N, W] → [B, D]``."""
        total = torch.zeros_like(self.embedding)
        layers = len(self.visual.transformer.resblocks)
        for later in range(layer + 1, layers):
            part = share / (1 + 2 * later)
            row = self.through_attention(later, source, part, centring)
            total += self.read_out(row, part / (1 + 2 * layers), centring)
        return total

    def neuron(self, layer: int, neuron: int, centring: str, even: bool = False) -> Tensor:
        """The effect of one neuron, ``[B, D]``; ``even``, with its part of biases and means as the paper's code."""
        block = self.visual.transformer.resblocks[layer]
        added = self.hidden[layer][:, :, neuron, None] * block.mlp.c_proj.weight[:, neuron] * scale(block.ls_2)
        neurons = self.hidden[layer].shape[-1]
        if even:
            return self.effect(layer, added + self.bias(layer) / neurons, 1 / neurons, centring)
        return self.effect(layer, added, 0.0, centring)

    def bias(self, layer: int) -> Tensor:
        block = self.visual.transformer.resblocks[layer]
        bias: Tensor = block.mlp.c_proj.bias * scale(block.ls_2)
        return bias

    def neurons(self, layer: int, centring: str, even: bool = False) -> Tensor:
        """Of all neurons, ``[B, M, D]``."""
        count = self.hidden[layer].shape[-1]
        return torch.stack([self.neuron(layer, neuron, centring, even) for neuron in range(count)], 1)

    def mlp(self, layer: int) -> Tensor:
        """What a layer's MLP added to the tokens, ``[B, N, W]``."""
        block = self.visual.transformer.resblocks[layer]
        added: Tensor = self.hidden[layer] @ block.mlp.c_proj.weight.T * scale(block.ls_2) + self.bias(layer)
        return added

    def whole(self, layer: int, centring: str) -> Tensor:
        """Of the whole MLP, ``[B, D]``."""
        return self.effect(layer, self.mlp(layer), 1.0, centring)


@torch.no_grad()
def record(visual: Any, images: Tensor) -> Recorded:
    """Runs the module and writes down what it computes on the way."""
    streams, hidden, attention, handles = [], [], [], []
    for block in visual.transformer.resblocks:
        handles.append(block.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].clone())))
        handles.append(block.mlp.gelu.register_forward_hook(lambda _, __, output: hidden.append(output.clone())))
    handles.append(visual.transformer.register_forward_hook(lambda _, __, output: streams.append(output.clone())))
    embedding = visual(images)
    for handle in handles:
        handle.remove()
    for block, stream in zip(visual.transformer.resblocks, streams, strict=False):
        heads, width = block.attn.num_heads, stream.shape[-1]
        normed = block.ln_1(stream)
        weight, bias = block.attn.in_proj_weight[: 2 * width], block.attn.in_proj_bias[: 2 * width]
        query, key = (x.unflatten(-1, (heads, -1)) for x in (normed @ weight.T + bias).chunk(2, -1))
        logits = torch.einsum("bqhe,bnhe->bhqn", query, key) / (width // heads) ** 0.5
        attention.append(logits.softmax(-1))
    return Recorded(visual, streams, attention, hidden, embedding)
