"""In what runs differ, and on what they ran, as HTML."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from focal_det.analysis import page
from focal_det.analysis.page import Place

from .differences import Entry, Value, compare, differing
from .finding import Found

TIMED_BY = frozenset({"device", "commit", "torch", "torchvision"})


def settings(found: Found, place: Place) -> str:
    """The config keys in which runs differ.

    Args:
        found: the records.
        place: of the table.
    """
    entries, _, without = _entries(found)
    parts = []
    # A LazyConfig has other keys than a YAML config: side by side, all of them would differ.
    for kind, members in _kinds(entries).items():
        differences = differing(members)
        count = page.count(len(members), "run", "runs")
        if len(members) < 2 or not differences:
            parts.append(f"<p>{count.capitalize()}{kind}: no key differs.</p>")
            continue
        caption = f"Config keys in which the {count}{kind} differ, without OUTPUT_DIR"
        rows = [_row(key, values) for key, values in differences.items()]
        parts.append(place.table(caption, ("Key",), rows, text="Values and their runs"))
    if without:
        parts.append(f"<p>No config is kept of {escape('; '.join(without))}.</p>")
    return "\n".join(parts)


def _kinds(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        kind = "" if "MODEL.META_ARCHITECTURE" in entry.values else " of a LazyConfig"
        kinds.setdefault(kind, []).append(entry)
    return kinds


def _row(key: str, values: Sequence[Value]) -> str:
    items = "".join(
        f"<li><code>{escape(value.text)}</code> {escape(value.runs)}</li>" for value in values
    )
    return page.row(f"<code>{escape(key)}</code>", (), text=f"<ul>{items}</ul>")


def environments(found: Found, place: Place) -> str:
    """Versions and machines of runs; nothing where no run says them.

    Args:
        found: the records.
        place: of the table.
    """
    _, entries, _ = _entries(found)
    if not entries:
        return ""
    compared = compare(entries)
    changed = [key for key, values in compared.items() if len(values) > 1]
    rows = []
    for key, values in compared.items():
        if key in changed:
            rows.append(_row(key, values))
        else:
            agreed = f"<code>{escape(values[0].text)}</code>"
            rows.append(page.row(f"<code>{escape(key)}</code>", (), text=agreed))
    count = page.count(len(entries), "record", "records")
    return _agreement(count, changed) + place.table(
        f"Versions and machines of {count}", ("What",), rows, text="Values"
    )


def _agreement(count: str, changed: Sequence[str]) -> str:
    if not changed:
        return f"<p>{count.capitalize()}, all of the same versions on the same kind of machine.</p>"
    text = f"{count.capitalize()}. They differ in {', '.join(changed)}."
    if TIMED_BY & set(changed):
        text += " Their times and memory are not to be compared without a thought."
    return f"<p><b>{escape(text)}</b></p>"


def _entries(found: Found) -> tuple[list[Entry], list[Entry], list[str]]:
    """Settings and environments of all runs, and the names of those whose config is not there."""
    configs, machines, without = [], [], []
    for sweep in found.sweeps:
        several = len(found.sweeps) > 1
        for trial in sweep.trials:
            group = f"table {trial['table']}"
            group = f"{found.name(sweep.folder)}, {group}" if several else group
            configs.append(Entry(group, trial["label"], trial["seed"], trial["settings"]))
            machines.append(Entry(group, trial["label"], trial["seed"], trial["environment"]))
    for comparison in found.comparisons:
        for run in comparison.results["records"]:
            group, loss = found.name(comparison.folder), run["loss"]
            machines.append(Entry(group, loss, None, _mapping(run.get("environment"))))
            if loss in comparison.settings:
                configs.append(Entry(group, loss, None, comparison.settings[loss]))
            else:
                without.append(f"{group}: {loss}")
    for each in found.runs:
        name = f"run {found.name(each.folder)}"
        if each.settings:
            configs.append(Entry(name, "", None, each.settings))
        else:
            without.append(name)
    return configs, [entry for entry in machines if entry.values], without


def _mapping(content: Any) -> Mapping[str, Any]:
    return content if isinstance(content, Mapping) else {}
