"""The parts of a comparison's page that hold images: curves and the picture wall."""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import drawing, page, records

MAX_COLUMNS = 6  # of the picture wall; more losses go to the next line
MAX_LINES = len(drawing.STYLES)  # of a chart; more losses get a chart of their own
SHARE_TOP = 102.0
TOP = page.Place()

CHARTS = (
    (
        "share",
        "Share of background in the loss",
        "percent",
        "How much of the classification loss comes from anchors without an object. Near 100 the "
        "few objects hardly count in a step.",
    ),
    (
        "foreground",
        "Loss of foreground anchors",
        "loss",
        "What anchors on objects add to a step. The losses weigh anchors differently, so compare "
        "how the curves bend, not how high they are.",
    ),
    (
        "background",
        "Loss of background anchors",
        "loss",
        "What anchors without an object add to a step. In both charts of losses the vertical axis "
        "is logarithmic.",
    ),
)
UNPARTED = (
    "loss_cls",
    "Classification loss",
    "loss",
    "Foreground and background together, as far as a detector logs it as loss_cls.",
)


def charts(runs: Sequence[dict[str, Any]], place: page.Place = TOP) -> str:
    """The section with the curves; nothing if no run has any.

    Args:
        runs: with ``loss``, their name, and ``curves``.
        place: of the section.
    """
    figures = []
    for start in range(0, len(runs), MAX_LINES):
        part = runs[start : start + MAX_LINES]
        some = f", {start + 1} to {start + len(part)} of {len(runs)}"
        some = some if len(runs) > MAX_LINES else ""
        figures += curve_figures(part, some)
    if not figures:
        return ""
    return place.section(
        "Where the loss comes from",
        "<p>Each point is the median of the 20 steps before it.</p>\n" + side_by_side(figures),
    )


def curve_figures(runs: Sequence[dict[str, Any]], some: str = "") -> list[str]:
    """A chart for each of :data:`CHARTS` that any run has values of.

    Args:
        runs: at most as many as there are styles.
        some: which runs these are, where others have charts of their own.
    """
    figures = []
    # A detector that does not part its loss has this one curve.
    parted = all(_has(run, "foreground") for run in runs if _has(run, "loss_cls"))
    for key, title, unit, caption in CHARTS if parted else (*CHARTS, UNPARTED):
        lines = []
        for style, run in zip(drawing.STYLES, runs, strict=False):
            if _has(run, key):
                lines.append((run["loss"], style, run["curves"]["iteration"], _values(run, key)))
        if lines:
            top = SHARE_TOP if key == "share" else None
            figures.append(chart(lines, title + some, unit, caption, top))
    return figures


def chart(
    lines: Sequence[tuple[str, drawing.Style, Sequence[float], Sequence[float | None]]],
    title: str,
    unit: str,
    caption: str,
    top: float | None = None,
    *,
    of: str = "",
) -> str:
    """One chart with its caption.

    Args:
        lines: of :func:`drawing.line_chart`, each with a value at least.
        title: what is shown.
        unit: of the vertical axis, which is logarithmic without `top`.
        caption: plain text.
        top: upper end of the vertical axis.
        of: what the curves are of, for those who do not see where the chart stands.
    """
    picture = drawing.line_chart(lines, title=title, unit=unit, log=top is None, top=top)
    alt = f"{title}{of} over the iterations. " + _last_values(lines)
    return (
        f"<figure>{page.image(picture, 'image/svg+xml', alt)}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def side_by_side(figures: Sequence[str]) -> str:
    """Charts in as many columns as fit."""
    return '<div class="charts">\n' + "\n".join(figures) + "\n</div>"


def _values(run: dict[str, Any], key: str) -> Sequence[float | None]:
    if key == "share":
        return _percent_background(run)
    values: Sequence[float | None] = run["curves"][key]
    return values


def _has(run: dict[str, Any], key: str) -> bool:
    return any(value is not None for value in _values(run, key))


def _percent_background(run: dict[str, Any]) -> list[float | None]:
    shares = records.background_share(run["curves"])
    return [None if share is None else 100 * share for share in shares]


def _last_values(lines: Sequence[tuple[str, Any, Any, Sequence[float | None]]]) -> str:
    """What a chart says in the end, in words."""
    ends = []
    for name, _, _, values in lines:
        last = [value for value in values if value is not None][-1]
        ends.append(f"{name} {last:.3g}")
    return "At the end: " + ", ".join(ends) + "."


def pictures(results: dict[str, Any], folder: Path, place: page.Place = TOP) -> str:
    """The section with the picture wall; nothing without pictures or detections.

    Args:
        results: see :mod:`focal_det.analysis.report`.
        folder: where the files of ``pictures`` are; one that is missing is left out, and counted.
        place: of the section.
    """
    runs = [run for run in results["records"] if run["pictures"]]
    if not results["pictures"] or not runs:
        return ""
    names = {int(key): name for key, name in results["settings"]["class_names"].items()}
    walls, missing = [], 0
    for index, picture in enumerate(results["pictures"]):
        if (folder / picture["file"]).is_file():
            walls.append(_wall(folder, picture, index, runs, names))
        else:
            missing += 1
    if missing:
        count = page.count(missing, "image is", "images are")
        walls.append(f"<p>{count} not shown: there is no such file any more.</p>")
    return place.section(
        "What the detectors see",
        "<p>Images of the validation set from the emptiest to the fullest, evenly spaced; the "
        "detections played no part in the choice. A detection is right if it has an object's class "
        "and overlaps it by half or more (IoU 0.5).</p>\n"
        + _legend()
        + "\n"
        + "\n".join(walls)
        + _thresholds(runs, place),
    )


def _wall(
    folder: Path,
    picture: dict[str, Any],
    index: int,
    runs: Sequence[dict[str, Any]],
    names: dict[int, str],
) -> str:
    """One image: its objects, and what each run makes of it."""
    pixels = np.asarray(Image.open(folder / picture["file"]).convert("RGB"))
    figures = [_truth_figure(pixels, picture, names)]
    figures += [_verdict_figure(pixels, run, run["pictures"][index], names) for run in runs]
    lines = -(-len(figures) // MAX_COLUMNS)
    columns = f'style="--columns:{-(-len(figures) // lines)}"'
    return f'<div class="wall" {columns}>\n' + "\n".join(figures) + "\n</div>"


def _truth_figure(pixels: np.ndarray, picture: dict[str, Any], names: dict[int, str]) -> str:
    objects = picture["objects"]
    listed = ", ".join(names[item["category_id"]] for item in objects) or "none"
    alt = f"Validation image {picture['image_id']} with the true boxes. Objects: {listed}."
    count = page.count(len(objects), "object", "objects") if objects else "no object"
    return _figure(drawing.draw_objects(pixels, objects, names), alt, "Ground truth", count)


def _verdict_figure(
    pixels: np.ndarray, run: dict[str, Any], verdict: dict[str, Any], names: dict[int, str]
) -> str:
    counts = ", ".join(f"{len(verdict[kind])} {kind}" for kind in ("right", "wrong", "missed"))
    alt = f"The same image with the detections of {run['loss']}: {counts}."
    return _figure(drawing.draw_verdict(pixels, verdict, names), alt, run["loss"], counts)


def _figure(picture: bytes, alt: str, title: str, text: str) -> str:
    return (
        f"<figure>{page.image(picture, 'image/jpeg', alt)}"
        f"<figcaption><b>{_breakable(title)}</b>{escape(text)}</figcaption></figure>"
    )


def _breakable(name: str) -> str:
    """A class name as HTML that may go on in the next line where a new word begins."""
    return "<wbr>".join(escape(word) for word in re.split("(?<=[a-z])(?=[A-Z])", name))


def _legend() -> str:
    css_lines = {"-": "solid", "--": "dashed", ":": "dotted"}
    items = "".join(
        f'<li><span style="border-color:{color};border-style:{css_lines[line]}"></span>{text}'
        "</li>\n"
        for (color, line), text in (
            (drawing.OBJECT, "ground truth"),
            (drawing.RIGHT, "right detection, with its score"),
            (drawing.WRONG, "wrong detection, with its score"),
            (drawing.MISSED, "missed object"),
        )
    )
    return f'<ul class="legend">\n{items}</ul>'


def _thresholds(runs: Sequence[dict[str, Any]], place: page.Place) -> str:
    rows = []
    for run in runs:
        point = run["operating_point"]
        if point is None:
            cells = ["no detection is right at any score", "–", "–", "–"]  # noqa: RUF001
        else:
            cells = [f"{100 * point['threshold']:.0f}%"]
            cells += [f"{100 * point[key]:.0f}%" for key in ("precision", "recall", "f1")]
        rows.append(page.row(escape(run["loss"]), cells))
    return (
        "<p>Losses differ in how high the scores are that they lead to, so that one fixed "
        "threshold would be unfair to some. For each detector the boxes are drawn whose score "
        "reaches the value at which its F1 over the whole validation set is highest. AP needs no "
        "threshold.</p>\n"
        + place.table(
            "From which score on boxes are drawn, and how good these are over all images",
            ("Detector", "Score from", "Precision", "Recall", "F1"),
            rows,
        )
    )
