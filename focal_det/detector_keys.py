"""Checks of Detectron2's own keys whose bad values would fail late, or without naming the key."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def check_detector_keys(cfg: Any) -> None:
    """Check what a dense detector reads besides focal_det's keys, before anything is built.

    Args:
        cfg: reads ``MODEL.ANCHOR_GENERATOR`` (SIZES, ASPECT_RATIOS) and ``MODEL.RETINANET``
            (IOU_THRESHOLDS, IOU_LABELS, BBOX_REG_WEIGHTS).

    Raises:
        ValueError: sizes, aspect ratios or weights that are not above 0, or IoU thresholds that do
            not fit their labels. Key, value and what is allowed are named.
    """
    for key in ("SIZES", "ASPECT_RATIOS"):
        values = cfg.MODEL.ANCHOR_GENERATOR[key]
        if not all_positive(np.concatenate([np.zeros(0), *map(np.atleast_1d, values)])):
            raise ValueError(f"MODEL.ANCHOR_GENERATOR.{key} must be above 0, got {values}")
    retinanet = cfg.MODEL.RETINANET
    thresholds, labels = retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS
    rise = [0, *thresholds] == sorted({0, *thresholds})
    if not rise or len(labels) != len(thresholds) + 1 or not {1} <= set(labels) <= {-1, 0, 1}:
        raise ValueError(
            f"MODEL.RETINANET.IOU_THRESHOLDS is {thresholds} and MODEL.RETINANET.IOU_LABELS "
            f"{labels}: the thresholds must be above 0 and rise, the labels one more than they, "
            "each of them -1, 0 or 1, and one of them 1"
        )
    weights = retinanet.BBOX_REG_WEIGHTS
    if len(weights) != 4 or not all_positive(weights):
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


def all_positive(values: Any) -> bool:
    """Whether all numbers are finite and above 0."""
    numbers = np.asarray(values, dtype=float)
    return bool(((numbers > 0) & np.isfinite(numbers)).all())
