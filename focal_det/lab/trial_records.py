"""The record of a trial: one JSON file, of a form that everything that reads it can rely on."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from yaml import YAMLError

from focal_det.analysis import records

SCHEMA = 1
# What is measured besides the metrics; None where it could not be.
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
PARTS: dict[str, type | tuple[type, ...]] = {
    "key": str,
    "table": str,
    "label": str,
    "overrides": Mapping,
    "seed": int,
    "iterations": int,
    "data": list,
    "metrics": Mapping,
    "curves": Mapping,
    "environment": Mapping,
    "error": (str, type(None)),
    "config": str,
}
# What records of earlier versions lack.
SINCE: dict[str, Any] = {
    **dict.fromkeys(FACTS), "annotations": {}, "not_measured": {}, "processes": 1,
}  # fmt: skip


def read_record(path: Path) -> dict[str, Any]:
    """A record of :func:`focal_det.lab.running.run_trial`.

    Args:
        path: of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such record; file and part are named.
    """
    record = records.load_of_schema(path, SCHEMA)
    for name, kind in PARTS.items():
        if not isinstance(record.get(name), kind) or isinstance(record[name], bool):
            raise ValueError(f"{path}: {name} is missing or of another kind")
    problem = _find_problem(record)
    if problem:
        raise ValueError(f"{path}: {problem}")
    environment = {"commit": None, "device": "unknown", **record["environment"]}
    metrics = {**dict.fromkeys(records.METRICS), **record["metrics"]}
    return {**SINCE, **record, "metrics": metrics, "environment": environment}


def _find_problem(record: Mapping[str, Any]) -> str | None:
    """What in a record would stumble its readers, or None."""
    for name, value in record["metrics"].items():
        if value is not None and not _is_number(value):
            return f"metrics: {name} must be a number or null, got {value!r}"
    for part in record["data"]:
        if not isinstance(part, list) or not all(isinstance(name, str) for name in part):
            return f"data must be lists of names, got {part!r}"
    times = record.get("inference_ms")
    if times is not None and not (
        isinstance(times, Mapping) and all(map(_is_number, times.values()))
    ):
        return f"inference_ms must have numbers by name, got {times!r}"
    return None


def _is_number(value: Any) -> bool:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and math.isfinite(value)


def load_setting(record: Mapping[str, Any]) -> CfgNode:
    """The config of a record.

    Raises:
        ValueError: it cannot be read; the record is named.
    """
    try:
        return CfgNode.load_cfg(record["config"])
    except (AttributeError, TypeError, ValueError, YAMLError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"record {record['key']}: its config cannot be read: {told}") from error


def save_record(record: dict[str, Any], output: Path) -> None:
    """Write a record below the folder of its sweep."""
    folder = output / "records"
    folder.mkdir(parents=True, exist_ok=True)
    records.save(record, folder / f"{record['key']}.json")


def load_records(output: Path, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The records that there are of some trials, by key.

    Args:
        output: folder of the sweep.
        keys: of trials.

    Raises:
        OSError, ValueError: see :func:`read_record`.
    """
    paths = {key: output / "records" / f"{key}.json" for key in keys}
    return {key: read_record(path) for key, path in paths.items() if path.is_file()}
