"""The notebooks of the documentation: what is saved is what a run gives, and a notebook that is not is noticed."""

import base64
import io
import re
from typing import Any

import pytest
from builders import ROOT
from PIL import Image, ImageDraw
from test_documentation_build import load

nbformat = pytest.importorskip("nbformat")
v4 = nbformat.v4
documentation = load("notebooks")
PATHS = documentation.notebooks()
EXECUTED = [
    pytest.param(path, id=path.stem, marks=[] if path.stem == "explain" else pytest.mark.slow) for path in PATHS
]
"""Of all notebooks one runs in the quick tests: every other takes a kernel and its imports again."""


def test_notebooks_are_found() -> None:
    assert [path.stem for path in PATHS] == ["explain", "migrate", "spurious"]


@pytest.mark.parametrize("path", EXECUTED)
@pytest.mark.slow
def test_saved_outputs_are_what_a_run_gives(path: Any) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    saved = documentation.read(path)
    assert documentation.differences(saved, documentation.execute(saved)) == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_is_saved_is_fit_to_be_read(path: Any) -> None:
    notebook = documentation.read(path)
    assert notebook.cells[0].source.startswith("# ")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len(outputs) >= 5
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert notebook.metadata == documentation.METADATA
    assert path.stat().st_size < 700_000
    for link in re.findall(r"\]\(([^):]+)\)", "".join(cell.source for cell in notebook.cells)):
        assert (path.parent / link).exists(), link


# ---------------------------------------------------------------------------------------------------------- comparing


def picture(colour: str = "white", size: tuple[int, int] = (40, 20), dot: bool = False) -> str:
    image = Image.new("RGB", size, colour)
    if dot:
        ImageDraw.Draw(image).rectangle((0, 0, 5, 1), fill="black")  # 12 of 800 pixels
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def notebook(*outputs: Any, source: str = "x") -> Any:
    return v4.new_notebook(cells=[v4.new_code_cell(source, outputs=list(outputs), execution_count=1)])


def printed(text: str) -> Any:
    return notebook(v4.new_output("stream", name="stdout", text=text))


def shown(**data: str) -> Any:
    return notebook(v4.new_output("display_data", {kind.replace("_", "/"): value for kind, value in data.items()}))


@pytest.mark.parametrize(
    ("saved", "new"),
    [
        ("the same\n", "the same\n"),
        ("0.104 and -0.20", "0.105 and -0.19"),
        ("0.001 -0.000", "0.000  0.000"),
        ("| 88% |\n", "| 87% |\n"),
        ("L5.H4 12.5%", "L5.H4 12.6%"),
        ("  -1.5 b", "1.5 b".replace("1.5", " -1.4")),
    ],
)
def test_machines_may_round_differently(saved: str, new: str) -> None:
    assert documentation.differences(printed(saved), printed(new)) == []


@pytest.mark.parametrize(
    ("saved", "new", "line"),
    [
        ("a red star", "a blue star", "'a red star' is now 'a blue star'"),
        ("0.104", "0.106", "0.104 is now 0.106"),
        ("0.104", "-0.104", "0.104 is now -0.104"),
        ("88%", "86%", "88% is now 86%"),
        ("88%", "88", "88% is now 88"),
        ("(96, 6, 6)", "(96, 6, 7)", "6 is now 7"),
        ("L5.H4", "L5.H3", "'L5.H4' is now 'L5.H3'"),
        ("0.10", "0.1", "0.10 is now 0.1"),
        ("1 2", "1", "'' is now nothing"),
        ("True", "False", "'True' is now 'False'"),
    ],
)
def test_another_result_is_noticed(saved: str, new: str, line: str) -> None:
    (difference,) = documentation.differences(printed(saved), printed(new))
    assert difference.startswith("cell 0, output 0: ")
    assert line in difference


def test_another_picture_is_noticed() -> None:
    def compared(first: str, second: str) -> list[str]:
        plain = documentation.differences(shown(image_png=first), shown(image_png=second))
        tags = [f'<img src="data:image/png;base64,{data}"/>' for data in (first, second)]
        in_html = documentation.differences(shown(text_html=tags[0]), shown(text_html=tags[1]))
        assert plain == in_html
        return plain

    assert compared(picture(), picture()) == []
    assert compared(picture(), picture("#fafafa")) == []  # five levels
    assert compared(picture(), picture("#e0ffff")) == [
        "cell 0, output 0: 100.0% of a picture's pixels have another colour"
    ]
    assert compared(picture(), picture(dot=True)) == [
        "cell 0, output 0: 1.5% of a picture's pixels have another colour"
    ]
    assert compared(picture(), picture(size=(40, 21))) == [
        "cell 0, output 0: a picture of (40, 20) is now one of (40, 21)"
    ]
    assert documentation.differences(shown(text_html="<b>a</b>"), shown(text_html=f"<b>a</b>{picture()}")) != []


def test_another_shape_of_a_notebook_is_noticed() -> None:
    one = printed("a")
    assert documentation.differences(one, notebook()) == ["cell 0, output 0: not there any more: a"]
    assert documentation.differences(notebook(), one) == ["cell 0, output 0: not saved: a"]
    assert documentation.differences(notebook(source="y"), notebook()) == ["cell 0: the cells are not the same"]
    assert documentation.differences(v4.new_notebook(), one) == ["cell 0: the cells are not the same"]
    assert documentation.differences(shown(text_plain="a"), shown(text_html="a")) == [
        "cell 0, output 0: kinds are ['text/plain'] and ['text/html']"
    ]
    unordered = printed("a")
    unordered.cells[0].execution_count = 3
    assert documentation.differences(unordered, one) == ["cell 0: was run as number 3: run all cells in order"]


# -------------------------------------------------------------------------------------------------------------- pages


def test_a_page_has_every_cell_and_its_outputs() -> None:
    cells = [
        v4.new_markdown_cell("# Title"),
        v4.new_markdown_cell("[next](other.ipynb), [model](../api/model.md)"),
        v4.new_code_cell("print(1)", outputs=[v4.new_output("stream", text="1 < 2\n")]),
        v4.new_code_cell(
            "x",
            outputs=[v4.new_output("execute_result", {"text/html": "<style>\ntd {}\n</style>\n<table>\n  </table>"})],
        ),
        v4.new_code_cell("y", outputs=[v4.new_output("display_data", {"image/png": picture(), "text/plain": "p"})]),
    ]
    text, pictures = documentation.page(v4.new_notebook(cells=cells), "name")
    assert text.startswith(
        "# Title\n\n[Download this notebook](name.ipynb)\n\n[next](other.md), [model](../api/model.md)\n"
    )
    assert '```python\nprint(1)\n```\n\n<pre class="output">1 &lt; 2</pre>' in text
    assert '<div class="output"> <table> </table> </div>' in text
    assert "](name-4-0.png)" in text
    assert pictures == {"name-4-0.png": base64.b64decode(picture())}


def test_links_of_other_pages_lead_to_pages() -> None:
    source = "[a](../notebooks/explain.ipynb), [b](notebooks/migrate.ipynb); [c](name.ipynb) `notebooks/x.ipynb`"
    expected = "[a](../notebooks/explain.md), [b](notebooks/migrate.md); [c](name.ipynb) `notebooks/x.ipynb`"
    assert documentation.on_page_markdown(source, None, None, None) == expected


def test_the_documentation_names_every_notebook() -> None:
    how_to = (ROOT / "docs" / "howto" / "notebooks.md").read_text(encoding="utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in PATHS:
        assert f"../notebooks/{path.name})" in how_to
        assert f"notebooks/{path.stem}.md" in navigation


def test_an_unknown_notebook_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        documentation.main(["no-such"])
    assert ending.value.code == 2
    assert "there is no notebook no-such: choose from explain, migrate, spurious" in capsys.readouterr().err
