"""Regenerate what is made from the code and from records: parts of README.md, pages in docs/.

The data of figures too; tools/plot.py draws them.

python tools/docs.py            # rewrite them
python tools/docs.py --check    # exit 1 if they are out of date
"""

import argparse
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from focal_det.benchmarks import markdown, measure
from focal_det.config import default_keys, detectron2_default
from focal_det.lab import figures, imbalance, results
from focal_det.lab import markdown as lab_markdown
from focal_det.losses import LOSS_REGISTRY, ClassificationLoss
from version_matrix import table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
RELIABILITY = ROOT / "docs" / "reliability.md"
BAD_INPUTS = ROOT / "docs" / "bad_inputs.json"
RESULTS = ROOT / "tools" / "results"
MATRIX = RESULTS / "matrix"
LAB = ROOT / "docs" / "results"
LAB_PAGE = ROOT / "docs" / "results.md"
PAPER_SPEED = LAB / "paper_speed.json"
FIGURES = ROOT / "docs" / "figures"
KILLS = ROOT / "docs" / "kill_and_resume.json"


def loss_table() -> str:
    """A Markdown table of the registered losses of focal_det: formula, source, keys, defaults."""
    rows = [
        "| `LOSS.NAME` | loss per term | source | keys (default) |",
        "|---|---|---|---|",
    ]
    own = [loss for _, loss in LOSS_REGISTRY if loss.__module__.startswith("focal_det.")]
    for loss in sorted(own, key=lambda loss: loss.__name__):
        cells = (f"`{loss.__name__}`", formula(loss), source(loss), keys(loss))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def formula(loss: type[ClassificationLoss]) -> str:
    """The formulas of the class docstring (its indented lines), without the derivative."""
    text = inspect.getdoc(loss) or ""
    block = re.search(r"\n\n((?:    .+\n)+)", text.split("\nArgs:")[0] + "\n")
    if block is None:
        return text.split("\n")[0].split(" (arXiv")[0]
    lines = [re.split(r"\s{3,}", line.strip())[0] for line in block.group(1).splitlines()]
    lines = [" ".join(line.split()) for line in lines]
    return "<br>".join(f"`{line}`" for line in lines if not re.match(r"d[A-Z*]+/dx", line))


def source(loss: type[ClassificationLoss]) -> str:
    """Where the docstring says that the loss comes from, after the paper's number."""
    match = re.search(r"arXiv 1708\.02002, ([^;)]+)", " ".join((loss.__doc__ or "").split()))
    if match is None:
        raise ValueError(f"the docstring of {loss.__name__} names no source")
    return match.group(1)


def keys(loss: type[ClassificationLoss]) -> str:
    """The config keys that the loss reads, with their defaults."""
    defaults = default_keys()
    shown = []
    for key in loss.config_keys().values():
        default = defaults[key] if key in defaults else detectron2_default(key)
        shown.append(f"`{key}` ({default})")
    return "<br>".join(shown) or "none"


def kills() -> str:
    """How many killed runs ended as runs that were left alone, and on what that was tried."""
    record = read(KILLS)
    trials = record["trials"]
    same = sum(trial["difference"] is None for trial in trials)
    environment = record["environment"]
    settings = sorted({(trial["processes"], trial["data_workers"]) for trial in trials})
    tried = ", ".join(f"{p} x {w}" for p, w in settings)
    moments: dict[str, int] = {}
    for trial in trials:
        moments[trial["moment"]] = moments.get(trial["moment"], 0) + 1
    return (
        f"**{len(trials)} kills, {len(trials)} resumes, {same} bit-identical ends** "
        f"({', '.join(f'{number} {moment}' for moment, number in moments.items())}; processes x "
        f"data workers: {tried}; CPU, PyTorch {environment['torch']}, Detectron2 "
        f"{environment['detectron2']}, {record['date']}, commit {environment['commit']})\n"
    )


def bad_inputs() -> str:
    """A table of what the tests have tried, and what came."""
    rows = ["| area | input | what comes |", "|---|---|---|"]
    for case in read(BAD_INPUTS):
        cells = (case["area"], case["input"], case["outcome"])
        rows.append("| " + " | ".join(lab_markdown.escape(cell) for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def matrix() -> str:
    """A table of the versions that the tests ran with, and what came."""
    return table.render(table.load_all(MATRIX))


@functools.cache
def kept_sweeps() -> dict[str, results.Sweep]:
    """The sweeps of the lab, by name."""
    return results.read_sweeps(LAB / "sweeps.yaml")


@functools.cache
def sweeps() -> dict[str, dict[str, Any]]:
    """What came of each table of each sweep of the lab, by the sweep's name and the table's."""
    found = results.read_records(LAB / "records")
    return {
        name: {table: results.summarise_sweep(sweep, table, found, ROOT) for table in sweep.tables}
        for name, sweep in kept_sweeps().items()
    }


def lab_tables() -> dict[str, Callable[[], str]]:
    """The tables of docs/results.md by the name of their part, ``sweep: table``."""

    def render(made: dict[str, Any]) -> str:
        return lab_markdown.render(made) if made["iterations"] else "Not measured yet.\n"

    return {
        f"{sweep}: {table}": functools.partial(render, made)
        for sweep, tables in sweeps().items()
        for table, made in tables.items()
    }


def figure_data() -> dict[str, Any]:
    """What figures are drawn from, by the name of the figure."""
    pairs = [pair for tables in sweeps().values() for pair in tables.items()]
    fights = [made for name, made in pairs if name == "detectors"]
    whole = [made for made in fights if all(row["seeds"] for row in made["rows"])]
    data = {"2": read(PAPER_SPEED) | figures.speed_panels(whole)}
    for name, made in pairs:
        if name == "7" and all(row["seeds"] for row in made["rows"]):
            data["7"] = made
    over_ratio = [x for x in kept_sweeps().values() if "imbalance" in x.tables]
    clipped = {x.base_config(ROOT).SOLVER.CLIP_GRADIENTS.ENABLED for x in over_ratio}
    if len(clipped) > 1:
        raise ValueError("sweeps over the ratio must agree in SOLVER.CLIP_GRADIENTS.ENABLED")
    traced = imbalance.trace((sweeps()[x.name]["imbalance"] for x in over_ratio), *clipped)
    if len(traced["points"]) > 1:
        data["imbalance"] = traced
    return data


def read(path: Path) -> Any:
    """A record."""
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def parts() -> dict[str, Callable[[], str]]:
    """What makes each generated part, by the name that pages have for it."""
    return {
        "losses": loss_table,
        "kills": kills,
        "bad inputs": bad_inputs,
        "matrix": matrix,
        **lab_tables(),
    }


def with_parts(path: Path) -> str:
    """The text of a page with each part between ``<!-- name: generated ... -->`` made anew."""

    def make(match: re.Match[str]) -> str:
        if match[2] not in parts():
            raise ValueError(f"{path}: no part is called {match[2]!r}")
        return match[1] + parts()[match[2]]() + match[3]

    pattern = r"(<!-- ([^\n]+?): generated by `make docs` -->\n).*?(<!-- /\2 -->)"
    return re.sub(pattern, make, path.read_text(encoding="utf-8"), flags=re.DOTALL)


def main() -> int:
    """Rewrite or check the files.

    Returns:
        1 if `--check` finds one out of date, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if outdated")
    args = parser.parse_args()
    made = {
        README: with_parts(README),
        RELIABILITY: with_parts(RELIABILITY),
        LAB_PAGE: with_parts(LAB_PAGE),
        PERFORMANCE: markdown.render(measure.load_all(RESULTS)),
    }
    for name, data in figure_data().items():
        made[FIGURES / f"figure_{name}.json"] = json.dumps(data, indent=1) + "\n"
    stale = 0
    for path, after in made.items():
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        if before == after:
            continue
        if args.check:
            print(f"{path.name} is out of date: run `make docs`")
            stale = 1
        else:
            path.write_text(after, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
