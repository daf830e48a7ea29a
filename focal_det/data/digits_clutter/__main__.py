"""``python -m focal_det.data.digits_clutter``: writes a data set with knobs of one's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .spec import EMBEDDED, SPLITS, DigitsClutterSpec, knobs
from .store import generate


def _dataset_entries(root: Path) -> str:
    """A value of FOCAL_DET_DATASETS that registers both splits under the directory's name."""
    # The names of the embedded sets stand for specs of their own, which are always registered.
    name = f"custom_{root.name}" if root.name in EMBEDDED else root.name
    return ",".join(
        f"{name}_{split}:{root / split}.json:{root / 'images' / split}" for split in SPLITS
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: each knob of the spec is an option."""
    parser = argparse.ArgumentParser(
        prog="python -m focal_det.data.digits_clutter",
        description="Write handwritten digits in cluttered scenes as a COCO-format data set.",
    )
    parser.add_argument("--out", required=True, type=Path, help="directory to create")
    defaults = DigitsClutterSpec()
    for name, kind in knobs().items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=getattr(defaults, name),
            help="default: %(default)s",
        )
    values = vars(parser.parse_args(argv))
    out = values.pop("out")
    try:
        root = generate(DigitsClutterSpec(**values), out, progress=True)
    except (ValueError, FileExistsError, ModuleNotFoundError) as error:
        parser.error(str(error))
    print(f"export FOCAL_DET_DATASETS={_dataset_entries(root)}")


if __name__ == "__main__":
    main()
