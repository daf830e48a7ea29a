"""What the trainer adds to Detectron2's: images that cannot be used are named, or left out."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, default_argument_parser
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from lazy_config import TINY_LAZY
from omegaconf import OmegaConf

from focal_det import add_config
from focal_det.data.guarded import GuardedMapper
from focal_det.data.loader import build_train_loader
from focal_det.engine import Trainer, run_lazy
from focal_det.engine.skipped import ReportSkipped
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


def skipped_in(batches, cfg):
    """Images that are left out of so many batches, those drawn in their place included."""
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0
    loader = build_train_loader(cfg)
    for _ in zip(range(batches), loader, strict=False):
        pass
    return sum(loader.mapper.skipped.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_skipped_and_counted(cfg, workers, caplog, tmp_path):
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.ON_BAD_IMAGE = workers, "skip"
    Trainer(cfg).train()
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    # A data worker reads up to two batches ahead; without one, none is.
    used, ahead = skipped_in(6, cfg), skipped_in(8 if workers else 6, cfg)
    assert 2 <= used <= json.loads(lines[-1])["skipped_images"] <= ahead
    if not workers:  # whose log this process does not see
        assert "skipped: image" in caplog.text
    assert "training images that could not be used were skipped: " in caplog.text


def fail(record):
    raise OSError("broken")


def test_the_images_that_all_processes_skip_are_summed_when_all_of_them_meet(monkeypatch, caplog):
    """Every process gathers in the same iterations, whatever it has skipped itself."""
    mapper = GuardedMapper(fail, "skip")
    others = {"OSError": 5, "BadLabelError": 2}
    met = []

    def gather(mine):
        met.append(hook.trainer.iter)
        return [mine, others]

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "gather", gather)
    hook = ReportSkipped(SimpleNamespace(mapper=mapper), period=4)
    hook.trainer = SimpleNamespace(iter=0, max_iter=10, storage=EventStorage())
    seen = []
    for hook.trainer.iter in range(10):
        mapper({"file_name": "a"})
        hook.after_step()
        seen.append(hook.trainer.storage.latest().get("skipped_images", (0,))[0])
    assert met == [3, 7, 9]
    assert seen == [0, 0, 0, 11, 11, 11, 11, 15, 15, 17]
    hook.after_train()
    assert met == [3, 7, 9]  # a process that failed is not waited for
    assert "were skipped: 15 x OSError, 2 x BadLabelError" in caplog.text


def test_where_bad_images_stop_training_nothing_is_gathered(monkeypatch):
    monkeypatch.setattr(comm, "gather", pytest.fail)
    hook = ReportSkipped(SimpleNamespace(mapper=GuardedMapper(fail)))
    hook.trainer = SimpleNamespace(iter=19, max_iter=20, storage=EventStorage())
    hook.after_step()
    hook.after_train()


LAZY = """
model.num_classes = 1
del dataloader.evaluator
dataloader.train.dataset.names = dataloader.test.dataset.names = "{name}"
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = 0
dataloader.train.mapper.augmentations[0].short_edge_length = [48]
train.update(init_checkpoint="", device="cpu", max_iter=1, output_dir="{output}")
"""


def test_with_a_lazy_config_a_class_out_of_range_is_named_with_its_image(
    small, tmp_path, monkeypatch
):
    records = DatasetCatalog.get(small)
    for record in records:  # all of them: which image is first depends on a seed that is drawn
        for annotation in record["annotations"]:
            annotation["category_id"] = 1
    name = f"nameless_{tmp_path.name}"  # without a list of classes that could be compared
    monkeypatch.setitem(DatasetCatalog.data, name, lambda: records)
    file = tmp_path / "lazy.py"
    file.write_text(TINY_LAZY + LAZY.format(name=name, output=tmp_path / "out"))
    parser = default_argument_parser()
    parser.add_argument("--allow-changes", action="store_true")
    with pytest.raises(ValueError, match=r"\.png' .*category_id is 1, allowed is 0\.\.0"):
        run_lazy(parser.parse_args(["--config-file", str(file)]))


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
