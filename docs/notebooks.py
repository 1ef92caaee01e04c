"""The notebooks of the documentation: running them, comparing what they give, and their pages for MkDocs.

``python docs/notebooks.py`` runs every notebook in a fresh kernel and saves its outputs; with names, those alone. With
``--check`` it saves nothing, lists what differs from the saved outputs, and exits with 1 where something does.

Numbers are compared as they are printed, to one unit of their last digit: machines round differently. Pictures are
compared by their size and colours, everything else by the word.
"""

import argparse
import base64
import io
import os
import re
import sys
import tempfile
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("notebooks")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
TIMEOUT = 600
"""Seconds that a cell, or the start of a kernel, may take: of a machine that is busy with other tests, too."""
IGNORED = ("ignore:IProgress not found",)  # of tqdm, which packages import whether they show progress or not
"""Warnings that depend on what else is installed."""
COLOUR_LEVELS = 8
"""How far a pixel may be from the saved one: a heat map's value in its third digit."""
OTHER_PIXELS = 0.005
"""Share of the pixels that may be further away: a last digit that is drawn into a cell."""

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?%?")
_PICTURE = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


def notebooks() -> list[Path]:
    """Every notebook, by name."""
    return sorted(FOLDER.glob("*.ipynb"))


# ------------------------------------------------------------------------------------------------------------ running


def read(path: Path) -> Any:
    """A notebook.

    Raises:
        nbformat.ValidationError: not a valid one.
    """
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(notebook: Any) -> Any:
    """A copy of a notebook with the outputs of a fresh kernel of this Python, in an empty folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    result = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory() as folder:
        files, settings = Path(folder), {"IPYTHONDIR": str(Path(folder, "ipython"))}
        connection = {"transport": "ipc", "ip": str(files / "kernel"), "connection_file": str(files / "kernel.json")}
        work = files / "work"
        work.mkdir()
        client = NotebookClient(
            result,
            timeout=TIMEOUT,
            startup_timeout=TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": str(work)}},
            config=Config({"KernelManager": connection}),
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--HistoryManager.enabled=False"],
        )
        ignored = ",".join([*filter(None, [os.environ.get("PYTHONWARNINGS")]), *IGNORED])
        client.execute(env={**os.environ, **settings, "PYTHONWARNINGS": ignored}, cleanup_kc=True)
    return tidied(result)


def tidied(notebook: Any) -> Any:
    """The notebook with the same metadata and cell identifiers wherever it was written."""
    notebook.metadata = METADATA
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}
    return notebook


def write(notebook: Any, path: Path) -> None:
    """Saves a notebook."""
    import nbformat

    path.write_text(nbformat.writes(notebook), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- comparing


def differences(saved: Any, new: Any) -> list[str]:
    """What is in one notebook's outputs and not in the other's, a line each; empty where they agree."""
    lines = []
    for number, (mine, theirs) in enumerate(zip_longest(saved.cells, new.cells)):
        if mine is None or theirs is None or (mine.cell_type, mine.source) != (theirs.cell_type, theirs.source):
            lines.append(f"cell {number}: the cells are not the same")
            continue
        for place, pair in enumerate(zip_longest(mine.get("outputs", []), theirs.get("outputs", []))):
            lines += [f"cell {number}, output {place}: {line}" for line in _output_differences(*pair)]
        if mine.get("execution_count") != theirs.get("execution_count"):
            lines.append(f"cell {number}: was run as number {mine.get('execution_count')}: run all cells in order")
    return lines


def _output_differences(saved: Any, new: Any) -> list[str]:
    if saved is None or new is None:
        return [f"{'not saved' if saved is None else 'not there any more'}: {_short(saved or new)}"]
    mine, theirs = _parts(saved), _parts(new)
    if mine.keys() != theirs.keys():
        return [f"kinds are {sorted(mine)} and {sorted(theirs)}"]
    lines = []
    for kind in mine:
        if kind.startswith("image/"):
            lines += _picture_differences(mine[kind], theirs[kind])
        else:
            lines += text_differences(mine[kind], theirs[kind])
    return lines


def _parts(output: Any) -> dict[str, str]:
    """The parts of an output by their kind."""
    if output.output_type == "stream":
        return {f"stream {output.name}": output.text}
    if output.output_type == "error":
        return {"error": f"{output.ename}: {output.evalue}"}
    return {kind: str(value) for kind, value in output.data.items()}


def _short(output: Any) -> str:
    return " ".join(next(iter(_parts(output).values())).split())[:80]


def text_differences(saved: str, new: str) -> list[str]:
    """Differences between two texts: words, numbers to one unit of their last digit, pictures in HTML."""
    pictures = [_PICTURE.findall(text) for text in (saved, new)]
    if len(pictures[0]) != len(pictures[1]):
        return [f"{len(pictures[0])} and {len(pictures[1])} pictures"]
    lines = [line for pair in zip(*pictures, strict=True) for line in _picture_differences(*pair)]
    saved, new = (" ".join(_PICTURE.sub("picture", text).split()) for text in (saved, new))
    words = [[part.strip() for part in _NUMBER.split(text)] for text in (saved, new)]
    if words[0] != words[1]:
        mine, theirs = next(pair for pair in zip_longest(*words) if pair[0] != pair[1])
        return [*lines, f"{_quoted(mine)} is now {_quoted(theirs)}"]
    pairs = zip(_NUMBER.findall(saved), _NUMBER.findall(new), strict=True)
    return lines + [f"{mine} is now {theirs}" for mine, theirs in pairs if not _is_near(mine, theirs)]


def _quoted(text: str | None) -> str:
    return "nothing" if text is None else repr(text[:60])


def _is_near(saved: str, new: str) -> bool:
    """Whether two printed numbers are equal or, rounded ones, one unit of their last digit apart."""
    if saved == new:
        return True
    places = {len(number.rstrip("%").partition(".")[2]) for number in (saved, new)}
    if len(places) > 1 or saved.endswith("%") != new.endswith("%") or not ("." in saved or saved.endswith("%")):
        return False
    unit = 10.0 ** -places.pop()
    return abs(float(saved.rstrip("%")) - float(new.rstrip("%"))) <= 1.001 * unit


def _picture_differences(saved: str, new: str) -> list[str]:
    import numpy as np
    from PIL import Image

    mine, theirs = (Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in (saved, new))
    if mine.size != theirs.size:
        return [f"a picture of {mine.size} is now one of {theirs.size}"]
    levels = np.abs(np.asarray(mine, dtype=int) - np.asarray(theirs, dtype=int)).max(-1)
    share = float((levels > COLOUR_LEVELS).mean())
    return [f"{share:.1%} of a picture's pixels have another colour"] if share > OTHER_PIXELS else []


# -------------------------------------------------------------------------------------------------------------- pages


def page(notebook: Any, name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the files of its pictures by their names."""
    import nbformat

    parts, pictures = [f"[Download this notebook]({name}.ipynb)"], {}
    for number, cell in enumerate(nbformat.from_dict(notebook).cells):
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", cell.source))  # the page of another notebook
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for place, output in enumerate(cell.outputs):
            shown = _parts(output)
            if "image/png" in shown:
                file = f"{name}-{number}-{place}.png"
                pictures[file] = base64.b64decode(shown["image/png"])
                parts.append(f"![What the cell above shows]({file})")
            elif "text/html" in shown:
                html = "".join(line.strip() + " " for line in shown["text/html"].splitlines())
                parts.append(f'<div class="output">{re.sub("<style.*?</style>", "", html)}</div>')
            else:
                parts.append(f'<pre class="output">{escape(next(iter(shown.values())).rstrip())}</pre>')
    title, *rest = parts[1:]
    return "\n\n".join([title, parts[0], *rest]) + "\n", pictures


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for every notebook, with its pictures."""
    from mkdocs.structure.files import File

    for path in notebooks():
        text, pictures = page(read(path), path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lets links to notebooks, which lead to the files where the sources are read, lead to their pages."""
    return re.sub(r"(\]\([\w./]*notebooks/\w+)\.ipynb\)", r"\1.md)", markdown)


def main(arguments: list[str] | None = None) -> int:
    """Runs notebooks; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of notebooks, without .ipynb; all")
    parser.add_argument("--check", action="store_true", help="save nothing, say what differs")
    options = parser.parse_args(arguments)
    known = {path.stem: path for path in notebooks()}
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"there is no notebook {unknown[0]}: choose from {', '.join(known)}")
    stale = 0
    for name in options.names or known:
        saved = read(known[name])
        new = execute(saved)
        lines = differences(saved, new)
        stale += bool(lines)
        print(f"{name}: {'as saved' if not lines else f'{len(lines)} differences'}", *lines, sep="\n  ")
        if not options.check:
            write(new, known[name])
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
