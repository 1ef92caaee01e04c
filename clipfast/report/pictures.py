"""Pictures of the model's input: resized and cropped, with the normalisation of colours undone."""

from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.model import Model


class Denormalizer:
    """Turns a model's input back into pictures.

    Preprocessing ends with an affine map per channel; where it takes black and white says how to undo it, whatever
    package the preprocessing is from.
    """

    def __init__(self, model: Model) -> None:
        height, width = model.tower.image_size
        black, white = (
            model.preprocess(Image.new("RGB", (width, height), colour)).float().mean(dim=(1, 2))
            for colour in ("black", "white")
        )
        self._black, self._span = black[:, None, None], (white - black)[:, None, None]

    def pictures(self, pixels: Tensor) -> list[Image.Image]:
        """Preprocessed pixels ``[B, 3, height, width]`` as ``B`` RGB pictures of that size."""
        levels = ((pixels.detach().float().cpu() - self._black) / self._span).clamp(0, 1) * 255
        arrays = levels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(np.ascontiguousarray(cast(Any, array))) for array in arrays]
