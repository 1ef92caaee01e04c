"""What MkDocs calls while it builds the documentation (``hooks`` in ``mkdocs.yml``).

:func:`on_files` adds the page of the command line, which ``python docs/generate.py`` prints. :func:`on_post_page`
refuses pages that would load anything from a network.
"""

import re
import subprocess
import sys
from typing import Any

PAGE = "commands.md"
INTRODUCTION = """# Command line

Made from the commands' own definitions. Tables and JSON go to stdout, progress and warnings to stderr.

| exit code | meaning |
|---|---|
| 0 | everything was done |
| 1 | a fault of clipfast; a traceback follows |
| 2 | the input was at fault, or some images failed; a line on stderr for each says what, where and what to do |
| 130, 143, 129 | stopped by Ctrl-C (SIGINT), SIGTERM or SIGHUP; what was computed is saved first |
"""
EXTERNAL = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link[^>]*\srel=["']?(?:stylesheet|preconnect|preload)[^>]*\shref=["']?(?:https?:)?//"""
    r"""|<link[^>]*\shref=["']?(?:https?:)?//[^>]*\srel=["']?(?:stylesheet|preconnect|preload)"""
)


def commands_page() -> str:
    """The reference of the command line as Markdown."""
    from clipfast.cli.app import app

    _, *sections = app.generate_docs(output_format="markdown").split("\n## clipfast ")
    return "\n".join([INTRODUCTION, *(f"## clipfast {section}" for section in sections)])


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated page; made in a process of its own, because usage lines name the running program."""
    from mkdocs.structure.files import File

    done = subprocess.run([sys.executable, __file__], stdout=subprocess.PIPE, text=True, check=True)
    files.append(File.generated(config, PAGE, content=done.stdout))
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
