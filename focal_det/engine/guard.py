"""Stops training at the first loss or gradient that is not finite, and says where it came from.

Nothing is changed by such a step: neither weights, buffers nor optimizer. What it takes to see the
same again is kept in ``OUTPUT_DIR/non_finite/iter_<n>_rank_<r>/``:

    report.json    what :func:`~.failure_text.format_report` prints; NaN and infinity are strings
    model.pth      the weights and buffers of before the step
    batch.pt       the images and labels; :func:`~.plain_batch.from_plain` brings them back
    config.yaml    what the model was built from

and ``python tools/replay.py`` runs it. N images of this process, L feature levels, A anchors per
location, K foreground classes.
"""

import functools
import io
import json
import logging
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from detectron2.engine import HookBase
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from focal_det.files import write_whole
from focal_det.modeling import LossNormalizer
from focal_det.safe_loading import UnsafeFileError, load_yaml

from .diagnosis import Report, Step, describe_failure, name_losses, not_finite, number
from .failure_text import format_report, headline, summary
from .plain_batch import to_plain

logger = logging.getLogger(f"detectron2.{__name__}")


class NonFiniteGuard(HookBase):
    """Looks at the losses and gradients of each step before anything uses them.

    Autograd calls it at the end of the backward pass, after DistributedDataParallel has averaged
    and before the optimizer, the gradient clipping and Detectron2's own check, in any of
    Detectron2's trainers. A healthy step costs one pass over the gradients, a copy of the buffers
    that training changes, and one read from the device (of the sum of the losses and the norm of
    the gradient); with several processes also one reduction of these two numbers, so that all stop
    at the same step. Register it in every process.

    A step may have several forward and backward passes, to accumulate gradients; the batches are
    held until it ends. The one whose losses are not finite is reported and kept, and otherwise the
    last that the backward pass reached. Passes outside of a step are let be.

    With a loss scale, gradients that overflow while the losses are finite are the scaler's affair:
    it skips the step and lowers the scale. They are an alarm once `patience` steps in a row
    overflowed with the scale at or below `scale_floor`, where no scaling is left to blame.

    Args:
        model: the model that is trained, also inside DistributedDataParallel.
        optimizer: its optimizer; gradients are looked at for the parameters that it holds.
        output_dir: below it the reports are kept.
        grad_scaler: the scaler of mixed precision in float16, None without one.
        config_yaml: the config as text, of Detectron2's either kind, for ``tools/replay.py``.
        scale_floor: > 0.
        patience: >= 1.

    Raises:
        ValueError: a `scale_floor` or `patience` out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        output_dir: str | Path,
        *,
        grad_scaler: Any = None,
        config_yaml: str = "",
        scale_floor: float = 1.0,
        patience: int = 5,
    ) -> None:
        if not scale_floor > 0:
            raise ValueError(f"scale_floor must be > 0, got {scale_floor}")
        if patience < 1:
            raise ValueError(f"patience must be >= 1, got {patience}")
        self._module = model.module if isinstance(model, DistributedDataParallel) else model
        self._optimizer = optimizer
        self._output_dir = Path(output_dir)
        self._grad_scaler = grad_scaler
        self._config_yaml = config_yaml
        self._scale_floor, self._patience = scale_floor, patience
        self._overflows = 0
        self._overflowed = False  # in this step
        self._watching = False
        self._queued = False
        self._forwards: list[Step] = []  # of this step
        self._reached: list[Step] = []  # of them, by a backward pass that was not checked yet
        self._buffers: list[tuple[list[Tensor], list[Tensor]]] = []
        self._handles: list[Any] = []

    def before_train(self) -> None:
        """Begin to watch the model."""
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for buffer in _changing_buffers(self._module):
            groups.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        self._buffers = [(group, [x.clone() for x in group]) for group in groups.values()]
        device = next(self._module.parameters()).device
        self._one = torch.ones(1, 1, dtype=torch.float32, device=device)
        self._handles = [self._module.register_forward_hook(self._after_forward)]

    def before_step(self) -> None:
        """Keep the buffers; begin to watch forward passes."""
        with torch.no_grad():
            for buffers, kept in self._buffers:
                torch._foreach_copy_(kept, buffers)
        if not self._overflowed:
            self._overflows = 0
        self._watching, self._queued, self._overflowed = True, False, False

    def after_step(self) -> None:
        """Let go of the batches."""
        self._watching = False
        self._forwards, self._reached = [], []

    def after_train(self) -> None:
        """Leave the model as it was found."""
        self.after_step()
        for handle in self._handles:
            handle.remove()
        self._handles, self._buffers = [], []

    def _after_forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not (self._watching and module.training and torch.is_grad_enabled()):
            return
        losses = name_losses(output)
        with torch.no_grad():  # autocast tells by what it does, alike on all devices and versions
            precision = torch.mm(self._one, self._one).dtype
        detached = {name: loss.detach() for name, loss in losses.items()}
        step = Step(inputs[0] if inputs else None, detached, precision)
        self._forwards.append(step)
        # What is left of a backward pass that failed.
        self._queued, self._reached = False, []
        # Weakly, for who keeps a loss is not to keep its batch.
        on_backward = functools.partial(self._on_backward, weakref.ref(step))
        for loss in losses.values():
            if loss.requires_grad:
                loss.register_hook(on_backward)

    def _on_backward(self, reference: weakref.ref[Step], gradient: Tensor) -> None:
        step = reference()
        if step is None:  # of a step that is over
            return
        if step not in self._reached:
            self._reached.append(step)
        if not self._queued:
            self._queued = True
            # Twice, to come after DistributedDataParallel, which queues its own in between.
            queue = Variable._execution_engine.queue_callback
            queue(lambda: queue(self._check))

    @torch.no_grad()
    def _check(self) -> None:
        self._queued, reached, self._reached = False, self._reached, []
        losses = torch.stack([x.float().sum() for step in reached for x in step.losses.values()])
        values = torch.stack([losses.sum(), self._gradient_norm().to(losses)])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
        if not all(math.isfinite(value) for value in values.tolist()):
            self._look_closer(sorted(reached, key=self._forwards.index))

    def _gradient_norm(self) -> Tensor:
        groups = self._optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return self._one.new_zeros(())
        norms = [norm.to(self._one) for norm in torch._foreach_norm(gradients)]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _look_closer(self, steps: Sequence[Step]) -> None:
        """Stop training, unless the norm alone is too large for its type or a scale explains it.

        Args:
            steps: the forward passes that the backward pass reached, in their order; not empty.
        """
        optimized = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        gradients = {
            name: parameter.grad
            for name, parameter in self._module.named_parameters()
            if id(parameter) in optimized and parameter.grad is not None
        }
        bad = [step for step in steps if not_finite(step.losses)]
        found = (bool(bad), bool(not_finite(gradients)))
        in_losses, in_gradients = map(any, zip(*comm.all_gather(found), strict=True))
        if in_losses or (in_gradients and not self._is_overflow()):
            step = bad[0] if bad else steps[-1]
            known = bool(bad) or len(steps) == 1
            self._stop(step, gradients, self._name_forward(step, known))

    def _is_overflow(self) -> bool:
        """Whether the loss scale may be why gradients are not finite; counts how often it was."""
        if self._grad_scaler is None or not self._grad_scaler.is_enabled():
            return False
        if not self._overflowed:  # a step counts once, however many backward passes it has
            at_floor = self._grad_scaler.get_scale() <= self._scale_floor
            self._overflows = self._overflows + 1 if at_floor else 0
        self._overflowed = True
        return self._overflows < self._patience

    def _name_forward(self, step: Step, known: bool) -> str | None:
        """Which of the forward passes so far it is, None if it is the only one."""
        if len(self._forwards) == 1:
            return None
        number = f"number {self._forwards.index(step) + 1} of {len(self._forwards)} in this step"
        return number if known else f"{number}; which of them gave the gradient is not known"

    def _stop(self, step: Step, gradients: dict[str, Tensor], forward_pass: str | None) -> None:
        normalizer = getattr(self._module, "normalizer", None)
        divisor = normalizer.value.item() if isinstance(normalizer, LossNormalizer) else None
        for buffers, kept in self._buffers:
            torch._foreach_copy_(buffers, kept)
        if self._grad_scaler is not None:
            step = replace(step, loss_scale=self._grad_scaler.get_scale())  # 1 where disabled
        report: Report = {
            "iteration": self.trainer.iter,
            "rank": comm.get_rank(),
            "world_size": comm.get_world_size(),
            "seed": torch.initial_seed(),
            "learning_rates": sorted({float(g["lr"]) for g in self._optimizer.param_groups}),
            "loss_scale": step.loss_scale,
            "forward_pass": forward_pass,
            "precision": str(step.precision).removeprefix("torch."),
            "normalizer": number(divisor),
            **describe_failure(self._module, step, gradients),
        }
        name = f"iter_{report['iteration']}_rank_{report['rank']}"
        folder = self._output_dir / "non_finite" / name
        report["ranks"] = comm.all_gather({**summary(report), "folder": str(folder)})
        saved = self._save(folder, report, step.batch)
        logger.error(format_report(report))
        # A process that ends takes the others with it, however far they are.
        comm.synchronize()
        which = "" if forward_pass is None else f"Forward pass: {forward_pass}. "
        raise FloatingPointError(f"{headline(report)}. {which}No weight was changed. {saved}")

    def _save(self, folder: Path, report: Report, batch: Any) -> str:
        """Write the folder's files; a sentence that says where, or why there are none."""

        def as_json(file: IO[bytes]) -> None:
            text = json.dumps(report, indent=2, allow_nan=False, default=str)
            file.write(f"{text}\n".encode())

        contents: dict[str, Callable[[IO[bytes]], object]] = {
            "report.json": as_json,
            "config.yaml": lambda file: file.write(self._config_yaml.encode()),
            "model.pth": lambda file: torch.save({"model": self._module.state_dict()}, file),
            "batch.pt": lambda file: torch.save(to_plain(batch), file),
        }
        lost = []
        for name, write in contents.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / name, write)
            except Exception as error:  # whatever a full disk or an odd batch raises: named below
                lost.append(f"{name}: {type(error).__name__}: {error}")
        if lost:
            return f"Not all of it could be kept in {folder}: {'; '.join(lost)}"
        command, unfit = f"python tools/replay.py {folder}", self._why_unfit()
        if unfit:
            return (
                f"Report, batch and weights are in {folder}. The config that is kept there cannot "
                f"be replayed as it is ({unfit}): `{command} --config-file FILE`, with the file "
                "that this training was started with, runs that step again."
            )
        return f"Report, batch and weights are in {folder}: `{command}` runs that step again."

    def _why_unfit(self) -> str:
        """Why ``tools/replay.py`` cannot build the model from the config's text; empty if it can.

        YAML does not hold each class, function or dtype that a LazyConfig may have for a value,
        and what it holds of them is not plain data.
        """
        if not self._config_yaml.strip():
            return "it is empty, for YAML cannot hold it"
        try:
            load_yaml(io.StringIO(self._config_yaml))
        except UnsafeFileError as error:
            return str(error)
        except yaml.YAMLError as error:
            return f"{type(error).__name__}: {error}"
        return ""


def _changing_buffers(module: nn.Module) -> list[Tensor]:
    """Buffers that a training step may change."""
    return [
        buffer
        for part in module.modules()
        if not isinstance(part, FrozenBatchNorm2d)
        for buffer in part.buffers(recurse=False)
    ]
