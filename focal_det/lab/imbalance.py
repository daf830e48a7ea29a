"""How losses fare as foreground gets rarer, and what that says of a data set of one's own.

What is compared are trials that differ in their loss and in their data set alone. How rare
foreground is in a set is the number of background anchors to a foreground one.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .summary import MAX_CHANCE, RANKED, chance_of_lead


def trace(summaries: Iterable[Mapping[str, Any]], clipped: bool | None = None) -> dict[str, Any]:
    """AP over the ratio, row by row.

    Args:
        summaries: of :func:`focal_det.lab.summary.summarise`, of one table and a data set each.
        clipped: whether they were all trained with clipped gradients, on which the order hangs;
            None if that is not known.

    Returns:
        ``labels`` of the rows, ``settings`` (the overrides of each label), ``clipped_gradients``
        (`clipped`), and ``points`` by rising ratio: ``data``, ``background_per_foreground``,
        ``iterations``, ``commits``, ``devices``, and ``AP`` by label: ``mean``, ``sd`` and
        ``values`` of the seeds. Sets without a ratio or a result are left out.
    """
    points, settings = [], {}
    for made in summaries:
        rows = [row for row in made["rows"] if row["metrics"][RANKED]["mean"] is not None]
        ratio = made["background_per_foreground"]
        if not rows or ratio is None:
            continue
        for row in rows:
            settings[row["label"]] = dict(row["overrides"])
        points.append(
            {
                **{key: made[key] for key in ("data", "iterations", "commits", "devices")},
                "background_per_foreground": ratio,
                RANKED: {row["label"]: row["metrics"][RANKED] for row in rows},
            }
        )
    points.sort(key=lambda point: point["background_per_foreground"])
    return {
        "labels": list(settings),
        "settings": settings,
        "clipped_gradients": clipped,
        "points": points,
    }


def advise(ratio: float, traced: Mapping[str, Any]) -> dict[str, Any]:
    """Which loss to try first where foreground is as rare as this.

    Args:
        ratio: background anchors to a foreground one, > 0.
        traced: of :func:`trace`, with at least one point.

    Returns:
        ``point``, the measured one that is nearest on a logarithmic axis; ``inside``, whether
        `ratio` lies between the outermost ones; ``ranked``, its labels by falling mean;
        ``first``, the best and those that its seeds do not tell from it: whose highest seed is not
        below the lowest of the best. With one seed of any row they cannot be told, nor one alone
        where rows that are alike would often have one (:func:`.summary.chance_of_lead`), and where
        all have an AP of 0 there is nothing to tell: ``first`` is None.

    Raises:
        ValueError: nothing was measured, or a ratio of 0 or less.
    """
    points = traced["points"]
    if not points:
        raise ValueError("no ratio of foreground to background was measured yet")
    if not ratio > 0:
        raise ValueError(f"the ratio must be above 0, got {ratio}")
    ratios = [point["background_per_foreground"] for point in points]
    point = min(points, key=lambda p: abs(math.log(p["background_per_foreground"] / ratio)))
    measured = point[RANKED]
    ranked = sorted(measured, key=lambda label: -measured[label]["mean"])
    values = {label: [x for x in measured[label]["values"] if x is not None] for label in ranked}
    lowest = min(values[ranked[0]])
    first = [label for label in ranked if max(values[label]) >= lowest]
    seeds = [len(of_row) for of_row in values.values()]
    told = measured[ranked[0]]["mean"] > 0 and min(seeds) > 1
    if len(first) == 1 and len(ranked) > 1:
        told = told and chance_of_lead(seeds) <= MAX_CHANCE
    return {
        "point": point,
        "inside": min(ratios) <= ratio <= max(ratios),
        "ranked": ranked,
        "first": first if told else None,
    }


def relative(traced: Mapping[str, Any], label: str) -> list[float | None]:
    """A row's mean AP in percent of the best row's, at each point; None where it has none.

    Args:
        traced: of :func:`trace`.
        label: of the row.
    """
    shares = []
    for point in traced["points"]:
        best = max(row["mean"] for row in point[RANKED].values())
        mean = point[RANKED].get(label, {}).get("mean")
        shares.append(100 * mean / best if mean is not None and best > 0 else None)
    return shares
