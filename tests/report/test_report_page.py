"""The page of a report: its contents, and that nothing is executed or fetched."""

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


def test_every_head_has_an_anchor_and_a_row(page: Parsed) -> None:
    names = [f"L{layer}.H{head}" for layer in range(LAYERS) for head in range(HEADS)]
    for name in names:
        assert page.by_id(name).tag == "div"
        assert any(link.text == name for link in page.all("a", href=f"#{name}"))
    rows = [cell.text for cell in page.all("th", class_="c-head") if cell.attributes["scope"] == "row"]
    assert rows == [head.name for head in sorted(content().heads, key=lambda head: -head.share)]


def test_values_equal_those_of_the_content(page: Parsed) -> None:
    ordered = sorted(content().heads, key=lambda head: -head.share)
    for name, values in {
        "c-share": [head.share for head in ordered],
        "c-rank": [float(head.rank) for head in ordered],
        "c-explained": [sum(text.explained for text in head.texts or ()) for head in ordered],
        "c-lost": [0.75 - head.alone.accuracy for head in ordered if head.alone],
    }.items():
        cells = page.all("td", class_=name)
        assert [float(cell.attributes["data-v"] or "") for cell in cells] == pytest.approx(values)
    assert [cell.text for cell in page.all("td", class_="c-rank")] == [str(head.rank) for head in ordered]
    for head in ordered:
        details = page.by_id(head.name).text
        for text in head.texts or ():
            assert text.text in details
            assert f"{100 * text.explained:.1f} %" in details
        assert head.notes[0] in details
        shots = [shot for text in head.texts or () for shot in (*text.best, *text.random)]
        assert all(f"{shot.score:+.3f}".replace("-", "−") in details for shot in shots)


def test_every_accuracy_is_in_a_table(page: Parsed) -> None:
    ablated = content().ablated
    assert ablated is not None
    cells = {(cell.text) for cell in page.all("td")}
    for row in (ablated.baseline, *ablated.layers, *ablated.others, *ablated.sizes):
        assert row.worst is not None
        assert {f"{100 * row.accuracy:.1f} %", f"{100 * row.worst:.1f} %"} <= cells


def test_names_are_escaped(page: Parsed) -> None:
    """The parser returns names unchanged, and they create no elements or attributes."""
    text = page.all("body")[0].text
    for name in ESCAPES:
        assert name in text
    assert page.all("title")[0].text == f"Report {ESCAPES[2]}"
    assert {image.attributes["alt"] for image in page.all("img")} >= {NASTY}
    assert any(ESCAPES[1] in (span.attributes["title"] or "") for span in page.all("span", role="img"))
    assert len(page.all("script")) == 2
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on")], element


def test_undecodable_bytes_and_control_characters_are_replaced(page: Parsed) -> None:
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


def test_every_picture_is_embedded_once(page: Parsed) -> None:
    for number, source in content().thumbnails.items():
        assert page.source.count(source) == 1
        assert page.all("span", class_=f"i{number}")
    assert page.all("span", class_="i4") == []
    assert page.all("span", class_="none")  # the fifth image has no picture


def test_page_without_optional_content() -> None:
    heads = [Head(0, 0, 1.0, 3, texts=None), Head(0, 1, 0.0, 0, texts=[])]
    bare = Parsed(render(Content("little", [Fact("images", "2")], heads, missing=[("accuracy", "no labels")])))
    assert [section.attributes["id"] for section in bare.all("section")] == ["summary", "heads"]
    assert "no labels" in bare.by_id("summary").text
    assert "not named" in bare.by_id("heads").text
    assert bare.all("td", class_="c-lost") == []
    assert [link.attributes["href"] for link in bare.all("a")][1:3] == ["#summary", "#heads"]


def test_accuracy_without_groups() -> None:
    ablated = content().ablated
    assert ablated is not None
    alone = replace(
        ablated,
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
        if box.attrib["class"] == style and float(box.attrib["height"]) != 12  # boxes of the legend have height 12
    ]


def test_bars_are_proportional_to_their_values() -> None:
    shares = Shares(0.05, (0, 1, 2), (0.4, -0.1, 0.2), (0.3, 0.1, 0.05), 0.0)
    chart = charts.layer_shares(shares)
    attention, mlps = boxes(chart, "fill-one"), boxes(chart, "fill-two")
    unit = attention[0]["height"] / 0.4
    assert [box["height"] / unit for box in attention] == pytest.approx([0.4, 0.1, 0.2], abs=1e-3)
    assert [box["height"] / unit for box in mlps] == pytest.approx([0.3, 0.1, 0.05], abs=1e-3)
    zero = attention[0]["y"] + attention[0]["height"]
    assert attention[1]["y"] == pytest.approx(zero, abs=0.1)  # a negative bar is below zero
    assert mlps[2]["y"] + mlps[2]["height"] == pytest.approx(zero, abs=0.1)
    rows = [Judged("a", 0.8, 0.4), Judged("b", 0.2, 0.1)]
    chart = charts.bars(rows, [("chance", 0.1)], "label")
    widths = [box["width"] for box in (*boxes(chart, "fill-one"), *boxes(chart, "fill-two"))]
    assert [width / widths[0] for width in widths] == pytest.approx([1, 0.25, 0.5, 0.125], abs=1e-3)


def test_points_of_a_curve() -> None:
    chart = charts.curves([charts.Line("a", [0.0, 0.5, 1.0])], [("chance", 0.25)], "m", "label")
    root = ElementTree.fromstring(chart)
    points = root.findall("polyline")[0].attrib["points"]
    positions = [tuple(map(float, point.split(","))) for point in points.split()]
    assert positions[1][0] - positions[0][0] == pytest.approx(positions[2][0] - positions[1][0], abs=0.11)
    assert positions[1][1] == pytest.approx((positions[0][1] + positions[2][1]) / 2, abs=0.11)
    rule = next(line for line in root.findall("line") if line.attrib["class"] == "rule")
    share = (positions[0][1] - float(rule.attrib["y1"])) / (positions[0][1] - positions[2][1])
    assert share == pytest.approx(0.25, abs=2e-3)
    assert [title.text for title in root.iter("title")] == ["a, 0: 0.0 %", "a, 1: 50.0 %", "a, 2: 100.0 %"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.13, 0.52), (0, 0.034), (0.0, 1e-6), (0, 0), (-3, 0)])
def test_ticks_are_round_and_cover_the_range(low: float, high: float) -> None:
    ticks = charts.ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 9
    step = ticks[1] - ticks[0]
    assert np.allclose(np.diff(ticks), step)
    assert f"{step:.0e}"[0] in "125" or np.isclose(step / 10 ** np.floor(np.log10(step)), 2.5)


def test_numbers_as_text() -> None:
    assert charts.percent(-0.0123) == "−1.2 %"
    assert charts.percent(-0.0001) == "0.0 %"
    assert charts.percent(0.5, 0) == "50 %"
    assert points(0.0251) == "2.5"


# ----------------------------------------------------------------------------------------------------------- pictures


def test_matrix_has_a_pixel_per_value() -> None:
    from base64 import b64decode
    from io import BytesIO

    from PIL import Image

    values = np.array([[1.0, 0.5], [0.0, 0.25]])
    kind, data = matrix(values).split(",")
    assert kind == "data:image/png;base64"
    pixels = np.asarray(Image.open(BytesIO(b64decode(data))).convert("RGBA"))
    assert np.array_equal(pixels[..., 3], np.round(values * 255))


def test_thumbnails_are_only_enlarged_on_request() -> None:
    assert fitted(picture(0, 200), 80).size == (80, 80)
    assert fitted(picture(0, 40), 80).size == (40, 40)
    assert fitted(picture(0, 40), 80, enlarge=True).size == (80, 80)
    assert fitted(picture(0, 200).resize((400, 2)), 80).size == (80, 1)


def test_missing_jinja2_names_the_extra() -> None:
    script = "import sys; sys.modules['jinja2'] = None; import clipfast.report.html.page"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    last = process.stderr.rstrip().splitlines()[-1]
    assert last.endswith("clipfast report needs the package jinja2: pip install 'clipfast[report]'")
