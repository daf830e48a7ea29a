"""Draw the paper's figures, from our losses and from data files.

    python tools/plot.py                                  # all that there is data for
    python tools/plot.py figure 4 --data output/loss_cdf.json --output output
    python tools/plot.py figure 7 --data output/ablate/7.json --output output

Figures 1, 5 and 6 are of the losses themselves. 2, 4, 7 and imbalance, which the paper does not
have, are drawn from files: without --data, those beside the pictures in docs/figures. Writes
figure_N.svg and figure_N.png; the same data give the same bytes.
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
    from focal_det.lab import figures

from matplotlib.figure import Figure

from focal_det.lab.charts import save_figure

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"
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


OF_DATA: dict[str, Callable[[Any], Figure]] = {
    "2": figures.figure_2,
    "4": figures.figure_4,
    "imbalance": figures.figure_imbalance,
    "7": lambda summary: figures.figure_7(settings_of_fl_star(summary)),
}


def draw(name: str, data: Path | None, output: Path) -> None:
    """Draw one figure.

    Args:
        name: the paper's number, or a name of :data:`OF_DATA`.
        data: JSON file, for those of :data:`OF_DATA`; None for the one in docs/figures.
        output: folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not what this figure is drawn from.
    """
    if name in OF_LOSSES:
        figure = OF_LOSSES[name]()
    else:
        path = data or FOLDER / f"figure_{name}.json"
        try:
            figure = OF_DATA[name](json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{path} is not what figure {name} is drawn from: {type(error).__name__}: {error}"
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
    for name in names:
        try:
            draw(name, args.data, args.output)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        print(args.output / f"figure_{name}.svg")
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message where it cannot be carried out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("figure",), help="with its name; default: all")
    known = sorted([*OF_LOSSES, *OF_DATA])
    parser.add_argument("name", nargs="?", choices=known)
    parser.add_argument("--data", type=Path, help=f"JSON file for {', '.join(OF_DATA)}")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder; default docs/figures")
    args = parser.parse_args(argv)
    if args.what and args.name is None:
        parser.error(f"figure needs a name, one of {', '.join(known)}")
    if args.data is not None and args.name not in OF_DATA:
        parser.error(f"--data is for figure {', '.join(OF_DATA)}, got {args.name}")
    return args


if __name__ == "__main__":
    sys.exit(main())
