"""The slim backbone: widths, strides, and Detectron2's own network at full width."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone

from focal_det.modeling import build_slim_resnet_fpn_backbone

IMAGE = ShapeSpec(channels=3)


@pytest.fixture
def cfg(small_cfg):
    small_cfg.MODEL.RESNETS.NORM = "BN"
    small_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return small_cfg


def test_widths_and_strides(cfg):
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16, 24
    backbone = build_slim_resnet_fpn_backbone(cfg, IMAGE)
    assert {k: v.channels for k, v in backbone.bottom_up.output_shape().items()} == {
        "res3": 48, "res4": 96, "res5": 192,
    }  # fmt: skip
    features = backbone(torch.zeros(1, 3, 64, 96))
    assert {k: tuple(v.shape) for k, v in features.items()} == {
        "p3": (1, 32, 8, 12), "p4": (1, 32, 4, 6), "p5": (1, 32, 2, 3),
    }  # fmt: skip


@pytest.mark.parametrize("depth", [18, 34])
def test_is_detectron2s_resnet_at_its_width(cfg, depth):
    cfg.MODEL.RESNETS.DEPTH = depth
    slim = build_slim_resnet_fpn_backbone(cfg, IMAGE).bottom_up
    theirs = build_resnet_backbone(cfg, IMAGE)
    slim.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.randn(1, 3, 64, 64)
    expected, found = theirs.eval()(image), slim.eval()(image)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_depths_are_refused(cfg):
    cfg.MODEL.RESNETS.DEPTH = 50
    with pytest.raises(ValueError, match=r"DEPTH must be one of 18, 34, got 50"):
        build_slim_resnet_fpn_backbone(cfg, IMAGE)
