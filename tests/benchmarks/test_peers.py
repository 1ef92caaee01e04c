"""Other packages: their answers against clipfast's, where they are installed, and what is said where they are not."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, peers, table
from benchmarks.clip_text_span import Clip
from benchmarks.peers import __main__ as command
from benchmarks.peers import conversions, measuring
from benchmarks.peers.question import Inputs, NotPossible, Peer, Question, Side, error
from benchmarks.peers.transformers import PEER
from benchmarks.results import FORMAT, Results
from clipfast.bench.measuring import Check, Comparison, WrongResult
from clipfast.bench.memory import Peak

ROOT = Path(__file__).resolve().parents[2]
SCENES = ["--model", "scenes", "--batch", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs.of("scenes", 2, torch.get_num_threads())


@pytest.mark.parametrize("question", PEER.questions, ids=lambda question: question.name)
def test_transformers_agrees(question: Question, inputs: Inputs) -> None:
    ours, theirs = question.ours(inputs.copied()), question.theirs(inputs.copied())
    check = question.check(ours.answer(), theirs.answer())
    assert check.passed, check


@pytest.mark.parametrize("name", [name for name in peers.PEERS if name not in ("transformers", "clip-text-span")])
def test_installed_package_agrees(name: str) -> None:
    """In a process of its own: some packages change torch when they are imported."""
    if measuring.load(name).missing() is not None:
        pytest.skip(f"{name} is not installed: it is no dependency")
    arguments = [sys.executable, "-m", "benchmarks.peers", "--only", name, "--dry-run", *SCENES]
    done = subprocess.run(arguments, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees to" in done.stdout


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_peer_is_described(name: str) -> None:
    peer = measuring.load(name)
    assert len({question.name for question in peer.questions}) == len(peer.questions) > 0
    for question in peer.questions:
        assert question.asked
        assert question.fair.endswith(".")


def test_model_is_the_same_in_transformers(inputs: Inputs) -> None:
    model = conversions.to_transformers(inputs.vision.visual)
    with torch.inference_mode():
        theirs, own = model(pixel_values=inputs.images).image_embeds, inputs.vision.encode_image(inputs.images)
    assert error(theirs, own) < 1e-5


def test_wrong_answer_is_neither_timed_nor_written(tmp_path: Path) -> None:
    question = next(question for question in PEER.questions if question.name == "heads' contributions")
    swapped = replace(question, ours=lambda inputs: _swapped(question.ours(inputs)))
    results = Results(peers.QUESTION, peers.SENTENCE, folder=tmp_path)
    with pytest.raises(WrongResult, match="heads' contributions"):
        measuring.measure("transformers", swapped, measuring.Setting("scenes", 1, 1), 1, results, lambda line: None)
    assert not results.path.exists()


def _swapped(side: Side) -> Side:
    """The same answer with two heads in each other's place."""

    def answer() -> torch.Tensor:
        heads = side.answer()
        assert isinstance(heads, torch.Tensor)
        return heads[:, :, [1, 0, *range(2, heads.shape[2])]]

    return Side(answer)


def test_answers_of_other_shapes_or_with_nan_are_wrong() -> None:
    right = torch.ones(2, 3)
    assert error(right, right) == 0
    assert error([right, right], [right, right + 1]) == 0.5
    for wrong in (torch.ones(3, 2), torch.full((2, 3), torch.nan)):
        assert math.isnan(error(wrong, right))
    assert math.isnan(error([right], [right, right]))
    assert math.isnan(error(torch.zeros(2), torch.zeros(2)))


def test_missing_package_is_one_line_and_stands_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = replace(PEER, name="Gone", distribution="gone-package", module="a_missing_package.inside")
    monkeypatch.setattr(measuring, "load", lambda name: gone)
    assert command.main(["--only", "legrad", "--out", str(tmp_path), *SCENES]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gone.questions)
    reason = "not run: not installed: pip install gone-package"
    assert lines[0] == f"Gone: attention of the class token, scenes, batch 2: {reason}"
    page = peers.tables(tmp_path)
    assert "- Gone, attention of the class token: not run, not installed: pip install gone-package" in page
    assert "|" not in page


def test_package_that_fails_is_one_line_with_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(inputs: Inputs) -> Side:
        raise AttributeError("'Block' has no attribute 'attn'\nmore lines")

    def refused(inputs: Inputs) -> Side:
        raise NotPossible("no bridge to this tower")

    for failing, reason in ((broken, "AttributeError: 'Block' has no attribute 'attn'"), (refused, "no bridge")):
        question = replace(PEER.questions[0], theirs=failing)
        measuring.measure("transformers", question, measuring.Setting("scenes", 1, 1), None, None, print)
        (line,) = capsys.readouterr().out.splitlines()
        assert reason in line


def test_package_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_broken_package.py").write_text("raise ImportError('needs torch 1')\n")
    monkeypatch.syspath_prepend(tmp_path)
    reason = Peer("Broken", "broken", "a_broken_package", ()).missing()
    assert reason == f"cannot be imported with torch {torch.__version__}: ImportError: needs torch 1"


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "clip-text-span", "--dry-run", "--out", str(tmp_path), *SCENES]) == 0
    assert capsys.readouterr().out.count("not run: no checkout of the published code: give --clip-text-span PATH") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.slow
def test_published_code_answers_from_its_own_process(number: int, checkout: Path, visual: Any) -> None:
    texts = cases.unit_texts(visual.output_dim, count=2)
    inputs = Inputs("any", Clip(visual), cases.noise(visual, 2), texts, 1, checkout)
    question = measuring.load("clip-text-span").questions[number]
    theirs = question.theirs(inputs)
    try:
        assert question.check(question.ours(inputs).answer(), theirs.answer()).passed
        assert theirs.run is not None
        assert theirs.run() is not None
        assert theirs.peak is not None
        assert theirs.peak().peak_mb > 100
    finally:
        theirs.close()


def test_published_code_that_fails_says_why(checkout: Path, visual: Any) -> None:
    (checkout / "prs_hook.py").write_text("import a_missing_package\ndef hook_prs_logger(): ...\n")
    inputs = Inputs("any", Clip(visual), cases.noise(visual, 1), torch.empty(0, 1), 1, checkout)
    with pytest.raises(NotPossible, match="No module named 'a_missing_package'"):
        measuring.load("clip-text-span").questions[0].theirs(inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "other"], "invalid choice: 'other'"),
        (["--pairs", "0"], "--pairs is 0: at least 1 is needed"),
        (["--batch", "0"], "--batch is 0: at least 1 is needed"),
        (
            ["--clip-text-span", "."],
            "--clip-text-span . is not a checkout of the published code: it has no prs_hook.py",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "transformers", "--dry-run", "--model", "ViT-B-31"]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert "ViT-B-31" in line


@pytest.mark.slow
def test_result_has_time_memory_and_version(tmp_path: Path) -> None:
    question = PEER.questions[0]
    results = Results(peers.QUESTION, peers.SENTENCE, folder=tmp_path)
    measuring.measure("transformers", question, measuring.Setting("scenes", 1, 1), 1, results, lambda line: None)
    document = json.loads(results.path.read_text())
    (case,) = document["cases"].values()
    assert document["format"] == FORMAT
    assert case["settings"]["version"] == PEER.version()
    assert case["pairs"] == 1
    assert 0 <= case["checks"][0]["error"] <= question.bound
    assert case["memory"]["a"]["peak_mb"] > 100 < case["memory"]["b"]["peak_mb"]
    assert f"| transformers {PEER.version()} | {question.name} | scenes, batch 1 |" in peers.tables(tmp_path)


def record(folder: Path, model: str, seconds: tuple[float, float], **settings: Any) -> None:
    described = {"peer": "Other", "version": "1.2", "question": "heads", "asked": "every head", "fair": "By hooks."}
    described |= {"model": model, "images": 8} | settings
    Results(peers.QUESTION, peers.SENTENCE, folder=folder).compared(
        f"{model} {described['question']}",
        Comparison((seconds[0],), (seconds[1],), (Check("heads", 2e-7, 1e-5),)),
        a="clipfast",
        b="Other",
        settings=described,
        memory=(Peak(100.0, 230.0, "VmHWM"), Peak(100.0, 200.0, "VmHWM")),
    )


def test_page_keeps_the_rows_where_a_package_is_faster(tmp_path: Path) -> None:
    record(tmp_path, "ViT-B-32", (2.0, 1.0))
    record(tmp_path, "ViT-B-16", (1.0, 3.0))
    page, short = peers.tables(tmp_path), peers.summary(tmp_path)
    slower = "| Other 1.2 | heads | ViT-B-32, batch 8 | 2 s | 1 s | 0.5 (0.5–0.5) | 230 MB / 200 MB | 130 MB / 100 MB |"
    assert slower in page
    assert slower in short
    assert "| ViT-B-16, batch 8 | 1 s | 3 s | 3 (3–3) |" in page
    assert "ViT-B-16" not in short
    assert page.count("- **Other, heads**: every head. By hooks.") == 1


def test_tables_say_that_nothing_was_measured(tmp_path: Path) -> None:
    for question in ("peers", "peers_summary"):
        assert table.tables(question, tmp_path) == "*Not measured yet: `python -m benchmarks.peers`.*"
