"""What every elementwise loss promises whatever its formula: shapes, dtypes, strides, gradients.

Where one layout is compared with another the tolerance is 1e-5: a vectorised `exp` and the scalar
one at the end of a row differ by a rounding, which an exponent of 20 makes 20.
"""

import copy

import pytest
import torch
from loss_cases import scene
from torch import Tensor

from focal_det.kernels import blocks
from focal_det.losses import (
    BalancedCrossEntropyLoss,
    CrossEntropyLoss,
    ElementwiseLoss,
    FocalLoss,
    FocalLossStar,
    HingeLoss,
)

LOSSES = [
    CrossEntropyLoss(),
    BalancedCrossEntropyLoss(),
    FocalLoss(),
    FocalLoss(None, 0.5),
    FocalLossStar(),
    HingeLoss(),
]

pytestmark = pytest.mark.parametrize("loss", LOSSES, ids=repr)


def value_and_gradient(
    loss: ElementwiseLoss, logits: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, labels)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def test_result_is_the_sum_of_the_terms(loss: ElementwiseLoss) -> None:
    """Twice the scene, twice the loss: nothing is averaged or normalised."""
    logits, labels = scene(60, 4)
    value, _ = value_and_gradient(loss, logits, labels)
    assert value.shape == ()
    assert value.dtype == torch.float32
    each = loss.elementwise(logits, labels)
    assert each.shape == logits.shape
    assert each.dtype == torch.float32
    torch.testing.assert_close(value, each.double().sum().float(), rtol=1e-5, atol=0)
    twice = loss(torch.cat([logits, logits]), torch.cat([labels, labels]))
    torch.testing.assert_close(twice, 2 * value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("poison", [0.0, 50.0, float("inf"), float("-inf"), float("nan")])
def test_ignored_anchors_do_not_exist(loss: ElementwiseLoss, poison: float) -> None:
    logits, labels = scene(80, 4, seed=3)
    ignored = labels == -1
    assert 0 < ignored.sum() < 80
    logits[ignored] = poison
    value, grad = value_and_gradient(loss, logits, labels)
    kept_value, kept_grad = value_and_gradient(loss, logits[~ignored], labels[~ignored])
    torch.testing.assert_close(value, kept_value, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[~ignored], kept_grad, rtol=1e-5, atol=1e-38)
    assert torch.equal(grad[ignored], torch.zeros_like(grad[ignored]))
    each = loss.elementwise(logits, labels)
    assert torch.equal(each[ignored], torch.zeros_like(each[ignored]))


@pytest.mark.parametrize("shape", [(0,), (0, 7), (2, 0), (3, 0, 2), (0, 0)], ids=str)
def test_no_anchors_give_0_with_a_gradient(loss: ElementwiseLoss, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(*shape, 5, requires_grad=True)
    value = loss(logits, torch.zeros(shape, dtype=torch.int64))
    value.backward()
    assert value.item() == 0.0
    assert value.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape
    assert loss.elementwise(logits, torch.zeros(shape, dtype=torch.int64)).shape == logits.shape


def test_all_ignored_gives_0_with_a_gradient_of_0(loss: ElementwiseLoss) -> None:
    logits, _ = scene(20, 5)
    value, grad = value_and_gradient(loss, logits, torch.full((20,), -1))
    assert value.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_background_only(loss: ElementwiseLoss) -> None:
    """Without objects every logit is pushed down, or left alone where the hinge is satisfied."""
    logits, _ = scene(20, 5)
    value, grad = value_and_gradient(loss, logits, torch.full((20,), 5))
    assert value.isfinite()
    assert value > 0
    assert (grad >= 0).all()
    assert grad.max() > 0


@pytest.mark.parametrize("num_classes", [1, 1203])
def test_few_and_many_classes(loss: ElementwiseLoss, num_classes: int) -> None:
    """Each foreground anchor raises its own class and no other."""
    logits = torch.full((4, num_classes), 0.25)
    labels = torch.tensor([0, num_classes - 1, num_classes, -1])
    _, grad = value_and_gradient(loss, logits, labels)
    sign = torch.ones(4, num_classes)
    sign[0, 0] = sign[1, num_classes - 1] = -1
    sign[3] = 0
    if isinstance(loss, HingeLoss):  # p_t is past .5 for the right class at logit .25
        sign = sign.clamp(min=0)
    assert torch.equal(grad.sign(), sign)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 2, 3), (2, 1, 3, 1), (3, 1, 1, 2, 1)])
def test_any_leading_dimensions(loss: ElementwiseLoss, shape: tuple[int, ...]) -> None:
    count = int(torch.tensor(shape).prod())
    logits, labels = scene(count, 4, seed=5)
    value, grad = value_and_gradient(loss, logits, labels)
    shaped, shaped_grad = value_and_gradient(loss, logits.view(*shape, 4), labels.view(shape))
    torch.testing.assert_close(shaped, value, rtol=1e-5, atol=0)
    torch.testing.assert_close(shaped_grad.view(count, 4), grad, rtol=1e-5, atol=1e-38)
    each = loss.elementwise(logits.view(*shape, 4), labels.view(shape))
    assert each.shape == (*shape, 4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("block_terms", [None, 24])
def test_views_of_the_output_of_a_head(
    loss: ElementwiseLoss, layout: str, block_terms: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(N, A K, H, W) read as (N, H, W, A, K) in place; the gradient lands in the head's layout."""
    if block_terms is not None:
        monkeypatch.setitem(blocks.BLOCK_TERMS, "cpu", block_terms)
    n, a, k, h, w = 2, 3, 4, 5, 6
    logits, labels = scene(n * h * w * a, k, seed=7)
    head = logits.view(n, h, w, a * k).permute(0, 3, 1, 2).contiguous()
    if layout == "channels_last":
        head = head.to(memory_format=torch.channels_last)
    head.requires_grad_()
    view = head.view(n, a, k, h, w).permute(0, 3, 4, 1, 2)
    assert view.data_ptr() == head.data_ptr()
    labels_view = labels.view(n, h, w, a)
    value = loss(view, labels_view)
    (grad,) = torch.autograd.grad(value, head)
    flat_value, flat_grad = value_and_gradient(loss, logits, labels)
    torch.testing.assert_close(value, flat_value, rtol=1e-5, atol=0)
    seen = grad.permute(0, 2, 3, 1).reshape(-1, k)
    torch.testing.assert_close(seen, flat_grad, rtol=1e-5, atol=1e-38)
    each = loss.elementwise(view, labels_view).reshape(-1, k)
    torch.testing.assert_close(each, loss.elementwise(logits, labels), rtol=1e-5, atol=1e-38)


def test_strided_transposed_and_expanded(loss: ElementwiseLoss) -> None:
    base, labels = scene(12, 8, seed=9)
    for view, y in [
        (base[::2, 1::2], labels[::2].clamp(max=4)),
        (base[:8, :8].t(), labels[:8]),
        (base[:1].expand(12, 8), labels),
        (base[:, :1].expand(12, 8), labels),
        (base, labels[:1].expand(12)),
        (base, labels.repeat_interleave(2)[::2]),
    ]:
        value, grad = value_and_gradient(loss, view.contiguous(), y.contiguous())
        leaf = view.detach().requires_grad_()  # shares the strides
        assert leaf.stride() == view.stride()
        result = loss(leaf, y)
        torch.testing.assert_close(result, value, rtol=1e-5, atol=0)
        (view_grad,) = torch.autograd.grad(result, leaf)
        torch.testing.assert_close(view_grad, grad, rtol=1e-5, atol=1e-38)


def test_gradient_sums_over_an_expanded_leaf(loss: ElementwiseLoss) -> None:
    base, labels = scene(10, 3)
    one = base[:1].clone().requires_grad_()
    loss(one.expand(10, 3), labels).backward()
    _, grad = value_and_gradient(loss, base[:1].expand(10, 3), labels)
    assert one.grad is not None
    torch.testing.assert_close(one.grad, grad.sum(0, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_inputs_stay_as_they_are(loss: ElementwiseLoss, dtype: torch.dtype) -> None:
    logits, labels = scene(50, 4)
    logits = logits.to(dtype).requires_grad_()
    logits_before, labels_before = logits.detach().clone(), labels.clone()
    loss(logits, labels).backward()
    loss.elementwise(logits, labels).sum().backward()
    assert torch.equal(logits, logits_before)
    assert torch.equal(labels, labels_before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_results(loss: ElementwiseLoss, dtype: torch.dtype) -> None:
    logits, labels = scene(20, 4)
    logits = logits.to(dtype)
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    value, grad = value_and_gradient(loss, logits, labels)
    assert value.dtype == accurate
    assert grad.dtype == dtype
    assert loss.elementwise(logits, labels).dtype == accurate
    # A 16-bit tensor holds float32 numbers: nothing but the gradient may be rounded.
    if accurate == torch.float32:
        assert torch.equal(value, loss(logits.float(), labels))
        assert torch.equal(
            loss.elementwise(logits, labels), loss.elementwise(logits.float(), labels)
        )


def test_small_integer_labels(loss: ElementwiseLoss) -> None:
    logits, labels = scene(50, 4)
    for dtype in (torch.int8, torch.int16, torch.int32):
        assert torch.equal(loss(logits, labels.to(dtype)), loss(logits, labels))


@pytest.mark.parametrize("factor", [2.5, -1.0, 0.0, 1e-3])
def test_incoming_gradient_is_multiplied(loss: ElementwiseLoss, factor: float) -> None:
    logits, labels = scene(40, 4)
    _, grad = value_and_gradient(loss, logits, labels)
    leaf = logits.clone().requires_grad_()
    (factor * loss(leaf, labels)).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, factor * grad, rtol=1e-5, atol=1e-38)


def test_elementwise_passes_a_gradient_for_each_term(loss: ElementwiseLoss) -> None:
    logits, labels = scene(40, 4)
    _, grad = value_and_gradient(loss, logits, labels)
    weights = torch.linspace(-1, 2, logits.numel()).view_as(logits)
    leaf = logits.clone().requires_grad_()
    (weights * loss.elementwise(leaf, labels)).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, weights * grad, rtol=1e-5, atol=1e-38)


def test_half_precision_gradient_survives_loss_scaling(loss: ElementwiseLoss) -> None:
    """Scaled by 2^16 before it is rounded to float16, or an easy term's gradient would be 0."""
    logits = torch.full((1, 1), -12.0, dtype=torch.float16, requires_grad=True)
    labels = torch.tensor([1])
    reference = logits.detach().double().requires_grad_()
    (loss(logits, labels) * 2**16).backward()
    (loss(reference, labels) * 2**16).backward()
    assert logits.grad is not None
    assert reference.grad is not None
    expected = reference.grad.half()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-3, atol=6e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(loss: ElementwiseLoss, dtype: torch.dtype) -> None:
    logits, labels = scene(200, 4)
    logits = logits.to(dtype)
    value, grad = value_and_gradient(loss, logits, labels)
    each = loss.elementwise(logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_value, cast_grad = value_and_gradient(loss, logits, labels)
        cast_each = loss.elementwise(logits, labels)
    assert cast_value.dtype == cast_each.dtype == torch.float32
    assert torch.equal(cast_value, value)
    assert torch.equal(cast_grad, grad)
    assert torch.equal(cast_each, each)


def test_derivative_in_float64(loss: ElementwiseLoss) -> None:
    """Away from the hinge's corner at logit 0, where there is none."""
    logits, labels = scene(12, 3, seed=11)
    logits = logits.double()
    logits = torch.where(logits.abs() < 0.1, logits + 0.2, logits).requires_grad_()
    torch.autograd.gradcheck(lambda x: loss(x, labels), (logits,))
    torch.autograd.gradcheck(lambda x: loss.elementwise(x, labels), (logits,))


@pytest.mark.parametrize("method", ["forward", "elementwise"])
def test_second_derivative_is_refused(loss: ElementwiseLoss, method: str) -> None:
    """The gradient is computed forward: asking for its derivative raises, and is not 0."""
    logits, labels = scene(5, 3)
    logits.requires_grad_()
    value = getattr(loss, method)(logits, labels).sum()
    for result in (value, value.square()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(result, logits, create_graph=True, retain_graph=True)


def test_no_gradient_wanted(loss: ElementwiseLoss) -> None:
    logits, labels = scene(30, 4)
    value, _ = value_and_gradient(loss, logits, labels)
    frozen = loss(logits, labels)
    assert not frozen.requires_grad
    assert torch.equal(frozen, value)
    with torch.no_grad():
        assert torch.equal(loss(logits.requires_grad_(), labels), value)


def test_losses_keep_no_state(loss: ElementwiseLoss) -> None:
    before = copy.deepcopy(loss.__dict__)
    logits, labels = scene(30, 4)
    first = loss(logits, labels)
    assert torch.equal(loss(logits, labels), first)
    assert list(loss.parameters()) == []
    assert list(loss.buffers()) == []
    assert loss.state_dict() == {}
    assert loss.__dict__ == before
    assert torch.equal(loss.eval()(logits, labels), first)
    loss.train()


@pytest.mark.parametrize("method", ["forward", "elementwise"])
@pytest.mark.parametrize("label", [-2, 5, 80, -100])
def test_labels_out_of_range(loss: ElementwiseLoss, method: str, label: int) -> None:
    labels = torch.tensor([0, 4, -1, label])
    with pytest.raises(ValueError, match=rf"labels must lie in -1\.\.4 .*got {label}$"):
        getattr(loss, method)(torch.zeros(4, 4), labels)


@pytest.mark.parametrize("method", ["forward", "elementwise"])
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64), r"\(4,\), got \(5,\)"),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64), r"\(4,\), got \(4, 3\)"),
        (torch.zeros(2, 4, 3), torch.zeros(8, dtype=torch.int64), r"\(2, 4\), got \(8,\)"),
        (torch.zeros(4, 3), torch.zeros(4), r"integers.*float32"),
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool), r"integers.*bool"),
        (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), r"float.*int64"),
        (torch.zeros(4, 0), torch.zeros(4, dtype=torch.int64), r"K >= 1, got \(4, 0\)"),
        (torch.tensor(0.0), torch.tensor(0), r"\(\.\.\., K\).*got \(\)"),
    ],
)
def test_inputs_that_do_not_fit(
    loss: ElementwiseLoss, method: str, logits: Tensor, labels: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(loss, method)(logits, labels)


def test_sums_per_image_over_levels(loss: ElementwiseLoss) -> None:
    """Three levels of two images equal their concatenation; `foreground` is the y = +1 terms."""
    k = 4
    shapes = [(2, 5, 4, 3), (2, 2, 2, 3), (2, 0, 1, 3)]
    levels = [scene(int(torch.tensor(s).prod()), k, seed=i) for i, s in enumerate(shapes)]
    logits = [x.view(*s, k).requires_grad_() for (x, _), s in zip(levels, shapes, strict=True)]
    labels = [y.view(s) for (_, y), s in zip(levels, shapes, strict=True)]
    sums = loss.per_image(logits, labels)
    assert sums.total.shape == sums.foreground.shape == (2,)
    assert not sums.foreground.requires_grad
    joined_logits = torch.cat([x.detach().reshape(2, -1, k) for x in logits], dim=1)
    joined_labels = torch.cat([y.reshape(2, -1) for y in labels], dim=1)
    for image in range(2):
        expected = loss(joined_logits[image], joined_labels[image])
        torch.testing.assert_close(sums.total[image].detach(), expected, rtol=1e-5, atol=0)
        each = loss.elementwise(joined_logits[image], joined_labels[image])
        is_own = torch.arange(k) == joined_labels[image].unsqueeze(-1)
        assert is_own.any()
        torch.testing.assert_close(
            sums.foreground[image], each[is_own].sum(), rtol=1e-5, atol=1e-30
        )
    weights = torch.tensor([2.0, -0.5])
    grads = torch.autograd.grad((sums.total * weights).sum(), logits)
    _, joined_grad = value_and_gradient(loss, joined_logits, joined_labels)
    torch.testing.assert_close(
        torch.cat([g.reshape(2, -1, k) for g in grads], dim=1),
        joined_grad * weights.view(2, 1, 1),
        rtol=1e-5,
        atol=1e-38,
    )
