"""A summary as a Markdown section."""

from collections.abc import Sequence
from typing import Any

from .summary import MACHINE

SHOWN = ("AP", "AP50", "AP75")
# Column -> measure, its unit and form.
SPEED = {
    "training images/s": ("images_per_second", 1.0, ".1f"),
    "ms an image": ("inference_ms", 1.0, ".1f"),
    "95th percentile": ("inference_p95_ms", 1.0, ".1f"),
    "peak MiB": ("peak_memory_mib", 1.0, ".0f"),
    "parameters, million": ("parameters", 1e-6, ".2f"),
    "giga multiply-adds": ("gflops", 1.0, ".2f"),
}


def render(summary: dict[str, Any]) -> str:
    """A summary as a Markdown section.

    Args:
        summary: of :func:`summarise`.
    """
    rows = summary["rows"]
    different = [row for row in rows if row["differs"]] if summary["speed"] else []
    notes = {row["label"]: number for number, row in enumerate(different, 1)}
    timed = any("milliseconds" in row["paper"] for row in rows)
    compared = any(row["paper"] for row in rows)
    head = ["", *SHOWN, "seeds", "rank"]
    head += [*(f"paper's {name}" for name in SHOWN), "paper's rank"] if compared else []
    head += ["ms an image", "paper's ms"] if timed else []
    head += [*SPEED, "what differs, below"] if summary["speed"] else []
    lines = [f"### {escape(summary['title'])}", ""]
    lines += [f"{escape(summary['source'])}.", ""] if summary["source"] else []
    lines += ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for row in rows:
        bold = "**" if row["label"] == summary["winner"] else ""
        cells = [f"{bold}{escape(row['label'])}{bold}"]
        cells += [_with_spread(row["metrics"][name]) for name in SHOWN]
        diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        cells += [f"{len(row['seeds'])}{diverged}", _number(row["rank"], "d")]
        if compared:
            cells += [_number(row["paper"].get(name)) for name in SHOWN]
            cells += [_number(row["paper_rank"], "d")]
        if timed:
            cells += [_number(row["inference_ms"]), _number(row["paper"].get("milliseconds"))]
        if summary["speed"]:
            cells += [_number(row[name], form, unit) for name, unit, form in SPEED.values()]
            cells.append(_number(notes.get(row["label"]), "d"))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "What could not be made equal:", ""] if notes else []
    lines += [
        f"{notes[row['label']]}. {escape(row['label'])}: {escape(row['differs'])}."
        for row in different
    ]
    tau = summary["kendall_tau"]
    both = sum(row["rank"] is not None and row["paper_rank"] is not None for row in rows)
    order = ""
    if tau is not None:
        order = f" Kendall's tau with the paper's order of {both} rows: {tau:.2f}."
    made = f"{_list(summary['iterations'])} iterations on {_list(summary['data'])}, "
    made += f"commit {_list(summary['commits'])}"
    lines += ["", f"{escape(summary['verdict'])}{order}", ""]
    lines += [f"Mean ± standard deviation over seeds; {made}, {_list(summary['devices'])}."]
    said = ""
    if summary["speed"] or timed:
        said = (equality if summary["speed"] else unlike)(summary["unequal"], "**")
    lines += ["", said] if said else []
    return "\n".join(lines) + "\n"


def equality(unequal: dict[str, list[str]], mark: str = "") -> str:
    """Whether rows that are compared by their speed agree in all settings.

    Args:
        unequal: of :func:`focal_det.lab.summary.unequal_settings`.
        mark: put around the sentence that they do not.
    """
    if not unequal:
        return (
            "All rows agree in data, loaders, input, schedule, backbone, pyramid and first "
            "weights. Times and memory are medians over seeds."
        )
    return f"{mark}The rows do not agree in all settings.{mark} {_named(unequal)}."


def unlike(unequal: dict[str, list[str]], mark: str = "") -> str:
    """Whether times were measured on machines that differ; empty where they were not.

    Args:
        unequal, mark: as of :func:`equality`.
    """
    machines = {key: values for key, values in unequal.items() if key in MACHINE}
    if not machines:
        return ""
    return f"{mark}The times were not measured alike.{mark} {_named(machines)}."


def _named(unequal: dict[str, list[str]]) -> str:
    return "; ".join(f"{key}: {' or '.join(values)}" for key, values in unequal.items())


def escape(cell: str) -> str:
    """Text for one line of Markdown, or a cell of a table."""
    text = " ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;")
    return text.replace("*", "\\*")


def _with_spread(metric: dict[str, Any]) -> str:
    if metric["mean"] is None:
        return ""
    sd = "" if metric["sd"] is None else f" ± {metric['sd']:.1f}"
    return f"{metric['mean']:.1f}{sd}"


def _number(value: float | None, form: str = ".1f", unit: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value if unit is None else unit * value:{form}}"


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values)) or "none"
