"""Everything that bends Detectron2, each with the condition under which it can go."""

import atexit
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def allow_ddp_on_cpu() -> None:
    """Let Detectron2 train with several processes on CPUs.

    Its ``create_ddp_model`` always passes ``device_ids``, which DistributedDataParallel refuses for
    a model on the CPU. Can go once Detectron2 leaves them out there.
    """
    from detectron2.engine import defaults

    create = defaults.create_ddp_model
    if hasattr(create, "__wrapped__"):
        return

    @functools.wraps(create)
    def create_ddp_model(model: nn.Module, **kwargs: Any) -> nn.Module:
        if all(parameter.device.type == "cpu" for parameter in model.parameters()):
            kwargs.setdefault("device_ids", None)
            atexit.register(leave_process_group)
        return create(model, **kwargs)

    defaults.create_ddp_model = create_ddp_model


def leave_process_group() -> None:
    """Leave the process group, if this process is in one.

    Detectron2 does not, and gloo's threads, which CPUs use, now and then abort a process that ends
    with them running. Can go once Detectron2's ``launch`` leaves it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from detectron2.utils import comm

        torch.distributed.destroy_process_group()
        # Detectron2 holds on to the group of this machine, whose threads run as long as it does.
        comm._LOCAL_PROCESS_GROUP = None


def check_before_building(check: Callable[[Any, type], None]) -> None:
    """Have ``DefaultTrainer.build_model(cfg)`` call ``check(cfg, cls)`` first.

    Detectron2's own scripts have no other moment between the finished config and the data at which
    it is certain that this is a training or an evaluation: a bare ``build_model`` may be for
    anything. Can go once they have a hook there.
    """
    from detectron2.engine import DefaultTrainer

    build = DefaultTrainer.build_model
    if hasattr(build, "__wrapped__"):
        return

    @functools.wraps(build.__func__)
    def build_model(cls: type[DefaultTrainer], cfg: Any) -> nn.Module:
        check(cfg, cls)
        model: nn.Module = build.__func__(cls, cfg)
        return model

    DefaultTrainer.build_model = classmethod(build_model)


def keeps_inner_trainer() -> bool:
    """Whether ``DefaultTrainer`` keeps the optimizer and the loss scale in its checkpoints.

    That of 0.6 does not; ours does it there instead. Can go with the support of 0.6.
    """
    from detectron2.engine import DefaultTrainer

    return "state_dict" in vars(DefaultTrainer)


def grad_scaler(device: str, **options: Any) -> Any:
    """A ``GradScaler``; before PyTorch 2.3 there are those of CUDA alone. Can go with them."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device, **options)
    return torch.cuda.amp.GradScaler(**options)
