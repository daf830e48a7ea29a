"""Records as the tools write them, small and made up."""

import json

import numpy as np
from PIL import Image

from focal_det.analysis.records import METRICS as NAMES

METRICS = {"AP": 12.3, "AP50": 30.0, "AP75": 10.0, "APs": 5.0, "APm": 20.0, "APl": None}
OBJECT = {"image_id": 7, "category_id": 1, "bbox": [4, 5, 20, 18]}


def make_run(loss, ap=12.3):
    verdict = {"right": [{**OBJECT, "score": 0.42}], "wrong": [], "missed": []}
    return {
        "loss": loss,
        "description": f"{loss}(alpha=0.25)",
        "summary": "A loss of the user's own.",
        "overrides": ["MODEL.FOCAL_DET.LOSS.NAME", loss],
        "seed": 0,
        "iterations": 40,
        "environment": {"commit": None, "torch": "2.0"},
        "finished": "2030-01-01T00:00:00+00:00",
        "seconds": {"training": 61.4, "evaluation": 5.0},
        "anchors_per_image": 3069,
        "metrics": {**METRICS, "AP": ap},
        "per_class": {"0": ap, "1": None},
        "curves": {
            "iteration": [20, 40],
            "loss_cls": [2.0, 1.0],
            "foreground": [0.5, 0.4],
            "background": [1.5, 0.6],
            "positives": [10.0, 14.0],
        },
        "operating_point": {"threshold": 0.3, "precision": 0.5, "recall": 0.25, "f1": 1 / 3},
        "pictures": [verdict],
        "error": None,
    }


def make_results(folder):
    """What tools/demo.py keeps in results.json; its image is written."""
    (folder / "images").mkdir(parents=True)
    Image.fromarray(np.full((40, 48, 3), 90, np.uint8)).save(folder / "images" / "7.png")
    return {
        "settings": {
            "command": "python tools/demo.py",
            "config_file": "configs/demo/focal_retinanet_digits.yaml",
            "output": "output/demo",
            "python": "python",
            "overrides": [],
            "iterations": 40,
            "images_per_step": 8,
            "seed": 0,
            "train": ["digits_clutter_train"],
            "test": "digits_clutter_val",
            "test_images": 200,
            "test_objects": 442,
            "class_names": {"1": "0", "2": "1"},
            "objects_per_class": {"0": 400, "1": 42},
        },
        "pictures": [{"image_id": 7, "file": "images/7.png", "objects": [OBJECT]}],
        "records": [make_run("CrossEntropyLoss", 8.0), make_run("FocalLoss", 12.3)],
    }


ENVIRONMENT = {"commit": "abc", "torch": "2.0", "device": "CPU"}


def make_trial(label="FL", seed=1, ap=12.3, *, table="mine", settings=(), **changes):
    """A record of focal_det.lab.running, whose key is made of table, label and seed."""
    config = {
        "MODEL": {"META_ARCHITECTURE": "FocalRetinaNet", "FOCAL_DET": {"LOSS": {"NAME": label}}},
        "SOLVER": {"BASE_LR": 0.01, "MAX_ITER": 40},
        "SEED": seed,
        "OUTPUT_DIR": "",
        **dict(settings),
    }
    return {
        "schema": 1,
        "key": f"{table}-{label}-{seed}".replace(" ", ""),
        "table": table,
        "label": label,
        "overrides": {"MODEL.FOCAL_DET.LOSS.NAME": label},
        "seed": seed,
        "iterations": 40,
        "processes": 1,
        "data": [["seen_train"], ["seen_val"]],
        "annotations": {},
        "metrics": {**dict.fromkeys(NAMES), "AP": ap, "AP50": 2 * (ap or 0.0)},
        "per_class": {},
        "curves": make_run("any")["curves"],
        "seconds": {"training": 10.0, "evaluation": 1.0},
        "resumed_from": 0,
        "images_per_second": 20.0,
        "parameters": 1_230_000,
        "gflops": 0.5,
        "background_per_foreground": 100.0,
        "not_measured": {},
        "peak_memory_mib": 800.0,
        "inference_ms": {"median": 10.0, "p95": 20.0},
        "environment": ENVIRONMENT,
        "finished": "2030-01-01T00:00:00+00:00",
        "error": None,
        "config": json.dumps(config),  # which is YAML, too
        **changes,
    }


def write_sweep(folder, trials):
    """As tools/ablate.py leaves it, each file named by the record's place."""
    (folder / "records").mkdir(parents=True, exist_ok=True)
    for index, trial in enumerate(trials):
        (folder / "records" / f"{index}.json").write_text(json.dumps(trial))
    return folder


def write_detections(folder, detections):
    """As Detectron2's evaluator leaves them in the folder of a run."""
    path = folder / "inference" / "coco_instances_results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(detections))


def write_run(folder, lines, config="MODEL: {META_ARCHITECTURE: RetinaNet}\n"):
    """As Detectron2's train_net.py leaves it."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(config)
    return folder


def write_data_set(folder):
    """Two images and a COCO file; the second image has one object."""
    folder.mkdir(parents=True)
    for image_id in (6, 7):
        pixels = np.full((40, 48, 3), 20 * image_id, np.uint8)
        Image.fromarray(pixels).save(folder / f"{image_id}.png")
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 48} for i in (6, 7)],
        "categories": [{"id": 1, "name": "cup"}],
        "annotations": [{**OBJECT, "id": 1, "area": 360, "iscrowd": 0}],
    }
    (folder / "val.json").write_text(json.dumps(coco))
    return folder / "val.json"
