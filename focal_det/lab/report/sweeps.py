"""The records of one sweep's folder as tables, each a summary and the trials behind it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from focal_det.lab.summary import RANKED, name_data, summarise
from focal_det.lab.tables import Row, Table, built_in, load_table

from .finding import Sweep


@dataclass(frozen=True)
class Outcome:
    """What came of one table.

    Attributes:
        summary: of :func:`focal_det.lab.summary.summarise`.
        trials: of its rows, one a row that has any: the one with the first seed.
        errors: label, seed and error of each training that was given up.
        setting: config keys and values in which it differs from the same table's other outcomes.
    """

    summary: dict[str, Any]
    trials: dict[str, dict[str, Any]]
    errors: list[tuple[str, int, str]]
    setting: dict[str, str]


def outcomes(sweep: Sweep) -> list[Outcome]:
    """One for each table, data set and budget, and for each setting that was tried besides.

    A summary that ``tools/ablate.py`` kept is preferred where it holds all that the records say:
    it also has trials that the table shares with another, and the title of a user's own table.

    Args:
        sweep: what there is.
    """
    made = []
    for name, trials, setting in _groups(sweep.trials):
        table = _table(name, trials)
        summary = summarise(table, [*trials, *_shared(sweep.trials, table, trials[0], setting)])
        saved = sweep.saved.get(name)
        if saved is not None and _covers(saved, summary):
            summary = saved
        shared = [trial for trial in sweep.trials if trial["table"] != name]
        made.append(_outcome(summary, [*trials, *shared], setting))
    shown = {outcome.summary["table"] for outcome in made}
    left = [sweep.saved[name] for name in sorted(sweep.saved) if name not in shown]
    return made + [_outcome(summary, sweep.trials, {}) for summary in left]


def _groups(
    trials: Iterable[dict[str, Any]],
) -> list[tuple[str, list[dict[str, Any]], dict[str, str]]]:
    """Table, trials that are comparable, and in which settings these differ from other groups."""
    by_table: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for trial in trials:
        by_table[trial["table"], str(trial["data"]), trial["iterations"]].append(trial)
    groups = []
    for (name, _, _), members in sorted(by_table.items(), key=lambda item: item[0]):
        keys = _changed_between_sweeps(members)
        by_setting: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        for trial in members:
            by_setting[tuple(trial["settings"].get(key, "not set") for key in keys)].append(trial)
        for values, chosen in sorted(by_setting.items(), key=lambda item: item[0]):
            groups.append((name, chosen, dict(zip(keys, values, strict=True))))
    return groups


def _changed_between_sweeps(trials: Sequence[dict[str, Any]]) -> list[str]:
    """Keys in which two trials of one row and seed differ: no row says them, the user did."""
    first: dict[tuple[str, int], dict[str, str]] = {}
    keys: set[str] = set()
    for trial in trials:
        one = first.setdefault((trial["label"], trial["seed"]), trial["settings"])
        other = trial["settings"]
        keys |= {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    return sorted(keys)


def _table(name: str, trials: Sequence[dict[str, Any]]) -> Table:
    """The built-in table with what other rows there are, or one of the labels alone."""
    labels = {trial["label"]: dict(trial["overrides"]) for trial in trials}
    table = load_table(name) if name in built_in() else None
    if table is None or not labels.keys() & {row.label for row in table.rows}:
        table = Table(name, f"Table {name}", "", ())
    known = {row.label for row in table.rows}
    others = [Row(label, labels[label]) for label in labels if label not in known]
    return Table(table.name, table.title, table.source, (*table.rows, *others), table.speed)


def _shared(
    trials: Iterable[dict[str, Any]],
    table: Table,
    like: dict[str, Any],
    setting: dict[str, str],
) -> list[dict[str, Any]]:
    """Trials of other tables that are of this one's rows too, under the labels of these rows.

    Args:
        trials: of the whole sweep.
        table: whose rows are meant.
        like: a trial of it; data set and budget must be the same.
        setting: what the group's trials have in common.
    """
    found = []
    for row in table.rows:
        for trial in trials:
            same = all(trial[part] == like[part] for part in ("data", "iterations"))
            same = same and dict(trial["overrides"]) == row.overrides
            held = all(trial["settings"].get(key, "not set") == x for key, x in setting.items())
            if trial["table"] != table.name and same and held:
                found.append({**trial, "label": row.label})
    return found


def _covers(saved: dict[str, Any], made: dict[str, Any]) -> bool:
    """Whether a summary has the results of every trial that another has."""
    there = {row["label"]: _results(row) for row in saved["rows"]}
    return all(there.get(row["label"], set()) >= _results(row) for row in made["rows"])


def _results(row: dict[str, Any]) -> set[tuple[int, float | None]]:
    return set(zip(row["seeds"], row["metrics"][RANKED]["values"], strict=True))


def _outcome(
    summary: dict[str, Any], trials: Sequence[dict[str, Any]], setting: dict[str, str]
) -> Outcome:
    found, errors = {}, []
    for row in summary["rows"]:
        of_row = [trial for trial in trials if _is_of(trial, row, summary)]
        of_row.sort(key=lambda trial: int(trial["seed"]))
        if of_row:
            found[row["label"]] = of_row[0]
        errors += [(row["label"], x["seed"], x["error"]) for x in of_row if x["error"] is not None]
    return Outcome(summary, found, errors, setting)


def _is_of(trial: dict[str, Any], row: dict[str, Any], summary: dict[str, Any]) -> bool:
    """Whether a row was made of this trial, whose record may have another table's label."""
    value = 0.0 if trial["error"] is not None else trial["metrics"][RANKED]
    return (
        (trial["seed"], value) in _results(row)
        and trial["iterations"] in summary["iterations"]
        and name_data(trial) in summary["data"]
        and (trial["label"] == row["label"] or dict(trial["overrides"]) == row["overrides"])
    )
