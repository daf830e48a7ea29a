"""Look into a trained detector, or into a data set.

    python tools/analyze.py loss-cdf --config-file output/run/config.yaml \\
        MODEL.WEIGHTS output/run/model_final.pth
    python tools/analyze.py imbalance --data cells --config-file configs/my_base.yaml

loss-cdf: which share of the focal loss the easiest examples make up, foreground and background
apart, for several gamma (arXiv 1708.02002, Figure 4). Streams over the images of DATASETS.TEST, in
memory that does not depend on their number. Writes OUTPUT, a JSON file that tools/plot.py draws.

imbalance: how many background anchors a data set has to a foreground one, with the anchors and
image size of a config, and which loss to try first where foreground is as rare as that, by the
measurements of docs/results.md.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # fvcore, which Detectron2 imports, scripts its focal loss; PyTorch warns that this will go.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*")
    import focal_det

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import Tensor
from tqdm import tqdm

from focal_det.analysis import records
from focal_det.data.checks import anchor_setup
from focal_det.engine.checkpoint import Checkpointer
from focal_det.lab import imbalance
from focal_det.lab.loss_cdf import LossCDF
from focal_det.lab.measuring import count_anchors, fingerprint, fingerprints
from focal_det.lab.results import setting
from focal_det.lab.trials import check_weights, said
from focal_det.progress import bar_options
from focal_det.safe_loading import UnsafeFileError

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "configs" / "Base-FocalRetinaNet.yaml"
MEASURED = ROOT / "docs" / "figures" / "figure_imbalance.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    args = parse(argv)
    try:
        status: int = args.run(args)
    # Of checkpoints, data and records; Detectron2 asserts that there are images.
    except (AssertionError, OSError, ValueError, UnsafeFileError) as error:
        print(error, file=sys.stderr)
        return 2
    return status


def find_loss_cdf(args: argparse.Namespace) -> int:
    """The command loss-cdf."""
    cfg = args.cfg
    model = build_model(cfg).eval()
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    cdf = LossCDF()
    images = get_detection_dataset_dicts(list(cfg.DATASETS.TEST), filter_empty=False)
    mapper = DatasetMapper(
        is_train=True,  # for the boxes
        augmentations=[T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)],
        image_format=cfg.INPUT.FORMAT,
    )
    images = images[: args.images]
    trained = setting(CfgNode.load_cfg(cfg.dump()))
    # Before all images have been looked at: files may have changed by then.
    traced = {
        "annotations": fingerprints(cfg.DATASETS.TEST),
        "weights": fingerprint(PathManager.get_local_path(cfg.MODEL.WEIGHTS)),
        "settings": {key: x for key, x in sorted(trained) if key != "MODEL.WEIGHTS"},
    }
    for record in tqdm(images, unit="image", **bar_options()):
        cdf.add(*examples(model, mapper(record)))
    try:
        made = cdf.curves()
    except ValueError as error:
        raise ValueError(f"{', '.join(cfg.DATASETS.TEST)}: {error}") from error
    made["images"] = len(images)
    made["data"] = list(cfg.DATASETS.TEST)
    made["loss"] = cfg.MODEL.FOCAL_DET.LOSS.NAME
    made |= traced
    made["environment"] = records.environment(cfg.MODEL.DEVICE)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    records.save(made, args.output)
    counts = ", ".join(f"{number:,} {side}" for side, number in made["counts"].items())
    print(f"{counts} examples of {len(images)} images: {args.output}")
    return 0


def find_imbalance(args: argparse.Namespace) -> int:
    """The command imbalance."""
    name = args.cfg.DATASETS.TRAIN[0]
    try:
        counts = count_anchors(args.cfg)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    ratio = counts["background_per_foreground"]
    if ratio is None:
        print(
            f"{name}: no anchor lies on an object, in {counts['images']} images. Either there is "
            "none, or the anchors do not fit: tools/check_dataset.py says more",
            file=sys.stderr,
        )
        return 1
    print(
        f"{name}: {ratio:,.0f} background anchors to each foreground one "
        f"({counts['images']} images looked at, {args.config_file})"
    )
    if not MEASURED.is_file():
        print(f"{MEASURED} is missing, so nothing can be said of losses", file=sys.stderr)
        return 1
    try:
        traced = json.loads(MEASURED.read_text(encoding="utf-8"))
        print(describe(ratio, traced, args.cfg.SOLVER.CLIP_GRADIENTS.ENABLED))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{MEASURED} cannot be read: {type(error).__name__}: {error}") from error
    return 0


def describe(ratio: float, traced: dict[str, Any], clipped: bool) -> str:
    """What measurements say of a data set with this ratio, in a few lines.

    Args:
        ratio: background anchors to a foreground one.
        traced: of :func:`focal_det.lab.imbalance.trace`.
        clipped: whether gradients are to be clipped, on which the order of the losses hangs.
    """
    advice = imbalance.advise(ratio, traced)
    point, measured = advice["point"], advice["point"]["AP"]
    lines = [
        f"Measured nearest to it: {point['background_per_foreground']:,.0f} to one "
        f"({', '.join(point['data'])}), a small detector in a short training:"
    ]
    for label in advice["ranked"]:
        row = measured[label]
        values = ", ".join(f"{value:.1f}" for value in row["values"] if value is not None)
        lines.append(f"  {label:24} AP {row['mean']:5.1f}  (by seed: {values})")
    if not advice["inside"]:
        lines.append("Your ratio lies outside of what was measured: take this as a hint at most.")
    if clipped != traced["clipped_gradients"]:
        lines.append(
            f"Measured with SOLVER.CLIP_GRADIENTS.ENABLED {traced['clipped_gradients']}, and your "
            f"config says {clipped}. Where that was tried, the order was another: "
            'docs/results.md, "Without clipped gradients".'
        )
    if advice["first"] is None:
        lines.append("That is too little to say which to try first: no AP, or a row of one seed.")
        return "\n".join(lines)
    best, *others = advice["first"]
    lines.append(f"Try first: {best}.")
    lines.append("  " + " ".join(f"{key} {x}" for key, x in traced["settings"][best].items()))
    if others:
        lines.append(f"The seeds do not tell apart from it: {', '.join(others)}.")
    return "\n".join(lines)


@torch.no_grad()
def examples(model: Any, sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (R, K) and labels (R,) of one image.

    Args:
        model: a FocalRetinaNet.
        sample: of Detectron2's mapper, with ``image`` and ``instances``.
    """
    images = model.preprocess_image([sample])
    features = model.backbone(images.tensor)
    features = [features[name] for name in model.head_in_features]
    logits, _ = model.head(features)
    anchors = model.anchor_generator(features)
    labels, _ = model.label_anchors(anchors, [sample["instances"].to(model.device)])
    per_anchor = [
        level[0].unflatten(0, (-1, model.num_classes)).permute(2, 3, 0, 1).flatten(0, 2)
        for level in logits
    ]
    return torch.cat(per_anchor), labels[0]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message where it cannot be carried out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cdf = commands.add_parser("loss-cdf", help="who makes up the loss of a trained detector")
    cdf.add_argument("--config-file", required=True, help="the YAML of the training")
    cdf.add_argument("--images", type=int, help="how many, in the data set's order; all")
    cdf.add_argument("--output", type=Path, default=Path("output/loss_cdf.json"))
    cdf.set_defaults(run=find_loss_cdf, load=load_trained)
    ratio = commands.add_parser("imbalance", help="how rare foreground is, and what that asks for")
    ratio.add_argument("--data", required=True, help="a data set, or NAME of NAME_train")
    ratio.add_argument(
        "--config-file", default=str(BASE), help="a YAML with anchors and image size; %(default)s"
    )
    ratio.set_defaults(run=find_imbalance, load=load_for_data)
    for command in (cdf, ratio):
        command.add_argument("opts", nargs="*", help="config overrides: KEY VALUE pairs")
    args = parser.parse_args(argv)
    try:
        args.cfg = args.load(args)
    except (AssertionError, ImportError, KeyError, OSError, ValueError) as error:
        commands.choices[args.command].error(said(error))
    return args


def load_for_data(args: argparse.Namespace) -> CfgNode:
    """The frozen config whose anchors are laid on the data set.

    Raises:
        AssertionError, KeyError: an override that is not a config key (Detectron2's messages).
        ImportError: focal_det could not be set up, as where FOCAL_DET_DATASETS is wrong.
        OSError: the file cannot be read.
        ValueError: the data set is not registered, or the config has no anchors to lay.
    """
    cfg = get_cfg()
    focal_det.add_config(cfg)  # before the name is looked for: it says why none is known
    names = (f"{args.data}_train", args.data)
    there = [name for name in names if name in DatasetCatalog]
    if not there:
        raise ValueError(
            f"--data {args.data}: neither {' nor '.join(map(repr, names))} is registered; "
            "name it in FOCAL_DET_DATASETS"
        )
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.DATASETS.TRAIN = (there[0],)
    anchor_setup(cfg)
    cfg.freeze()
    return cfg


def load_trained(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a trained FocalRetinaNet.

    Raises:
        AssertionError, KeyError: an override that is not a config key (Detectron2's messages).
        ImportError: focal_det could not be set up, as where FOCAL_DET_DATASETS is wrong.
        OSError: the file cannot be read.
        ValueError: another meta-architecture, no weights, no such data set, or no image to
            look at.
    """
    if args.images is not None and args.images < 1:
        raise ValueError(f"--images must be 1 or more, got {args.images}")
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    if cfg.MODEL.META_ARCHITECTURE != "FocalRetinaNet":
        raise ValueError(
            f"MODEL.META_ARCHITECTURE must be 'FocalRetinaNet', got {cfg.MODEL.META_ARCHITECTURE!r}"
        )
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS must name a trained checkpoint, got ''")
    check_weights(cfg)
    missing = [name for name in cfg.DATASETS.TEST if name not in DatasetCatalog]
    if missing or not cfg.DATASETS.TEST:
        raise ValueError(
            f"DATASETS.TEST must name registered data sets, got {tuple(cfg.DATASETS.TEST)}"
        )
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


if __name__ == "__main__":
    sys.exit(main())
