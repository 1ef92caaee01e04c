"""Pages that are made while the documentation is built: the command line's reference.

MkDocs calls :func:`on_files` (``hooks`` in ``mkdocs.yml``). ``python docs/generate.py`` prints the page.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

PAGE = "commands.md"
INTRODUCTION = """# Command line

Made from the commands' own help. Every command ends with 0 where all went well, 2 where the input was at fault (one
line on stderr says what, where and what to do) and 130 after Ctrl-C. Tables and JSON go to stdout, progress and
warnings to stderr.
"""


def help_text(*command: str) -> str:
    """What ``clipfast COMMAND --help`` prints, without colours, 100 columns wide."""
    code = "import sys; from clipfast.cli import main; sys.argv[0] = 'clipfast'; main()"
    environment = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PATH": "", "HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


def command_names() -> list[str]:
    """Every command in the order of ``clipfast --help``."""
    shown = help_text().partition("Commands")[2]
    return re.findall(r"^[│ ] ?([a-z][a-z-]*) {2,}\S", shown, re.MULTILINE)


def commands_page() -> str:
    """The reference of the command line as Markdown."""
    return "\n".join(_sections())


def _sections() -> Iterator[str]:
    yield INTRODUCTION
    for name in command_names():
        yield f"## clipfast {name}\n\n```text\n{help_text(name).strip()}\n```\n"


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=commands_page()))
    return files


if __name__ == "__main__":
    print(commands_page())
