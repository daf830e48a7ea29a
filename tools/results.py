"""Run what is missing of the results that this repository reports.

    python tools/results.py --dry-run
    python tools/results.py                          # everything whose data are there
    python tools/results.py "sparse digits" digits   # some sweeps of docs/results/sweeps.yaml

Each new record goes to docs/results/records; `make docs` then writes docs/results.md, its tables
and its figures. Sets of real images have to be named in FOCAL_DET_DATASETS.
"""

import argparse
import shutil
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

with warnings.catch_warnings():
    # fvcore, which Detectron2 imports, scripts its focal loss; PyTorch warns that this will go.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*")
    import focal_det

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog

from focal_det.lab import results
from focal_det.lab.sweep import run_sweep
from focal_det.lab.trials import Trial, dataset_names, make_trials

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    args = parse(argv)
    if not args.dry_run:
        keep(args.output, args.trials)
    try:
        known = {found for found, _ in results.read_records(RESULTS / "records")}
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    left = [
        trial
        for trial in args.trials
        if results.setting(CfgNode.load_cfg(trial.config)) not in known
    ]
    print(f"{len(args.trials)} trials: {len(left)} are to be run")
    if args.dry_run:
        for trial in left:
            print(f"{trial.key}  table {trial.table}, seed {trial.seed}: {trial.label}")
        return 0
    try:
        problems = run_sweep(left, args.output, timed=args.timed, cpus=args.cpus)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where this one stopped.")
        return 130
    except (ImportError, OSError, ValueError) as error:  # Ray, and what it has
        print(error, file=sys.stderr)
        return 2
    finally:
        keep(args.output, args.trials)
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    print("`make docs` writes the pages anew")
    return 1 if problems else 0


def keep(output: Path, trials: Iterable[Trial]) -> None:
    """Copy the records of trials to where they are committed."""
    folder = RESULTS / "records"
    folder.mkdir(parents=True, exist_ok=True)
    for trial in trials:
        path = output / "records" / f"{trial.key}.json"
        if path.is_file() and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message where it cannot be carried out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", nargs="*", help="names in docs/results/sweeps.yaml; default: all")
    parser.add_argument(
        "--cpus", type=int, help="CPU cores for each trial; default: 1, all where times are shown"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "results")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    args = parser.parse_args(argv)
    if args.cpus is not None and args.cpus < 1:
        parser.error(f"--cpus must be 1 or more, got {args.cpus}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output must name a folder, got '{args.output}', a file")
    try:
        focal_det.add_config(get_cfg())  # says why, where no data set of the user's is known
        sweeps = results.read_sweeps(RESULTS / "sweeps.yaml")
        for name in args.sweeps:
            if name not in sweeps:
                raise ValueError(f"sweep must be one of {'; '.join(sweeps)}, got {name!r}")
        chosen = [sweeps[name] for name in args.sweeps or sweeps]
        args.trials, args.timed = list_trials(chosen, args.sweeps)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    args.output = args.output.resolve()
    return args


def list_trials(
    sweeps: Sequence[results.Sweep], asked_for: Sequence[str]
) -> tuple[list[Trial], set[str]]:
    """The trials of sweeps, each once, first seeds first; and keys of those that are timed.

    Args:
        sweeps: which ones.
        asked_for: names of those that must not be left out where their data are not there.

    Raises:
        ValueError: see :func:`focal_det.lab.trials.make_trials`.
    """
    trials: dict[str, Trial] = {}
    timed: set[str] = set()
    for sweep in sweeps:
        there = all(name in DatasetCatalog for name in dataset_names(sweep.data))
        if not there and sweep.name not in asked_for:
            print(f"{sweep.name}: left out, {sweep.data} is not in FOCAL_DET_DATASETS")
            continue
        for name, seeds in sweep.tables.items():
            table = sweep.table(name)
            for trial in make_trials(
                table,
                config_file=str(ROOT / sweep.config),
                data=sweep.data,
                seeds=seeds,
                budget=sweep.budget,
                options=sweep.options,
            ):
                trials.setdefault(trial.key, trial)
                timed |= {trial.key} if table.timed else set()
    return sorted(trials.values(), key=lambda trial: trial.seed), timed


if __name__ == "__main__":
    sys.exit(main())
