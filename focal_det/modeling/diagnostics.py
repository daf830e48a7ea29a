"""What a training step says of itself, in TensorBoard and metrics.json.

* ``num_pos_anchors``: foreground anchors of an image, Detectron2's name;
  ``positives/<feature>``: those of each feature level;
* ``normalizer``: what the losses are divided by, the mean over the images;
* ``classification/foreground``: part of ``loss_cls`` from terms with y = +1, where the loss can
  tell; ``classification/background``: the rest of it;
* ``classification/hardest_percent``: share, in percent, of the background anchors' loss that comes
  from the hardest 1 % of all anchors; taken every :data:`PERIOD` iterations;
* ``ohem/kept_foreground``, ``ohem/kept_background``: anchors of an image that OHEM keeps.

Letters: N images, R anchors per image over all levels.
"""

import logging
from collections.abc import Callable

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

from .deferred import DeferredScalars

# Below Detectron2's logger, whose handlers every Detectron2 script sets up.
logger = logging.getLogger(f"detectron2.{__name__}")

SELDOM = "classification/hardest_percent"
PERIOD = 20
"""Iterations between looks at every anchor, which cost about a pass over the logits."""
HARDEST = 100
"""One anchor in so many is among the hardest."""
PATIENCE = 100
"""Steps in a row without a foreground anchor before that is worth a warning."""


class TrainingDiagnostics:
    """Puts the scalars of each step into Detectron2's storage, without waiting for a GPU."""

    def __init__(self) -> None:
        self._deferred = DeferredScalars()
        self._steps_without = 0

    def report(
        self,
        storage: EventStorage,
        scalars: dict[str, Tensor],
        is_foreground: dict[str, Tensor],
        loss_per_anchor: Callable[[], Tensor | None],
        is_background: Tensor,
    ) -> None:
        """Hand in what is known of a step; scalars of a GPU are stored a step later.

        Args:
            storage: of the trainer.
            scalars: 0-d each, ``num_pos_anchors`` among them.
            is_foreground: (N, anchors of the level) bool, by feature.
            loss_per_anchor: (N, R), or None where the loss cannot tell; called when it is due.
            is_background: (N, R) bool.
        """
        by_level = {
            f"positives/{name}": level.sum() / len(level) for name, level in is_foreground.items()
        }
        scalars = {**scalars, **by_level}
        if storage.iter % PERIOD == 0:
            losses = loss_per_anchor()
            if losses is not None:
                share = hardest_share(losses, is_background)
                scalars = {**scalars, SELDOM: 100 * share}
        for arrived in self._deferred.exchange(scalars):
            if SELDOM not in arrived and SELDOM in storage.latest():
                # Again, so that writers, which go by iteration, have it beside the others.
                arrived[SELDOM] = storage.latest()[SELDOM][0]
            for name, value in arrived.items():
                storage.put_scalar(name, value)
            self._watch(arrived["num_pos_anchors"])

    def _watch(self, positives: float) -> None:
        self._steps_without = 0 if positives > 0 else self._steps_without + 1
        if self._steps_without == PATIENCE:
            logger.warning(
                f"no anchor has been foreground for {PATIENCE} steps: nothing is learned of any "
                "object. The anchors do not fit the boxes, or the images have none: "
                "tools/check_dataset.py says which, and the anchor sizes that would do"
            )


def hardest_share(losses: Tensor, is_background: Tensor) -> Tensor:
    """Share of the background's loss in the hardest of its anchors.

    Args:
        losses: (N, R), the classification loss summed over classes.
        is_background: (N, R) bool.

    Returns:
        0-d, in [0, 1]: the part that the R / :data:`HARDEST` anchors of an image with the highest
        loss make up, over all images; 0 where the background has no loss.
    """
    losses = losses.detach().where(is_background, 0)
    # Nearly all anchors are background. Counting them exactly would wait for the device.
    number = max(1, losses.shape[1] // HARDEST)
    hardest = losses.topk(number, dim=1).values.sum()
    return (hardest / losses.sum().clamp(min=torch.finfo(losses.dtype).tiny)).clamp(max=1)
