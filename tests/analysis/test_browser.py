"""Our pages in a real browser: nothing missing, nothing from elsewhere, readable for everyone.

Needs Chromium (Debian: ``apt-get install chromium``) and Playwright. Without them the tests are
skipped; where ``CI`` is set, they fail.
"""

import json
import os
import re
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from written_records import (
    OBJECT,
    make_results,
    make_trial,
    write_data_set,
    write_detections,
    write_run,
    write_sweep,
)

from focal_det.analysis import report
from focal_det.lab.report import overview
from focal_det.lab.tables import load_table

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PHONE, DESK = 375, 1280  # pixels
PAPER = 718  # pixels of A4 between margins of 1 cm
MARGINS = dict.fromkeys(("top", "right", "bottom", "left"), "1cm")
# What reaches over the right edge, unless it is inside of something that scrolls by itself.
TOO_WIDE = """() => [...document.querySelectorAll("body *")]
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .filter(e => {
    for (let p = e.parentElement; p; p = p.parentElement) {
      if (getComputedStyle(p).overflowX === "auto") return false;
    }
    return true;
  })
  .map(e => e.outerHTML.slice(0, 200))"""
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


def needed(condition, reason):
    """Skips, or fails where a machine is meant to have all that it takes."""
    if not condition:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        needed(False, f"Playwright cannot be imported: {error}")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    needed(path, f"none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def axe():
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ImportError as error:
        needed(False, f"axe-core cannot be imported: {error}")
    return Axe()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The files of both pages, made of records with everything that a page can show."""
    folder = tmp_path_factory.mktemp("pages")
    annotations = write_data_set(folder / "data")
    register_coco_instances("seen_val", {}, str(annotations), str(annotations.parent))
    output = folder / "output"
    write_many_records(output)
    page, problems = overview.build(output)
    assert [path.name for path, _ in problems] == ["bad.json"]
    assert "data:image/jpeg" in page
    (output / "summary.html").write_text(page, encoding="utf-8")
    results = json.loads((output / "demo" / "results.json").read_text())
    yield {
        "overview": output / "summary.html",
        "demo": report.write_report(results, output / "demo"),
    }
    DatasetCatalog.remove("seen_val")
    MetadataCatalog.remove("seen_val")


def write_many_records(output):
    """Two sweeps, one with speed and long names, one with the paper's numbers; runs; a bad file."""
    for name, table in (("fight", "detectors"), ("argument", "main")):
        rows = load_table(table).rows
        trials = [
            make_trial(row.label, seed, 5.0 * index + seed, table=table)
            for index, row in enumerate(rows)
            for seed in (1, 2)
        ]
        trials[2]["error"] = "loss_cls became infinite at iteration 3"
        trials.append(make_trial("a_label_without_any_space_" * 4, ap=None, table=table))
        write_sweep(output / name, trials)
        for trial in trials:
            write_detections(output / name / "trials" / trial["key"], [{**OBJECT, "score": 0.42}])
    (output / "fight" / "records" / "bad.json").write_text("{")
    results = make_results(output / "demo")
    (output / "demo" / "results.json").write_text(json.dumps(results))
    lines = [{"iteration": i, "total_loss": 2.0 / (1 + i), "bbox/AP": float(i)} for i in range(4)]
    config = "MODEL: {META_ARCHITECTURE: RetinaNet}\nDATASETS: {TEST: [seen_val]}\n"
    run = write_run(
        output / "a_folder_with_a_name_that_is_longer_than_a_phone_is_wide", lines, config
    )
    write_detections(run, [{**OBJECT, "score": 0.9}])


@pytest.fixture(params=["overview", "demo"])
def opened(request, browser, pages):
    """The page in a tab; whatever goes wrong there until the test ends makes it fail."""
    wrong = []
    tab = browser.new_page(viewport={"width": DESK, "height": 900})
    tab.on("console", lambda message: wrong.append(f"console {message.type}: {message.text}"))
    tab.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    tab.on("requestfailed", lambda request: wrong.append(f"failed: {request.url[:100]}"))
    tab.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("file:", "data:"))
            else wrong.append(f"asked for {request.url[:100]}")
        ),
    )
    tab.goto(pages[request.param].as_uri())
    tab.wait_for_load_state("load")
    yield tab
    tab.close()
    assert wrong == []


def test_it_opens_with_all_its_pictures(opened):
    pictures = "[...document.images].map(i => i.complete && i.naturalWidth > 0)"
    shown = opened.evaluate(pictures)
    assert len(shown) > 3
    assert all(shown)
    assert opened.evaluate("document.scripts.length") == 0


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_no_page_scrolls_sideways(opened, width):
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate(TOO_WIDE) == []
    assert opened.evaluate(OVERFLOW) <= 0


def test_what_scrolls_by_itself_is_reached_by_keyboard(opened):
    opened.set_viewport_size({"width": PHONE, "height": 800})
    unreached = """() => [...document.querySelectorAll("body *")]
      .filter(e => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX === "auto")
      .filter(e => e.tabIndex !== 0 || !e.getAttribute("aria-label"))
      .map(e => e.outerHTML.slice(0, 200))"""
    assert opened.evaluate(unreached) == []
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.textContent") == "Skip to the content"


def test_on_paper_nothing_is_cut_off(opened):
    opened.emulate_media(media="print")
    opened.set_viewport_size({"width": PAPER, "height": 1000})
    assert opened.evaluate(TOO_WIDE) == []
    assert opened.evaluate(OVERFLOW) <= 0
    # Paper does not scroll: nothing may be hidden in what would.
    hidden = """() => [...document.querySelectorAll(".scroll, pre")]
      .filter(e => e.scrollWidth > e.clientWidth + 1)
      .map(e => e.getAttribute("aria-label"))"""
    assert opened.evaluate(hidden) == []
    assert opened.evaluate("getComputedStyle(document.querySelector('figure')).breakInside") == (
        "avoid"
    )
    printed = opened.pdf(format="A4", margin=MARGINS)
    assert len(re.findall(rb"/Type\s*/Page\b(?!s)", printed)) > 0


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_axe_finds_nothing(opened, axe, width):
    opened.set_viewport_size({"width": width, "height": 800})
    found = axe.run(opened).response
    assert len(found["passes"]) > 20
    assert [
        (each["id"], each["help"], [node["html"][:200] for node in each["nodes"]])
        for each in found["violations"]
    ] == []
