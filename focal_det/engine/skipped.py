"""How many training images were left out, where a user can see it."""

import logging
from typing import Any

from detectron2.engine import HookBase

from focal_det.data.guarded import GuardedMapper

logger = logging.getLogger(f"detectron2.{__name__}")


class ReportSkipped(HookBase):
    """The number of skipped images among the scalars, and all kinds of them in the log.

    Args:
        loader: the training data; without a :class:`GuardedMapper` there is nothing to report.
    """

    def __init__(self, loader: Any) -> None:
        mapper = getattr(loader, "mapper", None)
        self._mapper = mapper if isinstance(mapper, GuardedMapper) else None

    def after_step(self) -> None:
        """One scalar, once there is anything to tell."""
        skipped = self._skipped()
        if skipped:
            total = sum(skipped.values())
            self.trainer.storage.put_scalar("skipped_images", total, smoothing_hint=False)

    def after_train(self) -> None:
        """The sum by kind."""
        kinds = ", ".join(f"{number} x {kind}" for kind, number in self._skipped().items())
        if kinds:
            logger.warning(f"training images that could not be used were skipped: {kinds}")

    def _skipped(self) -> dict[str, int]:
        return self._mapper.skipped if self._mapper is not None else {}
