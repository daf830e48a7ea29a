"""Numbers for the host from a device that nobody waits for."""

from collections import deque
from typing import Any

import torch
from torch import Tensor


class DeferredScalars:
    """Brings a few numbers a step to the host.

    From a CPU they arrive at once. From a GPU they are copied in the background and arrive one step
    later, when the device has long computed them; reading them then waits for nothing.
    """

    def __init__(self) -> None:
        self._on_their_way: deque[tuple[list[str], Tensor, torch.cuda.Event]] = deque()

    def exchange(self, scalars: dict[str, Tensor]) -> list[dict[str, float]]:
        """Hand in the scalars of this step; get those that have arrived, oldest first.

        Args:
            scalars: 0-d tensors on one device.
        """
        values = torch.stack([value.detach().double() for value in scalars.values()])
        if not values.is_cuda:
            return [dict(zip(scalars, values.tolist(), strict=True))]
        with torch.cuda.device(values.device):  # whose stream the copy is in
            if torch.cuda.is_current_stream_capturing():  # a graph's replays report nothing
                return []
            on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            on_host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._on_their_way.append((list(scalars), on_host, event))
        arrived = []
        while self._on_their_way and self._on_their_way[0][2].query():
            names, numbers, _ = self._on_their_way.popleft()
            arrived.append(dict(zip(names, numbers.tolist(), strict=True)))
        return arrived

    def __getstate__(self) -> dict[str, Any]:
        # Models are copied and pickled; what is on its way stays with the original.
        return {"_on_their_way": deque()}
