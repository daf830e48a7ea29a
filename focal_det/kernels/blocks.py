"""The operations in plain PyTorch, for any device: no compiler, no synchronisation.

Class indices instead of one-hot targets, any strides (a view of the head's own output is read in
place), float32 inside, and in blocks, so that temporaries stay the size of a cache and not of the
logits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .terms import Terms, accurate

BLOCK_TERMS = {"cpu": 1 << 17, "cuda": 1 << 23}
"""Terms in a block (on a CPU, for each thread). On a CPU the temporaries of a block, 512 KiB each,
stay in cache; on a GPU they are 32 MiB each, and a block large enough to hide its launches."""


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
    # Many block sums are added up: in float64 where the device has it.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    sums = torch.zeros(2, len(logits), dtype=exact, device=logits.device)
    for block in blocks(logits):
        image = block[0]
        per_anchor, foreground = _block(
            terms,
            logits[block],
            labels[block],
            weights[image],
            None if grad is None else grad[block],
        )
        sums[0, image] += per_anchor.reshape(len(per_anchor), -1).sum(1)
        sums[1, image] += foreground.reshape(len(foreground), -1).sum(1)
    return sums.mul_(weights).to(accurate(logits.dtype))


def sum_terms_per_anchor(terms: Terms, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the loss over the classes of each anchor.

    Args:
        terms, logits, labels: see :func:`sum_terms`.

    Returns:
        (N, ...), 0 for ignored anchors.
    """
    sums = torch.zeros(labels.shape, dtype=accurate(logits.dtype), device=logits.device)
    for block in blocks(logits):
        sums[block] = _block(terms, logits[block], labels[block], None, None)[0]
    return sums


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


def _block(
    terms: Terms, logits: Tensor, labels: Tensor, weights: Tensor | None, grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum over the classes of each anchor (N, ...), and the part of it with y = +1.

    All terms are computed as background, then the one term of each foreground anchor that is not
    is put in its place: no one-hot target, no boolean indexing.
    """
    x = logits.to(accurate(logits.dtype))
    ignored = labels < 0
    own_class, is_own = _own(labels, logits.shape[-1])
    value, slope = terms.value_and_slope(-x, False)
    own_value, own_slope = terms.value_and_slope(x.gather(-1, own_class), True)
    own_value = (own_value * terms.foreground).where(is_own, 0).squeeze(-1)
    value = _writable(value, slope, x)
    value.scatter_(-1, own_class, value.gather(-1, own_class).masked_fill_(is_own, 0))
    per_anchor = (value.sum(-1) * terms.background).masked_fill_(ignored, 0) + own_value

    if grad is not None and weights is not None:
        weights = weights.view(-1, *[1] * labels.dim())
        torch.mul(slope, weights * -terms.background, out=grad)
        own_slope = own_slope * (weights * terms.foreground)
        grad.scatter_(
            -1, own_class, own_slope.to(grad.dtype).where(is_own, grad.gather(-1, own_class))
        )
        grad.masked_fill_(ignored.unsqueeze(-1), 0)
    return per_anchor, own_value


def _own(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The class of each anchor (..., 1), any valid one where it has none, and whether it has."""
    labels = labels.unsqueeze(-1)
    return labels.clamp(0, num_classes - 1).long(), (labels >= 0) & (labels < num_classes)


def _writable(value: Tensor, *others: Tensor) -> Tensor:
    """`value`, or a copy of it where a loss returned a tensor that is not its own to change."""
    storage = value.untyped_storage().data_ptr()
    shared = any(storage == other.untyped_storage().data_ptr() for other in others)
    return value.clone() if shared or 0 in value.stride() else value


def blocks(logits: Tensor) -> Iterator[tuple[slice, ...]]:
    """Cut (N, ..., K) into blocks of at most about ``BLOCK_TERMS`` terms.

    The dimension with the largest stride is cut first, so that a block is close together in memory
    whatever the layout. The class dimension stays whole: a label counts classes from its start.
    """
    if logits.numel() == 0:
        return
    size = BLOCK_TERMS["cuda"]
    if logits.device.type == "cpu":
        size = BLOCK_TERMS["cpu"] * torch.get_num_threads()
    yield from _cut(logits, tuple(slice(0, size) for size in logits.shape[:-1]), size)


def _cut(logits: Tensor, block: tuple[slice, ...], block_terms: int) -> Iterator[tuple[slice, ...]]:
    sizes = [part.stop - part.start for part in block]
    terms = logits.shape[-1]
    for size in sizes:
        terms *= size
    dims = [dim for dim, size in enumerate(sizes) if size > 1]
    if terms <= block_terms or not dims:
        yield block
        return
    dim = max(dims, key=logits.stride)
    step = max(1, block_terms * sizes[dim] // terms)
    for start in range(block[dim].start, block[dim].stop, step):
        part = slice(start, min(start + step, block[dim].stop))
        yield from _cut(logits, (*block[:dim], part, *block[dim + 1 :]), block_terms)
