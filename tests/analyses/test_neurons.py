"""Neuron-head pairs against brute force: every position, neuron, head and dimension written out in float64."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import directions, pixels, randomise, vision_tower
from measures import error, relative_error
from open_clip.modified_resnet import ModifiedResNet
from tolerances import EMBEDDING_FLOAT32, FLOAT64
from torch import Tensor

import clipfast
from clipfast import InputError
from clipfast.analyses import neurons
from clipfast.analyses.neuron_moments import PairMoments, centred, nearest_texts, sparse_texts

HEADS, NEURONS, WIDTH = 4, 128, 12


def resnet(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    visual = ModifiedResNet(layers=(1, 1, 1, 1), output_dim=WIDTH, heads=HEADS, image_size=64, width=4)
    return randomise(visual, seed).to(dtype).eval()


@dataclass
class Everything:
    """Of three images."""

    model: clipfast.Model
    images: Tensor
    parts: Tensor  # [B, N, H, C, D], what token i's neuron n writes through head h
    embedding: Tensor
    have: neurons.PairContributions

    @property
    def pairs(self) -> Tensor:
        return self.parts.sum(1)  # [B, H, C, D]

    @property
    def norm(self) -> Tensor:
        return self.embedding.norm(dim=-1)


@torch.no_grad()
def everything(count: int = 3, seed: int = 0) -> Everything:
    visual = resnet()
    images = pixels(visual, count, seed, torch.float64)
    features = []
    handle = visual.attnpool.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    embedding = visual(images)
    handle.remove()
    pool = visual.attnpool
    x = features[0].flatten(2).mT
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding  # [B, N, C]
    query, key = (layer(x).unflatten(-1, (HEADS, -1)) for layer in (pool.q_proj, pool.k_proj))
    alpha = (torch.einsum("bhe,bnhe->bhn", query[:, 0], key) / key.shape[-1] ** 0.5).softmax(-1)
    value = pool.v_proj.weight.unflatten(0, (HEADS, -1))  # [H, E, C]
    out = pool.c_proj.weight.unflatten(1, (HEADS, -1))  # [D, H, E]
    written = torch.einsum("hec,dhe->hcd", value, out)
    parts = torch.einsum("bhn,bnc,hcd->bnhcd", alpha, x, written)
    model = clipfast.wrap(visual)
    return Everything(model, images, parts, embedding, neurons.decompose(model, images))


@pytest.fixture(scope="module")
def case() -> Everything:
    return everything()


TEXTS = directions(5, WIDTH, dtype=torch.float64)
SOME = [(0, 3), (3, 127), (1, 0), (2, 64), (0, 3)]


def test_pairs_and_a_constant_are_the_embedding(case: Everything) -> None:
    have = case.have
    assert have.activations.shape == (3, HEADS, NEURONS)
    assert error(have.embedding, case.embedding) <= FLOAT64
    assert error(case.pairs.sum((1, 2)) + have.weights.constant, case.embedding) <= FLOAT64
    assert have.max_error() <= FLOAT64
    without_one = have.activations.clone()
    without_one[0, 2, 5] = 0
    assert replace(have, activations=without_one).max_error() > FLOAT64
    every = [(head, neuron) for head in range(HEADS) for neuron in range(NEURONS)]
    expected = case.pairs / case.norm[:, None, None, None]
    assert error(have.rows(every), expected.flatten(1, 2)) <= FLOAT64
    assert error(have.rows(torch.tensor(SOME)), expected[:, [0, 3, 1, 2, 0], [3, 127, 0, 64, 3]]) <= FLOAT64
    assert error(have.norms(), expected.norm(dim=-1)) <= FLOAT64
    assert error(have.heads(), expected.sum(2)) <= FLOAT64
    assert have.rows([]).shape == (3, 0, WIDTH)


def test_shares_add_up_to_one(case: Everything) -> None:
    expected = torch.einsum("bhcd,bd->bhc", case.pairs, case.embedding) / case.norm[:, None, None] ** 2
    assert error(case.have.shares(), expected) <= FLOAT64
    assert error(case.have.shares().sum((1, 2)) + case.have.constant_share(), torch.ones(3)) <= FLOAT64


def test_scores_of_texts_and_the_largest(case: Everything) -> None:
    expected = torch.einsum("bhcd,td->bhct", case.pairs, TEXTS) / case.norm[:, None, None, None]
    assert error(case.have.scores(TEXTS), expected) <= FLOAT64
    top = case.have.top(TEXTS, 7)
    values, places = expected.flatten(1, 2).mT.topk(7)
    assert error(top.scores, values) <= FLOAT64
    assert torch.equal(top.pairs[..., 0] * NEURONS + top.pairs[..., 1], places)
    assert case.have.top(TEXTS, 10**6).scores.shape == (3, 5, HEADS * NEURONS)
    with pytest.raises(InputError, match="these pairs are of several images"):
        top.above(0.5)


def test_a_decomposition_of_heads_has_the_same_embedding(case: Everything) -> None:
    contributions = case.model.decompose(case.images, attention=True)
    assert error(contributions.embedding, case.have.embedding) <= FLOAT64
    assert error(contributions.attention[:, 0], case.have.attention) <= FLOAT64
    bias = case.have.weights.constant / HEADS
    without = contributions.heads()[:, 0].sum(1) - HEADS * bias / case.norm[:, None]
    assert error(without, case.have.heads().sum(1)) <= FLOAT64


def test_maps_of_some_pairs_add_up_to_their_score(case: Everything) -> None:
    chosen = case.parts[:, :, [head for head, _ in SOME], [neuron for _, neuron in SOME]]  # [B, N, P, D]
    expected = torch.einsum("bnpd,td->bnt", chosen, TEXTS) / case.norm[:, None, None]
    maps = case.have.maps(SOME, TEXTS)
    assert maps.shape == (3, 2, 2, 5)
    assert error(maps.flatten(1, 2), expected[:, 1:]) <= FLOAT64
    of_one = case.have.maps([SOME, SOME[:2], SOME[2:], [], SOME], TEXTS)
    assert error(of_one[..., 0], maps[..., 0]) <= FLOAT64
    assert error(of_one[..., 1], case.have.maps(SOME[:2], TEXTS)[..., 1]) <= FLOAT64
    assert error(of_one[..., 3], torch.zeros(3, 2, 2)) == 0
    parts = case.have.maps(SOME[:2], TEXTS) + case.have.maps(SOME[2:], TEXTS)
    assert error(parts, maps) <= FLOAT64


def test_maps_in_pieces_are_the_same(case: Everything, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("exact", "published"):
        whole = case.have.maps(SOME, TEXTS, method=method)  # type: ignore[arg-type]
        monkeypatch.setattr(neurons, "_TOGETHER", 2)
        assert error(case.have.maps(SOME, TEXTS, method=method), whole) <= FLOAT64  # type: ignore[arg-type]
        assert error(case.have.weights.rows(SOME), case.have.weights.rows(SOME[:1] + SOME[1:])) == 0
        monkeypatch.undo()


def test_published_maps(case: Everything) -> None:
    """The mean over pairs of the neuron's value times the cosine of what its head writes of the token."""
    by_head = case.parts.sum(3)  # [B, N, H, D]
    cosines = F.cosine_similarity(by_head[:, :, :, None], TEXTS, dim=-1)  # [B, N, H, T]
    expected = sum(case.have.tokens[:, :, neuron, None] * cosines[:, :, head] for head, neuron in SOME) / len(SOME)
    assert isinstance(expected, Tensor)
    maps = case.have.maps(SOME, TEXTS, method="published")
    assert error(maps.flatten(1, 2), expected[:, 1:]) <= FLOAT64


def test_float32_and_a_final_map() -> None:
    visual = resnet(dtype=torch.float32)
    projection = torch.randn(WIDTH, 7, generator=torch.Generator().manual_seed(2))
    images = pixels(visual)
    have = neurons.decompose(clipfast.wrap(visual, projection=projection), images)
    with torch.no_grad():
        assert relative_error(have.embedding, visual(images) @ projection) <= EMBEDDING_FLOAT32
    assert have.max_error() <= EMBEDDING_FLOAT32
    assert have.weights.embed_dim == 7


# ---------------------------------------------------------------------------------------------------- over a data set


def split(whole: neurons.PairContributions, start: int, stop: int) -> neurons.PairContributions:
    names = ("embedding", "norm", "activations", "attention", "tokens")
    return replace(whole, **{name: getattr(whole, name)[start:stop] for name in names})


@pytest.fixture(scope="module")
def many() -> Everything:
    return everything(9, seed=1)


def collected(many: Everything, pieces: list[int], extremes: int = 3) -> PairMoments:
    moments, start = PairMoments(extremes), 0
    for size in pieces:
        moments.update(split(many.have, start, start + size))
        start += size
    return moments


@pytest.mark.parametrize("extremes", [1, 3, 6, 50])
def test_moments_are_those_of_all_images(many: Everything, extremes: int) -> None:
    moments = collected(many, [4, 0, 1, 4], extremes)
    pairs = many.pairs / many.norm[:, None, None, None]  # [B, H, C, D]
    mean = pairs.mean(0)
    assert moments.count == 9
    rows = many.have.weights.towards(torch.eye(WIDTH).double()).permute(1, 2, 0)  # [H, C, D]
    assert error(moments.mean[..., None] * rows, mean) <= FLOAT64
    assert error(moments.variance(), pairs.var(0).sum(-1)) <= FLOAT64
    away = (pairs - mean).norm(dim=-1)
    kept = min(extremes, 9)
    assert error(moments.importance(), away.topk(kept, 0).values.mean(0)) <= FLOAT64
    important = away.topk(kept, 0).indices[..., None].expand(-1, -1, -1, WIDTH)
    centred_parts = (pairs - mean).gather(0, important)  # [k, H, C, D]
    _, _, axes = torch.linalg.svd(centred_parts.permute(1, 2, 0, 3), full_matrices=False)
    first = axes[:, :, 0]  # [H, C, D]: the principal component that the paper takes
    positive = (torch.einsum("khcd,hcd->khc", centred_parts, first) > 0).sum(0)
    expected = torch.where((positive > kept // 2)[..., None], first, -first)
    every = [(head, neuron) for head in range(HEADS) for neuron in range(NEURONS)]
    have = moments.directions(every).view(HEADS, NEURONS, WIDTH)
    decided = 2 * positive != kept
    assert int(decided.sum()) > HEADS * NEURONS // 4
    assert error(have[decided], expected[decided]) <= 1e-6  # of singular vectors


def test_merged_moments_are_those_of_one_pass(many: Everything) -> None:
    whole, first, second = (collected(many, [9]), PairMoments(3), PairMoments(3))
    first.update(split(many.have, 0, 2))
    second.update(split(many.have, 2, 9))
    first.merge(second)
    first.merge(PairMoments(3))
    assert (first.count, whole.count) == (9, 9)
    for name in ("importance", "variance", "signs"):
        assert error(getattr(first, name)(), getattr(whole, name)()) <= FLOAT64
    assert error(first.mean, whole.mean) <= FLOAT64
    with pytest.raises(InputError, match="extremes are 3 and 4"):
        first.merge(PairMoments(4))


def test_selection_and_mean_ablation(many: Everything) -> None:
    moments = collected(many, [9])
    chosen = moments.select(0.1)
    assert chosen.shape == (51, 2)
    importance = moments.importance()
    values = importance[chosen[:, 0], chosen[:, 1]]
    assert torch.equal(values, importance.flatten().sort(descending=True).values[:51])
    pairs = many.pairs / many.norm[:, None, None, None]
    replaced = pairs.mean(0).expand_as(pairs).clone()
    replaced[:, chosen[:, 0], chosen[:, 1]] = pairs[:, chosen[:, 0], chosen[:, 1]]
    expected = replaced.sum((1, 2)) + many.have.weights.constant / many.norm[:, None]
    assert error(moments.ablated(many.have, chosen), expected) <= FLOAT64
    whole = many.embedding / many.norm[:, None]
    none = pairs.mean(0).sum((0, 1)) + many.have.weights.constant / many.norm[:, None]
    share = 1 - (whole - expected).square().sum() / (whole - none).square().sum()
    assert moments.kept_share(many.have, chosen) == pytest.approx(float(share), abs=FLOAT64)
    assert moments.kept_share(many.have, moments.select(1.0)) == pytest.approx(1, abs=FLOAT64)
    assert moments.kept_share(many.have, moments.select(0)) == 0


def test_top_pairs_of_texts(many: Everything) -> None:
    moments = collected(many, [9])
    every = [(head, neuron) for head in range(HEADS) for neuron in range(NEURONS)]
    cosines = moments.directions(every) @ TEXTS.T
    top = moments.top_pairs(2 * TEXTS, 6)
    values, places = cosines.T.topk(6)
    assert error(top.scores, values) <= FLOAT64
    assert torch.equal(top.pairs, torch.stack([places // NEURONS, places % NEURONS], -1))
    above = top.above(0.9)
    assert [len(pairs) for pairs in above] == [int((row > 0.9 * row[0]).sum()) for row in values]
    assert many.have.maps(above, TEXTS).shape == (9, 2, 2, 5)


# ------------------------------------------------------------------------------------------------------------- texts


def test_texts_of_directions() -> None:
    texts = directions(30, WIDTH, seed=1, dtype=torch.float64)
    weights = torch.zeros(2, 30, dtype=torch.float64)
    weights[0, [4, 9]] = torch.tensor([3.0, -2.0], dtype=torch.float64)
    weights[1, 17] = 1.0
    found = sparse_texts(weights @ texts, 5 * texts, 3)
    assert found.picks.shape == found.weights.shape == found.explained.shape == (2, 3)
    assert int(found.picks[0, 0]) == 4
    assert int(found.picks[1, 0]) == 17
    assert found.explained[1, 0] == pytest.approx(1, abs=FLOAT64)
    values, places = nearest_texts(weights @ texts, 5 * texts, 4)
    cosines = F.normalize(weights @ texts, dim=-1) @ texts.T
    assert error(values, cosines.topk(4).values) <= FLOAT64
    assert torch.equal(places, cosines.topk(4).indices)


def test_matching_pursuit_step_by_step() -> None:
    """Each pick is the text that lies nearest to what the least-squares fit of those before leaves."""
    texts, wanted = (directions(count, WIDTH, seed=count, dtype=torch.float64) for count in (40, 6))
    found = sparse_texts(wanted, texts, 5)
    for row, direction in enumerate(wanted):
        left, picks = direction, []
        for step in range(5):
            picks.append(int((texts @ left).abs().argmax()))
            fit = torch.linalg.lstsq(texts[picks].T, direction[:, None]).solution[:, 0]
            left = direction - fit @ texts[picks]
            assert float(found.explained[row, step]) == pytest.approx(1 - float(left @ left), abs=FLOAT64)
        assert found.picks[row].tolist() == picks
        assert error(found.weights[row], fit) <= FLOAT64


def test_centred_texts_are_what_distinguishes_them() -> None:
    shifted = TEXTS + 3 * TEXTS[0]
    assert error(centred(shifted), F.normalize(TEXTS - TEXTS.mean(0), dim=-1)) <= FLOAT64


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_one_line(case: Everything, many: Everything) -> None:
    moments = collected(many, [9])
    coca = vision_tower(attentional_pool=True, attn_pooler_heads=2)
    other = neurons.decompose(clipfast.wrap(resnet(seed=5)), case.images)
    broken = replace(case.have, activations=case.have.activations * float("nan"))
    cases: list[tuple[str, Any]] = [
        ("need the attention pool of a ResNet", lambda: neurons.decompose(clipfast.wrap(vision_tower()), None)),
        ("need the attention pool of a ResNet", lambda: neurons.decompose(clipfast.wrap(coca), None)),
        ("no head 4 with neuron 0: there are 4 heads, 128 neurons", lambda: case.have.rows([(4, 0)])),
        ("no head 0 with neuron -1", lambda: case.have.rows([(0, -1)])),
        (r"pairs are torch.float32 \[2, 2\]", lambda: case.have.rows(torch.ones(2, 2))),
        (r"text_features has shape \[5, 3\], expected \[texts, 12\]", lambda: case.have.scores(torch.ones(5, 3))),
        ("method is 'rough': choose one of exact, published", lambda: case.have.maps(SOME, TEXTS, method="rough")),  # type: ignore[arg-type]
        ("2 lists of pairs for 5 texts", lambda: case.have.maps([SOME, SOME], TEXTS)),
        ("extremes is 0", lambda: PairMoments(0)),
        ("these moments are empty", lambda: PairMoments().importance()),
        ("a variance needs two images or more: 1", lambda: collected(many, [1]).variance()),
        ("of another model, or of other weights", lambda: moments.update(other)),
        ("a contribution is not finite", lambda: moments.update(broken)),
        ("share is 2", lambda: moments.select(2)),
        ("these images do not differ", lambda: collected(many, [1]).kept_share(split(many.have, 0, 1), SOME)),
        ("size is 0, expected 1 to 12", lambda: sparse_texts(TEXTS, directions(30, WIDTH), 0)),
        (r"directions have shape \[5, 12\] and texts \[5, 3\]", lambda: nearest_texts(TEXTS, torch.ones(5, 3), 1)),
    ]
    for match, work in cases:
        with pytest.raises(InputError, match=match) as caught:
            work()
        assert "\n" not in str(caught.value)
    assert moments.count == 9
