"""From the folders of runs that differ only in their loss to the records behind a page."""

import datetime
import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_det.losses import LOSS_REGISTRY, build_loss

from . import matching, records

NUM_PICTURES = 6


def read_truth(cfg: CfgNode) -> dict[str, Any]:
    """What the validation set holds; makes the data sets first where they are generated.

    Args:
        cfg: whose first test set is meant, in COCO's format.

    Returns:
        As :func:`load_truth`.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.get(name)
    return load_truth(cfg.DATASETS.TEST[0])


def load_truth(dataset: str, num_pictures: int = NUM_PICTURES) -> dict[str, Any]:
    """What a data set's files hold; nothing is made or fetched.

    Args:
        dataset: its registered name; in COCO's format.
        num_pictures: how many images to show.

    Returns:
        ``objects``, ``class_names`` by category id, ``num_images``, and ``pictures``: the images to
        show with their objects, ``file`` being their place on disk.

    Raises:
        AttributeError: its metadata name no ``json_file`` or no ``image_root``.
        OSError: the annotations cannot be read.
    """
    metadata = MetadataCatalog.get(dataset)
    coco = json.loads(Path(metadata.json_file).read_text("utf-8"))
    objects = [
        {key: item[key] for key in ("image_id", "category_id", "bbox")}
        for item in coco["annotations"]
        if not item.get("iscrowd")
    ]
    files = {item["id"]: item["file_name"] for item in coco["images"]}
    return {
        "objects": objects,
        "class_names": {str(item["id"]): item["name"] for item in coco["categories"]},
        "num_images": len(files),
        "pictures": [
            {
                "image_id": image_id,
                "file": str(Path(metadata.image_root) / files[image_id]),
                "objects": [item for item in objects if item["image_id"] == image_id],
            }
            for image_id in matching.spread_by_count(files, objects, num_pictures)
        ],
    }


def count_per_class(truth: dict[str, Any]) -> dict[str, int]:
    """Number of objects by class name, in the order of the categories.

    Args:
        truth: of :func:`read_truth`.
    """
    names = truth["class_names"]
    counts = dict.fromkeys(names.values(), 0)
    for item in truth["objects"]:
        counts[names[str(item["category_id"])]] += 1
    return counts


def keep_pictures(pictures: Sequence[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """Copy the images to show, so that the page can be drawn without the data set.

    Args:
        pictures: of :func:`read_truth`.
        output: gets a folder ``images``.

    Returns:
        `pictures` with ``file`` seen from `output`.
    """
    folder = output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for picture in pictures:
        source = Path(picture["file"])
        name = f"{picture['image_id']}{source.suffix}"
        shutil.copyfile(source, folder / name)
        kept.append({**picture, "file": f"images/{name}"})
    return kept


def make_record(
    cfg: CfgNode,
    truth: dict[str, Any],
    *,
    overrides: list[str],
    seconds: dict[str, float | None],
    anchors: int | None,
    error: str | None,
) -> dict[str, Any]:
    """All that is kept of one run.

    Args:
        cfg: of the run; its ``OUTPUT_DIR`` holds what Detectron2 wrote.
        truth: of :func:`read_truth`.
        overrides: what tells `cfg` from that of the other runs.
        seconds: of ``training`` and ``evaluation``.
        anchors: number of anchors in an image.
        error: why the run was given up, or None. Its detections then count nothing: Detectron2
            may have evaluated before the failure, and does so after one in the very last step.
    """
    folder = Path(cfg.OUTPUT_DIR)
    rows = records.read_metrics(folder / "metrics.json")
    predictions = folder / "inference" / "coco_instances_results.json"
    evaluated = error is None and predictions.is_file()
    detections = json.loads(predictions.read_text("utf-8")) if evaluated else []
    point = matching.operating_point(detections, truth["objects"])
    finished = datetime.datetime.now(datetime.timezone.utc)
    return {
        **_describe(cfg),
        "overrides": overrides,
        "environment": records.environment(cfg.MODEL.DEVICE),
        "finished": finished.isoformat(timespec="seconds"),
        "seconds": seconds,
        "anchors_per_image": anchors,
        **records.average_precision(rows if evaluated else []),
        "curves": records.curves(rows),
        "operating_point": point,
        "pictures": verdicts(detections, truth["pictures"], point) if evaluated else [],
        "error": error,
    }


def _describe(cfg: CfgNode) -> dict[str, Any]:
    """The loss with its arguments and the first line of its documentation; seed and budget."""
    loss = build_loss(cfg)
    name = cfg.MODEL.FOCAL_DET.LOSS.NAME
    documentation = inspect.getdoc(LOSS_REGISTRY.get(name)) or ""
    return {
        "loss": name,
        "description": f"{type(loss).__name__}({loss.extra_repr()})",
        "summary": documentation.split("\n")[0],
        "seed": cfg.SEED,
        "iterations": cfg.SOLVER.MAX_ITER,
    }


def verdicts(
    detections: Sequence[dict[str, Any]],
    pictures: Sequence[dict[str, Any]],
    point: dict[str, float] | None,
) -> list[dict[str, Any]]:
    """For each picture, its detections and objects as :func:`matching.judge` sorts them.

    Args:
        detections: of all images.
        pictures: of :func:`load_truth`.
        point: of :func:`matching.operating_point`, below whose threshold detections are left out.
    """
    threshold = point["threshold"] if point else None
    judged = []
    for picture in pictures:
        here = [item for item in detections if item["image_id"] == picture["image_id"]]
        judged.append(matching.judge(here, picture["objects"], threshold))
    return judged
