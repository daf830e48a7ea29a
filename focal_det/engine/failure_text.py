"""Reports of what is not finite as text."""

from typing import Any

from tabulate import tabulate

from .diagnosis import REASONS, Report, unsound

# Entries of the report, and what they are called in its text.
LINES = {
    "forward_pass": "forward pass",
    "losses": "losses",
    "module": "first module with non-finite output for finite input",
    "level": "first level with non-finite predictions",
    "positives": "anchors assigned to an object",
    "normalizer": "normalizer",
    "learning_rates": "learning rates",
    "loss_scale": "loss scale",
    "precision": "precision of autocast",
    "gradient_norm": "gradient norm",
    "non_finite_gradients": "non-finite gradients, in the order of the backward pass",
    "non_finite_parameters": "non-finite parameters before the step",
    "non_finite_buffers": "non-finite buffers before the step",
    "largest_parameter": "largest parameter",
    "seed": "seed",
    "not_examined": "not examined again, because of",
}
SHOWN = 8  # names of a list


def summary(report: Report) -> Report:
    """What the other ranks are told: the entries of ``ranks`` but for the folder."""
    own = {key: report[key] for key in ("rank", "term", "value", "image")}
    return {**own, "losses": unsound(report["losses"])}


def cause(report: Report) -> Report:
    """The entry of ``ranks`` to blame.

    A loss on one rank spoils the gradients on all, and the losses too where batch normalization is
    synchronized: of the ranks with such a loss, that with the surest reason to blame an image.
    """
    suspects = [x for x in report["ranks"] if x["losses"] or x["rank"] == report["rank"]]
    order = list(REASONS)

    def doubt(entry: Report) -> tuple[bool, int]:
        image = entry["image"]
        return not entry["losses"], len(order) if image is None else order.index(image["reason"])

    return min(suspects, key=doubt)


def headline(report: Report) -> str:
    """What, when and for which image: a sentence without its full stop."""
    blamed = cause(report)
    one_rank = report["world_size"] > 1 and blamed["losses"]
    where = f" on rank {blamed['rank']}" if one_rank else ""
    image = blamed["image"]
    if image is None:
        blame = "no image by itself is to blame"
    else:
        name = image["file_name"] or f"number {image['index']} of the batch"
        known = "" if image["image_id"] is None else f" (image_id {image['image_id']})"
        others = f"; so are those of {image['others']} more" if image["others"] else ""
        blame = f"first image: {name}{known}, {image['reason']}{others}"
    value = f"{blamed['term']} is {blamed['value']}"
    return f"{value} at iteration {report['iteration']}{where}; {blame}"


def format_report(report: Report) -> str:
    """The report as text."""
    lines = [headline(report)]
    if len(report["ranks"]) > 1:
        keys = ("rank", "term", "value", "folder")
        lines.append(tabulate([[x[key] for key in keys] for x in report["ranks"]], headers=keys))
    # Reports of before an entry was added lack it.
    known = {name: report[key] for key, name in LINES.items() if report.get(key) is not None}
    lines += [f"{name}: {_show(value)}" for name, value in known.items()]
    for title, rows in (("levels", report["levels"]), ("images", report["images"])):
        if rows:
            flat = [_flatten(row) for row in rows]
            lines += [title, tabulate(flat, headers="keys", floatfmt=".4g", missingval="-")]
    return "\n".join(lines)


def _flatten(row: Report, prefix: str = "") -> Report:
    flat: Report = {}
    for key, value in row.items():
        name = f"{prefix} {key}".strip().replace("_", " ")
        flat.update(_flatten(value, key) if isinstance(value, dict) else {name: value})
    return flat


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        more = [f"and {len(value) - SHOWN} more"] if len(value) > SHOWN else []
        return ", ".join([*map(_show, value[:SHOWN]), *more]) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
