"""Layers of timm's models as plain tensors, and notes of those that are not what they should be."""

from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm import layers
from timm.layers import DropPath, LayerNorm2d, PatchDropout, RmsNorm, RmsNormFp32, activations
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import LayerNormFp32 as TimmLayerNormFp32
from timm.models import vision_transformer
from torch import Tensor, nn

from clipfast.towers.patches import plain_type, replacement
from clipfast.towers.tower import Activation, LayerNorm, Linear


def classes(module: ModuleType, *names: str) -> tuple[type, ...]:
    """The classes of these names that the installed version of timm has."""
    return tuple(getattr(module, name) for name in names if hasattr(module, name))


LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
NORMS = (nn.LayerNorm, TimmLayerNorm, TimmLayerNormFp32, LayerNorm2d, RmsNorm, RmsNormFp32, nn.RMSNorm)
IDLE = (nn.Dropout, nn.Identity, DropPath, PatchDropout, *classes(layers, "PatchDropoutWithIndices"))
"""Layers that compute nothing in eval mode."""
SCALES = (*classes(layers, "LayerScale"), *classes(vision_transformer, "LayerScale"))
ACTIVATIONS: dict[type, Activation] = {
    activations.GELU: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELU: "quick_gelu",
    activations.Swish: "silu",
    nn.SiLU: "silu",
}


def zeros(weight: Tensor) -> Tensor:
    """The bias that a layer with this weight does not have."""
    return weight.new_zeros(len(weight))


def halves(packed: Linear) -> tuple[Linear, Linear]:
    """The two layers that one packs."""
    first, second = packed.weight.chunk(2)
    biases = (None, None) if packed.bias is None else packed.bias.chunk(2)
    return Linear(first, biases[0]), Linear(second, biases[1])


def apply_norm(x: Tensor, norm: LayerNorm) -> Tensor:
    """A norm over the last axis."""
    shape = x.shape[-1:]
    if norm.rms:
        return F.rms_norm(x, shape, norm.weight, norm.eps)
    return F.layer_norm(x, shape, norm.weight, norm.bias, norm.eps)


class Parts:
    """Reads layers as tensors and notes what cannot be read.

    Attributes:
        like: a weight of the model; what a layer does not have is made in its dtype, on its device.
        found: why, by key of the reasons, with the places.
        heads: numbers of heads that blocks have.
        activations: those of blocks.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.found: dict[str, list[str]] = {}
        self.heads: set[int] = set()
        self.activations: set[Activation] = set()

    def note(self, key: str, place: str = "") -> None:
        """Adds a reason, and where it applies."""
        self.found.setdefault(key, []).extend([place] if place else [])

    @property
    def notes(self) -> int:
        """How many reasons and places there are."""
        return len(self.found) + sum(map(len, self.found.values()))

    def expect(self, module: object, kinds: tuple[type, ...], place: str) -> bool:
        """Whether a layer is of one of these classes; noted if not."""
        if isinstance(module, nn.Module) and plain_type(module) in kinds:
            return True
        self.note(replacement(module), f"{place}: {type(module).__name__} in place of {kinds[0].__name__}")
        return False

    def idle(self, place: str, **layers: object) -> None:
        """Notes layers that would change anything in eval mode."""
        for name, layer in layers.items():
            if layer is not None:
                self.expect(layer, IDLE, f"{place}.{name}")

    def linear(self, module: Any, place: str) -> Linear:
        """Weight and bias; zeros of no size for a layer that was noted."""
        if self.expect(module, LINEARS, place):
            return Linear(module.weight, module.bias)
        return Linear(self.like.new_zeros(0, 0), None)

    def norm(self, module: Any, place: str) -> LayerNorm | None:
        """A norm; None for none."""
        if type(module) is nn.Identity or not self.expect(module, NORMS, place):
            return None
        weight = module.weight
        if weight is None:
            weight = self.like.new_ones(module.normalized_shape)
        bias = getattr(module, "bias", None)
        rms = isinstance(module, RmsNorm | RmsNormFp32 | nn.RMSNorm)
        eps = module.eps if module.eps is not None else torch.finfo(weight.dtype).eps
        return LayerNorm(weight, zeros(weight) if bias is None else bias, eps, rms)

    def scale(self, module: Any, place: str) -> Tensor | None:
        """A layer scale; None for none."""
        if type(module) is nn.Identity or not self.expect(module, SCALES, place):
            return None
        return cast(Tensor, module.gamma)

    def activation(self, module: nn.Module, place: str) -> Activation:
        """The name of an activation; "gelu" for one that was noted."""
        kind = plain_type(module)
        if kind is nn.GELU:
            return "gelu" if cast(nn.GELU, module).approximate == "none" else "gelu_tanh"
        if kind not in ACTIVATIONS:
            self.note("timm_activation", f"{place}: {kind.__name__}")
        return ACTIVATIONS.get(kind, "gelu")
