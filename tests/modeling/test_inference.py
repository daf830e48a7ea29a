"""Post-processing against Detectron2's: the same bits in the same order."""

import math
from types import MethodType, SimpleNamespace
from unittest import mock

import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch import RetinaNet, retinanet
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from versions import needs_newer_ties

from focal_det.modeling.inference import detect_single_image, select_candidates

pytestmark = needs_newer_ties

A = 3
SIZES = [(13, 19), (7, 10), (2, 3), (1, 1)]
IMAGE_SIZE = (104, 152)
TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))


class Case:
    """Predictions for one image, and both ways to turn them into detections."""

    def __init__(
        self, fill, num_classes=5, dtype=torch.float32, sizes=SIZES, score_thresh=0.05, topk=200
    ):
        torch.manual_seed(0)
        self.num_classes, self.score_thresh, self.topk = num_classes, score_thresh, topk
        self.logits = [fill(1, A * num_classes, h, w).to(dtype) for h, w in sizes]
        self.deltas = [torch.randn(1, A * 4, h, w).to(dtype) for h, w in sizes]
        self.anchors = []
        for h, w in sizes:
            corners = torch.rand(h * w * A, 2) * 100
            extent = 8 + torch.rand(h * w * A, 2) * 40
            self.anchors.append(Boxes(torch.cat([corners, corners + extent], dim=1)))

    def parts(self):
        """The built-in detector, as far as inference reads it."""
        model = SimpleNamespace(
            num_classes=self.num_classes,
            box2box_transform=TRANSFORM,
            test_score_thresh=self.score_thresh,
            test_topk_candidates=self.topk,
            test_nms_thresh=0.5,
            max_detections_per_image=100,
            anchor_generator=lambda features: self.anchors,
        )
        for name in (
            "_transpose_dense_predictions",
            "_decode_per_level_predictions",
            "_decode_multi_level_predictions",
            "inference_single_image",
        ):
            setattr(model, name, MethodType(getattr(RetinaNet, name), model))
        return model

    def expected(self):
        # Clones that keep the strides: the built-in writes into channels_last predictions.
        predictions = [[x.clone() for x in self.logits], [x.clone() for x in self.deltas]]
        images = SimpleNamespace(image_sizes=[IMAGE_SIZE])
        # By itself it fails for scores of two bytes: the suppression takes float32 only.
        with mock.patch.object(retinanet, "batched_nms", float_nms):
            return RetinaNet.forward_inference(self.parts(), images, [], predictions)[0]

    def expected_candidates(self, level):
        """What goes into the suppression."""
        model = self.parts()
        logits, deltas = model._transpose_dense_predictions(
            [[self.logits[level].clone()], [self.deltas[level]]], [self.num_classes, 4]
        )
        return model._decode_per_level_predictions(
            self.anchors[level],
            logits[0][0].sigmoid_(),
            deltas[0][0],
            self.score_thresh,
            self.topk,
            IMAGE_SIZE,
        )

    def arguments(self):
        return (
            self.anchors,
            [x[0] for x in self.logits],
            [x[0] for x in self.deltas],
            IMAGE_SIZE,
            self.num_classes,
            TRANSFORM,
            self.score_thresh,
            self.topk,
            0.5,
            100,
        )

    def check(self):
        """Compare each level's candidates and the detections; return the latter."""
        before = [x.clone() for x in self.logits + self.deltas]
        found = detect_single_image(*self.arguments())
        for x, y in zip(self.logits + self.deltas, before, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        assert_same(found, self.expected())
        self.check_candidates()
        return found

    def check_candidates(self):
        for level, logits in enumerate(self.logits):
            scores, index, classes = select_candidates(
                logits[0], self.num_classes, self.score_thresh, self.topk
            )
            expected = self.expected_candidates(level)
            assert_bits(scores, expected.scores)
            assert_bits(classes, expected.pred_classes)
            assert index.dtype == torch.int64
            at_anchors = logits[0].unflatten(0, (A, -1)).permute(2, 3, 0, 1).flatten(0, 2)
            assert_close_scores(at_anchors[index, classes].sigmoid(), scores)


def float_nms(boxes, scores, classes, threshold):
    return batched_nms(boxes, scores.float(), classes, threshold)


def assert_bits(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def assert_close_scores(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def assert_same(found, expected):
    assert found.image_size == expected.image_size
    assert_bits(found.scores, expected.scores)
    assert_bits(found.pred_classes, expected.pred_classes)
    assert_bits(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def spread(*shape):
    return torch.randn(shape) * 2 - 3


def ties(*shape):
    return (spread(*shape) * 2).round() / 2


FILLS = {
    "spread": spread,
    "ties": ties,
    "all equal": lambda *shape: torch.full(shape, -1.0),
    "none survives": lambda *shape: torch.full(shape, -4.6),
    "all survive": lambda *shape: torch.rand(shape) * 3,
    "saturated": lambda *shape: torch.randn(shape) * 200,
    "few": lambda *shape: torch.randn(shape) - 5.5,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score_thresh", [-0.1, 0.0, 1e-9, 0.05, 0.5, 0.999, 1.0, 1.5])
@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS.keys())
def test_detections_are_detectron2s(fill, score_thresh, dtype):
    Case(fill, dtype=dtype, score_thresh=score_thresh).check()


def test_the_cases_are_what_they_say():
    assert len(Case(FILLS["none survives"]).check()) == 0
    for fill in ("spread", "ties", "all survive"):
        case = Case(FILLS[fill])
        assert (case.logits[0].sigmoid() > case.score_thresh).sum() > case.topk
        assert len(case.check()) == 100
    counts = [int((x.sigmoid() > 0.05).sum()) for x in Case(FILLS["few"]).logits]
    assert counts[0] > 0
    assert counts[-1] == 0  # a level without a candidate


@pytest.mark.parametrize("num_classes", [1, 8, 80])
@pytest.mark.parametrize("fill", [spread, ties])
def test_any_number_of_classes(fill, num_classes):
    Case(fill, num_classes=num_classes).check()


@pytest.mark.parametrize("fill", [spread, ties, FILLS["few"]])
@pytest.mark.parametrize("num_classes", [5, 8])
def test_channels_last(fill, num_classes):
    case = Case(fill, num_classes=num_classes)
    for predictions in (case.logits, case.deltas):
        predictions[:] = [x.to(memory_format=torch.channels_last) for x in predictions]
    assert not case.logits[0][0].is_contiguous()
    case.check()


def test_any_strides():
    case = Case(ties)
    for predictions in (case.logits, case.deltas):
        predictions[:] = [nn.functional.pad(x, (1, 2))[..., 1:-2] for x in predictions]
    case.check()


def test_not_a_number_and_infinity():
    def fill(*shape):
        x = spread(*shape)
        kind = torch.rand(shape)
        x[kind < 0.1] = math.nan
        x[(kind > 0.1) & (kind < 0.2)] = -math.inf
        x[(kind > 0.2) & (kind < 0.21)] = math.inf
        return x

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for score_thresh in (-0.1, 0.0, 0.05, 1.0):
            Case(fill, dtype=dtype, score_thresh=score_thresh).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threshold_that_is_a_score(dtype):
    """A score that equals the threshold is not above it."""
    for logit in (-2.0, 0.0, 1.5):
        score_thresh = torch.full((64,), logit, dtype=dtype).sigmoid()[0].item()
        case = Case(ties, dtype=dtype, score_thresh=score_thresh, topk=10**6)
        assert (case.logits[0] == logit).sum() > 3
        case.check()
        scores, _, _ = select_candidates(case.logits[0][0], 5, score_thresh, 10**6)
        assert len(scores) == (case.logits[0] > logit).sum()


def test_rounding_of_the_sigmoid_loses_nothing():
    """Scores are rounded up too: above a threshold whose logit is above theirs."""
    logits = torch.linspace(2, 4, 4096)
    scores = logits.sigmoid()
    below = torch.nextafter(scores, torch.zeros(()))
    lost = torch.special.logit(below.double()) > logits.double()
    assert lost.sum() > 3  # else this tests nothing
    for score_thresh in below[lost][:20].tolist():
        found, _, _ = select_candidates(logits.view(1, 64, 64), 1, score_thresh, 10**6)
        assert_bits(found, scores[scores > score_thresh].sort(descending=True)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_logit_of_two_bytes(dtype):
    logits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    scores = logits.sigmoid()
    thresholds = [-1.0, 0.0, 1e-40, 3e-8, 1e-7, 6e-5, 1e-3, 0.05, 0.0502, 0.3, 0.5, 0.97, 0.9999]
    for score_thresh in thresholds:
        found, _, _ = select_candidates(logits.view(1, 256, 256), 1, score_thresh, 10**6)
        assert_bits(found, scores[scores > score_thresh].sort(descending=True)[0])


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="other sharing of work")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sigmoid_as_it_is_shared_between_threads(threads):
    """The last bit depends on where in a thread's part an element is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for fill in (spread, FILLS["all survive"]):
            sizes = [(59, 61), (21, 23), (1, 1)]
            Case(fill, num_classes=7, sizes=sizes, topk=10**5).check_candidates()
    finally:
        torch.set_num_threads(before)


def test_the_last_bit_depends_on_the_place():
    """Why the sigmoid of what was gathered is not simply that: see the test above."""
    logits = spread(4096)
    one_by_one = torch.cat([x.sigmoid() for x in logits.split(1)])
    if torch.equal(one_by_one, logits.sigmoid()):
        pytest.skip("not on this CPU")
    for count in range(1, 300):
        found, _, _ = select_candidates(logits[:count].view(1, 1, count), 1, -1.0, 10**6)
        assert_bits(found, logits[:count].sigmoid().sort(descending=True)[0])


class NewTensors(TorchDispatchMode):
    """Records the sizes of new floating tensors: what an operator returns and did not get."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {
            x.untyped_storage().data_ptr() for x in tree_flatten(args)[0] if isinstance(x, Tensor)
        }
        for x in tree_flatten(out)[0]:
            if (
                isinstance(x, Tensor)
                and x.is_floating_point()
                and x.untyped_storage().data_ptr() not in old
            ):
                self.sizes.append(x.numel())
        return out


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_copy_of_the_predictions(memory_format):
    case = Case(FILLS["few"], sizes=[(24, 40), (12, 20)])
    for predictions in (case.logits, case.deltas):
        predictions[:] = [x.contiguous(memory_format=memory_format) for x in predictions]
    arguments = case.arguments()
    with NewTensors() as built_in:
        case.expected()
    with NewTensors() as ours:
        found = detect_single_image(*arguments)
    assert len(found) > 10
    assert max(built_in.sizes) == case.logits[0].numel()
    assert max(ours.sizes) < case.deltas[0].numel() / 4


class Detector(nn.Module):
    """As a detector's forward_inference calls it."""

    def __init__(self, case):
        super().__init__()
        self.box2box_transform = TRANSFORM
        self.num_classes: int = case.num_classes
        self.score_thresh: float = case.score_thresh
        self.topk: int = case.topk

    def forward(self, anchors: list[Tensor], logits: list[Tensor], deltas: list[Tensor]):
        return detect_single_image(
            [Boxes(x) for x in anchors],
            [x[0] for x in logits],
            [x[0] for x in deltas],
            (104, 152),
            self.num_classes,
            self.box2box_transform,
            self.score_thresh,
            self.topk,
            0.5,
            100,
        )


@pytest.mark.parametrize("fill", [spread, ties, FILLS["none survives"]])
def test_scripted(fill):
    # Here, since that of 0.6 cannot be imported beside a PyTorch without caffe2.
    from detectron2.export import scripting_with_instances

    case = Case(fill)
    fields = {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor}
    scripted = scripting_with_instances(Detector(case).eval(), fields)
    for _ in range(3):  # the second and third run are optimised ones
        found = scripted([x.tensor for x in case.anchors], case.logits, case.deltas)
        assert_same(found, case.expected())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*")
def test_traced_with_another_number_of_candidates():
    class Select(nn.Module):
        def forward(self, logits):
            return select_candidates(logits, 5, 0.05, 200)

    traced = torch.jit.trace(Select(), spread(A * 5, 13, 19))
    for logits in (FILLS["few"](A * 5, 13, 19), FILLS["none survives"](A * 5, 13, 19)):
        scores, index, classes = traced(logits)
        expected = select_candidates(logits, 5, 0.05, 200)
        assert_close_scores(scores, expected[0])
        assert_bits(index, expected[1])
        assert_bits(classes, expected[2])
