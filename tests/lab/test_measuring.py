"""What is measured of a trial, against numbers that are known."""

import sys
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import nn

from focal_det.lab import measuring, running
from focal_det.lab.measuring import count_gflops, peak_memory_mib, time_inference


class Storage:
    """Detectron2's storage of scalars, with these times of steps."""

    def __init__(self, times):
        self.times = times

    def history(self, name):
        """Pairs of value and iteration."""
        assert name == "time"
        if not self.times:
            raise KeyError(name)
        pairs = [(value, index) for index, value in enumerate(self.times)]
        return SimpleNamespace(values=lambda: pairs)


@pytest.fixture
def clock(monkeypatch):
    """A clock of trials whose time is told by hand."""
    cfg = CfgNode({"SOLVER": {"IMS_PER_BATCH": 8}, "MODEL": {"DEVICE": "cpu"}})
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(running.time, "monotonic", lambda: now.seconds)
    made = running._Clock(cfg, None)
    made.now = now
    made.trainer = SimpleNamespace(iter=0)
    return made


@pytest.mark.parametrize(
    ("times", "speed"),
    [
        # The first three steps warm up; of 2, 4, 20 seconds the median is 4.
        ([50.0, 50.0, 50.0, 20.0, 2.0, 4.0], 8 / 4),
        ([9.0, 9.0, 9.0, 0.5], 16.0),
        ([9.0, 9.0, 9.0], None),
        ([], None),
    ],
)
def test_images_per_second_are_of_the_median_step(clock, times, speed):
    clock.trainer.storage = Storage(times)
    assert clock.images_per_second() == speed


def test_training_ends_with_its_last_step_and_evaluation_follows(clock):
    clock.now.seconds = 110.0
    clock.before_train()
    for _ in range(2):
        clock.now.seconds += 7.0
        clock.after_step()
    clock.now.seconds += 5.0
    clock.after_train()
    assert clock.seconds == {"training": 14.0, "evaluation": 5.0}


@pytest.fixture
def cfg(few):
    """A config whose test set has four images."""
    return CfgNode({"MODEL": {"DEVICE": "cpu"}, "DATASETS": {"TEST": (f"{few}_val",)}})


@pytest.mark.parametrize(
    # In seconds, the first of which warm up.
    ("seconds", "warm_up", "median", "p95"),
    [
        ([9.0, 0.001, 0.002, 0.006], 1, 2.0, 6.0),  # of 1, 2, 6: not 9.2
        ([9.0, 9.0, 9.0, 0.004], 3, 4.0, 4.0),
        ([9.0, 9.0, 9.0, 0.004], 40, 4.0, 4.0),  # hardly any image
        ([9.0] * 3 + [0.001] * 40 + [9.0] * 20, 3, 1.0, 1.0),  # no more than 40
    ],
)
def test_latency_is_in_milliseconds_without_the_first_images(
    cfg, monkeypatch, seconds, warm_up, median, p95
):
    now = SimpleNamespace(seconds=0.0)
    left = list(seconds)

    class Model(nn.Module):
        def forward(self, inputs):
            assert not self.training
            assert inputs == ["an image"]
            now.seconds += left.pop(0)

    monkeypatch.setattr(measuring, "WARM_UP", warm_up)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now.seconds)
    loader = [["an image"]] * len(seconds)
    monkeypatch.setattr(measuring, "build_detection_test_loader", lambda *_: loader)
    found = time_inference(cfg, Model())
    assert found == {"median": pytest.approx(median), "p95": pytest.approx(p95)}


def test_a_measurement_that_fails_costs_no_trial_and_leaves_its_reason():
    reasons = {}
    assert measuring.attempt("gflops", lambda: 3.0, reasons) == 3.0
    assert reasons == {}

    def fail():
        raise AttributeError("a model of somebody else's\nand more")

    assert measuring.attempt("gflops", fail, reasons) is None
    assert reasons == {"gflops": "AttributeError: a model of somebody else's"}


def test_operations_of_a_convolution_are_those_worked_out_by_hand(cfg, monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 7, kernel_size=5, padding=2)

        def forward(self, inputs):
            return self.convolution(inputs[0]["image"][None])

    loader = [[{"image": torch.zeros(3, 32, 48)}]]
    monkeypatch.setattr(measuring, "build_detection_test_loader", lambda *_: loader)
    assert count_gflops(cfg, Model()) == pytest.approx(32 * 48 * 7 * 3 * 5 * 5 / 1e9)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_what_the_system_says_in_mib():
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    peak = int(lines["VmHWM"].split()[0]) / 1024
    assert peak_memory_mib("cpu") == pytest.approx(peak, rel=0.02)


def test_images_are_taken_from_all_over_the_set(cfg, few, monkeypatch):
    records = DatasetCatalog.get(f"{few}_val")
    names = [record["file_name"] for record in records]
    seen = []
    monkeypatch.setattr(measuring, "COUNTED", 2)
    monkeypatch.setattr(measuring, "anchor_setup", lambda _: None)
    monkeypatch.setattr(measuring, "usable_objects", lambda found: [x["file_name"] for x in found])
    monkeypatch.setattr(measuring, "foreground_ratio", lambda images, _: seen.extend(images))
    full = CfgNode(
        {"DATASETS": {"TRAIN": (f"{few}_val",)}, "DATALOADER": {"FILTER_EMPTY_ANNOTATIONS": False}}
    )
    measuring.count_anchors(full)
    assert seen == [names[0], names[2]]
