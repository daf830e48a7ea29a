"""Other detectors on the backbone, data and schedule of a FocalRetinaNet's config.

Detectron2's RetinaNet and Faster R-CNN are a matter of config keys. Its FCOS has no YAML form, and
torchvision's detectors are no meta-architectures; both get one here, so that the same trainer,
loaders and evaluator serve all. What cannot be made equal is in :data:`DIFFERENCES`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, detector_postprocess
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.models import detection as torchvision_detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

DIFFERENCES = {
    "focal_det": "",
    "retinanet": "",
    "fcos": "no anchors: one point a location; GIoU and centerness losses",
    "faster_rcnn": "two stages: proposals, then two fully connected layers for each",
    "torchvision_retinanet": (
        "four convolutions in each subnet, L1 box loss, each image normalised by its own anchors"
    ),
    "torchvision_fcos": "no anchors; GN in the subnets; GIoU and centerness losses",
}
"""Detector to what differs from the others beyond the keys of its config."""


def choose_detector(cfg: CfgNode, name: str) -> None:
    """Turn the config of a FocalRetinaNet into that of another detector.

    Args:
        cfg: changed in place; features, thresholds and number of classes are those of
            ``MODEL.RETINANET``.
        name: a key of :data:`DIFFERENCES`.
    """
    cfg.MODEL.META_ARCHITECTURE = {
        "focal_det": "FocalRetinaNet",
        "retinanet": "RetinaNet",
        "fcos": "DenseFCOS",
        "faster_rcnn": "GeneralizedRCNN",
        "torchvision_retinanet": "TorchvisionRetinaNet",
        "torchvision_fcos": "TorchvisionFCOS",
    }[name]
    if name != "faster_rcnn":
        return
    dense, features = cfg.MODEL.RETINANET, list(cfg.MODEL.RETINANET.IN_FEATURES)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    cfg.MODEL.RPN.IN_FEATURES = features
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 2000, 1000
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 1000, 1000
    heads, box_head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    heads.NAME, heads.IN_FEATURES = "StandardROIHeads", features
    heads.NUM_CLASSES = dense.NUM_CLASSES
    heads.SCORE_THRESH_TEST, heads.NMS_THRESH_TEST = dense.SCORE_THRESH_TEST, dense.NMS_THRESH_TEST
    box_head.NAME, box_head.NUM_FC, box_head.POOLER_RESOLUTION = "FastRCNNConvFCHead", 2, 7
    # As wide as the pyramid's share of the paper's: 1024 for 256 channels.
    box_head.FC_DIM = 4 * cfg.MODEL.FPN.OUT_CHANNELS


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


@META_ARCH_REGISTRY.register()
def TorchvisionRetinaNet(cfg: CfgNode) -> nn.Module:
    """torchvision's RetinaNet on Detectron2's backbone."""
    features = _Features(cfg)
    dense, anchors = cfg.MODEL.RETINANET, cfg.MODEL.ANCHOR_GENERATOR
    sizes = _per_level(anchors.SIZES, len(dense.IN_FEATURES))
    ratios = _per_level(anchors.ASPECT_RATIOS, len(dense.IN_FEATURES))
    generator = AnchorGenerator(sizes, ratios)
    head = RetinaNetHead(
        features.out_channels,
        generator.num_anchors_per_location()[0],
        dense.NUM_CLASSES,
        norm_layer=nn.BatchNorm2d if dense.NORM == "BN" else None,
    )
    model = torchvision_detection.RetinaNet(
        features,
        dense.NUM_CLASSES,
        anchor_generator=generator,
        head=head,
        fg_iou_thresh=dense.IOU_THRESHOLDS[-1],
        bg_iou_thresh=dense.IOU_THRESHOLDS[0],
        **_shared(cfg),
    )
    return TorchvisionDetector(model)


@META_ARCH_REGISTRY.register()
def TorchvisionFCOS(cfg: CfgNode) -> nn.Module:
    """torchvision's FCOS on Detectron2's backbone."""
    features = _Features(cfg)
    dense = cfg.MODEL.RETINANET
    head = torchvision_detection.fcos.FCOSHead(
        features.out_channels, 1, dense.NUM_CLASSES, num_convs=dense.NUM_CONVS
    )
    sizes = tuple((stride,) for stride in features.strides)
    model = torchvision_detection.FCOS(
        features,
        dense.NUM_CLASSES,
        anchor_generator=AnchorGenerator(sizes, ((1.0,),) * len(sizes)),
        head=head,
        **_shared(cfg),
    )
    return TorchvisionDetector(model)


def _shared(cfg: CfgNode) -> dict[str, Any]:
    dense = cfg.MODEL.RETINANET
    return {
        "score_thresh": dense.SCORE_THRESH_TEST,
        "nms_thresh": dense.NMS_THRESH_TEST,
        "topk_candidates": dense.TOPK_CANDIDATES_TEST,
        "detections_per_img": cfg.TEST.DETECTIONS_PER_IMAGE,
        "image_mean": list(cfg.MODEL.PIXEL_MEAN),
        "image_std": list(cfg.MODEL.PIXEL_STD),
        # Detectron2's loaders have resized the images already.
        "_skip_resize": True,
    }


def _per_level(values: Sequence[Sequence[float]], levels: int) -> tuple[tuple[float, ...], ...]:
    """One entry a level, where Detectron2's configs may have one for all."""
    every = [tuple(entry) for entry in values]
    return tuple(every * levels if len(every) == 1 else every)


class _Features(nn.Module):
    """Detectron2's backbone as torchvision wants one."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.names = list(cfg.MODEL.RETINANET.IN_FEATURES)
        shapes = self.backbone.output_shape()
        self.out_channels = shapes[self.names[0]].channels
        self.strides = [shapes[name].stride for name in self.names]

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        features = self.backbone(images)
        return OrderedDict((name, features[name]) for name in self.names)


class TorchvisionDetector(nn.Module):
    """A detector of torchvision behind Detectron2's interface.

    Args:
        model: takes a list of images and of targets, as those of
            ``torchvision.models.detection`` do.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses by name in training, else Detectron2's list of ``{"instances": ...}``."""
        images = [entry["image"].to(self.device).float() for entry in batched_inputs]
        if self.training:
            targets = [
                {
                    "boxes": entry["instances"].gt_boxes.tensor.to(self.device),
                    "labels": entry["instances"].gt_classes.to(self.device),
                }
                for entry in batched_inputs
            ]
            losses: dict[str, Tensor] = self.model(images, targets)
            return {f"loss_{name}": value for name, value in losses.items()}
        found = []
        for entry, image, result in zip(batched_inputs, images, self.model(images), strict=True):
            instances = Instances(
                tuple(image.shape[-2:]),
                pred_boxes=Boxes(result["boxes"]),
                scores=result["scores"],
                pred_classes=result["labels"],
            )
            height = entry.get("height", image.shape[-2])
            width = entry.get("width", image.shape[-1])
            found.append({"instances": detector_postprocess(instances, height, width)})
        return found
