"""tools/results.py: what is missing is run, and kept where it is committed."""

import json

import pytest
from written_records import make_trial

from focal_det.lab.trial_records import SCHEMA

SWEEPS = """
- name: here
  data: few
  num_classes: 10
  config: configs/demo/focal_retinanet_digits.yaml
  budget: 4
  tables: {imbalance: 2}
  rows: [focal loss, OHEM]
- name: elsewhere
  data: nowhere
  num_classes: 3
  config: configs/demo/focal_retinanet_bccd.yaml
  tables: {main: 1}
"""


@pytest.fixture
def tool(load_tool, tmp_path, monkeypatch):
    """The script, whose kept results are in ``tmp_path/kept``."""
    module = load_tool("results")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "sweeps.yaml").write_text(SWEEPS)
    return module


@pytest.fixture
def ran(tool, monkeypatch):
    """Trials that were handed to Ray, which fails after the first of each call."""
    seen = []

    def run_sweep(trials, output, timed, cpus):
        assert (timed, cpus) == (set(), None)
        seen.append([(trial.label, trial.seed, trial.iterations) for trial in trials])
        for trial in trials[:1]:
            record = {**make_trial(), "schema": SCHEMA, "config": trial.config, "key": trial.key}
            (output / "records").mkdir(parents=True, exist_ok=True)
            (output / "records" / f"{trial.key}.json").write_text(json.dumps(record))
        return ["the second one: no memory"] if len(trials) > 1 else []

    monkeypatch.setattr(tool, "run_sweep", run_sweep)
    return seen


def test_what_is_missing_is_run_first_seeds_first_and_kept(tool, ran, few, tmp_path, capsys):
    words = ["--output", str(tmp_path / "out")]
    assert tool.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "elsewhere: left out, nowhere is not in FOCAL_DET_DATASETS" in said
    assert "4 trials: 4 are to be run" in said
    assert ran == []
    assert not (tmp_path / "kept" / "records").exists()

    # What somebody else's sweep left there is nothing to be kept.
    (tmp_path / "out" / "records").mkdir(parents=True)
    (tmp_path / "out" / "records" / "other.json").write_text(json.dumps(make_trial()))
    assert tool.main(words) == 1
    assert "failed: the second one: no memory" in capsys.readouterr().err
    assert ran == [[(label, seed, 4) for seed in (1, 2) for label in ("OHEM", "focal loss")]]
    (kept,) = (tmp_path / "kept" / "records").iterdir()
    first = kept.read_text()

    # What an earlier call has made, be it one that was killed, is not made again.
    for left in (3, 2, 1):
        assert tool.main([*words, "here"]) == int(left > 1)
        assert len(ran[-1]) == left
    assert ran[-1] == [("focal loss", 2, 4)]
    assert len(list((tmp_path / "kept" / "records").iterdir())) == 4
    assert kept.read_text() == first


def test_trials_of_a_table_with_times_are_timed(tool, few, tmp_path, monkeypatch):
    """Those of the other table too, if they are the same."""
    sweeps = SWEEPS.replace("tables: {imbalance: 2}", "tables: {main: 1, detectors: 1}")
    sweeps = sweeps.replace(
        "rows: [focal loss, OHEM]",
        'rows: [cross entropy, "cross entropy, prior .5", "FocalRetinaNet, cross entropy"]',
    )
    (tmp_path / "kept" / "sweeps.yaml").write_text(sweeps)
    handed = {}

    def run_sweep(trials, output, timed, cpus):
        handed.update({trial.label: trial.key in timed for trial in trials})
        return []

    monkeypatch.setattr(tool, "run_sweep", run_sweep)
    assert tool.main(["here", "--output", str(tmp_path / "out")]) == 0
    assert handed == {"cross entropy": True, "cross entropy, prior .5": False}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["her"], "sweep must be one of here; elsewhere, got 'her'"),
        (["elsewhere"], "'nowhere_train' is not registered"),
        (["here", "--cpus", "0"], "--cpus must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_run_ends_with_2(tool, ran, few, words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(words)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert ran == []


def test_a_kept_record_that_cannot_be_read_ends_with_2(tool, ran, few, tmp_path, capsys):
    (tmp_path / "kept" / "records").mkdir()
    (tmp_path / "kept" / "records" / "cut.json").write_text('{"schema')
    assert tool.main(["here"]) == 2
    assert "cut.json: " in capsys.readouterr().err
    assert ran == []
