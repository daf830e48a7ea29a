"""Detectron2's list of dictionaries, called *records* here: what training reads.

Letters: M objects of one image.
"""

import numbers
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode
from torch import Tensor

from focal_det.overlap import iou, sides
from focal_det.safe_loading import check_inside

from .findings import ERROR, KINDS, Finding, found, is_id, is_number, plain, type_of

NEAR_DUPLICATE_IOU = 0.95
SLACK = 1.0  # pixels that a box may stand out of its image: annotators round
SMALLEST_SIDE = 1e-5  # pixels; Detectron2's mapper drops what is not larger
LARGEST_IMAGE = 1_000_000  # pixels a side
MOST_CLASSES = 1_000_000  # where their number is not known


def check_records(
    records: Collection[Any], num_classes: int | None = None, image_root: str | None = None
) -> list[Finding]:
    """All that can be said without opening an image.

    Args:
        records: Detectron2's dictionaries.
        num_classes: K; None for not known, then classes may be below :data:`MOST_CLASSES`.
        image_root: folder that the files must be in; None for anywhere.
    """
    findings: list[Finding] = []
    ids: set[Any] = set()
    files: dict[str, Any] = {}
    empty = []
    for index, record in enumerate(records):
        problem = record_problem(record)
        if problem is not None:
            findings.append(found("malformed", f"entry {index} of the data set {problem}"))
            continue
        image_id, file_name = record.get("image_id"), record["file_name"]
        if is_id(image_id):
            if image_id in ids:
                message = f"another image before it has the same image_id {image_id!r}"
                findings.append(of_image("duplicate-image-id", message, record))
            ids.add(image_id)
        if file_name in files:
            message = f"the image with id {files[file_name]} has the same file"
            findings.append(of_image("duplicate-file-name", message, record))
        files.setdefault(file_name, image_id)
        outside = None if image_root is None else _outside(image_root, file_name)
        if outside is not None:
            findings.append(of_image("outside-root", outside, record))
        has_size = any(key in record for key in ("height", "width"))
        if has_size and image_size(record) is None:
            sizes = ", ".join(f"{key} {record.get(key)!r}" for key in ("height", "width"))
            message = f"{sizes}: both must be whole numbers of pixels, 1..{LARGEST_IMAGE}"
            findings.append(of_image("size-fields", message, record))
        findings += _check_annotations(record, num_classes)
        if not any(is_object(x) for x in record.get("annotations", ())):
            empty.append(record)
    if empty and len(empty) == len(records):
        findings.append(found("no-objects", "no image of the data set has an object"))
    else:
        findings += [of_image("no-objects", "has no object", record) for record in empty]
    return findings


def record_problem(record: Any) -> str | None:
    """Why an entry of a data set cannot be looked at; None for one that can."""
    if not isinstance(record, dict):
        return f"must be a dict, got {type_of(record)}"
    if not isinstance(record.get("file_name"), str):
        return f"must have a file_name that is a string, got {record.get('file_name')!r}"
    annotations = record.get("annotations", [])
    if not isinstance(annotations, list) or not all(isinstance(x, dict) for x in annotations):
        return f"({record['file_name']}): annotations must be a list of dicts"
    return None


def _outside(root: str, file_name: str) -> str | None:
    """Why training refuses a path; None for one that is inside of the image folder."""
    try:
        check_inside(root, os.path.abspath(file_name))
    except ValueError as error:
        return str(error)
    return None


def is_object(annotation: dict[str, Any]) -> bool:
    """Whether training counts it as an object: Detectron2's own test for what is no crowd."""
    return bool(annotation.get("iscrowd", 0) == 0)


def image_size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width in pixels that a record states; None without two usable ones."""
    height, width = _pixels(record.get("height")), _pixels(record.get("width"))
    return None if height is None or width is None else (height, width)


def _pixels(side: Any) -> int | None:
    """A side of an image; None for what is none."""
    if not isinstance(side, numbers.Integral) or isinstance(side, bool):
        return None
    return int(side) if 1 <= int(side) <= LARGEST_IMAGE else None


def _check_annotations(record: dict[str, Any], num_classes: int | None) -> Iterator[Finding]:
    size = image_size(record)
    usable = []
    for index, annotation in enumerate(record.get("annotations", ())):
        problems = [box_problem(annotation, size), class_problem(annotation, num_classes)]
        if annotation.get("iscrowd", 0) not in (0, 1):
            message = f"iscrowd is {annotation['iscrowd']!r}, allowed are 0 and 1"
            problems.append(("crowd-flag", message))
        kinds = []
        for kind, message in filter(None, problems):
            kinds.append(kind)
            yield of_image(kind, message, record, index)
        if is_object(annotation) and not any(KINDS[kind].severity == ERROR for kind in kinds):
            usable.append(index)
    yield from _near_duplicates(record, usable)


def box_problem(
    annotation: Mapping[str, Any], size: tuple[int, int] | None = None
) -> tuple[str, str] | None:
    """The first thing that is wrong with the box of an object.

    Args:
        annotation: with ``bbox`` and ``bbox_mode``.
        size: height and width of the image in pixels; None for not known.

    Returns:
        A kind of :data:`KINDS` and a message that quotes the box; None for a good box.
    """
    mode, box = annotation.get("bbox_mode"), annotation.get("bbox")
    lengths = {BoxMode.XYXY_ABS: 4, BoxMode.XYWH_ABS: 4, BoxMode.XYWHA_ABS: 5}
    if not isinstance(mode, int) or mode not in lengths:
        allowed = ", ".join(f"BoxMode.{each.name}" for each in lengths)
        return "box-mode", f"bbox_mode is {mode!r}, allowed are {allowed}"
    values: Any = box.tolist() if isinstance(box, (np.ndarray, Tensor)) else box
    is_list = isinstance(values, (list, tuple))
    if not is_list or len(values) != lengths[BoxMode(mode)] or not all(map(is_number, values)):
        return "box-format", f"bbox must be {lengths[BoxMode(mode)]} numbers, got {box!r}"
    # In this form, since a number may be too large to be a float at all.
    if not all(abs(value) <= torch.finfo(torch.float32).max for value in values):
        return "box-not-finite", f"bbox {box!r} holds a number that is not finite"
    x1, y1, x2, y2 = corners(values, mode)
    if x2 < x1 or y2 < y1:
        return "box-negative-size", f"bbox {box!r} has a negative width or height"
    if min(x2 - x1, y2 - y1) <= SMALLEST_SIDE:
        return "box-zero-area", f"bbox {box!r} has no area"
    if size is None:
        return None
    height, width = size
    image = f"the image is {width} x {height} (width x height)"
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        return "box-outside-image", f"bbox {box!r} is outside of the image: {image}"
    if min(x1, y1) < -SLACK or x2 > width + SLACK or y2 > height + SLACK:
        return "box-partly-outside", f"bbox {box!r} stands out of the image: {image}"
    return None


def class_problem(
    annotation: Mapping[str, Any], num_classes: int | None = None
) -> tuple[str, str] | None:
    """What is wrong with the class of an object.

    Args:
        annotation: with ``category_id``, in records the class index from 0 on.
        num_classes: K; None for not known.

    Returns:
        See :func:`box_problem`.
    """
    value: Any = annotation.get("category_id")
    is_index = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    last = (MOST_CLASSES if num_classes is None else num_classes) - 1
    if is_index and 0 <= value <= last:
        return None
    return "class-out-of-range", f"category_id is {value!r}, allowed is 0..{last}"


def corners(values: Sequence[float], mode: int) -> list[float]:
    """x1, y1, x2, y2 of a box of any mode."""
    if mode == BoxMode.XYXY_ABS:
        return [float(value) for value in values]
    if mode == BoxMode.XYWH_ABS:  # nearly all there are; BoxMode.convert takes 50 times as long
        x, y, width, height = map(float, values)
        return [x, y, x + width, y + height]
    array = np.array([values], dtype=np.float64)
    xyxy: list[float] = BoxMode.convert(array, BoxMode(mode), BoxMode.XYXY_ABS)[0].tolist()
    return xyxy


def _near_duplicates(record: dict[str, Any], indices: Sequence[int]) -> Iterator[Finding]:
    """A finding for each object whose box and class an object before it has.

    Args:
        record: of the image.
        indices: of annotations whose boxes and classes are good.
    """
    if len(indices) < 2:
        return
    annotations = [record["annotations"][index] for index in indices]
    boxes = sides(torch.tensor([corners(x["bbox"], x["bbox_mode"]) for x in annotations]))
    classes = torch.tensor([x["category_id"] for x in annotations])
    order = torch.arange(len(indices))
    for rows in order.split(256):  # an image may hold thousands
        same = (iou(boxes[:, rows], boxes) >= NEAR_DUPLICATE_IOU) & (classes[rows, None] == classes)
        earlier = same & (order < rows[:, None])
        for row, first in zip(rows.tolist(), earlier.int().argmax(1).tolist(), strict=True):
            if earlier[row - int(rows[0]), first]:
                name = _annotation_name(record, indices[first])
                message = f"IoU with annotation {name} of the same class is {NEAR_DUPLICATE_IOU}"
                yield of_image("near-duplicate-box", f"{message} or more", record, indices[row])


def _annotation_name(record: dict[str, Any], index: int) -> int | str:
    """Id of an annotation, or its index where it has none; see :class:`Finding`."""
    name = record["annotations"][index].get("id")
    return plain(name) if is_id(name) else f"#{index}"


def of_image(kind: str, message: str, record: dict[str, Any], index: int | None = None) -> Finding:
    """A finding about an image, or about its annotation with this index."""
    name = None if index is None else _annotation_name(record, index)
    return found(kind, message, record.get("image_id"), record["file_name"], name)
