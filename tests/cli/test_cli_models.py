"""Listing models of every package, and describing one."""

import json
from pathlib import Path
from typing import Any

import pytest

from clipfast import InputError
from clipfast.commands.models import command
from clipfast.commands.models.command import run
from clipfast.commands.models.options import Options
from clipfast.errors import UnsupportedTower
from clipfast.towers import catalogue
from clipfast.towers.tower import Tower

PACKAGES = ("open_clip", "openai", "timm", "transformers")
REFUSED = "timm:convnext_large_mlp"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def kept_apart(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_CACHE", str(cache))


def listed(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, dict[str, Any]]:
    assert run(Options(json=True, **options)) == 0
    return {model["name"]: model for model in json.loads(capsys.readouterr().out)}


@pytest.mark.slow
def test_every_package_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    models = listed(capsys, search="16", all=True)
    assert {model["package"] for model in models.values()} == {"open_clip", "openai", "timm"}
    for name, package, pooling in (
        ("ViT-B-16-quickgelu", "open_clip", "cls"),
        ("ViT-B-16-SigLIP", "open_clip", "attention"),
        ("openai:ViT-B/16", "openai", "cls"),
        ("timm:vit_base_patch16_siglip_224", "timm", "attention"),
        ("timm:vit_base_patch16_224", "timm", "cls"),
        ("timm:vit_base_patch16_siglip_gap_224", "timm", "normed_mean"),
    ):
        model = models[name]
        assert (model["package"], model["decomposes"], model["pooling"]) == (package, True, pooling)
        assert model["refusals"] == []
        assert model["image_size"] == [224, 224]
    assert "webli" in models["ViT-B-16-SigLIP"]["tags"]
    refused = listed(capsys, search="convnext_large_mlp")[REFUSED]
    assert (refused["decomposes"], refused["pooling"], refused["image_size"]) == (False, None, None)
    assert "a nonlinear projection" in refused["refusals"][0]


def test_transformers_are_listed_by_class(capsys: pytest.CaptureFixture[str]) -> None:
    models = listed(capsys, package=["transformers"])
    assert {"CLIPModel", "SiglipModel", "Dinov2Model", "DINOv3ViTModel", "IJepaModel"} <= set(models)
    assert {model["package"] for model in models.values()} == {"transformers"}
    assert all(model["decomposes"] for model in models.values())


@pytest.mark.slow
def test_rows_and_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Options("large_", package=["timm"])) == 0
    captured = capsys.readouterr()
    rows = [line.split("\t") for line in captured.out.splitlines()]
    headers = ["# package", "name", "decomposes", "pooling", "why not", "image", "image tower", "pretrained"]
    assert rows[0] == headers
    by_name = {row[1]: dict(zip(headers, row, strict=True)) for row in rows[1:]}
    right, wrong = by_name["timm:vit_large_patch16_224"], by_name[REFUSED]
    assert (right["decomposes"], right["pooling"], right["why not"]) == ("yes", "class token", "-")
    assert right["image tower"] == "width 1024, 16 heads, patch 16, embedding 1000"
    assert (wrong["decomposes"], wrong["pooling"]) == ("no", "-")
    assert "a nonlinear projection" in wrong["why not"]
    assert "models" in captured.err


@pytest.mark.slow
def test_refused_models_are_counted_and_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Options(package=["open_clip"])) == 0
    captured = capsys.readouterr()
    rows = [line.split("\t") for line in captured.out.splitlines()[1:]]
    assert {row[2] for row in rows} == {"yes"}
    assert "ViT-L-14" in {row[1] for row in rows}
    hidden = int(captured.err.partition("; ")[2].split()[0])
    every = listed(capsys, package=["open_clip"], all=True)
    assert len(every) == len(rows) + hidden == len(catalogue.source("open_clip").names())
    assert all(bool(model["refusals"]) != model["decomposes"] for model in every.values())


def test_the_bundled_model_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, search="scenes")["scenes"]["package"] == "clipfast"
    assert "scenes" not in listed(capsys, search="scenes", package=["timm"])


def test_both_searches_must_match(capsys: pytest.CaptureFixture[str]) -> None:
    names = set(listed(capsys, name="vit_tiny", search="augreg", package=["timm"]))
    assert names == set()
    names = set(listed(capsys, name="SIGLIP", search="so400m", package=["timm"]))
    assert names
    assert all("siglip" in name and "so400m" in name for name in names)


# ------------------------------------------------------------------------------------------------------- one model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-16-SigLIP", {"layers": 12, "heads": 12, "depth": "pool", "tokens": 196, "embed_dim": 768}),
        ("openai:ViT-L/14@336px", {"layers": 24, "heads": 16, "tokens": 577, "activation": "quick_gelu"}),
        ("timm:vit_base_patch14_reg4_dinov2", {"layers": 12, "tokens": 1374, "prefix_tokens": 5}),
        ("SiglipModel", {"package": "transformers", "layers": 12, "depth": "pool"}),
    ],
)
def test_a_name_is_described(name: str, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Options(name, json=True)) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["name"] == name
    assert {key: described[key] for key in expected} == expected


def test_a_description_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Options("ViT-B-32")) == 0
    rows = dict(line.split("\t") for line in capsys.readouterr().out.splitlines()[1:])
    assert rows["blocks"] == "12 layers × 12 heads × 64, width 768, gelu"
    assert "openai" in rows["pretrained"].split()
    assert rows["weights"] == "87,849,216 in the image tower, 351 MB in float32"
    assert rows.keys().isdisjoint({"values", "texts"})  # these depend on the weights that are loaded


def test_the_bundled_model_and_folders_are_loaded(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("scenes", str(model_folder)):
        assert run(Options(name, json=True)) == 0
        described = json.loads(capsys.readouterr().out)
        assert (described["name"], described["pretrained"], described["layers"] > 1) == (name, True, True)
        assert described["normalisation"]["mean"][0] == pytest.approx(0.5, abs=1e-5)


def test_a_refused_name_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Options(REFUSED)) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[0] == ["model", f"{REFUSED}, of timm"]
    assert rows[1][0] == "is refused"
    assert "a nonlinear projection" in rows[1][1]
    assert run(Options(REFUSED, json=True)) == 0
    assert "a nonlinear projection" in json.loads(capsys.readouterr().out)["refusals"][0]


def test_a_package_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.catalogue, "find_spec", lambda name: None if name == "transformers" else object())
    with pytest.raises(InputError, match=r"^transformers is not installed"):
        run(Options(package=["transformers"]))


# ------------------------------------------------------------------------------------------------------- the cache


def test_what_was_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache" / "models.json"
    names = {"openai": catalogue.source("openai").names()}
    first = catalogue.Known(file)
    entries = list(first.entries(names, lambda: None))
    first.save(lambda path, text: path.write_text(text))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(catalogue, "entry", fail)
    assert list(catalogue.Known(file).entries(names, lambda: None)) == entries
    for damage in ("", "[]", "{}", '{"state": 1, "entries": {}}', file.read_text().replace('"kind"', '"other"')):
        file.write_text(damage)
        with pytest.raises(AssertionError, match="built again"):
            list(catalogue.Known(file).entries(names, lambda: None))


def test_other_versions_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = catalogue._state()
    assert before == catalogue._state()
    monkeypatch.setattr(catalogue.metadata, "version", lambda name: "0")
    assert catalogue._state() != before


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    known = catalogue.Known(tmp_path / "file" / "models.json")
    assert len(list(known.entries({"openai": ["openai:ViT-B/32"]}, lambda: None))) == 1
    known.save(lambda path, text: path.write_text(text))


def same(package: str, name: str) -> None:
    """A model that was built quickly is read as the whole model is."""
    (_, quick), (_, whole) = (catalogue.read(package, name, quick=quick) for quick in (True, False))
    if isinstance(whole, UnsupportedTower):
        assert isinstance(quick, UnsupportedTower), name
        assert len(quick.reasons) == len(whole.reasons), name
        return
    assert isinstance(quick, Tower), name
    for attribute in ("pooling", "heads", "width", "embed_dim", "image_size", "patch_size", "tokens"):
        assert getattr(quick, attribute) == getattr(whole, attribute), name
    assert quick.special() == whole.special(), name


def test_one_block_stands_for_all_others() -> None:
    for name in catalogue.source("open_clip").names()[::9]:
        same("open_clip", name)


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_one_block_stands_for_all_others_in_every_model(package: str) -> None:
    for name in catalogue.source(package).names():
        same(package, name)
