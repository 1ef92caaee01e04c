"""Which patches matter for a text, by the methods that a decomposition is compared with.

Each is written from its paper, runs on the same tower and gives raw scores of patches; :func:`.segmentation.normalise`
turns those of every method into heat the same way, and so every method is judged by one protocol.

All take ``(tower, images [B, 3, height, width], text_features [D] or [B, D])`` and return ``[B, rows, columns]``. What
gradients explain is ``⟨embedding/‖embedding‖, text⟩``. A text may be a direction that contrasts it with others
(``text − texts.mean(0)``), and its length counts in :func:`chefer`: times the model's logit scale it gives CLIP's own
logit. Where a method reads the class token's row of a matrix, a tower that averages its patches has their mean row.

``B`` images, ``N`` tokens (class token first), ``H`` heads, ``L`` layers, ``D`` embed_dim.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

import torch
from torch import Tensor

from clipfast.analyses.gradients import attention_gradients, attention_matrices, own_gradients
from clipfast.basis import autocast_disabled
from clipfast.towers.tower import Tower

Method: TypeAlias = Callable[[Tower, Tensor, Tensor], Tensor]


def _read(tower: Tower, matrix: Tensor) -> Tensor:
    """The row of the pooled token, ``[..., N, N] → [..., N]``."""
    return matrix[..., 0, :] if tower.pooling == "cls" else matrix[..., 1:, :].mean(-2)


def _patches(tower: Tower, row: Tensor) -> Tensor:
    """Scores of tokens without the class token, as the grid of patches, ``[B, N] → [B, rows, columns]``."""
    return row[:, tower.prefix_tokens :].unflatten(1, tower.grid)


def raw_attention(tower: Tower, images: Tensor, text_features: Tensor | None = None) -> Tensor:
    """The last layer's attention of the pooled token, averaged over heads; the same for every text.

    Keeps one layer's attention, ``B·H·N²``.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: not looked at; here so that all methods are called alike.

    Raises:
        InputError: images of another shape.
    """
    last = deque(attention_matrices(tower, images), maxlen=1).pop()  # [B, H, N, N]
    return _patches(tower, _read(tower, last).mean(1))


def rollout(tower: Tower, images: Tensor, text_features: Tensor | None = None) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020): how much of each patch arrives at the pooled token, over all layers.

    ``Â_L ⋯ Â_1`` with ``Â = (A + I)/2``, ``A`` averaged over heads and ``I`` for the residual connection. Rows of ``A``
    sum to 1, so those of ``Â`` do and need no normalising. The same for every text.

    Keeps one layer's attention, ``B·H·N²``, and one product, ``B·N²``.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: not looked at; here so that all methods are called alike.

    Raises:
        InputError: images of another shape.
    """
    return _patches(tower, _read(tower, rolled_out(attention_matrices(tower, images))))


def rolled_out(attentions: Iterable[Tensor]) -> Tensor:
    """``Â_L ⋯ Â_1`` with ``Â = (A + I)/2``, ``[B, N, N]``.

    Args:
        attentions: ``[B, H, N, N]`` of one layer or more, the first layer first.
    """
    layers = map(_with_residual, attentions)
    product = next(layers)
    for layer in layers:
        with autocast_disabled(layer):
            product = layer @ product
    return product


def _with_residual(attention: Tensor) -> Tensor:
    """``(A + I)/2`` with ``A`` averaged over heads, ``[B, H, N, N] → [B, N, N]``."""
    mixed = 0.5 * attention.mean(1)
    mixed.diagonal(dim1=1, dim2=2).add_(0.5)
    return mixed


def gradcam(tower: Tower, images: Tensor, text_features: Tensor) -> Tensor:
    """GradCAM (Selvaraju et al. 2017) on the last layer's attention, as in Chefer et al.'s comparison of ViT methods.

    The feature maps are the heads' rows of attention from the pooled token to the patches; a head's weight is its
    row's gradient averaged over patches; ``ReLU(mean over heads of weight · row)``. GradCAM on the tokens themselves
    is not possible in the last layer: where only the class token is pooled, no gradient reaches the patches.

    Keeps the residual stream of all layers, ``B·L·N·W``, and one layer's attention, ``B·H·N²``.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: ``[D]`` for all images, or ``[B, D]``, one per image.

    Raises:
        InputError: images or features of another shape.
    """
    _, attention, gradient = next(attention_gradients(tower, images, text_features))
    weight = _read(tower, gradient)[:, :, tower.prefix_tokens :].mean(2, keepdim=True)  # [B, H, 1]
    return _patches(tower, (weight * _read(tower, attention)).mean(1).relu())


def chefer(tower: Tower, images: Tensor, text_features: Tensor) -> Tensor:
    """Generic attention explainability (Chefer, Gur & Wolf, ICCV 2021), its rule for self-attention.

    ``R ← R + Ā R`` from the first layer to the last, beginning with ``R = I``, where ``Ā`` is the mean over heads of
    ``(gradient ⊙ attention)⁺``. Only the pooled token's row of ``R`` is needed, and it follows from the last layer
    back: ``r ← r + r Ā``, in the order in which gradients come. The first-order part of ``R`` grows with the gradient,
    the second with its square, and so on: unlike the other methods this one depends on how long the text is.

    Keeps the residual stream of all layers, ``B·L·N·W``, and one layer's attention, ``B·H·N²``; as written in the
    paper it would be ``B·L·H·N²``.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: ``[D]`` for all images, or ``[B, D]``, one per image; times the logit scale for CLIP's logit.

    Raises:
        InputError: images or features of another shape.
    """
    pooled = _read(tower, torch.eye(tower.tokens, dtype=torch.float64))
    steps = ((attention, gradient) for _, attention, gradient in attention_gradients(tower, images, text_features))
    return _patches(tower, accumulated(pooled, steps))


def accumulated(row: Tensor, steps: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """A row through ``(I + Ā_L) ⋯ (I + Ā_1)``, ``[N] → [B, N]``, ``Ā`` the mean of ``(gradient ⊙ attention)⁺``.

    Args:
        row: whose relevance is accumulated, a weight per token, ``[N]``.
        steps: attention and gradient, ``[B, H, N, N]`` each, of one layer or more, the *last* layer first.
    """
    rows = row[None, None]
    for attention, gradient in steps:
        with autocast_disabled(attention):
            rows = rows.to(attention)
            rows = rows + rows @ (gradient * attention).relu().mean(1)  # [B, 1, N]
    return rows[:, 0]


def legrad(tower: Tower, images: Tensor, text_features: Tensor, *, tokens: str = "all") -> Tensor:
    """LeGrad (Bousselham et al. 2024): how sensitive every layer's own similarity is to that layer's attention.

    The sum over layers of ``ReLU(∂s_l/∂A_l)`` averaged over heads and queries, where ``s_l`` is the similarity of the
    layer's output, pooled and read as if it were the last. The gradient itself is the signal: attention does not
    multiply it.

    Keeps one layer's attention and graph, ``B·H·N²``.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: ``[D]`` for all images, or ``[B, D]``, one per image.
        tokens: ``"all"`` pools a layer's output by averaging its tokens, so that every query has a gradient;
            ``"pooled"`` by what the tower pools, which for a class token leaves one query.

    Raises:
        InputError: images or features of another shape, or no such pooling.
    """
    layers = own_gradients(tower, images, text_features, tokens=tokens)
    total = sum((gradient.relu().mean((1, 2)) for _, _, gradient in layers), torch.zeros(()))  # [B, N]
    return _patches(tower, total)


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "attention": raw_attention,
        "rollout": rollout,
        "gradcam": gradcam,
        "chefer": chefer,
        "legrad": legrad,
    }
)
"""Every method by name."""
