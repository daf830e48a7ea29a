"""Whole models for the benchmark: how each is built, stepped, checked and taken apart by time.

Letters: N images, M boxes of an image, K = 80 classes.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import focal_det
from focal_det.compat import grad_scaler
from focal_det.modeling.diagnostics import PERIOD

from .memory import on_cuda

CLASSES = 80
BOXES = 8  # in an image; COCO has 7.3
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "focal_det": {"backbone": ("backbone", "forward"), "head": ("head", "forward")},
    "faster_rcnn": {
        "backbone": ("backbone", "forward"),
        "proposals": ("proposal_generator", "forward"),
        "ROI heads": ("roi_heads", "forward"),
    },
    "torchvision": {
        "backbone": ("backbone", "forward"),
        "head": ("head", "forward"),
        "assignment": ("compute_loss",),
        "loss": ("head", "compute_loss"),
    },
}
"""Part of a training step -> where the method is that does it. A part inside another counts once:
what is left of ``compute_loss`` is the assignment."""
PARTS["focal_det"] |= {"assignment": ("label_anchors",), "loss": ("losses",)}
PARTS["retinanet"] = PARTS["fcos"] = PARTS["focal_det"]


class Scene(NamedTuple):
    """A random image (3, H, W) uint8 with boxes (M, 4) XYXY and classes (M,)."""

    image: Tensor
    boxes: Tensor
    classes: Tensor


def random_boxes(
    count: int, height: int, width: int, generator: torch.Generator, smallest: int = 16
) -> Tensor:
    """(count, 4) XYXY inside an image; sides from `smallest` to half the image's, small ones more
    often."""
    sides = torch.rand(count, 2, generator=generator)
    room = torch.tensor([width, height]) / 2 / smallest
    sides = smallest * room.clamp(min=1) ** sides
    corners = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    return torch.cat([corners, corners + sides], dim=1)


def random_scenes(size: tuple[int, int], images: int, seed: int) -> list[Scene]:
    """N images of the same size (height, width)."""
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    return [
        Scene(
            torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator),
            random_boxes(BOXES, height, width, generator),
            torch.randint(0, CLASSES, (BOXES,), generator=generator),
        )
        for _ in range(images)
    ]


def build(
    name: str, depth: int, config_file: Path, loss: str = "FocalLoss", seed: int = 0
) -> nn.Module:
    """A model with random weights, its stem and first stage frozen, on the CPU.

    Args:
        name: a key of :data:`PARTS`.
        depth: 18 or 50, of the ResNet below the FPN.
        config_file: the YAML base config of both RetinaNets.
        loss: classification loss of ``focal_det``.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    if name == "fcos":
        return _fcos(depth)
    if name == "torchvision":
        return _torchvision_retinanet(depth)
    if name == "faster_rcnn":
        cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    else:
        cfg = get_cfg()
        focal_det.add_config(cfg)
        cfg.merge_from_file(str(config_file))
        cfg.MODEL.META_ARCHITECTURE = {"focal_det": "FocalRetinaNet", "retinanet": "RetinaNet"}[
            name
        ]
        cfg.MODEL.FOCAL_DET.LOSS.NAME = loss
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    cfg.MODEL.RESNETS.DEPTH = depth
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return build_model(cfg)


def _fcos(depth: int) -> nn.Module:
    model = model_zoo.get_config("common/models/fcos.py").model
    model.backbone.bottom_up.freeze_at = 2
    model.backbone.bottom_up.stages.depth = depth
    if depth < 50:
        del model.backbone.bottom_up.stages.stride_in_1x1
    return instantiate(model)


def _torchvision_retinanet(depth: int) -> nn.Module:
    """``retinanet_resnet50_fpn`` as it is for pretrained weights: frozen norm, frozen first stage.

    Without weights that function itself trains all layers and their batch norms, which the others
    do not.
    """
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.retinanet import RetinaNet
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{depth}",
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=3,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(512 if depth < 50 else 2048, 256),
    )
    return RetinaNet(backbone, CLASSES)


class Candidate:
    """A model with an optimizer, whatever library it is of.

    Args:
        name: a key of :data:`PARTS`.
        model: of :func:`build`.
        device: to run on.
        amp: ``none``, or the precision of autocast.
    """

    def __init__(self, name: str, model: nn.Module, device: str = "cpu", amp: str = "none") -> None:
        self.name, self.device, self.amp = name, device, AMP[amp]
        self.iteration = 1  # of every step; an ordinary one, see diagnostics_cost
        self.model = model.to(device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # At a rate of zero a step costs what it costs at any, and every round is the same.
        self.optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=1e-4)
        scaled = self.amp == torch.float16 and on_cuda(device)
        self.scaler = grad_scaler("cuda", enabled=scaled)

    def inputs(self, scenes: Sequence[Scene]) -> Any:
        """Scenes in the form that the model takes."""
        if self.name == "torchvision":
            height, width = scenes[0].image.shape[1:]
            transform: Any = self.model.transform
            transform.min_size, transform.max_size = (min(height, width),), max(height, width)
            return (
                [scene.image.float() / 255 for scene in scenes],
                [{"boxes": scene.boxes, "labels": scene.classes} for scene in scenes],
            )
        return [_detectron2_input(scene) for scene in scenes]

    def losses(self, inputs: Any) -> dict[str, Tensor]:
        """The loss dict of a training step."""
        with EventStorage(self.iteration), self._autocast():
            if self.name != "torchvision":
                return dict(self.model(inputs))
            images = [x.to(self.device) for x in inputs[0]]
            targets = [{k: x.to(self.device) for k, x in each.items()} for each in inputs[1]]
            return dict(self.model(images, targets))

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Gradients of the sum of the losses."""
        self.scaler.scale(torch.stack([x.float() for x in losses.values()]).sum()).backward()

    def update(self) -> None:
        """The optimizer's part."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, inputs: Any) -> None:
        """One training step; the model must be in training mode."""
        self.backward(self.losses(inputs))
        self.update()

    def detect(self, inputs: Any) -> Any:
        """Detections; the model must be in evaluation mode."""
        with torch.no_grad(), self._autocast():
            if self.name != "torchvision":
                return self.model(inputs)
            return self.model([x.to(self.device) for x in inputs[0]])

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, self.amp)


def _detectron2_input(scene: Scene) -> dict[str, Any]:
    height, width = scene.image.shape[1:]
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(scene.boxes)
    instances.gt_classes = scene.classes
    return {"image": scene.image, "instances": instances, "height": height, "width": width}


def step_parts(
    candidate: Candidate,
    inputs: Any,
    rounds: int,
    methods: Mapping[str, tuple[str, ...]] | None = None,
) -> tuple[float, dict[str, float]]:
    """Mean time of a training step and of its parts in milliseconds, with a timer around each.

    Args:
        candidate: in training mode.
        inputs: of :meth:`Candidate.inputs`.
        rounds: number of steps.
        methods: of the model, by the name of the part; None for :data:`PARTS`.

    Returns:
        The step, and its parts with the ``rest`` that is in none; they sum up to the step.
    """
    spent: dict[str, float] = {}
    running: list[float] = []  # time of the parts inside each part that has begun

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            running.append(0.0)
            begin = _now(candidate.device)
            result = function(*args, **kwargs)
            elapsed = _now(candidate.device) - begin
            spent[name] = spent.get(name, 0.0) + elapsed - running.pop()
            if running:
                running[-1] += elapsed
            return result

        return wrapper

    with contextlib.ExitStack() as stack:
        for name, path in (PARTS[candidate.name] if methods is None else methods).items():
            stack.enter_context(_replaced(candidate.model, path, name, timed))
        for name, method in (("backward", "backward"), ("optimizer", "update")):
            stack.enter_context(_replaced(candidate, (method,), name, timed))
        begin = _now(candidate.device)
        for _ in range(rounds):
            candidate.step(inputs)
        total = _now(candidate.device) - begin
    parts = {name: 1e3 * seconds / rounds for name, seconds in spent.items()}
    step = 1e3 * total / rounds
    return step, {**parts, "rest": max(0.0, step - sum(parts.values()))}


def diagnostics_cost(candidate: Candidate, inputs: Any, rounds: int) -> dict[str, float]:
    """What FocalRetinaNet's diagnostics take of a training step.

    Args:
        candidate: a FocalRetinaNet in training mode.
        inputs: of :meth:`Candidate.inputs`.
        rounds: number of steps of either kind.

    Returns:
        Milliseconds of a whole ordinary ``step_ms``, of the diagnostics in it, ``ordinary_ms``,
        and in the one step of :data:`PERIOD` that looks at every anchor, ``look_ms``; ``share``,
        the mean over a period as part of a step.
    """
    methods, ordinary = {"diagnostics": ("_diagnostics", "report")}, candidate.iteration
    step, parts = step_parts(candidate, inputs, rounds, methods)
    candidate.iteration = PERIOD
    try:
        candidate.step(inputs)  # the first look may compile something
        _, of_look = step_parts(candidate, inputs, rounds, methods)
    finally:
        candidate.iteration = ordinary
    usual, look = parts["diagnostics"], of_look["diagnostics"]
    mean = (look + (PERIOD - 1) * usual) / PERIOD
    return {"step_ms": step, "ordinary_ms": usual, "look_ms": look, "share": mean / step}


@contextlib.contextmanager
def _replaced(
    root: Any, path: Sequence[str], name: str, timed: Callable[..., Any]
) -> Iterator[None]:
    """Put a timer around a method of one object."""
    owner = root
    for part in path[:-1]:
        owner = getattr(owner, part)
    vars(owner)[path[-1]] = timed(name, getattr(owner, path[-1]))
    try:
        yield
    finally:
        del vars(owner)[path[-1]]


def _now(device: str) -> float:
    if on_cuda(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def parity(ours: Candidate, theirs: Candidate, scenes: Sequence[Scene]) -> str | None:
    """How the two RetinaNets differ with the same weights; None where they agree.

    Leaves both in evaluation mode, with classification biases that give some detections.
    """
    ours.model.load_state_dict(theirs.model.state_dict(), strict=False)
    inputs = ours.inputs(scenes)
    found, expected = (x.losses(inputs) for x in (ours, theirs))
    for key, value in expected.items():
        off = float((found[key] - value).detach().abs() / value.detach().abs().clamp(min=1e-12))
        if not off <= 1e-5:
            return f"{key} is off by {off:.1e} of itself"
    heads: list[Any] = [x.model.head for x in (ours, theirs)]
    noise = torch.randn(heads[1].cls_score.bias.shape, generator=torch.Generator().manual_seed(0))
    for x, head in zip((ours, theirs), heads, strict=True):
        x.model.eval()
        head.cls_score.bias.data += 2 * noise.to(x.device)
    pairs = zip(*(x.detect(inputs) for x in (ours, theirs)), strict=True)
    wrong = [difference(a["instances"], b["instances"]) for a, b in pairs]
    return next(filter(None, wrong), None)


def difference(found: Instances, expected: Instances) -> str | None:
    """How the detections of one image differ; None where they are identical, and there are some."""
    if len(found) != len(expected):
        return f"{len(found)} detections instead of {len(expected)}"
    fields = [
        (found.pred_boxes.tensor, expected.pred_boxes.tensor, "boxes"),
        (found.scores, expected.scores, "scores"),
        (found.pred_classes, expected.pred_classes, "classes"),
    ]
    return next((f"the {name} differ" for a, b, name in fields if not torch.equal(a, b)), None)


def find_sync(candidate: Candidate, scenes: Sequence[Scene]) -> str | None:
    """What makes the host wait for the GPU in ``forward_training`` and backward, or None."""
    model: Any = candidate.model
    batch = candidate.inputs(scenes)
    images = model.preprocess_image(batch)
    instances = [x["instances"].to(candidate.device) for x in batch]
    for mode in ("default", "error"):  # first without, so that all is allocated and chosen
        features = model.backbone(images.tensor)
        features = [features[name] for name in model.head_in_features]
        predictions = model.head(features)
        torch.cuda.synchronize(candidate.device)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with EventStorage():
                losses = model.forward_training(images, features, predictions, instances)
            sum(losses.values()).backward()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
            candidate.optimizer.zero_grad(set_to_none=True)
    return None
