"""Online hard example mining (OHEM) for one-stage detectors."""

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms
from typing_extensions import Self

from focal_det.kernels import LossSums, pick_anchors, sum_terms, sum_terms_per_anchor
from focal_det.overlap import overlaps_any, sides

from .contract import ClassificationLoss, check_in_range, join_levels
from .cross_entropy import CrossEntropyLoss
from .registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class OHEMLoss(ClassificationLoss):
    """Cross entropy of the hardest anchors of each image (arXiv 1708.02002, section 5.1, Table 1d).

    Per image: score every anchor that is not ignored by its cross entropy summed over classes, run
    class-agnostic NMS on the predicted boxes with that score, keep the hardest that are left.

    Plain OHEM keeps the `batch_size` highest. With ``neg_pos_ratio = r > 0`` (3 is the paper's
    "OHEM 1:3") at most ``floor(batch_size / (1 + r))`` of the highest positives and ``floor(r x
    positives kept)`` of the highest negatives are kept, both after NMS over all anchors; with no
    positive left, one negative.

    The paper leaves open what the minibatch spans, the score and the boxes of the NMS. Our choices:
    one minibatch an image, classification loss as the score, predicted boxes. The box loss is not
    mined. Gradients reach the kept anchors' logits; the selection and the boxes get none.

    Args:
        batch_size: anchors kept per image, >= 1.
        nms_thresh: boxes that overlap a harder one by more than this IoU are dropped, in [0, 1].
        neg_pos_ratio: negatives kept per positive, >= 0; 0 for plain OHEM.

    Raises:
        ValueError: an argument out of its range.
    """

    needs_boxes = True
    config_node = "OHEM"

    def __init__(
        self, batch_size: int = 128, nms_thresh: float = 0.5, neg_pos_ratio: float = 0.0
    ) -> None:
        super().__init__()
        if not _is_integer(batch_size):
            raise ValueError(f"OHEMLoss: batch_size must be an integer >= 1, got {batch_size!r}")
        check_in_range(self, "batch_size", batch_size, 1)
        check_in_range(self, "nms_thresh", nms_thresh, 0.0, 1.0)
        check_in_range(self, "neg_pos_ratio", neg_pos_ratio, 0.0)
        self.batch_size = int(batch_size)
        self.nms_thresh = float(nms_thresh)
        self.neg_pos_ratio = float(neg_pos_ratio)
        self.cross_entropy = CrossEntropyLoss()

    @property
    def impl(self) -> str:
        """That of the cross entropy."""
        return self.cross_entropy.impl

    def use(self, impl: str) -> Self:
        """See :meth:`ClassificationLoss.use`; it is the cross entropy that has implementations."""
        self.cross_entropy.use(impl)
        return self

    def per_image(
        self,
        logits: Sequence[Tensor],
        labels: Sequence[Tensor],
        boxes: Sequence[Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> LossSums:
        """See :meth:`ClassificationLoss.per_image`; `boxes` is required.

        Raises:
            ValueError: no boxes.
        """
        if boxes is None:
            raise ValueError("OHEMLoss needs boxes, (..., 4) XYXY, for its NMS; got None")
        terms = self.cross_entropy.terms()
        scores = [
            sum_terms_per_anchor(terms, x, y, self.cross_entropy.impl)
            for x, y in zip(logits, labels, strict=True)
        ]
        keep = self.select(
            join_levels(scores),
            join_levels(labels),
            join_levels(boxes, trailing=1),
            logits[0].shape[-1],
        )
        sizes = [y.shape[1:].numel() for y in labels]
        kept = [
            level.view(y.shape).nonzero(as_tuple=True)
            for y, level in zip(labels, keep.split(sizes, dim=1), strict=True)
        ]
        rows = torch.cat([pick_anchors(x, i) for x, i in zip(logits, kept, strict=True)])
        row_labels = torch.cat([y[i] for y, i in zip(labels, kept, strict=True)])
        images = torch.cat([i[0] for i in kept])
        sums = sum_terms(
            terms,
            rows.unsqueeze(1),  # a row as an image with one anchor
            row_labels.unsqueeze(1),
            None if weights is None else weights[images],
            self.cross_entropy.impl,
        )
        none = sums.foreground.new_zeros(len(keep))
        is_foreground = row_labels < logits[0].shape[-1]
        self.report = {
            "ohem/kept_foreground": is_foreground.sum() / len(keep),
            "ohem/kept_background": (~is_foreground).sum() / len(keep),
        }
        return LossSums(*(none.index_add(0, images, each) for each in sums))

    @torch.no_grad()
    def select(self, scores: Tensor, labels: Tensor, boxes: Tensor, num_classes: int) -> Tensor:
        """The anchors that enter the loss.

        Args:
            scores: (N, R), the cross entropy of each anchor.
            labels: (N, R), ``0..K-1`` foreground, ``K`` background, ``-1`` ignored.
            boxes: (N, R, 4), XYXY in absolute pixels.
            num_classes: K.

        Returns:
            (N, R) bool.
        """
        keep = torch.zeros_like(labels, dtype=torch.bool)
        for image in range(len(labels)):
            valid = (labels[image] >= 0).nonzero().squeeze(1)
            kept = self._select_one(
                scores[image, valid],
                labels[image, valid] < num_classes,
                boxes[image, valid].to(scores.dtype),
            )
            keep[image, valid[kept]] = True
        return keep

    def _select_one(self, scores: Tensor, positive: Tensor, boxes: Tensor) -> Tensor:
        """Indices of the kept anchors of one image: scores (R,), positive (R,), boxes (R, 4).

        Whether NMS keeps an anchor depends on harder anchors alone. So it runs over the hardest,
        which decides those as NMS over all would; what overlaps with their survivors is out; then
        over the hardest of what is left, until nothing more can be kept. For plain OHEM the first
        round is enough, as a rule; 1:3 goes on until every positive is decided.
        """
        left = torch.arange(len(scores), device=scores.device)
        survivors = left[:0]
        rows = sides(boxes)
        while True:
            hardest = left[_hardest(scores[left], 8 * self.batch_size)]
            found = hardest[nms(boxes[hardest], scores[hardest], self.nms_thresh)]
            survivors = torch.cat([survivors, found])
            kept, wants_positives, wants_negatives = self._take(survivors, positive)
            undecided = torch.ones_like(positive)
            undecided[hardest] = False
            left = left[undecided[left]]
            if len(left) == 0 or not (wants_positives or wants_negatives):
                return kept
            left = left[~overlaps_any(rows[:, left], rows[:, found], self.nms_thresh)]
            if not wants_negatives:
                positives = left[positive[left]]
                if len(positives) == 0:
                    return kept
                left = left[scores[left] >= scores[positives].min()]

    def _take(self, survivors: Tensor, positive: Tensor) -> tuple[Tensor, bool, bool]:
        """Take the minibatch from anchors by falling score.

        Returns:
            Indices, and whether another positive, or another negative, could change them.
        """
        if self.neg_pos_ratio == 0:
            is_open = len(survivors) < self.batch_size
            return survivors[: self.batch_size], is_open, is_open
        is_positive = positive[survivors]
        most = math.floor(self.batch_size / (1 + self.neg_pos_ratio))
        positives, negatives = survivors[is_positive][:most], survivors[~is_positive]
        quota = math.floor(self.neg_pos_ratio * len(positives)) if len(positives) else 1
        wants_negatives = len(negatives) < max(1, math.floor(self.neg_pos_ratio * most))
        return torch.cat([positives, negatives[:quota]]), len(positives) < most, wants_negatives


def _hardest(scores: Tensor, size: int) -> Tensor:
    """Indices of the `size` highest scores, falling, equal ones by index."""
    index = torch.arange(len(scores), device=scores.device)
    if size < len(scores):
        # Not ">=", which NaN would fail.
        index = (~(scores < scores.topk(size).values[-1])).nonzero().squeeze(1)
    return index[scores[index].sort(descending=True, stable=True).indices[:size]]


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
