"""TEXTSPAN: the texts that span a head's outputs.

Greedy: of all texts the one along which the head's outputs vary most is picked, its direction is removed from outputs
and texts, and so on. Only mean and second moment of the outputs matter, so the same pursuit runs on arrays and on
:class:`clipfast.Moments`. Source: arXiv 2310.05916, algorithm 1.

``K`` images, ``D`` embed_dim, ``T`` texts, ``R`` rank of a head's outputs, ``m`` texts picked.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from clipfast.analyses.spans import HeadSpans, of_outputs
from clipfast.errors import InputError
from clipfast.kernels import ops

logger = logging.getLogger("clipfast")

_TOGETHER = 48  # heads at once: their texts' coordinates stay around 50 MB

Method = Literal["greedy", "omp", "somp"]


def check_method(method: str) -> Method:
    """``method`` if it is one, else an :class:`InputError`."""
    if method not in get_args(Method):
        raise InputError(f"method is {method!r}: choose one of {', '.join(get_args(Method))}")
    return cast(Method, method)


@dataclass(frozen=True, repr=False)
class TextSpan:
    """The texts that span one head's outputs.

    Attributes:
        picks: indices into the texts, in the order they were picked; fewer than asked for where nothing was left.
        explained: ``[m]``, the share of the head's variance that each pick's direction holds.
        directions: ``[m, D]``, orthonormal: each picked text less what earlier picks hold.
        mean: ``[D]``, the head's mean output.
        rank: how many dimensions the head's outputs have here.
        variance: the head's variance, summed over dimensions.
        notes: what was clamped, stopped or found twice, a sentence each.
    """

    picks: tuple[int, ...]
    explained: Tensor
    directions: Tensor
    mean: Tensor
    rank: int
    variance: float
    notes: tuple[str, ...] = ()
    _outputs: Tensor | None = None

    def __repr__(self) -> str:
        explained = float(self.explained.sum())
        notes = f", notes {list(self.notes)}" if self.notes else ""
        return (
            f"TextSpan(picks {list(self.picks)}, explained {explained:.1%}, rank {self.rank}, "
            f"variance {self.variance:.4g}{notes})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the picks by their place among the texts, and what they explain."""
        shares = self.explained.tolist()
        rows = [
            f"<tr><td>{number}</td><td>{pick}</td><td>{share:.1%}</td><td>{sum(shares[:number]):.1%}</td></tr>"
            for number, (pick, share) in enumerate(zip(self.picks, shares, strict=True), start=1)
        ]
        head = "<tr><th>pick</th><th>text</th><th>explained</th><th>in all</th></tr>"
        notes = "".join(f"<br/>{escape(note)}" for note in self.notes)
        return (
            f"<p><b>TextSpan</b>, rank {self.rank}, variance {self.variance:.4g}{notes}</p>"
            f"<table>{head}{''.join(rows)}</table>"
        )

    def reconstruct(self, head_outputs: Tensor | None = None, size: int | None = None) -> Tensor:
        """Outputs with nothing kept but their mean and what the picked texts span.

        Args:
            head_outputs: ``[K, D]``; those the texts were picked for, if it was arrays.
            size: how many of the picks; all.

        Returns:
            ``[K, D]``: ``mean + (c − mean) Qᵀ Q`` with the directions ``Q``.

        Raises:
            InputError: no outputs, or of another width.
        """
        outputs = self._outputs if head_outputs is None else head_outputs
        if outputs is None:
            raise InputError("these texts were picked from moments: reconstruct(head_outputs) needs outputs [K, D]")
        if outputs.ndim != 2 or outputs.shape[1] != len(self.mean):
            raise InputError(f"head_outputs has shape {list(outputs.shape)}, expected [images, {len(self.mean)}]")
        kept = self.directions[:size].to(outputs)
        mean = self.mean.to(outputs)
        return mean + (outputs - mean) @ kept.T @ kept


def check_texts(text_features: Tensor, width: int) -> None:
    """Raises :class:`InputError` unless these are features of at least one text, ``[T, width]``."""
    _check(text_features, "text_features", "texts")
    if text_features.shape[1] != width or not len(text_features):
        raise InputError(f"text_features has shape {list(text_features.shape)}, expected [texts, {width}]")


def check_size(size: int) -> None:
    """Raises :class:`InputError` unless so many texts can be picked."""
    if size < 1:
        raise InputError(f"size is {size}, expected at least 1")


def _check(rows: Tensor, name: str, axis: str) -> None:
    if rows.ndim != 2 or not rows.is_floating_point():
        raise InputError(f"{name} is {rows.dtype} {list(rows.shape)}, expected floating point [{axis}, embed_dim]")
    if not bool(rows.isfinite().all()):
        raise InputError(
            f"{name} has values that are not finite, first in row {int((~rows.isfinite()).any(1).nonzero()[0])}"
        )


def distinct(text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Features that differ, ``[T', D]``, and where each stands first among the texts, ``[T']``, ascending."""
    _, inverse = torch.unique(text_features, dim=0, return_inverse=True)
    places = torch.arange(len(text_features), device=text_features.device)
    first = places.new_full((int(inverse.max()) + 1,), len(text_features))
    first = first.scatter_reduce(0, inverse, places, "amin").sort().values
    return text_features[first], first


def pursue(
    spans: HeadSpans, text_features: Tensor, size: int, method: Method = "greedy", backend: str = "auto"
) -> list[TextSpan]:
    """Picks texts for every head.

    Args:
        spans: the heads.
        text_features: ``[T, D]``.
        size: how many to pick per head.
        method: ``"greedy"`` is TEXTSPAN; ``"omp"`` gives every text unit length within the head's span first
            (orthogonal matching pursuit for many signals, Cotter et al. 2005).
        backend: which kernels compute.
    """
    features, first = distinct(text_features)
    features = features.to(spans.axes.device)
    repeated = len(text_features) - len(features)
    results = []
    for start in range(0, len(spans.ranks), _TOGETHER):
        part = spans.select(range(start, min(start + _TOGETHER, len(spans.ranks))))
        picks, rows = _picked(part, features, size, method, backend)
        explained, directions = _held(part, rows)
        for group, own in enumerate(picks):
            own = own[own >= 0]
            copies = explained[group, : len(own)].clone(), directions[group, : len(own)].clone()
            result = _result(part, group, first[own].tolist(), *copies, size)
            notes = (*result.notes, f"{repeated} texts stand twice: the first counts") if repeated else result.notes
            results.append(replace(result, notes=notes))
    return results


def _picked(spans: HeadSpans, features: Tensor, size: int, method: Method, backend: str) -> tuple[Tensor, Tensor]:
    """Indices into the features ``[G, m]``, −1 after the end, and directions ``[G, m, R]`` in each head's coordinates.

    Float64 features are float64 throughout. Coordinates of all others are float32, which rounds them no more than the
    features themselves are; what is picked from them is pursued once more by itself, in float64. So rounding decides
    which texts are picked and nothing else, and decides as float64 would where texts are 1e-4 apart and explain at
    least 1e-9 of the first pick's variance.
    """
    groups, rank, width = spans.axes.shape
    axes = spans.axes.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    # One product for all heads, in the layout that the pursuit reads.
    texts = (axes.reshape(-1, width) @ features.to(axes).T).view(groups, rank, -1).transpose(1, 2)
    texts = _scaled(texts, spans, method)
    picks, _, directions = ops.span(texts, spans.factor, size, spans.noise, backend=backend)
    if directions.dtype == torch.float64:
        return picks, directions
    picks = picks.sort(dim=1).values  # of equals the first counts, here too
    texts = _scaled(features[picks.clamp_min(0)].double() @ spans.axes.transpose(1, 2), spans, method)
    texts = texts * (picks >= 0)[..., None]  # what was not picked explains nothing
    order, _, directions = ops.span(texts, spans.factor, size, spans.noise)  # not every backend takes float64
    return torch.where(order < 0, -1, picks.gather(1, order.clamp_min(0))), directions


def _scaled(texts: Tensor, spans: HeadSpans, method: Method) -> Tensor:
    """Texts ``[G, T, R]`` as the method has them; one outside of the span stays short."""
    if method == "omp":
        return texts / texts.norm(dim=2, keepdim=True).clamp_min(spans.noise**0.5)
    return texts


def _held(spans: HeadSpans, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Variances ``[G, m]`` along directions ``[G, m, R]`` in the heads' own coordinates, and these as ``[G, m, D]``."""
    return (rows @ spans.factor).square().sum(2), rows @ spans.axes


def _result(
    spans: HeadSpans, group: int, picks: Sequence[int], explained: Tensor, directions: Tensor, size: int
) -> TextSpan:
    """What was picked for one head, with the variance ``[m]`` that each direction ``[m, D]`` holds."""
    variance = float(spans.factor[group].square().sum())
    notes = spans.notes[group]
    if len(picks) < size:
        notes = (*notes, f"stopped after {len(picks)} of {size} texts: what is left of the variance is rounding")
    return TextSpan(
        picks=tuple(picks),
        explained=explained / max(variance, torch.finfo(torch.float64).tiny),
        directions=directions,
        mean=spans.mean[group],
        rank=spans.ranks[group],
        variance=variance,
        notes=notes,
    )


def _absolute(spans: HeadSpans, head_outputs: Tensor, text_features: Tensor, size: int) -> TextSpan:
    """Simultaneous orthogonal matching pursuit: the score of a text is ``Σ_k |<residual_k, t>|``."""
    outputs = (head_outputs.double() - spans.mean[0]) @ spans.axes[0].T  # [K, R]
    texts = torch.nn.functional.normalize(text_features.double(), dim=1) @ spans.axes[0].T  # [T, R]
    first, rows = 0.0, outputs.new_zeros(0, outputs.shape[1])
    picks: list[int] = []
    while len(picks) < min(size, spans.ranks[0]):
        scores = (outputs @ texts.T).abs().sum(0)
        pick = int(scores.argmax())
        first = first or float(scores[pick])
        if not float(scores[pick]) > spans.noise**0.5 * first:
            break
        row = texts[pick]
        for _ in range(2):  # Gram-Schmidt twice is exact to rounding
            row = row - row @ rows.T @ rows
        rows = torch.cat([rows, torch.nn.functional.normalize(row, dim=0)[None]])
        outputs = outputs - outputs @ rows[-1:].T @ rows[-1:]
        picks.append(pick)
    explained, directions = _held(spans, rows[None])
    return _result(spans, 0, picks, explained[0], directions[0], size)


def textspan(
    head_outputs: Tensor,
    text_features: Tensor,
    size: int,
    rank: int | None = None,
    *,
    method: Method = "greedy",
    backend: str = "auto",
) -> TextSpan:
    """The texts that span a head's outputs, picked from the outputs themselves.

    Args:
        head_outputs: ``[K, D]``, :meth:`clipfast.Contributions.head` of many images.
        text_features: ``[T, D]``.
        size: how many texts to pick.
        rank: how many dimensions of the outputs count, the largest first; default all that stand above rounding.
        method: ``"greedy"`` (TEXTSPAN), ``"omp"`` (texts of unit length within the head's span) or ``"somp"`` (the sum
            of absolute projections in place of the variance, Tropp et al. 2006).
        backend: which kernels compute.

    Raises:
        InputError: shapes that do not fit, values that are not finite, or a size or rank below one.
    """
    _check(head_outputs, "head_outputs", "images")
    check_texts(text_features, head_outputs.shape[1])
    if not len(head_outputs):
        raise InputError("head_outputs has no images")
    check_size(size)
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}, expected at least 1")
    spans = of_outputs(head_outputs, rank)
    if check_method(method) == "somp":
        picked = _absolute(spans, head_outputs, text_features, size)
    else:
        picked = pursue(spans, text_features, size, method, backend)[0]
    for note in picked.notes:
        logger.info("%s", note)
    return replace(picked, _outputs=head_outputs)
