"""Code blocks of Markdown pages, and running them as a reader would: in order, in one folder per page.

Two comments change what happens to a page's blocks. Readers of the rendered page do not see them.

* ``<!-- files: a.jpg b.jpg -->`` draws images under these names before the page runs.
* ``<!-- not run: REASON -->`` before a block: it is checked (:func:`check`), not run. The reasons are :data:`REASONS`.
"""

import ast
import contextlib
import importlib.util
import inspect
import io
import logging
import re
import shlex
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders import ROOT
from cyclopts import CycloptsError
from PIL import Image

import clipfast
from clipfast.cli.app import app
from clipfast.cli.app import run as run_command_line
from clipfast.scenes.drawing import render_with_masks
from clipfast.scenes.scene import sample_scene

REASONS = {"downloads", "needs a GPU", "takes minutes", "needs your own files", "needs a package"}
"""Why a block is not run."""
LANGUAGES = {"python", "shell", "json", "text"}
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
_MARK = re.compile(r"<!-- not run: (.*?) -->\s*$")
_FILES = re.compile(r"<!-- files: (.*?) -->")


@dataclass(frozen=True)
class Block:
    """One fenced code block.

    Attributes:
        page: path from the repository's root.
        line: of its first line of code, from 1.
        reason: why it is not run, or None.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str | None = None) -> list[Block]:
    """The code blocks of a page in order."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    result = []
    for match in _FENCE.finditer(text):
        mark = _MARK.search(text[: match.start()])
        line = text[: match.start("code")].count("\n") + 1
        reason = mark[1] if mark else None
        result.append(Block(page, line, match["language"], textwrap.dedent(match["code"]), reason))
    return result


def files(page: str) -> list[str]:
    """Names of the images that a page's examples read."""
    return [name for names in _FILES.findall((ROOT / page).read_text(encoding="utf-8")) for name in names.split()]


def draw(folder: Path, names: list[str]) -> None:
    """Draws a scene for each name."""
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render_with_masks(sample_scene(0, "test", index))[0]).resize((96, 80)).save(folder / name)


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block as arguments; a backslash goes on with the next line."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(page: str, folder: Path) -> str:
    """Runs a page's blocks in a folder and checks those that are not run; returns what they printed.

    Raises:
        AssertionError: a command failed, or names something that does not exist.
        Exception: whatever a Python block raised; the traceback has the page's lines.
    """
    draw(folder, files(page))
    names: dict[str, object] = {"__name__": "__page__"}
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        for block in blocks(page):
            if block.reason is not None:
                check(block)
            elif block.language == "python":
                exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)
            elif block.language == "shell":
                for words in commands(block.code):
                    _run_command(words, block)
    return printed.getvalue()


def check(block: Block) -> None:
    """Checks the names in a block that cannot be run here: flags, modules, attributes, arguments.

    Raises:
        AssertionError: a name that does not exist.
    """
    if block.language == "python":
        _check_python(block)
    elif block.language == "shell":
        for words in commands(block.code):
            _check_command(words, block)


def clipfast_command(*arguments: str) -> tuple[int, str]:
    """The command line in this process: exit code and everything it printed."""
    logger = logging.getLogger("clipfast")
    shown, handlers, propagate = warnings.showwarning, list(logger.handlers), logger.propagate
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = run_command_line(arguments)
    finally:
        warnings.showwarning, logger.handlers[:], logger.propagate = shown, handlers, propagate
    return code, printed.getvalue()


def _run_command(words: list[str], block: Block) -> None:
    if words[0] != "clipfast":
        _check_command(words, block)
        return
    code, printed = clipfast_command(*words[1:])
    assert code == 0, f"{block}: {shlex.join(words)} ended with {code}:\n{printed}"
    print(printed)


def _check_command(words: list[str], block: Block) -> None:
    while "=" in words[0] and not words[0].startswith("-"):  # variables of the environment
        words = words[1:]
    program, *arguments = words
    where = f"{block}: {shlex.join(words)}"
    if program == "clipfast":
        _check_arguments(arguments, where)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wrong = [word for word in arguments if "=" not in word and word not in targets]
        assert not wrong, f"{where}: no target {wrong}"
    elif Path(program).name == "python":
        assert arguments[0] == "-m", where
        assert importlib.util.find_spec(arguments[1]) is not None, where
        wrong = [word for word in arguments[2:] if word.startswith(("benchmarks/", "tests/")) and not exists(word)]
        assert not wrong, f"{where}: no file {wrong}"
    else:
        assert program in {"pip", "git", "cd", "ray"}, f"{where}: the checks do not know the program {program}"


def exists(word: str) -> bool:
    """Whether a path of the repository, without the name of a test, exists."""
    return (ROOT / word.partition("::")[0]).exists()


def _check_arguments(arguments: list[str], where: str) -> None:
    """Parses a command line without running it."""
    try:
        app.parse_args(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise AssertionError(f"{where}: {error}") from error


_VARIABLES = {"model": clipfast.Model, "contributions": clipfast.Contributions, "moments": clipfast.Moments}
"""What the pages call these."""


def _check_python(block: Block) -> None:
    """Imports, attributes of modules, and keyword arguments of what is called."""
    tree = ast.parse(block.code, block.page)
    scope: dict[str, Any] = {"clipfast": clipfast} | _VARIABLES
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name) is not None, f"{block}: no module {alias.name}"
                root = alias.name.partition(".")[0]
                scope[alias.asname or root] = importlib.import_module(alias.name if alias.asname else root)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block}: no {alias.name} in {node.module}"
                scope[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _resolve(node, scope, block)
        elif isinstance(node, ast.Call):
            _check_keywords(node, _resolve(node.func, scope, block), block)


_UNKNOWN = object()


def _resolve(node: ast.expr, scope: dict[str, Any], block: Block) -> Any:
    """What a dotted name stands for, as far as :data:`_VARIABLES` and the imports tell."""
    if isinstance(node, ast.Name):
        return scope.get(node.id, _UNKNOWN)
    if not isinstance(node, ast.Attribute):
        return _UNKNOWN
    owner = _resolve(node.value, scope, block)
    if owner is _UNKNOWN or isinstance(owner, property):
        return _UNKNOWN
    assert hasattr(owner, node.attr) or node.attr in getattr(owner, "__annotations__", {}), (
        f"{block}: no {ast.unparse(node)}"
    )
    return getattr(owner, node.attr, _UNKNOWN)


def _check_keywords(node: ast.Call, function: Any, block: Block) -> None:
    if function is _UNKNOWN or not callable(function) or getattr(function, "__module__", "").startswith("torch"):
        return
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    wrong = [word.arg for word in node.keywords if word.arg is not None and word.arg not in parameters]
    assert not wrong, f"{block}: {ast.unparse(node.func)} has no argument {wrong}"


def pages() -> Iterator[str]:
    """Every Markdown page of the project that people read, from the repository's root."""
    yield from ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
    for folder in ("docs", "benchmarks", "clipfast"):
        for path in sorted((ROOT / folder).rglob("*.md")):
            if "results" not in path.parts or folder == "docs":
                yield str(path.relative_to(ROOT))
