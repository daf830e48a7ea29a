"""Records made of what Detectron2 leaves in a run's folder."""

import json

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

import focal_det
from focal_det.analysis import comparison, records

NAME = "comparison_val"
ANNOTATIONS = [
    {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
    {"id": 2, "image_id": 1, "category_id": 5, "bbox": [20, 0, 10, 10], "area": 100, "iscrowd": 0},
    {"id": 3, "image_id": 2, "category_id": 3, "bbox": [0, 0, 30, 30], "area": 900, "iscrowd": 1},
]
DETECTIONS = [
    {"image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 10], "score": 0.4},
    {"image_id": 2, "category_id": 3, "bbox": [0, 0, 10, 10], "score": 0.3},
]


@pytest.fixture
def cfg(tmp_path):
    """A config whose test set has two images: two objects in the first, a crowd in the second."""
    for image_id in (1, 2):
        Image.fromarray(np.full((40, 48, 3), image_id, np.uint8)).save(tmp_path / f"{image_id}.png")
    coco = {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 48} for i in (1, 2)],
        "categories": [{"id": 3, "name": "cup"}, {"id": 5, "name": "plate"}],
        "annotations": ANNOTATIONS,
    }
    (tmp_path / "val.json").write_text(json.dumps(coco))
    register_coco_instances(NAME, {}, str(tmp_path / "val.json"), str(tmp_path))
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), (NAME,)
    cfg.MODEL.DEVICE = "cpu"
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    yield cfg
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def folder(tmp_path):
    """A run's folder as Detectron2 leaves it."""
    folder = tmp_path / "run"
    (folder / "inference").mkdir(parents=True)
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(DETECTIONS))
    (folder / "metrics.json").write_text(
        '{"iteration": 9, "loss_cls": 2.0, "classification/foreground": 0.5}\n'
        '{"iteration": 10, "bbox/AP": 12.0, "bbox/APl": NaN}\n'
    )
    return folder


def make(cfg, error=None):
    return comparison.make_record(
        cfg,
        comparison.read_truth(cfg),
        overrides=["A", "1"],
        seconds={"training": 1.0, "evaluation": None},
        anchors=7,
        error=error,
    )


def test_truth_leaves_crowds_out(cfg):
    truth = comparison.read_truth(cfg)
    assert truth["num_images"] == 2
    assert [item["bbox"] for item in truth["objects"]] == [[0, 0, 10, 10], [20, 0, 10, 10]]
    assert [picture["image_id"] for picture in truth["pictures"]] == [2, 1]
    assert comparison.count_per_class(truth) == {"cup": 1, "plate": 1}


def test_pictures_are_kept_beside_the_page(cfg, tmp_path):
    output = tmp_path / "page"
    kept = comparison.keep_pictures(comparison.read_truth(cfg)["pictures"], output)
    assert [picture["file"] for picture in kept] == ["images/2.png", "images/1.png"]
    for picture in kept:
        assert np.asarray(Image.open(output / picture["file"])).max() == picture["image_id"]


def test_record(cfg, folder, tmp_path):
    record = make(cfg)
    assert record["loss"] == "FocalLoss"
    assert record["description"] == "FocalLoss(alpha=0.25, gamma=2.0)"
    assert record["summary"].startswith("Focal Loss")
    assert record["overrides"] == ["A", "1"]
    assert record["metrics"]["AP"] == 12.0
    assert record["metrics"]["APl"] is None
    assert record["curves"]["foreground"] == [0.5]
    # One of two objects with one detection: F1 = 2*1/(1+2), higher than with both detections.
    assert record["operating_point"] == pytest.approx(
        {"threshold": 0.4, "precision": 1.0, "recall": 0.5, "f1": 2 / 3}
    )
    empty, full = record["pictures"]
    assert empty == {"right": [], "wrong": [], "missed": []}
    assert full["right"] == DETECTIONS[:1]
    assert [item["bbox"] for item in full["missed"]] == [[20, 0, 10, 10]]
    records.save({"record": record}, tmp_path / "results.json")  # JSON can hold it


def test_a_run_that_was_given_up_has_no_detections(cfg, folder):
    record = make(cfg, error="Loss became infinite")
    assert record["metrics"]["AP"] is None
    assert record["operating_point"] is None
    assert record["pictures"] == []
    assert record["curves"]["foreground"] == [0.5]


def test_a_run_that_left_nothing(cfg):
    record = make(cfg, error="Loss became infinite")
    assert record["curves"]["iteration"] == []
    assert record["per_class"] == {}
