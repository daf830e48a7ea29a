"""From a row to a config, and from a config to a record."""

import math

import pytest

from focal_det.lab.running import run_trial
from focal_det.lab.tables import Row, Table, load_table
from focal_det.lab.trials import make_trials

DEMO = "configs/demo/focal_retinanet_digits.yaml"
FAST = ("SOLVER.IMS_PER_BATCH", 2)


@pytest.fixture
def trials(root, few):
    """A function that makes the trials of some rows."""

    def make(*rows, seeds=1, budget=2, options=FAST):
        table = Table("t", "A table", "", rows or (Row("focal", {}),))
        return make_trials(
            table,
            config_file=str(root / DEMO),
            data="few",
            seeds=seeds,
            budget=budget,
            options=options,
        )

    return make


def test_a_trial_is_complete_and_its_key_is_that_of_its_config(trials, tmp_path):
    lr = "SOLVER.BASE_LR"
    rows = (Row("low", {lr: 0.1}), Row("high", {lr: 0.3}))
    made = trials(*rows, seeds=2, options=(*FAST, lr, 0.2))
    assert [(each.label, each.seed) for each in made] == [
        ("low", 1), ("high", 1), ("low", 2), ("high", 2),
    ]  # fmt: skip
    assert len({each.key for each in made}) == 4
    assert [each.key for each in trials(*rows, seeds=2, options=FAST)] == [x.key for x in made]
    cfg = made[3].load_config(str(tmp_path))
    assert (cfg.SOLVER.BASE_LR, cfg.SEED, cfg.SOLVER.MAX_ITER) == (0.3, 2, 2)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("few_train",), ("few_val",))
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 10
    assert str(tmp_path) == cfg.OUTPUT_DIR
    assert str(tmp_path) not in made[3].config  # else it would be another run elsewhere


def test_the_number_of_classes_is_that_of_the_data(trials):
    (trial,) = trials(options=("MODEL.ROI_HEADS.NUM_CLASSES", 80))
    assert "NUM_CLASSES: 10" in trial.config


@pytest.mark.parametrize(
    ("row", "error", "says"),
    [
        (Row("r", {"SOLVER.BASE_LRR": 1.0}), AssertionError, "SOLVER.BASE_LRR"),
        (Row("r", {"MODEL.FOCAL_DET.LOSS.NAME": "Focal"}), ValueError, "'Focal', which is not one"),
        (Row("r", {"MODEL.RETINANET.FOCAL_LOSS_GAMMA": -1.0}), ValueError, "gamma must be >= 0"),
        (Row("r", {"MODEL.RETINANET.NUM_CLASSES": 3}), ValueError, "It must be 10"),
        (Row("r", {}, deeper=3), ValueError, "MODEL.RESNETS.DEPTH must be one of 18, 34, got 101"),
    ],
)
def test_what_is_wrong_with_a_row_is_found_before_any_runs(trials, row, error, says):
    with pytest.raises(error) as raised:
        trials(Row("good", {}), row)
    assert says in str(raised.value)
    assert "table t, row 'r': " in str(raised.value)


def test_data_that_is_not_there_is_named_with_what_is(root):
    with pytest.raises(
        ValueError, match=r"--data no: 'no_train' is not .* there are .*digits_clut"
    ):
        make_trials(load_table("3"), config_file=str(root / DEMO), data="no", seeds=1)


def test_a_record_says_what_was_run_and_what_came(trials, tmp_path):
    (trial,) = trials()
    seen = []
    record = run_trial(trial, tmp_path / "a", report=seen.append)
    assert record["error"] is None
    assert (record["key"], record["label"], record["seed"]) == (trial.key, "focal", 1)
    assert 0 <= record["metrics"]["AP"] <= 100
    assert set(record["per_class"]) == set("0123456789")
    assert record["seconds"]["training"] > 0
    assert record["seconds"]["evaluation"] > 0
    assert record["peak_memory_mib"] > 100
    assert 0 < record["inference_ms"]["median"] <= record["inference_ms"]["p95"]
    assert record["resumed_from"] == 0
    # 336 locations of 12 anchors in an image, few of which are on a digit.
    assert 20 < record["background_per_foreground"] < 4032
    assert record["environment"]["device"].startswith("CPU")
    assert record["config"] == trial.config
    # The same again in its folder: it goes on from its last checkpoint, which is the end.
    again = run_trial(trial, tmp_path / "a")
    assert again["resumed_from"] == 2
    assert again["metrics"] == record["metrics"]


def test_a_loss_that_diverges_has_a_record(trials, tmp_path):
    (trial,) = trials(
        budget=6,
        options=(*FAST, "SOLVER.BASE_LR", 1e30, "SOLVER.CLIP_GRADIENTS.ENABLED", False),
    )
    record = run_trial(trial, tmp_path / "a")
    assert "finite" in record["error"] or "nan" in record["error"] or "inf" in record["error"]
    assert set(record["metrics"].values()) == {None}
    assert record["seconds"] is None
    assert not any(isinstance(x, float) and math.isnan(x) for x in record["curves"]["loss_cls"])
