"""Turn all records below a folder into one page that opens from disk.

    python tools/report.py output/ablate
    python tools/report.py output --output report.html

Takes sweeps of tools/ablate.py, results of tools/demo.py, and training runs of any script of
Detectron2. The page holds everything: tables, plots, detections beside ground truth where these and
the data set are still there (one of your own is named in FOCAL_DET_DATASETS), in what the configs
differ, and versions and machines.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

with warnings.catch_warnings():
    # fvcore, which Detectron2 imports, scripts its focal loss; PyTorch warns that this will go.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*")
    import focal_det  # noqa: F401  (registers the data sets)

from focal_det.files import write_whole
from focal_det.lab.report import overview


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    args = parse(argv)
    path = args.output or args.folder / "summary.html"
    try:
        page, problems = overview.build(args.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        # What UTF-8 cannot hold, half a character in a label, becomes a question mark.
        write_whole(path, lambda file: file.write(page.encode("utf-8", "replace")))
    except (overview.NothingFoundError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for file, why in problems:
        print(f"cannot be read: {file}: {why}", file=sys.stderr)
    print(path)
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message where it cannot be carried out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUTPUT_DIR", help="looked through, all of it")
    parser.add_argument("--output", type=Path, help="the page; default: OUTPUT_DIR/summary.html")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"OUTPUT_DIR must be a folder, got {str(args.folder)!r}")
    return args


if __name__ == "__main__":
    sys.exit(main())
