"""Detections beside ground truth, as HTML."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from focal_det.analysis import figures
from focal_det.analysis.page import Place

from .detections import NotShown, judge
from .finding import Found


def pictures(
    folders: Mapping[str, Path], datasets: Sequence[str], found: Found, place: Place
) -> str:
    """Detections beside ground truth, or a sentence that says why there are none.

    Args:
        folders: of runs, by their name.
        datasets: what they were evaluated on.
        found: gets the files that cannot be read.
        place: of the section.
    """
    try:
        return figures.pictures(judge(folders, datasets, found), Path(), place)
    except NotShown as why:
        return f'<p class="soft">No pictures of detections. {escape(str(why))}</p>'
