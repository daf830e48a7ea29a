"""What the operations of this package compute: a loss as a function of one term.

A *term* is one (anchor, class) pair. With x its logit, y = +1 for the anchor's own class and
y = -1 elsewhere, a loss is a function of x_t = y x and a weight for each side.

Letters: N images, K classes, ``...`` whatever dimensions index the anchors of an image.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Terms:
    """A loss, stated once: all operations are generic over it.

    Attributes:
        value_and_slope: ``(z, foreground) -> (value, derivative by z)``, elementwise on tensors of
            any shape in float32 or better, where z = -x_t: nearly all terms have y = -1, and for
            those z is the logit as it lies in memory. `foreground` says whether these are the
            terms with y = +1.
        value: ``(x_t, foreground) -> value``, by operations that autograd can differentiate any
            number of times.
        background: weight of the terms with y = -1.
        foreground: weight of the terms with y = +1.
        key: equal for terms that compute the same function, so that what was compiled for one
            serves the other; None where nothing may be compiled, because the function depends on
            tensors or on state.
    """

    value_and_slope: Callable[[Tensor, bool], tuple[Tensor, Tensor]]
    value: Callable[[Tensor, bool], Tensor]
    background: float = 1.0
    foreground: float = 1.0
    key: Hashable = None

    def __call__(self, z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        """`value_and_slope`, in the dtype of `z` whatever the loss makes of it."""
        value, slope = self.value_and_slope(z, foreground)
        return value.to(z.dtype), slope.to(z.dtype)


class LossSums(NamedTuple):
    """Sums of a classification loss for each image.

    Attributes:
        total: (N,), differentiable.
        foreground: (N,), the part of `total` from terms with y = +1; for reports, no gradient.
            None where a loss cannot tell.
    """

    total: Tensor
    foreground: Tensor | None


def can_pick(device: torch.device) -> bool:
    """Whether the host may decide by what is in a tensor; a GPU would have to be waited for."""
    return device.type == "cpu"


def accurate(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a loss of logits of `dtype` is computed in: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(logits: Tensor) -> torch.autocast:
    """Keep autocast from lowering what happens inside a loss."""
    return torch.autocast(device_type=logits.device.type, enabled=False)
