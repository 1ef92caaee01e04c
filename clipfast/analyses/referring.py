"""Referring segmentation without training: the one region of an image that a phrase means.

A text map of the whole phrase marks everything that the phrase names, landmarks too, and CLIP hardly reads relations.
Here the phrase is taken apart (:mod:`.phrases`), every word has a map of its own, and geometry decides the rest:

1. Words that describe how things look, colours and textures, have maps that differ where there is something to
   describe. The spread of those maps over the words, at every patch, is the salience. Its hills are the regions.
2. Each region has a mean score for each word. How a word stands out from others of its kind there (``red`` from other
   colours, ``star`` from other nouns) says how likely the region is the target, or a landmark.
3. A relation holds to a degree between 0 and 1 for every pair of regions, by their centres. A region's score is its
   likelihood times the degree to which its relations hold with where the landmarks may be.

Maps are the text maps of arXiv 2310.05916, section 5.3, summed over layers and heads. ``B`` images, ``T`` texts, ``R``
regions of an image; coordinates of centres are shares of the image's width and height, from 0 to 1.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.analyses.phrases import (
    LARGE,
    NOUNS,
    OPPOSITES,
    AttributeKind,
    Extreme,
    Phrase,
    Place,
    Relation,
    Thing,
    parse,
)
from clipfast.contributions import Contributions
from clipfast.errors import InputError

SALIENT: Final[tuple[AttributeKind, ...]] = ("colour", "texture")
"""Kinds of words whose maps make the salience."""
TEMPLATES: Final = ("a photo of a {}.", "a {}")


class HasSize(Protocol):
    """What has an input size: a tower."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input."""


class Grounder(Protocol):
    """A model that draws text maps."""

    @property
    def tower(self) -> HasSize:
        """The vision tower."""

    def encode_text(self, texts: Iterable[str]) -> Tensor:
        """Unit features of texts, ``[T, D]``."""

    def decompose(self, images: Any, *, texts: Tensor) -> Contributions:
        """Contributions of images with text maps."""


@dataclass(frozen=True)
class Vocabulary:
    """What the words of a phrase stand out from, and the sentences that they are put into.

    Attributes:
        nouns: other nouns; those of what else the images may show are best.
        attributes: other words of each kind.
        templates: sentences with ``{}``; the features of all are averaged. ``a {}`` becomes ``an {}`` before a vowel.
    """

    nouns: Sequence[str] = NOUNS
    attributes: Mapping[AttributeKind, Sequence[str]] = field(default_factory=lambda: OPPOSITES)
    templates: Sequence[str] = TEMPLATES

    def __post_init__(self) -> None:
        if len(set(self.nouns)) < 2:
            raise InputError("nouns has fewer than two: give what else the images may show")
        lacking = [kind for kind in OPPOSITES if kind != "size" and len(set(self.attributes.get(kind, ()))) < 2]
        if lacking:
            raise InputError(f"attributes has fewer than two words for {lacking[0]!r}, which stand out from nothing")
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            raise InputError("templates has one without exactly one {}, or none at all")

    def of_noun(self, noun: str) -> list[str]:
        """A noun, then what it stands out from."""
        return list(dict.fromkeys([noun, *self.nouns]))

    def of_word(self, kind: AttributeKind, word: str | None = None) -> list[str]:
        """A word for how something looks, then what it stands out from, as texts; all of a kind without a word."""
        words = dict.fromkeys([*([] if word is None else [word]), *self.attributes[kind]])
        return [f"{each} object" for each in words]

    def texts(self, phrases: Sequence[Phrase]) -> tuple[str, ...]:
        """All texts that phrases need maps for, each once."""
        needed: dict[str, None] = dict.fromkeys(
            [*self.nouns, *(text for kind in SALIENT for text in self.of_word(kind))]
        )
        for thing in (thing for phrase in phrases for thing in phrase.things):
            if not thing.generic:
                needed |= dict.fromkeys(self.of_noun(thing.noun))
            for attribute in thing.attributes:
                if attribute.kind != "size":
                    needed |= dict.fromkeys(self.of_word(attribute.kind, attribute.word))
        return tuple(needed)

    def encode(self, texts: Sequence[str], encode_text: Callable[[Iterable[str]], Tensor]) -> Tensor:
        """A unit row per text, the mean over the templates, ``[T, D]``."""
        sentences = [_fill(template, text) for text in texts for template in self.templates]
        features = encode_text(sentences).unflatten(0, (len(texts), len(self.templates)))
        return F.normalize(features.mean(1), dim=1)


def _fill(template: str, text: str) -> str:
    if text[:1] in "aeiou" and (template.startswith("a {}") or " a {}" in template):
        template = template.replace("a {}", "an {}")
    return template.replace("{}", text)


@dataclass(frozen=True)
class Settings:
    """Numbers of the method. The defaults were chosen on scenes apart from those that it is measured on.

    Attributes:
        cut: a region ends where the salience falls below this share of its own peak.
        saddle: two hills are one region where the salience between them is above this share of the lower peak.
        faint: a region's peak is at least this share of the highest one.
        most: regions of an image at most, those with the highest peaks.
        sharpness: of the words' evidence.
        tolerance: share of the image's side over which left turns into right.
        reach: share of the image's side over which nearness fades.
        floor: degree of a relation that does not hold at all.
    """

    cut: float = 0.3
    saddle: float = 0.9
    faint: float = 0.05
    most: int = 40
    sharpness: float = 0.5
    tolerance: float = 0.05
    reach: float = 0.25
    floor: float = 0.02

    def __post_init__(self) -> None:
        for name in ("cut", "saddle", "faint"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected a share from 0 to 1")
        for name in ("sharpness", "tolerance", "reach", "floor", "most"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)!r}, expected a number above 0")


@dataclass(frozen=True)
class Proposal:
    """A region that a phrase may mean.

    Attributes:
        mask: ``[height, width]`` bool.
        score: share of belief, from 0 to 1; those of all proposals of an image add up to 1.
        box: left, top, right and bottom in pixels, the last two exclusive.
    """

    mask: Tensor
    score: float
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Grounding:
    """Where a phrase's target may be in one image.

    Attributes:
        heat: ``[height, width]``, the salience of every region times its score, scaled to 0 … 1.
        proposals: the regions, best first; none where nothing in the image stands out.
    """

    heat: Tensor
    proposals: tuple[Proposal, ...]

    @property
    def mask(self) -> Tensor:
        """The best proposal's mask, ``[height, width]`` bool; empty without proposals."""
        return self.proposals[0].mask if self.proposals else torch.zeros_like(self.heat, dtype=torch.bool)


def segment(
    model: Grounder,
    images: Any,
    phrase: str | Phrase,
    vocabulary: Vocabulary | None = None,
    settings: Settings | None = None,
) -> list[Grounding]:
    """Finds what a phrase means in images.

    Args:
        model: a :class:`clipfast.Model` with a text encoder.
        images: as ``model.decompose`` takes them.
        phrase: such as ``"the red star left of the blue circle"``.
        vocabulary: what the words stand out from.
        settings: numbers of the method.

    Raises:
        InputError: a phrase without a target, or texts that the model cannot encode.
    """
    phrase = parse(phrase) if isinstance(phrase, str) else phrase
    vocabulary = vocabulary or Vocabulary()
    texts = vocabulary.texts([phrase])
    maps = model.decompose(images, texts=vocabulary.encode(texts, model.encode_text)).patch_maps()
    return ground(maps, texts, phrase, model.tower.image_size, vocabulary, settings)


def ground(
    maps: Tensor,
    texts: Sequence[str],
    phrase: Phrase,
    image_size: tuple[int, int],
    vocabulary: Vocabulary | None = None,
    settings: Settings | None = None,
) -> list[Grounding]:
    """Finds what a phrase means from maps of its words; on the CPU.

    Args:
        maps: ``[B, rows, columns, T]``, :meth:`clipfast.Contributions.patch_maps` summed over layers and heads.
        texts: names of the ``T`` texts, at least those of :meth:`Vocabulary.texts`.
        phrase: from :func:`.phrases.parse`.
        image_size: height and width of the model's input.
        vocabulary: what the words stand out from, and what the maps were drawn for.
        settings: numbers of the method.

    Returns:
        A grounding per image.

    Raises:
        InputError: maps of another shape or not finite, or without a text that is needed.
    """
    found = regions(maps, texts, image_size, vocabulary, settings)
    return [each.ground(phrase) for each in found]


def regions(
    maps: Tensor,
    texts: Sequence[str],
    image_size: tuple[int, int],
    vocabulary: Vocabulary | None = None,
    settings: Settings | None = None,
) -> list["Regions"]:
    """The regions of images, for any number of phrases; arguments and errors as for :func:`ground`."""
    vocabulary, settings = vocabulary or Vocabulary(), settings or Settings()
    if maps.ndim != 4 or not maps.is_floating_point() or maps.shape[3] != len(texts):
        raise InputError(
            f"maps is {maps.dtype} {list(maps.shape)}, expected [images, rows, columns, {len(texts)} texts]"
        )
    lacking = set(vocabulary.texts([])) - set(texts)
    if lacking:
        raise InputError(f"maps has no text {min(lacking)!r}: draw maps for Vocabulary.texts")
    if not bool(maps.isfinite().all()):
        raise InputError("maps has values that are not finite")
    maps = maps.detach().cpu().to(torch.promote_types(maps.dtype, torch.float32))
    return [Regions.of(each, texts, image_size, vocabulary, settings) for each in maps]


# ------------------------------------------------------------------------------------------------------------- regions


@dataclass(frozen=True)
class Regions:
    """The regions of one image, and the ground: all pixels outside of them.

    Attributes:
        salience: ``[height, width]``, from 0 to 1.
        masks: ``[R, height, width]`` bool.
        scores: ``[R + 1, T]``, mean maps of every region, weighted by salience, and of the ground, which is last.
        peaks: ``[R]``, highest salience of every region.
        centres: ``[R, 2]``, x and y weighted by salience.
        shares: ``[R]``, of the image's area.
        columns: column of each text in ``scores`` and ``maps``.
        maps: ``[rows, columns, T]``.
        vocabulary: what words stand out from.
        settings: numbers of the method.
    """

    salience: Tensor
    masks: Tensor
    scores: Tensor
    peaks: Tensor
    centres: Tensor
    shares: Tensor
    columns: Mapping[str, int]
    maps: Tensor
    vocabulary: Vocabulary
    settings: Settings

    @classmethod
    def of(
        cls,
        maps: Tensor,
        texts: Sequence[str],
        image_size: tuple[int, int],
        vocabulary: Vocabulary,
        settings: Settings,
    ) -> "Regions":
        """The regions of maps ``[rows, columns, T]``."""
        columns = {text: at for at, text in enumerate(texts)}
        spreads = [
            _scaled(maps[..., [columns[text] for text in vocabulary.of_word(kind)]].std(-1, correction=0))
            for kind in SALIENT
        ]
        up, across = (_enlarging(few, many, maps) for few, many in zip(maps.shape[:2], image_size, strict=True))
        salience = _scaled(up @ torch.stack(spreads).sum(0) @ across.T)
        masks = _hills(salience, settings)
        weights = torch.cat([masks * salience, ~masks.any(0, keepdim=True) * torch.ones_like(salience)[None]])
        weights = weights / weights.sum((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        pooled = up.T @ weights @ across  # the transposed enlargement: a mean of enlarged maps is one of patches
        x, y = (_middles(side, maps) for side in (image_size[1], image_size[0]))
        kept = weights[:-1]
        return cls(
            salience=salience,
            masks=masks,
            scores=torch.einsum("rhw,hwt->rt", pooled, maps),
            peaks=(masks * salience).amax((1, 2)) if len(masks) else salience.new_zeros(0),
            centres=torch.stack([kept.sum(1) @ x, kept.sum(2) @ y], 1),
            shares=masks.to(maps.dtype).mean((1, 2)),
            columns=columns,
            maps=maps,
            vocabulary=vocabulary,
            settings=settings,
        )

    def __len__(self) -> int:
        return len(self.masks)

    def ground(self, phrase: Phrase) -> Grounding:
        """Scores every region for a phrase.

        Raises:
            InputError: a text of the phrase has no map.
        """
        if not len(self):
            return Grounding(torch.zeros_like(self.salience), ())
        beliefs = self.log_beliefs(phrase).softmax(0)
        order = beliefs.argsort(descending=True, stable=True).tolist()
        proposals = tuple(Proposal(self.masks[at], float(beliefs[at]), _box(self.masks[at])) for at in order)
        heat = (self.masks * self.salience * beliefs[:, None, None]).sum(0)
        return Grounding(_scaled(heat), proposals)

    def log_beliefs(self, phrase: Phrase) -> Tensor:
        """Logarithm of every region's score for a phrase, up to a constant, ``[R]``."""
        looks = self.likelihoods(phrase.target)[:-1]
        total = looks
        for relation in phrase.relations:
            total = total + self._related(relation).clamp_min(0).add(self.settings.floor).log()
        for place in phrase.places:
            total = total + self._placed(place).add(self.settings.floor).log()
        for extreme in phrase.extremes:
            total = total + self._exceeding(extreme, (looks - looks.max()).exp())
        return total

    def likelihoods(self, thing: Thing) -> Tensor:
        """Logarithm of how likely every region shows a thing, up to a constant, ``[R + 1]``; the ground is last."""
        ground = self.peaks.min(0, keepdim=True).values  # salient things are more likely meant; the ground least of all
        total = torch.cat([self.peaks, ground]).log() / 2
        if not thing.generic:
            total = total + self._evidence(self.vocabulary.of_noun(thing.noun))
        for attribute in thing.attributes:
            if attribute.kind == "size":
                total = total + self._sized(attribute.word in LARGE)
            else:
                total = total + self._evidence(self.vocabulary.of_word(attribute.kind, attribute.word))
        return total

    def _evidence(self, texts: Sequence[str]) -> Tensor:
        """Logarithm of how far the first text stands out from the others, ``[R + 1]``.

        A region's scores are centred and divided by their own root mean square, because the attention to a region says
        how much it counts and not what it shows.
        """
        lacking = [text for text in texts if text not in self.columns]
        if lacking:
            raise InputError(f"maps has no text {lacking[0]!r}: draw maps for Vocabulary.texts")
        scores = self.scores[:, [self.columns[text] for text in texts]]
        scores = scores - scores.mean(1, keepdim=True)
        scores = scores / scores.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(scores.dtype).tiny)
        return (self.settings.sharpness * scores).log_softmax(1)[:, 0]

    def _sized(self, large: bool) -> Tensor:
        """Logarithm of how far every region's side is beyond the mean one, ``[R + 1]``; of the ground nothing."""
        sides = self.shares.log() / 2
        beyond = F.logsigmoid((1 if large else -1) * (sides - sides.mean()) / _SIZES)
        return torch.cat([beyond, beyond.new_zeros(1)])

    # ------------------------------------------------------------------------------------------------- where things are

    def _related(self, relation: Relation) -> Tensor:
        """Degree to which a relation holds for every region with all of its landmarks, ``[R]``."""
        count = len(self)
        beliefs = [self.likelihoods(landmark).softmax(0) for landmark in relation.landmarks]  # [R + 1]
        if relation.kind == "between":
            degrees = self._between()
            return torch.einsum("rab,a,b->r", degrees, beliefs[0][:count], beliefs[1][:count])
        total = torch.ones_like(self.peaks)
        for landmark, belief in zip(relation.landmarks, beliefs, strict=True):
            degrees = torch.cat([self._pairs(relation.kind), self._to_ground(relation.kind, landmark)[:, None]], 1)
            total = total * (degrees @ belief)
        return total

    def _pairs(self, kind: str) -> Tensor:
        """Degree to which a relation holds between every region and every other one, ``[R, R]``; none to itself."""
        offsets = self.centres[None] - self.centres[:, None]  # [R, R, 2], from the region to the landmark
        if kind in _AXES:
            axis, sign = _AXES[kind]
            degrees = (sign * offsets[..., axis] / self.settings.tolerance).sigmoid()
        else:
            degrees = (-offsets.norm(dim=2) / self.settings.reach).exp()
        return degrees * (1 - torch.eye(len(self), dtype=degrees.dtype))

    def _to_ground(self, kind: str, landmark: Thing) -> Tensor:
        """Degree to which a relation holds between every region and the ground that shows a landmark, ``[R]``."""
        texts = ["object"] if landmark.generic else self.vocabulary.of_noun(landmark.noun)
        if len(texts) < 2:
            return torch.zeros_like(self.peaks)
        chosen = self.maps[..., [self.columns[text] for text in texts]]
        shown = _enlarged((chosen[..., 0] - chosen.mean(-1)).clamp_min(0), self.salience)
        shown = _scaled(shown * ~self.masks.any(0))  # [height, width]
        if kind not in _AXES:
            around = F.max_pool2d(self.masks[:, None].float(), *_ring(self.salience))[:, 0].bool() & ~self.masks
            return (around * shown).sum((1, 2)) / around.sum((1, 2)).clamp_min(1)
        axis, sign = _AXES[kind]
        line = shown.sum(axis)  # over rows for x, over columns for y
        line = line / line.sum().clamp_min(torch.finfo(line.dtype).tiny)
        offsets = _middles(len(line), line)[None] - self.centres[:, axis, None]
        return (sign * offsets / self.settings.tolerance).sigmoid() @ line

    def _between(self) -> Tensor:
        """Degree to which every region is between every pair of other ones, ``[R, R, R]``."""
        one, a, b = self.centres[:, None, None], self.centres[None, :, None], self.centres[None, None]
        line = b - a
        along = ((one - a) * line).sum(-1) / line.square().sum(-1).clamp_min(1e-6)  # 0 at the one end, 1 at the other
        off = (one - a - along[..., None] * line).norm(dim=-1)
        inside = ((along - 0.1) / 0.1).sigmoid() * ((0.9 - along) / 0.1).sigmoid()
        other = 1 - torch.eye(len(self), dtype=off.dtype)
        return (
            inside
            * (-(off / (2 * self.settings.tolerance)).square()).exp()
            * other[:, :, None]
            * other[:, None]
            * other
        )

    def _placed(self, place: Place) -> Tensor:
        """Degree to which every region is at a place of the image, ``[R]``."""
        if place == "middle":
            return (-((self.centres - 0.5).norm(dim=1) / self.settings.reach).square()).exp()
        axis, sign = _PLACES[place]
        return (sign * (0.5 - self.centres[:, axis]) / (2 * self.settings.tolerance)).sigmoid()

    def _exceeding(self, extreme: Extreme, candidates: Tensor) -> Tensor:
        """Logarithm of the probability that no other candidate exceeds a region, ``[R]``.

        Args:
            extreme: in what.
            candidates: how likely every region is another candidate, ``[R]``, from 0 to 1.
        """
        if extreme in ("largest", "smallest"):
            values = (1 if extreme == "largest" else -1) * self.shares.log() / 4
        else:
            axis, sign = _EXTREMES[extreme]
            values = sign * self.centres[:, axis]
        exceeded = ((values[None] - values[:, None]) / self.settings.tolerance).sigmoid() * candidates
        exceeded = exceeded * (1 - torch.eye(len(self), dtype=values.dtype))
        return torch.log1p(-exceeded.clamp_max(1 - 1e-3)).sum(1)


_SIZES: Final = 0.15
"""By how much the logarithms of sides differ between clearly large and middling."""
_AXES: Final = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}
"""Axis of the centres, and on which side of the target the landmark is: 1 for greater coordinates."""
_PLACES: Final = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
_EXTREMES: Final = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}


def _scaled(values: Tensor) -> Tensor:
    """Values from 0 on, divided by the highest; as they are where that is 0."""
    high = values.max()
    return values / high if bool(high > 0) else values


def _enlarging(few: int, many: int, like: Tensor) -> Tensor:
    """The matrix that enlarges a side of a map bilinearly, ``[many, few]``."""
    return F.interpolate(torch.eye(few, dtype=like.dtype)[None], size=many, mode="linear", align_corners=False)[0].T


def _enlarged(grid: Tensor, like: Tensor) -> Tensor:
    up, across = (_enlarging(few, many, grid) for few, many in zip(grid.shape, like.shape, strict=True))
    return up @ grid @ across.T


def _middles(side: int, like: Tensor) -> Tensor:
    """Centres of a side's pixels, from 0 to 1."""
    return (torch.arange(side, dtype=like.dtype) + 0.5) / side


def _ring(like: Tensor) -> tuple[int, int, int]:
    """Kernel, stride and padding that widen a mask by a sixteenth of the image."""
    margin = max(1, max(like.shape) // 16)
    return 2 * margin + 1, 1, margin


def _box(mask: Tensor) -> tuple[int, int, int, int]:
    rows, columns = (mask.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _hills(salience: Tensor, settings: Settings) -> Tensor:
    """Masks of the hills of a salience ``[height, width]``, highest first, ``[R, height, width]`` bool.

    Every pixel belongs to the peak that steepest ascent leads to. Hills are joined from the highest saddle down, where
    it is above a share of the lower peak. A mask is the connected part of a hill around its peak, above the cut.
    """
    height, width = salience.shape
    uphill = F.max_pool2d(salience[None, None], 3, 1, 1, return_indices=True)[1].flatten()
    while not torch.equal(uphill, further := uphill[uphill]):
        uphill = further
    values = salience.flatten()
    owner = {peak: peak for peak in uphill.unique().tolist()}

    def top(peak: int) -> int:
        while owner[peak] != peak:
            peak = owner[peak]
        return peak

    for saddle, one, other in _saddles(uphill.view(height, width), salience):
        low, high = sorted((top(one), top(other)), key=lambda peak: (float(values[peak]), -peak))
        if low != high and saddle > settings.saddle * float(values[low]):
            owner[low] = high
    highest = float(values.max())
    peaks = sorted({top(peak) for peak in owner}, key=lambda peak: (-float(values[peak]), peak))
    kept = [peak for peak in peaks if float(values[peak]) > settings.faint * highest][: settings.most]
    joined = uphill.clone()
    for peak in owner:
        joined[uphill == peak] = top(peak)
    masks = [_around((joined == peak) & (values >= settings.cut * values[peak]), peak, height, width) for peak in kept]
    return torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)


def _saddles(labels: Tensor, salience: Tensor) -> list[tuple[float, int, int]]:
    """The highest pass between every two hills that meet, highest first, with their labels."""
    passes: dict[tuple[int, int], float] = {}
    for before, after in (
        ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
        ((slice(None, -1),), (slice(1, None),)),
    ):
        differ = labels[before] != labels[after]
        low = torch.minimum(salience[before], salience[after])[differ]
        for one, other, value in zip(
            labels[before][differ].tolist(), labels[after][differ].tolist(), low.tolist(), strict=True
        ):
            pair = (min(one, other), max(one, other))
            passes[pair] = max(value, passes.get(pair, -1.0))
    return sorted(((value, *pair) for pair, value in passes.items()), key=lambda each: (-each[0], each[1:]))


def _around(mask: Tensor, seed: int, height: int, width: int) -> Tensor:
    """The connected part of a mask ``[height · width]`` around one of its pixels, ``[height, width]``."""
    inside = mask.view(1, 1, height, width)
    part = torch.zeros(height * width)
    part[seed] = 1
    part = part.view(1, 1, height, width)
    while not torch.equal(part, grown := F.max_pool2d(part, 3, 1, 1) * inside):
        part = grown
    return part[0, 0].bool()
