"""What a run must remember, beyond weights and optimizer, to go on as if it had not stopped."""

import json
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
        allow_changes: bool = False,
    ) -> None:
        self.model, self.loader, self.identity, self.period = model, loader, identity, period
        self.metrics_file, self.allow_changes = Path(metrics_file), allow_changes
        self.writers: Sequence[EventWriter] = ()
        self._later: list[HookBase] = []
        self._workers: list[dict[str, Any]] | None = None
        self._restored: dict[str, Any] | None = None

    def join(self, hooks: Sequence[HookBase]) -> list[HookBase]:
        """The hooks with this one in its place, before the one that saves checkpoints.

        Other processes than the main one have none; there it comes before the evaluation.
        """
        kinds = (PeriodicCheckpointer, EvalHook)
        place = next((i for i, hook in enumerate(hooks) if isinstance(hook, kinds)), len(hooks))
        self._later = [x for x in hooks[place:] if not isinstance(x, PeriodicCheckpointer)]
        return [*hooks[:place], self, *hooks[place:]]

    def after_step(self) -> None:
        """Gather what the other processes have to add, where a checkpoint is about to be made."""
        iteration = self.trainer.iter
        if (iteration + 1) % self.period == 0 or iteration >= self.trainer.max_iter - 1:
            self._workers = comm.gather(self._worker_state())

    def state_dict(self) -> dict[str, Any]:
        """The state of the step that is being finished; plain numbers, strings and tensors."""
        own = [self._worker_state()] if comm.get_world_size() == 1 else None
        return {
            "identity": self.identity,
            "seed": getattr(self.loader, "seed", None),
            "scalars": _scalars(self.trainer.storage),
            "written": max(_written(self.writers).values(), default=-1),
            "workers": own or self._workers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint; it comes into effect when training begins.

        Raises:
            ValueError: the checkpoint is of a run with another identity.
        """
        self._check_identity(state["identity"])
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
            _cut_metrics(self.metrics_file, -1 if state is None else state["written"])

    def before_train(self) -> None:
        """Restore, and finish the step in which the checkpoint was made."""
        if self._restored is None:
            return
        state, self._restored = self._restored, None
        self.trainer.iter = self.trainer.start_iter - 1
        self.trainer.storage.iter = self.trainer.iter
        for name, scalar in state["scalars"].items():
            for value, iteration in scalar["values"]:
                self.trainer.storage.put_scalar(
                    name, value, smoothing_hint=scalar["smoothing_hint"], cur_iter=iteration
                )
        for writer in _written(self.writers):
            writer._last_write = state["written"]
        workers = state["workers"]
        if workers is not None and len(workers) == comm.get_world_size():
            self._restore_worker(workers[comm.get_rank()])
        else:
            logger.warning(
                f"the checkpoint holds the random states of {len(workers or [])} processes and "
                f"this run has {comm.get_world_size()}: it goes on, but not bit for bit"
            )
        for hook in self._later:
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

    def _check_identity(self, found: dict[str, Any]) -> None:
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


def _cut_metrics(path: Path, written: int) -> None:
    """Take from ``metrics.json`` what was written after a checkpoint: it will be written again.

    The file is cut where it is, since a writer may have it open to append.
    """
    if not path.is_file():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["iteration"] > written:
                break
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)
