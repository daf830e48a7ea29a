"""Results that are kept: which sweeps there are, and their records, however old.

A file of sweeps is YAML: a list, each entry with ``name``, ``data`` (of ``<data>_train`` and
``<data>_val``), ``num_classes``, ``config``, ``tables`` (table to number of seeds) and, where need
be, ``budget`` (iterations), ``overrides`` of all rows and ``rows``, the labels that are meant where
not all are.

A record belongs to a row and seed if its whole config says the same. What is compared is how they
differ from today's defaults: a record that is older than some key had what is the default today.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from focal_det.config import add_config
from focal_det.safe_loading import load_yaml

from .summary import leaves, summarise
from .tables import Table, load_table
from .trial_records import load_setting, read_record
from .trials import base_config, row_config

NEEDED = frozenset({"name", "data", "num_classes", "config", "tables"})
KEYS = NEEDED | {"budget", "overrides", "rows"}

Setting = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Sweep:
    """Tables that were run on one data set, from one config.

    Attributes:
        name: of the sweep.
        data: data set.
        num_classes: K.
        config: path of a YAML.
        tables: number of seeds of each table.
        budget: iterations; None for the config's own.
        overrides: values by config key, for all rows.
        rows: labels of the rows that were run; empty for all.
    """

    name: str
    data: str
    num_classes: int
    config: str
    tables: dict[str, int]
    budget: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """The overrides as words of a command line."""
        return [str(word) for pair in self.overrides.items() for word in pair]

    def table(self, name: str) -> Table:
        """A table, of which only the rows that are meant are left."""
        table = load_table(name)
        rows = tuple(row for row in table.rows if not self.rows or row.label in self.rows)
        return Table(table.name, table.title, table.source, rows, table.speed)

    def base_config(self, root: Path) -> CfgNode:
        """What all rows start from.

        Args:
            root: folder that ``config`` is relative to.
        """
        return base_config(
            str(root / self.config),
            data=self.data,
            num_classes=self.num_classes,
            budget=self.budget,
            options=self.options,
        )


def read_sweeps(path: Path) -> dict[str, Sweep]:
    """Sweeps by name.

    Args:
        path: a file as described above.

    Raises:
        OSError: the file cannot be read.
        ValueError: a key is missing or unknown, or a row is in none of the tables; file and key or
            row are named.
    """
    with path.open(encoding="utf-8") as file:
        content = load_yaml(file)
    sweeps = {}
    for entry in content:
        unknown, missing = set(entry) - KEYS, NEEDED - set(entry)
        if unknown or missing:
            raise ValueError(
                f"{path}: sweep {entry.get('name')!r}: "
                f"unknown: {sorted(unknown) or 'none'}, missing: {sorted(missing) or 'none'}"
            )
        tables = {str(name): int(seeds) for name, seeds in entry["tables"].items()}
        rows = tuple(entry.get("rows", ()))
        known = {row.label for name in tables for row in load_table(name).rows}
        strange = [label for label in rows if label not in known]
        if strange:
            raise ValueError(
                f"{path}: sweep {entry['name']!r}: none of its tables has a row {strange[0]!r}"
            )
        sweeps[entry["name"]] = Sweep(**{**entry, "tables": tables, "rows": rows})
    return sweeps


def read_records(folder: Path) -> list[tuple[Setting, dict[str, Any]]]:
    """All records of a folder, each with its setting, in the order of their files' names.

    Raises:
        OSError, ValueError: see :func:`focal_det.lab.trial_records.read_record`.
    """
    found = [read_record(path) for path in sorted(folder.glob("*.json"))]
    # A sweep that is kept has one process a trial.
    return [(setting(load_setting(record)), record) for record in found if record["processes"] == 1]


def summarise_sweep(
    sweep: Sweep, table_name: str, found: Iterable[tuple[Setting, dict[str, Any]]], root: Path
) -> dict[str, Any]:
    """What came of a table of a sweep.

    Args:
        sweep: of :func:`read_sweeps`.
        table_name: one of its tables.
        found: of :func:`read_records`; those of other trials are left out.
        root: folder that ``config`` is relative to.

    Returns:
        See :func:`focal_det.lab.summary.summarise`.
    """
    by_setting = dict(found)
    table = sweep.table(table_name)
    base = sweep.base_config(root)
    labelled = []
    for seed in range(1, sweep.tables[table_name] + 1):
        for row in table.rows:
            # From its text, as a record's: a tuple that is written and read is a list.
            cfg = CfgNode.load_cfg(row_config(base, row, seed).dump())
            record = by_setting.get(setting(cfg))
            if record is not None:
                labelled.append({**record, "label": row.label})
    return summarise(table, labelled)


def setting(cfg: Mapping[str, Any]) -> Setting:
    """How a config differs from today's defaults, OUTPUT_DIR apart.

    Args:
        cfg: any config that was read from YAML.

    Returns:
        Pairs of dotted key and the text of its value.
    """
    usual = _defaults()
    return frozenset((key, value) for key, value in _texts(cfg) if usual.get(key) != value)


@functools.cache
def _defaults() -> dict[str, str]:
    cfg = get_cfg()
    add_config(cfg)
    return dict(_texts(CfgNode.load_cfg(cfg.dump())))


def _texts(cfg: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    return ((key, repr(value)) for key, value in leaves("", cfg) if key != "OUTPUT_DIR")
