"""Value and derivative of every loss against its scalar twin and against numbers made by hand."""

import math

import pytest
import torch
from loss_cases import Case, assert_close, cases, reference_terms, scene
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

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def wide_grid(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits over the promised range, each once as y = +1 (column 0) and once as y = -1.

    The points are where something happens: 17 is where a float32 probability rounds to 1, 20 where
    torch's softplus turns linear, 88 and 104 where float32 ``exp`` leaves the normal and the
    subnormal numbers.
    """
    edges = torch.tensor([0, 0.5, 1, 4, 10, 16.5, 17, 20, 30, 87, 88, 104, 300, 745, 1e3, 1e4])
    noise = 6 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    points = torch.cat([edges, -edges, noise]).to(dtype)
    return points.unsqueeze(1).repeat(1, 2), torch.zeros(len(points), dtype=torch.int64)


def gradient(loss: ElementwiseLoss, logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    loss(logits, labels).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases(), ids=repr)
def test_every_term_over_the_whole_range(case: Case, dtype: torch.dtype) -> None:
    """The twin is given the rounded logits: what a 16-bit input loses is not the loss's doing."""
    logits, labels = wide_grid(dtype)
    value, slope = reference_terms(case.term, logits, labels)
    each = case.loss.elementwise(logits, labels)
    assert each.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(each, value, case, logits)
    assert_close(gradient(case.loss, logits, labels), slope, case, logits)
    logits.requires_grad_()
    case.loss.elementwise(logits, labels).sum().backward()
    assert logits.grad is not None
    assert_close(logits.grad, slope, case, logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases(), ids=repr)
def test_sum_over_a_scene(case: Case, dtype: torch.dtype) -> None:
    """All kinds of anchors together. Terms are >= 0, so their relative errors bound the sum's."""
    logits, labels = scene(30, 5, seed=2)
    logits = logits.to(dtype)
    total, slopes = reference.sum_over_anchors(case.term, logits.tolist(), labels.tolist())
    result = case.loss(logits, labels)
    assert result.item() == pytest.approx(total, rel=5e-6, abs=1e-30)
    slope = torch.tensor(slopes, dtype=torch.float64)
    assert_close(gradient(case.loss, logits, labels), slope, case, logits)


@pytest.mark.parametrize("gamma", [30.0, 1e3])
@pytest.mark.parametrize("make", [FocalLoss, FocalLossStar], ids=lambda make: make.__name__)
def test_steep_gamma_stays_finite(make: type[ElementwiseLoss], gamma: float) -> None:
    logits, labels = wide_grid(torch.float32)
    loss = make(0.25, gamma)
    assert loss.elementwise(logits, labels).isfinite().all()
    assert gradient(loss, logits, labels).isfinite().all()


@pytest.mark.parametrize(
    ("loss", "logit", "foreground", "value", "slope"),
    [
        # x = 0: p_t = 1/2, CE = ln 2, dCE/dx = -y/2.
        (CrossEntropyLoss(), 0.0, True, LN2, -0.5),
        (CrossEntropyLoss(), 0.0, False, LN2, 0.5),
        # x = ln 3: p = 3/4. Foreground .75 ln(4/3), background .25 ln 4.
        (BalancedCrossEntropyLoss(), LN3, True, 0.75 * (LN4 - LN3), -0.75 * 0.25),
        (BalancedCrossEntropyLoss(), LN3, False, 0.25 * LN4, 0.25 * 0.75),
        # x = 0: (1 - p_t)^2 = 1/4; the slope's bracket is 2 (1/2) ln(1/2) - 1/2.
        (FocalLoss(), 0.0, True, 0.25 * 0.25 * LN2, -0.25 * 0.25 * (LN2 + 0.5)),
        (FocalLoss(), 0.0, False, 0.75 * 0.25 * LN2, 0.75 * 0.25 * (LN2 + 0.5)),
        # x = -ln 3, y = +1: p_t = 1/4, FL = .25 (3/4)^2 ln 4, bracket 2 (1/4) ln(1/4) - 3/4.
        (FocalLoss(), -LN3, True, 0.25 * 0.5625 * LN4, -0.25 * 0.5625 * (LN4 / 2 + 0.75)),
        # x = ln 3, y = +1, gamma 1/2: FL = sqrt(1/4) ln(4/3), bracket (1/2)(3/4) ln(3/4) - 1/4.
        (
            FocalLoss(None, 0.5),
            LN3,
            True,
            0.5 * (LN4 - LN3),
            -0.5 * (0.375 * (LN4 - LN3) + 0.25),
        ),
        # (gamma 4, beta 0), x = ln(3)/4: p_t* = 3/4, FL* = ln(4/3)/4, slope -(1 - 3/4).
        (FocalLossStar(None, 4.0, 0.0), LN3 / 4, True, (LN4 - LN3) / 4, -0.25),
        # (gamma 2, beta 1), x = 1/2, y = -1: 2 (-1/2) + 1 = 0, FL* = .75 ln(2)/2, slope .75/2.
        (FocalLossStar(), 0.5, False, 0.75 * LN2 / 2, 0.375),
        # x = -ln 3, y = +1: p_t = 1/4, 1/4 below the threshold, slope -(1/4)(3/4).
        (HingeLoss(), -LN3, True, 0.25, -3 / 16),
        # x = ln 3, y = +1: p_t = 3/4 is above the threshold.
        (HingeLoss(), LN3, True, 0.0, 0.0),
        (HingeLoss(0.875), LN3, True, 0.125, -3 / 16),
    ],
)
def test_values_made_by_hand(
    loss: ElementwiseLoss, logit: float, foreground: bool, value: float, slope: float
) -> None:
    """One anchor, one class; the derivations stand beside the numbers."""
    logits = torch.tensor([[logit]], dtype=torch.float64)
    labels = torch.tensor([0 if foreground else 1])
    assert loss(logits, labels).item() == pytest.approx(value, rel=1e-7, abs=1e-12)
    grad = gradient(loss, logits, labels)
    assert grad.item() == pytest.approx(slope, rel=1e-7, abs=1e-12)


def test_focal_loss_of_an_image_at_the_prior() -> None:
    """Background only, every probability .01: R K terms of .75 x .01^2 x -ln(.99) each."""
    prior = 0.01
    logits = torch.full((50, 8), -math.log((1 - prior) / prior))
    labels = torch.full((50,), 8)
    expected = 50 * 8 * 0.75 * prior**2 * -math.log(1 - prior)
    assert FocalLoss()(logits, labels).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("term", "x", "y", "value", "slope"),
    [
        (reference.cross_entropy, -LN3, 1, LN4, -0.75),
        (reference.focal, LN3, -1, 0.75 * 0.5625 * LN4, 0.75 * 0.5625 * (LN4 / 2 + 0.75)),
        (reference.focal_star, 0.5, -1, 0.75 * LN2 / 2, 0.375),
        (reference.hinge, LN3, -1, 0.25, 3 / 16),
    ],
)
def test_the_twins_themselves(
    term: reference.Term, x: float, y: int, value: float, slope: float
) -> None:
    """By hand as above: p = 3/4 at x = ln 3, so p_t = 1/4 for the wrong side."""
    assert term(x, y) == pytest.approx((value, slope), rel=1e-12)


@pytest.mark.parametrize("case", cases(), ids=repr)
def test_slopes_of_the_twins_are_their_derivatives(case: Case) -> None:
    """Central differences: the two formulas of a twin cannot both be wrong in step."""
    step = 1e-5
    for y in (1, -1):
        for x in (-7.3, -1.1, -0.2, 0.4, 2.7, 9.1):
            slope = (case.term(x + step, y)[0] - case.term(x - step, y)[0]) / (2 * step)
            assert case.term(x, y)[1] == pytest.approx(slope, rel=1e-6, abs=1e-9)
