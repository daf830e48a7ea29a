"""How many training images were left out, where a user can see it."""

import logging
from collections import Counter
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from focal_det.data.guarded import SKIP, GuardedMapper

logger = logging.getLogger(f"detectron2.{__name__}")


class ReportSkipped(HookBase):
    """The number of skipped images among the scalars, and all kinds of them in the log.

    It is that of all processes, since this start of the run: a run that is resumed counts anew.
    Data workers read ahead, so images are counted that no step has used yet.

    Args:
        loader: the training data; without a :class:`GuardedMapper` that skips there is nothing to
            report. It must be of one kind in all processes.
        period: iterations between sums over several processes; the last one has a sum, too.
    """

    def __init__(self, loader: Any, period: int = 20) -> None:
        mapper = getattr(loader, "mapper", None)
        skips = isinstance(mapper, GuardedMapper) and mapper.on_bad_image == SKIP
        self._mapper = mapper if skips else None
        self._period = period
        self._counts: Counter[str] = Counter()

    def after_step(self) -> None:
        """One scalar, once there is anything to tell."""
        iteration = self.trainer.iter
        is_due = (iteration + 1) % self._period == 0 or iteration >= self.trainer.max_iter - 1
        if is_due or comm.get_world_size() == 1:
            self._sum()
        if self._counts:
            total = self._counts.total()
            self.trainer.storage.put_scalar("skipped_images", total, smoothing_hint=False)

    def after_train(self) -> None:
        """The sum by kind; of several processes that of the last sum, since one may have failed."""
        if comm.get_world_size() == 1:
            self._sum()
        kinds = ", ".join(f"{number} x {kind}" for kind, number in self._counts.items())
        if kinds:
            logger.warning(f"training images that could not be used were skipped: {kinds}")

    def _sum(self) -> None:
        """Count over all processes; the main one alone has the sum."""
        if self._mapper is not None:
            gathered = comm.gather(self._mapper.skipped)
            self._counts = sum(map(Counter, gathered), Counter())
