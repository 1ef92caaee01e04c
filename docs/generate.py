"""What MkDocs calls while it builds the documentation (``hooks`` in ``mkdocs.yml``).

:func:`on_files` adds the page of the command line, which ``python docs/generate.py`` prints. :func:`on_post_page`
refuses pages that would load anything from a network.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

PAGE = "commands.md"
INTRODUCTION = """# Command line

Made from the commands' own definitions. Tables and JSON go to stdout, progress and warnings to stderr.

| exit code | meaning |
|---|---|
| 0 | everything was done |
| 2 | the input was at fault: one line on stderr says what, where and what to do |
| 130 | stopped by Ctrl-C |
"""
EXTERNAL = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link[^>]*\srel=["']?(?:stylesheet|preconnect|preload)[^>]*\shref=["']?(?:https?:)?//"""
    r"""|<link[^>]*\shref=["']?(?:https?:)?//[^>]*\srel=["']?(?:stylesheet|preconnect|preload)"""
)


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


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Raises an error where a page loads a script, a style or an image from elsewhere."""
    match = EXTERNAL.search(output)
    if match:
        from mkdocs.exceptions import PluginError

        raise PluginError(f"{page.file.src_path} loads from a network: {match[0]}")
    return output


if __name__ == "__main__":
    print(commands_page())
