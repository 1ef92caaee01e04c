"""Result files: writing, reading, errors, and tables."""

import json
from pathlib import Path
from typing import Any

import pytest
from documents import entry, failure, result, timing

from clipfast.bench.document import FORMAT, document, provenance, read, rows
from clipfast.bench.plan import Plan
from clipfast.bench.table import cells, markdown
from clipfast.errors import InputError


def test_document_has_provenance() -> None:
    written = document(Plan(models=("scenes",)).to_json(), [entry()], complete=False)
    assert written["format"] == FORMAT
    assert written["complete"] is False
    assert {"device_name", "cores"} <= set(written["machine"])
    assert {"clipfast", "torch", "python"} <= set(written["versions"])
    assert set(written["code"]) == {"commit", "dirty"}
    assert written["settings"]["models"] == ("scenes",)
    assert written["settings"]["float32_matmul_precision"] == "highest"
    assert written["backends"]["eager"] == []
    assert rows(json.loads(json.dumps(written, allow_nan=False))) == rows(written)


def test_read_returns_the_written_cases(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(result(entry(), failure())))
    heads, maps = rows(read(tmp_path / "bench.json"))
    assert heads.name == "ViT-B-32, batch 8, fp32, auto: heads"
    assert (heads.milliseconds, heads.images_per_second, heads.memory_mb, heads.error) == (400.0, 20.0, 1500.0, 2e-7)
    assert heads.against["plain"].median == 1.25
    assert maps.failed == "out of memory: try a smaller --batch"
    assert (maps.images_per_second, maps.memory_mb, dict(maps.against)) == (None, None, {})


def without(document: dict[str, Any], *path: str) -> dict[str, Any]:
    """A copy of a result without the entry at ``path``; a list is entered at its first item."""
    copied = json.loads(json.dumps(document))
    inner = copied
    for key in path[:-1]:
        inner = inner[key][0] if key == "cases" else inner[key]
    del inner[path[-1]]
    return copied


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("\x00", "is not JSON"),
        ("[]", "does not say that its format is"),
        ('{"cases": []}', "does not say that its format is"),
        ('{"format": "clipfast.benchmark/1", "cases": {}}', "its format is 'clipfast.benchmark/1'"),
        (json.dumps(without(result(entry()), "machine")), "is damaged: KeyError 'machine'"),
        (json.dumps(without(result(entry()), "complete")), "is damaged: KeyError 'complete'"),
        (json.dumps(without(result(entry()), "cases", "against")), "is damaged: KeyError 'against'"),
        (json.dumps(without(result(entry()), "cases", "memory", "shown_mb")), "is damaged: KeyError 'shown_mb'"),
        (json.dumps(result(entry(images_per_second="fast"))), "is damaged: ValueError"),
        (json.dumps(result(entry(images_per_second=float("nan")))), "is damaged: ValueError nan where a number"),
        (json.dumps(result() | {"cases": 3}), "is damaged: TypeError"),
        (json.dumps(result() | {"machine": "a computer"}), "is damaged: TypeError"),
    ],
)
def test_invalid_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "gone.json")
    with pytest.raises(InputError, match="a folder, not a file"):
        read(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe4"}')
    with pytest.raises(InputError, match="is not JSON"):
        read(tmp_path / "latin.json")


def test_provenance() -> None:
    assert provenance(result(entry())) == (
        "AMD EPYC, 2 cores, 2 threads; python 3.11.7, torch 2.14.1; commit 0123456789."
    )
    installed = result(entry(), code={"commit": None, "dirty": None})
    assert provenance(installed) == "AMD EPYC, 2 cores, 2 threads; python 3.11.7, torch 2.14.1."


# ------------------------------------------------------------------------------------------------------------ tables


def test_table_has_only_columns_with_values() -> None:
    headers, lines = cells(result(entry(memory=None)))
    assert headers == ["case", "output", "images/s", "time", "× plain", "largest error"]
    assert lines == [["ViT-B-32, batch 8, fp32, auto", "heads", "20", "400 ms", "1.25 (1.12–1.38)", "2.0e-07"]]
    both = {"plain": timing(1.0), "naive tokens": timing(16.0), "plain compiled": timing(0.8)}
    headers, lines = cells(result(entry("plain"), entry("tokens", against=both), failure()))
    assert headers[4:] == ["× plain", "× compiled", "× naive", "peak memory", "largest error", "not measured"]
    assert [line[6] for line in lines] == ["", "16 (14.4–17.6)", ""]
    assert lines[1][7] == "1.50 GB"
    assert lines[2][2:] == ["", "", "", "", "", "", "", "out of memory: try a smaller --batch"]


def test_markdown_escapes_reasons() -> None:
    text = markdown(result(entry(), failure(reason="a | b\nc")))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2
    assert {line.replace("\\|", "").count("|") for line in lines} == {9}
    assert "a \\| b c" in lines[-1]
    assert "commit 0123456789" in text
    assert "Interrupted" not in text
    assert "**Interrupted" in markdown(result(entry(), complete=False))
