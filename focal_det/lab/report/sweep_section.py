"""What came of a table of trials, as HTML."""

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from focal_det.analysis import figures, page
from focal_det.analysis.page import Place
from focal_det.analysis.records import METRICS
from focal_det.lab import charts
from focal_det.lab.figures import speed_picture
from focal_det.lab.markdown import (
    SPEED,
    compare,
    conclude,
    define,
    excuse,
    explain,
    join,
    papers_metrics,
)
from focal_det.lab.summary import RANKED, has_papers_times, name_data, shows_times

from .finding import Found
from .picture_wall import pictures
from .sweeps import Outcome

MAX_ROWS = 6  # of the picture wall


def body(outcome: Outcome, folder: Path, found: Found, place: Place) -> str:
    """What comes below the heading of a table.

    Args:
        outcome: of the table.
        folder: of its sweep, below which trials have left their detections.
        found: gets the files that cannot be read.
        place: of the parts below the section's heading.
    """
    summary = outcome.summary
    parts = [
        _source(outcome),
        _verdict(summary),
        _results(summary, place),
        _errors(outcome),
        _picture(summary, place),
        _speed(summary, place),
        _seeds(outcome),
        _curves(outcome, place),
        _detections(outcome, folder, found, place),
    ]
    return "\n".join(part for part in parts if part)


def _source(outcome: Outcome) -> str:
    summary = outcome.summary
    trials = sum(len(row["seeds"]) for row in summary["rows"])
    made = [
        page.count(trials, "trial", "trials").capitalize(),
        f"{join(summary['iterations'])} iterations",
        f"data {data_of(outcome)}",
        f"commit {join('unknown' if x == 'None' else x for x in summary['commits'])}",
        join(summary["devices"]),
        *(f"{key} {value}" for key, value in outcome.setting.items()),
    ]
    source = f"{summary['source']}. " if summary["source"] else ""
    return f'<p class="soft">{escape(source)}{escape("; ".join(made))}.</p>'


def data_of(outcome: Outcome) -> str:
    """Names of the data sets that its trials were trained and evaluated on, as plain text."""
    names = [name_data(trial) for trial in outcome.trials.values()]
    return join(dict.fromkeys(names) or outcome.summary["data"])


def _verdict(summary: dict[str, Any]) -> str:
    return f"<p>{escape(conclude(summary))}</p>"


def _results(summary: dict[str, Any], place: Place) -> str:
    rows = summary["rows"]
    compared = any(row["paper"] for row in rows)
    head = ["Row", *METRICS, "Seeds", "Rank"]
    papers = papers_metrics(summary)
    head += [*(f"Paper's {name}" for name in papers), "Paper's rank"] if compared else []
    lines = []
    for row in rows:
        cells = [_with_spread(row["metrics"][name]) for name in METRICS]
        diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        cells += [f"{len(row['seeds'])}{diverged}", page.number(row["rank"], 0)]
        if compared:
            cells += [page.number(row["paper"].get(name)) for name in papers]
            cells += [page.number(row["paper_rank"], 0)]
        won = row["label"] == summary["winner"]
        badge = '<span class="badge">ahead of the spread</span>' if won else ""
        name = escape(row["label"]) + badge
        lines.append(page.row(name, cells, css_class="best" if won else ""))
    return (
        place.table("Box AP in percent", head, lines)
        + f'\n<p class="soft">{escape(explain(summary))} A dash is a number that is missing'
        + (", or that the paper does not give" if compared else "")
        + ".</p>"
        + "".join(
            f"\n<p>{escape(said)}</p>" for said in (compare(summary), excuse(summary)) if said
        )
    )


def _with_spread(metric: dict[str, Any]) -> str:
    mean = page.number(metric["mean"])
    return mean if metric["sd"] is None else f"<b>{mean}</b> ± {metric['sd']:.1f}"


def _errors(outcome: Outcome) -> str:
    if not outcome.errors:
        return ""
    items = "".join(
        f"<li>{escape(f'{label}, seed {seed}: {error}')}</li>\n"
        for label, seed, error in outcome.errors
    )
    return f"<p>Given up:</p>\n<ul>\n{items}</ul>"


def _picture(summary: dict[str, Any], place: Place) -> str:
    drawn = charts.render(charts.draw_table(summary), "svg", str(summary["table"]))
    ours = _listed((row["label"], row["metrics"][RANKED]["mean"]) for row in summary["rows"])
    paper = _listed((row["label"], row["paper"].get(RANKED)) for row in summary["rows"])
    alt = f"AP of each row by seed, and its mean. Means: {ours}."
    alt += f" The paper's: {paper}." if paper else ""
    return _wide("AP of each row", drawn, alt, place)


def _listed(values: Iterable[tuple[str, float | None]]) -> str:
    return "; ".join(f"{name} {value:.1f}" for name, value in values if value is not None)


def _wide(title: str, drawn: bytes, alt: str, place: Place) -> str:
    """A picture whose writing would be too small on a phone: it scrolls there."""
    figure = f"<figure>{page.image(drawn, 'image/svg+xml', alt)}</figure>"
    return place.scroll(title, figure, css_class="wide")


def _speed(summary: dict[str, Any], place: Place) -> str:
    """Time, memory and size where the table is about them; nothing elsewhere."""
    rows = summary["rows"]
    if not shows_times(summary):
        return ""
    timed = has_papers_times(summary)
    measured = SPEED if summary["speed"] else {"ms an image": ("inference_ms", 1.0, ".1f")}
    head = ["Row", *(name[0].upper() + name[1:] for name in measured)]
    head += ["Paper's ms"] if timed else []
    lines = []
    for row in rows:
        cells = [
            page.number(None if row[name] is None else unit * row[name], int(form[1]))
            for name, unit, form in measured.values()
        ]
        cells += [page.number(row["paper"].get("milliseconds"))] if timed else []
        differs = escape(row["differs"]) if summary["speed"] else None
        lines.append(page.row(escape(row["label"]), cells, text=differs))
    text = "What differs" if summary["speed"] else ""
    body = place.table("Time, memory and size, medians over seeds", head, lines, text=text)
    said = define(summary)
    body += f'\n<p class="soft">{escape(said)}</p>' if said else ""
    return place.section("Speed", body + _speed_picture(summary, place))


def _speed_picture(summary: dict[str, Any], place: Place) -> str:
    figure = speed_picture(summary)
    if figure is None:
        return ""
    times = _listed((row["label"], row["inference_ms"]) for row in summary["rows"])
    alt = f"AP over the time of an image, with the upper convex hull. Milliseconds: {times}."
    drawn = charts.render(figure, "svg", f"{summary['table']} speed")
    return "\n" + _wide("AP over the time of an image", drawn, alt, place)


def _seeds(outcome: Outcome) -> str:
    seeds = sorted({trial["seed"] for trial in outcome.trials.values()})
    if not seeds:
        return ""
    which = "seed" if len(seeds) == 1 else "seeds"
    return f"<p>Curves and pictures are of each row's first trial, {which} {join(seeds)}.</p>"


def _curves(outcome: Outcome, place: Place) -> str:
    runs = [{"loss": label, "curves": trial["curves"]} for label, trial in outcome.trials.items()]
    return figures.charts(runs, place)


def _detections(outcome: Outcome, folder: Path, found: Found, place: Place) -> str:
    """Pictures of the rows with the highest AP, in the order of the table."""
    shown = {label: x for label, x in outcome.trials.items() if x["error"] is None}
    best = sorted(shown, key=lambda label: -(shown[label]["metrics"][RANKED] or 0.0))[:MAX_ROWS]
    folders = {
        label: folder / "trials" / trial["key"] for label, trial in shown.items() if label in best
    }
    if not folders:
        return ""
    datasets = next(iter(shown.values()))["data"][1]
    return pictures(folders, datasets, found, place)
