"""The decomposition written out from its definition, with everything materialised, in the precision of the module.

arXiv 2310.05916, section 3, with the even split of the final mean, of β and of the attention's bias that its code
uses. Nothing of clipfast is imported here: only an open_clip module and plain torch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Definition:
    """All terms, divided by the embedding's norm.

    Axes: ``B`` images, ``L`` layers, ``N`` tokens, ``H`` heads, ``D`` embed_dim.
    """

    embedding: Tensor  # [B, D], as the module gives it
    mean: Tensor  # [B]
    std: Tensor  # [B]
    attention: Tensor  # [B, L, H, N]
    tokens: Tensor  # [B, L, N, H, D]
    start: Tensor  # [B, D]
    mlps: Tensor  # [B, L, D]

    @property
    def heads(self) -> Tensor:
        return self.tokens.sum(2)  # [B, L, H, D]


def _scaled(x: Tensor, scale: nn.Module) -> Tensor:
    return x * scale.gamma if hasattr(scale, "gamma") else x


@torch.no_grad()
def define(visual: nn.Module, images: Tensor, centring: str) -> Definition:
    """Every term of ``visual(images)``, for a ``VisionTransformer`` with plain blocks."""
    embedding = visual(images)
    embedding = embedding[0] if isinstance(embedding, tuple) else embedding
    norm = embedding.norm(dim=-1)

    def pooled(x: Tensor) -> Tensor:
        return x[:, 1:].mean(1) if visual.pool_type == "avg" else x[:, 0]

    x = visual._embeds(images)
    start, attentions, parts, biases, mlps = pooled(x), [], [], [], []
    for block in visual.transformer.resblocks:
        attn = block.attn
        count, tokens, width = x.shape
        qkv = block.ln_1(x) @ attn.in_proj_weight.T + attn.in_proj_bias
        query, key, value = qkv.view(count, tokens, 3, attn.num_heads, -1).unbind(2)  # [B, N, H, E]
        logits = torch.einsum("bnhe,bmhe->bhnm", query, key) / query.shape[-1] ** 0.5
        weights = logits.softmax(-1)
        out_weight = attn.out_proj.weight.view(width, attn.num_heads, -1)  # [W, H, E]
        added = torch.einsum("bhnm,bmhe,whe->bnw", weights, value, out_weight) + attn.out_proj.bias
        row = weights[:, :, 1:].mean(2) if visual.pool_type == "avg" else weights[:, :, 0]  # [B, H, N]
        attentions.append(row)
        parts.append(_scaled(torch.einsum("bhn,bnhe,whe->bnhw", row, value, out_weight), block.ls_1))
        biases.append(_scaled(attn.out_proj.bias, block.ls_1))
        x = x + _scaled(added, block.ls_1)
        added = _scaled(block.mlp(block.ln_2(x)), block.ls_2)
        mlps.append(pooled(added))
        x = x + added

    residual = pooled(x)
    mean = residual.mean(-1)
    std = (residual.var(-1, unbiased=False) + visual.ln_post.eps).sqrt()
    layers, (tokens, heads) = len(parts), parts[0].shape[1:3]
    terms = 2 * layers + 1

    def read(term: Tensor, share: float) -> Tensor:
        """A residual term ``[B, ..., W]`` through the frozen LayerNorm and the projection; ``share`` of μ and β."""
        frozen = (len(images), *[1] * (term.ndim - 1))
        mu = term.mean(-1, keepdim=True) if centring == "termwise" else mean.view(frozen) * share
        normed = (term - mu) / std.view(frozen) * visual.ln_post.weight + visual.ln_post.bias * share
        return normed @ visual.proj / norm.view(frozen)

    bias = torch.stack(biases)[None, :, None, None] / (heads * tokens)  # [1, L, 1, 1, W]
    return Definition(
        embedding=embedding,
        mean=mean,
        std=std,
        attention=torch.stack(attentions, 1),
        tokens=read(torch.stack(parts, 1) + bias, 1 / (terms * heads * tokens)),
        start=read(start, 1 / terms),
        mlps=read(torch.stack(mlps, 1), 1 / terms),
    )
