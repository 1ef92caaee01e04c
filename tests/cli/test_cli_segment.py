"""``clipfast segment``: scores against slow ones from images one at a time, masks in every place, and pictures."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from masked import (
    BACKGROUND,
    EACH,
    IGNORED,
    KINDS,
    SIZE,
    VALUES,
    add,
    asked,
    features,
    hot,
    images_of,
    moved,
    patches,
    precision,
    scored,
    scores_of,
    share,
    squashed,
    write_data,
    written,
)
from PIL import Image
from tolerances import FLOAT32
from torch import Tensor

import clipfast as package
from clipfast.analyses.relevance import METHODS
from clipfast.commands.collect import command as collect
from clipfast.commands.collect.options import DataOptions
from clipfast.commands.options import ClassOptions
from clipfast.commands.segment.command import Options, run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(model_folder: Path) -> package.Model:
    return package.load(str(model_folder), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- one class per image


@pytest.mark.parametrize(
    ("given", "against", "threshold"),
    [
        ({}, "classes", None),
        ({"background_texts": "background.txt", "mask_values": "values.csv"}, "background", None),
        ({"contrast": False, "threshold": "0.4", "protocol": "published", "target": "predicted"}, "nothing", 0.4),
    ],
    ids=["classes", "background", "as they are"],
)
@pytest.mark.slow
def test_every_method_has_the_scores_of_its_definition(
    data: Path,
    model: package.Model,
    model_folder: Path,
    tmp_path: Path,
    given: dict[str, Any],
    against: str,
    threshold: float | None,
) -> None:
    """Image by image: the class less a mean, one direction for all methods, masks moved by open_clip's own steps."""
    files = {name: data / value for name, value in given.items() if name in ("background_texts", "mask_values")}
    paths = {name: str(path) if name == "background_texts" else path for name, path in files.items()}
    result = scored(data, model_folder, tmp_path, **{**given, **paths})
    texts = features(model)
    less = {
        "classes": texts.mean(0),
        "background": model.encode_text(BACKGROUND).mean(0),
        "nothing": torch.zeros_like(texts[0]),
    }[against]
    directions = model.module.logit_scale.exp().detach() * (texts - less)  # type: ignore[union-attr,operator]
    truths, kept = [], []
    heats: dict[str, list[Tensor]] = {method: [] for method in ("ours", *METHODS)}
    for at, path, drawn in images_of(data):
        values = (squashed if given.get("protocol") else moved)(drawn)
        if given.get("target"):
            at = int((model.encode_image([path]) @ texts.T).argmax())
        wanted = VALUES[KINDS[at]] if "mask_values" in given else (1, 2, 3, 4)
        truths.append(torch.isin(values, torch.tensor(wanted)))
        kept.append(values != IGNORED)
        heats["ours"].append(hot(patches(model, path, directions[at : at + 1])[..., 0]))
        for method, function in METHODS.items():
            heats[method].append(hot(function(model.tower, model.prepare([path]), directions[at])[0]))
    assert [row["method"] for row in result["methods"]] == list(heats)
    for row in result["methods"]:
        each = heats[row["method"]]
        cuts = [heat > (heat.mean() if threshold is None else threshold) for heat in each]
        expected = scores_of(truths, kept, cuts)
        ranges = [precision(heat[k], t[k]) for heat, t, k in zip(each, truths, kept, strict=True) if t[k].any()]
        worst, best = (sum(ends) / len(ends) for ends in zip(*ranges, strict=True))
        assert worst - FLOAT32 <= row["mAP"] <= best + FLOAT32, row["method"]
        assert best - worst < 0.01
        assert row["images"] == len(truths)
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=FLOAT32), row["method"]
    hits = [int((model.encode_image([path]) @ texts.T).argmax()) == at for at, path, _ in images_of(data)]
    assert result["baseline"]["accuracy"] == pytest.approx(sum(hits) / len(hits), abs=FLOAT32)
    assert result["panels"] == [f"panels/{kind}__{number}.png" for kind in KINDS for number in range(EACH)]
    assert all(Image.open(tmp_path / panel).format == "PNG" for panel in result["panels"])


def test_masks_in_a_shard_and_images_of_a_collection(data: Path, model_folder: Path, tmp_path: Path) -> None:
    """The same images and masks by other ways have the same scores."""
    expected = scored(data, model_folder, tmp_path / "files", methods="ours,legrad", panels=1)["methods"]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for at, path, drawn in images_of(data):
            key = f"{KINDS[at]}-{path.stem}"
            for ending, content in (("png", path), ("mask.png", drawn), ("cls", KINDS[at])):
                add(tar, f"{key}.{ending}", content)
    collecting = asked(tmp_path / "shard.tar", model_folder, labels="shard")
    beside = scored(
        data, model_folder, tmp_path / "s", collecting=collecting, masks="shard", methods="ours,legrad", panels=0
    )
    assert beside["methods"] == expected
    assert not (tmp_path / "s" / "panels").exists()
    for at, path, drawn in images_of(data):  # masks beside the shard, under its name or under the keys alone
        folder = tmp_path / "keys" / "shard" if at else tmp_path / "keys"
        folder.mkdir(parents=True, exist_ok=True)
        drawn.save(folder / f"{KINDS[at]}-{path.stem}.png")
    keys = scored(
        data, model_folder, tmp_path / "k", collecting=collecting, masks=str(tmp_path / "keys"), methods="ours,legrad"
    )
    assert keys["methods"] == expected
    collected = DataOptions(
        [str(data / "images")], model=str(model_folder), dtype="fp64", batch_size=4, labels="folder"
    )
    assert collect.run(collect.Options(collected, out=tmp_path / "c")) == 0
    collecting = asked(tmp_path / "c", None, labels=None)
    again = scored(data, model_folder, tmp_path / "o", collecting=collecting, methods="ours,legrad")
    assert again["methods"] == expected
    assert again["model"] == str(model_folder)


# --------------------------------------------------------------------------------------------------- a label per pixel


@pytest.mark.parametrize("background", [None, 0.3])
@pytest.mark.parametrize("others", [False, True])
def test_labels_of_pixels(
    data: Path, model: package.Model, model_folder: Path, tmp_path: Path, background: float | None, others: bool
) -> None:
    """The largest of the maps wins; background is what a background text wins, or what is too cold."""
    given: dict[str, Any] = {"background": background, "methods": "ours,chefer", "mask_values": data / "values.csv"}
    if others:
        given["background_texts"] = str(data / "background.txt")
    collecting = asked(data / "images", model_folder, labels=None)
    result = scored(data, model_folder, tmp_path, collecting=collecting, multiclass=True, **given)
    texts = torch.cat([features(model), *([model.encode_text(BACKGROUND)] if others else [])])
    directions = model.module.logit_scale.exp().detach() * (texts - texts.mean(0))  # type: ignore[union-attr,operator]
    with_background = others or background is not None
    for row in result["methods"]:
        labels, truths = [], []
        for _, path, drawn in images_of(data):
            if row["method"] == "ours":
                maps = patches(model, path, directions)
            else:
                every = [METHODS["chefer"](model.tower, model.prepare([path]), each)[0] for each in directions]
                maps = torch.stack(every, -1)
            big = F.interpolate(maps.permute(2, 0, 1)[None], size=(SIZE, SIZE), mode="bilinear")[0]
            label = big.argmax(0).clamp_max(3)
            if background is not None:
                lead = (big.amax(0) - big.mean(0)).clamp_min(0)
                label[(lead - lead.min()) / (lead.max() - lead.min()) <= background] = 3
            values = moved(drawn)
            truth = torch.full_like(values, 3)
            for at, kind in enumerate(KINDS):
                truth[torch.isin(values, torch.tensor(VALUES[kind]))] = at
            keep = (values != IGNORED) & (with_background | (truth != 3))
            labels.append(label[keep])
            truths.append(truth[keep])
        label, truth = torch.cat(labels), torch.cat(truths)
        names = [*KINDS, *(["background"] if with_background else [])]
        iou = {
            name: share((label == at) & (truth == at), (label == at) | (truth == at)) for at, name in enumerate(names)
        }
        assert row["IoU"] == pytest.approx(iou, abs=FLOAT32)
        assert row["mIoU"] == pytest.approx(sum(iou.values()) / len(iou), abs=FLOAT32)
        assert row["accuracy"] == pytest.approx(share(label == truth, torch.ones_like(label)), abs=FLOAT32)
    assert result["baseline"] is None
    assert len(result["panels"]) == len(KINDS) * EACH


# ------------------------------------------------------------------------------------------------------- without masks


def test_pictures_of_texts(data: Path, model: package.Model, model_folder: Path, tmp_path: Path) -> None:
    image = data / "images" / "cat" / "0.png"
    texts = ["a cat", "The Sea!"]
    collecting = asked(image, model_folder, labels=None)
    assert run(Options(collecting, out=tmp_path, texts=texts, methods="ours,gradcam")) == 0
    (entry,) = written(tmp_path)["pictures"]
    names = ["0/000-a-cat-ours", "0/000-a-cat-gradcam", "0/001-the-sea-ours", "0/001-the-sea-gradcam"]
    assert [each["heat"] for each in entry["maps"]] == [f"heat/{name}.png" for name in names]
    feature = model.encode_text(texts)
    maps = patches(model, image, feature - feature.mean(0))
    for at, each in enumerate(entry["maps"][::2]):
        heat = hot(maps[..., at])
        cut = np.asarray(Image.open(tmp_path / each["mask"]))
        assert set(np.unique(cut)) == {0, 255}
        assert torch.equal(torch.from_numpy(cut.copy()) == 255, heat > heat.mean())
        assert each["share"] == pytest.approx(float((heat > heat.mean()).double().mean()), abs=FLOAT32)
        assert Image.open(tmp_path / each["heat"]).size == (SIZE, SIZE)


def test_pictures_of_an_images_own_class(data: Path, model_folder: Path, tmp_path: Path) -> None:
    assert (
        run(Options(asked(data / "images", model_folder), out=tmp_path, zeroshot=ClassOptions(prompt=["one {}."]))) == 0
    )
    result = written(tmp_path)
    assert [[each["text"] for each in entry["maps"]] for entry in result["pictures"]] == [
        [kind] for kind in KINDS for _ in range(EACH)
    ]
    assert result["texts"]["owl"] == ["one owl."]
    assert result["baseline"]["images"] == len(KINDS) * EACH
