"""Nearest images by what one head, or a set of heads, writes: for an image or for a text.

A head that writes colour finds images of the same colour. Its output has a large mean that every image shares, so the
cosine of two raw outputs is near 1 whatever they show; by default outputs are compared less the mean over the index,
as covariances and TEXTSPAN do. Source: arXiv 2310.05916, image retrieval by a head's output.

``N`` images in the index, ``Q`` queries, ``W`` numbers kept per image, ``D`` embed_dim, ``E`` head_dim, ``T`` texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from os import PathLike
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from clipfast import storage
from clipfast.analyses.ranking import largest
from clipfast.basis import Basis, StoredBasis, autocast_disabled
from clipfast.contributions import Contributions
from clipfast.errors import InputError, MissingExtra
from clipfast.indices import resolve_heads

FORMAT = "clipfast.retrieval/2"
IMAGES_AT_ONCE = 8192
QUERIES_AT_ONCE = 1024

Measure = Literal["cosine", "dot"]
Engine = Literal["exact", "faiss"]
Query: TypeAlias = Sequence[int] | Contributions | Tensor

_NAMES, _ERRORS = "utf-8", "surrogateescape"  # a file's name may hold any bytes but zero
_ROUNDINGS = 8  # an output within so many roundings of the mean has no direction


def import_faiss() -> Any:
    """The module of the engine ``"faiss"``.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return import_module("faiss")
    except ImportError:
        raise MissingExtra("faiss-cpu", "faiss", "retrieval with faiss") from None


@dataclass(frozen=True)
class Neighbours:
    """The images nearest to each query.

    Attributes:
        images: ``[Q, k]``, where they stand in the index, nearest first; of equal scores the lower index first.
            Copies of an image score equally but for rounding, which depends on where they stand in their batches.
        scores: ``[Q, k]``.
        names: their names, where the index has names.
    """

    images: Tensor
    scores: Tensor
    names: tuple[tuple[str, ...], ...] | None = None


class Index:
    """What a set of heads writes for every image, to look up the nearest.

    >>> index = Index([(11, 3)])
    >>> for batch in batches:
    ...     index.add(model.decompose(batch))
    >>> index.nearest(model.decompose(["query.png"]), 5).images
    >>> index.nearest(model.encode_text(["a red object"]), 5).images

    Per image the sum of the heads' outputs is kept: ``D`` numbers, or its coordinates in the heads' own span where
    those are fewer (``heads · E + 3``); products are the same in both. :attr:`kept` says which.

    Args:
        heads: (layer, head) pairs, layers negative from the end, each counted once; their outputs are added.

    Attributes:
        heads: the pairs, sorted, layers as the model counts them once images were added.
        names: of the images, in order; empty where they have none.
    """

    def __init__(self, heads: Sequence[tuple[int, int]]) -> None:
        if not heads:
            raise InputError("no heads to retrieve by: give (layer, head) pairs")
        self.heads = sorted(set(heads))
        self.names: list[str] = []
        self._parts: list[Tensor] = []  # [·, W] each
        self._total = torch.zeros(0)
        self._basis: Basis | None = None
        self._axes = self._fold = torch.zeros(0)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def __repr__(self) -> str:
        return f"Index({len(self)} images, heads {self.heads}, {self.kept})"

    @property
    def kept(self) -> str:
        """What is kept per image, in words."""
        if self._basis is None:
            return "nothing yet"
        width, embed_dim = self._axes.shape[1], self._basis.columns
        if width == embed_dim:
            return f"{embed_dim} numbers per image: the sum of the heads' outputs"
        return f"{width} numbers per image, coordinates in the heads' own span, in place of {embed_dim}"

    # ------------------------------------------------------------------------------------------------------ filling

    def add(self, contributions: Contributions, names: Sequence[str] | None = None) -> None:
        """Adds a batch; its images follow those that are there.

        Args:
            contributions: of the same model as those before.
            names: one per image; all batches have names or none has.

        Raises:
            InputError: another model, a head that was not kept, values that are not finite, or names that do not fit.
        """
        if not len(contributions):
            return
        named = names is not None
        if len(self) and named != bool(self.names):
            raise InputError("all images of an index have names, or none has")
        if names is not None and (len(names) != len(contributions) or any(not name or "\0" in name for name in names)):
            raise InputError(f"{len(names)} names for {len(contributions)} images: give one per image, none empty")
        if not bool(contributions.is_finite().all()):
            raise InputError("a contribution is not finite: the image or a weight is not, or an embedding is zero")
        rows = self._rows(contributions)
        if self._parts:
            rows = rows.to(self._parts[0])
            self._total += rows.double().sum(0)
        else:
            self._total = rows.double().sum(0)
        self._parts.append(rows)
        self.names += names or ()

    def _rows(self, contributions: Contributions) -> Tensor:
        """What is kept of these images, ``[B, W]``."""
        if self._basis is None:
            self._begin(contributions.basis)
        elif not self._basis.same_as(contributions.basis):
            raise InputError(
                "these contributions are of another model, of other weights or of another centring or image size"
            )
        resolve_heads(self.heads, contributions.basis.layers, contributions.basis.heads, contributions.layers)
        scale = 1 / (contributions.std * contributions.norm)
        shared = torch.stack([scale, contributions.mean * scale, 1 / contributions.norm], 1)  # [B, 3]
        codes = [contributions.codes[:, contributions.layers.index(layer), head] for layer, head in self.heads]
        with autocast_disabled(contributions.codes):
            return torch.cat([*codes, shared.to(codes[0])], 1) @ self._fold.to(codes[0])

    def _begin(self, basis: Basis) -> None:
        self._use(basis, sorted(set(resolve_heads(self.heads, basis.layers, basis.heads))))

    def _use(self, basis: Basis, heads: list[tuple[int, int]]) -> None:
        """Folds the basis of these heads, so that ``[every head's code, 1, μ, σ] / (σ n) @ fold`` is what is kept."""
        bias = torch.stack([basis.biases[layer] for layer, _ in heads]).double().sum(0)
        constants = torch.stack([bias, len(heads) * basis.mean_row.double(), len(heads) * basis.std_row.double()])
        rows = [basis.values(layer)[head].double() for layer, head in heads]
        whole = torch.cat([*rows, constants])  # [heads · E + 3, D]
        if len(whole) < whole.shape[1]:
            axes, triangular = torch.linalg.qr(whole.T)  # orthonormal: inner products are those of the outputs
            self._axes, self._fold = axes.contiguous(), triangular.T.contiguous()
        else:
            self._axes, self._fold = torch.eye(whole.shape[1], dtype=whole.dtype, device=whole.device), whole
        self._basis, self.heads = basis, heads

    # ----------------------------------------------------------------------------------------------------- searching

    def nearest(
        self,
        query: Query,
        count: int = 5,
        *,
        measure: Measure = "cosine",
        centred: bool = True,
        engine: Engine = "exact",
    ) -> Neighbours:
        """The images nearest to each query, compared block by block: never all with all at once.

        Args:
            query: positions in the index (each finds the others, not itself), contributions of other images, or text
                features ``[T, D]``.
            count: how many; all there are where that is less.
            measure: ``"cosine"`` or ``"dot"``. An output within rounding of the mean has no direction: 0.
            centred: compare outputs less their mean over the index. A text has no mean to lose: its score is the
                product with the centred output.
            engine: ``"exact"``, or ``"faiss"``: its flat index, which compares all too but decides ties as it likes.

        Raises:
            InputError: an empty index, a query that does not fit, or an unknown option.
            MissingExtra: faiss is asked for and not installed.
        """
        if measure not in get_args(Measure) or engine not in get_args(Engine):
            raise InputError(f"measure is {measure!r} and engine {engine!r}: choose cosine or dot, exact or faiss")
        if count < 1:
            raise InputError(f"count is {count}, expected at least 1")
        if not len(self):
            raise InputError("the index is empty: add contributions first")
        own: Tensor | None = None
        if isinstance(query, Contributions):
            rows = self._comparable(self._rows(query).to(self._all()), measure, centred)
        elif isinstance(query, Tensor):
            rows = self._texts(query, measure)
        else:
            own = self._positions(query)
            rows = self._comparable(self._all()[own], measure, centred)
        if not bool(rows.isfinite().all()):
            raise InputError("the query has values that are not finite")
        with autocast_disabled(rows):
            search = self._by_faiss if engine == "faiss" else partial(nearest_rows, self._all())
            scores, images = search(
                rows,
                min(count, len(self) - (own is not None)),
                own,
                lambda block: self._comparable(block, measure, centred),
            )
        names = tuple(tuple(self.names[image] for image in row) for row in images.tolist()) if self.names else None
        return Neighbours(images, scores, names)

    def _all(self) -> Tensor:
        """All that is kept, ``[N, W]``."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def _comparable(self, rows: Tensor, measure: Measure, centred: bool) -> Tensor:
        """Rows whose products are the scores."""
        return comparable(rows, self._total / len(self) if centred else None, measure)

    def _texts(self, features: Tensor, measure: Measure) -> Tensor:
        embed_dim = len(self._axes)
        if features.ndim != 2 or features.shape[1] != embed_dim or not features.is_floating_point():
            raise InputError(
                f"the query is {features.dtype} {list(features.shape)}, expected text features [texts, {embed_dim}]"
            )
        texts = features.to(self._axes)
        texts = torch.nn.functional.normalize(texts, dim=1) if measure == "cosine" else texts
        return (texts @ self._axes).to(self._all().dtype)

    def _positions(self, images: Sequence[int]) -> Tensor:
        wrong = [image for image in images if not 0 <= image < len(self)]
        if wrong:
            raise InputError(f"no images {wrong[:5]} in the index: they are 0 to {len(self) - 1}")
        return torch.tensor(list(images), dtype=torch.long, device=self._all().device)

    def _by_faiss(
        self, queries: Tensor, count: int, own: Tensor | None, prepared: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As :func:`nearest_rows`, by faiss, in float32 on the CPU."""
        index = import_faiss().IndexFlatIP(queries.shape[1])
        for start in range(0, len(self), IMAGES_AT_ONCE):
            index.add(prepared(self._all()[start : start + IMAGES_AT_ONCE]).float().cpu().contiguous().numpy())
        searched = count + (own is not None)
        if not count or not len(queries):
            empty = queries.new_empty(len(queries), count)
            return empty, empty.long()
        scores, images = map(torch.from_numpy, index.search(queries.float().cpu().contiguous().numpy(), searched))
        if own is not None:
            others = (images != own.cpu()[:, None]).to(torch.uint8)  # each query itself goes to the end, then away
            order = others.sort(dim=1, descending=True, stable=True).indices[:, :count]
            scores, images = scores.gather(1, order), images.gather(1, order)
        return scores.to(queries), images.to(queries.device)

    # --------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the index with the basis of its layers to one safetensors file.

        Raises:
            InputError: an empty index.
            OSError: the file cannot be written.
        """
        if self._basis is None or not len(self):
            raise InputError("the index is empty: add contributions first")
        header = {"format": FORMAT, "retrieved by": self.heads} | self._basis.header()
        tensors = {"rows": self._all(), "total": self._total, "axes": self._axes, "fold": self._fold}
        if self.names:
            tensors["names"] = torch.frombuffer(
                bytearray("\0".join(self.names).encode(_NAMES, _ERRORS)), dtype=torch.uint8
            )
        storage.write(path, header, tensors | self._basis.tensors(sorted({layer for layer, _ in self.heads})))

    @classmethod
    def load(cls, path: str | PathLike[str], device: str | torch.device = "cpu") -> "Index":
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: not such a file, or damaged.
            FileNotFoundError: no such file.
        """
        header, tensors = storage.read(path, FORMAT, "Index.save", device)
        with storage.as_damage(path):
            index = cls([(layer, head) for layer, head in header["retrieved by"]])
            layers = sorted({layer for layer, _ in index.heads})
            index._basis = StoredBasis.of(tensors, layers, header)
            index._parts, index._total = [tensors["rows"]], tensors["total"]
            index._axes, index._fold = tensors["axes"], tensors["fold"]
            if "names" in tensors:
                index.names = bytes(tensors["names"].cpu().numpy()).decode(_NAMES, _ERRORS).split("\0")
        return index


def comparable(rows: Tensor, mean: Tensor | None, measure: Measure = "cosine") -> Tensor:
    """Rows whose products are scores of likeness, ``[N, W]``.

    Args:
        rows: ``[N, W]``.
        mean: ``[W]``, what all rows have in common and lose; None for nothing.
        measure: ``"cosine"`` or ``"dot"``. A row within rounding of the mean has no direction: 0.
    """
    whole = rows.double()
    left = whole if mean is None else whole - mean
    if measure == "cosine":
        norm = left.norm(dim=1, keepdim=True)
        noise = _ROUNDINGS * torch.finfo(rows.dtype).eps * whole.norm(dim=1, keepdim=True)
        left = torch.where(norm > (0 if mean is None else noise), left / norm, 0)
    return left.to(rows.dtype)


def nearest_rows(
    rows: Tensor,
    queries: Tensor,
    count: int,
    own: Tensor | None = None,
    prepared: Callable[[Tensor], Tensor] = lambda block: block,
) -> tuple[Tensor, Tensor]:
    """The rows with the largest products, each query's best so far against one block of rows after another.

    Args:
        rows: ``[N, W]``.
        queries: ``[Q, W]``.
        count: how many; at most ``N``, or ``N − 1`` with ``own``.
        own: ``[Q]``, the row that each query is, which it does not find; None for queries from elsewhere.
        prepared: what is done to a block of rows before.

    Returns:
        Scores and rows, ``[Q, count]``, the largest first; of equal scores the lower row.
    """
    results = []
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        some = queries[first : first + QUERIES_AT_ONCE]
        selves = None if own is None else own[first : first + QUERIES_AT_ONCE]
        best = some.new_empty(len(some), 0)
        nearest = torch.empty(len(some), 0, dtype=torch.long, device=some.device)
        for start in range(0, len(rows), IMAGES_AT_ONCE):
            block = prepared(rows[start : start + IMAGES_AT_ONCE])
            places = torch.arange(start, start + len(block), device=some.device)
            scores = some @ block.T
            if selves is not None:
                scores.masked_fill_(places == selves[:, None], -torch.inf)
            # The best so far stand before the block, in order: of equal scores the lower row stays first.
            nearest = torch.cat([nearest, places.expand(len(some), -1)], 1)
            best, order = largest(torch.cat([best, scores], 1), count)
            nearest = nearest.gather(1, order)
        results.append((best, nearest))
    if not results:
        nothing = queries.new_empty(0, count)
        return nothing, nothing.long()
    return torch.cat([scores for scores, _ in results]), torch.cat([nearest for _, nearest in results])
