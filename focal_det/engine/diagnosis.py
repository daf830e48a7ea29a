"""What a model, a batch and its gradients say about a loss or gradient that is not finite.

N images of this process, L feature levels, A anchors per location, K foreground classes.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from focal_det.modeling import LossNormalizer

from .plain_batch import to_plain

Report = dict[str, Any]

PREDICTIONS_OF = {"loss_cls": "logits", "loss_box_reg": "deltas"}

# Why an image is to blame, the surest reason first, by what its entry of the report says.
REASONS: dict[str, Callable[[Report], bool]] = {
    "whose pixels are not finite": lambda image: image["non_finite_pixels"] > 0,
    "whose boxes are not finite": lambda image: image["non_finite_boxes"] > 0,
    "whose own losses are not finite": lambda image: bool(unsound(image["losses"])),
    "whose predictions are not finite": lambda image: image["predictions_finite"] is False,
}


@dataclass(frozen=True, eq=False)
class Step:
    """What a forward pass in training saw and gave.

    Attributes:
        batch: N dictionaries in Detectron2's form; whatever the model was given, if it is another.
        losses: 0-d each, without their graph.
        precision: what autocast lowered to; float32 without it.
        loss_scale: what the losses were multiplied by before the backward pass.
    """

    batch: Any
    losses: dict[str, Tensor]
    precision: torch.dtype
    loss_scale: float = 1.0


class Trace:
    """Follows a forward pass.

    Attributes:
        origin: the module that first gave something non-finite for finite inputs, None if none did.
        order: of each module that was called, when it last was.
        predictions: of a RetinaNet's head, ``logits`` (L tensors (N, A x K, Hi, Wi)) and ``deltas``
            (N, A x 4, Hi, Wi); empty for other models.
        num_foreground: (N,) anchors assigned to an object; None where that is not known.
    """

    def __init__(self) -> None:
        self.origin: str | None = None
        self.order: dict[str, int] = {}
        self.predictions: dict[str, list[Tensor]] = {}
        self.num_foreground: Tensor | None = None
        self._calls = 0

    @contextlib.contextmanager
    def of(self, module: nn.Module) -> Iterator[None]:
        """Follow what `module` does inside the ``with`` block."""
        handles = [
            part.register_forward_hook(functools.partial(self._record, name))
            for name, part in module.named_modules()
            if name
        ]
        if isinstance(module, RetinaNet):
            handles.append(module.head.register_forward_hook(self._keep_predictions))
        normalizer = getattr(module, "normalizer", None)
        if isinstance(normalizer, LossNormalizer):
            handles.append(normalizer.register_forward_hook(self._keep_num_foreground))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.order[name] = self._calls = self._calls + 1
        if self.origin is None and not _all_finite(output) and _all_finite(inputs):
            self.origin = name

    def _keep_predictions(self, head: nn.Module, inputs: Any, output: Any) -> None:
        self.predictions = dict(zip(("logits", "deltas"), output, strict=True))

    def _keep_num_foreground(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.num_foreground = inputs[0]


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Let a model run and put back its buffers and the random state; what it logs goes nowhere.

    A backward pass belongs inside, too: it reads buffers. Parameters must not be changed inside.
    """
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    device = next(module.parameters()).device
    devices = [device] if device.type == "cuda" else []
    # Not iteration 0, at which models may also draw.
    with EventStorage(1), torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, kept in buffers:
                    buffer.copy_(kept)


def lowered_to(precision: torch.dtype, module: nn.Module) -> torch.autocast:
    """Autocast to `precision` on the model's device; none for float32."""
    device, enabled = next(module.parameters()).device, precision != torch.float32
    return torch.autocast(device.type, precision if enabled else None, enabled=enabled)


@contextlib.contextmanager
def images_apart(module: nn.Module) -> Iterator[None]:
    """Have batch normalization use its running statistics, so that no image reaches another."""
    norms = [x for x in module.modules() if isinstance(x, _BatchNorm) and x.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


@torch.no_grad()
def describe_failure(module: nn.Module, step: Step, gradients: dict[str, Tensor]) -> Report:
    """All that a model, a batch and its gradients say about what is not finite.

    Runs the batch again, forward only: once whole, and once image by image.

    Args:
        module: the model, in training mode, with the weights and buffers of before the step; it is
            left so.
        step: the step.
        gradients: of each parameter, by its name.

    Returns:
        The report's entries but for those of the training around it. ``term`` is the first loss, or
        else the gradient that the backward pass came to first, None if all is finite. Where the
        batch has another form than Detectron2's, or the second pass fails, since there may be no
        memory left, ``not_examined`` is the reason: half a report is better than none.
    """
    trace, not_examined = Trace(), None
    images: list[Report] = []
    try:
        images = [_describe_image(index, entry) for index, entry in enumerate(step.batch)]
    except Exception as error:
        not_examined = f"the batch is no list of dictionaries: {type(error).__name__}: {error}"
    try:
        with undisturbed(module), lowered_to(step.precision, module), trace.of(module):
            module(step.batch)
        for image in images:
            _examine_image(module, step, image, trace)
    except Exception as error:
        not_examined = f"{type(error).__name__}: {error}"
    bad_losses = not_finite(step.losses)
    # The backward pass comes first to what was called last.
    bad_gradients = sorted(
        not_finite(gradients), key=lambda name: -trace.order.get(name.rpartition(".")[0], 0)
    )
    term, worst = None, None
    if bad_losses:
        term, worst = bad_losses[0], step.losses[bad_losses[0]]
    elif bad_gradients:
        term, worst = f"gradient of {bad_gradients[0]}", gradients[bad_gradients[0]]
    levels = _describe_levels(module, trace.predictions)
    return {
        "term": term,
        "value": None if worst is None else number(worst.abs().amax()),
        "level": _first_level(levels, term),
        "module": trace.origin,
        "image": _first_image(images),
        "losses": {name: number(loss) for name, loss in step.losses.items()},
        "gradient_norm": number(gradient_norm(gradients.values()) / step.loss_scale),
        "non_finite_gradients": bad_gradients,
        "non_finite_parameters": not_finite(dict(module.named_parameters())),
        "non_finite_buffers": not_finite(dict(module.named_buffers())),
        "largest_parameter": _largest(module.named_parameters()),
        "positives": _sum([image["positives"] for image in images]),
        "levels": levels,
        "images": images,
        "not_examined": not_examined,
    }


def _describe_image(index: int, entry: dict[str, Any]) -> Report:
    pixels = entry.get("image", torch.zeros(0))
    boxes = getattr(entry.get("instances"), "gt_boxes", None)
    corners = torch.zeros(0, 4) if boxes is None else boxes.tensor
    return {
        "index": index,
        "image_id": to_plain(entry.get("image_id")),
        "file_name": to_plain(entry.get("file_name")),
        "shape": list(pixels.shape),
        "non_finite_pixels": int((~pixels.isfinite()).sum()),
        "boxes": len(corners),
        "non_finite_boxes": int((~corners.isfinite()).any(dim=1).sum()),
        "positives": None,
        "predictions_finite": None,
        "losses": {},
    }


def _examine_image(module: nn.Module, step: Step, image: Report, trace: Trace) -> None:
    """Add what the pass over the whole batch and one over this image alone say."""
    index = image["index"]
    if trace.num_foreground is not None:
        image["positives"] = int(trace.num_foreground[index])
    if trace.predictions:
        maps = [x[index] for levels in trace.predictions.values() for x in levels]
        image["predictions_finite"] = _all_finite(maps)
    with undisturbed(module), lowered_to(step.precision, module), images_apart(module):
        losses = name_losses(module([step.batch[index]]))
    image["losses"] = {name: number(loss) for name, loss in losses.items()}


def _first_image(images: Sequence[Report]) -> Report | None:
    """The first image to blame, with the reason, by the first reason that any image gives."""
    for reason, applies in REASONS.items():
        blamed = [image for image in images if applies(image)]
        if blamed:
            names = {key: blamed[0][key] for key in ("index", "image_id", "file_name")}
            return {**names, "reason": reason, "others": len(blamed) - 1}
    return None


def _describe_levels(module: Any, predictions: dict[str, list[Tensor]]) -> list[Report] | None:
    if not predictions:
        return None
    return [
        {"level": name, "logits": _statistics(logits), "deltas": _statistics(deltas)}
        for name, logits, deltas in zip(
            module.head_in_features, predictions["logits"], predictions["deltas"], strict=True
        )
    ]


def _statistics(x: Tensor) -> Report:
    """Share of what is not finite, and the largest magnitude and the sum of the rest."""
    rest = x.float().nan_to_num(0.0, 0.0, 0.0)
    return {
        "non_finite_share": 1 - x.isfinite().double().mean().item(),
        "largest": rest.abs().amax().item(),
        "sum": rest.sum(dtype=torch.float64).item(),
    }


def _first_level(levels: list[Report] | None, term: str | None) -> str | None:
    """The first level with non-finite predictions, of the term's own kind if it has one."""
    kinds = [PREDICTIONS_OF[term]] if term in PREDICTIONS_OF else ["logits", "deltas"]
    for level in levels or []:
        if any(level[kind]["non_finite_share"] > 0 for kind in kinds):
            return str(level["level"])
    return None


def name_losses(output: Any) -> dict[str, Tensor]:
    """The losses that a model gave, by name; a single one is named as Detectron2 names it."""
    return output if isinstance(output, dict) else {"total_loss": output}


def gradient_norm(gradients: Iterable[Tensor]) -> float:
    """The Euclidean norm of all gradients together, in float64."""
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in gradients]
    return math.hypot(*norms)


def number(value: float | Tensor | None) -> float | str | None:
    """A number for JSON: NaN and infinity, which it cannot hold, as strings."""
    if value is None or math.isfinite(value):
        return None if value is None else float(value)
    return str(float(value))


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _largest(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """The largest finite magnitude, by the name of the parameter that has it."""
    sizes = {
        name: x.detach().float().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        for name, x in parameters
        if x.numel() > 0
    }
    name = max(sizes, key=sizes.__getitem__)
    return {name: sizes[name]}


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if not _all_finite(tensor)]


def _all_finite(value: Any) -> bool:
    """Whether all tensors in nested lists, tuples and dictionaries are finite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, dict):
        value = list(value.values())
    return all(map(_all_finite, value)) if isinstance(value, list | tuple) else True


def unsound(losses: Mapping[str, float | str | None]) -> list[str]:
    """Names of the losses of a report that are not finite."""
    return [name for name, value in losses.items() if isinstance(value, str)]
