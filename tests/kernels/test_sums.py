"""Sums and gradients by each implementation: right, of the same precision, and one buffer."""

import importlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import focal_det
from focal_det.kernels import IMPLEMENTATIONS, LossSums, Terms, blocks, sum_levels, sum_terms, sums
from focal_det.kernels import sum_terms_per_anchor as per_anchor_sums
from focal_det.losses import (
    LOSS_REGISTRY,
    ClassificationLoss,
    CrossEntropyLoss,
    ElementwiseLoss,
    FocalLoss,
    HingeLoss,
    OHEMLoss,
    build_loss,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
from loss_cases import Case, assert_close, cases, reference_terms, scene

EPS = torch.finfo(torch.float32).eps
# Also where a power of e leaves float32: e^x at 88.7, e^2x at 44.4, e^-x at -103.
EXTREMES = [0, -0.0, 1e-3, 1, 17, 30, 43.5, 44, 45, 50, 60, 80, 86, 87, 88, 89, 100, 104, 1e4]

each_impl = pytest.mark.parametrize("impl", ["torch", "eager"])


def images(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits of `shape` (N, ..., K) that want a gradient, and labels with every kind of anchor."""
    logits, labels = scene(math.prod(shape[:-1]), shape[-1], seed=5)
    return logits.to(dtype).view(shape).requires_grad_(), labels.view(shape[:-1])


def extremes(num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A random scene, and anchors whose logits are all one number, with every kind of label."""
    logits, labels = scene(40, num_classes)
    numbers = torch.tensor([sign * x for x in EXTREMES for sign in (1, -1)])
    kinds = torch.tensor([-1, 0, num_classes])
    rows = numbers.repeat_interleave(len(kinds)).unsqueeze(1).expand(-1, num_classes)
    logits, labels = torch.cat([logits, rows]), torch.cat([labels, kinds.repeat(len(numbers))])
    return logits.to(dtype).unsqueeze(0), labels.unsqueeze(0)


def value_and_gradient(
    terms: Terms, logits: Tensor, labels: Tensor, impl: str, weights: Tensor | None = None
) -> tuple[LossSums, Tensor]:
    logits = logits.detach().requires_grad_()
    result = sum_terms(terms, logits, labels, weights, impl)
    (grad,) = torch.autograd.grad(result.total.sum(), logits)
    return LossSums(*(x.detach() for x in result)), grad


class NewTensors(TorchDispatchMode):
    """Keeps every tensor of at least `size` elements that is made while it is on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {
            x.untyped_storage().data_ptr()
            for x in tree_flatten((args, kwargs))[0]
            if isinstance(x, Tensor)
        }
        for x in tree_flatten(result)[0]:
            is_new = isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given
            if is_new and x.untyped_storage().nbytes() >= self.size * x.element_size():
                self.tensors.append(x)
        return result


knows_kept_graphs = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph"),
    reason="this PyTorch does not say whether a graph is kept: gradients are copied to be safe",
)


@contextmanager
def new_tensors(logits: Tensor) -> Iterator[list[Tensor]]:
    """The tensors of the size of `logits` that the body makes."""
    with NewTensors(logits.numel()) as mode:
        yield mode.tensors


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 terms, so that none has the size of the logits."""
    monkeypatch.setitem(blocks.BLOCK_TERMS, "cpu", 64)


def focal_terms() -> Terms:
    return FocalLoss().terms()


# Values and gradients.


@each_impl
def test_weights_scale_sums_and_gradients_of_their_images(impl: str) -> None:
    logits, labels = images(3, 20, 4)
    weights = torch.tensor([0.5, 3.0, 0.0])
    plain, plain_grad = value_and_gradient(focal_terms(), logits, labels, impl)
    result, grad = value_and_gradient(focal_terms(), logits, labels, impl, weights)
    torch.testing.assert_close(result.total, plain.total * weights)
    torch.testing.assert_close(result.foreground, plain.foreground * weights)
    torch.testing.assert_close(grad, plain_grad * weights.view(3, 1, 1))
    assert not grad[2].any()


@each_impl
def test_weights_are_constants(impl: str) -> None:
    """Of whatever dtype, as a normalizer may come in."""
    logits, labels = images(2, 20, 4)
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    result = sum_terms(focal_terms(), logits, labels, weights, impl)
    assert result.total.dtype == torch.float32
    result.total.sum().backward()
    assert weights.grad is None


@each_impl
@pytest.mark.parametrize("case", cases(), ids=repr)
def test_sums_are_those_of_the_reference(case: Case, impl: str) -> None:
    """Over images and levels, total and foreground, to a few roundings of the sum."""
    case.loss.use(impl)
    logits, labels = images(2, 3, 5, 7)
    more_logits, more_labels = images(2, 4, 7)
    weights = torch.tensor([0.25, 1.5])
    result = case.loss.per_image([logits, more_logits], [labels, more_labels], weights=weights)
    total, foreground = torch.zeros(2, 2, dtype=torch.float64)
    for x, y in ((logits, labels), (more_logits, more_labels)):
        value, _ = reference_terms(case.term, x, y)
        total += value.flatten(1).sum(1) * weights
        is_own = y.unsqueeze(-1) == torch.arange(7)
        foreground += (value * is_own).flatten(1).sum(1) * weights
    rtol = EPS * (8 + float(2 * case.exponent(logits.detach()).max()))
    atol = EPS * case.absolute * logits.numel()
    close = {"rtol": rtol, "atol": atol, "check_dtype": False}
    torch.testing.assert_close(result.total.detach(), total, **close)
    torch.testing.assert_close(result.foreground, foreground, **close)


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", cases(), ids=repr)
def test_every_term_and_its_gradient_is_that_of_the_reference(
    case: Case, dtype: torch.dtype, impl: str
) -> None:
    for num_classes in (1, 7):
        logits, labels = extremes(num_classes, dtype)
        value, slope = reference_terms(case.term, logits, labels)
        each = case.loss.use(impl).elementwise(logits, labels)
        assert_close(each, value, case, logits)
        _, grad = value_and_gradient(case.loss.terms(), logits, labels, impl)
        assert grad.dtype == dtype
        assert_close(grad, slope, case, logits)
        assert not grad[labels < 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases(), ids=repr)
def test_fused_is_as_precise_as_autograd(case: Case, dtype: torch.dtype) -> None:
    """The largest relative error of a term is at most that of eager and four roundings."""
    logits, labels = scene(600, 3, ignored=False)
    logits, labels = logits.to(dtype).unsqueeze(0), labels.unsqueeze(0)
    truth = reference_terms(case.term, logits, labels)
    worst = {}
    for impl in ("eager", "torch"):
        each = case.loss.use(impl).elementwise(logits, labels)
        _, grad = value_and_gradient(case.loss.terms(), logits, labels, impl)
        worst[impl] = []
        for x, expected in zip((each, grad), truth, strict=True):
            scale = expected.abs().clamp(min=1.0 if case.absolute else 1e-30)
            worst[impl].append(float(((x.double() - expected).abs() / scale).max()))
    for fused, eager in zip(worst["torch"], worst["eager"], strict=True):
        assert fused <= eager + 4 * EPS


@each_impl
@pytest.mark.parametrize("num_classes", [1, 7])
def test_sums_of_each_anchor(num_classes: int, impl: str) -> None:
    logits, labels = images(2, 3, 8, num_classes)
    result = per_anchor_sums(focal_terms(), logits, labels, impl)
    each = FocalLoss().use(impl).elementwise(logits.double(), labels).sum(-1)
    torch.testing.assert_close(result, each.float().detach(), rtol=1e-5, atol=0)
    assert not result.requires_grad
    assert not result[labels < 0].any()


@each_impl
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (0, 0, 3)], ids=str)
def test_nothing_to_sum_is_zero(shape: tuple[int, ...], impl: str) -> None:
    logits, labels = torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.int64)
    result, grad = value_and_gradient(focal_terms(), logits, labels, impl)
    assert result.total.tolist() == result.foreground.tolist() == [0.0] * shape[0]
    assert grad.shape == logits.shape


@each_impl
def test_autocast_changes_nothing(impl: str) -> None:
    logits, labels = images(2, 20, 4)
    expected, expected_grad = value_and_gradient(focal_terms(), logits, labels, impl)
    anchors = per_anchor_sums(focal_terms(), logits, labels, impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, grad = value_and_gradient(focal_terms(), logits, labels, impl)
        assert torch.equal(per_anchor_sums(focal_terms(), logits, labels, impl), anchors)
    assert torch.equal(result.total, expected.total)
    assert torch.equal(grad, expected_grad)


def itself(z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
    return z, torch.ones_like(z)


def twice(z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
    e = (0.1 * z).exp()
    return e, e


def expanded(z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
    return z.new_tensor(3.0).expand_as(z), z.new_tensor(2.0).expand_as(z)


def views(z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
    both = torch.stack([z.exp(), z.square()], dim=-1)
    return both[..., 0], both[..., 1]


def own_slope(z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
    return z.square(), z


@pytest.mark.parametrize("picks", [True, False], ids=["picked", "dense"])
@pytest.mark.parametrize("formula", [itself, twice, expanded, views, own_slope])
def test_a_loss_may_return_tensors_that_share_memory(
    formula: Callable[[Tensor, bool], tuple[Tensor, Tensor]],
    picks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "_can_pick", lambda device: picks)
    terms = Terms(formula, lambda x_t, foreground: formula(-x_t, foreground)[0], 0.5, 2.0)
    logits, labels = images(2, 11, 3)
    before = logits.detach().clone()
    total, foreground, slope = torch.zeros(2), torch.zeros(2), torch.zeros_like(before)
    for image, anchor, k in torch.cartesian_prod(*map(torch.arange, before.shape)).tolist():
        label, x = labels[image, anchor], before[image, anchor, k]
        if label >= 0:
            is_own = bool(label == k)
            y, weight = (1, 2.0) if is_own else (-1, 0.5)
            value, derivative = formula((-y * x).view(1).clone(), is_own)
            slope[image, anchor, k] = -y * weight * derivative
            total[image] += weight * value.item()
            foreground[image] += is_own * weight * value.item()
    result, grad = value_and_gradient(terms, logits, labels, "torch")
    torch.testing.assert_close(result.total, total)
    torch.testing.assert_close(result.foreground, foreground)
    torch.testing.assert_close(grad, slope)
    assert torch.equal(logits, before)


# Derivatives of the gradient.


def test_the_second_derivative_of_torch_is_refused_and_names_the_way_out() -> None:
    logits, labels = images(1, 5, 3)
    total = sum_terms(focal_terms(), logits, labels, impl="torch").total.sum()
    with pytest.raises(RuntimeError, match='impl="eager"'):
        torch.autograd.grad(total, logits, create_graph=True)


@pytest.mark.parametrize("loss", [CrossEntropyLoss(), FocalLoss(), FocalLoss(gamma=0.5)], ids=repr)
def test_eager_has_second_derivatives(loss: ElementwiseLoss) -> None:
    logits, labels = images(1, 6, 3, dtype=torch.float64)
    logits = logits.detach().requires_grad_()

    def total(x: Tensor) -> Tensor:
        return sum_terms(loss.terms(), x, labels, impl="eager").total

    torch.autograd.gradcheck(total, (logits,))
    torch.autograd.gradgradcheck(total, (logits,))


# The gradient's buffer.


@knows_kept_graphs
def test_the_gradient_is_the_only_tensor_of_its_size(small_blocks: None) -> None:
    logits, labels = images(2, 300, 4)
    with new_tensors(logits) as made:
        sum_terms(focal_terms(), logits, labels, impl="torch").total.sum().backward()
    assert len(made) == 1
    assert logits.grad is not None
    assert made[0].data_ptr() == logits.grad.data_ptr()


@knows_kept_graphs
@pytest.mark.parametrize("factors", [[1.0, 1.0], [0.5, -2.0]], ids=str)
def test_backward_returns_the_buffer_of_the_forward_pass(
    factors: list[float], small_blocks: None
) -> None:
    """As it is, or scaled in place."""
    logits, labels = images(2, 300, 4)
    _, expected = value_and_gradient(focal_terms(), logits, labels, "torch")
    with new_tensors(logits) as made:
        total = sum_terms(focal_terms(), logits, labels, impl="torch").total
    (buffer,) = made
    with new_tensors(logits) as made:
        (grad,) = torch.autograd.grad(total, logits, torch.tensor(factors))
    assert made == []
    assert grad.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(grad, expected * torch.tensor(factors).view(2, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "calls",
    [
        [[2.0, 2.0], [2.0, 2.0], [3.0, -0.25]],
        [[1.0, 1.0], [-0.5, -0.5]],
        [[1.0, 1.0], [1.0, 1.0], [1.0, 2.0], [0.0, 1.0]],
    ],
    ids=["scaled", "one first", "mixed"],
)
def test_a_kept_graph_gives_right_gradients_again(
    calls: list[list[float]], dtype: torch.dtype
) -> None:
    """Nor does the last call, whose graph is not kept, change what those before it returned."""
    logits, labels = images(2, 10, 4, dtype=dtype)
    logits = logits.detach().requires_grad_()
    _, expected = value_and_gradient(focal_terms(), logits, labels, "torch")
    total = sum_terms(focal_terms(), logits, labels, impl="torch").total
    grads = []
    for factors in calls:
        keep = len(grads) < len(calls) - 1
        grads += torch.autograd.grad(total, logits, torch.tensor(factors), retain_graph=keep)
    close = {torch.float32: (1e-6, 0), torch.bfloat16: (8e-3, 0), torch.float16: (2e-3, 1.2e-7)}
    rtol, atol = close[dtype]
    for grad, factors in zip(grads, calls, strict=True):
        scaled = expected * torch.tensor(factors, dtype=dtype).view(2, 1, 1)
        torch.testing.assert_close(grad, scaled, rtol=rtol, atol=atol)


def test_gradients_accumulate_over_a_kept_graph() -> None:
    logits, labels = images(2, 10, 4)
    _, expected = value_and_gradient(focal_terms(), logits, labels, "torch")
    total = sum_terms(focal_terms(), logits, labels, impl="torch").total.sum()
    for keep in (True, True, False):
        total.backward(retain_graph=keep)
    torch.testing.assert_close(logits.grad, 3 * expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_gradient_nothing_of_the_size_of_the_logits_is_made(
    dtype: torch.dtype, small_blocks: None
) -> None:
    logits, labels = images(2, 300, 4, dtype=dtype)
    logits = logits.detach()
    with new_tensors(logits) as made:
        sum_terms(focal_terms(), logits, labels, impl="torch")
        per_anchor_sums(focal_terms(), logits, labels, impl="torch")
        with torch.no_grad():
            sum_terms(focal_terms(), logits.requires_grad_(), labels, impl="torch")
    assert made == []


def test_a_float16_gradient_is_not_made_before_it_can_be_scaled(small_blocks: None) -> None:
    logits, labels = images(2, 300, 4, dtype=torch.float16)
    logits = logits.detach().requires_grad_()
    with new_tensors(logits) as made:
        total = sum_terms(focal_terms(), logits, labels, impl="torch").total
    assert made == []
    with new_tensors(logits) as made:
        total.sum().backward()
    assert len(made) == 1


def test_small_float16_gradients_survive_the_loss_scale() -> None:
    """Slopes of 1e-10 to 1e-8 would be 0 in float16; 65536 times as large they are not."""
    logits = torch.linspace(-8, -6.2, 50, dtype=torch.float16).view(1, 50, 1).requires_grad_()
    labels = torch.ones(1, 50, dtype=torch.int64)
    total = sum_terms(focal_terms(), logits, labels, impl="torch").total
    _, expected = value_and_gradient(focal_terms(), logits.double(), labels, "eager")
    assert not expected.half().any()
    for keep in (True, False):
        (grad,) = torch.autograd.grad(total * 65536, logits, retain_graph=keep)
        # One rounding to float16, of a number that may be subnormal there.
        torch.testing.assert_close(
            grad.double(), expected * 65536, rtol=2**-11 * 1.01, atol=2**-25 * 1.01
        )


# Choosing an implementation.


@pytest.mark.parametrize("name", ["", "Torch", "cuda", None])
def test_an_unknown_implementation_lists_those_there_are(name: Any) -> None:
    with pytest.raises(ValueError, match=", ".join(IMPLEMENTATIONS)):
        FocalLoss().use(name)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_use_returns_the_loss(impl: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton")
    loss = FocalLoss()
    assert loss.use(impl) is loss
    assert loss.impl == impl


def test_levels_must_fit_each_other() -> None:
    logits, labels = images(2, 5, 3)
    with pytest.raises(ValueError, match=r"got 2 levels of torch\.float32, and labels for 1"):
        sum_levels(focal_terms(), [logits, logits], [labels])
    with pytest.raises(ValueError, match=r"one dtype.* torch\.bfloat16, torch\.float32"):
        sum_levels(focal_terms(), [logits, logits.bfloat16()], [labels, labels])


@pytest.mark.parametrize("impl", ["torch", "eager"])
def test_a_level_without_a_gradient_counts_all_the_same(impl: str) -> None:
    logits, labels = images(2, 5, 3)
    fixed, leaf = logits + 1, logits.clone().requires_grad_()
    total = sum_levels(focal_terms(), [fixed, leaf], [labels, labels], impl=impl).total
    parts = [sum_terms(focal_terms(), x, labels, impl=impl).total for x in (fixed, leaf)]
    torch.testing.assert_close(total, parts[0] + parts[1])
    grads = [torch.autograd.grad(x.sum(), leaf)[0] for x in (total, parts[1])]
    torch.testing.assert_close(*grads)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton cannot be imported."""
    for name in ("triton_kernels", "triton_match", "translate"):
        monkeypatch.delitem(sys.modules, f"focal_det.kernels.{name}", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)


def test_triton_that_cannot_be_imported_is_refused_when_it_is_chosen(no_triton: None) -> None:
    loss = FocalLoss()
    with pytest.raises(RuntimeError, match=r'impl="triton" is not available: .*triton'):
        loss.use("triton")
    assert loss.impl == "auto"
    cfg = config("MODEL.FOCAL_DET.IMPL", "triton")
    with pytest.raises(RuntimeError, match=r"MODEL\.FOCAL_DET\.IMPL: .*not available"):
        build_loss(cfg)


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of the choice, with none given before."""
    messages: list[str] = []
    monkeypatch.setattr(sums, "_warned", set())
    monkeypatch.setattr(sums.logger, "warning", messages.append)
    return messages


ON_A_GPU: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device="cuda:0")


def test_auto_without_triton_is_torch_and_says_so_once(no_triton: None, warned: list[str]) -> None:
    for _ in range(3):
        assert sums.choose("auto", focal_terms(), ON_A_GPU) is blocks
    (message,) = warned
    assert "plain PyTorch" in message
    assert "triton" in message


def test_auto_takes_what_triton_refuses_and_triton_does_not(
    monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    def refuse(terms: Terms, logits: Tensor) -> None:
        raise RuntimeError(f"no kernel for {terms.key}")

    monkeypatch.setattr(sums, "import_triton", lambda module: SimpleNamespace(prepare=refuse))
    for key in ("a", "a", "b"):
        terms = Terms(itself, None, key=key)
        assert sums.choose("auto", terms, ON_A_GPU) is blocks
        with pytest.raises(RuntimeError, match=f"no kernel for {key}"):
            sums.choose("triton", terms, ON_A_GPU)
    assert [message[-1] for message in warned] == ["a", "b"]


def test_triton_needs_a_gpu_and_says_where_the_logits_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    triton_kernels = importlib.import_module("focal_det.kernels.triton_kernels")
    monkeypatch.setattr(triton_kernels, "_is_interpreted", lambda: False)
    logits, labels = images(1, 5, 3)
    loss = FocalLoss().use("triton")
    with pytest.raises(RuntimeError, match=r"CUDA.*cpu"):
        loss(logits, labels)


def test_auto_on_a_cpu_does_not_import_triton() -> None:
    program = """
import sys, torch, focal_det
from focal_det.losses import FocalLoss
logits = torch.randn(4, 3, requires_grad=True)
FocalLoss()(logits, torch.tensor([0, 3, -1, 2])).backward()
assert logits.grad.any()
assert "focal_det.kernels.triton_kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


# The config key.


def config(*options: Any) -> CfgNode:
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_list(list(options))
    return cfg


def built(name: str, impl: str) -> Any:
    return build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name, "MODEL.FOCAL_DET.IMPL", impl))


class PlainSum(nn.Module):
    """A loss that knows nothing of this package."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits[labels >= 0].square().sum()


class DirectSum(ClassificationLoss):
    """A loss that computes its sums itself."""

    def per_image(self, logits: Any, labels: Any, boxes: Any = None, weights: Any = None) -> Any:
        return LossSums(torch.stack([x.sum() for x in logits[0]]), None)


@pytest.mark.parametrize("impl", ["auto", "eager", "torch"])
def test_the_config_key_reaches_the_loss(impl: str) -> None:
    assert built("FocalLoss", impl).impl == impl
    ohem = built("OHEMLoss", impl)
    assert isinstance(ohem, OHEMLoss)
    assert ohem.cross_entropy.impl == impl


@pytest.mark.parametrize("name", ["FocalLoss", "OHEMLoss"])
def test_a_bad_name_in_the_config_names_the_key(name: str) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.FOCAL_DET\.IMPL: .*eager.*got 'fast'"):
        built(name, "fast")


@pytest.mark.parametrize("loss", [PlainSum, DirectSum])
def test_a_loss_without_implementations_takes_auto_only(
    loss: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSS_REGISTRY._obj_map, loss.__name__, loss)
    assert isinstance(built(loss.__name__, "auto"), loss)
    with pytest.raises(ValueError, match=r"MODEL\.FOCAL_DET\.IMPL: .*impl must be auto"):
        built(loss.__name__, "torch")


@pytest.mark.parametrize("impl", ["eager", "torch"])
def test_ohem_computes_the_same_by_each_implementation(impl: str) -> None:
    logits, labels = images(2, 40, 3)
    boxes = 100.0 * torch.arange(40).view(40, 1) + torch.tensor([0.0, 0, 20, 20])
    boxes = boxes.expand(2, 40, 4)
    expected = OHEMLoss(batch_size=8)(logits, labels, boxes)
    loss = OHEMLoss(batch_size=8).use(impl)(logits, labels, boxes)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, logits)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads)


# Compiled callers.


@each_impl
def test_a_compiled_caller_gets_the_same(impl: str) -> None:
    loss = FocalLoss().use(impl)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * loss.per_image([2 * x], [y]).total.sum()

    logits, labels = images(2, 20, 4)
    expected = step(logits, labels)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    torch._dynamo.reset()
    value = torch.compile(step, backend="eager")(logits, labels)
    (grad,) = torch.autograd.grad(value, logits)
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.skipif(
    torch.__version__ < (2, 2), reason="refused earlier, for a reason of torch.compile's own"
)
def test_a_whole_graph_is_refused_with_the_reason() -> None:
    logits, labels = images(2, 20, 4)
    loss = FocalLoss()
    torch._dynamo.reset()
    step = torch.compile(
        lambda x, y: loss.per_image([x], [y]).total, backend="eager", fullgraph=True
    )
    with pytest.raises(RuntimeError, match="sum_levels"):
        step(logits, labels)


# What tells compiled losses apart.


class Holder(ElementwiseLoss):
    """A loss that holds anything."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def value(self, x_t: Tensor, foreground: bool) -> Tensor:
        return -x_t


class Wrapper(ElementwiseLoss):
    """A loss that leaves the formula to another."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.inner = FocalLoss(gamma=gamma)

    def value_and_slope(self, z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        return self.inner.value_and_slope(z, foreground)


def with_buffer() -> Holder:
    loss = Holder(None)
    loss.register_buffer("scale", torch.ones(()))
    return loss


def test_equal_settings_have_equal_keys() -> None:
    assert FocalLoss().terms().key == FocalLoss().terms().key is not None
    assert hash(FocalLoss().terms().key) == hash(FocalLoss().terms().key)
    assert Holder("sum").terms().key == Holder("sum").terms().key is not None


def test_what_a_formula_depends_on_is_in_the_key() -> None:
    losses = [
        FocalLoss(),
        FocalLoss(gamma=0.5),
        CrossEntropyLoss(),
        HingeLoss(),
        HingeLoss(0.25),
        Holder(None),
        Holder(1),
        Holder("1"),
    ]
    keys = [loss.terms().key for loss in losses]
    assert None not in keys
    assert len(set(keys)) == len(losses)


def test_the_settings_of_an_inner_loss_are_not_lost() -> None:
    """Either they are in the key, or there is none."""
    key = Wrapper(2.0).terms().key
    assert key is None or key != Wrapper(0.5).terms().key


def test_training_and_evaluation_have_their_own_keys() -> None:
    """As a formula may ask for the module's mode."""
    assert FocalLoss().eval().terms().key != FocalLoss().terms().key


@pytest.mark.parametrize(
    "loss",
    [
        Holder([1.0]),
        Holder((1.0,)),
        Holder(torch.ones(())),
        Holder(nn.Parameter(torch.ones(()))),
        Holder(nn.Linear(2, 2)),
        Holder(math.exp),
        with_buffer(),
    ],
    ids=["list", "tuple", "tensor", "parameter", "module", "function", "buffer"],
)
def test_state_that_is_not_plain_has_no_key(loss: ElementwiseLoss) -> None:
    assert loss.terms().key is None
