"""Run a table of the Focal Loss paper, or one of your own, on your data.

    python tools/ablate.py --table 1b --data digits_clutter --seeds 3
    python tools/ablate.py --table all --data cells --config configs/my_base.yaml --budget 5000
    python tools/ablate.py --table my_axes.yaml --data cells SOLVER.BASE_LR 0.01
    python tools/ablate.py --table 1b --data digits_clutter --report-only

What is done already, by the hash of its whole config, is not run again: a sweep that was killed
goes on where it stopped, and one with more seeds adds to the first. A set of your own is named in
FOCAL_DET_DATASETS, as NAME_train and NAME_val.

Writes OUTPUT/records/KEY.json for each trial and OUTPUT/TABLE.md, .json, .svg and .png, of a table
of speed TABLE_speed.svg and .png, too. OUTPUT/trials/KEY is what Detectron2 leaves of each trial,
its last checkpoint included; it may be removed. A trial gets one CPU core; where the table shows
times, a machine to itself, unless --cpus says otherwise.

"all" is the whole paper: 1a to 1e, 3, and 7, the settings of Figure 7.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # fvcore, which Detectron2 imports, scripts its focal loss; PyTorch warns that this will go.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*")
    import focal_det

import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog

from focal_det.analysis import records
from focal_det.lab import charts, figures, markdown, summary
from focal_det.lab.measuring import fingerprints
from focal_det.lab.running import differ
from focal_det.lab.sweep import run_sweep
from focal_det.lab.tables import Table, built_in, load_table
from focal_det.lab.trial_records import load_records
from focal_det.lab.trials import Trial, make_trials, said


@dataclass(frozen=True)
class Command:
    """A script that runs one table.

    Attributes:
        table: its name.
        output: default folder, to which the data set's name is added.
        description: for ``--help``.
    """

    table: str
    output: str
    description: str


ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "demo" / "focal_retinanet_digits.yaml"


def main(argv: Sequence[str] | None = None, command: Command | None = None) -> int:
    """Run the command line; the exit status.

    Args:
        argv: words; None for those of the process.
        command: what a script that is for one table makes of it.
    """
    args = parse(argv, command)
    output = Path(args.output).resolve()
    try:
        return run(args, output)
    except KeyboardInterrupt:
        print(
            "\nInterrupted. The same command goes on where this one stopped; with --report-only "
            "it writes the tables of what is done."
        )
        return 130
    except (ImportError, OSError, ValueError) as error:  # Ray, what it has, and records
        print(error, file=sys.stderr)
        return 2


def run(args: argparse.Namespace, output: Path) -> int:
    """Run what is missing and write the tables; the exit status.

    Args:
        args: of :func:`parse`.
        output: folder.

    Raises:
        ImportError, OSError, ValueError: Ray cannot run, or a record cannot be read.
    """
    by_table: dict[str, list[Trial]] = args.trials
    every = {trial.key: trial for trials in by_table.values() for trial in trials}
    done = load_done(output, every)
    left = [trial for key, trial in every.items() if key not in done]
    print(f"{len(every)} trials: {len(done)} are done, {len(left)} are to be run")
    if args.dry_run:
        for trial in left:
            print(f"{trial.key}  table {trial.table}, seed {trial.seed}: {trial.label}")
        return 0
    problems = []
    if not args.report_only:
        timed = {x.key for table in args.tables if table.timed for x in by_table[table.name]}
        problems = run_sweep(
            left, output, timed=timed, address=args.address, cpus=args.cpus, gpus=args.gpus
        )
        done = load_done(output, every)
    for table in args.tables:
        trials = by_table[table.name]
        # Tables share settings: a record may say the label that another table has for it.
        labelled = [{**done[x.key], "label": x.label} for x in trials if x.key in done]
        report(table, labelled, output)
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if problems else 0


def load_done(output: Path, trials: dict[str, Trial]) -> dict[str, dict[str, Any]]:
    """The records of trials that are done, with the annotations that there are now.

    Args:
        output: folder of the sweep.
        trials: by key.
    """
    done = load_records(output, trials)
    names = {name for record in done.values() for part in record["data"] for name in part}
    now = fingerprints(sorted(name for name in names if name in DatasetCatalog))
    stale = [key for key, record in done.items() if differ(record["annotations"], now)]
    if stale:
        print(f"{len(stale)} records are of other annotations under the same names: left out")
    return {key: record for key, record in done.items() if key not in stale}


def report(table: Table, found: list[dict[str, object]], output: Path) -> None:
    """Write a table's summary in all its forms, and print it."""
    if not found:
        print(f"table {table.name}: nothing has been run yet")
        return
    made = summary.summarise(table, found)
    records.save(made, output / f"{table.name}.json")
    text = markdown.render(made)
    (output / f"{table.name}.md").write_text(text, encoding="utf-8")
    charts.save_figure(charts.draw_table(made), output / table.name)
    if table.speed:
        picture = figures.speed_picture(made)
        if picture is not None:
            charts.save_figure(picture, output / f"{table.name}_speed")
    print(f"\n{text}")


def parse(argv: Sequence[str] | None = None, command: Command | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message where it cannot be carried out.

    Args:
        argv, command: as of :func:`main`.
    """
    parser = argparse.ArgumentParser(
        description=command.description if command else __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(built_in())
    if command is None:
        table = f"{names}, all (those with a number), or a YAML file of your own"
        parser.add_argument("--table", required=True, help=table)
    else:
        parser.set_defaults(table=command.table)
    parser.add_argument("--data", required=True, help="NAME of NAME_train and NAME_val")
    parser.add_argument("--config", default=str(CONFIG), help="a YAML config to start from")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 1 on")
    parser.add_argument("--budget", type=int, help="iterations; the schedule is scaled to it")
    folder = command.output if command else "output/ablate"
    parser.add_argument("--output", help=f"folder of the sweep; default: {folder}/DATA")
    parser.add_argument("--address", help="of a Ray cluster; default: this machine")
    parser.add_argument("--cpus", type=int, help="CPU cores for each trial; default: see above")
    parser.add_argument(
        "--gpus",
        type=int,
        default=int(torch.cuda.is_available()),
        help="GPUs for each trial; default: 1 where there is one",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    parser.add_argument("--report-only", action="store_true", help="run nothing, write the tables")
    parser.add_argument("opts", nargs="*", help="config overrides of all rows: KEY VALUE pairs")
    args = parser.parse_args(argv)
    args.output = args.output or f"{folder}/{args.data}"
    try:
        check(args)
    except (AssertionError, ImportError, KeyError, OSError, ValueError) as error:
        parser.error(said(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Find out before the first trial what would stop the last; adds ``tables`` and ``trials``.

    Raises:
        AssertionError, KeyError, OSError, ValueError: see
            :func:`focal_det.lab.trials.make_trials`.
        ImportError: focal_det could not be set up, as where FOCAL_DET_DATASETS is wrong.
    """
    focal_det.add_config(get_cfg())  # says why, where no data set of the user's is known
    for flag, least in (("seeds", 1), ("budget", 1), ("cpus", 1), ("gpus", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag} must be {least} or more, got {value}")
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise ValueError(f"--output must name a folder, got {args.output!r}, a file")
    if not Path(args.config).is_file():
        raise ValueError(f"--config must name a YAML file, got {args.config!r}")
    names = (
        [name for name in built_in() if name[0].isdigit()] if args.table == "all" else [args.table]
    )
    args.tables = [load_table(name) for name in names]
    args.trials = {
        table.name: make_trials(
            table,
            config_file=args.config,
            data=args.data,
            seeds=args.seeds,
            budget=args.budget,
            device="cuda" if args.gpus else "cpu",
            options=args.opts,
            processes=max(1, args.gpus),
        )
        for table in args.tables
    }


if __name__ == "__main__":
    sys.exit(main())
