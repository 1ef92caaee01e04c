"""Docstrings as Markdown, for the API pages: roles become code, ``::`` a colon, ``>>>`` examples code blocks."""

import re

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|meth|func|data|attr|mod|exc):`~?([^`]+)`")
LITERAL = re.compile(r"(?<=[\w)`])::$", re.MULTILINE)
EXAMPLE = re.compile(r"(?:^[ \t]*(?:>>>|\.\.\.) ?.*\n?)+", re.MULTILINE)


def as_markdown(docstring: str) -> str:
    """A docstring without the parts that Markdown reads as something else."""

    def block(match: re.Match[str]) -> str:
        lines = [re.sub(r"^[ \t]*(?:>>>|\.\.\.) ?", "", line) for line in match[0].rstrip("\n").splitlines()]
        indent = re.match(r"[ \t]*", match[0])[0]  # type: ignore[index]  # the pattern matches an empty string
        return "\n".join(f"{indent}{line}".rstrip() for line in ["", "```python", *lines, "```", "", ""])

    return EXAMPLE.sub(block, LITERAL.sub(":", ROLE.sub(r"`\1`", docstring)))


class Docstrings(Extension):
    """Applies :func:`as_markdown` to every docstring that is loaded."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Called by griffe for every object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
