"""The examples of the kernels' page run, and there is one for every operation."""

import re

import torch
from builders import ROOT

from clipfast.kernels import library

TEXT = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_every_operation_has_an_example() -> None:
    headings = re.findall(r"^### `(\w+)\(", TEXT, re.MULTILINE)
    assert set(headings) == set(library.OPERATIONS)
    assert len(BLOCKS) == len(headings) + 1  # and the common start


def test_the_examples_run_in_order() -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "kernels/README.md", "exec"), names)


def test_examples_are_short() -> None:
    assert max(len(block.strip().splitlines()) for block in BLOCKS) <= 10


def test_what_the_page_links_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "kernels" / target).exists(), target
    for file in re.findall(r"`(\w+\.py)` \|$", TEXT, re.MULTILINE):
        assert (ROOT / "kernels" / file).exists(), file
