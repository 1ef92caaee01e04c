"""LeGrad's heat maps (arXiv 2404.03214) by the names of the package ``legrad_torch``.

>>> model = LeWrapper(clipfast.load("ViT-B-16", "openai"))  # or a module that clipfast.wrap takes
>>> model.compute_legrad_clip(image=images, text_embedding=model.encode_text(["a dog", "a cat"]))  # [B, T, …]

The package's rule is that of :func:`clipfast.analyses.relevance.legrad` over the layers from ``layer_index`` on, by
default the last two: the gradient of every layer's own similarity towards its attention, without negative values,
averaged over heads and queries. The sum over layers is enlarged bilinearly by the patch size, and each map is spread
from 0 to 1. The package takes one image at a time and repeats it per text; here images are a batch and the forward is
shared by all texts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.analyses.relevance import legrad
from clipfast.compat.relevance import as_model, check_batch, enlarged, features_of, patch_size, spread
from clipfast.errors import InputError
from clipfast.model import Model


class LeWrapper:
    """A CLIP model that draws LeGrad's maps; what it does not have itself is the wrapped model's.

    Attributes:
        model: the model.
        layer_index: the first layer that counts.
        starting_depth: the same, counted from 0.

    Args:
        model: a model, or a module that :func:`clipfast.wrap` takes; it is not changed.
        layer_index: the first layer that counts, negative from the end.
    """

    def __init__(self, model: Model | nn.Module, layer_index: int = -2) -> None:
        self._wrapped = model
        self.model = as_model(model)
        self.layer_index = layer_index
        layers = self.model.tower.layers
        if not -layers <= layer_index < layers:
            raise InputError(f"layer_index {layer_index} does not exist: layers are 0 to {layers - 1}")
        self.starting_depth = layer_index % layers
        self._resized: dict[tuple[int, int], Model] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_wrapped" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._wrapped, name)

    def compute_legrad(
        self, text_embedding: Tensor | Sequence[str], image: Tensor | Sequence[str] | None = None
    ) -> Tensor:
        """:meth:`compute_legrad_clip`, the package's name for any model."""
        return self.compute_legrad_clip(text_embedding, image)

    def compute_legrad_clip(
        self, text_embedding: Tensor | Sequence[str], image: Tensor | Sequence[str] | None = None
    ) -> Tensor:
        """Heat maps of images for texts. The two may stand in either order: images have four axes.

        Args:
            text_embedding: features ``[T, D]``, or strings.
            image: ``[B, 3, height, width]``, preprocessed, of any size that is whole patches: positions are
                interpolated for it as the model's own package does it.

        Returns:
            ``[B, T, height, width]`` from 0 to 1, float32 at least; 0 where a map's values are all alike.

        Raises:
            InputError: no image, one that does not fit, other features, or a tower beyond CLIP's transformers.
        """
        if image is None:
            raise InputError("compute_legrad_clip needs image: no forward is remembered between calls")
        if _are_images(text_embedding) and not _are_images(image):
            text_embedding, image = image, text_embedding  # type: ignore[assignment]
        if not isinstance(image, Tensor):
            raise InputError(f"image is a {type(image).__name__}: give preprocessed images [B, 3, height, width]")
        model = self._at(image)
        images, texts = check_batch(model, image), features_of(self.model, text_embedding)
        scores = legrad(model.tower, images, texts[None], first_layer=self.starting_depth)
        (rows, columns), (high, wide) = model.tower.grid, patch_size(model.tower)
        return spread(enlarged(scores, (rows * high, columns * wide)))

    def _at(self, image: Tensor) -> Model:
        """The model for images of this size."""
        height, width = image.shape[-2:]
        size = (height, width)
        if image.ndim != 4 or size == self.model.image_size:
            return self.model
        if size not in self._resized:
            self._resized[size] = self.model.resized(height, width)
        return self._resized[size]


def _are_images(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


class LePreprocess:
    """A preprocessing of torchvision's transforms for square images of another size, without cropping.

    Args:
        preprocess: a composition whose last three steps come after resizing and cropping, as open_clip's.
        image_size: side of the images, in pixels.
    """

    def __init__(self, preprocess: Any, image_size: int) -> None:
        from torchvision.transforms import Compose, InterpolationMode, Resize

        steps = getattr(preprocess, "transforms", None)
        if steps is None or len(steps) < 3:
            raise InputError("preprocess is no composition of torchvision: use model.resized(height, width).preprocess")
        resize = Resize((image_size, image_size), interpolation=InterpolationMode.BICUBIC)
        self.transform = Compose([resize, *steps[-3:]])

    def __call__(self, image: Any) -> Tensor:
        """PIL image → ``[3, image_size, image_size]``."""
        result = self.transform(image)
        assert isinstance(result, torch.Tensor)
        return result
