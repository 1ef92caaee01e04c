"""The README's experiments run as they are written, one after the other."""

import contextlib
import re
from pathlib import Path

import pytest
from builders import ROOT

from clipfast.commands.scenes import Options, run

LONGEST = 10  # lines of one experiment


def blocks() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## The experiments, in Python\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_experiments_are_short() -> None:
    found = blocks()
    assert len(found) >= 8
    assert max(sum(bool(line.strip()) for line in block.splitlines()) for block in found) <= LONGEST


def test_experiments_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Options(tmp_path / "out" / "scenes", count=48)) == 0
    capsys.readouterr()
    names: dict[str, object] = {}
    with contextlib.chdir(tmp_path):
        for block in blocks():
            exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "L5.H0" in printed
    assert "torch.Size([1, 65, 5])" in printed
