"""Explaining one zero-shot choice of one image: the choice, the concepts behind it, as a table and as JSON.

Put together from :mod:`.concepts`. ``C`` classes, ``D`` embed_dim, ``T`` texts of the pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol, TypeAlias

from PIL import Image
from torch import Tensor, nn

from clipfast.analyses.concepts import (
    Against,
    Decision,
    TextConcept,
    VisualConcept,
    VisualConcepts,
    decide,
    text_concepts,
    visual_concepts,
)
from clipfast.contributions import Contributions
from clipfast.errors import InputError

Picture: TypeAlias = Image.Image | str | PathLike[str]

_HEADS, _TEXTS = 3, 3  # of a group of patches, in a table


class Explains(Protocol):
    """A model that decomposes images and encodes texts."""

    module: nn.Module

    def decompose(self, images: Any, *, tokens: bool, layers: Sequence[int] | None) -> Contributions:
        """The terms of image embeddings."""

    def encode_text(self, texts: Any, normalize: bool = True) -> Tensor:
        """Text features."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why one image is taken for one class rather than another.

    ``margin = Σ shares + unexplained`` over text concepts, and ``margin = Σ group scores + prefix + other`` over visual
    ones, both up to rounding.

    Attributes:
        labels: the classes.
        decision: the choice.
        probabilities: ``[C]``, softmax of the scores times the model's scale; None where that is not known.
        pool: the texts that concepts are named by.
        texts: the concepts that image and classes share.
        visual: the concepts in the image.
    """

    labels: tuple[str, ...]
    decision: Decision
    probabilities: Tensor | None
    pool: tuple[str, ...]
    texts: tuple[TextConcept, ...]
    visual: VisualConcepts

    @property
    def target(self) -> str:
        """The class that is explained."""
        return self.labels[self.decision.target]

    @property
    def rival(self) -> str:
        """What it is held against."""
        return "the other classes" if self.decision.rival is None else self.labels[self.decision.rival]

    @property
    def unexplained(self) -> float:
        """What the text concepts leave of the margin."""
        return self.decision.margin - sum(concept.share for concept in self.texts)

    def heat(self) -> Tensor:
        """The order of the explanation as a heat map, ``[rows, columns]``: :meth:`.VisualConcepts.heat`."""
        return self.visual.heat()

    def class_rows(self) -> list[tuple[str, ...]]:
        """Class, similarity, probability; the most similar first."""
        scores = self.decision.scores.tolist()
        probabilities = None if self.probabilities is None else self.probabilities.tolist()
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        return [
            (
                self.labels[place],
                f"{scores[place]:+.3f}",
                "" if probabilities is None else f"{probabilities[place]:.1%}",
            )
            for place in order
        ]

    def text_rows(self) -> list[tuple[str, ...]]:
        """Text, cosine and rank on the image's side and on the classes', part of the margin."""
        rows = [
            (
                self.pool[concept.text],
                f"{concept.image_score:+.2f} (#{concept.image_rank + 1})",
                f"{concept.class_score:+.2f} (#{concept.class_rank + 1})",
                f"{concept.share:+.3f}",
            )
            for concept in self.texts
        ]
        return [*rows, ("what they leave", "", "", f"{self.unexplained:+.3f}")]

    def visual_rows(self) -> list[tuple[str, ...]]:
        """Group, its patches, heads and texts, part of the margin."""
        rows = [
            (
                name,
                str(group.patches),
                " ".join(f"L{layer}.H{head} {score:+.3f}" for layer, head, score in group.heads[:_HEADS]),
                "; ".join(self.pool[text] for text, _ in group.texts[:_TEXTS]),
                f"{group.score:+.3f}",
            )
            for name, group in self.groups()
        ]
        return [
            *rows,
            ("class token and registers", "", "", "", f"{self.visual.prefix:+.3f}"),
            ("MLPs and the rest", "", "", "", f"{self.visual.other:+.3f}"),
        ]

    def groups(self) -> list[tuple[str, VisualConcept]]:
        """The groups of patches with their letters."""
        return [(_letter(place), group) for place, group in enumerate(self.visual.groups)]

    def headline(self) -> str:
        """The choice in one line."""
        return f"{self.target} rather than {self.rival}: margin {self.decision.margin:+.3f}"

    def table(self) -> str:
        """The whole explanation as plain text."""
        return "\n\n".join(
            (
                self.headline(),
                _columns(CLASS_HEADERS, self.class_rows()),
                _columns(TEXT_HEADERS, self.text_rows()),
                _columns(VISUAL_HEADERS, self.visual_rows()),
            )
        )

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> dict[str, Any]:
        """The whole explanation as dictionaries, lists, numbers and strings."""
        decision, visual = self.decision, self.visual
        probabilities = None if self.probabilities is None else _rounded(self.probabilities.tolist())
        return {
            "target": self.target,
            "rival": None if decision.rival is None else self.rival,
            "margin": _rounded(decision.margin),
            "scores": dict(zip(self.labels, _rounded(decision.scores.tolist()), strict=True)),
            "probabilities": None if probabilities is None else dict(zip(self.labels, probabilities, strict=True)),
            "texts": [
                {
                    "text": self.pool[concept.text],
                    "image": {"score": _rounded(concept.image_score), "rank": concept.image_rank + 1},
                    "classes": {"score": _rounded(concept.class_score), "rank": concept.class_rank + 1},
                    "share": _rounded(concept.share),
                }
                for concept in self.texts
            ],
            "unexplained": _rounded(self.unexplained),
            "groups": [
                {
                    "name": name,
                    "score": _rounded(group.score),
                    "mask": group.mask.int().tolist(),
                    "heads": [
                        {"layer": layer, "head": head, "score": _rounded(score)} for layer, head, score in group.heads
                    ],
                    "texts": [{"text": self.pool[text], "cosine": _rounded(cosine)} for text, cosine in group.texts],
                }
                for name, group in self.groups()
            ],
            "class_token": _rounded(visual.prefix),
            "other": _rounded(visual.other),
        }


CLASS_HEADERS = ("class", "similarity", "probability")
TEXT_HEADERS = ("text", "in the image", "in the classes", "adds to the margin")
VISUAL_HEADERS = ("group", "patches", "through", "nearest texts", "adds to the margin")


def explain_image(
    contributions: Contributions,
    classifier: Tensor,
    labels: Sequence[str],
    pool: Tensor,
    texts: Sequence[str],
    *,
    target: str | None = None,
    against: str = "runner-up",
    concepts: int = 8,
    groups: int = 4,
    heads: Sequence[tuple[int, int]] | None = None,
    scale: float | None = None,
) -> Explanation:
    """The explanation of one image's choice, from its contributions.

    Args:
        contributions: of one image, decomposed with ``tokens=True``.
        classifier: ``[C, D]``, unit rows.
        labels: the ``C`` classes' names.
        pool: ``[T, D]``, unit rows.
        texts: the ``T`` texts.
        target: the class to explain; the most similar one for None.
        against: another class, ``"runner-up"`` or ``"mean"``, see :func:`.decide`.
        concepts: text concepts at most.
        groups: groups of patches at most.
        heads: (layer, head) pairs to look at; all kept heads for None.
        scale: what similarities are multiplied by for probabilities; None for none.

    Raises:
        InputError: arguments that do not fit, see :mod:`.concepts`.
        NotKept: decomposed without ``tokens=True``.
    """
    names = tuple(labels)
    for what, count, rows in (("labels", len(names), classifier), ("texts", len(texts), pool)):
        if count != len(rows):
            raise InputError(f"{count} {what} for {len(rows)} rows of features: give one for each")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the class {twice!r} is given twice")
    held: Against | int = "runner-up" if against == "runner-up" else "mean"
    if against not in ("runner-up", "mean"):
        held = _place(against, names)
    chosen = None if target is None else _place(target, names)
    decision = decide(contributions, classifier, chosen, held)
    embedding = contributions.embedding[0].to(decision.direction) / contributions.norm[0].to(decision.direction)
    return Explanation(
        labels=names,
        decision=decision,
        probabilities=None if scale is None else (scale * decision.scores).softmax(0),
        pool=tuple(texts),
        texts=tuple(text_concepts(embedding, decision.direction, pool, concepts)),
        visual=visual_concepts(contributions, decision.direction, pool, groups, heads),
    )


def explain(
    model: Explains,
    image: Picture | Tensor,
    classes: Sequence[str],
    texts: Sequence[str],
    *,
    target: str | None = None,
    against: str = "runner-up",
    concepts: int = 8,
    groups: int = 4,
    layers: Sequence[int] | None = None,
) -> Explanation:
    """Explains why an image is taken for one class rather than another.

    >>> print(clipfast.explain(model, "photo.jpg", ["a cat", "a dog"], clipfast.descriptions.pool("general")))

    Args:
        model: the model.
        image: a path, a PIL image, or a preprocessed tensor ``[1, 3, height, width]``.
        classes: at least two texts, as they are: no template is put around them.
        texts: the pool that concepts are named by.
        target: the class to explain; the predicted one for None.
        against: another class, ``"runner-up"``, or ``"mean"`` for the mean of all others.
        concepts: text concepts at most.
        groups: groups of patches at most.
        layers: layers whose heads are looked at, negative from the end; all for None.

    Raises:
        ImageError: a file that cannot be read.
        InputError: one class only, a class that is not there, or a model whose patches cannot be told apart.
    """
    if isinstance(classes, str) or isinstance(texts, str):
        raise InputError("classes and texts are lists of strings: put a single one into a list")
    for what, given in (("classes", classes), ("texts", texts)):
        if len(given) < 2:
            raise InputError(f"{len(given)} {what} were given: expected at least two")
    classifier = model.encode_text(list(classes))
    pool = model.encode_text(list(texts))
    contributions = model.decompose(image if isinstance(image, Tensor) else [image], tokens=True, layers=layers)
    return explain_image(
        contributions,
        classifier,
        classes,
        pool,
        texts,
        target=target,
        against=against,
        concepts=concepts,
        groups=groups,
        scale=logit_scale(model.module),
    )


def logit_scale(module: nn.Module) -> float | None:
    """What a CLIP module multiplies similarities by; None where it has no such parameter."""
    scale = getattr(module, "logit_scale", None)
    return float(scale.detach().exp()) if isinstance(scale, Tensor) and scale.numel() == 1 else None


def _place(label: str, labels: Sequence[str]) -> int:
    if label not in labels:
        raise InputError(f"there is no class {label!r}: choose from {', '.join(labels)}")
    return list(labels).index(label)


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else f"group {place + 1}"


def _columns(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (headers, *rows))
    return "\n".join(line.rstrip() for line in lines)


def _rounded(value: Any) -> Any:
    return [_rounded(each) for each in value] if isinstance(value, list) else float(f"{value:.7g}")
