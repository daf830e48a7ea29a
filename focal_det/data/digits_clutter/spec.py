"""The knobs of the data set."""

from __future__ import annotations

import dataclasses
import math
import typing

CLASS_NAMES = tuple("0123456789")
SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True)
class DigitsClutterSpec:
    """Everything the scenes depend on. Two equal specs give equal pixels and boxes.

    To make foreground rarer, enlarge ``image_size``, raise ``empty_fraction`` or lower
    ``max_objects``; to make the background harder, raise ``fragments`` and ``strokes``.

    Attributes:
        train_images: scenes in the training split, >= 1.
        val_images: scenes in the validation split, >= 1.
        image_size: side of the square scenes in pixels, >= 32.
        min_objects: fewest digits that a scene with digits is meant to hold, >= 1.
        max_objects: most digits in a scene, >= ``min_objects``. The number is uniform between the
            two; a digit for which there is no free place left is dropped.
        empty_fraction: probability in [0, 1] that a scene holds no digit.
        dark_fraction: probability in [0, 1] that a scene is light ink on a dark sheet. Both kinds
            together are harder to learn than either of them.
        fragments: pieces of digits in each scene, >= 0.
        strokes: random pen strokes in each scene, >= 0.
        min_digit_size: smallest digit in pixels (longer side before rotation), >= 6.
        max_digit_size: largest digit, between ``min_digit_size`` and 3/4 of ``image_size``.
            Sizes are log-uniform between the two.
        zipf_exponent: class ``c`` has probability proportional to ``(c + 1) ** -zipf_exponent``;
            >= 0, where 0 makes all classes equally frequent.
        seed: seed of all scenes, >= 0.

    Raises:
        ValueError: a value is out of its range; names the argument, the value and the range.
        TypeError: a value is not a number of the right kind.
    """

    train_images: int = 2000
    val_images: int = 200
    image_size: int = 128
    min_objects: int = 2
    max_objects: int = 6
    empty_fraction: float = 0.1
    dark_fraction: float = 0.0
    fragments: int = 6
    strokes: int = 3
    min_digit_size: int = 10
    max_digit_size: int = 80
    zipf_exponent: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in knobs().items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, kind)):
                raise TypeError(f"{name} must be {kind.__name__}, got {value!r}")
            # An exponent given as 1 equals one given as 1.0, in the manifest too.
            object.__setattr__(self, name, kind(value))
        for name, lowest in (
            ("train_images", 1),
            ("val_images", 1),
            ("image_size", 32),
            ("min_objects", 1),
            ("fragments", 0),
            ("strokes", 0),
            ("min_digit_size", 6),
            ("seed", 0),
        ):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be >= {lowest}, got {getattr(self, name)}")
        if self.max_objects < self.min_objects:
            raise ValueError(
                f"max_objects must be >= min_objects = {self.min_objects}, got {self.max_objects}"
            )
        largest = self.image_size * 3 // 4
        if not self.min_digit_size <= self.max_digit_size <= largest:
            raise ValueError(
                f"max_digit_size must be in [min_digit_size, 3/4 image_size] = "
                f"[{self.min_digit_size}, {largest}], got {self.max_digit_size}"
            )
        for name in ("empty_fraction", "dark_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0.0 <= self.zipf_exponent < math.inf:
            raise ValueError(f"zipf_exponent must be finite and >= 0, got {self.zipf_exponent}")


def knobs() -> dict[str, type]:
    """Name and type (int or float) of each field of the spec, in order."""
    return typing.get_type_hints(DigitsClutterSpec)


# The embedded data sets by name. The demo's anchors meet some 45, 220, 1,000 and 4,800 background
# ones to each on a digit: four steps over two orders of magnitude, whose scenes are alike
# otherwise. The rarer digits are, the more scenes it takes to score as many.
EMBEDDED = {
    "digits_crowded": DigitsClutterSpec(
        min_objects=20, max_objects=30, empty_fraction=0.0, val_images=100
    ),
    "digits_clutter": DigitsClutterSpec(),
    "digits_sparse": DigitsClutterSpec(
        min_objects=1, max_objects=2, empty_fraction=0.5, train_images=4000, val_images=600
    ),
    "digits_rare": DigitsClutterSpec(
        min_objects=1, max_objects=1, empty_fraction=0.8, train_images=4000, val_images=1500
    ),
}
