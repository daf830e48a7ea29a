"""Config keys, the start-up line and the checks before data is read."""

import logging

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

import focal_det
from focal_det.config import check_config, default_keys
from focal_det.losses import LOSS_REGISTRY


@pytest.fixture
def warnings(caplog, monkeypatch):
    """A function from a config to the warnings of its check."""
    # A Detectron2 script that ran in this process may have cut propagation.
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    caplog.set_level(logging.INFO, logger="detectron2")

    def check(cfg):
        caplog.clear()
        check_config(cfg)
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    return check


def test_defaults_are_the_contract():
    cfg = get_cfg()
    focal_det.add_config(cfg)
    node = cfg.MODEL.FOCAL_DET
    assert node.HEAD.NAME == "FocalRetinaNetHead"
    assert node.LOSS.NAME == "FocalLoss"
    assert node.BALANCED_CE.ALPHA == 0.75
    assert (node.FL_STAR.ALPHA, node.FL_STAR.GAMMA, node.FL_STAR.BETA) == (0.25, 2.0, 1.0)
    assert node.HINGE.THRESHOLD == 0.5
    assert (node.OHEM.BATCH_SIZE, node.OHEM.NMS_THRESH, node.OHEM.NEG_POS_RATIO) == (128, 0.5, 0.0)
    assert (node.NORMALIZER.NAME, node.NORMALIZER.SYNC) == ("ema", True)


def test_add_config_is_idempotent_and_keeps_what_is_set():
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.MODEL.FOCAL_DET.HINGE.THRESHOLD = 0.3
    focal_det.add_config(cfg)
    assert cfg.MODEL.FOCAL_DET.HINGE.THRESHOLD == 0.3


def test_a_saved_config_loads_again(small_cfg, tmp_path):
    small_cfg.MODEL.FOCAL_DET.LOSS.NAME = "OHEMLoss"
    path = tmp_path / "config.yaml"
    path.write_text(small_cfg.dump())
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(str(path))
    assert cfg.dump() == small_cfg.dump()


def test_every_key_is_read_by_something():
    """No dead key: the names, the normalizer's two, and what the losses' constructors take."""
    read = {key for _, loss in LOSS_REGISTRY for key in loss.config_keys().values()}
    names = {"HEAD.NAME", "LOSS.NAME", "NORMALIZER.NAME", "NORMALIZER.SYNC"}
    assert set(default_keys()) - read == {f"MODEL.FOCAL_DET.{name}" for name in names}


def test_start_up_line_says_what_the_config_resolves_to(small_cfg, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    caplog.set_level(logging.INFO, logger="detectron2")
    small_cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA = 0.5
    build_model(small_cfg)
    lines = [r.getMessage() for r in caplog.records if "focal_det" in r.name]
    assert lines == ["FocalLoss(alpha=0.25, gamma=0.5), normalizer ema, prior 0.01, K=5, A=9"]


def test_config_without_our_keys_says_how_to_add_them():
    cfg = get_cfg()
    cfg.MODEL.pop("FOCAL_DET", None)
    cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
    with pytest.raises(ValueError, match=r"no MODEL\.FOCAL_DET: call focal_det\.add_config\(cfg\)"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("loss", "key", "value", "owner"),
    [
        ("FocalLoss", "MODEL.FOCAL_DET.HINGE.THRESHOLD", 0.3, "HingeLoss"),
        ("FocalLoss", "MODEL.FOCAL_DET.OHEM.BATCH_SIZE", 256, "OHEMLoss"),
        ("FocalLoss", "MODEL.FOCAL_DET.BALANCED_CE.ALPHA", None, "BalancedCrossEntropyLoss"),
        ("CrossEntropyLoss", "MODEL.RETINANET.FOCAL_LOSS_GAMMA", 1.0, "FocalLoss"),
        ("OHEMLoss", "MODEL.FOCAL_DET.FL_STAR.BETA", 0.0, "FocalLossStar"),
    ],
)
def test_a_key_that_the_chosen_loss_ignores_is_reported_once(
    small_cfg, warnings, loss, key, value, owner
):
    small_cfg.MODEL.FOCAL_DET.LOSS.NAME = loss
    small_cfg.merge_from_list([key, value])
    (line,) = warnings(small_cfg)
    assert line == (
        f"{key} is set to {value!r} but has no effect: it belongs to {owner}, "
        f"and MODEL.FOCAL_DET.LOSS.NAME is {loss!r}"
    )
    small_cfg.MODEL.FOCAL_DET.LOSS.NAME = owner
    assert warnings(small_cfg) == []


def test_class_count_in_the_wrong_place_is_reported(small_cfg, warnings):
    small_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    (line,) = warnings(small_cfg)
    assert "MODEL.ROI_HEADS.NUM_CLASSES is set to 3 but has no effect" in line
    assert "MODEL.RETINANET.NUM_CLASSES, which is 5" in line


@pytest.mark.parametrize(
    ("batch", "rate", "expected"),
    [(16, 0.01, None), (16, 0.02, None), (2, 0.01, "0.00125"), (16, 0.001, "0.01")],
)
def test_learning_rate_far_from_the_recipe_is_reported(small_cfg, warnings, batch, rate, expected):
    small_cfg.MODEL.WEIGHTS = "pretrained.pkl"
    small_cfg.SOLVER.IMS_PER_BATCH, small_cfg.SOLVER.BASE_LR = batch, rate
    lines = warnings(small_cfg)
    if expected is None:
        assert lines == []
    else:
        assert lines[0].endswith(f"scales to {expected}")
    small_cfg.MODEL.WEIGHTS = ""  # from scratch there is no recipe to be far from
    assert warnings(small_cfg) == []


@pytest.fixture
def three_classes():
    name = "focal_det_test_three_classes"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).thing_classes = ["a", "b", "c"]
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_class_count_is_checked_against_every_data_set(small_cfg, three_classes, split):
    small_cfg.DATASETS[split] = (three_classes,)
    message = (
        rf"NUM_CLASSES is 5, but '{three_classes}' \(DATASETS\.{split}\) has 3 classes \(a, b, c\)"
        r".*Add MODEL\.RETINANET\.NUM_CLASSES 3"
    )
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg)
    small_cfg.MODEL.RETINANET.NUM_CLASSES = 3
    assert build_model(small_cfg).num_classes == 3


def test_range_errors_name_the_config_key(small_cfg):
    small_cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA = -1.0
    message = r"gamma must be >= 0, got -1\.0.*MODEL\.RETINANET\.FOCAL_LOSS_GAMMA"
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg)


def test_argument_without_a_default_is_refused():
    from focal_det.losses import ElementwiseLoss

    @LOSS_REGISTRY.register()
    class NeedsMargin(ElementwiseLoss):
        def __init__(self, margin):
            super().__init__()

    try:
        with pytest.raises(TypeError, match=r"'margin' of NeedsMargin needs a default.*got none"):
            focal_det.add_config(get_cfg())
    finally:
        LOSS_REGISTRY._obj_map.pop("NeedsMargin")
