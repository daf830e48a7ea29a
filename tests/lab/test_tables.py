"""Tables of trials: the paper's own, and what a user may get wrong in one of theirs."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from detectron2.config import get_cfg

import focal_det
from focal_det.analysis.records import METRICS
from focal_det.lab.tables import FOLDER, Row, built_in, load_table
from focal_det.losses import build_loss


@pytest.fixture
def cfg():
    cfg = get_cfg()
    focal_det.add_config(cfg)
    return cfg


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


TABLES = {
    "1a": "table_1a_balanced_ce",
    "1b": "table_1b_focal",
    "1c": "table_1c_anchors",
    "1d": "table_1d_ohem_R101",
    "1e": "table_1e_speed_accuracy_testdev",
    "3": "table_3_focal_star",
}


@pytest.mark.parametrize("name", TABLES)
def test_every_number_of_the_paper_stands_in_the_row_of_its_setting(cfg, name):
    """Against the numbers as they were copied from the paper, with the settings they stand by."""
    paper = json.loads((Path(__file__).parent / "paper_tables.json").read_text())[TABLES[name]]
    rows = load_table(name).rows
    assert len(rows) == len(paper)
    for row, expected in zip(rows, paper, strict=True):
        numbers = {key: expected[key] for key in METRICS if key in expected}
        if "time_ms" in expected:
            numbers["milliseconds"] = expected["time_ms"]
        assert row.paper == numbers, row.label
        changed = cfg.clone()
        row.apply(changed)
        _assert_is_setting(changed, expected, row)


def _assert_is_setting(cfg, expected, row):
    """That a row's config has the paper's setting."""
    dense, own = cfg.MODEL.RETINANET, cfg.MODEL.FOCAL_DET
    name, star, ohem = own.LOSS.NAME, own.FL_STAR, own.OHEM
    losses = {"CE": "BalancedCrossEntropyLoss", "FL": "FocalLoss", "FL*": "FocalLossStar"}
    if "loss" in expected:
        assert name == losses[expected["loss"]]
    if "method" in expected:
        assert name == ("FocalLoss" if expected["method"] == "FL" else "OHEMLoss")
        assert (3.0 if expected["method"] == "OHEM 1:3" else 0.0) == ohem.NEG_POS_RATIO
    found = {
        "alpha": dense.FOCAL_LOSS_ALPHA if name == "FocalLoss" else own.BALANCED_CE.ALPHA,
        "gamma": star.GAMMA if name == "FocalLossStar" else dense.FOCAL_LOSS_GAMMA,
        "beta": star.BETA,
        "batch_size": ohem.BATCH_SIZE,
        "nms_thresh": ohem.NMS_THRESH,
        "scales": len(cfg.MODEL.ANCHOR_GENERATOR.SIZES[0]),
        "aspect_ratios": len(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0]),
        "depth": cfg.MODEL.RESNETS.DEPTH,
        "scale": row.image_scale * 600,
    }
    for key, value in expected.items():
        if key in found and value is not None:
            assert found[key] == value, (row.label, key)


def test_each_row_changes_what_its_label_says(cfg):
    found = {}
    for name in built_in():
        for row in load_table(name).rows:
            changed = cfg.clone()
            row.apply(changed)
            found[name, row.label] = changed.MODEL
    assert found["1a", "alpha 0.99"].FOCAL_DET.BALANCED_CE.ALPHA == 0.99
    assert found["1b", "gamma 0.5, alpha 0.5"].RETINANET.FOCAL_LOSS_GAMMA == 0.5
    assert found["1b", "gamma 0.5, alpha 0.5"].RETINANET.FOCAL_LOSS_ALPHA == 0.5
    ohem = found["1d", "OHEM 1:3, batch 256, NMS 0.5"].FOCAL_DET
    assert ohem.LOSS.NAME == "OHEMLoss"
    assert (ohem.OHEM.BATCH_SIZE, ohem.OHEM.NMS_THRESH, ohem.OHEM.NEG_POS_RATIO) == (256, 0.5, 3.0)
    star = found["3", "FL* gamma 4, beta 0"].FOCAL_DET
    assert (star.LOSS.NAME, star.FL_STAR.GAMMA, star.FL_STAR.BETA) == ("FocalLossStar", 4.0, 0.0)
    assert found["main", "cross entropy, prior .5"].RETINANET.PRIOR_PROB == 0.5
    # No two rows of a table are one setting.
    for name in built_in():
        dumps = [json.dumps(m, sort_keys=True) for (table, _), m in found.items() if table == name]
        if name != "1e":  # whose rows differ in INPUT too
            assert len(set(dumps)) == len(dumps)


def test_a_row_is_what_its_label_says_whatever_it_starts_from(cfg):
    """A base with other values of a loss must not show through."""
    odd = cfg.clone()
    odd.merge_from_list(
        [
            *("MODEL.RETINANET.FOCAL_LOSS_GAMMA", 3.5, "MODEL.RETINANET.FOCAL_LOSS_ALPHA", 0.6),
            *("MODEL.FOCAL_DET.BALANCED_CE.ALPHA", 0.6, "MODEL.FOCAL_DET.HINGE.THRESHOLD", 0.6),
            *("MODEL.FOCAL_DET.FL_STAR.ALPHA", 0.6, "MODEL.FOCAL_DET.FL_STAR.GAMMA", 3.5),
            *("MODEL.FOCAL_DET.FL_STAR.BETA", 3.5, "MODEL.FOCAL_DET.OHEM.BATCH_SIZE", 7),
            *("MODEL.FOCAL_DET.OHEM.NMS_THRESH", 0.6, "MODEL.FOCAL_DET.OHEM.NEG_POS_RATIO", 6.0),
        ]
    )
    compared = 0
    for name in built_in():
        for row in load_table(name).rows:
            made, expected = odd.clone(), cfg.clone()
            row.apply(made)
            row.apply(expected)
            if row.detector == "focal_det":
                assert repr(build_loss(made)) == repr(build_loss(expected)), (name, row.label)
            elif row.detector != "faster_rcnn":  # the focal loss of the other dense detectors
                for key in ("FOCAL_LOSS_GAMMA", "FOCAL_LOSS_ALPHA"):
                    assert made.MODEL.RETINANET[key] == expected.MODEL.RETINANET[key]
            compared += 1
    assert compared > 50


def test_a_deeper_net_does_not_start_from_the_weights_of_another_depth(cfg):
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.WEIGHTS = 50, "mine.pth"
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS 'mine.pth' has no 'R-50.' in its name"):
        Row("", {}, deeper=1).apply(cfg)
    cfg.MODEL.WEIGHTS = "far/R-50.pkl"
    Row("", {}, deeper=1).apply(cfg)
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.WEIGHTS) == (101, "far/R-101.pkl")


@pytest.mark.parametrize(("name", "timed"), [("1e", True), ("detectors", True), ("1a", False)])
def test_tables_that_show_times_say_so(name, timed):
    assert load_table(name).timed is timed


def test_a_table_cannot_take_the_name_of_another_tools_file(tmp_path):
    (tmp_path / "results.yaml").write_text("rows: [{label: a}]")
    with pytest.raises(ValueError, match="a table cannot be called results"):
        load_table(str(tmp_path / "results.yaml"))
    (tmp_path / "1b.yaml").write_text("rows: [{label: a}]")
    with pytest.raises(ValueError, match="a table cannot be called 1b"):
        load_table(str(tmp_path / "1b.yaml"))


def test_a_built_in_table_may_be_named_by_its_path(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    assert load_table("tables/1b.yaml") == load_table("1b")


def test_anchors_are_so_many_to_the_octave_from_each_levels_smallest(cfg):
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[13, 10], [24]]
    Row("", {}, anchors={"scales": 2, "aspect_ratios": 3}).apply(cfg)
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes[0] == pytest.approx([10, 10 * 2**0.5])
    assert sizes[1] == pytest.approx([24, 24 * 2**0.5])
    assert cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS == [[0.5, 1.0, 2.0]]
    Row("", {}, anchors={"scales": 1, "aspect_ratios": 1}).apply(cfg)
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[10], [24]]
    assert cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS == [[1.0]]


def test_image_scale_of_the_papers_recipe_gives_the_papers_sizes(cfg, root):
    cfg.merge_from_file(
        str(root / "configs/COCO-Detection/focal_retinanet_R_50_FPN_paper_600.yaml")
    )
    Row("", {}, image_scale=Fraction("400/600")).apply(cfg)
    assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == (400,)
    assert cfg.INPUT.MIN_SIZE_TEST == 400
    assert cfg.INPUT.MAX_SIZE_TEST == cfg.INPUT.MAX_SIZE_TRAIN == 667


def test_a_deeper_backbone_takes_its_own_weights(cfg):
    cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.DEPTH = "catalog://MSRA/R-50.pkl", 50
    Row("", {}, deeper=1).apply(cfg)
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.WEIGHTS) == (101, "catalog://MSRA/R-101.pkl")
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS\.DEPTH is 101: there is no ResNet 2 "):
        Row("", {}, deeper=2).apply(cfg)


def test_axes_are_multiplied(tmp_path):
    text = """
title: Mine
overrides: {MODEL.FOCAL_DET.LOSS.NAME: FocalLoss}
axes:
  SOLVER.BASE_LR: [0.1, 0.2]
  MODEL.RETINANET.FOCAL_LOSS_GAMMA: [1.0, 2.0, 3.0]
"""
    table = load_table(write(tmp_path, text))
    assert (table.name, table.title, len(table.rows)) == ("mine", "Mine", 6)
    assert table.rows[4].label == "BASE_LR 0.2, FOCAL_LOSS_GAMMA 2.0"
    assert table.rows[4].overrides == {
        "MODEL.FOCAL_DET.LOSS.NAME": "FocalLoss",
        "SOLVER.BASE_LR": 0.2,
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA": 2.0,
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1", "must have axes, overrides, rows, source, speed, title, got [1]"),
        ("title: a", "must have either rows or axes"),
        ("rows: []\naxes: {A: [1]}", "must have either rows or axes"),
        ("rows: []", "has no row"),
        ("rows: [{label: a}]\nrow: 1", "has row, which is none of axes, overrides, rows"),
        ("rows: [{overrides: {A: 1}}]", "a row has no label"),
        ("rows: [{label: a, override: {A: 1}}]", "a row has override, which is none of anchors"),
        ("rows: [{label: a, overrides: [A, 1]}]", "row 'a': overrides must map names to values"),
        ("rows: [{label: a}, {label: a}]", "two rows are labelled 'a'"),
        ("rows: [{label: a, anchors: {scales: 0, aspect_ratios: 1}}]", "scales, 1 to 8, and aspec"),
        ("rows: [{label: a, anchors: {scales: 1, aspect_ratios: 2}}]", "aspect_ratios, 1 or 3"),
        ("rows: [{label: a, image_scale: 0}]", "image_scale must be above 0, up to 100, got 0"),
        ("rows: [{label: a, image_scale: 1/0}]", "be above 0, up to 100, got '1/0'"),
        ("rows: [{label: a, image_scale: 1e999999}]", "be above 0, up to 100, got '1e999999'"),
        (
            "rows: [{label: a, detector: yolo}]",
            "detector must be one of focal_det, retinanet, fcos",
        ),
        ("rows: [{label: a}]\nspeed: fast", "speed must be true or false, got 'fast'"),
        ("rows: [{label: a, deeper: -1}]", "deeper must be 0 to 4, got -1"),
        ("rows: [{label: a, paper: {AP: high}}]", "paper: AP must be a number, got 'high'"),
        ("axes: {A: 1}", "axes: A must be a list of values, got 1"),
        ("axes: {}", "axes must map config keys to lists of values, got none"),
        ("rows: 5", "rows must be a list, got 5"),
        ("rows: [{label: a}", "is no YAML: "),
        ("rows: [{label: a, anchors: {scales: 2.0, aspect_ratios: 1}}]", "scales, 1 to 8, and asp"),
        ("rows: [{label: a, anchors: {scales: 2, aspect_ratios: [1]}}]", "aspect_ratios, 1 or 3"),
        ("rows: [{label: a, detector: [fcos]}]", "detector must be one of focal_det"),
        ("rows: [{label: a, deeper: 1.0}]", "deeper must be 0 to 4, got 1.0"),
        ("rows: [{label: a, paper: {AP: .nan}}]", "paper: AP must be a number, got nan"),
        ("rows: [{label: a, paper: {ap: 3}}]", "paper: ap is none of AP, AP50, AP75"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_its_file(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (asserted below)
        load_table(path)
    assert says in str(error.value)
    assert path in str(error.value)


def test_an_unknown_table_lists_the_known():
    with pytest.raises(
        ValueError, match=r"must be one of 1a, 1b, .*, all, or a YAML file, got '2'"
    ):
        load_table("2")
