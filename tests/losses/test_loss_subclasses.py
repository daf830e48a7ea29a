"""Losses of a user's own that change one thing: nothing stale is inherited."""

import pytest
import torch
from loss_cases import scene
from torch import Tensor

from focal_det.losses import CrossEntropyLoss, ElementwiseLoss, FocalLoss


class Tilted(FocalLoss):
    """Changes the value alone: the closed form of its parent is not its own."""

    def value(self, x_t: Tensor, foreground: bool) -> Tensor:
        return super().value(x_t, foreground) + 3 * torch.sigmoid(-x_t)


class Doubled(FocalLoss):
    """Changes the closed form alone."""

    def value_and_slope(self, z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        value, slope = super().value_and_slope(z, foreground)
        return 2 * value, 2 * slope


def test_a_subclass_that_changes_the_value_does_not_keep_its_parents_closed_form() -> None:
    logits, labels = scene(20, 4)
    logits.requires_grad_()
    results = {}
    for impl in ("torch", "eager"):
        value = Tilted().use(impl)(logits, labels)
        results[impl] = (value, *torch.autograd.grad(value, logits))
    torch.testing.assert_close(results["torch"], results["eager"])
    assert results["torch"][0] > FocalLoss()(logits, labels) + 1


def test_a_subclass_that_changes_the_closed_form_does_not_keep_its_parents_value() -> None:
    logits, labels = scene(20, 4)
    twice = 2 * FocalLoss()(logits, labels)
    torch.testing.assert_close(Doubled()(logits, labels), twice)
    torch.testing.assert_close(Doubled().use("eager")(logits, labels), twice)


def test_a_value_of_another_dtype_is_brought_back() -> None:
    class Double(ElementwiseLoss):
        def value(self, x_t: Tensor, foreground: bool) -> Tensor:
            return torch.nn.functional.softplus(-x_t.double())

    logits, labels = scene(20, 4)
    total = Double()(logits.requires_grad_(), labels)
    total.backward()
    torch.testing.assert_close(total, CrossEntropyLoss()(logits, labels))
    assert logits.grad is not None


class Learned(ElementwiseLoss):
    """Cross entropy with a margin that is trained too."""

    def __init__(self) -> None:
        super().__init__()
        self.margin = torch.nn.Parameter(torch.tensor(0.3))

    def value(self, x_t: Tensor, foreground: bool) -> Tensor:
        return torch.nn.functional.softplus(-(x_t - self.margin))


def test_parameters_of_a_loss_get_their_gradient() -> None:
    logits, labels = scene(20, 4)
    loss, shifted = Learned(), CrossEntropyLoss()
    (slope,) = torch.autograd.grad(loss(logits.requires_grad_(), labels), loss.margin)
    step = 1e-3
    signs = torch.where(torch.nn.functional.one_hot(labels.clamp(min=0), 5)[:, :4] > 0, 1.0, -1.0)
    moved = [
        shifted((logits.detach() - sign * signs * step - signs * 0.3).double(), labels)
        for sign in (1, -1)
    ]
    torch.testing.assert_close(
        slope.double(), (moved[0] - moved[1]) / (2 * step), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(RuntimeError, match=r"Learned has parameters .* 'torch' .* does not give"):
        loss.use("torch")(logits, labels)
    loss.requires_grad_(False)  # nothing to learn: the fast way will do
    assert loss(logits, labels).isfinite()


def test_eager_leaves_ignored_anchors_out_of_the_gradient_whatever_they_hold() -> None:
    logits, labels = scene(20, 4)
    labels[3] = -1
    logits[3] = torch.nan
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(FocalLoss().use("eager")(logits, labels), logits)
    assert grad.isfinite().all()
    assert (grad[3] == 0).all()
