"""FocalRetinaNet against Detectron2's RetinaNet: the same config, weights and inputs."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.utils.events import EventStorage

from focal_det.modeling import FocalRetinaNet


@pytest.fixture
def make_pair(small_cfg):
    """A function from overrides to (built-in, ours) with the same weights."""

    def make(*overrides):
        small_cfg.merge_from_list(list(overrides))
        models = []
        for name in ("RetinaNet", "FocalRetinaNet"):
            small_cfg.MODEL.META_ARCHITECTURE = name
            torch.manual_seed(1)
            models.append(build_model(small_cfg))
        # The prior leaves all scores below the test threshold and all gradients alike: shake it.
        with torch.no_grad():
            noise = torch.randn(models[0].head.cls_score.bias.shape) * 2
            for model in models:
                model.head.cls_score.bias.add_(noise)
                torch.manual_seed(2)
                model.head.bbox_pred.weight.normal_(std=0.1)
        return models

    return make


def step(model, batch):
    model.train().zero_grad()
    with EventStorage():
        losses = model(copy.deepcopy(batch))
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou"])
@pytest.mark.parametrize("counts", [(4, 0, 7), (0, 0)], ids=["mixed", "no objects"])
def test_losses_and_gradients_equal_detectron2s(make_pair, make_batch, norm, box_loss, counts):
    theirs, ours = make_pair(
        "MODEL.RETINANET.NORM", norm,
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_loss,
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.11,
        "MODEL.RETINANET.FOCAL_LOSS_ALPHA", 0.4,
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA", 1.5,
    )  # fmt: skip
    # Three steps, since the moving average of the normalizer is a state.
    for seed in range(3):
        batch = make_batch(counts, seed)
        expected, _ = step(theirs, batch)
        losses, _ = step(ours, batch)
        assert losses.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(losses[key], value, rtol=1e-5, atol=0)
    # Gradients in float64: in float32, a norm over few pixels blows rounding errors up. (The
    # built-in loss is float32 inside even then, hence not tighter.)
    batch = make_batch(counts, 3)
    _, expected_grads = step(theirs.double(), batch)
    _, grads = step(ours.double(), batch)
    assert grads.keys() == expected_grads.keys()
    scale = max(grad.abs().max().item() for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        torch.testing.assert_close(
            grads[name], grad, rtol=1e-5, atol=1e-7 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("norm", ["", "GN"])
def test_detections_equal_detectron2s(make_pair, make_batch, norm):
    theirs, ours = (model.eval() for model in make_pair("MODEL.RETINANET.NORM", norm))
    batch = make_batch((1, 1, 1))
    with torch.no_grad():
        for expected, found in zip(theirs(batch), ours(batch), strict=True):
            expected, found = expected["instances"], found["instances"]
            assert len(expected) > 10
            assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
            assert torch.equal(found.scores, expected.scores)
            assert torch.equal(found.pred_classes, expected.pred_classes)


def test_same_seed_gives_the_weights_of_detectron2(small_cfg):
    states = []
    for name in ("RetinaNet", "FocalRetinaNet"):
        small_cfg.MODEL.META_ARCHITECTURE = name
        torch.manual_seed(3)
        states.append(build_model(small_cfg).state_dict())
    theirs, ours = states
    assert set(ours) - set(theirs) == {"normalizer.value"}
    assert set(theirs) <= set(ours)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_state_dicts_load_into_each_other(make_pair):
    theirs, ours = make_pair()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing == []
    assert unexpected == ["normalizer.value"]


def test_is_a_retinanet_and_no_deeper_than_one_level(make_pair):
    _, ours = make_pair()
    assert isinstance(ours, RetinaNet)
    assert FocalRetinaNet.__bases__ == (RetinaNet,)
