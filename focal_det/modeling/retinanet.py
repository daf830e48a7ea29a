"""RetinaNet with the classification loss as a part.

Letters: N images, L feature levels, A anchors per location, R anchors per image over all levels,
K foreground classes.
"""

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import configurable
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.backbone import build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY, RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from focal_det.config import check_model, describe
from focal_det.detector_keys import all_positive, check_detector_keys, check_features
from focal_det.losses import build_loss
from focal_det.losses.contract import as_classification_loss, join_levels

from .anchors import AnchorCache
from .assign import label_batch
from .box_loss import box_loss_per_image, check_box_loss
from .deferred import DeferredScalars
from .diagnostics import TrainingDiagnostics
from .head import build_dense_head
from .inference import detect_single_image
from .normalizer import LossNormalizer, build_normalizer

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# Below Detectron2's logger, whose handlers every Detectron2 script sets up.
logger = logging.getLogger(f"detectron2.{__name__}")


@META_ARCH_REGISTRY.register()
class FocalRetinaNet(RetinaNet):
    """RetinaNet (arXiv 1708.02002, section 4) for any classification loss.

    With the default loss it computes what Detectron2's RetinaNet computes: same loss dict, same
    detections, same parameter names. The loss reads the head's own output through views.

    Args:
        cls_loss: sums the classification loss of each image; see
            :class:`focal_det.losses.ClassificationLoss`. Any other module is called with the
            logits (R, K) and labels (R,) of one image at a time.
        normalizer: what both losses are divided by; see
            :class:`focal_det.modeling.LossNormalizer`.
        impl: how `cls_loss` is computed, one of
            :data:`focal_det.kernels.IMPLEMENTATIONS`; None for what it is set to. Anchors are
            matched likewise, under a loss that has no such setting as by ``auto``.
        retinanet: the arguments of Detectron2's RetinaNet (``backbone``, ``head``,
            ``anchor_generator``, ``box2box_transform``, ``anchor_matcher``, ``num_classes``,
            ``pixel_mean``, ...). Its ``focal_loss_alpha`` and ``focal_loss_gamma`` are kept as
            attributes, for tools that read them, and have no effect: the loss holds its own.

    Raises:
        TypeError: `cls_loss` or `normalizer` is of another kind.
        ValueError: an `impl` that the loss does not know; a ``box_reg_loss_type`` that is none of
            :data:`focal_det.modeling.box_loss.BOX_LOSSES`, a ``smooth_l1_beta`` below 0, or a
            ``pixel_std`` that is not above 0.
        RuntimeError: an `impl` that cannot be had on this machine.
    """

    @configurable
    def __init__(
        self,
        *,
        cls_loss: nn.Module,
        normalizer: LossNormalizer,
        impl: str | None = None,
        **retinanet: Any,
    ) -> None:
        if not isinstance(cls_loss, nn.Module):
            raise TypeError(f"cls_loss must be an nn.Module, got {type(cls_loss).__name__}")
        if not isinstance(normalizer, LossNormalizer):
            raise TypeError(
                "normalizer must be a focal_det.modeling.LossNormalizer, "
                f"got {type(normalizer).__name__}"
            )
        super().__init__(**retinanet)
        self._check_arguments(retinanet["pixel_std"])
        self.cls_loss = as_classification_loss(cls_loss)
        if impl is not None:
            self.cls_loss.use(impl)
        self.normalizer = normalizer
        self._anchors = AnchorCache()
        self._diagnostics = TrainingDiagnostics()
        self._class_range = DeferredScalars()

    def _check_arguments(self, pixel_std: Any) -> None:
        """Raise for what Detectron2's constructor takes and training would stumble over."""
        check_box_loss(self.box_reg_loss_type)
        if not 0 <= self.smooth_l1_beta < math.inf:
            raise ValueError(
                "smooth_l1_beta (MODEL.RETINANET.SMOOTH_L1_LOSS_BETA) must be >= 0, got "
                f"{self.smooth_l1_beta}"
            )
        if not all_positive(pixel_std):
            raise ValueError(f"pixel_std (MODEL.PIXEL_STD) must be above 0, got {pixel_std}")

    @classmethod
    def from_config(cls, cfg: "CfgNode") -> dict[str, Any]:
        """Constructor arguments from a config; checks it and logs what it resolves to.

        Raises:
            ValueError: a value that is out of range or does not fit another; the key is named.
        """
        check_model(cfg)
        check_detector_keys(cfg)
        cls_loss, normalizer = build_loss(cfg), build_normalizer(cfg)
        retinanet = cfg.MODEL.RETINANET
        # In the order in which Detectron2 builds them, so that a seed gives the same weights.
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        check_features(cfg, shapes)
        feature_shapes = [shapes[name] for name in retinanet.IN_FEATURES]
        head = build_dense_head(cfg, feature_shapes)
        anchor_generator = build_anchor_generator(cfg, feature_shapes)
        logger.info(
            describe(
                cls_loss,
                cfg.MODEL.FOCAL_DET.NORMALIZER.NAME,
                retinanet.PRIOR_PROB,
                retinanet.NUM_CLASSES,
                anchor_generator.num_cell_anchors[0],
            )
        )
        return {
            "cls_loss": cls_loss,
            "normalizer": normalizer,
            "backbone": backbone,
            "head": head,
            "head_in_features": retinanet.IN_FEATURES,
            "anchor_generator": anchor_generator,
            "box2box_transform": Box2BoxTransform(weights=retinanet.BBOX_REG_WEIGHTS),
            "anchor_matcher": Matcher(
                retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS, allow_low_quality_matches=True
            ),
            "num_classes": retinanet.NUM_CLASSES,
            "focal_loss_alpha": retinanet.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": retinanet.FOCAL_LOSS_GAMMA,
            "smooth_l1_beta": retinanet.SMOOTH_L1_LOSS_BETA,
            "box_reg_loss_type": retinanet.BBOX_REG_LOSS_TYPE,
            "test_score_thresh": retinanet.SCORE_THRESH_TEST,
            "test_topk_candidates": retinanet.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": retinanet.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """One training step's losses; see :meth:`losses`.

        Args:
            images: the batch.
            features: L feature maps, (N, C, Hi, Wi).
            predictions: the head's two lists of L tensors: logits (N, A x K, Hi, Wi) and box
                deltas (N, A x 4, Hi, Wi).
            gt_instances: N entries with ``gt_boxes`` and ``gt_classes``.

        Raises:
            ValueError: a class outside ``0..K-1``; on a GPU it is found out a step later.
        """
        self._check_classes(gt_instances)
        logits, deltas = predictions
        anchors = self._cached_anchors(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(
            anchors,
            [_view_per_anchor(x, self.num_classes) for x in logits],
            gt_labels,
            [_view_per_anchor(x, 4) for x in deltas],
            gt_boxes,
        )

    def _check_classes(self, gt_instances: list[Instances]) -> None:
        classes = torch.cat([instances.gt_classes for instances in gt_instances])
        if len(classes) == 0:
            return
        for extremes in self._class_range.exchange({"min": classes.min(), "max": classes.max()}):
            wrong = [int(x) for x in extremes.values() if not 0 <= x < self.num_classes]
            if wrong:
                raise ValueError(
                    f"gt_classes holds {wrong[0]}, allowed is 0..{self.num_classes - 1} "
                    f"(MODEL.RETINANET.NUM_CLASSES = {self.num_classes}; background is not counted)"
                )

    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Class and box that each anchor is trained on; see Detectron2's method of this name.

        Args:
            anchors: L levels of Hi x Wi x A anchors.
            gt_instances: N entries with ``gt_boxes`` and ``gt_classes``.

        Returns:
            N tensors (R,) of labels, ``0..K-1`` foreground, ``K`` background, ``-1`` ignored, and N
            tensors (R, 4) of matched boxes, which mean something for foreground anchors only.
        """
        if type(self.anchor_matcher) is not Matcher:
            return super().label_anchors(anchors, gt_instances)
        labels, boxes = label_batch(
            Boxes.cat(anchors).tensor,
            [instances.gt_boxes.tensor for instances in gt_instances],
            [instances.gt_classes for instances in gt_instances],
            self.num_classes,
            self.anchor_matcher,
            getattr(self.cls_loss, "impl", "auto"),
        )
        return list(labels), list(boxes)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Classification and box loss, each divided by the normalizer.

        Args:
            anchors: L levels of Hi x Wi x A anchors.
            pred_logits: L tensors (N, Hi, Wi, A, K), views of any strides; Detectron2's form
                (N, Hi x Wi x A, K) will do too.
            gt_labels: N tensors (R,), ``0..K-1`` foreground, ``K`` background, ``-1`` ignored.
            pred_anchor_deltas: L tensors of the shape of `pred_logits` with 4 in place of K.
            gt_boxes: N tensors (R, 4), the matched boxes; of use where foreground.

        Returns:
            ``loss_cls`` and ``loss_box_reg``, 0-d.
        """
        labels = torch.stack(gt_labels)  # (N, R)
        is_foreground = (labels >= 0) & (labels != self.num_classes)
        num_foreground = is_foreground.sum(dim=1)
        divisors = self.normalizer(num_foreground, update=torch.is_grad_enabled())  # (N,)

        sizes = [len(level) for level in anchors]
        level_labels = [
            level.view(x.shape[:-1])
            for level, x in zip(labels.split(sizes, dim=1), pred_logits, strict=True)
        ]
        boxes = self._decode(anchors, pred_anchor_deltas) if self.cls_loss.needs_boxes else None
        weights = 1 / divisors
        cls_sums = self.cls_loss.per_image(pred_logits, level_labels, boxes, weights)
        box_sums = box_loss_per_image(
            Boxes.cat(anchors).tensor,
            join_levels(pred_anchor_deltas, trailing=1),
            torch.stack(gt_boxes),
            is_foreground,
            self.box2box_transform,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        loss_cls = cls_sums.total.sum()

        # Names without "loss", so that Detectron2's console line stays as short as it was.
        scalars = {
            "num_pos_anchors": num_foreground.float().mean(),
            "normalizer": divisors.float().mean(),
            **self.cls_loss.report,
        }
        if cls_sums.foreground is not None:
            foreground = cls_sums.foreground.sum()
            scalars["classification/foreground"] = foreground
            scalars["classification/background"] = loss_cls.detach() - foreground
        self._diagnostics.report(
            get_event_storage(),
            scalars,
            dict(zip(self.head_in_features, is_foreground.split(sizes, dim=1), strict=True)),
            lambda: self.cls_loss.per_anchor(pred_logits, level_labels),
            labels == self.num_classes,
        )
        return {"loss_cls": loss_cls, "loss_box_reg": (box_sums * weights).sum()}

    @torch.no_grad()
    def _decode(self, anchors: list[Boxes], deltas: list[Tensor]) -> list[Tensor]:
        """Predicted boxes, XYXY in absolute pixels, each of the shape of its deltas."""
        return [
            self.box2box_transform.apply_deltas(
                x.reshape(-1, 4), level.tensor.repeat(len(x), 1)
            ).view(x.shape)
            for level, x in zip(anchors, deltas, strict=True)
        ]

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        """Detections of each image, Detectron2's to the bit; the predictions stay as they were.

        Args:
            images: the batch.
            features: L feature maps, (N, C, Hi, Wi).
            predictions: see :meth:`forward_training`.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            anchors = self.anchor_generator(features)
        else:
            if self._changes_inference():
                return self._detectron2_inference(images, features, predictions)
            anchors = self._cached_anchors(features)
        logits, deltas = predictions
        results: list[Instances] = []
        for index, image_size in enumerate(images.image_sizes):
            results.append(
                detect_single_image(
                    anchors,
                    [x[index] for x in logits],
                    [x[index] for x in deltas],
                    image_size,
                    self.num_classes,
                    self.box2box_transform,
                    self.test_score_thresh,
                    self.test_topk_candidates,
                    self.test_nms_thresh,
                    self.max_detections_per_image,
                )
            )
        return results

    @torch.jit.unused
    def _changes_inference(self) -> bool:
        """Whether a subclass, or this detector alone, has a step of Detectron2's of its own.

        It then gets all of Detectron2's steps.
        """
        return any(
            getattr(getattr(self, step), "__func__", None) is not getattr(RetinaNet, step)
            for step in (
                "inference_single_image",
                "_decode_multi_level_predictions",
                "_decode_per_level_predictions",
            )
        )

    @torch.jit.unused
    def _detectron2_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        return RetinaNet.forward_inference(self, images, features, predictions)

    @torch.jit.unused
    def _cached_anchors(self, features: list[Tensor]) -> list[Boxes]:
        return self._anchors(self.anchor_generator, features)


def _view_per_anchor(predictions: Tensor, last: int) -> Tensor:
    """(N, A x last, Hi, Wi) -> (N, Hi, Wi, A, last), the order of the anchors, without a copy."""
    return predictions.unflatten(1, (-1, last)).permute(0, 3, 4, 1, 2)
