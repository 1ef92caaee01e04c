"""Code × basis: contributions are small per-image codes times matrices that belong to the model.

For head h of layer l, with the final LayerNorm frozen at the image's own μ, σ and n = ‖embedding‖::

    code[l,h]  = [ z, 1, μ, σ ] / (σ n)                                        per image
    basis[l,h] = [ W_O γP ; b_O γP / H ; −1ᵀγP / (K H) ; βP / (K H) ]          per model
    c[l,h]     = code[l,h] @ basis[l,h]

Only the first rows depend on the head, so a :class:`Basis` keeps them per layer and the last three as vectors. Its
columns are the dimensions of the embedding, or texts after :meth:`Basis.towards`: anything linear in ``c`` is done on
codes with a folded basis. Source: arXiv 2310.05916, section 3; the even split of μ, β and b_O is that of its code.

``z`` is what the pooled row reads. Where a norm stands between the heads and the stream it is frozen at that row, too:
a norm of all heads' outputs acts on ``z``; of one after the output projection, ``1/σ`` is one more number of ``z``, by
which b_O is multiplied.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.fingerprint import checksum, fingerprint
from clipfast.kernels.reference import accumulation_dtype
from clipfast.towers.tower import LayerNorm, Output, Tower

Centring = Literal["uniform", "termwise"]
Depth = Literal["all", "pool"]
Kind = Literal["stream", "pool", "upstream"]
_ROWS = ("biases", "mean_row", "std_row")
_SERIALS = count()


def autocast_disabled(like: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on the device of a tensor, so that products have the dtype of their operands."""
    if like.device.type == "meta":  # torch has no autocast there
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


class Basis:
    """The model's part of every contribution.

    Axes: ``L`` layers, ``H`` heads, ``E`` head_dim, ``C`` columns (embed_dim or texts).

    Attributes:
        biases: ``[L, C]``, ``b_O γP / H`` of each layer, the same for its heads.
        mean_row: ``[C]``, ``−1ᵀγP / (K H)``, multiplied by an image's μ (zero for centring ``"termwise"``).
        std_row: ``[C]``, ``βP / (K H)``, multiplied by an image's σ.
        heads: heads per layer.
        centring: how the mean was split: ``"uniform"`` (μ/K each, the paper's code) or ``"termwise"``.
        kind: what its heads are: ``"stream"``, those of the blocks; ``"pool"``, those of the pooling; ``"upstream"``,
            those of the blocks as an attention pool reads them: their codes are the contributions themselves.
        serial: a number that no other basis of this process has had.
    """

    def __init__(
        self,
        biases: Tensor,
        mean_row: Tensor,
        std_row: Tensor,
        heads: int,
        centring: Centring,
        kind: Kind = "stream",
    ) -> None:
        self.biases = biases
        self.mean_row = mean_row
        self.std_row = std_row
        self.heads = heads
        self.centring = centring
        self.kind: Kind = kind
        self.serial = next(_SERIALS)
        self._made: dict[int, Tensor] = {}
        self._moved: dict[tuple[torch.device, torch.dtype], Basis] = {}

    @property
    def layers(self) -> int:
        """Number of layers, ``L``."""
        return self.biases.shape[0]

    @property
    def columns(self) -> int:
        """Number of columns, ``C``: embed_dim or texts."""
        return self.biases.shape[1]

    def values(self, layer: int) -> Tensor:
        """``W_O γP`` of one layer, ``[H, E, C]``; computed at first use, then kept."""
        if layer not in self._made:
            if torch.compiler.is_compiling():
                self._made[layer] = self._make(layer)
            else:
                with torch.inference_mode(False):  # kept beyond it, and by kernels for as long as it does not change
                    self._made[layer] = self._make(layer)
        return self._made[layer]

    def _make(self, layer: int) -> Tensor:
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Of all vision weights of the model, see :func:`clipfast.fingerprint.fingerprint`; read at first use.

        Raises:
            InputError: the weights have changed since the basis was made.
        """
        raise NotImplementedError

    def same_as(self, other: "Basis") -> bool:
        """Whether both are of the same weights and centring, wherever they are kept."""
        mine, theirs = self._source(), other._source()
        if mine is theirs:
            return True
        if (mine.heads, mine.centring, mine.kind) != (theirs.heads, theirs.centring, theirs.kind):
            return False
        digest = mine._known_fingerprint()
        return digest is not None and digest == theirs._known_fingerprint()

    def _known_fingerprint(self) -> str | None:
        """The fingerprint, or None where the weights have changed before it was read."""
        return self.fingerprint

    def _source(self) -> "Basis":
        """The basis that this one is a copy of, on another device or in another dtype."""
        return self

    def tensors(self, layers: Sequence[int]) -> dict[str, Tensor]:
        """Everything about these layers by name, as :meth:`StoredBasis.of` reads it."""
        rows = {f"basis/{name}": getattr(self, name) for name in _ROWS}
        if self.kind == "upstream":  # the same for all layers and heads
            return rows
        return rows | {f"basis/values/{layer}": self.values(layer) for layer in layers}

    def header(self) -> dict[str, Any]:
        """Everything else about it, as :meth:`StoredBasis.of` reads it."""
        kind = {} if self.kind == "stream" else {"kind": self.kind}  # older files have no other
        return {"heads": self.heads, "centring": self.centring, "fingerprint": self.fingerprint} | kind

    def towards(self, texts: Tensor) -> "Basis":
        """The same basis with texts as columns.

        Args:
            texts: ``[T, C]``.
        """
        return _Projected(self, texts)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Basis":
        """The same basis on another device or in another dtype: made once, its layers converted when first read."""
        if (self.biases.device, self.biases.dtype) == (device, dtype):
            return self
        if (device, dtype) not in self._moved:
            self._moved[device, dtype] = _Moved(self, device, dtype)
        return self._moved[device, dtype]

    def constants(self, mean: Tensor, std: Tensor, layers: Sequence[int]) -> Tensor:
        """What a head adds besides its values, before the division by σ n: ``b_O γP/H + μ·… + σ·…``.

        Args:
            mean: ``[B]``.
            std: ``[B]``.
            layers: which layers.

        Returns:
            ``[B, len(layers), C]``, the same for every head of a layer.
        """
        shared = mean[:, None] * self.mean_row + std[:, None] * self.std_row
        if not layers:
            return shared.new_empty(len(shared), 0, self.columns)
        # No index: that would copy a list to the device, which a CUDA graph cannot.
        return shared[:, None] + torch.stack([self.biases[layer] for layer in layers])


class StoredBasis(Basis):
    """A basis read from a file.

    Args:
        biases: ``[L, C]``.
        mean_row: ``[C]``.
        std_row: ``[C]``.
        heads: heads per layer.
        centring: how the mean was split.
        fingerprint: of the model's weights.
        values: ``[H, E, C]`` by layer.
    """

    def __init__(
        self,
        biases: Tensor,
        mean_row: Tensor,
        std_row: Tensor,
        heads: int,
        centring: Centring,
        fingerprint: str,
        values: Mapping[int, Tensor],
        kind: Kind = "stream",
    ) -> None:
        super().__init__(biases, mean_row, std_row, heads, centring, kind)
        self._fingerprint = fingerprint
        self._made = dict(values)

    @property
    def fingerprint(self) -> str:
        """Of all vision weights of the model."""
        return self._fingerprint

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layers: Sequence[int], header: Mapping[str, Any]) -> "StoredBasis":
        """The basis in a file, from what :meth:`Basis.tensors` and :meth:`Basis.header` wrote."""
        biases, mean_row, std_row = (tensors[f"basis/{name}"] for name in _ROWS)
        heads, kind = header["heads"], header.get("kind", "stream")
        if kind == "upstream":
            values = dict.fromkeys(layers, _identity(biases, heads))
        else:
            values = {layer: tensors[f"basis/values/{layer}"] for layer in layers}
        return cls(
            biases,
            mean_row,
            std_row,
            heads=heads,
            centring=check_centring(header["centring"]),
            fingerprint=header["fingerprint"],
            values=values,
            kind=kind,
        )

    def _make(self, layer: int) -> Tensor:
        raise InputError(f"layer {layer} was not kept: the layers here are {sorted(self._made)}")


class _Projected(Basis):
    """Another basis with texts as columns."""

    def __init__(self, basis: Basis, texts: Tensor) -> None:
        biases, mean_row, std_row = (row @ texts.T for row in (basis.biases, basis.mean_row, basis.std_row))
        super().__init__(biases, mean_row, std_row, basis.heads, basis.centring, basis.kind)
        self._basis = basis
        self._texts = texts

    @property
    def fingerprint(self) -> str:
        """Of all vision weights of the model."""
        return self._basis.fingerprint

    def _make(self, layer: int) -> Tensor:
        return self._basis.values(layer) @ self._texts.T


class _Moved(Basis):
    """Another basis on another device or in another dtype."""

    def __init__(self, basis: Basis, device: torch.device, dtype: torch.dtype) -> None:
        biases, mean_row, std_row = (row.to(device, dtype) for row in (basis.biases, basis.mean_row, basis.std_row))
        super().__init__(biases, mean_row, std_row, basis.heads, basis.centring, basis.kind)
        self._basis = basis

    @property
    def fingerprint(self) -> str:
        """Of all vision weights of the model."""
        return self._basis.fingerprint

    def _source(self) -> Basis:
        return self._basis._source()

    def _make(self, layer: int) -> Tensor:
        return self._basis.values(layer).to(self.biases)


def check_centring(centring: str) -> Centring:
    """``centring`` if it is one, else an :class:`InputError`."""
    if centring not in get_args(Centring):
        raise InputError(f"centring is {centring!r}: choose one of {', '.join(get_args(Centring))}")
    return cast(Centring, centring)


def _identity(biases: Tensor, heads: int) -> Tensor:
    """The values of an ``"upstream"`` basis, ``[H, C, C]``, one matrix for all heads."""
    columns = biases.shape[1]
    return torch.eye(columns, dtype=biases.dtype, device=biases.device).expand(heads, -1, -1)


class Readout:
    """A norm's weights and the projection after it as one linear map of the terms before.

    Attributes:
        matrix: ``[W, C]``, ``γP`` (centred over its rows for centring ``"termwise"``).
        mean_row: ``[C]``, ``−1ᵀγP / K``.
        std_row: ``[C]``, ``(βP + b) / K``.

    Args:
        width: ``W``.
        norm: the final LayerNorm, None for none.
        projection: ``[W, D]``, None for none.
        bias: ``[D]`` of the projection, None for none.
        terms: ``K``, how many terms share the constants.
        centring: how the mean is split over them.
        like: a tensor of the dtype and device of all.
        texts: ``[T, D]``, in place of the dimensions of the embedding.
    """

    def __init__(
        self,
        width: int,
        norm: LayerNorm | None,
        projection: Tensor | None,
        bias: Tensor | None,
        terms: int,
        centring: Centring,
        like: Tensor,
        texts: Tensor | None = None,
    ) -> None:
        dtype = like.dtype
        if projection is None:
            projection = torch.eye(width, dtype=dtype, device=like.device)
        projection = projection.detach().to(dtype)
        shift = None if bias is None else bias.detach().to(dtype)
        if texts is not None:
            directions = texts.to(dtype).T
            projection = projection @ directions
            shift = None if shift is None else shift @ directions
        self.matrix = projection if norm is None else norm.weight.detach().to(dtype)[:, None] * projection
        self.std_row = self.matrix.new_zeros(self.matrix.shape[1])
        if norm is not None:
            self.std_row = norm.bias.detach().to(dtype) @ projection / terms
        if shift is not None:
            self.std_row = self.std_row + shift / terms
        self.mean_row = torch.zeros_like(self.std_row)
        if norm is not None and not norm.rms:
            if centring == "termwise":
                self.matrix = self.matrix - self.matrix.mean(0)
            else:
                self.mean_row = -self.matrix.sum(0) / terms

    def term(self, residual: Tensor, mean: Tensor, std: Tensor, count: int = 1) -> Tensor:
        """``count`` residual terms added up, read out, before the division by σ n.

        Args:
            residual: ``[B, ..., W]``.
            mean: ``[B]``.
            std: ``[B]``.
            count: how many of the K terms ``residual`` is the sum of.

        Returns:
            ``[B, ..., C]``.
        """
        shared = mean[:, None] * self.mean_row + std[:, None] * self.std_row
        shape = (shared.shape[0], *[1] * (residual.ndim - 2), shared.shape[1])
        return residual @ self.matrix + count * shared.view(shape)


class TowerBasis(Basis):
    """The basis of a tower in memory, with the readout of its other residual terms.

    Attributes:
        readout: reads out the start of the residual stream and the MLPs.
    """

    readout: Readout
    _tower: Tower
    _read_fingerprint: Callable[[], str] | None
    _digest: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of all vision weights of the model."""
        if self._digest is None:
            self._digest = fingerprint(self._tower) if self._read_fingerprint is None else self._read_fingerprint()
        return self._digest

    def _known_fingerprint(self) -> str | None:
        try:
            return self.fingerprint
        except InputError:
            return None


class FoldedTower(TowerBasis):
    """The basis of heads whose outputs are codes: those of the blocks or of the pooling.

    Args:
        tower: the model.
        readout: of what they add to.
        outputs: of each layer.
        heads: of each layer.
        centring: how the mean is split.
        kind: what the heads are.
        read_fingerprint: gives the fingerprint of the weights.
    """

    def __init__(
        self,
        tower: Tower,
        readout: Readout,
        outputs: Sequence[Output],
        heads: int,
        centring: Centring,
        kind: Kind,
        read_fingerprint: Callable[[], str] | None = None,
    ) -> None:
        biases = torch.stack([_bias(output, readout.matrix.dtype) for output in outputs])
        super().__init__(
            biases @ readout.matrix / heads,
            readout.mean_row / heads,
            readout.std_row / heads,
            heads,
            centring,
            kind,
        )
        self.readout = readout
        self._outputs = outputs
        self._tower = tower
        self._read_fingerprint = read_fingerprint
        # Compiled code makes its basis anew at every call and cannot see versions.
        unchecked = torch.compiler.is_compiling() or tower.device.type == "meta"  # there are no bytes to check
        self._checksums = None if unchecked else [checksum(output.tensors()) for output in outputs]

    def _make(self, layer: int) -> Tensor:
        output = self._outputs[layer]
        if self._checksums is not None and checksum(output.tensors()) != self._checksums[layer]:
            raise InputError("the weights have changed since these images were decomposed: decompose them again")
        columns = self.readout.matrix
        with torch.no_grad(), autocast_disabled(columns):
            if output.scale is not None:
                columns = output.scale.to(columns.dtype)[:, None] * columns
            return self._values_of(output, columns)

    def _values_of(self, output: Output, columns: Tensor) -> Tensor:
        """``[H, E, C]`` of an output, given what reads the stream, ``[W, C]``."""
        dtype, (inner, post) = columns.dtype, (output.inner_norm, output.post_norm)
        if post is not None:
            columns = post.weight.to(dtype)[:, None] * columns
            columns = columns if post.rms else columns - columns.mean(0)
        weight = output.weight.to(dtype).T
        if inner is not None:
            weight = inner.weight.to(dtype)[:, None] * weight
        values = (weight @ columns).view(self.heads, -1, columns.shape[1])
        if post is None and not any(each.post_norm for each in self._outputs):
            return values
        # One number more per head: 1/σ of the norm after the projection, which is the bias's factor.
        bias = _inner_bias(output, dtype) @ columns / self.heads
        row = torch.zeros_like(bias) if post is None else bias
        return torch.cat([values, row.expand(self.heads, 1, -1)], 1)


def _inner_bias(output: Output, dtype: torch.dtype) -> Tensor:
    """What an output adds besides its heads, before its norm and scale, ``[W]``."""
    bias = output.bias.to(dtype)
    if output.inner_norm is None:
        return bias
    return bias + output.weight.to(dtype) @ output.inner_norm.bias.to(dtype)


def _bias(output: Output, dtype: torch.dtype) -> Tensor:
    """What an output adds to the stream whatever the image is, ``[W]``."""
    if output.inner_norm is None and output.post_norm is None:  # rounded as the forward rounds it
        return (output.bias if output.scale is None else output.bias * output.scale).to(dtype)
    bias = _inner_bias(output, dtype) if output.post_norm is None else output.post_norm.bias.to(dtype)
    return bias if output.scale is None else bias * output.scale.to(dtype)


class UpstreamBasis(TowerBasis):
    """The basis of the blocks of a tower whose attention pool reads them: the identity.

    Attributes:
        texts: ``[T, D]`` of the columns, where they are texts.
    """

    def __init__(
        self,
        tower: Tower,
        readout: Readout,
        centring: Centring,
        read_fingerprint: Callable[[], str] | None = None,
        texts: Tensor | None = None,
    ) -> None:
        row = readout.std_row
        nothing = (row.new_zeros(tower.layers, len(row)), torch.zeros_like(row), torch.zeros_like(row))
        super().__init__(*nothing, tower.heads, centring, "upstream")
        self.readout = readout
        self.texts = texts
        self._tower = tower
        self._read_fingerprint = read_fingerprint

    def _make(self, layer: int) -> Tensor:
        return _identity(self.biases, self.heads)


@torch.no_grad()
def fold(
    tower: Tower,
    centring: Centring,
    texts: Tensor | None = None,
    read_fingerprint: Callable[[], str] | None = None,
    depth: Depth = "all",
) -> TowerBasis:
    """Folds a tower's output projections, final LayerNorm and projection into a basis.

    Args:
        tower: the model.
        centring: ``"uniform"`` or ``"termwise"``.
        texts: ``[T, D]``, to get columns for texts without the ``D``-wide basis in between.
        read_fingerprint: gives the fingerprint of the weights, or raises :class:`InputError` if they have changed.
        depth: ``"all"`` for the heads of the blocks, ``"pool"`` for those of the pooling.

    Returns:
        A basis whose per-layer values are made at first use; it raises :class:`InputError` then if a weight of the
        tower has changed in the meantime.
    """
    like = torch.empty(0, dtype=accumulation_dtype(tower.dtype), device=tower.device)
    pool, projection, bias = tower.pool, tower.projection, tower.projection_bias
    with autocast_disabled(like):
        if pool is not None:
            terms = 1 if depth == "pool" else tower.terms
            readout = Readout(len(pool.out_weight), pool.norm, projection, bias, terms, centring, like, texts)
            if depth == "all":
                return UpstreamBasis(tower, readout, centring, read_fingerprint, texts)
            outputs, heads = [Output(pool.out_weight, pool.out_bias)], pool.heads
            return FoldedTower(tower, readout, outputs, heads, centring, "pool", read_fingerprint)
        terms = 1 if depth == "pool" else tower.terms
        readout = Readout(tower.width, tower.ln_post, projection, bias, terms, centring, like, texts)
        if depth == "pool":  # one head, which takes the tokens as they are
            own = Output(torch.eye(tower.width, dtype=like.dtype, device=like.device), like.new_zeros(tower.width))
            return FoldedTower(tower, readout, [own], 1, centring, "pool", read_fingerprint)
        outputs = [block.output() for block in tower.blocks]
        return FoldedTower(tower, readout, outputs, tower.heads, centring, "stream", read_fingerprint)
