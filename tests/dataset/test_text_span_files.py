"""Exports for scripts of the paper's package have its names, shapes and numbers, and are read back with checks."""

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from builders import randomise
from made_collections import EVERYTHING, EXACT, Pictures, decomposed, picture, run, tiny_model
from tolerances import GOLDEN, SUM_FLOAT32

from clipfast import Contributions, InputError, Model, NotKept, wrap
from clipfast.compat.clip_text_span import read_folder
from clipfast.dataset import opening, text_span_export
from clipfast.dataset.text_span_export import Classifier, Pool, export_text_span
from clipfast.dataset.text_span_files import Names, completeness, completeness_text

PICTURES = Pictures((9, 12, 10), bad=(1,))
GOOD = [*range(9), *range(9, 21, 3), *range(21, 31)]
NAMES = Names("pets", "tiny")
TEXTS = ["a red star", "a blue circle", "", "naïve – text", "-----"]
HEADS = {(0, 1): (3, 0), (1, 0): (), (1, 1): (4, 2)}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def contributions(model: Model) -> Contributions:
    return decomposed(model, PICTURES)


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text_span") / "collection"
    run(folder, model, PICTURES, EXACT)
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "ROWS_AT_ONCE", 4)


def pool(**changes: Any) -> Pool:
    return Pool("general", TEXTS, torch.eye(len(TEXTS), 20), **{"size": 2, "heads": HEADS, **changes})


def classifier(**changes: Any) -> Classifier:
    return Classifier(**{"classes": ("cat", "dog", "fish"), "weights": torch.eye(3, 20), **changes})


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "out"
    export_text_span(folder, out, NAMES, classifier=classifier(), pools=[pool()])
    return out


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "out")
    return tmp_path / "out"


# ---------------------------------------------------------------------------------------------------------- numbers


def test_contributions(folder: Path, written: Path, contributions: Contributions) -> None:
    attn, mlp, own = (np.load(written / f"pets_{kind}_tiny.npy") for kind in ("attn", "mlp", "cls_attn"))
    assert attn.dtype == mlp.dtype == own.dtype == np.float32
    np.testing.assert_allclose(attn, contributions.heads().numpy(), atol=GOLDEN, strict=True)
    np.testing.assert_allclose(mlp, contributions.start_and_mlps().numpy(), atol=GOLDEN, strict=True)
    np.testing.assert_allclose(own, contributions.class_token().numpy(), atol=GOLDEN, strict=True)
    normalised = torch.nn.functional.normalize(contributions.embedding, dim=1)
    np.testing.assert_allclose(read_folder(written, "pets", "tiny").embeddings(), normalised.numpy(), atol=SUM_FLOAT32)


def test_all_is_read_back(written: Path, contributions: Contributions) -> None:
    data = read_folder(written, "pets", "tiny")
    assert len(data) == len(GOOD)
    assert isinstance(data.attn, np.memmap)  # its rows are read when they are used
    assert data.labels is not None
    assert data.labels.tolist() == [(0, -1, 1)[number % 3] for number in GOOD]
    assert data.classes == ("cat", "dog", "fish")
    assert data.classifier is not None
    np.testing.assert_array_equal(data.classifier, np.eye(20, 3, dtype=np.float32), strict=True)
    assert set(data.pools) == {"general"}
    assert data.pools["general"].texts == tuple(TEXTS)
    np.testing.assert_array_equal(data.pools["general"].features, np.eye(5, 20, dtype=np.float32), strict=True)
    assert data.completeness == {
        ("general", 2): {head: tuple(TEXTS[pick] for pick in picks) for head, picks in HEADS.items()}
    }


def test_the_layout_of_the_texts_of_heads(written: Path) -> None:
    text = (written / "pets_completeness_general_top_2_heads_tiny.txt").read_text(encoding="utf-8")
    rule = "------------------"
    assert text.startswith(
        f"{rule}\nLayer 0, Head 1\n{rule}\nnaïve – text\na red star\n{rule}\nLayer 1, Head 0\n{rule}\n"
    )
    assert (written / "general.txt").read_text(encoding="utf-8").split("\n") == [*TEXTS, ""]


def test_half_precision_is_that_of_the_collection(model: Model, contributions: Contributions, tmp_path: Path) -> None:
    run(tmp_path / "c", model, PICTURES, EVERYTHING)
    export_text_span(tmp_path / "c", tmp_path / "out", NAMES)
    data = read_folder(tmp_path / "out", "pets", "tiny")
    np.testing.assert_allclose(data.attn, contributions.heads().numpy(), atol=2e-3)
    np.testing.assert_array_equal(data.mlp, contributions.start_and_mlps().half().float().numpy())


def test_some_arrays_and_no_labels(folder: Path, tmp_path: Path) -> None:
    written = export_text_span(folder, tmp_path / "out", NAMES, kinds=["mlp", "attn"])
    assert (
        {path.name for path in written}
        == {"pets_attn_tiny.npy", "pets_mlp_tiny.npy"}
        == set(os.listdir(tmp_path / "out"))
    )
    data = read_folder(tmp_path / "out", "pets", "tiny")
    assert (data.cls_attn, data.classifier, data.labels, data.pools, data.completeness) == (None, None, None, {}, {})
    export_text_span(folder, tmp_path / "labels", NAMES, kinds=[], classifier=classifier(weights=None))
    assert set(os.listdir(tmp_path / "labels")) == {"pets_labels.npy", "pets_classes.txt"}


def test_a_model_without_a_class_token(tmp_path: Path) -> None:
    """Its pooling alone, as one layer; it has no part of a class token."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    config = transformers.SiglipVisionConfig(**sizes, intermediate_size=64)
    model = wrap(randomise(transformers.SiglipVisionModel(config), 0).eval())
    run(tmp_path / "c", model, Pictures((5,)), EXACT)
    with pytest.raises(InputError, match="is of a model without a class token: leave cls_attn out"):
        export_text_span(tmp_path / "c", tmp_path / "out", NAMES, kinds=["cls_attn"])
    export_text_span(tmp_path / "c", tmp_path / "out", NAMES)
    data = read_folder(tmp_path / "out", "pets", "tiny")
    assert (data.attn.shape, data.mlp.shape, data.cls_attn) == ((5, 1, 2, 32), (5, 2, 32), None)
    assert not (tmp_path / "out" / "pets_cls_attn_tiny.npy").exists()
    images = [picture(number) for number in range(5)]
    with torch.no_grad():
        expected = model.decompose(images)
    np.testing.assert_allclose(data.attn, expected.heads().numpy(), atol=GOLDEN)
    embeddings = expected.embedding / expected.norm[:, None]
    np.testing.assert_allclose(data.embeddings(), embeddings.numpy(), atol=SUM_FLOAT32)


# ----------------------------------------------------------------------------------------------------------- writing


def test_memory_is_that_of_a_block(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is alive at once is a layer of a block: the largest result of the products has no more rows."""
    rows: list[int] = []
    einsum = torch.einsum

    def watched(equation: str, *operands: Any) -> Any:
        result = einsum(equation, *operands)
        rows.append(result.numel())
        return result

    monkeypatch.setattr(torch, "einsum", watched)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    export_text_span(folder, tmp_path / "out", NAMES)
    assert max(rows) == 4 * 2 * 20
    assert len(rows) == 2 * (3 + 1 + 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_a_folder_may_have_other_files_but_none_is_replaced(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_text_span(folder, out, NAMES, pools=[pool()])
    export_text_span(folder, out, Names("pets", "other"), kinds=["attn"])
    export_text_span(folder, out, Names("cars", "tiny"), kinds=["attn"])
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    for kinds, pools in ((["attn"], []), (["cls_attn"], []), ([], [pool()])):
        with pytest.raises(InputError, match="exists: nothing is replaced, give another folder or other names"):
            export_text_span(folder, out, NAMES, kinds=kinds, pools=pools)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_export_that_stops_leaves_nothing(folder: Path, tmp_path: Path, error: Any) -> None:
    (tmp_path / "out").mkdir()
    written: list[int] = []

    def stop(images: int) -> None:
        written.append(images)
        if len(written) == 3:
            raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        export_text_span(folder, tmp_path / "out", NAMES, pools=[pool()], progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_noticed_before_anything_is_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to a mapped file without space would end the process."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    written: list[int] = []
    with pytest.raises(OSError, match="No space left"):
        export_text_span(folder, tmp_path / "out", NAMES, progress=written.append)
    assert (written, list(tmp_path.iterdir())) == ([], [])


def test_a_file_that_is_made_meanwhile_is_kept(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def make(_: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "pets_mlp_tiny.npy").write_text("mine")

    with pytest.raises(InputError, match=r"pets_mlp_tiny\.npy exists: nothing is replaced"):
        export_text_span(folder, out, NAMES, progress=make)
    assert os.listdir(out) == ["pets_mlp_tiny.npy"]
    assert (out / "pets_mlp_tiny.npy").read_text() == "mine"


def test_moving_is_all_or_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, moved = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        if len(moved) == 2:
            raise OSError(5, "Input/output error")
        moved.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        export_text_span(folder, tmp_path / "out", NAMES)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("lacking", "option"), [("codes", "--codes"), ("terms", "--terms"), ("class_codes", "--class-codes")]
)
def test_what_was_not_kept(model: Model, tmp_path: Path, lacking: str, option: str) -> None:
    kept = {name: dtype for name, dtype in EXACT.items() if name != lacking}
    run(tmp_path / "c", model, Pictures((3,)), kept)
    with pytest.raises(NotKept, match=f"has no {lacking}: collect the images again with {option}$"):
        export_text_span(tmp_path / "c", tmp_path / "out", NAMES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ["attn", "heads"]}, "no array 'heads': choose from attn, mlp, cls_attn"),
        ({"pools": [Pool("a/b", ["x"], torch.zeros(1, 20))]}, "the name of the pool is 'a/b'"),
        ({"pools": [Pool("pets_attn", ["x"], torch.zeros(1, 20))]}, "would have the file pets_attn_tiny.npy: rename"),
        ({"pools": [Pool("pets_classes", ["x"], torch.zeros(1, 20))]}, "would have the file pets_classes.txt: rename"),
        ({"pools": [pool(), pool()]}, "the pool 'general' would have the file general.txt"),
        ({"pools": [Pool("p", ["x\ny"], torch.zeros(1, 20))]}, "has a line break"),
    ],
)
def test_arguments_that_do_not_fit(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_text_span(folder, tmp_path / "out", NAMES, **change)
    assert list(tmp_path.iterdir()) == []


def test_places_that_are_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file exists and is no folder"):
        export_text_span(folder, tmp_path / "file", NAMES)
    with pytest.raises(InputError, match="is no folder: make it first"):
        export_text_span(folder, tmp_path / "no" / "out", NAMES)
    for dataset, name in (("", "m"), ("a/b", "m"), ("a", "m\n"), (".a", "m")):
        with pytest.raises(InputError, match="can be part of a file's name"):
            Names(dataset, name)
    assert text_span_export.KINDS.keys() == {"attn", "mlp", "cls_attn"}


# ----------------------------------------------------------------------------------------------------------- reading


def test_files_of_a_published_script(tmp_path: Path) -> None:
    """Float16 classifiers, the accuracy at the end of the texts, and pools whose texts are elsewhere."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "imagenet_attn_ViT-B-16.npy", rng.normal(size=(4, 2, 3, 8)).astype(np.float32))
    np.save(tmp_path / "imagenet_mlp_ViT-B-16.npy", rng.normal(size=(4, 3, 8)).astype(np.float32))
    np.save(tmp_path / "imagenet_classifier_ViT-B-16.npy", rng.normal(size=(8, 5)).astype(np.float16))
    np.save(tmp_path / "words_ViT-B-16.npy", rng.normal(size=(2, 8)).astype(np.float32))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "words.txt").write_text("one\ntwo")
    rule = "-" * 18
    end = f"{rule}\nCurrent accuracy: 12.5\nNumber of texts: 1"
    file = tmp_path / "imagenet_completeness_words_top_1_heads_ViT-B-16.txt"
    file.write_text(f"{rule}\nLayer 1, Head 0\n{rule}\ntwo\n{rule}\nLayer 1, Head 2\n{rule}\none\n{end}")
    data = read_folder(tmp_path, "imagenet", "ViT-B-16", text_dir=tmp_path / "texts")
    assert data.pools["words"].texts == ("one", "two")
    assert data.completeness == {("words", 1): {(1, 0): ("two",), (1, 2): ("one",)}}
    assert read_folder(tmp_path, "imagenet", "ViT-B-16").pools == {}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    heads = {(0, 0): ("a", "------------------x"), (3, 11): ()}
    (tmp_path / "c.txt").write_text(completeness_text(heads))
    assert completeness(tmp_path / "c.txt") == heads


def replaced(name: str, values: Any) -> Any:
    return lambda folder: np.save(folder / name, values)


def text(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


COMPLETENESS = "pets_completeness_general_top_2_heads_tiny.txt"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "pets_attn_tiny.npy").unlink(), r"pets_attn_tiny\.npy is not there: check"),
        (lambda f: (f / "pets_mlp_tiny.npy").unlink(), r"pets_mlp_tiny\.npy is not there: check"),
        (lambda f: os.truncate(f / "pets_attn_tiny.npy", 3000), r"pets_attn_tiny\.npy is truncated"),
        (lambda f: os.truncate(f / "pets_mlp_tiny.npy", 50), r"pets_mlp_tiny\.npy is truncated"),
        (lambda f: os.truncate(f / "pets_labels.npy", 0), r"pets_labels\.npy is truncated"),
        (text("pets_attn_tiny.npy", b"no array"), r"pets_attn_tiny\.npy is truncated, or no array"),
        (replaced("pets_attn_tiny.npy", np.zeros((23, 2, 20))), r"has shape \[23, 2, 20\], expected \[images, layers,"),
        (
            replaced("pets_mlp_tiny.npy", np.zeros((23, 2, 20))),
            r"\[23, 2, 20\], expected \[23, 3, 20\] as in pets_attn",
        ),
        (replaced("pets_mlp_tiny.npy", np.zeros((22, 3, 20))), r"\[22, 3, 20\], expected \[23, 3, 20\]"),
        (replaced("pets_cls_attn_tiny.npy", np.zeros((23, 3, 20))), r"expected \[23, 2, 20\]"),
        (replaced("pets_classifier_tiny.npy", np.zeros((3, 20))), r"expected \[20, classes\]"),
        (
            replaced("pets_classifier_tiny.npy", np.zeros((20, 4))),
            "names 3 classes, and the classifier beside it has 4",
        ),
        (replaced("pets_labels.npy", np.zeros(22, int)), r"has shape \[22\], expected \[23\]"),
        (replaced("pets_labels.npy", np.full(23, 3)), "labels from 3 to 3, and the classifier beside it 3 classes"),
        (replaced("pets_labels.npy", np.zeros(23)), "pets_labels.npy holds float64"),
        (replaced("pets_mlp_tiny.npy", np.array([None])), r"pets_mlp_tiny\.npy is truncated, or no array"),
        (replaced("pets_mlp_tiny.npy", np.zeros((23, 3, 20), int)), "holds int64: expected numbers as float32"),
        (replaced("general_tiny.npy", np.zeros((4, 20))), r"expected \[5, 20\] as in general.txt and the terms"),
        (text("general.txt", b"\xff\xfe"), "general.txt is not UTF-8"),
        (text(COMPLETENESS, b"Layer 0, Head 0\n"), "does not begin with the texts of a head"),
        (text(COMPLETENESS, completeness_text({(0, 0): ("a",)}).encode() * 2), "has a head twice"),
    ],
)
def test_damage_is_one_line(copied: Path, damage: Any, message: str) -> None:
    damage(copied)
    with pytest.raises(InputError, match=message) as caught:
        read_folder(copied, "pets", "tiny")
    assert "\n" not in str(caught.value)


def test_folders_and_names_that_are_not_there(written: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        read_folder(written / "gone", "pets", "tiny")
    with pytest.raises(InputError, match=r"cars_attn_tiny\.npy is not there"):
        read_folder(written, "cars", "tiny")
