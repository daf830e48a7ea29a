"""Find what is wrong with a data set before a training meets it.

    python tools/check_dataset.py digits_clutter_train \
        --config-file configs/demo/focal_retinanet_digits.yaml
    python tools/check_dataset.py coco_2017_val --jobs 8 --json output/coco_2017_val.json
    FOCAL_DET_DATASETS=cells:cells.json:images \
        python tools/check_dataset.py cells INPUT.MIN_SIZE_TEST 600

Takes the names that training takes. Looks at the annotation file, decodes every image, checks every
box and class, and asks whether the config's anchors fit the boxes. Exit status 0 if there is
nothing worse than a warning, 1 if there are errors, 2 if the command line cannot be carried out.
"""

import argparse
import dataclasses
import difflib
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # fvcore, which Detectron2 imports, scripts its focal loss; PyTorch warns that this will go.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*")
    import focal_det

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from tabulate import tabulate
from tqdm import tqdm

from focal_det.analysis.records import save
from focal_det.data import checks
from focal_det.progress import bar_options

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "Base-FocalRetinaNet.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    args = parse(argv)
    report = examine(args)
    print_report(report, args.show)
    if args.json is not None:
        save(report, args.json)
        print(f"\nWritten: {args.json}")
    return 1 if report["errors"] else 0


def examine(args: argparse.Namespace) -> dict[str, Any]:
    """All findings and statistics of a data set.

    Args:
        args: the command line.

    Returns:
        What JSON can hold: ``dataset``, ``annotation_file``, ``config_file`` and ``opts``; number
        of ``errors`` and ``warnings``; ``findings``; ``statistics``, which are ``objects`` and, if
        there are objects, ``anchors`` and ``assignment``; see :mod:`focal_det.data.checks`.
    """
    data = checks.read_dataset(args.name)
    findings = list(data.findings)
    # Before the records: sizes that these do not state are taken from the files.
    if not args.skip_images:
        decoded = checks.check_images(data.records, args.jobs)
        for found in progress(decoded, "decoding", len(data.records)):
            findings += found
    num_classes = None if data.classes is None else len(data.classes)
    findings += checks.check_records(
        progress(data.records, "checking", len(data.records)), num_classes, data.image_root
    )
    images = checks.usable_objects(data.records, num_classes)
    statistics = {"objects": checks.count_objects(images, data.records, data.classes)}
    if statistics["objects"]["objects"]:
        statistics["anchors"] = checks.anchor_coverage(images, args.anchors)
        findings += checks.check_coverage(statistics["anchors"])
        step = max(1, -(-len(images) // args.assign))
        sample = images[::step]
        statistics["assignment"] = checks.foreground_ratio(
            progress(sample, "assigning", len(sample)), args.anchors
        )
    severities = Counter(finding.severity for finding in findings)
    return {
        "dataset": args.name,
        "annotation_file": data.json_file,
        "config_file": args.config_file,
        "opts": args.opts,
        "errors": severities[checks.ERROR],
        "warnings": severities[checks.WARNING],
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "statistics": statistics,
    }


def progress(items: Any, what: str, total: int) -> Any:
    """A progress bar over images."""
    return tqdm(items, what, total, unit="image", **bar_options())


def print_report(report: dict[str, Any], show: int) -> None:
    """The tables, on the console.

    Args:
        report: of :func:`examine`.
        show: how many findings of each kind to print.
    """
    objects = report["statistics"]["objects"]
    source = f" ({report['annotation_file']})" if report["annotation_file"] else ""
    print(
        f"\n{report['dataset']}{source}: {objects['images']} images, "
        f"{objects['images_without_objects']} of them without objects; {objects['objects']} "
        f"objects, {objects['crowds']} crowds"
    )
    if objects["objects"]:
        print_classes(objects)
        print_anchors(report["statistics"]["anchors"])
        print_assignment(report["statistics"]["assignment"])
    print_findings(report["findings"], show)
    print(f"\nErrors: {report['errors']}, warnings: {report['warnings']}")


def print_classes(objects: dict[str, Any]) -> None:
    """Counts and sizes of the objects."""
    counts = objects["objects_per_class"]
    rows = [[name, count, count / objects["objects"]] for name, count in counts.items()]
    print("\n" + tabulate(rows, ["class", "objects", "share"], floatfmt=".1%"))
    quantities = {
        "objects per image": objects["objects_per_image"],
        "sqrt of box area, pixels": objects["box_size"],
        "box height / width": objects["box_aspect"],
    }
    rows = [[name, *values.values()] for name, values in quantities.items()]
    print("\n" + tabulate(rows, ["quantiles", *objects["objects_per_image"]]))


def print_anchors(anchors: dict[str, Any]) -> None:
    """Boxes that no anchor reaches, by level."""
    columns = ("stride", "sizes", "boxes", "unreached", "share", "fitting_sizes")
    rows = []
    for level in anchors["levels"]:
        shown = {key: " ".join(f"{x:g}" for x in level[key]) for key in ("sizes", "fitting_sizes")}
        rows.append([{**level, **shown}[key] for key in columns])
    head = ["stride", "anchor sizes", "boxes", "without anchor", "share", "sizes that fit"]
    print("\n" + tabulate(rows, head, floatfmt=".1%", missingval="-", disable_numparse=[1, 5]))
    print(
        f"Without an anchor of IoU {anchors['foreground_iou']:g} or more at MIN_SIZE_TEST "
        f"{anchors['min_size']}, MAX_SIZE_TEST {anchors['max_size']}: {anchors['share']:.1%} of "
        f"the boxes. Were each in the middle of an anchor: {anchors['share_if_centred']:.1%}. With "
        f"the sizes that fit (quantiles of each level's boxes): "
        f"{anchors['share_with_fitting_sizes']:.1%}."
    )


def print_assignment(assignment: dict[str, Any]) -> None:
    """Foreground against background."""
    ratio = assignment["background_per_foreground"]
    print(
        f"Anchors of {assignment['images']} images: {assignment['foreground']} foreground, "
        f"{assignment['background']} background, {assignment['ignored']} ignored: "
        + ("no foreground" if ratio is None else f"{ratio:.0f} background for each foreground")
    )


def print_findings(findings: Sequence[dict[str, Any]], show: int) -> None:
    """How many of each kind, errors first, and some of them."""
    counts = Counter(finding["kind"] for finding in findings)
    if not counts:
        return
    kinds = sorted(counts, key=lambda kind: (checks.KINDS[kind].severity, kind))
    rows = [
        [checks.KINDS[kind].severity, kind, counts[kind], checks.KINDS[kind].meaning]
        for kind in kinds
    ]
    print("\n" + tabulate(rows, ["", "finding", "count", "what it does"]))
    for kind in kinds if show else ():
        print(f"\n{kind}:")
        of_kind = [finding for finding in findings if finding["kind"] == kind]
        for finding in of_kind[:show]:
            print(f"  {checks.Finding(**finding)}")
        if len(of_kind) > show:
            print(f"  ... and {len(of_kind) - show} more (--show, --json)")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message where it cannot be carried out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="a registered data set")
    parser.add_argument("--config-file", default=str(CONFIG), help="a YAML config, for its anchors")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write all findings")
    parser.add_argument(
        "--jobs", type=int, default=min(4, os.cpu_count() or 1), help="images decoded at a time"
    )
    parser.add_argument("--show", type=int, default=3, help="findings of each kind to print")
    parser.add_argument(
        "--assign", type=int, default=200, help="images whose anchors are assigned, at most"
    )
    parser.add_argument("--skip-images", action="store_true", help="open no image")
    parser.add_argument("opts", nargs="*", help="config overrides: KEY VALUE pairs")
    args = parser.parse_intermixed_args(argv)
    if args.jobs < 1 or args.assign < 1 or args.show < 0:
        parser.error("--jobs and --assign must be 1 or more, --show 0 or more")
    try:
        check(args)
    except (AssertionError, ImportError, KeyError, OSError, ValueError) as error:
        parser.error(error.args[0] if isinstance(error, KeyError) else str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Build the anchors, which ``args.anchors`` then is, and look the data set up.

    Raises:
        AssertionError, KeyError: an override that is not a config key (Detectron2's messages).
        ImportError: focal_det cannot be set up, such as by a bad FOCAL_DET_DATASETS.
        OSError: the config file cannot be read.
        ValueError: another argument that cannot be used.
    """
    cfg = get_cfg()
    focal_det.add_config(cfg)
    if args.config_file.endswith(".py"):
        raise ValueError(
            f"--config-file must name a YAML file, not a LazyConfig, got {args.config_file!r}"
        )
    if not Path(args.config_file).is_file():
        raise ValueError(f"--config-file must name a YAML file, got {args.config_file!r}")
    try:
        cfg.merge_from_file(args.config_file)
    except (AttributeError, RecursionError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"--config-file {args.config_file!r} is no config: {problem}") from error
    cfg.merge_from_list(args.opts)
    args.anchors = checks.anchor_setup(cfg)
    if args.name not in DatasetCatalog:
        near = difflib.get_close_matches(args.name, DatasetCatalog.list(), n=5)
        known = ", ".join(near or sorted(DatasetCatalog.list()))
        raise ValueError(
            f"NAME must be a registered data set, got {args.name!r}; "
            f"{'near it are' if near else 'there are'} {known}. Sets of your own: "
            "FOCAL_DET_DATASETS=name:annotations.json:image_dir"
        )
    if args.json is not None:
        check_writable(args.json)


def check_writable(path: Path) -> None:
    """Make the folder of a file, and see that the file can be written into it.

    Raises:
        ValueError: it cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"--json {str(path)!r} cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
