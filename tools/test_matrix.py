"""Run a part of the tests with other versions of Python, PyTorch and Detectron2, and record it.

    python tools/test_matrix.py                               # all that this machine can make
    python tools/test_matrix.py --list
    python tools/test_matrix.py --only 'py3.12-*' '*-detectron2-main'
    python tools/test_matrix.py --quick                       # a handful of tests of each
    python tools/test_matrix.py --detectron2-source ../detectron2

Each pair of Python and PyTorch gets a virtual environment in CACHE (3 to 6 GB; --prune removes it
after use) with everything but Detectron2. Where this tool runs in such a pair, its own environment
serves. Each Detectron2 gets a small environment on top, whose packages come before those of the
larger one. What was imported is asked in a process of that environment, and a combination whose
Detectron2 is not its own is an error.

Detectron2 is installed as Python only, but for main-built, which is built here. 0.6 insists on its
compiled part: the import is guarded as in the main branch, and pycocotools takes the place of its
COCO evaluation.

Writes OUTPUT/<Python and PyTorch>/detectron2-<version>.json; `make docs` makes the README's table.
"""

import argparse
import fnmatch
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from version_matrix import environments, layers, outcomes, table
from version_matrix.combinations import ROOT, Combination, combinations

RESULTS = ROOT / "tools" / "results" / "matrix"


def main() -> int:
    """Run the command line; 1 if a combination fails for a reason that is not known, else 0."""
    args = parse()
    if args.list:
        print("\n".join(combination.name for combination in args.chosen))
        return 0
    found = environments.interpreters(args.python)
    made = []
    with tqdm(args.chosen, unit="combination", dynamic_ncols=True) as bar:
        for index, combination in enumerate(bar):
            record = try_combination(args, combination, found, bar)
            if record["status"] != "not made" or not table.has(combination, args.output):
                table.save(record, args.output)  # what ran on another machine is not lost
            bar.write(f"{combination.name}: {table.result(record)}")
            made.append(record)
            last = args.chosen[index + 1 : index + 2]
            if args.prune and not (last and last[0].pair == combination.pair):
                shutil.rmtree(args.cache / combination.pair, ignore_errors=True)
    print("\n" + table.render(made))
    print(f"Written below {args.output}; what was printed meanwhile is in {args.cache / 'logs'}.")
    return int(any(record["status"] == "failed" for record in made))


def try_combination(
    args: argparse.Namespace, combination: Combination, found: Mapping[str, Path], bar: Any
) -> dict[str, Any]:
    """Make a combination, test it, and tell what came of it.

    Args:
        args: the command line.
        combination: what to try.
        found: interpreters by minor release.
        bar: progress.

    Returns:
        A record.
    """
    log = args.cache / "logs" / f"{combination.name}.txt"
    os.makedirs(log.parent, exist_ok=True)
    log.write_text("")
    record = table.empty_record(combination, args.quick)
    try:
        bar.set_description(f"{combination.name}: packages")
        base = environments.make_base(combination, found, args.cache, log)
        bar.set_description(f"{combination.name}: Detectron2")
        source = layers.get_source(combination, args.detectron2_source, base, args.cache, log)
        record["detectron2_from"] = source.label
        layer = layers.make_layer(combination, base, source, args.cache, log)
        record["versions"] = layers.probe(layer, log)
    except environments.NotMade as reason:
        return {**record, "status": "not made", "reason": str(reason)}
    bar.set_description(f"{combination.name}: tests")
    record |= outcomes.run_tests(combination, layer, args.quick, args.workers, log)
    advice = outcomes.doctor(layer)
    for breakage in record["known"]:
        breakage["doctor"] = breakage["cure"] in advice
    return record


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message where it cannot be carried out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the combinations' names")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of names")
    parser.add_argument("--quick", action="store_true", help="a handful of tests")
    parser.add_argument(
        "--python", nargs="+", type=Path, default=[], metavar="PATH", help="further interpreters"
    )
    parser.add_argument(
        "--detectron2-source", default=layers.DETECTRON2_URL, metavar="PATH_OR_GIT_URL"
    )
    parser.add_argument("--workers", default="auto", help="processes of pytest; 0 for none")
    parser.add_argument(
        "--prune", action="store_true", help="remove each environment after its last combination"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / ".matrix", help="default .matrix")
    parser.add_argument("--output", type=Path, help="folder; default tools/results/matrix")
    args = parser.parse_args(argv)
    for path in args.python:
        if not os.access(path, os.X_OK):
            parser.error(f"--python must name interpreters, got {path}")
    # A quick run must not replace a record of a full one.
    quick = ROOT / "output" / "matrix"
    args.output = args.output or (quick if args.quick else RESULTS)
    args.cache = args.cache.resolve()
    args.chosen = [
        combination
        for combination in combinations()
        if any(fnmatch.fnmatch(combination.name, pattern) for pattern in args.only)
    ]
    if not args.chosen:
        parser.error(f"--only {' '.join(args.only)}: no combination is of this name; see --list")
    return args


if __name__ == "__main__":
    sys.exit(main())
