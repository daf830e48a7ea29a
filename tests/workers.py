"""Shared parts of the tests of many workers and of training under load.

A detector that takes milliseconds a step, images for it, and commands whose processes can all be
found.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from detectron2.structures import Boxes, Instances
from PIL import Image

import focal_det

ROOT = Path(__file__).parent.parent


@BACKBONE_REGISTRY.register()
def build_tiny_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A stem and two residual blocks under an FPN: strides 8 and 16, FPN.OUT_CHANNELS wide."""
    width, norm = cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.RESNETS.NORM
    stem = BasicStem(in_channels=input_shape.channels, out_channels=width, norm=norm)
    stages = [
        ResNet.make_stage(
            BasicBlock, 1, stride_per_block=[2], in_channels=inner, out_channels=outer, norm=norm
        )
        for inner, outer in [(width, 2 * width), (2 * width, width)]
    ]
    levels = ["res2", "res3"]
    bottom_up = ResNet(stem, stages, out_features=levels)
    return FPN(bottom_up, levels, out_channels=width, norm=cfg.MODEL.FPN.NORM)


def tiny_cfg(*options: Any) -> CfgNode:
    """A FocalRetinaNet on that backbone: K = 3, six anchors a place, sizes of 16 to 48 pixels."""
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_list(
        [
            "MODEL.META_ARCHITECTURE", "FocalRetinaNet",
            "MODEL.DEVICE", "cpu",
            "MODEL.PIXEL_STD", [64.0, 64.0, 64.0],
            "MODEL.BACKBONE.NAME", "build_tiny_fpn_backbone",
            "MODEL.FPN.OUT_CHANNELS", 32,
            "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 24], [32, 48]],
            "MODEL.RETINANET.IN_FEATURES", ["p3", "p4"],
            "MODEL.RETINANET.NUM_CONVS", 1,
            "MODEL.RETINANET.NUM_CLASSES", 3,
            *options,
        ]
    )  # fmt: skip
    return cfg


def picture(
    generator: torch.Generator, objects: int, height: int, width: int, num_classes: int = 3
) -> dict[str, Any]:
    """A random image with boxes of 4 to 40 pixels, where there is room for them."""
    corners = torch.rand(objects, 2, generator=generator) * torch.tensor([width, height]) * 0.8
    sides = 4 + 36 * torch.rand(objects, 2, generator=generator)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
    instances.gt_boxes.clip((height, width))
    instances.gt_classes = torch.randint(0, num_classes, (objects,), generator=generator)
    image = torch.rand(3, height, width, generator=generator) * 255
    return {"image": image, "instances": instances}


def write_squares(folder: Path) -> None:
    """Write four images of a white square each, and ``squares.json``, in COCO format."""
    images, annotations = [], []
    for index in range(4):
        pixels = np.zeros((64, 64, 3), dtype=np.uint8)
        x, y = 4 * index, 16 - 4 * index
        pixels[y : y + 32, x : x + 32] = 255
        Image.fromarray(pixels).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 64})
        box = {"id": index + 1, "image_id": index, "category_id": 1, "bbox": [x, y, 32, 32]}
        annotations.append({**box, "area": 1024, "iscrowd": 0})
    categories = [{"id": 1, "name": "square"}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "squares.json").write_text(json.dumps(coco))


class Job:
    """A command that runs beside the test, in a process group of its own.

    Args:
        log: a file for all that it prints.
        command: arguments of the Python interpreter.
        environment: variables to add.
    """

    def __init__(self, log: Path, *command: Any, **environment: str) -> None:
        self.log = log
        path = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float) -> int:
        """Its exit status; whatever still runs after `timeout` seconds is ended, and it raises."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None

    def kill(self) -> None:
        """End all its processes at once, as a power cut would."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        os.killpg(self.process.pid, number)

    def processes(self) -> list[int]:
        """Those of its processes that run."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                # After the name, which may hold anything: state, parent, group.
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            except OSError:  # it has ended meanwhile
                continue
            if int(group) == self.process.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def wait_until_none_is_left(self, timeout: float) -> None:
        """Raise where some of its processes outlive it by more than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.processes():
            if time.monotonic() > deadline:
                left = self.processes()
                self.signal(signal.SIGKILL)
                raise AssertionError(f"processes {left} are left behind:\n{self.output}")
            time.sleep(0.1)
