"""Look into a trained detector, or into a data set.

    python tools/analyze.py loss-cdf --config-file output/run/config.yaml \\
        MODEL.WEIGHTS output/run/model_final.pth

loss-cdf: which share of the focal loss the easiest examples make up, foreground and background
apart, for several gamma (arXiv 1708.02002, Figure 4). Streams over the images of DATASETS.TEST, in
memory that does not depend on their number. Writes OUTPUT, a JSON file that tools/plot.py draws.
"""

import argparse
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
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from torch import Tensor
from tqdm import tqdm

from focal_det.analysis import records
from focal_det.engine.checkpoint import Checkpointer
from focal_det.lab.loss_cdf import LossCDF
from focal_det.progress import bar_options


def main() -> int:
    """Run the command line; the exit status."""
    args = parse()
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
    for record in tqdm(images, unit="image", **bar_options()):
        cdf.add(*examples(model, mapper(record)))
    made = cdf.curves()
    made["images"] = len(images)
    made["data"] = list(cfg.DATASETS.TEST)
    made["loss"] = cfg.MODEL.FOCAL_DET.LOSS.NAME
    made["environment"] = records.environment(cfg.MODEL.DEVICE)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    records.save(made, args.output)
    counts = ", ".join(f"{number:,} {side}" for side, number in made["counts"].items())
    print(f"{counts} examples of {len(images)} images: {args.output}")
    return 0


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
    command = commands.add_parser("loss-cdf", help="who makes up the loss of a trained detector")
    command.add_argument("--config-file", required=True, help="the YAML of the training")
    command.add_argument("--images", type=int, help="how many, in the data set's order; all")
    command.add_argument("--output", type=Path, default=Path("output/loss_cdf.json"))
    command.add_argument("opts", nargs="*", help="config overrides: KEY VALUE pairs")
    args = parser.parse_args(argv)
    try:
        args.cfg = load_config(args.config_file, args.opts)
        if args.images is not None and args.images < 1:
            raise ValueError(f"--images must be 1 or more, got {args.images}")
    except (AssertionError, KeyError, OSError, ValueError) as error:
        command.error(str(error))
    return args


def load_config(config_file: str, options: Sequence[str]) -> CfgNode:
    """The frozen config of a trained FocalRetinaNet.

    Raises:
        AssertionError, KeyError: an override that is not a config key (Detectron2's messages).
        OSError: the file cannot be read.
        ValueError: another meta-architecture, or no weights.
    """
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(list(options))
    if cfg.MODEL.META_ARCHITECTURE != "FocalRetinaNet":
        raise ValueError(
            f"MODEL.META_ARCHITECTURE must be 'FocalRetinaNet', got {cfg.MODEL.META_ARCHITECTURE!r}"
        )
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS must name a trained checkpoint, got ''")
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


if __name__ == "__main__":
    sys.exit(main())
