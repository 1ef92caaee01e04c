"""``clipfast collection``: what a collection holds, checks, exports, and units that are computed again."""

import json
import os
import re
import shutil
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from builders import ROOT
from commandline import COMMAND, HEADS, LAYERS, inside, messages, picture
from page_blocks import blocks, commands

import clipfast as package
from clipfast.cli.app import GROUPS
from clipfast.dataset.collection import Collection
from clipfast.dataset.manifest import Manifest

COUNT = 10


def write_shard(path: Path, numbers: range, damaged: int | None = None) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            content = BytesIO()
            picture(number).save(content, "png")
            data = content.getvalue()[: 60 if number == damaged else None]
            for name, text in ((f"{number:03}.png", data), (f"{number:03}.cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(name)
                member.size = len(text)
                tar.addfile(member, BytesIO(text))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two shards of five images; one of the second is damaged."""
    write_shard(tmp_path / "a.tar", range(5))
    write_shard(tmp_path / "b.tar", range(5, 10), damaged=7)
    return tmp_path


@pytest.fixture
def collection(data: Path, model_folder: Path) -> Path:
    done = inside("collect", "{a,b}.tar", *options(model_folder), "--out", "c", cwd=data)
    assert done.returncode == 2, done.stderr
    return data / "c"


def options(model: Path) -> list[object]:
    return ["--model", model, "--device", "cpu", "--batch-size", 2, "--labels", "shard"]


def shown(stderr: str) -> list[str]:
    """Messages without the lines of progress."""
    return [line for line in messages(stderr) if not line.startswith("{")]


# ------------------------------------------------------------------------------------------------------------- info


def test_info_as_json(collection: Path, model_folder: Path) -> None:
    done = inside("collection", "info", collection, "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert (content["complete"], content["units"], content["units_left"]) == (True, 2, 0)
    assert (content["images"], content["failed"]) == (9, 1)
    assert content["statuses"] == {"ok": 9, "decode_error": 1}
    assert content["bytes_of_shards"] == sum((collection.parent / f"{name}.tar").stat().st_size for name in "ab")
    assert content["settings"] == Manifest(collection).settings.to_json()
    files = [path for path in collection.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert sum(content["bytes"].values()) == sum(path.stat().st_size for path in files)
    codes = [path for path in files if "codes" in path.parts]
    assert content["bytes"]["codes"] == sum(path.stat().st_size for path in codes)


def test_info_as_a_table(collection: Path, model_folder: Path) -> None:
    done = inside("collection", "info", collection)
    table = dict(line.split("\t", 1) for line in done.stdout.splitlines()[1:])
    assert table["state"] == "complete"
    assert (table["units"], table["images"], table["failed"]) == ("2", "9", "1 decode_error")
    assert table["inputs"] == "{a,b}.tar"
    assert table["model"] == f"{model_folder}, its own weights, float32, images of 32x32"
    assert table["kept"] == "codes float16, class_codes float16, terms float16, embeddings float32"
    assert table["labels"] == "from shard, column label"


def test_info_of_an_unfinished_collection(collection: Path) -> None:
    Manifest(collection).record_path(1).unlink()
    done = inside("collection", "info", collection)
    assert "1 unit left: run the command that began it once more" in done.stdout
    assert json.loads(inside("collection", "info", collection, "--json").stdout)["complete"] is False


# --------------------------------------------------------------------------------------------------------- validate


def test_a_sound_collection(collection: Path) -> None:
    done = inside("collection", "validate", collection)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{collection}: 2 of 2 units checked, 0 findings\n"
    assert json.loads(inside("collection", "validate", collection, "--json").stdout)["findings"] == []


def test_results_of_analyses_beside_it_are_no_findings(collection: Path) -> None:
    assert (collection / "stats.json").exists()
    assert (collection / "arguments.json").exists()
    (collection / "textspan.json").write_text("{}")
    assert inside("collection", "validate", collection).returncode == 0


def test_damage_is_a_line_and_exit_code_2(collection: Path) -> None:
    manifest = Manifest(collection)
    folder = manifest.data / manifest.record(0).folder
    content = bytearray((folder / "images.parquet").read_bytes())
    content[len(content) // 2] ^= 255
    (folder / "images.parquet").write_bytes(content)
    (collection / "basis.safetensors").unlink()
    done = inside("collection", "validate", collection)
    assert done.returncode == 2
    lines = messages(done.stderr)
    assert all(line.startswith("error: ") for line in lines)
    assert any(str(folder / "images.parquet") in line for line in lines)
    assert any("basis.safetensors" in line for line in lines)
    assert done.stdout == f"{collection}: 2 of 2 units checked, {len(lines)} findings\n"
    again = inside("collection", "validate", collection, "--json")
    assert again.returncode == 2
    assert len(json.loads(again.stdout)["findings"]) == len(lines)


def test_inputs_are_read_again_when_asked(collection: Path) -> None:
    write_shard(collection.parent / "a.tar", range(20, 25))
    assert inside("collection", "validate", collection).returncode == 0
    done = inside("collection", "validate", collection, "--inputs")
    assert done.returncode == 2
    assert "a.tar" in done.stderr


# ------------------------------------------------------------------------------------------------------------ retry


def test_changed_shards_are_computed_again(collection: Path, model_folder: Path) -> None:
    """Going on is refused, and so is a plain ``retry``; ``retry --changed`` computes that unit alone again."""
    folders = [Manifest(collection).record(unit).folder for unit in range(2)]
    write_shard(collection.parent / "a.tar", range(20, 25))
    os.utime(collection.parent / "a.tar", ns=(1, 1))
    arguments = ["collect", "{a,b}.tar", *options(model_folder), "--out", "c"]
    for refused in (inside(*arguments, cwd=collection.parent), inside("collection", "retry", collection)):
        assert refused.returncode == 2
        assert "--changed" in shown(refused.stderr)[-1]
        assert "a.tar" in shown(refused.stderr)[-1]
    done = inside("collection", "retry", collection, "--changed", "--device", "cpu")
    assert done.returncode == 2  # one image is damaged still
    manifest = Manifest(collection)
    assert manifest.statuses() == {"ok": 9, "decode_error": 1}
    assert (manifest.record(0).folder != folders[0], manifest.record(1).folder != folders[1]) == (True, False)
    assert {entry.key for entry in Collection(collection).entries} >= {"020", "024", "005"}
    again = inside(*arguments, cwd=collection.parent)
    assert shown(again.stderr)[-1].startswith("collected in c")


def test_a_mended_shard_is_computed_again(collection: Path) -> None:
    """It is tried again because it has failures and other bytes than before."""
    write_shard(collection.parent / "b.tar", range(5, 10))
    done = inside("collection", "retry", collection, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert Manifest(collection).statuses() == {"ok": 10}


def test_retry_finishes_what_was_not_computed(collection: Path) -> None:
    Manifest(collection).record_path(0).unlink()
    assert inside("collection", "retry", collection, "--device", "cpu").returncode == 2
    assert Manifest(collection).statuses() == {"ok": 9, "decode_error": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory): run the command that made the collection again"),
        ("{", "is damaged (JSONDecodeError)"),
        ("{}", "is damaged (KeyError)"),
        ("[]", "is damaged (TypeError)"),
    ],
)
def test_retry_needs_the_options_of_the_pass(content: str | None, message: str, collection: Path) -> None:
    path = collection / "arguments.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    done = inside("collection", "retry", collection)
    assert done.returncode == 2
    assert message in done.stderr
    assert "--retry-failed" in done.stderr


def test_retry_needs_the_folder_that_paths_are_from(collection: Path) -> None:
    path = collection / "arguments.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"folder": "gone"}))
    assert "which is gone" in inside("collection", "retry", collection).stderr


# ----------------------------------------------------------------------------------------------------- merge, export


def test_parts_that_lack_units_are_refused(data: Path, model_folder: Path) -> None:
    arguments = ["collect", "{a,b}.tar", *options(model_folder), "--num-shards", 2, "--shard-index", 0, "--out", "p"]
    assert inside(*arguments, cwd=data).returncode == 0
    done = inside("collection", "merge", "--out", "p", cwd=data)
    assert done.returncode == 2
    assert "part 1 of 2 is missing" in messages(done.stderr)[-1]


def test_passes_over_different_images(data: Path, model_folder: Path) -> None:
    """Joined one behind the other; images of the same name are refused, or told."""
    for name in ("a", "b"):
        inside("collect", f"{name}.tar", *options(model_folder), "--out", name, cwd=data)
    done = inside("collection", "merge", "a", "b", "--out", "both", cwd=data)
    assert done.returncode == 2  # one image is damaged
    assert Manifest(data / "both").statuses() == {"ok": 9, "decode_error": 1}
    assert "--retry-failed" in inside("collection", "retry", "both", cwd=data).stderr  # they had different options
    (data / "sub").mkdir()
    shutil.copy(data / "a.tar", data / "sub" / "a.tar")
    inside("collect", "a.tar", *options(model_folder), "--out", data / "again", cwd=data / "sub")
    refused = inside("collection", "merge", "a", "again", "--out", "twice", cwd=data)
    assert (refused.returncode, "images of the same name" in refused.stderr) == (2, True)
    allowed = inside("collection", "merge", "a", "again", "--allow-duplicates", "--out", "twice", cwd=data)
    assert allowed.returncode == 0, allowed.stderr
    assert "images of the same name" in allowed.stderr


def test_export_for_clip_retrieval(collection: Path, tmp_path: Path) -> None:
    done = inside("collection", "export", collection, "--out", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"9 images in {tmp_path / 'e'}\n"
    embeddings = np.load(tmp_path / "e" / "img_emb" / "img_emb_0.npy")
    assert embeddings.dtype == np.float16
    assert np.allclose(np.linalg.norm(embeddings.astype(np.float32), axis=1), 1, atol=2e-3)
    out = tmp_path / "heads"
    done = inside("collection", "export", collection, "--heads", "L1.H0", "--dtype", "float32", "--out", out)
    assert done.returncode == 0, done.stderr
    codes = np.load(out / "img_emb" / "img_emb_0.npy")
    expected = np.concatenate([made.codes[:, 1, 0].numpy() for _, made in Collection(collection).batches()])
    assert np.array_equal(codes, expected)


@pytest.mark.parametrize("layout", ["zarr", "parquet"])
def test_export_of_everything(layout: str, collection: Path, tmp_path: Path) -> None:
    done = inside("collection", "export", collection, "--layout", layout, "--out", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    if layout == "zarr":
        import zarr

        assert zarr.open_group(tmp_path / "e" / "arrays.zarr", mode="r")["codes"].shape == (9, LAYERS, HEADS, 16)
    else:
        import pyarrow.parquet as pq

        assert pq.read_table(tmp_path / "e").num_rows == 9


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("command", [name for name in GROUPS["collection"] if name != "merge"])
def test_a_folder_that_is_no_collection(command: str, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "gone"):
        done = inside("collection", command, place)
        assert done.returncode == 2
        (line,) = messages(done.stderr)
        assert line.startswith("error: ")
        assert f"{place} is no collection" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge"], "holds no parts"),
        (["merge", "gone", "--out", "w"], "gone is no collection"),
        (["export", "c", "--layout", "csv"], "csv"),
        (["export", "c", "--heads", "L9.H9", "--out", "e"], "L9"),
        (["export", "c", "--heads", "L1.H0", "--layout", "zarr", "--out", "e"], "clip-retrieval"),
        (["export", "c", "--out", "a.tar"], "a.tar exists"),
        (["info"], "COLLECTION"),
        (["retry", "c", "--device", "gpu"], "no device is called 'gpu'"),
        (["no-such-command"], "no-such-command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_in_one_line(arguments: list[str], message: str, collection: Path) -> None:
    done = inside("collection", *arguments, cwd=collection.parent)
    assert done.returncode == 2
    (line,) = messages(done.stderr)
    assert line.startswith("error: ")
    assert message in line


def test_a_damaged_record_is_an_error_everywhere(collection: Path) -> None:
    path = Manifest(collection).record_path(1)
    path.write_text(path.read_text().replace('"ok": 4', '"ok": 5'))
    for command in ("info", "export"):
        done = inside("collection", command, collection)
        assert done.returncode == 2
        assert f"{path} is damaged or was edited" in done.stderr
    with pytest.raises(package.InputError, match="is damaged or was edited"):
        Collection(collection)


# ------------------------------------------------------------------------------------------------------ documentation


@pytest.mark.slow
def test_the_slurm_script_of_the_page(data: Path, model_folder: Path) -> None:
    """Run by bash as Slurm would: for every index, with the variables of an array of two jobs."""
    [script] = [block.code for block in blocks("docs/howto/datasets.md") if "#SBATCH" in block.code]
    program = data / "bin" / "clipfast"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\nexec {" ".join(COMMAND)} "$@" --model {model_folder} --device cpu\n')
    program.chmod(0o755)
    for index in range(2):
        environment = os.environ | {
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "DATA": "{a,b}.tar",
            "RESULTS": str(data / "joined"),
            "SLURM_ARRAY_TASK_ID": str(index),
            "SLURM_ARRAY_TASK_COUNT": "2",
        }
        (data / "job.sh").write_text(script)
        done = subprocess.run(
            ["bash", "job.sh"], cwd=data, env=environment, capture_output=True, text=True, check=False
        )
        assert Manifest(data / "joined" / "parts" / f"000{index}-of-0002").finished() == {index}, done.stderr
    joined = inside("collection", "merge", "--out", "joined", cwd=data)
    assert joined.returncode == 2  # one image is damaged
    assert Manifest(data / "joined").statuses() == {"ok": 9, "decode_error": 1}


def test_the_table_of_the_page_about_planning() -> None:
    """Is what the command before it prints, some rows left out."""
    page = blocks("docs/howto/planning.md")
    place = next(number for number, block in enumerate(page) if block.language == "text")
    words = commands(page[place - 1].code)[-1]
    printed = inside(*words[1:]).stdout.splitlines()
    shown = page[place].code.splitlines()
    assert shown[0] == printed[1].removeprefix("# ")
    assert set(shown[1:]) < set(printed)


def test_bytes_per_image_of_the_page_are_those_of_the_model() -> None:
    text = (ROOT / "docs" / "howto" / "datasets.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"\| `--([a-z-]+)`, default \|[^|]*\| ([\d,]+) \|", text))
    done = inside("plan", "--model", "ViT-L-14", "--rate", 1, "--json")
    expected = json.loads(done.stdout)["bytes_per_image"]
    assert {name.replace("-", "_"): int(size.replace(",", "")) for name, size in table.items()} == {
        name: size for name, size in expected.items() if name != "table"
    }
