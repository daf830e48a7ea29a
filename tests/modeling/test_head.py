"""The head: prior, structure and early errors."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

from focal_det.modeling import FocalRetinaNetHead, build_dense_head

SHAPES = [ShapeSpec(channels=8, stride=8), ShapeSpec(channels=8, stride=16)]


def make(**changes):
    arguments = {
        "input_shape": SHAPES, "num_classes": 3, "num_anchors": 2, "conv_dims": [8], "norm": "",
    }  # fmt: skip
    return FocalRetinaNetHead(**{**arguments, **changes})


def test_prior_sets_the_classification_bias():
    """-log((1 - .01) / .01) = -4.59512; .5 is no prior."""
    assert make().cls_score.bias.tolist() == pytest.approx([-4.59512] * 6, abs=1e-5)
    assert make(prior_prob=0.5).cls_score.bias.abs().max().item() == 0
    probability = make(prior_prob=0.2).cls_score.bias.sigmoid()
    assert probability.tolist() == pytest.approx([0.2] * 6)


def test_subnets_start_at_the_papers_spread():
    torch.manual_seed(0)
    weight = make(conv_dims=[64, 64]).cls_subnet[2].weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert math.isclose(weight.mean().item(), 0, abs_tol=2e-4)


def test_output_shapes():
    logits, deltas = make()([torch.zeros(1, 8, 4, 6), torch.zeros(1, 8, 2, 3)])
    assert [tuple(x.shape) for x in logits] == [(1, 6, 4, 6), (1, 6, 2, 3)]
    assert [tuple(x.shape) for x in deltas] == [(1, 8, 4, 6), (1, 8, 2, 3)]


def test_is_detectron2s_head_one_level_below():
    assert FocalRetinaNetHead.__bases__ == (RetinaNetHead,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior_prob": 0.0}, r"PRIOR_PROB\) must be in \(0, 1\), got 0.0"),
        ({"prior_prob": 1.5}, r"PRIOR_PROB\) must be in \(0, 1\), got 1.5"),
        ({"num_classes": 0}, r"NUM_CLASSES\) must be >= 1, got 0"),
        ({"conv_dims": []}, r"NUM_CONVS must be >= 1"),
    ],
)
def test_arguments_out_of_range_name_their_key(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_unknown_head_lists_the_valid_ones(small_cfg):
    small_cfg.MODEL.FOCAL_DET.HEAD.NAME = "RPNHead"
    with pytest.raises(ValueError, match=r"HEAD\.NAME is 'RPNHead'.*FocalRetinaNetHead"):
        build_dense_head(small_cfg, SHAPES)
