"""The operations as a formula for autograd to differentiate: the slow twin of the fused ones.

Every step makes a tensor of the size of the logits. What the fused operations give up is here:
derivatives of any order.
"""

import torch
from torch import Tensor

from .terms import Terms, accurate


def elementwise_terms(terms: Terms, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of every term, and which terms have y = +1.

    Args:
        terms: the loss.
        logits: (..., K).
        labels: (...), ``0..K-1`` foreground, ``K`` background, ``-1`` ignored.

    Returns:
        Two tensors (..., K): the loss, 0 for ignored anchors, and a mask.
    """
    labels = labels.unsqueeze(-1)
    # A gradient of 0 times infinity would be NaN.
    x = logits.to(accurate(logits.dtype)).masked_fill(labels < 0, 0)
    is_own = labels == torch.arange(logits.shape[-1], device=logits.device)
    foreground = terms.value(x, True) * terms.foreground
    background = terms.value(-x, False) * terms.background
    return foreground.where(is_own, background).masked_fill(labels < 0, 0), is_own


def sum_terms(
    terms: Terms, logits: Tensor, labels: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum the loss of all terms of each image.

    Args:
        terms, logits, labels: see :func:`elementwise_terms`, with a leading dimension N.
        weights: (N,), factor of each image's sum.

    Returns:
        Two tensors (N,): the sums, and their part from terms with y = +1.
    """
    value, is_own = elementwise_terms(terms, logits, labels)
    total = value.flatten(1).sum(1)
    foreground = value.detach().where(is_own, 0).flatten(1).sum(1)
    return total * weights, foreground * weights
