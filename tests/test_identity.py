"""Results of one model's weights never meet those of others, and weights that change are noticed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import clip_model, directions, pixels, randomise, vision_tower
from tolerances import FLOAT32, FLOAT64, SUM_FLOAT32
from torch import nn

from clipfast import Ablated, Contributions, InputError, Moments, wrap
from clipfast.analyses.ablation import ablate
from clipfast.analyses.retrieval import Index

OTHER = "of another model, of other weights or of another centring"


def changed_mlp() -> nn.Module:
    """The tower of seed 0 with one number of one MLP changed, which no basis holds."""
    visual = vision_tower()
    with torch.no_grad():
        visual.transformer.resblocks[1].mlp.c_fc.weight[3, 4] += 0.5
    return visual


@pytest.mark.parametrize("other", [changed_mlp, lambda: vision_tower(seed=1)], ids=["one MLP weight", "all weights"])
def test_other_weights_are_refused(other: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, changed = wrap(vision_tower()), wrap(other())
    x = pixels(model.module, 4)
    mine, theirs = model.decompose(x), changed.decompose(x)
    moments, index = Moments(model), Index([(0, 0)])
    moments.update(mine)
    index.add(mine)
    assert not mine.basis.same_as(theirs.basis)
    mine.save(tmp_path / "mine")
    moments.save(tmp_path / "moments")
    for call in (
        lambda: moments.update(theirs),
        lambda: Moments.load(tmp_path / "moments").update(theirs),
        lambda: index.add(theirs),
        lambda: ablate(theirs, "L0", moments),
        lambda: Ablated(changed, "L0", moments),
    ):
        with pytest.raises(InputError, match=OTHER):
            call()
    with pytest.raises(InputError, match="only batches of one model"):
        Contributions.cat([Contributions.load(tmp_path / "mine"), theirs])


def test_the_same_weights_belong_together(tmp_path: Path) -> None:
    """Another object, another number of threads, a file, another device or dtype of the results: one model."""
    model, again = wrap(vision_tower()), wrap(vision_tower())
    x = pixels(model.module, 4)
    moments = Moments(model)
    moments.update(model.decompose(x))
    model.decompose(x).save(tmp_path / "saved")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        others = [
            again.decompose(x),
            Contributions.load(tmp_path / "saved"),
            model.decompose(x).to(dtype=torch.float64),
        ]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert other.fingerprint == model.fingerprint() == moments.fingerprint
        moments.update(other)
    assert moments.count == 16
    with pytest.raises(InputError, match=OTHER):
        moments.update(model.decompose(x, centring="termwise"))


def test_saved_files_name_the_weights(tmp_path: Path) -> None:
    model = wrap(vision_tower())
    contributions = model.decompose(pixels(model.module, 3))
    moments, index = Moments(), Index([(0, 0)])
    moments.update(contributions)
    index.add(contributions)
    for result, kind in ((contributions, Contributions), (moments, Moments)):
        result.save(tmp_path / "file")
        assert kind.load(tmp_path / "file").fingerprint == model.fingerprint()
    index.save(tmp_path / "index")
    Index.load(tmp_path / "index").add(contributions)


# ---------------------------------------------------------------------------------------------- weights that change


def through_data(visual: nn.Module) -> None:
    """A change that the version of no tensor shows."""
    versions = [parameter._version for parameter in visual.parameters()]
    visual.proj.data.mul_(2)
    for block in visual.transformer.resblocks:
        block.attn.out_proj.weight.data[:, 16:] = 0  # one of two heads is pruned
    assert versions == [parameter._version for parameter in visual.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_change_through_data_is_seen_by_the_next_call(dtype: torch.dtype) -> None:
    visual = vision_tower(dtype=dtype)
    model, x, texts = wrap(visual), pixels(visual, dtype=dtype), directions(3, 20)
    before = model.decompose(x, texts=texts)
    before.heads()
    through_data(visual)
    after, fresh = model.decompose(x, texts=texts), wrap(visual).decompose(x, texts=texts)
    assert torch.equal(after.heads(), fresh.heads())
    assert torch.equal(after.maps, fresh.maps)
    assert after.fingerprint == fresh.fingerprint
    if dtype != torch.bfloat16:
        assert after.max_error() <= (SUM_FLOAT32 if dtype == torch.float32 else FLOAT64)


def test_a_change_through_data_is_refused_by_results_from_before() -> None:
    visual = vision_tower()
    model, x = wrap(visual), pixels(visual)
    before = model.decompose(x)
    through_data(visual)
    with pytest.raises(InputError, match="the weights have changed since these images were decomposed"):
        before.heads()
    with pytest.raises(InputError, match="the weights have changed since these images were decomposed"):
        _ = before.fingerprint


def test_a_change_of_the_text_tower_through_data_is_seen() -> None:
    clip = clip_model()
    model, x = wrap(clip), pixels(clip.visual)
    before = model.decompose(x, texts=["a cat"]).maps
    clip.text_projection.data.mul_(torch.linspace(-1, 1, 20))
    after = model.decompose(x, texts=["a cat"]).maps
    assert torch.equal(after, wrap(clip).decompose(x, texts=["a cat"]).maps)
    assert float((after - before).abs().max()) > FLOAT32


def test_randomised_weights_are_other_weights() -> None:
    visual = vision_tower()
    model = wrap(visual)
    first = model.fingerprint()
    randomise(visual, 3)
    assert model.fingerprint() != first
