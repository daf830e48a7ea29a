"""What was aimed at, and whether the rows of a benchmark reach it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

OURS = ("torch", "triton", "focal_det")
"""Variants of ours that are used; ``eager`` is a twin to compare with."""

SHAPE = "800x1216 K=80"
FOCAL = "FL gamma 2 alpha .25"
OUR_MODEL, THEIR_MODEL = "FocalRetinaNet", "Detectron2 RetinaNet"


@dataclass(frozen=True)
class Target:
    """One aim.

    Attributes:
        name: what is measured.
        goal: in words.
        measured: in words; empty where it was not measured.
        met: whether the goal is reached; None where it was not measured.
    """

    name: str
    goal: str
    measured: str = ""
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """``met``, ``**missed**`` or nothing."""
        return {True: "met", False: "**missed**", None: ""}[self.met]


def find_targets(rows: Sequence[Row], device: str) -> list[Target]:
    """All aims for a device, with what its rows say.

    Args:
        rows: of all records of one device.
        device: ``"cpu"`` or ``"cuda"``.
    """
    measured = [row for row in rows if row["error"] is None and row["part"] != "shares"]
    return _gpu(measured, rows) if device == "cuda" else _cpu(measured)


def _cpu(rows: Sequence[Row]) -> list[Target]:
    ours = pick(rows, part="loss", variant="torch", dtype="float32", shape=SHAPE)
    ours = pick(ours, mode="forward+backward")
    elementwise = [row for row in ours if "OHEM" not in row["loss"]]
    targets = [
        _worst(f"{name}, {SHAPE}, time, {allocator}", text, limit, "ratio",
               pick(chosen, allocator=allocator), as_ratio)
        for allocator, text, limit in (("cold", "<= 1/12", 1 / 12), ("warm", "<= 1/5", 1 / 5))
        for name, chosen in (("focal loss", pick(ours, loss=FOCAL)),
                             ("slowest of the elementwise losses", elementwise))
    ]  # fmt: skip
    targets += _loss_peaks(
        rows, "torch", {"of its tensors": "tensors_s", "of the process": "peak_s"}
    )
    assignment = pick(rows, part="assignment", variant="focal_det")
    trained = pick(rows, part="postprocessing", variant="focal_det", state="trained")
    for allocator, text, limit in (("cold", "<= 1/4", 1 / 4), ("warm", "<= 1/1.3", 1 / 1.3)):
        found = pick(assignment, boxes=300, allocator=allocator)
        name = f"assignment, 300 boxes, time, {allocator}"
        targets.append(_worst(name, text, limit, "ratio", found, as_ratio))
    targets.append(_assignment_peak(assignment))
    for allocator in ("cold", "warm"):
        found = pick(trained, allocator=allocator)
        name = f"post-processing, trained model, time, {allocator}"
        targets.append(_worst(name, "<= 1/2.4", 1 / 2.4, "ratio", found, as_ratio))
    steps = pick(rows, part="step", model=OUR_MODEL)
    steps = [row for row in steps if row["ratio"] is not None]
    name = "training step, time, worst case"
    targets.append(_worst(name, "never slower", 1.0, "ratio", steps, as_ratio))
    return [*targets, _diagnostics(rows)]


def _gpu(rows: Sequence[Row], all_rows: Sequence[Row]) -> list[Target]:
    ours = pick(rows, part="loss", variant="triton", mode="forward+backward")
    elementwise = [row for row in ours if row["shape"] == SHAPE and "OHEM" not in row["loss"]]
    focal = pick(elementwise, loss=FOCAL, dtype="float32", images=16)
    assignment = pick(rows, part="assignment", variant="focal_det")
    steps = pick(rows, part="step", model=OUR_MODEL, backbone="R-50", size="800x1333")
    steps = [row for row in steps if row["batch"] == 16 and row["amp"] != "none"]
    of_300 = pick(assignment, boxes=300, allocator="warm")
    return [
        _worst(f"elementwise losses, {SHAPE}, time over a copy's", "<= 1.3x", 1.3, "floor_ratio",
               elementwise, as_factor),
        _worst(f"focal loss, {SHAPE}, 16 images, time", "<= 1/25", 1 / 25, "ratio", focal,
               as_ratio),
        *_loss_peaks(rows, "triton", {"of its tensors": "tensors_s"}),
        _worst("assignment, 300 boxes, time", "<= 1/1.3", 1 / 1.3, "ratio", of_300, as_ratio),
        _assignment_peak(assignment),
        _syncs(pick(all_rows, part="sync")),
        _worst("training step, R-50, 16 images of 800x1333, AMP, time", "<= 1/1.25", 1 / 1.25,
               "ratio", steps, as_ratio),
        _step_peak(steps, pick(rows, part="step", model=THEIR_MODEL)),
        _diagnostics(rows),
    ]  # fmt: skip


def _loss_peaks(rows: Iterable[Row], variant: str, fields: dict[str, str]) -> list[Target]:
    # The scratch space of a block is of a fixed size: at smaller shapes it outweighs the gradient.
    chosen = pick(rows, part="loss", variant=variant, mode="forward+backward", shape=SHAPE)
    return [
        _worst(
            f"losses, {SHAPE}, peak memory {whose}, the worst of all",
            *("<= 1.05 S", 1.05, field, chosen),
            lambda value: f"{value:.2f} S",
        )
        for whose, field in fields.items()
    ]


def _assignment_peak(rows: Iterable[Row]) -> Target:
    chosen = [row for row in pick(rows, boxes=1000) if row["peak_mib"] is not None]
    name = "assignment, 1000 boxes, peak memory"
    return _worst(name, "< 30 MiB", 30.0, "peak_mib", chosen, lambda value: f"{value:.1f} MiB")


def _syncs(rows: Sequence[Row]) -> Target:
    name = "training step, waits for the GPU"
    if not rows:
        return Target(name, "none")
    met = all(row["passed"] for row in rows)
    return Target(name, "none", "none" if met else "some", met)


def _diagnostics(rows: Iterable[Row]) -> Target:
    name, chosen = (
        "diagnostics, share of a training step, worst case",
        pick(rows, part="diagnostics"),
    )
    return _worst(name, "<= 1%", 0.01, "share", chosen, lambda value: f"{value:.2%}")


def _step_peak(ours: Sequence[Row], theirs: Iterable[Row]) -> Target:
    name = "training step, R-50, 16 images of 800x1333, AMP, peak memory"
    keys = ("backbone", "size", "batch", "amp")
    peaks = {tuple(row[key] for key in keys): row["peak_mib"] for row in theirs}
    pairs = [(row["peak_mib"], peaks.get(tuple(row[key] for key in keys))) for row in ours]
    known = [mine / other for mine, other in pairs if mine is not None and other]
    if not known:
        return Target(name, "<= 0.75x")
    return Target(name, "<= 0.75x", as_factor(max(known)), max(known) <= 0.75)


def _worst(
    name: str,
    goal: str,
    limit: float,
    field: str,
    rows: Sequence[Row],
    show: Callable[[float], str],
) -> Target:
    """An aim that the row with the highest value decides; it is named where there are several."""
    known = [row for row in rows if row[field] is not None]
    if not known:
        return Target(name, goal)
    worst = max(known, key=lambda row: row[field])
    told = [worst.get(key) for key in ("loss", "dtype", "shape", "backbone")]
    if worst["part"] == "step":
        told.append(worst["size"])
    named = f" ({', '.join(x for x in told if x)})" if len(known) > 1 else ""
    return Target(name, goal, show(worst[field]) + named, worst[field] <= limit)


def as_ratio(value: float) -> str:
    """A time over Detectron2's: ``1/12.3`` where it is faster, ``1.30x`` where it is slower."""
    return f"1/{1 / value:.1f}" if value < 0.995 else f"{value:.2f}x"


def as_factor(value: float) -> str:
    """``1.30x``."""
    return f"{value:.2f}x"


def pick(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in values.items())]
