"""Curves and pictures with boxes, as bytes for a page; what they show is worked out elsewhere.

Colours are those of Okabe and Ito, which people with a colour vision deficiency can tell apart;
line styles say the same a second time.
"""

import contextlib
import io
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

LinePattern = tuple[int, tuple[float, ...]]


class Style(NamedTuple):
    """How a loss is drawn: colour and line pattern (offset, lengths of strokes and gaps)."""

    color: str
    dashes: LinePattern


SOLID: LinePattern = (0, ())
STYLES = (
    Style("#555555", (0, (4, 1.5))),
    Style("#e69f00", (0, (6, 1.5, 1, 1.5))),
    Style("#009e73", (0, (1.2, 1.2))),
    Style("#0072b2", SOLID),
    Style("#cc79a7", (0, (8, 2))),
    Style("#56b4e9", (0, (3, 1, 1, 1, 1, 1))),
)

# Boxes: what they stand for, colour, line style.
OBJECT = ("#ffffff", "-")
RIGHT = ("#56b4e9", "-")
WRONG = ("#ff9b21", "--")
MISSED = ("#ffffff", ":")

PICTURE_SIDE = 360  # pixels of the shorter side of a drawn picture
# Of matplotlib, for every chart.
SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.fonttype": "path",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
LABEL_SIZE = 14  # points; pictures are shown at half their size
FEW_POINTS = 15
SHORT_NAME, LONGEST_LINE = 26, 52  # characters of a legend's entry: two beside each other; a line


@contextlib.contextmanager
def drawing_as_here(more: dict[Any, Any] | None = None) -> Iterator[None]:
    """Settings of matplotlib for as long as a figure is made, whatever the user's are.

    Args:
        more: settings besides :data:`SETTINGS`.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**SETTINGS, **(more or {})})
        yield


def line_chart(
    lines: Sequence[tuple[str, Style, Sequence[float], Sequence[float | None]]],
    *,
    title: str,
    unit: str,
    log: bool = False,
    top: float | None = None,
) -> bytes:
    """Curves over the iterations, as SVG.

    Args:
        lines: name, style, iterations and values of each curve; a value of None leaves a gap.
        title: what is shown.
        unit: of the vertical axis.
        log: logarithmic vertical axis, where any value is above 0.
        top: upper end of the vertical axis, whose lower end is then 0.
    """
    settings = {
        "font.size": 11,
        "svg.hashsalt": title,  # the same curves give the same bytes
        "text.parse_math": False,  # a name may hold dollars
    }
    names = ["\n".join(textwrap.wrap(line[0], LONGEST_LINE)) or " " for line in lines]
    columns = 2 if all(len(name) <= SHORT_NAME for name in names) else 1
    extra = sum(1 + name.count("\n") for name in names) - 3 if columns == 1 else 0
    with drawing_as_here(settings):
        figure = Figure(figsize=(5.2, 3.7 + 0.2 * max(0, extra)), layout="constrained")
        axes = figure.add_subplot()
        handles = []
        for _, style, iterations, values in lines:
            heights = np.array(values, dtype=float)  # None becomes NaN, which leaves a gap
            marker = "o" if len(heights) < FEW_POINTS else None
            handles += axes.plot(
                iterations,
                heights,
                color=style.color,
                linestyle=style.dashes,
                linewidth=2,
                marker=marker,
                markersize=4,
            )
        positive = [value for line in lines for value in line[3] if value and value > 0]
        if log and positive:
            axes.set_yscale("log")
            # Labels at powers of ten alone would be one or none where the curves are flat.
            subdivisions = (1.0, 2.0, 5.0) if max(positive) < 100 * min(positive) else (1.0,)
            axes.yaxis.set_major_locator(LogLocator(subs=subdivisions))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0, max((line[2][-1] for line in lines if line[2]), default=1) * 1.02)
        if top is not None:
            axes.set_ylim(0, top)
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
        axes.set_xlabel("iteration")
        axes.set_ylabel(unit)
        axes.grid(True, color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        # Named here: matplotlib leaves out a label that begins with an underscore.
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=10,
            handlelength=3.2,
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def draw_objects(
    pixels: np.ndarray, objects: Sequence[dict[str, Any]], names: dict[int, str]
) -> bytes:
    """A picture with the boxes of its objects, as JPEG.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        objects: with ``bbox`` ``[x, y, w, h]`` and ``category_id``.
        names: class names by ``category_id``.
    """
    canvas = _Canvas(pixels)
    for item in objects:
        canvas.box(item["bbox"], OBJECT, names[item["category_id"]])
    return canvas.jpeg()


def draw_verdict(
    pixels: np.ndarray, verdict: dict[str, list[dict[str, Any]]], names: dict[int, str]
) -> bytes:
    """A picture with what a detector got right, got wrong and missed, as JPEG.

    Args:
        pixels: (H, W, 3) uint8, RGB.
        verdict: of :func:`focal_det.analysis.matching.judge`.
        names: class names by ``category_id``.
    """
    canvas = _Canvas(pixels)
    for item in verdict["missed"]:
        canvas.box(item["bbox"], MISSED)
    for kind, style in (("wrong", WRONG), ("right", RIGHT)):
        for item in verdict[kind]:
            label = f"{names[item['category_id']]} {100 * item['score']:.0f}%"
            canvas.box(item["bbox"], style, label)
    return canvas.jpeg()


class _Canvas:
    """Boxes with labels on a picture, drawn by Detectron2's Visualizer."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.scale = max(1.0, PICTURE_SIDE / min(pixels.shape[:2]))
        self.visualizer = Visualizer(pixels, scale=self.scale)

    def box(self, bbox: Sequence[float], style: tuple[str, str], label: str = "") -> None:
        """Draw one box ``[x, y, w, h]``, its label above it or, at the upper edge, below."""
        left, top, width, height = bbox
        color, line = style
        corners = (left, top, left + width, top + height)
        # A dark line beneath keeps the box visible on bright paper.
        self._outline(corners, "#000000", "-" if line == "-" else line, 3.4)
        self._outline(corners, color, line, 1.8)
        if label:
            size = LABEL_SIZE
            text_height = 1.75 * size / self.scale
            y = top - text_height if top >= text_height else top + height + 2 / self.scale
            self.visualizer.draw_text(
                label,
                (left, y),
                font_size=size / self.scale,  # draw_text multiplies by the scale
                color=color,
                horizontal_alignment="left",
            )

    def _outline(
        self, corners: tuple[float, float, float, float], color: str, line: str, width: float
    ) -> None:
        self.visualizer.draw_box(corners, alpha=1.0, edge_color=color, line_style=line)
        self.visualizer.output.ax.patches[-1].set_linewidth(width)

    def jpeg(self) -> bytes:
        """The picture."""
        buffer = io.BytesIO()
        image = Image.fromarray(self.visualizer.output.get_image())
        # Full colour resolution: halved, it would smear the thin lines.
        image.save(buffer, format="JPEG", quality=86, subsampling=0, optimize=True)
        return buffer.getvalue()
