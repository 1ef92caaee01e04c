"""The page in a browser: sorting, filtering, links, themes, narrow screens, and no network requests."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pages import ESCAPES, content

from clipfast.report.html.page import render

try:
    from playwright.sync_api import Browser, Error, Page, expect, sync_playwright
except ImportError:
    pytest.skip("playwright is not installed: pip install 'clipfast[dev]'", allow_module_level=True)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HEADS = content().heads
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    page: Path = tmp_path_factory.mktemp("page") / "report.html"
    page.write_text(render(content()), encoding="utf-8")
    return page.as_uri()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Open]:
    """Opens the page, and checks at the end that it made no request, logged nothing and ran no code from names."""
    messages: list[str] = []
    requests: list[str] = []
    contexts = []

    def open_page(fragment: str = "", width: int = 1280, scripts: bool = True, **options: Any) -> Page:
        viewport = {"width": width, "height": 900}
        context = browser.new_context(viewport=viewport, java_script_enabled=scripts, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address + fragment)
        return page

    yield open_page
    for context in contexts:
        with suppress(Error):
            context.close()
    assert messages == []
    assert [url for url in requests if not url.startswith("data:") and url.split("#")[0] != address] == []


def names(page: Page) -> list[str]:
    return page.locator("#table tbody tr:visible .c-head").all_inner_texts()


def button(page: Page, name: str) -> Any:
    return page.get_by_role("columnheader").get_by_role("button", name=name)


def test_sorting_by_click(visit: Open) -> None:
    page = visit()
    assert names(page) == [head.name for head in sorted(HEADS, key=lambda head: -head.share)]
    assert page.locator("th[aria-sort]").all_inner_texts() == ["share"]
    keys: dict[str, Callable[[Any], Any]] = {
        "rank": lambda head: -head.rank,
        "explained": lambda head: -head.explained,
        "lost": lambda head: head.alone.accuracy,
        "head": lambda head: (head.layer, head.head),
        "first texts": lambda head: head.texts[0].text,
    }
    for name, key in keys.items():
        button(page, name).click()
        expected = [head.name for head in sorted(HEADS, key=key)]
        assert names(page) == expected, name
        (cell,) = page.locator("th[aria-sort]").all()
        assert cell.inner_text() == name
        first = cell.get_attribute("aria-sort")
        assert first == ("ascending" if name in ("head", "first texts") else "descending")
        button(page, name).click()
        assert names(page) == expected[::-1]
        assert cell.get_attribute("aria-sort") != first


def test_sorting_by_keyboard(visit: Open) -> None:
    page = visit()
    page.locator("#filter").focus()
    page.keyboard.press("Tab")  # Close all
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "head"
    style = "getComputedStyle(document.activeElement)"
    assert page.evaluate(f"{style}.outlineStyle + parseInt({style}.outlineWidth)") == "solid3"
    page.keyboard.press("Enter")
    assert names(page) == [head.name for head in HEADS]
    page.keyboard.press("Space")
    assert names(page) == [head.name for head in HEADS][::-1]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("th[aria-sort]").all_inner_texts() == ["share"]


def test_link_opens_its_head(visit: Open) -> None:
    page = visit("#L1.H2")
    details = page.locator("[id='L1.H2']")
    expect(details).to_be_visible()
    expect(page.locator("#table tr.linked")).to_be_in_viewport()
    assert page.locator("#table details[open]").count() == 1
    assert page.evaluate("document.activeElement.closest('tr').cells[0].textContent") == "L1.H2"
    page.locator("#table").get_by_role("link", name="L0.H1").click()
    expect(page.locator("[id='L0.H1']")).to_be_visible()
    assert page.url.endswith("#L0.H1")
    # A link in the matrix of heads, followed twice: the second time the address does not change.
    page.locator("#overlaps").get_by_role("link", name="L1.H2").click()
    expect(page.locator("#table tr.linked .c-head")).to_have_text("L1.H2")
    page.get_by_role("button", name="Close all").click()
    expect(details).to_be_hidden()
    page.locator("#overlaps").get_by_role("link", name="L1.H2").click()
    expect(details).to_be_visible()
    expect(page.locator("#table tr.linked")).to_be_in_viewport()


def test_filter(visit: Open) -> None:
    page = visit()
    box, status = page.locator("#filter"), page.locator("#found")
    expect(status).to_have_text("6 heads")
    box.fill("RED star")
    assert names(page) == ["L1.H1"]
    expect(status).to_have_text("1 of 6 heads")
    box.fill("l0.h")
    assert sorted(names(page)) == ["L0.H0", "L0.H1", "L0.H2"]
    box.fill("zebra")
    assert names(page) == []
    expect(page.get_by_text("No head fits")).to_be_visible()
    page.locator("#overlaps").get_by_role("link", name="L0.H1").click()  # a head that the filter hides
    expect(page.locator("[id='L0.H1']")).to_be_visible()
    assert len(names(page)) == 6
    box.fill("tree")
    box.press("Escape")
    assert len(names(page)) == 6
    assert box.input_value() == ""


def brightness(page: Page) -> float:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@pytest.mark.parametrize("system", ["light", "dark"])
def test_light_and_dark(visit: Open, system: str) -> None:
    page = visit(color_scheme=system)
    toggle = page.locator("#theme")
    assert (brightness(page) > 128) == (system == "light")
    expect(toggle).to_have_text("Dark" if system == "light" else "Light")
    toggle.focus()
    page.keyboard.press("Enter")
    assert (brightness(page) > 128) == (system == "dark")
    expect(toggle).to_have_text("Light" if system == "light" else "Dark")
    for _ in range(20):  # storage is written by another process, with a delay
        page.reload()
        if (brightness(page) > 128) == (system == "dark"):
            break
    else:
        pytest.fail("the theme is not remembered")
    page.emulate_media(media="print")
    assert brightness(page) > 250
    expect(page.locator("nav")).to_be_hidden()


@pytest.mark.parametrize("width", [400, 320, 800, 1280])
def test_page_fits_every_width(visit: Open, width: int) -> None:
    page = visit(width=width)
    page.evaluate("document.querySelectorAll('details').forEach((element) => { element.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # All parts of the table and the figures are inside the window.
    right = "[...document.querySelectorAll('main *')].map((element) => element.getBoundingClientRect().right)"
    assert page.evaluate(f"Math.max(...{right})") <= width
    button(page, "rank").click()
    assert names(page)[0] == max(HEADS, key=lambda head: head.rank).name
    page.get_by_role("link", name="L0.H0").first.click()
    expect(page.locator("#table tr.linked")).to_be_in_viewport()


def test_names_are_not_executed(visit: Open) -> None:
    page = visit("#L0.H0")
    for name in (ESCAPES[0], ESCAPES[3]):
        expect(page.get_by_text(name, exact=False).first).to_be_attached()
    expect(page.locator("[id='L0.H0'] .map .name")).to_have_text(ESCAPES[0])
    assert page.locator("img[src='x'], [onerror], [onmouseover]").count() == 0
    assert page.title() == f"Report {ESCAPES[2]}"
    page.wait_for_timeout(200)  # visit fails if anything ran


def test_pictures_are_drawn(visit: Open) -> None:
    page = visit("#L0.H0")
    broken = "[...document.images].filter((image) => !image.complete || !image.naturalWidth).length"
    assert page.evaluate(broken) == 0
    thumb = page.locator("[id='L0.H0'] .i0").first
    assert thumb.evaluate("(element) => getComputedStyle(element).backgroundImage").startswith('url("data:image/webp')
    expect(page.get_by_role("img", name="0.png:").first).to_be_visible()
    for chart in page.locator("svg.chart").all():
        assert chart.bounding_box()["width"] > 200  # type: ignore[index]
        assert chart.get_attribute("aria-label")


def test_without_scripts(visit: Open) -> None:
    page = visit("#L1.H0", scripts=False)
    expect(page.locator("[id='L1.H0']")).to_be_visible()  # the browser opens the linked details itself
    expect(page.locator("#filter")).to_be_hidden()
    page.locator("summary").last.click()
    assert len(names(page)) == 6
