"""Which patches matter for a text, by the methods that a decomposition is compared with.

Each is written from its paper, runs on the same tower and gives raw scores of patches; :func:`.segmentation.normalise`
turns those of every method into heat the same way, and so every method is judged by one protocol.

All take ``(tower, images [B, 3, height, width], text_features [D] or [B, D])`` and return ``[B, rows, columns]``. With
``[B, T, D]``, or ``[1, T, D]`` for the same texts with every image, they return ``[B, T, rows, columns]``; the forward
is shared by all texts, and each adds a backward. What gradients explain is ``⟨embedding/‖embedding‖, text⟩``. A text
may be a direction that contrasts it with others (``text − texts.mean(0)``), and its length counts in :func:`chefer`:
times the model's logit scale it gives CLIP's own logit. Where a method reads the class token's row of a matrix, a tower
that averages its patches has their mean row.

``B`` images, ``N`` tokens (class token first), ``H`` heads, ``L`` layers, ``D`` embed_dim.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Final, TypeAlias

import torch
from torch import Tensor

from clipfast.analyses.gradients import (
    attention_matrices,
    check_images,
    check_targets,
    check_texts,
    text_attention_gradients,
    text_own_gradients,
)
from clipfast.basis import autocast_disabled
from clipfast.indices import resolve_layer
from clipfast.towers.tower import Tower

Method: TypeAlias = Callable[[Tower, Tensor, Tensor], Tensor]


def _read(tower: Tower, matrix: Tensor) -> Tensor:
    """The row of the pooled token, ``[..., N, N] → [..., N]``."""
    return matrix[..., 0, :] if tower.pooling == "cls" else matrix[..., 1:, :].mean(-2)


def _patches(tower: Tower, row: Tensor) -> Tensor:
    """Scores of tokens without the class token, as the grid of patches, ``[..., N] → [..., rows, columns]``."""
    return row[..., tower.prefix_tokens :].unflatten(-1, tower.grid)


def _texts(tower: Tower, images: Tensor, text_features: Tensor) -> tuple[Tensor, int]:
    """Texts ``[B, T, D]``, and how many there are."""
    images = check_images(tower, images)
    if text_features.ndim == 3:
        texts = check_texts(tower, images, text_features)
    else:
        texts = check_targets(tower, images, text_features)[:, None]
    return texts, texts.shape[1]


def _shaped(tower: Tower, rows: Iterable[Tensor], text_features: Tensor) -> Tensor:
    """Scores of tokens per text, ``T`` times ``[B, N]``, as grids with an axis of texts where the texts have one."""
    result = _patches(tower, torch.stack(list(rows), 1))
    return result if text_features.ndim == 3 else result[:, 0]


def _unlike_texts(tower: Tower, images: Tensor, result: Tensor, text_features: Tensor | None) -> Tensor:
    """A result that is the same for every text, with an axis of texts where the texts have one."""
    if text_features is None or text_features.ndim != 3:
        return result
    count = check_texts(tower, check_images(tower, images), text_features).shape[1]
    return result[:, None].repeat(1, count, 1, 1)


def raw_attention(tower: Tower, images: Tensor, text_features: Tensor | None = None) -> Tensor:
    """The last layer's attention of the pooled token, averaged over heads; the same for every text.

    Keeps one layer's attention, ``B·H·N²``.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: not looked at but for their number; here so that all methods are called alike.

    Raises:
        InputError: images of another shape.
    """
    last = deque(attention_matrices(tower, images), maxlen=1).pop()  # [B, H, N, N]
    return _unlike_texts(tower, images, _patches(tower, _read(tower, last).mean(1)), text_features)


def rollout(tower: Tower, images: Tensor, text_features: Tensor | None = None) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020): how much of each patch arrives at the pooled token, over all layers.

    ``Â_L ⋯ Â_1`` with ``Â = (A + I)/2``, ``A`` averaged over heads and ``I`` for the residual connection. Rows of ``A``
    sum to 1, so those of ``Â`` do and need no normalising. The same for every text.

    Keeps one layer's attention, ``B·H·N²``, and one product, ``B·N²``.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: not looked at but for their number; here so that all methods are called alike.

    Raises:
        InputError: images of another shape.
    """
    result = _patches(tower, _read(tower, rolled_out(attention_matrices(tower, images))))
    return _unlike_texts(tower, images, result, text_features)


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
        text_features: ``[D]`` for all images, ``[B, D]``, one per image, or ``[B, T, D]``.

    Raises:
        InputError: images or features of another shape.
    """
    texts, count = _texts(tower, images, text_features)
    rows = []
    for _, _, attention, gradient in islice(text_attention_gradients(tower, images, texts), count):
        weight = _read(tower, gradient)[:, :, tower.prefix_tokens :].mean(2, keepdim=True)  # [B, H, 1]
        rows.append((weight * _read(tower, attention)).mean(1).relu())
    return _shaped(tower, rows, text_features)


def chefer(tower: Tower, images: Tensor, text_features: Tensor, *, first_layer: int = 0) -> Tensor:
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
        text_features: ``[D]`` for all images, ``[B, D]``, one per image, or ``[B, T, D]``; times the logit scale for
            CLIP's logit.
        first_layer: where ``R = I`` begins, negative from the end; the published notebook's is the last.

    Raises:
        InputError: images or features of another shape, or no such layer.
    """
    texts, count = _texts(tower, images, text_features)
    turns = (tower.layers - resolve_layer(first_layer, tower.layers)) * count
    pooled = _read(tower, torch.eye(tower.tokens, dtype=torch.float64))
    rows = [pooled[None, None]] * count
    for _, text, attention, gradient in islice(text_attention_gradients(tower, images, texts), turns):
        rows[text] = _accumulate(rows[text], attention, gradient)
    return _shaped(tower, (row[:, 0] for row in rows), text_features)


def accumulated(row: Tensor, steps: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """A row through ``(I + Ā_L) ⋯ (I + Ā_1)``, ``[N] → [B, N]``, ``Ā`` the mean of ``(gradient ⊙ attention)⁺``.

    Args:
        row: whose relevance is accumulated, a weight per token, ``[N]``.
        steps: attention and gradient, ``[B, H, N, N]`` each, of one layer or more, the *last* layer first.
    """
    rows = row[None, None]
    for attention, gradient in steps:
        rows = _accumulate(rows, attention, gradient)
    return rows[:, 0]


def _accumulate(rows: Tensor, attention: Tensor, gradient: Tensor) -> Tensor:
    """``r + r Ā``, ``[B, 1, N]``."""
    with autocast_disabled(attention):
        rows = rows.to(attention)
        return rows + rows @ (gradient * attention).relu().mean(1)


def legrad(tower: Tower, images: Tensor, text_features: Tensor, *, tokens: str = "all", first_layer: int = 0) -> Tensor:
    """LeGrad (Bousselham et al. 2024): how sensitive every layer's own similarity is to that layer's attention.

    The sum over layers of ``ReLU(∂s_l/∂A_l)`` averaged over heads and queries, where ``s_l`` is the similarity of the
    layer's output, pooled and read as if it were the last. The gradient itself is the signal: attention does not
    multiply it.

    Keeps one layer's attention and graph, ``B·H·N²``.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed.
        text_features: ``[D]`` for all images, ``[B, D]``, one per image, or ``[B, T, D]``.
        tokens: ``"all"`` pools a layer's output by averaging its tokens, so that every query has a gradient;
            ``"pooled"`` by what the tower pools, which for a class token leaves one query.
        first_layer: the first that counts, negative from the end; the published package's is -2.

    Raises:
        InputError: images or features of another shape, or no such pooling or layer.
    """
    texts, count = _texts(tower, images, text_features)
    first = resolve_layer(first_layer, tower.layers)
    totals = [torch.zeros(())] * count  # [B, N] each
    for _, text, _, gradient in text_own_gradients(tower, images, texts, tokens=tokens, first_layer=first):
        totals[text] = gradient.relu().mean((1, 2)) + totals[text]
    return _shaped(tower, totals, text_features)


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
