"""Box losses: Detectron2's, image by image, on the path of a CPU and on that of a GPU."""

import pytest
import torch
from detectron2.modeling.box_regression import (
    Box2BoxTransform,
    Box2BoxTransformLinear,
    _dense_box_regression_loss,
)
from detectron2.structures import Boxes

from focal_det.modeling import box_loss
from focal_det.modeling.box_loss import box_loss_per_image

TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
KINDS = {
    "l1": ("smooth_l1", 0.0),
    "smooth l1": ("smooth_l1", 0.11),
    "giou": ("giou", 0.0),
    "diou": ("diou", 0.0),
    "ciou": ("ciou", 0.0),
}
ANCHOR = [10.0, 10.0, 50.0, 40.0]
PLACES = {
    "identical": ANCHOR,
    "touches an edge": [50.0, 10.0, 80.0, 40.0],
    "touches a corner": [50.0, 40.0, 80.0, 60.0],
    "inside": [20.0, 15.0, 30.0, 35.0],
    "inside, along an edge": [10.0, 10.0, 20.0, 40.0],
    "around": [0.0, 0.0, 90.0, 80.0],
    "overlaps": [30.0, 20.0, 70.0, 90.0],
    "same columns": [10.0, 60.0, 50.0, 90.0],
    "apart": [200.0, 300.0, 240.0, 330.0],
    "apart and small": [-20.0, -20.0, -19.5, -19.0],
}

of_every_kind = pytest.mark.parametrize(("kind", "beta"), KINDS.values(), ids=KINDS.keys())


@pytest.fixture(params=[True, False], ids=["picked", "all rows"])
def _rows(request, monkeypatch):
    """The foreground alone, as on a CPU, and all anchors, as on a GPU."""
    monkeypatch.setattr(box_loss, "_can_pick", lambda device: request.param)


pytestmark = pytest.mark.usefixtures("_rows")


def random_boxes(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, generator=generator) * 60
    return torch.cat([corners, corners + 4 + torch.rand(*shape, 2, generator=generator) * 60], -1)


def problem(num_anchors=60):
    """Anchors, deltas, boxes and foreground of an image with some, one with none, one with all."""
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, num_anchors, 4, generator=generator) * 0.4
    is_foreground = torch.rand(3, num_anchors, generator=generator) < 0.3
    is_foreground[1], is_foreground[2] = False, True
    boxes = random_boxes(3, num_anchors, seed=2)
    return random_boxes(num_anchors, seed=1), deltas, boxes, is_foreground


def detectron2s(anchors, deltas, gt_boxes, is_foreground, transform, kind, beta):
    sums = [
        _dense_box_regression_loss(
            [Boxes(anchors)], transform, [x[None]], [boxes], foreground[None], kind, beta
        )
        for x, boxes, foreground in zip(deltas, gt_boxes, is_foreground, strict=True)
    ]
    return torch.stack(sums)


def value_and_grad(loss, anchors, deltas, *rest):
    """Sums of each image, and the gradient where each image has a weight of its own."""
    deltas = deltas.clone().requires_grad_()
    sums = loss(anchors, deltas, *rest)
    weights = torch.arange(1, len(sums) + 1)
    return sums.detach(), torch.autograd.grad((sums * weights).sum(), deltas)[0]


def check(*arguments):
    """Compare with Detectron2; gives what both agree on."""
    expected = value_and_grad(detectron2s, *arguments)
    found = value_and_grad(box_loss_per_image, *arguments)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    return found


@of_every_kind
def test_random_boxes_cost_what_they_do_in_detectron2(kind, beta):
    sums, grad = check(*problem(), TRANSFORM, kind, beta)
    assert (sums > 0).tolist() == [True, False, True]
    assert grad[1].eq(0).all()


@of_every_kind
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 9.0, 5.0, 4.0)], ids=str)
@pytest.mark.parametrize("gt_box", PLACES.values(), ids=PLACES.keys())
def test_every_position_costs_what_it_does_in_detectron2(gt_box, weights, kind, beta):
    """The predicted box is the anchor; a second anchor is background."""
    anchors = torch.tensor([ANCHOR, [0.0, 0.0, 32.0, 32.0]])
    boxes = torch.tensor([[gt_box, gt_box]])
    is_foreground = torch.tensor([[True, False]])
    transform = Box2BoxTransform(weights=weights)
    sums, _ = check(anchors, torch.zeros(1, 2, 4), boxes, is_foreground, transform, kind, beta)
    assert (sums.item() < 1e-5) == (gt_box == ANCHOR)


@of_every_kind
def test_no_foreground_at_all_is_zero_and_still_in_the_graph(kind, beta):
    anchors, deltas, boxes, is_foreground = problem()
    sums, grad = check(anchors, deltas, boxes, is_foreground & False, TRANSFORM, kind, beta)
    assert sums.tolist() == [0, 0, 0]
    assert grad.eq(0).all()


@of_every_kind
def test_no_anchors_at_all_is_zero(kind, beta):
    sums, _ = check(*problem(num_anchors=0), TRANSFORM, kind, beta)
    assert sums.tolist() == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@of_every_kind
def test_what_is_matched_with_the_background_is_not_read(kind, beta):
    anchors, deltas, boxes, is_foreground = problem()
    expected = value_and_grad(
        box_loss_per_image, anchors, deltas, boxes, is_foreground, TRANSFORM, kind, beta
    )
    garbage = torch.tensor(
        [
            [float("nan")] * 4,
            [float("inf")] * 4,
            [float("-inf"), 0.0, float("inf"), 9.0],
            [0.0] * 4,
            [7.0, 7.0, 7.0, 9.0],
            [9.0, 9.0, 5.0, 5.0],
            [0.0, 0.0, 3e38, 3e38],
        ]
    )
    rows = torch.arange(boxes.shape[1]) % len(garbage)
    boxes = boxes.where(is_foreground[..., None], garbage[rows])
    # No step of the backward pass may see a NaN: who looks for one would find this.
    with torch.autograd.detect_anomaly():
        found = value_and_grad(
            box_loss_per_image, anchors, deltas, boxes, is_foreground, TRANSFORM, kind, beta
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@of_every_kind
@pytest.mark.parametrize("delta", [-200.0, 200.0, 1e30], ids=str)
def test_wild_predictions_on_the_background_are_not_felt(delta, kind, beta):
    """A box of no size has no shape to compare, one of infinite size no overlap."""
    anchors, deltas, boxes, is_foreground = problem()
    deltas = deltas.where(is_foreground[..., None], delta)
    check(anchors, deltas, boxes, is_foreground, TRANSFORM, kind, beta)


@of_every_kind
@pytest.mark.parametrize("anchor", [[5.0, 5.0, 5.0, 9.0], [5.0, 5.0, 5.0, 5.0]], ids=str)
def test_anchors_without_a_size_on_the_background_are_not_felt(anchor, kind, beta):
    """Detectron2's loss asserts that there are none."""
    anchors, deltas, boxes, is_foreground = problem()
    is_foreground[:, 0] = False
    arguments = deltas, boxes, is_foreground, TRANSFORM, kind, beta
    expected = value_and_grad(box_loss_per_image, anchors, *arguments)
    anchors[0] = torch.tensor(anchor)
    found = value_and_grad(box_loss_per_image, anchors, *arguments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@of_every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_deltas_cost_what_they_do_in_float32(dtype, kind, beta):
    anchors, deltas, boxes, is_foreground = problem()
    low = deltas.to(dtype)
    arguments = boxes, is_foreground, TRANSFORM, kind, beta
    found = box_loss_per_image(anchors, low, *arguments)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, box_loss_per_image(anchors, low.float(), *arguments))


@pytest.mark.parametrize("kind", ["smooth_l1", "giou"])
def test_inputs_stay_as_they_were(kind):
    arguments = problem()
    copies = [x.clone() for x in arguments]
    value_and_grad(box_loss_per_image, *arguments, TRANSFORM, kind, 0.0)
    assert all(torch.equal(*pair) for pair in zip(arguments, copies, strict=True))


class Doubled(Box2BoxTransform):
    """Deltas twice as large as usual."""

    def get_deltas(self, src_boxes, target_boxes):
        return 2 * super().get_deltas(src_boxes, target_boxes)

    def apply_deltas(self, deltas, boxes):
        return super().apply_deltas(deltas / 2, boxes)


@of_every_kind
def test_a_transform_of_another_class_says_what_deltas_mean(kind, beta):
    anchors, deltas, boxes, is_foreground = problem()
    arguments = deltas, boxes, is_foreground
    usual = box_loss_per_image(anchors, *arguments, TRANSFORM, kind, beta)
    doubled, _ = check(anchors, *arguments, Doubled((1.0, 1.0, 1.0, 1.0)), kind, beta)
    assert doubled[0] != usual[0]
    deltas.abs_()
    check(anchors, *arguments, Box2BoxTransformLinear(), kind, beta)


@pytest.mark.parametrize("has_foreground", [True, False])
def test_an_unknown_type_is_named_with_its_key(has_foreground):
    anchors, deltas, boxes, is_foreground = problem()
    with pytest.raises(
        ValueError,
        match=r"MODEL\.RETINANET\.BBOX_REG_LOSS_TYPE.* smooth_l1, giou, diou, ciou, got 'eiou'",
    ):
        box_loss_per_image(
            anchors, deltas, boxes, is_foreground & has_foreground, TRANSFORM, "eiou"
        )
