"""Which ground-truth box each anchor is trained on.

Detectron2's rule, bit for bit, but the (M, R) matrix of overlaps never exists: blocks of it are
computed, reduced and forgotten, so that memory does not grow with the number of boxes. On a GPU
nothing here waits for the device; with Triton it is two kernels for all images of a batch.

Letters: N images, R anchors, M ground-truth boxes of one image, A anchors and B boxes in a block,
K classes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor

from focal_det.kernels.sums import import_triton, warn_once
from focal_det.kernels.terms import can_pick
from focal_det.overlap import iou, may_meet, sides

BLOCK_PAIRS_CPU = 1 << 17
"""(box, anchor) pairs in a block: 512 KiB a temporary, few enough of them to stay in a cache."""

BLOCK_PAIRS_DEVICE = 1 << 22
"""The same on a GPU: 16 MiB a temporary, some 64 MiB in all, and work enough for a launch."""

BLOCK_BOXES = 32
"""Boxes in a block. Fewer of them make room for more anchors, and so for fewer blocks."""


def label_anchors(
    anchors: Tensor, gt_boxes: Tensor, gt_classes: Tensor, num_classes: int, matcher: Matcher
) -> tuple[Tensor, Tensor]:
    """:func:`label_batch` for one image.

    Args:
        anchors: (R, 4) XYXY pixels, of all levels.
        gt_boxes: (M, 4) XYXY pixels.
        gt_classes: (M,) integers in ``0..K-1``.
        num_classes: K.
        matcher: see :func:`match_anchors`.

    Returns:
        Labels (R,) and matched boxes (R, 4).
    """
    labels, boxes = label_batch(anchors, [gt_boxes], [gt_classes], num_classes, matcher)
    return labels[0], boxes[0]


@torch.no_grad()
def label_batch(
    anchors: Tensor,
    gt_boxes: Sequence[Tensor],
    gt_classes: Sequence[Tensor],
    num_classes: int,
    matcher: Matcher,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Class and box that each anchor is trained on, as ``RetinaNet.label_anchors``.

    Args:
        anchors: (R, 4) XYXY pixels, of all levels.
        gt_boxes: N tensors (M, 4) XYXY pixels.
        gt_classes: N tensors (M,) of integers in ``0..K-1``.
        num_classes: K.
        matcher: see :func:`match_anchors`.
        impl: see :func:`match_batch`.

    Returns:
        Labels (N, R), ``0..K-1`` foreground, ``K`` background, ``-1`` ignored, and matched boxes
        (N, R, 4) in float32, which mean something for foreground anchors only.
    """
    matches, match_labels = match_batch(anchors, gt_boxes, matcher, impl)
    counts = [len(boxes) for boxes in gt_boxes]
    if sum(counts) == 0:
        # Background even if the matcher would ignore what overlaps with nothing.
        matched_boxes = anchors.new_zeros(*matches.shape, 4, dtype=torch.float32)
        return torch.full_like(matches, num_classes), matched_boxes
    start = 0
    for row, count in zip(matches, counts, strict=True):
        # An image without boxes takes any: none of its anchors is foreground.
        row += start if count else 0
        start += count
    labels = torch.cat([classes.long() for classes in gt_classes])[matches]
    labels.masked_fill_(match_labels == 0, num_classes)
    labels.masked_fill_(match_labels == -1, -1)
    for row, count in zip(labels, counts, strict=True):
        if count == 0:
            row.fill_(num_classes)
    return labels, torch.cat([boxes.float() for boxes in gt_boxes])[matches]


@torch.compiler.disable
@torch.no_grad()
def match_batch(
    anchors: Tensor, gt_boxes: Sequence[Tensor], matcher: Matcher, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`match_anchors` for all images of a batch.

    Args:
        anchors: (R, 4) XYXY pixels.
        gt_boxes: N tensors (M, 4) XYXY pixels.
        matcher: see :func:`match_anchors`.
        impl: ``triton``, two kernels, CUDA; ``auto``, that where it can be had, else blocks of
            plain PyTorch; any other of :data:`focal_det.kernels.IMPLEMENTATIONS`: those blocks.

    Returns:
        Index of the box of its image with the highest IoU (N, R) int64, and the matcher's label
        (N, R) int8.

    Raises:
        RuntimeError: ``impl="triton"`` cannot be had; it says why.
    """
    counts = [len(boxes) for boxes in gt_boxes]
    triton = _triton_for(anchors.device, impl) if anchors.numel() and sum(counts) else None
    if triton is None:
        matched = [match_anchors(anchors, boxes, matcher) for boxes in gt_boxes]
        matches, match_labels = zip(*matched, strict=True)
        return torch.stack(matches), torch.stack(match_labels)
    boxes = sides(torch.cat([boxes.float() for boxes in gt_boxes]))
    best_iou, indices, is_best = triton.match(
        sides(anchors), boxes, counts, matcher.allow_low_quality_matches
    )
    return indices, _match_labels(best_iou, is_best, matcher)


def _triton_for(device: torch.device, impl: str) -> Any:
    """The module of the Triton kernels, or None where plain PyTorch is to be used.

    Raises:
        RuntimeError: Triton is asked for and cannot be had.
    """
    if impl not in ("auto", "triton") or (impl == "auto" and device.type != "cuda"):
        return None
    # The kernels are told the numbers of boxes by the host, and a replay would not be.
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    try:
        module = import_triton("triton_match")
        module.prepare(device)
    except torch.cuda.OutOfMemoryError:  # a RuntimeError that says nothing of Triton
        raise
    except RuntimeError as error:
        if impl == "triton":
            raise
        warn_once(f"anchors are matched by plain PyTorch operations: {error}")
        return None
    return module


@torch.no_grad()
def match_anchors(anchors: Tensor, gt_boxes: Tensor, matcher: Matcher) -> tuple[Tensor, Tensor]:
    """Match each anchor with the box that it overlaps most.

    Equals ``matcher(pairwise_iou(Boxes(gt_boxes), Boxes(anchors)))`` and like it computes in
    float32, whatever it is given. Two passes: the first finds the best box of each anchor and the
    best overlap of each box, the second the anchors that have it ("low-quality matches").

    Args:
        anchors: (R, 4) XYXY pixels.
        gt_boxes: (M, 4) XYXY pixels.
        matcher: states the thresholds, their labels, and whether the best anchors of a box are
            foreground however little they overlap.

    Returns:
        Index of the box with the highest IoU (R,) int64, the first of equals, and the matcher's
        label (R,) int8.
    """
    num_anchors, num_boxes = len(anchors), len(gt_boxes)
    matches = anchors.new_zeros(num_anchors, dtype=torch.int64)
    match_labels = anchors.new_full((num_anchors,), matcher.labels[0], dtype=torch.int8)
    if num_anchors == 0 or num_boxes == 0:
        return matches, match_labels

    anchor_sides, box_sides = sides(anchors), sides(gt_boxes)
    best_iou = anchor_sides.new_zeros(num_anchors)
    blocks = _anchor_blocks(num_anchors, num_boxes, anchors.device)
    # Of each box in each block: thousands of times smaller than the matrix.
    highest = anchor_sides.new_zeros(len(blocks), num_boxes)
    for block, highest_here in zip(blocks, highest, strict=True):
        nearby = _indices(may_meet(box_sides, anchor_sides[:, block]))
        for boxes, overlaps in _iou_blocks(anchor_sides[:, block], box_sides, nearby):
            highest_here[boxes] = overlaps.amax(1)
            _keep_better(overlaps, boxes, best_iou[block], matches[block])

    is_best = None
    if matcher.allow_low_quality_matches:
        is_best = _is_best_of_a_box(anchor_sides, box_sides, blocks, highest)
    return matches, _match_labels(best_iou, is_best, matcher)


def _match_labels(best_iou: Tensor, is_best: Tensor | None, matcher: Matcher) -> Tensor:
    """The matcher's labels, int8, from the highest IoU of each anchor, of any shape.

    Args:
        best_iou: float32.
        is_best: the low-quality matches, bool; None where the matcher has none.
        matcher: states thresholds and labels.
    """
    # The matcher's thresholds ascend from -inf: every overlap reaches one of its levels.
    labels = torch.full_like(best_iou, matcher.labels[0], dtype=torch.int8)
    for label, low in zip(matcher.labels[1:], matcher.thresholds[1:-1], strict=True):
        labels.masked_fill_(best_iou >= low, label)
    if is_best is not None:
        labels.masked_fill_(is_best, 1)
    return labels


def _is_best_of_a_box(
    anchors: Tensor, boxes: Tensor, blocks: list[slice], highest: Tensor
) -> Tensor:
    """Whether no anchor overlaps more with some box than this one, (R,) bool.

    Args:
        anchors: (5, R), see :func:`focal_det.overlap.sides`.
        boxes: (5, M).
        blocks: L slices of the anchors.
        highest: (L, M), highest IoU of each box in each of them.
    """
    highest_of_all = highest.amax(0)
    # Every anchor is the best of a box that none overlaps: Detectron2 has it so.
    is_best = (highest_of_all == 0).any().repeat(anchors.shape[1])
    for block, highest_here in zip(blocks, highest, strict=True):
        found_here = _indices((highest_here == highest_of_all) & (highest_of_all > 0))
        for index, overlaps in _iou_blocks(anchors[:, block], boxes, found_here):
            is_best[block] |= (overlaps == highest_of_all[index, None]).any(0)
    return is_best


def _keep_better(overlaps: Tensor, boxes: Tensor, best_iou: Tensor, matches: Tensor) -> None:
    """Update the best box so far of each anchor of a block, in place.

    Args:
        overlaps: (B, A), IoU.
        boxes: (B,) indices, ascending and above those of the blocks before.
        best_iou: (A,), updated.
        matches: (A,) indices of boxes, updated.
    """
    # The index by a second reduction: on a CPU, max(dim=0) with indices takes several times both.
    highest = overlaps.amax(0)
    rows = torch.arange(len(boxes) + 1, dtype=torch.int32, device=overlaps.device)
    first = torch.where(overlaps == highest, rows[:-1, None], rows[-1]).amin(0)
    # The first box wins a tie, so a later one has to overlap more.
    matches.copy_(torch.where(highest > best_iou, boxes[first], matches))
    torch.maximum(best_iou, highest, out=best_iou)


def _iou_blocks(anchors: Tensor, boxes: Tensor, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Overlaps of (5, A) anchors with some of the (5, M) boxes.

    Yields:
        At most BLOCK_BOXES indices of boxes (B,), in the order of `index`, and their IoU (B, A).
    """
    for start in range(0, len(index), BLOCK_BOXES):
        part = index[start : start + BLOCK_BOXES]
        yield part, iou(boxes[:, part], anchors)


def _indices(wanted: Tensor) -> Tensor:
    """Where `wanted` (M,) is True; on a GPU 0..M-1, as the host would have to wait for the answer.

    What is asked for saves work and changes no result.
    """
    if can_pick(wanted.device):
        return wanted.nonzero().squeeze(1)
    return torch.arange(len(wanted), device=wanted.device)


def _anchor_blocks(num_anchors: int, num_boxes: int, device: torch.device) -> list[slice]:
    pairs = BLOCK_PAIRS_CPU if device.type == "cpu" else BLOCK_PAIRS_DEVICE
    step = max(1, pairs // min(num_boxes, BLOCK_BOXES))
    return [slice(start, start + step) for start in range(0, num_anchors, step)]
