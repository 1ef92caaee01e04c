"""The page of a report: everything is in it, nothing in it can run or be fetched."""

import base64
import hashlib
import re
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from pages import ESCAPES, HEADS, LAYERS, NASTY, Parsed, content, picture

from clipfast.analyses.variance import Shares
from clipfast.report.html import charts
from clipfast.report.html.content import Content, Fact, Head, Judged
from clipfast.report.html.page import points, render
from clipfast.report.html.pictures import fitted, matrix


@pytest.fixture(scope="module")
def page() -> Parsed:
    return Parsed(render(content()))


def test_every_head_has_its_anchor_and_its_row(page: Parsed) -> None:
    names = [f"L{layer}.H{head}" for layer in range(LAYERS) for head in range(HEADS)]
    for name in names:
        assert page.by_id(name).tag == "div"
        assert any(link.text == name for link in page.all("a", href=f"#{name}"))
    rows = [cell.text for cell in page.all("th", class_="c-head") if cell.attributes["scope"] == "row"]
    assert rows == [head.name for head in sorted(content().heads, key=lambda head: -head.share)]


def test_the_numbers_are_those_of_the_content(page: Parsed) -> None:
    ordered = sorted(content().heads, key=lambda head: -head.share)
    for name, wanted in {
        "c-share": [head.share for head in ordered],
        "c-rank": [float(head.rank) for head in ordered],
        "c-explained": [sum(text.explained for text in head.texts or ()) for head in ordered],
        "c-lost": [0.75 - head.alone.accuracy for head in ordered if head.alone],
    }.items():
        cells = page.all("td", class_=name)
        assert [float(cell.attributes["data-v"] or "") for cell in cells] == pytest.approx(wanted)
    assert [cell.text for cell in page.all("td", class_="c-rank")] == [str(head.rank) for head in ordered]
    for head in ordered:
        more = page.by_id(head.name).text
        for text in head.texts or ():
            assert text.text in more
            assert f"{100 * text.explained:.1f} %" in more
        assert head.notes[0] in more
        shots = [shot for text in head.texts or () for shot in (*text.best, *text.random)]
        assert all(f"{shot.score:+.3f}".replace("-", "−") in more for shot in shots)


def test_every_accuracy_is_in_a_table(page: Parsed) -> None:
    found = content().ablated
    assert found is not None
    cells = {(cell.text) for cell in page.all("td")}
    for row in (found.baseline, *found.layers, *found.others, *found.sizes):
        assert row.worst is not None
        assert {f"{100 * row.accuracy:.1f} %", f"{100 * row.worst:.1f} %"} <= cells


def test_names_stay_names(page: Parsed) -> None:
    """Escaped everywhere: they come back from the parser as they went in, and made no element of their own."""
    text = page.all("body")[0].text
    for name in ESCAPES:
        assert name in text
    assert page.all("title")[0].text == f"Report {ESCAPES[2]}"
    assert {image.attributes["alt"] for image in page.all("img")} >= {NASTY}
    assert any(ESCAPES[1] in (each.attributes["title"] or "") for each in page.all("span", role="img"))
    assert len(page.all("script")) == 2
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on")], element


def test_bytes_that_are_no_text_and_control_characters(page: Parsed) -> None:
    assert "\x00" not in page.source
    assert "\x1b" not in page.source
    page.source.encode("utf-8")
    assert "caf? " in page.all("dl")[1].text


def test_nothing_is_fetched_and_only_its_own_scripts_run(page: Parsed) -> None:
    for element in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "background"):
            value = element.attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), element
    style = page.all("style")[0].text
    assert "@import" not in style
    assert all(address.startswith("data:image/") for address in re.findall(r"url\((.*?)\)", style))
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.split(" ", 1) for rule in (policy.attributes["content"] or "").split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    digests = [hashlib.sha256(script.text.encode()).digest() for script in page.all("script")]
    assert rules["script-src"] == " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def test_a_picture_is_there_once(page: Parsed) -> None:
    for number, source in content().thumbnails.items():
        assert page.source.count(source) == 1
        assert page.all("span", class_=f"i{number}")
    assert page.all("span", class_="i4") == []
    assert page.all("span", class_="none")  # the fifth image, which has none


def test_a_page_with_little_in_it() -> None:
    heads = [Head(0, 0, 1.0, 3, texts=None), Head(0, 1, 0.0, 0, texts=[])]
    bare = Parsed(render(Content("little", [Fact("images", "2")], heads, missing=[("accuracy", "no labels")])))
    assert [each.attributes["id"] for each in bare.all("section")] == ["summary", "heads"]
    assert "no labels" in bare.by_id("summary").text
    assert "not named" in bare.by_id("heads").text
    assert bare.all("td", class_="c-lost") == []
    assert [link.attributes["href"] for link in bare.all("a")][1:3] == ["#summary", "#heads"]


def test_an_accuracy_without_groups() -> None:
    found = content().ablated
    assert found is not None
    alone = replace(
        found,
        baseline=Judged("nothing", 0.75),
        layers=[Judged("layer 0", 0.7)],
        others=[Judged("both", 0.6)],
        sizes=[],
        worst_group=None,
    )
    page = Parsed(render(replace(content(), ablated=alone)))
    assert "worst group" not in page.by_id("charts").text


# ------------------------------------------------------------------------------------------------------------- charts


def boxes(chart: str, style: str) -> list[dict[str, float]]:
    root = ElementTree.fromstring(chart)
    return [
        {name: float(box.attrib[name]) for name in ("x", "y", "width", "height")}
        for box in root.findall("rect")
        if box.attrib["class"] == style and float(box.attrib["height"]) != 12  # those of the legend
    ]


def test_bars_are_as_long_as_their_values() -> None:
    shares = Shares(0.05, (0, 1, 2), (0.4, -0.1, 0.2), (0.3, 0.1, 0.05), 0.0)
    chart = charts.layer_shares(shares)
    attention, mlps = boxes(chart, "fill-one"), boxes(chart, "fill-two")
    unit = attention[0]["height"] / 0.4
    assert [box["height"] / unit for box in attention] == pytest.approx([0.4, 0.1, 0.2], abs=1e-3)
    assert [box["height"] / unit for box in mlps] == pytest.approx([0.3, 0.1, 0.05], abs=1e-3)
    zero = attention[0]["y"] + attention[0]["height"]
    assert attention[1]["y"] == pytest.approx(zero, abs=0.1)  # it hangs below
    assert mlps[2]["y"] + mlps[2]["height"] == pytest.approx(zero, abs=0.1)
    rows = [Judged("a", 0.8, 0.4), Judged("b", 0.2, 0.1)]
    chart = charts.bars(rows, [("chance", 0.1)], "label")
    widths = [box["width"] for box in (*boxes(chart, "fill-one"), *boxes(chart, "fill-two"))]
    assert [width / widths[0] for width in widths] == pytest.approx([1, 0.25, 0.5, 0.125], abs=1e-3)


def test_points_of_a_line() -> None:
    chart = charts.curves([charts.Line("a", [0.0, 0.5, 1.0])], [("chance", 0.25)], "m", "label")
    root = ElementTree.fromstring(chart)
    points = root.findall("polyline")[0].attrib["points"]
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.11)
    assert places[1][1] == pytest.approx((places[0][1] + places[2][1]) / 2, abs=0.11)
    rule = next(line for line in root.findall("line") if line.attrib["class"] == "rule")
    share = (places[0][1] - float(rule.attrib["y1"])) / (places[0][1] - places[2][1])
    assert share == pytest.approx(0.25, abs=2e-3)
    assert [title.text for title in root.iter("title")] == ["a, 0: 0.0 %", "a, 1: 50.0 %", "a, 2: 100.0 %"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.13, 0.52), (0, 0.034), (0.0, 1e-6), (0, 0), (-3, 0)])
def test_ticks_are_round_and_reach(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 9
    step = found[1] - found[0]
    assert np.allclose(np.diff(found), step)
    assert f"{step:.0e}"[0] in "125" or np.isclose(step / 10 ** np.floor(np.log10(step)), 2.5)


def test_numbers_as_text() -> None:
    assert charts.percent(-0.0123) == "−1.2 %"
    assert charts.percent(-0.0001) == "0.0 %"
    assert charts.percent(0.5, 0) == "50 %"
    assert points(0.0251) == "2.5"


# ----------------------------------------------------------------------------------------------------------- pictures


def test_a_matrix_has_a_pixel_per_value() -> None:
    from base64 import b64decode
    from io import BytesIO

    from PIL import Image

    values = np.array([[1.0, 0.5], [0.0, 0.25]])
    kind, data = matrix(values).split(",")
    assert kind == "data:image/png;base64"
    pixels = np.asarray(Image.open(BytesIO(b64decode(data))).convert("RGBA"))
    assert np.array_equal(pixels[..., 3], np.round(values * 255))


def test_thumbnails_are_made_smaller_only() -> None:
    assert fitted(picture(0, 200), 80).size == (80, 80)
    assert fitted(picture(0, 40), 80).size == (40, 40)
    assert fitted(picture(0, 40), 80, enlarge=True).size == (80, 80)
    assert fitted(picture(0, 200).resize((400, 2)), 80).size == (80, 1)


def test_without_jinja2_the_extra_is_named() -> None:
    script = "import sys; sys.modules['jinja2'] = None; import clipfast.report.html.page"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.endswith("clipfast report needs the package jinja2: pip install 'clipfast[report]'")
