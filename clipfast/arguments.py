"""What is passed to a model, checked: images, texts, depth, and what a tower does not have."""

from collections.abc import Iterable, Mapping
from typing import get_args

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipfast.basis import Depth
from clipfast.errors import InputError
from clipfast.reading import Picture
from clipfast.towers.tower import Tower


def factors(tower: Tower) -> list[Tensor]:
    """The weights that multiply, which must be of one dtype."""
    tables = [tower.positional_embedding, tower.registers, None if tower.pool is None else tower.pool.weights]
    for block in tower.blocks:
        tables += [] if block.rotary is None else [*block.rotary.tensors()]
    left_out = {id(table) for table in (*tables, *tower.sources) if table is not None}
    return [tensor for tensor in tower.tensors() if tensor.ndim > 1 and id(tensor) not in left_out]


def default_depth(tower: Tower) -> Depth:
    """Whose heads a decomposition has by default."""
    learned = tower.pool is not None and tower.pool.weights is None
    return "pool" if learned or not tower.blocks else "all"


def check_depth(tower: Tower, depth: Depth | None) -> Depth:
    """The depth that is asked for, or an :class:`InputError` where a tower has none such."""
    if depth is None:
        return default_depth(tower)
    if depth not in get_args(Depth):
        raise InputError(f"depth is {depth!r}: choose 'all' or 'pool'")
    if depth == "pool" and tower.pooling == "cls":
        raise InputError("depth='pool' needs a pooling over tokens, and this model reads its class token alone")
    if depth == "all" and not tower.blocks:
        raise InputError("depth='all' needs transformer blocks, and this model has none: leave it out")
    return depth


def check_request(tower: Tower, depth: Depth, *, tokens: bool, class_token: bool) -> None:
    """Raises :class:`InputError` where a tower does not have what is asked for."""
    if class_token and not tower.has_class_token:
        raise InputError("class_token=True needs a class token, and this model has none")
    if depth == "all" and tower.pool is not None and (tokens or class_token):
        name = "tokens" if tokens else "class_token"
        raise InputError(f"{name}=True is not kept before an attention pool: ask for maps of texts, or depth='pool'")


def pictures_of(images: Iterable[Picture]) -> list[Picture]:
    """Paths and PIL images, or one line that says how to pass what else there is."""
    if isinstance(images, np.ndarray):
        raise InputError("images is a numpy array: pass PIL images (PIL.Image.fromarray), or a preprocessed tensor")
    if isinstance(images, DataLoader):
        raise InputError("images is a DataLoader: pass the images of each batch, for pixels, labels in loader: ...")
    if isinstance(images, Dataset):
        raise InputError("images is a Dataset: pass the images of each batch of a torch.utils.data.DataLoader")
    if isinstance(images, Mapping):
        raise InputError(f"images is a {type(images).__name__}: pass the images in it alone")
    try:
        pictures = list(images)
    except TypeError as error:
        kind = type(images).__name__
        raise InputError(f"images is a {kind}: pass a preprocessed tensor, PIL images or paths") from error
    tensors = [isinstance(picture, Tensor) for picture in pictures]
    if any(tensors):
        if pictures[0].ndim == 4 if isinstance(pictures[0], Tensor) else False:
            raise InputError("images is a batch with its labels: pass the first of the two alone, images[0]")
        raise InputError("images holds tensors: pass one tensor [images, 3, height, width], torch.stack(images)")
    if any(isinstance(picture, np.ndarray) for picture in pictures):
        raise InputError("images holds numpy arrays: pass PIL images (PIL.Image.fromarray), or a preprocessed tensor")
    return pictures


def strings_of(texts: Iterable[str]) -> tuple[str, ...]:
    """One string or several as a tuple; a generator is read once."""
    strings = (texts,) if isinstance(texts, str) else tuple(texts)
    wrong = next((text for text in strings if not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(f"texts hold a {type(wrong).__name__}: give strings, or features as one tensor [T, D]")
    return strings
