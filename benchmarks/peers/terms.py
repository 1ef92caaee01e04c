"""Heads' contributions to the embedding from what hooks see: each head's output before the output projection.

What users of hooks write themselves. It is the definition of ``Contributions.heads()`` with uniform centring
(arXiv 2310.05916): ``((z W_O + b_O/H − μ/(K H))/σ ⊙ γ + β/(K H)) P / ‖y‖`` with ``K = 2L + 1`` terms.

``B`` images, ``L`` layers, ``H`` heads, ``E`` head_dim, ``W`` width, ``D`` embed_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Readout:
    """The weights after the heads.

    Attributes:
        out_weights: ``[H, E, W]`` per layer.
        out_biases: ``[L, W]``.
        gamma: ``[W]``, of the final LayerNorm.
        beta: ``[W]``.
        eps: of the final LayerNorm.
        projection: ``[W, D]``; None where the embedding is the normed row itself.
    """

    out_weights: tuple[Tensor, ...]
    out_biases: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float
    projection: Tensor | None

    @classmethod
    def of(cls, outputs: Sequence[Any], norm: Any, projection: Tensor | None, heads: int) -> "Readout":
        """From output projections (``nn.Linear``), the final norm (``nn.LayerNorm``) and ``[W, D]``."""
        weights = tuple(output.weight.detach().T.unflatten(0, (heads, -1)) for output in outputs)
        biases = torch.stack([output.bias.detach() for output in outputs])
        projection = None if projection is None else projection.detach()
        return cls(weights, biases, norm.weight.detach(), norm.bias.detach(), norm.eps, projection)

    def heads(self, mixed: Sequence[Tensor], last: Tensor) -> Tensor:
        """Contributions ``[B, L, H, D]``.

        Args:
            mixed: what each output projection reads at the class token, ``[B, H·E]`` per layer.
            last: the class token's row of the last residual stream, ``[B, W]``.
        """
        results = [
            torch.einsum("bhe,hew->bhw", z.unflatten(-1, weight.shape[:2]), weight)
            for z, weight in zip(mixed, self.out_weights, strict=True)
        ]
        return self.towards_embedding(torch.stack(results, 1), last)

    def towards_embedding(self, results: Tensor, last: Tensor) -> Tensor:
        """Contributions ``[B, L, H, D]`` of heads' results without biases, ``[B, L, H, W]``."""
        layers, heads = results.shape[1:3]
        share = 1 / ((2 * layers + 1) * heads)
        mean = last.mean(-1, keepdim=True)  # [B, 1]
        std = (last.var(-1, unbiased=False, keepdim=True) + self.eps).sqrt()
        embedding = self._projected((last - mean) / std * self.gamma + self.beta)
        terms = results + (self.out_biases / heads)[:, None] - (mean * share)[:, None, None]
        terms = terms / std[:, None, None] * self.gamma + self.beta * share
        return self._projected(terms) / embedding.norm(dim=-1)[:, None, None, None]

    def _projected(self, rows: Tensor) -> Tensor:
        return rows if self.projection is None else rows @ self.projection
