"""The page of a comparison: sound HTML that stands alone, whatever the records hold."""

import copy
import re

import pytest
from pages import assert_stands_alone, parse
from written_records import METRICS, OBJECT, make_results, make_run

from focal_det.analysis import report
from focal_det.losses import LOSS_REGISTRY


@pytest.fixture
def results(tmp_path):
    return make_results(tmp_path)


def test_page_stands_alone_and_is_accessible(results, tmp_path):
    path = report.write_report(results, tmp_path)
    page = path.read_text(encoding="utf-8")
    checker = assert_stands_alone(page)
    tags = {tag for tag, _ in checker.tags}
    assert {"caption", "figcaption"} <= tags
    images = [attributes for tag, attributes in checker.tags if tag == "img"]
    assert len(images) == 3 + 3  # charts; ground truth and one a loss


def test_table_marks_the_best_and_only_the_best(results, tmp_path):
    page = report.render(results, tmp_path)
    rows = re.findall(r"<tr.*?</tr>", page, flags=re.DOTALL)
    best = [row for row in rows if 'class="best"' in row]
    assert len(best) == 1
    assert "FocalLoss" in best[0]
    assert "best AP" in best[0]
    assert "<b>12.3</b>" in best[0]
    assert "61 s" in best[0]
    assert "4.3 above CrossEntropyLoss" in page


def test_the_gap_is_that_of_the_numbers_shown(results, tmp_path):
    results["records"] = [make_run("CrossEntropyLoss", 1.57), make_run("FocalLoss", 1.73)]
    page = report.render(results, tmp_path)
    assert "<b>1.6</b>" in page
    assert "has the highest AP, 1.7, 0.1 above CrossEntropyLoss" in page


def test_imbalance_is_worked_out_of_the_curves(results, tmp_path):
    # Mean of 10 and 14 anchors on objects, of 3069: (3069 - 12) / 12 = 254.75.
    page = report.render(results, tmp_path)
    assert "<strong>3,069</strong>" in page
    assert "<strong>12.0</strong>" in page
    assert "<strong>1 : 255</strong>" in page


def test_charts_say_in_words_where_they_end(results, tmp_path):
    page = report.render(results, tmp_path)
    # Background 0.6 of 0.4 + 0.6.
    assert "Share of background in the loss over the iterations. At the end: " in page
    assert "FocalLoss 60" in page


def test_pictures_are_counted(results, tmp_path):
    page = report.render(results, tmp_path)
    assert "1 right, 0 wrong, 0 missed" in page
    assert "<td>30%</td><td>50%</td><td>25%</td><td>33%</td>" in page


def without_numbers(results):
    for run in results["records"]:
        run["metrics"] = dict.fromkeys(METRICS)
        run["per_class"] = {}
        run["operating_point"] = None
        run["pictures"] = [{"right": [], "wrong": [], "missed": [OBJECT]}]


def with_zero(results):
    for run in results["records"]:
        run["metrics"] = dict.fromkeys(METRICS, 0.0)
        run["curves"]["background"] = [0.0, 0.0]
        run["curves"]["foreground"] = [0.0, 0.0]


def without_curves(results):
    for run in results["records"]:
        run["curves"] = {name: [] for name in run["curves"]}


def with_a_failure(results):
    run = results["records"][0]
    without_numbers({"records": [run]})
    run["error"] = "Loss became infinite or NaN at iteration=3!"
    run["seconds"]["evaluation"] = None
    run["anchors_per_image"] = None


def without_runs(results):
    results["records"] = []


def without_pictures(results):
    results["pictures"] = []


def with_markup_in_names(results):
    results["settings"]["class_names"] = {"1": "<b>&", "2": '"'}
    results["settings"]["objects_per_class"] = {"<b>&": 1, '"': 0}
    results["records"][0]["loss"] = "My<Loss>"


@pytest.mark.parametrize(
    "change",
    [
        without_numbers,
        with_zero,
        without_curves,
        with_a_failure,
        without_runs,
        without_pictures,
        with_markup_in_names,
    ],
)
def test_unusual_records_give_a_sound_page(results, tmp_path, change):
    change(results)
    page = report.render(results, tmp_path)
    parse(page)
    visible = " ".join(parse(page).text)
    assert not re.search(r"\b(?:nan|None)\b", visible)


def test_a_failure_is_said_in_the_table(results, tmp_path):
    with_a_failure(results)
    assert "Loss became infinite or NaN at iteration=3!" in report.render(results, tmp_path)


def test_records_are_not_changed(results, tmp_path):
    before = copy.deepcopy(results)
    report.render(results, tmp_path)
    assert results == before


def test_a_loss_without_an_explanation_of_ours_is_told_by_its_docstring(results, tmp_path):
    results["records"].append(make_run("MyLoss"))
    assert "A loss of the user&#x27;s own." in report.render(results, tmp_path)


def test_explanations_are_of_losses_that_exist():
    assert set(report.EXPLANATIONS) <= {name for name, _ in LOSS_REGISTRY}
