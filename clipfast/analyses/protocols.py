"""What analyses need of a model. Anything that has it will do: analyses import neither the model nor its towers."""

from typing import Protocol, TypeAlias, cast

from clipfast.basis import Basis


class Sizes(Protocol):
    """Layers and heads per layer: those of a tower or a basis."""

    @property
    def layers(self) -> int:
        """Layers, ``L``."""

    @property
    def heads(self) -> int:
        """Heads per layer, ``H``."""


class HasTower(Protocol):
    """A model whose vision tower says how many layers and heads it has."""

    @property
    def tower(self) -> Sizes:
        """The vision tower."""


Source: TypeAlias = HasTower | Sizes
"""A model, or its tower or basis."""


class HasBasis(Protocol):
    """A model that gives the basis of its contributions."""

    backend: str

    def basis(self) -> Basis:
        """The model's part of every contribution."""


def sizes(model: Source) -> tuple[int, int]:
    """Layers and heads per layer of a model, or of its tower or basis."""
    source = cast(Sizes, getattr(model, "tower", model))
    return source.layers, source.heads
