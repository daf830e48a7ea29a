"""What runs saw in a few images, beside what is there; from files alone, nothing is computed anew.

A run's detections are where Detectron2's evaluator leaves them. The images are those of the data
set, as far as it is registered here and its files are there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog

from focal_det.analysis import comparison, matching

from .finding import Found

FILE = Path("inference") / "coco_instances_results.json"
NUM_PICTURES = 4
SHOWN = ("image_id", "category_id", "bbox", "score")


class NotShown(Exception):
    """There is nothing to show; the message says why, as a sentence."""


def judge(folders: Mapping[str, Path], datasets: Sequence[str], found: Found) -> dict[str, Any]:
    """Detections of some runs on the same data set, sorted into right, wrong and missed.

    Args:
        folders: of runs, by their name.
        datasets: what they were evaluated on.
        found: gets the files that cannot be read.

    Returns:
        What :func:`focal_det.analysis.figures.pictures` takes; runs without detections are left
        out.

    Raises:
        NotShown: no run has one, or there is no truth to lay beside them.
    """
    there = {name: folder / FILE for name, folder in folders.items() if (folder / FILE).is_file()}
    if not there:
        raise NotShown("No detections are kept of these runs any more.")
    if len(datasets) != 1:
        raise NotShown("Detections of more than one data set are not told apart.")
    truth = _truth(datasets[0])
    runs = []
    for name, path in there.items():
        detections = found.read(path, lambda path: _read(path, truth))
        if detections is not None:
            point = matching.operating_point(detections, truth["objects"])
            pictures = comparison.verdicts(detections, truth["pictures"], point)
            runs.append({"loss": name, "operating_point": point, "pictures": pictures})
    if not runs:
        raise NotShown("Their files cannot be read.")
    return {
        "settings": {"class_names": truth["class_names"]},
        "pictures": truth["pictures"],
        "records": runs,
    }


def _read(path: Path, truth: dict[str, Any]) -> list[dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    detections = [{key: item[key] for key in SHOWN} for item in found]
    if not {str(item["category_id"]) for item in detections} <= truth["class_names"].keys():
        raise ValueError("its classes are not those that the data set has now")
    return detections


def _truth(dataset: str) -> dict[str, Any]:
    """Objects and images to show; those whose file is gone stay in, for the page to count."""
    if dataset not in DatasetCatalog:
        raise NotShown(
            f"The data set {dataset} is not known here: FOCAL_DET_DATASETS says where it is."
        )
    try:
        truth = comparison.load_truth(dataset, NUM_PICTURES)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise NotShown(f"The annotations of {dataset} cannot be read any more.") from error
    if not any(Path(picture["file"]).is_file() for picture in truth["pictures"]):
        raise NotShown(f"The images of {dataset} are not where they were.")
    return truth
