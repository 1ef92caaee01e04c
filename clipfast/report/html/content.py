"""The contents of a report: plain numbers and names. Nothing is computed or formatted here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from clipfast.analyses.variance import Shares


@dataclass(frozen=True)
class Fact:
    """One figure of the summary.

    Attributes:
        name: what it is.
        value: as shown.
        note: how to judge it.
        doubtful: whether it suggests a wrong setup.
    """

    name: str
    value: str
    note: str = ""
    doubtful: bool = False


@dataclass(frozen=True)
class Shot:
    """An image in a row of them.

    Attributes:
        image: its number in the data set.
        name: its file's name, with its label where it has one.
        score: what the head adds to its similarity with the text.
    """

    image: int
    name: str
    score: float


@dataclass(frozen=True)
class HeadText:
    """One of a head's texts.

    Attributes:
        text: the text.
        explained: the share of the variance of the head along its direction.
        best: the images with the highest scores, in descending order; empty for texts without images.
        random: images drawn at random.
    """

    text: str
    explained: float
    best: Sequence[Shot] = ()
    random: Sequence[Shot] = ()


@dataclass(frozen=True)
class HeadMap:
    """The map of the first text of a head in the image with the highest score for it.

    Attributes:
        name: of the image.
        text: the text.
        score: of the head in this image; the map's patches and the class token add up to it.
        limit: the value at which the palette saturates.
        picture: data URI of the image as the model sees it.
        overlay: data URI of the map over it.
    """

    name: str
    text: str
    score: float
    limit: float
    picture: str
    overlay: str


@dataclass(frozen=True)
class Judged:
    """Zero-shot accuracy with something ablated.

    Attributes:
        name: what is ablated.
        accuracy: of all labelled images.
        worst: of the worst group, None without groups.
    """

    name: str
    accuracy: float
    worst: float | None = None


@dataclass(frozen=True)
class Head:
    """One head.

    Attributes:
        layer: its layer.
        head: its place there.
        share: its variance as a share of the sum of the variances of all heads.
        rank: dimension of the span of its outputs.
        texts: in the order they were picked; None for a head that was not named.
        notes: remarks.
        alone: accuracy with only this head ablated, None without labels.
        map: of its first text, None where none was drawn.
    """

    layer: int
    head: int
    share: float
    rank: int
    texts: Sequence[HeadText] | None = None
    notes: Sequence[str] = ()
    alone: Judged | None = None
    map: HeadMap | None = None

    @property
    def name(self) -> str:
        """``L5.H3``; also the anchor of the head in the page."""
        return f"L{self.layer}.H{self.head}"

    @property
    def explained(self) -> float | None:
        """The share of its variance that all its texts explain."""
        return None if self.texts is None else sum(text.explained for text in self.texts)


@dataclass(frozen=True)
class Ablated:
    """Zero-shot accuracy with and without terms.

    Attributes:
        baseline: without ablation.
        chance: accuracy of guessing.
        layers: entry ``l`` with the attention of layers 0 to ``l`` ablated.
        others: MLPs, the class token's own part, both.
        sizes: entry ``m`` with heads replaced by what ``m`` texts span.
        replaced: description of the heads replaced.
        worst_group: name of the worst group of the baseline, None without groups.
    """

    baseline: Judged
    chance: float
    layers: Sequence[Judged]
    others: Sequence[Judged]
    sizes: Sequence[Judged] = ()
    replaced: str = ""
    worst_group: str | None = None


@dataclass(frozen=True)
class ClassMap:
    """A heat map of one class.

    Attributes:
        label: the class.
        score: similarity of the image with it.
        overlay: data URI.
    """

    label: str
    score: float
    overlay: str


@dataclass(frozen=True)
class Example:
    """An image with maps for the classes with the highest scores, in descending order.

    Attributes:
        name: of the image.
        label: its label, None where it has none.
        picture: data URI of the image as the model sees it.
        maps: of classes.
    """

    name: str
    label: str | None
    picture: str
    maps: Sequence[ClassMap]


@dataclass(frozen=True)
class Overlaps:
    """Overlap of the outputs of every pair of heads.

    Attributes:
        heads: names.
        layers: (layer, number of heads) in order.
        picture: data URI of the matrix, a pixel per pair.
        alike: the pairs of heads with the largest overlaps.
    """

    heads: Sequence[str]
    layers: Sequence[tuple[int, int]]
    picture: str
    alike: Sequence[tuple[str, str, float]]


@dataclass(frozen=True)
class Content:
    """A report.

    Attributes:
        title: of the page.
        facts: the figures of the summary.
        warnings: what may make the results wrong or misleading.
        missing: what was not computed, with the reason.
        settings: names and values of the settings.
        heads: all heads, in order.
        shares: of the embedding's variance, None where contributions were not kept.
        ablated: None without labels.
        overlaps: None where there is one head only.
        examples: images with maps for classes.
        thumbnails: data URIs by image; images that are shown without one have only their name.
    """

    title: str
    facts: Sequence[Fact]
    heads: Sequence[Head]
    warnings: Sequence[str] = ()
    missing: Sequence[tuple[str, str]] = ()
    settings: Sequence[tuple[str, str]] = ()
    shares: Shares | None = None
    ablated: Ablated | None = None
    overlaps: Overlaps | None = None
    examples: Sequence[Example] = ()
    thumbnails: Mapping[int, str] = field(default_factory=dict)
