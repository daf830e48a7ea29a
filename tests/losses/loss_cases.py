"""Cases and comparisons shared by the loss tests; the truth is `focal_det.losses.reference`."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from focal_det.losses import (
    BalancedCrossEntropyLoss,
    CrossEntropyLoss,
    ElementwiseLoss,
    FocalLoss,
    FocalLossStar,
    HingeLoss,
    reference,
)

ALPHAS = (None, -1.0, 0.0, 0.25, 0.75, 1.0)
GAMMAS = (0.0, 0.1, 0.5, 2.0, 5.0)
STARS = ((2.0, 1.0), (4.0, 0.0), (1.0, -2.0))


class Case(NamedTuple):
    """A loss, its scalar twin, and how far rounding may carry the two apart.

    Attributes:
        exponent: ``x -> e``: the loss forms ``exp`` of a number that is itself rounded and about
            ``e`` large, so its relative error is ``e`` roundings and not one.
        absolute: error in units of one rounding of 1, for a loss that subtracts probabilities.
    """

    loss: ElementwiseLoss
    term: reference.Term
    exponent: Callable[[Tensor], Tensor] = torch.zeros_like
    absolute: float = 0.0

    def __repr__(self) -> str:
        return f"{type(self.loss).__name__}({self.loss.extra_repr()})"


def affine(gamma: float, beta: float = 0.0) -> Callable[[Tensor], Tensor]:
    """``x -> gamma |x| + |beta|``."""
    return lambda x: gamma * x.abs() + abs(beta)


def cases() -> list[Case]:
    """Every elementwise loss at the paper's settings and at the edges of its ranges."""
    return [
        Case(CrossEntropyLoss(), reference.cross_entropy),
        *(
            Case(BalancedCrossEntropyLoss(a), partial(reference.balanced_cross_entropy, alpha=a))
            for a in ALPHAS
        ),
        *(
            Case(
                FocalLoss(a, g),
                partial(reference.focal, alpha=a, gamma=g),
                affine(g),
            )
            for a in ALPHAS
            for g in GAMMAS
        ),
        *(
            Case(
                FocalLossStar(a, g, b),
                partial(reference.focal_star, alpha=a, gamma=g, beta=b),
                affine(g, b),
            )
            for a in ALPHAS
            for g, b in STARS
        ),
        *(
            Case(HingeLoss(t), partial(reference.hinge, threshold=t), absolute=4.0)
            for t in (0.0, 0.3, 0.5, 0.95, 1.0)
        ),
    ]


def reference_terms(term: reference.Term, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative of every term, one Python number at a time, in float64."""
    num_classes = logits.shape[-1]
    values, slopes = [], []
    rows = logits.reshape(-1, num_classes).tolist()
    for row, label in zip(rows, labels.flatten().tolist(), strict=True):
        for k, x in enumerate(row):
            pair = (0.0, 0.0) if label == -1 else term(x, 1 if label == k else -1)
            values.append(pair[0])
            slopes.append(pair[1])
    shape = logits.shape
    double = partial(torch.tensor, dtype=torch.float64)
    return double(values).reshape(shape), double(slopes).reshape(shape)


def assert_close(actual: Tensor, expected: Tensor, case: Case, logits: Tensor) -> None:
    """Assert that `actual` is `expected` up to what rounding can explain.

    - 8 roundings of the working precision for the handful of operations, plus two for each unit
      of the exponent (see `Case.exponent`).
    - In float64, torch's softplus drops ``exp(-|x|)`` beyond 20, an absolute error of 2.1e-9 that
      an exponent turns into a relative one; float32 cannot see it.
    - A 16-bit result (a gradient) is rounded once more, by half its epsilon or half its smallest
      number.
    - Below the smallest normal float32 nothing is promised but closeness to 0.
    """
    dtype = actual.dtype
    work = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    x = logits.double()
    linear = (x.abs() >= 20) | (case.exponent(x) >= 20)
    dropped = 2.1e-9 * linear if dtype == torch.float64 else 0.0
    unit_exponent = case.exponent(torch.ones_like(x))
    relative = work.eps * (8 + 2 * case.exponent(x)) + dropped * (1 + unit_exponent)
    floor = torch.finfo(torch.float32).tiny * (1 + unit_exponent) + case.absolute * work.eps
    if dtype in (torch.float16, torch.bfloat16):
        relative = relative + torch.finfo(dtype).eps / 2
        floor = floor + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    error = (actual.double() - expected).abs()
    allowed = relative * expected.abs() + floor
    worst = (error - allowed).argmax()
    assert actual.isfinite().all()
    assert (error <= allowed).all(), (
        f"{case!r} at logit {x.flatten()[worst].item():.9g}: got "
        f"{actual.flatten()[worst].item():.9g}, want {expected.flatten()[worst].item():.9g}"
    )


def scene(
    anchors: int, num_classes: int, seed: int = 0, scale: float = 3.0, ignored: bool = True
) -> tuple[Tensor, Tensor]:
    """Random logits (R, K) and labels (R,): half background, some ignored, the rest objects."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(anchors, num_classes, generator=generator)
    labels = torch.randint(-1 if ignored else 0, num_classes, (anchors,), generator=generator)
    labels[torch.rand(anchors, generator=generator) < 0.5] = num_classes
    return logits, labels


def crowd(anchors: int, seed: int = 0, extent: float = 60.0) -> Tensor:
    """Random boxes (R, 4), many overlapping; they start in a square of side `extent`."""
    generator = torch.Generator().manual_seed(seed)
    corner = extent * torch.rand(anchors, 2, generator=generator)
    size = 10 + 30 * torch.rand(anchors, 2, generator=generator)
    return torch.cat([corner, corner + size], dim=1)
