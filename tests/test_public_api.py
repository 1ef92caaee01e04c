"""What a caller of the Python interface relies on: names of terms, slices, devices, labels, and clear refusals."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import clip_model, directions, pixels, vision_tower
from measures import error
from PIL import Image
from tolerances import FLOAT32, FLOAT64, UNIT_NORM

from clipfast import Ablated, Contributions, InputError, Model, Moments, NotKept, wrap
from clipfast.analyses import ablation
from clipfast.analyses.ablation import curves, evaluate
from clipfast.analyses.reconstruction import reconstruction_curve
from clipfast.analyses.variance import TermVariances
from clipfast.indices import resolve_head, resolve_heads, resolve_layer, resolve_layers
from clipfast.kernels import ops

TEXTS = directions(3, 20, dtype=torch.float64)


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(vision_tower(dtype=torch.float64))


@pytest.fixture(scope="module")
def images(model: Model) -> torch.Tensor:
    return pixels(model.module, 5, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ named terms


def test_terms_are_named_in_the_order_of_the_sum(model: Model, images: torch.Tensor) -> None:
    contributions = model.decompose(images)
    assert contributions.terms == (
        "start",
        *("L0.attn.H0", "L0.attn.H1", "L0.mlp"),
        *("L1.attn.H0", "L1.attn.H1", "L1.mlp"),
        *("L2.attn.H0", "L2.attn.H1", "L2.mlp"),
    )
    stacked, labels = contributions.stack()
    assert labels == contributions.terms
    assert stacked.shape == (5, 10, 20)
    assert torch.equal(stacked[:, labels.index("start")], contributions.start)
    assert torch.equal(stacked[:, labels.index("L1.mlp")], contributions.mlps[:, 1])
    assert torch.equal(stacked[:, labels.index("L2.attn.H1")], contributions.heads()[:, 2, 1])
    assert error(stacked.sum(1), contributions.embedding / contributions.norm[:, None]) <= FLOAT64


@pytest.mark.parametrize("layers", [[1], [0, 2], []])
def test_layers_that_were_left_out_are_the_last_term(model: Model, images: torch.Tensor, layers: list[int]) -> None:
    contributions = model.decompose(images, layers=layers)
    stacked, labels = contributions.stack()
    assert labels[-1] == "rest"
    assert torch.equal(stacked[:, -1], contributions.rest)
    assert [name for name in labels if "attn" in name] == [
        f"L{layer}.attn.H{head}" for layer in layers for head in (0, 1)
    ]
    assert [name for name in labels if "mlp" in name] == ["L0.mlp", "L1.mlp", "L2.mlp"]
    assert error(stacked.sum(1), contributions.embedding / contributions.norm[:, None]) <= FLOAT64


def test_check_is_the_older_name_of_max_error(model: Model, images: torch.Tensor) -> None:
    contributions = model.decompose(images)
    assert contributions.check() == contributions.max_error() <= FLOAT64


# ----------------------------------------------------------------------------------------------- images of a batch


def test_slices_hold_the_images_they_name(model: Model, images: torch.Tensor) -> None:
    whole = model.decompose(images, texts=TEXTS, attention=True, tokens=True, class_token=True)
    for images_of, rows in (
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2, 4]),
        (slice(None, None, -1), [4, 3, 2, 1, 0]),
        (slice(9, 12), []),
        (3, [3]),
        (-1, [4]),
    ):
        part = whole[images_of]
        assert len(part) == len(rows)
        assert torch.equal(part.codes, whole.codes[rows])
        assert torch.equal(part.maps, whole.maps[rows])
        assert error(part.heads(), whole.heads()[rows]) <= FLOAT64
        assert error(part.tokens(1), whole.tokens(1)[rows]) <= FLOAT64
        assert part.layers == whole.layers
        assert part.basis is whole.basis
    for wrong in (5, -6):
        with pytest.raises(InputError, match=f"image {wrong} does not exist: there are 5"):
            whole[wrong]


def test_iteration_gives_each_image(model: Model, images: torch.Tensor) -> None:
    whole = model.decompose(images)
    parts = list(whole)
    assert [len(part) for part in parts] == [1] * 5
    assert torch.equal(Contributions.cat(parts).embedding, whole.embedding)


def test_to_another_dtype_converts_the_basis_too(images: torch.Tensor) -> None:
    model = wrap(vision_tower())
    single = model.decompose(images.float(), texts=TEXTS.float(), tokens=True, class_token=True)
    double = single.to(torch.float64)
    assert double.codes.dtype == double.heads().dtype == double.tokens(0).dtype == double.maps.dtype == torch.float64
    assert error(double.heads(), single.heads()) <= FLOAT32
    assert double.max_error() <= FLOAT32
    assert single.codes.dtype == torch.float32
    assert double.basis.same_as(single.basis)
    assert single.to(dtype=torch.float64).basis is double.basis  # converted once
    assert torch.equal(single.cpu().heads(), single.heads())
    assert single.cpu().basis is single.basis
    with pytest.raises(InputError, match=r"dtype is torch.int32: contributions are floating point"):
        single.to(dtype=torch.int32)


def test_to_a_device_moves_everything(model: Model, images: torch.Tensor) -> None:
    """The meta device, which every machine has: no operation may meet a tensor that stayed behind."""
    moved = model.decompose(images, texts=TEXTS, tokens=True, class_token=True).to("meta")
    for tensor in (moved.heads(), moved.class_token(), moved.total(), moved.stack()[0], *moved.scores(TEXTS)):
        assert tensor.device.type == "meta"


def test_a_notebook_shows_a_table(model: Model, images: torch.Tensor) -> None:
    contributions = model.decompose(images, texts=TEXTS, labels=["<b>", "cat & dog", "c"], maps="per_head")
    page = contributions._repr_html_()
    assert page.count("<table>") == page.count("</table>") == 1
    assert "<td><code>codes</code></td><td>5 × 3 × 2 × 16</td><td>images, layers, heads, head_dim</td>" in page
    assert "<td>5 × 3 × 2 × 10 × 3</td><td>images, layers, heads, tokens, texts</td>" in page
    assert "texts: &lt;b&gt;, cat &amp; dog, c" in page
    assert "attention" not in page
    for rows in re.findall("<tr>.*?</tr>", page):
        assert rows.count("<t") == 5  # a row of four cells


def test_is_finite_names_the_images_that_are_not(model: Model, images: torch.Tensor) -> None:
    spoilt = images.clone()
    spoilt[1, 0, 0, 0] = torch.nan
    spoilt[3] = torch.inf
    contributions = model.decompose(spoilt)
    assert contributions.is_finite().tolist() == [True, False, True, False, True]
    contributions.mlps[0, 2, 3] = torch.inf
    contributions.norm[2] = 0
    assert contributions.is_finite().tolist() == [False, False, False, False, True]
    assert contributions[:0].is_finite().tolist() == []
    for add in (Moments(model).update, TermVariances().update):
        with pytest.raises(InputError, match="a contribution is not finite"):
            add(contributions)


def test_nothing_public_has_a_twin(model: Model, images: torch.Tensor) -> None:
    contributions = model.decompose(images, attention=True)
    assert [name for name in dir(contributions) if name.startswith("kept_")] == []
    assert contributions.kept == ("attention",)
    with pytest.raises(NotKept):
        _ = contributions.maps


# ---------------------------------------------------------------------------------------------------------- labels


def test_labels_name_features(model: Model, images: torch.Tensor) -> None:
    assert model.decompose(images, texts=TEXTS).texts is None
    assert model.decompose(images, texts=TEXTS, labels=["a", "b", "c"]).texts == ("a", "b", "c")
    assert model.decompose(images, texts=TEXTS, labels=(name for name in "xyz")).texts == ("x", "y", "z")
    with pytest.raises(InputError, match=r"^2 labels for 3 texts: give one per text$"):
        model.decompose(images, texts=TEXTS, labels=["a", "b"])
    with pytest.raises(InputError, match=r"^labels name texts: give texts, too$"):
        model.decompose(images, labels=["a"])


def test_strings_keep_their_names_whatever_holds_them() -> None:
    model = wrap(clip_model())
    x = pixels(model.module.visual)
    assert model.decompose(x, texts=(word for word in ("a cat", "a dog"))).texts == ("a cat", "a dog")
    assert model.decompose(x, texts="a cat").texts == ("a cat",)
    assert model.decompose(x, texts=["a cat"], labels=["Katze"]).texts == ("Katze",)
    expected = model.encode_text(["a cat", "a dog"])
    assert torch.equal(model.encode_text(word for word in ("a cat", "a dog")), expected)
    with pytest.raises(InputError, match="texts hold a int: give strings"):
        model.decompose(x, texts=[1, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [1.5]}, r"^layer 1\.5 is not an integer$"),
        ({"layers": ["1"]}, r"^layer '1' is not an integer$"),
        ({"layers": 1}, r"^layers is 1: give a list of integers, such as \[-2, -1\]$"),
        ({"layers": [3]}, r"^layer 3 does not exist: choose from 0 to 2, or negative from the end$"),
        ({"texts": torch.zeros(0, 20)}, r"^no texts were given: leave texts out for no maps$"),
        ({"texts": torch.zeros(2, 20, dtype=torch.long)}, r"^texts are torch\.int64: give strings, or features"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(
    model: Model, images: torch.Tensor, options: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.decompose(images, **options)


def test_layers_of_any_integer_type_are_taken(model: Model, images: torch.Tensor) -> None:
    for layers in ([np.int64(1)], torch.tensor([1]), np.array([-2]), range(1, 2)):
        assert model.decompose(images, layers=layers).layers == (1,)


# -------------------------------------------------------------------------------------------------- norms, gradients


def test_both_encoders_normalise_unless_told(images: torch.Tensor) -> None:
    model = wrap(clip_model())
    x = images.float()
    moments = Moments(model)
    moments.update(model.decompose(x))
    for encoder in (model, Ablated(model, "L0", moments)):
        for encode, what in ((encoder.encode_image, x), (encoder.encode_text, ["a cat", "a dog"])):
            unit, plain = encode(what), encode(what, normalize=False)
            assert error(unit.norm(dim=1), torch.ones(len(unit))) <= UNIT_NORM
            assert error(unit, plain / plain.norm(dim=1, keepdim=True)) <= UNIT_NORM
            assert not torch.allclose(plain.norm(dim=1), torch.ones(len(plain)), atol=0.01)


def test_gradients_are_refused_where_they_are_asked_for(model: Model, images: torch.Tensor) -> None:
    x, texts = images.clone().requires_grad_(), TEXTS.clone().requires_grad_()
    contributions = model.decompose(images)
    line = r"^{0} require gradients, and a decomposition has none: call it under torch.no_grad\(\) or pass {0}.detach"
    calls: list[tuple[str, Callable[[], object]]] = [
        ("images", lambda: model.decompose(x)),
        ("images", lambda: model.encode_image(x)),
        ("texts", lambda: model.decompose(images, texts=texts)),
        ("text_features", lambda: contributions.scores(texts)),
    ]
    for name, call in calls:
        with pytest.raises(InputError, match=line.format(name)):
            call()
        with torch.no_grad():
            call()
    assert error(model.decompose(x.detach()).embedding, contributions.embedding) == 0


# --------------------------------------------------------------------------------------------------------- analyses


def test_groups_are_optional(model: Model, images: torch.Tensor) -> None:
    contributions = model.decompose(images, class_token=True)
    moments, labels, groups = Moments(model), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 0, 1, 1, 1])
    moments.update(contributions)
    spans = moments.textspan(TEXTS, 2, [(2, 0)])
    for batch in ((contributions, labels), (contributions, labels, groups)):
        result = [
            evaluate([batch], TEXTS, moments, ["L0"])[ablation.Terms.parse("L0", model)],
            curves([batch], TEXTS, moments).layers[0],
            reconstruction_curve([batch], TEXTS, spans).baseline,
        ]
        assert result[0].accuracy == result[1].accuracy
        for accuracy in result:
            assert accuracy.count == 5
            if len(batch) == 3:
                assert sorted(accuracy.group_accuracies) == [0, 1]
            else:
                with pytest.raises(InputError, match="no groups were given"):
                    _ = accuracy.group_accuracies
    for wrong in (contributions, (contributions,), (labels, contributions)):
        with pytest.raises(InputError, match=r"a batch is \(contributions, labels\) or"):
            evaluate([wrong], TEXTS, moments, ["L0"])


def test_an_interrupted_update_adds_nothing(
    model: Model, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    contributions = model.decompose(images, class_token=True)
    moments, once = Moments(model), Moments(model)
    once.update(contributions)

    def interrupted(*arguments: object, **options: object) -> None:
        ops_moments(*arguments, **options)
        raise KeyboardInterrupt

    ops_moments = ops.moments
    for before in (Moments(model), once):
        moments = Moments()
        moments.merge(before)
        count, means = moments.count, None if not before.count else moments.means()
        with monkeypatch.context() as patch:
            patch.setattr(ops, "moments", interrupted)
            with pytest.raises(KeyboardInterrupt):
                moments.update(contributions)
        assert moments.count == count
        if means is not None:
            assert torch.equal(moments.means(), means)
        moments.update(contributions)
        assert moments.count == count + 5


def test_a_refused_batch_leaves_empty_moments_empty(model: Model, images: torch.Tensor) -> None:
    moments = Moments()
    with pytest.raises(InputError, match="a contribution is not finite"):
        moments.update(model.decompose(images * torch.nan))
    with pytest.raises(InputError, match="these moments are empty"):
        _ = moments.basis


def test_one_unreadable_file_does_not_end_batches(model: Model, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for path in paths:
        Image.new("RGB", (30, 30), (200, 10, 10)).save(path)
    paths[2].write_text("no picture")
    with pytest.raises(Exception, match=r"2\.png"):
        list(model.batches(paths, 2))
    batches = model.batches(paths, 2, on_error="skip")
    sizes, indices = [], []
    for batch in batches:
        sizes.append(len(batch))
        indices += batches.indices
        assert batch.dtype == torch.float64
    assert indices == [0, 1, 3, 4]
    assert sum(sizes) == 4
    assert [(skipped.index, skipped.image) for skipped in batches.skipped] == [(2, paths[2])]
    assert "2.png" in str(batches.skipped[0].error)
    with pytest.raises(InputError, match="on_error is 'ignore'"):
        model.batches(paths, 2, on_error="ignore")


# ---------------------------------------------------------------------------------------------------------- indices


def test_layers_and_heads_are_resolved() -> None:
    assert [resolve_layer(layer, 12) for layer in (0, 11, -1, -12)] == [0, 11, 11, 0]
    assert resolve_layers([-1, 3, 11, 3], 12) == (3, 11)
    assert resolve_heads([(-1, 2), (0, 0)], 12, 4) == [(11, 2), (0, 0)]
    assert resolve_head(np.int32(3), 4) == 3
    assert resolve_layer(-1, 12, kept=[10, 11]) == 11


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resolve_layer(12, 12), "layer 12 does not exist: choose from 0 to 11, or negative from the end"),
        (lambda: resolve_layer(-13, 12), "layer -13 does not exist"),
        (lambda: resolve_layer(3, 12, kept=[4, 5]), r"layer 3 was not kept: the layers here are \[4, 5\]"),
        (lambda: resolve_layer(1.0, 12), r"layer 1\.0 is not an integer"),
        (lambda: resolve_layer(True, 12), "layer True is not an integer"),
        (lambda: resolve_layer(None, 12), "layer None is not an integer"),
        (lambda: resolve_head(-1, 4), "head -1 does not exist: heads are 0 to 3"),
        (lambda: resolve_head(4, 4), "head 4 does not exist"),
        (lambda: resolve_heads([3], 12, 4), r"3 is not a \(layer, head\) pair"),
        (lambda: resolve_heads([(1, 2, 3)], 12, 4), r"\(1, 2, 3\) is not a \(layer, head\) pair"),
    ],
)
def test_what_is_no_layer_or_head_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        call()
