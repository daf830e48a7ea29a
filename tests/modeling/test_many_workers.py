"""Two processes with a part of a batch each are one process with all of it.

What a training step comes to is compared: the losses that Detectron2 reports (the mean over the
workers) and the gradients that DistributedDataParallel leaves, for every registered loss with every
normalizer. All in float64: in float32 the sums over two parts and over the whole round differently,
by more than the figures asserted here.

For the image normalizer the step of one process is the mean over all images of the batch, each
image's loss divided by its own count. That is the mean of the workers' means only where each has as
many images as the others, so one step has not.

Run as a script, this file is the two processes.
"""

import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer, defaults, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from filelock import FileLock
from torch import Tensor, nn
from workers import Job, picture, tiny_cfg

from focal_det.compat import leave_process_group
from focal_det.losses import LOSS_REGISTRY
from focal_det.modeling import LossNormalizer
from focal_det.modeling.normalizer import SHORT_NAMES

Part = list[dict[str, Any]]
"""Images of one worker."""

# The images of the first and of the second worker, each as (objects, height, width).
STEPS = {
    "objects everywhere": ([(4, 48, 64), (1, 48, 64)], [(2, 48, 64), (6, 48, 64)]),
    "none for one worker": ([(3, 48, 48), (5, 48, 48)], [(0, 48, 48), (0, 48, 48)]),
    "none at all": ([(0, 48, 48), (0, 48, 48)], [(0, 48, 48), (0, 48, 48)]),
    # All batches are padded to 64 x 64, the half ones and the whole one.
    "unequal sizes": ([(2, 48, 64), (3, 64, 32)], [(1, 64, 64), (4, 32, 48)]),
    "unequal shares": ([(5, 48, 48), (1, 48, 48), (0, 48, 48)], [(2, 48, 48)]),
}
EQUAL_SHARES = len(STEPS) - 1

# Padded to 48 x 64 and to 96 x 32, whose background is not that of both padded to 96 x 64.
STEPS_PADDED_APART = {
    "unequal sizes": ([(2, 48, 64), (3, 32, 32)], [(1, 96, 32), (4, 32, 32)]),
    "none for one worker": ([(0, 32, 32), (0, 32, 64)], [(5, 96, 48), (2, 48, 48)]),
    "unequal shares": ([(1, 80, 80)], [(0, 32, 48), (3, 64, 32), (4, 16, 16)]),
}


class Case(NamedTuple):
    """A detector, and how its batches come.

    Attributes:
        padded_apart: each worker pads its images to its own largest; the one process takes the
            parts one by one then.
    """

    loss: str
    normalizer: str
    norm: str
    padded_apart: bool = False
    sync: bool = True

    def __str__(self) -> str:
        marks = "-padded_apart" * self.padded_apart + "-alone" * (not self.sync)
        return f"{self.loss}-{self.normalizer}-{self.norm}{marks}"


LOSSES = sorted(name for name, _ in LOSS_REGISTRY)
SYNCED = [
    Case(loss, normalizer, norm, padded_apart)
    for loss in LOSSES
    for normalizer in SHORT_NAMES
    for norm, padded_apart in [("FrozenBN", False), ("GN", False), ("GN", True)]
]
ALONE = [Case("FocalLoss", normalizer, "GN", sync=False) for normalizer in SHORT_NAMES]


def parts_of_each_step(case: Case) -> list[tuple[Part, Part]]:
    generator = torch.Generator().manual_seed(0)
    steps = STEPS_PADDED_APART if case.padded_apart else STEPS
    return [
        tuple([picture(generator, *shape) for shape in part] for part in parts)
        for parts in steps.values()
    ]


def build_detector(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(
        tiny_cfg(
            "MODEL.FOCAL_DET.LOSS.NAME", case.loss,
            "MODEL.FOCAL_DET.NORMALIZER.NAME", case.normalizer,
            "MODEL.FOCAL_DET.NORMALIZER.SYNC", case.sync,
            "MODEL.RESNETS.NORM", case.norm,
            "MODEL.FPN.NORM", case.norm,
            "MODEL.RETINANET.NORM", case.norm,
        )
    ).double()  # fmt: skip
    with torch.no_grad():  # predictions that differ from anchor to anchor, scores around 1/2
        model.head.cls_score.weight.normal_(std=0.2)
        model.head.cls_score.bias.normal_(std=2.0)
        model.head.bbox_pred.weight.normal_(std=0.1)
    return model


class Steps(HookBase):
    """Keeps what each step left in the detector."""

    def __init__(self, detector: nn.Module) -> None:
        # Under its own names, whatever wraps it; and before its normalizer is replaced.
        self.parameters, self.normalizer = dict(detector.named_parameters()), detector.normalizer
        self.gradients: list[dict[str, Tensor]] = []
        self.values: list[Tensor] = []

    def after_step(self) -> None:
        # A file of float32 is half the size, and rounds by 6e-8.
        self.gradients.append({name: x.grad.float() for name, x in self.parameters.items()})
        self.values.append(self.normalizer.value.clone())


def train(model: nn.Module, steps: Steps, batches: list[Any]) -> dict[str, Any]:
    """Train `model` on the batches; gives what was reported and kept of each step."""
    # A batch without objects is divided by next to nothing: its gradients are thousands of times
    # those of the others.
    optimizer = torch.optim.SGD(steps.parameters.values(), lr=1e-5)
    trainer = SimpleTrainer(model, batches, optimizer)
    trainer.register_hooks([steps])
    trainer.train(0, len(batches))
    reported = {}
    if comm.is_main_process():
        for name in ("loss_cls", "loss_box_reg", "total_loss"):
            values = [value for value, _ in trainer.storage.history(name).values()]
            reported[name] = torch.tensor(values, dtype=torch.float64)
    return {"losses": reported, "gradients": steps.gradients, "values": torch.stack(steps.values)}


def two_processes(case: Case) -> dict[str, Any]:
    """The training of one of the two."""
    detector = build_detector(case)
    steps = Steps(detector)
    model = defaults.create_ddp_model(detector, broadcast_buffers=False)  # as DefaultTrainer does
    rank = comm.get_rank()
    return train(model, steps, [parts[rank] for parts in parts_of_each_step(case)])


def one_process(case: Case) -> dict[str, Any]:
    detector = build_detector(case)
    steps = Steps(detector)
    batches: list[Any] = parts_of_each_step(case)
    if case.padded_apart:
        return train(OneByOne(detector), steps, batches)
    return train(detector, steps, [first + second for first, second in batches])


class OneByOne(nn.Module):
    """One process that takes a batch in parts, each padded to its own largest image."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        detector.normalizer = NormalizerOfParts(detector.normalizer)
        self.detector = detector

    def forward(self, parts: tuple[Part, Part]) -> dict[str, Tensor]:
        with torch.no_grad():
            for part in parts:
                self.detector(part)
        first, second = (self.detector(part) for part in parts)
        return {name: first[name] + second[name] for name in first}


class NormalizerOfParts(nn.Module):
    """Counts the parts of a batch first; then gives each its share of the divisors of the whole."""

    def __init__(self, whole: LossNormalizer) -> None:
        super().__init__()
        self.whole = whole
        self.counts: list[Tensor] = []
        self.divisors: Iterator[Tensor] = iter(())

    def forward(self, num_foreground: Tensor, update: bool) -> Tensor:
        if not update:  # without gradients
            self.counts.append(num_foreground)
            return torch.ones_like(num_foreground)
        if self.counts:
            sizes = [len(count) for count in self.counts]
            self.divisors = iter(self.whole(torch.cat(self.counts)).split(sizes))
            self.counts = []
        return next(self.divisors)


def work(folder: str) -> None:
    """One of the two processes: all cases, what they came to in a file each."""
    for case in SYNCED + ALONE:
        result = two_processes(case)
        if comm.is_main_process():
            torch.save(result, Path(folder) / f"{case}.pt")
    leave_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes came to; they run once, also for tests that run abreast."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "many_workers"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            job = Job(folder / "log.txt", __file__, folder)
            assert job.wait(timeout=400) == 0, job.output
    return folder


def results(case: Case, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / f"{case}.pt"
    assert path.exists(), (folder / "log.txt").read_text()
    together = torch.load(path)
    path.unlink()
    return together, one_process(case)


@pytest.mark.parametrize("case", SYNCED, ids=str)
def test_two_processes_are_one(case: Case, trained: Path) -> None:
    together, alone = results(case, trained)
    for name, losses in alone["losses"].items():
        assert len(losses) == len(STEPS_PADDED_APART if case.padded_apart else STEPS)
        torch.testing.assert_close(together["losses"][name], losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(together["values"], alone["values"], rtol=1e-6, atol=0)
    for found, expected in zip(together["gradients"], alone["gradients"], strict=True):
        assert found.keys() == expected.keys()
        largest = max(x.abs().max() for x in expected.values())
        assert largest > 0
        for name, gradient in expected.items():
            # That of a bias before a norm is nothing but the rounding errors of larger numbers.
            allowed = 1e-5 * gradient.abs().max() + 1e-12 * largest
            error = (found[name] - gradient).abs().max()
            assert error <= allowed, f"{name}: {error:g}, allowed is {allowed:g}"


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_without_sync_each_worker_counts_alone(case: Case, trained: Path) -> None:
    """Then two are one with the image normalizer alone, where each worker has as many images."""
    together, alone = results(case, trained)
    found, expected = (x["losses"]["total_loss"] for x in (together, alone))
    is_equal = (found - expected).abs() <= 1e-6 * expected
    if case.normalizer == "image":
        assert is_equal[:EQUAL_SHARES].all()
        assert not is_equal[EQUAL_SHARES]
    else:
        assert not is_equal[0]


if __name__ == "__main__":
    launch(work, 2, dist_url="auto", args=(sys.argv[1],), timeout=timedelta(seconds=60))
