"""An encoder with terms ablated: the numbers of ``ablate``, behind the calls of open_clip's own zero-shot code."""

import open_clip
import pytest
import torch
from builders import clip_model, pixels, vision_tower
from measures import error, relative_error
from PIL import Image
from tolerances import FLOAT32, FLOAT64, UNIT_NORM
from torch import Tensor

import clipfast
from clipfast import Model, Moments
from clipfast.analyses.ablated import Ablated
from clipfast.analyses.ablation import ablate
from clipfast.analyses.terms import Terms

TERMS = ["nothing", "mlps", "L0.H1", "L0, cls 0", "cls", "start, mlp 0, cls 1, L1.H0"]


@pytest.fixture
def model() -> Model:
    return clipfast.wrap(clip_model().double())


def moments_of(model: Model, centring: str = "uniform", **options: object) -> Moments:
    moments = Moments()
    images = pixels(model.module.visual, 12, seed=1, dtype=model.dtype)
    moments.update(model.decompose(images, centring=centring, **({"class_token": True} | options)))
    return moments


@pytest.fixture
def x(model: Model) -> Tensor:
    return pixels(model.module.visual, 5, dtype=torch.float64)


@pytest.mark.parametrize("text", TERMS)
@pytest.mark.parametrize("centring", ["uniform", "termwise"])
def test_features_are_those_of_ablate(model: Model, x: Tensor, text: str, centring: str) -> None:
    moments = moments_of(model, centring)
    encoder = Ablated(model, text, moments)
    contributions = model.decompose(x, class_token=True, centring=centring)
    expected = ablate(contributions, text, moments) * contributions.norm[:, None]
    assert encoder.terms == Terms.parse(text, model)
    assert error(encoder.encode_image(x, normalize=False), expected) <= FLOAT64
    assert error(encoder.encode_image(x), expected / expected.norm(dim=1, keepdim=True)) <= FLOAT64


def test_with_nothing_ablated_it_is_the_model(model: Model, x: Tensor) -> None:
    encoder = Ablated(model, "nothing", moments_of(model))
    with torch.no_grad():
        assert error(encoder.encode_image(x, normalize=False), model.module.encode_image(x)) <= FLOAT64
        tokens = open_clip.SimpleTokenizer(context_length=16)(["a cat", "a dog"])
        for normalize in (False, True):
            assert torch.equal(
                encoder.encode_text(tokens, normalize=normalize), model.module.encode_text(tokens, normalize=normalize)
            )
        images, texts, scale = encoder(x, tokens)
        for have, expected in zip((images, texts, scale), model.module(x, tokens), strict=True):
            assert error(have, expected) <= FLOAT64
    for normalize in (False, True):
        strings = ["a cat", "a dog"]
        assert torch.equal(encoder.encode_text(strings, normalize), model.encode_text(strings, normalize))
        assert torch.equal(encoder.encode_text(strings, normalize), encoder.encode_text(tokens, normalize))
    assert encoder.logit_scale is model.module.logit_scale
    assert encoder.preprocess is model.preprocess
    assert encoder(image=x)[1] is None
    assert encoder(text=tokens)[0] is None


def test_open_clips_own_zero_shot_code_runs(model: Model, x: Tensor) -> None:
    """Its classifier builder, then the lines of its evaluation loop."""
    moments = moments_of(model)
    encoder = Ablated(model, "mlps, L0.H1", moments)
    names, templates = ["cat", "dog", "gear"], ["a photo of a {}.", "a drawing of a {}."]
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    classifier = open_clip.build_zero_shot_classifier(encoder, tokenizer, names, templates, num_classes_per_batch=2)
    assert torch.equal(classifier, open_clip.build_zero_shot_classifier(model.module, tokenizer, names, templates, 2))
    legacy = open_clip.build_zero_shot_classifier_legacy(encoder, tokenizer, names, templates)
    assert error(legacy, classifier) <= FLOAT64
    contributions = model.decompose(x)
    expected = torch.nn.functional.normalize(ablate(contributions, "mlps, L0.H1", moments), dim=1) @ classifier
    with torch.no_grad():
        output = encoder(image=x)
        logits = encoder.logit_scale.exp() * encoder.encode_image(x, normalize=True) @ classifier
    assert error(output[0] @ classifier, expected) <= FLOAT64
    assert relative_error(logits, float(model.module.logit_scale.detach().exp()) * expected) <= FLOAT64


def test_moving_and_modes_do_no_harm(model: Model, x: Tensor) -> None:
    encoder = Ablated(model, "L1, cls", moments_of(model))
    before = encoder.encode_image(x)
    assert not encoder.training
    same = encoder.eval().to("cpu").to(torch.float64).requires_grad_(False)
    assert same is encoder
    assert torch.equal(encoder.encode_image(x), before)
    assert {name.removeprefix("module.") for name in encoder.state_dict()} == set(model.module.state_dict())
    with torch.inference_mode():
        assert torch.equal(encoder.encode_image(x), before)
    assert "terms=cls, L1" in repr(encoder)


def test_pictures_are_preprocessed(model: Model) -> None:
    encoder = Ablated(model, "mlps", moments_of(model))
    picture = Image.new("RGB", (40, 30), (200, 30, 30))
    one = encoder.encode_image(encoder.preprocess(picture)[None])
    assert error(encoder.encode_image([picture]), one) <= FLOAT64
    assert encoder.encode_image([]).shape == (0, 20)


def test_moments_of_no_more_than_is_needed(model: Model, x: Tensor) -> None:
    contributions = model.decompose(x)
    few = moments_of(model, layers=[1], class_token=False)
    expected = ablate(contributions, "L1.H0, mlps", moments_of(model)) * contributions.norm[:, None]
    assert error(Ablated(model, "L1.H0, mlps", few).encode_image(x, normalize=False), expected) <= FLOAT64
    with pytest.raises(clipfast.InputError, match=r"the moments keep layers \[1\] and layer 0 is to be ablated"):
        Ablated(model, "L0.H0", few)
    with pytest.raises(clipfast.NotKept, match="class_token=True"):
        Ablated(model, "cls 1", few)


def test_a_vision_tower_alone() -> None:
    model = clipfast.wrap(vision_tower())
    moments, x = Moments(model), pixels(model.module)
    moments.update(model.decompose(pixels(model.module, 6, seed=1)))
    encoder = Ablated(model, "L0", moments)
    features = encoder.encode_image(x, normalize=True)
    assert features.dtype == torch.float32
    assert error(features.norm(dim=1), torch.ones(2)) <= UNIT_NORM
    contributions = model.decompose(x)
    assert (
        relative_error(
            encoder.encode_image(x, normalize=False), ablate(contributions, "L0", moments) * contributions.norm[:, None]
        )
        <= FLOAT32
    )
    for text in (["a cat"], torch.zeros(1, 16, dtype=torch.long)):
        with pytest.raises(clipfast.InputError, match="this model has no text encoder"):
            encoder.encode_text(text)


def test_weights_that_change_are_noticed(model: Model, x: Tensor) -> None:
    encoder = Ablated(model, "L0", moments_of(model))
    with torch.no_grad():
        for parameter in model.module.visual.parameters():
            parameter.mul_(1.1)
    with pytest.raises(clipfast.InputError, match="the moments are of another model, of other weights"):
        encoder.encode_image(x)
    with pytest.raises(clipfast.InputError, match="the moments are of another model, of other weights"):
        Ablated(clipfast.wrap(clip_model(seed=7).double()), "L0", moments_of(model))
