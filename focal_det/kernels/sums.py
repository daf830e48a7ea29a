"""One pass over the logits: the sum of a loss and its gradient, by whichever implementation.

Letters: N images, K classes, ``...`` whatever dimensions index the anchors of an image.
"""

import importlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import blocks, eager
from .terms import LossSums, Terms, accurate, full_precision

logger = logging.getLogger(f"detectron2.{__name__}")

IMPLEMENTATIONS = ("auto", "eager", "torch", "triton")
"""``torch``: blocks of plain PyTorch, any device. ``triton``: one kernel, CUDA. ``eager``: the
formula differentiated by autograd, slow, with derivatives of any order. ``auto``: triton where it
can be had, else torch."""


def check_implementation(impl: str) -> None:
    """Raise unless `impl` is one of :data:`IMPLEMENTATIONS` and its package is installed.

    Raises:
        ValueError: an unknown name.
        RuntimeError: Triton is asked for and cannot be imported; it says why.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "triton":
        import_triton("triton_kernels")


@torch.compiler.disable
def sum_terms(
    terms: Terms,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    impl: str = "auto",
) -> LossSums:
    """Sum the loss of all terms of each image; the gradient is computed in the same pass.

    The extra memory is the gradient and nothing else of its size: with gradients off it is
    not made, and a backward pass whose incoming gradient is 1 returns it as it is. So put factors
    (a normalizer) into `weights` instead of multiplying afterwards.

    Args:
        terms: the loss.
        logits: (N, ..., K), any floating dtype and strides.
        labels: (N, ...), ``0..K-1`` foreground, ``K`` background, ``-1`` ignored.
        weights: (N,), factor of each image's sum, 1 where None; a constant for autograd.
        impl: see :data:`IMPLEMENTATIONS`.

    Returns:
        float32 sums (float64 for float64 logits). Second derivatives need ``impl="eager"``.

    Raises:
        RuntimeError: ``impl="triton"`` cannot be had for these tensors or this loss; it says why.
    """
    return sum_levels(terms, [logits], [labels], weights, impl)


@torch.compiler.disable
def sum_levels(
    terms: Terms,
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    weights: Tensor | None = None,
    impl: str = "auto",
) -> LossSums:
    """:func:`sum_terms` over several feature levels at once.

    Args:
        terms: the loss.
        logits: at least one (N, ..., K), one a level, all of one dtype.
        labels: (N, ...) of each level.
        weights, impl: see :func:`sum_terms`.

    Returns:
        The sums over all levels, (N,) each.

    Raises:
        RuntimeError: see :func:`sum_terms`.
        ValueError: another number of levels of labels, or levels of several dtypes.
    """
    first = logits[0]
    dtypes = {x.dtype for x in logits}
    if len(logits) != len(labels) or len(dtypes) > 1:
        raise ValueError(
            f"logits must be of one dtype, with labels for each level; got {len(logits)} levels "
            f"of {', '.join(sorted(map(str, dtypes)))}, and labels for {len(labels)}"
        )
    if weights is None:
        weights = torch.ones(len(first), dtype=accurate(first.dtype), device=first.device)
    weights = weights.detach().to(accurate(first.dtype))
    if impl == "eager":
        with full_precision(first):
            pairs = zip(logits, labels, strict=True)
            sums = [eager.sum_terms(terms, x, y, weights) for x, y in pairs]
        return LossSums(*(torch.stack(parts).sum(0) for parts in zip(*sums, strict=True)))
    fused = choose(impl, terms, first)
    if not torch.is_grad_enabled():  # which a function of its own is not told
        logits = [x.detach() for x in logits]
    return LossSums(*_SumTerms.apply(labels, weights, terms, fused, *logits))


@torch.compiler.disable
@torch.no_grad()
def sum_terms_per_anchor(
    terms: Terms, logits: Tensor, labels: Tensor, impl: str = "auto"
) -> Tensor:
    """Sum the loss over the classes of each anchor, without a gradient.

    Args:
        terms, logits, labels, impl: see :func:`sum_terms`.

    Returns:
        (N, ...) float32 (float64 for float64 logits), 0 for ignored anchors.
    """
    with full_precision(logits):
        if impl == "eager":
            return eager.elementwise_terms(terms, logits, labels)[0].sum(-1)
        return choose(impl, terms, logits).sum_terms_per_anchor(terms, logits, labels)


@torch.compiler.disable
def elementwise_terms(terms: Terms, logits: Tensor, labels: Tensor, impl: str = "auto") -> Tensor:
    """The loss of every term, differentiable by `logits`.

    For looking at a loss, not for training: it has one fused implementation, in PyTorch.

    Args:
        terms, logits, labels: see :func:`sum_terms`; here N may be missing.
        impl: ``eager`` for derivatives of any order.

    Returns:
        The shape of `logits`, float32 (float64 for float64 logits), 0 for ignored anchors.
    """
    if impl == "eager":
        with full_precision(logits):
            return eager.elementwise_terms(terms, logits, labels)[0]
    return _ElementwiseTerms.apply(logits, labels, terms)


def choose(impl: str, terms: Terms, logits: Tensor) -> Any:
    """The module that implements ``auto``, ``torch`` or ``triton`` for these terms and logits.

    Raises:
        RuntimeError: Triton is asked for and cannot be had; it says why.
    """
    if impl == "torch" or (impl == "auto" and not logits.is_cuda):
        return blocks
    try:
        triton = import_triton("triton_kernels")
        triton.prepare(terms, logits)
    except RuntimeError as error:
        if impl == "triton":
            raise
        warn_once(f"the loss is computed by plain PyTorch operations: {error}")
        return blocks
    return triton


def import_triton(module: str) -> Any:
    """A module of this package that needs Triton.

    Raises:
        RuntimeError: it cannot be imported; it says why.
    """
    try:
        return importlib.import_module(f"{__package__}.{module}")
    except ImportError as error:
        raise RuntimeError(f'impl="triton" is not available: {error}') from error


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning, the first time that it is asked for."""
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


class _SumTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        labels: Sequence[Tensor],
        weights: Tensor,
        terms: Terms,
        fused: Any,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.terms, ctx.fused = terms, fused
        # float16 gradients of easy terms would vanish before the loss scale of automatic mixed
        # precision reaches them: they wait for it. bfloat16 has the exponents of float32.
        ctx.waits = logits[0].dtype == torch.float16
        with_grads = any(ctx.needs_input_grad) and not ctx.waits
        with full_precision(logits[0]):
            (total, foreground), grads = fused.sum_levels(
                terms, logits, labels, weights, with_grads
            )
        if ctx.waits:
            ctx.save_for_backward(weights, *labels, *logits)
        else:
            ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(foreground)
        return total, foreground

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_foreground: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative()
        if ctx.waits:
            weights, *saved = ctx.saved_tensors
            labels, logits = saved[: len(saved) // 2], saved[len(saved) // 2 :]
            weights = weights * grad_total
            with full_precision(logits[0]):
                _, grads = ctx.fused.sum_levels(ctx.terms, logits, labels, weights, True)
        else:
            # Of use once more only to a graph that is kept.
            in_place = not _graph_is_kept()
            grads = [ctx.fused.scale(x, grad_total, in_place) for x in ctx.saved_tensors]
        return None, None, None, None, *grads


class _ElementwiseTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, terms: Terms) -> Tensor:
        ctx.terms = terms
        ctx.save_for_backward(logits, labels)
        with full_precision(logits):
            return blocks.elementwise_terms(terms, logits, labels)[0]

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None]:
        _refuse_second_derivative()
        logits, labels = ctx.saved_tensors
        with full_precision(logits):
            slope = blocks.elementwise_terms(ctx.terms, logits, labels)[1]
            return (slope * grad_value).to(logits.dtype), None, None


def _graph_is_kept() -> bool:
    """Whether this backward pass runs with ``retain_graph=True``, or cannot be asked."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


def _refuse_second_derivative() -> None:
    # Gradients are on in a backward pass under create_graph=True only. Without this, what is built
    # on the gradient (a gradient penalty, say) would take it for a constant, and say nothing.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "focal_det's fused losses compute their gradient in closed form and have no second "
            'derivative: for create_graph=True set impl="eager" (MODEL.FOCAL_DET.IMPL)'
        )
