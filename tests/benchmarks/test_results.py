"""Result files: their metadata, rejected results, and tables."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import FORMAT, Results
from benchmarks.table import FOLDER, PAGES, main, table, written
from clipfast.bench import machine
from clipfast.bench.measuring import Bar, Check, Comparison, WrongResult
from clipfast.bench.memory import Peak

GOOD = Comparison((1.0, 2.0, 1.0), (2.0, 3.0, 3.0), (Check("check()", 1e-7, 1e-5),))


def record(results: Results, case: str = "ViT-B-32", comparison: Comparison = GOOD) -> dict[str, Any]:
    return results.compared(
        case,
        comparison,
        a="decomposed",
        b="plain",
        settings={"model": "ViT-B-32", "batch": 8, "threads": 2},
        memory=(Peak(100.0, 230.0, "VmHWM"), Peak(100.0, 200.0, "VmHWM")),
        bars=(Bar("times as fast", comparison.ratio, 1.05, at_least=True),),
    )


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results("forward", "Is it faster?", folder=tmp_path)


def test_file_has_metadata_and_cases(results: Results) -> None:
    record(results)
    document = json.loads(results.path.read_text())
    assert document["format"] == FORMAT
    assert document["sentence"] == "Is it faster?"
    assert {"device", "device_name", "cpu", "cores", "memory_gb"} <= set(document["machine"])
    assert {"python", "torch", "open_clip_torch", "triton"} <= set(document["versions"])
    assert set(document["code"]) == {"commit", "dirty"}
    case = document["cases"]["ViT-B-32"]
    assert case["settings"]["batch"] == 8
    assert case["taken"].endswith("+00:00")
    assert case["checks"] == [{"name": "check()", "error": 1e-7, "bound": 1e-5}]
    assert case["ratio_b_over_a"]["median"] == 2.0
    assert case["ratio_b_over_a"]["all"] == [2.0, 1.5, 3.0]
    assert case["a"]["seconds"]["median"] == 1.0
    assert case["memory"]["increment_ratio_a_over_b"] == pytest.approx(1.3)
    assert case["bars"] == [{"what": "times as fast", "value": 2.0, "at_least": 1.05, "met": True}]


def test_file_is_named_by_question_and_machine(results: Results) -> None:
    assert results.path.name.startswith("forward-")
    described = {"device": "cpu", "device_name": "AMD EPYC(TM) 9654 Processor @ 2.4GHz", "cores": 2}
    assert machine.slug(described) == "amd-epyc-9654-2-cores"
    assert machine.slug({"device": "cuda", "device_name": "NVIDIA H200", "cores": 16}) == "nvidia-h200"


@pytest.mark.parametrize("checks", [(), (Check("heads", 1.0, 1e-5),), (Check("heads", float("nan"), 1e-5),)])
def test_wrong_result_is_not_recorded(results: Results, checks: tuple[Check, ...]) -> None:
    with pytest.raises(WrongResult):
        record(results, comparison=Comparison((1.0,), (2.0,), checks))
    assert not results.path.exists()


def test_cases_of_another_commit_are_dropped(tmp_path: Path, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    record(results)
    record(results, "ViT-B-16")
    assert list(json.loads(results.path.read_text())["cases"]) == ["ViT-B-32", "ViT-B-16"]
    monkeypatch.setattr(machine, "code", lambda results: {"commit": "f" * 40, "dirty": False})
    record(Results("forward", "Is it faster?", folder=tmp_path), "ViT-L-14")
    assert list(json.loads(results.path.read_text())["cases"]) == ["ViT-L-14"]


def test_damaged_file_is_replaced(results: Results) -> None:
    results.path.write_text("{")
    record(results)
    assert list(json.loads(results.path.read_text())["cases"]) == ["ViT-B-32"]


def test_table_names_machine_and_commit(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "code", lambda results: {"commit": "0123456789abcdef", "dirty": True})
    results = Results("forward", "Is it faster?", folder=results.path.parent)
    record(results)
    text = table(json.loads(results.path.read_text()))
    assert "commit 0123456789 with local changes" in text
    assert machine.cpu_name() in text
    row = text.splitlines()[-1]
    assert row.startswith(
        "| ViT-B-32, batch 8 | decomposed 1 s | plain 3 s | 2 (1.6–2.8) | 230 MB / 200 MB | 1.0e-07 |"
    )
    assert "2 ≥ 1.05 met" in row


def test_every_committed_result_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The command skips files of other formats."""
    main([])
    printed = capsys.readouterr().out
    for file in FOLDER.glob("*.json"):
        document = json.loads(file.read_text(encoding="utf-8"))
        assert (document.get("sentence", "no sentence") in printed) == (document.get("format") == FORMAT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_have_the_tables_of_the_committed_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    marked = questions(text)
    assert len(marked) == text.count("<!-- end of results -->") == len(set(marked)) >= 1
    assert written(text) == text, "run: python -m benchmarks.table --write"


def test_every_question_with_results_is_on_a_page() -> None:
    measured = {file.name.split("-")[0] for file in FOLDER.glob("*-*.json")} | {"truth"}
    shown = [question for page in PAGES for question in questions(page.read_text(encoding="utf-8"))]
    assert measured <= set(shown)
    assert {"forward", "truth"} <= set(questions(PAGES[0].read_text(encoding="utf-8")))


def questions(text: str) -> list[str]:
    return [line.split()[2] for line in text.splitlines() if line.startswith("<!-- results: ")]


def test_page_gets_the_tables_of_its_questions(results: Results) -> None:
    page = "before\n<!-- results: {} -->\nold\n<!-- end of results -->\nafter\n"
    empty = written(page.format("forward"), results.path.parent)
    assert "*Not measured yet: `benchmarks/bench_forward.py`.*" in empty
    record(results)
    filled = written(empty, results.path.parent)
    assert table(json.loads(results.path.read_text())) in filled
    assert filled.startswith("before\n<!-- results: forward -->\n\n**")
    assert filled.endswith("|\n\n<!-- end of results -->\nafter\n")
    assert written(filled, results.path.parent) == filled
    assert "old" not in filled + empty
    assert "Is it faster?" not in written(page.format("naive"), results.path.parent)
