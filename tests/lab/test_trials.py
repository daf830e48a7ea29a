"""From a row to a config, and from a config to a record."""

import fcntl
import math
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_det.analysis.records import cpu_name
from focal_det.data import DigitsClutterSpec, generate, register_from_env
from focal_det.lab import running
from focal_det.lab import trials as trials_module
from focal_det.lab.measuring import background_per_foreground
from focal_det.lab.running import run_trial, shorten_paths
from focal_det.lab.tables import Row, Table, load_table
from focal_det.lab.trials import base_config, make_trials, said

DEMO = "configs/demo/focal_retinanet_digits.yaml"
ONE_ANCHOR = {"scales": 1, "aspect_ratios": 1}
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
        (Row("r", {"DATASETS.TRAIN": ["few_val"]}), ValueError, "DATASETS.TRAIN cannot be overr"),
        (Row("r", {"DATASETS.TEST": []}), ValueError, "DATASETS.TEST cannot be overridden: --data"),
        (Row("r", {"SOLVER.STEPS": [float("nan")]}), ValueError, "SOLVER.STEPS must be a finite"),
        (
            Row("r", {"MODEL.FPN.IN_FEATURES": ["foo"]}),
            ValueError,
            "row 'r': the model cannot be built: KeyError: foo",
        ),
        (
            Row("r", {"MODEL.ANCHOR_GENERATOR.SIZES": [[]]}, anchors=ONE_ANCHOR),
            ValueError,
            "MODEL.ANCHOR_GENERATOR.SIZES must have a list of sizes a level, got [[]]",
        ),
        (
            Row("r", {}, image_scale=Fraction(1, 1000)),
            ValueError,
            "row 'r': image_scale 0.001 leaves no pixel of INPUT.M",
        ),
        (Row("r", {"SOLVER.BASE_LR": None}), ValueError, "SOLVER.BASE_LR must have a value"),
        (Row("r", {"SOLVER.MAX_ITER": 0}), ValueError, "SOLVER.MAX_ITER must be 1 or more, got 0"),
        (
            Row("r", {"SOLVER.IMS_PER_BATCH": 0}),
            ValueError,
            "IMS_PER_BATCH must be 1 or more, got 0",
        ),
        (
            Row("r", {"SOLVER.BASE_LR": float("nan")}),
            ValueError,
            "must be a finite number, got nan",
        ),
        (Row("r", {"SEED": 7}), ValueError, "SEED cannot be overridden: --seeds says"),
        (
            Row("r", {"MODEL.META_ARCHITECTURE": "RetinaNet"}),
            ValueError,
            "MODEL.META_ARCHITECTURE cannot be overridden: a row's `detector` says that",
        ),
        (Row("r", {"MODEL.DEVICE": "tpu"}), ValueError, "must be cpu or cuda, got 'tpu'"),
        (Row("r", {"MODEL.DEVICE": "meta"}), ValueError, "must be cpu or cuda, got 'meta'"),
        (Row("r", {"MODEL.WEIGHTS": "no.pth"}), ValueError, "there is no file 'no.pth'"),
        (Row("r", {}, deeper=3), ValueError, "MODEL.RESNETS.DEPTH must be one of 18, 34, got 101"),
    ],
)
def test_what_is_wrong_with_a_row_is_found_before_any_runs(trials, row, error, says):
    with pytest.raises(error) as raised:
        trials(Row("good", {}), row)
    assert says in str(raised.value)
    assert "table t, row 'r': " in str(raised.value)


def test_a_schedule_of_nothing_cannot_be_scaled(trials):
    with pytest.raises(ValueError, match=r"SOLVER\.MAX_ITER must be 1 or more, got 0"):
        trials(budget=5, options=("SOLVER.MAX_ITER", 0))


def test_data_that_is_not_there_is_named_with_what_is(root):
    with pytest.raises(
        ValueError, match=r"--data no: 'no_train' is not .* there are .*digits_clut"
    ):
        make_trials(load_table("3"), config_file=str(root / DEMO), data="no", seeds=1)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_of_the_data_is_answered_with_the_whole(root, few, part):
    with pytest.raises(ValueError, match=rf"--data {few}_{part}: .* --data {few} names both parts"):
        make_trials(load_table("3"), config_file=str(root / DEMO), data=f"{few}_{part}", seeds=1)


def test_data_without_a_name_are_refused(root):
    with pytest.raises(ValueError, match=r"--data must name a data set, got ''; there are "):
        make_trials(load_table("3"), config_file=str(root / DEMO), data="", seeds=1)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("SEED", 3, "--seeds"),
        ("OUTPUT_DIR", "x", "--output"),
    ],
)
def test_an_option_that_would_be_overridden_is_refused(trials, key, value, says):
    with pytest.raises(ValueError, match=f"{re.escape(key)} cannot be overridden: .*{says}"):
        trials(options=(key, value))


@pytest.mark.parametrize(
    ("found", "options", "taken"),
    [
        ("GeneralizedRCNN", (), False),
        ("GeneralizedRCNN", ("MODEL.META_ARCHITECTURE", "FocalRetinaNet"), True),
        ("RetinaNet", (), True),
    ],
)
def test_a_config_of_another_model_is_refused(root, few, tmp_path, found, options, taken):
    """It would be trained as a FocalRetinaNet, and its name would say another."""
    config = tmp_path / "other.yaml"
    config.write_text(f"_BASE_: {root / DEMO}\nMODEL: {{META_ARCHITECTURE: {found}}}\n")
    given = {"config_file": str(config), "data": few, "seeds": 1, "options": options}
    if taken:
        (*_, trial) = make_trials(load_table("3"), **given)
        assert trial.load_config("").MODEL.META_ARCHITECTURE == "FocalRetinaNet"
        return
    with pytest.raises(ValueError, match=r"other\.yaml: .* is 'General.* add MODEL\.META_ARCH"):
        make_trials(load_table("3"), **given)


def test_an_error_of_a_key_is_said_without_quotes():
    assert said(KeyError("Non-existent key: A.B")) == "Non-existent key: A.B"
    assert said(ValueError("no")) == "no"


def test_two_rows_that_are_one_setting_are_refused(trials):
    with pytest.raises(ValueError, match=r"row 'b': with this config it is the same .* row 'a'"):
        trials(Row("a", {}), Row("b", {"MODEL.FOCAL_DET.LOSS.NAME": "FocalLoss"}))


def test_another_number_of_processes_is_another_run(root, few):
    table = Table("t", "A table", "", (Row("focal", {}),))
    shared = {"config_file": str(root / DEMO), "data": few, "seeds": 1}
    (one,), (two,) = (make_trials(table, **shared, processes=x) for x in (1, 2))
    assert one.config == two.config
    assert one.key != two.key


def test_weights_are_found_from_anywhere(trials, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "start.pth").write_bytes(b"")
    (trial,) = trials(options=(*FAST, "MODEL.WEIGHTS", "start.pth"))
    assert str(tmp_path / "start.pth") == trial.load_config("").MODEL.WEIGHTS


def test_a_model_that_reads_numbers_while_it_is_built_is_no_reason_to_stop(trials, monkeypatch):
    def build(cfg):
        built.append(cfg.MODEL.DEVICE)
        return torch.linspace(0, 1, 3).sum().item()  # as rates of stochastic depth are

    built = []
    monkeypatch.setattr(trials_module, "build_model", build)
    trials(seeds=3)
    assert built == ["meta", "cpu"]  # once a row


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
    assert (record["processes"], record["environment"]["cpu"]) == (1, cpu_name())
    # The same again in its folder: it goes on from its last checkpoint, which is the end.
    again = run_trial(trial, tmp_path / "a")
    assert again["resumed_from"] == 2
    assert again["metrics"] == record["metrics"]


def test_a_trial_that_is_run_elsewhere_is_left_alone(trials, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "LOCK_SECONDS", 0.5)
    (trial,) = trials()
    tmp_path.joinpath("a").mkdir()
    with (tmp_path / "a" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another sweep is running this trial"):
            run_trial(trial, tmp_path / "a")


def test_other_annotations_under_the_same_name_start_anew(trials, few, tmp_path):
    (trial,) = trials()
    first = run_trial(trial, tmp_path / "a")
    assert sorted(first["annotations"]) == ["few_train", "few_val"]
    path = Path(MetadataCatalog.get("few_train").json_file)
    path.write_text(path.read_text() + " ")
    second = run_trial(trial, tmp_path / "a")
    assert second["resumed_from"] == 0
    assert second["annotations"]["few_train"] != first["annotations"]["few_train"]
    assert second["annotations"]["few_val"] == first["annotations"]["few_val"]


def test_a_training_that_detects_nothing_has_an_ap_of_0(trials, tmp_path):
    (trial,) = trials(options=(*FAST, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.9999))
    metrics = run_trial(trial, tmp_path / "a")["metrics"]
    assert (metrics["AP"], metrics["AP50"], metrics["AP75"]) == (0.0, 0.0, 0.0)


def test_an_evaluation_without_ap_is_no_result(trials, tmp_path):
    (trial,) = trials()
    names = "TEST:\n  - few_val"
    assert names in trial.config
    without = replace(trial, config=trial.config.replace(names, "TEST: []"))
    with pytest.raises(ValueError, match=r"DATASETS.TEST \(\) gave no bbox/AP"):
        run_trial(without, tmp_path / "a")


def test_a_cut_training_keeps_one_checkpoint_and_a_whole_one_its_end(trials, tmp_path):
    (trial,) = trials(budget=10)
    folder = tmp_path / "a"

    def stop(_iteration):
        if (folder / "model_0000005.pth").exists():
            raise KeyboardInterrupt

    patience = running.REPORT_SECONDS
    running.REPORT_SECONDS = 0.0
    try:
        with pytest.raises(KeyboardInterrupt):
            run_trial(trial, folder, report=stop)
    finally:
        running.REPORT_SECONDS = patience
    assert [x.name for x in folder.glob("model_*")] == ["model_0000005.pth"]
    record = run_trial(trial, folder)
    assert record["resumed_from"] == 6
    assert [x.name for x in folder.glob("model_*")] == ["model_final.pth"]
    assert record["config"] == trial.config


def test_what_cannot_be_measured_costs_no_trial(trials, tmp_path, monkeypatch):
    def fail(*_):
        raise AttributeError("a model of somebody else's")

    monkeypatch.setattr(running, "count_gflops", fail)
    monkeypatch.setattr(running, "time_inference", fail)
    (trial,) = trials()
    record = run_trial(trial, tmp_path / "a")
    assert (record["gflops"], record["inference_ms"]) == (None, None)
    reason = "AttributeError: a model of somebody else's"
    assert record["not_measured"] == {"gflops": reason, "inference_ms": reason}
    assert record["metrics"]["AP"] is not None


def test_images_that_training_leaves_out_do_not_count_as_background(tmp_path, root):
    """Half of the scenes are empty: with them, twice as many background anchors."""
    generate(DigitsClutterSpec(train_images=60, val_images=1, empty_fraction=0.5), tmp_path / "x")
    register_from_env(f"half_empty:{tmp_path}/x/train.json:{tmp_path}/x/images/train")
    cfg = base_config(str(root / DEMO), data="x", num_classes=10)
    cfg.DATASETS.TRAIN = ("half_empty",)
    ratios = {}
    for cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS in (False, True):
        ratios[cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS] = background_per_foreground(cfg, None)
    DatasetCatalog.remove("half_empty")
    MetadataCatalog.remove("half_empty")
    assert 1.5 < ratios[False] / ratios[True] < 2.7


def test_a_loss_that_diverges_has_a_record(trials, tmp_path):
    (trial,) = trials(
        budget=6,
        options=(*FAST, "SOLVER.BASE_LR", 1e30, "SOLVER.CLIP_GRADIENTS.ENABLED", False),
    )
    record = run_trial(trial, tmp_path / "sweep" / "trials" / "a")
    assert re.match(r"(loss|gradient)\S* .*\b(nan|-?inf)\b", record["error"])
    assert str(tmp_path / "sweep") not in record["error"]
    (named,) = set(re.findall(r"OUTPUT/(trials/a/[^ :`]+)", record["error"]))
    assert (tmp_path / "sweep" / named / "report.json").is_file()
    assert set(record["metrics"].values()) == {None}
    assert record["seconds"] is None
    assert not any(isinstance(x, float) and math.isnan(x) for x in record["curves"]["loss_cls"])


def test_a_record_names_images_by_their_data_set(tmp_path):
    image = "gradient is nan at iteration 3; first image: {}/7.png (image_id 7)"
    MetadataCatalog.get("of_somebody").image_root = str(tmp_path / "images") + "/"
    text = image.format(tmp_path / "images") + f", in {tmp_path}/sweep/trials/a"
    found = shorten_paths(text, tmp_path / "sweep", ["of_somebody", "without_images"])
    for name in ("of_somebody", "without_images"):
        MetadataCatalog.remove(name)
    assert found == image.format("of_somebody") + ", in OUTPUT/trials/a"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "SOLVER must have a value, got null"),
        ({"BASE_LR": 0.1}, "SOLVER must have one value, got .*: write SOLVER.NAME: value"),
    ],
)
def test_an_override_has_one_value(trials, value, says):
    """Detectron2 would let it replace all keys below."""
    with pytest.raises(ValueError, match=f"row 'odd': {says}"):
        trials(Row("odd", {"SOLVER": value}))
