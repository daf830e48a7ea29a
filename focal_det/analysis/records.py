"""What a training run left behind, as plain dictionaries that JSON can hold.

A missing number (an AP without objects to score, a loss before the first log line) is None
throughout, never NaN, so that the files are JSON by its standard.
"""

import json
import math
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from focal_det.files import write_whole

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

# Our name of a curve -> Detectron2's name of the scalar.
SCALARS = {
    "loss_cls": "loss_cls",
    "foreground": "classification/foreground",
    "background": "classification/background",
    "positives": "num_pos_anchors",
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of Detectron2's ``metrics.json``, oldest first; no line without the file.

    A last line that was cut off by an interrupt is left out.
    """
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def curves(rows: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """Scalars over the iterations.

    Args:
        rows: of :func:`read_metrics`.

    Returns:
        ``iteration`` (iterations finished, from 1 on) and a list of the same length for each of
        :data:`SCALARS`.
    """
    logged = [row for row in rows if SCALARS["loss_cls"] in row]
    result: dict[str, list[Any]] = {"iteration": [row["iteration"] + 1 for row in logged]}
    for name, scalar in SCALARS.items():
        result[name] = [finite(row.get(scalar)) for row in logged]
    return result


def background_share(curve: dict[str, list[Any]]) -> list[float | None]:
    """The part of the classification loss that background anchors make up, in [0, 1].

    Args:
        curve: of :func:`curves`.
    """
    shares: list[float | None] = []
    for foreground, background in zip(curve["foreground"], curve["background"], strict=True):
        if foreground is None or background is None or foreground + background <= 0:
            shares.append(None)
        else:
            # The background part is a difference of sums, which rounding may push below 0.
            shares.append(min(1.0, max(0.0, background / (foreground + background))))
    return shares


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the numbers among `values`; None without any."""
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None


def average_precision(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The last evaluation's box AP in percent.

    Args:
        rows: of :func:`read_metrics`.

    Returns:
        ``metrics``: each of :data:`METRICS`; ``per_class``: AP by class name.
    """
    evaluated = [row for row in rows if "bbox/AP" in row]
    last = evaluated[-1] if evaluated else {}
    prefix = "bbox/AP-"
    return {
        "metrics": {name: finite(last.get(f"bbox/{name}")) for name in METRICS},
        "per_class": {
            key.removeprefix(prefix): finite(value)
            for key, value in last.items()
            if key.startswith(prefix)
        },
    }


def best(records: Sequence[dict[str, Any]], metric: str = "AP") -> int | None:
    """Index of the record with the highest value; None if none has any above 0."""
    values = [record["metrics"].get(metric) or 0.0 for record in records]
    highest = max(values, default=0.0)
    return values.index(highest) if highest > 0 else None


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is missing, infinite or not a number."""
    return float(value) if value is not None and math.isfinite(value) else None


def environment(device: str) -> dict[str, Any]:
    """Versions and machine, as far as they bear on a result.

    Args:
        device: what the model ran on, ``"cpu"`` or a CUDA device.
    """
    import detectron2
    import numpy
    import torch
    import torchvision

    import focal_det

    on_cpu = torch.device(device).type == "cpu"
    return {
        "commit": commit(),
        "focal_det": focal_det.__version__,
        "detectron2": detectron2.__version__,
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "device": (
            f"CPU ({platform.machine()}), threads: {torch.get_num_threads()}"
            if on_cpu
            else torch.cuda.get_device_name(device)
        ),
        "cpu": cpu_name(),
    }


def cpu_name() -> str:
    """The model of this machine's CPU, as far as the system tells."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit that focal_det runs from, with ``-dirty`` where files differ from it.

    None where the package is not part of a git checkout, or git is missing.
    """
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        # Without optional locks, a query changes nothing in the repository.
        command = ["git", "--no-optional-locks", "-C", str(package), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # An installed copy may lie inside some other repository, whose commit says nothing of it.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = git("rev-parse", "--short=12", "HEAD")
    if revision is None:
        return None
    # Records of earlier measurements, and pages made of them, change nothing in what is measured.
    code = (":/", ":(top,exclude)tools/results", ":(top,exclude)docs")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return f"{revision}-dirty" if changed else revision


def save(results: dict[str, Any], path: Path) -> None:
    """Write `results` as JSON in one step, so that a reader never meets half a file.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of ours.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(results, dict) or not {"settings", "pictures", "records"} <= results.keys():
        raise ValueError(f"{path} holds no results of a comparison of losses")
    return results


def load_of_schema(path: Path, schema: int) -> dict[str, Any]:
    """A record that says its schema.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or of another schema, which is named with the file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, of its encoding, of its depth
        raise ValueError(f"{path}: {error}") from error
    found = record.get("schema") if isinstance(record, dict) else None
    if found != schema:
        raise ValueError(f"{path}: schema {found}, known is {schema}")
    return dict(record)
