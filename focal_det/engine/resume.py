"""What a run must remember, beyond weights and optimizer, to go on as if it had not stopped."""

import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter
from torch import nn

from focal_det.data.loader import TrainLoader

logger = logging.getLogger(f"detectron2.{__name__}")

KEPT_VALUES = 200
"""Values of each scalar that are kept; writers smooth over the last 20 iterations."""

OF_THE_PROCESS = ("time", "data_time", "rank_data_time", "eta_seconds", "skipped_images")
"""Scalars that tell of the process and its machine, and begin anew with it."""


class RunState(HookBase):
    """The rest of a run's state, which a trainer keeps in its checkpoints as that of a hook.

    That is: the random states of all processes and their own buffers, the seed of the
    data, the scalars that writers smooth over, how far ``metrics.json`` had been written, and what
    the run is.

    A checkpoint is made in the middle of the hooks of a step. On resume, the hooks that come after
    it (evaluation, writers) are run for that step before the next one begins.

    Args:
        model: whose buffers may differ from process to process.
        loader: the training data.
        identity: what makes it this run and no other, such as the loss: numbers and strings by
            what a message should call them.
        period: iterations between checkpoints.
        metrics_file: what Detectron2's ``JSONWriter`` writes.
        settings: what a run may be resumed with another value of, but not bit for bit: a warning
            names it.
        allow_changes: go on from a checkpoint of a run with another identity.

    Attributes:
        writers: of this process; to be set where it has any.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        identity: dict[str, Any],
        period: int,
        metrics_file: str | os.PathLike[str],
        *,
        settings: dict[str, Any] | None = None,
        allow_changes: bool = False,
    ) -> None:
        if period < 1:
            raise ValueError(
                "SOLVER.CHECKPOINT_PERIOD (in a LazyConfig: train.checkpointer.period) must be 1 "
                f"or more iterations, got {period}"
            )
        self.model, self.loader, self.identity, self.period = model, loader, identity, period
        self.metrics_file, self.allow_changes = Path(metrics_file), allow_changes
        self.settings = settings or {}
        self.writers: Sequence[EventWriter] = ()
        self._workers: tuple[int, list[dict[str, Any]]] | None = None
        self._restored: dict[str, Any] | None = None

    def join(self, hooks: Sequence[HookBase]) -> list[HookBase]:
        """The hooks with this one in its place, before the one that saves checkpoints.

        Other processes than the main one have none; there it comes before the evaluation.
        """
        kinds = (PeriodicCheckpointer, EvalHook)
        place = next((i for i, hook in enumerate(hooks) if isinstance(hook, kinds)), len(hooks))
        return [*hooks[:place], self, *hooks[place:]]

    def after_step(self) -> None:
        """Gather what the other processes have to add, where a checkpoint is about to be made."""
        iteration = self.trainer.iter
        if (iteration + 1) % self.period == 0 or iteration >= self.trainer.max_iter - 1:
            self._workers = iteration, comm.gather(self._worker_state())

    def state_dict(self) -> dict[str, Any]:
        """The state of the step that is being finished; plain numbers, strings and tensors."""
        workers = [self._worker_state()] if comm.get_world_size() == 1 else None
        if self._workers is not None and self._workers[0] == self.trainer.iter:
            workers = self._workers[1]
        return {
            "identity": self.identity,
            "settings": self.settings,
            "seed": getattr(self.loader, "seed", None),
            "scalars": _scalars(self.trainer.storage),
            "written": max(_written(self.writers).values(), default=-1),
            "metrics_size": _size(self.metrics_file),
            "workers": workers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint; it comes into effect when training begins.

        Raises:
            ValueError: the checkpoint is of a run with another identity.
        """
        self._check_identity(state["identity"], state["settings"])
        self._restored = state

    def start(self, iteration: int, found: bool | None) -> None:
        """Say where training will begin, before it does.

        Args:
            iteration: the first one.
            found: whether there was a checkpoint to resume from; None where none was asked for.
        """
        state = self._restored
        if isinstance(self.loader, TrainLoader):
            if state is not None:
                self.loader.seed = state["seed"]
            self.loader.start_at(iteration)
        if found and state is None:
            logger.warning(
                "the checkpoint is not one of focal_det's trainer: weights, optimizer and schedule "
                "go on from it, the order of the data and the random states begin anew"
            )
        elif found is not None and comm.is_main_process():
            _cut(self.metrics_file, 0 if state is None else state["metrics_size"])
        if found and not isinstance(self.loader, TrainLoader):
            logger.warning(
                "the training data are not loaded by focal_det.data.loader.build_train_loader: "
                "their order begins anew"
            )

    def before_train(self) -> None:
        """Restore."""
        if self._restored is None:
            return
        state, storage = self._restored, self.trainer.storage
        self.trainer.iter = self.trainer.start_iter - 1
        for name, scalar in state["scalars"].items():
            for value, iteration in scalar["values"]:
                storage.iter = iteration
                storage.put_scalar(name, value, smoothing_hint=scalar["smoothing_hint"])
        storage.iter = self.trainer.iter
        for writer in _written(self.writers):
            writer._last_write = state["written"]
        workers = state["workers"]
        if workers is not None and len(workers) == comm.get_world_size():
            self._restore_worker(workers[comm.get_rank()])
            self._workers = self.trainer.iter, workers
        else:
            logger.warning(
                f"the checkpoint holds the random states of {len(workers or [])} processes and "
                f"this run has {comm.get_world_size()}: it goes on, but not bit for bit"
            )

    def finish_step(self) -> None:
        """Run the hooks of the step that the checkpoint was made in which came after it."""
        if self._restored is None:
            return
        self._restored = None
        hooks = self.trainer._hooks
        place = next(i for i, hook in enumerate(hooks) if hook is self)
        is_end = self.trainer.start_iter >= self.trainer.max_iter
        for hook in hooks[place + 1 :]:
            # At the end it writes two files, and a kill may have come between them.
            if is_end or not isinstance(hook, PeriodicCheckpointer):
                hook.after_step()

    def _worker_state(self) -> dict[str, Any]:
        algorithm, keys, *rest = np.random.get_state()
        state: dict[str, Any] = {
            "python": random.getstate(),
            # As plain numbers: a checkpoint holds nothing that needs NumPy's own unpickling.
            "numpy": (algorithm, np.asarray(keys).tolist(), *rest),
            "torch": torch.get_rng_state(),
            "buffers": {name: x.detach().cpu() for name, x in self._own_buffers().items()},
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def _restore_worker(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, buffer in self._own_buffers().items():
                if name in state["buffers"]:
                    buffer.copy_(state["buffers"][name])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])

    def _own_buffers(self) -> dict[str, torch.Tensor]:
        """Running statistics and the like, which only the main process's checkpoint has."""
        kept = self.model.state_dict().keys()
        return {name: x for name, x in self.model.named_buffers() if name in kept}

    def _check_identity(self, found: dict[str, Any], settings: dict[str, Any]) -> None:
        for key, value in self.settings.items():
            if key in settings and settings[key] != value:
                logger.warning(
                    f"{key} is {value!r}, the checkpoint was made with {settings[key]!r}: the run "
                    "goes on, but not as the one that was interrupted"
                )
        for key, value in self.identity.items():
            if found.get(key) == value:
                continue
            difference = (
                f"{key} is {value!r}, but the checkpoint was trained with {found.get(key)!r}"
            )
            if not self.allow_changes:
                raise ValueError(
                    f"{difference}: set it back, train into another OUTPUT_DIR, or pass "
                    "--allow-changes to go on all the same"
                )
            logger.warning(f"{difference} (allowed)")


def drop_unfit_state(optimizer: torch.optim.Optimizer) -> None:
    """Forget the optimizer's state of parameters that have another shape now.

    It happens where a run goes on with another number of classes.
    """
    for parameter, state in list(optimizer.state.items()):
        tensors = [x for x in state.values() if isinstance(x, torch.Tensor) and x.dim() > 0]
        if any(x.shape != parameter.shape for x in tensors):
            del optimizer.state[parameter]


def _scalars(storage: EventStorage) -> dict[str, dict[str, Any]]:
    hints = storage.smoothing_hints()
    return {
        name: {"smoothing_hint": hints[name], "values": history.values()[-KEPT_VALUES:]}
        for name, history in storage.histories().items()
        if name not in OF_THE_PROCESS
    }


def _written(writers: Sequence[EventWriter]) -> dict[Any, int]:
    """The iteration up to which each writer has written, of those that know."""
    known = {writer: getattr(writer, "_last_write", None) for writer in writers}
    return {writer: last for writer, last in known.items() if isinstance(last, int)}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _cut(path: Path, size: int) -> None:
    """Take from a file what was written after a checkpoint: it will be written again.

    The file is cut where it is, since a writer may have it open to append.
    """
    if _size(path) > size:
        logger.info(f"{path} is cut to what it was when the checkpoint was made ({size} bytes)")
        os.truncate(path, size)


class FinishStep(HookBase):
    """Has a :class:`RunState` finish its step once all hooks are ready; to be registered last.

    Args:
        state: the one that is registered too.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state

    def before_train(self) -> None:
        """See :meth:`RunState.finish_step`."""
        self._state.finish_step()
