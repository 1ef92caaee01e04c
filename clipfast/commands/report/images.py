"""Pictures of a report: thumbnails of images, and maps of heads and classes over them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from PIL import Image
from torch import Tensor

from clipfast.commands import console
from clipfast.commands.collecting import Collected
from clipfast.commands.outcome import memory_for
from clipfast.commands.reading import reading
from clipfast.errors import ClipfastError
from clipfast.report.html.content import ClassMap, Example, HeadMap, Shot
from clipfast.report.html.pictures import data_uri, fitted, heat
from clipfast.report.palette import limit
from clipfast.report.pictures import Denormalizer
from clipfast.report.shares import text_scores

_MAP = 136
"""Side of a map, shown at 136 pixels."""
_EXAMPLE = 160
_CLASSES = 3
_BATCH = 8


@dataclass(frozen=True)
class HeadMapRequest:
    """A map to draw: of a head, for a text, in an image.

    Attributes:
        layer: the head's layer.
        head: its place there.
        image: number of the image.
        text: the text.
        feature: its features, ``[D]``.
    """

    layer: int
    head: int
    image: int
    text: str
    feature: Tensor


class CollectionImages:
    """The images of a collection, opened again to show them.

    Attributes:
        gone: images that could not be opened, by number.
    """

    def __init__(self, collected: Collected) -> None:
        self._model, self._entries = collected.model, collected.collection.entries
        self._sources = collected.collection.sources()
        self._denormalizer = Denormalizer(collected.model)
        self.gone: set[int] = set()

    def shot(self, image: int, score: float) -> Shot:
        """An image in a row of them."""
        label = self._entries[image].label
        name = self.name(image)
        return Shot(image, name if label is None else f"{name}: {label}", score)

    def name(self, image: int) -> str:
        """What an image's file is called, without its folders."""
        return PurePath(self._entries[image].file).name

    def _opened(self, images: Iterable[int], what: str) -> Iterator[tuple[list[int], Tensor, list[Image.Image]]]:
        """Numbers, pixels ``[B, 3, height, width]`` and pictures of what can be opened, some at a time."""
        numbers = list(images)

        def fail(image: int, error: ClipfastError) -> None:
            if image not in self.gone:
                console.warn(error)
            self.gone.add(image)

        with (
            console.progress(what, len(numbers)) as advance,
            reading(self._model, numbers, self._sources.__getitem__, _BATCH, fail) as batches,
        ):
            for batch in batches:
                if batch.items:
                    pixels = self._model.prepare(batch.pixels)
                    yield batch.items, pixels, self._denormalizer.pictures(pixels)
                advance(_BATCH)

    def thumbnails(self, images: Iterable[int], side: int) -> dict[int, str]:
        """Data URIs by image."""
        return {
            number: data_uri(fitted(picture, side))
            for numbers, _, pictures in self._opened(images, "thumbnails")
            for number, picture in zip(numbers, pictures, strict=True)
        }

    def head_maps(self, requests: Sequence[HeadMapRequest]) -> dict[tuple[int, int], HeadMap]:
        """Maps by head."""
        by_image: dict[int, list[HeadMapRequest]] = {}
        for request in requests:
            by_image.setdefault(request.image, []).append(request)
        maps: dict[tuple[int, int], HeadMap] = {}
        for numbers, pixels, pictures in self._opened(by_image, "maps of heads"):
            layers = sorted({request.layer for number in numbers for request in by_image[number]})
            with memory_for(len(numbers), str(self._model.device)):
                contributions = self._model.decompose(pixels, tokens=True, layers=layers)
            for row, (number, picture) in enumerate(zip(numbers, pictures, strict=True)):
                one, shown = contributions.select([row]), fitted(picture, _MAP, enlarge=True)
                source = data_uri(shown)
                for request in by_image[number]:
                    place = (request.layer, request.head)
                    map_ = one.text_maps(request.feature[None], [place])[0, :, 0].float().cpu()
                    patches = (
                        map_[-contributions.grid[0] * contributions.grid[1] :].unflatten(0, contributions.grid).numpy()
                    )
                    overlay, top = heat(shown, patches)
                    maps[place] = HeadMap(self.name(number), request.text, float(map_.sum()), top, source, overlay)
        return maps

    def examples(self, images: Iterable[int], labels: Sequence[str], classifier: Tensor) -> list[Example]:
        """Images with the maps of the classes they are most like, less the mean over all classes."""
        examples = []
        for numbers, pixels, pictures in self._opened(images, "maps of classes"):
            with memory_for(len(numbers), str(self._model.device)):
                contributions = self._model.decompose(pixels, texts=classifier)
            maps = contributions.patch_maps().float()
            maps = (maps - maps.mean(-1, keepdim=True)).cpu()
            scores = text_scores(contributions, classifier)
            for row, (number, picture) in enumerate(zip(numbers, pictures, strict=True)):
                shown = fitted(picture, _EXAMPLE, enlarge=True)
                best = scores[row].argsort(descending=True, stable=True)[:_CLASSES].tolist()
                chosen = maps[row][..., best].numpy()  # [rows, columns, classes shown]
                top = limit(chosen)
                examples.append(
                    Example(
                        name=self.name(number),
                        label=self._entries[number].label,
                        picture=data_uri(shown),
                        maps=[
                            ClassMap(labels[at], float(scores[row, at]), heat(shown, chosen[..., place], top)[0])
                            for place, at in enumerate(best)
                        ],
                    )
                )
        return examples


def in_turn(rows: Mapping[tuple[int, int], Sequence[Sequence[int]]]) -> list[int]:
    """Images by how much they are missed: the best of every head's first text, then of its second, then second bests.

    Args:
        rows: per head, the most important first, images for each of its texts, the best first.
    """
    most = max((len(images) for texts in rows.values() for images in texts), default=0)
    count = max((len(texts) for texts in rows.values()), default=0)
    ordered = (
        texts[text][place]
        for place in range(most)
        for text in range(count)
        for texts in rows.values()
        if text < len(texts) and place < len(texts[text])
    )
    return list(dict.fromkeys(ordered))
