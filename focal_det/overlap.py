"""Overlaps of many boxes, a block at a time.

Letters: A and B boxes on either side.
"""

import torch
from torch import Tensor


def sides(boxes: Tensor) -> Tensor:
    """Boxes (B, 4) XYXY as rows x1, y1, x2, y2, area: (5, B) float32.

    A box without an area, or with NaN or infinite sides (so not with a finite area), overlaps with
    nothing. It becomes a point with an infinite area: its IoU is 0 / inf, never 0 / 0.
    """
    rows = boxes.new_empty(5, len(boxes), dtype=torch.float32)
    corners, area = rows[:4], rows[4]
    corners.copy_(boxes.t())
    x1, y1, x2, y2 = corners
    torch.mul(x2 - x1, y2 - y1, out=area)
    is_empty = ~((area > 0) & (area < torch.inf))
    corners.masked_fill_(is_empty, 0)
    area.masked_fill_(is_empty, torch.inf)
    return rows


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union (B, A) of (5, B) and (5, A) boxes, see :func:`sides`.

    The operations of Detectron2's ``pairwise_iou``, and of torchvision's NMS on a CPU, in their
    order, so that all bits are the same.
    """
    x1, y1, x2, y2, area = first.unsqueeze(-1)
    other_x1, other_y1, other_x2, other_y2, other_area = second.unsqueeze(1)
    width = torch.minimum(x2, other_x2).sub_(torch.maximum(x1, other_x1)).clamp_(min=0)
    height = torch.minimum(y2, other_y2).sub_(torch.maximum(y1, other_y1)).clamp_(min=0)
    intersection = width.mul_(height)
    union = torch.add(area, other_area, out=height).sub_(intersection)
    return intersection.div_(union)


def may_meet(boxes: Tensor, others: Tensor) -> Tensor:
    """Which of the (5, B) boxes can overlap with any of the (5, A) others, (B,) bool."""
    top_left = others[:2].amin(1, keepdim=True)
    bottom_right = others[2:4].amax(1, keepdim=True)
    return ((boxes[:2] < bottom_right) & (boxes[2:4] > top_left)).all(0)


def overlaps_any(boxes: Tensor, others: Tensor, threshold: float, block: int = 2048) -> Tensor:
    """Which of the (5, B) boxes have an IoU above `threshold` with any of the (5, A) others.

    It waits for the device: each block of boxes looks only at those that are near.

    Args:
        boxes: best in an order in which neighbours are near each other.
        others: any order.
        threshold: compared in float64, as torchvision's NMS does on a CPU.
        block: boxes at a time.

    Returns:
        (B,) bool.
    """
    found = torch.zeros(boxes.shape[1], dtype=torch.bool, device=boxes.device)
    for part, result in zip(boxes.split(block, dim=1), found.split(block), strict=True):
        near = others[:, may_meet(others, part)]
        for start in range(0, near.shape[1], 64):
            highest = iou(near[:, start : start + 64], part).amax(0)
            result |= highest.double() > threshold
    return found
