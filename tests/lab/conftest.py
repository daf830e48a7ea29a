"""A small data set, as a user names one."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_det.data import DigitsClutterSpec, generate, register_from_env


@pytest.fixture(autouse=True)
def _quiet(logging_as_it_was):
    """For every test of this folder."""


@pytest.fixture
def few(tmp_path, monkeypatch):
    """``few``: six scenes to train on and four to evaluate on, named in FOCAL_DET_DATASETS."""
    folder = tmp_path / "few"
    generate(DigitsClutterSpec(train_images=6, val_images=4), folder)
    entries = [f"few_{x}:{folder}/{x}.json:{folder}/images/{x}" for x in ("train", "val")]
    monkeypatch.setenv("FOCAL_DET_DATASETS", ",".join(entries))
    register_from_env()
    yield "few"
    for split in ("train", "val"):
        DatasetCatalog.remove(f"few_{split}")
        MetadataCatalog.remove(f"few_{split}")
