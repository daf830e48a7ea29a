"""Everything that bends Detectron2, each with the condition under which it can go."""

import functools
from typing import Any

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
        return create(model, **kwargs)

    defaults.create_ddp_model = create_ddp_model
