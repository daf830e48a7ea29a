"""One trial, from its config to its record."""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.engine import HookBase, default_setup, hooks, launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessRaisedException

from focal_det.analysis import records
from focal_det.engine import Trainer

from .measuring import (
    attempt,
    background_per_foreground,
    count_gflops,
    fingerprints,
    peak_memory_mib,
    time_inference,
)
from .trial_records import FACTS, SCHEMA
from .trials import Trial

STEPS_WARM_UP = 3
CHECKPOINTS = 5  # at least, of a training, so that one that is cut short has little to do again
LOCK, STAMP = ".lock", "annotations.json"
LOCK_SECONDS = 30.0
REPORT_SECONDS = 2.0
MEASURED = "measured.json"

Report = Callable[[int], None]


def run_trial(
    trial: Trial, folder: Path, num_gpus: int = 0, report: Report | None = None
) -> dict[str, Any]:
    """Train and evaluate; goes on from the last checkpoint where an earlier try was cut short.

    Args:
        trial: what to run.
        folder: its own; gets what Detectron2 writes.
        num_gpus: processes with a GPU each; 0 for one process on what ``MODEL.DEVICE`` says.
        report: called with the number of finished iterations, before the first and then every few
            seconds; not with several processes.

    Returns:
        A record: what was run (``table``, ``label``, ``overrides``, ``seed``, ``iterations``,
        ``processes``, ``key``), ``data`` and ``annotations`` (a hash by data set), ``metrics`` in
        percent, ``curves``, ``seconds``, ``resumed_from``, ``images_per_second`` of the median
        step, ``parameters``, ``gflops`` of an image, ``background_per_foreground`` (anchors, of
        FCOS points), ``peak_memory_mib`` until the last step (the main process), ``inference_ms``
        (median and 95th percentile, one image), ``environment``, and ``error``, why training was
        given up (see :func:`shorten_paths`; the sweep's folder is that above ``folder``'s parent),
        or None. What could not be measured is None, and ``not_measured`` says why. Seconds, images
        per second and peak memory are of this try alone, from ``resumed_from`` on.

    Raises:
        RuntimeError: another process runs this trial in this folder.
        ValueError: the evaluation gave no AP.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        return _run_alone(trial, folder, num_gpus, report)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when the process ends, however it ends.

    A sweep that was killed takes a moment to end, and may be started again at once.
    """
    import fcntl  # absent on Windows, where the rest of the package works

    deadline = time.monotonic() + LOCK_SECONDS
    with (folder / LOCK).open("w", encoding="ascii") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    message = f"another sweep is running this trial, in {folder}"
                    raise RuntimeError(message) from None
                time.sleep(0.2)
        yield


def _run_alone(trial: Trial, folder: Path, num_gpus: int, report: Report | None) -> dict[str, Any]:
    cfg = trial.load_config(str(folder)).clone()
    cfg.defrost()
    # Not part of what the trial is: how often it can go on from makes no difference to its end.
    most = max(1, cfg.SOLVER.MAX_ITER // CHECKPOINTS)
    cfg.SOLVER.CHECKPOINT_PERIOD = min(cfg.SOLVER.CHECKPOINT_PERIOD, most)
    cfg.freeze()
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    _start_anew_with_other_data(folder, fingerprints(names))
    measured = folder / MEASURED
    measured.unlink(missing_ok=True)
    # Of the code that is imported now; the checkout may change while it runs.
    environment = records.environment(cfg.MODEL.DEVICE)
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
        error = shorten_paths(str(failure).splitlines()[0], folder.parent.parent, names)
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
        "processes": trial.processes,
        "data": [list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)],
        "annotations": fingerprints(names),
        **(records.average_precision([]) if error else _score(cfg, rows, folder)),
        "curves": records.curves(rows),
        **dict.fromkeys(FACTS),
        "not_measured": {},
        **(json.loads(measured.read_text("utf-8")) if measured.is_file() else {}),
        "environment": environment,
        "finished": finished.isoformat(timespec="seconds"),
        "error": error,
        "config": trial.config,
    }


def shorten_paths(text: str, sweep: Path, datasets: Iterable[str]) -> str:
    """A text without the folders of this machine, which say nothing where a record is passed on to.

    Args:
        text: what names files.
        sweep: the sweep's folder, which becomes ``OUTPUT``.
        datasets: registered names, which stand for the folders of their images.
    """
    text = text.replace(os.path.join(sweep, ""), "OUTPUT/")
    for name in datasets:
        root = MetadataCatalog.get(name).get("image_root")
        if root:
            text = text.replace(os.path.join(root, ""), f"{name}/")
    return text


def _start_anew_with_other_data(folder: Path, annotations: dict[str, str]) -> None:
    """Remove what an earlier try left that had other annotations under the same names."""
    stamp = folder / STAMP
    if stamp.is_file() and differ(json.loads(stamp.read_text("utf-8")), annotations):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    records.save(annotations, stamp)


def differ(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two :func:`fingerprints` contradict each other; one may know more than the other."""
    return any(one[name] != other[name] for name in one.keys() & other.keys())


def _train(cfg: CfgNode, measured: Path, report: Report | None) -> None:
    """The work of one process."""
    default_setup(cfg, argparse.Namespace())
    trainer = Trainer(cfg)
    for hook in trainer._hooks:
        if isinstance(hook, hooks.PeriodicCheckpointer):
            hook.max_to_keep = 1  # many trials lie side by side
    trainer.resume_or_load(resume=True)
    start = trainer.start_iter
    clock = _Clock(cfg, report)
    trainer.register_hooks([clock])
    trainer.train()
    if comm.is_main_process():
        for path in Path(cfg.OUTPUT_DIR).glob("model_[0-9]*.pth"):
            path.unlink()  # model_final.pth is there
        model: Any = getattr(trainer.model, "module", trainer.model)
        measures: dict[str, Callable[[], Any]] = {
            "inference_ms": lambda: time_inference(cfg, model),
            "gflops": lambda: count_gflops(cfg, model),
            "background_per_foreground": lambda: background_per_foreground(cfg, model),
        }
        not_measured: dict[str, str] = {}
        facts = {
            "seconds": clock.seconds,
            "resumed_from": start,
            "images_per_second": clock.images_per_second(),
            "peak_memory_mib": clock.peak_memory_mib,
            "parameters": sum(x.numel() for x in model.parameters()),
            **{name: attempt(name, measure, not_measured) for name, measure in measures.items()},
            "not_measured": not_measured,
        }
        records.save(facts, measured)


class _Clock(HookBase):
    """Time of the steps, of training and of the evaluation after it; memory until then.

    Reports how far training is. Must be the last hook.
    """

    def __init__(self, cfg: CfgNode, report: Report | None) -> None:
        self.cfg, self.report = cfg, report
        self.begin = self.last = self.reported = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.peak_memory_mib: float | None = None

    def before_train(self) -> None:
        """Start; say where, which is not 0 after a checkpoint."""
        self.begin = self.last = time.monotonic()
        if self.report is not None:
            self.report(self.trainer.start_iter)
        if torch.device(self.cfg.MODEL.DEVICE).type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.cfg.MODEL.DEVICE)

    def after_step(self) -> None:
        """Report, but not more often than anyone looks."""
        self.last = time.monotonic()
        # Here, since the last evaluation comes before this hook's after_train.
        self.peak_memory_mib = peak_memory_mib(self.cfg.MODEL.DEVICE)
        if self.report is not None and self.last - self.reported >= REPORT_SECONDS:
            self.reported = self.last
            self.report(self.trainer.iter + 1)

    def after_train(self) -> None:
        """Called after Detectron2's evaluation hook, which is registered before."""
        self.seconds = {
            "training": self.last - self.begin,
            "evaluation": time.monotonic() - self.last,
        }

    def images_per_second(self) -> float | None:
        """Of the median step, loading included, evaluations and checkpoints not.

        None where too few steps were left to do.
        """
        try:
            steps = self.trainer.storage.history("time").values()[STEPS_WARM_UP:]
        except KeyError:
            return None
        seconds = [value for value, _ in steps]
        batch: int = self.cfg.SOLVER.IMS_PER_BATCH
        return batch / statistics.median(seconds) if seconds else None


def _score(cfg: CfgNode, rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The last evaluation's AP; 0 where there are objects and nothing was detected.

    Raises:
        ValueError: the evaluation gave no AP of boxes.
    """
    if not any("bbox/AP" in row for row in rows):
        raise ValueError(
            f"the evaluation on DATASETS.TEST {tuple(cfg.DATASETS.TEST)} gave no bbox/AP: it takes "
            "one data set, which Detectron2 evaluates as COCO's are"
        )
    found = records.average_precision(rows)
    detections = folder / "inference" / "coco_instances_results.json"
    if found["metrics"]["AP"] is None and json.loads(detections.read_text("utf-8")) == []:
        # Detectron2 gives no number then. That a training led to nothing is a result, though.
        images = get_detection_dataset_dicts(list(cfg.DATASETS.TEST), False)
        if any(image.get("annotations") for image in images):
            found["metrics"] |= dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
    return found
