"""A summary as a Markdown section."""

from collections.abc import Iterable
from typing import Any

from focal_det.analysis.records import METRICS

from .measuring import TIMED
from .summary import MACHINE, has_papers_times, shows_times

SHOWN = ("AP", "AP50", "AP75")  # and those that the paper has
# Column -> measure, its unit and form.
SPEED = {
    "training images/s": ("images_per_second", 1.0, ".1f"),
    "ms an image": ("inference_ms", 1.0, ".1f"),
    "95th percentile": ("inference_p95_ms", 1.0, ".1f"),
    "peak MiB": ("peak_memory_mib", 1.0, ".0f"),
    "parameters, million": ("parameters", 1e-6, ".2f"),
    "giga multiply-adds": ("gflops", 1.0, ".2f"),
    "background to foreground": ("background_per_foreground", 1.0, ".0f"),
}
# What AP hangs on besides the settings; times hang on the whole machine.
TRAINED_WITH = ("torch", "torchvision", "detectron2", "processes")


def render(summary: dict[str, Any]) -> str:
    """A summary as a Markdown section.

    Args:
        summary: of :func:`summarise`.
    """
    rows = summary["rows"]
    different = [row for row in rows if row["differs"]] if summary["speed"] else []
    notes = {row["label"]: number for number, row in enumerate(different, 1)}
    timed = has_papers_times(summary)
    compared, shown = any(row["paper"] for row in rows), papers_metrics(summary)
    head = ["", *shown, "seeds", "rank"]
    head += [*(f"paper's {name}" for name in shown), "paper's rank"] if compared else []
    head += ["ms an image", "paper's ms"] if timed else []
    head += [*SPEED, "what differs, below"] if summary["speed"] else []
    lines = [f"### {escape(summary['title'])}", ""]
    lines += [f"{escape(summary['source'])}.", ""] if summary["source"] else []
    lines += ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for row in rows:
        bold = "**" if row["label"] == summary["winner"] else ""
        cells = [f"{bold}{escape(row['label'])}{bold}"]
        cells += [_with_spread(row["metrics"][name]) for name in shown]
        diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        cells += [f"{len(row['seeds'])}{diverged}", _number(row["rank"], "d")]
        if compared:
            cells += [_number(row["paper"].get(name)) for name in shown]
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
    made = f"{join(summary['iterations'])} iterations on {join(summary['data'])}, "
    made += f"commit {join(summary['commits'])}"
    lines += ["", escape(conclude(summary)), ""]
    lines += [f"{explain(summary)} {made}, {join(summary['devices'])}."]
    for said in (compare(summary, "**"), define(summary), escape(excuse(summary))):
        lines += ["", said] if said else []
    return "\n".join(lines) + "\n"


def papers_metrics(summary: dict[str, Any]) -> list[str]:
    """The metrics that are compared: :data:`SHOWN`, and others that the paper has for any row."""
    return [
        name
        for name in METRICS
        if name in SHOWN or any(name in row["paper"] for row in summary["rows"])
    ]


def conclude(summary: dict[str, Any]) -> str:
    """Who won, if anyone, and how far the order is the paper's."""
    tau = summary["kendall_tau"]
    if tau is None:
        return str(summary["verdict"])
    both = sum(row["rank"] is not None and row["paper_rank"] is not None for row in summary["rows"])
    return f"{summary['verdict']} Kendall's tau with the paper's order of {both} rows: {tau:.2f}."


def explain(summary: dict[str, Any]) -> str:
    """What the numbers of the table are."""
    seeds = max((len(row["seeds"]) for row in summary["rows"]), default=0)
    if seeds == 0:
        return "No result yet."
    said = "Mean ± standard deviation of the sample of seeds." if seeds > 1 else "One seed."
    if any(row["diverged"] for row in summary["rows"]):
        said += " A training that diverged counts as AP 0."
    return said


def compare(summary: dict[str, Any], mark: str = "") -> str:
    """Whether rows agree in what they must agree in to be compared; empty if it is no question.

    Rows of a table of speed must agree in all settings of
    :data:`focal_det.lab.summary.SHARED`, those with times in the machine, and all of them in
    annotations and versions.

    Args:
        summary: of :func:`summarise`.
        mark: put around the sentence that they do not.
    """
    unequal = summary["unequal"]
    if summary["speed"]:
        if unequal:
            return f"{mark}The rows do not agree in all settings.{mark} {_named(unequal)}."
        return (
            "All rows agree in data, loaders, input, schedule, backbone, pyramid and the "
            "backbone's first weights. The schedule is that of FocalRetinaNet's config; none was "
            "tuned for another detector."
        )
    trained, timed = {}, {}
    for key, values in unequal.items():
        if key in TRAINED_WITH or key.startswith("annotations of "):
            trained[key] = values
        elif key in MACHINE and shows_times(summary):
            timed[key] = values
    return " ".join(
        f"{mark}The {what} alike.{mark} {_named(found)}."
        for what, found in (("rows were not trained", trained), ("times were not measured", timed))
        if found
    )


def define(summary: dict[str, Any]) -> str:
    """What the columns of time, memory and size hold; empty for a table without them."""
    if not summary["speed"]:
        return ""
    return (
        "Times and memory are medians over seeds. Training images/s: of the median step, loading "
        "included, evaluation not. Milliseconds: from one image in memory to its detections, over "
        f"{TIMED} images. Peak MiB: on a CPU, of the whole process, libraries included; on a GPU, "
        "of PyTorch's allocator. Multiply-adds: of one image, as fvcore counts. Background to "
        "foreground: anchors of training, of FCOS points, where they were counted."
    )


def excuse(summary: dict[str, Any]) -> str:
    """What could not be measured, and why; empty if there is nothing."""
    if not shows_times(summary):
        return ""
    columns = {measure: column for column, (measure, _, _) in SPEED.items()}
    found = [
        f"{row['label']}, {columns[measure]}: {reason}"
        for row in summary["rows"]
        for measure, reason in row["not_measured"].items()
    ]
    return f"Not measured: {'; '.join(found)}." if found else ""


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


def join(values: Iterable[Any]) -> str:
    """Values as a list in a sentence."""
    return ", ".join(map(str, values)) or "none"
