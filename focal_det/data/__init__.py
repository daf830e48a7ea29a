"""The embedded data set and the registration of data sets in every process."""

from .digits_clutter import DigitsClutterSpec, generate, render_scene
from .registration import (
    dataset_classes,
    register_all,
    register_digits_clutter,
    register_from_env,
)

__all__ = [
    "DigitsClutterSpec",
    "dataset_classes",
    "generate",
    "register_all",
    "register_digits_clutter",
    "register_from_env",
    "render_scene",
]
