"""Mean-ablation against its definition: every term written out, the named ones replaced by their mean."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import directions, vision_tower
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measures import error
from tolerances import FLOAT32, FLOAT64
from torch import Tensor

import clipfast
from clipfast import Contributions, Model, Moments
from clipfast.analyses.ablation import Ablations, Batch, ablate, curves, evaluate
from clipfast.analyses.reconstruction import _Replaced, reconstruction_curve
from clipfast.analyses.terms import Terms
from clipfast.basis import Basis

CLASSES = directions(4, 20, dtype=torch.float64)
LAYERS, HEADS = 3, 2


def drawn(images: int, seed: int) -> Tensor:
    return torch.randn(images, 3, 24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def model() -> Model:
    return clipfast.wrap(vision_tower(seed=3, dtype=torch.float64))


@pytest.fixture(scope="module", params=["uniform", "termwise"])
def data(request: pytest.FixtureRequest, model: Model) -> tuple[Contributions, Contributions, Moments]:
    """Images to ablate, other images for the mean, and their moments."""
    options = {"tokens": True, "class_token": True, "centring": request.param}
    seen = model.decompose(drawn(30, 1), **options)
    return model.decompose(drawn(9, 2), **options), seen, moments_of(seen)


def moments_of(*parts: Contributions) -> Moments:
    moments = Moments()
    for part in parts:
        moments.update(part)
    return moments


def parts(result: Contributions) -> dict[object, Tensor]:
    """Every smallest term: of each head the class token's part and what is left, of the others what they are."""
    terms: dict[object, Tensor] = {("mlp", layer): result.mlps[:, layer] for layer in range(LAYERS)}
    terms["start"] = result.start
    for layer in range(LAYERS):
        own = result.tokens(layer)[:, 0]  # [B, H, D]
        for head in range(HEADS):
            terms["class", layer, head] = own[:, head]
            terms["other", layer, head] = result.heads()[:, layer, head] - own[:, head]
    return terms


def naive(result: Contributions, seen: Contributions, terms: Terms) -> Tensor:
    gone: set[object] = {("mlp", layer) for layer in terms.mlps}
    gone |= {"start"} if terms.start else set()
    gone |= {("class", layer, head) for layer in terms.class_tokens for head in range(HEADS)}
    gone |= {(kind, layer, head) for layer, head in terms.heads for kind in ("class", "other")}
    own, theirs = parts(result), parts(seen)
    rows = [theirs[name].mean(0).expand(len(result), -1) if name in gone else own[name] for name in own]
    return torch.stack(rows).sum(0)


def in_batches(result: Contributions, labels: Tensor, groups: Tensor | None = None, size: int = 4) -> Iterator[Batch]:
    for start in range(0, len(result), size):
        chosen = slice(start, min(start + size, len(result)))
        part = result.select(range(chosen.start, chosen.stop))
        yield part, labels[chosen], None if groups is None else groups[chosen]


TEXTS = [
    "nothing",
    "start",
    "mlps",
    "cls",
    "mlps, cls",
    "L0-L1",
    "L1.H0",
    "L0-L2",
    "L1.H0, cls 1",
    "L1, cls 1",
    "cls 0, cls 2, L2.H1, L0, mlp 1",
    "start, mlps, L0-L2, cls",
]


@pytest.mark.parametrize("text", TEXTS)
def test_named_terms_become_their_mean(data: tuple[Contributions, Contributions, Moments], text: str) -> None:
    result, seen, moments = data
    terms = Terms.parse(text, result.basis)
    expected = naive(result, seen, terms)
    assert error(ablate(result, terms, moments), expected) <= FLOAT64
    assert error(ablate(result, text, moments), expected) <= FLOAT64
    logits = Ablations(CLASSES, moments, [terms, Terms.of(result.basis)]).logits(result)
    assert error(logits[0], expected @ CLASSES.T) <= FLOAT64
    assert error(logits[1], result.embedding / result.norm[:, None] @ CLASSES.T) <= FLOAT64


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_set_of_terms(data: tuple[Contributions, Contributions, Moments], draws: st.DataObject) -> None:
    result, seen, moments = data
    layer = st.integers(0, LAYERS - 1)
    terms = Terms.of(
        result.basis,
        heads=draws.draw(st.lists(st.tuples(layer, st.integers(0, HEADS - 1)), max_size=6)),
        start=draws.draw(st.booleans()),
        mlps=draws.draw(st.lists(layer, max_size=4)),
        class_tokens=draws.draw(st.lists(layer, max_size=3)),
    )
    expected = naive(result, seen, terms)
    assert error(ablate(result, terms, moments), expected) <= FLOAT64
    assert error(Ablations(CLASSES, moments, [terms]).logits(result)[0], expected @ CLASSES.T) <= FLOAT64


def test_a_whole_head_takes_the_class_tokens_part_once(
    data: tuple[Contributions, Contributions, Moments], model: Model
) -> None:
    result, _, moments = data
    assert torch.equal(ablate(result, "L1, cls 1", moments), ablate(result, "L1", moments))
    one, both = ablate(result, "L1.H0, cls 1", moments), ablate(result, "L1, cls 1", moments)
    assert error(one, both) > 1e-3
    bare = model.decompose(drawn(9, 2), centring=result.basis.centring)  # without the class token's part
    assert error(ablate(bare, "L1, cls 1", moments), both) <= FLOAT64


def test_everything_ablated_is_the_mean(data: tuple[Contributions, Contributions, Moments]) -> None:
    result, seen, moments = data
    expected = (seen.embedding / seen.norm[:, None]).mean(0)
    assert error(ablate(result, "start, mlps, L0-L2", moments), expected.expand(9, -1)) <= FLOAT64


def test_layers_that_are_not_kept(model: Model, data: tuple[Contributions, Contributions, Moments]) -> None:
    """Ablated as one where all of them are, whatever the moments keep."""
    result, seen, moments = data
    options = {"layers": [2], "centring": result.basis.centring}
    few, few_moments = model.decompose(drawn(9, 2), **options), moments_of(model.decompose(drawn(30, 1), **options))
    for text in ("L0-L1", "L0-L1, L2.H1, mlps", "L2.H0", "mlps"):
        expected = naive(result, seen, Terms.parse(text, result.basis))
        for contributions in (result, few):
            for means in (moments, few_moments):
                assert error(ablate(contributions, text, means), expected) <= FLOAT64
    with pytest.raises(clipfast.InputError, match=r"^the contributions keep layers \[2\] and layer 1 is to be ablated"):
        ablate(few, "L1", moments)
    with pytest.raises(clipfast.InputError, match=r"^the moments keep layers \[2\] and layer 0 is to be ablated: keep"):
        ablate(result, "L0.H1", few_moments)


def test_average_pooling(model: Model) -> None:
    pooled = clipfast.wrap(vision_tower(seed=3, dtype=torch.float64, pool_type="avg", final_ln_after_pool=True))
    seen, result = (pooled.decompose(drawn(*which), tokens=True, class_token=True) for which in ((12, 1), (5, 2)))
    for text in ("cls", "L1.H0, cls 1-2, mlps"):
        expected = naive(result, seen, Terms.parse(text, pooled))
        assert error(ablate(result, text, moments_of(seen)), expected) <= FLOAT64


def test_other_precisions() -> None:
    double = clipfast.wrap(vision_tower(seed=3, dtype=torch.float64))
    single = clipfast.wrap(vision_tower(seed=3))
    results = []
    for model in (double, single):
        x = (drawn(6, 1).to(model.dtype), drawn(3, 2).to(model.dtype))
        seen, result = (model.decompose(images, class_token=True) for images in x)
        results.append(ablate(result, "L0, L2.H1, cls, mlp 1", moments_of(seen)))
    assert results[1].dtype == torch.float32
    assert error(results[1], results[0]) <= FLOAT32


def test_what_does_not_belong_together(data: tuple[Contributions, Contributions, Moments], model: Model) -> None:
    result, _, moments = data
    other = clipfast.wrap(vision_tower(seed=4, dtype=torch.float64)).decompose(
        drawn(2, 1), centring=result.basis.centring
    )
    for call in (
        lambda: ablate(other, "L0", moments),
        lambda: evaluate([(other, torch.tensor([0, 1]), None)], CLASSES, moments, []),
    ):
        with pytest.raises(clipfast.InputError, match="the moments are of another model, of other weights or of"):
            call()
    bare = model.decompose(drawn(2, 1), centring=result.basis.centring)
    with pytest.raises(clipfast.NotKept, match="the class token was not kept: decompose with class_token=True"):
        ablate(bare, "cls", moments)
    with pytest.raises(clipfast.NotKept, match="update with contributions decomposed with class_token=True"):
        ablate(result, "cls", moments_of(bare))
    with pytest.raises(clipfast.InputError, match="'L3': layer 3 does not exist"):
        ablate(result, "L3", moments)
    with pytest.raises(clipfast.InputError, match="the moments of 0 images were asked for"):
        ablate(bare, "L0", Moments(BasisOf(bare)))
    assert ablate(result.select([]), "L0, cls", moments).shape == (0, 20)


class BasisOf:
    """What moments need of a model, with the centring of these contributions."""

    backend = "auto"

    def __init__(self, contributions: Contributions) -> None:
        self.contributions = contributions

    def basis(self) -> Basis:
        return self.contributions.basis


# -------------------------------------------------------------------------------------------------- many in one pass


def test_curves_are_the_ablations_one_by_one(data: tuple[Contributions, Contributions, Moments]) -> None:
    result, seen, moments = data
    labels, groups = torch.arange(9) % 4, torch.arange(9) % 2
    got = curves(in_batches(result, labels, groups), CLASSES, moments)
    named = {"nothing": got.baseline, "mlps": got.mlps, "cls": got.class_token, "mlps, cls": got.both}
    named |= dict(zip(("L0", "L0-L1", "L0-L2"), got.layers, strict=True))
    for text, accuracy in named.items():
        guesses = (naive(result, seen, Terms.parse(text, result.basis)) @ CLASSES.T).argmax(1)
        hits = (guesses == labels).double()
        assert accuracy.count == 9
        assert accuracy.accuracy == pytest.approx(float(hits.mean()))
        assert accuracy.group_accuracies == pytest.approx({g: float(hits[groups == g].mean()) for g in (0, 1)})


def test_evaluate_gives_the_baseline_first(data: tuple[Contributions, Contributions, Moments], tmp_path: Path) -> None:
    result, _, moments = data
    whole = result.embedding / result.norm[:, None] @ CLASSES.T
    labels = whole.argmax(1)
    got = evaluate(in_batches(result, labels), CLASSES, moments, ["L1.H0", "mlps", "nothing", "L1.H0"])
    assert [str(terms) for terms in got] == ["nothing", "L1.H0", "mlps"]
    assert next(iter(got.values())).accuracy == 1
    files = []  # batches from files have a basis each, and moments from a file another
    for number, (part, *rest) in enumerate(in_batches(result, labels)):
        part.save(tmp_path / f"part{number}")
        files.append((Contributions.load(tmp_path / f"part{number}"), *rest))
    moments.save(tmp_path / "moments")
    again = evaluate(files, CLASSES, Moments.load(tmp_path / "moments"), ["L1.H0", "mlps"])
    assert [each.accuracy for each in again.values()] == [each.accuracy for each in got.values()]
    with pytest.raises(clipfast.InputError, match="no images were counted"):
        evaluate([], CLASSES, moments, [])


@pytest.mark.parametrize("ablated", [None, "mlps, L0"])
def test_heads_replaced_by_their_texts(data: tuple[Contributions, Contributions, Moments], ablated: str | None) -> None:
    result, seen, moments = data
    pool = directions(40, 20, seed=5, dtype=torch.float64)
    spans = moments.textspan(pool, 6, heads=[(-1, 0), (1, 1)]) | moments.textspan(pool, 3, heads=[(2, 1)])
    labels = torch.arange(9) % 4
    got = reconstruction_curve(in_batches(result, labels), CLASSES, spans, moments=moments, ablated=ablated)
    assert len(got.sizes) == 7
    base = naive(result, seen, Terms.parse(ablated or "nothing", result.basis))
    for size, accuracy in enumerate(got.sizes):
        expected = base
        for (layer, head), span in spans.items():
            outputs = result.head(layer, head)
            expected = expected - outputs + span.reconstruct(outputs, size)
        assert accuracy.accuracy == pytest.approx(float(((expected @ CLASSES.T).argmax(1) == labels).double().mean()))
    whole = (result.embedding @ CLASSES.T).argmax(1)
    assert got.baseline.accuracy == pytest.approx(float((whole == labels).double().mean()))


def test_logits_of_heads_replaced_by_their_texts(data: tuple[Contributions, Contributions, Moments]) -> None:
    """Accuracies are coarse: the logits that they are counted from are compared too."""
    result, _, moments = data
    spans = moments.textspan(directions(40, 20, seed=5, dtype=torch.float64), 5)
    _, logits = _Replaced(result, CLASSES, spans, 5, None, None).logits(result)
    for size in range(6):
        expected = result.embedding / result.norm[:, None]
        for (layer, head), span in spans.items():
            expected = expected - result.head(layer, head) + span.reconstruct(result.head(layer, head), size)
        assert error(logits[:, size], expected @ CLASSES.T) <= FLOAT64


def test_a_head_is_replaced_or_ablated(data: tuple[Contributions, Contributions, Moments]) -> None:
    result, _, moments = data
    spans = moments.textspan(directions(9, 20, dtype=torch.float64), 2, heads=[(-1, 0)])
    batch = [(result, torch.arange(9) % 4, None)]
    for text in ("L2.H0", "L2", "cls 2"):
        with pytest.raises(clipfast.InputError, match=r"^L2\.H0 is to be replaced by its texts and abl"):
            reconstruction_curve(batch, CLASSES, spans, moments=moments, ablated=text)
    with pytest.raises(clipfast.InputError, match=r"^to ablate mlps the moments of a data set are needed"):
        reconstruction_curve(batch, CLASSES, spans, ablated="mlps")
    with pytest.raises(clipfast.InputError, match="no spans were given"):
        reconstruction_curve(batch, CLASSES, {})


def test_a_baseline_near_chance_is_warned_of(
    data: tuple[Contributions, Contributions, Moments], caplog: pytest.LogCaptureFixture
) -> None:
    result, _, moments = data
    right = (result.embedding @ CLASSES.T).argmax(1)
    with caplog.at_level(logging.WARNING, logger="clipfast"):
        evaluate([(result, right, None)], CLASSES, moments, [])
        assert not caplog.records
        evaluate([(result, (right + 1) % 4, None)], CLASSES, moments, [])
    assert [record.getMessage() for record in caplog.records] == [
        "the baseline gets 0.0 % of 9 images right, near chance (25.0 %): check that labels and classes are in the "
        "same order and that the model has its weights"
    ]
