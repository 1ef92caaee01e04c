"""What analyses need of a model. Anything that has it will do: analyses import neither the model nor its towers."""

from typing import Protocol, TypeAlias

from clipfast.basis import Basis, Depth


class Sizes(Protocol):
    """Layers and heads per layer: those of a model's decomposition, of a tower or of a basis."""

    @property
    def layers(self) -> int:
        """Layers, ``L``."""

    @property
    def heads(self) -> int:
        """Heads per layer, ``H``."""


Source: TypeAlias = Sizes
"""A model, or its tower or basis."""


class HasBasis(Protocol):
    """A model that gives the basis of its contributions."""

    backend: str

    def basis(self, *, depth: Depth | None = None) -> Basis:
        """The model's part of every contribution."""


def sizes(model: Source) -> tuple[int, int]:
    """Layers and heads per layer of a model, or of its tower or basis."""
    return model.layers, model.heads
