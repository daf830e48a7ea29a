"""Whether a config's anchors fit the boxes of a data set.

Letters: M objects of one image, B objects of all images, L feature levels, A anchors per location.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator
from detectron2.modeling.backbone import build_backbone
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor

from focal_det.detector_keys import check_detector_keys, check_features

from .findings import Finding, found
from .objects import Objects

UNREACHED_SHARE = 0.05  # of the boxes, from which on it is worth a warning
BLOCK_BOXES = 1 << 14


class AnchorSetup(NamedTuple):
    """What a config says of anchors and of the size that images are seen at.

    Attributes:
        generator: Detectron2's anchor generator.
        matcher: assigns anchors to boxes.
        min_size: of the shorter side after resizing, pixels; 0 for no resizing.
        max_size: of the longer side.
        size_divisibility: images are padded to a multiple of it.
    """

    generator: DefaultAnchorGenerator
    matcher: Matcher
    min_size: int
    max_size: int
    size_divisibility: int

    @property
    def foreground_iou(self) -> float:
        """The IoU with a box from which on an anchor is foreground."""
        pairs = zip(self.matcher.labels, self.matcher.thresholds[:-1], strict=True)
        return float(max(0.0, min(low for label, low in pairs if label == 1)))


def anchor_setup(cfg: Any) -> AnchorSetup:
    """Build the anchors of a config; its backbone is built to learn its strides.

    Args:
        cfg: reads ``MODEL.BACKBONE``, ``MODEL.ANCHOR_GENERATOR``, ``MODEL.RETINANET`` (IN_FEATURES,
            IOU_THRESHOLDS, IOU_LABELS) and ``INPUT.MIN_SIZE_TEST``, ``MAX_SIZE_TEST``.

    Raises:
        ValueError: other anchors than Detectron2's axis-parallel ones, or what
            :func:`focal_det.detector_keys.check_detector_keys` and ``check_features`` refuse.
    """
    check_detector_keys(cfg)
    retinanet, name = cfg.MODEL.RETINANET, cfg.MODEL.ANCHOR_GENERATOR.NAME
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    check_features(cfg, shapes)
    generator = build_anchor_generator(cfg, [shapes[key] for key in retinanet.IN_FEATURES])
    if type(generator) is not DefaultAnchorGenerator:
        raise ValueError(
            f"MODEL.ANCHOR_GENERATOR.NAME is {name!r}; anchors of DefaultAnchorGenerator alone "
            "can be checked"
        )
    matcher = Matcher(
        retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS, allow_low_quality_matches=True
    )
    return AnchorSetup(
        generator,
        matcher,
        cfg.INPUT.MIN_SIZE_TEST,
        cfg.INPUT.MAX_SIZE_TEST,
        backbone.size_divisibility,
    )


def anchor_coverage(images: Sequence[Objects], setup: AnchorSetup) -> dict[str, Any]:
    """Which boxes no anchor reaches, and anchor sizes that would.

    A box is reached if an anchor overlaps it by the foreground threshold or more. The others are
    trained on by the one or few anchors that overlap them most, however little that is. A box
    counts for the level that has its best anchor. The sizes offered for a level are quantiles of
    the square root of the area of its boxes, as many as it has now; whether they do better is
    computed, not promised.

    Args:
        images: of :func:`usable_objects`.
        setup: of :func:`anchor_setup`.

    Returns:
        ``boxes``; ``unreached`` and ``share`` of them; ``share_if_centred``, what would remain
        were each box in the middle of an anchor (so what sizes and aspect ratios alone leave, the
        rest being the stride's); ``share_with_fitting_sizes``; ``foreground_iou``, ``min_size``,
        ``max_size``; ``levels`` with ``stride``, ``sizes``, ``boxes``, ``unreached``, ``share`` and
        ``fitting_sizes``. A share of no boxes is None.
    """
    seen = [resized(image, setup) for image in images]
    boxes = torch.cat([torch.zeros(0, 4), *(each for each, _ in seen)])
    padded = torch.cat(
        [torch.zeros(0, 2), *(torch.tensor([size] * len(each)).view(-1, 2) for each, size in seen)]
    )
    cells = [cell.detach() for cell in setup.generator.cell_anchors]
    reached, centred = _best_ious(boxes, padded, cells, setup.generator)
    level_of = reached.argmax(1)
    missed = reached.amax(1) < setup.foreground_iou
    areas = Boxes(boxes).area()
    levels, fitting_cells = [], []
    for level, (stride, cell) in enumerate(zip(setup.generator.strides, cells, strict=True)):
        here = level_of == level
        # Detectron2 makes all shapes of the first size, then those of the next one.
        lengths = Boxes(cell).area().sqrt()
        num_shapes = len((cell / lengths[:, None]).round(decimals=4).unique(dim=0))
        shapes = cell[:num_shapes] / lengths[0]
        sizes = [round(x, 2) for x in lengths[::num_shapes].tolist()]
        fitting = sizes
        if here.any():
            shares = (np.arange(len(sizes)) + 0.5) / len(sizes)
            fitting = np.quantile(areas[here].sqrt().numpy(), shares).round(1).tolist()
        fitting_cells.append((torch.tensor(fitting).view(-1, 1, 1) * shapes).view(-1, 4))
        levels.append(
            {
                "stride": stride,
                "sizes": sizes,
                "boxes": int(here.sum()),
                "unreached": int((missed & here).sum()),
                "share": _share(missed[here]),
                "fitting_sizes": fitting,
            }
        )
    refitted, _ = _best_ious(boxes, padded, fitting_cells, setup.generator)
    return {
        "boxes": len(boxes),
        "unreached": int(missed.sum()),
        "share": _share(missed),
        "share_if_centred": _share(centred.amax(1) < setup.foreground_iou),
        "share_with_fitting_sizes": _share(refitted.amax(1) < setup.foreground_iou),
        "foreground_iou": setup.foreground_iou,
        "min_size": setup.min_size,
        "max_size": setup.max_size,
        "levels": levels,
    }


def check_coverage(coverage: dict[str, Any]) -> list[Finding]:
    """A warning where many boxes are without an anchor.

    Args:
        coverage: of :func:`anchor_coverage`.
    """
    share = coverage["share"]
    if share is None or share <= UNREACHED_SHARE:
        return []
    message = (
        f"{coverage['unreached']} of {coverage['boxes']} boxes ({share:.1%}) overlap with no "
        f"anchor by {coverage['foreground_iou']:g} or more at MIN_SIZE_TEST "
        f"{coverage['min_size']}, MAX_SIZE_TEST {coverage['max_size']}"
    )
    return [found("boxes-without-anchor", message)]


def foreground_ratio(images: Iterable[Objects], setup: AnchorSetup) -> dict[str, Any]:
    """Assign the anchors of images as training does, and count.

    Args:
        images: of :func:`usable_objects`; at 800 x 1216 each takes some 10 ms.
        setup: of :func:`anchor_setup`.

    Returns:
        ``images``; anchors that are ``foreground``, ``background`` and ``ignored``;
        ``background_per_foreground``, None without foreground; ``foreground_per_level``.
    """
    # Here, since modeling imports focal_det.data.
    from focal_det.modeling.anchors import AnchorCache
    from focal_det.modeling.assign import label_anchors

    cache = AnchorCache()
    counts = torch.zeros(3, dtype=torch.int64)  # foreground, background, ignored
    per_level = torch.zeros(len(setup.generator.strides), dtype=torch.int64)
    num_images = 0
    for image in images:
        boxes, (height, width) = resized(image, setup)
        levels = cache(setup.generator, empty_features(height, width, setup.generator.strides))
        classes = torch.zeros(len(boxes), dtype=torch.int64)  # of one class, so 1 is background
        labels, _ = label_anchors(Boxes.cat(levels).tensor, boxes, classes, 1, setup.matcher)
        counts += torch.stack([(labels == value).sum() for value in (0, 1, -1)])
        parts = labels.split([len(level) for level in levels])
        per_level += torch.stack([(part == 0).sum() for part in parts])
        num_images += 1
    foreground, background, ignored = counts.tolist()
    return {
        "images": num_images,
        "foreground": foreground,
        "background": background,
        "ignored": ignored,
        "background_per_foreground": background / foreground if foreground else None,
        "foreground_per_level": per_level.tolist(),
    }


def empty_features(height: int, width: int, strides: Iterable[int]) -> list[Tensor]:
    """Features without any pixel, for anchor generators, which look at the shape alone.

    Args:
        height, width: of the padded image.
        strides: of the levels.
    """
    return [
        torch.empty(0, 1, math.ceil(height / stride), math.ceil(width / stride))
        for stride in strides
    ]


def resized(image: Objects, setup: AnchorSetup) -> tuple[Tensor, tuple[int, int]]:
    """Boxes (M, 4) at the size that the model sees, and height and width with the padding.

    Args:
        image: of :func:`usable_objects`.
        setup: of :func:`anchor_setup`.
    """
    height, width = image.size
    if setup.min_size > 0:
        height, width = ResizeShortestEdge.get_output_shape(
            height, width, setup.min_size, setup.max_size
        )
    boxes = Boxes(image.boxes.clone())
    boxes.scale(width / image.size[1], height / image.size[0])
    step = max(1, setup.size_divisibility)
    return boxes.tensor, (math.ceil(height / step) * step, math.ceil(width / step) * step)


def _best_ious(
    boxes: Tensor, padded: Tensor, cells: Sequence[Tensor], generator: DefaultAnchorGenerator
) -> tuple[Tensor, Tensor]:
    """Highest IoU of each box with the anchors of each level, without making the anchors.

    Of one shape, the anchor whose centre is nearest overlaps most, along each axis apart; so one
    anchor a shape is looked at.

    Args:
        boxes: (B, 4) XYXY pixels.
        padded: (B, 2) height and width of the box's image with its padding.
        cells: L tensors (A, 4), the anchors about the origin.
        generator: states strides and offset.

    Returns:
        (B, L) each: over the anchors that there are, and were one in the middle of each box.
    """
    reached, centred = (torch.zeros(len(boxes), len(cells)) for _ in range(2))
    for part in torch.arange(len(boxes)).split(BLOCK_BOXES):
        centres = Boxes(boxes[part]).get_centers()
        for level, (stride, cell) in enumerate(zip(generator.strides, cells, strict=True)):
            last = (padded[part].flip(1) / stride).ceil() - 1
            nearest = (centres / stride - generator.offset).round().clamp(min=0)
            nearest = (torch.minimum(nearest, last) + generator.offset) * stride
            others = Boxes(boxes[part].repeat_interleave(len(cell), 0))
            for middle, result in ((nearest, reached), (centres, centred)):
                anchors = Boxes((middle.repeat(1, 2)[:, None] + cell).view(-1, 4))
                overlaps = matched_pairwise_iou(anchors, others).view(-1, len(cell))
                result[part, level] = overlaps.amax(1)
    return reached, centred


def _share(flags: Tensor) -> float | None:
    return float(flags.float().mean()) if len(flags) else None
