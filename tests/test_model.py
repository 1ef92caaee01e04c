"""Model: its own encoders, what images and texts it takes, and one line for every argument that does not fit."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from builders import clip_model, directions, pixels, randomise, vision_tower
from measures import error, relative_error
from PIL import Image
from tolerances import EMBEDDING_FLOAT32, UNIT_NORM
from torch.utils.data import DataLoader, TensorDataset

from clipfast import ClipfastError, ImageError, InputError, Model, wrap


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(clip_model())


@pytest.fixture(scope="module")
def images(model: Model) -> torch.Tensor:
    return pixels(model.module.visual)


def one_line(match: str, kind: type[ClipfastError], work: Callable[[], object]) -> None:
    with pytest.raises(kind, match=match) as caught:
        work()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- texts


def test_text_features_have_unit_norm_and_the_models_direction(model: Model) -> None:
    texts = ["a red star", "a forest", ""]
    features = model.encode_text(texts)
    assert features.shape == (3, 20)
    assert error(features.norm(dim=-1), torch.ones(3)) <= UNIT_NORM
    tokens = open_clip.SimpleTokenizer(context_length=16)(texts)
    with torch.no_grad():
        assert error(features, model.module.encode_text(tokens, normalize=True)) <= UNIT_NORM


def test_one_string_is_one_text(model: Model, images: torch.Tensor) -> None:
    assert torch.equal(model.encode_text("a red star"), model.encode_text(["a red star"]))
    contributions = model.decompose(images, texts="a red star")
    assert contributions.maps.shape == (2, 10, 1)
    assert contributions.texts == ("a red star",)


def test_strings_and_their_features_give_the_same_maps(model: Model, images: torch.Tensor) -> None:
    texts = ["a red star", "a forest"]
    strings = model.decompose(images, texts=texts, maps="per_head")
    features = model.decompose(images, texts=model.encode_text(texts), maps="per_head")
    assert torch.equal(strings.maps, features.maps)
    assert strings.texts == ("a red star", "a forest")
    assert features.texts is None


@pytest.mark.parametrize("centring", ["uniform", "termwise"])
def test_other_texts_give_other_maps(images: torch.Tensor, centring: str) -> None:
    """Text features and their basis are kept between batches: only for the same texts and the same weights."""
    clip = clip_model()
    model, features = wrap(clip), directions(2, 20)
    steps: list[Callable[[], object]] = [
        lambda: "a red star",
        lambda: "a red star",
        lambda: "a forest",
        lambda: features,
        lambda: features.neg_(),  # the same tensor, other numbers
        lambda: randomise(clip.visual, 5) and features,
        lambda: "a forest",
        lambda: randomise(clip.transformer, 6) and "a forest",
    ]
    for step in steps:
        texts = step()
        expected = wrap(clip).decompose(images, texts=texts, centring=centring).maps
        assert torch.equal(model.decompose(images, texts=texts, centring=centring).maps, expected)


def test_another_centring_of_the_same_texts(images: torch.Tensor) -> None:
    clip = clip_model()
    model, features = wrap(clip), directions(2, 20)
    for centring in ("uniform", "termwise", "uniform"):
        expected = wrap(clip).decompose(images, texts=features, centring=centring).maps
        assert torch.equal(model.decompose(images, texts=features, centring=centring).maps, expected)


def test_texts_that_cannot_be_encoded(model: Model, images: torch.Tensor) -> None:
    long = "word " * 30
    one_line(
        r"^a text has 32 tokens, the model reads 16: shorten 'word word", InputError, lambda: model.encode_text([long])
    )
    one_line(r"^a text has 32 tokens", InputError, lambda: model.decompose(images, texts=["fine", long]))
    one_line(r"^no texts were given$", InputError, lambda: model.encode_text([]))
    one_line(r"^no texts were given$", InputError, lambda: model.decompose(images, texts=[]))


def test_a_vision_tower_alone_reads_no_texts() -> None:
    visual = vision_tower()
    lonely = wrap(visual)
    advice = "pass texts as features"
    one_line(rf"no text encoder: {advice}", InputError, lambda: lonely.encode_text(["a"]))
    one_line(rf"no text encoder: {advice}", InputError, lambda: lonely.decompose(pixels(visual), texts=["a"]))


def test_another_vocabulary_needs_its_own_tokenizer(images: torch.Tensor) -> None:
    clip = clip_model()
    clip.vocab_size = 100
    one_line("no tokenizer: wrap it with tokenize=…", InputError, lambda: wrap(clip).encode_text(["a"]))
    numbers = torch.arange(16).expand(1, 16)
    own = wrap(clip, tokenize=lambda texts: numbers.expand(len(texts), 16))
    with torch.no_grad():
        assert error(own.encode_text(["a"]), clip.encode_text(numbers, normalize=True)) <= UNIT_NORM


# --------------------------------------------------------------------------------------------------------- images


def test_pictures_paths_lists_and_tensors_agree(model: Model, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    picture, path = Image.fromarray(array), tmp_path / "picture.png"
    picture.save(path)
    tensor = model.preprocess(picture)[None]
    expected = model.decompose(tensor)
    for given in (picture, path, str(path), [picture], [path], (str(path),)):
        contributions = model.decompose(given)
        assert torch.equal(contributions.embedding, expected.embedding)
        assert torch.equal(model.encode_image(given), model.encode_image(tensor))
    assert len(model.decompose([picture, path, str(path)])) == 3


def test_a_wrapped_visual_preprocesses_like_its_clip(tmp_path: Path) -> None:
    """open_clip leaves the mean, the size and the interpolation of a model it creates on its visual."""
    clip, _, transform = open_clip.create_model_and_transforms("ViT-S-32-alt", image_mean=(0.1, 0.2, 0.3))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8))
    for module in (clip, clip.visual):
        assert torch.equal(wrap(module.eval()).preprocess(picture), transform(picture))


def test_greyscale_pictures_are_taken(model: Model) -> None:
    assert len(model.decompose(Image.new("L", (30, 30), 100))) == 1


def test_encode_image_is_the_models_own_forward(model: Model, images: torch.Tensor) -> None:
    with torch.no_grad():
        expected = model.module.encode_image(images)
    assert torch.equal(model.encode_image(images, normalize=False), expected)
    assert error(model.encode_image(images), expected / expected.norm(dim=1, keepdim=True)) <= UNIT_NORM
    assert relative_error(model.decompose(images).embedding, expected) <= EMBEDDING_FLOAT32
    tokens_too = vision_tower(output_tokens=True)
    assert wrap(tokens_too).encode_image(images).shape == (2, 20)


def test_images_that_do_not_fit(model: Model, images: torch.Tensor, tmp_path: Path) -> None:
    for wrong in (images[0], images[:, :2], images[..., :-1], images[None]):
        one_line(
            r"^images has shape \[.*\], expected \[images, 3, 24, 24\]", InputError, lambda x=wrong: model.prepare(x)
        )
    one_line(r"^images are torch.uint8: ", InputError, lambda: model.decompose(images.to(torch.uint8)))
    one_line(r"^images are torch.int64: ", InputError, lambda: model.encode_image(images.long()))
    one_line("nowhere.png: no such file", ImageError, lambda: model.decompose([tmp_path / "nowhere.png"]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda x: x.numpy(), r"^images is a numpy array: pass PIL images"),
        (lambda x: [x[0].numpy()], r"^images holds numpy arrays: pass PIL images"),
        (lambda x: list(x), r"^images holds tensors: pass one tensor .*torch\.stack\(images\)$"),
        (lambda x: [x, torch.tensor([0, 1])], r"^images is a batch with its labels: .* images\[0\]$"),
        (lambda x: (x, ["a", "b"]), r"^images is a batch with its labels"),
        (lambda x: TensorDataset(x), r"^images is a Dataset: pass the images of each batch"),
        (lambda x: DataLoader(TensorDataset(x)), r"^images is a DataLoader: pass the images of each batch"),
        (lambda x: {"image": x}, r"^images is a dict: pass the images in it alone$"),
        (lambda x: 3, r"^images is a int: pass a preprocessed tensor, PIL images or paths$"),
        (lambda x: None, r"^images is a NoneType: "),
        (lambda x: [3], r"^image 0 is a int: expected a path or a PIL image$"),
    ],
)
def test_images_of_other_kinds(model: Model, images: torch.Tensor, make: Callable, match: str) -> None:
    one_line(match, InputError, lambda: model.decompose(make(images)))
    one_line(match, InputError, lambda: model.encode_image(make(images)))


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (torch.full((1, 16), 60_000), r"^the tokenizer gives token 60000, the model knows 49408: "),
        (torch.full((1, 16), -1), r"^the tokenizer gives token -1, the model knows 49408: "),
        (torch.ones(1, 77, dtype=torch.long), r"^the tokenizer gives 77 tokens, the model reads 16: "),
        (torch.ones(16, dtype=torch.long), r"^the tokenizer gives torch.int64 \[16\]: expected integers"),
        (torch.ones(1, 16), r"^the tokenizer gives torch.float32 \[1, 16\]: expected integers"),
        ({"input_ids": torch.ones(1, 16, dtype=torch.long)}, r"^the tokenizer gives dict: expected integers"),
        ([[1] * 16], r"^the tokenizer gives list: expected integers"),
    ],
)
def test_a_foreign_tokenizer(tokens: object, match: str) -> None:
    foreign = wrap(clip_model(), tokenize=lambda texts: tokens)
    one_line(match, InputError, lambda: foreign.encode_text(["a"]))
    if isinstance(tokens, torch.Tensor):
        one_line(match, InputError, lambda: foreign.encode_text(tokens))


def test_double_images_are_taken_in_the_models_dtype(model: Model, images: torch.Tensor) -> None:
    assert torch.equal(model.decompose(images.double()).embedding, model.decompose(images).embedding)


# ------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"maps": "summed"}, r"^maps='summed' needs texts$"),
        ({"maps": "per_head"}, r"^maps='per_head' needs texts$"),
        ({"maps": "mean", "texts": directions(2, 20)}, r"^maps is 'mean': choose 'summed' or 'per_head'$"),
        ({"texts": directions(2, 19)}, r"^texts has shape \[2, 19\], expected \[texts, 20\]$"),
        ({"texts": directions(2, 20)[0]}, r"^texts has shape \[20\], expected \[texts, 20\]$"),
        ({"centring": "median"}, r"^centring is 'median': choose one of uniform, termwise$"),
        ({"layers": [2]}, r"^layer 2 does not exist: choose from 0 to 1, or negative from the end$"),
        ({"layers": [0, -3, 7]}, r"^layer -3 does not exist"),
    ],
)
def test_arguments_that_do_not_fit(model: Model, images: torch.Tensor, options: dict, match: str) -> None:
    one_line(match, InputError, lambda: model.decompose(images, **options))


def test_a_centring_that_does_not_exist_has_no_basis(model: Model) -> None:
    one_line("^centring is 'median'", InputError, lambda: model.basis("median"))


def test_an_unknown_backend(model: Model) -> None:
    one_line(
        "^unknown backend 'abacus': choose 'auto' or one of ", InputError, lambda: wrap(model.module, backend="abacus")
    )


def test_a_named_backend_computes_the_same(model: Model, images: torch.Tensor) -> None:
    eager = wrap(model.module, backend="eager").decompose(images, texts=directions(2, 20))
    assert eager.max_error() <= EMBEDDING_FLOAT32
    assert relative_error(eager.embedding, model.decompose(images).embedding) <= EMBEDDING_FLOAT32


def test_wrapping_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        wrapped = wrap(clip_model())
    assert caplog.messages == []
    assert wrapped.pretrained is None


def test_a_files_folder_can_be_gone_after_loading(model: Model, tmp_path: Path) -> None:
    """Pictures are read when they are given, not when their pixels are wanted."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (30, 30), "red").save(folder / "a.png")
    prepared = model.prepare([folder / "a.png"])
    shutil.rmtree(folder)
    assert len(model.decompose(prepared)) == 1
