"""Anchors are made once for each size of the feature maps."""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor


class _Kept(NamedTuple):
    """Anchors of one size.

    Attributes:
        anchors: one entry a level.
        versions: of their tensors, which tell whether a caller has changed them in place.
        buffers: of the generator; kept so that no other tensor takes their address.
    """

    anchors: list[Boxes]
    versions: list[int]
    buffers: list[Tensor]


class AnchorCache:
    """The anchors of the last few sizes of the feature maps.

    Making them takes a copy from the host to the device for each level, which the device's queue
    has to be empty for. Multi-scale training has many sizes, so the oldest are forgotten. Anchors
    that a caller has changed in place are made anew.

    Args:
        max_sizes: how many sizes are kept. At 800 x 1216 the paper's anchors are 2.8 MiB.
    """

    def __init__(self, max_sizes: int = 16) -> None:
        self.max_sizes = max_sizes
        self._kept: OrderedDict[Any, _Kept] = OrderedDict()

    @torch.compiler.disable
    def __call__(self, anchor_generator: Any, features: list[Tensor]) -> list[Boxes]:
        """What ``anchor_generator(features)`` returns.

        Args:
            anchor_generator: only a ``DefaultAnchorGenerator`` is known to look at nothing but
                sizes; any other is asked each time.
            features: one (N, C, Hi, Wi) a level.
        """
        if (
            type(anchor_generator) is not DefaultAnchorGenerator or torch.jit.is_tracing()  # type: ignore[attr-defined]
        ):
            return anchor_generator(features)
        buffers = list(anchor_generator.buffers())
        key = (
            tuple(feature.shape[-2:] for feature in features),
            tuple(anchor_generator.strides),
            anchor_generator.offset,
            # The generator's own anchors, which may be moved to a device or replaced.
            tuple((x.device, x.data_ptr(), _version(x)) for x in buffers),
            # Tensors made in inference mode cannot take part in training.
            torch.is_inference_mode_enabled(),
        )
        kept = self._kept.pop(key, None)
        if kept is None or kept.versions != [_version(level.tensor) for level in kept.anchors]:
            anchors = anchor_generator(features)
            kept = _Kept(anchors, [_version(level.tensor) for level in anchors], buffers)
        self._kept[key] = kept  # as the latest
        if len(self._kept) > self.max_sizes:
            self._kept.popitem(last=False)
        return [Boxes(level.tensor) for level in kept.anchors]

    def __getstate__(self) -> dict[str, Any]:
        return {"max_sizes": self.max_sizes, "_kept": OrderedDict()}


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count it."""
    return 0 if x.is_inference() else x._version
