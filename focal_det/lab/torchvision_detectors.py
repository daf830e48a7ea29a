"""torchvision's RetinaNet and FCOS as meta-architectures of Detectron2.

Matching, losses and suppression are torchvision's. Backbone, input, anchors, depth and norms of the
subnets are those that Detectron2's detectors have of the same config: torchvision's own would
resize the images once more in evaluation, round the anchors and share one BatchNorm between levels.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList, ShapeSpec, get_norm
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    build_anchor_generator,
    build_backbone,
    detector_postprocess,
)
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection import fcos, retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.misc import Conv2dNormActivation

Norm = Callable[[int], nn.Module]


def box_loss(cfg: CfgNode) -> str:
    """The box loss of torchvision's RetinaNet that is nearest to ``MODEL.RETINANET``'s.

    Args:
        cfg: of the detector.

    Returns:
        ``l1``, ``smooth_l1`` (whose beta is 1), ``giou``, ``diou`` or ``ciou``.
    """
    name: str = cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE
    if name != "smooth_l1" or cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA == 1:
        return name
    return "l1"


class TorchvisionDetector(nn.Module):
    """What a detector of torchvision needs to be one of Detectron2; its first base class."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Detectron2's interface.

        Args:
            batched_inputs: ``image`` (3, H, W) as the mapper made it, in training ``instances``,
                else ``height`` and ``width`` that the boxes are wanted for.

        Returns:
            Losses by name in training, else a list of ``{"instances": ...}``.
        """
        images = [entry["image"].to(self.device).float() for entry in batched_inputs]
        if self.training:
            targets = [
                {
                    "boxes": entry["instances"].gt_boxes.tensor.to(self.device),
                    "labels": entry["instances"].gt_classes.to(self.device),
                }
                for entry in batched_inputs
            ]
            losses: dict[str, Tensor] = super().forward(images, targets)
            return {f"loss_{name}": value for name, value in losses.items()}
        found = []
        results = super().forward(images)
        for entry, image, result in zip(batched_inputs, images, results, strict=True):
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


@META_ARCH_REGISTRY.register()
class TorchvisionRetinaNet(TorchvisionDetector, detection.RetinaNet):
    """torchvision's RetinaNet on Detectron2's backbone and anchors.

    Args:
        cfg: thresholds, depth, norm, prior and box loss are those of ``MODEL.RETINANET``, as far as
            torchvision has them.
    """

    def __init__(self, cfg: CfgNode) -> None:
        backbone, shapes = _build_backbone(cfg)
        dense, channels = cfg.MODEL.RETINANET, shapes[0].channels
        anchors = Detectron2Anchors(build_anchor_generator(cfg, shapes))
        (num_anchors,) = set(anchors.num_anchors_per_location())
        head: Any = retinanet.RetinaNetHead(channels, num_anchors, dense.NUM_CLASSES)
        head.classification_head = retinanet.RetinaNetClassificationHead(
            channels, num_anchors, dense.NUM_CLASSES, prior_probability=dense.PRIOR_PROB
        )
        # Its constructor always makes four, and without a bias where there is a norm.
        norm = _norm_layer(dense.NORM, len(shapes))
        for part in (head.classification_head, head.regression_head):
            part.conv = _convolutions(channels, dense.NUM_CONVS, norm)
        head.regression_head._loss_type = box_loss(cfg)
        head.regression_head.box_coder.weights = tuple(dense.BBOX_REG_WEIGHTS)
        super().__init__(
            backbone,
            dense.NUM_CLASSES,
            anchor_generator=anchors,
            head=head,
            fg_iou_thresh=dense.IOU_THRESHOLDS[-1],
            bg_iou_thresh=dense.IOU_THRESHOLDS[0],
            **_thresholds(cfg),
        )
        self.box_coder = head.regression_head.box_coder
        self.transform = Detectron2Input(cfg, backbone)


@META_ARCH_REGISTRY.register()
class TorchvisionFCOS(TorchvisionDetector, detection.FCOS):
    """torchvision's FCOS on Detectron2's backbone, its points where Detectron2's FCOS has them.

    Args:
        cfg: thresholds, depth, norm and prior are those of ``MODEL.RETINANET``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        backbone, shapes = _build_backbone(cfg)
        dense, channels = cfg.MODEL.RETINANET, shapes[0].channels
        strides = [shape.stride for shape in shapes]
        norm = _norm_layer(dense.NORM, len(shapes)) or nn.Identity
        # Without convolutions at first: it would make GroupNorms of 32 groups for them.
        head = fcos.FCOSHead(channels, 1, dense.NUM_CLASSES, num_convs=0)
        head.classification_head = fcos.FCOSClassificationHead(
            channels,
            1,
            dense.NUM_CLASSES,
            dense.NUM_CONVS,
            prior_probability=dense.PRIOR_PROB,
            norm_layer=norm,
        )
        head.regression_head = fcos.FCOSRegressionHead(
            channels, 1, dense.NUM_CONVS, norm_layer=norm
        )
        super().__init__(
            backbone,
            dense.NUM_CLASSES,
            anchor_generator=Detectron2Anchors(
                DefaultAnchorGenerator(
                    sizes=[[stride] for stride in strides], aspect_ratios=[1.0], strides=strides
                )
            ),
            head=head,
            **_thresholds(cfg),
        )
        self.transform = Detectron2Input(cfg, backbone)


class Detectron2Input(GeneralizedRCNNTransform):
    """Normalises and pads as Detectron2 does, and leaves the size that the mapper made.

    Args:
        cfg: whose ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD`` are meant.
        backbone: says what sizes it takes.
    """

    def __init__(self, cfg: CfgNode, backbone: nn.Module) -> None:
        mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
        super().__init__(0, 0, mean, std, size_divisible=backbone.size_divisibility)
        self.padding: dict[str, Any] = {}
        if hasattr(backbone, "padding_constraints"):  # not in Detectron2 0.6
            self.padding["padding_constraints"] = backbone.padding_constraints

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Nothing."""
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Images of any size as one (N, 3, H, W), padded at the right and the bottom."""
        batch: Tensor = ImageList.from_tensors(images, size_divisible, **self.padding).tensor
        return batch


class Detectron2Anchors(AnchorGenerator):
    """Detectron2's anchors, in the form of torchvision's.

    Args:
        generator: one of Detectron2.
    """

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator

    def num_anchors_per_location(self) -> list[int]:
        """One number a level."""
        numbers: Any = self.generator.num_anchors
        return list(numbers)

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors (R, 4) of each image, in the order of the feature maps."""
        anchors = torch.cat([boxes.tensor for boxes in self.generator(feature_maps)])
        return [anchors] * len(image_list.image_sizes)


def _build_backbone(cfg: CfgNode) -> tuple[Any, list[ShapeSpec]]:
    """Detectron2's, with what torchvision asks for, and the shapes of the features in use.

    It stays the module that it is, not wrapped in another: its weights have to have the names that
    they have in Detectron2's detectors, for checkpoints to fit.
    """
    backbone = build_backbone(cfg)
    names = list(cfg.MODEL.RETINANET.IN_FEATURES)
    shapes = [backbone.output_shape()[name] for name in names]
    backbone.out_channels = shapes[0].channels
    backbone.register_forward_hook(partial(_choose_features, names))
    return backbone, shapes


def _choose_features(
    names: list[str], _backbone: nn.Module, _inputs: Any, features: dict[str, Tensor]
) -> "OrderedDict[str, Tensor]":
    return OrderedDict((name, features[name]) for name in names)


def _norm_layer(name: str, levels: int) -> Norm | None:
    """What makes a norm for so many channels, None for none; BatchNorms as Detectron2's RetinaNet.

    Each feature level has its own statistics there, and all have one scale and shift.
    """
    if name in ("BN", "SyncBN"):
        kind = nn.BatchNorm2d if name == "BN" else nn.SyncBatchNorm
        return lambda channels: CycleBatchNormList(levels, kind, num_features=channels)
    return partial(get_norm, name) if name else None


def _convolutions(channels: int, number: int, norm: Norm | None) -> nn.Sequential:
    """A subnet's, initialised as torchvision does."""
    blocks = [
        Conv2dNormActivation(channels, channels, norm_layer=norm, bias=True) for _ in range(number)
    ]
    for block in blocks:
        nn.init.normal_(block[0].weight, std=0.01)
        nn.init.zeros_(block[0].bias)
    return nn.Sequential(*blocks)


def _thresholds(cfg: CfgNode) -> dict[str, Any]:
    dense = cfg.MODEL.RETINANET
    return {
        "score_thresh": dense.SCORE_THRESH_TEST,
        "nms_thresh": dense.NMS_THRESH_TEST,
        "topk_candidates": dense.TOPK_CANDIDATES_TEST,
        "detections_per_img": cfg.TEST.DETECTIONS_PER_IMAGE,
    }
