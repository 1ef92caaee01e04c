"""Moments against the outputs they stand for: streaming, merging, files, TEXTSPAN without images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import vision_tower
from hand_moments import moments_of_outputs
from measures import error, relative_error
from tolerances import FLOAT64, OP_FLOAT32
from torch.utils._python_dispatch import TorchDispatchMode

import clipfast
from clipfast.analyses import moments as moments_module
from clipfast.analyses.moments import Moments

IMAGES, TEXTS = 160, 90


@pytest.fixture(scope="module", params=["uniform", "termwise"])
def seen(request: pytest.FixtureRequest) -> clipfast.Contributions:
    model = clipfast.wrap(vision_tower(seed=1, dtype=torch.float64))
    images = torch.randn(IMAGES, 3, 24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return model.decompose(images, centring=request.param)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    drawn = torch.randn(TEXTS, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=1)


def of(contributions: clipfast.Contributions, *, batch: int = 37) -> Moments:
    moments = Moments()
    for start in range(0, len(contributions), batch):
        moments.update(contributions.select(range(start, min(start + batch, len(contributions)))))
    return moments


def test_means_and_covariances_are_those_of_the_outputs(seen: clipfast.Contributions) -> None:
    moments, heads = of(seen), seen.heads()
    assert error(moments.means(), heads.mean(0)) <= FLOAT64
    residual, rest = moments.residual_means()
    assert error(residual[0], seen.start.mean(0)) <= FLOAT64
    assert error(residual[1:], seen.mlps.mean(0)) <= FLOAT64
    assert error(rest, seen.rest.mean(0)) <= FLOAT64
    for layer, head in moments.heads():
        assert error(moments.covariance(layer, head), torch.cov(heads[:, layer, head].T)) <= FLOAT64


@pytest.mark.parametrize("method", ["greedy", "omp"])
def test_the_same_texts_as_from_the_outputs(seen: clipfast.Contributions, features: torch.Tensor, method: Any) -> None:
    result = of(seen).textspan(features, 12, method=method)
    for (layer, head), span in result.items():
        outputs = seen.head(layer, head)
        expected = clipfast.textspan(outputs, features, 12, method=method)
        assert span.picks == expected.picks
        assert span.rank == expected.rank
        assert error(span.explained, expected.explained) <= FLOAT64
        assert error(span.reconstruct(outputs), expected.reconstruct()) <= FLOAT64


def test_a_rank_counts_the_largest_dimensions(seen: clipfast.Contributions, features: torch.Tensor) -> None:
    result = of(seen).textspan(features, 4, rank=5)
    for (layer, head), span in result.items():
        assert span.rank == 5
        assert span.picks == clipfast.textspan(seen.head(layer, head), features, 4, rank=5).picks


def test_a_span_is_of_the_uncentred_outputs() -> None:
    """Along x a variance of 1 over the images (unbiased 4/3), along y the mean's square of 1.21: y is the larger."""
    outputs = torch.tensor([[1.0, 1.1, 0, 0], [1.0, 1.1, 0, 0], [-1.0, 1.1, 0, 0], [-1.0, 1.1, 0, 0]])
    spans = moments_of_outputs([outputs]).spans(rank=1)
    assert spans.ranks == (1,)
    assert error(spans.axes[0, 0].abs(), torch.tensor([0.0, 1, 0, 0])) <= OP_FLOAT32


def test_spans_are_computed_once_per_state(seen: clipfast.Contributions) -> None:
    moments = of(seen.select(range(80)))
    spans = moments.spans()
    assert moments.spans() is spans
    assert moments.spans(rank=5) is not spans
    assert moments.spans() is spans  # that of another rank replaces nothing
    moments.update(seen.select(range(80, 160)))
    assert moments.spans() is not spans
    assert error(moments.spans().mean, seen.heads().mean(0).flatten(0, 1)) <= FLOAT64


def test_some_heads_by_negative_layers(seen: clipfast.Contributions, features: torch.Tensor) -> None:
    moments = of(seen)
    some = moments.textspan(features, 3, heads=[(-1, 1), (0, 0)])
    assert list(some) == [(2, 1), (0, 0)]
    everyone = moments.textspan(features, 3)
    assert all(everyone[head].picks == span.picks for head, span in some.items())


def test_batches_do_not_matter(seen: clipfast.Contributions) -> None:
    one, many = of(seen, batch=IMAGES), of(seen, batch=7)
    assert one.count == many.count == IMAGES
    assert relative_error(one.covariance(2, 1), many.covariance(2, 1)) <= FLOAT64


def test_shards_merge(seen: clipfast.Contributions) -> None:
    whole = of(seen)
    merged, parts = Moments(), [of(seen.select(range(start, start + 40))) for start in range(0, IMAGES, 40)]
    for part in parts:
        merged.merge(part)
    merged.merge(Moments())
    assert merged.count == IMAGES
    assert relative_error(merged.covariance(1, 0), whole.covariance(1, 0)) <= FLOAT64
    assert error(merged.means(), whole.means()) <= FLOAT64
    again = Moments()
    for part in parts:
        again.merge(part)
    assert torch.equal(again.covariance(1, 0), merged.covariance(1, 0))


def test_a_far_mean_cancels_nothing() -> None:
    """Codes around 1000 that vary by 0.03: sums of raw squares in float32 would keep no digit of a variance."""
    model = clipfast.wrap(vision_tower(seed=1))
    images = torch.randn(64, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    contributions = model.decompose(images)
    contributions.codes += 1000  # rounded, to about 1/500 of what they vary by: the rounded codes are what is measured
    scale = 1 / (contributions.std * contributions.norm)
    shared = torch.stack([scale, contributions.mean * scale, 1 / contributions.norm], 1)
    codes = torch.cat([contributions.codes[:, 0, 0], shared], 1).double()
    basis = contributions.basis
    rows = torch.stack([basis.biases[0], basis.mean_row, basis.std_row])
    folded = torch.cat([basis.values(0)[0], rows]).double()
    expected = folded.T @ torch.cov(codes.T) @ folded
    assert relative_error(of(contributions).covariance(0, 0), expected) <= OP_FLOAT32


def test_the_class_tokens_mean(tmp_path: Path) -> None:
    """From the tokens themselves, through batches, shards and a file."""
    for centring in ("uniform", "termwise"):
        model = clipfast.wrap(vision_tower(seed=1, dtype=torch.float64))
        images = torch.randn(40, 3, 24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        contributions = model.decompose(images, class_token=True, tokens=True, centring=centring)
        expected = torch.stack(
            [contributions.tokens(layer)[:, 0].mean(0) for layer in contributions.layers]
        )  # [L, H, D]
        moments = of(contributions, batch=7)
        assert moments.has_class_token is True
        assert error(moments.class_means(), expected) <= FLOAT64
        assert error(moments.class_token_means(), expected.sum(1)) <= FLOAT64
        merged = Moments()
        for part in (contributions.select(range(30)), contributions.select(range(30, 40))):
            merged.merge(of(part))
        assert error(merged.class_token_means(), expected.sum(1)) <= FLOAT64
        moments.save(tmp_path / "moments")
        assert torch.equal(Moments.load(tmp_path / "moments").class_means(), moments.class_means())
        assert error(moments.means(), contributions.heads().mean(0)) <= FLOAT64


def test_the_class_token_is_kept_by_all_images_or_by_none(seen: clipfast.Contributions) -> None:
    model = clipfast.wrap(vision_tower(seed=1, dtype=torch.float64))
    images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with_it = model.decompose(images, class_token=True, centring=seen.basis.centring)
    for first, second in ((with_it, seen), (seen, with_it)):
        moments = of(first)
        with pytest.raises(clipfast.InputError, match="kept by some of these images only: decompose all alike"):
            moments.update(second)
        with pytest.raises(clipfast.InputError, match="kept by some of these images only"):
            moments.merge(of(second))
        assert moments.count == len(first)
    assert of(seen).has_class_token is False
    for read in (of(seen).class_means, of(seen).class_token_means):
        with pytest.raises(clipfast.NotKept, match="decomposed with class_token=True"):
            read()
    with pytest.raises(clipfast.InputError, match="the moments of 0 images"):
        Moments(model).class_token_means()


def test_saving(seen: clipfast.Contributions, features: torch.Tensor, tmp_path: Path) -> None:
    moments = of(seen)
    moments.save(tmp_path / "moments.safetensors")
    loaded = Moments.load(tmp_path / "moments.safetensors")
    assert loaded.count == IMAGES
    assert loaded.layers == moments.layers
    assert torch.equal(loaded.covariance(1, 1), moments.covariance(1, 1))
    ours, theirs = moments.textspan(features, 6), loaded.textspan(features, 6)
    assert all(ours[head].picks == theirs[head].picks for head in ours)
    loaded.merge(moments)
    assert loaded.count == 2 * IMAGES
    loaded.update(seen)
    assert loaded.count == 3 * IMAGES


def test_saving_without_the_basis(seen: clipfast.Contributions, tmp_path: Path) -> None:
    moments, path = of(seen), tmp_path / "moments"
    moments.save(path, with_basis=False)
    model = clipfast.wrap(vision_tower(seed=1, dtype=torch.float64))
    own = model.basis(seen.basis.centring)
    assert torch.equal(Moments.load(path, basis=own).means(), moments.means())
    with pytest.raises(clipfast.InputError, match="holds no basis: read it with that of its model"):
        Moments.load(path)
    others_centring = model.basis("termwise" if seen.basis.centring == "uniform" else "uniform")
    others_weights = clipfast.wrap(vision_tower(seed=7, dtype=torch.float64)).basis(seen.basis.centring)
    for other in (others_centring, others_weights):
        with pytest.raises(clipfast.InputError, match="another model than the basis that is given"):
            Moments.load(path, basis=other)


def test_a_file_of_something_else(seen: clipfast.Contributions, tmp_path: Path) -> None:
    seen.save(tmp_path / "contributions.safetensors")
    with pytest.raises(clipfast.InputError, match=r"not one that Moments\.save wrote"):
        Moments.load(tmp_path / "contributions.safetensors")


def test_what_does_not_belong_together(seen: clipfast.Contributions, features: torch.Tensor) -> None:
    other = clipfast.wrap(vision_tower(seed=7, dtype=torch.float64)).decompose(torch.ones(2, 3, 24, 24))
    moments = of(seen)
    with pytest.raises(clipfast.InputError, match="another model"):
        moments.update(other)
    with pytest.raises(clipfast.InputError, match="another model"):
        moments.merge(of(other))
    with pytest.raises(clipfast.InputError, match="head 2 does not exist"):
        moments.textspan(features, 3, heads=[(0, 2)])
    with pytest.raises(clipfast.InputError, match="somp"):
        moments.textspan(features, 3, method="somp")
    with pytest.raises(clipfast.InputError, match=r"text_features has shape \[90, 19\]"):
        moments.textspan(features[:, 1:], 3)


def test_other_layers_are_refused() -> None:
    model = clipfast.wrap(vision_tower(seed=1))
    images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    moments = Moments(model)
    moments.update(model.decompose(images, layers=[1, 2]))
    assert moments.layers == (1, 2)
    assert moments.heads() == [(1, 0), (1, 1), (2, 0), (2, 1)]
    with pytest.raises(clipfast.InputError, match=r"keep layers \[0, 1, 2\], the moments \[1, 2\]"):
        moments.update(model.decompose(images))


def test_nothing_seen() -> None:
    model = clipfast.wrap(vision_tower(seed=1))
    moments = Moments(model)
    moments.update(model.decompose(torch.empty(0, 3, 24, 24)))
    for call in (moments.means, moments.heads, moments.residual_means, moments.spans):
        with pytest.raises(clipfast.InputError, match="the moments of 0 images were asked for"):
            call()


def test_one_image_has_no_covariance() -> None:
    moments = moments_of_outputs([torch.tensor([[1.0, 2.0, 0.0, 0.0]])])
    assert error(moments.means(), torch.tensor([[[1.0, 2.0, 0.0, 0.0]]])) <= OP_FLOAT32
    for call in (moments.spans, lambda: moments.covariance(0, 0)):
        with pytest.raises(clipfast.InputError, match="the moments of 1 images were asked for: at least 2 are needed"):
            call()


def test_merged_moments_have_the_noise_of_the_coarser_dtype(seen: clipfast.Contributions) -> None:
    coarse = seen.to(torch.bfloat16)
    for first, second in ((seen, coarse), (coarse, seen)):
        moments = of(first)
        moments.merge(of(second))
        assert moments.spans().noise == 2**-8  # (8 roundings of 2**-7)²
    assert of(seen).spans().noise == 1e-12


def test_an_image_that_is_not_finite_changes_nothing() -> None:
    model = clipfast.wrap(vision_tower(seed=1))
    moments = Moments(model)
    with pytest.raises(clipfast.InputError, match="not finite"):
        moments.update(model.decompose(torch.full((1, 3, 24, 24), torch.inf)))
    assert moments.count == 0


# ------------------------------------------------------------------------------------------- without waiting for a GPU


class NoWaiting(TorchDispatchMode):
    """Raises where Python reads a value out of a tensor, which waits for the tensor's device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        assert func is not torch.ops.aten.nonzero.default, "a size depends on values"
        return func(*args, **kwargs or {})


@pytest.fixture
def checked_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(moments_module, "_is_checked_later", lambda device: True)


@pytest.mark.usefixtures("checked_later")
@pytest.mark.parametrize("class_token", [False, True])
def test_an_update_reads_no_value(class_token: bool) -> None:
    model = clipfast.wrap(vision_tower(seed=1))
    batches = [model.decompose(torch.randn(3, 3, 24, 24), class_token=class_token) for _ in range(3)]
    moments = Moments(model, backend="eager")
    with NoWaiting():
        for batch in batches:
            moments.update(batch)
    assert moments.count == 9


def test_reading_a_value_is_noticed() -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="a value was read"):
        bool(torch.ones(()))


@pytest.mark.usefixtures("checked_later")
def test_checked_later_gives_the_same_bits(seen: clipfast.Contributions, monkeypatch: pytest.MonkeyPatch) -> None:
    later = of(seen)
    assert later.count == IMAGES
    monkeypatch.undo()
    for name, tensor in of(seen)._sums.items():
        assert torch.equal(tensor, later._sums[name])


@pytest.mark.usefixtures("checked_later")
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_batch_that_is_not_finite_is_left_out_and_reported_once(seen: clipfast.Contributions, position: int) -> None:
    """First it would spoil the centre, later the sums; the error comes with the next update or the next look."""
    parts = [seen.select(range(start, start + 40)) for start in (0, 40, 80)]
    bad = parts[position]
    codes = bad.codes.clone()
    codes[3, 0, 1, 2] = torch.nan
    parts[position] = replace(bad, codes=codes)
    moments, errors = Moments(), []
    for part in [*parts, seen.select(range(120, 160))]:
        try:
            moments.update(part)
        except clipfast.InputError as error:
            errors.append(str(error))
            moments.update(part)  # what raised was an earlier batch
    assert len(errors) == 1
    assert errors[0].endswith("batches of 40 images were left out")
    assert "not finite" in errors[0]
    good = [part for part in range(4) if part != position]
    expected = of(seen.select([image for part in good for image in range(40 * part, 40 * part + 40)]))
    assert moments.count == 120
    assert relative_error(moments.means(), expected.means()) <= FLOAT64
    for layer, head in moments.heads():
        assert relative_error(moments.covariance(layer, head), expected.covariance(layer, head)) <= FLOAT64


@pytest.mark.usefixtures("checked_later")
@pytest.mark.parametrize(
    "look",
    [
        lambda moments: moments.count,
        Moments.settle,
        Moments.means,
        Moments.spans,
        lambda moments: moments.merge(Moments()),
        lambda moments: Moments().merge(moments),
        lambda moments: moments.save("never.safetensors"),
    ],
)
def test_every_look_at_the_moments_raises_first(
    seen: clipfast.Contributions, look: Callable[[Moments], object]
) -> None:
    moments = of(seen)
    moments.update(replace(seen, codes=seen.codes * torch.inf))
    with pytest.raises(clipfast.InputError, match=f"batches of {IMAGES} images were left out"):
        look(moments)
    assert moments.count == IMAGES


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_update_on_a_gpu_does_not_wait() -> None:
    model = clipfast.wrap(vision_tower(seed=1).cuda())
    batches = [model.decompose(torch.randn(3, 3, 24, 24, device="cuda")) for _ in range(3)]
    moments = Moments(model)
    moments.update(batches[0])  # compiles and times
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            moments.update(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert moments.count == 9
