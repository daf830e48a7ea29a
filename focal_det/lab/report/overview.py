"""The page of all records below a folder."""

from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from focal_det.analysis import page, report
from focal_det.analysis.page import Place
from focal_det.progress import bar_options

from . import run_section, setup_section, sweep_section
from .finding import LOOKED_FOR, UNREADABLE, Found, Sweep, find, reason
from .sweeps import Outcome, outcomes


class Part(NamedTuple):
    """A section of the page that is still to be drawn.

    Attributes:
        title: plain text.
        path: where its records are.
        draw: gives its HTML; its argument is the place of what comes below the heading.
    """

    title: str
    path: Path
    draw: Callable[[Place], str]


class NothingFoundError(ValueError):
    """There is no record below a folder."""


def build(root: Path) -> tuple[str, list[tuple[Path, str]]]:
    """The page of a folder.

    Args:
        root: the folder.

    Returns:
        The page, and the files that cannot be read, with the reason.

    Raises:
        NothingFoundError: there is no record that can be read; the message says what was looked
            for, and which files are none.
    """
    found = find(root)
    if not (found.sweeps or found.comparisons or found.runs):
        unread = "".join(f"\n{path}: {why}" for path, why in found.problems)
        raise NothingFoundError(f"no records below {root}: looked for {LOOKED_FOR}{unread}")
    sections = _draw(found)
    title = f"Report of {found.name(root)}"
    header = f"<h1>{escape(title)}</h1>\n{_lead(found)}"
    if found.problems:
        anchor, name = "problems", "Files that cannot be read"
        sections.append((anchor, name, Place().section(name, _problems(found), anchor=anchor)))
    if len(sections) > 1:
        header += "\n" + page.contents((anchor, name) for anchor, name, _ in sections)
    footer = (
        "<p>Made by <code>tools/report.py</code> of the records alone; nothing was measured or "
        "computed anew.</p>"
    )
    main = "\n".join(html for _, _, html in sections)
    return page.page(title, header, main, footer), found.problems


def _lead(found: Found) -> str:
    trials = sum(len(sweep.trials) for sweep in found.sweeps)
    counted = (
        (found.sweeps, page.count(len(found.sweeps), "sweep", "sweeps") + f" of {trials} trials"),
        (found.comparisons, page.count(len(found.comparisons), "comparison", "comparisons")),
        (found.runs, page.count(len(found.runs), "training run", "training runs")),
    )
    text = ", ".join(text for records, text in counted if records)
    parts = [f'<p class="lead">{escape(text[0].upper() + text[1:])}.</p>']
    for sweep in found.sweeps:
        if sweep.unfinished:
            count = page.count(len(sweep.unfinished), "trial", "trials").capitalize()
            keys = ", ".join(sweep.unfinished)
            parts.append(
                f"<p>{count} of {escape(found.name(sweep.folder))} began and left no record yet: "
                f"{escape(keys)}.</p>"
            )
    if found.problems:
        count = page.count(len(found.problems), "file", "files").capitalize()
        parts.append(f"<p><b>{count} could not be read; what is there is left out.</b></p>")
    return "\n".join(parts)


def _problems(found: Found) -> str:
    items = "".join(
        f"<li><code>{escape(str(path.relative_to(found.root)))}</code>: {escape(why)}</li>\n"
        for path, why in found.problems
    )
    return f'<ul class="problems">\n{items}</ul>'


def _draw(found: Found) -> list[tuple[str, str, str]]:
    """Anchor, title and HTML of each section; what cannot be drawn becomes a problem."""
    sections: list[tuple[str, str, str]] = []
    for part in tqdm(list(_parts(found)), desc="drawing", unit="section", **bar_options()):
        try:
            html = part.draw(Place(3, part.title))
        except UNREADABLE as error:
            # Records that are well-formed as files and still do not hold what they should.
            found.problems.append((part.path, f"{part.title}: {reason(error, part.path)}"))
            continue
        if html:
            anchor = f"part-{len(sections) + 1}"
            whole = Place().section(part.title, html, anchor=anchor)
            sections.append((anchor, part.title, whole))
    return sections


def _parts(found: Found) -> Iterator[Part]:
    for sweep in found.sweeps:
        try:
            made = outcomes(sweep)
        except UNREADABLE as error:
            found.problems.append((sweep.folder, reason(error, sweep.folder)))
            continue
        for outcome in made:
            draw = partial(sweep_section.body, outcome, sweep.folder, found)
            yield Part(_title(outcome, sweep, found), sweep.folder, draw)
    for comparison in found.comparisons:
        title = f"{report.title(comparison.results)}: {found.name(comparison.folder)}"
        path = comparison.folder / "results.json"
        yield Part(title, path, partial(run_section.comparison, comparison))
    if found.runs:
        yield Part("Training runs", found.root, partial(run_section.body, found))
    yield Part("What differs between the runs", found.root, partial(setup_section.settings, found))
    yield Part("Versions and machines", found.root, partial(setup_section.environments, found))


def _title(outcome: Outcome, sweep: Sweep, found: Found) -> str:
    """A table's title, with what tells it from others on the page."""
    title = str(outcome.summary["title"])
    details = [f"{key.rsplit('.', 1)[-1]} {value}" for key, value in outcome.setting.items()]
    budgets = {trial["iterations"] for trial in sweep.trials}
    if len(budgets) > 1:
        details += [f"{iterations} iterations" for iterations in outcome.summary["iterations"]]
    if len({str(trial["data"]) for trial in sweep.trials}) > 1:
        details.append(sweep_section.data_of(outcome))
    if len(found.sweeps) > 1:
        details.append(found.name(sweep.folder))
    return f"{title} ({', '.join(details)})" if details else title
