"""Every term of one model per family against forward hooks and frozen norms, see :mod:`hooked`."""

import copy
from collections.abc import Iterator
from pathlib import Path

import hooked
import pytest
import torch
from families import FAMILIES
from hooked import Hooked, Terms
from timm_families import TIMM_FAMILIES, convnext
from torch import Tensor

import clipfast
from clipfast import InputError, Model
from clipfast.basis import Centring

Case = tuple[Hooked, Tensor, Terms]

TERM_FLOAT64 = 1e-10  # of terms that are divided by the embedding's norm
TERM_FLOAT32 = 2e-5


MODELS = FAMILIES | TIMM_FAMILIES


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """So that a result that nobody has written is none that happens to be right."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    model = MODELS[request.param]()
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, images, hooked.terms(model, images)


def away(have: Tensor, expected: Tensor) -> float:
    return float((have.double() - expected).abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_term(case: Case, dtype: torch.dtype) -> None:
    family, images, expected = case
    bar = TERM_FLOAT64 if dtype == torch.float64 else TERM_FLOAT32
    module = copy.deepcopy(family.module).to(dtype)
    have = clipfast.wrap(module).decompose(images.to(dtype), depth="all", centring="termwise")
    assert away(have.start, expected.start) <= bar
    assert away(have.heads(), expected.heads) <= bar
    assert away(have.mlps, expected.mlps) <= bar
    other = torch.zeros_like(expected.start) if expected.other is None else expected.other
    assert away(have.rest, other) <= bar
    assert away(have.embedding, expected.embedding) <= bar * float(expected.embedding.norm(dim=-1).max())
    assert have.max_error() <= bar


def _model(case: Case) -> Model:
    return clipfast.wrap(case[0].module)


@pytest.mark.parametrize("centring", ["uniform", "termwise"])
def test_what_is_kept_adds_up(case: Case, centring: Centring) -> None:
    """Maps, tokens and attention of some layers, against the heads they are of."""
    _, images, expected = case
    model, texts = _model(case), torch.randn(4, expected.embedding.shape[1], dtype=torch.float64)
    before_pool = model.tower.pool is not None
    for depth in ("all", "pool"):
        if depth == "pool" and model.tower.pooling == "cls":
            continue
        keep_tokens = not before_pool or depth == "pool"
        layers = [0, 2] if depth == "all" else None
        summed, by_head = (
            model.decompose(
                images,
                texts=texts,
                maps=maps,
                attention=True,
                tokens=keep_tokens,
                layers=layers,
                centring=centring,
                depth=depth,
            )
            for maps in ("summed", "per_head")
        )
        alone = model.decompose(images, texts=texts, maps="summed", layers=layers, centring=centring, depth=depth)
        scores = by_head.scores(texts)
        assert away(alone.maps, summed.maps) <= 1e-9  # computed in another way where no values are kept
        assert summed.max_error() <= TERM_FLOAT64
        assert away(scores.total(), (expected.embedding / expected.embedding.norm(dim=-1)[:, None]) @ texts.T) <= 1e-9
        assert away(by_head.maps.sum(3), scores.heads) <= 1e-9
        assert away(summed.maps, by_head.maps.sum((1, 2))) <= 1e-9
        assert away(summed.attention.sum(-1), torch.ones(())) <= TERM_FLOAT64
        if keep_tokens:
            for position, layer in enumerate(by_head.layers):
                assert away(by_head.tokens(layer).sum(1), by_head.heads()[:, position]) <= TERM_FLOAT64


def test_each_option_alone(case: Case) -> None:
    """What is asked for alone is what it is beside everything else, and a class token's part is that of its token."""
    _, images, expected = case
    model = _model(case)
    texts = torch.randn(4, expected.embedding.shape[1], dtype=torch.float64)
    before_pool, has_class_token = model.tower.pool is not None, model.tower.has_class_token
    for depth in ("all", "pool"):
        if depth == "pool" and model.tower.pooling == "cls":
            continue
        options = {"attention": {"attention": True}, "maps": {"texts": texts, "maps": "per_head"}}
        if has_class_token and not (before_pool and depth == "all"):
            options["class_codes"] = {"class_token": True}
        else:
            with pytest.raises(InputError, match="class_token=True"):
                model.decompose(images, class_token=True, depth=depth)
        for layers in ([0],) if depth == "pool" else ([0, 1], [2], [0, 2]):
            together = {name: value for option in options.values() for name, value in option.items()}
            if not (before_pool and depth == "all"):
                together["tokens"] = True
            whole = model.decompose(images, layers=layers, depth=depth, **together)
            for name, option in options.items():
                alone = model.decompose(images, layers=layers, depth=depth, **option)
                assert away(getattr(alone, name), getattr(whole, name)) <= 1e-12
            if "class_codes" in options:
                first = torch.stack([whole.tokens(layer)[:, 0].sum(1) for layer in layers], 1)
                assert away(whole.class_token(), first) <= TERM_FLOAT64


def test_the_pool_alone_is_all_of_the_embedding(case: Case) -> None:
    """What the blocks give through a pool adds up to what its heads give."""
    _, images, expected = case
    model = _model(case)
    if model.tower.pooling == "cls":
        with pytest.raises(InputError, match="reads its class token alone"):
            model.decompose(images, depth="pool")
        return
    have = model.decompose(images, depth="pool", centring="termwise")
    unit = expected.embedding / expected.embedding.norm(dim=-1)[:, None]
    assert away(have.total(), unit) <= TERM_FLOAT64
    assert have.layers == (0,)
    assert away(have.start, torch.zeros(())) == 0
    other = torch.zeros_like(unit) if expected.other is None else expected.other
    assert away(have.mlps[:, 0], other) <= TERM_FLOAT64


def test_results_are_written_joined_and_converted(case: Case, tmp_path: Path) -> None:
    _, images, expected = case
    model = _model(case)
    for depth in ("all", "pool"):
        if depth == "pool" and model.tower.pooling == "cls":
            continue
        whole = model.decompose(images, attention=True, depth=depth)
        parts = [model.decompose(images[rows], attention=True, depth=depth) for rows in (slice(2), slice(2, 3))]
        joined = clipfast.Contributions.cat(parts)
        joined.save(tmp_path / depth)
        read = clipfast.Contributions.load(tmp_path / depth)
        assert (read.depth, read.terms) == (whole.depth, whole.terms) == (depth, joined.terms)
        stacked, names = read.stack()
        assert stacked.shape[1] == len(names)
        assert away(stacked.sum(1), expected.embedding / expected.embedding.norm(dim=-1)[:, None]) <= TERM_FLOAT64
        assert away(read.heads(), whole.heads()) <= TERM_FLOAT64
        assert away(read.to(torch.float32).heads(), whole.heads()) <= TERM_FLOAT32


def test_moments_texts_and_ablations(case: Case, tmp_path: Path) -> None:
    """From images alone: the mean of every head, texts that span it, and its ablation."""
    _, images, expected = case
    model, texts = _model(case), torch.randn(6, expected.embedding.shape[1], dtype=torch.float64)
    for depth in ("all", "pool"):
        if depth == "pool" and model.tower.pooling == "cls":
            continue
        moments = clipfast.Moments(model, depth=depth)
        contributions = model.decompose(images, depth=depth)
        moments.update(contributions)
        moments.save(tmp_path / depth)
        moments = clipfast.Moments.load(tmp_path / depth)
        assert away(moments.means(), contributions.heads().mean(0)) <= 1e-9
        picked = moments.textspan(texts, size=2)
        assert len(picked) == contributions.codes.shape[1] * contributions.codes.shape[2]
        heads = contributions.heads()
        head = heads.shape[2] - 1  # a mean has one
        ablated, missing = clipfast.Ablated(model, f"L0.H{head}", moments), heads[:, 0, head]
        unit = expected.embedding / expected.embedding.norm(dim=-1)[:, None]
        features = ablated.encode_image(images, normalize=False) / expected.embedding.norm(dim=-1)[:, None]
        assert away(features, unit - missing + missing.mean(0)) <= 1e-9


@torch.no_grad()
def test_a_network_without_blocks() -> None:
    """ConvNeXt: every place of the last feature map, through the mean, the frozen norm and the classifier."""
    model, read = convnext()
    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = model.forward_features(images).flatten(2).mT
    own = model(images)
    to_embedding, _ = read(x)
    zero = to_embedding(torch.zeros_like(x))
    places = torch.eye(x.shape[1], dtype=torch.float64)
    expected = torch.stack([to_embedding(x * place[:, None]) - zero + zero / len(places) for place in places], 1)
    have = clipfast.wrap(model, image_size=(64, 96)).decompose(images, tokens=True, centring="termwise")
    assert have.depth == "pool"
    assert away(have.tokens(0, 0), expected / own.norm(dim=-1)[:, None, None]) <= TERM_FLOAT64
    assert away(have.heads()[:, 0, 0], own / own.norm(dim=-1)[:, None]) <= TERM_FLOAT64
    assert away(have.embedding, own) <= TERM_FLOAT64
