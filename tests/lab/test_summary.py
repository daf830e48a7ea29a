"""What a summary says of records, against numbers worked out by hand."""

import functools
import json
import math
import re

import matplotlib as mpl
import pytest

from focal_det.analysis.records import METRICS
from focal_det.lab import charts, markdown, summary
from focal_det.lab.rivals import DIFFERENCES, differences
from focal_det.lab.tables import Row, Table
from focal_det.lab.trials import base_config

DEMO = "configs/demo/focal_retinanet_digits.yaml"

TABLE = Table(
    "t",
    "A table",
    "somewhere",
    (
        Row("a", {}, {"AP": 30.0}),
        Row("b", {}, {"AP": 31.0, "AP50": 50.0}),
        Row("c", {}, {"AP": 34.0}),
        Row("d", {}),
    ),
)


def record(label, seed, ap, error=None):
    return {
        "label": label,
        "seed": seed,
        "error": error,
        "iterations": 10,
        "data": [["x_train"], ["x_val"]],
        "metrics": {**dict.fromkeys(METRICS), "AP": ap},
        "inference_ms": {"median": 10.0 * seed, "p95": 99.0},
        "images_per_second": 4.0 * seed,
        "peak_memory_mib": 800.0,
        "parameters": 1_230_000,
        "gflops": None,
        "background_per_foreground": 50.0 * seed,
        "not_measured": {},
        "config": "SOLVER: {BASE_LR: 0.1}\n",
        "environment": {"commit": "abc", "device": "CPU"},
        "annotations": {"x_train": "11", "x_val": "22"},
        "processes": 1,
    }


def made(**values):
    """A summary of these APs by row, seeds from 1 on."""
    found = [
        record(label, seed, ap) for label, aps in values.items() for seed, ap in enumerate(aps, 1)
    ]
    return summary.summarise(TABLE, found)


def of_rows(**values):
    """The same of a table with these rows alone."""
    rows = tuple(row for row in TABLE.rows if row.label in values)
    found = [
        record(label, seed, ap) for label, aps in values.items() for seed, ap in enumerate(aps, 1)
    ]
    return summary.summarise(Table("t", "A table", "somewhere", rows), found)


def row(made, label):
    return next(each for each in made["rows"] if each["label"] == label)


def test_mean_spread_and_ranks():
    found = made(a=[10.0, 14.0], b=[20.0, 20.0], c=[12.0])
    assert row(found, "a")["metrics"]["AP"] == {
        "mean": 12.0,
        "sd": pytest.approx(math.sqrt(8)),  # of the sample: (2^2 + 2^2) / 1
        "values": [10.0, 14.0],
    }
    assert row(found, "c")["metrics"]["AP"]["sd"] is None
    assert [each["rank"] for each in found["rows"]] == [2, 1, 2, None]
    assert [each["paper_rank"] for each in found["rows"]] == [3, 2, 1, None]
    assert row(found, "a")["inference_ms"] == 15.0
    assert row(found, "d")["seeds"] == []
    assert found["background_per_foreground"] == 50.0  # the median of 50, 100, 50, 100, 50


@pytest.mark.parametrize(
    ("ours", "papers", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([4, 3, 2, 1], [10, 20, 30, 40], -1.0),
        ([1, 3, 2, 4], [10, 20, 30, 40], 4 / 6),  # five pairs agree, one does not
        ([1, 1, 2, 3], [10, 20, 30, 40], 5 / math.sqrt(5 * 6)),  # tau-b: one tie on our side
        ([1, 2, 3, 4, 9, None], [10, 20, 30, 40, None, 1], 1.0),  # what one side lacks
        ([1, 2, 3], [10, 20, 30], None),  # one of six orders: nothing
        ([1, 2, 3, 4], [10, 20, 30, None], None),
        ([5, 5, 5, 5], [10, 20, 30, 40], None),
    ],
)
def test_kendalls_tau_with_the_papers_order(ours, papers, tau):
    rows = [
        {"metrics": {"AP": {"mean": ap}}, "paper": {} if its is None else {"AP": its}}
        for ap, its in zip(ours, papers, strict=True)
    ]
    assert summary.rank_correlation(rows) == (None if tau is None else pytest.approx(tau))


@pytest.mark.parametrize(
    ("values", "chance"),
    [
        # Of 20 ways to say which three of six belong to a row, one puts it on top; of two rows.
        ({"a": [9.0, 10.0, 11.0], "b": [11.5, 13.0, 15.5]}, "10"),
        ({"a": [0.0, 0.0, 0.0], "b": [15.0, 16.0, 17.0]}, "10"),  # the others led to nothing
        # Only the row of three can be that far ahead: one of 35.
        ({"a": [1.0, 2.0, 3.0, 4.0], "b": [15.0, 16.0, 17.0]}, "2.9"),
        ({"a": [1.0, 1.0], "b": [9.0, 9.5], "c": [2.0, 2.0], "d": [3.0, 3.0]}, "14"),  # 4 of 28
    ],
)
def test_the_winner_is_ahead_by_more_than_the_seeds_differ(values, chance):
    found = of_rows(**values)
    assert found["winner"] == ("b" if float(chance) <= 10 else None)
    highest = max(max(aps) for label, aps in values.items() if label != "b")
    assert f"lowest seed ({values['b'][0]})" in found["verdict"]
    assert f"the highest of any other row ({highest})" in found["verdict"]
    assert f"all alike, one is so far ahead in {chance} % of cases" in found["verdict"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"a": [10.0, 12.0], "b": [11.5, 15.5]},
            "its lowest seed (11.5) is not above the highest of a",
        ),
        (
            {"a": [10.0, 12.0], "b": [12.0, 15.5]},
            "its lowest seed (12.0) is not above the highest of a",
        ),
        ({"a": [10.0, 11.0], "b": [15.0, 16.0]}, "in 33 % of cases: more seeds will tell"),
        ({"a": [10.0], "b": [15.0]}, "one seed says nothing of the spread (b is highest)"),
        ({"a": [10.0], "b": [15.0, 16.0]}, "fewer seeds than of b of a"),
        ({"a": [10.0, 11.0], "b": [15.0, 16.0], "c": []}, "no result of c"),
        ({"a": [0.0, 0.0], "b": [0.0, 0.0]}, "no row has an AP above 0"),
        ({"a": [5.0, 6.0]}, "one row only"),
    ],
)
def test_no_winner_inside_the_spread_or_before_all_have_run(values, says):
    found = of_rows(**values)
    assert found["winner"] is None
    assert says in found["verdict"]


def test_ranks_are_among_the_rows_that_have_run():
    found = made(a=[20.0], c=[12.0])
    assert [each["rank"] for each in found["rows"]] == [1, None, 2, None]
    assert [each["paper_rank"] for each in found["rows"]] == [2, None, 1, None]


def test_a_training_that_diverged_counts_as_nothing_and_is_named():
    found = summary.summarise(
        TABLE, [record("a", 1, None, "loss_cls is inf"), record("a", 2, 8.0), record("b", 1, 5.0)]
    )
    assert row(found, "a")["metrics"]["AP"]["values"] == [0.0, 8.0]
    assert row(found, "a")["diverged"] == 1
    text = markdown.render(found)
    assert "| 2 (1 diverged) |" in text
    assert "A training that diverged counts as AP 0." in text
    assert "diverged" not in markdown.render(made(a=[1.0]))


def test_markdown_has_the_papers_column_and_marks_the_winner():
    text = markdown.render(of_rows(a=[9.0, 10.0, 11.0], b=[11.5, 13.5, 15.5]))
    lines = text.splitlines()
    assert lines[0] == "### A table"
    cells = [cell.strip() for cell in next(x for x in lines if "**b**" in x).split("|")]
    assert cells[1:] == ["**b**", "13.5 ± 2.0", "", "", "3", "1", "31.0", "50.0", "", "1", ""]
    assert "Kendall's tau" not in text  # of two rows
    assert (
        "Mean ± standard deviation of the sample of seeds. "
        "10 iterations on x_train / x_val, commit abc, CPU." in text
    )
    assert "ms an image" not in text
    assert "not trained alike" not in text
    assert "One seed. 10 iterations" in markdown.render(made(a=[1.0]))
    json.dumps(made(a=[1.0]), allow_nan=False)


def test_a_table_of_speed_shows_it_and_what_differs(root):
    rows = (Row("ours", {}), Row("other", {}, detector="faster_rcnn"))
    table = Table("t", "A fight", "", rows, speed=True)
    cfg = base_config(str(root / DEMO), data="x", num_classes=10)
    found = [record("ours", 1, 10.0), record("ours", 3, 12.0)]
    found += [record("other", 1, 5.0), record("other", 3, 6.0)]
    found = [{**each, "config": cfg.dump()} for each in found]
    text = markdown.render(summary.summarise(table, found))
    cells = {
        x.split("|")[1].strip(" *"): [y.strip() for y in x.split("|")]
        for x in text.splitlines()
        if x.count("|") > 9
    }
    assert "paper's AP" not in text
    assert cells["ours"][7:14] == ["8.0", "20.0", "99.0", "800", "1.23", "", "100"]
    assert (cells["ours"][14], cells["other"][14]) == ("", "1")
    (note,) = re.findall(r"^1\. other: (.*)\.$", text, re.M)
    assert note == " ".join(differences(cfg, "faster_rcnn").split())
    assert len(note) > len(DIFFERENCES["faster_rcnn"])  # what the config adds
    assert "All rows agree in data" in text
    assert "none was tuned for another detector" in text
    assert "Milliseconds: from one image in memory to its detections, over 40 images." in text
    cfg.SOLVER.BASE_LR = 0.3
    other = {**record("other", 1, 5.0), "config": cfg.dump()}
    other["environment"] = {"commit": "abc", "device": "a GPU"}
    other |= {"annotations": {"x_train": "33"}, "processes": 2}
    text = markdown.render(summary.summarise(table, [*found[:2], other]))
    assert (
        "**The rows do not agree in all settings.** device: CPU or a GPU; processes: 1 or 2; "
        "annotations of x_train: 11 or 33; SOLVER.BASE_LR: 0.2 or 0.3; seeds: 1 or 1, 3."
    ) in text


def test_a_table_without_results_says_so():
    assert "\nNo result yet. none iterations" in markdown.render(made())


def test_times_of_machines_that_differ_are_not_compared_silently():
    """Rows of a table with times may differ in their settings, but not in where they ran."""
    rows = (Row("small", {}, {"AP": 1.0, "milliseconds": 5.0}), Row("large", {}))
    table = Table("t", "Sizes", "", rows)
    found = [record("small", 1, 10.0), record("large", 1, 12.0)]
    found[1]["config"] = "SOLVER: {BASE_LR: 0.2}\n"
    assert "alike" not in markdown.render(summary.summarise(table, found))
    found[1]["environment"] = {"commit": "def", "device": "CPU", "cpu": "a faster one"}
    said = markdown.render(summary.summarise(table, found))
    assert "**The times were not measured alike.** cpu: None or a faster one." in said
    found[1]["environment"]["torch"] = "9.9"
    said = markdown.render(summary.summarise(table, found))
    assert (
        "**The rows were not trained alike.** torch: 9.9 or None. "
        "**The times were not measured alike.** cpu: None or a faster one."
    ) in said


def test_a_seed_that_was_added_later_is_compared_within_itself():
    """Of the commit alone: another version or other annotations would be in all later means."""
    found = [record(label, seed, 10.0) for seed in (1, 2) for label in "ab"]
    for later in found[2:]:
        later["environment"] = {"commit": "def", "device": "CPU"}
    assert summary.unequal_settings(found, []) == {}
    assert summary.unequal_settings(found[:3], []) == {"seeds": ["1", "1, 2"]}
    found[3]["environment"] = found[0]["environment"]
    assert summary.unequal_settings(found, []) == {"commit": ["abc", "def"]}
    for later in found[2:]:
        later["environment"] = {"commit": "def", "device": "CPU", "torch": "9.9"}
        later["annotations"] = {"x_train": "33"}
    expected = {"torch": ["9.9", "None"], "annotations of x_train": ["11", "33"]}
    assert summary.unequal_settings(found, []) == expected


def test_whatever_is_no_part_of_the_loss_is_to_be_shared(root):
    """Each key of data, solver and detector by itself."""
    cfg = base_config(str(root / DEMO), data="x", num_classes=10)
    one = {**record("a", 1, 10.0), "config": cfg.dump()}
    general = ("DATASETS", "DATALOADER", "INPUT", "SOLVER", "TEST")
    detector = ("RETINANET", "ANCHOR_GENERATOR", "BACKBONE", "RESNETS", "FPN")
    keys = [key for name in general for key, _ in summary.leaves(name, cfg[name])]
    for name in detector:
        keys += [key for key, _ in summary.leaves(f"MODEL.{name}", cfg.MODEL[name])]
    assert len(keys) > 80
    for key in keys:
        other = cfg.clone()
        *path, last = key.split(".")
        functools.reduce(lambda node, name: node[name], path, other)[last] = "another"
        two = {**record("b", 1, 10.0), "config": other.dump()}
        said = summary.unequal_settings([one, two])
        assert list(said) == ([] if "FOCAL_LOSS" in key else [key]), key


def test_no_row_wins_by_something_else_than_its_setting():
    rows = (Row("a", {}), Row("b", {}))
    aps = {"a": (9.0, 10.0, 11.0), "b": (15.0, 16.0, 17.0)}
    found = [record(label, seed, aps[label][seed - 1]) for seed in (1, 2, 3) for label in "ab"]
    assert summary.summarise(Table("t", "T", "", rows), found)["winner"] == "b"
    for each in found[1::2]:
        each["environment"] = {"commit": "def", "device": "CPU", "cpu": "a faster one"}
    assert summary.summarise(Table("t", "T", "", rows), found)["winner"] == "b"
    found[1]["environment"]["torch"] = "9.9"
    made = summary.summarise(Table("t", "T", "", rows), found)
    assert made["winner"] is None
    assert made["verdict"] == (
        "No winner: b is ahead by more than the seeds differ, but the rows do not agree in torch."
    )
    found[1]["environment"]["torch"] = None
    found[1]["config"] = "SOLVER: {BASE_LR: 0.2}\n"
    speed = Table("t", "T", "", rows, speed=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "SHARED", ("SOLVER",))
        assert "not agree in SOLVER.BASE_LR." in summary.summarise(speed, found)["verdict"]


def test_metrics_that_the_paper_has_are_shown_beside_its_own():
    rows = (Row("a", {}, {"AP": 30.0, "APs": 11.0}), Row("b", {}))
    found = [record("a", 1, 10.0), record("b", 1, 12.0)]
    found[0]["metrics"]["APs"] = 7.0
    text = markdown.render(summary.summarise(Table("t", "T", "", rows), found))
    head, line = (
        [cell.strip() for cell in next(x for x in text.splitlines() if start in x).split("|")]
        for start in ("| AP50", "| a ")
    )
    cells = dict(zip(head, line, strict=True))
    assert (cells["APs"], cells["paper's APs"]) == ("7.0", "11.0")
    assert "APl" not in cells


def test_rows_that_were_not_trained_alike_are_not_compared_silently():
    """Where no times are shown, machines may differ, but not versions or annotations."""
    rows = (Row("a", {}, {"AP": 1.0}), Row("b", {}))
    found = [record("a", 1, 10.0), record("b", 1, 12.0)]
    found[1]["environment"] |= {"cpu": "a faster one", "commit": "def"}
    assert "alike" not in markdown.render(summary.summarise(Table("t", "T", "", rows), found))
    found[1]["environment"]["torch"] = "9.9"
    found[1]["annotations"] = {"x_train": "33"}
    said = markdown.render(summary.summarise(Table("t", "T", "", rows), found))
    assert (
        "**The rows were not trained alike.** torch: 9.9 or None; annotations of x_train: 11 or 33."
    ) in said


def test_what_no_seed_has_measured_has_its_reason(root):
    table = Table("t", "A fight", "", (Row("a", {}),), speed=True)
    config = base_config(str(root / DEMO), data="x", num_classes=10).dump()
    reasons = {"gflops": "RuntimeError: no <trace>", "inference_ms": "OSError: gone"}
    one = record("a", 1, 10.0) | {"not_measured": reasons, "inference_ms": None, "config": config}
    two = record("a", 2, 10.0) | {"config": config}
    text = markdown.render(summary.summarise(table, [one, two]))
    assert "Not measured: a, giga multiply-adds: RuntimeError: no &lt;trace>.\n" in text
    # Where no such column is, nothing is missing.
    assert "Not measured" not in markdown.render(summary.summarise(TABLE, [one]))


def test_the_ratio_of_a_table_is_that_of_anchors():
    rows = (Row("a", {}), Row("points", {}, detector="fcos"))
    found = [record("a", 1, 10.0), record("points", 1, 10.0) | {"background_per_foreground": 9.0}]
    found[1]["config"] = "{}"
    made = summary.summarise(Table("t", "T", "", rows), found)
    assert made["background_per_foreground"] == 50.0
    assert [each["background_per_foreground"] for each in made["rows"]] == [50.0, 9.0]


def test_a_users_own_words_stay_words():
    table = Table("t", "a <b> *c*\nd", "", (Row("x", {}),))
    assert markdown.render(summary.summarise(table, [record("x", 1, 1.0)])).startswith(
        "### a &lt;b> \\*c\\* d\n\n|  | AP |"
    )


def test_a_bar_in_a_label_is_no_new_cell():
    text = markdown.render(
        of_rows(a=[1.0]) | {"rows": [{**row(made(a=[1.0]), "a"), "label": "a|b"}]}
    )
    assert "| a\\|b |" in text


def test_records_of_other_rows_are_left_out():
    assert summary.summarise(TABLE, [record("other", 1, 99.0)])["commits"] == []


def test_what_is_drawn_does_not_hang_on_the_users_settings_or_on_what_was_drawn_before():
    found = made(a=[10.0, 11.0], b=[11.5, 15.5], d=[3.0])
    expected = {kind: charts.render(charts.draw_table(found), kind, "t") for kind in ("svg", "png")}
    with mpl.rc_context({"axes.facecolor": "black", "font.size": 30, "lines.linewidth": 9}):
        figure = charts.draw_table(found)
        assert {kind: charts.render(figure, kind, "t") for kind in ("png", "svg")} == expected


def test_the_picture_is_the_same_for_the_same_data(tmp_path):
    found = made(a=[10.0, 11.0], b=[11.5, 15.5], d=[3.0])
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        charts.save_figure(charts.draw_table(found), folder / "t")
    for kind in ("svg", "png"):
        one, two = ((tmp_path / name / f"t.{kind}").read_bytes() for name in ("one", "two"))
        assert one == two
        assert len(one) > 5000
