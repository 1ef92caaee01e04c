"""``clipfast collect``: a collection, its resumption, its refusals, and what is said meanwhile."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from builders import ROOT
from commandline import HEADS, LAYERS, clipfast, inside, messages, picture, start, write_bad
from measures import error
from tolerances import FLOAT32

import clipfast as package
from clipfast.analyses.moments import Moments
from clipfast.dataset.collection import Collection
from clipfast.dataset.manifest import Manifest


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    for kind in ("cats", "dogs"):
        (folder / kind).mkdir(parents=True)
        for number in range(4):
            picture(number + 10 * (kind == "dogs")).save(folder / kind / f"{number}.png")
    return folder


def options(model: Path) -> list[object]:
    return ["--model", model, "--device", "cpu", "--batch-size", 3]


def shown(stderr: str) -> list[str]:
    """Messages without the lines of progress."""
    return [line for line in messages(stderr) if not line.startswith("{")]


# ----------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.slow
def test_a_collection_has_the_contributions_of_the_model(images: Path, model_folder: Path, tmp_path: Path) -> None:
    """As a process: labels of the folder, everything in float32."""
    arguments = [*options(model_folder), "--labels", "folder", "--store-dtype", "float32", "--unit-size", 5]
    done = clipfast("collect", images, *arguments, "--out", tmp_path / "c", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["images"], result["failed"], result["complete"]) == (8, 0, True)
    assert result["statuses"] == {"ok": 8}
    assert result["rounding"] is None
    assert len(result["heads"]) == LAYERS * HEADS
    assert sum(row["share"] for row in result["heads"]) == pytest.approx(1, abs=1e-4)
    assert json.loads((tmp_path / "c" / "stats.json").read_text()) == result

    collection = Collection(tmp_path / "c")
    assert collection.manifest.plan.count == 2
    assert [entry.label for entry in collection.entries] == ["cats"] * 4 + ["dogs"] * 4
    model = package.load(str(model_folder), device="cpu")
    expected = model.decompose([entry.path for entry in collection.entries], class_token=True)
    kept = package.Contributions.cat([contributions for _, contributions in collection.batches()])
    assert error(kept.heads(), expected.heads()) <= FLOAT32
    assert error(kept.class_token(), expected.class_token()) <= FLOAT32
    moments = Moments(model)
    moments.update(expected)
    assert error(collection.moments.means(), moments.means()) <= FLOAT32


def test_float16_is_the_default_and_its_error_is_told(images: Path, model_folder: Path, tmp_path: Path) -> None:
    done = inside("collect", images, *options(model_folder), "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    last = shown(done.stderr)[-1]
    assert last.startswith(f"collected in {tmp_path / 'c'}: give that folder to the other analyses; codes in float16: ")
    assert "heads' variances differ by at most " in last
    result = json.loads((tmp_path / "c" / "stats.json").read_text())
    rounding = result["rounding"]
    assert (rounding["dtype"], rounding["images"]) == ("float16", 8)
    assert 0 < rounding["largest_relative_difference_of_variance"] < 0.01
    assert f"{100 * rounding['largest_relative_difference_of_variance']:.2g} %" in last
    settings = Manifest(tmp_path / "c").settings
    assert dict(settings.kept) == {
        "codes": "float16",
        "class_codes": "float16",
        "terms": "float16",
        "embeddings": "float32",
    }
    assert done.stdout.startswith("# 8 images, the heads that vary most\n")


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--moments-only"], set()),
        (["--no-codes", "--no-class-codes"], {"terms", "embeddings"}),
        (["--no-terms", "--no-embeddings"], {"codes", "class_codes"}),
    ],
)
def test_less_is_kept(flags: list[str], kept: set[str], images: Path, model_folder: Path, tmp_path: Path) -> None:
    done = inside("collect", images, *options(model_folder), *flags, "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    manifest = Manifest(tmp_path / "c")
    assert {name for name, dtype in manifest.settings.kept.items() if dtype} == kept
    arrays = {name.partition("/")[0] for record in manifest.records() for name in record.files if "/" in name}
    assert arrays == kept
    collection = Collection(tmp_path / "c")
    assert collection.moments.count == 8
    with pytest.raises(package.InputError, match=r"holds moments only|does not hold every image's"):
        list(collection.batches())


@pytest.mark.slow
def test_images_that_cannot_be_read_are_left_out(images: Path, model_folder: Path, tmp_path: Path) -> None:
    bad = write_bad(tmp_path / "bad")
    done = clipfast("collect", images, tmp_path / "bad", *options(model_folder), "--out", tmp_path / "c", "--json")
    assert done.returncode == 2
    result = json.loads(done.stdout)
    assert result["failed"] == len(bad)
    assert result["statuses"]["ok"] == 8
    assert sum(result["statuses"].values()) == 8 + len(bad)
    lines = shown(done.stderr)
    assert all(any(name in line and word in line for line in lines) for name, word in bad.items())
    counts = {line.split()[1].rstrip(":"): int(line.split()[0]) for line in lines if line[0].isdigit()}
    assert counts == {status: count for status, count in result["statuses"].items() if status != "ok"}


def test_at_most_twenty_errors_of_a_unit_are_shown(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "good.png")
    for number in range(33):
        (tmp_path / "images" / f"{number:02}.png").write_bytes(b"damaged")
    done = inside("collect", tmp_path / "images", *options(model_folder), "--out", tmp_path / "c")
    assert done.returncode == 2
    errors = [line for line in shown(done.stderr) if line.startswith("error: ")]
    assert len(errors) == 21
    assert "13 more images" in errors[-1]


def test_what_fast_preprocessing_changes_is_told(images: Path, model_folder: Path, tmp_path: Path) -> None:
    arguments = ["collect", images, *options(model_folder), "--preprocess", "fast", "--out", tmp_path / "c"]
    done = inside(*arguments)
    assert done.returncode == 0, done.stderr
    assert sum("fast preprocessing: pixels of 8 images differ" in line for line in shown(done.stderr)) == 1
    told = json.loads((tmp_path / "c" / "stats.json").read_text())["preprocessing"]
    assert (told["mode"], told["difference"]["images"]) == ("fast", 8)
    assert 0.9 < told["difference"]["least_cosine"] <= 1
    assert inside("collect", images, *options(model_folder), "--out", tmp_path / "exact").returncode == 0
    assert json.loads((tmp_path / "exact" / "stats.json").read_text())["preprocessing"] == {"mode": "exact"}


# -------------------------------------------------------------------------------------------------- going on


def test_a_finished_pass_is_not_computed_again(images: Path, model_folder: Path, tmp_path: Path) -> None:
    arguments = ["collect", images, *options(model_folder), "--out", tmp_path / "c"]
    first = inside(*arguments)
    folders = sorted(path.name for path in (tmp_path / "c" / "data").iterdir())
    again = inside(*arguments)
    assert (first.returncode, again.returncode) == (0, 0)
    assert again.stdout == first.stdout
    assert sorted(path.name for path in (tmp_path / "c" / "data").iterdir()) == folders
    assert not [line for line in again.stderr.splitlines() if line.startswith("{")]  # nothing to show


def test_every_other_setting_is_named(images: Path, model_folder: Path, tmp_path: Path) -> None:
    assert inside("collect", images, *options(model_folder), "--out", tmp_path / "c").returncode == 0
    before = (tmp_path / "c" / "collection.json").read_bytes()
    other = [images / "cats", images / "dogs", "--model", model_folder, "--dtype", "bf16", "--device", "cpu"]
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label\n" + "".join(f"{path},a\n" for path in sorted(images.rglob("*.png"))))
    other += ["--labels", labels, "--store-dtype", "float32", "--no-terms", "--preprocess", "fast"]
    other += ["--unit-size", 3, "--image-column", "jpg"]
    done = inside("collect", *other, "--out", tmp_path / "c")
    assert done.returncode == 2
    (line,) = shown(done.stderr)
    assert line == (
        f"error: {tmp_path / 'c'} holds images collected without labels; dtype 'float32', not 'bfloat16'; "
        "preprocessing mode 'exact', not 'fast'; kept codes 'float16', not 'float32'; kept class codes 'float16', not "
        "'float32'; kept terms 'float16', not None; batch size 3, not 8; unit size 1024, not 3; a pass over other "
        "images; image column None, not 'jpg': give another folder, or the options it was made with"
    )
    assert (tmp_path / "c" / "collection.json").read_bytes() == before
    labelled = inside("collect", images, *options(model_folder), "--labels", "folder", "--out", tmp_path / "c")
    assert "holds images collected without labels: give another" in shown(labelled.stderr)[-1]
    scenes = inside("collect", images, "--device", "cpu", "--batch-size", 3, "--out", tmp_path / "c")
    assert f"model '{model_folder}', not 'scenes'" in shown(scenes.stderr)[-1]


def test_other_images_in_the_same_folder_are_refused(images: Path, model_folder: Path, tmp_path: Path) -> None:
    assert inside("collect", images / "cats", *options(model_folder), "--out", tmp_path / "c").returncode == 0
    done = inside("collect", images / "dogs", *options(model_folder), "--out", tmp_path / "c")
    assert done.returncode == 2
    assert "a pass over other images" in shown(done.stderr)[-1]


def test_failures_are_tried_again_when_asked(images: Path, model_folder: Path, tmp_path: Path) -> None:
    """A file that was gone and is there again; ``collection retry`` does the same from any folder."""
    (tmp_path / "images").mkdir()
    for path in sorted((images / "cats").iterdir()):
        shutil.copy(path, tmp_path / "images")
    names = tmp_path / "list.txt"
    names.write_text("".join(f"images/{number}.png\n" for number in range(4)))
    (tmp_path / "images" / "2.png").rename(tmp_path / "2.png")
    arguments = ["collect", "list.txt", *options(model_folder), "--out", "c"]
    assert inside(*arguments, cwd=tmp_path).returncode == 2
    assert Manifest(tmp_path / "c").statuses() == {"ok": 3, "missing": 1}
    assert inside(*arguments, cwd=tmp_path).returncode == 2  # not without being asked
    (tmp_path / "2.png").rename(tmp_path / "images" / "2.png")
    done = inside("collection", "retry", tmp_path / "c", cwd=images)
    assert done.returncode == 0, done.stderr
    assert Manifest(tmp_path / "c").statuses() == {"ok": 4}
    assert inside(*arguments, "--retry-failed", cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_processes_give_the_same_bits(images: Path, model_folder: Path, tmp_path: Path) -> None:
    arguments = ["collect", images, *options(model_folder), "--unit-size", 2]
    assert inside(*arguments, "--out", tmp_path / "one").returncode == 0
    done = inside(*arguments, "--workers", 2, "--threads", 1, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-2])["devices"] == ["cpu"]
    records = [list(Manifest(tmp_path / name).records()) for name in ("one", "two")]
    assert [record.files for record in records[0]] == [record.files for record in records[1]]
    moments = [(tmp_path / name / "moments.safetensors").read_bytes() for name in ("one", "two")]
    assert moments[0] == moments[1]


def test_parts_of_a_pass(images: Path, model_folder: Path, tmp_path: Path) -> None:
    """Each part computes every other unit; the parts joined are the pass, and can be computed again as one."""
    arguments = ["collect", images, *options(model_folder), "--unit-size", 2]
    assert inside(*arguments, "--out", tmp_path / "whole").returncode == 0
    for index in range(2):
        done = inside(*arguments, "--num-shards", 2, "--shard-index", index, "--out", tmp_path / "joined")
        assert done.returncode == 0, done.stderr
        part = tmp_path / "joined" / "parts" / f"{index:04}-of-0002"
        assert f"collected 2 of 4 units in {part}" in shown(done.stderr)[-1]
        assert Manifest(part).finished() == {index, index + 2}
    done = inside("collection", "merge", "--out", tmp_path / "joined")
    assert done.returncode == 0, done.stderr
    moments = [(tmp_path / name / "moments.safetensors").read_bytes() for name in ("whole", "joined")]
    assert moments[0] == moments[1]
    assert done.stdout == inside("collect", tmp_path / "whole").stdout
    Manifest(tmp_path / "joined").record_path(1).unlink()
    retried = inside("collection", "retry", tmp_path / "joined", "--device", "cpu")
    assert retried.returncode == 0, retried.stderr
    assert Manifest(tmp_path / "joined").complete


# -------------------------------------------------------------------------------------------------- collections given


def test_a_collection_in_place_of_images(images: Path, model_folder: Path, tmp_path: Path) -> None:
    assert inside("collect", images, *options(model_folder), "--out", tmp_path / "c").returncode == 0
    again = inside("collect", tmp_path / "c", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["images"] == 8
    refused = inside("collect", tmp_path / "c", "--model", "scenes")
    assert refused.returncode == 2
    assert "is a collection, whose images are collected already: leave --model out" in refused.stderr


def test_a_collection_of_an_earlier_version(tmp_path: Path) -> None:
    """Is refused with the command that rewrites it; with that it has what it had, in float32."""
    old = tmp_path / "old"
    shutil.copytree(ROOT / "tests" / "saved" / "collections" / "collection-4", old)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    refused = inside("collect", old)
    assert refused.returncode == 2
    assert f"rewrite it with `clipfast collect --upgrade {old} --out FOLDER`" in refused.stderr
    done = inside("collect", "--upgrade", old, "--out", tmp_path / "new", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == json.loads(before["collection.json"])["count"]
    assert Manifest(tmp_path / "new").settings.kept["codes"] == "float32"
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert inside("collection", "validate", tmp_path / "new").returncode == 0
    half = inside("collect", "--upgrade", old, "--store-dtype", "float16", "--out", tmp_path / "half")
    assert half.returncode == 0
    assert Manifest(tmp_path / "half").settings.kept["codes"] == "float16"


def test_the_earlier_name_says_so(images: Path, model_folder: Path, tmp_path: Path) -> None:
    done = inside("stats", images, *options(model_folder), "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith("`clipfast stats` is now `clipfast collect`")
    assert Manifest(tmp_path / "c").complete


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no images were given"),
        (["gone"], "gone: no such file or folder"),
        (["images", "--labels", "gone.csv"], "cannot read the labels in gone.csv"),
        (["images", "--label-column", "shape"], "--label-column names a column of --labels, which is not given"),
        (["images", "--num-shards", "4"], "--num-shards and --shard-index belong together"),
        (["images", "--num-shards", "4", "--shard-index", "4"], "--shard-index is 4: with --num-shards 4 give 0 to 3"),
        (["images", "--engine", "serial", "--workers", "2"], "--engine serial is one worker in this process"),
        (["images", "--engine", "local", "--ray-address", "auto"], "--ray-address is for --engine ray"),
        (["images", "--devices", "cpu,"], "--devices is 'cpu,'"),
        (["images", "--devices", "gpu"], "no device is called 'gpu'"),
        (["images", "--device", "cuda:99"], "there is no device cuda:99"),
        (["images", "--max-error-rate", "1.5"], "Must be <= 1"),
        (["images", "--interval", "0"], "Must be > 0"),
        (["images", "--store-dtype", "int8"], "int8"),
        (["images", "--out", "images"], "--out is images, which is also what to collect"),
        (["images", "--out", "images/cats/0.png"], "it is a file, not a folder"),
        (["images", "--image-size", "33"], "image"),
        (["images", "--upgrade"], "images is no collection of an earlier version"),
        (["images", "images", "--upgrade"], "--upgrade takes one collection of an earlier version, not 2 paths"),
        (["images", "--no-such-option"], "--no-such-option"),
        (["empty"], "no images in empty"),
        (["images", "--log-to", "wandb"], "pip install 'clipfast[wandb]'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_in_one_line(
    images: Path, model_folder: Path, arguments: list[str], message: str, tmp_path: Path
) -> None:
    (images.parent / "empty").mkdir(exist_ok=True)
    arguments = [*arguments, *([] if "--out" in arguments else ["--out", str(tmp_path / "o")])]
    done = inside("collect", *arguments, "--model", model_folder, cwd=images.parent)
    assert done.returncode == 2
    (line,) = shown(done.stderr)
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "o" / "collection.json").exists()


def test_shards_that_are_gone(model_folder: Path, tmp_path: Path) -> None:
    """A line for each; they are units like others, and computed when they are there."""
    done = inside("collect", "gone-{0..2}.tar", *options(model_folder), "--out", "c", cwd=tmp_path)
    assert done.returncode == 2
    *lines, last = shown(done.stderr)
    assert lines == [f"error: gone-{number}.tar: no such file" for number in range(3)]
    assert "holds no image yet, or none that could be read" in last


def test_too_many_errors_end_the_pass(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(150):
        path = tmp_path / "images" / f"{number:03}.png"
        picture(number).save(path) if number % 2 else path.write_bytes(b"damaged")
    arguments = ["collect", tmp_path / "images", *options(model_folder), "--unit-size", 60, "--out", tmp_path / "c"]
    done = inside(*arguments, "--max-error-rate", 0.1)
    assert done.returncode == 2
    last = shown(done.stderr)[-1]
    assert "60 of 120 images failed" in last
    assert "--max-error-rate" in last
    assert Manifest(tmp_path / "c").finished() == {0, 1}
    assert inside(*arguments).returncode == 2  # goes on, to the end
    assert Manifest(tmp_path / "c").statuses()["ok"] == 75


# ------------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP))],
    ids=lambda each: each.name,
)
@pytest.mark.slow
def test_an_interrupted_pass_says_what_is_done(number: int, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index in range(400):
        picture(index).save(tmp_path / "images" / f"{index:03}.png")
    arguments = ["collect", "images", *options(model_folder), "--unit-size", 4, "--out", "c"]
    process = start(*arguments, cwd=tmp_path)
    while not any((tmp_path / "c" / "units").glob("*.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    units = len(Manifest(tmp_path / "c").finished())
    assert 0 < units < 100
    assert shown(stderr)[-1] == (
        f"error: interrupted: {units} of 100 units are done; run the same command again to go on"
    )
    assert json.loads(stderr.splitlines()[-2])["units"] <= units
    done = inside(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{units} of 100 units ({4 * units} images) were collected before" in done.stderr
    assert Manifest(tmp_path / "c").statuses() == {"ok": 400}


@pytest.mark.slow
def test_ray_gives_the_same_bits(images: Path, model_folder: Path, tmp_path: Path) -> None:
    """With a cluster that Ray starts on this machine, in a process of its own."""
    pytest.importorskip("ray")
    arguments = ["collect", images, *options(model_folder), "--unit-size", 2]
    assert inside(*arguments, "--out", tmp_path / "one").returncode == 0
    done = clipfast(*arguments, "--engine", "ray", "--workers", 2, "--threads", 1, "--out", tmp_path / "ray")
    assert done.returncode == 0, done.stderr
    records = [list(Manifest(tmp_path / name).records()) for name in ("one", "ray")]
    assert [record.files for record in records[0]] == [record.files for record in records[1]]
    assert "Traceback" not in done.stderr
