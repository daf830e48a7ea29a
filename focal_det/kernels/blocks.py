"""The operations in plain PyTorch, for any device: no compiler, no synchronisation.

Class indices instead of one-hot targets, any strides (a view of the head's own output is read in
place), float32 inside, and in blocks, so that temporaries stay the size of a cache and not of the
logits.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .terms import Terms, accurate

BLOCK_TERMS = {"cpu": 1 << 17, "cuda": 1 << 23}
"""Terms in a block at most (on a CPU, for each thread). On a CPU the temporaries of a block are
512 KiB each and stay in cache; on a GPU they are 32 MiB each, and a block is worth its launches."""

BLOCKS = 8
"""Blocks that logits are cut into at least, so that temporaries are small beside the gradient."""

SMALLEST_BLOCK = 1 << 14
"""Terms that are not cut any further, since each operation has its fixed cost."""

Block = tuple[tuple[int, int, int], ...]
"""A part of a tensor: ``(dimension, start, length)`` for each dimension that is cut."""


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
    # Many terms are added up: in float64 where the device has it.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    parts = _per_anchor(terms, logits, labels, weights, grad)
    sums = torch.stack([x.unsqueeze(-1).flatten(1).sum(1, dtype=exact) for x in parts])
    return sums.mul_(weights).to(accurate(logits.dtype))


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
    if factors.device.type == "cpu" and bool((factors == 1).all()):
        return grad
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
    value, slope = terms.value_and_slope(-x, False)
    own_class, is_own = _own(labels, logits.shape[-1])
    own_value, own_slope = terms.value_and_slope(x.gather(-1, own_class), True)
    results = []
    for each, own, background, foreground in (
        (value, own_value, terms.background, terms.foreground),
        (slope, own_slope, -terms.background, terms.foreground),
    ):
        each = each * background
        own = (own * foreground).where(is_own, each.gather(-1, own_class))
        each = each.scatter(-1, own_class, own)
        results.append(each.masked_fill(labels.unsqueeze(-1) < 0, 0))
    return results[0], results[1]


def _per_anchor(
    terms: Terms, logits: Tensor, labels: Tensor, weights: Tensor | None, grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum over the classes of each anchor (N, ...), and the part of it with y = +1.

    All terms are computed as background, then the one term of each foreground anchor that is not
    is put in its place: no one-hot target, no boolean indexing.
    """
    ignored = (labels < 0).unsqueeze(-1)
    own_class, is_own = _own(labels, logits.shape[-1])
    own_logits = logits.gather(-1, own_class).to(accurate(logits.dtype))
    own_value, own_slope = terms.value_and_slope(own_logits, True)
    own_value = (own_value * terms.foreground).where(is_own, 0).squeeze(-1)

    sums = torch.empty(labels.shape, dtype=own_logits.dtype, device=logits.device)
    factors = None
    if grad is not None and weights is not None:
        factors = weights.view(-1, *[1] * labels.dim())
        background = (factors * -terms.background).expand_as(is_own).masked_fill(ignored, 0)
    for block in blocks(logits):
        x, classes, is_one = (take(t, block) for t in (logits, own_class, is_own))
        value, slope = terms.value_and_slope(-x.to(own_logits.dtype), False)
        value = _writable(value, slope, x)
        value.scatter_(-1, classes, value.gather(-1, classes).masked_fill_(is_one, 0))
        torch.sum(value, -1, out=take(sums, block))
        if grad is not None and factors is not None:
            torch.mul(slope, take(background, block), out=take(grad, block))
    if grad is not None and factors is not None:
        # 0 times infinity is not 0. On a CPU it can be seen whether there was any.
        if logits.device.type != "cpu" or not bool(sums.isfinite().all()):
            grad.masked_fill_(ignored, 0)
        own_slope = (own_slope * (factors * terms.foreground)).to(grad.dtype)
        grad.scatter_(-1, own_class, own_slope.where(is_own, grad.gather(-1, own_class)))
    sums.mul_(terms.background).masked_fill_(ignored.squeeze(-1), 0).add_(own_value)
    return sums, own_value


def _own(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The class of each anchor (..., 1), any valid one where it has none, and whether it has."""
    labels = labels.unsqueeze(-1)
    return labels.clamp(0, num_classes - 1).long(), (labels >= 0) & (labels < num_classes)


def _writable(value: Tensor, *others: Tensor) -> Tensor:
    """`value`, or a copy of it where a loss returned a tensor that is not its own to change."""
    storage = value.untyped_storage().data_ptr()
    shared = any(storage == other.untyped_storage().data_ptr() for other in others)
    return value.clone() if shared or 0 in value.stride() else value


def take(x: Tensor, block: Block) -> Tensor:
    """The part of a tensor that a block covers."""
    for dim, start, length in block:
        x = x.narrow(dim, start, length)
    return x


def blocks(logits: Tensor) -> Iterator[Block]:
    """Cut (N, ..., K) into blocks.

    The dimension with the largest stride is cut first, so that a block is close together in memory
    whatever the layout. The class dimension stays whole: a label counts classes from its start.
    """
    if logits.numel() == 0:
        return
    most = BLOCK_TERMS["cuda"]
    if logits.device.type == "cpu":
        most = BLOCK_TERMS["cpu"] * torch.get_num_threads()
    size = min(most, max(SMALLEST_BLOCK, logits.numel() // BLOCKS))
    yield from _cut(list(logits.shape), logits.stride(), (), size)


def _cut(
    sizes: list[int], strides: tuple[int, ...], block: Block, block_terms: int
) -> Iterator[Block]:
    terms = math.prod(sizes)
    dims = [dim for dim, size in enumerate(sizes[:-1]) if size > 1]
    if terms <= block_terms or not dims:
        yield block
        return
    dim = max(dims, key=lambda dim: strides[dim])
    step = max(1, block_terms * sizes[dim] // terms)
    for start in range(0, sizes[dim], step):
        length = min(step, sizes[dim] - start)
        part = [*sizes[:dim], length, *sizes[dim + 1 :]]
        yield from _cut(part, strides, (*block, (dim, start, length)), block_terms)
