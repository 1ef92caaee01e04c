"""The program started with inputs and surroundings that once made it fail."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from commandline import COMMAND, inside, messages, picture, start

import clipfast as package
from clipfast.commands import text_features
from clipfast.commands.options import ClassOptions
from clipfast.commands.zeroshot import read_classes
from clipfast.dataset.collection import Collection, Entry


def draw(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number).save(folder / f"{number:03}.png")
    return folder


def shell(script: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Runs ``clipfast`` in a shell script, in which ``$CLIPFAST`` starts the program."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CLIPFAST": " ".join(COMMAND)}
    return subprocess.run(["bash", "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


# ------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.slow
def test_a_reader_of_stdout_that_leaves_does_not_end_the_work(tmp_path: Path, model_folder: Path) -> None:
    draw(tmp_path / "images", 30)
    script = f"set -o pipefail; $CLIPFAST decompose images --model {model_folder} --batch-size 1 --out o | head -1"
    done = shell(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["complete"] is True
    assert len(summary["images"]) == 30


@pytest.mark.slow
def test_a_closed_stdout(tmp_path: Path, model_folder: Path) -> None:
    """What is printed does not end up in the first file that is opened, and nothing fails."""
    draw(tmp_path / "images", 2)
    done = shell(f"$CLIPFAST decompose images --model {model_folder} --out o >&-", tmp_path)
    assert (done.returncode, [line for line in messages(done.stderr) if "error" in line]) == (0, [])
    saved = package.Contributions.load(tmp_path / "o" / "contributions-00000.safetensors")
    assert len(saved) == 2


@pytest.mark.slow
def test_a_full_disk_behind_stdout_is_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = shell("$CLIPFAST models ViT-B-32 > /dev/full", tmp_path)
    assert done.returncode == 2
    assert messages(done.stderr)[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_no_home_and_no_entry_for_the_user(tmp_path: Path) -> None:
    code = """
import os, pwd
os.environ.pop("HOME", None); os.environ.pop("XDG_CACHE_HOME", None); os.environ.pop("CLIPFAST_CACHE", None)
def missing(_):
    raise KeyError("no such user")
pwd.getpwuid = missing
from clipfast.cli.app import run
raise SystemExit(run(["doctor", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["timed"]["choices"] == {}


@pytest.mark.slow
def test_bench_without_the_module_resource(tmp_path: Path) -> None:
    """Windows has none."""
    code = """
import sys
sys.modules["resource"] = None
import clipfast.bench.memory, clipfast.commands.bench.measure
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)]
)
def test_signals_save_like_ctrl_c(number: signal.Signals, code: int, tmp_path: Path, model_folder: Path) -> None:
    draw(tmp_path / "images", 50)
    for original in sorted((tmp_path / "images").iterdir()):
        for copy in range(99):  # more than the program gets through before a busy machine runs this test again
            os.link(original, original.with_name(f"{original.stem}-{copy}{original.suffix}"))
    arguments = ("decompose", tmp_path / "images", "--model", model_folder, "--batch-size", 1, "--out", tmp_path / "o")
    process = start(*arguments)
    assert process.stdout is not None
    assert process.stdout.readline()  # the first image is done
    process.send_signal(number)
    process.send_signal(number)  # what a second one interrupts must not be the saving
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert messages(err)[-1].startswith("error: interrupted: ")
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["complete"] is False
    assert 0 < len(summary["images"]) < 5000


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path) -> None:
    """As ``nohup`` starts a program."""
    code = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from clipfast.commands.outcome import exit_code_of
def body():
    os.kill(os.getpid(), signal.SIGHUP)
    return 7
print(exit_code_of(body))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "7\n"


# --------------------------------------------------------------------------------------------------------- collections


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """``images/a/x`` and ``images/b/y``, two images each, and ``c``, the collection of them."""
    folder = tmp_path_factory.mktemp("collected")
    for place, kind in (("a", "x"), ("b", "y")):
        draw(folder / "images" / place / kind, 2)
    done = inside("collect", "images", "--model", model_folder, "--out", "c", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "c"


@pytest.mark.parametrize(
    "arguments",
    [
        ("decompose", "images", "--model", "MODEL"),
        ("demo", "--scenes", "1"),
        ("scenes", "--count", "1"),
        ("bench", "--model", "MODEL"),
        ("segment", "images", "--model", "MODEL", "--texts", "a", "--texts", "b"),
        ("explain", "images", "--model", "MODEL", "--classes", "a,b"),
        ("textspan", "c"),
        ("textspan", "--weights", "--model", "MODEL"),
        ("ablate", "c"),
        ("retrieve", "c", "--labels", "folder"),
        ("report", "c"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_no_command_writes_into_a_collection(arguments: tuple[str, ...], collection: Path, model_folder: Path) -> None:
    before = {path: path.read_bytes() for path in collection.rglob("*") if path.is_file()}
    named = [str(model_folder) if argument == "MODEL" else argument for argument in arguments]
    done = inside(*named, "--out", "c", cwd=collection.parent)
    assert done.returncode == 2
    (line,) = messages(done.stderr)
    assert line == "error: c holds a collection, and results here would overwrite it: give another --out"
    assert {path: path.read_bytes() for path in collection.rglob("*") if path.is_file()} == before


# -------------------------------------------------------------------------------------------------------------- labels


def test_labels_of_the_folder_an_image_is_in(collection: Path, tmp_path: Path) -> None:
    result = {}
    for origin in ("folder", "parent"):
        done = inside("retrieve", "c", "--labels", origin, "--out", tmp_path / origin, "--json", cwd=collection.parent)
        assert done.returncode == 0, done.stderr
        result[origin] = json.loads(done.stdout)["labelled"]
    assert result == {"folder": 4, "parent": 4}
    out = tmp_path / "own"
    images = collection.parent / "images"
    model = Collection(collection).header["model"]
    done = inside("collect", images, "--model", model, "--labels", "parent", "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [entry.label for entry in Collection(out).entries] == ["x", "x", "y", "y"]


def test_columns_of_a_table_of_groups_and_splits(model_folder: Path, tmp_path: Path) -> None:
    draw(tmp_path / "images", 8)
    rows = [f"{number},images/{number:03}.png,{number % 2},{number // 4},{number // 2 % 2}" for number in range(8)]
    (tmp_path / "metadata.csv").write_text("\n".join(["img_id,img_filename,y,split,place", *rows]) + "\n")
    arguments = ("collect", "images", "--model", model_folder, "--labels", "metadata.csv", "--label-column", "y")
    columns = ("--file-column", "img_filename", "--group-column", "y,place", "--where", "split=1", "--out", "c")
    done = inside(*arguments, *columns, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    entries = Collection(tmp_path / "c").entries
    assert [Path(entry.file).name for entry in entries] == [f"{number:03}.png" for number in range(4, 8)]
    assert [entry.group for entry in entries] == ["y=0, place=0", "y=1, place=0", "y=0, place=1", "y=1, place=1"]
    for wrong, message in (
        (("--where", "split"), "'split' is no row filter"),
        (("--where", "split=9"), "no image has a label from metadata.csv"),
        (("--group-column", "y,"), "--group-column is 'y,'"),
        (("--file-column", "name"), "name"),
    ):
        done = inside(*arguments, *wrong, "--out", "other", cwd=tmp_path)
        assert done.returncode == 2, wrong
        assert message in messages(done.stderr)[-1]


def test_a_typing_error_in_a_shards_column_names_the_columns(model_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for number, shape in enumerate(("star", "ring")):
            image = BytesIO()
            picture(number).save(image, "png")
            members = {"png": image.getvalue(), "json": json.dumps({"shape": shape}).encode(), "txt": b"a star"}
            for ending, data in members.items():
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                archive.addfile(member, BytesIO(data))
    arguments = ("collect", "s.tar", "--model", model_folder, "--labels", "shard", "--out", "c", "--label-column")
    done = inside(*arguments, "shap", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = messages(done.stderr)
    assert "'shap'" in line
    assert "shape" in line.replace("'shap'", "")


def test_json_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    deep = "[" * 200_000
    (tmp_path / "bench.json").write_text(deep)
    done = inside("bench", "--chart", "bench.json", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "bench.json is not JSON" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("decompose", "images", "--texts-file", "PIPE"),
        ("textspan", "--weights", "--pool", "PIPE"),
        ("segment", "images", "--classes", "PIPE", "--model", "no-such-model"),
        ("segment", "images", "--labels", "parent", "--templates", "PIPE", "--model", "no-such-model"),
        ("segment", "images", "--texts", "a", "--texts", "b", "--background-texts", "PIPE", "--model", "no-such-model"),
        ("collect", "images", "--labels", "PIPE"),
        ("bench", "--chart", "PIPE"),
    ],
    ids=lambda arguments: " ".join(arguments[:4]),
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(arguments: tuple[str, ...], tmp_path: Path) -> None:
    draw(tmp_path / "images" / "a", 1)
    draw(tmp_path / "images" / "b", 1)
    os.mkfifo(tmp_path / "PIPE")
    done = inside(*arguments, "--out", tmp_path / "o", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = messages(done.stderr)
    assert line.startswith("error: ")
    assert "a FIFO, not a regular file" in line


# ----------------------------------------------------------------------------------------------------------- zero-shot


def entries_of(*labels: str) -> list[Entry]:
    return [Entry(f"{number}.png", str(number), f"/{number}.png", label=label) for number, label in enumerate(labels)]


def test_templates_times_classes(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text("label,text\ncat,cat\ncat,kitten\ndog,dog\n")
    (tmp_path / "templates.txt").write_text("a sketch of a {}\nmany {}s\n")
    file = str(tmp_path / "templates.txt")
    classes = read_classes(
        entries_of("cat", "dog"), ClassOptions(classes=tmp_path / "classes.csv", prompt=["a {}!"], templates=[file])
    )
    assert classes.labels == ("cat", "dog")
    assert classes.texts == (
        ("a cat!", "a sketch of a cat", "many cats", "a kitten!", "a sketch of a kitten", "many kittens"),
        ("a dog!", "a sketch of a dog", "many dogs"),
    )
    named = read_classes(entries_of("red_fox", "owl"), ClassOptions(templates=["simple"]))
    assert named.texts[1][0] == "a photo of a red fox."
    assert [len(texts) for texts in named.texts] == [7, 7]
    plain = read_classes(entries_of("cat", "dog"), ClassOptions(classes=tmp_path / "classes.csv"))
    assert plain.texts == (("cat", "kitten"), ("dog",))
    (tmp_path / "wrong.txt").write_text("no place\n")
    for options, message in (
        (ClassOptions(templates=["none"]), "neither a file nor one of plain, simple, imagenet"),
        (ClassOptions(templates=[str(tmp_path / "wrong.txt")]), "'no place': it needs one {}"),
    ):
        with pytest.raises(package.InputError, match=message):
            read_classes(entries_of("cat", "dog"), options)


def test_a_classifier_is_the_normalised_mean_of_unit_features() -> None:
    model = package.load("scenes")
    classes = read_classes(entries_of("star", "ring"), ClassOptions(templates=["simple"]))
    expected = []
    for texts in classes.texts:
        rows = torch.stack([row / row.norm() for row in model.encode_text(list(texts))])
        expected.append(rows.mean(0) / rows.mean(0).norm())
    torch.testing.assert_close(classes.classifier(model), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    text_features.cache_folder.cache_clear()
    yield tmp_path / "cache" / "texts"
    text_features.cache_folder.cache_clear()


def count_encoded(model: package.Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of texts of every call of ``encode_text``."""
    counts: list[int] = []
    encode = package.Model.encode_text

    def counted(self: package.Model, texts: list[str], **options: object) -> torch.Tensor:
        counts.append(len(texts))
        return encode(self, texts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(package.Model, "encode_text", counted)
    return counts


def test_features_of_texts_are_kept_on_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = package.load("scenes")
    texts = [f"a star number {number}" for number in range(160)]
    counts = count_encoded(model, monkeypatch)
    first = text_features.encode_texts(model, texts)
    assert counts == [128, 32]
    assert torch.equal(text_features.encode_texts(model, texts), first)
    assert torch.equal(text_features.encode_texts(package.load("scenes"), texts), first)
    assert counts == [128, 32]
    files = sorted(cache.iterdir())
    assert len(files) == 2
    for file in files:
        data = bytearray(file.read_bytes())
        data[-5] ^= 1  # a damaged file is as good as none
        file.write_bytes(bytes(data))
    assert torch.equal(text_features.encode_texts(model, texts), first)
    assert counts == [128, 32] * 2
    assert torch.equal(text_features.encode_texts(model, texts), first)
    assert counts == [128, 32] * 2


def test_features_of_other_weights_or_activations_are_not_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"a star number {number}" for number in range(70)]
    model = package.load("scenes")
    first = text_features.encode_texts(model, texts)
    other = package.load("scenes")
    with torch.no_grad():
        other.module.text_projection.mul_(-1)
    assert torch.equal(text_features.encode_texts(other, texts), -first)
    changed = package.load("scenes")
    for block in changed.module.transformer.resblocks:
        block.mlp[1] = torch.nn.ReLU()
    assert not torch.equal(text_features.encode_texts(changed, texts), first)


def test_the_cache_is_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_features, "MAX_BYTES", 1)
    model = package.load("scenes")
    text_features.encode_texts(model, [f"a star number {number}" for number in range(70)])
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "file"))
    text_features.cache_folder.cache_clear()
    model = package.load("scenes")
    assert len(text_features.encode_texts(model, [f"a star number {number}" for number in range(70)])) == 70
    text_features.cache_folder.cache_clear()


@pytest.mark.slow
def test_two_processes_share_the_cache(tmp_path: Path) -> None:
    code = """
import clipfast
from clipfast.commands.text_features import encode_texts
texts = [f"a star number {number}" for number in range(300)]
print(float(encode_texts(clipfast.load("scenes"), texts).sum()))
"""
    environment = {**os.environ, "CLIPFAST_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert printed[0] == printed[1] != ""
    assert [process.returncode for process in processes] == [0, 0]
    assert all(path.suffix == ".safetensors" for path in (tmp_path / "texts").iterdir())
