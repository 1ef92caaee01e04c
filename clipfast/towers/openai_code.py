"""Whether classes named as those of OpenAI's ``clip`` package have its code.

The package is copied into many projects, and some change what it computes. Its classes are known by name alone, so the
source of each method that an image passes through is compared with what was published.
"""

import inspect
import io
import textwrap
import tokenize
from functools import lru_cache
from hashlib import sha256
from typing import Any

from torch import nn

from clipfast.towers.patches import plain_type

_SKIPPED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)

_PUBLISHED = {
    "VisionTransformer.forward": ("208045bfb828",),
    "VisualTransformer.forward": ("208045bfb828",),
    "Transformer.forward": ("f0991dac4cc5",),
    "ResidualAttentionBlock.forward": ("912dca7a7736",),
    "ResidualAttentionBlock.attention": ("a1fbbc25d1e6", "01f5b102d721"),
    "LayerNorm.forward": ("b0b2b4a8a8e2",),
    "QuickGELU.forward": ("5cde8d6e7344",),
    "ModifiedResNet.forward": ("3a9306a6a097", "b7a5ca05d60a"),
    "AttentionPool2d.forward": ("4286e3e6ed8b", "8892e493a888"),
}
"""Digests of each method's source, of the package and its releases on PyPI."""


def changed_methods(tower: nn.Module, module: str) -> list[str]:
    """Methods of a tower's classes whose source is none that was published, or cannot be read.

    Args:
        tower: a vision tower.
        module: where the package's classes are defined.
    """
    kinds: set[Any] = {plain_type(part) for part in tower.modules()}
    return sorted(place for kind in kinds if kind.__module__ == module for place in _changed(kind))


@lru_cache
def _changed(kind: Any) -> tuple[str, ...]:
    """Of one class."""
    names = [place for place in _PUBLISHED if place.partition(".")[0] == kind.__name__]
    return tuple(place for place in names if digest(vars(kind).get(place.partition(".")[2])) not in _PUBLISHED[place])


def digest(method: Any) -> str:
    """A digest of a method's source without comments and white space; nothing where there is none."""
    try:
        lines = io.StringIO(textwrap.dedent(inspect.getsource(method))).readline
        tokens = [token.string for token in tokenize.generate_tokens(lines) if token.type not in _SKIPPED]
    except (OSError, TypeError, tokenize.TokenError, SyntaxError):
        return ""
    return sha256(" ".join(tokens).encode()).hexdigest()[:12]
