"""The packages that models come from, and which of them a module belongs to.

Each package has one file here, the only one that imports it, with the functions of :class:`Package`.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol, cast

import torch
from PIL import Image
from torch import Tensor, nn

from clipfast.towers.tower import Tower
from clipfast.towers.wrappers import unwrap

_FILES = {
    "transformers": "clipfast.towers.huggingface",
    "timm": "clipfast.towers.timm_models",
    "clip": "clipfast.towers.openai_clip",
}
"""Name of a package → its file; every other module is open_clip's, or is refused as none of its classes."""
_OPEN_CLIP = "clipfast.towers.openclip_models"


class Package(Protocol):
    """What clipfast needs of a package. ``module`` is always a model, or a vision tower alone, as a user passes it."""

    def vision_module(self, module: nn.Module) -> nn.Module:
        """The part that computes image embeddings: what is watched for changes."""

    def read(self, module: nn.Module, *, ignore_hooks: bool = False, image_size: tuple[int, int] = ...) -> Tower:
        """The vision tower as plain tensors; :class:`clipfast.errors.UnsupportedTower` with every reason.

        ``image_size`` is given where a user or a loader said one, and not else: positions are then interpolated for it
        as the package does it.
        """

    def encode_image(self, module: nn.Module, images: Tensor) -> Tensor:
        """The module's own image embeddings, ``[B, 3, height, width] → [B, D]``, of images of any size."""

    def own_forward(self, module: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The module's own embeddings, and its residual stream before the first block and after each."""

    def has_text_encoder(self, module: nn.Module) -> bool:
        """Whether :meth:`encode_text` can be called."""

    def encode_text(self, module: nn.Module, tokens: object, device: torch.device) -> Tensor:
        """Text features ``[T, D]`` of tokens ``[T, context]``, not normalised.

        Raises:
            InputError: what a tokenizer gave is not what the text encoder reads.
        """

    def default_tokenizer(self, module: nn.Module) -> Callable[[Sequence[str]], Tensor] | None:
        """Strings → tokens ``[T, context]``, where the module says which tokenizer is its own."""

    def default_preprocess(self, module: nn.Module) -> Callable[[Image.Image], Tensor]:
        """PIL image → ``[3, height, width]``."""

    def resized_preprocess(
        self, module: nn.Module, image_size: tuple[int, int], preprocess: Callable[[Image.Image], Tensor] | None = None
    ) -> Callable[[Image.Image], Tensor]:
        """The package's own preprocessing for images of another size.

        ``preprocess`` is what came with the model, where it is known: the same with the other size.
        """


def package_name(module: nn.Module) -> str:
    """The name of the package that a module's class, or one that it inherits from, is defined in."""
    homes = _homes(module)
    return next((name for name in _FILES if name in homes), "open_clip")


def _homes(module: nn.Module) -> set[str]:
    return {kind.__module__.partition(".")[0] for kind in type(unwrap(module)).__mro__}


def classes_of(module: nn.Module) -> tuple[str, ...]:
    """The classes of a model, of its image tower and, where that has one, of the trunk in it, by name."""
    visual = package_of(module).vision_module(module)
    parts = [unwrap(module), *(visual.values() if isinstance(visual, nn.ModuleDict) else [visual])]
    trunk = getattr(parts[-1], "trunk", None)
    parts += [trunk] if isinstance(trunk, nn.Module) else []
    named = [type(part).__name__ for part in parts if not isinstance(part, nn.Linear)]
    return tuple(dict.fromkeys(named))


def package_of(module: nn.Module) -> Package:
    """The package that a module's class, or one that it inherits from, is defined in."""
    homes = _homes(module)
    file = next((file for name, file in _FILES.items() if name in homes), _OPEN_CLIP)
    return cast(Package, import_module(file))
