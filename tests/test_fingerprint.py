"""The fingerprint of a tower's weights: every byte counts; devices, threads and wrapping do not."""

from collections.abc import Callable

import pytest
import torch
from builders import clip_model, pixels, vision_tower

from clipfast import InputError, wrap
from clipfast.fingerprint import SECONDS_BETWEEN_CHECKS, Weights, _weighted_sum, fingerprint
from clipfast.towers import openclip
from clipfast.towers.tower import Tower

TENSORS = len(list(openclip.read(vision_tower()).tensors()))


def tower(**changes: object) -> Tower:
    return openclip.read(vision_tower(**changes))


def test_equal_weights_have_equal_fingerprints() -> None:
    assert fingerprint(tower()) == fingerprint(tower())
    assert len(fingerprint(tower())) == 32
    assert int(fingerprint(tower()), 16)


def test_a_clip_and_its_vision_tower_have_the_same_fingerprint() -> None:
    clip = clip_model()
    assert wrap(clip).fingerprint() == wrap(clip.visual).fingerprint()


@pytest.mark.parametrize("index", range(TENSORS))
def test_the_lowest_bit_of_every_tensor_counts(index: int) -> None:
    changed = tower()
    weight = list(changed.tensors())[index]
    weight.data.view(torch.int32).view(-1)[-1] ^= 1
    assert fingerprint(changed) != fingerprint(tower())


def swap_equal_shapes(visual: torch.nn.Module) -> None:
    first, second = visual.transformer.resblocks[0].ln_1, visual.transformer.resblocks[1].ln_1
    first.weight.data, second.weight.data = second.weight.data, first.weight.data


def swap_rows(visual: torch.nn.Module) -> None:
    visual.proj.data = visual.proj.data.flip(0)


@pytest.mark.parametrize("change", [swap_equal_shapes, swap_rows])
def test_the_place_of_a_weight_counts(change: Callable[[torch.nn.Module], None]) -> None:
    visual = vision_tower()
    before = wrap(visual).fingerprint()
    change(visual)
    assert wrap(visual).fingerprint() != before


def test_dtype_and_settings_count() -> None:
    prints = {
        fingerprint(tower()),
        fingerprint(tower(dtype=torch.float64)),
        fingerprint(tower(dtype=torch.bfloat16)),
        fingerprint(tower(dtype=torch.float16)),
        fingerprint(tower(act_layer=openclip.QuickGELU)),
        fingerprint(tower(pool_type="avg", final_ln_after_pool=True)),
        fingerprint(tower(heads=4)),
        fingerprint(tower(norm_layer=lambda width: openclip.OpenClipLayerNorm(width, eps=1e-6))),
    }
    assert len(prints) == 8


def test_threads_and_strides_do_not_count() -> None:
    expected, threads = fingerprint(tower()), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert fingerprint(tower()) == expected
        torch.set_num_threads(3)
        assert fingerprint(tower()) == expected
    finally:
        torch.set_num_threads(threads)
    visual = vision_tower()
    visual.proj.data = visual.proj.data.T.contiguous().T
    assert not visual.proj.is_contiguous()
    assert wrap(visual).fingerprint() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_device_does_not_count() -> None:
    assert fingerprint(openclip.read(vision_tower().cuda())) == fingerprint(tower())


@pytest.mark.parametrize("change", ["mul_", "single", "no_grad", "replaced"])
def test_a_models_fingerprint_follows_its_weights(change: str) -> None:
    clip = clip_model()
    model = wrap(clip)
    before = model.fingerprint()
    weight = clip.visual.transformer.resblocks[1].mlp.c_fc.weight
    if change == "mul_":
        weight.data.mul_(2)  # counts no version
    elif change == "single":
        weight.data[3, 5] += 1
    elif change == "no_grad":
        with torch.no_grad():
            weight += 1
    else:
        clip.visual.transformer.resblocks[1].mlp.c_fc.weight = torch.nn.Parameter(weight.detach() * 2)
    assert model.fingerprint() != before
    assert model.fingerprint() == wrap(clip).fingerprint()


def test_text_weights_do_not_count() -> None:
    clip = clip_model()
    before = wrap(clip).fingerprint()
    clip.text_projection.data.mul_(2)
    assert wrap(clip).fingerprint() == before


def test_weights_without_values_have_no_fingerprint() -> None:
    with pytest.raises(InputError, match=r"^the weights are on the meta device and have no values: load them first$"):
        fingerprint(openclip.read(vision_tower().to("meta")))


# ------------------------------------------------------------------------------------------- checks at every call


def test_a_cached_fingerprint_is_read_again_when_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = clip_model()
    model = wrap(clip)
    x = pixels(clip.visual)
    first = model.decompose(x).fingerprint
    assert first == model.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr("clipfast.model.fingerprint", lambda tower: pytest.fail("it was read again"))
        assert model.decompose(x).fingerprint == first
    for tensor in model.tower.tensors():
        tensor.data.mul_(2)
        assert model.decompose(x).fingerprint == model.fingerprint() != first
        tensor.data.mul_(0.5)
    assert model.decompose(x).fingerprint == first


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_checksum_on_any_device_notices_values_and_places(dtype: torch.dtype) -> None:
    """The sum that GPUs compute, on the CPU."""
    weight = torch.randn(7, 9).to(dtype)
    seen = {int(_weighted_sum(weight)), int(_weighted_sum(weight.flip(0))), int(_weighted_sum(weight * 2))}
    changed = weight.clone()
    changed[3, 4] += 1
    seen |= {int(_weighted_sum(changed)), int(_weighted_sum(weight.roll(1, 1)))}
    assert len(seen) == 5
    assert _weighted_sum(weight.T.contiguous().T) == _weighted_sum(weight)


def test_bytes_on_a_gpu_are_read_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, reads = 0.0, []
    monkeypatch.setattr("clipfast.fingerprint.time.monotonic", lambda: now)
    weights = Weights()

    def state(version: int) -> int:
        return weights._seldom("basis", version, lambda: reads.append(now) or len(reads))

    first = state(1)
    assert (state(1), len(reads)) == (first, 1)
    assert state(2) != first  # another version is read at once
    now = SECONDS_BETWEEN_CHECKS
    state(2)
    assert reads == [0.0, 0.0, SECONDS_BETWEEN_CHECKS]
