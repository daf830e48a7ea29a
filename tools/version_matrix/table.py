"""Records of combinations, and the table that is made of them."""

import datetime
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from focal_det.analysis import records

from .combinations import DETECTRON2, Combination

SCHEMA = 1


def empty_record(combination: Combination, quick: bool) -> dict[str, Any]:
    """A record of what has not run yet."""
    commit = records.commit()
    return {
        "schema": SCHEMA,
        **asdict(combination),
        "status": "not made",
        "reason": None,
        "detectron2_from": None,
        "versions": None,
        "selection": "quick" if quick else "full",
        **dict.fromkeys(("passed", "failed", "skipped", "seconds")),
        "failures": [],
        "known": [],
        "commit": commit.removesuffix("-dirty") if commit else None,
        "dirty": bool(commit and commit.endswith("-dirty")),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write a record in the place of an earlier one of its combination.

    Returns:
        The file.
    """
    combination = Combination(*(record[name] for name in ("python", "torch", "detectron2")))
    path = _path(combination, folder)
    os.makedirs(path.parent, exist_ok=True)
    records.save(record, path)
    return path


def has(combination: Combination, folder: Path) -> bool:
    """Whether there is a record of a combination."""
    return _path(combination, folder).is_file()


def _path(combination: Combination, folder: Path) -> Path:
    return folder / combination.pair / f"detectron2-{combination.detectron2}.json"


def load_all(folder: Path) -> list[dict[str, Any]]:
    """All records below a folder.

    Raises:
        ValueError: one is of another schema; the file is named.
    """
    return [records.load_of_schema(path, SCHEMA) for path in sorted(folder.glob("*/*.json"))]


def render(found: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of records, notes on failures, and a line on when and where they ran."""
    order = list(DETECTRON2)
    rows = sorted(
        found,
        key=lambda record: (
            numbers(record["python"]), numbers(record["torch"]), order.index(record["detectron2"]),
        ),
    )  # fmt: skip
    if not rows:
        return "Nothing has been run yet.\n"
    causes = list(dict.fromkeys(text for record in rows for text in known_causes(record)))
    lines = [
        "| Python | PyTorch | Detectron2 | NumPy | Pillow | tests |",
        "|---|---|---|---|---|---|",
    ]
    for record in rows:
        versions = record["versions"] or {}
        cells = [
            versions.get("python", record["python"]),
            versions.get("torch", record["torch"]),
            detectron2_cell(record),
            *(versions.get(name, "") for name in ("numpy", "PIL")),
            result_cell(record, causes),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if causes:
        lines += ["", "Known causes of failures, each with its cure:", ""]
        lines += [f"{number}. {text}" for number, text in enumerate(causes, 1)]
    machines = sorted({record["machine"] for record in rows})
    dates = sorted({record["date"] for record in rows})
    commits = sorted({str(record["commit"]) for record in rows})
    changed = " with changes" if any(record["dirty"] for record in rows) else ""
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = f"{', '.join(machines)} at commit {', '.join(commits)}{changed}"
    return "\n".join([*lines, "", f"Run {when} on {where}."]) + "\n"


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers, for sorting."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def detectron2_cell(record: dict[str, Any]) -> str:
    """Which Detectron2, and where it is from."""
    label = DETECTRON2[record["detectron2"]].label
    source = record["detectron2_from"] or ""
    return f"{label}, {source}" if source.startswith("git") else label


def result(record: dict[str, Any]) -> str:
    """What came of a combination and why, in a line of its own."""
    return "; ".join([counted(record), *known_causes(record)])


def result_cell(record: dict[str, Any], causes: Sequence[str]) -> str:
    """What came of a combination, for a table that lists causes below.

    Args:
        record: of the combination.
        causes: in the order of their numbers, from 1.
    """
    if not record["failed"]:
        return counted(record)
    shown = [str(number) for number in sorted(causes.index(c) + 1 for c in known_causes(record))]
    shown += ["unknown"] if record["status"] == "failed" else []
    return f"**{counted(record)}** (causes: {', '.join(shown)})"


def counted(record: dict[str, Any]) -> str:
    """How many tests failed and passed, or why there were none."""
    if record["status"] == "not made":
        return f"not made: {record['reason']}"
    shown = [name for name in ("failed", "passed", "skipped") if record[name] or name == "passed"]
    return ", ".join(f"{record[name]} {name}" for name in shown)


def known_causes(record: dict[str, Any]) -> list[str]:
    """The causes of failures that are known, each with its cure."""
    return [f"{known['cause']}: {quoted(known['cure'])}" for known in record["known"]]


def quoted(cure: str) -> str:
    """A command as code, words as they are."""
    return f"`{cure}`" if cure.startswith("pip ") else cure
