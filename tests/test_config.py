"""Config keys, the start-up line and the checks before data is read."""

import logging
from collections import Counter

import pytest
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model

import focal_det
from focal_det.config import check_model, check_training, default_keys
from focal_det.losses import LOSS_REGISTRY, FocalLoss, HingeLoss, build_loss
from focal_det.losses.contract import config_keys


@pytest.fixture
def warnings(caplog, monkeypatch):
    """A function from a config to the warnings of its check."""
    # A Detectron2 script that ran in this process may have cut propagation.
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    caplog.set_level(logging.INFO, logger="detectron2")

    def check(cfg):
        caplog.clear()
        # What was reported stays unreported for the rest of the process; tests start anew.
        monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())
        cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
        for _ in range(2):
            check_model(cfg)
        check_training(cfg)
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
    assert yaml.safe_load(cfg.dump()) == yaml.safe_load(small_cfg.dump())


def test_every_key_is_read_by_something():
    """No dead key: the names, the normalizer's two, and what the losses' constructors take."""
    read = {key for _, loss in LOSS_REGISTRY for key in config_keys(loss).values()}
    names = {"HEAD.NAME", "IMPL", "LOSS.NAME", "NORMALIZER.NAME", "NORMALIZER.SYNC"}
    names = {f"MODEL.FOCAL_DET.{name}" for name in names}
    assert set(default_keys()) - read == names | {"DATALOADER.ON_BAD_IMAGE"}


def test_start_up_line_says_what_the_config_resolves_to(small_cfg, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    caplog.set_level(logging.INFO, logger="detectron2")
    small_cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA = 0.5
    model = build_model(small_cfg)
    assert model.focal_loss_gamma == 0.5  # where tools written for the built-in look
    lines = [r.getMessage() for r in caplog.records if "focal_det" in r.name]
    assert lines == ["FocalLoss(alpha=0.25, gamma=0.5), normalizer ema, prior 0.01, K=5, A=9"]


def test_config_without_our_keys_says_how_to_add_them():
    cfg = get_cfg()
    cfg.MODEL.pop("FOCAL_DET", None)
    cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
    with pytest.raises(ValueError, match=r"no MODEL\.FOCAL_DET: call focal_det\.add_config\(cfg\)"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("MODEL.RETINANET.NUM_CLASSES", 3, lambda m: m.num_classes),
        ("MODEL.RETINANET.PRIOR_PROB", 0.5, lambda m: m.head.cls_score.bias[0].sigmoid().item()),
        ("MODEL.RETINANET.NUM_CONVS", 2, lambda m: len(m.head.cls_subnet) // 2),
        ("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.3, lambda m: m.smooth_l1_beta),
        ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou", lambda m: m.box_reg_loss_type),
        ("MODEL.RETINANET.IOU_THRESHOLDS", [0.3, 0.6], lambda m: m.anchor_matcher.thresholds[1:-1]),
        ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.2, lambda m: m.test_score_thresh),
        ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 7, lambda m: m.test_topk_candidates),
        ("MODEL.RETINANET.NMS_THRESH_TEST", 0.4, lambda m: m.test_nms_thresh),
        ("TEST.DETECTIONS_PER_IMAGE", 9, lambda m: m.max_detections_per_image),
        ("MODEL.FOCAL_DET.NORMALIZER.SYNC", False, lambda m: m.normalizer.sync),
        ("MODEL.FPN.OUT_CHANNELS", 64, lambda m: m.head.cls_score.in_channels),
    ],
)
def test_every_key_of_the_detector_changes_what_it_says(small_cfg, key, value, seen):
    before = seen(build_model(small_cfg))
    small_cfg.merge_from_list([key, value])
    after = seen(build_model(small_cfg))
    assert after == (value if isinstance(value, str) else pytest.approx(value))
    assert after != before


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
    small_cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
    small_cfg.DATASETS[split] = (three_classes,)
    message = (
        rf"MODEL\.RETINANET\.NUM_CLASSES .*is 5, but '{three_classes}' \(DATASETS\.{split}\) "
        r"has 3 classes \(a, b, c\)\. It must be 3"
    )
    with pytest.raises(ValueError, match=message):
        DefaultTrainer.build_model(small_cfg)
    # A model alone may be for anything, as with Detectron2's RetinaNet.
    assert build_model(small_cfg).num_classes == 5
    small_cfg.MODEL.RETINANET.NUM_CLASSES = 3
    assert DefaultTrainer.build_model(small_cfg).num_classes == 3


def test_keys_of_ours_under_another_meta_architecture_are_reported(small_cfg, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    small_cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    small_cfg.MODEL.FOCAL_DET.LOSS.NAME = "OHEMLoss"
    with caplog.at_level(logging.WARNING, logger="detectron2"):
        check_training(small_cfg)
    assert "MODEL.FOCAL_DET.LOSS.NAME set, but without effect" in caplog.text
    assert "'RetinaNet', not 'FocalRetinaNet'" in caplog.text


def test_frozen_config_is_not_changed():
    cfg = get_cfg()
    cfg.MODEL.pop("FOCAL_DET", None)
    cfg.freeze()
    with pytest.raises(
        ValueError, match=r"config is frozen, MODEL\.FOCAL_DET\.\S+ cannot be added"
    ):
        focal_det.add_config(cfg)
    assert "FOCAL_DET" not in cfg.MODEL


@pytest.fixture
def registered():
    """A function that registers a class for the length of a test."""
    names = []

    def register(kind):
        LOSS_REGISTRY.register(kind)
        names.append(kind.__name__)

    yield register
    for name in names:
        LOSS_REGISTRY._obj_map.pop(name)


def test_subclasses_have_keys_of_their_own(registered):
    class Steep(FocalLoss):
        def __init__(self, alpha=0.25, gamma=4.0, scale=3.0):
            super().__init__(alpha, gamma)
            self.scale = scale

    class Wide(HingeLoss):
        def __init__(self, threshold=0.7):
            super().__init__(threshold)

    registered(Steep)
    registered(Wide)
    cfg = get_cfg()
    focal_det.add_config(cfg)
    assert cfg.MODEL.FOCAL_DET.HINGE.THRESHOLD == 0.5
    assert cfg.MODEL.FOCAL_DET.WIDE.THRESHOLD == 0.7
    cfg.MODEL.FOCAL_DET.LOSS.NAME = "Steep"
    cfg.MODEL.FOCAL_DET.STEEP.SCALE = 5.0
    loss = build_loss(cfg)
    assert (loss.gamma, loss.scale) == (cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA, 5.0)


def test_two_losses_cannot_share_a_key_with_two_defaults(registered):
    class Other(HingeLoss):
        config_node = "HINGE"

        def __init__(self, threshold=0.7):
            super().__init__(threshold)

    registered(Other)
    with pytest.raises(ValueError, match=r"HINGE\.THRESHOLD has two defaults, 0\.5 and 0\.7"):
        default_keys()


def test_lists_in_defaults_are_not_shared(registered):
    class Weighted(HingeLoss):
        def __init__(self, weights=[1.0]):  # noqa: B006  what is tested
            super().__init__()

    registered(Weighted)
    first, second = get_cfg(), get_cfg()
    for cfg in (first, second):
        cfg.MODEL.get("FOCAL_DET", {}).pop("WEIGHTED", None)
        focal_det.add_config(cfg)
    first.MODEL.FOCAL_DET.WEIGHTED.WEIGHTS.append(2.0)
    assert second.MODEL.FOCAL_DET.WEIGHTED.WEIGHTS == [1.0]


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
