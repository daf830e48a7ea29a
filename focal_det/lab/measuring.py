"""What is measured of a trained model and its data; all of it optional, none may cost a trial."""

import hashlib
import itertools
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

from focal_det.data.checks import (
    Objects,
    anchor_setup,
    empty_features,
    foreground_ratio,
    resized,
    usable_objects,
)

# Below Detectron2's logger, whose handlers every Detectron2 script sets up.
logger = logging.getLogger(f"detectron2.{__name__}")

WARM_UP, TIMED = 3, 40  # images
COUNTED = 200  # images
# Detectors whose anchors are those of MODEL.ANCHOR_GENERATOR, assigned as RetinaNet does.
ANCHORED = frozenset({"FocalRetinaNet", "RetinaNet", "TorchvisionRetinaNet"})

Value = TypeVar("Value")


def attempt(what: str, measure: Callable[[], Value], not_measured: dict[str, str]) -> Value | None:
    """A measurement; None, and a warning, where it fails.

    Training is over by then, and a model of somebody else's may raise anything.

    Args:
        what: is measured, as records call it.
        measure: does it.
        not_measured: gets the reason of a failure, by `what`.
    """
    try:
        return measure()
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        logger.warning(f"{what}: not measured, {reason}")
        not_measured[what] = reason
        return None


def fingerprints(datasets: Iterable[str]) -> dict[str, str]:
    """A hash of each data set's annotations, 12 hexadecimal digits, by the data set's name.

    Args:
        datasets: registered names; those without a file of annotations are left out.
    """
    made = {}
    for name in datasets:
        path = MetadataCatalog.get(name).get("json_file")
        if path and os.path.isfile(path):
            made[name] = fingerprint(path)
    return made


def fingerprint(path: str) -> str:
    """A hash of a file, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:12]


def peak_memory_mib(device: str) -> float:
    """Most memory so far: of PyTorch's allocator on a GPU, else resident in this process."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    import resource  # absent on Windows, where records can still be read

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


@torch.no_grad()
def time_inference(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Time from an image in memory to its detections, one image at a time.

    Args:
        cfg: whose first test set is meant.
        model: on its device; left in evaluation mode.

    Returns:
        ``median`` and ``p95`` in milliseconds over :data:`TIMED` images, after :data:`WARM_UP`.
    """
    model.eval()
    times: list[float] = []  # of every image
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    for index, inputs in enumerate(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])):
        if index == WARM_UP + TIMED:
            break
        begin = time.perf_counter()
        model(inputs)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    times = times[WARM_UP:] or times[-1:]  # a data set of hardly any image
    # One value has no quantiles; those of a few are extrapolated beyond the slowest.
    p95 = statistics.quantiles(times, n=20)[-1] if len(times) > 1 else times[0]
    return {"median": statistics.median(times), "p95": min(p95, max(times))}


@torch.no_grad()
def count_gflops(cfg: CfgNode, model: nn.Module) -> float:
    """Operations of one image as fvcore counts them, in 10^9; a multiply-add is one.

    Args:
        cfg: whose first image of the first test set is meant.
        model: left in evaluation mode.

    Raises:
        RuntimeError: the model cannot be traced.
    """
    model.eval()
    (inputs,) = itertools.islice(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0]), 1)
    counter = FlopCountAnalysis(model, inputs)
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return float(counter.total()) / 1e9


def background_per_foreground(cfg: CfgNode, model: Any) -> float | None:
    """How many background anchors there are for each foreground one, as training assigns them.

    Args:
        cfg: whose training sets are meant.
        model: if it is Detectron2's FCOS, its points are counted instead.

    Returns:
        None without a foreground anchor, or for a detector without such anchors or points.

    Raises:
        ValueError: the config's anchors are not Detectron2's.
    """
    if isinstance(model, FCOS):
        return _count_points(cfg, model)
    if cfg.MODEL.META_ARCHITECTURE not in ANCHORED:
        return None
    ratio: float | None = count_anchors(cfg)["background_per_foreground"]
    return ratio


@torch.no_grad()
def _count_points(cfg: CfgNode, model: FCOS) -> float | None:
    """By the model's own rule, on the images and at the size of :func:`count_anchors`."""
    setup, generator = anchor_setup(cfg), model.anchor_generator
    foreground = background = 0
    for image in _counted(cfg):
        boxes, (height, width) = resized(image, setup)
        features = empty_features(height, width, generator.strides)
        points = generator([feature.to(model.device) for feature in features])
        objects = Instances((height, width), gt_boxes=Boxes(boxes))
        objects.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
        (labels,), _ = model.label_anchors(points, [objects.to(model.device)])
        found = int((labels != model.num_classes).sum())
        foreground, background = foreground + found, background + len(labels) - found
    return background / foreground if foreground else None


def count_anchors(cfg: CfgNode) -> dict[str, Any]:
    """See :func:`focal_det.data.checks.foreground_ratio`.

    Args:
        cfg: whose training sets are meant, without images that ``FILTER_EMPTY_ANNOTATIONS``
            leaves out; :data:`COUNTED` of them, evenly spaced, are looked at, at the size of
            evaluation.

    Raises:
        ValueError: the config's anchors are not Detectron2's.
    """
    return foreground_ratio(_counted(cfg), anchor_setup(cfg))


def _counted(cfg: CfgNode) -> list[Objects]:
    records = get_detection_dataset_dicts(
        list(cfg.DATASETS.TRAIN), cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    images = usable_objects(records)
    return images[:: max(1, -(-len(images) // COUNTED))]
