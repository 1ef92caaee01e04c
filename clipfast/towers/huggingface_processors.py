"""Image processors and tokenizers of Hugging Face's transformers as functions of one image, and of texts."""

import logging
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import Any, cast

from PIL import Image
from torch import Tensor, nn

from clipfast.errors import InputError
from clipfast.towers.huggingface_layouts import Parts
from clipfast.towers.sizes import check_patches

logger = logging.getLogger("clipfast")

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_TRIALS = ((48, 32), (32, 48))
"""Sizes of the images that show whether a processor's result has one size."""


class Preprocess:
    """An image processor as a function of one image: the same bits that the processor gives itself."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image → ``[3, height, width]``."""
        return cast(Tensor, self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0])

    @cached_property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of every result; None where they depend on the image."""
        sizes = {tuple(self(Image.new("RGB", size)).shape[1:]) for size in _TRIALS}
        return cast(tuple[int, int], sizes.pop()) if len(sizes) == 1 else None


class SizedPreprocess(Preprocess):
    """An image processor that is called with another size, in the same proportion to its crop as its own.

    Where it resizes the shortest edge and crops a square, images cover a rectangle as closely as they cover the square.

    Args:
        processor: the image processor.
        image_size: height and width of every result.

    Raises:
        InputError: it gives images of another size all the same.
    """

    def __init__(self, processor: Any, image_size: tuple[int, int]) -> None:
        super().__init__(processor)
        self._size = image_size
        if self.image_size != image_size:
            height, width = image_size
            raise InputError(
                f"{type(processor).__name__} gives no images of {height} × {width} pixels with size={processor.size}"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image → ``[3, height, width]``."""
        options = {**self._options(image.height, image.width), "return_tensors": "pt"}
        return cast(Tensor, self.processor(images=image.convert("RGB"), **options)["pixel_values"][0])

    def _options(self, image_height: int, image_width: int) -> dict[str, dict[str, int]]:
        """What the processor is called with for an image of a height and width."""
        height, width = self._size
        size, crop = _sides(self.processor.size), _sides(getattr(self.processor, "crop_size", None))
        if not getattr(self.processor, "do_center_crop", False) or len(crop) < 2:
            return {"size": {"height": height, "width": width}}
        cropped: dict[str, dict[str, int]] = {"crop_size": {"height": height, "width": width}}
        if "shortest_edge" not in size:
            zoomed = {side: round(length * size[side] / crop[side]) for side, length in cropped["crop_size"].items()}
            return {"size": zoomed, **cropped}
        zoom = size["shortest_edge"] / min(crop.values())
        if height == width:
            return {"size": {"shortest_edge": round(height * zoom)}, **cropped}
        scale = zoom * max(height / image_height, width / image_width)
        covering = {"height": max(round(image_height * scale), height), "width": max(round(image_width * scale), width)}
        return {"size": covering, **cropped}


def _sides(size: Any) -> dict[str, int]:
    """A processor's size by the names of its sides."""
    return {} if size is None else {name: int(length) for name, length in dict(size).items() if length is not None}


class PatchPreprocess(Preprocess):
    """The image processor of SigLIP 2 (NaFlex): images keep their aspect ratio, and become whole patches.

    The processor gives rows of patches, padded to one length; here they are put together again, without the padding.

    Args:
        processor: the image processor.
        image_size: of the images that the model reads, height and width; None for any.
    """

    def __init__(self, processor: Any, image_size: tuple[int, int] | None = None) -> None:
        super().__init__(processor)
        self._expected = image_size

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image → ``[3, height, width]``.

        Raises:
            InputError: the image's own size is not the one that the model reads.
        """
        rows, columns, patches = self._patches(image)
        size = int(self.processor.patch_size)
        own = (rows * size, columns * size)
        if self._expected is not None and own != self._expected:
            height, width = self._expected
            raise InputError(
                f"an image of {image.height} × {image.width} pixels becomes {own[0]} × {own[1]}, to keep its aspect "
                f"ratio, and the model reads {height} × {width}: give it a model with image_size=({own[0]}, {own[1]})"
            )
        squares = patches.unflatten(1, (size, size, 3)).unflatten(0, (rows, columns))
        return squares.permute(4, 0, 2, 1, 3).reshape(3, *own)

    def size_of(self, image: Image.Image) -> tuple[int, int]:
        """Height and width that an image is resized to: whole patches of about its own aspect ratio."""
        rows, columns, _ = self._patches(image)
        return rows * int(self.processor.patch_size), columns * int(self.processor.patch_size)

    def _patches(self, image: Image.Image) -> tuple[int, int, Tensor]:
        """Rows and columns of patches, and the patches one after the other, ``[patches, 3·size²]``."""
        out = self.processor(images=image.convert("RGB"), return_tensors="pt")
        rows, columns = map(int, out["spatial_shapes"][0])
        return rows, columns, out["pixel_values"][0][: rows * columns]

    @property
    def image_size(self) -> tuple[int, int] | None:  # type: ignore[override]
        """None: it depends on the image."""
        return None


def preprocess(source: str, parts: Parts, *, download: bool = False) -> Preprocess | None:
    """The image processor in a folder or of a name on the hub; None where there is none.

    Raises:
        InputError: it makes patches of another size than the model's.
    """
    from transformers import AutoImageProcessor

    processor = _read(AutoImageProcessor, source, download)
    return None if processor is None else _preprocess(processor, parts)


def _preprocess(processor: Any, parts: Parts) -> Preprocess:
    if not parts.takes_patches:
        return Preprocess(processor)
    size = getattr(processor, "patch_size", None)
    if (size, size) != parts.patch_size:
        raise InputError(f"the image processor makes patches of {size} pixels, and the model's are {parts.patch_size}")
    return PatchPreprocess(processor, parts.image_size)


def of_class(module: nn.Module, parts: Parts) -> Preprocess:
    """The image processor that models of a class are trained with, at the size that the tower reads.

    Raises:
        InputError: the tower reads images that are not square, and its processor crops squares.
    """
    import transformers

    height, width = parts.image_size
    exact: dict[str, Any] = {"size": {"height": height, "width": width}}
    kind = type(module).__name__
    if parts.takes_patches:
        rows, columns = height // parts.patch_size[0], width // parts.patch_size[1]
        processor = transformers.Siglip2ImageProcessor(patch_size=parts.patch_size[0], max_num_patches=rows * columns)
        return PatchPreprocess(processor, parts.image_size)
    if kind.startswith("Siglip"):
        return Preprocess(transformers.SiglipImageProcessor(**exact))
    if kind.startswith("DINOv3"):
        named = getattr(transformers, "DINOv3ViTImageProcessor", None)  # …Fast before transformers 5
        return Preprocess((named or transformers.DINOv3ViTImageProcessorFast)(**exact))
    if kind == "ViTModel":
        return Preprocess(transformers.ViTImageProcessor(**exact))
    if height != width:
        raise InputError(f"no preprocessing is known for images of {height} × {width} pixels: pass tensors")
    options: dict[str, Any] = {"size": {"shortest_edge": height}, "crop_size": {"height": height, "width": width}}
    return Preprocess(transformers.CLIPImageProcessor(**options, **({} if parts.is_clip else _IMAGENET)))


def resized(current: Preprocess, parts: Parts, image_size: tuple[int, int]) -> Preprocess:
    """The same image processor for images of another size.

    Of SigLIP 2 (NaFlex) it is the number of patches that changes: images that become another grid are refused.

    Raises:
        InputError: images that are not whole patches, or a processor that cannot be given the size.
    """
    if image_size != parts.image_size:
        check_patches(image_size, parts.patch_size)
    if isinstance(current, PatchPreprocess):
        processor = copy(current.processor)
        (height, width), (high, wide) = image_size, parts.patch_size
        processor.max_num_patches = (height // high) * (width // wide)
        return PatchPreprocess(processor, image_size)
    plain = Preprocess(current.processor)
    return plain if plain.image_size == image_size else SizedPreprocess(current.processor, image_size)


class Tokenize:
    """A tokenizer as a function of texts.

    Args:
        tokenizer: of the model.
        context: how many tokens the model reads.
        padded: whether every text is padded to ``context``, as SigLIP needs it: it reads the last token.
    """

    def __init__(self, tokenizer: Any, context: int, *, padded: bool = False) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.padding: dict[str, Any] = {"padding": True}
        if padded:
            self.padding = {"padding": "max_length", "max_length": context}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokens ``[T, longest]``, or ``[T, context]``; a text that would be cut off is an error."""
        rows = self.tokenizer(list(texts))["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > self.context:
                raise InputError(
                    f"a text has {len(row)} tokens, the model reads {self.context}: shorten {text[:60]!r}…"
                )
        return cast(Tensor, self.tokenizer(list(texts), return_tensors="pt", **self.padding)["input_ids"])


def tokenizer(source: str, module: nn.Module, *, download: bool = False) -> Callable[[Sequence[str]], Tensor] | None:
    """The tokenizer in a folder or of a name on the hub; None where there is none."""
    from transformers import AutoTokenizer

    found = _read(AutoTokenizer, source, download)
    if found is None:
        return None
    longest = int(cast(Any, module).config.text_config.max_position_embeddings)
    return Tokenize(found, longest, padded=type(module).__name__.startswith("Siglip"))


def _read(kind: Any, source: str, download: bool) -> Any:
    """What one of transformers' classes reads in a folder or of a name on the hub, None where it fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return kind.from_pretrained(source, local_files_only=not download)
        except Exception as error:  # transformers, its hub client and its files raise different types
            logger.debug("no %s in %s: %s", kind.__name__, source, error)
            return None
