"""Sets of templates for zero-shot classification: sentences with ``{}`` for the name of a class."""

import tomllib
from functools import cache
from pathlib import Path

from clipfast.descriptions import read
from clipfast.errors import InputError

FILE = Path(__file__).with_name("templates.toml")


@cache
def template_sets() -> dict[str, tuple[str, ...]]:
    """The sets by name."""
    return {name: tuple(templates) for name, templates in tomllib.loads(FILE.read_text(encoding="utf-8")).items()}


def read_templates(name: str) -> tuple[str, ...]:
    """A set by name, or the templates in a file, one per line.

    Raises:
        InputError: neither a set nor a readable file, or a template without exactly one ``{}``.
    """
    known = template_sets()
    if name in known:
        return known[name]
    if not Path(name).exists():
        raise InputError(f"--templates is {name!r}: neither a file nor one of {', '.join(known)}")
    try:
        templates = read(name).texts
    except OSError as error:
        raise InputError(f"cannot read the templates in {name}: {error.strerror}") from None
    return tuple(check_template(template, name) for template in templates)


def check_template(template: str, where: str) -> str:
    """Returns the template if it is valid.

    Raises:
        InputError: the template does not have exactly one ``{}``.
    """
    if template.count("{}") != 1:
        raise InputError(f"{where} is {template!r}: it needs one {{}} where the class goes")
    return template


def fill(template: str, name: str) -> str:
    """A template with the name of a class inserted; other braces stay unchanged."""
    return template.replace("{}", name)
