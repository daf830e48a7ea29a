"""From the head's outputs to the loss dict and back, nothing waits for the device.

Fake tensors have shapes and no data: whatever would bring some to the host raises. `NoWaiting` adds
what they let pass. No GPU is needed.
"""

import contextlib
from itertools import chain

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from focal_det.kernels import sums
from focal_det.losses import LOSS_REGISTRY
from focal_det.modeling import NORMALIZER_REGISTRY, FocalRetinaNet
from focal_det.modeling.deferred import DeferredScalars

# To tell two tensors apart, the loss asks where they lie.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

WAITING = (DataDependentOutputException, DynamicOutputShapeException)

# OHEM waits, several times an image: how many anchors its suppression keeps is for the host to know
# before it can go on.
LOSSES = [name for name, _ in LOSS_REGISTRY if name != "OHEMLoss"]
NORMALIZERS = [name for name, _ in NORMALIZER_REGISTRY]

# Not a CPU, so the branches of a GPU are taken; autograd runs on it without having one. (On a fake
# "cuda" without a GPU it does not.)
DEVICE = "lazy"

SIZES = [(12, 16), (6, 8), (1, 1)]
NUM_ANCHORS, NUM_CLASSES = 3, 4


class NoWaiting(TorchDispatchMode):
    """Refuses copies between devices and writing to a boolean index.

    The host waits for a copy from its own memory too, unless that is pinned.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket
        if name is torch.ops.aten._to_copy and result.device != args[0].device:
            raise DataDependentOutputException(func)
        if name is torch.ops.aten.copy_ and args[0].device != args[1].device:
            raise DataDependentOutputException(func)
        if (
            name is torch.ops.aten.index_put_
            and args[2].dim() > 0
            and any(index is not None and index.dtype == torch.bool for index in args[1])
        ):
            raise DataDependentOutputException(func)
        return result


class Anchors(nn.Module):
    """An anchor generator that has its anchors on the device."""

    def forward(self, features):
        device = features[0].device
        return [
            Boxes(torch.empty(height * width * NUM_ANCHORS, 4, device=device))
            for height, width in SIZES
        ]


def detector(kind, **arguments):
    return kind(
        backbone=nn.Identity(),
        head=nn.Identity(),
        head_in_features=["p3", "p4", "p5"],
        anchor_generator=Anchors(),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        num_classes=NUM_CLASSES,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
        **arguments,
    )


def train_step(model, device=DEVICE, box_counts=(7, 0), memory_format=torch.contiguous_format):
    """Losses, and gradients of the predictions, of fake images on a device."""
    num_images = len(box_counts)
    instances = [
        Instances(
            (96, 128),
            gt_boxes=Boxes(torch.empty(count, 4, device=device)),
            gt_classes=torch.empty(count, dtype=torch.int64, device=device),
        )
        for count in box_counts
    ]
    predictions = [
        [
            torch.empty(num_images, NUM_ANCHORS * last, *size, device=device)
            .to(memory_format=memory_format)
            .requires_grad_(torch.is_grad_enabled())
            for size in SIZES
        ]
        for last in (NUM_CLASSES, 4)
    ]
    features = [torch.empty(num_images, 8, *size, device=device) for size in SIZES]
    images = ImageList(torch.empty(num_images, 3, 96, 128, device=device), [(96, 128)] * num_images)
    with EventStorage():
        losses = model.train().forward_training(images, features, predictions, instances)
        grads = []
        if torch.is_grad_enabled():
            grads = torch.autograd.grad(sum(losses.values()), [*chain(*predictions)])
    return losses, grads


@pytest.fixture
def reported(monkeypatch):
    """What was handed in to be brought to the host without waiting, by name."""
    reported = {}

    def exchange(self, scalars):
        reported.update(scalars)
        return []

    monkeypatch.setattr(DeferredScalars, "exchange", exchange)
    return reported


@pytest.fixture
def _no_data(monkeypatch):
    # There is no automatic mixed precision to be turned off on that device.
    monkeypatch.setattr(sums, "full_precision", lambda logits: contextlib.nullcontext())
    with FakeTensorMode(), NoWaiting():
        yield


def build(loss="FocalLoss", normalizer="EMANormalizer", box_loss="smooth_l1", device=DEVICE):
    """Inside the mode, so that its buffers are fake too."""
    model = detector(
        FocalRetinaNet,
        cls_loss=LOSS_REGISTRY.get(loss)(),
        normalizer=NORMALIZER_REGISTRY.get(normalizer)(),
        impl="torch",
        box_reg_loss_type=box_loss,
    )
    model.normalizer.value = torch.empty((), device=device)
    return model


def check(losses, grads, reported, device=DEVICE):
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    for x in (*losses.values(), *grads, *reported.values()):
        assert isinstance(x, FakeTensor)
        assert x.device.type == device
    assert all(x.dim() == 0 for x in (*losses.values(), *reported.values()))
    assert {"min", "max", "num_pos_anchors", "classification/background"} <= set(reported)


@pytest.mark.usefixtures("_no_data")
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_training_step_waits_for_nothing(reported, loss, normalizer):
    losses, grads = train_step(build(loss, normalizer))
    check(losses, grads, reported)
    assert len(grads) == 2 * len(SIZES)


@pytest.mark.usefixtures("_no_data")
@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "diou", "ciou"])
def test_no_box_loss_waits(reported, box_loss):
    check(*train_step(build(box_loss=box_loss)), reported)


@pytest.mark.usefixtures("_no_data")
@pytest.mark.parametrize("box_counts", [(1,), (0, 3, 40)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_number_of_boxes_and_no_layout_waits(reported, box_counts, memory_format):
    losses, grads = train_step(build(), box_counts=box_counts, memory_format=memory_format)
    check(losses, grads, reported)


@pytest.mark.usefixtures("_no_data")
def test_images_without_objects_wait_for_nothing(reported):
    losses, _ = train_step(build(), box_counts=(0, 0))
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    assert "min" not in reported


@pytest.mark.usefixtures("_no_data")
@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou"])
def test_a_validation_loss_waits_for_nothing_on_cuda(reported, box_loss):
    with torch.no_grad():
        try:
            torch.empty(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"this torch has no fake CUDA tensors: {error}")
        losses, _ = train_step(build(box_loss=box_loss, device="cuda"), "cuda")
    check(losses, [], reported, "cuda")


@pytest.mark.usefixtures("_no_data", "reported")
def test_the_test_finds_ohem_waiting():
    with pytest.raises(WAITING):
        train_step(build("OHEMLoss"))


@pytest.mark.usefixtures("_no_data")
def test_the_test_finds_detectron2_waiting():
    with pytest.raises(WAITING):
        train_step(detector(RetinaNet))


@pytest.mark.usefixtures("_no_data", "reported")
@pytest.mark.parametrize("step", ["label_anchors", "losses"])
def test_the_test_finds_each_step_of_detectron2_waiting(step):
    model = build()
    setattr(model, step, getattr(RetinaNet, step).__get__(model))
    with pytest.raises(WAITING):
        train_step(model)


@pytest.mark.usefixtures("_no_data")
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, x),
        pytest.param(
            lambda x: torch.tensor([1.0, 2.0], device=x.device),
            marks=pytest.mark.skipif(
                torch.__version__ < (2, 2) or torch.cuda.is_available(),
                reason="cannot be faked there",
            ),
        ),
        lambda x: torch.zeros(2).to(x.device),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: torch.equal(x, x),
    ],
    ids=["item", "bool", "cpu", "nonzero", "mask", "set", "tensor", "to", "copy", "equal"],
)
def test_the_test_finds(wait):
    x = torch.empty(3, device=DEVICE)
    with pytest.raises(WAITING):
        wait(x)


@pytest.mark.usefixtures("_no_data")
def test_what_does_not_wait_passes():
    x = torch.empty(3, device=DEVICE)
    x[x > 0] = 1.0
    x.new_full((2,), 1.0)
    x.where(x > 0, 0.0).masked_fill_(x > 0, 2.0)
    x.copy_(torch.empty(3, device=DEVICE).double())
