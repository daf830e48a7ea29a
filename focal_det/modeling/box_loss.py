"""Box regression losses of the foreground anchors, without waiting for the device.

Detectron2's and torchvision's functions pick the foreground by boolean indexing and assert that
boxes are valid, and on a GPU the host has to wait for each. Here a GPU computes all anchors and
drops what is not foreground; a CPU, where picking is free, computes the foreground alone.

Letters: N images, R anchors per image over all levels, P rows that are computed.
"""

import math

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import smooth_l1_loss
from torch import Tensor

from focal_det.kernels.terms import can_pick as _can_pick

EPS = 1e-7
"""What the IoU losses add to a denominator, as Detectron2's do."""


def box_loss_per_image(
    anchors: Tensor,
    deltas: Tensor,
    gt_boxes: Tensor,
    is_foreground: Tensor,
    box2box_transform: Box2BoxTransform,
    box_reg_loss_type: str = "smooth_l1",
    smooth_l1_beta: float = 0.0,
) -> Tensor:
    """Sum of the box loss over the foreground anchors of each image.

    Args:
        anchors: (R, 4) XYXY pixels.
        deltas: (N, R, 4), predicted.
        gt_boxes: (N, R, 4) XYXY pixels, the matched boxes; read where foreground.
        is_foreground: (N, R) bool.
        box2box_transform: says what deltas mean.
        box_reg_loss_type: ``smooth_l1`` on the deltas; ``giou`` (arXiv 1902.09630), ``diou`` or
            ``ciou`` (arXiv 1911.08287) on the boxes.
        smooth_l1_beta: where smooth L1 turns from a parabola into a line; 0 for L1.

    Returns:
        (N,) float32 or better.

    Raises:
        ValueError: another `box_reg_loss_type`.
    """
    num_images, num_anchors = is_foreground.shape
    foreground = is_foreground.flatten()
    deltas, targets = deltas.flatten(0, 1), gt_boxes.flatten(0, 1)
    if _can_pick(foreground.device):
        rows = foreground.nonzero().squeeze(1)
        counts, deltas, targets = (x[rows] for x in (foreground, deltas, targets))
        sources = anchors[rows % num_anchors]  # (P, 4)
    else:
        counts, sources = foreground, anchors.repeat(num_images, 1)
    # An anchor without a box gets itself for a target: finite, whatever it is multiplied with.
    targets = targets.where(counts[:, None], sources)
    # What it predicts is put aside before anything is computed: a gradient of 0 times infinity, as
    # far back as that may be, would be NaN.
    deltas = deltas.where(counts[:, None], 0)

    if box_reg_loss_type == "smooth_l1":
        encoded = _encode(box2box_transform, sources, targets)
        losses = smooth_l1_loss(deltas, encoded, beta=smooth_l1_beta, reduction="none").sum(1)
    else:
        check_box_loss(box_reg_loss_type)
        boxes = box2box_transform.apply_deltas(deltas, sources)
        losses = IOU_LOSSES[box_reg_loss_type](boxes, targets)
    losses = losses.where(counts, 0)
    if _can_pick(foreground.device):
        return losses.new_zeros(num_images).index_add(0, rows // num_anchors, losses)
    return losses.view(num_images, num_anchors).sum(1)


def _encode(transform: Box2BoxTransform, sources: Tensor, targets: Tensor) -> Tensor:
    """Deltas (P, 4) that lead from `sources` to `targets`."""
    if type(transform) is not Box2BoxTransform:
        return transform.get_deltas(sources, targets)
    # As Box2BoxTransform.get_deltas, without its assertion that anchors have a width.
    weights = torch.cat([sources.new_full((1, 1), weight) for weight in transform.weights], dim=1)
    shift, scale = weights[:, :2], weights[:, 2:]
    size, target_size = sources[:, 2:] - sources[:, :2], targets[:, 2:] - targets[:, :2]
    center, target_center = sources[:, :2] + 0.5 * size, targets[:, :2] + 0.5 * target_size
    return torch.cat(
        [shift * (target_center - center) / size, scale * torch.log(target_size / size)], dim=1
    )


def _giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """``1 - IoU + (C - union) / C`` with C the area of the smallest box around both, (P,)."""
    intersection, union = _intersection_and_union(boxes, targets)
    area = _size_around(boxes, targets).prod(1)
    return 1 - intersection / (union + EPS) + (area - union) / (area + EPS)


def _diou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """``1 - IoU + d^2 / c^2``: distance of the centres over the diagonal around both, (P,)."""
    intersection, union = _intersection_and_union(boxes, targets)
    diagonal = _size_around(boxes, targets).square().sum(1) + EPS
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2, (targets[:, :2] + targets[:, 2:]) / 2
    distance = (centers[0] - centers[1]).square().sum(1)
    return 1 - intersection / (union + EPS) + distance / diagonal


def _ciou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """DIoU loss ``+ a v``, v the difference of the boxes' shapes, (P,)."""
    size, target_size = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    angles = [torch.atan(x[:, 0] / x[:, 1]) for x in (target_size, size)]
    v = (4 / math.pi**2) * (angles[0] - angles[1]).square()
    with torch.no_grad():
        intersection, union = _intersection_and_union(boxes, targets)
        weight = v / (1 - intersection / (union + EPS) + v + EPS)
    return _diou_loss(boxes, targets) + weight * v


def _intersection_and_union(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    overlap = torch.min(boxes[:, 2:], targets[:, 2:]) - torch.max(boxes[:, :2], targets[:, :2])
    intersection = overlap.prod(1).where((overlap > 0).all(1), 0)
    areas = [(x[:, 2:] - x[:, :2]).prod(1) for x in (boxes, targets)]
    return intersection, areas[0] + areas[1] - intersection


def _size_around(boxes: Tensor, targets: Tensor) -> Tensor:
    """Width and height (P, 2) of the smallest box around both."""
    return torch.max(boxes[:, 2:], targets[:, 2:]) - torch.min(boxes[:, :2], targets[:, :2])


IOU_LOSSES = {"giou": _giou_loss, "diou": _diou_loss, "ciou": _ciou_loss}
BOX_LOSSES = ("smooth_l1", *IOU_LOSSES)


def check_box_loss(name: str) -> None:
    """Raise unless `name` is one of :data:`BOX_LOSSES`.

    Raises:
        ValueError: it is not; the config key is named.
    """
    if name not in BOX_LOSSES:
        raise ValueError(
            "box_reg_loss_type (MODEL.RETINANET.BBOX_REG_LOSS_TYPE) must be one of "
            f"{', '.join(BOX_LOSSES)}, got {name!r}"
        )
