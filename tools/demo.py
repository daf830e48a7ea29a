"""Train one small detector with several classification losses and compare them on a page.

    python tools/demo.py                            # cross entropy, balanced CE, OHEM, focal loss
    python tools/demo.py --iters 200 --losses FocalLoss HingeLoss --seed 1 --output output/short
    python tools/demo.py --report-only              # draw the page again

Writes OUTPUT/report.html, OUTPUT/results.json and a folder for each loss with its log, config and
weights. The environment variable DEMO_ITERS stands in for --iters.
"""

import argparse
import contextlib
import logging
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # fvcore, which Detectron2 imports, scripts its focal loss; PyTorch warns that this will go.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*")
    import focal_det

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import HookBase
from detectron2.structures import Boxes
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate
from tqdm import tqdm

from focal_det.analysis import comparison, records, report
from focal_det.engine import Trainer
from focal_det.lab.trials import scale_schedule
from focal_det.losses import build_loss
from focal_det.progress import bar_options

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "demo" / "focal_retinanet_digits.yaml"
LOSSES = ("CrossEntropyLoss", "BalancedCrossEntropyLoss", "OHEMLoss", "FocalLoss")
TRAINING_SHARE = 0.9  # of a run's time, for the estimate of what is left; the rest is evaluation
LOGGERS = ("detectron2", "fvcore", "focal_det", "py.warnings")


class DemoTrainer(Trainer):
    """The trainer of focal_det, whose evaluation shows a progress bar."""

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's loader in a progress bar."""
        loader = super().build_test_loader(cfg, dataset_name)
        return tqdm(loader, desc="      evaluating", unit="image", leave=False, **bar_options())


class Progress(HookBase):
    """A progress bar of a run with an estimate for all runs; keeps what only the process knows.

    Args:
        name: of the loss.
        index: of the run, from 0 on.
        total: number of runs.
        start: ``time.monotonic()`` when the first run began.

    Attributes:
        seconds: of ``training`` and of the ``evaluation`` after it, None where it did not end.
        anchors: number of anchors of the last image that the model saw.
    """

    def __init__(self, name: str, index: int, total: int, start: float) -> None:
        self.name, self.index, self.total, self.start = name, index, total, start
        self.seconds: dict[str, float | None] = {"training": None, "evaluation": None}
        self.anchors: int | None = None
        self.bar: Any = None
        self.begin = self.now = start

    def before_train(self) -> None:
        """Open the bar."""
        self.trainer.model.anchor_generator.register_forward_hook(self._count_anchors)
        self.begin = self.now = time.monotonic()
        self.bar = tqdm(
            total=self.trainer.max_iter,
            desc=f"[{self.index + 1}/{self.total}] {self.name}",
            unit="step",
            **bar_options(),
        )

    def _count_anchors(self, _module: Any, _inputs: Any, output: list[Boxes]) -> None:
        self.anchors = sum(len(level) for level in output)

    def after_step(self) -> None:
        """Move the bar and estimate the time left of all runs."""
        self.now = time.monotonic()
        share = (self.index + TRAINING_SHARE * (self.bar.n + 1) / self.bar.total) / self.total
        left = remaining(self.now - self.start, share)
        loss = self.trainer.storage.history("total_loss").latest()
        self.bar.set_postfix_str(f"loss {loss:.3g}, all runs done in {left}", refresh=False)
        self.bar.update()

    def after_train(self) -> None:
        """Close the bar; called after the last evaluation, or after a failure."""
        if self.bar is None:  # another hook failed before the first step
            return
        finished = self.bar.n == self.bar.total
        self.bar.close()
        self.seconds["training"] = self.now - self.begin
        if finished:
            self.seconds["evaluation"] = time.monotonic() - self.now


def remaining(elapsed: float, share: float) -> str:
    """Time left as ``m:ss``, after `elapsed` seconds for `share` (0 to 1) of the work."""
    seconds = round(elapsed * (1 - share) / share)
    return f"{seconds // 60}:{seconds % 60:02d}"


@contextlib.contextmanager
def quiet_console(log: Path) -> Iterator[None]:
    """Send what Detectron2, the COCO evaluator and warnings print to a file instead."""
    with open(log, "a", encoding="utf-8") as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(
            logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
        )
        loggers = [logging.getLogger(name) for name in LOGGERS]
        before = [(each.handlers, each.level, each.propagate) for each in loggers]
        for each in loggers:
            each.handlers, each.propagate = [handler], False
            each.setLevel(logging.INFO)
        logging.captureWarnings(True)
        try:
            with contextlib.redirect_stdout(stream):
                yield
        finally:
            logging.captureWarnings(False)
            for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
                each.handlers, each.propagate = handlers, propagate
                each.setLevel(level)


def make_config(args: argparse.Namespace, loss: str) -> CfgNode:
    """The frozen config of one run.

    Args:
        args: the command line.
        loss: name of the classification loss.
    """
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list([*args.opts, *overrides(loss)])
    cfg.SEED = max(cfg.SEED, 0) if args.seed is None else args.seed
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.OUTPUT_DIR = str(Path(args.output) / loss)
    if args.iters is not None:
        scale_schedule(cfg, args.iters)
    cfg.freeze()
    return cfg


def overrides(loss: str) -> list[str]:
    """What tells the config of one loss from that of another."""
    return ["MODEL.FOCAL_DET.LOSS.NAME", loss]


def build_trainer(cfg: CfgNode) -> DemoTrainer:
    """A trainer whose initial weights and data order depend on the seed, not on the loss."""
    seed_all_rng(cfg.SEED)
    trainer = DemoTrainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer


def train(cfg: CfgNode, progress: Progress) -> str | None:
    """Train and evaluate with one loss; ``OUTPUT_DIR`` is emptied before.

    Returns:
        Why the training was given up, or None.
    """
    folder = Path(cfg.OUTPUT_DIR)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump(), encoding="utf-8")
    with quiet_console(folder / "log.txt"):
        trainer = build_trainer(cfg)
        trainer.register_hooks([progress])
        try:
            trainer.train()
        except FloatingPointError as failure:  # that a loss diverges is a result, too
            return str(failure).splitlines()[0]
    return None


def make_settings(args: argparse.Namespace, cfg: CfgNode, truth: dict[str, Any]) -> dict[str, Any]:
    """What all runs share."""
    interpreter = shown(sys.executable)
    python = "python" if Path(interpreter).is_absolute() else interpreter
    return {
        "command": shlex.join([python, "tools/demo.py", *args.typed]),
        "python": python,
        "config_file": shown(args.config_file),
        "output": args.output,
        "overrides": args.opts,
        "iterations": cfg.SOLVER.MAX_ITER,
        "images_per_step": cfg.SOLVER.IMS_PER_BATCH,
        "seed": cfg.SEED,
        "train": list(cfg.DATASETS.TRAIN),
        "test": cfg.DATASETS.TEST[0],
        "test_images": truth["num_images"],
        "test_objects": len(truth["objects"]),
        "class_names": truth["class_names"],
        "objects_per_class": comparison.count_per_class(truth),
    }


def shown(path: str) -> str:
    """A path as seen from the working directory, where it is below that."""
    full = Path(path).absolute()  # unresolved: a virtual environment's Python is a link
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else path


def compare(args: argparse.Namespace) -> None:
    """Run all losses; after each one, results and page hold what is finished."""
    output = Path(args.output)
    configs = [make_config(args, loss) for loss in args.losses]
    truth = comparison.read_truth(configs[0])
    for name in ("results.json", "report.html"):
        (output / name).unlink(missing_ok=True)
    results: dict[str, Any] = {
        "settings": make_settings(args, configs[0], truth),
        "pictures": comparison.keep_pictures(truth["pictures"], output),
        "records": [],
    }
    start = time.monotonic()
    for index, cfg in enumerate(configs):
        progress = Progress(args.losses[index], index, len(configs), start)
        error = train(cfg, progress)
        results["records"].append(
            comparison.make_record(
                cfg,
                truth,
                overrides=overrides(args.losses[index]),
                seconds=progress.seconds,
                anchors=progress.anchors,
                error=error,
            )
        )
        records.save(results, output / "results.json")
        report.write_report(results, output)
    print_results(results, output)


def print_results(results: dict[str, Any], output: Path) -> None:
    """The table and where the page is, on the console."""
    rows = [
        [run["loss"], *(run["metrics"][key] for key in records.METRICS), run["seconds"]["training"]]
        for run in results["records"]
    ]
    head = ["loss", *records.METRICS, "seconds"]
    print("\n" + tabulate(rows, head, floatfmt=("", *[".1f"] * 6, ".0f"), missingval="-"))
    for run in results["records"]:
        if run["error"]:
            print(f"{run['loss']} was given up: {run['error']}")
    print(f"\nReport: {output / 'report.html'}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message where it cannot be carried out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=str(CONFIG), help="a YAML config to start from")
    parser.add_argument("--losses", nargs="+", default=LOSSES, metavar="NAME")
    parser.add_argument("--iters", help="steps of each run; the schedule is scaled to it")
    parser.add_argument("--seed", type=int, help="of weights and data order; default: the config's")
    parser.add_argument(
        "--output",
        default="output/demo",
        help="folder to write to; what an earlier comparison left there is replaced",
    )
    parser.add_argument("--report-only", action="store_true", help="draw the page from its records")
    parser.add_argument(
        "opts", nargs="*", help="config overrides: KEY VALUE pairs, before --losses"
    )
    args = parser.parse_args(argv)
    args.typed = list(sys.argv[1:] if argv is None else argv)
    if not args.report_only:
        try:
            check(args)
        except (AssertionError, KeyError, OSError, ValueError) as error:
            parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Find out before the first run what would stop the last; turns ``args.iters`` into a number.

    Raises:
        AssertionError, KeyError: an override that is not a config key (Detectron2's messages).
        OSError: the config file cannot be read.
        ValueError: another argument that cannot be used.
    """
    args.iters = steps_wanted(args.iters)
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be in [0, 2**32), got {args.seed}")
    if len(set(args.losses)) < len(args.losses):
        raise ValueError(f"--losses names a loss twice: {' '.join(args.losses)}")
    if not Path(args.config_file).is_file():
        raise ValueError(f"--config-file must name a YAML file, got {args.config_file!r}")
    for loss in args.losses:
        build_loss(make_config(args, loss))


def steps_wanted(typed: str | None) -> int | None:
    """The number of steps from --iters or DEMO_ITERS; None for the config's own.

    Raises:
        ValueError: not a whole number from 1 on.
    """
    name, value = ("--iters", typed) if typed else ("DEMO_ITERS", os.environ.get("DEMO_ITERS", ""))
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name} must be a whole number of steps, 1 or more, got {value!r}")
    return int(value)


def main() -> int:
    """Run the command line; the exit status."""
    args = parse()
    output = Path(args.output)
    if args.report_only:
        try:
            results = records.load(output / "results.json")
        except (FileNotFoundError, ValueError) as error:
            print(f"nothing to draw in {output}: {error}", file=sys.stderr)
            return 2
        report.write_report(results, output)
        print_results(results, output)
        return 0
    try:
        compare(args)
    except KeyboardInterrupt:
        if (output / "results.json").is_file():
            print(f"\nInterrupted. The finished runs are in {output / 'report.html'}.")
        else:
            print("\nInterrupted before the first run was finished.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
