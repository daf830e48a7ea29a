"""tools/report.py on small records written by hand: numbers, what is missing, what is broken."""

import html
import json
import os
import re
import subprocess
import sys

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from pages import assert_stands_alone
from written_records import (
    ENVIRONMENT,
    OBJECT,
    make_results,
    make_trial,
    write_data_set,
    write_detections,
    write_run,
    write_sweep,
)

from focal_det.lab.report import differences, overview, reading
from focal_det.lab.summary import summarise
from focal_det.lab.tables import Row, Table, load_table

DASH = "\N{EN DASH}"
HOSTILE = '<script>alert("x")</script> & $x$ _'


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.fixture
def seen(tmp_path):
    """The data set of the trials, registered."""
    annotations = write_data_set(tmp_path / "data")
    register_coco_instances("seen_val", {}, str(annotations), str(annotations.parent))
    yield annotations.parent
    DatasetCatalog.remove("seen_val")
    MetadataCatalog.remove("seen_val")


def draw(folder):
    """The page, checked, its visible text in one line, and the problems."""
    page, problems = overview.build(folder)
    text = " ".join(" ".join(assert_stands_alone(page).text).split())
    visible = text[text.index("Skip to the content") :]
    assert problems or not re.search(r"\b(?:nan|None|inf)\b", visible)
    return page, text, problems


def cells(page, name):
    """What the row of a table says, by its name."""
    for row in re.findall(r"<tr.*?</tr>", page, re.S):
        values = [re.sub("<[^>]*>", "", x) for x in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)]
        if values[0] == name:
            return values[1:]
    raise AssertionError(f"no row {name}")


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_built_in_table_stands_beside_the_paper(output):
    labels = [row.label for row in load_table("main").rows]
    trials = [
        make_trial(label, seed, ap + seed, table="main")
        for label, ap in zip(labels, (0.0, 4.0, 5.0, 9.0, 3.0, 7.0), strict=True)
        for seed in (1, 2)
    ]
    page, text, problems = draw(write_sweep(output, trials))
    assert problems == []
    assert headings(page)[0] == "The argument in six rows"
    # 10 and 11: mean 10.5, deviation of the sample 1/sqrt(2); AP50 is twice the AP.
    assert cells(page, "FL, gamma 2, alpha .25ahead of the spread") == [
        "10.5 ± 0.7", "21.0 ± 1.4", DASH, DASH, DASH, DASH, "2", "1", "34.0", DASH, DASH, "1",
    ]  # fmt: skip
    assert cells(page, "FL*, gamma 4, beta 0")[8:] == ["33.9", "51.8", "36.4", "2"]
    # The paper's order of the four that it has is ours.
    assert "Kendall's tau with the paper's order of 4 rows: 1.00." in text
    assert "its lowest seed (10.0) is above the highest of any other row (9.0)." in text
    assert "12 trials; 40 iterations; data seen_train / seen_val; commit abc; CPU." in text
    assert "Means: cross entropy, prior .5 1.5;" in page
    assert "Curves and pictures are of each row's first trial, seed 1." in text


def test_a_table_of_speed_has_its_columns_and_picture(output):
    trials = [
        make_trial("FocalRetinaNet, focal loss", table="detectors"),
        make_trial("Detectron2 Faster R-CNN", table="detectors", gflops=None),
    ]
    page, text, _ = draw(write_sweep(output, trials))
    assert cells(page, "FocalRetinaNet, focal loss")[:8] == [
        "12.3", "24.6", DASH, DASH, DASH, DASH, "1", "1",
    ]  # fmt: skip
    speed = page[page.index("Time, memory and size") :]
    assert cells(speed, "FocalRetinaNet, focal loss") == [
        "20.0", "10.0", "20.0", "800", "1.23", "0.50", "100", "",
    ]  # fmt: skip
    assert cells(speed, "Detectron2 Faster R-CNN")[5] == DASH
    assert cells(speed, "Detectron2 Faster R-CNN")[7].startswith("two stages")
    assert "All rows agree in data" in text
    assert "Peak MiB: on a CPU, of the whole process" in text
    assert "AP over the time of an image, with the upper convex hull." in page


def test_what_is_said_of_a_winner_does_not_hang_on_the_version_that_kept_the_numbers(output):
    trials = [make_trial(x, seed, ap) for x, ap in (("a", 3.0), ("b", 5.0)) for seed in (1, 2)]
    write_sweep(output, trials)
    made = summarise(Table("mine", "My rates", "", (Row("a", {}), Row("b", {}))), trials)
    old = made | {"winner": "b", "verdict": "b wins.", "kendall_tau": 1.0}
    (output / "mine.json").write_text(json.dumps(old))
    page, text, _ = draw(output)
    assert headings(page)[0] == "My rates"
    assert "b wins" not in text
    assert "tau" not in text
    assert "ahead in 33 % of cases: more seeds will tell." in text


def test_a_table_of_the_users_own_is_that_which_ablate_kept(output):
    trials = [make_trial("a", ap=3.0), make_trial("b", ap=5.0)]
    write_sweep(output, trials)
    page, _, _ = draw(output)
    assert headings(page)[0] == "Table mine"
    rows = (Row("a", trials[0]["overrides"], {"AP": 30.0}), Row("b", trials[1]["overrides"]))
    made = summarise(Table("mine", "My rates", "at home", rows), trials)
    (output / "mine.json").write_text(json.dumps(made))
    page, text, _ = draw(output)
    assert headings(page)[0] == "My rates"
    assert "at home. Two trials;" in text
    assert cells(page, "a")[8] == "30.0"
    # What has been run since is not in it.
    write_sweep(output, [*trials, make_trial("a", 2, ap=4.0)])
    page, _, _ = draw(output)
    assert headings(page)[0] == "Table mine"
    assert cells(page, "a")[0] == "3.5 ± 0.7"


def test_a_table_whose_trials_another_one_ran_is_shown(output):
    trials = [make_trial("a", ap=3.0)]
    write_sweep(output, trials)
    made = summarise(Table("other", "Other", "", (Row("slow", trials[0]["overrides"]),)), [
        {**trials[0], "label": "slow"}
    ])  # fmt: skip
    (output / "other.json").write_text(json.dumps(made))
    page, _, _ = draw(output)
    assert headings(page)[:2] == ["Table mine", "Other"]
    assert cells(page[page.index(">Other<") :], "slow")[0] == "3.0"
    assert page.count('alt="Loss of foreground anchors over the iterations.') == 2


def test_a_row_that_another_table_ran_is_not_missing(output):
    """As after table 1d, and a sweep of table 3 that was killed before it wrote its summary."""
    focal = next(row for row in load_table("3").rows if row.label == "focal loss")
    star = next(row for row in load_table("3").rows if row.label == "FL* gamma 4, beta 0")
    trials = [
        make_trial("any name", ap=23.4, table="1d", overrides=focal.overrides),
        make_trial(star.label, ap=21.5, table="3", overrides=star.overrides),
        make_trial("any name", 2, ap=66.6, table="1d", overrides=focal.overrides, iterations=41),
    ]
    page, _, _ = draw(write_sweep(output, trials))
    of_three = page[page.index("FL*, another form of the same idea") :]
    assert cells(of_three, "focal loss")[0] == "23.4"
    assert cells(of_three, star.label)[0] == "21.5"


def test_one_row_run_in_two_settings_gives_two_tables(output):
    fast = {"SOLVER": {"BASE_LR": 0.02, "MAX_ITER": 40}}
    trials = [
        make_trial("a", ap=3.0),
        make_trial("b", ap=4.0),
        make_trial("a", ap=5.0, settings=fast),
        make_trial("a", ap=9.0, iterations=80),
    ]
    page, _, _ = draw(write_sweep(output, trials))
    assert headings(page)[:3] == [
        "Table mine (BASE_LR 0.01, 40 iterations)",
        "Table mine (BASE_LR 0.02, 40 iterations)",
        "Table mine (80 iterations)",
    ]
    second = page[page.index("<h2>Table mine (BASE_LR 0.02") :]
    assert cells(second, "a")[0] == "5.0"


def test_a_training_that_diverged_is_named(output):
    error = "loss_cls became infinite"
    page, text, _ = draw(write_sweep(output, [make_trial("a", ap=None, error=error)]))
    assert cells(page, "a")[0] == "0.0"
    assert cells(page, "a")[6] == "1 (1 diverged)"
    assert "a, seed 1: loss_cls became infinite" in text


def test_what_older_records_lack_is_a_dash(output):
    trial = make_trial("FocalRetinaNet, focal loss", table="detectors")
    for name in ("images_per_second", "parameters", "gflops", "background_per_foreground"):
        del trial[name]
    trial["inference_ms"], trial["metrics"] = None, {"AP": float("nan")}
    trial["curves"] = {"iteration": [], "loss_cls": []}
    page, _, problems = draw(write_sweep(output, [trial]))
    assert problems == []
    speed = page[page.index("Time, memory and size") :]
    assert cells(speed, "FocalRetinaNet, focal loss") == [
        DASH, DASH, DASH, "800", DASH, DASH, DASH, "",
    ]  # fmt: skip


def test_detections_stand_beside_ground_truth(output, seen):
    trials = [make_trial("a"), make_trial("b"), make_trial("a", 2)]
    write_sweep(output, trials)
    write_detections(output / "trials" / trials[0]["key"], [{**OBJECT, "score": 0.42}])
    write_detections(output / "trials" / trials[1]["key"], [])
    page, text, problems = draw(output)
    assert problems == []
    assert "Validation image 7 with the true boxes. Objects: cup." in page
    assert "The same image with the detections of a: 1 right, 0 wrong, 0 missed." in page
    assert "The same image with the detections of b: 0 right, 0 wrong, 1 missed." in page
    assert page.count("data:image/jpeg") == 2 * 3  # images; truth and rows
    thresholds = page[page.index("From which score on boxes are drawn") :]
    assert cells(thresholds, "a") == ["42%", "100%", "100%", "100%"]
    assert "No pictures of detections." not in text
    (seen / "7.png").unlink()
    page, text, _ = draw(output)
    assert "one image is not shown" in text
    (seen / "6.png").unlink()
    assert "The images of seen_val are not where they were." in draw(output)[1]


def test_at_most_six_rows_have_pictures_the_best_ones(output, seen):
    trials = [make_trial(f"row {index}", ap=float(index)) for index in range(8)]
    write_sweep(output, trials)
    for trial in trials:
        write_detections(output / "trials" / trial["key"], [])
    page, _, _ = draw(output)
    shown = set(re.findall(r"detections of (row \d)", page))
    assert shown == {f"row {index}" for index in range(2, 8)}
    assert page.count("Loss of foreground anchors, 1 to 6 of 8 over") == 1
    assert page.count("Loss of foreground anchors, 7 to 8 of 8 over") == 1


def test_pictures_that_cannot_be_are_explained(output, tmp_path):
    trial = make_trial("a")
    write_sweep(output, [trial])
    assert "No detections are kept of these runs any more." in draw(output)[1]
    write_detections(output / "trials" / trial["key"], [])
    assert "The data set seen_val is not known here" in draw(output)[1]
    register_coco_instances("seen_val", {}, str(tmp_path / "gone.json"), str(tmp_path))
    try:
        assert "The annotations of seen_val cannot be read any more." in draw(output)[1]
    finally:
        DatasetCatalog.remove("seen_val")
        MetadataCatalog.remove("seen_val")


def test_detections_that_do_not_fit_are_named(output, seen):
    trial = make_trial("a")
    write_sweep(output, [trial])
    write_detections(output / "trials" / trial["key"], [{**OBJECT, "category_id": 9, "score": 0.5}])
    _, text, ((path, why),) = draw(output)
    assert path.name == "coco_instances_results.json"
    assert why == "its classes are not those that the data set has now"
    assert why in text


def test_a_comparison_of_losses_is_the_demos(output):
    results = make_results(output / "demo")
    (output / "demo" / "results.json").write_text(json.dumps(results))
    run = output / "demo" / "FocalLoss"
    write_run(run, [], "MODEL: {META_ARCHITECTURE: FocalRetinaNet}\n")
    page, text, problems = draw(output)
    assert problems == []
    assert headings(page)[0] == "One detector, two classification losses: demo"
    assert cells(page, "FocalLossbest AP")[:2] == ["12.3", "30.0"]
    assert "Training runs" not in headings(page)  # its folder is part of the comparison
    assert "The same image with the detections of FocalLoss: 1 right" in page
    assert "No config is kept of demo: CrossEntropyLoss." in text
    (output / "demo" / "images" / "7.png").unlink()
    assert "one image is not shown: there is no such file any more." in draw(output)[1]


LINES = [
    {
        "iteration": 19,
        "total_loss": 3.0,
        "loss_cls": 2.0,
        "loss_box_reg": 1.0,
        "classification/foreground": 1.5,
        "classification/background": 0.5,
    },
    {"iteration": 39, "total_loss": 1.5, "loss_cls": 1.0, "loss_box_reg": float("inf")},
    {"iteration": 40, "bbox/AP": 7.0, "bbox/AP50": float("nan")},
]


def test_a_training_run_has_its_ap_and_its_curves(output):
    write_run(output / "one", LINES)
    page, text, problems = draw(output)
    assert problems == []
    assert cells(page, "one") == ["RetinaNet", "40", "7.0", DASH, DASH, DASH, DASH, DASH]
    assert "Losses of one over the iterations. At the end: total_loss 1.5, loss_cls 1," in page
    assert "At the end: foreground 1.5, background 0.5." in page
    assert "Detections of more than one data set" not in text


def test_of_a_run_started_anew_the_last_counts(output):
    again = [{**LINES[0], "total_loss": 9.0}, {"iteration": 20, "bbox/AP": 1.0}]
    write_run(output / "one", [*LINES, *again])
    page, _, _ = draw(output)
    assert cells(page, "one")[1:3] == ["20", "1.0"]
    assert "At the end: total_loss 9," in page
    assert "AP of one over" not in page


def test_of_each_iteration_the_lines_of_its_last_run_are_kept(tmp_path):
    losses = [{"iteration": i, "total_loss": 1.0} for i in (19, 39, 59)]
    evaluation = {"iteration": 59, "bbox/AP": 1.0}
    again = [{"iteration": i, "total_loss": 2.0} for i in (39, 59)]
    write_run(tmp_path / "run", [*losses, evaluation, *again, evaluation])
    kept = reading.read_lines(tmp_path / "run" / "metrics.json")
    assert kept == [losses[0], *again, evaluation]


def test_config_differences_name_values_and_runs(output):
    fast = {"SOLVER": {"BASE_LR": 0.02, "MAX_ITER": 40}, "OUTPUT_DIR": "elsewhere"}
    write_sweep(output, [make_trial("a"), make_trial("a", 2), make_trial("b", settings=fast)])
    page, _, _ = draw(output)
    table = page[page.index("Config keys in which the three runs differ") :]
    assert cells(table, "SOLVER.BASE_LR") == ["0.01 table mine: a0.02 table mine: b"]
    assert cells(table, "SEED") == [
        "1 table mine: a (seed 1); table mine: b2 table mine: a (seed 2)"
    ]
    for same in ("SOLVER.MAX_ITER", "OUTPUT_DIR"):
        assert f"<code>{same}</code>" not in table


def test_differences_are_told_shortly():
    entries = [
        differences.Entry(f"group {index % 9}", str(index), None, {"A": int(index < 3), "B": None})
        for index in range(18)
    ]
    zero, one = differences.compare(entries)["A"]
    assert (zero.text, zero.runs) == ("0", "all others (15 runs)")
    assert one.runs == "group 0: 0; group 1: 1; group 2: 2"
    assert differences.compare(entries)["B"][0].text == "unknown"
    whole = [differences.Entry("g", str(x), None, {"A": 1}) for x in range(9)]
    rest = [differences.Entry(f"run {x}", "", None, {"B": 2}) for x in range(8)]
    found = differences.compare([*whole, *rest])
    assert [value.runs for value in found["A"]] == [
        "all of g",
        "run 0; run 1; run 2; run 3; run 4; run 5 and 2 more",
    ]
    assert found["A"][1].text == "not set"


def test_environments_are_compared(output):
    other = {**ENVIRONMENT, "commit": None}
    write_sweep(output, [make_trial("a"), make_trial("b")])
    assert "Two records, all of the same versions" in draw(output)[1]
    write_sweep(output, [make_trial("a"), make_trial("b", environment=other)])
    page, text, _ = draw(output)
    assert "Two records. They differ in commit." in text
    assert cells(page[page.index("<h2>Versions") :], "commit") == [
        "abc table mine: aunknown table mine: b"
    ]


def test_names_from_files_are_harmless(output, seen):
    trials = [
        make_trial(HOSTILE, key="k", error=None, environment={HOSTILE: HOSTILE}),
        make_trial("b", table=HOSTILE, error=HOSTILE, settings={HOSTILE: HOSTILE}),
    ]
    write_sweep(output / "<b>sweep", trials)
    write_detections(output / "<b>sweep" / "trials" / "k", [{**OBJECT, "score": 0.42}])
    results = make_results(output / "demo")
    results["settings"]["class_names"] = {"1": HOSTILE, "2": "x"}
    results["records"][0]["loss"] = "<i>Loss"
    (output / "demo" / "results.json").write_text(json.dumps(results))
    write_run(output / "<u>run", [{"iteration": 1, "total_loss": 1.0, "loss_<s>": 2.0}])
    (output / "<b>sweep" / "bad<em>.json").write_text("{")
    page, _, problems = draw(output)
    assert [path.name for path, _ in problems] == ["bad<em>.json"]
    for tag in ("<b>sweep", "<i>Loss", "<u>run", "loss_<s>", "bad<em>", HOSTILE):
        assert tag not in page
        assert html.escape(tag) in page


def bad_files(output):
    """Each is read by another hand, and none of them is what it should be."""
    write_sweep(output / "s", [make_trial("a")])
    write_run(output / "r", LINES)
    broken = {
        "s/records/cut.json": '{"schema": 1, "key',
        "s/records/new.json": json.dumps({**make_trial("b"), "schema": 2}),
        "s/records/list.json": "[]",
        "s/records/nolabel.json": json.dumps({**make_trial("b"), "label": None}),
        "s/records/curves.json": json.dumps(
            {**make_trial("b"), "curves": {"iteration": [1], "loss_cls": []}}
        ),
        "s/records/config.json": json.dumps({**make_trial("b"), "config": "a: !!python/x [1]"}),
        "s/other.json": "{}",
        "d/results.json": '{"settings": {}, "pictures": [], "records": [{}]}',
        "e/results.json": '{"settings": {}, "pictures": [], "records": []}',
        "t/metrics.json": "no\n",
        "t/config.yaml": "A: 1\n",
        "u/metrics.json": '["x"]\n',
        "u/config.yaml": "- 1\n",
    }
    for name, content in broken.items():
        path = output / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    (output / "s" / "records" / "latin.json").write_bytes(b'{"schema": "\xff"}')
    return {*broken, "s/records/latin.json"} - {"t/config.yaml"}


def test_files_that_cannot_be_read_are_named_and_the_rest_is_shown(output):
    expected = bad_files(output)
    page, text, problems = draw(output)
    assert {path.relative_to(output).as_posix() for path, _ in problems} == expected
    assert all(why for _, why in problems)
    assert f"{len(expected)} files could not be read" in text
    for name in expected:
        assert f"<code>{name}</code>:" in page
    assert "schema 2, known is 1" in text
    assert cells(page, "a")[0] == "12.3"
    assert cells(page, "r")[2] == "7.0"


def test_a_trial_without_a_record_is_counted(output):
    write_sweep(output, [make_trial("a")])
    write_run(output / "trials" / "cafe", LINES)
    page, text, _ = draw(output)
    assert "One trial of output began and left no record yet: cafe." in text
    assert "Training runs" not in headings(page)


def test_the_page_is_the_same_for_the_same_records(output, seen):
    trial = make_trial("a")
    write_sweep(output, [trial])
    write_detections(output / "trials" / trial["key"], [{**OBJECT, "score": 0.42}])
    assert overview.build(output)[0] == overview.build(output)[0]


def test_a_single_section_needs_no_contents(output):
    write_sweep(output, [make_trial("a")])
    page, _, _ = draw(output)
    links = re.findall(r'href="#([\w-]+)"', page)
    assert links[1:] == re.findall(r'<section id="([\w-]+)"', page)
    assert len(links) == 1 + len(headings(page))


@pytest.fixture
def tool(root):
    """A function that runs the script where Ray cannot be imported."""

    def run(*words, status=0):
        code = (
            "import runpy, sys; sys.modules['ray'] = None; sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        script = str(root / "tools" / "report.py")
        done = subprocess.run(
            [sys.executable, "-c", code, script, *map(str, words)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


def test_the_tool_writes_one_file_and_says_what_it_could_not_read(tool, output, tmp_path):
    half = make_trial("b", table="t \ud800")  # half a character
    write_sweep(output, [make_trial("a"), half])
    (output / "records" / "bad.json").write_text("{")
    done = tool(output)
    assert done.stdout.strip() == str(output / "summary.html")
    assert f"cannot be read: {output}/records/bad.json: " in done.stderr
    assert "Table mine" in (output / "summary.html").read_text(encoding="utf-8")
    tool(output, "--output", tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").is_file()


def test_a_folder_without_records_ends_with_2(tool, output):
    assert "OUTPUT_DIR must be a folder" in tool(output, status=2).stderr
    (output / "records").mkdir(parents=True)
    said = tool(output, status=2).stderr
    assert f"no records below {output}: looked for records/KEY.json" in said
    (output / "records" / "bad.json").write_text("{")
    assert "records/bad.json: " in tool(output, status=2).stderr
    assert not (output / "summary.html").exists()
