"""Inference of a whole detector: what it leaves alone, and who may change its steps."""

from itertools import chain

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import RetinaNet
from torch import nn
from versions import needs_newer_ties

from focal_det.modeling import FocalRetinaNet


@pytest.fixture
def model(small_cfg):
    """With scores of all heights and boxes of all sizes."""
    torch.manual_seed(0)
    model = build_model(small_cfg).eval()
    # Without trained weights the features are huge.
    model.backbone.register_forward_hook(
        lambda _, args, features: {name: x / x.std() for name, x in features.items()}
    )
    for parameter in model.head.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
    nn.init.constant_(model.head.cls_score.bias, -3.0)
    nn.init.normal_(model.head.bbox_pred.weight, std=0.01)
    return model


@torch.no_grad()
def head_outputs(model, batch, memory_format=torch.contiguous_format):
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    features = [features[name] for name in model.head_in_features]
    predictions = [[x.to(memory_format=memory_format) for x in y] for y in model.head(features)]
    return images, features, predictions


def become(model, **methods):
    """The same detector, of a subclass with methods of its own."""
    model.__class__ = type("Changed", (FocalRetinaNet,), methods)
    return model


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_predictions_stay_as_they_were(model, make_batch, memory_format):
    images, features, predictions = head_outputs(model, make_batch((1, 1)), memory_format)
    copies = [[x.clone() for x in y] for y in predictions]
    model.forward_inference(images, features, predictions)
    for level, copy in zip(chain(*predictions), chain(*copies), strict=True):
        assert torch.equal(level, copy)
        assert level.stride() == copy.stride()


def test_detectron2_changes_the_predictions_of_a_channels_last_head(model, make_batch):
    """It takes the sigmoid in place. Why the above is worth a test."""
    images, features, predictions = head_outputs(model, make_batch((1, 1)), torch.channels_last)
    copies = [x.clone() for x in predictions[0]]
    RetinaNet.forward_inference(model, images, features, predictions)
    assert not torch.equal(predictions[0][0], copies[0])
    torch.testing.assert_close(predictions[0][0], copies[0].sigmoid())


def test_the_same_predictions_are_detected_twice(model, make_batch):
    images, features, predictions = head_outputs(model, make_batch((1,)), torch.channels_last)
    first, second = (model.forward_inference(images, features, predictions)[0] for _ in range(2))
    assert len(first) > 10
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)
    assert torch.equal(first.scores, second.scores)


def test_no_image_gives_no_detections(model, make_batch):
    images, features, predictions = head_outputs(model, make_batch((1,)))
    images.image_sizes = []
    assert model.forward_inference(images, features, predictions) == []


def test_a_subclass_may_change_the_inference_of_an_image(model, make_batch):
    def inference_single_image(self, anchors, box_cls, box_delta, image_size):
        seen.append(image_size)
        # Detectron2's form: scores of (H x W x A, K), deltas of (H x W x A, 4).
        assert all(x.min() >= 0 and x.max() <= 1 and x.shape[1] == 5 for x in box_cls)
        assert [len(x) for x in box_delta] == [len(x) for x in anchors]
        detections = RetinaNet.inference_single_image(self, anchors, box_cls, box_delta, image_size)
        return detections[:3]

    seen = []
    batch = make_batch((1, 1))
    with torch.no_grad():
        expected = [x["instances"][:3] for x in model(batch)]
        assert all(len(x) == 3 for x in expected)
        found = become(model, inference_single_image=inference_single_image)(batch)
    assert len(seen) == 2
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["instances"].pred_boxes.tensor, other.pred_boxes.tensor)


@pytest.mark.parametrize(
    "step",
    [
        "_decode_multi_level_predictions",
        "_decode_per_level_predictions",
    ],
)
def test_a_subclass_may_change_a_step_inside(model, make_batch, step):
    def changed(self, *args):
        seen.append(step)
        return getattr(RetinaNet, step)(self, *args)

    seen = []
    with torch.no_grad():
        become(model, **{step: changed})(make_batch((1,)))
    assert seen


def test_one_detector_may_have_its_own_inference_of_an_image(model, make_batch):
    """Tools that visualise or export put a function in place of the method."""
    seen = []
    model.inference_single_image = lambda *args: (
        seen.append(args) or RetinaNet.inference_single_image(model, *args)
    )
    with torch.no_grad():
        model(make_batch((1,)))
    assert len(seen) == 1


@needs_newer_ties
def test_bfloat16_autocast_detects_what_detectron2_does_there(model, make_batch):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = head_outputs(model, make_batch((1, 1)))
        found = model.forward_inference(*outputs)
        expected = RetinaNet.forward_inference(model, *outputs)
    for one, other in zip(found, expected, strict=True):
        assert len(one) > 10
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_classes, other.pred_classes)
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)


def test_bfloat16_autocast_detects_about_what_float32_does(model, make_batch):
    batch = make_batch((1,))
    with torch.no_grad():
        full = model(batch)[0]["instances"]
        with torch.autocast("cpu", torch.bfloat16):
            low = model(batch)[0]["instances"]
    assert low.pred_boxes.tensor.dtype == torch.float32
    assert low.pred_boxes.tensor.isfinite().all()
    # Which box has a score may change by what bfloat16 rounds, how high the best ones are does not.
    torch.testing.assert_close(low.scores[:10].float(), full.scores[:10], rtol=0.02, atol=0.02)
