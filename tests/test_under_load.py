"""Thousands of steps, and images and classes of sizes that are no longer usual.

Memory is held against sizes that can be worked out: what one step computes with, or what a matrix
of all pairs would take that must never exist.
"""

import gc
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from workers import Job, picture, tiny_cfg, write_squares

from focal_det.benchmarks import memory
from focal_det.benchmarks.memory import MIB, tensors_mib
from focal_det.losses import LOSS_REGISTRY
from focal_det.modeling.normalizer import SHORT_NAMES

LOSSES = sorted(name for name, _ in LOSS_REGISTRY)
ANCHORS_PER_PLACE = 6
STRIDES = (8, 16)
UNSURE = ("MODEL.RETINANET.PRIOR_PROB", 0.5)
"""Scores around 1/2, so that background costs something by any loss."""


def build(*options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(tiny_cfg(*options))


def count_anchors(height: int, width: int) -> int:
    """Anchors of an image whose sides are multiples of 16."""
    return sum(ANCHORS_PER_PLACE * (height // x) * (width // x) for x in STRIDES)


def step(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One training step without the optimizer; its losses and gradients are finite."""
    model.train().zero_grad()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    return losses


def assert_detections_lie_inside(model: nn.Module, image: Tensor) -> int:
    """Detect at any score; gives the number of detections."""
    model.eval()
    model.test_score_thresh = 0.0
    with torch.no_grad():
        (found,) = model([{"image": image}])
    instances = found["instances"]
    height, width = image.shape[1:]
    assert instances.image_size == (height, width)
    assert len(instances) <= model.max_detections_per_image
    boxes = instances.pred_boxes.tensor
    assert boxes.shape == (len(instances), 4)
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height, width, height])).all()
    assert ((instances.scores > 0) & (instances.scores <= 1)).all()
    assert ((instances.pred_classes >= 0) & (instances.pred_classes < model.num_classes)).all()
    return len(instances)


# --------------------------------------------------------------------------------------------------
# Many steps

CLASSES_OF_MANY_STEPS = 100
SIZES = [(16 * height, 16 * width) for height in range(1, 5) for width in range(1, 7)]
"""24 sizes of images: more than the detector keeps anchors for."""

SCALARS_A_STEP = 14
BYTES_A_SCALAR = 200
"""EventStorage keeps each scalar of each step: a tuple, its two numbers, and a place in a list."""


class Gauge(HookBase):
    """Takes the losses in turn and, now and then, detects; counts what the process holds."""

    def __init__(self, model: nn.Module, losses: list[nn.Module], steps: list[int]) -> None:
        self.model, self.losses, self.steps = model, losses, steps
        self.open_files: list[int] = []
        self.tensors: list[int] = []
        self.resident: list[float] = []

    def before_step(self) -> None:
        self.model.cls_loss = self.losses[self.trainer.iter % len(self.losses)]

    def after_step(self) -> None:
        if self.trainer.iter % 8 == 0:
            self.model.eval()
            with torch.no_grad():
                self.model([{"image": torch.zeros(3, *SIZES[self.trainer.iter % len(SIZES)])}])
            self.model.train()
        if self.trainer.iter + 1 in self.steps:
            gc.collect()
            memory._malloc("malloc_trim", 0)  # what free() kept is not held
            self.open_files.append(len(os.listdir("/proc/self/fd")))
            self.tensors.append(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
            self.resident.append(memory._resident("VmRSS"))


@pytest.mark.parametrize("rounds", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_grows_with_the_steps(rounds: int) -> None:
    """Images of 24 sizes a round, all losses in turn: 192 steps, or 4,800."""
    model = build("MODEL.RETINANET.NUM_CLASSES", CLASSES_OF_MANY_STEPS)
    losses = [LOSS_REGISTRY.get(name)() for name in LOSSES]
    assert len(SIZES) % len(losses) == 0, "each round is to be like the one before"
    generator = torch.Generator().manual_seed(0)
    batches = [
        [picture(generator, objects, *size, CLASSES_OF_MANY_STEPS) for objects in (index % 4, 2)]
        for index, size in enumerate(SIZES)
    ]
    warm, steps = 3 * len(SIZES), rounds * len(SIZES)
    gauge = Gauge(model, losses, [warm, steps])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    trainer = SimpleTrainer(model, itertools.cycle(batches), optimizer)
    trainer.register_hooks([gauge])
    trainer.train(0, steps)
    assert gauge.open_files[0] == gauge.open_files[1]
    assert gauge.tensors[0] == gauge.tensors[1]
    assert len(trainer.storage.histories()) == SCALARS_A_STEP
    # Of the allocator's making, and the same for any number of steps: eight times the logits of the
    # largest batch. One gradient of logits a step would be five times as much after 120 steps.
    logits = 2 * 4 * CLASSES_OF_MANY_STEPS * max(count_anchors(*size) for size in SIZES)
    kept = (steps - warm) * SCALARS_A_STEP * BYTES_A_SCALAR
    assert gauge.resident[1] - gauge.resident[0] <= (8 * logits + kept) / MIB


TRAIN_AND_COUNT = """
import gc, json, os, sys
from pathlib import Path

from detectron2.engine import HookBase
from workers import tiny_cfg

from focal_det.benchmarks import memory
from focal_det.engine import Trainer


class Gauge(HookBase):
    def __init__(self):
        self.counts = []

    def after_step(self):
        if self.trainer.iter + 1 in (500, 3000):
            gc.collect()
            memory._malloc("malloc_trim", 0)
            files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in [os.getpid(), *children()]]
            self.counts.append([files, memory._resident("VmRSS")])


def children():
    tasks = Path("/proc/self/task").glob("*/children")
    return sorted(int(pid) for task in tasks for pid in task.read_text().split())


if __name__ == "__main__":
    cfg = tiny_cfg(*sys.argv[2:])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    gauge = Gauge()
    trainer.register_hooks([gauge])
    trainer.train()
    Path(sys.argv[1]).write_text(json.dumps(gauge.counts))
"""


@pytest.mark.slow
def test_our_trainer_with_data_workers_holds_no_more_after_thousands_of_steps(
    tmp_path: Path,
) -> None:
    """3,000 steps with all hooks, writers and checkpoints, data from files by two workers."""
    write_squares(tmp_path)
    (tmp_path / "count.py").write_text(TRAIN_AND_COUNT)
    job = Job(
        tmp_path / "log.txt", tmp_path / "count.py", tmp_path / "counts.json",
        "MODEL.RETINANET.NUM_CLASSES", 1, "MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", 8,
        "DATASETS.TRAIN", "('squares',)", "DATALOADER.NUM_WORKERS", 2,
        "INPUT.MIN_SIZE_TRAIN", "(32,)", "SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 1e-5,
        "SOLVER.STEPS", "()", "SOLVER.MAX_ITER", 3000, "SOLVER.CHECKPOINT_PERIOD", 250,
        "OUTPUT_DIR", tmp_path / "out",
        FOCAL_DET_DATASETS=f"squares:{tmp_path}/squares.json:{tmp_path}",
    )  # fmt: skip
    assert job.wait(timeout=900) == 0, job.output
    (files, before), (files_after, after) = json.loads((tmp_path / "counts.json").read_text())
    assert len(files) == 3, "this process and two workers"
    assert files == files_after
    # Some 20 scalars a step, and what the allocator makes of it.
    assert after - before <= 2500 * 20 * BYTES_A_SCALAR / MIB + 8


# --------------------------------------------------------------------------------------------------
# Unusual sizes


@pytest.mark.parametrize("loss", LOSSES)
def test_a_thousand_objects_in_an_image(loss: str) -> None:
    size, generator = (256, 256), torch.Generator().manual_seed(0)
    model = build("MODEL.FOCAL_DET.LOSS.NAME", loss)
    few, many = ([picture(generator, objects, *size)] for objects in (10, 1000))
    step(model, few)  # what is made once is made
    extra = tensors_mib(lambda: step(model, many)) - tensors_mib(lambda: step(model, few))
    # Far less than the matrix of all overlaps, of which Detectron2 makes several.
    matrix = 4 * 1000 * count_anchors(*size) / MIB
    assert extra < matrix / 8

    instances = many[0]["instances"]
    with EventStorage() as storage:
        model(many)
    counted = storage.latest()["num_pos_anchors"][0]
    features = [torch.zeros(1, 1, size[0] // stride, size[1] // stride) for stride in STRIDES]
    (labels,), _ = RetinaNet.label_anchors(model, model.anchor_generator(features), [instances])
    assert counted == ((labels >= 0) & (labels < 3)).sum() > 1000


@pytest.mark.parametrize("size", [(6000, 400), (400, 6000)], ids=["high", "wide"])
def test_an_image_of_6000_pixels(size: tuple[int, int]) -> None:
    """It takes the memory of ten images of a tenth: nothing grows with its square."""
    generator = torch.Generator().manual_seed(0)
    model = build("MODEL.FPN.OUT_CHANNELS", 8)
    tenth = tuple(side // 10 if side == 6000 else side for side in size)
    step(model, [picture(generator, 3, 64, 64)])
    small = tensors_mib(lambda: step(model, [picture(generator, 20, *tenth)]))
    large = tensors_mib(lambda: step(model, [picture(generator, 200, *size)]))
    assert large <= 1.05 * 10 * small
    assert assert_detections_lie_inside(model, torch.rand(3, *size) * 255) > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_1203_classes(loss: str) -> None:
    size, generator = (128, 128), torch.Generator().manual_seed(0)
    model = build("MODEL.RETINANET.NUM_CLASSES", 1203, "MODEL.FOCAL_DET.LOSS.NAME", loss)
    batch = [picture(generator, 20, *size, num_classes=1203)]
    losses = step(model, batch)
    assert losses["loss_cls"] > 0
    peak = tensors_mib(lambda: step(model, batch))
    # The logits, their gradient and that of the weights; no third tensor of that size.
    logits = 4 * 1203 * count_anchors(*size)
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    assert peak <= 1.1 * (2 * logits + weights) / MIB
    assert assert_detections_lie_inside(model, batch[0]["image"]) > 0


@pytest.mark.parametrize("normalizer", SHORT_NAMES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("objects", [0, 1, 5])
def test_a_batch_of_one(loss: str, normalizer: str, objects: int) -> None:
    names = ["MODEL.FOCAL_DET.LOSS.NAME", loss, "MODEL.FOCAL_DET.NORMALIZER.NAME", normalizer]
    model = build(*names, *UNSURE)
    losses = step(model, [picture(torch.Generator().manual_seed(0), objects, 48, 64)])
    assert losses["loss_cls"] > 0
    assert (losses["loss_box_reg"] > 0) == (objects > 0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (7, 200)], ids=str)
def test_an_image_smaller_than_a_stride(loss: str, size: tuple[int, int]) -> None:
    model = build("MODEL.FOCAL_DET.LOSS.NAME", loss, *UNSURE)
    generator = torch.Generator().manual_seed(0)
    for objects in (0, 2):
        losses = step(model, [picture(generator, objects, *size)])
        assert losses["loss_cls"] > 0
    assert_detections_lie_inside(model, torch.rand(3, *size) * 255)
