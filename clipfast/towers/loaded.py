"""A model as it was loaded, whatever package it comes from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor, nn


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
