"""What second-order effects of neurons are used for: ablation, words that confuse classes, concepts, segmentation.

All follow the experiments of arXiv 2406.04341. A neuron is described by a direction, the first principal one of its
effects (:mod:`.second_order_moments`), and by few texts that add up to it (:func:`describe`).

``B`` images, ``M`` neurons, ``D`` embed_dim, ``T`` texts, ``m`` texts per neuron, ``C`` classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.analyses.accuracy import Accuracy
from clipfast.analyses.neuron_moments import SparseTexts, sparse_texts
from clipfast.analyses.ranking import largest
from clipfast.analyses.second_order import NeuronEffects
from clipfast.analyses.second_order_moments import TopImages
from clipfast.errors import InputError

# ---------------------------------------------------------------------------------------------------------- ablation

_ABLATIONS = ("all", "significant", "insignificant", "approximated")


@dataclass(frozen=True)
class Ablations:
    """Zero-shot accuracy with parts of all neurons' second-order effects replaced by their means.

    Attributes:
        baseline: nothing replaced.
        all: every effect of every neuron.
        significant: in each image the effects that are significant for their neuron.
        insignificant: in each image all the others.
        approximated: nothing, but each deviation from the mean is projected on its neuron's direction.
        changes: how far each of the last four moves ``y / ‖y‖``, the mean over images, by its name.
    """

    baseline: Accuracy
    all: Accuracy
    significant: Accuracy
    insignificant: Accuracy
    approximated: Accuracy
    changes: Mapping[str, float]


def evaluate(
    batches: Iterable[tuple[NeuronEffects, Tensor]], classifier: Tensor, top: TopImages, directions: Tensor
) -> Ablations:
    """The paper's ablations of one layer in one pass over the images.

    Args:
        batches: effects with labels, integers ``[B]``.
        classifier: ``[C, D]``.
        top: of the images whose mean is taken, made from moments.
        directions: ``[M, D]``, of every neuron.

    Raises:
        InputError: top images without a mean, or anything that does not fit.
    """
    if top.mean is None:
        raise InputError("these top images were measured from 0: make them from the moments whose mean is to be taken")
    accuracies = {name: Accuracy(classifier) for name in ("baseline", *_ABLATIONS)}
    moved = dict.fromkeys(_ABLATIONS, 0.0)
    for effects, labels in batches:
        whole, significant = effects.embedding.to(effects.norm) / effects.norm[:, None], top.significant(effects)
        accuracies["baseline"].update(whole, labels)
        features = (
            effects.ablated(top.mean),
            effects.ablated(top.mean, mask=significant),
            effects.ablated(top.mean, mask=~significant),
            effects.approximated(top.mean, directions),
        )
        for name, each in zip(_ABLATIONS, features, strict=True):
            accuracies[name].update(each, labels)
            moved[name] += float((each - whole).norm(dim=1).sum())
    count = max(accuracies["baseline"].count, 1)
    return Ablations(**accuracies, changes={name: total / count for name, total in moved.items()})


# ------------------------------------------------------------------------------------------------------------- texts


def describe(directions: Tensor, text_features: Tensor, size: int) -> SparseTexts:
    """:func:`.neuron_moments.sparse_texts` for any number of directions, some at a time.

    The paper takes texts less their mean, :func:`.neuron_moments.centred`.

    Args:
        directions: ``[M, D]``.
        text_features: ``[T, D]``.
        size: texts per neuron, ``m``.

    Raises:
        InputError: as there.
    """
    together = max(1, 2**23 // max(size * text_features.shape[-1], len(text_features)))
    parts = [sparse_texts(part, text_features, size) for part in directions.split(together)]
    return SparseTexts(*(torch.cat([getattr(p, name) for p in parts]) for name in ("picks", "weights", "explained")))


@dataclass(frozen=True)
class Push:
    """A text that speaks for a class through neurons that it describes.

    Attributes:
        text: its number.
        score: how far it pushes, summed over these neurons.
        neurons: which have it in their description and push with it, the strongest first.
    """

    text: int
    score: float
    neurons: tuple[int, ...]


def between_classes(directions: Tensor, towards: Tensor, away: Tensor) -> Tensor:
    """How far every neuron's direction goes from one class to another, ``⟨uₙ, t₁ − t₀⟩``, ``[M]``.

    Args:
        directions: ``[M, D]``.
        towards: ``[D]``, a text; it counts with unit length.
        away: ``[D]``, another.

    Raises:
        InputError: shapes that do not fit.
    """
    width = directions.shape[-1]
    for name, text in (("towards", towards), ("away", away)):
        if directions.ndim != 2 or text.shape != (width,):
            raise InputError(
                f"{name} has shape {list(text.shape)}: expected [{width}], and directions [neurons, width]"
            )
    step = F.normalize(towards.to(directions), dim=0) - F.normalize(away.to(directions), dim=0)
    return directions @ step


def confusing_texts(
    directions: Tensor,
    described: SparseTexts,
    text_features: Tensor,
    towards: Tensor,
    away: Tensor,
    *,
    neurons: int = 50,
    count: int = 20,
    limit: float = 0.6,
) -> list[Push]:
    """Texts that push an image of one class towards another without naming it: words of a semantic adversarial image.

    The neurons that separate the classes most are taken. Each of their texts pushes by its weight in the description
    times what the neuron does, :func:`between_classes`. The paper ranks single pairs of neuron and text; here a text's
    pushes are summed over neurons, so that words which several neurons share come first.

    Args:
        directions: ``[M, D]``; those of several layers one after the other.
        described: of the same neurons, by the same texts.
        text_features: ``[T, D]``.
        towards: ``[D]``, the class that the image is to be taken for.
        away: ``[D]``, the class that it is of.
        neurons: how many, by the size of what they do.
        count: how many texts at most.
        limit: texts whose cosine with ``towards``, both less the mean of all texts, is above this name the class, and
            are left out. (The paper has a sentence encoder and a list of words for it.)

    Returns:
        Texts with a positive score, the largest first.

    Raises:
        InputError: shapes that do not fit, or descriptions of other neurons.
    """
    amounts = between_classes(directions, towards, away)
    _check_described(described, len(directions), len(text_features))
    if text_features.ndim != 2 or text_features.shape[1] != directions.shape[1]:
        raise InputError(
            f"text_features has shape {list(text_features.shape)}, expected [texts, {directions.shape[1]}]"
        )
    mean = text_features.mean(0)
    names = F.cosine_similarity(text_features - mean, (towards.to(text_features) - mean)[None]) > limit
    _, chosen = largest(amounts.abs(), neurons)
    pushes: dict[int, list[tuple[float, int]]] = {}
    for neuron in chosen.tolist():
        each = (described.weights[neuron] * amounts[neuron]).tolist()
        for text, push in zip(described.picks[neuron].tolist(), each, strict=True):
            if push > 0 and not bool(names[text]):
                pushes.setdefault(text, []).append((push, neuron))
    found = [
        Push(text, sum(push for push, _ in of), tuple(neuron for _, neuron in sorted(of, reverse=True)))
        for text, of in pushes.items()
    ]
    return sorted(found, key=lambda push: (-push.score, push.text))[:count]


def concepts(
    effects: NeuronEffects, top: TopImages, described: SparseTexts, texts: int, directions: Tensor | None = None
) -> Tensor:
    """How much every text is among what the significant neurons of an image say, ``[B, texts]``.

    Args:
        effects: of some images.
        top: says which effects are significant.
        described: of every neuron.
        texts: how many texts there are.
        directions: ``[M, D]``: a neuron counts by how far its effect goes along its own. None to count every one by
            the distance of its effect from the mean, whichever side it lies on, as the paper does.

    Raises:
        InputError: descriptions or directions of other neurons, or effects of another model.
    """
    _check_described(described, effects.weights.neurons, texts)
    amounts = effects.norms(top.mean) if directions is None else effects.along(directions, top.mean)
    amounts = amounts * top.significant(effects).to(amounts)
    result = amounts.new_zeros(len(effects), texts)
    for picks, weights in zip(described.picks.T, described.weights.T, strict=True):
        result.index_add_(1, picks.to(result.device), amounts * weights.to(amounts))
    return result


def _check_described(described: SparseTexts, neurons: int, texts: int) -> None:
    if len(described.picks) != neurons:
        raise InputError(f"{len(described.picks)} neurons are described, and there are {neurons}: describe every one")
    if described.picks.numel() and int(described.picks.max()) >= texts:
        raise InputError(f"a description has text {int(described.picks.max())}, and there are {texts} texts")


# ------------------------------------------------------------------------------------------------------ segmentation


def class_maps(
    effects: Sequence[NeuronEffects],
    directions: Sequence[Tensor],
    text_features: Tensor,
    *,
    count: int = 200,
    signed: bool = False,
) -> Tensor:
    """Where the neurons that speak for a class are active, ``[B, rows, columns, T]``.

    For each text the mean activation of the neurons, of all layers together, whose directions lie nearest to it or to
    its opposite. For :func:`.segmentation.heat`; the paper takes it with ``contrast=False, clip=False`` and cuts the
    heat at a half.

    Args:
        effects: of one or more layers, decomposed with ``tokens=True``, of the same images.
        directions: ``[M, D]`` of each of these layers.
        text_features: ``[T, D]``.
        count: neurons per text.
        signed: subtract the activations of the neurons whose direction lies nearer to the opposite. The paper adds all.

    Raises:
        InputError: shapes that do not fit, a count below 1, or decomposed without ``tokens=True``.
    """
    if not effects or len(effects) != len(directions):
        raise InputError(f"{len(directions)} tensors of directions for {len(effects)} layers: give one per layer")
    if count < 1:
        raise InputError(f"count is {count}, expected at least 1")
    weights = effects[0].weights
    texts = weights.check_features(text_features)
    for layer, each in zip(effects, directions, strict=True):
        if each.shape != (layer.weights.neurons, weights.embed_dim) or len(layer) != len(effects[0]):
            raise InputError(
                f"directions have shape {list(each.shape)} for {layer.weights.neurons} neurons of {len(layer)} images: "
                f"expected [neurons, {weights.embed_dim}] for each layer, all of the same images"
            )
    along = torch.cat([each.to(texts) for each in directions]) @ texts.T  # [M of all layers, T]
    maps = []
    for one in along.T:
        _, chosen = largest(one.abs(), count)
        factor = (one[chosen].sign() if signed else torch.ones_like(one[chosen])) / len(chosen)
        total, start = None, 0
        for layer in effects:
            own = (chosen >= start) & (chosen < start + layer.weights.neurons)
            part = layer.activation_maps(chosen[own] - start).to(factor) @ factor[own]
            total, start = part if total is None else total + part, start + layer.weights.neurons
        assert total is not None
        maps.append(total)
    rows, columns = effects[0].grid
    return torch.stack(maps, 3) if maps else texts.new_empty(len(effects[0]), rows, columns, 0)
