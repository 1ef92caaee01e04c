"""The chart: valid SVG with bars proportional to the results."""

from typing import Any
from xml.etree import ElementTree

import pytest
from documents import entry, failure, result, timing

from clipfast.bench.chart import svg

NAMESPACE = "{http://www.w3.org/2000/svg}"


def parts(document: dict[str, Any], tag: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg(document)).findall(NAMESPACE + tag)


def bars(document: dict[str, Any]) -> list[float]:
    """Widths of the bars, without the background."""
    return [float(box.get("width", "0")) for box in parts(document, "rect")[1:]]


def texts(document: dict[str, Any]) -> list[str]:
    return [text.text or "" for text in parts(document, "text")]


def test_bars_are_proportional_to_the_factors() -> None:
    document = result(entry("plain", 1.0), entry("heads", 1.5), entry("naive tokens", 0.0625))
    plain, heads, naive = bars(document)
    assert heads == pytest.approx(1.5 * plain, abs=0.2)
    assert naive == pytest.approx(plain / 16, abs=0.2)


def test_dashed_line_marks_the_plain_forward() -> None:
    document = result(entry("plain", 1.0), entry("heads", 3.0))
    (dashed,) = [line for line in parts(document, "line") if line.get("stroke-dasharray")]
    bar = parts(document, "rect")[1]
    end = float(bar.get("x", "0")) + float(bar.get("width", "0"))
    assert float(dashed.get("x1", "0")) == pytest.approx(end, abs=0.2)


def test_all_elements_are_inside_the_image() -> None:
    entries = [
        entry(output, ratio, model=f"model {ratio}") for ratio in (0.01, 1.0, 61.5) for output in ("plain", "maps")
    ]
    document = result(*entries, failure(reason="long " * 100))
    root = ElementTree.fromstring(svg(document))
    width, height = float(root.get("width", "0")), float(root.get("height", "0"))
    for element in root.iter():
        for name, limit in (("x", width), ("x1", width), ("x2", width), ("y", height), ("y1", height), ("y2", height)):
            assert 0 <= float(element.get(name, "0")) <= limit
    assert max(len(text) for text in texts(document)) < 160


def test_chart_has_title_axis_and_provenance() -> None:
    labels = texts(result(entry("heads", 1.25, speed=17.25)))
    assert labels[0] == "Images per second relative to the plain forward"
    assert any("AMD EPYC" in text and "commit 0123456789" in text for text in labels)
    assert any(text.startswith("times as fast as the plain forward") for text in labels)
    assert {"ViT-B-32, batch 8, fp32, auto", "heads", "1.25", "17.25", "0"} <= set(labels)


def test_text_is_escaped() -> None:
    name = 'a<b>&"c\x00\x1b'
    labels = texts(result(entry(model=name), failure(reason="<script> & more")))
    assert any(text.startswith('a<b>&"c') and "batch 8" in text for text in labels)
    assert any("<script> & more" in text for text in labels)


def test_failed_case_has_its_reason_and_no_bar() -> None:
    document = result(entry("plain", 1.0), failure("maps"))
    assert len(bars(document)) == 1
    assert "not measured: out of memory: try a smaller --batch" in texts(document)


def test_chart_without_measured_cases() -> None:
    assert bars(result()) == []
    assert bars(result(failure())) == []


def test_outputs_have_different_colours() -> None:
    names = ("plain", "heads", "attention", "maps", "tokens", "plain compiled", "naive heads")
    boxes = parts(result(*(entry(name) for name in names)), "rect")[1:]
    assert len({box.get("fill") for box in boxes}) == len(names)


def test_chart_ignores_other_baselines() -> None:
    both = entry("heads", against={"plain": timing(1.25), "naive heads": timing(9.0)})
    assert svg(result(both)) == svg(result(entry("heads", 1.25)))
