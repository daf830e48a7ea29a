"""What the benchmark of the losses times: inputs, variants, and the check that they agree.

Letters: N images, L levels, A = 9 anchors per location, R anchors per image, K classes.
S: the size of all logits in float32, whatever dtype is timed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from fvcore.nn import sigmoid_focal_loss, sigmoid_focal_loss_jit
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from focal_det.losses import LOSS_REGISTRY, ClassificationLoss

ANCHORS = 9
STRIDES = (8, 16, 32, 64, 128)
FOREGROUND, IGNORED = 150, 200  # anchors per image

FOCAL = "FL gamma 2 alpha .25"
"""The setting that Detectron2's, torchvision's and fvcore's functions compute."""

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "CE": ("CrossEntropyLoss", {}),
    "balanced CE alpha .75": ("BalancedCrossEntropyLoss", {"alpha": 0.75}),
    "FL gamma .5 alpha .5": ("FocalLoss", {"gamma": 0.5, "alpha": 0.5}),
    FOCAL: ("FocalLoss", {"gamma": 2.0, "alpha": 0.25}),
    "FL*": ("FocalLossStar", {}),
    "hinge": ("HingeLoss", {}),
    "OHEM": ("OHEMLoss", {}),
    "OHEM 1:3": ("OHEMLoss", {"neg_pos_ratio": 3.0}),
}
"""Name in the tables -> name in ``LOSS_REGISTRY`` and arguments."""

PEER_NEEDS = 15.0
"""Memory that a path of elementwise tensor operations takes, in S, rounded up."""


class Shape(NamedTuple):
    """Size of the padded input image and number of classes."""

    height: int
    width: int
    num_classes: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width} K={self.num_classes}"

    def levels(self) -> list[tuple[int, int]]:
        """Height and width of P3 to P7: each convolution of stride 2 rounds up."""
        return [(math.ceil(self.height / s), math.ceil(self.width / s)) for s in STRIDES]

    def anchors(self) -> int:
        """R."""
        return ANCHORS * sum(height * width for height, width in self.levels())

    def s_bytes(self, images: int) -> int:
        """S."""
        return 4 * images * self.anchors() * self.num_classes


class Tolerance(NamedTuple):
    """How far a variant may be from float64, which is given the same rounded logits.

    An element of the gradient may differ by ``slope * |itself| + floor * |largest| + least``.
    """

    value: float
    slope: float
    floor: float
    least: float


TOLERANCES = {
    torch.float32: Tolerance(2e-5, 1e-4, 2e-6, 0.0),
    torch.bfloat16: Tolerance(1e-3, 2**-6, 2e-6, 0.0),
    # Smaller gradients are multiples of 2^-24: float16 has no more bits there.
    torch.float16: Tolerance(1e-3, 2**-9, 2e-6, 2**-23),
}


class Inputs:
    """A head's output and what the losses need with it, random but for the seed.

    Attributes:
        raw: L leaves (N, A x K, H, W) that require gradients.
        labels: L tensors (N, H, W, A); some 150 anchors an image are foreground, 200 ignored.
        boxes: L tensors (N, H, W, A, 4).
        normalizer: the number of foreground anchors, by which peers divide.
        weights: (N,), its inverse.
    """

    def __init__(
        self, shape: Shape, images: int, dtype: torch.dtype, seed: int, device: str = "cpu"
    ) -> None:
        self.shape, self.images = shape, images
        generator = torch.Generator().manual_seed(seed)
        labels = _random_labels(shape, images, generator)  # (N, R)
        sizes = [h * w * ANCHORS for h, w in shape.levels()]
        self.flat_labels = labels.to(device)
        self.labels = [
            level.view(images, h, w, ANCHORS)
            for level, (h, w) in zip(self.flat_labels.split(sizes, 1), shape.levels(), strict=True)
        ]
        self.boxes = [
            x.view(images, h, w, ANCHORS, 4).to(device)
            for x, (h, w) in zip(
                _random_boxes(shape, images, generator), shape.levels(), strict=True
            )
        ]
        foreground = ((labels >= 0) & (labels < shape.num_classes)).sum()
        self.normalizer = max(1.0, float(foreground))
        self.weights = torch.full((images,), 1 / self.normalizer, device=device)
        # A thousand million normal numbers take a GPU milliseconds, and a host half a minute.
        generator = torch.Generator(device).manual_seed(seed + 1)
        self.raw = [
            _random_logits((images, ANCHORS * shape.num_classes, h, w), generator)
            .to(dtype)
            .requires_grad_()
            for h, w in shape.levels()
        ]

    def views(self, raw: Sequence[Tensor]) -> list[Tensor]:
        """(N, A x K, H, W) a level -> (N, H, W, A, K) without a copy."""
        classes = self.shape.num_classes
        return [x.unflatten(1, (-1, classes)).permute(0, 3, 4, 1, 2) for x in raw]

    def loss(self, loss: ClassificationLoss, raw: Sequence[Tensor]) -> Tensor:
        """What a detector's training step asks a loss for, 0-d."""
        boxes = self.boxes if loss.needs_boxes else None
        return loss.per_image(self.views(raw), self.labels, boxes, self.weights).total.sum()


def _random_labels(shape: Shape, images: int, generator: torch.Generator) -> Tensor:
    """(N, R) in ``-1..K``."""
    labels = torch.full((images, shape.anchors()), shape.num_classes)
    for row in labels:
        order = torch.randperm(len(row), generator=generator)
        some = min(FOREGROUND, len(row) // 4)
        row[order[:some]] = torch.randint(0, shape.num_classes, (some,), generator=generator)
        row[order[some : some + IGNORED]] = -1
    return labels


def anchor_levels(shape: Shape) -> list[Tensor]:
    """RetinaNet's anchors, L tensors (H x W x A, 4) XYXY."""
    sizes = [[4 * s * 2 ** (octave / 3) for octave in range(3)] for s in STRIDES]
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=list(STRIDES)
    )
    return [x.tensor for x in generator([torch.empty(1, 1, *level) for level in shape.levels()])]


def _random_boxes(shape: Shape, images: int, generator: torch.Generator) -> list[Tensor]:
    """L tensors (N, H x W x A, 4): anchors, shaken as a trained model's boxes are."""
    boxes = []
    for level, stride in zip(anchor_levels(shape), STRIDES, strict=True):
        noise = torch.randn(images, len(level), 4, generator=generator)
        boxes.append(level + noise * (stride / 4))
    return boxes


def _random_logits(size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Mostly sure of background, normal around -4; one in a thousand far out."""
    where: dict[str, Any] = {"generator": generator, "device": generator.device}
    logits = torch.randn(size, **where).sub_(4)
    flat = logits.view(-1)
    chosen = torch.randint(0, len(flat), (max(1, len(flat) // 1000),), **where)
    flat[chosen] += torch.randn(len(chosen), **where) * 8
    return logits


@dataclass
class Variant:
    """One way to compute a loss from its leaves.

    Attributes:
        loss: name of the setting; empty for a floor, which computes none.
        name: of the way: an ``impl`` of ours, or of a peer.
        leaves: what the gradient is taken for.
        forward: the loss, 0-d.
        arrange: turns the gradient for the raw output, L tensors, into the layout of the leaves.
        needs_s: memory that it takes, in S.
    """

    loss: str
    name: str
    leaves: list[Tensor]
    forward: Callable[[], Tensor]
    arrange: Callable[[list[Tensor]], list[Tensor]] = list
    needs_s: float = 3.0

    def gradient(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Value and gradients."""
        value = self.forward()
        return value, torch.autograd.grad(value, self.leaves)

    def call(self, mode: str) -> Callable[[], object]:
        """What is timed: ``forward+backward``, or ``forward`` without a gradient."""
        return self.gradient if mode == "forward+backward" else torch.no_grad()(self.forward)


def build_loss(setting: str, impl: str) -> ClassificationLoss:
    """A loss by its name in the tables."""
    name, arguments = SETTINGS[setting]
    return LOSS_REGISTRY.get(name)(**arguments).use(impl)


def our_variant(inputs: Inputs, setting: str, impl: str) -> Variant:
    """A loss of focal_det on the head's own output."""
    loss = build_loss(setting, impl)
    needs = PEER_NEEDS if impl == "eager" else 3.0
    return Variant(setting, impl, inputs.raw, lambda: inputs.loss(loss, inputs.raw), needs_s=needs)


def peer_variants(inputs: Inputs, compiled: bool = False) -> list[Variant]:
    """Focal loss as others compute it, and by ``torch.compile`` on request.

    Detectron2's and fvcore's function compute in float32 whatever they are given; torchvision's,
    which does not, is given float32 on the same route.
    """

    def route(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: _detectron2_route(inputs, function)

    def torchvision_route(x: Tensor, target: Tensor, **settings: Any) -> Tensor:
        return torchvision_focal_loss(x.float(), target.float(), **settings)

    ways = {"detectron2": route(sigmoid_focal_loss_jit), "torchvision": route(torchvision_route)}
    if compiled:
        # What the scripted function scripts: the compiler does not look into a script.
        ways["detectron2 compiled"] = torch.compile(route(sigmoid_focal_loss))
        ways["torchvision compiled"] = torch.compile(route(torchvision_route))
    return [Variant(FOCAL, k, inputs.raw, way, needs_s=PEER_NEEDS) for k, way in ways.items()]


def _detectron2_route(inputs: Inputs, function: Callable[..., Tensor]) -> Tensor:
    """From the head's output to the loss as ``RetinaNet.losses`` goes."""
    classes = inputs.shape.num_classes
    logits = [permute_to_N_HWA_K(x, classes) for x in inputs.raw]
    valid = inputs.flat_labels >= 0
    target = F.one_hot(inputs.flat_labels[valid], num_classes=classes + 1)[:, :-1]
    loss = function(
        torch.cat(logits, dim=1)[valid],
        target.to(logits[0].dtype),
        alpha=0.25,
        gamma=2.0,
        reduction="sum",
    )
    return loss / inputs.normalizer


def fvcore_variant(inputs: Inputs) -> Variant:
    """fvcore's function alone: logits permuted and chosen, one-hot targets made, all beforehand."""
    classes = inputs.shape.num_classes
    valid = inputs.flat_labels >= 0

    def arrange(raw: list[Tensor]) -> list[Tensor]:
        return [torch.cat([permute_to_N_HWA_K(x, classes) for x in raw], dim=1)[valid]]

    with torch.no_grad():
        (leaf,) = arrange(inputs.raw)
        target = F.one_hot(inputs.flat_labels[valid], num_classes=classes + 1)[:, :-1]
        target = target.to(leaf.dtype)
    leaf.requires_grad_()
    return Variant(
        FOCAL,
        "fvcore",
        [leaf],
        lambda: (
            sigmoid_focal_loss_jit(leaf, target, alpha=0.25, gamma=2.0, reduction="sum")
            / inputs.normalizer
        ),
        arrange,
        needs_s=PEER_NEEDS,
    )


def floor_calls(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """What no loss can undercut: read the logits and write as much; the same with one ``exp``."""
    sources = [x.detach() for x in inputs.raw]
    targets = [torch.empty_like(x) for x in sources]

    def copy() -> None:
        for x, out in zip(sources, targets, strict=True):
            out.copy_(x)

    def exp() -> None:
        for x, out in zip(sources, targets, strict=True):
            torch.exp(x, out=out)

    return {"copy": copy, "exp": exp}


def reference(inputs: Inputs, setting: str, impl: str) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients for the same, rounded logits in float64.

    Args:
        inputs: whatever dtype.
        setting: the loss.
        impl: ``eager``, which shares least with what it checks, or ``torch`` where that is too
            large.
    """
    raw = [x.detach().double().requires_grad_() for x in inputs.raw]
    value = inputs.loss(build_loss(setting, impl), raw)
    return value.detach(), list(torch.autograd.grad(value, raw))


def disagreement(
    variant: Variant, expected: tuple[Tensor, list[Tensor]], tolerance: Tolerance
) -> str | None:
    """How a variant is off; None where it agrees within the tolerance.

    Args:
        variant: is run once.
        expected: of :func:`reference`.
        tolerance: of the dtype.
    """
    before = [x._version for x in variant.leaves]
    value, gradients = variant.gradient()
    if [x._version for x in variant.leaves] != before:
        return "it changed the logits"
    true_value, true_gradients = expected
    off = abs(float(value) - float(true_value)) / max(abs(float(true_value)), 1e-12)
    if not off <= tolerance.value:  # NaN too
        return f"its value is off by {off:.1e} of itself, allowed is {tolerance.value:.1e}"
    true_gradients = variant.arrange(true_gradients)
    largest = max(float(x.abs().max()) for x in true_gradients)
    excess = max(
        _excess(found, true, tolerance.slope)
        for found, true in zip(gradients, true_gradients, strict=True)
    )
    allowed = tolerance.floor * largest + tolerance.least
    if not excess <= allowed:
        return (
            f"an element of its gradient is off by {excess:.1e} more than {tolerance.slope:.1e} of "
            f"itself, allowed is {allowed:.1e}"
        )
    return None


def _excess(found: Tensor, true: Tensor, slope: float) -> float:
    """The largest of ``|found - true| - slope |true|``, in slices that keep memory small."""
    worst = torch.zeros((), dtype=torch.float64, device=true.device)
    for a, b in zip(found.flatten().split(1 << 22), true.flatten().split(1 << 22), strict=True):
        worst = torch.maximum(worst, ((a - b).abs() - slope * b.abs()).max())
    return float(worst)
