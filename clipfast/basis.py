"""Code × basis: contributions are small per-image codes times matrices that belong to the model.

For head h of layer l, with the final LayerNorm frozen at the image's own μ, σ and n = ‖embedding‖::

    code[l,h]  = [ z, 1, μ, σ ] / (σ n)                                        per image
    basis[l,h] = [ W_O γP ; b_O γP / H ; −1ᵀγP / (K H) ; βP / (K H) ]          per model
    c[l,h]     = code[l,h] @ basis[l,h]

Only the first rows depend on the head, so a :class:`Basis` keeps them per layer and the last three as vectors. Its
columns are the dimensions of the embedding, or texts after :meth:`Basis.towards`: anything linear in ``c`` is done on
codes with a folded basis. Source: arXiv 2310.05916, section 3; the even split of μ, β and b_O is that of its code.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.fingerprint import checksum, fingerprint, output_weights
from clipfast.kernels.reference import accumulation_dtype
from clipfast.towers.tower import Tower

Centring = Literal["uniform", "termwise"]
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
        serial: a number that no other basis of this process has had.
    """

    def __init__(self, biases: Tensor, mean_row: Tensor, std_row: Tensor, heads: int, centring: Centring) -> None:
        self.biases = biases
        self.mean_row = mean_row
        self.std_row = std_row
        self.heads = heads
        self.centring = centring
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
        if (mine.heads, mine.centring) != (theirs.heads, theirs.centring):
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
        return rows | {f"basis/values/{layer}": self.values(layer) for layer in layers}

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
    ) -> None:
        super().__init__(biases, mean_row, std_row, heads, centring)
        self._fingerprint = fingerprint
        self._made = dict(values)

    @property
    def fingerprint(self) -> str:
        """Of all vision weights of the model."""
        return self._fingerprint

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], layers: Sequence[int], heads: int, centring: str, fingerprint: str
    ) -> "StoredBasis":
        """The basis among a file's tensors, named as :meth:`Basis.tensors` names them."""
        biases, mean_row, std_row = (tensors[f"basis/{name}"] for name in _ROWS)
        return cls(
            biases,
            mean_row,
            std_row,
            heads=heads,
            centring=check_centring(centring),
            fingerprint=fingerprint,
            values={layer: tensors[f"basis/values/{layer}"] for layer in layers},
        )

    def _make(self, layer: int) -> Tensor:
        raise InputError(f"layer {layer} was not kept: the layers here are {sorted(self._made)}")


class _Projected(Basis):
    """Another basis with texts as columns."""

    def __init__(self, basis: Basis, texts: Tensor) -> None:
        biases, mean_row, std_row = (row @ texts.T for row in (basis.biases, basis.mean_row, basis.std_row))
        super().__init__(biases, mean_row, std_row, basis.heads, basis.centring)
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
        super().__init__(biases, mean_row, std_row, basis.heads, basis.centring)
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


def _projection(tower: Tower, dtype: torch.dtype) -> Tensor:
    """The final projection ``[W, D]``, the identity where there is none."""
    if tower.projection is None:
        return torch.eye(tower.width, dtype=dtype, device=tower.device)
    return tower.projection.detach().to(dtype)


class Readout:
    """The final LayerNorm's weights and the projection as one linear map of residual terms.

    Attributes:
        matrix: ``[W, C]``, ``γP`` (centred over its rows for centring ``"termwise"``).
        mean_row: ``[C]``, ``−1ᵀγP / K``.
        std_row: ``[C]``, ``βP / K``.
    """

    def __init__(self, tower: Tower, centring: Centring, texts: Tensor | None = None) -> None:
        acc_dtype = accumulation_dtype(tower.dtype)
        projection = _projection(tower, acc_dtype)
        if texts is not None:
            projection = projection @ texts.to(acc_dtype).T
        self.matrix = tower.ln_post.weight.detach().to(acc_dtype)[:, None] * projection
        self.mean_row = -self.matrix.sum(0) / tower.terms
        self.std_row = tower.ln_post.bias.detach().to(acc_dtype) @ projection / tower.terms
        if centring == "termwise":
            self.matrix = self.matrix - self.matrix.mean(0)
            self.mean_row = torch.zeros_like(self.mean_row)

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


class FoldedTower(Basis):
    """The basis of a tower in memory, with the readout of its other residual terms.

    Attributes:
        readout: reads out the start of the residual stream and the MLPs.
    """

    def __init__(
        self, tower: Tower, readout: Readout, centring: Centring, read_fingerprint: Callable[[], str] | None = None
    ) -> None:
        biases = torch.stack([block.scaled_out_bias().to(readout.matrix.dtype) for block in tower.blocks])
        super().__init__(
            biases @ readout.matrix / tower.heads,
            readout.mean_row / tower.heads,
            readout.std_row / tower.heads,
            tower.heads,
            centring,
        )
        self.readout = readout
        self._tower = tower
        self._read_fingerprint = read_fingerprint
        self._digest: str | None = None
        # Compiled code makes its basis anew at every call and cannot see versions.
        unchecked = torch.compiler.is_compiling() or tower.device.type == "meta"  # there are no bytes to check
        self._checksums = None if unchecked else _checksums(tower)

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

    def _make(self, layer: int) -> Tensor:
        block = self._tower.blocks[layer]
        if self._checksums is not None and checksum(output_weights(block)) != self._checksums[layer]:
            raise InputError("the weights have changed since these images were decomposed: decompose them again")
        columns = self.readout.matrix
        if block.attention_scale is not None:
            columns = block.attention_scale.to(columns.dtype)[:, None] * columns
        with torch.no_grad(), autocast_disabled(columns):
            return (block.out_weight.to(columns.dtype).T @ columns).view(self._tower.heads, -1, columns.shape[1])


def _checksums(tower: Tower) -> list[int]:
    """By layer, of the weights that are read when its values are first asked for."""
    return [checksum(output_weights(block)) for block in tower.blocks]


@torch.no_grad()
def fold(
    tower: Tower, centring: Centring, texts: Tensor | None = None, read_fingerprint: Callable[[], str] | None = None
) -> FoldedTower:
    """Folds a tower's output projections, final LayerNorm and projection into a basis.

    Args:
        tower: the model.
        centring: ``"uniform"`` or ``"termwise"``.
        texts: ``[T, D]``, to get columns for texts without the ``D``-wide basis in between.
        read_fingerprint: gives the fingerprint of the weights, or raises :class:`InputError` if they have changed.

    Returns:
        A basis whose per-layer values are made at first use; it raises :class:`InputError` then if a weight of the
        tower has changed in the meantime.
    """
    with autocast_disabled(tower.patch_weight):
        return FoldedTower(tower, Readout(tower, centring, texts), centring, read_fingerprint)
