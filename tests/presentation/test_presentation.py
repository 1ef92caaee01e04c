"""Contributions as labelled arrays, tables, pictures and HTML: names, sums, and clear refusals."""

import base64
import io
import re
import sys
from itertools import product

import numpy as np
import pandas
import pytest
import torch
import xarray
from builders import directions, pixels, vision_tower
from measures import error
from PIL import Image
from tolerances import FLOAT64, SUM_BFLOAT16

from clipfast import Contributions, InputError, MissingExtra, Model, Moments, wrap
from clipfast.dataset.arrays import ARRAYS
from clipfast.presentation import drawing
from clipfast.presentation.effects import in_order, shares
from clipfast.report.palette import overlay

TEXTS = directions(3, 20, dtype=torch.float64)
LABELS = ["a <cat>", "a dog", "a dog"]
OPTIONS = {"texts": TEXTS, "labels": LABELS, "attention": True, "tokens": True, "class_token": True}


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(vision_tower(dtype=torch.float64))


@pytest.fixture(scope="module")
def images(model: Model) -> torch.Tensor:
    return pixels(model.module, 4, dtype=torch.float64)


@pytest.fixture(scope="module")
def full(model: Model, images: torch.Tensor) -> Contributions:
    return model.decompose(images, maps="per_head", **OPTIONS)


def pooled() -> Contributions:
    """The heads of a pooling alone."""
    model = wrap(vision_tower(dtype=torch.float64, pool_type="avg", final_ln_after_pool=True))
    return model.decompose(pixels(model.module, 2, dtype=torch.float64), depth="pool", texts=TEXTS)


# ----------------------------------------------------------------------------------------------------------- effects


@pytest.mark.parametrize("layers", [None, [1], []])
@pytest.mark.parametrize("centring", ["uniform", "termwise"])
def test_shares_are_products_with_the_unit_embedding(
    model: Model, images: torch.Tensor, layers: list[int] | None, centring: str
) -> None:
    contributions = model.decompose(images, layers=layers, centring=centring)
    terms, names = contributions.stack()
    unit = contributions.embedding / contributions.norm[:, None]
    values = in_order(contributions, shares(contributions))
    assert values.shape == (4, len(names), 1)
    assert error(values[..., 0], torch.einsum("bkd,bd->bk", terms, unit)) <= FLOAT64
    assert error(values.sum(1), torch.ones(4, 1, dtype=torch.float64)) <= FLOAT64


# ------------------------------------------------------------------------------------------------------------ xarray


def test_arrays_have_the_names_of_a_collection(full: Contributions) -> None:
    data = full.to_xarray(ids=["a", "b", "c", "d"], heads=True)
    for name, kind in ARRAYS.items():
        assert data[name].dims == kind.dims
        assert torch.equal(torch.from_numpy(data[name].values), kind.values(full))
        assert data[name].attrs == {"long_name": kind.meaning, "units": "1"}
        for axis, labels in kind.labels(full).items():
            assert data[axis].values.tolist() == labels
    for name in ("mean", "std", "norm"):
        assert (data[name].values == getattr(full, name).numpy()).all()
    assert data.id.values.tolist() == ["a", "b", "c", "d"]
    assert data.attrs == {"centring": "uniform", "depth": "all", "fingerprint": full.fingerprint}


def test_parts_are_selected_by_label(full: Contributions) -> None:
    data = full.to_xarray(heads=True)
    assert set(data) == {*ARRAYS, "heads", "attention", "maps", "patch_maps", "values"}
    assert "id" not in data.coords
    assert error(torch.from_numpy(data.heads.sel(layer=2, head=1).values), full.head(2, 1)) <= FLOAT64
    assert (data.maps.sel(text="a <cat>").values == full.maps[..., 0].numpy()).all()
    assert (data.patch_maps.isel(row=1, column=2).values == full.patch_maps()[..., 1, 2, :].numpy()).all()
    at = (data.patch_row == 1) & (data.patch_column == 2)
    assert (data.maps.isel(token=at.values).squeeze("token").values == full.patch_maps()[..., 1, 2, :].numpy()).all()
    assert data.attention.dims == ("image", "layer", "head", "token")
    assert np.allclose(data.attention.sum("token"), 1)
    assert (data.terms.sel(term="L1.mlp").values == full.mlps[:, 1].numpy()).all()


def test_values_times_attention_are_codes(full: Contributions) -> None:
    data = full.to_xarray()
    codes = (data["values"] * data.attention).sum("token") / (data["std"] * data.norm)
    assert abs(codes.transpose(*data.codes.dims) - data.codes).max() <= FLOAT64


def test_only_what_was_kept_becomes_an_array(model: Model, images: torch.Tensor) -> None:
    plain = model.decompose(images).to_xarray()
    assert set(plain) == {"codes", "terms", "embeddings"}
    assert not {"text", "patch_row"} & set(plain.coords)
    summed = model.decompose(images, texts=TEXTS, layers=[1]).to_xarray()
    assert summed.maps.dims == ("image", "token", "text")
    assert summed.patch_maps.dims == ("image", "row", "column", "text")
    assert summed.layer.values.tolist() == [1]
    assert "text" not in summed.coords
    nothing = model.decompose(images, layers=[], tokens=True).to_xarray()
    assert nothing["values"].shape == (4, 0, 10, 2, 16)


def test_bfloat16_becomes_float32(images: torch.Tensor) -> None:
    model = wrap(vision_tower(dtype=torch.bfloat16))
    contributions = model.decompose(images.bfloat16(), tokens=True)
    data = contributions.to_xarray()
    assert data.embeddings.dtype == data["values"].dtype == np.float32
    assert (data.embeddings.values == contributions.embedding.float().numpy()).all()
    assert contributions.to_pandas().share.sum() == pytest.approx(4, abs=4 * SUM_BFLOAT16)
    assert contributions.plot().size[0] > 100


def test_a_data_set_is_concatenated(full: Contributions) -> None:
    whole = xarray.concat([full[:3].to_xarray(), full[3:].to_xarray()], "image", data_vars="all")
    assert whole.equals(full.to_xarray())


# ------------------------------------------------------------------------------------------------------------ pandas


def test_a_row_per_image_and_term(full: Contributions) -> None:
    frame = full.to_pandas(ids=["a", "b", "c", "d"])
    assert frame.columns.tolist() == ["image", "id", "term", "kind", "layer", "head", "norm", "share"]
    assert frame.term.tolist() == list(full.terms) * 4
    assert frame.id.tolist() == [name for name in "abcd" for _ in full.terms]
    terms, _ = full.stack()
    assert error(torch.tensor(frame.norm.to_numpy()).view(4, -1), terms.norm(dim=-1)) <= FLOAT64
    assert np.allclose(frame.groupby("image").share.sum(), 1, atol=FLOAT64)
    heads = frame[frame.kind == "head"]
    assert [(layer, head) for layer, head in zip(heads["layer"][:6], heads["head"][:6], strict=True)] == list(
        product(range(3), range(2))
    )
    assert frame[frame.kind == "start"][["layer", "head"]].isna().all(axis=None)
    mlps = frame[frame.kind == "mlp"]
    assert mlps["layer"].tolist() == [0, 1, 2] * 4
    assert mlps["head"].isna().all()


def test_scores_of_texts_sum_to_similarities(full: Contributions) -> None:
    frame = full.to_pandas(TEXTS, ["a", "b", "c"])
    assert len(frame) == 4 * len(full.terms) * 3
    sums = frame.groupby(["image", "text"]).score.sum().unstack()
    similarities = (full.embedding / full.norm[:, None]) @ TEXTS.T
    assert error(torch.tensor(sums.to_numpy()), similarities) <= FLOAT64
    one = frame[(frame.image == 2) & (frame.term == "L1.attn.H1") & (frame.text == "b")]
    assert one.score.item() == pytest.approx(full.scores(TEXTS).heads[2, 1, 1, 1].item(), abs=FLOAT64)
    assert full.to_pandas(TEXTS).text.unique().tolist() == [0, 1, 2]
    assert np.allclose(full.to_pandas(TEXTS)[::3][["norm", "share"]], full.to_pandas()[["norm", "share"]])


def test_the_rest_and_many_images_have_rows(model: Model, images: torch.Tensor) -> None:
    many = Contributions.cat([model.decompose(images, layers=[1])] * 9)
    frame = many.to_pandas()
    assert frame[frame.image == 35].term.tolist() == list(many.terms)
    assert frame.kind.iloc[-1] == "rest"
    rest = frame[frame.kind == "rest"].norm.to_numpy()
    assert error(torch.tensor(rest), many.rest.norm(dim=1)) <= FLOAT64
    empty = many[:0].to_pandas(TEXTS)
    assert len(empty) == 0
    assert empty.columns.tolist()[-2:] == ["text", "score"]


# ----------------------------------------------------------------------------------------------------------- pictures


def cell_colour(value: float, scale: float) -> list[int]:
    return overlay(np.full((1, 1), drawing._EMPTY), np.array([[value / scale]]))[0, 0].tolist()


def test_cells_have_the_colours_of_their_effects(full: Contributions) -> None:
    sheet = np.asarray(full[1].plot(TEXTS[:1], text="a cat", image=0))
    scores = full[1].scores(TEXTS[:1])
    effects = drawing.Effects.of(scores)
    cell = 52  # two heads: the largest cells
    left, top = drawing.MARGIN + 62, drawing.MARGIN + drawing._HEADER
    for layer in range(3):
        for head in range(2):
            corner = sheet[top + layer * 26 + 1, left + head * cell + 1]
            assert corner.tolist() == cell_colour(float(scores.heads[0, layer, head, 0]), effects.limit)
        corner = sheet[top + layer * 26 + 1, left + 2 * cell + drawing.GAP + 1]
        assert corner.tolist() == cell_colour(float(scores.mlps[0, layer, 0]), effects.limit)
    assert (np.asarray(full.plot(TEXTS[:1], text="a cat", image=1)) == sheet).all()
    assert (np.asarray(full.plot(TEXTS[:1], text="a cat", image=-3)) == sheet).all()


def test_the_mean_over_images(full: Contributions) -> None:
    effects = drawing.Effects.of(full.scores(TEXTS[:1]))
    assert np.allclose(effects.heads, full.scores(TEXTS[:1]).heads[..., 0].mean(0), atol=FLOAT64)
    sheet = full.plot(TEXTS[:1], image=None)
    assert sheet.height < full.plot(TEXTS[:1]).height  # without maps
    assert sheet.height == full.plot(image=None).height


def test_maps_are_drawn_over_the_picture(model: Model, images: torch.Tensor, full: Contributions) -> None:
    """A picture of one grey: where a map is zero the grey shows, and summed maps are drawn as maps per head are."""
    picture = Image.new("RGB", (300, 300), (100, 100, 100))
    per_head = full.plot(picture=picture)
    summed = model.decompose(images, **OPTIONS).plot(picture=picture)
    difference = np.abs(np.asarray(per_head).astype(int) - np.asarray(summed))
    assert difference.max() <= 1  # sums round in another order
    contributions = model.decompose(images[:1], texts=TEXTS, labels=LABELS)
    contributions.maps.zero_()
    sheet = np.asarray(contributions.plot(picture=picture))
    ground = round(60 + 100 * 170 / 255)
    grounds = (sheet == ground).all(-1).sum()
    assert grounds == 3 * drawing.TILE**2
    assert ((sheet == 100).all(-1)).sum() == drawing.TILE**2


@pytest.mark.parametrize("texts", [1, 2, 40])
def test_any_number_of_texts_has_a_layout(model: Model, images: torch.Tensor, texts: int) -> None:
    names = [f"text {number} ü 中 {'long ' * (number % 6)}" for number in range(texts)]
    contributions = model.decompose(images, texts=directions(texts, 20, dtype=torch.float64), labels=names, layers=[-1])
    first, second = contributions.plot(), contributions.plot()
    assert first.tobytes() == second.tobytes()
    assert contributions[0].plot(picture=Image.new("L", (30, 20))).width == contributions[0].plot().width or texts < 4


def test_a_wide_tower_and_a_pooling_have_pictures() -> None:
    wide = wrap(vision_tower(width=128, heads=16, layers=1))
    assert wide.decompose(pixels(wide.module)).plot().width <= 1200
    contributions = pooled()
    assert contributions.plot().height > 100
    assert contributions.to_pandas().kind.unique().tolist() == ["start", "head", "mlp"]
    assert "<img" in contributions._repr_html_()
    assert contributions.to_xarray().attrs["depth"] == "pool"


# --------------------------------------------------------------------------------------------------------------- HTML


def test_a_notebook_shows_a_small_picture(full: Contributions) -> None:
    page = full._repr_html_()
    (data,) = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (40, 30)  # two heads, a gap and the MLPs; three layers
        pixels_of = np.asarray(picture.convert("RGB"))
    effects = drawing.Effects.of(shares(full))
    for layer, head in product(range(3), range(2)):
        expected = cell_colour(effects.heads[layer, head], effects.limit)
        assert pixels_of[layer * 10 + 5, head * 10 + 5].tolist() == expected
    assert pixels_of[5, 25].tolist() == [255] * 3
    assert len(page) < 5000


def test_a_notebook_shows_contributions_without_a_picture(model: Model, images: torch.Tensor) -> None:
    spoilt = images.clone()
    spoilt[0] = torch.nan
    whole = model.decompose(images)
    for contributions in (whole[:0], model.decompose(images, layers=[]), model.decompose(spoilt), whole.to("meta")):
        page = contributions._repr_html_()
        assert "<table>" in page
        assert "<img" not in page
    many = Contributions.cat([whole] * 9)._repr_html_()
    assert "mean of the first 32 images" in many


def test_moments_and_textspans_say_what_they_are(model: Model, full: Contributions) -> None:
    assert repr(Moments()) == "Moments(images 0)"
    moments = Moments(model)
    assert repr(moments) == "Moments(images 0, heads per layer 2)"
    moments.update(full)
    assert repr(moments) == ("Moments(images 4, heads per layer 2, layers 0, 1, 2, head_dim 16, class token kept)")
    page = moments._repr_html_()
    assert page.count("<tr>") == 5
    assert "<tr><th>images</th><td>4</td></tr>" in page
    span = moments.textspan(TEXTS, 2, [(2, 1)])[2, 1]
    assert repr(span).startswith(
        f"TextSpan(picks {list(span.picks)}, explained {float(span.explained.sum()):.1%}, rank "
    )
    page = span._repr_html_()
    assert page.count("<tr>") == 1 + len(span.picks)
    first, second = span.explained.tolist()
    assert f"<td>2</td><td>{span.picks[1]}</td><td>{second:.1%}</td><td>{first + second:.1%}</td>" in page


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("package", ["xarray", "pandas"])
def test_a_missing_package_is_one_line(full: Contributions, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    line = rf"^Contributions\.to_{package} needs the package {package}: pip install 'clipfast\[data\]'$"
    with pytest.raises(MissingExtra, match=line):
        getattr(full, f"to_{package}")()


def test_what_does_not_fit_is_one_line(full: Contributions) -> None:
    for call, message in (
        (lambda: full.to_pandas(texts=["a"]), r"texts name text_features: give text_features, too"),
        (lambda: full.to_pandas(TEXTS, ["a"]), r"1 texts for 3 text_features: give one per row"),
        (lambda: full.to_pandas(["a"]), r"text_features is a list: give features \[texts, embed_dim\], such as "),
        (lambda: full.to_pandas(TEXTS[:, :3]), r"text_features has shape \[3, 3\], expected \[texts, 20\]"),
        (lambda: full.to_pandas(ids=["a"]), r"1 ids for 4 images: give one per image"),
        (lambda: full.to_xarray(ids="abcd"), r"ids is 'abcd': give a list of names, one per image"),
        (lambda: full.plot(TEXTS), r"text_features has 3 rows: plot shows one text, \[1, embed_dim\]"),
        (lambda: full.plot(text="a"), r"text names text_features: give text_features, too"),
        (lambda: full.plot(image=4), r"image 4 does not exist: there are 4"),
        (lambda: full.plot(image=None, picture=Image.new("L", (9, 9))), r"there are no maps to draw on the picture: "),
        (lambda: full[:0].plot(), r"there are no images to plot"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            call()


def test_frames_are_frames(full: Contributions) -> None:
    assert isinstance(full.to_pandas(), pandas.DataFrame)
    assert isinstance(full.to_xarray(), xarray.Dataset)
    assert isinstance(full.plot(), Image.Image)
