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
NUMBERS = (
    *("images_per_second", "parameters", "gflops", "background_per_foreground"),
    "peak_memory_mib",
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
    """A record of :func:`focal_det.lab.running.run_trial`; what is not finite in it is None.

    Args:
        path: of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such record; file and part are named.
    """
    record = records.load_of_schema(path, SCHEMA)
    for name, kind in PARTS.items():
        value = record.get(name, ...)  # of no kind, while a missing null would pass as one
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{path}: {name} is missing or of another kind")
    parts = record["data"]
    if len(parts) != 2 or not all(_is_names(part) for part in parts):
        raise ValueError(f"{path}: data must be two lists of names, got {parts!r}")
    made = {**SINCE, **record}
    for name in ("annotations", "not_measured"):
        if not isinstance(made[name], Mapping):
            raise ValueError(f"{path}: {name} must map names to texts, got {made[name]!r}")
    try:
        made |= {name: _number(name, made[name]) for name in NUMBERS}
        made["metrics"] = dict.fromkeys(records.METRICS) | _numbers("metrics", record["metrics"])
        if made["inference_ms"] is not None:
            made["inference_ms"] = _numbers("inference_ms", made["inference_ms"])
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    made["environment"] = {"commit": None, "device": "unknown", **record["environment"]}
    for name in ("commit", "device"):
        value = made["environment"][name]
        if not isinstance(value, (str, type(None))):
            raise ValueError(f"{path}: environment: {name} must be text, got {value!r}")
    return made


def _is_names(part: Any) -> bool:
    """Whether it is a list of one or more texts."""
    return isinstance(part, list) and bool(part) and all(isinstance(name, str) for name in part)


def _numbers(name: str, values: Any) -> dict[str, float | None]:
    """A mapping of :func:`_number`.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} must have numbers by name, got {values!r}")
    return {key: _number(f"{name}: {key}", value) for key, value in values.items()}


def _number(name: str, value: Any) -> float | None:
    """A number as it is; None where it is not finite.

    Raises:
        TypeError: it is of another kind.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or null, got {value!r}")
    return value if math.isfinite(value) else None


def load_setting(record: Mapping[str, Any]) -> CfgNode:
    """The config of a record.

    Raises:
        ValueError: it cannot be read; the record is named.
    """
    try:
        return CfgNode.load_cfg(record["config"])
    except (AssertionError, AttributeError, TypeError, ValueError, YAMLError) as error:
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
        OSError, ValueError: see :func:`read_record`; or a file has another trial's name.
    """
    found = {}
    for key in keys:
        path = output / "records" / f"{key}.json"
        if path.is_file():
            found[key] = read_record(path)
            if found[key]["key"] != key:
                raise ValueError(f"{path}: it is the record of {found[key]['key']}")
    return found
