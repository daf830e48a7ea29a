"""The logits of a few anchors, picked out of all."""

from typing import Any

import torch
from torch import Tensor


def pick_anchors(logits: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    """``logits[index]``, whose gradient comes back in the layout of the logits.

    Plain indexing hands back a gradient in the order of the dimensions, and the layer that made
    the logits has to copy it.

    Args:
        logits: (N, ..., K), any strides.
        index: one (P,) a dimension but the last, no anchor twice.

    Returns:
        (P, K)
    """
    return _PickAnchors.apply(logits, *index)


class _PickAnchors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *index: Tensor) -> Tensor:
        ctx.save_for_backward(*index)
        # Of the logits themselves only the layout is needed.
        ctx.like = logits.detach().to("meta")
        return logits[index]

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        index = ctx.saved_tensors
        grad = torch.empty_like(ctx.like, dtype=grad_rows.dtype, device=grad_rows.device).zero_()
        grad[index] = grad_rows
        return grad, *[None] * len(index)
