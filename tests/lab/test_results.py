"""Records that are kept find their rows, however old they are."""

import json

import pytest
from detectron2.config import CfgNode

from focal_det.lab import results
from focal_det.lab.running import SCHEMA
from focal_det.lab.trials import base_config, row_config

SWEEPS = """
- name: a sweep
  data: nowhere
  num_classes: 3
  config: base.yaml
  budget: 40
  overrides: {SOLVER.BASE_LR: 0.5}
  tables: {main: 2}
  rows: [cross entropy, "FL, gamma 2, alpha .25"]
"""


@pytest.fixture
def folder(tmp_path, root):
    base = root / "configs" / "demo" / "focal_retinanet_digits.yaml"
    (tmp_path / "base.yaml").write_text(f"_BASE_: {base}\n")
    (tmp_path / "sweeps.yaml").write_text(SWEEPS)
    (tmp_path / "records").mkdir()
    return tmp_path


@pytest.fixture
def sweep(folder):
    return results.read_sweeps(folder / "sweeps.yaml")["a sweep"]


def record(config, seed, ap):
    return {
        "schema": SCHEMA,
        "label": "under another name",
        "seed": seed,
        "error": None,
        "iterations": 850,
        "data": [["nowhere_train"], ["nowhere_val"]],
        "metrics": dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), ap),
        **dict.fromkeys(("inference_ms", "images_per_second", "peak_memory_mib", "parameters")),
        "gflops": None,
        "background_per_foreground": 7.0,
        "environment": {"commit": "abc", "device": "CPU"},
        "config": config,
    }


def configs(sweep, folder):
    """The config of each row and seed, as a record has it."""
    base = base_config(
        str(folder / "base.yaml"), data="nowhere", num_classes=3, budget=40, options=sweep.options
    )
    return {
        (row.label, seed): row_config(base, row, seed).dump()
        for row in sweep.table("main").rows
        for seed in (1, 2)
    }


def write(folder, name, content):
    (folder / "records" / f"{name}.json").write_text(json.dumps(content))


def values(sweep, folder):
    found = results.read_records(folder / "records")
    made = results.summarise_sweep(sweep, "main", found, folder)
    return {row["label"]: row["metrics"]["AP"]["values"] for row in made["rows"]}


def test_each_record_goes_to_its_row_and_seed(sweep, folder):
    for number, ((label, seed), config) in enumerate(configs(sweep, folder).items()):
        write(folder, number, record(config, seed, 10.0 * seed + (label == "cross entropy")))
    assert values(sweep, folder) == {
        "cross entropy": [11.0, 21.0],
        "FL, gamma 2, alpha .25": [10.0, 20.0],
    }


@pytest.mark.parametrize(
    ("key", "value", "belongs"),
    [
        ("OUTPUT_DIR", "elsewhere", True),
        ("SOLVER.BASE_LR", 0.4, False),
        ("SEED", 3, False),
        ("DATASETS.TRAIN", ["other_train"], False),
        ("MODEL.FOCAL_DET.NO_LONGER_THERE", 1, False),
    ],
)
def test_another_setting_is_not_taken_for_it(sweep, folder, key, value, belongs):
    cfg = CfgNode.load_cfg(configs(sweep, folder)["cross entropy", 1])
    cfg.set_new_allowed(True)
    node, _, last = key.rpartition(".")
    at = cfg
    for part in filter(None, node.split(".")):
        at = at[part]
    at[last] = value
    write(folder, "one", record(cfg.dump(), 1, 5.0))
    assert values(sweep, folder)["cross entropy"] == ([5.0] if belongs else [])


def test_a_record_that_is_older_than_a_key_had_its_default(sweep, folder):
    cfg = CfgNode.load_cfg(configs(sweep, folder)["cross entropy", 1])
    cfg.MODEL.FOCAL_DET.pop("FL_STAR")
    write(folder, "old", record(cfg.dump(), 1, 5.0))
    assert values(sweep, folder)["cross entropy"] == [5.0]
    # But not where the row asks for another value of that key.
    text = SWEEPS.replace("BASE_LR: 0.5", "BASE_LR: 0.5, MODEL.FOCAL_DET.FL_STAR.GAMMA: 3.0")
    (folder / "sweeps.yaml").write_text(text)
    assert (
        values(results.read_sweeps(folder / "sweeps.yaml")["a sweep"], folder)["cross entropy"]
        == []
    )


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  data: nowhere\n", "", r"a sweep.*missing: \['data'\]"),
        ("data:", "date:", r"unknown: \['date'\]"),
    ],
)
def test_a_file_of_sweeps_with_a_wrong_key_is_refused(folder, old, new, says):
    (folder / "sweeps.yaml").write_text(SWEEPS.replace(old, new))
    with pytest.raises(ValueError, match=says):
        results.read_sweeps(folder / "sweeps.yaml")


def test_the_kept_records_all_belong_to_a_kept_sweep(root):
    """So that none is carried along that no page shows."""
    kept = root / "docs" / "results"
    found = results.read_records(kept / "records")
    shown = set()
    for sweep in results.read_sweeps(kept / "sweeps.yaml").values():
        base = sweep.base_config(root)
        for name, seeds in sweep.tables.items():
            for row in sweep.table(name).rows:
                for seed in range(1, seeds + 1):
                    cfg = CfgNode.load_cfg(row_config(base, row, seed).dump())
                    shown.add(results.setting(cfg))
    assert [record["key"] for setting, record in found if setting not in shown] == []
