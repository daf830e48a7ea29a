"""Every config in the tree loads, builds, and says what it means."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

import focal_det
from focal_det.losses import CrossEntropyLoss, FocalLoss, HingeLoss, OHEMLoss
from focal_det.modeling import FocalRetinaNet, ImageNormalizer

CONFIGS = Path(__file__).parent.parent / "configs"
YAMLS = sorted(CONFIGS.rglob("*.yaml"))
LAZY = sorted((CONFIGS / "lazy").glob("*.py"))
TWINS = {
    "focal_retinanet_R_50_FPN_1x": "COCO-Detection/focal_retinanet_R_50_FPN_1x.yaml",
    "focal_retinanet_R_50_FPN_paper_600": "COCO-Detection/focal_retinanet_R_50_FPN_paper_600.yaml",
}


def load(path):
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_yaml_builds_and_needs_no_python_tag(path):
    with path.open() as file:
        yaml.safe_load(file)  # raises on a tag such as !!python/object
    cfg = load(path)
    # The values are the test; the weights are not, and meta tensors cost nothing.
    with torch.device("meta"):
        model = FocalRetinaNet(cfg)
    assert type(model) is FocalRetinaNet
    assert model.num_classes == cfg.MODEL.RETINANET.NUM_CLASSES


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "COCO-Detection").glob("*.yaml")), ids=lambda path: path.stem
)
def test_leaf_holds_only_its_deltas(path):
    assert len(path.read_text().splitlines()) <= 12
    assert path.read_text().startswith("_BASE_")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cross_entropy", CrossEntropyLoss()),
        ("focal", FocalLoss(alpha=0.25, gamma=2.0)),
        ("hinge", HingeLoss(threshold=0.5)),
        ("ohem", OHEMLoss(batch_size=128, nms_thresh=0.5, neg_pos_ratio=0.0)),
        ("ohem_1to3", OHEMLoss(batch_size=128, nms_thresh=0.5, neg_pos_ratio=3.0)),
    ],
)
def test_ablation_resolves_to_its_loss(name, expected):
    model = FocalRetinaNet.from_config(load(CONFIGS / "ablations" / f"{name}.yaml"))
    assert str(model["cls_loss"]) == str(expected)


def test_there_is_one_ablation_for_each_loss():
    named = {load(path).MODEL.FOCAL_DET.LOSS.NAME for path in (CONFIGS / "ablations").iterdir()}
    assert named == {
        "BalancedCrossEntropyLoss",
        "CrossEntropyLoss",
        "FocalLoss",
        "FocalLossStar",
        "HingeLoss",
        "OHEMLoss",
    }


def test_paper_recipe_to_the_letter():
    cfg = load(CONFIGS / "Base-FocalRetinaNet-Paper.yaml")
    solver, retinanet = cfg.SOLVER, cfg.MODEL.RETINANET
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (16, 0.01, 90000)
    assert (solver.STEPS, solver.GAMMA) == ((60000, 80000), 0.1)
    assert (solver.WEIGHT_DECAY, solver.MOMENTUM) == (1e-4, 0.9)
    assert (solver.WARMUP_ITERS, solver.WARMUP_METHOD) == (500, "linear")
    assert pytest.approx(1 / 3) == solver.WARMUP_FACTOR
    assert (retinanet.FOCAL_LOSS_ALPHA, retinanet.FOCAL_LOSS_GAMMA) == (0.25, 2.0)
    assert (retinanet.PRIOR_PROB, retinanet.NUM_CONVS) == (0.01, 4)
    assert (retinanet.SMOOTH_L1_LOSS_BETA, retinanet.BBOX_REG_LOSS_TYPE) == (0.11, "smooth_l1")
    assert (retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS) == ([0.4, 0.5], [0, -1, 1])
    assert (retinanet.SCORE_THRESH_TEST, retinanet.TOPK_CANDIDATES_TEST) == (0.05, 1000)
    assert (retinanet.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE) == (0.5, 100)
    assert retinanet.IN_FEATURES == ["p3", "p4", "p5", "p6", "p7"]
    assert cfg.MODEL.FPN.OUT_CHANNELS == 256
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert cfg.MODEL.FOCAL_DET.NORMALIZER.NAME == "image"
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST) == ((600,), 600)
    assert cfg.INPUT.RANDOM_FLIP == "horizontal"
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    expected = [2 ** (level + octave / 3) for level in range(5, 10) for octave in range(3)]
    assert [size for level in sizes for size in level] == pytest.approx(expected)
    assert cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS == [[0.5, 1.0, 2.0]]


def test_anchors_are_those_of_detectron2s_base_to_the_last_bit():
    sizes = load(CONFIGS / "Base-FocalRetinaNet.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes == [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]


@pytest.mark.parametrize("path", LAZY, ids=lambda path: path.stem)
def test_lazy_config_equals_its_yaml_twin(path, caplog):
    caplog.set_level(logging.ERROR)
    lazy = LazyConfig.load(str(path))
    cfg = load(CONFIGS / TWINS[path.stem])
    with torch.device("meta"):
        twin, model = FocalRetinaNet(cfg), instantiate(lazy.model)
    assert str(model) == str(twin)  # modules, losses and their arguments
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in twin.state_dict().items()
    }
    trainable = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, twin)]
    assert trainable[0] == trainable[1]
    for name in (
        "num_classes", "smooth_l1_beta", "box_reg_loss_type", "test_score_thresh",
        "test_topk_candidates", "test_nms_thresh", "max_detections_per_image", "input_format",
        "head_in_features",
    ):  # fmt: skip
        assert list_or_value(getattr(model, name)) == list_or_value(getattr(twin, name)), name
    assert vars(model.anchor_matcher) == vars(twin.anchor_matcher)
    assert vars(model.box2box_transform) == vars(twin.box2box_transform)
    assert_same_training(lazy, cfg)


def assert_same_training(lazy, cfg):
    train, resize = lazy.dataloader.train, lazy.dataloader.train.mapper.augmentations[0]
    assert (train.total_batch_size, lazy.optimizer.lr) == (
        cfg.SOLVER.IMS_PER_BATCH,
        cfg.SOLVER.BASE_LR,
    )
    assert (lazy.optimizer.momentum, lazy.optimizer.weight_decay) == (
        cfg.SOLVER.MOMENTUM,
        cfg.SOLVER.WEIGHT_DECAY,
    )
    assert (tuple(resize.short_edge_length), resize.max_size) == (
        cfg.INPUT.MIN_SIZE_TRAIN,
        cfg.INPUT.MAX_SIZE_TRAIN,
    )
    resize = lazy.dataloader.test.mapper.augmentations[0]
    assert list_or_value(resize.max_size) == cfg.INPUT.MAX_SIZE_TEST
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    multiplier = instantiate(lazy.lr_multiplier)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for step in (0, 1, 250, 499, 500, 999, 1000, 59999, 60000, 79999, 80000, 89999):
        assert multiplier(step / cfg.SOLVER.MAX_ITER) == pytest.approx(
            scheduler._multiplier(step / cfg.SOLVER.MAX_ITER), rel=1e-6
        )


def list_or_value(value):
    return list(value) if isinstance(value, (list, tuple)) else value


def test_lazy_images_give_the_twins_losses(make_batch):
    """Beyond structure: the two doors compute the same numbers from the same weights."""
    from detectron2.utils.events import EventStorage

    lazy = LazyConfig.load(str(CONFIGS / "lazy" / "focal_retinanet_R_50_FPN_paper_600.py"))
    cfg = load(CONFIGS / TWINS["focal_retinanet_R_50_FPN_paper_600"])
    model, twin = instantiate(lazy.model), build_model(cfg)
    assert isinstance(model.normalizer, ImageNormalizer)
    model.load_state_dict(twin.state_dict())
    with EventStorage(), torch.no_grad():
        losses, expected = (m.train()(make_batch((2, 1))) for m in (model, twin))
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value)
