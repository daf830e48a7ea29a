"""Checks of Detectron2's own keys whose bad values would fail late, or without naming the key."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np


def check_detector_keys(cfg: Any) -> None:
    """Check what a dense detector reads besides focal_det's keys, before anything is built.

    Args:
        cfg: reads ``MODEL.ANCHOR_GENERATOR`` (SIZES, ASPECT_RATIOS) and ``MODEL.RETINANET``
            (IOU_THRESHOLDS, IOU_LABELS, BBOX_REG_WEIGHTS).

    Raises:
        ValueError: sizes, aspect ratios or weights that are not numbers above 0, a level without
            sizes or aspect ratios, or IoU thresholds that do not fit their labels. Key, value and
            what is allowed are named.
    """
    for key in ("SIZES", "ASPECT_RATIOS"):
        values = cfg.MODEL.ANCHOR_GENERATOR[key]
        # Detectron2 takes one list for all levels, too.
        is_nested = any(isinstance(level, (list, tuple)) for level in values)
        levels = values if is_nested else [values]
        if not all(_are_positive_numbers(level) and len(level) > 0 for level in levels):
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.{key} must be numbers above 0, one or more of each "
                f"level, got {values}"
            )
    retinanet = cfg.MODEL.RETINANET
    thresholds, labels = retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS
    if not _thresholds_rise(thresholds) or not _labels_fit(labels, len(thresholds)):
        raise ValueError(
            f"MODEL.RETINANET.IOU_THRESHOLDS is {thresholds} and MODEL.RETINANET.IOU_LABELS "
            f"{labels}: the thresholds must be in (0, 1] and rise, the labels one more than they, "
            "each of them -1, 0 or 1, with 1 for the highest overlaps, and for those alone"
        )
    weights = retinanet.BBOX_REG_WEIGHTS
    if not _are_positive_numbers(weights) or len(weights) != 4:
        raise ValueError(
            f"MODEL.RETINANET.BBOX_REG_WEIGHTS must be 4 numbers above 0, got {weights}"
        )


def check_features(cfg: Any, available: Iterable[str]) -> None:
    """Check that a backbone has the features that the head is to read.

    Args:
        cfg: reads ``MODEL.RETINANET.IN_FEATURES``.
        available: names of the backbone's features.

    Raises:
        ValueError: it lacks one, or none are named.
    """
    wanted, there = cfg.MODEL.RETINANET.IN_FEATURES, list(available)
    missing = [feature for feature in wanted if feature not in there]
    if missing or not wanted:
        raise ValueError(
            f"MODEL.RETINANET.IN_FEATURES names {', '.join(missing) or 'nothing'}, but the "
            f"backbone {cfg.MODEL.BACKBONE.NAME} has {', '.join(there)}"
        )


def _thresholds_rise(thresholds: Any) -> bool:
    """Whether they are numbers in (0, 1], each larger than the one before."""
    return (
        _are_positive_numbers(thresholds)
        and all(value <= 1 for value in thresholds)
        and list(thresholds) == sorted(set(thresholds))
    )


def _labels_fit(labels: Any, num_thresholds: int) -> bool:
    """Whether the labels make the highest overlaps foreground, and those alone."""
    foreground = [label == 1 for label in labels]
    return (
        len(labels) == num_thresholds + 1
        and all(label in (-1, 0, 1) for label in labels)
        and foreground[-1]
        and not foreground[0]
        and foreground == sorted(foreground)
    )


def _are_positive_numbers(values: Any) -> bool:
    """Whether it is a list of numbers, finite and above 0, and of nothing else."""
    return isinstance(values, (list, tuple)) and all(
        isinstance(x, (int, float)) and x is not True and 0 < x < math.inf for x in values
    )


def all_positive(values: Any) -> bool:
    """Whether all numbers are finite and above 0."""
    numbers = np.asarray(values, dtype=float)
    return bool(((numbers > 0) & np.isfinite(numbers)).all())
