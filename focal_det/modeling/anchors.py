"""Anchors are made once for each size of the feature maps."""

from collections import OrderedDict
from typing import Any

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor, nn


class AnchorCache:
    """The anchors of the last few sizes of the feature maps.

    Making them takes a copy from the host to the device for each level, which the device's queue
    has to be empty for. Multi-scale training has many sizes, so the oldest are forgotten. What is
    cached is shared: callers must not change the boxes in place.

    Args:
        max_sizes: how many sizes are kept. At 800 x 1216 the paper's anchors are 2.8 MiB.
    """

    def __init__(self, max_sizes: int = 16) -> None:
        self.max_sizes = max_sizes
        self._kept: OrderedDict[Any, tuple[list[Boxes], list[Tensor]]] = OrderedDict()

    def __call__(self, anchor_generator: nn.Module, features: list[Tensor]) -> list[Boxes]:
        """What ``anchor_generator(features)`` returns.

        Args:
            anchor_generator: only a ``DefaultAnchorGenerator`` is known to look at nothing but
                sizes; any other is asked each time.
            features: one (N, C, Hi, Wi) a level.
        """
        if (
            type(anchor_generator) is not DefaultAnchorGenerator
            or torch.jit.is_tracing()  # type: ignore[attr-defined]
            or torch.compiler.is_compiling()
        ):
            return anchor_generator(features)
        buffers = list(anchor_generator.buffers())
        key = (
            tuple(feature.shape[-2:] for feature in features),
            # The generator's own anchors, which may be moved to a device or replaced.
            tuple((x.device, x.data_ptr(), _version(x)) for x in buffers),
            # Tensors made in inference mode cannot take part in training.
            torch.is_inference_mode_enabled(),
        )
        if key not in self._kept:
            # The buffers too, so that no other tensor takes their address.
            self._kept[key] = anchor_generator(features), buffers
            if len(self._kept) > self.max_sizes:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def __getstate__(self) -> dict[str, Any]:
        return {"max_sizes": self.max_sizes, "_kept": OrderedDict()}


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count it."""
    return 0 if x.is_inference() else x._version
