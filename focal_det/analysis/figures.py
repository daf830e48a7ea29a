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


def charts(runs: Sequence[dict[str, Any]]) -> str:
    """The section with the curves; nothing if no run has any."""
    figures = []
    for key, title, unit, caption in CHARTS:
        lines = []
        for i, run in enumerate(runs):
            values = run["curves"][key] if key != "share" else _percent_background(run)
            if any(value is not None for value in values):
                style = drawing.STYLES[i % len(drawing.STYLES)]
                lines.append((run["loss"], style, run["curves"]["iteration"], values))
        if not lines:
            continue
        is_share = key == "share"
        chart = drawing.line_chart(
            lines, title=title, unit=unit, log=not is_share, top=102 if is_share else None
        )
        alt = f"{title} over the iterations. " + _last_values(lines)
        figures.append(
            f"<figure>{page.image(chart, 'image/svg+xml', alt)}"
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    if not figures:
        return ""
    return (
        "<section>\n<h2>Where the loss comes from</h2>\n"
        '<p>Each point is the median of the 20 steps before it.</p>\n<div class="charts">\n'
        + "\n".join(figures)
        + "\n</div>\n</section>"
    )


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


def pictures(results: dict[str, Any], folder: Path) -> str:
    """The section with the picture wall; nothing without pictures or detections.

    Args:
        results: see :mod:`focal_det.analysis.report`.
        folder: where the files of ``pictures`` are.
    """
    shown = results["pictures"]
    runs = [run for run in results["records"] if run["pictures"]]
    if not shown or not runs:
        return ""
    names = {int(key): name for key, name in results["settings"]["class_names"].items()}
    walls = []
    for index, picture in enumerate(shown):
        pixels = np.asarray(Image.open(folder / picture["file"]).convert("RGB"))
        figures = [_truth_figure(pixels, picture, names)]
        figures += [_verdict_figure(pixels, run, run["pictures"][index], names) for run in runs]
        columns = f'style="--columns:{min(len(figures), MAX_COLUMNS)}"'
        walls.append(f'<div class="wall" {columns}>\n' + "\n".join(figures) + "\n</div>")
    return (
        "<section>\n<h2>What the detectors see</h2>\n"
        "<p>Images of the validation set from the emptiest to the fullest, evenly spaced; the "
        "detections played no part in the choice. A detection is right if it has an object's class "
        "and overlaps it by half or more (IoU 0.5).</p>\n"
        + _legend()
        + "\n"
        + "\n".join(walls)
        + _thresholds(runs)
        + "\n</section>"
    )


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


def _thresholds(runs: Sequence[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        point = run["operating_point"]
        if point is None:
            cells = ["no detection is right at any score", "–", "–", "–"]  # noqa: RUF001
        else:
            cells = [f"{100 * point['threshold']:.0f}%"]
            cells += [f"{100 * point[key]:.0f}%" for key in ("precision", "recall", "f1")]
        rows.append(page.row(f"<code>{escape(run['loss'])}</code>", cells))
    return (
        "<p>Losses differ in how high the scores are that they lead to, so that one fixed "
        "threshold would be unfair to some. For each detector the boxes are drawn whose score "
        "reaches the value at which its F1 over the whole validation set is highest. AP needs no "
        "threshold.</p>\n"
        + page.table(
            "From which score on boxes are drawn, and how good these are over all images",
            ("Loss", "Score from", "Precision", "Recall", "F1"),
            rows,
        )
    )
