"""What MkDocs and mkdocstrings are given: the generated page, docstrings as Markdown, no resources from a network."""

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
from builders import ROOT


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"documentation_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


generate = load("generate")


def test_every_command_has_a_section_with_its_options() -> None:
    script = [sys.executable, str(ROOT / "docs" / "generate.py")]
    page = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert "```console\nclipfast collect [OPTIONS]" in page
    for command, option in (
        ("collect", "--moments-only"),
        ("collection", "--layout"),
        ("textspan", "--pool"),
        ("bench", "--pairs"),
        ("models", "--all"),
    ):
        section = page.partition(f"\n## clipfast {command}\n")[2].partition("\n## ")[0]
        assert option in section
    assert page.count("\n## clipfast ") >= 12
    assert "\x1b" not in page


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<script async src="//cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="https://fonts.example/css">',
        '<link href="https://fonts.example" rel="preconnect">',
        '<img alt="x" src="http://example/x.png">',
    ],
)
def test_pages_that_load_from_a_network_are_recognised(html: str) -> None:
    assert generate.EXTERNAL.search(f"<p>text</p>{html}")


def test_links_are_no_resources() -> None:
    html = '<a href="https://arxiv.org">x</a><link rel="canonical" href="https://x"><script src="assets/x.js"></script>'
    assert not generate.EXTERNAL.search(html)


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe")
    as_markdown = load("docstrings").as_markdown
    assert as_markdown("See :meth:`Model.decompose` and :class:`.Moments`.") == "See `Model.decompose` and `.Moments`."
    assert as_markdown("The score::\n\n    a · b") == "The score:\n\n    a · b"
    example = ">>> for x in y:\n...     print(x)\n\nAfter."
    assert as_markdown(example) == "\n```python\nfor x in y:\n    print(x)\n```\n\n\nAfter."
