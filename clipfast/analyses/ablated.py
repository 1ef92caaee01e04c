"""An encoder with terms ablated, for zero-shot code written for open_clip.

``B`` images, ``T`` texts, ``D`` embed_dim.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Protocol, TypeAlias, cast

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from clipfast.analyses.ablation import Means, check_basis, kept_terms
from clipfast.analyses.moments import Moments
from clipfast.analyses.terms import Terms, as_terms
from clipfast.basis import Basis, Centring, Depth
from clipfast.contributions import Contributions

Picture: TypeAlias = Image.Image | str | PathLike[str]
Images: TypeAlias = Tensor | Picture | Sequence[Picture]


class Decomposes(Protocol):
    """A model that decomposes images and encodes texts."""

    module: nn.Module
    preprocess: Callable[[Image.Image], Tensor]

    def basis(self, centring: Centring = "uniform", depth: Depth | None = None) -> Basis:
        """The model's part of every contribution, the same object until weights change."""

    def decompose(
        self, images: Any, *, class_token: bool, layers: Sequence[int], centring: Centring, depth: Depth | None
    ) -> Contributions:
        """The terms of image embeddings."""

    def encode_text(self, texts: Any, normalize: bool = True) -> Tensor:
        """Text features."""


class Ablated(nn.Module):
    """A model whose image features lack some terms: each is replaced by its mean over a data set.

    It answers to what open_clip's zero-shot code calls. One decomposed forward per batch keeps no more than the terms
    need; no gradient flows. The model's module is shared, so ``.to(device)`` moves it too.

    Args:
        model: the model.
        terms: what to ablate, or its text (:meth:`.Terms.parse`).
        moments: of the images whose mean is taken.

    Attributes:
        module: the model's own module.
        terms: what is ablated.

    Raises:
        InputError: moments of another model, no images in them, or without a layer that is named.
        NotKept: the class token's part is named and the moments do not have it.
    """

    def __init__(self, model: Decomposes, terms: Terms | str, moments: Moments) -> None:
        super().__init__()
        self.module = model.module
        self.training = model.module.training
        self.terms = as_terms(terms, moments.basis)
        self._model = model
        self._centring = moments.basis.centring
        self._depth: Depth = "pool" if moments.basis.kind == "pool" else "all"
        self._moments_basis = moments.basis
        self._mean = Means(moments).of(self.terms)  # [D], float64: no buffer, which .half() would round
        self._checked: Basis | None = None
        self._check()

    def _check(self) -> None:
        basis = self._model.basis(self._centring, self._depth)
        if basis is not self._checked:  # weights were moved or changed
            check_basis(basis, self._moments_basis)
            self._checked = basis

    def encode_image(self, image: Images, normalize: bool = True) -> Tensor:
        """Image features without the ablated terms, on the scale of the model's own.

        Args:
            image: ``[B, 3, height, width]`` preprocessed, or PIL images, or paths.
            normalize: whether to give each unit norm.

        Returns:
            ``[B, D]``: :func:`.ablate`, normalised, or times the norm of the model's own embedding.

        Raises:
            ImageError: a file that cannot be read.
            InputError: images that do not fit, or weights that are no longer those of the moments.
        """
        self._check()
        contributions = self._model.decompose(
            image,
            layers=self.terms.layers,
            class_token=bool(self.terms.split_layers),
            centring=self._centring,
            depth=self._depth,
        )
        features = kept_terms(contributions, self.terms) + self._mean.to(contributions.codes)
        features = (features * contributions.norm[:, None]).to(contributions.embedding.dtype)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor | Sequence[str], normalize: bool = True) -> Tensor:
        """Text features by the model itself, ``[T, D]``.

        Args:
            text: tokens ``[T, context]``, or strings.
            normalize: whether to give each unit norm.

        Raises:
            InputError: no text encoder; for strings also no tokenizer, or one that is too long.
        """
        return self._model.encode_text(text, normalize)

    def forward(self, image: Images | None = None, text: Tensor | Sequence[str] | None = None) -> tuple[Any, ...]:
        """Unit image features, unit text features (None for what was not passed), scale, and bias if there is one."""
        features = None if image is None else self.encode_image(image, normalize=True)
        texts = None if text is None else self.encode_text(text, normalize=True)
        bias = getattr(self.module, "logit_bias", None)
        return (features, texts, self.logit_scale.exp(), *(() if bias is None else (bias,)))

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of what similarities are multiplied by; the model's own."""
        return cast(Tensor, self.module.logit_scale)

    @property
    def preprocess(self) -> Callable[[Image.Image], Tensor]:
        """PIL image → ``[3, height, width]``."""
        return self._model.preprocess

    def extra_repr(self) -> str:
        """What is ablated."""
        return f"terms={self.terms}"
