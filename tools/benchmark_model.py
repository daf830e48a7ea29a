"""Training steps and inference of FocalRetinaNet, side by side with other detectors.

    python tools/benchmark_model.py                 # on the GPU if there is one
    python tools/benchmark_model.py --sizes 800x1216 --backbones 50 --batch 1 --parts step
    python tools/benchmark_model.py --quick         # does it run?

Also its anchor assignment and post-processing against Detectron2's, at 800x1216. Weights, images
and boxes are random, nothing is downloaded. FocalRetinaNet and Detectron2's RetinaNet must give the
same losses and detections with the same weights, or nothing is timed. All models take turns in one
process. Where the time of a step goes is measured in steps of their own.

Writes OUTPUT/<device>/benchmark_model.json; `make docs` makes the tables of it.
"""

import argparse
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # fvcore scripts its focal loss when it is imported; PyTorch warns that this will go.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*")
    from focal_det.benchmarks import models, parts

import torch
from tabulate import tabulate
from tqdm import tqdm

from focal_det.benchmarks import measure
from focal_det.benchmarks.losses import Shape
from focal_det.benchmarks.memory import allocators, on_cuda
from focal_det.losses import LOSS_REGISTRY

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "Base-FocalRetinaNet.yaml"
LABELS = {
    "focal_det": "FocalRetinaNet",
    "retinanet": "Detectron2 RetinaNet",
    "fcos": "Detectron2 FCOS",
    "faster_rcnn": "Detectron2 Faster R-CNN",
    "torchvision": "torchvision RetinaNet",
}
PARTS = ("step", "inference", "assignment", "postprocessing")
SECONDS = 15.0  # after which no further round of a case begins
SHARE_ROUNDS = 1
DIAGNOSTICS_ROUNDS = 3

Row = dict[str, Any]


class Disagreement(Exception):
    """Ours does not compute what Detectron2 computes."""


def main() -> int:
    """Run the command line; the exit status."""
    args = parse()
    logging.disable(logging.WARNING)  # models that say how they were built
    rows: list[Row] = []
    try:
        rows += time_models(args)
        for allocator in allocators(args.device):
            rows += time_parts(args, allocator)
    except Disagreement as failure:
        print(f"nothing is reported: {failure}", file=sys.stderr)
        return 1
    add_ratios(rows)
    typed = measure.without_option(sys.argv[1:], "--output")
    record = measure.make_record("benchmark_model", typed, args.device, args.seed, rows)
    print_tables(rows)
    print(f"\nWritten: {measure.save(record, args.output)}")
    return 0


def add_ratios(rows: Sequence[Row]) -> None:
    """Give each row its time over that of Detectron2's RetinaNet, or of its part."""
    groups = {
        "step": ("backbone", "size", "batch", "amp"),
        "inference": ("backbone", "size", "batch", "amp"),
        "assignment": ("size", "boxes", "allocator"),
        "postprocessing": ("size", "state", "allocator"),
    }
    for part, keys in groups.items():
        column, name = ("variant", "detectron2")
        if part in ("step", "inference"):
            column, name = ("model", LABELS["retinanet"])
        chosen = [row for row in rows if row["part"] == part]
        measure.add_ratio(chosen, keys, lambda row, c=column, n=name: row[c] == n)  # type: ignore[misc]


def time_models(args: argparse.Namespace) -> list[Row]:
    """Rows of steps, shares and inference of all models, backbones and sizes."""
    rows: list[Row] = []
    wanted = [part for part in ("step", "inference") if part in args.parts]
    for depth in args.backbones if wanted else ():
        check_parity(args, depth)
        candidates, broken = build_all(args, depth)
        prime(args, candidates, broken)
        for size, part in itertools.product(args.sizes, wanted):
            common = {
                "part": part,
                "backbone": f"R-{depth}",
                "size": shown(size),
                "batch": args.batch,
                "amp": args.amp,
            }
            rows += time_part(args, common, size, candidates, broken)
        if on_cuda(args.device) and "step" in wanted and LABELS["focal_det"] in candidates:
            rows.append(sync_row(args, depth, candidates[LABELS["focal_det"]]))
    return rows


def shown(size: tuple[int, int]) -> str:
    """A size as in the command line."""
    return f"{size[0]}x{size[1]}"


def wanted_models(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Label, kind and classification loss of each model."""
    for name in args.models:
        if name != "focal_det":
            yield LABELS[name], name, ""
            continue
        for loss in args.losses:
            yield LABELS[name] + ("" if loss == "FocalLoss" else f" ({loss})"), name, loss


def build_all(
    args: argparse.Namespace, depth: int
) -> tuple[dict[str, models.Candidate], dict[str, str]]:
    """The models by label, and why those that could not be built were not."""
    candidates, broken = {}, {}
    for label, name, loss in wanted_models(args):
        try:
            model = models.build(name, depth, CONFIG, loss or "FocalLoss", args.seed).train()
            candidates[label] = models.Candidate(name, model, args.device, args.amp)
        except Exception as error:
            broken[label] = reason(error)
    return candidates, broken


def reason(error: Exception) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def check_parity(args: argparse.Namespace, depth: int) -> None:
    """Compare FocalRetinaNet with Detectron2's RetinaNet.

    Raises:
        Disagreement: they differ.
    """
    if not {"focal_det", "retinanet"} <= set(args.models):
        return
    ours, theirs = (
        models.Candidate(name, models.build(name, depth, CONFIG).train(), args.device)
        for name in ("focal_det", "retinanet")
    )
    wrong = models.parity(ours, theirs, models.random_scenes(min(args.sizes), 2, args.seed))
    if wrong:
        raise Disagreement(f"FocalRetinaNet and RetinaNet with R-{depth}: {wrong}")


def prime(
    args: argparse.Namespace, candidates: dict[str, models.Candidate], broken: dict[str, str]
) -> None:
    """A first small step, which allocates what stays; models that fail go to `broken`."""
    scenes = models.random_scenes(min(args.sizes), 1, args.seed)
    for label in list(candidates):
        try:
            candidates[label].step(candidates[label].inputs(scenes))
        except Exception as error:
            broken[label] = reason(error)
            del candidates[label]


def time_part(
    args: argparse.Namespace,
    common: Row,
    size: tuple[int, int],
    candidates: dict[str, models.Candidate],
    broken: dict[str, str],
) -> list[Row]:
    """Rows of one part of the work at one size, ``step`` with its shares."""
    scenes, training = models.random_scenes(size, args.batch, args.seed), common["part"] == "step"
    for candidate in candidates.values():
        candidate.model.train(training)

    def call(candidate: models.Candidate, inputs: Any) -> Callable[[], object]:
        run = candidate.step if training else candidate.detect
        return lambda: run(inputs)

    inputs = {label: candidate.inputs(scenes) for label, candidate in candidates.items()}
    calls = {label: call(candidates[label], inputs[label]) for label in candidates}
    description = f"{common['backbone']} {common['size']} {common['part']}"
    timings = run_paired(args, calls, description)
    rows = []
    for label, timing in timings.items():
        images_per_s = args.batch / timing.median_ms * 1e3
        rows.append({**common, "model": label, "images_per_s": images_per_s, **timing.fields()})
    for label, why in broken.items():
        fields = measure.not_measured(why)
        rows.append({**common, "model": label, "images_per_s": None, **fields})
    if training:
        rows += [share_row(common, label, candidates[label], inputs[label]) for label in candidates]
        ours = LABELS["focal_det"]
        if ours in candidates:
            cost = models.diagnostics_cost(candidates[ours], inputs[ours], DIAGNOSTICS_ROUNDS)
            rows.append({**common, "part": "diagnostics", "model": ours, **cost, "error": None})
    return rows


def share_row(common: Row, label: str, candidate: models.Candidate, inputs: Any) -> Row:
    """Where the time of a step goes."""
    step_ms, parts_ms = models.step_parts(candidate, inputs, SHARE_ROUNDS)
    shares = {"step_ms": step_ms, "parts_ms": parts_ms, "error": None}
    return {**common, "part": "shares", "model": label, **shares}


def sync_row(args: argparse.Namespace, depth: int, candidate: models.Candidate) -> Row:
    """Whether a training step makes the host wait for the GPU."""
    candidate.model.train()
    scenes = models.random_scenes(min(args.sizes), args.batch, args.seed)
    message = models.find_sync(candidate, scenes)
    return {
        "part": "sync",
        "model": LABELS["focal_det"],
        "backbone": f"R-{depth}",
        "size": shown(min(args.sizes)),
        "batch": args.batch,
        "passed": message is None,
        "error": message,
    }


def time_parts(args: argparse.Namespace, allocator: str) -> list[Row]:
    """Rows of anchor assignment and post-processing, built-in and ours.

    Raises:
        Disagreement: the results differ.
    """
    cases: list[Iterable[parts.Case]] = []
    if "assignment" in args.parts:
        cases.append(parts.assignment_cases(args.shape, args.boxes, args.seed, args.device))
    if "postprocessing" in args.parts:
        cases.append(parts.postprocessing_cases(args.shape, args.seed, CONFIG, args.device))
    rows = []
    for common, calls, wrong in itertools.chain(*cases):
        name = f"{common['part']} {common.get('boxes') or common.get('state')}"
        if wrong:
            raise Disagreement(f"{name}: {wrong}")
        cold = on_cuda(args.device) or allocator == "cold"
        timings = run_paired(args, calls, f"{allocator} {name}", with_peak=cold)
        rows += [
            {**common, "allocator": allocator, "variant": variant, **timing.fields()}
            for variant, timing in timings.items()
        ]
    return rows


def run_paired(
    args: argparse.Namespace,
    calls: dict[str, Callable[[], Any]],
    description: str,
    with_peak: bool = True,
) -> dict[str, measure.Timing]:
    """Time the calls in turns below a progress bar."""
    total = len(calls) * (args.rounds + 1)
    with tqdm(total=total, desc=description, unit="call", dynamic_ncols=True, leave=False) as bar:
        return measure.measure(
            calls,
            args.rounds,
            device=args.device,
            seconds=SECONDS,
            with_peak=with_peak,
            progress=bar.update,
        )


def print_tables(rows: Sequence[Row]) -> None:
    """All rows on the console, a table for each part."""
    for part in dict.fromkeys(row["part"] for row in rows):
        chosen = [row for row in rows if row["part"] == part]
        hidden = ("amp", "error", "parts_ms")
        names = [name for name in measure.ROW_FIELDS[part] if name not in hidden]
        table = [[row.get(name) for name in names] + [notes(row)] for row in chosen]
        print(f"\n{part}\n" + tabulate(table, [*names, ""], floatfmt=".3g", missingval="-"))


def notes(row: Row) -> str:
    """What a table's last column says of a row: its error, or its parts."""
    shares = row.get("parts_ms") or {}
    told = ", ".join(f"{name} {ms / row['step_ms']:.0%}" for name, ms in shares.items())
    return row["error"] or told


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message where it cannot be carried out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", metavar="HxW")
    parser.add_argument("--batch", type=int, help="default 1 on the CPU, 16 on a GPU")
    parser.add_argument("--backbones", nargs="+", type=int, default=[18, 50], choices=[18, 50])
    parser.add_argument("--models", nargs="+", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--losses", nargs="+", default=["FocalLoss"], help="of FocalRetinaNet")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--amp", choices=list(models.AMP), help="default none on the CPU, else fp16"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny images, two rounds, all parts")
    parser.add_argument("--output", type=Path, help="folder; default tools/results")
    args = parser.parse_args(argv)
    cuda = on_cuda(args.device)
    args.amp = args.amp or ("fp16" if cuda else "none")
    args.sizes = args.sizes or (["512x512", "800x1333"] if cuda else ["256x256", "512x512"])
    args.batch = args.batch or (16 if cuda else 1)
    args.shape, args.boxes = Shape(800, 1216, models.CLASSES), parts.BOX_COUNTS
    # A quick run says nothing of performance: it must not replace a record that does.
    args.output = args.output or ROOT / ("output/benchmarks" if args.quick else "tools/results")
    if args.quick:
        args.sizes, args.batch, args.rounds, args.backbones = ["64x96"], 1, 2, [18]
        args.shape, args.boxes = Shape(128, 192, models.CLASSES), (1, 30)
    try:
        args.sizes = [(int(h), int(w)) for h, w in (size.split("x") for size in args.sizes)]
    except ValueError:
        parser.error(f"--sizes must be HEIGHTxWIDTH, got {' '.join(args.sizes)}")
    if min(args.batch, args.rounds, *itertools.chain(*args.sizes)) < 1:
        parser.error("--batch, --rounds and the numbers of --sizes must be 1 or more")
    unknown = [name for name in args.losses if name not in LOSS_REGISTRY]
    if unknown:
        parser.error(f"--losses: {unknown[0]!r} is not in LOSS_REGISTRY")
    return args


if __name__ == "__main__":
    sys.exit(main())
