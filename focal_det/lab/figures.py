"""The paper's figures, drawn from our own losses, records and measurements.

Every function takes plain data, so that what is drawn can be kept beside the picture and drawn
again. Colours are Okabe and Ito's; dashes say the same a second time.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from focal_det.analysis.drawing import STYLES, drawing_as_here
from focal_det.losses import CrossEntropyLoss, ElementwiseLoss, FocalLoss, FocalLossStar

from .charts import plain
from .imbalance import relative
from .summary import RANKED, shows_times

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)  # arXiv 1708.02002, Figure 1
FORMS: dict[str, ElementwiseLoss] = {  # Figures 5 and 6, without alpha
    "CE": CrossEntropyLoss(),
    "FL, gamma 2": FocalLoss(alpha=None, gamma=2.0),
    "FL*, gamma 2, beta 1": FocalLossStar(alpha=None, gamma=2.0, beta=1.0),
    "FL*, gamma 4, beta 0": FocalLossStar(alpha=None, gamma=4.0, beta=0.0),
}
SIZE = (5.6, 4.2)
# Of Figure 2; the same in each panel.
FAMILIES = {
    "FocalRetinaNet": (STYLES[3], "D"),
    "RetinaNet": (STYLES[1], "o"),
    "others": (STYLES[0], "s"),
}
# In typographic points: a marker, a digit of the numbers beside it, and how far these may be.
MARKER = 9.0
DIGIT = (5.5, 8.5)
DISTANCES = (7.0, 12.0, 18.0, 26.0)
# To the right, below, above, to the left, and between them.
DIRECTIONS = (
    (1.0, 0.0), (0.0, -1.2), (0.0, 1.2), (-1.0, 0.0), (0.8, -0.8), (0.8, 0.8), (-0.8, -0.8),
    (-0.8, 0.8),
)  # fmt: skip
LEADER = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkA": 5, "shrinkB": 4}


def figure_1() -> Figure:
    """Focal loss over p_t (arXiv 1708.02002, Figure 1)."""
    p_t = torch.linspace(0.005, 0.995, 400, dtype=torch.float64)
    curves = {
        f"gamma {gamma:g}" + (" (CE)" if gamma == 0 else ""): loss_of(
            FocalLoss(alpha=None, gamma=gamma), torch.logit(p_t)
        )[0]
        for gamma in GAMMAS
    }
    with drawing_as_here():
        figure, axes = _axes("Focal loss", "p_t, probability of the true class", "loss")
        _draw_curves(axes, p_t, curves)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 5)
        axes.axvspan(0.6, 1, color="#eeeeee", zorder=0)
        axes.text(0.8, 4.6, "well classified", ha="center", color="#444444")
        axes.legend(frameon=False, loc="upper center", handlelength=3.2)
    return figure


def figure_5() -> Figure:
    """FL and FL* over x_t = y x (arXiv 1708.02002, Figure 5)."""
    return _forms("FL and FL*", "loss", derivative=False)


def figure_6() -> Figure:
    """Their derivatives by x_t (arXiv 1708.02002, Figure 6)."""
    return _forms("Derivatives of FL and FL*", "d loss / d x_t", derivative=True)


def _forms(title: str, unit: str, *, derivative: bool) -> Figure:
    x_t = torch.linspace(-5, 5, 401, dtype=torch.float64)
    curves = {name: loss_of(loss, x_t)[int(derivative)] for name, loss in FORMS.items()}
    with drawing_as_here():
        figure, axes = _axes(title, "x_t, logit of the true class", unit)
        _draw_curves(axes, x_t, curves)
        axes.set_xlim(-5, 5)
        axes.axvline(0, color="#999999", linewidth=0.8)
        axes.legend(frameon=False, handlelength=3.2)
    return figure


def loss_of(loss: ElementwiseLoss, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its derivative by x_t, of foreground terms.

    Args:
        loss: without alpha weighting.
        x_t: (P,) float64.

    Returns:
        Two tensors (P,).
    """
    logits = x_t.clone()[:, None].requires_grad_()
    labels = torch.zeros(len(x_t), dtype=torch.int64)
    values = loss.elementwise(logits, labels)
    (slopes,) = torch.autograd.grad(values.sum(), logits)
    return values.detach()[:, 0], slopes[:, 0]


def figure_7(rows: Iterable[Mapping[str, float]]) -> Figure:
    """FL* curves coloured by the AP that training with them gave (arXiv 1708.02002, Figure 7).

    Args:
        rows: ``gamma``, ``beta`` and ``AP`` of each setting.
    """
    rows = sorted(rows, key=lambda row: row["AP"])
    x_t = torch.linspace(-5, 5, 401, dtype=torch.float64)
    with drawing_as_here():
        figure, axes = _axes("FL* by the AP it gave", "x_t, logit of the true class", "loss")
        scores = [row["AP"] for row in rows]
        norm = mpl.colors.Normalize(min(scores), max(scores) or 1)
        colors = mpl.colormaps["cividis"]
        for row in rows:
            loss = FocalLossStar(alpha=None, gamma=row["gamma"], beta=row["beta"])
            values = loss_of(loss, x_t)[0]
            axes.plot(x_t, values, color=colors(norm(row["AP"])), linewidth=1.8)
        values = loss_of(CrossEntropyLoss(), x_t)[0]
        axes.plot(x_t, values, color="black", linestyle=(0, (4, 1.5)), label="CE")
        axes.set_xlim(-5, 5)
        axes.set_ylim(0, 5)
        axes.legend(frameon=False)
        figure.colorbar(mpl.cm.ScalarMappable(norm, colors), ax=axes, label="AP (percent)")
    return figure


def figure_2(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """AP against inference time, and the upper hull (arXiv 1708.02002, Figure 2).

    One panel a group: times of different machines have no common axis.

    Args:
        groups: title to points with ``method``, ``AP`` (percent) and ``time_ms``.
    """
    with drawing_as_here():
        figure = Figure(figsize=(1.7 * SIZE[0], SIZE[1] * len(groups)), layout="constrained")
        panels = figure.subplots(len(groups), squeeze=False)[:, 0]
        numbered = []
        for axes, (title, points) in zip(panels, groups.items(), strict=True):
            _label(axes, plain(title), "inference time of an image (ms)", "AP (percent)")
            hull = upper_hull([(point["time_ms"], point["AP"]) for point in points])
            axes.plot(*zip(*hull, strict=True), color="#999999", linestyle=(0, (4, 1.5)), zorder=1)
            points = sorted(points, key=lambda point: -point["AP"])
            for number, point in enumerate(points, start=1):
                style, marker = FAMILIES[_family(point["method"])]
                what = f"{point['method']}: {point['AP']:.1f}, {point['time_ms']:.3g} ms"
                axes.plot(
                    point["time_ms"], point["AP"], marker, color=style.color, ms=7,
                    linestyle="none", label=plain(f"{number}  {what}"),
                )  # fmt: skip
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
            axes.margins(0.12)
            numbered.append((axes, [(point["time_ms"], point["AP"]) for point in points]))
        figure.draw_without_rendering()  # Places hang on the layout, and may not change it.
        figure.set_layout_engine("none")
        for axes, at in numbered:
            for number, (place, where) in enumerate(zip(_places(axes, at), at, strict=True), 1):
                axes.annotate(
                    str(number), where, xytext=place, textcoords="offset points", fontsize=9,
                    ha="center", va="center", arrowprops=LEADER,
                )  # fmt: skip
    return figure


def _places(axes: Axes, at: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where the numbers 1, 2, ... of points go: near them, and where it can be, off all points and
    other numbers.

    Args:
        axes: whose limits do not change any more.
        at: the points, in its data.

    Returns:
        The middle of each number, as its offset in typographic points.
    """
    inch = axes.figure.dpi / 72
    middles = axes.transData.transform(at) / inch
    taken = [(x, y, MARKER, MARKER) for x, y in middles]
    places = []
    for number, (x, y) in enumerate(middles, start=1):
        wide, high = DIGIT[0] * len(str(number)), DIGIT[1]
        tried = [
            (distance * right + wide * np.sign(right) / 2, distance * up)
            for distance in DISTANCES
            for right, up in DIRECTIONS
        ]
        free = (
            (right, up)
            for right, up in tried
            if not any(
                abs(x + right - left) < (wide + width) / 2
                and abs(y + up - low) < (high + height) / 2
                for left, low, width, height in taken
            )
        )
        right, up = next(free, tried[0])
        taken.append((x + right, y + up, wide, high))
        places.append((float(right), float(up)))
    return places


def speed_points(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A sweep's own points of Figure 2: the rows that have both an AP and a time.

    Args:
        summary: of :func:`focal_det.lab.summary.summarise`.

    Returns:
        ``method``, ``AP`` (percent, mean over seeds) and ``time_ms`` of each.
    """
    return [
        {
            "method": row["label"],
            "AP": row["metrics"]["AP"]["mean"],
            "time_ms": row["inference_ms"],
        }
        for row in summary["rows"]
        if row["inference_ms"] is not None and row["metrics"]["AP"]["mean"] is not None
    ]


def speed_panels(summaries: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Panels of Figure 2, a sweep each, by their titles: data, iterations and devices.

    Args:
        summaries: of :func:`focal_det.lab.summary.summarise`.

    Raises:
        ValueError: a sweep of a table that shows no times, one without both an AP and a time in any
            row, or two that cannot be told apart.
    """
    panels: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        iterations = ", ".join(map(str, summary["iterations"]))
        title = f"{', '.join(summary['data'])}; {iterations} it.; {', '.join(summary['devices'])}"
        if not shows_times(summary):
            raise ValueError(f"{title}: not a table of times, its trials may have shared cores")
        points = speed_points(summary)
        if not points:
            raise ValueError(f"{title}: no row has both an AP and a time")
        if title in panels:
            raise ValueError(f"two sweeps of {title}")
        panels[title] = points
    return panels


def speed_picture(summary: Mapping[str, Any]) -> Figure | None:
    """Figure 2 of a sweep's own rows; None where none has both an AP and a time.

    Args:
        summary: of :func:`focal_det.lab.summary.summarise`.
    """
    points = speed_points(summary)
    return figure_2({", ".join(summary["devices"]): points}) if points else None


def _family(method: str) -> str:
    return next((family for family in FAMILIES if family in method), "others")


def upper_hull(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper convex hull of points, from the leftmost to the highest.

    Args:
        points: time and AP; at least one.

    Returns:
        Corners by rising time; no line between two of them has a point above it.
    """
    hull: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if hull and hull[-1][0] == point[0]:
            continue  # as slow as the last and no better
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) >= 0:
            hull.pop()
        hull.append(point)
    highest = max(range(len(hull)), key=lambda index: hull[index][1])
    return hull[: highest + 1]


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Above 0 where the way from a over b to c turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def figure_imbalance(traced: Mapping[str, Any]) -> Figure:
    """AP of each loss as foreground gets rarer, and its share of the best loss's AP.

    Args:
        traced: of :func:`focal_det.lab.imbalance.trace`.

    Raises:
        ValueError: more rows than can be told apart.
    """
    _check_number(traced["labels"])
    points = traced["points"]
    ratios = [point["background_per_foreground"] for point in points]
    with drawing_as_here():
        figure = Figure(figsize=(2 * SIZE[0], SIZE[1]), layout="constrained")
        left, right = figure.subplots(1, 2)
        unit = "background anchors to a foreground one"
        _label(left, "AP as foreground gets rarer", unit, "AP (percent)")
        _label(right, "Share of the best loss's AP", unit, "percent")
        for label, style in zip(traced["labels"], STYLES, strict=False):
            look: dict[str, Any] = {"color": style.color, "linestyle": style.dashes}
            there = [
                (ratio, point[RANKED][label])
                for ratio, point in zip(ratios, points, strict=True)
                if label in point[RANKED]
            ]
            left.plot(*zip(*((r, m["mean"]) for r, m in there), strict=True), label=label, **look)
            for ratio, metric in there:
                values = [value for value in metric["values"] if value is not None]
                left.plot([ratio] * len(values), values, "o", color=style.color, ms=4, alpha=0.6)
            shares = zip(ratios, relative(traced, label), strict=True)
            known = [(ratio, share) for ratio, share in shares if share is not None]
            right.plot(*zip(*known, strict=True), marker="o", ms=4, **look)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xticks(ratios, [f"{ratio:,.0f}" for ratio in ratios])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
        left.legend(frameon=False, handlelength=3.2)
    return figure


def figure_4(curves: Mapping[str, Any]) -> Figure:
    """Cumulative share of the loss, easiest examples first (arXiv 1708.02002, Figure 4).

    Args:
        curves: ``fraction`` (of the examples, in [0, 1]), and for ``foreground`` and
            ``background`` a mapping of gamma, as text, to the share of the loss up to there.
    """
    with drawing_as_here():
        figure = Figure(figsize=(2 * SIZE[0], SIZE[1]), layout="constrained")
        for axes, side in zip(figure.subplots(1, 2), ("foreground", "background"), strict=True):
            _label(axes, side, f"fraction of {side} examples", "share of the loss")
            by_gamma = {f"gamma {float(gamma):g}": y for gamma, y in curves[side].items()}
            _draw_curves(axes, curves["fraction"], by_gamma)
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1)
            axes.legend(frameon=False, loc="upper left", handlelength=3.2)
    return figure


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    _label(axes, title, x, y)
    return figure, axes


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def _check_number(curves: Collection[str]) -> None:
    """Raise before a curve would look like another, or be left out."""
    if len(curves) > len(STYLES):
        raise ValueError(f"{len(curves)} curves, but at most {len(STYLES)} can be told apart")


def _draw_curves(axes: Any, x: Any, curves: Mapping[str, Any]) -> None:
    _check_number(curves)
    for (name, y), style in zip(curves.items(), STYLES, strict=False):
        axes.plot(
            np.asarray(x), np.asarray(y), label=name, color=style.color, linestyle=style.dashes,
            linewidth=2,
        )  # fmt: skip
