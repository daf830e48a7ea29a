"""What every classification loss of a dense detector promises.

Letters used throughout: N images, R anchors, K foreground classes. A *term* is one (anchor, class)
pair: K independent binary classifiers per anchor, no softmax. With x the logit of a term and
y = +1 for the anchor's own class, y = -1 for every other class and for background anchors:

    x_t = y x          p_t = sigmoid(x_t)          alpha_t = alpha if y = +1 else 1 - alpha
"""

import inspect
import math
import numbers
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from focal_det.kernels import (
    LossSums,
    Terms,
    check_implementation,
    elementwise_terms,
    sum_levels,
    sum_terms_per_anchor,
)

__all__ = [
    "ClassificationLoss",
    "ElementwiseLoss",
    "LossSums",
    "PlainLoss",
    "as_classification_loss",
    "check_in_range",
    "config_keys",
]

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}
"""What every module has, and no formula depends on."""


def check_in_range(
    owner: object,
    name: str,
    value: float,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    low_excluded: bool = False,
) -> None:
    """Raise unless ``low <= value <= high`` (``low < value`` if `low_excluded`).

    Args:
        owner: the object whose argument it is; its class is named in the error.
        name, value: the argument; NaN and anything that is not a number are out of range.

    Raises:
        ValueError: names the argument, its value and the allowed range.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    inside = is_number and low <= value <= high and not (low_excluded and value == low)
    # Infinity is no usable setting even where the range has no upper end.
    if not inside or math.isinf(value):
        bound = ">" if low_excluded else ">="
        if math.isinf(low):
            allowed = "a finite number"
        elif math.isinf(high):
            allowed = f"finite and {bound} {low:g}" if value == math.inf else f"{bound} {low:g}"
        else:
            allowed = f"in [{low:g}, {high:g}]"
        raise ValueError(f"{type(owner).__name__}: {name} must be {allowed}, got {value!r}")


def check_inputs(logits: Tensor, labels: Tensor, boxes: Tensor | None = None) -> None:
    """Check one loss call against the contract.

    Args:
        logits: (..., K) floating point.
        labels: (...) integer, ``0..K-1`` foreground class, ``K`` background, ``-1`` ignored.
        boxes: (..., 4), or None.

    Raises:
        TypeError: one is no tensor.
        ValueError: names what does not fit, the shape or value, and what is allowed.
    """
    for name, given in (("logits", logits), ("labels", labels), ("boxes", boxes)):
        if not isinstance(given, Tensor) and not (name == "boxes" and given is None):
            raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    if logits.dim() == 0 or logits.shape[-1] == 0 or logits.dtype not in LOGIT_DTYPES:
        raise ValueError(
            "logits must be a tensor of float16, bfloat16, float32 or float64, of shape (..., K) "
            f"with K >= 1, got {tuple(logits.shape)} {logits.dtype}"
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of logits without its last dimension, "
            f"{tuple(logits.shape[:-1])}, got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers (int64), got {labels.dtype}")
    if boxes is not None and boxes.shape != (*labels.shape, 4):
        raise ValueError(
            f"boxes must have the shape of labels and a last dimension of 4, "
            f"{(*labels.shape, 4)}, got {tuple(boxes.shape)}"
        )
    num_classes = logits.shape[-1]
    # What is captured into a CUDA graph cannot be looked at.
    hidden = labels.is_cuda and torch.cuda.is_current_stream_capturing()
    if labels.numel() > 0 and not hidden:
        low, high = (int(x) for x in torch.aminmax(labels))
        if low < -1 or high > num_classes:
            raise ValueError(
                f"labels must lie in -1..{num_classes} (-1 ignored, 0..{num_classes - 1} "
                f"foreground, {num_classes} background), got {low if low < -1 else high}"
            )


def config_keys(loss: type[nn.Module]) -> dict[str, str]:
    """Full config key of each constructor argument of a loss, in the order of the signature.

    Args:
        loss: a class in ``LOSS_REGISTRY``. One that has a ``config_keys`` of its own says them;
            else they are ``MODEL.FOCAL_DET.<NODE>.<ARGUMENT>``, where the node is the class's own
            ``config_node`` or, without one, its name in upper snake case.
    """
    if issubclass(loss, ClassificationLoss):
        return loss.config_keys()
    return _derived_keys(loss)


def _derived_keys(loss: type[nn.Module]) -> dict[str, str]:
    boundary = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
    # Not inherited: a subclass with other defaults must not change its parent's keys.
    node = vars(loss).get("config_node") or re.sub(boundary, "_", loss.__name__).upper()
    return {
        name: f"MODEL.FOCAL_DET.{node}.{name.upper()}"
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


class ClassificationLoss(nn.Module, ABC):
    """Base of every loss in ``LOSS_REGISTRY``: a sum over anchors, never normalised.

    A subclass implements :meth:`per_image`; most should derive from :class:`ElementwiseLoss`
    instead and state one formula. Constructor arguments need defaults: each becomes the config key
    ``MODEL.FOCAL_DET.<config_node>.<ARGUMENT>``, and the defaults are those of the signature.
    """

    needs_boxes: bool = False
    """Whether :meth:`per_image` wants the predicted boxes, which cost a decoding."""

    report: Mapping[str, Tensor] = MappingProxyType({})
    """Scalars of the last call of :meth:`per_image`, 0-d, by the name they are logged under."""

    config_node: ClassVar[str] = ""
    """Node under ``MODEL.FOCAL_DET``; empty for the class name in upper snake case."""

    @torch.jit.unused  # so that a detector that holds a loss can be scripted for deployment
    def forward(self, logits: Tensor, labels: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Sum of the loss over all anchors that are not ignored.

        On a GPU the check of the labels waits for the device; :meth:`per_image`, which detectors
        call, checks nothing and waits for nothing.

        Args:
            logits: (..., K) float32, float16 or bfloat16, any strides.
            labels: (...) int64 in ``-1..K``: ``0..K-1`` foreground class, ``K`` background,
                ``-1`` ignored.
            boxes: (..., 4) predicted boxes, XYXY in absolute pixels; read only by losses that
                say so (``needs_boxes``). Its leading dimension is the image; (R, 4) is one image.

        Returns:
            0-d float32 (float64 for float64 logits). Gradients reach `logits` only; with no
            anchor, or none that counts, it is 0 and so is its gradient.

        Raises:
            ValueError: shapes that do not fit each other, or a label outside ``-1..K``.
        """
        check_inputs(logits, labels, boxes)
        while labels.dim() < 2:  # one image, or one anchor of it
            logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
            boxes = None if boxes is None else boxes.unsqueeze(0)
        return self.per_image([logits], [labels], None if boxes is None else [boxes]).total.sum()

    @abstractmethod
    def per_image(
        self,
        logits: Sequence[Tensor],
        labels: Sequence[Tensor],
        boxes: Sequence[Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> LossSums:
        """Sums of the loss for each image over all feature levels.

        Args:
            logits: one (N, ..., K) a level, any strides; a view of the head's output will do.
            labels: one (N, ...) a level.
            boxes: one (N, ..., 4) a level, or None.
            weights: (N,), a constant factor of each image's sums; None for 1. Multiplied
                here, a normalizer costs nothing; afterwards it costs a pass over the gradient.

        Returns:
            The sums, (N,) each. Inputs are not checked here: :meth:`forward` does.
        """

    def per_anchor(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor | None:
        """The loss of each anchor summed over classes, for reports.

        Args:
            logits, labels: see :meth:`per_image`.

        Returns:
            (N, R) without a gradient, 0 for ignored anchors; None where the loss is no sum over
            anchors.
        """
        return None

    def use(self, impl: str) -> Self:
        """Choose how the loss is computed; see :data:`focal_det.kernels.IMPLEMENTATIONS`.

        Args:
            impl: ``auto``; losses that are an :class:`ElementwiseLoss` have others too.

        Returns:
            This loss.

        Raises:
            ValueError: a name that this loss does not know.
            RuntimeError: an implementation that cannot be had here; it says why.
        """
        if impl != "auto":
            name = type(self.loss if isinstance(self, PlainLoss) else self).__name__
            raise ValueError(f"{name} has no implementations: impl must be auto, got {impl!r}")
        return self

    @classmethod
    def config_keys(cls) -> dict[str, str]:
        """Full config key of each constructor argument, in the order of the signature."""
        return _derived_keys(cls)

    def extra_repr(self) -> str:
        """The constructor arguments that are kept under their own name."""
        kept = {name: getattr(self, name) for name in self.config_keys() if hasattr(self, name)}
        return ", ".join(f"{name}={value!r}" for name, value in kept.items())


class ElementwiseLoss(ClassificationLoss):
    """A loss that is a sum of one function over all terms.

    A subclass states the function of x_t in :meth:`value`; the derivative is then taken by
    autograd, block by block. Where a closed form is faster, :meth:`value_and_slope` states both.
    Sign, alpha weighting, ignored anchors, strides and precision are handled here.
    """

    impl: str = "auto"
    """How it is computed; see :meth:`use`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A closed form belongs to the value that it was derived from: whoever changes one of the
        # two does not inherit the other.
        super().__init_subclass__(**kwargs)
        stated = {"value", "value_and_slope"} & vars(cls).keys()
        if stated == {"value"}:
            cls.value_and_slope = ElementwiseLoss.value_and_slope  # type: ignore[method-assign]
        elif stated == {"value_and_slope"}:
            cls.value = ElementwiseLoss.value  # type: ignore[method-assign]

    alpha: float | None = None
    """Weight of the foreground terms, ``1 - alpha`` of the background ones; None or negative for no
    weighting."""

    def value(self, x_t: Tensor, foreground: bool) -> Tensor:
        """Loss per term, without the alpha weight.

        Args:
            x_t: logits times y, float32 or better, any shape; must not be changed.
            foreground: whether these are the terms with y = +1. Most losses do not ask.

        Returns:
            A tensor of the shape of `x_t`, from operations that autograd can differentiate.
        """
        if type(self).value_and_slope is ElementwiseLoss.value_and_slope:
            raise NotImplementedError(f"{type(self).__name__} needs value() or value_and_slope()")
        return self.value_and_slope(-x_t, foreground)[0]

    def value_and_slope(self, z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        """Loss per term and its derivative by z = -x_t, without the alpha weight.

        The logit of the error 1 - p_t is z. Nearly all terms are background, whose z is the logit
        itself: no operation is spent on a sign.

        Args:
            z: float32 or better, any shape; must not be changed.
            foreground: see :meth:`value`.

        Returns:
            Two tensors of the shape of `z`, finite for ``|z| <= 1e4``.
        """
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = self.value(-z, foreground)
            if not value.requires_grad:  # constant, such as no loss at all for one side
                return value, torch.zeros_like(value)
            # None where this side depends on something else that requires a gradient, not on z.
            (slope,) = torch.autograd.grad(value, z, torch.ones_like(value), allow_unused=True)
        return value.detach(), torch.zeros_like(value) if slope is None else slope

    def terms(self) -> Terms:
        """What the fused operations compute: the function of x_t and the two alpha weights."""
        background, foreground = 1.0, 1.0
        if self.alpha is not None and self.alpha >= 0:
            background, foreground = 1.0 - self.alpha, self.alpha
        return Terms(self.value_and_slope, self.value, background, foreground, self._settings())

    def _settings(self) -> Hashable:
        """All that a formula can depend on, to tell compiled ones apart; None if not simple."""
        if self._parameters or self._buffers or self._modules:
            return None
        own = {name: x for name, x in vars(self).items() if name not in MODULE_ATTRIBUTES}
        simple = all(isinstance(x, (int, float, str, type(None))) for x in own.values())
        return (type(self), *sorted(own.items())) if simple else None

    def elementwise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of every term.

        Args:
            logits, labels: see :meth:`forward`.

        Returns:
            (..., K) float32 (float64 for float64 logits), 0 where the anchor is ignored.

        Raises:
            ValueError: see :meth:`forward`.
        """
        check_inputs(logits, labels)
        return elementwise_terms(self.terms(), logits, labels, self._implementation())

    def use(self, impl: str) -> Self:
        """See :meth:`ClassificationLoss.use`."""
        check_implementation(impl)
        self.impl = impl
        return self

    def per_image(
        self,
        logits: Sequence[Tensor],
        labels: Sequence[Tensor],
        boxes: Sequence[Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> LossSums:
        """See :meth:`ClassificationLoss.per_image`; `boxes` is not read."""
        return sum_levels(self.terms(), logits, labels, weights, self._implementation())

    @torch.no_grad()
    def per_anchor(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor | None:
        """See :meth:`ClassificationLoss.per_anchor`."""
        terms, impl = self.terms(), self._implementation()
        levels = [
            sum_terms_per_anchor(terms, x, y, impl) for x, y in zip(logits, labels, strict=True)
        ]
        return join_levels(levels)

    def _implementation(self) -> str:
        """`impl`, or the one that parameters of the loss's own get a gradient from.

        Raises:
            RuntimeError: the loss has such parameters and `impl` would leave them out.
        """
        if self.impl == "eager" or not any(x.requires_grad for x in self.parameters()):
            return self.impl
        if self.impl != "auto":
            raise RuntimeError(
                f"{type(self).__name__} has parameters that require a gradient, which impl "
                f"{self.impl!r} (MODEL.FOCAL_DET.IMPL) does not give: choose 'auto' or 'eager'"
            )
        return "eager"

    def _set_alpha(self, alpha: float | None) -> None:
        """Check and keep `alpha`; None and negative values mean no weighting."""
        if alpha is None or (isinstance(alpha, numbers.Real) and alpha < 0):
            self.alpha = None
        else:
            check_in_range(self, "alpha", alpha, 0.0, 1.0)
            self.alpha = float(alpha)


class PlainLoss(ClassificationLoss):
    """A loss that is any module called as ``loss(logits, labels)``, for one image at a time.

    Args:
        loss: returns the sum over anchors, 0-d, for logits (R, K) and labels (R,). With a true
            attribute ``needs_boxes`` it gets ``boxes`` (R, 4) too.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.needs_boxes = bool(getattr(loss, "needs_boxes", False))

    def per_image(
        self,
        logits: Sequence[Tensor],
        labels: Sequence[Tensor],
        boxes: Sequence[Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> LossSums:
        """See :meth:`ClassificationLoss.per_image`; the share of the foreground is not known."""
        joined = {"logits": join_levels(logits, trailing=1), "labels": join_levels(labels)}
        if self.needs_boxes and boxes is not None:
            joined["boxes"] = join_levels(boxes, trailing=1)
        sums = []
        for image in range(len(labels[0])):
            arguments = {name: x[image] for name, x in joined.items()}
            sums.append(self.loss(arguments.pop("logits"), arguments.pop("labels"), **arguments))
        total = torch.stack(sums)
        return LossSums(total if weights is None else total * weights, None)


def as_classification_loss(loss: nn.Module) -> ClassificationLoss:
    """`loss` itself, or wrapped where it is a module that knows only ``loss(logits, labels)``."""
    return loss if isinstance(loss, ClassificationLoss) else PlainLoss(loss)


def join_levels(levels: Sequence[Tensor], trailing: int = 0) -> Tensor:
    """(N, ..., *trailing dimensions) a level -> (N, R, *trailing dimensions) over all levels."""
    return torch.cat([x.flatten(1, x.dim() - 1 - trailing) for x in levels], dim=1)
