"""What is wrong with a data set, found before a training meets it.

An error is an image or object that cannot be used, or not as it was meant; a warning is handled,
but worth a look. `tools/check_dataset.py` is the command line.
"""

from .anchors import (
    AnchorSetup,
    anchor_coverage,
    anchor_setup,
    check_coverage,
    empty_features,
    foreground_ratio,
    resized,
)
from .coco import parse_coco, read_coco
from .findings import ERROR, KINDS, WARNING, Finding, Kind
from .images import check_image, check_images
from .objects import Objects, count_objects, usable_objects
from .records import MOST_CLASSES, box_problem, check_records, class_problem
from .registered import Dataset, read_dataset

__all__ = [
    "ERROR",
    "KINDS",
    "MOST_CLASSES",
    "WARNING",
    "AnchorSetup",
    "Dataset",
    "Finding",
    "Kind",
    "Objects",
    "anchor_coverage",
    "anchor_setup",
    "box_problem",
    "check_coverage",
    "check_image",
    "check_images",
    "check_records",
    "class_problem",
    "count_objects",
    "empty_features",
    "foreground_ratio",
    "parse_coco",
    "read_coco",
    "read_dataset",
    "resized",
    "usable_objects",
]
