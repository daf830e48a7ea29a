"""Scalars on their way to the host: nothing lost, nothing early, all in order."""

import copy
import pickle
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from focal_det.modeling import deferred
from focal_det.modeling.deferred import DeferredScalars


def test_from_a_cpu_they_arrive_at_once():
    scalars = DeferredScalars()
    for step in range(3):
        assert scalars.exchange({"b": torch.tensor(step), "a": torch.tensor(0.5)}) == [
            {"b": step, "a": 0.5}
        ]


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(0.1),
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor(2**53 - 1),
        torch.tensor(-1),
        torch.tensor(7, dtype=torch.uint8),
        torch.tensor(True),
        torch.tensor(1e-40),
        torch.tensor(float("inf")),
        torch.tensor(0.1, dtype=torch.bfloat16),
        torch.tensor(0.1, requires_grad=True),
    ],
    ids=str,
)
def test_no_digit_is_lost(value):
    other = torch.tensor(1.5, dtype=torch.float16)
    (arrived,) = DeferredScalars().exchange({"value": value, "other": other})
    assert arrived == {"value": value.item(), "other": 1.5}
    assert type(arrived["value"]) is float


class Device:
    """A GPU that is as far as the test says, in place of torch inside the module.

    Its copies to the host have their values once it has come to them, and not before.
    """

    def __init__(self):
        self.issued = self.done = 0
        self.capturing = False
        self.cuda = SimpleNamespace(
            Event=lambda: Event(self),
            device=self.as_current,
            is_current_stream_capturing=lambda: self.capturing,
        )
        self.current = None

    @contextmanager
    def as_current(self, index):
        self.current = index
        yield
        self.current = None

    def stack(self, values):
        return SimpleNamespace(
            is_cuda=True,
            device="cuda:1",
            numbers=torch.stack(values),
            shape=(len(values),),
            dtype=torch.float64,
        )

    def empty(self, shape, dtype, pin_memory):
        assert pin_memory, "a copy to other memory is waited for"
        assert dtype == torch.float64
        return OnHost(self)


class Event:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self):
        assert self.device.current == "cuda:1", "recorded in the stream of another device"
        self.at = self.device.issued

    def query(self):
        return self.device.done >= self.at

    def synchronize(self):
        raise AssertionError("waits for the device")


class OnHost:
    def __init__(self, device):
        self.device = device

    def copy_(self, values, non_blocking):
        assert non_blocking
        self.device.issued += 1
        self.at, self.values = self.device.issued, values

    def tolist(self):
        assert self.device.done >= self.at, "read before it was written"
        return self.values.numbers.tolist()


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(deferred, "torch", device)
    return device


def hand_in(scalars, step):
    """Exchange the number of a step under a name of its own; get the numbers that have arrived."""
    arrived = scalars.exchange({f"step {step}": torch.tensor(step), "same": torch.tensor(0)})
    assert all(len(x) == 2 and x["same"] == 0 for x in arrived)
    return [int(name.split()[1]) for x in arrived for name in x if name != "same"]


def test_from_a_gpu_they_arrive_a_step_later(device):
    scalars = DeferredScalars()
    assert hand_in(scalars, 0) == []
    for step in range(1, 5):
        device.done = device.issued  # the host went on to the next step meanwhile
        assert hand_in(scalars, step) == [step - 1]


def test_a_slow_gpu_is_not_waited_for_and_loses_nothing(device):
    scalars = DeferredScalars()
    assert [hand_in(scalars, step) for step in range(3)] == [[], [], []]
    device.done = 2
    assert hand_in(scalars, 3) == [0, 1]
    assert hand_in(scalars, 4) == []
    device.done = 5
    assert hand_in(scalars, 5) == [2, 3, 4]


def test_a_fast_gpu_may_be_done_at_once(device):
    device.done = 100
    assert [hand_in(DeferredScalars(), step) for step in range(2)] == [[0], [1]]


def test_nothing_is_copied_while_a_graph_is_captured(device):
    scalars = DeferredScalars()
    hand_in(scalars, 0)
    device.capturing, device.done = True, 1
    assert hand_in(scalars, 1) == []
    assert device.issued == 1
    device.capturing = False
    assert hand_in(scalars, 2) == [0]


def test_copies_start_empty(device):
    scalars = DeferredScalars()
    hand_in(scalars, 0)
    copies = [copy.deepcopy(scalars), copy.copy(scalars), pickle.loads(pickle.dumps(scalars))]
    device.done = 1
    for copied in copies:
        assert hand_in(copied, 7) == []
    assert hand_in(scalars, 1) == [0]
