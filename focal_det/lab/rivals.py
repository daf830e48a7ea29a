"""Other detectors on the backbone, data and schedule of a FocalRetinaNet's config.

Detectron2's RetinaNet and Faster R-CNN are a matter of config keys. Its FCOS has no YAML form and
gets one here; torchvision's detectors get theirs in :mod:`.torchvision_detectors`. The same
trainer, loaders and evaluator serve all. :func:`differences` says what cannot be made equal.

The meta-architectures are registered when this module is imported. For ``tools/train_net.py`` to
take the config of a trial of theirs, have it do so: ``FOCAL_DET_PLUGINS=focal_det.lab.rivals``.
"""

from collections.abc import Callable, Iterator

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from torch import nn

from focal_det.config import default_keys

from . import torchvision_detectors  # registers TorchvisionRetinaNet and TorchvisionFCOS

_POINTS = (
    "one point a location instead of anchors, none of them ignored, for objects whose center is "
    "within 1.5 strides and that reach 4 to 8 strides from it, on the finest level less and on the "
    "coarsest more; GIoU and centerness losses; scores, to which the threshold applies, are the "
    "root of class times centerness"
)
DIFFERENCES = {
    "focal_det": "",
    "retinanet": "",
    "fcos": _POINTS,
    "faster_rcnn": (
        "two stages, cross entropy without a prior in both, softmax in the second; proposals are "
        "pooled from stride 16 from 224 px on, an octave a level, whatever "
        "MODEL.ANCHOR_GENERATOR.SIZES says; boxes are clipped to the image before NMS"
    ),
    "torchvision_retinanet": "boxes are clipped to the image before NMS",
    "torchvision_fcos": f"{_POINTS}; boxes are clipped to the image before NMS",
}
"""Detector to what differs from a FocalRetinaNet whatever the config says."""
META_ARCHITECTURES = {
    "focal_det": "FocalRetinaNet",
    "retinanet": "RetinaNet",
    "fcos": "DenseFCOS",
    "faster_rcnn": "GeneralizedRCNN",
    "torchvision_retinanet": "TorchvisionRetinaNet",
    "torchvision_fcos": "TorchvisionFCOS",
}


def choose_detector(cfg: CfgNode, name: str) -> None:
    """Turn the config of a FocalRetinaNet into that of another detector.

    Args:
        cfg: changed in place; features, thresholds, box loss, norm and number of classes are those
            of ``MODEL.RETINANET``.
        name: a key of :data:`DIFFERENCES`.
    """
    cfg.MODEL.META_ARCHITECTURE = META_ARCHITECTURES[name]
    if name == "faster_rcnn":
        _set_first_stage(cfg)
        _set_second_stage(cfg)


def _set_first_stage(cfg: CfgNode) -> None:
    dense, rpn = cfg.MODEL.RETINANET, cfg.MODEL.RPN
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    rpn.IN_FEATURES = list(dense.IN_FEATURES)
    rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST = 2000, dense.TOPK_CANDIDATES_TEST
    rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST = 1000, 1000
    rpn.BBOX_REG_LOSS_TYPE = dense.BBOX_REG_LOSS_TYPE
    rpn.SMOOTH_L1_BETA = dense.SMOOTH_L1_LOSS_BETA
    rpn.BBOX_REG_WEIGHTS = dense.BBOX_REG_WEIGHTS


def _set_second_stage(cfg: CfgNode) -> None:
    dense, heads, box_head = cfg.MODEL.RETINANET, cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    heads.NAME, heads.IN_FEATURES = "StandardROIHeads", list(dense.IN_FEATURES)
    heads.NUM_CLASSES = dense.NUM_CLASSES
    heads.SCORE_THRESH_TEST, heads.NMS_THRESH_TEST = dense.SCORE_THRESH_TEST, dense.NMS_THRESH_TEST
    box_head.NAME, box_head.POOLER_RESOLUTION = "FastRCNNConvFCHead", 7
    box_head.BBOX_REG_LOSS_TYPE = dense.BBOX_REG_LOSS_TYPE
    box_head.SMOOTH_L1_BETA = dense.SMOOTH_L1_LOSS_BETA
    # As wide as the pyramid's share of the paper's: 1024 for 256 channels.
    box_head.FC_DIM = 4 * cfg.MODEL.FPN.OUT_CHANNELS
    box_head.NUM_FC, box_head.NUM_CONV, box_head.NORM = 2, 0, dense.NORM
    if dense.NORM:
        # Only convolutions have a norm; this is the form of Detectron2's own models with GN.
        box_head.NUM_FC, box_head.NUM_CONV = 1, dense.NUM_CONVS
        box_head.CONV_DIM = cfg.MODEL.FPN.OUT_CHANNELS


def differences(cfg: CfgNode, detector: str) -> str:
    """What differs between a detector and the FocalRetinaNet of the same config.

    Args:
        cfg: of the detector, that is, after :func:`choose_detector`.
        detector: a key of :data:`DIFFERENCES`.

    Returns:
        A text of no more than the truth for this config, to be printed; empty for no difference.
    """
    notes: dict[str, Callable[[CfgNode], Iterator[str]]] = {
        "retinanet": _of_retinanet,
        "fcos": _of_fcos,
        "faster_rcnn": _of_faster_rcnn,
        "torchvision_retinanet": _of_torchvision_retinanet,
        "torchvision_fcos": _of_torchvision_fcos,
    }
    parts = [DIFFERENCES[detector]]
    if detector in notes:
        parts += [*notes[detector](cfg), *_of_all_others(cfg)]
    return "; ".join(filter(None, parts))


def _of_all_others(cfg: CfgNode) -> Iterator[str]:
    head = cfg.MODEL.FOCAL_DET.HEAD.NAME
    if head != default_keys()["MODEL.FOCAL_DET.HEAD.NAME"]:
        yield f"without {head}, the head of MODEL.FOCAL_DET"


def _of_retinanet(cfg: CfgNode) -> Iterator[str]:
    yield from _divisor(cfg, "ema", "a moving average of the foreground count")
    if cfg.MODEL.WEIGHTS:
        yield "takes the head, but no moving average, of a FocalRetinaNet in MODEL.WEIGHTS"


def _of_fcos(cfg: CfgNode) -> Iterator[str]:
    yield "the losses' divisor is a moving average of the foreground count that starts at 300"
    yield from _counts_alone(cfg)
    if cfg.MODEL.WEIGHTS:
        yield "takes the subnets' convolutions, not the last ones, of a head in MODEL.WEIGHTS"


def _of_faster_rcnn(cfg: CfgNode) -> Iterator[str]:
    rpn, heads, box_head = cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    norm = box_head.NORM
    # In evaluation; Detectron2 takes the best of each level first.
    of_levels = rpn.PRE_NMS_TOPK_TEST * len(rpn.IN_FEATURES)
    proposals = min(rpn.POST_NMS_TOPK_TEST, of_levels)
    yield (
        f"{rpn.BATCH_SIZE_PER_IMAGE} anchors and {heads.BATCH_SIZE_PER_IMAGE} proposals an image "
        f"are drawn, foreground above an overlap of {rpn.IOU_THRESHOLDS[-1]:g} and "
        f"{heads.IOU_THRESHOLDS[-1]:g}, and divide the losses"
    )
    yield (
        f"up to {proposals} proposals an image by an RPN of one convolution; for each, "
        f"{box_head.NUM_CONV} x convolution, {box_head.NUM_FC} x fully connected of "
        f"{box_head.FC_DIM}"
    )
    if norm:
        shared = ", whose statistics all levels share" if norm in ("BN", "SyncBN") else ""
        yield f"{norm} after these convolutions{shared}, none in the RPN and the connected layers"
    yield (
        "box targets of the second stage are scaled by "
        f"{', '.join(f'{x:g}' for x in box_head.BBOX_REG_WEIGHTS)} before the box loss"
    )
    yield from _no_head(cfg)


def _of_torchvision_retinanet(cfg: CfgNode) -> Iterator[str]:
    dense, loss = cfg.MODEL.RETINANET, torchvision_detectors.box_loss(cfg)
    if loss == "l1" and dense.SMOOTH_L1_LOSS_BETA != 0:
        yield f"L1 box loss, not smooth L1 of beta {dense.SMOOTH_L1_LOSS_BETA:g}"
    yield from _divisor(cfg, "image", "each image's own foreground count", alone=False)
    yield from _of_torchvision(cfg)


def _of_torchvision_fcos(cfg: CfgNode) -> Iterator[str]:
    yield from _divisor(cfg, "batch", "the batch's foreground count")
    yield from _of_torchvision(cfg)


def _of_torchvision(cfg: CfgNode) -> Iterator[str]:
    alpha, gamma = cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA, cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA
    if (alpha, gamma) != (0.25, 2):
        yield f"focal loss of alpha 0.25 and gamma 2, not {alpha:g} and {gamma:g}"
    yield from _no_head(cfg)


def _divisor(cfg: CfgNode, same: str, theirs: str, alone: bool = True) -> Iterator[str]:
    """``alone``: whether they count on each GPU alone, which is no difference for single images."""
    ours = cfg.MODEL.FOCAL_DET.NORMALIZER.NAME
    if ours != same:
        yield f"the losses' divisor is {theirs}, not MODEL.FOCAL_DET.NORMALIZER's {ours!r}"
    if alone:
        yield from _counts_alone(cfg)


def _counts_alone(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.FOCAL_DET.NORMALIZER.SYNC and cfg.MODEL.DEVICE.startswith("cuda"):
        yield "of several GPUs, each counts its own foreground alone"


def _no_head(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.WEIGHTS:
        yield "takes the backbone, not the head, of a RetinaNet in MODEL.WEIGHTS"


@META_ARCH_REGISTRY.register()
def DenseFCOS(cfg: CfgNode) -> nn.Module:
    """Detectron2's FCOS (arXiv 2006.09214) from the keys of ``MODEL.RETINANET``.

    Its own test thresholds do not apply: they are those of the other rows.
    """
    backbone = build_backbone(cfg)
    dense = cfg.MODEL.RETINANET
    shapes = [backbone.output_shape()[name] for name in dense.IN_FEATURES]
    head = FCOSHead(
        input_shape=shapes,
        num_classes=dense.NUM_CLASSES,
        conv_dims=[shapes[0].channels] * dense.NUM_CONVS,
        norm=dense.NORM,
        prior_prob=dense.PRIOR_PROB,
    )
    return FCOS(
        backbone=backbone,
        head=head,
        head_in_features=dense.IN_FEATURES,
        num_classes=dense.NUM_CLASSES,
        focal_loss_alpha=dense.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=dense.FOCAL_LOSS_GAMMA,
        test_score_thresh=dense.SCORE_THRESH_TEST,
        test_topk_candidates=dense.TOPK_CANDIDATES_TEST,
        test_nms_thresh=dense.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
