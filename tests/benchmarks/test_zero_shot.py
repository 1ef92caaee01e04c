"""The bundled model's accuracy as a page: that the command runs, and that the committed page is that of its figures."""

import json
from pathlib import Path

import pytest

from benchmarks import zero_shot
from benchmarks.results import FOLDER


@pytest.mark.slow
def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero_shot.main(["--scenes", "60", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "zero_shot.json").read_text())
    assert document["result"]["attributes"]["background"]["accuracy"] > 0.9
    assert capsys.readouterr().out.strip() == (tmp_path / "zero_shot.md").read_text().strip()


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    document = json.loads((FOLDER / "zero_shot.json").read_text())
    assert document["result"]["passed"]
    assert document["code"]["dirty"] is False
    assert zero_shot.page(document) == (FOLDER / "zero_shot.md").read_text()
