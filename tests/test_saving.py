"""Contributions.save and .load: the same bits come back, and other files are refused."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from builders import clip_model, directions, pixels, vision_tower
from safetensors.torch import save_file

from clipfast import Contributions, InputError, Model, wrap

SETTINGS = ("layers", "grid", "texts", "prefix_tokens")
TENSORS = [field.name for field in fields(Contributions) if field.name not in (*SETTINGS, "basis", "_values")]


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(clip_model())


def assert_same(have: Contributions, expected: Contributions) -> None:
    for name in TENSORS:
        old, new = getattr(expected, name), getattr(have, name)
        assert (old is None) == (new is None), name
        if old is not None:
            assert old.dtype == new.dtype, name
            assert torch.equal(old, new), name
    assert [getattr(have, name) for name in SETTINGS] == [getattr(expected, name) for name in SETTINGS]
    assert (have.basis.heads, have.basis.centring) == (expected.basis.heads, expected.basis.centring)
    assert torch.equal(have.heads(), expected.heads())
    assert have.max_error() == expected.max_error()
    if expected._values is not None:
        for layer in expected.layers:
            assert torch.equal(have.tokens(layer), expected.tokens(layer))
    if expected._maps is not None:
        assert torch.equal(have.patch_maps(), expected.patch_maps())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"texts": ["a red star", "naïve café, “quoted”"], "maps": "per_head", "attention": True, "tokens": True},
        {"class_token": True, "layers": [0, -1]},
        {"texts": directions(3, 20), "maps": "summed", "centring": "termwise"},
        {"layers": [-1], "tokens": True, "attention": True},
        {"layers": [], "texts": directions(1, 20)},
    ],
    ids=["bare", "everything", "class token", "termwise", "one layer", "no layer"],
)
def test_saved_contributions_are_loaded_to_the_bit(model: Model, options: dict, tmp_path: Path) -> None:
    contributions = model.decompose(pixels(model.module.visual), **options)
    contributions.save(tmp_path / "file.safetensors")
    assert_same(Contributions.load(tmp_path / "file.safetensors"), contributions)


def test_saving_what_was_loaded_gives_the_same_file(model: Model, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    model.decompose(pixels(model.module.visual), texts=["a"], tokens=True, layers=[1]).save(first)
    Contributions.load(first).save(str(second))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    visual = vision_tower(dtype=dtype)
    contributions = wrap(visual).decompose(pixels(visual, dtype=dtype), attention=True, tokens=True)
    contributions.save(tmp_path / "file")
    assert_same(Contributions.load(tmp_path / "file"), contributions)


def test_contributions_of_no_images(model: Model, tmp_path: Path) -> None:
    contributions = model.decompose(pixels(model.module.visual, 0), texts=["a"], attention=True)
    contributions.save(tmp_path / "none")
    assert_same(Contributions.load(tmp_path / "none"), contributions)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("once", "again"):
        model = wrap(clip_model(seed=4))
        contributions = model.decompose(
            pixels(model.module.visual), texts=["a", "b"], maps="per_head", attention=True, tokens=True
        )
        contributions.save(tmp_path / name)
    assert (tmp_path / "once").read_bytes() == (tmp_path / "again").read_bytes()


def test_a_loaded_file_can_be_deleted(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "file"
    contributions = model.decompose(pixels(model.module.visual))
    contributions.save(path)
    loaded = Contributions.load(path)
    path.unlink()
    assert torch.equal(loaded.heads(), contributions.heads())


def test_a_loaded_file_can_be_overwritten(model: Model, tmp_path: Path) -> None:
    """What was loaded does not change, or vanish, with the file."""
    path = tmp_path / "file"
    contributions = model.decompose(pixels(model.module.visual))
    contributions.save(path)
    loaded = Contributions.load(path)
    model.decompose(pixels(model.module.visual, seed=1)).save(path)
    assert_same(loaded, contributions)


def test_a_file_can_be_saved_back_where_it_came_from(model: Model, tmp_path: Path) -> None:
    """In a process of its own: reading memory of a file that has been cut off ends the process."""
    path = tmp_path / "file"
    model.decompose(pixels(model.module.visual), tokens=True).save(path)
    before = path.read_bytes()
    script = "import sys, clipfast; clipfast.Contributions.load(sys.argv[1]).save(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-300:]}"
    assert path.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------- errors


def test_a_truncated_file(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "file"
    model.decompose(pixels(model.module.visual)).save(path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"file is damaged or not a safetensors file \("):
            Contributions.load(path)


def test_another_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a tensor in sight\n" * 20)
    with pytest.raises(InputError, match=r"notes.txt is damaged or not a safetensors file"):
        Contributions.load(path)


def test_safetensors_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(InputError, match=r"is a safetensors file, but not one that Contributions\.save wrote$"):
            Contributions.load(path)


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Contributions.load(tmp_path / "nowhere")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path)):
        Contributions.load(tmp_path)


def test_a_folder_that_does_not_exist(model: Model, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        model.decompose(pixels(model.module.visual)).save(tmp_path / "nowhere" / "file")
