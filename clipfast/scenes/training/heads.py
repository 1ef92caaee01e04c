"""Supervised heads on the vision tower, used only during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.scenes.encoding import KIND_FIELDS
from clipfast.scenes.training.pool import PATCH
from clipfast.scenes.vocabulary import ATTRIBUTES

_DENSE: Final = ("shape", "colour", "texture")
_WHOLE: Final = ("shape", "colour", "texture", "size", "position", "count", "background", "lighting")
_SECOND: Final = len(KIND_FIELDS) + 1
_NONE: Final = -100
_REACH: Final = 28
"""Distance from an object's centre, in pixels, within which patches learn their offset."""


@dataclass(frozen=True)
class DenseTruth:
    """Targets of the patches of a batch.

    codes     [batch, 14] int64 rows of `encode_scene`
    coverage  [batch, patches] float, the share of each patch that objects cover
    owner     [batch, patches] int64, the kind of object (0 or 1) that covers most of it
    outline   [batch, patches, 64] float, 1 for the patch's pixels that objects cover
    offset    [batch, patches, 2] float, pixels from the nearest object's centre to that of the patch
    """

    codes: Tensor
    coverage: Tensor
    owner: Tensor
    outline: Tensor
    offset: Tensor


class Heads(nn.Module):
    """Linear heads that read the scene's attributes from the class token and the objects' from patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.whole = nn.ModuleDict({name: nn.Linear(width, len(ATTRIBUTES[name])) for name in _WHOLE})
        self.dense = nn.ModuleDict({name: nn.Linear(width, len(ATTRIBUTES[name])) for name in _DENSE})
        self.outline = nn.Linear(width, PATCH * PATCH)
        self.offset = nn.Linear(width, 2)

    def whole_loss(self, token: Tensor, codes: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean cross entropy of the scene's attributes, and the accuracy of each attribute where it is defined.

        Args:
            token: [batch, width] class tokens after the last norm.
            codes: [batch, 14] int64 rows of `encode_scene`.
        """
        losses, accuracies = [], {}
        for name in _WHOLE:
            logits = self.whole[name](token)
            first, second = attribute_targets(name, codes)
            one = F.cross_entropy(logits, first, ignore_index=_NONE, reduction="none")
            two = F.cross_entropy(logits, second, ignore_index=_NONE, reduction="none")
            both = (second != _NONE).float()
            weight = (first != _NONE).float()
            terms = torch.where(both > 0, (one + two) / 2, one) * weight
            losses.append(terms.sum() / weight.sum().clamp(min=1))
            clear = (first != _NONE) & (second == _NONE)
            accuracies[name] = _accuracy(logits, first, clear)
        return torch.stack(losses).mean(), accuracies

    def dense_loss(self, tokens: Tensor, truth: DenseTruth) -> tuple[Tensor, float]:
        """Loss of the patch tokens, and their accuracy on the object's shape.

        A patch predicts which of its pixels belong to objects, its offset from the nearest object's
        centre, and, weighted by coverage, the shape, colour and texture of the object that covers it.

        Args:
            tokens: [batch, patches, width] patch tokens after the last norm.
            truth: targets of the patches.
        """
        codes, coverage = truth.codes, truth.coverage
        outline = F.binary_cross_entropy_with_logits(self.outline(tokens), truth.outline)
        near = (truth.offset.square().sum(dim=2) < _REACH**2).float()
        offset_loss = F.smooth_l1_loss(self.offset(tokens), truth.offset / PATCH, reduction="none").mean(dim=2)
        loss = outline + (offset_loss * near).sum() / near.sum().clamp(min=1)
        mass = coverage.sum().clamp(min=1)
        accuracy = 0.0
        for name in _DENSE:
            field = KIND_FIELDS.index(name)
            kinds = torch.stack([codes[:, field], codes[:, _SECOND + field]], dim=1)
            target = kinds.gather(1, truth.owner).clamp(min=0)
            logits = self.dense[name](tokens)
            terms = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            loss = loss + (terms * coverage.flatten()).sum() / mass
            if name == "shape":
                accuracy = _accuracy(logits.flatten(0, 1), target.flatten(), coverage.flatten() > 0.3)
        return loss / (len(_DENSE) + 1), accuracy


def attribute_targets(name: str, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Classes of the first and the second kind of object, [batch] each; _NONE where undefined."""
    nothing = torch.full_like(codes[:, 0], _NONE)
    if name == "background":
        return codes[:, -2], nothing
    if name == "lighting":
        return codes[:, -1], nothing
    if name == "count":
        return codes[:, _SECOND - 1] + codes[:, 2 * _SECOND - 1] - 1, nothing
    field = KIND_FIELDS.index(name)
    first, second = codes[:, field], codes[:, _SECOND + field]
    return first.where(first >= 0, nothing), second.where(second >= 0, nothing)


def _accuracy(logits: Tensor, target: Tensor, where: Tensor) -> float:
    if not bool(where.any()):
        return float("nan")
    return float((logits.argmax(dim=1) == target)[where].float().mean())
