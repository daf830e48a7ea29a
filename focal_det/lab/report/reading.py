"""One record, read and checked, so that what shows it can rely on its form.

Numbers that a record lacks, or that are not finite, are None.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from focal_det.analysis import records
from focal_det.lab.summary import MEASURES, find_winner, leaves, rank_correlation
from focal_det.lab.trial_records import read_record
from focal_det.safe_loading import load_yaml

SUMMARY_PARTS = frozenset(
    {
        "table", "title", "source", "rows", "kendall_tau", "winner", "verdict", "commits",
        "devices", "iterations", "data",
    }
)  # fmt: skip
ROW_PARTS = frozenset({"label", "seeds", "diverged", "paper", "metrics", "rank", "paper_rank"})
# What summaries of earlier versions lack.
SINCE: dict[str, Any] = {"speed": False, "unequal": {}}
ROW_SINCE: dict[str, Any] = {
    **dict.fromkeys(MEASURES),
    "differs": "",
    "overrides": {},
    "not_measured": {},
}


def read_trial(path: Path) -> dict[str, Any]:
    """A record of :func:`focal_det.lab.running.run_trial`.

    Args:
        path: of the file.

    Returns:
        The record, and ``settings``: its config by dotted keys, and ``processes``.

    Raises:
        OSError, ValueError: the file cannot be read, or is no such record; a part is named.
    """
    record = read_record(path)
    clock, machine = record["inference_ms"] or {}, record["environment"]
    return {
        **record,
        "inference_ms": {name: clock.get(name) for name in ("median", "p95")},
        "curves": _curves(record["curves"]),
        "environment": {**machine, "device": str(machine["device"])},
        "settings": {
            "processes": str(record["processes"]),
            **_settings(load_yaml(io.StringIO(record["config"]))),
        },
    }


def _curves(curves: Mapping[str, Any]) -> dict[str, list[Any]]:
    iterations = curves.get("iteration", [])
    made = {"iteration": list(iterations)}
    for name in records.SCALARS:
        values = curves.get(name, [None] * len(iterations))
        if len(values) != len(iterations):
            raise ValueError(f"the curve of {name} has not a value an iteration")
        made[name] = [records.finite(value) for value in values]
    return made


def read_summary(path: Path) -> dict[str, Any]:
    """What ``tools/ablate.py`` keeps of a table.

    Raises:
        OSError, ValueError: the file cannot be read, or is no such summary.
    """
    content = _mapping(json.loads(path.read_text(encoding="utf-8")))
    missing = SUMMARY_PARTS - content.keys()
    rows = [] if missing else [dict(_mapping(row)) for row in content["rows"]]
    missing |= {name for row in rows for name in ROW_PARTS - row.keys()}
    if missing:
        raise ValueError(f"no summary of tools/ablate.py: it lacks {', '.join(sorted(missing))}")
    rows = [ROW_SINCE | row for row in rows]
    # Drawn anew: what is said of a winner must not hang on the version that kept the numbers.
    winner, verdict = find_winner(rows, _mapping(content.get("unequal", {})))
    told = {"winner": winner, "verdict": verdict, "kendall_tau": rank_correlation(rows)}
    return {**SINCE, **content, "rows": rows, **told}


def read_settings(path: Path) -> dict[str, str]:
    """A ``config.yaml`` by dotted keys.

    Raises:
        OSError, ValueError, yaml.YAMLError: the file cannot be read, or holds no config.
    """
    with path.open(encoding="utf-8") as file:
        return _settings(load_yaml(file))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.json``, each iteration as it was run last.

    A training that goes on from a checkpoint, or begins anew in the same folder, adds its lines.

    Raises:
        OSError, ValueError: the file cannot be read, or holds something else.
    """
    lines = records.read_metrics(path)
    if not all(isinstance(line, dict) and isinstance(line.get("iteration"), int) for line in lines):
        raise ValueError("a line is not one that Detectron2 writes")
    if not lines and path.stat().st_size:
        raise ValueError("its first line is no JSON")
    kept: list[dict[str, Any]] = []
    for line in lines:
        while kept and _is_outrun(kept[-1], line):
            kept.pop()
        kept.append(line)
    return kept


def _is_outrun(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a line is of an iteration that was run again; one may have two lines, for losses
    and for an evaluation."""
    if old["iteration"] != new["iteration"]:
        return bool(old["iteration"] > new["iteration"])
    return len(old.keys() & new.keys()) > 1


def _settings(content: Any) -> dict[str, str]:
    """A config as dotted keys and values as text."""
    return {key: str(value) for key, value in leaves("", _mapping(content))}


def _mapping(content: Any) -> Mapping[Any, Any]:
    if not isinstance(content, Mapping):
        raise ValueError("does not map names to values")
    return content
