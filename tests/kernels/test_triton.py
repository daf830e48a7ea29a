"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter.

The interpreter is slow, so shapes are small. What only a GPU would show is compiled for one here,
which needs none: see `test_the_kernels_compile_for_a_gpu`.
"""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from focal_det.kernels import Terms, blocks, sum_levels, sum_terms, sum_terms_per_anchor, sums
from focal_det.losses import (
    BalancedCrossEntropyLoss,
    CrossEntropyLoss,
    ElementwiseLoss,
    FocalLoss,
    FocalLossStar,
    HingeLoss,
    reference,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
from loss_cases import Case, affine, assert_close, reference_terms, scene

triton = pytest.importorskip("triton")
translate = importlib.import_module("focal_det.kernels.translate")
kernels = importlib.import_module("focal_det.kernels.triton_kernels")
matching = importlib.import_module("focal_det.kernels.triton_match")

# The interpreter's NumPy speaks of what a GPU does silently.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
WEIGHTS = torch.tensor([0.5, 1.5], device=DEVICE)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# The kernels' exponential rounds `x / log(2)` first.
CASES = [
    Case(CrossEntropyLoss(), reference.cross_entropy, affine(0.5)),
    Case(BalancedCrossEntropyLoss(), reference.balanced_cross_entropy, affine(0.5)),
    Case(FocalLoss(), reference.focal, affine(2.0)),
    Case(FocalLoss(None, 0.5), lambda x, y: reference.focal(x, y, None, 0.5), affine(0.5)),
    Case(FocalLossStar(), reference.focal_star, affine(2.0, 1.0)),
    Case(HingeLoss(), reference.hinge, absolute=4.0),
]


class PolyFocalLoss(ElementwiseLoss):
    """The README's loss of a user's own: only a value is stated."""

    def __init__(self, gamma: float = 2.0, epsilon: float = -1.0) -> None:
        super().__init__()
        self.gamma, self.epsilon = gamma, epsilon

    def value(self, x_t: Tensor, foreground: bool) -> Tensor:
        log_q = -F.softplus(x_t)
        focal = (self.gamma * log_q).exp() * F.softplus(-x_t)
        return focal + self.epsilon * ((self.gamma + 1) * log_q).exp()


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits of `shape` (N, ..., K) and labels with every kind of anchor."""
    logits, labels = scene(math.prod(shape[:-1]), shape[-1], seed=7)
    return logits.to(DEVICE, dtype).view(shape), labels.to(DEVICE).view(shape[:-1])


def gradient_of(
    terms: Terms, logits: Tensor, labels: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, foreground and gradient by the kernel."""
    kernels.prepare(terms, logits)
    leaf = logits.detach().requires_grad_()
    result = sum_terms(terms, leaf, labels, weights, "triton")
    (grad,) = torch.autograd.grad(result.total.sum(), leaf)
    return result.total.detach(), result.foreground, grad


def assert_gradient(grad: Tensor, expected: Tensor, case: Case, logits: Tensor) -> None:
    """As `assert_close`, but a bfloat16 gradient may be off by a unit in the last place.

    The interpreter truncates where it stores bfloat16; a GPU rounds to nearest.
    """
    if grad.dtype == torch.bfloat16:
        up, down = (
            grad.view(torch.int16).add(step).view(torch.bfloat16).double() for step in (1, -1)
        )
        low, high = torch.minimum(up, down), torch.maximum(up, down)
        expected = expected.to(low.device)
        grad = torch.where(grad == 0, grad.double(), expected.clamp(low, high)).bfloat16()
    assert_close(grad.cpu(), expected.cpu(), case, logits.cpu())


def check(case: Case, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
    """Sums, gradient and sums per anchor against the scalar reference."""
    value, slope = reference_terms(case.term, logits.detach(), labels)
    factors = torch.ones(len(logits)) if weights is None else weights.cpu()
    factors = factors.double().view(-1, *[1] * labels.dim())
    total, foreground, grad = gradient_of(case.loss.terms(), logits, labels, weights)
    assert grad.shape == logits.shape
    assert grad.dtype == logits.dtype
    assert total.dtype == foreground.dtype == torch.float32
    assert_gradient(grad, slope * factors, case, logits.detach())
    num_classes = logits.shape[-1]
    is_own = labels.cpu().unsqueeze(-1) == torch.arange(num_classes)
    units = 12 + float(2 * case.exponent(logits.double()).max()) if logits.numel() else 0
    close = {"rtol": EPS * units, "check_dtype": False}
    absolute = EPS * (case.absolute * num_classes + 1e-30)
    weighted = (value * factors).flatten(1)
    size = weighted.shape[1]
    torch.testing.assert_close(total.cpu(), weighted.sum(1), atol=absolute * size, **close)
    own = (weighted * is_own.flatten(1)).sum(1)
    torch.testing.assert_close(foreground.cpu(), own, atol=absolute * size, **close)
    anchors = sum_terms_per_anchor(case.loss.terms(), logits, labels, "triton")
    torch.testing.assert_close(anchors.cpu(), value.sum(-1), atol=absolute, **close)
    assert not anchors[labels < 0].any()


# Losses, dtypes, layouts.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_loss_is_that_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    """With weights, ignored anchors, and logits from 0 to 1e4."""
    logits, labels = inputs(2, 13, 3, dtype=dtype)
    logits[0, :3] = torch.tensor([[0.0], [1e4], [-1e4]])
    logits[1, :4] = torch.tensor([[100.0], [-100], [44], [-87]])
    labels[0, :3], labels[1, :4] = 0, torch.tensor([3, 0, 1, 3])
    check(case, logits, labels, WEIGHTS)


@pytest.mark.parametrize("num_classes", [1, 3, 80, 1203])
@pytest.mark.parametrize("classes_last", [False, True])
def test_any_number_of_classes(num_classes: int, classes_last: bool) -> None:
    images, anchors = (1, 1) if num_classes > 1000 else (2, 2)  # as few as the interpreter's time
    head = inputs(images, anchors * num_classes, 1, 3)[0]
    if classes_last:
        head = head.to(memory_format=torch.channels_last)
    logits = head.unflatten(1, (anchors, num_classes)).permute(0, 3, 4, 1, 2)
    check(CASES[2], logits, inputs(*logits.shape)[1])


def test_a_value_alone_is_differentiated() -> None:
    """The error is at most that of autograd in float32, and a few roundings."""
    terms = PolyFocalLoss().terms()
    logits, labels = inputs(2, 31, 3)
    total, foreground, grad = gradient_of(terms, logits, labels, WEIGHTS)
    results = {}
    for dtype in (torch.float32, torch.float64):
        x = logits.to(dtype).requires_grad_()
        result = sum_terms(terms, x, labels, WEIGHTS, "eager")
        (slope,) = torch.autograd.grad(result.total.sum(), x)
        results[dtype] = [x.detach().double() for x in (*result, slope)]
    for actual, eager, truth in zip((total, foreground, grad), *results.values(), strict=True):
        error = (actual.double() - truth).abs().max()
        assert error <= (eager - truth).abs().max() + 8 * EPS * truth.abs().max()


def head_view() -> Tensor:
    """(N, A K, H, W) read as (N, H, W, A, K)."""
    return inputs(2, 3 * 4, 2, 5)[0].unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2)


def channels_last() -> Tensor:
    head = inputs(2, 3 * 4, 2, 5)[0].to(memory_format=torch.channels_last)
    return head.unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "head": head_view,
    "channels last": channels_last,
    "flat": lambda: inputs(2, 30, 4)[0],
    "every other anchor": lambda: inputs(2, 30, 4)[0][:, ::2],
    "every other class": lambda: inputs(2, 15, 8)[0][..., ::2],
    "part of the images": lambda: inputs(4, 15, 4)[0][1:3],
    "reversed dimensions": lambda: inputs(4, 5, 3, 2)[0].permute(3, 2, 1, 0),
    "images inside": lambda: inputs(15, 2, 4)[0].transpose(0, 1),
    "expanded": lambda: inputs(2, 1, 4)[0].expand(2, 15, 4),
    "expanded classes": lambda: inputs(2, 15, 1)[0].expand(2, 15, 4),
    "three that do not merge": lambda: inputs(2, 2, 4, 11, 4)[0][:, :, :3, ::2],
    "six dimensions": lambda: inputs(2, 2, 3, 1, 2, 3, 4)[0],
    "six that do not merge": lambda: inputs(2, 4, 4, 3, 4, 3, 4)[0][:, ::2, ::2, ::2, ::2, ::2],
    "no anchor dimension": lambda: inputs(5, 4)[0],
}


@pytest.mark.parametrize("part_of_all_levels", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, part_of_all_levels: bool) -> None:
    """The labels may be a slice of those of all levels, (N, R)."""
    logits = LAYOUTS[layout]()
    labels = inputs(*logits.shape)[1]
    if part_of_all_levels:
        rows = labels.reshape(len(labels), -1)
        rows = torch.cat([rows[:, :2], rows, rows], dim=1)[:, 2 : 2 + rows.shape[1]]
        labels = rows.view(labels.shape)
    check(CASES[2], logits, labels)


@pytest.mark.parametrize("layout", ["head", "channels last", "every other class"])
def test_offsets_that_need_64_bits(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_span", lambda logits: 2**31)
    logits = LAYOUTS[layout]()
    check(CASES[2], logits, inputs(*logits.shape)[1], WEIGHTS)


@pytest.mark.parametrize("order", [(0, 2, 1), (2, 1, 0)])
def test_labels_of_another_order(order: tuple[int, ...]) -> None:
    logits, labels = inputs(3, 4, 3, 5)
    if order[0] == 0:
        labels = inputs(3, 3, 4, 5)[1]
    check(CASES[0], logits, labels.permute(order))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_small_integer_labels(dtype: torch.dtype) -> None:
    logits, labels = inputs(2, 9, 100)
    for x, y in zip(
        gradient_of(CASES[2].loss.terms(), logits, labels.to(dtype)),
        gradient_of(CASES[2].loss.terms(), logits, labels),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (0, 0, 3), (1, 2, 0, 3)], ids=str)
def test_nothing_to_sum_is_zero(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, device=DEVICE)
    labels = torch.zeros(shape[:-1], dtype=torch.int64, device=DEVICE)
    total, foreground, grad = gradient_of(FocalLoss().terms(), logits, labels)
    assert total.tolist() == foreground.tolist() == [0.0] * shape[0]
    assert grad.shape == shape
    anchors = sum_terms_per_anchor(FocalLoss().terms(), logits, labels, "triton")
    assert anchors.shape == shape[:-1]


@pytest.mark.parametrize("label", [-1, 4])
def test_all_anchors_of_one_kind(label: int) -> None:
    logits, labels = inputs(2, 9, 4)
    check(CASES[2], logits, torch.full_like(labels, label))


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("layout", ["head", "channels last", "flat", "images inside"])
def test_more_than_one_tile(layout: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILE_TERMS", tile)
    logits = LAYOUTS[layout]()
    check(CASES[2], logits, inputs(*logits.shape)[1], WEIGHTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_of_the_gradient_is_written(layout: str) -> None:
    """Those of ignored anchors, too; and nothing beside them."""
    terms = FocalLoss().terms()
    logits = LAYOUTS[layout]()
    labels = inputs(*logits.shape)[1]
    labels.view(-1)[0] = -1
    weights = torch.ones(len(logits), device=DEVICE)
    kernels.prepare(terms, logits)
    grad = torch.full_like(logits, torch.nan)
    kernels.sum_into(terms, [logits], [labels], weights, [grad])
    assert grad.isfinite().all()
    around = torch.full((2 * logits.numel() + 64,), 7.0, device=DEVICE)
    part = around[32 : 32 + logits.numel()].view(logits.shape)
    kernels.sum_into(terms, [logits], [labels], weights, [part])
    assert torch.equal(part, grad)
    assert (around[:32] == 7).all()
    assert (around[32 + logits.numel() :] == 7).all()


def test_equal_inputs_give_equal_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILE_TERMS", 32)
    logits, labels = inputs(2, 40, 3)
    first, second = (gradient_of(FocalLoss().terms(), logits, labels) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_are_summed_together(dtype: torch.dtype) -> None:
    """Of any layouts, one without anchors and one that the kernel has to copy among them."""
    layouts = ("head", "six that do not merge", "flat", "every other anchor")
    logits = [LAYOUTS[name]().to(dtype) for name in layouts]
    logits.insert(1, torch.zeros(2, 0, 4, device=DEVICE, dtype=dtype))
    labels = [inputs(*x.shape)[1] if x.numel() else x[..., 0].long() for x in logits]
    results = {}
    for impl in ("triton", "torch"):
        leaves = [x.detach().requires_grad_() for x in logits]
        found = sum_levels(FocalLoss().terms(), leaves, labels, WEIGHTS, impl)
        grads = torch.autograd.grad(found.total[0] + 3 * found.total[1], leaves)
        results[impl] = [found.total, found.foreground, *grads]
    unit = torch.finfo(dtype).eps
    for one, other in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=max(1e-5, 2 * unit), atol=1e-7)
    alone = [
        sum_terms(FocalLoss().terms(), x, y, WEIGHTS, "triton")
        for x, y in zip(logits, labels, strict=True)
    ]
    expected = torch.stack([each.total for each in alone]).sum(0)
    torch.testing.assert_close(results["triton"][0], expected, rtol=1e-6, atol=0)


# Scaling in the backward pass.

GRADIENTS: dict[str, Callable[[], Tensor]] = {
    "flat": lambda: inputs(2, 15, 4)[0],
    "head": head_view,
    "channels last": channels_last,
    "images inside": LAYOUTS["images inside"],
    "gaps": LAYOUTS["every other anchor"],
    "gaps between images": lambda: inputs(2, 15, 4)[0][:, :10],
    "one image": lambda: inputs(1, 700, 4)[0],
    "empty": lambda: torch.zeros(2, 0, 4, device=DEVICE),
    "no image": lambda: torch.zeros(0, 3, 4, device=DEVICE),
}


@pytest.mark.parametrize("factors", [[1.0, 1.0], [1.0, -0.5], [0.0, 65536.0]], ids=str)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("layout", GRADIENTS)
def test_scale(layout: str, in_place: bool, factors: list[float]) -> None:
    grad = GRADIENTS[layout]()
    before = grad.clone()
    factor = torch.tensor(factors, device=DEVICE)[: len(grad)]
    expected = before * factor.view(-1, *[1] * (grad.dim() - 1))
    # As the sum's backward passes it on: one number, expanded.
    given = factor[:1].expand(len(grad)) if factors[0] == factors[-1] else factor
    result = kernels.scale(grad, given, in_place)
    assert torch.equal(result, expected)
    assert torch.equal(grad, expected if in_place else before)
    if grad.numel():
        assert (result.data_ptr() == grad.data_ptr()) == in_place


def test_scale_rounds_a_bfloat16_gradient_once() -> None:
    grad = inputs(2, 30, 4, dtype=torch.bfloat16)[0]
    factor = torch.tensor([0.3, 1.0], device=DEVICE)
    result = kernels.scale(grad, factor, in_place=False)
    exact = grad.double() * factor.view(2, 1, 1)
    # A whole unit in the last place: the interpreter truncates.
    torch.testing.assert_close(result.double(), exact, rtol=2**-7, atol=0)
    assert torch.equal(result[1], grad[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kept_graph_gives_right_gradients_again(dtype: torch.dtype) -> None:
    logits, labels = inputs(2, 9, 4, dtype=dtype)
    expected = gradient_of(FocalLoss().terms(), logits.float(), labels)[2]
    total = sum_terms(FocalLoss().terms(), logits.requires_grad_(), labels, impl="triton").total
    calls = [[1.0, 1.0], [2.0, -3.0], [0.5, 0.5]]
    grads = []
    for factors in calls:
        incoming = torch.tensor(factors, device=DEVICE)
        keep = len(grads) < len(calls) - 1
        grads += torch.autograd.grad(total, logits, incoming, retain_graph=keep)
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    for grad, factors in zip(grads, calls, strict=True):
        scaled = expected * torch.tensor(factors, device=DEVICE).view(2, 1, 1)
        torch.testing.assert_close(grad.float(), scaled, rtol=rtol, atol=1.2e-7)


# The translation.

aten = torch.ops.aten
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "add": lambda x: torch.add(x, x.exp(), alpha=3) + 0.25,
    "alias": aten.alias,
    "bitwise_and": lambda x: ((x > -1) & (x < 1)) * x,
    "bitwise_not": lambda x: ~(x > 0) * x,
    "bitwise_or": lambda x: ((x < -1) | (x > 1)) * x,
    "clamp": lambda x: x.clamp(-1, 0.5),
    "clamp low": lambda x: x.clamp(min=-0.5).exp(),
    "clamp_max": lambda x: x * aten.clamp_max(x.detach(), 0.5),
    "clamp_min": lambda x: x * aten.clamp_min(x.detach(), 0.5),
    "clone": torch.clone,
    "constant": lambda x: x * torch.full_like(x, 2.0).log() - torch.ones_like(x).exp(),
    "cos": torch.cos,
    "detach": lambda x: x.detach() * x,
    "div": lambda x: (x / (x.abs() + 1)) / 3,
    "eq": lambda x: (x.sign() == 1) * x,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "full": lambda x: x * torch.full(x.shape, 1.5, device=x.device),
    "full_like": lambda x: x * torch.full_like(x, -1.5),
    "ge": lambda x: (x >= 0.25) * x,
    "gt": lambda x: (x > 0.25) * x,
    "in place": lambda x: (x + 4).mul_(2).log() * (x.detach() / 2).exp_().masked_fill_(x > 1, 3),
    "inf": lambda x: torch.where(x > 0, x, math.inf).clamp(max=3) + x.clamp(min=-math.inf),
    "le": lambda x: (x <= 0.25) * x,
    "log": lambda x: (x.abs() + 0.1).log(),
    "log1p": lambda x: x.abs().log1p(),
    "logical_and": lambda x: torch.logical_and(x > -1, x < 1) * x,
    "logical_not": lambda x: torch.logical_not(x > 0) * x,
    "logical_or": lambda x: torch.logical_or(x < -1, x > 1) * x,
    "lt": lambda x: (x < 0.25) * x,
    "mask arithmetic": lambda x: ((x > 0) + (x > 1).float() - 1) * x + (1 - (x < 0).float()) / 2,
    "mask of masks": lambda x: torch.where(x > 0, x > 1, x < -1) * x,
    "masked_fill": lambda x: x.masked_fill(x > 0, 2.0) * x,
    "maximum": lambda x: torch.maximum(x, x.square() - 1),
    "maximum of a constant": lambda x: torch.maximum(x, torch.full_like(x, 0.5)),
    "minimum": lambda x: torch.minimum(x, x.square() - 1),
    "mul": lambda x: 3 * x * x.exp(),
    "ne": lambda x: (x.sign() != 1) * x,
    "neg": lambda x: -x,
    "pow": lambda x: x**3 + x**2 + x**4 + x**1,
    "pow 0": lambda x: x**0 + x,
    "pow 5": lambda x: x**5,
    "pow -1": lambda x: x**-1,
    "pow -2": lambda x: x**-2,
    "pow fraction": lambda x: x.abs() ** 1.7 + (x.abs() + 0.1) ** 0.5,
    "pow of a number": lambda x: 2**x,
    "pow of tensors": lambda x: (x.abs() + 0.1) ** x,
    "reciprocal": torch.reciprocal,
    "relu": torch.relu,
    "rsqrt": lambda x: (x.abs() + 0.1).rsqrt(),
    "scalar_tensor": lambda x: torch.where(x > 0, 2.0, x) * x,
    "sigmoid": torch.sigmoid,
    "sign": lambda x: x.sign() * x,
    "sin": torch.sin,
    "sqrt": lambda x: (x.abs() + 0.1).sqrt(),
    "sub": lambda x: 1 - torch.sub(x, x.exp(), alpha=2),
    "tanh": torch.tanh,
    "where": lambda x: torch.where(x > 0.5, x.exp(), x),
    "_to_copy": lambda x: (x > 0).to(torch.float32) * x,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "logaddexp": lambda x: torch.logaddexp(x, -2 * x),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none"),
    "mish": F.mish,
}


class FormulaLoss(ElementwiseLoss):
    """A named formula: its value and its derivative are each a side's derivative of the sum."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def value(self, x_t: Tensor, foreground: bool) -> Tensor:
        return FORMULAS[self.name](x_t)

    def value_and_slope(self, z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        value, slope = super().value_and_slope(z, foreground)
        return (value, -value) if foreground else (-slope, -slope)


@pytest.mark.parametrize("name", FORMULAS)
def test_operations_are_translated(name: str) -> None:
    """Value and derivative of each number by one launch: foreground gives one, background one."""
    numbers = torch.cat([torch.linspace(-3, 3, 26), torch.tensor([1e-6, -1e-6, 1.0, -1.0, 0.0])])
    if name in ("pow -1", "pow -2", "reciprocal", "pow of tensors"):
        numbers = numbers[numbers.abs() > 1e-3]
    logits = torch.stack([numbers, -numbers]).unsqueeze(-1).to(DEVICE)
    labels = torch.tensor([[0], [1]], device=DEVICE).expand(2, len(numbers))
    loss = FormulaLoss(name)
    grad = gradient_of(loss.terms(), logits, labels)[2].squeeze(-1).cpu()
    x = numbers.double().requires_grad_()
    value = FORMULAS[name](x)
    slope = torch.zeros_like(x)
    if value.requires_grad:
        (slope,) = torch.autograd.grad(value, x, torch.ones_like(x))
    close = {"rtol": 2e-6, "atol": 5e-7, "check_dtype": False}
    torch.testing.assert_close(grad[0], value.detach(), **close)
    torch.testing.assert_close(grad[1], slope, **close)


def test_every_translation_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()

    class Recorder(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            used.add(name)
            return super().__getitem__(name)

    monkeypatch.setattr(translate, "EXPRESSIONS", Recorder(translate.EXPRESSIONS))
    for formula in FORMULAS.values():
        terms = Terms(lambda x_t, foreground, formula=formula: (formula(x_t), x_t), None)
        translate._statements(terms, True)
    assert set(translate.EXPRESSIONS) - used == set()


@pytest.mark.parametrize("name", ["log1p", "expm1", "tanh"])
def test_helpers_are_accurate_to_four_roundings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all magnitudes, with a relative error; a GPU's `exp` and `log` are approximate.

    The exponential rounds `x / log(2)` first: half a rounding more for each unit of `x`.
    """
    magnitudes = torch.cat([10.0 ** torch.linspace(-30, 1.5, 300), torch.linspace(0.2, 0.3, 100)])
    below = magnitudes[magnitudes < 0.99] if name == "log1p" else magnitudes
    numbers = torch.cat([magnitudes, -below, torch.zeros(1)])
    monkeypatch.setitem(FORMULAS, f"torch.{name}", getattr(torch, name))
    logits = numbers.view(1, -1, 1).to(DEVICE)
    labels = torch.zeros(1, len(numbers), dtype=torch.int64, device=DEVICE)
    grad = gradient_of(FormulaLoss(f"torch.{name}").terms(), logits, labels)[2].flatten().cpu()
    roundings = 4 if DEVICE == "cpu" else 8
    exact = getattr(torch, name)(numbers.double())
    error = (grad.double() - exact).abs() / exact.abs().clamp(min=1e-38)
    growing = numbers.double().clamp(min=0) / 2 if name == "expm1" else 0.0
    assert (error <= (roundings + growing) * EPS).all(), numbers[error.argmax()]


class LogisticGradient(ElementwiseLoss):
    """Its gradient for y = +1 is ``log(1 + e^x)``, written in place."""

    def value_and_slope(self, z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        return z, -(-z).exp_().log1p_()


def test_the_logarithm_of_one_plus_an_exponential_is_accurate() -> None:
    """``log1p(exp(x))`` has a translation of its own, which neither overflows nor loses digits."""
    magnitudes = torch.cat([10.0 ** torch.linspace(-30, 2.5, 300), torch.linspace(0, 4, 400)])
    numbers = torch.cat([magnitudes, -magnitudes[magnitudes < 87]])
    logits = numbers.view(1, -1, 1).to(DEVICE)
    labels = torch.zeros(1, len(numbers), dtype=torch.int64, device=DEVICE)
    grad = gradient_of(LogisticGradient().terms(), logits, labels)[2].flatten().cpu()
    exact = torch.logaddexp(numbers.double(), torch.zeros(()).double())
    allowed = (8 + numbers.double().clamp(max=0).neg() / 2) * EPS
    assert ((grad.double() - exact).abs() <= allowed * exact).all()


class OneSided(ElementwiseLoss):
    """A number on one side, a function on the other."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def value(self, x_t: Tensor, foreground: bool) -> Tensor:
        return torch.full_like(x_t, self.number) if foreground else x_t.square()


@pytest.mark.parametrize("number", [0.0, 2.5])
def test_a_loss_may_be_constant_on_one_side(number: float) -> None:
    logits, labels = inputs(1, 9, 3)
    total, foreground, grad = gradient_of(OneSided(number).terms(), logits, labels)
    is_own = labels.unsqueeze(-1) == torch.arange(3, device=DEVICE)
    others = logits * (labels.unsqueeze(-1) >= 0) * ~is_own
    assert foreground.item() == pytest.approx(number * is_own.sum().item())
    torch.testing.assert_close(grad, 2 * others)
    torch.testing.assert_close(total, foreground + others.square().sum())


def by_values(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


UNTRANSLATED: dict[str, Callable[[Tensor], Tensor]] = {
    "no translation": torch.erfinv,
    "a sum": lambda x: x * x.sum(),
    "a division that rounds": lambda x: x // 0.5,
    "a result put elsewhere": lambda x: torch.mul(x, 2, out=torch.empty_like(x)),
    "control flow by values": by_values,
    "a tensor of its own": lambda x: x * torch.tensor(2.5, device=x.device),
    "a number on the host": lambda x: x * float(x.detach().max()),
    "an error": lambda x: x + torch.zeros(7, 11, device=x.device),
}


@pytest.mark.parametrize("name", UNTRANSLATED)
def test_what_has_no_translation_is_refused_or_left_to_torch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `auto` with one warning, which says why."""
    messages: list[str] = []
    monkeypatch.setattr(sums, "_warned", set())
    monkeypatch.setattr(sums.logger, "warning", messages.append)
    monkeypatch.setitem(FORMULAS, name, UNTRANSLATED[name])
    terms = FormulaLoss(name).terms()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no translation|cannot be traced") as error:
            sums.choose("triton", terms, inputs(1, 4, 3)[0])
        on_a_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device="cuda:0")
        assert sums.choose("auto", terms, on_a_gpu) is blocks
    assert len(messages) == 1
    assert str(error.value) in messages[0]


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "whole numbers": lambda x: x * x.int(),
    "float16": lambda x: x.half().float() * x,
    "truth of numbers": lambda x: x * torch.logical_or(x.relu(), x < -1),
    "a mask of ones": lambda x: x * (torch.ones_like(x, dtype=torch.bool) & (x > 0)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_refused_is_computed_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the launch, so that `auto` can do without Triton."""
    monkeypatch.setitem(FORMULAS, name, UNUSUAL[name])
    terms = FormulaLoss(name).terms()
    logits, labels = inputs(1, 9, 3)
    logits = logits + 1 / 3
    try:
        kernels.prepare(terms, logits)
    except RuntimeError:
        return
    total, _, grad = gradient_of(terms, logits, labels)
    expected = sum_terms(terms, logits.requires_grad_(), labels, impl="torch").total
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize(
    ("loss", "dtype", "message"),
    [
        (FocalLoss(), torch.float64, "float64"),
        (FormulaLoss(torch.ones(())), torch.float32, "holds tensors"),
    ],
    ids=["float64", "state"],
)
def test_what_the_kernels_cannot_take_is_refused(
    loss: ElementwiseLoss, dtype: torch.dtype, message: str
) -> None:
    logits, labels = inputs(1, 4, 3, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        sum_terms(loss.terms(), logits, labels, impl="triton")


def test_losses_of_other_settings_are_other_functions() -> None:
    logits, labels = inputs(1, 9, 3)
    for gamma in (2.0, 0.5, 2.0):
        total = gradient_of(FocalLoss(gamma=gamma).terms(), logits, labels)[0]
        expected = sum_terms(FocalLoss(gamma=gamma).terms(), logits, labels, impl="torch").total
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)


# Compiled for a GPU, without one, in a process of its own: see `compiled`.


def compile_for_a_gpu(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: set[str],
    last_stage: str,
    **settings: Any,
) -> str:
    """What Triton's compiler makes of a kernel for an A100.

    Args:
        types: of the arguments that are not in `constants`.
        aligned: arguments that are multiples of 16.
        last_stage: ``ttir``, ``ttgir`` or, which needs NVIDIA's assembler to be there, ``ptx``.
        settings: of the compiler.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned - set(constants)},
    )
    target = GPUTarget("cuda", 80, 32)
    backend = make_backend(target)
    options = backend.parse_options(settings)
    stages: dict[str, Callable[[Any, dict[str, Any]], Any]] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, functions, modules, context)
    metadata = {"target": target, **vars(options)}
    for name, stage in stages.items():
        module = stage(module, metadata)
        if name == last_stage:
            break
    return str(module)


def has_assembler() -> bool:
    try:
        return bool(triton.knobs.nvidia.ptxas)
    except RuntimeError:
        return False


LAST_STAGE = "ptx" if has_assembler() else "ttgir"


def compile_sum(
    loss: ElementwiseLoss, dtype: str, classes_last: bool, per_anchor: bool = False
) -> str:
    names = kernels._sum_kernel.arg_names
    block_anchors, block_classes = kernels._tile(80, *((1, 80) if classes_last else (400, 1)))
    constants: dict[str, Any] = {
        "TERMS": translate.device_function(loss.terms()),
        "HAS_GRAD": not per_anchor,
        "PER_ANCHOR": per_anchor,
        "BLOCK_ANCHORS": block_anchors,
        "BLOCK_CLASSES": block_classes,
        "WHOLE_BLOCKS": 80 % block_classes == 0,
        "CLASSES_LAST": classes_last,
        "ALIGNED": 4 if dtype == "fp32" else 8,
        "OFFSETS": triton.language.int32,
        "logit_stride_k" if classes_last else "logit_stride_2": 1,
        **dict.fromkeys(["weight_ptr", "grad_ptr"] if per_anchor else ["anchor_ptr"]),
    }
    types = {
        **dict.fromkeys(names, "i32"),
        **dict.fromkeys(["weight_ptr", "anchor_ptr", "partial_ptr"], "*fp32"),
        **dict.fromkeys(["logit_ptr", "grad_ptr"], f"*{dtype}"),
        "label_ptr": "*i64",
        "background": "fp32",
        "foreground": "fp32",
    }
    # All that Triton is told of sizes and strides is in ALIGNED.
    aligned = {n for n in names if n.endswith("_ptr")}
    return compile_for_a_gpu(kernels._sum_kernel, types, constants, aligned, LAST_STAGE)


def compile_kernels() -> dict[str, str]:
    """Each kernel as PTX; without NVIDIA's assembler, as Triton's last stage before it."""
    results = {
        f"{dtype} {layout}": compile_sum(FocalLoss(), dtype, layout == "classes last")
        for dtype in ("fp32", "bf16")
        for layout in ("classes last", "anchors last")
    }
    results["per anchor"] = compile_sum(CrossEntropyLoss(), "fp32", True, per_anchor=True)
    results["value only"] = compile_sum(PolyFocalLoss(), "fp16", False)
    types = {"grad_ptr": "*bf16", "factor_ptr": "*fp32", "size": "i32", "blocks": "i32"}
    constants = {"BLOCK": kernels.TILE_TERMS, "TILES": kernels.SCALE_TILES}
    results["scale"] = compile_for_a_gpu(
        kernels._scale_kernel, types, constants, set(types) - {"blocks"}, LAST_STAGE
    )
    return results


def compile_matching() -> dict[str, str]:
    """The kernels that match anchors, as :func:`compile_kernels` has its own."""
    results = {}
    for kernel in (matching._best_kernel, matching._is_best_kernel):
        types = dict.fromkeys(kernel.arg_names, "*fp32")
        types |= {"start_ptr": "*i64", "match_ptr": "*i64", "highest_bits_ptr": "*i32"}
        types |= {"is_best_ptr": "*i1", "num_anchors": "i32", "num_boxes": "i32"}
        constants = {"BLOCK": matching.BLOCK_ANCHORS}
        results[kernel.__name__] = compile_for_a_gpu(
            kernel, types, constants, set(), LAST_STAGE, enable_fp_fusion=False
        )
    return results


def compile_formulas() -> dict[str, str]:
    """Each formula in Triton's own representation, or why it has none."""

    @triton.jit
    def kernel(pointer, TERMS: triton.language.constexpr):
        pointers = pointer + triton.language.arange(0, 32)
        x = triton.language.load(pointers)
        value, slope = TERMS(x, True)
        other_value, other_slope = TERMS(x, False)
        triton.language.store(pointers, value + slope + other_value + other_slope)

    results = {}
    for name in FORMULAS:
        try:
            constants = {"TERMS": translate.device_function(FormulaLoss(name).terms())}
            types = {"pointer": "*fp32"}
            results[name] = compile_for_a_gpu(kernel, types, constants, set(), "ttir")
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


def print_compiled() -> None:
    compiled = {"kernels": compile_kernels(), "formulas": compile_formulas()}
    print(json.dumps({**compiled, "matching": compile_matching()}))


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, str]]:
    """What `print_compiled` prints in a process where Triton compiles."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import test_triton; test_triton.print_compiled()"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    result: dict[str, dict[str, str]] = json.loads(process.stdout.splitlines()[-1])
    return result


def test_the_kernels_compile_for_a_gpu_and_move_four_numbers_at_once(
    compiled: dict[str, dict[str, str]],
) -> None:
    for name, code in compiled["kernels"].items():
        if LAST_STAGE == "ptx":
            assert ".visible .entry" in code, name
            # 16 bytes, or four numbers of 16 bits.
            four = "v4.b32" if name.startswith("fp32") or name == "per anchor" else "v[24].b32"
            assert re.search(rf"ld\.global\.{four}", code), name
            assert name == "per anchor" or re.search(rf"st\.global\.{four}", code), name
        else:
            assert "tt.load" in code, name
            assert "sizePerThread = [1, 4]" in code or "sizePerThread = [4" in code, name


def test_the_matching_compiles_for_a_gpu_without_fused_operations(
    compiled: dict[str, dict[str, str]],
) -> None:
    """A multiplication and an addition in one would round once where Detectron2 rounds twice."""
    assert len(compiled["matching"]) == 2
    for name, code in compiled["matching"].items():
        assert (".visible .entry" if LAST_STAGE == "ptx" else "tt.load") in code, name
        assert "fma" not in code, name


def test_all_translations_compile_for_a_gpu(compiled: dict[str, dict[str, str]]) -> None:
    refused = {name: x for name, x in compiled["formulas"].items() if "tt.store" not in x}
    assert refused == {}


class Aliases(ElementwiseLoss):
    """Changes a tensor in place through another name of it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def value_and_slope(self, z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        value = z.exp()
        slope = value.detach() if self.way == "detach" else value[...]
        slope.mul_(2)
        return value, slope


@pytest.mark.parametrize("way", ["detach", "all of it"])
def test_a_change_in_place_is_seen_under_all_names(way: str) -> None:
    logits, labels = inputs(1, 9, 3)
    terms = Aliases(way).terms()
    total, _, grad = gradient_of(terms, logits, labels)
    expected = sum_terms(terms, logits.detach().requires_grad_(), labels, impl="torch")
    torch.testing.assert_close(total, expected.total.detach(), rtol=1e-5, atol=0)
    assert grad is not None


def test_a_first_use_in_inference_mode_leaves_the_derivative_alone() -> None:
    class Fresh(ElementwiseLoss):
        def value(self, x_t: Tensor, foreground: bool) -> Tensor:
            return torch.sigmoid(-1.25 * x_t)

    loss = Fresh().use("triton")
    logits, labels = torch.randn(9, 3, device=DEVICE), torch.randint(-1, 4, (9,), device=DEVICE)
    with torch.inference_mode():
        loss(logits, labels)
    grads = []
    for impl in ("triton", "torch"):
        x = logits.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss.use(impl)(x, labels), x)[0])
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_labels_that_do_not_merge_are_copied() -> None:
    labels = torch.randint(-1, 5, (2, 5, 2, 7, 3), device=DEVICE).permute(0, 4, 3, 2, 1)
    logits = torch.randn(*labels.shape, 4, device=DEVICE, requires_grad=True)
    totals = [FocalLoss().use(impl)(logits, labels) for impl in ("triton", "torch")]
    torch.testing.assert_close(*totals, rtol=1e-5, atol=0)


def test_what_cannot_be_built_falls_back_under_auto_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine with a GPU and without a C compiler, say."""

    def no_compiler(terms: Terms, logits: Tensor) -> None:
        raise OSError("no C compiler")

    monkeypatch.setattr(kernels, "_try", no_compiler)
    terms = FocalLoss(gamma=3.75).terms()
    logits = torch.zeros(1, 1, 1, device=DEVICE)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no C compiler"):
            kernels.prepare(terms, logits)
