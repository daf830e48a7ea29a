"""What the paper and other implementations say of the losses, each property by its name."""

import math
from collections.abc import Callable

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss as fvcore_focal_loss
from loss_cases import scene
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from focal_det.losses import (
    BalancedCrossEntropyLoss,
    CrossEntropyLoss,
    ElementwiseLoss,
    FocalLoss,
    FocalLossStar,
    HingeLoss,
    reference,
)


def value_and_gradient(
    loss: ElementwiseLoss, logits: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    loss(logits, labels).backward()
    assert logits.grad is not None
    return loss.elementwise(logits, labels).detach(), logits.grad


def assert_same_loss(one: ElementwiseLoss, other: ElementwiseLoss) -> None:
    logits, labels = scene(200, 6)
    results = (value_and_gradient(loss, logits, labels) for loss in (one, other))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-30)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    return F.one_hot(labels, num_classes + 1)[..., :-1].float()


def at_probability(p: float) -> tuple[Tensor, Tensor]:
    """One foreground term with p_t = p."""
    return torch.tensor([[math.log(p / (1 - p))]], dtype=torch.float64), torch.tensor([0])


@pytest.mark.parametrize("alpha", [None, 0.0, 0.25, 0.75, 1.0])
def test_gamma_0_is_cross_entropy(alpha: float | None) -> None:
    assert_same_loss(FocalLoss(alpha, 0.0), BalancedCrossEntropyLoss(alpha))
    assert_same_loss(FocalLoss(None, 0.0), CrossEntropyLoss())


@pytest.mark.parametrize("alpha", [None, 0.25, 0.75])
def test_star_with_gamma_1_and_beta_0_is_cross_entropy(alpha: float | None) -> None:
    assert_same_loss(FocalLossStar(alpha, 1.0, 0.0), BalancedCrossEntropyLoss(alpha))


@pytest.mark.parametrize("make", [BalancedCrossEntropyLoss, FocalLoss, FocalLossStar])
def test_negative_alpha_and_none_switch_weighting_off(make: type[ElementwiseLoss]) -> None:
    assert_same_loss(make(-1), make(None))
    logits, labels = scene(50, 4)
    # 1/2 weighs both sides by a power of two: exactly half of the unweighted loss.
    assert torch.equal(
        2 * make(0.5).elementwise(logits, labels), make(None).elementwise(logits, labels)
    )


@pytest.mark.parametrize("make", [BalancedCrossEntropyLoss, FocalLoss, FocalLossStar])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_0_and_1_silence_one_side(make: type[ElementwiseLoss], alpha: float) -> None:
    """alpha 0 leaves the background terms alone and untouched, alpha 1 the foreground ones."""
    logits, labels = scene(100, 4, ignored=False)
    foreground = one_hot(labels, 4).bool()
    silent = foreground if alpha == 0 else ~foreground
    results = (value_and_gradient(make(a), logits, labels) for a in (alpha, None))
    for weighted, plain in zip(*results, strict=True):
        assert (weighted[silent] == 0).all()
        assert torch.equal(weighted[~silent], plain[~silent])
        assert (weighted[~silent] != 0).all()


@pytest.mark.parametrize("alpha", [None, 0.25, 0.9])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0, 5.0])
def test_ratio_to_cross_entropy(alpha: float | None, gamma: float) -> None:
    """FL / CE = alpha_t (1 - p_t)^gamma (equation 5)."""
    logits, labels = scene(100, 4, ignored=False)
    logits = logits.double()
    foreground = one_hot(labels, 4).bool()
    p = logits.sigmoid()
    p_t = p.where(foreground, 1 - p)
    weight = 1.0 if alpha is None else torch.where(foreground, alpha, 1 - alpha)
    ratio = FocalLoss(alpha, gamma).elementwise(logits, labels) / CrossEntropyLoss().elementwise(
        logits, labels
    )
    torch.testing.assert_close(ratio, weight * (1 - p_t) ** gamma, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("p_t", "factor"), [(0.9, 100.0), (0.968, 976.5625)])
def test_numbers_of_section_3_2(p_t: float, factor: float) -> None:
    """With gamma 2 an easy example costs 100 times less at p_t = .9, about 1000 times at .968."""
    inputs = at_probability(p_t)
    ratio = CrossEntropyLoss()(*inputs) / FocalLoss(None, 2.0)(*inputs)
    assert ratio.item() == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("p_t", [0.001, 0.1, 0.3, 0.5])
def test_hard_examples_lose_at_most_a_factor_of_4(p_t: float) -> None:
    inputs = at_probability(p_t)
    ratio = CrossEntropyLoss()(*inputs).item() / FocalLoss(None, 2.0)(*inputs).item()
    assert 1.0 <= ratio <= 4.0 + 1e-6
    assert ratio == pytest.approx((1 - p_t) ** -2, rel=1e-6)


def test_star_is_shifted_and_steeper_cross_entropy() -> None:
    """FL*(x_t) = CE(gamma x_t + beta) / gamma, for one foreground term."""
    x = torch.tensor([[0.7]])
    star = FocalLossStar(None, 3.0, -0.5)(x, torch.tensor([0]))
    torch.testing.assert_close(star, CrossEntropyLoss()(3 * x - 0.5, torch.tensor([0])) / 3)


def test_hinge_vanishes_above_its_threshold() -> None:
    for p_t, expected in [(0.2, 0.4), (0.59, 0.01), (0.6001, 0.0), (0.99, 0.0)]:
        inputs = at_probability(p_t)
        assert HingeLoss(0.6)(*inputs).item() == pytest.approx(expected, abs=1e-9)


def test_cross_entropy_equals_torch() -> None:
    """Against torch in float64: it adds two nearly opposite numbers for easy terms."""
    logits, labels = scene(300, 7, scale=8.0, ignored=False)
    expected = F.binary_cross_entropy_with_logits(
        logits.double(), one_hot(labels, 7).double(), reduction="none"
    )
    each = CrossEntropyLoss().elementwise(logits, labels)
    torch.testing.assert_close(each, expected.float(), rtol=1e-5, atol=1e-13)
    torch.testing.assert_close(CrossEntropyLoss()(logits, labels), expected.sum().float())


@pytest.mark.parametrize("gamma", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [-1, 0.25, 0.75])
@pytest.mark.parametrize("theirs", [fvcore_focal_loss, torchvision_focal_loss])
def test_focal_loss_equals_fvcore_and_torchvision(
    theirs: Callable[..., Tensor], alpha: float, gamma: float
) -> None:
    """fvcore computes in float32 whatever it is given, with 1 - p_t from a rounded p_t."""
    logits, labels = scene(300, 7, ignored=False)
    logits = logits.double().requires_grad_()
    expected = theirs(logits, one_hot(labels, 7).double(), alpha, gamma, "none")
    (slope,) = torch.autograd.grad(expected.sum(), logits)
    tolerance = 1e-6 if expected.dtype == torch.float32 else 1e-12
    each, grad = value_and_gradient(FocalLoss(alpha, gamma), logits.detach(), labels)
    torch.testing.assert_close(each, expected.detach().double(), rtol=1e-4, atol=tolerance)
    torch.testing.assert_close(grad, slope, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_small_gamma_has_a_gradient_where_fvcore_has_none(gamma: float) -> None:
    """At logit 20 a float32 p_t is 1, and the derivative of 0^gamma is infinite for gamma < 1."""
    logits = torch.tensor([[20.0]], requires_grad=True)
    theirs = fvcore_focal_loss(logits, torch.ones(1, 1), 0.25, gamma, "sum")
    (grad,) = torch.autograd.grad(theirs, logits)
    assert grad.isnan().all(), "fvcore has mended this: drop the claim"
    (grad,) = torch.autograd.grad(FocalLoss(0.25, gamma)(logits, torch.tensor([0])), logits)
    expected = reference.focal(20.0, 1, 0.25, gamma)[1]
    assert expected < 0
    assert grad.item() == pytest.approx(expected, rel=1e-5)
