"""What the trainer adds to Detectron2's: images that cannot be used are named, or left out."""

import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from omegaconf import OmegaConf

from focal_det import add_config
from focal_det.engine import Trainer
from focal_det.engine.trainer import _as_yaml

DEMO = Path(__file__).parents[2] / "configs/demo/focal_retinanet_digits.yaml"


@pytest.fixture
def cfg(small, tmp_path):
    """Six iterations of two images, the third of which is no image."""
    (tmp_path / "2.png").write_bytes(b"not an image")
    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_file(DEMO)
    options = [
        *("DATASETS.TRAIN", (small,), "DATASETS.TEST", (), "MODEL.RETINANET.NUM_CLASSES", 2),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 6, "OUTPUT_DIR", str(tmp_path / "out")),
    ]
    cfg.merge_from_list(options)
    (tmp_path / "out").mkdir()
    return cfg


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_training_and_is_named(cfg, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    trainer = Trainer(cfg)
    with pytest.raises(ValueError, match=r"2\.png' \(image_id 2\) cannot be used") as raised:
        trainer.train()
    assert "ON_BAD_IMAGE" in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_skipped_and_counted(cfg, workers, caplog, tmp_path):
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.ON_BAD_IMAGE = workers, "skip"
    Trainer(cfg).train()
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    # 12 images are read in 2 epochs of 6, and a data worker reads two batches ahead.
    assert 2 <= json.loads(lines[-1])["skipped_images"] <= 3
    if not workers:  # whose log this process does not see
        assert "skipped: image" in caplog.text
    assert "training images that could not be used were skipped: " in caplog.text


def test_a_trainer_that_does_not_read_the_key_says_so(cfg, caplog):
    cfg.DATALOADER.ON_BAD_IMAGE = "skip"
    Trainer.build_model(cfg)
    assert "ON_BAD_IMAGE" not in caplog.text
    DefaultTrainer.build_model(cfg)
    assert "DATALOADER.ON_BAD_IMAGE is 'skip', but without effect" in caplog.text


def test_a_lazy_config_that_yaml_cannot_hold_is_an_empty_text(caplog):
    caplog.set_level(logging.INFO, logger="detectron2")
    for value, expected in ((torch.float32, ""), (3, "model: {value: 3}\n")):
        config = OmegaConf.create({"model": {"value": value}}, flags={"allow_objects": True})
        assert _as_yaml(config) == expected
    assert not caplog.records  # Detectron2 has shown the traceback already, when it saved it
    logging.getLogger("detectron2.config.lazy").warning("heard again")
    assert "heard again" in caplog.text
