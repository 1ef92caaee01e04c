"""A model's description holds the numbers that the model, its preprocessing and its results have."""

import json
from typing import Any

import pytest
import torch
import transformers
from builders import clip_model, pixels, vision_tower
from huggingface_models import VISION
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

import clipfast
from clipfast import Contributions, Model, Summary, wrap
from clipfast.summary import normalisation


def hugging_face(kind: str, **changes: Any) -> Model:
    torch.manual_seed(0)
    config = getattr(transformers, kind.replace("Model", "Config"))(**(VISION | changes))
    return wrap(getattr(transformers, kind)(config).eval())


def siglip() -> Model:
    return hugging_face("SiglipVisionModel")


def dinov2() -> Model:
    torch.manual_seed(0)
    vision = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    config = transformers.Dinov2WithRegistersConfig(**vision, num_register_tokens=4)
    return wrap(transformers.Dinov2WithRegistersModel(config).eval())


MODELS = {
    "class token": lambda: wrap(vision_tower()),
    "mean": lambda: wrap(vision_tower(pool_type="avg", final_ln_after_pool=True)),
    "bfloat16": lambda: wrap(vision_tower(dtype=torch.bfloat16)),
    "float64": lambda: wrap(vision_tower(dtype=torch.float64)),
    "registers": dinov2,
    "attention pool": siglip,
    "mean of norms": lambda: hugging_face("IJepaModel"),
}


def bytes_of(contributions: Contributions) -> dict[str, int]:
    """Bytes that results really hold, by name."""
    parts = {name: value.nbytes for name, value in vars(contributions).items() if isinstance(value, Tensor)}
    values = contributions._values
    parts["_values"] = 0 if values is None else sum(value.nbytes for value in values)
    return parts


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_what_a_decomposition_holds(name: str) -> None:
    model = MODELS[name]()
    summary, images = model.describe(), 3
    x = torch.randn(images, 3, *summary.image_size)
    texts = torch.randn(5, summary.embed_dim)
    assert summary.depth in summary.memory
    for depth, expected in summary.memory.items():
        options: dict[str, Any] = {"depth": depth, "tokens": expected.tokens is not None}
        parts = bytes_of(model.decompose(x, texts=texts, attention=True, **options))
        per_head = bytes_of(model.decompose(x, texts=texts, maps="per_head", depth=depth))
        terms = sum(parts[part] for part in ("embedding", "norm", "mean", "std", "codes", "start", "mlps", "rest"))
        assert images * expected.terms == terms
        assert images * expected.attention == parts["_attention"]
        assert images * 5 * expected.map == parts["_maps"]
        assert images * 5 * expected.map_per_head == per_head["_maps"]
        if expected.tokens is not None:  # the attention is kept along with the values
            assert images * expected.tokens == parts["_values"] + parts["_attention"]
        is_late = depth == "all" and name in ("attention pool", "mean of norms")
        assert (expected.until_the_end > 0) == is_late


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_the_results(name: str) -> None:
    model = MODELS[name]()
    summary = model.describe()
    contributions = model.decompose(torch.randn(2, 3, *summary.image_size), attention=True)
    assert contributions.codes.shape[1:3] == (model.layers, model.heads)
    assert contributions.attention.shape[-1] == summary.tokens == contributions.token_count
    assert contributions.embedding.shape[1] == summary.embed_dim
    assert (contributions.grid, contributions.prefix_tokens) == (summary.grid, summary.prefix_tokens)
    assert contributions.depth == summary.depth
    assert summary.width == summary.heads * (summary.head_dim or 0)
    assert summary.parameters == sum(
        weight.numel() for weight in model._package.vision_module(model.module).parameters()
    )


def test_the_bundled_model() -> None:
    summary = clipfast.load("scenes", device="cpu").describe()
    assert isinstance(summary, Summary)
    assert (summary.package, summary.classes, summary.pretrained) == ("open_clip", ("CLIP", "VisionTransformer"), True)
    assert (summary.tokenizer, summary.vocabulary, summary.context) == ("SimpleTokenizer", 806, 32)
    assert summary.normalisation is not None
    assert summary.normalisation.mean == (0.5, 0.5, 0.5)
    assert summary.normalisation.std == (0.25, 0.25, 0.25)
    printed = str(summary)
    assert "6 layers × 6 heads × 32, width 192, gelu" in printed
    assert "the class token" in printed
    widths = {line.index(value) for line, (_, value) in zip(printed.splitlines(), summary.rows(), strict=True)}
    assert len(widths) == 1  # values stand below each other
    page = summary._repr_html_()
    assert page.count("<tr>") == page.count("</tr>") == len(summary.rows())
    assert json.loads(json.dumps(summary.as_dict()))["memory"]["all"]["terms"] == summary.memory["all"].terms


def test_names_are_escaped_in_notebooks() -> None:
    model = wrap(vision_tower())
    model.name = "<b>"
    assert "&lt;b&gt;, of open_clip" in model.describe()._repr_html_()


def test_what_is_special_is_named() -> None:
    pool = siglip().describe()
    assert pool.features == ("no class token", "pooling after the final norm")
    assert pool.pooling == "an attention pool, 2 heads"
    assert pool.package == "transformers"
    assert pool.tokenizer is None
    assert "no tokenizer" in str(pool)
    assert wrap(vision_tower()).describe().features == ()
    assert MODELS["mean"]().describe().pooling == "the mean of the patches"
    assert MODELS["mean of norms"]().describe().pooling == "the mean of all tokens, each after the final norm"


def test_weights_are_as_given_random_or_pretrained() -> None:
    assert "as given" in str(wrap(clip_model()).describe())
    summary = clipfast.load("ViT-S-32-alt", device="cpu").describe()
    assert summary.pretrained is False
    assert "random" in str(summary)


@pytest.mark.parametrize("mean", [(0.48145466, 0.4578275, 0.40821073), (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)])
def test_mean_and_standard_deviation_are_read_off_images(mean: tuple[float, ...]) -> None:
    std = (0.26862954, 0.26130258, 0.27577711)
    transform = image_transform_v2(PreprocessCfg(size=24, mean=mean, std=std), is_train=False)
    found = normalisation(transform, (24, 24))
    assert found is not None
    assert found.mean == pytest.approx(mean, abs=2e-6)
    assert found.std == pytest.approx(std, abs=2e-6)


def test_other_preprocessing_has_no_mean() -> None:
    def squared(image: Image.Image) -> Tensor:
        return torch.full((3, 24, 24), float(image.getpixel((0, 0))[0]) ** 2)

    def refusing(image: Image.Image) -> Tensor:
        raise ValueError("only its own images")

    def constant(image: Image.Image) -> Tensor:
        return torch.zeros(3, 24, 24)

    def noisy(image: Image.Image) -> Tensor:
        return torch.randn(3, 24, 24)

    for preprocess in (squared, refusing, constant, noisy):
        assert normalisation(preprocess, (24, 24)) is None
    model = wrap(vision_tower())
    model.preprocess = refusing
    assert "no mean and standard deviation are known" in str(model.describe())


def test_describing_changes_nothing() -> None:
    visual = vision_tower()
    images, model = pixels(visual), wrap(visual)
    before, random = model.decompose(images), torch.get_rng_state()
    model.describe()
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model.decompose(images).codes, before.codes)
