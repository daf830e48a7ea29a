"""tools/ablate.py as a user types it, with Ray."""

import importlib
import json
import math
import os
import subprocess
import sys

import pytest
from written_records import make_trial

from focal_det.lab.trial_records import load_records, load_setting, read_record, save_record

TABLE = """
title: Two rates
source: nowhere
axes: {SOLVER.BASE_LR: [0.01, 0.02]}
"""


@pytest.fixture
def ablate(root, tmp_path):
    """A function that runs the script; what it prints."""

    def run(*words, status=0):
        command = [sys.executable, str(root / "tools" / "ablate.py"), *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_a_sweep_runs_goes_on_and_makes_its_table(ablate, few, tmp_path):
    (tmp_path / "rates.yaml").write_text(TABLE)
    words = ["--table", "rates.yaml", "--data", few, "--budget", 2, "--output", "out"]
    batch = ["SOLVER.IMS_PER_BATCH", 2]
    assert "2 trials: 0 are done, 2 are to be run" in ablate(*words, "--dry-run", *batch)
    assert not (tmp_path / "out").exists()
    text = ablate(*words, *batch)
    assert "| BASE_LR 0.01 |" in text
    assert (tmp_path / "out" / "rates.md").read_text() in text
    made = json.loads((tmp_path / "out" / "rates.json").read_text())
    assert [row["seeds"] for row in made["rows"]] == [[1], [1]]
    assert made["data"] == ["few_train / few_val"]
    for kind in ("svg", "png"):
        assert (tmp_path / "out" / f"rates.{kind}").is_file()
    # As after a kill: what has a record is not run again.
    records = sorted((tmp_path / "out" / "records").iterdir())
    before = records[0].stat().st_mtime_ns
    records[1].unlink()
    assert "2 trials: 1 are done, 1 are to be run" in ablate(*words, *batch)
    assert sorted((tmp_path / "out" / "records").iterdir()) == records
    assert records[0].stat().st_mtime_ns == before

    # Another table with a setting that was run already has its result, under its own label.
    other = "rows: [{label: slow, overrides: {SOLVER.BASE_LR: 0.01}}]"
    (tmp_path / "other.yaml").write_text(other)
    text = ablate("--table", "other.yaml", *words[2:], *batch)
    assert "1 trials: 1 are done, 0 are to be run" in text
    (row,) = json.loads((tmp_path / "out" / "other.json").read_text())["rows"]
    assert row["label"] == "slow"
    assert row["metrics"] == made["rows"][0]["metrics"]


@pytest.fixture
def tool(root, monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(root / "tools"))
    return importlib.import_module("ablate")


def test_each_data_set_has_a_folder_of_its_own(tool, few):
    assert tool.parse(["--table", "1a", "--data", few]).output == f"output/ablate/{few}"
    assert tool.parse(["--table", "1a", "--data", few, "--output", "x"]).output == "x"


def test_a_script_for_one_table_has_help_of_its_own(root, tmp_path):
    command = [sys.executable, str(root / "tools" / "benchmark_detectors.py")]
    said = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("usage: benchmark_detectors.py")
    assert "--table" not in said
    assert "against Detectron2's and torchvision's detectors" in said
    said = subprocess.run(
        [*command, "--data", "digits_clutter", "--dry-run", "--output", str(tmp_path)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "11 trials: 0 are done, 11 are to be run" in said
    assert "table detectors, seed 1: torchvision FCOS" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--table", "9", "--data", "digits_clutter"), "--table must be one of 1a, 1b"),
        (("--table", "3", "--data", "no"), "--data no: 'no_train' is not registered"),
        (("--table", "3", "--data", "digits_clutter", "--seeds", "0"), "--seeds must be 1 or more"),
        (("--table", "3", "--data", "digits_clutter", "--config", "x"), "--config must name a YA"),
        (("--table", "3", "--data", "digits_clutter", "--config", "list.yaml"), "list.yaml: a con"),
        (("--table", "3", "--data", "digits_clutter", "--output", "list.yaml"), "must name a fold"),
        (("--table", "3", "--data", "digits_clutter", "--config", "raw.yaml"), "raw.yaml: no YAML"),
        (
            ("--table", "3", "--data", "digits_clutter", "DATASETS.TRAIN", "()"),
            "DATASETS.TRAIN cannot be overridden: --data says that",
        ),
        (
            ("--table", "3", "--data", "digits_clutter", "SOLVER.LR", "1"),
            "Non-existent key: SOLVER.LR",
        ),
    ],
)
def test_a_command_line_that_cannot_be_carried_out_ends_with_2(ablate, tmp_path, words, says):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "raw.yaml").write_bytes(b"\xff")
    assert says in ablate(*words, status=2)


@pytest.mark.parametrize("tool", ["ablate", "analyze", "results"])
def test_what_is_wrong_with_ones_own_data_comes_before_that_they_are_unknown(root, tool):
    words = {
        "ablate": ("--table", "3", "--data", "cells", "--dry-run"),
        "analyze": ("imbalance", "--data", "cells"),
        "results": ("--dry-run",),
    }
    ran = subprocess.run(
        [sys.executable, root / "tools" / f"{tool}.py", *words[tool]],
        env={**os.environ, "FOCAL_DET_DATASETS": "cells_train:none.json:images"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "entry 'cells_train:none.json:images': annotations file not found" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_more_than_there_is_cannot_be_asked_for(ablate, few):
    words = ("--table", "3", "--data", few, "--budget", 1, "--cpus", 1000)
    assert "--cpus 1000 --gpus 0 a trial, but no machine has both" in ablate(*words, status=2)


@pytest.mark.parametrize(("table", "times"), [("detectors", True), ("3", False)])
def test_all_trials_of_a_table_with_times_are_timed(tool, few, tmp_path, monkeypatch, table, times):
    handed = {}

    def run_sweep(trials, output, **more):
        handed.update(more, keys={trial.key for trial in trials})
        return []

    monkeypatch.setattr(tool, "run_sweep", run_sweep)
    words = ["--table", table, "--data", few, "--budget", "1", "--output", str(tmp_path / "out")]
    assert tool.main(words) == 0
    assert len(handed["keys"]) > 3
    assert handed["timed"] == (handed["keys"] if times else set())
    assert handed["cpus"] is None


def test_records_of_other_annotations_are_in_no_table(tool, few, tmp_path, capsys):
    words = ["--table", "3", "--data", few, "--output", str(tmp_path / "out"), "--report-only"]
    args = tool.parse(words)
    now = tool.fingerprints([f"{few}_train", f"{few}_val"])
    for number, trial in enumerate(args.trials["3"]):
        stale = {**now, f"{few}_train": "0"} if number == 0 else now
        made = make_trial(trial.label, ap=10.0 + number, table="3")
        made |= {"key": trial.key, "annotations": stale, "data": [[f"{few}_train"], [f"{few}_val"]]}
        save_record(made, tmp_path / "out")
    assert tool.main(words) == 0
    assert "1 records are of other annotations" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "3.json").read_text())["rows"]
    assert [row["metrics"]["AP"]["values"] for row in rows] == [[], [11.0], [12.0], [13.0]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "Expecting value"),
        (b"\xff", "can't decode"),
        ('{"schema": 2}', "schema 2, known is 1"),
        ('{"schema": 1}', "key is missing or of another kind"),
        ({"metrics": [1.0]}, "metrics is missing or of another kind"),
        ({"seed": True}, "seed is missing or of another kind"),
        ({"metrics": {"AP": "12"}}, "metrics: AP must be a number or null, got '12'"),
        ({"gflops": "many"}, "gflops must be a number or null, got 'many'"),
        ({"not_measured": None}, "not_measured must map names to texts, got None"),
        ({"annotations": []}, r"annotations must map names to texts, got \[\]"),
        ("[" * 100_000, "recursion"),
        ({"error": ...}, "error is missing or of another kind"),
        ({"data": ["few_train"]}, r"data must be two lists of names, got \['few_train'\]"),
        ({"data": [[1], ["few_val"]]}, r"data must be two lists of names, got \[\[1\]"),
        ({"data": [[], ["few_val"]]}, r"data must be two lists of names, got \[\[\]"),
        ({"data": []}, r"data must be two lists of names, got \[\]"),
        ({"environment": {"device": {}}}, "environment: device must be text, got {}"),
        ({"inference_ms": 12.0}, "inference_ms must have numbers by name, got 12.0"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(tmp_path, content, says):
    path = tmp_path / "one.json"
    if isinstance(content, dict):
        made = {**make_trial(), **content}
        content = json.dumps({key: value for key, value in made.items() if value is not ...})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"one.json: .*{says}"):
        read_record(path)


def test_a_record_whose_config_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="record 0123: its config cannot be read: "):
        load_setting({"key": "0123", "config": "MODEL: [1, 2"})
    with pytest.raises(ValueError, match="record 0123: its config cannot be read: "):
        load_setting({"key": "0123", "config": "[1, 2]"})


def test_numbers_that_are_not_finite_are_missing(tmp_path):
    made = {**make_trial(), "metrics": {"AP": math.nan}, "gflops": math.inf}
    (tmp_path / "one.json").write_text(json.dumps(made))
    record = read_record(tmp_path / "one.json")
    assert (record["metrics"]["AP"], record["gflops"]) == (None, None)


def test_a_record_under_the_name_of_another_is_refused(tmp_path):
    save_record({**make_trial(), "key": "0123"}, tmp_path)
    assert list(load_records(tmp_path, ["0123", "4567"])) == ["0123"]
    (tmp_path / "records" / "0123.json").rename(tmp_path / "records" / "4567.json")
    with pytest.raises(ValueError, match=r"4567\.json: it is the record of 0123"):
        load_records(tmp_path, ["4567"])


def test_an_older_record_lacks_nothing(tmp_path):
    made = make_trial()
    for name in ("processes", "annotations", "gflops", "inference_ms"):
        made.pop(name, None)
    del made["metrics"]["APs"]
    made["environment"] = {}
    (tmp_path / "one.json").write_text(json.dumps(made))
    record = read_record(tmp_path / "one.json")
    assert (record["processes"], record["annotations"]) == (1, {})
    assert record["environment"] == {"commit": None, "device": "unknown"}
    assert (record["gflops"], record["inference_ms"], record["metrics"]["APs"]) == (None,) * 3
