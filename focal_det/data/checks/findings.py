"""What is found wrong, and how bad it is."""

import dataclasses
import numbers
from typing import Any, NamedTuple

ERROR, WARNING = "error", "warning"


class Kind(NamedTuple):
    """What a finding is about.

    Attributes:
        severity: ``error`` or ``warning``.
        meaning: what it does to a training, one line.
    """

    severity: str
    meaning: str


KINDS = {
    "annotations-unreadable": Kind(ERROR, "the annotation file is missing, not JSON or cut off"),
    "malformed": Kind(ERROR, "a field is missing or of the wrong type"),
    "unloadable": Kind(ERROR, "Detectron2 cannot load the data set"),
    "no-images": Kind(ERROR, "there is nothing to train on"),
    "duplicate-category-id": Kind(ERROR, "the classes after it are counted wrongly"),
    "duplicate-category-name": Kind(WARNING, "two classes that reports cannot tell apart"),
    "duplicate-image-id": Kind(ERROR, "one of the images is lost, its objects go to the other"),
    "duplicate-annotation-id": Kind(ERROR, "Detectron2 refuses the file"),
    "unknown-image": Kind(ERROR, "the object is left out: no image has its image_id"),
    "unknown-category": Kind(ERROR, "Detectron2 refuses the file: no category has this id"),
    "broken-polygon": Kind(ERROR, "Detectron2 leaves the object out, its box included"),
    "ignore-flag": Kind(ERROR, "Detectron2 refuses the file: it knows iscrowd, not ignore"),
    "no-evaluation-fields": Kind(WARNING, "trains, but the COCO evaluator fails"),
    "outside-root": Kind(ERROR, "the file name leads out of the image folder"),
    "duplicate-file-name": Kind(WARNING, "one file, seen as two images with objects of their own"),
    "missing-file": Kind(ERROR, "training stops at this image"),
    "empty-file": Kind(ERROR, "training stops at this image"),
    "unreadable-image": Kind(ERROR, "training stops at this image"),
    "size-mismatch": Kind(ERROR, "training stops at this image"),
    "deep-pixels": Kind(ERROR, "values above 255 become white: training reads 8 bits a channel"),
    "size-fields": Kind(ERROR, "height or width is no number of pixels"),
    "box-format": Kind(ERROR, "bbox is not a list of as many numbers as bbox_mode wants"),
    "box-mode": Kind(ERROR, "Detectron2 cannot convert boxes of this mode"),
    "box-not-finite": Kind(ERROR, "Detectron2 leaves the object out, or clips it, without a word"),
    "box-negative-size": Kind(ERROR, "Detectron2 leaves the object out without a word"),
    "box-zero-area": Kind(ERROR, "Detectron2 leaves the object out without a word"),
    "box-outside-image": Kind(ERROR, "Detectron2 leaves the object out without a word"),
    "box-partly-outside": Kind(WARNING, "the box is clipped to the image"),
    "class-out-of-range": Kind(ERROR, "training stops at this image"),
    "crowd-flag": Kind(ERROR, "what is not 0 counts as a crowd, which training leaves out"),
    "near-duplicate-box": Kind(WARNING, "one object that is labelled and counted twice"),
    "no-objects": Kind(WARNING, "left out unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"),
    "boxes-without-anchor": Kind(WARNING, "few anchors learn them: they get the best there is"),
}
"""Severity and meaning of each kind of finding."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One problem.

    Attributes:
        kind: a key of :data:`KINDS`.
        severity: ``error`` or ``warning``.
        message: what is wrong; which image and object is told apart from it.
        image_id: of the image.
        file_name: of the image.
        annotation: id of the object in the annotation file; where that is not known ``#`` and its
            index in the image, from 0 on.
    """

    kind: str
    severity: str
    message: str
    image_id: int | str | None = None
    file_name: str | None = None
    annotation: int | str | None = None

    def __str__(self) -> str:
        where = []
        if self.file_name is not None:
            where.append(f"image {self.file_name!r} (id {self.image_id})")
        elif self.image_id is not None:
            where.append(f"image with id {self.image_id}")
        if self.annotation is not None:
            where.append(f"annotation {self.annotation}")
        return f"{', '.join(where)}: {self.message}" if where else self.message


def found(
    kind: str,
    message: str,
    image_id: Any = None,
    file_name: str | None = None,
    annotation: Any = None,
) -> Finding:
    """A finding with the severity of its kind and ids that JSON can hold."""
    return Finding(
        kind,
        KINDS[kind].severity,
        message,
        None if image_id is None else plain(image_id),
        file_name,
        None if annotation is None else plain(annotation),
    )


def plain(value: Any) -> int | str:
    """An id that JSON can hold."""
    is_whole = is_number(value) and value == value // 1
    return int(value) if is_whole else str(value)


def is_number(value: Any) -> bool:
    """Whether a value is a number, NaN and infinity included."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_id(value: Any) -> bool:
    """Whether a value can tell images or annotations apart: text, or a number but not NaN."""
    return isinstance(value, str) or (is_number(value) and value == value)


def type_of(value: Any) -> str:
    """What a value is, for a message."""
    return "None" if value is None else type(value).__name__
