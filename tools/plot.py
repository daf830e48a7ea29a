"""Draw the paper's figures, from our losses and from data files.

    python tools/plot.py                                  # all that there is data for
    python tools/plot.py figure 4 --data output/loss_cdf.json --output output
    python tools/plot.py figure 7 --data output/ablate/cells/7.json
    python tools/plot.py figure 2 --data output/detectors/cells/detectors.json
    python tools/plot.py figure imbalance --data output/ablate/*/imbalance.json

Figures 1, 5 and 6 are of the losses themselves. 2, 4, 7 and imbalance, which the paper does not
have, are drawn from files: without --data, those beside the pictures in docs/figures; 4 from what
tools/analyze.py loss-cdf writes, the others from summaries of tools/ablate.py and
tools/benchmark_detectors.py, imbalance from one a data set. Writes figure_N.svg and figure_N.png,
by default to docs/figures, or beside the data; the same data give the same bytes.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # fvcore, which Detectron2 imports, scripts its focal loss; PyTorch warns that this will go.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*")
    from focal_det.lab import figures, imbalance

from matplotlib.figure import Figure

from focal_det.lab.charts import save_figure

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "figures"
PAPER_SPEED = ROOT / "docs" / "results" / "paper_speed.json"
OF_LOSSES: dict[str, Callable[[], Figure]] = {
    "1": figures.figure_1,
    "5": figures.figure_5,
    "6": figures.figure_6,
}


def settings_of_fl_star(summary: dict[str, Any]) -> list[dict[str, float]]:
    """Gamma, beta and AP of each row of a sweep of FL*.

    Args:
        summary: what ``tools/ablate.py`` writes for a table whose axes are the two.

    Raises:
        KeyError: a row without the overrides.
    """
    node = "MODEL.FOCAL_DET.FL_STAR"
    return [
        {
            "gamma": row["overrides"][f"{node}.GAMMA"],
            "beta": row["overrides"][f"{node}.BETA"],
            "AP": row["metrics"]["AP"]["mean"],
        }
        for row in summary["rows"]
        if row["metrics"]["AP"]["mean"] is not None
    ]


def _only(contents: Sequence[Any]) -> Any:
    """The content of a file that is drawn alone.

    Raises:
        ValueError: there are others.
    """
    if len(contents) > 1:
        raise ValueError("of several files, each must be a summary of a table")
    return contents[0]


def speed_groups(*contents: Any) -> dict[str, Any]:
    """Panels of Figure 2: of one file that has them, or the paper's and one of each summary.

    Raises:
        ValueError: see :func:`focal_det.lab.figures.speed_panels`.
    """
    if not all("rows" in content for content in contents):
        return dict(_only(contents))
    paper: dict[str, Any] = json.loads(PAPER_SPEED.read_text(encoding="utf-8"))
    return paper | figures.speed_panels(contents)


def over_ratio(*contents: Any) -> dict[str, Any]:
    """What imbalance is drawn from: of one file that has it, or of summaries, one a data set.

    Raises:
        ValueError: no summary has both an AP and a ratio.
    """
    if not all("rows" in content for content in contents):
        return dict(_only(contents))
    traced = imbalance.trace(contents)
    if not traced["points"]:
        raise ValueError("no row has an AP, or the ratio of background to foreground is not known")
    return traced


OF_DATA: dict[str, Callable[..., Figure]] = {
    "2": lambda *contents: figures.figure_2(speed_groups(*contents)),
    "4": figures.figure_4,
    "imbalance": lambda *contents: figures.figure_imbalance(over_ratio(*contents)),
    "7": lambda summary: figures.figure_7(settings_of_fl_star(summary)),
}
OF_SUMMARIES = ("2", "imbalance")  # of any number of them


def draw(name: str, data: Sequence[Path], output: Path) -> None:
    """Draw one figure.

    Args:
        name: the paper's number, or a name of :data:`OF_DATA`.
        data: JSON files, for those of :data:`OF_DATA`; none for the one in docs/figures.
        output: folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the files are not what this figure is drawn from, or too many.
    """
    if name in OF_LOSSES:
        figure = OF_LOSSES[name]()
    else:
        paths = data or [FOLDER / f"figure_{name}.json"]
        if len(paths) > 1 and name not in OF_SUMMARIES:
            raise ValueError(f"figure {name} takes one file, got {', '.join(map(str, paths))}")
        try:
            figure = OF_DATA[name](*(json.loads(x.read_text(encoding="utf-8")) for x in paths))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{', '.join(map(str, paths))} is not what figure {name} is drawn from: "
                f"{type(error).__name__}: {error}"
            ) from error
    output.mkdir(parents=True, exist_ok=True)
    save_figure(figure, output / f"figure_{name}")


def main() -> int:
    """Run the command line; the exit status."""
    args = parse()
    if args.name is not None:
        names = [args.name]
    else:
        there = [name for name in OF_DATA if (FOLDER / f"figure_{name}.json").is_file()]
        names = sorted([*OF_LOSSES, *there])
    output = args.output or (args.data[0].parent if args.data else FOLDER)
    for name in names:
        try:
            draw(name, args.data, output)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        print(output / f"figure_{name}.svg")
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message where it cannot be carried out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("figure",), help="with its name; default: all")
    known = sorted([*OF_LOSSES, *OF_DATA])
    parser.add_argument("name", nargs="?", choices=known)
    parser.add_argument(
        "--data", type=Path, nargs="+", default=(), help=f"JSON files for {', '.join(OF_DATA)}"
    )
    parser.add_argument("--output", type=Path, help="folder; default: see above")
    args = parser.parse_args(argv)
    if args.what and args.name is None:
        parser.error(f"figure needs a name, one of {', '.join(known)}")
    if args.data and args.name not in OF_DATA:
        parser.error(f"--data is for figure {', '.join(OF_DATA)}, got {args.name}")
    return args


if __name__ == "__main__":
    sys.exit(main())
