"""The HTML report in headless Chromium: accessible, quick, without errors, and usable on a phone.

Needs the extra `browser` and a Chromium: CHROMIUM, or chromium or google-chrome of the PATH.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pages
import pytest

from pytest_moe_routing.report import html

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium or google-chrome")
AXE = Path(axe.__file__).parent / "axe.min.js"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    texts = {
        "large": pages.page(),
        "releases": pages.page(models=12, releases=("0.32.0", "0.33.0")),
        "empty": html.page([]),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return folder


@pytest.fixture
def visit(browser, files):
    """Open a page; anything that its console says fails the test."""
    said, contexts = [], []

    def visit(name="large", size="desktop", scheme="light", **options):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **options
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto((files / f"{name}.html").as_uri())
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert said == []


def shoot(tab, name):
    """Keep a screenshot where MOE_SCREENSHOTS says, for people to look at."""
    if folder := os.environ.get("MOE_SCREENSHOTS"):
        tab.screenshot(path=Path(folder) / f"{name}.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["releases", "large", "empty"])
def test_a_page_has_no_accessibility_violation(visit, name, size, scheme):
    tab = visit(name, size, scheme, bypass_csp=True)
    shoot(tab, f"{name}-{size}-{scheme}")
    tab.evaluate("document.querySelectorAll('details').forEach((d, n) => { d.open = n % 40 < 2 })")
    tab.evaluate(AXE.read_text("utf-8"))
    found = tab.evaluate("axe.run()")
    told = [(v["id"], v["nodes"][0]["html"][:200]) for v in found["violations"]]
    assert told == []
    assert len(found["passes"]) > 10


def test_a_large_page_opens_in_a_second(visit, files):
    assert (files / "large.html").stat().st_size < 1_500_000
    tab = visit()
    timing = "const t = performance.getEntriesByType('navigation')[0]; t.domComplete - t.startTime"
    assert tab.evaluate(f"(() => {{ {timing.replace('; t.', '; return t.')} }})()") < 1000


def test_the_matrix_is_complete_without_a_script(visit):
    tab = visit(java_script_enabled=False)
    assert tab.locator("#matrix-0 tbody tr").count() == 100
    assert tab.locator("#matrix-0 tbody td a").count() == 800
    assert not tab.locator("form.filters").first.is_visible()


def test_releases_are_a_timeline(visit):
    tab = visit("releases")
    header = tab.locator("#timeline thead th").all_inner_texts()
    assert header[2:] == ["vllm 0.32.0, FlashInfer 0.7.0", "vllm 0.33.0, FlashInfer 0.7.0"]
    for row in tab.locator("#timeline tbody tr").all():
        before, after = (cell.get_attribute("class") for cell in row.locator("td[class]").all())
        assert before != after
    tab.locator("#releases").scroll_into_view_if_needed()
    shoot(tab, "timeline")


def test_filters(visit):
    tab = visit()
    rows = tab.locator("#matrix-0 tbody tr:visible")
    tab.get_by_label("Model").fill("MODEL-01 name")
    assert rows.count() == 10
    assert tab.locator("form.filters output").inner_text() == "10 of 100 models"
    tab.get_by_label("Model").fill("")
    tab.locator("form.filters").get_by_label("wrong").check()
    assert 0 < rows.count() < 100
    assert all("wrong" in text for text in rows.all_inner_texts())
    tab.locator("form.filters").get_by_label("crash").check()
    assert all("wrong" in text or "crash" in text for text in rows.all_inner_texts())


def test_a_verdict_leads_to_its_explanation_by_keyboard(visit):
    tab = visit()
    link = tab.locator("#matrix-0 td.wrong a").first
    link.focus()
    tab.keyboard.press("Enter")
    target = tab.locator(f"[id='{link.get_attribute('href')[1:]}']")
    box = target.bounding_box()
    assert 0 <= box["y"] < SIZES["desktop"][1]
    assert "wanted   0-7: 0.375" in target.locator("xpath=ancestor-or-self::details").inner_text()
    tab.keyboard.press("Home")
    tab.locator("body").press("Tab")
    assert tab.evaluate("document.activeElement.tagName") in ("A", "PRE", "SUMMARY")


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_wider_than_the_window_and_headers_stay(visit, size):
    tab = visit(size=size)
    assert tab.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    box = tab.locator(".scroll").first
    box.scroll_into_view_if_needed()
    box.evaluate("(e) => { e.scrollTop = 600; e.scrollLeft = 200 }")
    header, frame = tab.locator("#matrix-0 thead th").first.bounding_box(), box.bounding_box()
    assert abs(header["y"] - frame["y"]) < 5
    assert abs(header["x"] - frame["x"]) < 5
    shoot(tab, f"scrolled-{size}")


def test_the_decision_path_is_drawn(visit):
    tab = visit()
    drawing = tab.locator("section svg").first
    assert drawing.get_attribute("role") == "img"
    tab.evaluate("document.querySelector('section details').open = true")
    taken = drawing.locator(".taken text").all_text_contents()
    assert taken == [
        "scoring_func is softmax",
        "not e_score_correction_bias",
        "not renormalize",
        "Default",
    ]
    others = drawing.locator("g:not(.taken) text").all_text_contents()
    assert others == ["renormalize", "scoring_func is sigmoid"]
    drawing.scroll_into_view_if_needed()
    shoot(tab, "model")
