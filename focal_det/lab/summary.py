"""What came of a sweep, beside the paper's numbers: means, spreads, ranks, and who won, if anyone.

All metrics are in percent. A training that diverged counts as AP 0 in ranks, and is named.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from focal_det.analysis.records import METRICS
from focal_det.losses.registry import get_key

from .measuring import ANCHORED
from .rivals import DIFFERENCES, META_ARCHITECTURES, differences
from .tables import Table
from .trial_records import load_setting

RANKED = "AP"
MIN_ORDERED = 4  # rows; of fewer, too many orders come about by chance to say anything of one
MAX_CHANCE = 0.1  # of a winner among rows that are all alike

# What is measured of a trial, as a median over seeds.
MEASURES: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "images_per_second": itemgetter("images_per_second"),
    "inference_ms": lambda record: (record["inference_ms"] or {}).get("median"),
    "inference_p95_ms": lambda record: (record["inference_ms"] or {}).get("p95"),
    "peak_memory_mib": itemgetter("peak_memory_mib"),
    "parameters": itemgetter("parameters"),
    "gflops": itemgetter("gflops"),
    "background_per_foreground": itemgetter("background_per_foreground"),
}
# Settings in which rows that are compared by their speed and AP must agree.
SHARED = (
    "DATASETS", "DATALOADER", "INPUT", "SOLVER", "TEST", "MODEL.BACKBONE", "MODEL.RESNETS",
    "MODEL.FPN", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.WEIGHTS", "MODEL.DEVICE",
    "MODEL.ANCHOR_GENERATOR", "MODEL.RETINANET",
)  # fmt: skip
# Below them, what is part of the loss that a row has.
OF_THE_LOSS = frozenset({"MODEL.RETINANET.FOCAL_LOSS_ALPHA", "MODEL.RETINANET.FOCAL_LOSS_GAMMA"})
OURS = "focal_det"
MACHINE = ("device", "cpu", "torch", "torchvision", "detectron2", "processes")
# What may differ between rows without a doubt whether one has a higher AP by its setting alone.
HARMLESS = frozenset({"commit", "seeds", "device", "cpu"})


def summarise(table: Table, found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Bring records and table together.

    Args:
        table: whose rows are meant, in their order.
        found: records of :func:`focal_det.lab.running.run_trial`; those of other rows are left out.

    Returns:
        ``table``, ``title``, ``source``, ``speed``; ``rows`` with ``label``, ``overrides``,
        ``seeds``, ``diverged`` (how many), ``paper``, ``rank``, ``paper_rank``, ``differs`` (of the
        detector), each of :data:`MEASURES`, ``not_measured`` (why, by those that no seed has),
        and ``metrics``: for each of ``AP``, ``AP50``, ...
        ``mean``, ``sd`` (of the sample, None for one seed) and ``values`` by seed; ``kendall_tau``
        with the paper's order, None for fewer than :data:`MIN_ORDERED` rows to compare;
        ``winner``, a label or None, and ``verdict``, why; ``unequal``, see
        :func:`unequal_settings`; ``commits``, ``devices``, ``iterations``, ``data``;
        ``background_per_foreground``, a median of the rows with anchors.
    """
    by_label: dict[str, list[dict[str, Any]]] = {row.label: [] for row in table.rows}
    for record in found:
        if record["label"] in by_label:
            by_label[record["label"]].append(record)
    rows = []
    for row in table.rows:
        of_row = sorted(by_label[row.label], key=lambda record: int(record["seed"]))
        rows.append(
            {
                "label": row.label,
                "overrides": row.overrides,
                "seeds": [record["seed"] for record in of_row],
                "diverged": sum(record["error"] is not None for record in of_row),
                "paper": row.paper,
                "metrics": {name: _spread(of_row, name) for name in METRICS},
                **{
                    name: _median(measure(record) for record in of_row)
                    for name, measure in MEASURES.items()
                },
                "differs": _differs(of_row, row.detector),
            }
        )
        reasons = {key: x for record in of_row for key, x in record["not_measured"].items()}
        rows[-1]["not_measured"] = {k: x for k, x in reasons.items() if rows[-1][k] is None}
    _rank(rows)
    every = [record for records in by_label.values() for record in records]
    unequal = unequal_settings(every, SHARED if table.speed else ())
    winner, verdict = find_winner(rows, unequal)
    anchored = {row.label for row in table.rows if META_ARCHITECTURES[row.detector] in ANCHORED}
    return {
        "table": table.name,
        "speed": table.speed,
        "unequal": unequal,
        "title": table.title,
        "source": table.source,
        "rows": rows,
        "kendall_tau": rank_correlation(rows),
        "winner": winner,
        "verdict": verdict,
        "commits": sorted({str(record["environment"]["commit"]) for record in every}),
        "devices": sorted({record["environment"]["device"] for record in every}),
        "iterations": sorted({record["iterations"] for record in every}),
        "data": sorted({name_data(record) for record in every}),
        "background_per_foreground": _median(
            record["background_per_foreground"] for record in every if record["label"] in anchored
        ),
    }


def shows_times(summary: Mapping[str, Any]) -> bool:
    """Whether the table is one of times: of detectors, or with the paper's milliseconds."""
    return bool(summary["speed"]) or has_papers_times(summary)


def has_papers_times(summary: Mapping[str, Any]) -> bool:
    """Whether the paper gives milliseconds for any row."""
    return any("milliseconds" in row["paper"] for row in summary["rows"])


def _differs(of_row: Sequence[dict[str, Any]], detector: str) -> str:
    if detector == OURS or not of_row:
        return DIFFERENCES[detector]
    try:
        return differences(load_setting(of_row[0]), detector)
    except (AttributeError, KeyError):  # the config of an earlier version, without some key
        return DIFFERENCES[detector]


def name_data(record: Mapping[str, Any]) -> str:
    """Names of the data sets that a record's trial was trained and evaluated on."""
    return " / ".join(", ".join(part) for part in record["data"])


def _spread(of_row: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    values = [_value(record, name) for record in of_row]
    numbers = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(numbers) if numbers else None,
        "sd": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "values": values,
    }


def _value(record: dict[str, Any], name: str) -> float | None:
    """A metric; 0 where training diverged, None where there was nothing to score."""
    if record["error"] is not None:
        return 0.0
    value = record["metrics"][name]
    return None if value is None else float(value)


def unequal_settings(
    found: Iterable[dict[str, Any]], shared: Iterable[str] = SHARED
) -> dict[str, list[str]]:
    """Settings, machines, versions, annotations and seeds in which records differ.

    Commits are compared seed by seed: one that is added later, for all rows, favours none.

    Args:
        found: records of :func:`focal_det.lab.running.run_trial`.
        shared: config keys, and nodes, in which they are to agree; what is :data:`OF_THE_LOSS`
            below them is left out.

    Returns:
        Key to its values, as text; empty where all agree.
    """
    seen: dict[str, set[str]] = {}
    commits: dict[int, set[str]] = {}
    seeds: dict[str, set[int]] = {}
    for record in found:
        commits.setdefault(record["seed"], set()).add(str(record["environment"]["commit"]))
        seeds.setdefault(record["label"], set()).add(record["seed"])
        known = {**record["environment"], "processes": record["processes"]}
        facts = {name: known.get(name) for name in MACHINE}
        facts |= {f"annotations of {name}": x for name, x in record["annotations"].items()}
        for name, value in facts.items():
            seen.setdefault(name, set()).add(str(value))
        cfg = load_setting(record)
        for key in shared:
            for name, value in leaves(key, get_key(cfg, key)):
                if name not in OF_THE_LOSS:
                    seen.setdefault(name, set()).add(str(value))
    seen["commit"] = set[str]().union(*(each for each in commits.values() if len(each) > 1))
    seen["seeds"] = {", ".join(map(str, sorted(numbers))) for numbers in seeds.values()}
    return {name: sorted(values) for name, values in seen.items() if len(values) > 1}


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values below a key, by dotted keys; a node without any is a value itself.

    Args:
        key: of `value`; empty for a whole config.
        value: a config, or one value.
    """
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from leaves(f"{key}.{name}" if key else name, part)
    else:
        yield key, value


def _median(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.median(numbers) if numbers else None


def _rank(rows: Sequence[dict[str, Any]]) -> None:
    """Add ``rank`` and ``paper_rank``, 1 for the highest AP; equal ones share the better rank.

    Both are among the rows that have a result, so that they can be compared.
    """
    ours = [row["metrics"][RANKED]["mean"] for row in rows]
    papers = [row["paper"].get(RANKED) for row in rows]
    papers = [None if mine is None else its for mine, its in zip(ours, papers, strict=True)]
    for key, values in (("rank", ours), ("paper_rank", papers)):
        for row, value in zip(rows, values, strict=True):
            better = sum(
                other is not None and value is not None and other > value for other in values
            )
            row[key] = None if value is None else 1 + better


def rank_correlation(rows: Iterable[dict[str, Any]]) -> float | None:
    """Kendall's tau-b between the mean APs and the paper's.

    Args:
        rows: of :func:`summarise`.

    Returns:
        1 for the same order, -1 for the reverse; None for fewer than :data:`MIN_ORDERED` rows that
        have both, or where all on one side are equal.
    """
    pairs = [
        (row["metrics"][RANKED]["mean"], row["paper"][RANKED])
        for row in rows
        if row["metrics"][RANKED]["mean"] is not None and RANKED in row["paper"]
    ]
    if len(pairs) < MIN_ORDERED:
        return None
    from scipy.stats import kendalltau  # which nothing but a sweep needs

    tau = float(kendalltau(*zip(*pairs, strict=True)).statistic)
    return None if math.isnan(tau) else tau


def find_winner(
    rows: Sequence[dict[str, Any]], unequal: Iterable[str] = ()
) -> tuple[str | None, str]:
    """The row that is ahead by more than the seeds differ.

    Its lowest seed must be above the highest seed of every other row. Every row must have a result,
    of two seeds at least and of as many as the best; :func:`chance_of_lead` must not be above
    :data:`MAX_CHANCE`: of two rows it takes three seeds each. And no row may be ahead by something
    else than its setting.

    Args:
        rows: of :func:`summarise`.
        unequal: keys of :func:`unequal_settings`; those that are not :data:`HARMLESS` forbid a
            winner.

    Returns:
        Its label, or None, and a sentence that says why.
    """
    without = [row["label"] for row in rows if not _numbers(row)]
    if without:
        return None, f"No winner yet: no result of {'; '.join(without)}."
    if len(rows) < 2 or not any(any(_numbers(row)) for row in rows):
        return None, "No winner: no row has an AP above 0, or there is one row only."
    best, *others = sorted(rows, key=lambda row: -row["metrics"][RANKED]["mean"])
    if len(_numbers(best)) < 2:
        return None, f"No winner: one seed says nothing of the spread ({best['label']} is highest)."
    fewer = [row["label"] for row in others if len(_numbers(row)) < len(_numbers(best))]
    if fewer:
        return None, f"No winner yet: fewer seeds than of {best['label']} of {'; '.join(fewer)}."
    lowest = min(_numbers(best))
    near = [row["label"] for row in others if max(_numbers(row)) >= lowest]
    if near:
        return None, (
            f"No winner: {best['label']} has the highest mean, but its lowest seed ({lowest:.1f}) "
            f"is not above the highest of {'; '.join(near)}."
        )
    doubtful = sorted(set(unequal) - HARMLESS)
    if doubtful:
        return None, (
            f"No winner: {best['label']} is ahead by more than the seeds differ, but the rows do "
            f"not agree in {', '.join(doubtful)}."
        )
    highest = max(max(_numbers(row)) for row in others)
    chance = chance_of_lead([len(_numbers(row)) for row in rows])
    ahead = (
        f"{best['label']}: its lowest seed ({lowest:.1f}) is above the highest of any other row "
        f"({highest:.1f})."
    )
    often = f"Among rows that are all alike, one is so far ahead in {100 * chance:.2g} % of cases"
    if chance > MAX_CHANCE:
        return None, f"No winner yet. {ahead} {often}: more seeds will tell."
    return best["label"], f"{ahead} {often}."


def chance_of_lead(counts: Sequence[int]) -> float:
    """How probable it is that, of rows that are all alike, one has all its seeds above all others'.

    Of N seeds together, one of the k rows that have the fewest, n, does with the probability

        k / C(N, n)

    Args:
        counts: seeds of each row, > 0.
    """
    fewest = min(counts)
    return counts.count(fewest) / math.comb(sum(counts), fewest)


def _numbers(row: dict[str, Any]) -> list[float]:
    return [value for value in row["metrics"][RANKED]["values"] if value is not None]
