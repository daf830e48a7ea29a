"""Which files below a folder are records, and what they hold."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from focal_det.analysis import records
from focal_det.lab.tables import RESERVED
from focal_det.safe_loading import UnsafeFileError

from . import reading

LOOKED_FOR = (
    "records/KEY.json and TABLE.json of tools/ablate.py, results.json of tools/demo.py, and "
    "metrics.json with config.yaml of a training run"
)
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError,
    yaml.YAMLError, UnsafeFileError,
)  # fmt: skip
Content = TypeVar("Content")


@dataclass
class Sweep:
    """A folder that ``tools/ablate.py`` wrote.

    Attributes:
        folder: of the sweep.
        trials: of :func:`.reading.read_trial`.
        saved: summaries of :func:`.reading.read_summary`, by the name of their table.
        unfinished: keys of trials that have begun and have no record.
    """

    folder: Path
    trials: list[dict[str, Any]]
    saved: dict[str, dict[str, Any]]
    unfinished: list[str]


@dataclass
class Comparison:
    """A folder that ``tools/demo.py`` wrote.

    Attributes:
        folder: of the comparison.
        results: of its ``results.json``.
        settings: config by dotted keys, by loss, where the run's folder is still there.
    """

    folder: Path
    results: dict[str, Any]
    settings: dict[str, dict[str, str]]


@dataclass
class Run:
    """The folder of one training.

    Attributes:
        folder: of the training.
        lines: of its ``metrics.json``.
        settings: its config by dotted keys.
    """

    folder: Path
    lines: list[dict[str, Any]]
    settings: dict[str, str]


@dataclass
class Found:
    """All records below a folder.

    Attributes:
        root: the folder.
        sweeps, comparisons, runs: what there is.
        problems: files that cannot be read, and why.
    """

    root: Path
    sweeps: list[Sweep] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    problems: list[tuple[Path, str]] = field(default_factory=list)

    def name(self, folder: Path) -> str:
        """How a folder is called on the page: its path from the root."""
        inner = folder.relative_to(self.root).as_posix()
        return self.root.resolve().name if inner == "." else inner

    def read(self, path: Path, reader: Callable[[Path], Content]) -> Content | None:
        """What a file holds; None, and a problem, where it cannot be read."""
        try:
            return reader(path)
        except UNREADABLE as error:
            self.problems.append((path, reason(error, path)))
            return None


def reason(error: BaseException, path: Path) -> str:
    """An exception in one line.

    Args:
        error: caught while a file was read.
        path: of the file, which is named elsewhere.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = " ".join(str(error).split()).removeprefix(str(path)).lstrip(": ")
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def find(root: Path) -> Found:
    """Look through a folder and all below it, hidden folders apart.

    Args:
        root: the folder.
    """
    found = Found(root)
    shown: set[Path] = set()  # folders of runs that are part of something else
    for name, folders, files in os.walk(root):
        folder = Path(name)
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        if "records" in folders:
            sweep = _read_sweep(found, folder, files)
            if sweep.trials or sweep.saved:
                found.sweeps.append(sweep)
                folders[:] = [each for each in folders if each not in ("records", "trials")]
        if "results.json" in files:
            results = found.read(folder / "results.json", _read_results)
            if results is not None:
                comparison = _comparison(found, folder, results)
                found.comparisons.append(comparison)
                shown |= {folder / run["loss"] for run in results["records"]}
        if {"metrics.json", "config.yaml"} <= set(files) and folder not in shown:
            run = _read_run(found, folder)
            found.runs += [run] if run is not None else []
    return found


def _read_sweep(found: Found, folder: Path, files: list[str]) -> Sweep:
    trials = [
        found.read(path, reading.read_trial) for path in sorted((folder / "records").glob("*.json"))
    ]
    sweep = Sweep(folder, [trial for trial in trials if trial is not None], {}, [])
    for name in sorted(files):
        if name.endswith(".json") and name.removesuffix(".json") not in RESERVED:
            summary = found.read(folder / name, reading.read_summary)
            if summary is not None:
                sweep.saved[str(summary["table"])] = summary
    known = {path.stem for path in (folder / "records").glob("*.json")}
    begun = (path.parent.name for path in (folder / "trials").glob("*/config.yaml"))
    sweep.unfinished = sorted(set(begun) - known)
    return sweep


def _read_results(path: Path) -> dict[str, Any]:
    results = records.load(path)
    if not all(isinstance(run["loss"], str) for run in results["records"]):
        raise ValueError("a run has no loss")
    return results


def _comparison(found: Found, folder: Path, results: dict[str, Any]) -> Comparison:
    settings = {}
    for run in results["records"]:
        path = folder / run["loss"] / "config.yaml"
        content = found.read(path, reading.read_settings) if path.is_file() else None
        if content is not None:
            settings[run["loss"]] = content
    return Comparison(folder, results, settings)


def _read_run(found: Found, folder: Path) -> Run | None:
    lines = found.read(folder / "metrics.json", reading.read_lines)
    settings = found.read(folder / "config.yaml", reading.read_settings)
    if lines is None:
        return None
    return Run(folder, lines, settings or {})
