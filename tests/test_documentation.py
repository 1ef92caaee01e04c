"""Every code block of the README and the documentation runs, every link leads somewhere."""

import re
from pathlib import Path

import pytest
import torch
from builders import ROOT
from page_blocks import LANGUAGES, REASONS, Block, blocks, check, commands, pages, run

from clipfast.cli.app import COMMANDS, app
from clipfast.kernels.registration import operations

PAGES = list(pages())
BLOCKS = {page: blocks(page) for page in PAGES}
OPERATIONS = "docs/kernels/operations.md"
OPTIONS = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", app.generate_docs(output_format="markdown")))
SUITE_OPTIONS = {"--budget", "--only", "--again", "--wheels", "--dry-run"}
OTHER_OPTIONS = {"--pairs", "--threads", "--device", "--reference", "--write", "--commit"} | SUITE_OPTIONS
"""Of the benchmarks."""


def test_pages_are_found() -> None:
    assert {"README.md", "docs/index.md", "docs/tutorial.md", OPERATIONS} <= set(PAGES)
    assert sum(map(len, BLOCKS.values())) >= 40


FIRST_PAGES = {"README.md", "docs/index.md", "docs/tutorial.md"}
"""Those that a new user reads first; the blocks of all others are slow tests."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if page in FIRST_PAGES else [pytest.mark.slow]) for page in PAGES if BLOCKS[page]],
)
def test_code_blocks_run(page: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    run(page, tmp_path)


def test_every_block_names_a_language_and_a_reason() -> None:
    every = [block for page in PAGES for block in BLOCKS[page]]
    assert [str(block) for block in every if block.language not in LANGUAGES] == []
    assert [str(block) for block in every if block.reason not in {None, *REASONS}] == []


def test_most_blocks_run() -> None:
    """Blocks of commands that are only checked by name (make, pip) count as run; there is nothing to run in them."""
    every = [block for page in PAGES for block in BLOCKS[page] if block.language in {"python", "shell"}]
    assert sum(block.reason is None for block in every) >= 0.75 * len(every)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    (python,) = [block for block in BLOCKS["README.md"] if block.language == "python"]
    assert len(python.code.splitlines()) <= 10


def test_every_operation_has_a_short_example() -> None:
    text = (ROOT / OPERATIONS).read_text(encoding="utf-8")
    headings = re.findall(r"^## (\w+)$", text, re.MULTILINE)
    assert set(headings) == set(operations())
    assert len(BLOCKS[OPERATIONS]) == len(headings) + 1  # and the common start
    assert max(len(block.code.splitlines()) for block in BLOCKS[OPERATIONS]) <= 10


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    generated = {"commands.md"}
    missing = [
        target
        for target in targets
        if not target.startswith(("http:", "https:"))
        and target.rpartition("/")[2] not in generated
        and not (ROOT / page).parent.joinpath(target).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_exist(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    if page == "CHANGELOG.md":  # has commands of earlier versions
        return
    for span in re.findall(r"`([^`\n]+)`", text):
        words = span.split()
        if span.startswith(("make ", "python -m ")):
            check(shell(span))
        elif len(words) > 1 and words[0] == "clipfast" and words[1][0].islower():
            assert words[1] in COMMANDS, span
            assert {word for word in words if word.startswith("--")} <= OPTIONS, span
        elif words[0].startswith("--"):
            assert words[0] in OPTIONS | OTHER_OPTIONS, f"{page}: {span}"


def shell(code: str) -> Block:
    return Block("page.md", 1, "shell", code, "needs a GPU")


def python(code: str) -> Block:
    return Block("page.md", 1, "python", code, "needs a GPU")


@pytest.mark.parametrize(
    "block",
    [
        shell("clipfast collect images --no-such-option"),
        shell("clipfast no-such-command images"),
        shell("make no-such-target"),
        shell("python -m benchmarks.no_such_module"),
        shell("python -m pytest benchmarks/no_such_file.py"),
        shell("curl -O file"),
        python("import clipfast.no_such_module"),
        python("from clipfast import no_such_name"),
        python("clipfast.no_such_function()"),
        python("clipfast.load('scenes', no_such_argument=1)"),
        python("model.no_such_method()"),
        python("model.decompose(images, no_such_argument=1)"),
    ],
    ids=lambda block: block.code,
)
def test_a_wrong_name_in_a_block_that_is_not_run_is_noticed(block: Block) -> None:
    with pytest.raises((AssertionError, ImportError)):
        check(block)


def test_right_names_in_a_block_that_is_not_run() -> None:
    check(shell("clipfast collect images --out out \\\n    --batch-size 8  # a comment\nmake test\ncd ..\n"))
    check(
        python("import torch\nmodel = clipfast.load('scenes', device='cuda', dtype=torch.bfloat16)\nmodel.tower.heads")
    )


def test_blocks_are_read_with_their_marks() -> None:
    text = "a\n\n```shell\nmake \\\n  test  # x\n```\n\n<!-- not run: needs a GPU -->\n```python\nx = 1\n```\n"
    first, second = blocks("page.md", text)
    assert (first.language, first.line, first.reason) == ("shell", 4, None)
    assert commands(first.code) == [["make", "test"]]
    assert (second.code, second.line, second.reason) == ("x = 1\n", 10, "needs a GPU")


def test_a_failing_block_fails_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr("page_blocks.ROOT", tmp_path)
    page.write_text("```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError):
        run("page.md", tmp_path)
    page.write_text("```shell\nclipfast textspan no-such-folder\n```\n")
    with pytest.raises(AssertionError, match="ended with 2"):
        run("page.md", tmp_path)
