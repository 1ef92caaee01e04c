"""Joint decomposition and the overlap of heads, against sums and covariances written out."""

import pytest
import torch
from builders import directions, pixels, vision_tower
from hand_moments import moments_of_outputs
from measures import error
from tolerances import FLOAT64
from torch import Tensor

import clipfast
from clipfast.analyses import joint
from clipfast.analyses.joint import head_overlaps, head_scores, patch_scores, subspace_overlaps
from clipfast.analyses.moments import Moments

IMAGES = 160
HEADS = [(layer, head) for layer in range(3) for head in range(2)]


@pytest.fixture(scope="module", params=["uniform", "termwise"])
def seen(request: pytest.FixtureRequest) -> clipfast.Contributions:
    model = clipfast.wrap(vision_tower(seed=1, dtype=torch.float64))
    images = torch.randn(IMAGES, 3, 24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return model.decompose(images, centring=request.param)


@pytest.fixture(scope="module")
def moments(seen: clipfast.Contributions) -> Moments:
    result = Moments()
    result.update(seen)
    return result


@pytest.fixture(scope="module")
def spans(moments: Moments) -> dict[tuple[int, int], clipfast.TextSpan]:
    return moments.textspan(directions(90, 20, dtype=torch.float64), 4)


# ---------------------------------------------------------------------------------------------------------- patches


@pytest.fixture(scope="module")
def tokens() -> clipfast.Contributions:
    """A tower of 2 × 3 patches."""
    model = clipfast.wrap(vision_tower(seed=1, dtype=torch.float64, image_size=(16, 24), patch_size=8))
    return model.decompose(pixels(model.module, 3, dtype=torch.float64), tokens=True, attention=True)


@pytest.mark.parametrize("head", HEADS)
def test_patches_along_a_heads_directions(
    tokens: clipfast.Contributions, spans: dict[tuple[int, int], clipfast.TextSpan], head: tuple[int, int]
) -> None:
    """α_i v_i through the head, written out, times every direction; the sum is the head's own score."""
    span, (layer, number) = spans[head], head
    result = patch_scores(tokens, layer, number, span)
    assert result.shape == (3, 7, len(span.picks))
    basis, scale = tokens.basis, 1 / (tokens.std * tokens.norm)
    constant = basis.biases[layer] + torch.outer(tokens.mean, basis.mean_row) + torch.outer(tokens.std, basis.std_row)
    assert tokens._values is not None
    for image in range(3):
        for token in range(7):
            value = tokens._values[layer][image, token, number]  # [E]
            weighted = tokens.attention[image, layer, number, token] * value @ basis.values(layer)[number]
            part = (weighted + constant[image] / 7) * scale[image]  # [D]
            for place, direction in enumerate(span.directions):
                assert abs(float(result[image, token, place] - part @ direction)) <= FLOAT64
    assert error(result.sum(1), tokens.head(layer, number) @ span.directions.T) <= FLOAT64


def test_patches_along_texts(tokens: clipfast.Contributions) -> None:
    texts = directions(3, 20, dtype=torch.float64)
    result = patch_scores(tokens, -1, 1, texts)
    assert error(result, tokens.tokens(2, 1) @ texts.T) <= FLOAT64
    assert patch_scores(tokens, -1, 1, texts[:0]).shape == (3, 7, 0)
    patches = result[:, -6:].unflatten(1, tokens.grid)
    assert torch.equal(patches[1, 1, 2], result[1, 6])


def test_a_head_is_spanned_by_its_directions_on_every_patch(tokens: clipfast.Contributions) -> None:
    """With as many directions as the head has dimensions, patches and directions give back the head."""
    axes = torch.linalg.qr(tokens.head(1, 0).new_empty(20, 20).normal_(generator=torch.Generator().manual_seed(0)))[0]
    whole = torch.einsum("bnm,md->bd", patch_scores(tokens, 1, 0, axes), axes)
    assert error(whole, tokens.head(1, 0)) <= FLOAT64


def test_patches_need_tokens(seen: clipfast.Contributions, tokens: clipfast.Contributions) -> None:
    texts = directions(2, 20, dtype=torch.float64)
    with pytest.raises(clipfast.NotKept, match="tokens were not kept"):
        patch_scores(seen, 0, 0, texts)
    with pytest.raises(clipfast.InputError, match="head 2 does not exist"):
        patch_scores(tokens, 0, 2, texts)
    with pytest.raises(clipfast.InputError, match="layer 3 does not exist"):
        patch_scores(tokens, 3, 0, texts)
    for wrong in (texts[:, 1:], texts[0]):
        with pytest.raises(clipfast.InputError, match=r"directions have shape \[.*\], expected \[directions, 20\]"):
            patch_scores(tokens, 0, 0, wrong)


def test_scores_of_heads_along_their_own_directions(
    seen: clipfast.Contributions, spans: dict[tuple[int, int], clipfast.TextSpan]
) -> None:
    wanted = {(2, 1): spans[2, 1], (-3, 0): spans[0, 0].directions}
    result = head_scores(seen, wanted)
    assert result.shape == (IMAGES, 2, 4)
    heads = seen.heads()
    assert error(result[:, 0], heads[:, 2, 1] @ spans[2, 1].directions.T) <= FLOAT64
    assert error(result[:, 1], heads[:, 0, 0] @ spans[0, 0].directions.T) <= FLOAT64
    with pytest.raises(clipfast.InputError, match="the heads have between 3 and 4 directions"):
        head_scores(seen, {(0, 0): spans[0, 0], (0, 1): spans[0, 1].directions[:3]})
    with pytest.raises(clipfast.InputError, match="the heads have no directions"):
        head_scores(seen, {})


# ------------------------------------------------------------------------------------------------ heads against heads


def covariances(seen: clipfast.Contributions) -> Tensor:
    return torch.stack([torch.cov(seen.head(*head).T) for head in HEADS])


@pytest.mark.parametrize("entries", [1, 6 * 20 * 7, 1 << 24])
def test_overlaps_are_those_of_the_covariances(
    seen: clipfast.Contributions, moments: Moments, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row, in blocks that do not divide the width, and at once."""
    monkeypatch.setattr(joint, "_ENTRIES", entries)
    whole = covariances(seen).flatten(1)
    unit = whole / whole.norm(dim=1, keepdim=True)
    result = head_overlaps(moments)
    assert error(result, unit @ unit.T) <= FLOAT64
    assert error(result.diagonal(), torch.ones(6)) <= FLOAT64


@pytest.mark.parametrize("rank", [None, 1, 4])
def test_subspaces_by_their_principal_angles(seen: clipfast.Contributions, moments: Moments, rank: int | None) -> None:
    """Cosines of principal angles are the singular values of the product of two orthonormal bases."""
    bases = [torch.linalg.svd(seen.head(*head), full_matrices=False)[2][: rank or 19] for head in HEADS]
    ranks = moments.spans(rank).ranks
    bases = [basis[:own] for basis, own in zip(bases, ranks, strict=True)]
    expected = torch.tensor(
        [[float(torch.linalg.svdvals(a @ b.T).square().mean()) for a in bases] for b in bases], dtype=torch.float64
    )
    assert error(subspace_overlaps(moments, rank), expected) <= FLOAT64


def test_heads_whose_overlap_anyone_can_compute() -> None:
    """One varies along x, one along y, one along both equally, one not at all."""
    x, y = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
    sign = torch.tensor([1.0, 1, -1, -1])[:, None]
    other = torch.tensor([1.0, -1, 1, -1])[:, None]
    moments = moments_of_outputs([sign * x, 3 * other * y, sign * x + other * y, torch.zeros(4, 4)])
    half = 0.5**0.5
    expected = torch.tensor([[1, 0, half, 0], [0, 1, half, 0], [half, half, 1, 0], [0, 0, 0, 0]])
    assert error(head_overlaps(moments), expected) <= 1e-7  # √½ in float32 above
    assert (
        error(subspace_overlaps(moments), torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0.0] * 4]))
        <= FLOAT64
    )


def test_what_has_no_overlap(moments: Moments) -> None:
    with pytest.raises(clipfast.InputError, match="rank is 0"):
        subspace_overlaps(moments, 0)
    for overlaps in (head_overlaps, subspace_overlaps):
        with pytest.raises(clipfast.InputError, match="the moments of 0 images were asked for"):
            overlaps(Moments())
