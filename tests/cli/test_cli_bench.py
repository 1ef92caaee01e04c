"""``clipfast bench`` as a process: what it measures, writes, says, and how it ends."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from commandline import clipfast, start

from clipfast.bench import outputs
from clipfast.bench.document import read, rows
from clipfast.cli.app import run as command_line
from clipfast.commands import console
from clipfast.commands.bench import command
from clipfast.commands.bench import measure as bench
from clipfast.commands.bench.measure import Options, run
from clipfast.errors import ClipfastError

QUICK = ("--pairs", 1, "--warmup", 0, "--no-memory", "--threads", 1)


def options(folder: Path, built: Path, **changes: Any) -> Options:
    quick = {"outputs": ["plain,heads"], "pairs": 1, "warmup": 0, "memory": False, "threads": 1}
    return Options(**{"model": [str(built)], "batch": [2], "out": folder / "out", **quick, **changes})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The folder of a run, as a process in a folder without a checkout."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ("bench", "--model", model_folder, "--model", "convnext_large_d", "--batch", 1, "--batch", 3, *QUICK)
    done = clipfast(*arguments, "--outputs", "plain,maps", "--outputs", "tokens", "--out", "out", cwd=folder)
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    (folder / "code").write_text(str(done.returncode))
    return folder


def test_results_of_a_run(written: Path) -> None:
    assert sorted(path.name for path in (written / "out").iterdir()) == ["bench.json", "bench.md", "bench.svg"]
    result = read(written / "out" / "bench.json")
    assert result["complete"] is True
    assert result["settings"]["batches"] == [1, 3]
    assert result["settings"]["pairs"] == 1
    measured = [(entry["batch"], entry["output"]) for entry in result["cases"] if entry["failed"] is None]
    assert measured == [(batch, output) for batch in (1, 3) for output in ("plain", "maps", "tokens")]
    for entry in result["cases"]:
        if entry["failed"] is None:
            assert entry["torch_threads"] == 1
            assert entry["images_per_second"] > 0
            assert 0 <= entry["largest_error"] < 1e-5
            assert len(entry["against"]["plain"]["a"]["all"]) == 1


@pytest.mark.slow
def test_images_of_another_size(tmp_path: Path, model_folder: Path) -> None:
    assert run(options(tmp_path, model_folder, image_size="16x48", memory=True)) == 0
    result = read(tmp_path / "out" / "bench.json")
    assert result["settings"]["image_size"] == [16, 48]
    assert all(entry["failed"] is None and entry["memory"]["shown_mb"] > 0 for entry in result["cases"])
    assert "images have 16 × 48 pixels" in (tmp_path / "out" / "bench.md").read_text(encoding="utf-8")
    built = outputs.module(str(model_folder), image_size=(16, 48))
    assert outputs.Case.of(built, 2).images.shape == (2, 3, 16, 48)
    assert run(options(tmp_path, model_folder, image_size="20")) != 0
    (entry,) = read(tmp_path / "out" / "bench.json")["cases"]
    assert "images of 20 × 20 pixels are not whole patches of 8 × 8" in entry["failed"]["reason"]
    with pytest.raises(ClipfastError, match="--image-size is '2x': give HEIGHTxWIDTH"):
        run(options(tmp_path, model_folder, image_size="2x"))


def test_a_refused_model_is_a_row_and_the_exit_code(written: Path) -> None:
    refused = [row for row in rows(read(written / "out" / "bench.json")) if row.failed]
    assert [row.case for row in refused] == [
        "convnext_large_d, batch 1, fp32, auto",
        "convnext_large_d, batch 3, fp32, auto",
    ]
    assert all("nonlinear projection" in (row.failed or "") for row in refused)
    assert (written / "code").read_text() == "2"
    errors = [line for line in (written / "stderr").read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 + 1
    assert errors[-1] == "error: 2 of 8 rows were not measured"
    assert "Traceback" not in (written / "stderr").read_text()


def test_the_same_table_on_stdout_and_in_markdown(written: Path) -> None:
    lines = (written / "stdout").read_text().splitlines()
    assert lines[0].startswith("# case\toutput\timages/s\ttime\t× plain\t")
    assert len(lines) == 1 + 8
    markdown = (written / "out" / "bench.md").read_text()
    for line in lines[1:]:
        assert f"| {' | '.join(line.split(chr(9)))} |" in markdown


def test_the_chart_is_drawn_again_from_the_json_alone(written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    copy.write_bytes((written / "out" / "bench.json").read_bytes())
    done = clipfast("bench", "--chart", copy)
    assert (done.returncode, done.stdout.strip()) == (0, f"chart: {tmp_path / 'copy.svg'}")
    assert (tmp_path / "copy.svg").read_bytes() == (written / "out" / "bench.svg").read_bytes()
    assert ElementTree.parse(tmp_path / "copy.svg").getroot().tag.endswith("svg")


def test_comparing_two_files(written: Path, tmp_path: Path) -> None:
    result = json.loads((written / "out" / "bench.json").read_text())
    for entry in result["cases"]:
        if entry["failed"] is None:
            entry["images_per_second"] *= 2
    result["cases"] = [entry for entry in result["cases"] if entry["output"] != "maps"]
    result["machine"]["device_name"] = "another"
    (tmp_path / "new.json").write_text(json.dumps(result))
    done = clipfast("bench", "--compare", written / "out" / "bench.json", tmp_path / "new.json")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    table = [line.split("|")[4].strip() for line in lines if line.startswith("| ")][2:]
    assert table == ["2.000"] * 4  # plain and tokens, two batches
    assert sum(line.startswith("- only in A:") and ": maps" in line for line in lines) == 2
    assert any(line.startswith("- machine device_name:") and line.endswith("another in B") for line in lines)


def test_files_that_cannot_be_compared_are_refused_with_one_line(written: Path, tmp_path: Path) -> None:
    good, other = written / "out" / "bench.json", tmp_path / "other.json"
    other.write_text('{"format": "clipfast.benchmark/1"}')
    for pair, said in (
        ((good, tmp_path / "gone.json"), "No such file"),
        ((other, good), "is not a result of `clipfast bench`"),
        ((good, good.with_suffix(".md")), "is not JSON"),
    ):
        done = clipfast("bench", "--compare", *pair)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert said in line
    result = json.loads(good.read_text()) | {"cases": []}
    other.write_text(json.dumps(result))
    done = clipfast("bench", "--compare", good, other)
    assert done.returncode == 2
    assert "only in A" in done.stdout
    assert done.stderr.splitlines() == [f"error: no case is measured in both {good} and {other}"]


def test_results_are_looked_at_without_loading_torch(written: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from clipfast.commands.bench.results import compare_files
compare_files(Path({str(written / "out" / "bench.json")!r}), Path({str(written / "out" / "bench.json")!r}))
print([name for name in ("torch", "open_clip") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_json_is_all_that_reaches_stdout(tmp_path: Path, model_folder: Path) -> None:
    done = clipfast(
        "bench", "--model", model_folder, "--batch", 1, "--outputs", "plain", *QUICK, "--json", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "bench.json").read_text())
    assert "random weights" not in done.stderr


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_is_done(tmp_path: Path, model_folder: Path) -> None:
    batches = [part for batch in range(1, 200) for part in ("--batch", batch)]
    process = start("bench", "--model", model_folder, *batches, *QUICK, "--outputs", "heads", "--out", tmp_path)
    assert process.stderr is not None
    line = process.stderr.readline()
    while not line.startswith("[1/199]"):  # a machine that is busy is warned about first
        line = process.stderr.readline()
        assert line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    result = read(tmp_path / "bench.json")
    assert result["complete"] is False
    assert 0 < len(result["cases"]) < 199
    assert said == f"error: interrupted: {len(result['cases'])} of 199 are done"
    assert len(out.splitlines()) == 1 + len(result["cases"])
    assert "**Interrupted" in (tmp_path / "bench.md").read_text()
    assert not list(tmp_path.glob(".*"))


# ------------------------------------------------------------ the same code without a process of its own


def test_a_wrong_result_is_not_timed_and_exits_with_1(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = outputs.heads_only

    def wrong(*given: Any) -> Any:
        result, heads = right(*given)
        return result, heads + 1e-3

    monkeypatch.setattr(outputs, "heads_only", wrong)
    assert run(options(tmp_path, model_folder)) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.out.splitlines() if "\theads\t" in line]
    _, _, speed, time, factor, error, reason = line.split("\t")
    assert (speed, time, factor, error) == ("", "", "", "")
    assert reason.startswith("wrong result: not timed: ")
    assert "1 of 2 rows were not measured" in captured.err
    assert rows(read(tmp_path / "out" / "bench.json"))[0].images_per_second is not None


def test_out_of_memory_exits_with_2(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outputs, "heads_only", lambda model, images: torch.empty(1 << 60))
    assert run(options(tmp_path, model_folder)) == 2
    assert "heads: out of memory: try a smaller --batch" in capsys.readouterr().err


def test_an_internal_error_keeps_what_was_measured(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = iter(bench.measure_plan(bench.plan_of(options(tmp_path, model_folder))))

    def breaking(_: object) -> Any:
        yield next(first)
        raise KeyError("x")

    monkeypatch.setattr(bench, "measure_plan", breaking)
    with pytest.raises(KeyError):
        run(options(tmp_path, model_folder))
    result = read(tmp_path / "out" / "bench.json")
    assert [entry["output"] for entry in result["cases"]] == ["plain"]
    assert result["complete"] is False


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ["ViT-B-23"]}, "no model is called 'ViT-B-23': did you mean ViT-B-32"),
        ({"backend": ["abacus"]}, "unknown backend 'abacus'"),
        ({"outputs": ["heads,tails"]}, "--outputs does not know 'tails'"),
        ({"batch": [0]}, "--batch is 0"),
        ({"device": "gpu"}, "no device is called 'gpu'"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"out": Path("/proc/clipfast")}, "cannot write to /proc/clipfast"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(
    tmp_path: Path, model_folder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ClipfastError) as caught:
        run(options(tmp_path, model_folder, **changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


def test_a_busy_machine_is_warned_about(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for load, warned in ((7.5, True), (0.1, False)):
        monkeypatch.setattr(bench, "moment", lambda load=load: {"load_average": load})
        bench._warn_when_busy()
        assert ("load average 7.5" in capsys.readouterr().err) is warned


def test_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "set_up", lambda: None)
    asked: list[Options] = []
    monkeypatch.setattr(command, "run", lambda options: asked.append(options) or 0)
    assert command_line(["bench"]) == 0
    assert asked.pop() == Options()
    given = "--model a --model b --batch 1 --batch 2 --dtype bf16 --dtype fp64 --backend eager --outputs plain,maps"
    more = "--texts 4 --device cpu --threads 2 --pairs 3 --warmup 1 --naive --compile --no-memory --out x --json"
    assert command_line(["bench", *given.split(), *more.split()]) == 0
    assert asked.pop() == Options(
        model=["a", "b"],
        batch=[1, 2],
        dtype=["bf16", "fp64"],
        backend=["eager"],
        outputs=["plain,maps"],
        texts=4,
        device="cpu",
        threads=2,
        pairs=3,
        warmup=1,
        naive=True,
        compile=True,
        memory=False,
        out=Path("x"),
        json=True,
    )
    for wrong in (["--batch", "0"], ["--dtype", "int8"], ["--pairs", "0"], ["--warmup", "-1"], ["--compare", "a.json"]):
        assert command_line(["bench", *wrong]) == 2, wrong
    assert asked == []
