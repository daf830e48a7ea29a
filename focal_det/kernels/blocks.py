"""The operations in plain PyTorch, for any device: no compiler, no synchronisation.

Class indices instead of one-hot targets, any strides (a view of the head's own output is read in
place), float32 inside, and in blocks, so that temporaries stay the size of a cache and not of the
logits.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .terms import Terms, accurate
from .terms import can_pick as _can_pick

BLOCK_TERMS = {"cpu": 1 << 17, "cuda": 1 << 23}
"""Terms in a block, at most (on a CPU, for each thread). On a CPU the temporaries of a block are
512 KiB each and stay in cache; on a GPU they are 32 MiB each, and a block is worth its launches."""

BLOCKS = 48
"""Blocks that logits are cut into at least, so that temporaries are small beside the gradient."""

SMALLEST_BLOCK = 1 << 17
"""Terms that are not cut any further for that, since each operation has its fixed cost."""


def sum_terms(
    terms: Terms, logits: Tensor, labels: Tensor, weights: Tensor, grad: Tensor | None
) -> Tensor:
    """Sum the loss of all terms of each image and, in the same pass, write its gradient.

    Args:
        terms: the loss.
        logits: (N, ..., K), any strides.
        labels: (N, ...), ``0..K-1`` foreground, ``K`` background, ``-1`` ignored.
        weights: (N,), factor of each image's sum.
        grad: of the shape of `logits`, to be written; None for the sums alone.

    Returns:
        (2, N): the sums, and their part from terms with y = +1.
    """
    per_anchor, foreground = _per_anchor(terms, logits, labels, weights, grad)
    total = per_anchor.unsqueeze(-1).flatten(1).sum(1, dtype=foreground.dtype)
    return torch.stack([total, foreground]).mul_(weights).to(accurate(logits.dtype))


def sum_levels(
    terms: Terms,
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    weights: Tensor,
    with_grads: bool,
) -> tuple[Tensor, list[Tensor]]:
    """:func:`sum_terms` over several levels.

    Args:
        terms: the loss.
        logits, labels: (N, ..., K) and (N, ...) of each level.
        weights: (N,), factor of each image's sum.
        with_grads: whether to make the gradient.

    Returns:
        (2, N): the sums over all levels. And the gradient for each level; an empty list without.
    """
    sums, grads = [], []
    for x, y in zip(logits, labels, strict=True):
        # Made when its level is due: the temporaries of the largest, which comes first, then lie
        # where the others' gradients will be.
        grad = torch.empty_like(x) if with_grads else None
        sums.append(sum_terms(terms, x, y, weights, grad))
        grads += [] if grad is None else [grad]
    return torch.stack(sums).sum(0), grads


def sum_terms_per_anchor(terms: Terms, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the loss over the classes of each anchor.

    Args:
        terms, logits, labels: see :func:`sum_terms`.

    Returns:
        (N, ...), 0 for ignored anchors.
    """
    return _per_anchor(terms, logits, labels, None, None)[0]


def scale(grad: Tensor, factors: Tensor, in_place: bool) -> Tensor:
    """`grad` (N, ...) times one factor (N,) an image; as it is where all factors are 1.

    On a GPU the factors are not looked at, since that would wait for the device.
    """
    if _can_pick(factors.device) and bool((factors == 1).all()):
        return grad if in_place else grad.clone()
    factors = factors.view(-1, *[1] * (grad.dim() - 1))
    return grad.mul_(factors) if in_place else (grad * factors).to(grad.dtype)


def elementwise_terms(terms: Terms, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of every term and its derivative by the logit.

    Args:
        terms, logits, labels: see :func:`sum_terms`; here N may be missing.

    Returns:
        Two tensors (..., K) in float32 or better, 0 for ignored anchors.
    """
    x = logits.to(accurate(logits.dtype))
    value, slope = terms(x, False)
    own = _Own(terms, logits, labels)
    results = []
    for each, of_own in (
        (value * terms.background, own.value),
        (slope * terms.background, own.slope),
    ):
        of_own = of_own.where(own.exists, each.gather(-1, own.classes))
        each = each.scatter(-1, own.classes, of_own)
        results.append(each.masked_fill(labels.unsqueeze(-1) < 0, 0))
    return results[0], results[1]


def _per_anchor(
    terms: Terms, logits: Tensor, labels: Tensor, weights: Tensor | None, grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum over the classes of each anchor (N, ...), and of each image's terms with y = +1 (N,).

    All terms are computed as background; the terms of foreground anchors are then put right: no
    one-hot target. A CPU picks those anchors and computes them once more; a GPU, which would have
    to be waited for, puts each block right as it goes.
    """
    work = accurate(logits.dtype)
    own = None if _can_pick(logits.device) else _Own(terms, logits, labels)
    sums = torch.empty(labels.shape, dtype=work, device=logits.device)
    factors = None if weights is None else weights.view(-1, *[1] * labels.dim())
    # (N, ..., 1), so that it can be cut as the others are.
    background = None
    if grad is not None and factors is not None:
        background = (factors * terms.background).expand(*labels.shape, 1)
    mask = (None, None) if own is None else (own.classes, own.exists)
    for x, total, slope_to, factor, classes, exists in blocks(
        logits, sums, grad, background, *mask
    ):
        value, slope = terms(x.to(work), False)
        if classes is not None:
            value = _writable(value, slope, x)
            value.scatter_(-1, classes, value.gather(-1, classes).masked_fill_(exists, 0))
        torch.sum(value, -1, out=total)
        if slope_to is not None:
            torch.mul(slope, factor, out=slope_to)
        del value, slope  # or they would live on while the next block's are computed

    _leave_out_ignored(labels < 0, sums.mul_(terms.background), grad)
    # Many terms are added up: in float64 where the device has it.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    foreground = torch.zeros(len(logits), dtype=exact, device=logits.device)
    if own is not None:
        own.put(sums, foreground, factors, grad)
    else:
        _put_picked(terms, logits, labels, sums, foreground, weights, grad)
    return sums, foreground


def _leave_out_ignored(ignored: Tensor, sums: Tensor, grad: Tensor | None) -> None:
    sums.masked_fill_(ignored, 0)
    if grad is None:
        return
    # As a rule they are few, and picking them spares a CPU a pass over all.
    if _can_pick(ignored.device) and int(ignored.count_nonzero()) * 16 < ignored.numel():
        grad[ignored.nonzero(as_tuple=True)] = 0
    else:
        grad.masked_fill_(ignored.unsqueeze(-1), 0)


def _put_picked(
    terms: Terms,
    logits: Tensor,
    labels: Tensor,
    sums: Tensor,
    foreground: Tensor,
    weights: Tensor | None,
    grad: Tensor | None,
) -> None:
    """Put the foreground anchors right: `sums` (N, ...), `foreground` (N,), `grad` (N, ..., K)."""
    index = ((labels >= 0) & (labels < logits.shape[-1])).nonzero(as_tuple=True)
    classes = labels[index].long().unsqueeze(1)  # (P, 1)
    x = logits[index].to(sums.dtype)  # (P, K)
    value, slope = terms(x, False)
    value = _writable(value, slope, x).scatter_(1, classes, 0)
    own_value, own_slope = terms(-x.gather(1, classes), True)
    own_value = own_value.squeeze(1) * terms.foreground
    sums[index] = value.sum(1) * terms.background + own_value
    foreground.index_add_(0, index[0], own_value.to(foreground.dtype))
    if grad is not None and weights is not None:
        own_slope = own_slope.squeeze(1) * (weights[index[0]] * -terms.foreground)
        grad[(*index, classes.squeeze(1))] = own_slope.to(grad.dtype)


class _Own:
    """The one term of each anchor that has y = +1, if it has one: of all anchors, for a GPU."""

    def __init__(self, terms: Terms, logits: Tensor, labels: Tensor) -> None:
        labels = labels.unsqueeze(-1)
        self.classes = labels.clamp(0, logits.shape[-1] - 1).long()  # (N, ..., 1)
        self.exists = (labels >= 0) & (labels < logits.shape[-1])
        x = logits.gather(-1, self.classes).to(accurate(logits.dtype))
        value, slope = terms(-x, True)
        self.value, self.slope = value * terms.foreground, slope * -terms.foreground

    def put(
        self, sums: Tensor, foreground: Tensor, factors: Tensor | None, grad: Tensor | None
    ) -> None:
        """Add their values to `sums` (N, ...) and `foreground` (N,); write into `grad`."""
        value = self.value.where(self.exists, 0)
        sums.add_(value.squeeze(-1))
        foreground.copy_(value.flatten(1).sum(1, dtype=foreground.dtype))
        if grad is not None and factors is not None:
            slope = (self.slope * factors).to(grad.dtype)
            slope = slope.where(self.exists, grad.gather(-1, self.classes))
            grad.scatter_(-1, self.classes, slope)


def _writable(value: Tensor, *others: Tensor) -> Tensor:
    """`value`, or a copy of it where a loss returned a tensor that is not its own to change."""
    storage = value.untyped_storage().data_ptr()
    shared = any(storage == other.untyped_storage().data_ptr() for other in others)
    return value.clone() if shared or 0 in value.stride() else value


def blocks(logits: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Cut (N, ..., K), and what belongs to it, into blocks of about equal size.

    The dimension with the largest stride is cut first, so that a block is close together in memory
    whatever the layout. The class dimension stays whole: a label counts classes from its start.

    Args:
        logits: (N, ..., K).
        others: begin with the dimensions N, ...; None yields None in every block.

    Yields:
        Views of `logits` and of each of the others.
    """
    if logits.numel() == 0:
        return
    most = BLOCK_TERMS["cuda"]
    if logits.device.type == "cpu":
        most = BLOCK_TERMS["cpu"] * torch.get_num_threads()
    yield from _cut((logits, *others), min(most, max(SMALLEST_BLOCK, logits.numel() // BLOCKS)))


def _cut(parts: tuple[Any, ...], block_terms: int) -> Iterator[tuple[Any, ...]]:
    logits = parts[0]
    dims = [dim for dim, size in enumerate(logits.shape[:-1]) if size > 1]
    if logits.numel() <= block_terms or not dims:
        yield parts
        return
    dim = max(dims, key=logits.stride)
    size = logits.shape[dim]
    most = max(1, block_terms * size // logits.numel())
    pieces = math.ceil(size / most)  # of equal size: a small rest costs as much as a whole block
    step = math.ceil(size / pieces)
    split = [repeat(None) if x is None else x.split(step, dim) for x in parts]
    for piece in zip(*split, strict=False):
        yield from _cut(piece, block_terms)
