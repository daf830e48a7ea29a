"""Measuring calls side by side, and the records that hold what was measured.

A record is a dictionary that JSON can hold: what ran, where, on which commit and versions, and a
list of rows. Nothing here knows what is measured.
"""

import datetime
import gc
import importlib.metadata
import json
import math
import os
import re
import shlex
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from focal_det.analysis import records

from .memory import on_cuda, peak_mib

SCHEMA = 1
MIN_ROUNDS = 3
QUEUE_MS = 8.0
"""Work in a GPU's queue ahead of a call: more than the host takes to launch a loss that does not
wait for the GPU."""

RECORD_FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "tool": str,
    "command": str,
    "commit": (str, type(None)),
    "dirty": bool,
    "versions": dict,
    "device": dict,
    "date": str,
    "seed": int,
    "rows": list,
}
VERSIONS = ("python", "torch", "torchvision", "detectron2", "fvcore")
TIMING_FIELDS = ("median_ms", "quartile_low_ms", "quartile_high_ms", "rounds", "peak_mib")
MEASURED = (*TIMING_FIELDS, "error")
ROW_FIELDS: dict[str, tuple[str, ...]] = {
    "loss": (
        *("loss", "variant", "dtype", "mode", "shape", "images", "allocator"),
        *("peak_s", "tensors_s", "ratio", "floor_ratio", *MEASURED),
    ),
    "step": ("model", "backbone", "size", "batch", "amp", "images_per_s", "ratio", *MEASURED),
    "inference": ("model", "backbone", "size", "batch", "amp", "images_per_s", "ratio", *MEASURED),
    "shares": ("model", "backbone", "size", "batch", "amp", "step_ms", "parts_ms", "error"),
    "diagnostics": (
        *("model", "backbone", "size", "batch", "amp"),
        *("step_ms", "ordinary_ms", "look_ms", "share", "error"),
    ),
    "assignment": ("variant", "size", "boxes", "allocator", "ratio", *MEASURED),
    "postprocessing": ("variant", "size", "state", "candidates", "allocator", "ratio", *MEASURED),
    "sync": ("model", "backbone", "size", "batch", "passed", "error"),
}
"""Fields of a row by its ``part``; ``error`` says why a row has no numbers, else it is None."""


@dataclass(frozen=True)
class Timing:
    """What one variant took.

    Attributes:
        median_ms, quartile_low_ms, quartile_high_ms: of the wall time of a call.
        rounds: number of timed calls.
        peak_mib: memory that one call takes above what was allocated before it; None where that
            cannot be known.
    """

    median_ms: float
    quartile_low_ms: float
    quartile_high_ms: float
    rounds: int
    peak_mib: float | None

    def fields(self) -> dict[str, Any]:
        """As the fields of a row that was measured."""
        return {**asdict(self), "error": None}


def not_measured(reason: str) -> dict[str, Any]:
    """The fields of a row without numbers, and why it has none."""
    return {**dict.fromkeys(TIMING_FIELDS), "error": reason}


def measure(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    device: str = "cpu",
    warmup: int = 1,
    seconds: float | None = None,
    with_peak: bool = True,
    queued: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time several calls in turns, so that what drifts hits all of them alike.

    Args:
        variants: by name; what a call returns is dropped.
        rounds: timed calls of each, at most.
        device: ``"cpu"`` or a CUDA device, on which the GPU's own time is taken.
        warmup: untimed calls of each, at least 1; the last one is the one whose memory is measured.
        seconds: no further round is begun after this time, once there are :data:`MIN_ROUNDS`.
        with_peak: whether to measure memory. On the CPU it shows nothing with a warm allocator.
        queued: whether a GPU has other work to do while the host launches a call, as it has in the
            middle of a training step. Else the GPU's waiting for the host is part of the time.
        clock: seconds, for the CPU.
        progress: called after each call.
    """
    timed = _cuda_timer(device, queued) if on_cuda(device) else _cpu_timer(clock)
    gc.collect()  # what went before must not be freed in the middle
    peaks: dict[str, float | None] = dict.fromkeys(variants)
    for name, call in variants.items():
        for _ in range(warmup - 1):
            call()
        if with_peak:
            peaks[name] = peak_mib(call, device)
        else:
            call()
        progress()
    times: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    try:
        begin = clock()
        for finished in range(rounds):
            late = seconds is not None and clock() - begin > seconds
            if late and finished >= MIN_ROUNDS:
                break
            for name, call in variants.items():
                times[name].append(timed(call))
                progress()
    finally:
        gc.enable()
    return {name: summarize(times[name], peaks[name]) for name in variants}


def summarize(times: Sequence[float], peak: float | None) -> Timing:
    """Median and quartiles of wall times in milliseconds.

    Args:
        times: at least one.
        peak: extra memory in MiB.
    """
    low, median, high = times[0], times[0], times[0]
    if len(times) > 1:
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high, len(times), peak)


_Timer = Callable[[Callable[[], object]], float]
"""From a call to its milliseconds."""


def _cpu_timer(clock: Callable[[], float]) -> _Timer:
    def timed(call: Callable[[], object]) -> float:
        begin = clock()
        call()
        return (clock() - begin) * 1e3

    return timed


def _cuda_timer(device: str, queued: bool) -> _Timer:
    mib = 2**20
    # Filling it empties the cache of what the last call left there, and keeps the GPU busy while
    # the host queues the call's kernels.
    flush = torch.empty(256 * mib, dtype=torch.int8, device=device)

    def timed(call: Callable[[], object], fills: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(fills):
            flush.zero_()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end))

    timed(flush.zero_, 1)
    fills = math.ceil(QUEUE_MS / timed(flush.zero_, 1)) if queued else 1
    return lambda call: timed(call, fills)


def add_ratio(
    rows: Sequence[dict[str, Any]],
    keys: Sequence[str],
    is_baseline: Callable[[dict[str, Any]], bool],
    field: str = "ratio",
) -> None:
    """Give each row its median time over that of the baseline it belongs to, or None.

    Args:
        rows: changed in place.
        keys: fields in which a row and its baseline agree.
        is_baseline: tells the baselines.
        field: to write.
    """

    def group(row: dict[str, Any]) -> Hashable:
        return tuple(row[key] for key in keys)

    base = {group(row): row["median_ms"] for row in rows if is_baseline(row) and row["median_ms"]}
    for row in rows:
        known = row["median_ms"] is not None and group(row) in base
        row[field] = row["median_ms"] / base[group(row)] if known else None


def describe_device(device: str = "cpu") -> dict[str, Any]:
    """``type`` ("cpu" or "cuda"), ``name`` of the model, ``threads`` (CPU; else None)."""
    if on_cuda(device):
        return {"type": "cuda", "name": torch.cuda.get_device_name(device), "threads": None}
    return {"type": "cpu", "name": records.cpu_name(), "threads": torch.get_num_threads()}


def slug(device: dict[str, Any]) -> str:
    """A device as the name of a folder.

    Args:
        device: of :func:`describe_device`.
    """
    threads = f" {device['threads']} threads" if device["type"] == "cpu" else ""
    name = device["name"].replace("(R)", "").replace("(TM)", "") + threads
    prefix = "cpu " if device["type"] == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", (prefix + name).lower()).strip("-")


def make_record(
    tool: str, arguments: Sequence[str], device: str, seed: int, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """A record of one run, as of now.

    Args:
        tool: name of the script, without ``.py``.
        arguments: of the command line, without paths.
        device: what it ran on.
        seed: of the inputs.
        rows: what was measured; see :data:`ROW_FIELDS`.
    """
    environment = records.environment(device)
    commit = environment["commit"]
    versions = {name: environment[name] for name in VERSIONS if name in environment}
    versions |= {name: _version(name) for name in ("fvcore", "triton")}
    return {
        "schema": SCHEMA,
        "tool": tool,
        "command": shlex.join(["python", f"tools/{tool}.py", *arguments]),
        "commit": commit.removesuffix("-dirty") if commit else None,
        "dirty": bool(commit and commit.endswith("-dirty")),
        "versions": versions,
        "device": describe_device(device),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seed": seed,
        "rows": rows,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def without_option(arguments: Sequence[str], name: str) -> list[str]:
    """A command line without the option `name` and its value, which is a path."""
    kept, skip = [], False
    for word in arguments:
        if not skip and word != name and not word.startswith(f"{name}="):
            kept.append(word)
        skip = word == name
    return kept


def validate(record: Any) -> None:
    """Check that a record is whole.

    Raises:
        ValueError: says what is missing, or of the wrong type.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record is a dictionary, got {type(record).__name__}")
    for name, kind in RECORD_FIELDS.items():
        if name not in record:
            raise ValueError(f"the record has no {name!r}")
        if not isinstance(record[name], kind):
            raise ValueError(f"the record's {name!r} must not be {type(record[name]).__name__}")
    if record["schema"] != SCHEMA:
        raise ValueError(f"the record is of schema {record['schema']}, known is {SCHEMA}")
    for name in VERSIONS:
        if not record["versions"].get(name):
            raise ValueError(f"the record's versions have no {name!r}")
    for name in ("type", "name", "threads"):
        if name not in record["device"]:
            raise ValueError(f"the record's device has no {name!r}")
    if not record["rows"]:
        raise ValueError("the record has no rows")
    for index, row in enumerate(record["rows"]):
        _validate_row(index, row)


def _validate_row(index: int, row: Any) -> None:
    part = row.get("part") if isinstance(row, dict) else None
    if part not in ROW_FIELDS:
        raise ValueError(f"row {index} is of no known part: {part!r}")
    missing = [name for name in ROW_FIELDS[part] if name not in row]
    if missing:
        raise ValueError(f"row {index} ({part}) has no {missing[0]!r}")
    if row["error"] is None and row.get("median_ms", 0.0) is None:
        raise ValueError(f"row {index} ({part}) has neither a time nor an error")


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write a record to ``FOLDER/<device>/<tool>.json``, in the place of an earlier one.

    Returns:
        The file.

    Raises:
        ValueError: the record is not whole, or holds a number that is not finite.
    """
    validate(record)
    path = Path(folder) / slug(record["device"]) / f"{record['tool']}.json"
    os.makedirs(path.parent, exist_ok=True)
    records.save(record, path)
    return path


def load_all(folder: Path) -> list[dict[str, Any]]:
    """All records below a folder, by path.

    Raises:
        ValueError: one is not whole; the file is named.
    """
    found = []
    for path in sorted(Path(folder).glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        try:
            validate(record)
        except ValueError as error:
            raise ValueError(f"{path.parent.name}/{path.name}: {error}") from None
        found.append(record)
    return found
