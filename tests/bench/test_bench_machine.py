"""The description of machine and code in a result."""

import subprocess
from pathlib import Path

import pytest

from clipfast.bench import machine


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.example", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def test_code_of_a_checkout_is_its_commit_and_state(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", checkout)
    commit = git(checkout, "rev-parse", "HEAD")
    assert machine.code() == {"commit": commit, "dirty": False}
    (checkout / "file").write_text("two")
    assert machine.code() == {"commit": commit, "dirty": True}


def test_results_do_not_make_a_checkout_dirty(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", checkout)
    (checkout / "benchmarks" / "results").mkdir(parents=True)
    (checkout / "benchmarks" / "results" / "new.json").touch()
    assert machine.code()["dirty"] is False
    (checkout / "measured").mkdir()
    (checkout / "measured" / "new.json").touch()
    assert machine.code()["dirty"] is True
    assert machine.code([checkout / "measured"])["dirty"] is False
    assert machine.code([checkout / "measured", Path("/elsewhere")])["dirty"] is False


def test_installation_inside_another_repository_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = checkout / ".venv" / "lib" / "site-packages"
    installed.mkdir(parents=True)
    monkeypatch.setattr(machine, "ROOT", installed)
    assert machine.code() == {"commit": None, "dirty": None}


def test_root_is_the_checkout() -> None:
    assert Path(__file__).resolve().parents[2] == machine.ROOT
