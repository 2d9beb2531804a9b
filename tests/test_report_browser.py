"""The report in headless Chromium: it opens without an error or a request, and does what its keys and buttons say."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def browser(start_browser: Callable[..., Any]) -> Iterator[Any]:
    """One that draws nothing as a GPU would, which takes long without one."""
    running = start_browser("--disable-gpu")
    yield running
    running.close()


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What the console and the network had to say; there must be nothing."""
    heard: list[str] = []
    yield heard
    assert heard == []


@pytest.fixture
def tab(browser: Any, tiny_report: Path, complaints: list[str]) -> Iterator[Any]:
    """The report in a tab of a laptop's size."""
    context = browser.new_context(viewport={"width": 1366, "height": 768}, color_scheme="light")
    page = context.new_page()
    listen(page, complaints)
    page.goto(tiny_report.as_uri())
    yield page
    context.close()


def listen(page: Any, complaints: list[str]) -> None:
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:")) else complaints.append(request.url),
    )


def column(tab: Any, caption: str, number: int) -> list[str]:
    rows = tab.locator("table", has=tab.get_by_text(caption, exact=True)).locator("tbody tr:visible")
    return [(row.locator("th, td").nth(number).text_content() or "").strip() for row in rows.all()]


def test_a_table_is_sorted_by_click_and_key(tab: Any) -> None:
    caption = "All 10 cases"
    tab.get_by_text("All cases: size, spacing and volumes").click()
    table = tab.locator("table", has=tab.get_by_text(caption, exact=True))
    case, volume = (table.locator("thead th", has_text=name) for name in ("Case", "Anterior (ml)"))
    names = column(tab, caption, 0)
    assert case.get_attribute("aria-sort") == "ascending" and names == sorted(names) and len(names) == 10
    volume.get_by_role("button").click()
    falling = [float(text) for text in column(tab, caption, 3)]
    assert volume.get_attribute("aria-sort") == "descending" and case.get_attribute("aria-sort") is None
    assert falling == sorted(falling, reverse=True) and falling[0] > falling[-1]
    volume.get_by_role("button").focus()
    tab.keyboard.press("Enter")
    assert volume.get_attribute("aria-sort") == "ascending"
    assert [float(text) for text in column(tab, caption, 3)] == falling[::-1]
    case.get_by_role("button").click()
    assert column(tab, caption, 0) == names


def test_cases_are_gone_through_by_keyboard(tab: Any) -> None:
    names = column(tab, "Held-out cases of tiny, worst first", 0)
    tab.keyboard.press("j")
    assert tab.evaluate("document.activeElement.dataset.case") == names[0]
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.dataset.case") == names[1]
    tab.keyboard.press("k")
    tab.keyboard.press("Enter")
    dialog = tab.locator("dialog#case")
    assert dialog.get_by_role("heading").inner_text() == names[0]
    assert dialog.locator("svg").count() == 3 and dialog.locator("path.reference").count() >= 3
    tab.keyboard.press("j")
    assert dialog.get_by_role("heading").inner_text() == names[1]
    tab.keyboard.press("r")
    assert dialog.locator("path.reference").count() == 0
    assert dialog.get_by_role("button", name="reference").get_attribute("aria-pressed") == "false"
    tab.keyboard.press("e")
    assert dialog.locator("path.error").count() == 0
    tab.keyboard.press("Escape")
    assert not dialog.is_visible()
    tab.locator(f"tr[data-case={names[1]}]:focus").wait_for(timeout=10_000)


def test_a_case_shows_its_scores(tab: Any) -> None:
    shown = json.loads(tab.locator("#report-data").text_content())["models"]["tiny"]["scores"]
    row = tab.locator("tr.opens").first
    row.click()
    table = tab.locator("dialog#case table")
    expected = [f"{label[0]:.4f}" for label in shown[row.get_attribute("data-case")]]
    assert [cells.locator("td").first.inner_text() for cells in table.locator("tbody tr").all()] == expected


def test_pictures_have_the_aspect_of_the_voxels(tab: Any) -> None:
    for figure in tab.locator(".worst figure svg").all()[:6]:
        box, (_, _, width, height) = figure.bounding_box(), map(float, figure.get_attribute("viewBox").split())
        assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.02)
        image = figure.locator("image").bounding_box()
        assert image["width"] == pytest.approx(box["width"], abs=1) and image["height"] == pytest.approx(
            box["height"], abs=1
        )


def test_light_dark_and_narrow(browser: Any, tiny_report: Path, complaints: list[str]) -> None:
    def paper(page: Any) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    for scheme, other in (("light", "dark"), ("dark", "light")):
        context = browser.new_context(viewport={"width": 1280, "height": 720}, color_scheme=scheme)
        page = context.new_page()
        listen(page, complaints)
        page.goto(tiny_report.as_uri())
        as_system = paper(page)
        assert (as_system == "rgb(255, 255, 255)") == (scheme == "light")
        while page.evaluate("document.documentElement.dataset.theme") != other:
            page.keyboard.press("t")
        assert paper(page) != as_system
        for width in (1366, 1024, 480):
            page.set_viewport_size({"width": width, "height": 720})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.emulate_media(media="print")
        assert paper(page) == "rgb(255, 255, 255)" and not page.locator("nav").is_visible()
        context.close()


def test_tables_and_figures_are_downloaded(tab: Any, tmp_path: Path) -> None:
    shown = json.loads(tab.locator("#report-data").text_content())["models"]["tiny"]["scores"]
    with tab.expect_download() as download:
        tab.locator(".panel .download", has_text="CSV").last.click()
    assert download.value.suggested_filename == "Task04_Hippocampus-Held-out-cases-of-tiny-worst-first.csv"
    with Path(download.value.path()).open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert {row["Case"]: [float(row["Anterior"]), float(row["Posterior"])] for row in rows} == {
        case: [label[0] for label in scores] for case, scores in shown.items()
    }
    tab.locator("tr.opens").first.click()
    with tab.expect_download() as download:
        tab.locator("dialog#case").get_by_role("button", name="CSV").click()
    case = tab.locator("dialog#case h2").inner_text()
    assert download.value.suggested_filename == f"Task04_Hippocampus-scores-of-{case}.csv"
    with Path(download.value.path()).open(newline="", encoding="utf-8-sig") as file:
        assert [float(row["Dice"]) for row in csv.DictReader(file)] == [label[0] for label in shown[case]]
    tab.keyboard.press("Escape")
    plane, chart = tab.locator(".worst figure").first, tab.locator("figure.chart", has_text="Loss").first
    for figure, share in ((plane, 0.1), (chart, 0.002)):
        figure.hover()
        with tab.expect_download() as download:
            figure.get_by_role("button", name="PNG").click()
        assert download.value.suggested_filename.endswith(".png") and not tab.locator("dialog#case").is_visible()
        picture = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
        assert picture.shape[1] >= 900
        assert (picture.min(axis=2) < 195).mean() > share, "it is drawn, not blank"
        assert (np.ptp(picture, axis=2) > 60).any(), "in colour"


def test_commands_are_copied(tab: Any) -> None:
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    command = tab.locator(".worst .command").first
    command.locator("xpath=following-sibling::button").click()
    tab.get_by_role("button", name="Copied").wait_for(timeout=10_000)
    assert tab.evaluate("navigator.clipboard.readText()") == command.inner_text()
    assert command.inner_text().startswith("nnlite view hippocampus_") and " -m tiny -w /" in command.inner_text()


def test_paper_and_captures_are_whole(tab: Any) -> None:
    """Print opens what is closed; a capture of the full page shows every section, however far down."""
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.locator("details:not([open])").count() == 0
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.locator("details:not([open])").count() >= 2
    picture = np.asarray(Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("L"))
    boxes = [section.bounding_box() for section in tab.locator("main > section").all()]
    assert len(boxes) == 8  # without Comparison, of one model
    for box in boxes:
        section = picture[round(box["y"]) : round(box["y"] + box["height"]), round(box["x"]) :]
        dark = (section < 128).any(axis=1)
        gaps = np.diff(np.flatnonzero(np.concatenate(([True], dark, [True]))))
        assert gaps.max() < 150, "pixels without anything dark"


def test_curves_are_read_off(tab: Any) -> None:
    plot = tab.locator("svg[data-curves]", has=tab.locator("title", has_text="fold 0, training")).first
    plot.hover()
    curves = json.loads(plot.get_attribute("data-curves"))
    text = tab.locator(".readout").inner_text()
    assert text.startswith("epoch ") and f"fold 0, training: {curves['series'][0]['y'][0]:.4g}"[:20] in text
