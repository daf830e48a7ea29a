"""Settings and machines in which runs differ."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

LEFT_OUT = frozenset({"OUTPUT_DIR"})
ABSENT = "not set"
MANY = 6  # runs; more are counted


class Entry(NamedTuple):
    """A run and what is known of it.

    Attributes:
        group: what the run is part of, plain text.
        name: of the run within it, without its seed; empty where it is the only one.
        seed: None where the name says all.
        values: by key.
    """

    group: str
    name: str
    seed: int | None
    values: Mapping[str, Any]


class Value(NamedTuple):
    """A value of some key, and the runs that have it, in words."""

    text: str
    runs: str


def compare(entries: Sequence[Entry]) -> dict[str, list[Value]]:
    """The values of every key, those that most runs have first.

    Args:
        entries: at least one; a key that one lacks is :data:`ABSENT` there.
    """
    keys = dict.fromkeys(key for entry in entries for key in entry.values)
    return {key: _values(entries, key) for key in keys if key not in LEFT_OUT}


def differing(entries: Sequence[Entry]) -> dict[str, list[Value]]:
    """Those of :func:`compare` that have more than one value, by key."""
    found = compare(entries)
    return {key: found[key] for key in sorted(found) if len(found[key]) > 1}


def _values(entries: Sequence[Entry], key: str) -> list[Value]:
    having: dict[str, list[Entry]] = {}
    for entry in entries:
        value = entry.values.get(key, ABSENT)
        having.setdefault("unknown" if value is None else str(value), []).append(entry)
    ordered = sorted(having.items(), key=lambda item: -len(item[1]))
    return [
        Value(text, _name(members, entries, is_most=index == 0 and len(ordered) > 1))
        for index, (text, members) in enumerate(ordered)
    ]


def _name(members: Sequence[Entry], every: Sequence[Entry], *, is_most: bool) -> str:
    """Some of all runs in words; the most frequent value's are the others where they are many."""
    names = []
    for group in dict.fromkeys(entry.group for entry in members):
        some, there = ([x for x in entries if x.group == group] for entries in (members, every))
        if len(some) == len(there):
            names.append(group if len(some) == 1 else f"all of {group}")
            continue
        for name in dict.fromkeys(entry.name for entry in some):
            seeds = _seeds(some, name)
            suffix = f" (seed {', '.join(map(str, seeds))})" if seeds != _seeds(there, name) else ""
            names.append(f"{group}: {name}{suffix}")
    if len(names) <= MANY:
        return "; ".join(names)
    if is_most:
        return f"all others ({len(members)} runs)"
    return "; ".join(names[:MANY]) + f" and {len(names) - MANY} more"


def _seeds(entries: Iterable[Entry], name: str) -> list[int]:
    return sorted({x.seed for x in entries if x.name == name and x.seed is not None})
