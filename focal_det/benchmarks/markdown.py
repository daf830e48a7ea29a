"""The page about performance: from records of the benchmarks to Markdown, and nothing else.

A record is what :mod:`focal_det.benchmarks.measure` writes; a row is one of its ``rows``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from .measure import slug
from .targets import OURS, Target, as_ratio, find_targets, pick

Row = dict[str, Any]

INTRODUCTION = """\
# Performance

Made by `make docs` from the records in `tools/results/`; do not edit it. One command measures \
everything on your machine, on its GPU if it has one, and writes this page anew:

```bash
make benchmark
```

Variants that are compared take turns in one process, and only after their results were found to \
agree. Times are medians, with the quartiles in brackets. A ratio is the time over that of \
Detectron2's own code in the same case: 1/12 is twelve times as fast, 2.0x half as fast. *cold* is \
the CPU's allocator as it comes, which takes large buffers fresh from the operating system; *warm* \
reuses pages. A peak is the memory that one call takes above what was allocated before it: on a \
GPU by its tensors; on a CPU by the process, which is what the C library and the operating system \
make of the tensors, and for the losses by the tensors too.
"""

LOSS_NOTE = """\
From the head's raw output (N, 9 K, H, W) of five levels to its gradient. S is the size of the \
logits in float32. `torch` and `triton` are focal_det's, `eager` is its slow twin of plain \
autograd. `detectron2` is the path of Detectron2's RetinaNet, here with gamma 2 and alpha .25; it \
knows no other loss, so the ratio of the others is to that, too. `torchvision` is its function on \
the same route, `fvcore` the function alone with logits and targets prepared beforehand. `copy` \
and `exp` compute no loss: reading the logits and writing as much is the floor, for the forward \
pass alone, too. On a GPU, other work is queued ahead of each call, as it is in the middle of a \
training step: the time is the GPU's own.
"""

MODEL_NOTE = """\
Random weights, images and boxes, K = 80, the stem and first stage frozen. The ratio is to \
Detectron2's RetinaNet.
"""

DIAGNOSTICS_NOTE = """\
What FocalRetinaNet's scalars for TensorBoard take: in an ordinary step, in the one of 20 that \
looks at the loss of every anchor, and on average.
"""


def render(records: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        records: valid ones, of any number of devices and tools.
    """
    parts = [INTRODUCTION]
    if not records:
        parts.append("Nothing has been measured yet.\n")
    if not any(record["device"]["type"] == "cuda" for record in records):
        parts.append("Not measured on a GPU.\n")
    for name in sorted({slug(record["device"]) for record in records}):
        parts += _device(sorted(_of(records, name), key=lambda record: record["tool"]))
    return "\n".join(parts)


def _of(records: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [record for record in records if slug(record["device"]) == name]


def _device(records: Sequence[dict[str, Any]]) -> list[str]:
    """All sections of one device."""
    device = records[0]["device"]
    rows = [row for record in records for row in record["rows"]]
    threads = f", {device['threads']} threads" if device["threads"] else ""
    parts = [f"## {device['name']}{threads}\n"]
    parts += ["".join(_provenance(record) for record in records)]
    parts += ["### Targets\n", _targets(find_targets(rows, device["type"]))]
    slower = _slower(rows)
    if slower:
        parts += ["### Where focal_det is slower than another\n", slower]
    parts += _losses(_only(rows, "loss"))
    parts += _models(rows)
    parts += _diagnostics(_only(rows, "diagnostics"))
    parts += _paired(_only(rows, "assignment"), "Anchor assignment", "boxes")
    parts += _paired(_only(rows, "postprocessing"), "Post-processing of one image", "candidates")
    parts += [_sync(row) for row in _only(rows, "sync")]
    return parts


def _only(rows: Iterable[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def _provenance(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in record["versions"].items() if text)
    changed = ", with changes that are not in it" if record["dirty"] else ""
    return (
        f"- `{record['command']}` on {record['date']}, commit {record['commit'] or 'unknown'}"
        f"{changed}, seed {record['seed']}; {versions}\n"
    )


def _targets(targets: Sequence[Target]) -> str:
    rows = [(x.name, x.goal, x.measured or "not measured", x.verdict) for x in targets]
    return table(("what", "target", "measured", ""), rows)


def _slower(rows: Sequence[Row]) -> str:
    """A line for each case in which a peer took less time than ours; empty without any."""
    keys = ("part", "dtype", "mode", "shape", "backbone", "size", "boxes", "state", "allocator")
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get("median_ms") is not None and _name(row) not in ("copy", "exp", "eager"):
            cases.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    lines = []
    for case, members in cases.items():
        peers = [row for row in members if not _is_ours(row)]
        fastest = min(peers, key=lambda row: row["median_ms"], default=None)
        for row in members:
            if fastest and _is_ours(row) and row["median_ms"] > fastest["median_ms"]:
                factor = row["median_ms"] / fastest["median_ms"]
                where = ", ".join(str(value) for value in case if value is not None)
                label = f"{row.get('loss', '')} {_name(row)}".strip()
                lines.append(f"- {where}: {label} takes {factor:.2f}x {_name(fastest)}\n")
    return "".join(lines)


def _name(row: Row) -> str:
    return str(row.get("variant") or row.get("model"))


def _is_ours(row: Row) -> bool:
    return _name(row) in OURS or _name(row).startswith("FocalRetinaNet")


def _losses(rows: Sequence[Row]) -> list[str]:
    """A table for each shape and mode."""
    parts = ["### Classification losses\n", LOSS_NOTE] if rows else []
    for shape, images, mode in _distinct(rows, "shape", "images", "mode"):
        chosen = [r for r in rows if (r["shape"], r["images"], r["mode"]) == (shape, images, mode)]
        what = "forward and backward" if mode == "forward+backward" else "forward, no gradient"
        allocators = [name for (name,) in _distinct(chosen, "allocator")]
        head = ["loss", "by", "dtype"]
        for name in allocators:
            head += [f"{name} ms", f"{name} ratio"]
        lines = [
            [row[0] or "-", *row[1:], *_loss_cells(chosen, row, allocators)]
            for row in _distinct(chosen, "loss", "variant", "dtype")
        ]
        head += ["peak MiB", "peak / S", "tensors / S", "x copy"]
        title = f"#### {shape}, {images} image{'s' if images > 1 else ''}, {what}\n"
        parts += [title, table(head, lines)]
    return parts


def _loss_cells(rows: Sequence[Row], line: Sequence[str], allocators: Sequence[str]) -> list[str]:
    """Times and ratios by allocator, and peaks, of a line's loss, variant and dtype."""
    rows = pick(rows, **dict(zip(("loss", "variant", "dtype"), line, strict=True)))
    errors = [row["error"] for row in rows if row["error"]]
    if errors:
        return [errors[0], "-"] + ["-", "-"] * (len(allocators) - 1) + ["-"] * 4
    cells = []
    for allocator in allocators:
        row = next(iter(pick(rows, allocator=allocator)), None)
        cells += [milliseconds(row), ratio(row["ratio"] if row else None)]
    peaks = [row for row in rows if row["peak_mib"] is not None]
    floor = rows[-1]["floor_ratio"]  # of the warm allocator, where there are two
    cells += [f"{peaks[0]['peak_mib']:.1f}", f"{peaks[0]['peak_s']:.2f}"] if peaks else ["-", "-"]
    tensors = [row["tensors_s"] for row in rows if row["tensors_s"] is not None]
    cells.append(f"{tensors[0]:.2f}" if tensors else "-")
    return [*cells, "-" if floor is None else f"{floor:.1f}"]


def _models(rows: Sequence[Row]) -> list[str]:
    parts = []
    for part, title in (("step", "Training step"), ("inference", "Inference, untrained")):
        chosen = _only(rows, part)
        if not chosen:
            continue
        head = ("model", "backbone", "size", "images", "AMP", "ms", "images/s", "ratio", "peak MiB")
        parts += [f"### {title}\n", MODEL_NOTE, table(head, [_model_cells(r) for r in chosen])]
    shares = _only(rows, "shares")
    if shares:
        names = list(dict.fromkeys(name for row in shares for name in row["parts_ms"]))
        lines = [
            [row["model"], row["backbone"], row["size"], f"{row['step_ms']:.0f}"]
            + [_share(row, name) for name in names]
            for row in shares
        ]
        head = ("model", "backbone", "size", "step ms", *names)
        parts += ["### Where a training step goes\n", table(head, lines)]
    return parts


def _diagnostics(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    head = ("backbone", "size", "images", "step ms", "ordinary ms", "look ms", "mean share")
    lines = []
    for row in rows:
        times = (f"{row['step_ms']:.0f}", f"{row['ordinary_ms']:.2f}", f"{row['look_ms']:.2f}")
        where = (row["backbone"], row["size"], str(row["batch"]))
        lines.append([*where, *times, f"{row['share']:.2%}"])
    return ["### Diagnostics of a training step\n", DIAGNOSTICS_NOTE, table(head, lines)]


def _model_cells(row: Row) -> list[str]:
    known = row["images_per_s"] is not None
    speed = f"{row['images_per_s']:.2f}" if known else "-"
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    shown = [row["model"], row["backbone"], row["size"], str(row["batch"]), row["amp"]]
    return [*shown, milliseconds(row), speed, ratio(row["ratio"]), peak]


def _share(row: Row, name: str) -> str:
    spent = row["parts_ms"].get(name)
    return "-" if spent is None else f"{spent / row['step_ms']:.1%}"


def _paired(rows: Sequence[Row], title: str, key: str) -> list[str]:
    """A table of built-in and ours, a line for each case and allocator."""
    if not rows:
        return []
    state = ["state"] if "state" in rows[0] else []
    lines = []
    for case in _distinct(rows, "size", *state, key, "allocator"):
        chosen = pick(rows, **dict(zip(("size", *state, key, "allocator"), case, strict=True)))
        by_name = {row["variant"]: row for row in chosen}
        both = [by_name.get(name) for name in ("detectron2", "focal_det")]
        cells = [cell for row in both for cell in (milliseconds(row), _peak(row))]
        lines.append([*map(str, case), *cells, ratio(both[1]["ratio"] if both[1] else None)])
    head = ("size", *state, key, "allocator", "built-in ms", "MiB", "focal_det ms", "MiB", "ratio")
    return [f"### {title}\n", table(head, lines)]


def _peak(row: Row | None) -> str:
    return "-" if row is None or row["peak_mib"] is None else f"{row['peak_mib']:.1f}"


def _sync(row: Row) -> str:
    outcome = "never waits for the GPU" if row["passed"] else f"waits for the GPU: {row['error']}"
    where = f"{row['backbone']}, {row['batch']} images of {row['size']}"
    return f"In `forward_training` and backward ({where}), the host {outcome}.\n"


def _distinct(rows: Iterable[Row], *keys: str) -> list[tuple[Any, ...]]:
    """The combinations of values that occur, in their order."""
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def milliseconds(row: Row | None) -> str:
    """Median and quartiles, or why there are none."""
    if row is None:
        return "-"
    if row["error"]:
        return str(row["error"]).replace("|", "\\|")
    fields = ("median_ms", "quartile_low_ms", "quartile_high_ms")
    median, low, high = (f"{row[x]:.0f}" if row[x] >= 100 else f"{row[x]:.3g}" for x in fields)
    return f"{median} ({low}-{high})"


def ratio(value: float | None) -> str:
    """:func:`as_ratio` of what may be missing."""
    return "-" if value is None else as_ratio(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
