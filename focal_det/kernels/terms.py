"""One pass over the logits: the loss of every term and its derivative, in closed form.

Class indices instead of one-hot targets, any strides (a view of the head's own output is read in
place), float32 inside, and in blocks, so that temporaries stay the size of a cache and not of the
logits. Generic over the loss: a function of type :data:`Terms` states it.

Letters: N images, K classes, ``...`` whatever dimensions index the anchors of an image.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Terms = Callable[[Tensor, bool], tuple[Tensor, Tensor]]
"""(logits, foreground) -> (value, derivative by the logit), all of one shape."""

BLOCK_TERMS = 1 << 18
"""Terms in a block: 1 MiB in float32, small enough that a block's temporaries stay in cache."""


class LossSums(NamedTuple):
    """Sums of a classification loss for each image.

    Attributes:
        total: (N,), differentiable.
        foreground: (N,), the part of `total` from terms with y = +1; for reports, no gradient.
            None where a loss cannot tell.
    """

    total: Tensor
    foreground: Tensor | None


def sum_terms(terms: Terms, logits: Tensor, labels: Tensor) -> LossSums:
    """Sum the loss of all terms of each image; the gradient is computed in the same pass.

    Args:
        terms: the loss.
        logits: (N, ..., K), any floating dtype and strides.
        labels: (N, ...), ``0..K-1`` foreground, ``K`` background, ``-1`` ignored.

    Returns:
        float32 sums (float64 for float64 logits). Second derivatives are not available.
    """
    total, foreground = _SumTerms.apply(logits, labels, terms)
    return LossSums(total, foreground)


def sum_terms_per_anchor(terms: Terms, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the loss over the classes of each anchor, without a gradient.

    Args:
        terms, logits, labels: see :func:`sum_terms`.

    Returns:
        (N, ...) float32 (float64 for float64 logits), 0 for ignored anchors.
    """
    with torch.no_grad(), _full_precision(logits):
        sums = torch.zeros(labels.shape, dtype=_accurate(logits.dtype), device=logits.device)
        for block in _blocks(logits):
            sums[block] = _block_terms(terms, logits[block], labels[block])[0].sum(-1)
    return sums


def elementwise_terms(terms: Terms, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of every term, differentiable by `logits`.

    Args:
        terms, logits, labels: see :func:`sum_terms`; here N may be missing.

    Returns:
        The shape of `logits`, float32 (float64 for float64 logits), 0 for ignored anchors.
    """
    return _ElementwiseTerms.apply(logits, labels, terms)


class _SumTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        with _full_precision(logits):
            accurate = _accurate(logits.dtype)
            # float16 gradients of easy terms would vanish before the loss scale of automatic
            # mixed precision reaches them; bfloat16 has the exponents of float32.
            stored = accurate if logits.dtype == torch.float16 else logits.dtype
            wants_grad = ctx.needs_input_grad[0]
            grad = torch.empty_like(logits, dtype=stored) if wants_grad else None
            # Many block sums are added up: in float64 where the device has it.
            exact = torch.float32 if logits.device.type == "mps" else torch.float64
            sums = torch.zeros(2, len(logits), dtype=exact, device=logits.device)
            for block in _blocks(logits):
                value, slope, of_class = _block_terms(terms, logits[block], labels[block])
                image = block[0]
                sums[0, image] += value.flatten(1).sum(1)
                sums[1, image] += of_class.flatten(1).sum(1)
                if grad is not None:
                    grad[block] = slope
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        total, foreground = sums.to(accurate)
        ctx.mark_non_differentiable(foreground)
        return total, foreground

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor, grad_foreground: Tensor
    ) -> tuple[Tensor | None, None, None]:
        _refuse_second_derivative()
        (grad,) = ctx.saved_tensors
        per_image = grad_total.view(-1, *[1] * (grad.dim() - 1))
        return (grad * per_image).to(ctx.dtype), None, None


class _ElementwiseTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, terms: Terms) -> Tensor:
        with _full_precision(logits):
            value, slope, _ = _block_terms(terms, logits, labels)
        ctx.save_for_backward(slope)
        ctx.dtype = logits.dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None]:
        _refuse_second_derivative()
        (slope,) = ctx.saved_tensors
        return (slope * grad_value).to(ctx.dtype), None, None


def _refuse_second_derivative() -> None:
    # Gradients are on in a backward pass under create_graph=True only. Without this, what is built
    # on the gradient (a gradient penalty, say) would take it for a constant, and say nothing.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "focal_det's losses compute their gradient in closed form and have no second "
            "derivative: create_graph=True is not available"
        )


def _block_terms(terms: Terms, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value (..., K) and derivative (..., K) of every term, and value of the y = +1 ones (..., 1).

    All terms are computed as background, then the one term of each foreground anchor that is not
    is put in its place: no one-hot target, no boolean indexing.
    """
    num_classes = logits.shape[-1]
    logits = logits.to(_accurate(logits.dtype))
    value, slope = terms(logits, False)
    labels = labels.unsqueeze(-1)
    own_class = labels.clamp(0, num_classes - 1).long()
    is_foreground = (labels >= 0) & (labels < num_classes)
    fg_value, fg_slope = terms(logits.gather(-1, own_class), True)
    value = value.scatter(-1, own_class, fg_value.where(is_foreground, value.gather(-1, own_class)))
    slope = slope.scatter(-1, own_class, fg_slope.where(is_foreground, slope.gather(-1, own_class)))
    ignored = labels < 0
    value.masked_fill_(ignored, 0)
    slope.masked_fill_(ignored, 0)
    return value, slope, fg_value.masked_fill(~is_foreground, 0)


def _blocks(logits: Tensor) -> Iterator[tuple[slice, ...]]:
    """Cut (N, ..., K) into blocks of at most about BLOCK_TERMS terms.

    The dimension with the largest stride is cut first, so that a block is close together in memory
    whatever the layout. The class dimension stays whole: a label counts classes from its start.
    """
    if logits.numel() == 0:
        return
    yield from _cut(logits, tuple(slice(0, size) for size in logits.shape[:-1]))


def _cut(logits: Tensor, block: tuple[slice, ...]) -> Iterator[tuple[slice, ...]]:
    sizes = [part.stop - part.start for part in block]
    terms = logits.shape[-1]
    for size in sizes:
        terms *= size
    dims = [dim for dim, size in enumerate(sizes) if size > 1]
    if terms <= BLOCK_TERMS or not dims:
        yield block
        return
    dim = max(dims, key=logits.stride)
    step = max(1, BLOCK_TERMS * sizes[dim] // terms)
    for start in range(block[dim].start, block[dim].stop, step):
        part = slice(start, min(start + step, block[dim].stop))
        yield from _cut(logits, (*block[:dim], part, *block[dim + 1 :]))


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _full_precision(logits: Tensor) -> torch.autocast:
    """Keep autocast from lowering what happens inside a loss."""
    return torch.autocast(device_type=logits.device.type, enabled=False)
