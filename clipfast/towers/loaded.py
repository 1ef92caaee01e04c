"""A model as it was loaded, whatever package it comes from, and models without weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Loaded:
    """A model with its preprocessing and tokenizer.

    Attributes:
        module: the model, in eval mode.
        preprocess: PIL image → ``[3, height, width]``.
        tokenize: strings → tokens ``[T, context]``; None where no tokenizer could be loaded.
        pretrained: whether weights were loaded; False means random ones.
        image_size: height and width of the images that ``preprocess`` gives, where the tower was made for others.
    """

    module: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenize: Callable[[Sequence[str]], Tensor] | None
    pretrained: bool
    image_size: tuple[int, int] | None = None


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are made inside are on the meta device, and their initialisation is left out."""
    with torch.device("meta"), _Unfilled():
        yield


_FILLING = {
    getattr(Tensor, name)
    for name in ("add_", "clamp_", "copy_", "div_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_")
}


class _Unfilled(TorchFunctionMode):
    """Leaves out what would fill a tensor on the meta device: it has no values, and torch takes its time."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _FILLING and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
