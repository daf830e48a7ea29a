"""Which detections are right, and the score from which on to trust a detector.

Works on COCO's own records: an object is ``{"image_id", "category_id", "bbox": [x, y, w, h]}``, a
detection has a ``score`` besides. G objects, D detections of one image.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

IOU_THRESHOLD = 0.5


def box_iou(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> np.ndarray:
    """Intersection over union of every pair of boxes.

    Args:
        first: D boxes ``[x, y, w, h]``.
        second: G boxes.

    Returns:
        (D, G) float64; 0 where both boxes are empty.
    """
    a = np.asarray(first, dtype=np.float64).reshape(-1, 1, 4)
    b = np.asarray(second, dtype=np.float64).reshape(1, -1, 4)
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    overlap = (high - low).clip(min=0).prod(axis=-1)
    union = a[..., 2:].prod(axis=-1) + b[..., 2:].prod(axis=-1) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def match(
    detections: Sequence[dict[str, Any]],
    objects: Sequence[dict[str, Any]],
    iou_threshold: float = IOU_THRESHOLD,
) -> list[int | None]:
    """Give each detection the object it found, by falling score and each object once (COCO's rule).

    Args:
        detections: of any images.
        objects: of the same images.
        iou_threshold: least overlap of a detection with an object of its own class.

    Returns:
        For each detection the index of its object, or None where it is wrong.
    """
    candidates = defaultdict(list)
    for index, item in enumerate(objects):
        candidates[item["image_id"], item["category_id"]].append(index)
    found: list[int | None] = [None] * len(detections)
    taken: set[int] = set()
    for position in sorted(range(len(detections)), key=lambda i: -detections[i]["score"]):
        detection = detections[position]
        free = [
            index
            for index in candidates[detection["image_id"], detection["category_id"]]
            if index not in taken
        ]
        if not free:
            continue
        overlaps = box_iou([detection["bbox"]], [objects[index]["bbox"] for index in free])[0]
        best = int(overlaps.argmax())
        if overlaps[best] >= iou_threshold:
            found[position] = free[best]
            taken.add(free[best])
    return found


def operating_point(
    detections: Sequence[dict[str, Any]], objects: Sequence[dict[str, Any]]
) -> dict[str, float] | None:
    """The score threshold at which the detector does best, by its F1 over all images and classes.

    Losses differ in how high the scores are that they lead to, so one fixed threshold would favour
    some of them. Of equal F1 the highest threshold is taken.

    Returns:
        ``threshold`` (detections with at least this score count), ``precision``, ``recall`` and
        ``f1``, the last three in [0, 1]; None if no detection is right at any threshold.
    """
    right = np.array([index is not None for index in match(detections, objects)], dtype=bool)
    if not right.any():
        return None
    scores = np.array([detection["score"] for detection in detections], dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], right[order].cumsum()
    # A threshold cannot part equal scores: only the last of each counts.
    last = np.append(scores[1:] < scores[:-1], True)
    kept = np.arange(1, len(scores) + 1)
    f1 = np.where(last, 2 * hits / (kept + len(objects)), -1.0)
    best = int(f1.argmax())
    return {
        "threshold": float(scores[best]),
        "precision": float(hits[best] / kept[best]),
        "recall": float(hits[best] / len(objects)),
        "f1": float(f1[best]),
    }


def judge(
    detections: Sequence[dict[str, Any]],
    objects: Sequence[dict[str, Any]],
    threshold: float | None,
) -> dict[str, list[dict[str, Any]]]:
    """Sort one image's detections and objects by what became of them.

    Args:
        detections: of one image.
        objects: of the same image.
        threshold: detections below this score are left out; all of them if None.

    Returns:
        ``right`` and ``wrong`` detections and ``missed`` objects.
    """
    shown = [d for d in detections if threshold is not None and d["score"] >= threshold]
    found = match(shown, objects)
    return {
        "right": [d for d, index in zip(shown, found, strict=True) if index is not None],
        "wrong": [d for d, index in zip(shown, found, strict=True) if index is None],
        "missed": [item for index, item in enumerate(objects) if index not in set(found)],
    }


def spread_by_count(
    image_ids: Iterable[int], objects: Sequence[dict[str, Any]], number: int
) -> list[int]:
    """Images from the emptiest to the fullest, evenly spaced; no detection has a say.

    Args:
        image_ids: all images.
        objects: all objects.
        number: how many images to choose, >= 1; all of them if there are fewer.
    """
    counts: dict[int, int] = defaultdict(int)
    for item in objects:
        counts[item["image_id"]] += 1
    ordered = sorted(image_ids, key=lambda image_id: (counts[image_id], image_id))
    number = min(number, len(ordered))
    positions = np.linspace(0, len(ordered) - 1, number).round().astype(int)
    return [ordered[position] for position in positions]
