"""The Triton kernels that match anchors with boxes: Detectron2's result, bit for bit.

On a GPU where there is one, else in Triton's interpreter.
"""

import importlib
import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from focal_det.kernels import sums
from focal_det.modeling import assign
from focal_det.modeling.assign import label_batch, match_anchors, match_batch
from focal_det.overlap import sides

triton = pytest.importorskip("triton", minversion="3.0")
kernels = importlib.import_module("focal_det.kernels.triton_match")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MATCHERS = {
    "retinanet": Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
    "high only": Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=False),
    # IoU of boxes with whole-number sides often is one of these exactly.
    "exact": Matcher([0.25, 0.5], [0, -1, 1], allow_low_quality_matches=False),
    "ignores the rest": Matcher([0.125, 0.25, 0.5], [-1, 0, -1, 1], True),
}


@pytest.fixture(params=[16, 64, 512])
def _block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_ANCHORS", request.param)


def whole_boxes(count: int, seed: int) -> Tensor:
    """(count, 4) with whole-number sides, some of them empty: full of ties."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 12, (count, 2, 2), generator=generator).sort(dim=1)[0]
    return corners.flatten(1).float().to(DEVICE)


def real_boxes(count: int, seed: int) -> Tensor:
    """(count, 4), few of which meet."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 60
    sides = torch.rand(count, 2, generator=generator) * 20
    return torch.cat([corners, corners + sides], dim=1).to(DEVICE)


def check(anchors: Tensor, gt_boxes: Sequence[Tensor], matcher: Matcher) -> None:
    matches, labels = match_batch(anchors, gt_boxes, matcher, "triton")
    assert matches.shape == labels.shape == (len(gt_boxes), len(anchors))
    for boxes, *found in zip(gt_boxes, matches, labels, strict=True):
        expected = matcher(pairwise_iou(Boxes(boxes), Boxes(anchors)))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize("name", MATCHERS)
def test_matches_of_a_batch_are_detectron2s(name: str) -> None:
    """Images with many boxes, one, and none, in any place."""
    for make, counts in itertools.product(
        (whole_boxes, real_boxes), ([3, 0, 17, 1], [0, 9, 0], [5])
    ):
        gt_boxes = [make(count, 100 + index) for index, count in enumerate(counts)]
        check(make(130, 7), gt_boxes, MATCHERS[name])


def test_what_is_not_asked_for_is_not_computed() -> None:
    anchors, boxes = sides(real_boxes(9, 0)), sides(real_boxes(2, 1))
    with_best, without = (kernels.match(anchors, boxes, [2], find) for find in (True, False))
    assert without[2] is None
    assert all(torch.equal(a, b) for a, b in zip(with_best[:2], without[:2], strict=True))


def test_the_default_dtype_is_of_no_matter() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        check(real_boxes(40, 1).float(), [real_boxes(3, 0).float()], MATCHERS["retinanet"])
    finally:
        torch.set_default_dtype(torch.float32)


def test_boxes_far_from_all_anchors_make_every_anchor_their_best() -> None:
    """Which Detectron2 does for a box that no anchor overlaps."""
    far = torch.tensor([[900.0, 900.0, 910.0, 910.0]], device=DEVICE)
    near = real_boxes(3, 0)
    for gt_boxes in ([far], [near, far], [torch.cat([near, far]), near]):
        check(real_boxes(40, 1), gt_boxes, MATCHERS["retinanet"])


def test_a_box_without_an_area_overlaps_nothing() -> None:
    odd = torch.tensor(
        [[3.0, 3.0, 3.0, 9.0], [9.0, 9.0, 3.0, 3.0], [0.0, 0.0, 8.0, 8.0]], device=DEVICE
    )
    anchors = torch.cat([odd, whole_boxes(20, 3)])
    matches, labels = match_batch(anchors, [odd], MATCHERS["retinanet"], "triton")
    expected = match_anchors(anchors, odd, MATCHERS["retinanet"])
    assert torch.equal(matches[0], expected[0])
    assert torch.equal(labels[0], expected[1])
    assert (matches[0][labels[0] == 1] == 2).any()


@pytest.mark.parametrize("counts", [[4, 0, 2], [0, 0], [0, 3], [1]], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_labels_of_a_batch_are_those_of_its_images(impl: str, counts: list[int]) -> None:
    matcher, num_classes = MATCHERS["ignores the rest"], 7
    anchors = whole_boxes(90, 5)
    gt_boxes = [whole_boxes(count, 20 + index) for index, count in enumerate(counts)]
    gt_classes = [torch.arange(count, device=DEVICE) % num_classes for count in counts]
    labels, boxes = label_batch(anchors, gt_boxes, gt_classes, num_classes, matcher, impl)
    model = SimpleNamespace(anchor_matcher=matcher, num_classes=num_classes)
    instances = [
        Instances((99, 99), gt_boxes=Boxes(b), gt_classes=c)
        for b, c in zip(gt_boxes, gt_classes, strict=True)
    ]
    expected = RetinaNet.label_anchors(model, [Boxes(anchors)], instances)
    assert torch.equal(labels, torch.stack(expected[0]))
    is_foreground = (labels >= 0) & (labels < num_classes)
    assert torch.equal(boxes[is_foreground], torch.stack(expected[1])[is_foreground])
    assert is_foreground.any() == (sum(counts) > 0)


@pytest.mark.parametrize("impl", ["triton", "torch", "eager"])
@pytest.mark.parametrize("loss", ["FocalLoss", "OHEMLoss"])
def test_anchors_are_matched_as_the_loss_is_computed(
    impl: str, loss: str, small_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_cfg.MODEL.FOCAL_DET.IMPL, small_cfg.MODEL.FOCAL_DET.LOSS.NAME = impl, loss
    model = build_model(small_cfg)
    kernels.prepare(torch.device(DEVICE))  # so that what is counted is not its trial
    calls = []
    match = kernels.match
    monkeypatch.setattr(kernels, "match", lambda *args: calls.append(1) or match(*args))
    instances = Instances((64, 64), gt_boxes=Boxes(real_boxes(2, 1)))
    instances.gt_classes = torch.tensor([0, 4], device=DEVICE)
    labels, boxes = model.label_anchors([Boxes(real_boxes(40, 0))], [instances] * 2)
    assert len(calls) == (impl == "triton")
    assert [len(x) for x in labels] == [len(x) for x in boxes] == [40, 40]


def test_a_graph_is_captured_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told by the host how many boxes there are, which a replay would not be."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(kernels, "_problem", lambda device: None)
    for captures in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda x=captures: x)
        assert (assign._triton_for(gpu, "auto") is None) == captures


def test_what_cannot_be_built_is_left_to_torch_and_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(sums, "_warned", set())
    monkeypatch.setattr(sums.logger, "warning", messages.append)
    monkeypatch.setattr(kernels, "_problem", lambda device: "no C compiler")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError, match="no C compiler"):
        match_batch(real_boxes(9, 0), [real_boxes(2, 1)], MATCHERS["retinanet"], "triton")
    for _ in range(2):
        assert assign._triton_for(torch.device("cuda"), "auto") is None
    (message,) = messages
    assert "no C compiler" in message
    assert "anchors" in message


def test_an_operation_that_fails_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(*args: object, **settings: object) -> None:
        calls.append(1)
        raise OSError("no C compiler")

    monkeypatch.setattr(kernels, "match", fail)
    kernels._problem.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no C compiler"):
                kernels.prepare(torch.device(DEVICE))
    finally:
        kernels._problem.cache_clear()
    assert calls == [1]
