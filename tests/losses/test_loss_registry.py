"""Every loss in the registry keeps the contract, whoever wrote it.

The losses of ``FOCAL_DET_PLUGINS`` take part, so this file is also the test of a user's own loss:
``FOCAL_DET_PLUGINS=my_loss.py pytest tests/losses/test_loss_registry.py``.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from loss_cases import crowd, scene
from torch import Tensor, nn
from torch.nn import functional as F

import focal_det
from focal_det.losses import LOSS_REGISTRY, ElementwiseLoss, FocalLoss, OHEMLoss, build_loss
from focal_det.losses import BalancedCrossEntropyLoss as BalancedCE
from focal_det.losses import FocalLossStar as FLStar
from focal_det.losses import HingeLoss as Hinge
from focal_det.plugins import load_plugins

load_plugins()
NAMES = [name for name, _ in LOSS_REGISTRY]
EXPECTED = {
    "CrossEntropyLoss", "BalancedCrossEntropyLoss", "FocalLoss", "FocalLossStar", "HingeLoss",
    "OHEMLoss",
}  # fmt: skip


def config(*options: Any) -> CfgNode:
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_list(list(options))
    return cfg


def arguments(loss_class: type[nn.Module]) -> dict[str, Any]:
    """Constructor arguments and their defaults; those of `nn.Module` itself are no arguments."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(loss_class).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def value_at(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def run(
    loss: nn.Module, logits: Tensor, labels: Tensor, boxes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Value and gradient; boxes are given to those that want them, far apart unless said."""
    if boxes is None:
        x = 100.0 * torch.arange(labels.numel()).view(*labels.shape, 1)
        boxes = torch.cat([x, torch.zeros_like(x), x + 20, torch.full_like(x, 30)], dim=-1)
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, labels, boxes=boxes)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def check_is_a_sum(name: str) -> None:
    """0-d float32, and two images cost what each costs alone."""
    loss = build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name))
    logits, labels = scene(60, 4)
    value, grad = run(loss, logits, labels)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert value > 0
    assert grad.dtype == torch.float32
    assert grad.abs().sum() > 0
    both, _ = run(loss, torch.stack([logits, -logits]), torch.stack([labels, labels]))
    torch.testing.assert_close(both, value + run(loss, -logits, labels)[0])


def check_ignores_and_empties(name: str) -> None:
    loss = build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name))
    logits, labels = scene(60, 4)
    value, _ = run(loss, logits, labels)
    logits[labels == -1] = float("nan")
    same, grad = run(loss, logits, labels)
    assert torch.equal(same, value)
    assert (grad[labels == -1] == 0).all()
    for anchors, label in [(0, 0), (7, -1)]:
        value, grad = run(loss, torch.ones(anchors, 4), torch.full((anchors,), label))
        assert value.item() == 0.0
        assert torch.equal(grad, torch.zeros(anchors, 4))
    value, grad = run(loss, torch.ones(7, 4), torch.full((7,), 4))  # no objects
    assert value.isfinite()
    assert grad.isfinite().all()


def check_is_finite_everywhere(name: str) -> None:
    loss = build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name))
    points = torch.tensor([0, 1e-3, 1, 17, 20, 88, 104, 1e3, 1e4])
    logits = torch.cat([points, -points]).unsqueeze(1).repeat(1, 2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        value, grad = run(loss, logits.to(dtype), torch.zeros(len(logits), dtype=torch.int64))
        assert value.isfinite()
        assert grad.isfinite().all()
        assert grad.dtype == dtype


def check_bad_inputs_are_refused(name: str) -> None:
    loss = build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name))
    for label in (-2, 4):
        with pytest.raises(ValueError, match=f"got {label}"):
            run(loss, torch.zeros(2, 3), torch.tensor([0, label]))
    with pytest.raises(ValueError, match="labels must have the shape"):
        run(loss, torch.zeros(2, 3), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="boxes must have the shape"):
        loss(torch.zeros(2, 3), torch.tensor([0, 1]), boxes=torch.zeros(3, 4))


def check_inputs_are_left_alone(name: str) -> None:
    """Gradients reach only the logits; nothing is changed in place."""
    loss = build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name))
    logits, labels = scene(60, 4)
    boxes = crowd(60).requires_grad_()
    inputs = (logits, labels, boxes)
    before = [x.detach().clone() for x in inputs]
    run(loss, *inputs)
    assert boxes.grad is None
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)


def check_autocast_and_layout(name: str) -> None:
    """The same numbers under autocast, from a view of a head's output, and for K = 1."""
    loss = build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name))
    logits, labels = scene(2 * 60, 4)
    value, grad = run(loss, logits.view(2, 60, 4), labels.view(2, 60))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = run(loss, logits.view(2, 60, 4), labels.view(2, 60))
    assert cast.dtype == torch.float32
    assert torch.equal(cast, value)
    head = logits.view(2, 60, 4).transpose(1, 2).contiguous()
    strided, strided_grad = run(loss, head.transpose(1, 2), labels.view(2, 60))
    torch.testing.assert_close(strided, value)
    torch.testing.assert_close(strided_grad, grad)
    single, _ = run(loss, logits[:, :1], labels.clamp(max=1))
    assert single > 0


def check_derivative(name: str) -> None:
    """Against central differences in float64."""
    loss = build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name))
    logits, labels = scene(12, 3, seed=4)
    logits, step = logits.double(), 1e-6
    _, grad = run(loss, logits, labels)
    numerical = torch.zeros_like(logits)
    for i in range(logits.numel()):
        shift = torch.zeros(logits.numel(), dtype=torch.float64)
        shift[i] = step
        shift = shift.view_as(logits)
        rise = run(loss, logits + shift, labels)[0] - run(loss, logits - shift, labels)[0]
        numerical.view(-1)[i] = rise / (2 * step)
    torch.testing.assert_close(grad, numerical, rtol=1e-5, atol=1e-7)


def check_elementwise(name: str) -> None:
    loss = build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name))
    if not isinstance(loss, ElementwiseLoss):
        assert not hasattr(loss, "elementwise")
        return
    logits, labels = scene(60, 4)
    each = loss.elementwise(logits, labels)
    assert each.shape == logits.shape
    torch.testing.assert_close(each.sum(), loss(logits, labels))
    assert (each[labels == -1] == 0).all()


def check_defaults_are_those_of_the_config(name: str) -> None:
    loss_class = LOSS_REGISTRY.get(name)
    cfg = config("MODEL.FOCAL_DET.LOSS.NAME", name)
    defaults = arguments(loss_class)
    assert {a: value_at(cfg, key) for a, key in loss_class.config_keys().items()} == defaults
    assert build_loss(cfg).extra_repr() == loss_class().extra_repr()


def check_every_key_counts(name: str) -> None:
    """Another number at any key changes the value and so reaches the formula."""
    logits, labels = scene(400, 4, seed=6)
    labels[100:] = 4
    boxes = crowd(400, seed=6, extent=400.0)
    plain, _ = run(build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name)), logits, labels, boxes)
    for key in LOSS_REGISTRY.get(name).config_keys().values():
        default = value_at(config(), key)
        if isinstance(default, bool) or not isinstance(default, (int, float)):
            continue
        other = type(default)(default / 2 if default else 1)
        loss = build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name, key, other))
        value, _ = run(loss, logits, labels, boxes)
        assert abs(value - plain) > 1e-4 * plain, f"{key} {other}"


def check_is_listed_in_its_repr(name: str) -> None:
    """The start-up line shows the resolved arguments."""
    loss = LOSS_REGISTRY.get(name)()
    for argument in arguments(type(loss)):
        assert f"{argument}=" in loss.extra_repr()


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def test_the_losses_of_the_paper_are_there() -> None:
    assert set(NAMES) >= EXPECTED


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, check: Callable[[str], None]) -> None:
    check(name)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("CrossEntropyLoss", {}),
        ("BalancedCrossEntropyLoss", {"MODEL.FOCAL_DET.BALANCED_CE.ALPHA": 0.75}),
        (
            "FocalLoss",
            {"MODEL.RETINANET.FOCAL_LOSS_ALPHA": 0.25, "MODEL.RETINANET.FOCAL_LOSS_GAMMA": 2.0},
        ),
        (
            "FocalLossStar",
            {
                "MODEL.FOCAL_DET.FL_STAR.ALPHA": 0.25,
                "MODEL.FOCAL_DET.FL_STAR.GAMMA": 2.0,
                "MODEL.FOCAL_DET.FL_STAR.BETA": 1.0,
            },
        ),
        ("HingeLoss", {"MODEL.FOCAL_DET.HINGE.THRESHOLD": 0.5}),
        (
            "OHEMLoss",
            {
                "MODEL.FOCAL_DET.OHEM.BATCH_SIZE": 128,
                "MODEL.FOCAL_DET.OHEM.NMS_THRESH": 0.5,
                "MODEL.FOCAL_DET.OHEM.NEG_POS_RATIO": 0.0,
            },
        ),
    ],
)
def test_documented_keys_and_defaults(name: str, keys: dict[str, Any]) -> None:
    assert set(LOSS_REGISTRY.get(name).config_keys().values()) == set(keys)
    cfg = config()
    assert {key: value_at(cfg, key) for key in keys} == keys
    assert type(build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name))).__name__ == name


def test_focal_loss_is_the_default() -> None:
    loss = build_loss(config("MODEL.RETINANET.FOCAL_LOSS_GAMMA", 0.5))
    assert isinstance(loss, FocalLoss)
    assert (loss.alpha, loss.gamma) == (0.25, 0.5)


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="'FocalLos'") as raised:
        build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", "FocalLos"))
    for name in EXPECTED:
        assert name in str(raised.value)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "argument", "value", "allowed"),
    [
        *(
            (make, "alpha", value, r"in \[0, 1\]")
            for make in (BalancedCE, FocalLoss, FLStar)
            for value in (1.5, 1.0001, NAN, INF, "0.5", True)
        ),
        *((FocalLoss, "gamma", value, ">= 0") for value in (-1.0, -1e-9, NAN, INF, None, "2")),
        *((FLStar, "gamma", value, "> 0") for value in (0, 0.0, -2.0, NAN, INF)),
        *((FLStar, "beta", value, "") for value in (NAN, INF, -INF, None)),
        *((Hinge, "threshold", value, r"in \[0, 1\]") for value in (1.5, -0.1, NAN, None)),
        *((OHEMLoss, "batch_size", value, ">= 1") for value in (0, -5, True)),
        *((OHEMLoss, "batch_size", value, "integer") for value in ("128", 12.5, NAN)),
        *((OHEMLoss, "nms_thresh", value, r"in \[0, 1\]") for value in (1.2, -0.5, NAN)),
        *((OHEMLoss, "neg_pos_ratio", value, ">= 0") for value in (-1.0, NAN, INF)),
    ],
    ids=str,
)
def test_arguments_out_of_range(
    make: Callable[..., nn.Module], argument: str, value: Any, allowed: str
) -> None:
    """The error names the class, the argument, its value and the range."""
    with pytest.raises(ValueError, match=rf"{argument} must be .*{allowed}") as raised:
        make(**{argument: value})
    message = str(raised.value)
    assert message.startswith(f"{make.__name__}: ")
    assert repr(value) in message


@pytest.mark.parametrize(
    "make",
    [
        lambda: BalancedCE(0),
        lambda: BalancedCE(1),
        lambda: BalancedCE(-5.0),
        lambda: FocalLoss(0, 0),
        lambda: FLStar(None, 1e-3, -100.0),
        lambda: Hinge(0),
        lambda: Hinge(1.0),
        lambda: OHEMLoss(1, 0.0, 0),
        lambda: OHEMLoss(1, 1, 0.5),
    ],
)
def test_ends_of_the_ranges_are_allowed(make: Callable[[], nn.Module]) -> None:
    value, grad = run(make(), *scene(20, 3))
    assert value.isfinite()
    assert grad.isfinite().all()


def test_error_from_a_config_names_its_key() -> None:
    cfg = config("MODEL.RETINANET.FOCAL_LOSS_ALPHA", 1.5)
    with pytest.raises(ValueError, match=r"alpha.*1\.5.*MODEL\.RETINANET\.FOCAL_LOSS_ALPHA"):
        build_loss(cfg)


@pytest.fixture
def registry() -> Iterator[None]:
    """Forget the losses that a test has registered."""
    before = dict(LOSS_REGISTRY._obj_map)
    yield
    LOSS_REGISTRY._obj_map.clear()
    LOSS_REGISTRY._obj_map.update(before)


def register_poly_focal() -> type[ElementwiseLoss]:
    @LOSS_REGISTRY.register()
    class PolyFocalLoss(ElementwiseLoss):
        def __init__(self, gamma: float = 2.0, epsilon: float = 1.0) -> None:
            super().__init__()
            self.gamma, self.epsilon = gamma, epsilon

        def value(self, x_t: Tensor, foreground: bool) -> Tensor:
            miss = torch.sigmoid(-x_t)
            return miss**self.gamma * (F.softplus(-x_t) + self.epsilon * miss)

    return PolyFocalLoss


def register_brier() -> type[ElementwiseLoss]:
    @LOSS_REGISTRY.register()
    class BrierLoss(ElementwiseLoss):
        def __init__(self, alpha: float = 0.5) -> None:
            super().__init__()
            self.alpha = alpha

        def value_and_slope(self, z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
            miss = torch.sigmoid(z)
            return miss**2, 2 * miss**2 * torch.sigmoid(-z)

    return BrierLoss


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("register", "options", "weights"),
    [
        (
            register_poly_focal,
            {"POLY_FOCAL_LOSS.GAMMA": 1.0, "POLY_FOCAL_LOSS.EPSILON": -0.5},
            (1.0, 1.0),
        ),
        (register_brier, {"BRIER_LOSS.ALPHA": 0.125}, (0.125, 0.875)),
    ],
)
def test_a_loss_of_the_users_own(
    register: Callable[[], type[ElementwiseLoss]],
    options: dict[str, float],
    weights: tuple[float, float],
) -> None:
    """At most 15 lines, chosen and set by config, and held to the same contract."""
    lines = inspect.getsource(register).splitlines()[1:-2]
    assert len([line for line in lines if line.strip()]) <= 15
    name = register().__name__
    flat = [x for key, value in options.items() for x in (f"MODEL.FOCAL_DET.{key}", value)]
    loss = build_loss(config("MODEL.FOCAL_DET.LOSS.NAME", name, *flat))
    assert type(loss).__name__ == name
    assert loss.extra_repr() == ", ".join(
        f"{k.split('.')[1].lower()}={v}" for k, v in options.items()
    )
    # One foreground and one background term at p = 3/4, 1/4: miss is 1/4 in both.
    logits = torch.tensor([[1.0986122886681098, -1.0986122886681098]])
    value, _ = run(loss, logits, torch.tensor([0]))
    log = 0.2876820724517809  # ln(4/3)
    per_term = 0.25 * (log - 0.5 * 0.25) if name == "PolyFocalLoss" else 0.25**2
    assert value.item() == pytest.approx(sum(weights) * per_term, rel=1e-6)
    value, _ = run(loss, logits[:, :1], torch.tensor([0]))
    assert value.item() == pytest.approx(weights[0] * per_term, rel=1e-6)
    for check in CHECKS:
        check(name)


@pytest.mark.usefixtures("registry")
def test_a_name_can_be_taken_once() -> None:
    register_brier()
    with pytest.raises(AssertionError, match="BrierLoss"):
        register_brier()


@pytest.mark.usefixtures("registry")
def test_a_loss_without_a_formula_says_what_is_missing() -> None:
    class NoFormula(ElementwiseLoss):
        pass

    with pytest.raises(NotImplementedError, match=r"NoFormula needs value\(\)"):
        NoFormula()(torch.zeros(1, 1), torch.tensor([0]))


@pytest.mark.usefixtures("registry")
def test_a_default_that_no_config_can_hold() -> None:
    @LOSS_REGISTRY.register()
    class TensorDefaultLoss(ElementwiseLoss):
        def __init__(self, scale: object = object) -> None:
            super().__init__()

    with pytest.raises(TypeError, match="'scale' of TensorDefaultLoss"):
        config()
