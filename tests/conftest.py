"""Shared parts of the tests: a small detector and images with boxes."""

import importlib.util
import logging
import os

# Before torch. The tests run side by side, one process a core: threads that wait for each other on
# a busy core cost ten times the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Before Triton, which detectron2 imports. Its kernels are tested where there is no GPU, too.
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes, Instances

import focal_det

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """A function from the name of a script in tools/ to the script as a module, made anew."""

    def load(name: str) -> ModuleType:
        path = ROOT / "tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{name}_tool", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def logging_as_it_was(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Trainers set up loggers for good, and take them out of the reach of pytest."""
    for name in ("detectron2", "fvcore"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "propagate", True)
        monkeypatch.setattr(logger, "handlers", [*logger.handlers])
        # A trainer that finds it set leaves it alone.
        caplog.set_level(logging.INFO, logger=name)


@pytest.fixture
def small_cfg() -> CfgNode:
    """A RetinaNet small enough for a CPU test: ResNet-18, 32 channels, K = 5, no data sets."""
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "Base-FocalRetinaNet.yaml"))
    cfg.merge_from_list(
        [
            "MODEL.DEVICE", "cpu",
            "MODEL.RESNETS.DEPTH", 18,
            "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
            "MODEL.FPN.OUT_CHANNELS", 32,
            "MODEL.RETINANET.NUM_CONVS", 1,
            "MODEL.RETINANET.NUM_CLASSES", 5,
            "DATASETS.TRAIN", (),
            "DATASETS.TEST", (),
        ]
    )  # fmt: skip
    return cfg


@pytest.fixture
def make_batch() -> Callable[..., list[dict[str, Any]]]:
    """A function from box counts to a batch of random images of unequal sizes, K = 5."""

    def make(counts: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        batch = []
        for index, count in enumerate(counts):
            height, width = 96 + 32 * index, 160 - 32 * index
            corners = torch.rand(count, 2, generator=generator) * 60
            sizes = 16 + torch.rand(count, 2, generator=generator) * 60
            instances = Instances((height, width))
            instances.gt_boxes = Boxes(torch.cat([corners, corners + sizes], dim=1))
            instances.gt_classes = torch.randint(0, 5, (count,), generator=generator)
            image = torch.rand(3, height, width, generator=generator) * 255
            batch.append({"image": image, "instances": instances, "file_name": f"{index}.png"})
        return batch

    return make
