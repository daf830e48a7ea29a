"""What the summed losses are divided by.

All three follow the count of anchors that are assigned to an object ("foreground"), as the paper
does (arXiv 1708.02002, section 4.1); they differ in what they count over. N images of this worker,
W workers, n_i foreground anchors of image i.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from detectron2.utils import comm
from fvcore.common.registry import Registry
from torch import Tensor, nn

if TYPE_CHECKING:
    from detectron2.config import CfgNode

NORMALIZER_REGISTRY: Registry = Registry("NORMALIZER")
NORMALIZER_REGISTRY.__doc__ = "Loss normalizers, by class name; configs use the short names."

SHORT_NAMES = {"ema": "EMANormalizer", "batch": "BatchNormalizer", "image": "ImageNormalizer"}


def build_normalizer(cfg: "CfgNode") -> "LossNormalizer":
    """Build the normalizer that ``MODEL.FOCAL_DET.NORMALIZER.NAME`` names.

    Args:
        cfg: a config with the keys of :func:`focal_det.add_config`.

    Raises:
        ValueError: an unknown name (the valid ones are listed).
    """
    name = cfg.MODEL.FOCAL_DET.NORMALIZER.NAME
    class_name = SHORT_NAMES.get(name, name)
    if class_name not in NORMALIZER_REGISTRY:
        known = [key for key, _ in NORMALIZER_REGISTRY if key not in SHORT_NAMES.values()]
        raise ValueError(
            f"MODEL.FOCAL_DET.NORMALIZER.NAME is {name!r}, which is not one of: "
            + ", ".join([*SHORT_NAMES, *known])
        )
    return NORMALIZER_REGISTRY.get(class_name)(sync=cfg.MODEL.FOCAL_DET.NORMALIZER.SYNC)


class LossNormalizer(nn.Module, ABC):
    """Base: counts of foreground anchors in, one divisor an image out.

    The state is the buffer ``value``, so a checkpoint carries it. Weights without it (from
    Detectron2's RetinaNet) load all the same and leave the start value. Where gradients are off (a
    validation loss under ``no_grad``) the state stays as it was.

    Args:
        sync: count over all workers, so that W workers with a part of a batch each take the step
            of one worker with all of it.
    """

    value: Tensor

    def __init__(self, sync: bool = True, start: float = 1.0) -> None:
        super().__init__()
        self.sync = sync
        self.register_buffer("value", torch.tensor(float(start)))

    @torch.jit.unused  # so that a detector that holds one can be scripted for deployment
    @torch.no_grad()
    def forward(self, num_foreground: Tensor, update: bool = True) -> Tensor:
        """Divisors for the losses of each image.

        Args:
            num_foreground: (N,) integers, anchors assigned to an object in each image.
            update: whether this is a training step; else the state stays as it was, and this
                worker counts alone: the others may not be there to count with.

        Returns:
            (N,) float32, > 0. The loss of the batch is ``sum_i loss_i / divisor_i``, which the
            mean over workers (as DistributedDataParallel takes it) turns into the step's loss.
        """
        counts = torch.stack(
            [
                num_foreground.sum().float(),
                num_foreground.clamp(min=1).sum().float(),
                torch.full_like(self.value, float(len(num_foreground))),
            ]
        )
        num_workers = 1
        if self.sync and update and comm.get_world_size() > 1:
            torch.distributed.all_reduce(counts)
            num_workers = comm.get_world_size()
        value = self.next_value(*counts)
        if update:
            self.value.copy_(value)
        return self.divisors(num_foreground, value, counts[2]) / num_workers

    @abstractmethod
    def next_value(self, foreground: Tensor, clamped: Tensor, images: Tensor) -> Tensor:
        """The new state: 0-d sums over the images of n_i, max(n_i, 1) and 1."""

    def divisors(self, num_foreground: Tensor, value: Tensor, images: Tensor) -> Tensor:
        """One divisor an image, (N,), from n_i (N,), the new state and the number of images."""
        return value.expand(len(num_foreground))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if f"{prefix}value" in state_dict:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )


@NORMALIZER_REGISTRY.register()
class EMANormalizer(LossNormalizer):
    """Detectron2's: a moving average of the batch's foreground count.

        value <- 0.9 value + 0.1 max(sum_i n_i, 1),  starting at 100

    It steadies the step where a batch holds few images. Counted over W workers, 100 stands for all
    of them, where Detectron2 starts each at 100; some 30 steps later nothing is left of that.
    """

    def __init__(self, sync: bool = True) -> None:
        super().__init__(sync, start=100.0)

    def next_value(self, foreground: Tensor, clamped: Tensor, images: Tensor) -> Tensor:
        """See :meth:`LossNormalizer.next_value`."""
        return 0.9 * self.value + 0.1 * foreground.clamp(min=1)


@NORMALIZER_REGISTRY.register()
class BatchNormalizer(LossNormalizer):
    """The foreground count of this batch: ``max(sum_i n_i, 1)``."""

    def next_value(self, foreground: Tensor, clamped: Tensor, images: Tensor) -> Tensor:
        """See :meth:`LossNormalizer.next_value`."""
        return foreground.clamp(min=1)


@NORMALIZER_REGISTRY.register()
class ImageNormalizer(LossNormalizer):
    """The paper's: each image by its own count, ``max(n_i, 1)``, then the mean over the images.

    ``value`` is the mean count, for reports.
    """

    def next_value(self, foreground: Tensor, clamped: Tensor, images: Tensor) -> Tensor:
        """See :meth:`LossNormalizer.next_value`."""
        return clamped / images

    def divisors(self, num_foreground: Tensor, value: Tensor, images: Tensor) -> Tensor:
        """See :meth:`LossNormalizer.divisors`."""
        return num_foreground.clamp(min=1) * images
