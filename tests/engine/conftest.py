"""A data set for trainers."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image


@pytest.fixture(autouse=True)
def _quiet(logging_as_it_was):
    """For every test of this folder."""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The name of a registered COCO-format set of six images, which lie in `tmp_path`."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(6):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 64})
        box = {"id": index + 1, "image_id": index, "bbox": [8, 8, 30, 30], "area": 900}
        annotations.append({**box, "category_id": 1 + index % 2, "iscrowd": 0})
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "small.json").write_text(json.dumps(content))
    name = f"resume_{tmp_path.name}"
    register_coco_instances(name, {}, str(tmp_path / "small.json"), str(tmp_path))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
