"""Matching anchors with boxes as two Triton kernels, for CUDA: all images of a batch at once.

The operations of :func:`focal_det.overlap.iou` in their order, none of them fused with another, so
that all bits are the same. No value comes back to the host, so nothing waits for the device. With
``TRITON_INTERPRET=1`` set before the first use, they run in Triton's interpreter on a CPU.

Letters: N images, R anchors, M boxes of all images together.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ANCHORS = 512
"""Anchors of a program: about a row of the finest level, so few boxes are near all of them."""


def prepare(device: torch.device) -> None:
    """Raise where the kernels cannot be had.

    Raises:
        RuntimeError: it says why.
    """
    problem = _problem(device)
    if problem is not None:
        raise RuntimeError(problem)


@functools.cache  # what failed is not tried again at every step
def _problem(device: torch.device) -> str | None:
    if device.type != "cuda" and isinstance(_best_kernel, triton.runtime.JITFunction):
        return f"Triton needs a CUDA device, the anchors are on {device}"
    if int(triton.__version__.split(".")[0]) < 3:  # it has no division that rounds to nearest
        return f"Triton 3.0 or newer is needed, this is {triton.__version__}"
    one = torch.ones(5, 1, dtype=torch.float32, device=device)
    try:
        match(one, one, [1], find_best=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may raise
        return f"Triton cannot build the kernels: {error}"
    return None


def match(
    anchors: Tensor, boxes: Tensor, counts: list[int], find_best: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Match the anchors with the boxes of each image.

    Args:
        anchors: (5, R), see :func:`focal_det.overlap.sides`.
        boxes: (5, M), image after image; M and R are at least 1.
        counts: N numbers of boxes.
        find_best: whether the last result is wanted.

    Returns:
        Highest IoU of each anchor (N, R) float32; its box (N, R) int64, an index into those of its
        image, the first of equals; and whether no anchor of the image overlaps more with some box
        than this one does (N, R) bool, or None.
    """
    device, num_anchors = anchors.device, anchors.shape[1]
    # From pinned memory, a copy that nobody waits for.
    starts = torch.tensor(
        [0, *itertools.accumulate(counts)], device="cpu", pin_memory=device.type == "cuda"
    ).to(device, non_blocking=True)
    best_iou, matches, is_best = (
        torch.empty(len(counts), num_anchors, dtype=dtype, device=device)
        for dtype in (torch.float32, torch.int64, torch.bool)
    )
    highest = torch.zeros(boxes.shape[1], dtype=torch.float32, device=device)
    grid = (triton.cdiv(num_anchors, BLOCK_ANCHORS), len(counts))
    # A multiplication and an addition in one step would round once where PyTorch rounds twice.
    settings = {"BLOCK": BLOCK_ANCHORS, "enable_fp_fusion": False}
    sizes = (num_anchors, boxes.shape[1])
    with torch.cuda.device_of(anchors):
        bits = highest.view(torch.int32)
        _best_kernel[grid](anchors, boxes, starts, bits, best_iou, matches, *sizes, **settings)
        if find_best:
            _is_best_kernel[grid](anchors, boxes, starts, highest, is_best, *sizes, **settings)
    return best_iou, matches, is_best if find_best else None


@triton.jit
def _load_anchors(anchor_ptr, num_anchors, BLOCK: tl.constexpr):
    """The program's anchors: indices, which of them there are, and their sides and areas."""
    anchor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = anchor < num_anchors
    # Lanes without an anchor hold the last one: it changes no maximum.
    anchor = tl.minimum(anchor, num_anchors - 1)
    x1 = tl.load(anchor_ptr + anchor)
    y1 = tl.load(anchor_ptr + num_anchors + anchor)
    x2 = tl.load(anchor_ptr + 2 * num_anchors + anchor)
    y2 = tl.load(anchor_ptr + 3 * num_anchors + anchor)
    area = tl.load(anchor_ptr + 4 * num_anchors + anchor)
    return anchor, inside, x1, y1, x2, y2, area


@triton.jit
def _overlap(box_ptr, index, num_boxes, x1, y1, x2, y2, area):
    """IoU of one box with a block of anchors."""
    box_x1 = tl.load(box_ptr + index)
    box_y1 = tl.load(box_ptr + num_boxes + index)
    box_x2 = tl.load(box_ptr + 2 * num_boxes + index)
    box_y2 = tl.load(box_ptr + 3 * num_boxes + index)
    box_area = tl.load(box_ptr + 4 * num_boxes + index)
    width = tl.maximum(tl.minimum(box_x2, x2) - tl.maximum(box_x1, x1), 0.0)
    height = tl.maximum(tl.minimum(box_y2, y2) - tl.maximum(box_y1, y1), 0.0)
    intersection = width * height
    return tl.div_rn(intersection, (box_area + area) - intersection)


@triton.jit
def _meets(box_ptr, index, num_boxes, left, top, right, bottom):
    """Whether one box overlaps with what surrounds a block of anchors."""
    from_right = tl.load(box_ptr + index) >= right
    from_bottom = tl.load(box_ptr + num_boxes + index) >= bottom
    to_left = tl.load(box_ptr + 2 * num_boxes + index) <= left
    to_top = tl.load(box_ptr + 3 * num_boxes + index) <= top
    return (from_right | from_bottom | to_left | to_top) == 0


@triton.jit(do_not_specialize=["num_anchors", "num_boxes"])
def _best_kernel(
    anchor_ptr,
    box_ptr,
    start_ptr,
    highest_bits_ptr,
    best_ptr,
    match_ptr,
    num_anchors,
    num_boxes,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK anchors of one image, all its boxes."""
    image = tl.program_id(1)
    anchor, inside, x1, y1, x2, y2, area = _load_anchors(anchor_ptr, num_anchors, BLOCK)
    left, top = tl.min(x1, axis=0), tl.min(y1, axis=0)
    right, bottom = tl.max(x2, axis=0), tl.max(y2, axis=0)

    begin = tl.load(start_ptr + image)
    end = tl.load(start_ptr + image + 1)
    best = tl.zeros((BLOCK,), dtype=tl.float32)
    found = tl.zeros((BLOCK,), dtype=tl.int64)
    for index in range(begin, end):
        if _meets(box_ptr, index, num_boxes, left, top, right, bottom):
            overlap = _overlap(box_ptr, index, num_boxes, x1, y1, x2, y2, area)
            found = tl.where(overlap > best, index - begin, found)
            best = tl.maximum(best, overlap)
            # The bits of numbers that are not negative are in the order of the numbers.
            highest = tl.max(overlap, axis=0).to(tl.int32, bitcast=True)
            tl.atomic_max(highest_bits_ptr + index, highest)
    offsets = image.to(tl.int64) * num_anchors + anchor
    tl.store(best_ptr + offsets, best, mask=inside)
    tl.store(match_ptr + offsets, found, mask=inside)


@triton.jit(do_not_specialize=["num_anchors", "num_boxes"])
def _is_best_kernel(
    anchor_ptr,
    box_ptr,
    start_ptr,
    highest_ptr,
    is_best_ptr,
    num_anchors,
    num_boxes,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK anchors of one image, all its boxes, whose highest IoU is known."""
    image = tl.program_id(1)
    anchor, inside, x1, y1, x2, y2, area = _load_anchors(anchor_ptr, num_anchors, BLOCK)
    left, top = tl.min(x1, axis=0), tl.min(y1, axis=0)
    right, bottom = tl.max(x2, axis=0), tl.max(y2, axis=0)

    begin = tl.load(start_ptr + image)
    end = tl.load(start_ptr + image + 1)
    is_best = tl.zeros((BLOCK,), dtype=tl.int32)
    for index in range(begin, end):
        highest = tl.load(highest_ptr + index)
        if highest > 0.0:
            if _meets(box_ptr, index, num_boxes, left, top, right, bottom):
                overlap = _overlap(box_ptr, index, num_boxes, x1, y1, x2, y2, area)
                is_best = tl.where(overlap == highest, 1, is_best)
        else:  # every anchor is the best of a box that none overlaps: Detectron2 has it so
            is_best = tl.full((BLOCK,), 1, dtype=tl.int32)
    tl.store(is_best_ptr + image.to(tl.int64) * num_anchors + anchor, is_best != 0, mask=inside)
