"""The interface of the paper's package on unmodified models, against forward hooks in float64 and TEXTSPAN in NumPy."""

import copy
import gc
import io
import json
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import ROOT, clip_model, pixels, randomise
from golden.make_golden import decompose
from golden.make_golden import textspan as by_definition
from measures import error, relative_error
from open_clip.transformer import QuickGELU, VisionTransformer
from tolerances import EMBEDDING_FLOAT32, FLOAT64, GOLDEN, SUM_FLOAT32, UNIT_NORM
from torch import Tensor, nn

import clipfast
from clipfast import InputError, UnsupportedTower, wrap
from clipfast.compat.clip_text_span import PRSLogger, hook_prs_logger, replace_with_iterative_removal

GOLDEN_FOLDER = ROOT.parent / "shared" / "golden"


@pytest.fixture
def model() -> Any:
    return clip_model()


@pytest.fixture
def images(model: Any) -> Tensor:
    return pixels(model.visual, 3)


def logged(model: Any, images: Tensor, method: str, **options: Any) -> tuple[Tensor, Tensor]:
    """As a published script does it."""
    with hook_prs_logger(model, "cpu", spatial=method == "head") as prs, torch.no_grad():
        prs.reinit()
        representation = model.encode_image(images, attn_method=method, normalize=False, **options)
        return prs.finalize(representation)


def expected(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """``[b, layers, tokens, heads, d]`` and ``[b, layers + 1, d]`` by forward hooks on a float64 copy."""
    made = decompose(copy.deepcopy(model.visual).double(), images.double(), "uniform")
    mlps = np.concatenate([made["start"][:, None], made["mlps"]], 1)
    return torch.from_numpy(made["tokens"]), torch.from_numpy(mlps)


# ------------------------------------------------------------------------------------------------------------ terms


def test_terms_with_tokens(model: Any, images: Tensor) -> None:
    attentions, mlps = logged(model, images, "head")
    tokens, other = expected(model, images)
    assert (attentions.shape, mlps.shape) == ((3, 2, 10, 2, 20), (3, 3, 20))
    assert attentions.dtype == mlps.dtype == torch.float32
    assert attentions.is_contiguous()
    assert not attentions.requires_grad
    assert error(attentions, tokens) <= GOLDEN
    assert error(mlps, other) <= GOLDEN


def test_terms_without_tokens(model: Any, images: Tensor) -> None:
    attentions, mlps = logged(model, images, "head_no_spatial")
    tokens, other = expected(model, images)
    assert (attentions.shape, mlps.shape) == ((3, 2, 2, 20), (3, 3, 20))
    assert attentions.dtype == torch.float32
    assert error(attentions, tokens.sum(2)) <= GOLDEN
    assert error(mlps, other) <= GOLDEN


@pytest.mark.parametrize("name", ["tower_gelu.npz", "tower_quickgelu.npz"])
def test_arrays_of_another_implementation(name: str) -> None:
    if not (GOLDEN_FOLDER / name).is_file():
        pytest.skip(f"no arrays of another implementation beside this checkout: {name}")
    with np.load(GOLDEN_FOLDER / name) as file:
        saved = {key: torch.from_numpy(file[key]) for key in file.files}
    config = json.loads(bytes(saved["config"].numpy()))
    quick_gelu, _ = config.pop("quick_gelu"), config.pop("seed")
    model = clip_model()
    model.visual = VisionTransformer(**config, act_layer=QuickGELU if quick_gelu else nn.GELU).eval()
    weights = {key.removeprefix("weights/"): saved[key] for key in saved if key.startswith("weights/")}
    model.visual.load_state_dict(weights)
    attentions, mlps = logged(model, saved["images"], "head")
    assert error(attentions, saved["attentions"]) <= GOLDEN
    assert error(mlps, saved["mlps"]) <= GOLDEN
    attentions, mlps = logged(model, saved["images"], "head_no_spatial")
    assert error(attentions, saved["attentions"].sum(2)) <= GOLDEN
    assert error(mlps, saved["mlps"]) <= GOLDEN


def test_terms_sum_to_what_encode_image_returned(model: Any, images: Tensor) -> None:
    own = model.encode_image(images)
    for method, axes in (("head", (1, 2, 3)), ("head_no_spatial", (1, 2))):
        with hook_prs_logger(model, "cpu", spatial=method == "head") as prs:
            representation = model.encode_image(images, attn_method=method)
            assert relative_error(representation, own) <= EMBEDDING_FLOAT32
            attentions, mlps = prs.finalize(representation)
        total = representation / representation.norm(dim=1, keepdim=True)
        assert error(attentions.sum(axes) + mlps.sum(1), total) <= SUM_FLOAT32


def test_terms_are_divided_by_the_norm_of_what_is_given(model: Any, images: Tensor) -> None:
    """A normalised representation has norm 1: as published, terms then sum to the embedding itself."""
    attentions, mlps = logged(model, images, "head_no_spatial")
    with hook_prs_logger(model, "cpu", spatial=False) as prs:
        representation = model.encode_image(images, normalize=True, attn_method="head_no_spatial")
        assert error(representation.norm(dim=1), torch.ones(3)) <= UNIT_NORM
        divided = prs.finalize(representation)
        norm = model.encode_image(images).norm(dim=1)
        assert relative_error(divided[0], attentions * norm[:, None, None, None]) <= EMBEDDING_FLOAT32
        assert relative_error(divided[1], mlps * norm[:, None, None]) <= EMBEDDING_FLOAT32
    with hook_prs_logger(model, "cpu") as prs:
        representation = model.encode_image(images, attn_method="head")
        assert relative_error(prs.finalize(2 * representation)[0].sum(2), attentions / 2) <= EMBEDDING_FLOAT32


def test_calls_give_the_same_after_reinit(model: Any, images: Tensor) -> None:
    with hook_prs_logger(model, "cpu") as prs:
        results = []
        for batch in (images, images.flip(0), images):
            prs.reinit()
            representation = model.encode_image(batch, attn_method="head")
            results.append(prs.finalize(representation))
            assert all(map(torch.equal, prs.finalize(representation), results[-1]))
    assert all(map(torch.equal, results[0], results[2]))
    assert error(results[1][0].flip(0), results[0][0]) <= GOLDEN


def test_weights_that_change_are_seen(model: Any, images: Tensor) -> None:
    with hook_prs_logger(model, "cpu", spatial=False) as prs:
        first = prs.finalize(model.encode_image(images, attn_method="head_no_spatial"))
        randomise(model, 7)
        prs.reinit()
        second = prs.finalize(model.encode_image(images, attn_method="head_no_spatial"))
    tokens, _ = expected(model, images)
    assert error(second[0], tokens.sum(2)) <= GOLDEN
    assert error(first[0], second[0]) > 100 * GOLDEN


def test_other_dtypes_and_no_images(model: Any, images: Tensor) -> None:
    tokens, mlps = expected(model, images)
    attentions, other = logged(model.double(), images.double(), "head")
    assert attentions.dtype == torch.float64
    assert error(attentions, tokens) <= FLOAT64
    assert error(other, mlps) <= FLOAT64
    attentions, other = logged(model.bfloat16(), images, "head_no_spatial")
    assert attentions.dtype == other.dtype == torch.float32
    assert logged(model.float(), images[:0], "head")[0].shape == (0, 2, 10, 2, 20)


def test_models_that_clipfast_loaded(model: Any, images: Tensor) -> None:
    wrapped = wrap(model)
    own, plain = wrapped.encode_image(images), set(vars(wrapped))
    attentions, mlps = logged(wrapped, images, "head")
    tokens, other = expected(model, images)
    assert error(attentions, tokens) <= GOLDEN
    assert error(mlps, other) <= GOLDEN
    with hook_prs_logger(wrapped, "cpu"), torch.no_grad():
        assert torch.equal(wrapped.encode_image(images), own)  # normalised, as is its way
        assert torch.equal(wrapped.encode_image(images, normalize=False), model.encode_image(images))
        assert "encode_image" not in vars(model)
    assert set(vars(wrapped)) == plain


def test_towers_that_another_layer_wraps(model: Any, images: Tensor) -> None:
    parallel = nn.DataParallel(model)
    with hook_prs_logger(parallel, "cpu", spatial=False) as prs:
        attentions, _ = prs.finalize(parallel.encode_image(images, attn_method="head_no_spatial"))
        assert torch.equal(parallel.encode_image(images), model.encode_image(images))
    assert error(attentions, expected(model, images)[0].sum(2)) <= GOLDEN
    assert not hasattr(parallel, "encode_image")


# ----------------------------------------------------------------------------------- the model before, with and after


def state(model: Any) -> dict[str, Any]:
    return dict(vars(model))


def test_the_model_is_as_before(model: Any, images: Tensor) -> None:
    before, kind, own = state(model), type(model), model.encode_image(images)
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}
    prs = hook_prs_logger(model, "cpu")
    assert "encode_image" in vars(model)
    assert torch.equal(model.encode_image(images), own)
    assert torch.equal(model.encode_image(images, True), nn.functional.normalize(own, dim=-1))
    assert torch.equal(model.encode_image(images, attn_method="direct"), own)
    assert torch.equal(model(images)[0], nn.functional.normalize(own, dim=-1))
    assert type(model) is kind
    assert model.state_dict().keys() == clip_model().state_dict().keys()
    assert not prs.closed
    prs.close()
    prs.close()
    assert prs.closed
    assert state(model) == before
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == modules
    with pytest.raises(TypeError):
        model.encode_image(images, attn_method="head")


def test_positional_arguments_are_those_of_the_published_method(model: Any, images: Tensor) -> None:
    with hook_prs_logger(model, "cpu", False) as prs:
        representation = model.encode_image(images, False, "head_no_spatial")
        assert relative_error(representation, type(model).encode_image(model, images)) <= EMBEDDING_FLOAT32
        assert len(prs.finalize(representation)[0]) == 3


def test_what_was_kept_is_there_after_closing(model: Any, images: Tensor) -> None:
    with hook_prs_logger(model, "cpu") as prs:
        representation = model.encode_image(images, attn_method="head")
    attentions, _ = prs.finalize(representation)
    assert error(attentions, expected(model, images)[0]) <= GOLDEN


def test_an_exception_closes_it(model: Any) -> None:
    before = state(model)
    with pytest.raises(ZeroDivisionError), hook_prs_logger(model, "cpu"):
        _ = 1 / 0
    assert state(model) == before


@pytest.mark.parametrize("first", [0, 1])
def test_two_loggers(model: Any, images: Tensor, first: int) -> None:
    before = state(model)
    loggers = [hook_prs_logger(model, "cpu"), hook_prs_logger(model, "cpu", spatial=False)]
    with_tokens = loggers[0].finalize(model.encode_image(images, attn_method="head"))
    without = loggers[1].finalize(model.encode_image(images, attn_method="head_no_spatial"))
    assert error(with_tokens[0].sum(2), without[0]) <= GOLDEN
    loggers[first].close()
    assert "encode_image" in vars(model)
    loggers[1 - first].close()
    assert state(model) == before


def test_two_loggers_of_one_kind_keep_the_same(model: Any, images: Tensor) -> None:
    with hook_prs_logger(model, "cpu") as outer:
        with hook_prs_logger(model, "cpu") as inner:
            representation = model.encode_image(images, attn_method="head")
            assert all(map(torch.equal, outer.finalize(representation), inner.finalize(representation)))
            inner.reinit()
            with pytest.raises(InputError, match="called twice"):
                model.encode_image(images, attn_method="head")
            with pytest.raises(InputError, match="no images were encoded"):  # nothing was kept by half
                inner.finalize(representation)
        outer.reinit()
        outer.finalize(model.encode_image(images, attn_method="head"))


def test_a_logger_that_is_dropped(model: Any, images: Tensor) -> None:
    before = state(model)
    prs = hook_prs_logger(model, "cpu")
    prs = hook_prs_logger(model, "cpu", spatial=False)  # a cell of a notebook that is run again
    with pytest.raises(InputError, match="needs a logger made with spatial=True"):
        model.encode_image(images, attn_method="head")
    prs.finalize(model.encode_image(images, attn_method="head_no_spatial"))
    del prs
    assert state(model) == before


def test_neither_keeps_the_other_alive() -> None:
    gc.disable()
    try:
        model = clip_model()
        alive = weakref.ref(model)
        prs = hook_prs_logger(model, "cpu")
        del model
        assert alive() is not None  # the logger has it
        del prs
        assert alive() is None
    finally:
        gc.enable()


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_pickle, through_save])
def test_copies_have_no_logger(model: Any, images: Tensor, copied: Callable[[Any], Any]) -> None:
    own, names = model.encode_image(images), set(vars(model))
    with hook_prs_logger(model, "cpu", spatial=False) as prs:
        other = copied(model)
        assert set(vars(other)) == names
        assert torch.equal(other.encode_image(images), own)
        prs.finalize(model.encode_image(images, attn_method="head_no_spatial"))
        attentions, _ = logged(other, images, "head")
        assert error(attentions, expected(model, images)[0]) <= GOLDEN


def test_clipfast_decomposes_a_model_with_a_logger(model: Any, images: Tensor) -> None:
    with hook_prs_logger(model, "cpu"):
        assert wrap(model).verify(images).ok
        model.visual.transformer.resblocks[0].ln_1.eps = 1e-3  # reads the tower again
        model.encode_image(images, attn_method="head")


# ------------------------------------------------------------------------------------------------------- bad input


def test_refusals(model: Any, images: Tensor) -> None:
    with pytest.raises(InputError, match="device is 'gpu'"):
        hook_prs_logger(model, "gpu")
    with pytest.raises(InputError, match="not a str"):
        hook_prs_logger("ViT-B-32", "cpu")  # type: ignore[arg-type]
    prs = hook_prs_logger(model, "cpu")
    with pytest.raises(InputError, match=r"no images were encoded since reinit.*attn_method='head'"):
        prs.finalize(torch.zeros(3, 20))
    for method in ("heads", "qkv", 3):
        with pytest.raises(InputError, match=f"attn_method is {method!r}: choose from 'head', 'head_no_spatial'"):
            model.encode_image(images, attn_method=method)
    with pytest.raises(InputError, match="'head_no_spatial' needs a logger made with spatial=False: this one takes"):
        model.encode_image(images, attn_method="head_no_spatial")
    with pytest.raises(InputError, match="takes no layers"):
        model.encode_image(images, attn_method="head", layers=3)
    with pytest.raises(InputError, match=r"images has shape \[3, 3, 24, 20\]"):
        model.encode_image(images[..., :20], attn_method="head")
    representation = model.encode_image(images, attn_method="head")
    with pytest.raises(InputError, match="encode_image was called twice: call reinit"):
        model.encode_image(images, attn_method="head")
    for wrong in (representation[:2], representation[0]):
        with pytest.raises(InputError, match=r"representation is \[.*\], expected \[3, 20\]"):
            prs.finalize(wrong)
    with pytest.raises(InputError, match=r"representation is list"):
        prs.finalize([1.0])  # type: ignore[arg-type]
    encode = model.encode_image
    prs.close()
    with pytest.raises(InputError, match="'head' needs a logger: call hook_prs_logger"):
        encode(images, attn_method="head")


def test_a_model_that_cannot_be_decomposed_stays_as_it_is(model: Any) -> None:
    model.visual.transformer.resblocks[0].mlp.register_forward_hook(lambda *_: None)
    before = state(model)
    with pytest.raises(UnsupportedTower, match="forward hook"):
        hook_prs_logger(model, "cpu")
    assert state(model) == before
    with hook_prs_logger(wrap(model, ignore_hooks=True), "cpu"):
        pass


def test_a_method_of_the_model_itself_is_given_back() -> None:
    wrapped = clipfast.wrap(clip_model())
    own = wrapped.encode_image
    vars(wrapped)["encode_image"] = own
    with hook_prs_logger(wrapped, "cpu"):
        assert vars(wrapped)["encode_image"] is not own
        assert torch.equal(wrapped.encode_image(torch.zeros(1, 3, 24, 24)), own(torch.zeros(1, 3, 24, 24)))
    assert vars(wrapped)["encode_image"] is own
    prs = hook_prs_logger(wrapped, "cpu")
    vars(wrapped)["encode_image"] = own  # put there in the meantime
    prs.close()
    assert vars(wrapped)["encode_image"] is own


def test_the_class_is_there_for_type_hints(model: Any) -> None:
    with hook_prs_logger(model, torch.device("cpu")) as prs:
        assert isinstance(prs, PRSLogger)
        assert (prs.model, prs.device, prs.spatial) == (model, torch.device("cpu"), True)


# -------------------------------------------------------------------------------------------------------- TEXTSPAN


def drawn(images: int = 60, d: int = 24, dims: int = 24, texts: int = 50, seed: int = 0) -> tuple[Any, Any, list[str]]:
    """Outputs ``[images, d]`` of so many dimensions, with a mean and unequal variances, and text features."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(d, dims)))[0]
    data = ((rng.normal(size=(images, dims)) + 1) * 0.85 ** np.arange(dims)) @ axes.T
    features = rng.normal(size=(texts, d))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return data.astype(np.float32), features.astype(np.float32), [f"text {number}" for number in range(texts)]


@pytest.mark.parametrize(("iters", "rank"), [(1, 24), (8, 24), (12, 16), (5, 5), (24, 24)])
def test_iterative_removal_follows_its_definition(iters: int, rank: int) -> None:
    data, features, texts = drawn()
    reconstruction, picked = replace_with_iterative_removal(data, features, texts, iters, rank, "cpu")
    picks, rebuilt = by_definition(data.astype(np.float64), features.astype(np.float64), iters, rank)
    assert picked == [texts[pick] for pick in picks]
    assert reconstruction.dtype == np.float32
    assert relative_error(torch.from_numpy(reconstruction), torch.from_numpy(rebuilt)) <= GOLDEN


def test_a_rank_beyond_the_outputs_own_is_lowered() -> None:
    """The published function keeps directions of rounding then, and its picks follow them."""
    data, features, texts = drawn(dims=6)
    picks, rebuilt = by_definition(data.astype(np.float64), features.astype(np.float64), 5, 6)
    for rank in (6, 7, 20, 80, None):
        reconstruction, picked = replace_with_iterative_removal(data, features, texts, 5, rank, "cpu")
        assert picked == [texts[pick] for pick in picks]
        assert relative_error(torch.from_numpy(reconstruction), torch.from_numpy(rebuilt)) <= GOLDEN
    reconstruction, picked = replace_with_iterative_removal(data, features, texts, 30, 80, "cpu")
    assert len(picked) == 6  # nothing but rounding is left
    assert relative_error(torch.from_numpy(reconstruction), torch.from_numpy(data)) <= GOLDEN


def test_arrays_and_tensors() -> None:
    data, features, texts = drawn()
    expected, picked = replace_with_iterative_removal(data, features, texts, 6, 20, "cpu")
    for outputs, directions in (
        (torch.from_numpy(data), torch.from_numpy(features)),
        (data, torch.from_numpy(features)),
        (torch.from_numpy(data).requires_grad_(), features.astype(np.float64)),
        (np.asfortranarray(data), features[::-1][::-1]),
    ):
        own, names = replace_with_iterative_removal(outputs, directions, tuple(texts), 6, 20, torch.device("cpu"))
        assert isinstance(own, np.ndarray)
        assert names == picked
        np.testing.assert_allclose(own, expected, atol=GOLDEN)  # torch rounds by the layout in memory
    half, names = replace_with_iterative_removal(data.astype(np.float16), features, texts, 6, 20, "cpu")
    assert half.dtype == np.float32
    assert names == picked


def test_mapped_arrays_stay_as_they_are(tmp_path: Path) -> None:
    data, features, texts = drawn()
    np.save(tmp_path / "data.npy", data)
    mapped = np.load(tmp_path / "data.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reconstruction, _ = replace_with_iterative_removal(mapped, features, texts, 24, 24, "cpu")
    reconstruction += 1  # is the caller's own
    np.testing.assert_array_equal(np.load(tmp_path / "data.npy"), data)


def test_outputs_that_do_not_vary_have_no_texts() -> None:
    data, features, texts = drawn()
    data[:] = data[:1]
    reconstruction, picked = replace_with_iterative_removal(data, features, texts, 6, 20, "cpu")
    assert picked == []
    np.testing.assert_allclose(reconstruction, data, atol=GOLDEN)


def test_the_pursuit_of_another_implementation() -> None:
    path = GOLDEN_FOLDER / "textspan.npz"
    if not path.is_file():
        pytest.skip("no arrays of another implementation beside this checkout")
    with np.load(path) as file:
        saved = {name: file[name] for name in file.files}
    texts = [str(number) for number in range(len(saved["text_features"]))]
    reconstruction, picked = replace_with_iterative_removal(
        saved["head_outputs"], saved["text_features"], texts, len(saved["picks"]), int(saved["rank"]), "cpu"
    )
    assert picked == [str(pick) for pick in saved["picks"]]
    # Every row of that file is the last image's: its program added to an array whose rows share their memory.
    expected = torch.from_numpy(saved["reconstruction"])[-1]
    assert relative_error(torch.from_numpy(reconstruction)[-1], expected) <= GOLDEN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": ["one"]}, "1 texts for 50 text_features: give one per row"),
        ({"iters": 0}, "size is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"data": [[1.0]]}, "data is a list: give an array or a tensor"),
        ({"data": np.array([["a"]])}, "data holds <U1: give numbers"),
        ({"data": np.zeros((0, 24), np.float32)}, "has no images"),
        ({"data": np.zeros((4, 23), np.float32)}, r"text_features has shape \[50, 24\], expected \[texts, 23\]"),
        ({"data": np.full((4, 24), np.nan, np.float32)}, "not finite, first in row 0"),
        ({"device": "gpu"}, "device is 'gpu'"),
    ],
)
def test_arguments_of_iterative_removal_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    data, features, texts = drawn()
    given = {"data": data, "text_features": features, "texts": texts, "iters": 3, "rank": 20, "device": "cpu"}
    with pytest.raises(InputError, match=message):
        replace_with_iterative_removal(**{**given, **change})
