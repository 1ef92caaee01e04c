"""Reports with known contents, and what a browser's parser makes of a page."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from clipfast.analyses.variance import Shares
from clipfast.report.html.content import (
    Ablated,
    ClassMap,
    Content,
    Example,
    Fact,
    Head,
    HeadMap,
    HeadText,
    Judged,
    Overlaps,
    Shot,
)
from clipfast.report.html.pictures import data_uri, heat, matrix

NASTY = "<img src=x onerror=alert(1)>.png"
ESCAPES = (NASTY, "\"onmouseover='alert(2)'", "</style></script><script>alert(3)</script>", "{{ 7 * 7 }}", "a & b < c")
"""Names that would do something where they are not escaped."""

LAYERS, HEADS = 2, 3
_VOID = {"meta", "link", "img", "input", "br"}


@dataclass
class Element:
    """An element with all text within it."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""


@dataclass
class Parsed(HTMLParser):
    """The elements of a page in order."""

    source: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[Element] = []
        self.feed(self.source)
        self.close()
        assert self._open == [], [element.tag for element in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Elements of a kind; ``class_`` asks for one of its classes."""
        wanted = attributes.pop("class_", None)
        return [
            element
            for element in self.elements
            if element.tag == tag
            and (wanted is None or wanted in (element.attributes.get("class") or "").split())
            and all(element.attributes.get(name) == value for name, value in attributes.items())
        ]

    def by_id(self, name: str) -> Element:
        (result,) = [element for element in self.elements if element.attributes.get("id") == name]
        return result


def picture(seed: int, side: int = 32) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


def head(layer: int, place: int) -> Head:
    """A head whose numbers all differ from the others'."""
    number = layer * HEADS + place
    shots = [Shot(image, f"{image}.png: {ESCAPES[image]}", 0.1 * (image + 1) - 0.01 * number) for image in range(5)]
    texts = [
        HeadText(f"text {number}, {'a red star' if number == 4 else 'a tree'} {ESCAPES[1]}", 0.4, shots[:3], shots[3:]),
        HeadText(f"second {number} {ESCAPES[2]}", 0.05 + number / 100),
    ]
    seen = picture(number, 64)
    overlay, limit = heat(seen, np.linspace(-1, 1, 16).reshape(4, 4))
    return Head(
        layer=layer,
        head=place,
        share=((number * 5) % 6 + 1) / 21,
        rank=(3, 30, 12, 7, 25, 9)[number],
        texts=texts,
        notes=(f"note {number} {NASTY}",),
        alone=Judged(f"L{layer}.H{place}", 0.75 - (number - 2) / 50, 0.5),
        map=HeadMap(NASTY, ESCAPES[2], 0.25, limit, data_uri(seen), overlay),
    )


def content() -> Content:
    """A report with everything in it, and names that must stay names."""
    heads = [head(layer, place) for layer in range(LAYERS) for place in range(HEADS)]
    seen = picture(9, 64)
    overlay, _ = heat(seen, np.linspace(-1, 1, 16).reshape(4, 4))
    return Content(
        title=f"Report {ESCAPES[2]}",
        facts=[Fact("images", "12", ESCAPES[3]), Fact("zero-shot accuracy", "75.0 %", "chance 50.0 %", doubtful=True)],
        heads=heads,
        warnings=[f"warned {ESCAPES[4]}"],
        missing=[("left out", ESCAPES[0])],
        settings=[("command", f"clipfast report {ESCAPES[0]}"), ("bytes", "caf\udce9 \x00\x1b[31m")],
        shares=Shares(0.1, (0, 1), (0.5, -0.1), (0.2, 0.3), 0.0),
        ablated=Ablated(
            baseline=Judged("nothing", 0.75, 0.5),
            chance=0.5,
            layers=[Judged("layer 0", 0.7, 0.4), Judged("layers 0 to 1", 0.55, 0.3)],
            others=[Judged("all MLPs", 0.65, 0.35), Judged("CLS→CLS", 0.74, 0.45), Judged("both", 0.6, 0.25)],
            sizes=[Judged("0", 0.5, 0.1), Judged("1", 0.6, 0.2), Judged("2", 0.72, 0.3)],
            replaced="The 6 heads of layers 0 to 1",
            worst_group=ESCAPES[0],
        ),
        overlaps=Overlaps(
            [each.name for each in heads],
            [(0, HEADS), (1, HEADS)],
            matrix(np.eye(LAYERS * HEADS)),
            [("L0.H1", "L1.H2", 0.25)],
        ),
        examples=[Example(NASTY, ESCAPES[1], data_uri(seen), [ClassMap(ESCAPES[1], 0.3, overlay)])],
        thumbnails={image: data_uri(picture(image)) for image in range(4)},
    )
