"""Comparisons of losses and single trainings, as HTML."""

from collections.abc import Sequence
from html import escape
from typing import Any

from focal_det.analysis import drawing, figures, page, records, report
from focal_det.analysis.page import Place

from .finding import Comparison, Found, Run
from .picture_wall import pictures

MAX_LOSSES = figures.MAX_LINES
SIDES = ("foreground", "background")


def comparison(of: Comparison, place: Place) -> str:
    """What comes below the heading of a comparison.

    Args:
        of: the comparison.
        place: of the parts below its heading.
    """
    parts = [report.introduction(of.results), *report.sections(of.results, of.folder, place)]
    return "\n".join(part for part in parts if part)


def body(found: Found, place: Place) -> str:
    """What comes below the heading of all single trainings.

    Args:
        found: with one at least; gets the files that cannot be read.
        place: of the parts below the heading.
    """
    parts = [_table(found, place)]
    for run in found.runs:
        name = found.name(run.folder)
        parts.append(place.section(name, _single(run, found, Place(place.level + 1, name))))
    return "\n".join(parts)


def _table(found: Found, place: Place) -> str:
    rows = []
    for run in found.runs:
        metrics = records.average_precision(run.lines)["metrics"]
        done = max((line["iteration"] + 1 for line in run.lines if "total_loss" in line), default=0)
        cells = [escape(_detector(run)), f"{done:,}"]
        cells += [page.number(metrics[name]) for name in records.METRICS]
        rows.append(page.row(escape(found.name(run.folder)), cells))
    head = ("Run", "Detector", "Iterations logged", *records.METRICS)
    return place.table("Box AP in percent at the last evaluation", head, rows)


def _detector(run: Run) -> str:
    """What was trained, by the names in its config; a dash where that does not say."""
    name = run.settings.get("MODEL.META_ARCHITECTURE")
    loss = run.settings.get("MODEL.FOCAL_DET.LOSS.NAME")
    if name is None:
        return page.number(None)
    return f"{name}, {loss}" if name == "FocalRetinaNet" and loss else name


def _single(run: Run, found: Found, place: Place) -> str:
    """Curves and pictures of one training."""
    of = f" of {found.name(run.folder)}"
    charts = [_losses(run, of), _sides(run, of), _evaluations(run, of)]
    charts = [chart for chart in charts if chart]
    parts = [figures.side_by_side(charts)] if charts else ["<p>No loss has been logged yet.</p>"]
    datasets = run.settings.get("DATASETS.TEST", "")
    folders = {found.name(run.folder): run.folder}
    parts.append(pictures(folders, _names(datasets), found, place))
    return "\n".join(part for part in parts if part)


def _names(datasets: str) -> list[str]:
    """Names out of the text of a list or tuple of them."""
    return [
        name for name in (part.strip(" '\"") for part in datasets.strip("[]()").split(",")) if name
    ]


def _losses(run: Run, of: str) -> str:
    logged = [line for line in run.lines if "total_loss" in line]
    names = dict.fromkeys(key for line in logged for key in line if key.startswith("loss_"))
    chosen = ["total_loss", *names][:MAX_LOSSES]
    lines = _lines(logged, {name: name for name in chosen})
    caption = "Every loss that the model gives, and their sum; the vertical axis is logarithmic."
    return _chart(lines, "Losses", "loss", caption, of)


def _sides(run: Run, of: str) -> str:
    logged = [line for line in run.lines if records.SCALARS["foreground"] in line]
    lines = _lines(logged, {side: records.SCALARS[side] for side in SIDES})
    caption = "The two parts of the classification loss; the vertical axis is logarithmic."
    return _chart(lines, "Foreground and background", "loss", caption, of)


def _evaluations(run: Run, of: str) -> str:
    evaluated = [line for line in run.lines if "bbox/AP" in line]
    if len(evaluated) < 2:
        return ""
    lines = _lines(evaluated, {name: f"bbox/{name}" for name in ("AP", "AP50", "AP75")})
    caption = "Box AP in percent at each evaluation."
    return _chart(lines, "AP", "percent", caption, of, 100.0)


def _lines(logged: Sequence[dict[str, Any]], scalars: dict[str, str]) -> list[Any]:
    """Curves of :func:`focal_det.analysis.drawing.line_chart`, without those of no number."""
    iterations = [line["iteration"] + 1 for line in logged]
    lines = []
    for style, (name, scalar) in zip(drawing.STYLES, scalars.items(), strict=False):
        values = [records.finite(line.get(scalar)) for line in logged]
        if any(value is not None for value in values):
            lines.append((name, style, iterations, values))
    return lines


def _chart(
    lines: list[Any], title: str, unit: str, caption: str, of: str, top: float | None = None
) -> str:
    return figures.chart(lines, title, unit, caption, top, of=of) if lines else ""
