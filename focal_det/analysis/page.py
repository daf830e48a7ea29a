"""The frame of our HTML pages: one file, no script, nothing loaded from elsewhere."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

# Nothing from elsewhere and no script, even if a name out of a record should slip in unescaped.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #56626f; --line: #d9dee4; --tint: #eef4f9;
  --accent: #0b5c94; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: break-word; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
header, main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 2rem; }
.skip { position: absolute; left: -100vw; }
.skip:focus { left: 1rem; top: .5rem; background: #fff; padding: .3rem .6rem; }
a { color: var(--accent); }
h1 { font-size: clamp(1.6rem, 5vw, 2.5rem); line-height: 1.15; margin: 0 0 .6rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .6rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, li, dd { max-width: 46rem; }
p { margin: .5rem 0 .9rem; }
.lead { font-size: 1.12rem; color: var(--soft); }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; padding: 0;
  list-style: none; }
.facts li { flex: 1 1 9rem; max-width: none; background: var(--tint); border-radius: .6rem;
  padding: .8rem 1rem; }
.facts strong { display: block; font-size: 1.7rem; line-height: 1.2; color: var(--accent); }
.scroll { overflow-x: auto; margin: 1rem 0; }
.scroll:focus-visible, pre:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .9rem; padding-bottom: .4rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 2rem); }
th, td { padding: .5rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line);
  white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 600; white-space: normal; min-width: 8rem; overflow-wrap: anywhere; }
th:first-child { position: sticky; left: 0; background: #fff; }
tr.best > * { background: var(--tint); }
.badge { background: var(--accent); color: #fff; border-radius: 1rem; padding: .1rem .55rem;
  font-size: .75rem; font-weight: 600; margin-left: .4rem; display: inline-block; }
.bar { display: block; height: .35rem; min-width: 5rem; border-radius: .2rem; background: #e3e8ed;
  margin-top: .25rem; }
.bar i { display: block; height: 100%; border-radius: .2rem; }
.text { white-space: normal; text-align: left; min-width: 11rem; }
.text ul { margin: 0; padding-left: 1.1rem; }
.text li { overflow-wrap: anywhere; }
.failed { white-space: normal; text-align: left; color: #a33600; }
.losses { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr));
  gap: 1rem; margin: 1rem 0; }
.losses div { border-left: .35rem solid; padding: .1rem 0 .1rem .9rem; }
.losses dt { font-weight: 700; }
.losses dd { margin: .2rem 0 0; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
pre { background: #16212c; color: #eef3f7; border-radius: .6rem; padding: .9rem 1rem;
  overflow-x: auto; margin: .5rem 0 1.2rem; }
pre code { overflow-wrap: normal; }
.nowrap { white-space: nowrap; }
figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  gap: 1.5rem; margin: 1rem 0; }
.charts img { width: 100%; }
.wide img { max-width: none; }
.contents ul { columns: 18rem; padding-left: 1.2rem; }
.problems { border-left: .35rem solid #a33600; padding-left: 2rem; overflow-wrap: anywhere; }
.wall { display: grid; grid-template-columns: 1fr 1fr; gap: .7rem; margin: 0 0 1.8rem; }
.wall > :first-child { grid-column: 1 / -1; }
.wall img { width: 100%; border-radius: .4rem; }
.wall figcaption { line-height: 1.35; padding-top: .3rem; overflow-wrap: anywhere; }
.wall figcaption b { color: var(--ink); display: block; }
.legend { display: flex; flex-wrap: wrap; gap: .7rem 1.6rem; padding: 0 0 .4rem 3px;
  list-style: none; }
.legend span { display: inline-block; width: 1.9rem; height: 1.2rem; margin-right: .7rem;
  vertical-align: -.25rem; border: 3px solid; background: #4a5560; box-shadow: 0 0 0 3px #4a5560; }
footer { margin-top: 3rem; padding-bottom: 3rem; }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
footer dt { color: var(--soft); }
footer dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; padding: .5rem 0; }
@media (min-width: 46rem), print {
  .wall { grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
  .wall > :first-child { grid-column: auto; }
  tbody th { min-width: 12rem; }
}
@media print {
  html { font-size: 10pt; }
  header, main, footer { max-width: none; padding: 0; }
  .scroll, pre { overflow: visible; }
  .skip { display: none; }
  table { font-size: 8pt; }
  th, td { padding: .25rem .35rem; white-space: normal; }
  th:first-child { position: static; }
  th:first-child, .text { overflow-wrap: anywhere; }
  tbody th, .text { min-width: 0; }
  .wide img { max-width: 100%; }
  caption span { position: static; max-width: none; }
  pre { white-space: pre-wrap; background: #fff; color: #000; border: 1px solid #999; }
  figure, tr, .losses div { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
}
"""


class Place(NamedTuple):
    """Where on a page something stands.

    Attributes:
        level: of its heading, 2 or more.
        name: told apart by it from what else is like it on the page; plain text.
    """

    level: int = 2
    name: str = ""

    def section(self, title: str, body: str, *, anchor: str = "") -> str:
        """A part of the page under a heading.

        Args:
            title: plain text.
            body: HTML.
            anchor: its id, for links.
        """
        attribute = f' id="{anchor}"' if anchor else ""
        return (
            f"<section{attribute}>\n<h{self.level}>{escape(title)}</h{self.level}>\n"
            f"{body}\n</section>"
        )

    def scroll(self, label: str, body: str, *, css_class: str = "") -> str:
        """What scrolls by itself where the page is narrower, by keyboard too.

        Args:
            label: what it is, plain text.
            body: HTML.
            css_class: another class of it.
        """
        name = escape(f"{label}, {self.name}" if self.name else label)
        classes = f"scroll {css_class}".strip()
        return (
            f'<div class="{classes}" tabindex="0" role="region" aria-label="{name}">\n'
            f"{body}\n</div>"
        )

    def table(
        self, caption: str, head: Sequence[str], rows: Iterable[str], *, text: str = ""
    ) -> str:
        """A table that scrolls by itself.

        Args:
            caption: plain text.
            head: column names, plain text; the first column names the rows.
            rows: ``<tr>`` elements.
            text: name of a last column that holds text.
        """
        columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
        columns += f'<th scope="col" class="text">{escape(text)}</th>' if text else ""
        body = "\n".join(rows)
        return self.scroll(
            caption,
            f"<table>\n<caption><span>{escape(caption)}</span></caption>\n"
            f"<thead><tr>{columns}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>",
        )


def page(title: str, header: str, main: str, footer: str) -> str:
    """A whole page.

    Args:
        title: plain text.
        header: HTML, as are `main` and `footer`.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        '<nav aria-label="Page"><a class="skip" href="#main">Skip to the content</a></nav>\n'
        f'<header>\n{header}\n</header>\n<main id="main">\n{main}\n</main>\n'
        f"<footer>\n{footer}\n</footer>\n"
        "</body>\n</html>\n"
    )


def image(data: bytes, kind: str, alt: str) -> str:
    """An image that is part of the page.

    Args:
        data: the file's bytes.
        kind: its media type, like ``image/jpeg``.
        alt: what it shows, for those who do not see it.
    """
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img src="data:{kind};base64,{encoded}" alt="{escape(alt)}">'


def contents(entries: Iterable[tuple[str, str]]) -> str:
    """Links to the sections of a page.

    Args:
        entries: id and title of each, plain text.
    """
    items = "".join(
        f'<li><a href="#{anchor}">{escape(title)}</a></li>\n' for anchor, title in entries
    )
    return f'<nav class="contents" aria-label="Contents">\n<ul>\n{items}</ul>\n</nav>'


def row(name: str, cells: Iterable[str], *, css_class: str = "", text: str | None = None) -> str:
    """A table row.

    Args:
        name: HTML, as are `cells` and `text`.
        cells: numbers or few words.
        css_class: of the row.
        text: of a last cell that may be long.
    """
    attribute = f' class="{css_class}"' if css_class else ""
    last = "" if text is None else f'<td class="text">{text}</td>'
    return (
        f'<tr{attribute}><th scope="row">{name}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + f"{last}</tr>"
    )


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of terms and what they are, both plain text."""
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>\n" for k, v in pairs)
    return f"<dl>\n{items}</dl>"


def number(value: float | None, digits: int = 1) -> str:
    """`value` for a table cell; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001  a dash is meant


def count(value: int, one: str, many: str) -> str:
    """`value` things, in words up to six."""
    words = ("no", "one", "two", "three", "four", "five", "six")
    return f"{words[value] if value < len(words) else value} {one if value == 1 else many}"
