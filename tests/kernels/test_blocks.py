"""The blocked pass over the terms: its cuts, its two sums and the dtype of its gradient."""

import math

import pytest
import torch
from torch import Tensor

from focal_det.kernels import Terms, blocks, elementwise_terms, sum_terms, sum_terms_per_anchor


@pytest.fixture(params=[True, False], ids=["picked", "dense"], autouse=True)
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a CPU, and that of a GPU."""
    monkeypatch.setattr(blocks, "_can_pick", lambda device: request.param)


def weigh(z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
    """A loss whose sums are easy to tell apart: x^2 for background, 100 + 3 x for foreground."""
    if foreground:
        return 100 - 3 * z, torch.full_like(z, -3.0)
    return z**2, 2 * z


WEIGH = Terms(weigh, lambda x_t, foreground: weigh(-x_t, foreground)[0])


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    """Logits of `shape` (..., K), labels with every kind of anchor."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    labels = torch.randint(-1, shape[-1] + 1, shape[:-1], generator=generator)
    return logits, labels


def by_loop(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and derivative of every term, and whether it is an anchor's own class."""
    value, slope = torch.zeros_like(logits), torch.zeros_like(logits)
    own = torch.zeros_like(logits, dtype=torch.bool)
    num_classes = logits.shape[-1]
    rows = (x.view(-1, num_classes) for x in (logits, value, slope, own))
    for x, v, s, o, label in zip(*rows, labels.flatten().tolist(), strict=True):
        for k in range(num_classes):
            if label == k:
                v[k], s[k], o[k] = 100 + 3 * x[k], 3.0, True
            elif label >= 0:
                v[k], s[k] = x[k] ** 2, 2 * x[k]
    return value, slope, own


SHAPES = [(1, 1, 1), (2, 7, 3), (1, 23, 5), (3, 2, 5, 3, 4), (5, 1, 1, 1, 2), (4, 6)]


@pytest.mark.parametrize("block_terms", [1, 2, 3, 5, 16, 31, 60, 61, 1 << 18])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuts_change_nothing(
    shape: tuple[int, ...], block_terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also blocks smaller than one anchor's classes, which stay whole."""
    monkeypatch.setitem(blocks.BLOCK_TERMS, "cpu", block_terms)
    logits, labels = inputs(*shape)
    value, slope, own = by_loop(logits, labels)
    logits.requires_grad_()
    total, foreground = sum_terms(WEIGH, logits, labels)
    torch.testing.assert_close(total.detach(), value.flatten(1).sum(1))
    torch.testing.assert_close(foreground, (value * own).flatten(1).sum(1))
    (grad,) = torch.autograd.grad(total.sum(), logits)
    torch.testing.assert_close(grad, slope, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum_terms_per_anchor(WEIGH, logits, labels), value.sum(-1))


@pytest.mark.parametrize("block_terms", [1, 4, 10, 40, 1000])
@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (0, 2, 3, 1), (3, 2, 1, 0)]
)
def test_blocks_tile_the_tensor(
    block_terms: int, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every anchor is in exactly one block, and no block has more terms than asked for."""
    monkeypatch.setitem(blocks.BLOCK_TERMS, "cpu", block_terms)
    logits = torch.zeros(2, 5, 7, 4).permute(order)
    seen = torch.zeros(logits.shape[:-1])
    for part, count, none in blocks.blocks(logits, seen, None):
        assert none is None
        assert part.shape[:-1] == count.shape
        assert part.numel() <= max(block_terms, logits.shape[-1])
        count.add_(1)
    assert (seen == 1).all()


def test_blocks_are_as_large_as_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 anchors of 4 classes in blocks of 400 terms are 10 blocks, not more."""
    monkeypatch.setitem(blocks.BLOCK_TERMS, "cpu", 400)
    assert len(list(blocks.blocks(torch.zeros(1, 1000, 4)))) == 10


def test_a_block_lies_together_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """(1, A K, H, W) read as (1, H, W, A, K) is cut along A (dimension 3), its largest stride."""
    monkeypatch.setitem(blocks.BLOCK_TERMS, "cpu", 4 * 5 * 6)
    view = torch.zeros(1, 3, 4, 5, 6).permute(0, 3, 4, 1, 2)
    parts = [part for (part,) in blocks.blocks(view)]
    assert [part.shape for part in parts] == [(1, 5, 6, 1, 4)] * 3
    assert [part.storage_offset() for part in parts] == [0, 120, 240]


def test_no_block_is_a_small_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 anchors in blocks of at most 30 are four times 25, not three times 30 and 10."""
    monkeypatch.setitem(blocks.BLOCK_TERMS, "cpu", 30 * 4)
    parts = [part for (part,) in blocks.blocks(torch.zeros(1, 100, 4))]
    assert [part.shape[1] for part in parts] == [25] * 4


def test_blocks_are_a_small_part_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large a block may be, 800 terms are cut into 48, but not into crumbs."""
    monkeypatch.setitem(blocks.BLOCK_TERMS, "cpu", 1 << 20)
    monkeypatch.setattr(blocks, "SMALLEST_BLOCK", 1)
    assert len(list(blocks.blocks(torch.zeros(1, 200, 4)))) == 50  # of 16 terms
    monkeypatch.setattr(blocks, "SMALLEST_BLOCK", 100)
    assert len(list(blocks.blocks(torch.zeros(1, 200, 4)))) == 8
    monkeypatch.setattr(blocks, "SMALLEST_BLOCK", 400)
    assert len(list(blocks.blocks(torch.zeros(1, 200, 4)))) == 2


def test_no_temporary_of_the_size_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss sees a block, or the one term of each anchor that may have y = +1."""
    monkeypatch.setitem(blocks.BLOCK_TERMS, "cpu", 64)
    largest = {True: 0, False: 0}

    def watch(z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        largest[foreground] = max(largest[foreground], z.numel())
        return weigh(z, foreground)

    logits, labels = inputs(2, 50, 8)
    labels.clamp_(min=7)  # few are foreground
    for run in (sum_terms, sum_terms_per_anchor):
        largest.update({True: 0, False: 0})
        run(Terms(watch, None), logits, labels)
        assert 0 < largest[True] <= 2 * 50
        assert largest[False] <= max(64, 8 * int((labels == 7).sum()))


def test_gradient_of_a_weighted_sum_of_images() -> None:
    logits, labels = inputs(3, 4, 2)
    logits.requires_grad_()
    _, slope, _ = by_loop(logits.detach(), labels)
    weights = torch.tensor([0.5, -2.0, 0.0])
    (grad,) = torch.autograd.grad((sum_terms(WEIGH, logits, labels).total * weights).sum(), logits)
    torch.testing.assert_close(grad, slope * weights.view(3, 1, 1), rtol=1e-6, atol=0)


def test_elementwise_with_and_without_images() -> None:
    logits, labels = inputs(3, 4, 2)
    value, slope, _ = by_loop(logits, labels)
    torch.testing.assert_close(elementwise_terms(WEIGH, logits, labels), value)
    torch.testing.assert_close(elementwise_terms(WEIGH, logits[0], labels[0]), value[0])
    single = logits[0, 0].requires_grad_()
    (grad,) = torch.autograd.grad(elementwise_terms(WEIGH, single, labels[0, 0]).sum(), single)
    torch.testing.assert_close(grad, slope[0, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_is_given_float32_or_better(dtype: torch.dtype) -> None:
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    logits, labels = inputs(2, 9, 3)

    def typed(x: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        assert x.dtype == accurate
        assert not torch.is_autocast_cpu_enabled()
        return weigh(x, foreground)

    leaf = logits.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, foreground = sum_terms(Terms(typed, None), leaf, labels)
        each = elementwise_terms(Terms(typed, None), leaf, labels)
        anchors = sum_terms_per_anchor(Terms(typed, None), leaf, labels)
    assert {total.dtype, foreground.dtype, each.dtype, anchors.dtype} == {accurate}
    (grad,) = torch.autograd.grad(total.sum(), leaf)
    assert grad.dtype == dtype


def test_sums_of_many_blocks_do_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 blocks after a large one: a float32 running sum would round each of them off."""
    monkeypatch.setitem(blocks.BLOCK_TERMS, "cpu", 64)
    logits = torch.full((1, 4097, 64), math.sqrt(0.1))
    logits[0, 0] = 3e3
    labels = torch.full((1, 4097), 64)
    small = torch.tensor(math.sqrt(0.1)).square().double().item()
    total = sum_terms(WEIGH, logits, labels).total.item()
    assert total == pytest.approx(64 * (9e6 + 4096 * small), rel=1.2e-7)


def test_foreground_part_carries_no_gradient() -> None:
    logits, labels = inputs(2, 9, 3)
    sums = sum_terms(WEIGH, logits.requires_grad_(), labels)
    assert sums.total.requires_grad
    assert not sums.foreground.requires_grad
    assert not sum_terms_per_anchor(WEIGH, logits, labels).requires_grad


def test_gradient_follows_the_layout_of_the_logits() -> None:
    """No transposed copy on the way back to a head's own output."""
    head = torch.randn(2, 3 * 4, 5, 6, requires_grad=True)
    view = head.view(2, 3, 4, 5, 6).permute(0, 3, 4, 1, 2)
    labels = torch.zeros(2, 5, 6, 3, dtype=torch.int64)
    (grad,) = torch.autograd.grad(sum_terms(WEIGH, view, labels).total.sum(), view)
    assert grad.stride() == view.stride()
