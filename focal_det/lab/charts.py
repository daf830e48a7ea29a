"""A summary as a picture: our seeds on the left, the paper's numbers on the right."""

import io
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from matplotlib.figure import Figure

from focal_det.analysis.drawing import STYLES, drawing_as_here
from focal_det.files import write_whole

from .summary import RANKED

OURS, PAPERS = STYLES[3].color, STYLES[1].color
LONGEST_LINE = 44  # characters of a row's label


def draw_table(summary: dict[str, Any]) -> Figure:
    """Each row's AP by seed and its mean, and the paper's AP where it has one.

    Args:
        summary: of :func:`focal_det.lab.summary.summarise`.
    """
    rows = summary["rows"][::-1]  # the first one on top
    compared = any(RANKED in row["paper"] for row in rows)
    with drawing_as_here():
        figure = Figure(figsize=(8 if compared else 5.5, 1.2 + 0.34 * len(rows)))
        figure.set_layout_engine("constrained")
        axes = figure.subplots(1, 1 + compared, sharey=True, squeeze=False)[0]
        for height, row in enumerate(rows):
            metric = row["metrics"][RANKED]
            values = [value for value in metric["values"] if value is not None]
            axes[0].plot(
                values, [height] * len(values), "o", color=OURS, alpha=0.5, ms=5, mec="none"
            )
            if metric["mean"] is not None:
                axes[0].plot(metric["mean"], height, "|", color=OURS, ms=14, mew=2.5)
            if compared and RANKED in row["paper"]:
                axes[1].plot(row["paper"][RANKED], height, "D", color=PAPERS, ms=6)
        axes[0].set_yticks(range(len(rows)), [_broken(row["label"]) for row in rows])
        axes[0].set_ylim(-0.6, len(rows) - 0.4)
        titles = ("measured: seeds and mean", "the paper, COCO")
        for axis, title in zip(axes, titles, strict=False):
            axis.set_xlim(0, max(axis.dataLim.x1, 0) * 1.06 or 1)
            axis.set_xlabel("AP (percent)")
            axis.set_title(title, loc="left", fontsize=10)
            axis.grid(True, color="#dddddd", linewidth=0.7)
            axis.set_axisbelow(True)
        figure.suptitle(plain(summary["title"]), x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def plain(text: str) -> str:
    """Text for matplotlib, which would take what is between two dollars for a formula."""
    return text.replace("$", r"\$")


def _broken(label: str) -> str:
    """A label in lines that leave room for the picture."""
    return plain("\n".join(textwrap.wrap(label, LONGEST_LINE)))


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``path`` with the endings ``.svg`` and ``.png``; the same figure gives the same bytes.

    Args:
        figure: of this module.
        path: without an ending.
    """
    for kind in ("svg", "png"):
        content = render(figure, kind, path.name)
        write_whole(path.with_name(f"{path.name}.{kind}"), _writer(content))


def render(figure: Figure, kind: str, name: str) -> bytes:
    """A figure as the content of a file; the same figure gives the same bytes.

    Args:
        figure: of this module.
        kind: ``svg`` or ``png``.
        name: of the figure.
    """
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    buffer = io.BytesIO()
    # A fixed salt and no date, so that nothing but the data can change the files.
    with drawing_as_here({"svg.hashsalt": name}):
        # Once, as each drawing moves the parts a little further.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _writer(content: bytes) -> Callable[[IO[bytes]], object]:
    return lambda file: file.write(content)
