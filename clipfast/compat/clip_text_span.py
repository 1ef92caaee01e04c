"""What scripts of the paper's package, ``clip_text_span``, import: the logger of a model's terms, and TEXTSPAN.

>>> from clipfast.compat.clip_text_span import hook_prs_logger, replace_with_iterative_removal
>>> prs = hook_prs_logger(model, "cpu")  # model: an unmodified open_clip model
>>> prs.reinit()
>>> representation = model.encode_image(images, attn_method="head", normalize=False)
>>> attentions, mlps = prs.finalize(representation)

Names, arguments, shapes and values are those of that package (arXiv 2310.05916); the code and the way are clipfast's:
no module is copied, no hook is registered, and nothing quadratic in the tokens is kept.

``b`` images, ``layers``, ``tokens`` (class token first), ``heads``, ``d`` the width of the embedding.
"""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clipfast.analyses.textspan import textspan
from clipfast.contributions import Contributions
from clipfast.dataset.text_span_files import TextSpanFolder, read_folder
from clipfast.errors import InputError
from clipfast.loading import wrap
from clipfast.model import Model
from clipfast.towers.wrappers import unwrap

__all__ = ["PRSLogger", "TextSpanFolder", "hook_prs_logger", "read_folder", "replace_with_iterative_removal"]

METHODS = {"head": True, "head_no_spatial": False}
"""``attn_method`` of ``encode_image`` → whether terms have a token axis."""
_OWN = (None, "direct")  # the published default, which no logger reads
_NAME = "encode_image"
_ATTRIBUTES = (_NAME, "__getstate__")

Numbers: TypeAlias = Tensor | npt.NDArray[Any]


def hook_prs_logger(model: nn.Module | Model, device: str | torch.device, spatial: bool = True) -> "PRSLogger":
    """Gives ``model.encode_image`` the argument ``attn_method``, and returns what keeps the terms of its images.

    Until the logger is closed, or no longer referred to, ``model.encode_image(image, normalize=False,
    attn_method=…)`` computes the embeddings and their terms. Without ``attn_method`` (or with ``"direct"``) it is the
    model's own method. The model is otherwise untouched: its forward, its class and its weights stay, and copies and
    pickles of it have no logger.

    Args:
        model: an open_clip model as it was loaded, or any other model that :func:`clipfast.wrap` takes; or what
            :func:`clipfast.load` and :func:`clipfast.wrap` return.
        device: where the results are put. The model stays where it is.
        spatial: whether terms have a token axis: for ``attn_method="head"``; False is for ``"head_no_spatial"``.

    Raises:
        UnsupportedTower: a model that cannot be decomposed exactly, with every reason.
        InputError: no model, or no device.
    """
    return PRSLogger(model, device, spatial)


class PRSLogger:
    """The terms of the images that a model encoded last ("projected residual stream").

    It is a context manager, which closes it. Several may be open on one model: each keeps the terms of every call of
    ``encode_image`` that is of its kind.

    Attributes:
        model: the model, as it was given.
        device: where results are put.
        spatial: whether terms have a token axis.

    Args:
        model: as for :func:`hook_prs_logger`.
        device: as for :func:`hook_prs_logger`.
        spatial: as for :func:`hook_prs_logger`.
    """

    def __init__(self, model: nn.Module | Model, device: str | torch.device, spatial: bool = True) -> None:
        self.device = _device(device)
        self.model = model
        self.spatial = bool(spatial)
        self._decomposer = model if isinstance(model, Model) else wrap(model)
        self._kept: Contributions | None = None
        encoder = vars(model).get(_NAME)
        if not isinstance(encoder, _Encoder):
            encoder = _Encoder(model)
            encoder.attach()
        encoder.loggers[id(self)] = weakref.ref(self)
        self._close = weakref.finalize(self, encoder.release, id(self))
        self._close.atexit = False

    @property
    def closed(self) -> bool:
        """Whether it is closed: then ``encode_image`` keeps nothing here."""
        return not self._close.alive

    def close(self) -> None:
        """Ends it; the last one on a model takes ``attn_method`` away again. What was kept can still be read."""
        self._close()

    def __enter__(self) -> "PRSLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def reinit(self) -> None:
        """Forgets the last images; call it before every ``encode_image``."""
        self._kept = None

    def keep(self, contributions: Contributions) -> None:
        """Takes the terms of images.

        Raises:
            InputError: those of others are here.
        """
        if self._kept is not None:
            raise InputError("encode_image was called twice: call reinit() of the logger before every batch")
        self._kept = contributions

    def check_free(self) -> None:
        """Raises as :meth:`keep`, before anything is computed."""
        if self._kept is not None:
            self.keep(self._kept)

    def finalize(self, representation: Tensor) -> tuple[Tensor, Tensor]:
        """Every term of the embeddings of the images that were encoded since :meth:`reinit`.

        Terms are divided by the norm of ``representation``: with what ``encode_image(…, normalize=False)`` returned,
        they sum to the normalised embedding. The final LayerNorm's mean, its bias and the biases of the attention are
        split evenly (centring "uniform"). Calling it again gives the same.

        Args:
            representation: ``[b, d]``.

        Returns:
            The attention's terms, ``[b, layers, tokens, heads, d]`` (``spatial``) or ``[b, layers, heads, d]``, and the
            start of the residual stream followed by every MLP, ``[b, layers + 1, d]``; float32 (float64 for a model
            of float64), without gradients.

        Raises:
            InputError: no images, or a representation that is not of them.
        """
        kept = self._kept
        if kept is None:
            method = "head" if self.spatial else "head_no_spatial"
            raise InputError(
                f"no images were encoded since reinit(): call model.encode_image(images, attn_method={method!r}) first"
            )
        shape = list(kept.embedding.shape)
        if not isinstance(representation, Tensor) or list(representation.shape) != shape:
            given = list(representation.shape) if isinstance(representation, Tensor) else type(representation).__name__
            raise InputError(f"representation is {given}, expected {shape}: give what encode_image returned")
        with torch.no_grad():
            kept = _divided_by(kept, representation.detach().to(kept.norm).norm(dim=-1))
            mlps = kept.start_and_mlps().to(self.device)
            if not self.spatial:
                return kept.heads().to(self.device), mlps
            shape = [len(kept), len(kept.layers), kept.token_count, kept.basis.heads, kept.embedding.shape[1]]
            attentions = torch.empty(shape, dtype=kept.codes.dtype, device=self.device)
            for position, layer in enumerate(kept.layers):  # one layer at a time beside the result
                attentions[:, position] = kept.tokens(layer)
            return attentions, mlps


def _divided_by(contributions: Contributions, norm: Tensor) -> Contributions:
    """Contributions with terms divided by other norms ``[b]``."""
    if torch.equal(norm, contributions.norm):
        return contributions
    factor = contributions.norm / norm
    return replace(
        contributions,
        norm=norm,
        codes=contributions.codes * factor[:, None, None, None],
        start=contributions.start * factor[:, None],
        mlps=contributions.mlps * factor[:, None, None],
        rest=contributions.rest * factor[:, None],
    )


class _Encoder:
    """``encode_image`` of one model object while loggers are open on it.

    It stands among the object's own attributes, as does a ``__getstate__`` that leaves both out of copies and pickles.
    It keeps neither the model nor the loggers alive.

    Attributes:
        loggers: the open loggers, by their id.
    """

    def __init__(self, model: nn.Module | Model) -> None:
        self._model = weakref.ref(model)
        self.loggers: dict[int, weakref.ref[PRSLogger]] = {}
        self._before: dict[str, Any] = {}

    def attach(self) -> None:
        """Puts it among the model's attributes."""
        attributes = vars(self._alive())
        self._before = {name: attributes[name] for name in _ATTRIBUTES if name in attributes}
        attributes[_NAME] = self
        attributes["__getstate__"] = self.state

    def release(self, logger: int) -> None:
        """Forgets a logger; the last one gives the model its own attributes back."""
        self.loggers.pop(logger, None)
        model = self._model()
        if self.loggers or model is None:
            return
        attributes = vars(model)
        if attributes.get(_NAME) is self:  # else it was replaced in the meantime
            for name in _ATTRIBUTES:
                attributes.pop(name, None)
            attributes.update(self._before)

    def state(self) -> Any:
        """What the model's class says its state is, without what :meth:`attach` added."""
        model = self._alive()
        own = self._before.get("__getstate__") or getattr(type(model), "__getstate__").__get__(model)  # noqa: B009
        state = own()
        if isinstance(state, dict) and state.get(_NAME) is self:
            return {name: value for name, value in state.items() if name not in _ATTRIBUTES} | self._before
        return state

    def _alive(self) -> nn.Module | Model:
        model = self._model()
        if model is None:
            raise InputError("the model of this encode_image is gone: keep a reference to it")
        return model

    def __call__(
        self, image: Any, normalize: bool | None = None, attn_method: str | None = None, **options: Any
    ) -> Tensor:
        """Embeddings ``[b, d]``.

        Args:
            image: ``[b, 3, height, width]``, preprocessed.
            normalize: whether to give each unit norm; default as the model's own method, and False with a method.
            attn_method: ``"head"`` or ``"head_no_spatial"`` for terms with or without a token axis; None and
                ``"direct"`` for the model's own method.
            options: what else the model's own method takes.

        Raises:
            InputError: another ``attn_method``, or one that no logger is open for; or images that do not fit.
        """
        if attn_method in _OWN:
            given = {} if normalize is None else {"normalize": normalize}
            return cast(Tensor, self._own()(image, **given, **options))
        if attn_method not in METHODS:
            raise InputError(
                f"attn_method is {attn_method!r}: choose from {', '.join(map(repr, METHODS))}, or leave it out for the "
                "model's own embedding"
            )
        if options:
            raise InputError(f"encode_image with attn_method={attn_method!r} takes no {', '.join(options)}")
        return self._logged(image, METHODS[attn_method], bool(normalize))

    def _logged(self, image: Any, spatial: bool, normalize: bool) -> Tensor:
        loggers = [logger for logger in (reference() for reference in self.loggers.values()) if logger is not None]
        fitting = [logger for logger in loggers if logger.spatial == spatial]
        if not fitting:
            method, other = ("head", "head_no_spatial") if spatial else ("head_no_spatial", "head")
            raise InputError(
                f"attn_method={method!r} needs a logger made with spatial={spatial}: this one takes {other!r}"
                if loggers
                else f"attn_method={method!r} needs a logger: call hook_prs_logger(model, device, spatial={spatial})"
            )
        for logger in fitting:
            logger.check_free()
        contributions = fitting[0]._decomposer.decompose(image, tokens=spatial)
        for logger in fitting:
            logger.keep(contributions)
        embedding = contributions.embedding
        return nn.functional.normalize(embedding, dim=-1) if normalize else embedding

    def _own(self) -> Any:
        """The model's own method."""
        model = self._alive()
        if _NAME in self._before:
            return self._before[_NAME]
        if hasattr(type(model), _NAME):
            return getattr(type(model), _NAME).__get__(model)
        inner = unwrap(cast(nn.Module, model))
        if inner is not model and hasattr(inner, _NAME):
            return getattr(inner, _NAME)
        raise InputError(f"{type(model).__name__} has no encode_image of its own: give attn_method='head'")


@torch.no_grad()
def replace_with_iterative_removal(
    data: Numbers,
    text_features: Numbers,
    texts: Sequence[str],
    iters: int,
    rank: int | None,
    device: str | torch.device,
) -> tuple[npt.NDArray[np.float32], list[str]]:
    """TEXTSPAN of one head, and its outputs with nothing kept but their mean and what the picked texts span.

    Args:
        data: ``[images, d]``, the head's outputs; an array or a tensor, as ``text_features``.
        text_features: ``[texts, d]``.
        texts: the texts themselves, in that order.
        iters: how many to pick.
        rank: how many dimensions of the outputs count, the largest first; None for all.
        device: where to compute.

    Returns:
        The reconstruction, float32 ``[images, d]``, and the picked texts in their order.

        Three things differ from the published function. A rank above the outputs' numerical rank is lowered to it: a
        head of 64 numbers has at most 67 dimensions, and the published default of 80 adds directions that are nothing
        but rounding to every text. It stops where no variance above rounding is left, with fewer than ``iters`` texts.
        And every image has its own reconstruction on a CPU, too, where the published function adds all of them to one
        row in memory.

    Raises:
        InputError: shapes that do not fit, values that are not finite, or numbers below one.
    """
    place = _device(device)
    outputs, features = _numbers("data", data, place), _numbers("text_features", text_features, place)
    if len(texts) != len(features):
        raise InputError(f"{len(texts)} texts for {len(features)} text_features: give one per row")
    span = textspan(outputs, features, iters, rank)
    return span.reconstruct().float().cpu().numpy(), [texts[pick] for pick in span.picks]


def _numbers(name: str, values: Numbers, place: torch.device) -> Tensor:
    """An array or a tensor as a float32 tensor, as published."""
    if isinstance(values, Tensor):
        return values.to(place, torch.float32)
    if not isinstance(values, np.ndarray):
        raise InputError(f"{name} is a {type(values).__name__}: give an array or a tensor")
    if values.dtype.kind not in "fiu":
        raise InputError(f"{name} holds {values.dtype}: give numbers")
    return torch.from_numpy(np.array(values, np.float32)).to(place)  # a copy: mapped arrays cannot be written to


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is {device!r}: give a device of torch, such as 'cpu' or 'cuda:0'") from error
