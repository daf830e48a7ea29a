"""One trial, from its config to its record."""

import argparse
import datetime
import itertools
import json
import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.engine import HookBase, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException

from focal_det.analysis import records
from focal_det.data.checks import anchor_setup, foreground_ratio, usable_objects
from focal_det.engine import Trainer

from .trials import Trial

# Below Detectron2's logger, whose handlers every Detectron2 script sets up.
logger = logging.getLogger(f"detectron2.{__name__}")

SCHEMA = 1
WARM_UP, TIMED = 3, 40  # images
COUNTED = 200  # images
REPORT_SECONDS = 2.0
MEASURED = "measured.json"
FACTS = (
    "seconds",
    "resumed_from",
    "images_per_second",
    "parameters",
    "gflops",
    "background_per_foreground",
    "peak_memory_mib",
    "inference_ms",
)

Report = Callable[[int], None]


def run_trial(
    trial: Trial, folder: Path, num_gpus: int = 0, report: Report | None = None
) -> dict[str, Any]:
    """Train and evaluate; goes on from the last checkpoint where an earlier try was cut short.

    Args:
        trial: what to run.
        folder: its own; gets what Detectron2 writes.
        num_gpus: processes with a GPU each; 0 for one process on what ``MODEL.DEVICE`` says.
        report: called with the number of finished iterations, every few seconds; not with several
            processes.

    Returns:
        A record: what was run (``table``, ``label``, ``overrides``, ``seed``, ``iterations``,
        ``key``), ``metrics`` in percent, ``curves``, ``seconds``, ``resumed_from``,
        ``images_per_second`` of training (None where nothing was left to do), ``parameters``,
        ``gflops`` of an image (multiply-adds), ``background_per_foreground`` (anchors),
        ``peak_memory_mib`` of the main process, ``inference_ms`` (median and 95th percentile, one
        image), ``environment``, and ``error``, why training was given up, or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cfg = trial.load_config(str(folder))
    measured = folder / MEASURED
    measured.unlink(missing_ok=True)
    error = None
    try:
        launch(
            _train,
            num_gpus,
            num_machines=1,
            dist_url="auto",
            args=(cfg, measured, report if num_gpus < 2 else None),
        )
    except FloatingPointError as failure:  # that a loss diverges is a result, too
        error = str(failure).splitlines()[0]
    except ProcessRaisedException as failure:
        if "FloatingPointError" not in str(failure):
            raise
        error = "a loss or gradient is not finite, see the log"
    rows = records.read_metrics(folder / "metrics.json")
    finished = datetime.datetime.now(datetime.timezone.utc)
    return {
        "schema": SCHEMA,
        "key": trial.key,
        "table": trial.table,
        "label": trial.label,
        "overrides": trial.overrides,
        "seed": trial.seed,
        "iterations": trial.iterations,
        "data": [list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)],
        **records.average_precision([] if error else rows),
        "curves": records.curves(rows),
        **dict.fromkeys(FACTS),
        **(json.loads(measured.read_text("utf-8")) if measured.is_file() else {}),
        "environment": records.environment(cfg.MODEL.DEVICE),
        "finished": finished.isoformat(timespec="seconds"),
        "error": error,
        "config": trial.config,
    }


def _train(cfg: CfgNode, measured: Path, report: Report | None) -> None:
    """The work of one process."""
    default_setup(cfg, argparse.Namespace())
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    start = trainer.start_iter
    clock = _Clock(report)
    trainer.register_hooks([clock])
    trainer.train()
    if comm.is_main_process():
        model: Any = getattr(trainer.model, "module", trainer.model)
        images = (trainer.max_iter - start) * cfg.SOLVER.IMS_PER_BATCH
        facts = {
            "seconds": clock.seconds,
            "resumed_from": start,
            "images_per_second": images / clock.seconds["training"] if images else None,
            "parameters": sum(x.numel() for x in model.parameters()),
            "gflops": count_gflops(cfg, model),
            "background_per_foreground": background_per_foreground(cfg),
            "peak_memory_mib": peak_memory_mib(cfg.MODEL.DEVICE),
            "inference_ms": time_inference(cfg, model),
        }
        records.save(facts, measured)


class _Clock(HookBase):
    """Seconds of training and of the evaluation after it; reports how far it is."""

    def __init__(self, report: Report | None) -> None:
        self.report = report
        self.begin = self.last = self.reported = time.monotonic()
        self.seconds: dict[str, float] = {}

    def before_train(self) -> None:
        """Start."""
        self.begin = self.last = time.monotonic()

    def after_step(self) -> None:
        """Report, but not more often than anyone looks."""
        self.last = time.monotonic()
        if self.report is not None and self.last - self.reported >= REPORT_SECONDS:
            self.reported = self.last
            self.report(self.trainer.iter + 1)

    def after_train(self) -> None:
        """Called after Detectron2's evaluation hook, which is registered before."""
        self.seconds = {
            "training": self.last - self.begin,
            "evaluation": time.monotonic() - self.last,
        }


def peak_memory_mib(device: str) -> float:
    """Most memory so far: of PyTorch's allocator on a GPU, else resident in this process."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
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
    times: list[float] = []
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    for index, inputs in enumerate(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])):
        if index == WARM_UP + TIMED:
            break
        begin = time.perf_counter()
        model(inputs)
        if on_gpu:
            torch.cuda.synchronize()
        if index >= WARM_UP:
            times.append(1000 * (time.perf_counter() - begin))
    if len(times) < 2:  # a data set of hardly any image
        times = [1000 * (time.perf_counter() - begin)] * 2
    return {"median": statistics.median(times), "p95": statistics.quantiles(times, n=20)[-1]}


@torch.no_grad()
def count_gflops(cfg: CfgNode, model: nn.Module) -> float | None:
    """Multiply-adds of one image's convolutions and matrix products, in 10^9, by fvcore.

    Args:
        cfg: whose first image of the first test set is meant.
        model: left in evaluation mode.

    Returns:
        None where the model cannot be traced.
    """
    model.eval()
    (inputs,) = itertools.islice(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0]), 1)
    counter = FlopCountAnalysis(model, inputs)
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    try:
        return float(counter.total()) / 1e9
    except RuntimeError as error:  # of torch.jit.trace
        logger.warning(f"operations cannot be counted: {str(error).splitlines()[0]}")
        return None


def background_per_foreground(cfg: CfgNode) -> float | None:
    """How many background anchors there are for each foreground one, as training assigns them.

    Args:
        cfg: whose training sets are meant.

    Returns:
        None without a foreground anchor, or where the config's anchors are not Detectron2's.
    """
    try:
        counts = count_anchors(cfg)
    except ValueError:
        return None
    ratio: float | None = counts["background_per_foreground"]
    return ratio


def count_anchors(cfg: CfgNode) -> dict[str, Any]:
    """See :func:`focal_det.data.checks.foreground_ratio`.

    Args:
        cfg: whose training sets are meant; :data:`COUNTED` of their images, evenly spaced, are
            looked at, at the size of evaluation.

    Raises:
        ValueError: the config's anchors are not Detectron2's.
    """
    setup = anchor_setup(cfg)
    images = usable_objects(get_detection_dataset_dicts(list(cfg.DATASETS.TRAIN), False))
    return foreground_ratio(images[:: max(1, -(-len(images) // COUNTED))], setup)
