"""The objects that training sees, and how many of them there are.

Letters: M objects of one image.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes
from torch import Tensor

from .findings import KINDS, WARNING
from .records import (
    SMALLEST_SIDE,
    box_problem,
    class_problem,
    corners,
    image_size,
    is_object,
    record_problem,
)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Objects(NamedTuple):
    """What training sees of one image's objects: neither crowds nor what cannot be used.

    Attributes:
        boxes: (M, 4) float32 XYXY pixels, clipped to the image.
        classes: M class indices.
        size: height and width of the image in pixels.
    """

    boxes: Tensor
    classes: list[int]
    size: tuple[int, int]


def usable_objects(records: Iterable[Any], num_classes: int | None = None) -> list[Objects]:
    """The objects that training sees, for each image whose size is known.

    Args:
        records: Detectron2's dictionaries.
        num_classes: K; None for not known.
    """
    kept = []
    for record in records:
        size = None if record_problem(record) is not None else image_size(record)
        if size is None:
            continue
        good = []
        for annotation in filter(is_object, record.get("annotations", ())):
            problems = (box_problem(annotation, size), class_problem(annotation, num_classes))
            if all(each is None or KINDS[each[0]].severity == WARNING for each in problems):
                good.append(annotation)
        rows = [corners(x["bbox"], x["bbox_mode"]) for x in good]
        boxes = Boxes(torch.tensor(rows).reshape(-1, 4))
        boxes.clip(size)
        visible = boxes.nonempty(SMALLEST_SIDE)
        classes = [int(x["category_id"]) for x, keep in zip(good, visible, strict=True) if keep]
        kept.append(Objects(boxes[visible].tensor, classes, size))
    return kept


def count_objects(
    images: Sequence[Objects], records: Sequence[Any], classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """How many objects there are, of which class and size.

    Args:
        images: of :func:`usable_objects`.
        records: all that there are.
        classes: names of the classes, None for the indices of those that occur.

    Returns:
        Counts of ``images``, ``images_without_objects``, ``objects``, ``crowds`` and
        ``objects_per_class``; quantiles, by their name, of ``objects_per_image``, ``box_size``
        (square root of the area, pixels of the file) and ``box_aspect`` (height / width).
    """
    boxes = _joined(images)
    counts = Counter(index for image in images for index in image.classes)
    if classes is None:
        per_class = {str(index): counts[index] for index in sorted(counts)}
    else:
        times = Counter(map(str, classes))
        # Two classes of one name keep their counts apart.
        per_class = {
            f"{name} ({index})" if times[str(name)] > 1 else str(name): counts[index]
            for index, name in enumerate(classes)
        }
    per_image = torch.tensor([float(len(image.classes)) for image in images])
    well_formed = [record for record in records if record_problem(record) is None]
    return {
        "images": len(records),
        "images_without_objects": sum(not image.classes for image in images),
        "objects": counts.total(),
        "crowds": sum(
            not is_object(x) for record in well_formed for x in record.get("annotations", ())
        ),
        "objects_per_class": per_class,
        "objects_per_image": _quantiles(per_image),
        "box_size": _quantiles(Boxes(boxes).area().sqrt()),
        "box_aspect": _quantiles((boxes[:, 3] - boxes[:, 1]) / (boxes[:, 2] - boxes[:, 0])),
    }


def _joined(images: Sequence[Objects]) -> Tensor:
    return torch.cat([torch.zeros(0, 4), *(image.boxes for image in images)])


def _quantiles(values: Tensor) -> dict[str, float]:
    """Quantiles by their name, such as ``50%``; none of nothing."""
    if len(values) == 0:
        return {}
    found = np.quantile(values.numpy(), QUANTILES)
    return {f"{share:.0%}": round(float(x), 2) for share, x in zip(QUANTILES, found, strict=True)}
