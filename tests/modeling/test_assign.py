"""The assignment of anchors: equal to Detectron2's in every bit, small, and never waiting."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from focal_det.modeling import assign
from focal_det.modeling.assign import label_anchors, label_batch, match_anchors

MATCHERS = {
    "retinanet": Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
    "high only": Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=False),
    # IoU of boxes with whole-number sides often is one of these exactly.
    "exact": Matcher([0.25, 0.5], [0, -1, 1], allow_low_quality_matches=False),
    "three": Matcher([0.125, 0.25, 0.5], [-1, 0, -1, 1], allow_low_quality_matches=True),
    "one": Matcher([0.5], [0, 1], allow_low_quality_matches=True),
}


@pytest.fixture(params=[None, (7, 2), (64, 5)], ids=["blocks", "7", "64"])
def _block_size(request, monkeypatch):
    """Blocks as they are, and tiny ones that put many borders into a small problem."""
    if request.param is not None:
        monkeypatch.setattr(assign, "BLOCK_PAIRS_CPU", request.param[0])
        monkeypatch.setattr(assign, "BLOCK_BOXES", request.param[1])


@pytest.fixture(params=[False, True], ids=["selected", "all pairs"])
def _selection(request, monkeypatch):
    """With and without the selection of boxes, which a GPU goes without."""
    if request.param:
        monkeypatch.setattr(assign, "_indices", lambda wanted: torch.arange(len(wanted)))


def whole_boxes(count, size, seed):
    """(count, 4) random boxes with whole-number sides, some of them empty: full of ties."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, size, (count, 2, 2), generator=generator).sort(dim=1)[0]
    return corners.flatten(1).float()


def real_boxes(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * size
    sides = torch.rand(count, 2, generator=generator) * size / 2
    return torch.cat([corners, corners + sides], dim=1)


def grid_anchors(height=96, width=128):
    """(R, 4) as Detectron2 places them, on two levels."""
    generator = DefaultAnchorGenerator(
        sizes=[[32, 40.3, 50.8], [64, 80.6, 101.6]],
        aspect_ratios=[[0.5, 1.0, 2.0]],
        strides=[8, 16],
        offset=0.0,
    )
    maps = [torch.zeros(1, 1, height // stride, width // stride) for stride in (8, 16)]
    return Boxes.cat(generator(maps)).tensor


def check(anchors, gt_boxes, matcher):
    """Compare with Detectron2; gives what both agree on."""
    wanted = matcher(pairwise_iou(Boxes(gt_boxes), Boxes(anchors)))
    got = match_anchors(anchors, gt_boxes, matcher)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    return got


@pytest.mark.usefixtures("_block_size", "_selection")
@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.parametrize("seed", range(3))
def test_matches_of_random_boxes_are_detectron2s(name, seed):
    for num_boxes, make in itertools.product([2, 17], [whole_boxes, real_boxes]):
        anchors = make(70, 12, seed)
        gt_boxes = make(num_boxes, 12, 1000 * (seed + 1) + num_boxes)
        check(anchors, gt_boxes, MATCHERS[name])


@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.parametrize("num_boxes", [1, 40, 1000])
def test_matches_on_a_grid_of_anchors_are_detectron2s(name, num_boxes):
    check(grid_anchors(), real_boxes(num_boxes, 96, num_boxes), MATCHERS[name])


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.parametrize(("num_anchors", "num_boxes"), [(0, 0), (0, 3), (30, 0), (1, 1), (1, 9)])
def test_hardly_any_anchors_or_boxes(name, num_anchors, num_boxes):
    anchors, gt_boxes = whole_boxes(num_anchors, 9, 0), whole_boxes(num_boxes, 9, 1)
    check(anchors, gt_boxes, MATCHERS[name])


@pytest.mark.usefixtures("_block_size", "_selection")
def test_the_first_of_equal_boxes_wins():
    """Also where the equal ones are far apart, so in different blocks."""
    box, other = [2.0, 2.0, 8.0, 8.0], [20.0, 20.0, 22.0, 22.0]
    gt_boxes = torch.tensor([other, box, box, *[other] * 7, box, box])
    anchors = torch.tensor([box, [3.0, 3.0, 9.0, 9.0], other, [2.0, 2.0, 8.0, 5.0]])
    matches, _ = check(anchors, gt_boxes, MATCHERS["retinanet"])
    assert matches.tolist() == [1, 1, 0, 1]


@pytest.mark.usefixtures("_block_size", "_selection")
def test_an_overlap_at_a_threshold_belongs_to_the_upper_level():
    gt_boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    anchors = torch.tensor([[0.0, 0.0, 8.0, height] for height in (1.0, 2.0, 3.0, 4.0, 5.0)])
    _, labels = check(anchors, gt_boxes, MATCHERS["exact"])
    assert labels.tolist() == [0, -1, -1, 1, 1]


@pytest.mark.usefixtures("_block_size", "_selection")
def test_all_the_best_anchors_of_a_box_are_foreground():
    """Of the second box three anchors have the same IoU of 1/9, and are the first box's too."""
    gt_boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [4.0, 4.0, 5.0, 5.0]])
    anchors = torch.tensor([[x, 3.0, x + 3, 6.0] for x in (2.0, 3.0, 4.0, 5.0, 6.0)])
    matches, labels = check(anchors, gt_boxes, MATCHERS["one"])
    assert labels.tolist() == [1, 1, 1, 1, 1]
    assert matches.tolist() == [0] * 5
    _, labels = check(anchors, gt_boxes[1:], MATCHERS["one"])
    assert labels.tolist() == [1, 1, 1, 0, 0]
    _, labels = check(anchors, gt_boxes, Matcher([0.5], [0, 1]))
    assert labels.tolist() == [0] * 5


@pytest.mark.usefixtures("_block_size", "_selection")
@pytest.mark.parametrize(
    "box",
    [
        [5.0, 5.0, 5.0, 9.0],  # no width
        [5.0, 5.0, 5.0, 5.0],
        [7.0, 7.0, 5.0, 5.0],  # inside out, so with a positive area
        [7.0, 5.0, 5.0, 7.0],  # and with a negative one
        [50.0, 50.0, 60.0, 60.0],  # off all anchors
        [12.0, 0.0, 15.0, 12.0],  # touches the edge of some
        [5.0, 5.0, 5.25, 5.25],  # smaller than any
        [-100.0, -100.0, 100.0, 100.0],  # larger than all
        [math.nan, 1.0, 5.0, 5.0],
        [math.nan] * 4,
        [0.0, 0.0, math.inf, 5.0],
        [-math.inf, -math.inf, math.inf, math.inf],
        [0.0, 0.0, 1e-30, 1e-30],  # area 0 in float32
        [0.0, 0.0, 3e19, 3e19],  # infinite area in float32
    ],
)
def test_degenerate_boxes(box):
    """Alone and among others. A box that none overlaps makes every anchor foreground."""
    anchors = whole_boxes(40, 12, 3)
    anchors[7] = torch.tensor([4.0, 4.0, 4.0, 4.0])  # empty
    anchors[8] = torch.tensor([9.0, 9.0, 4.0, 4.0])  # inside out
    anchors[9] = torch.tensor([5.0, 5.0, 5.0, 9.0])
    alone = torch.tensor([box])
    among_others = torch.cat([whole_boxes(6, 12, 4), alone, whole_boxes(3, 12, 5)])
    for matcher in MATCHERS.values():
        check(anchors, alone, matcher)
        check(anchors, among_others, matcher)


def test_a_box_that_no_anchor_overlaps_makes_all_of_them_foreground():
    anchors = grid_anchors()
    gt_boxes = torch.tensor([[10.0, 10.0, 60.0, 60.0], [900.0, 900.0, 910.0, 910.0]])
    _, labels = check(anchors, gt_boxes, MATCHERS["retinanet"])
    assert labels.eq(1).all()
    _, labels = check(anchors, gt_boxes[:1], MATCHERS["retinanet"])
    assert not labels.eq(1).all()


@pytest.mark.usefixtures("_block_size", "_selection")
@pytest.mark.parametrize("swap", [[0, 1, 2, 3], [1, 0, 3, 2]], ids=["x", "y"])
def test_a_box_in_a_gap_between_anchors_overlaps_none(swap):
    """It lies within the bounds of all anchors, and in the range of each in one direction."""
    anchors = torch.tensor([[0.0, 0.0, 2.0, 9.0], [8.0, 0.0, 10.0, 9.0], [0.0, 2.0, 3.0, 9.0]])
    gt_boxes = torch.tensor([[4.0, 3.0, 6.0, 5.0], [0.0, 0.0, 2.0, 9.0]])
    for boxes in (gt_boxes, gt_boxes[:1]):
        _, labels = check(anchors[:, swap], boxes[:, swap], MATCHERS["retinanet"])
        assert labels.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.parametrize(
    ("anchor_dtype", "box_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float64),
        (torch.float16, torch.float32),
        (torch.float32, torch.int64),
    ],
)
def test_any_dtype_is_computed_in_float32(name, anchor_dtype, box_dtype):
    anchors = (grid_anchors().double() * 1.0001).to(anchor_dtype)
    gt_boxes = (real_boxes(20, 96, 0).double() * 1.0001).to(box_dtype)
    check(anchors, gt_boxes, MATCHERS[name])


def test_inputs_stay_as_they_were():
    anchors, gt_boxes = whole_boxes(50, 9, 0), whole_boxes(5, 9, 1)
    gt_boxes[2, 0] = math.nan
    copies = anchors.clone(), gt_boxes.clone()
    match_anchors(anchors, gt_boxes, MATCHERS["retinanet"])
    assert torch.equal(anchors, copies[0])
    assert torch.equal(gt_boxes.nan_to_num(), copies[1].nan_to_num())


@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.parametrize("num_boxes", [0, 1, 12])
def test_labels_are_those_of_retinanet(name, num_boxes):
    anchors = grid_anchors()
    gt_boxes = real_boxes(num_boxes, 96, 2).double()
    gt_classes = torch.randint(0, 5, (num_boxes,), generator=torch.Generator().manual_seed(0))
    instances = Instances((96, 128), gt_boxes=Boxes(gt_boxes), gt_classes=gt_classes)
    retinanet = SimpleNamespace(anchor_matcher=MATCHERS[name], num_classes=5)
    wanted = RetinaNet.label_anchors(retinanet, [Boxes(anchors)], [instances])
    got = label_anchors(anchors, gt_boxes, gt_classes, 5, MATCHERS[name])
    for one, (other,) in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    if num_boxes == 0:
        assert got[0].eq(5).all()


def test_labels_are_whole_numbers_beside_an_image_without_boxes():
    """Whose classes some mappers make an empty tensor of the default dtype."""
    gt_boxes = [real_boxes(3, 96, 0), torch.zeros(0, 4)]
    gt_classes = [torch.tensor([0, 1, 2]), torch.tensor([])]
    labels, _ = label_batch(grid_anchors(), gt_boxes, gt_classes, 5, MATCHERS["retinanet"])
    assert labels.dtype == torch.int64
    assert set(labels[0].tolist()) > {0, 1, 2}
    assert labels[1].eq(5).all()


def test_a_compiled_step_leaves_the_matching_alone():
    matcher, anchors, gt_boxes = MATCHERS["retinanet"], grid_anchors(), [real_boxes(3, 96, 0)]
    gt_classes = [torch.tensor([0, 1, 2])]
    arguments = (anchors, gt_boxes, gt_classes, 5, matcher)
    compiled = torch.compile(label_batch, backend="eager")
    for one, other in zip(compiled(*arguments), label_batch(*arguments), strict=True):
        assert torch.equal(one, other)


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes that a result of an operation takes up."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.usefixtures("_selection")
def test_memory_does_not_grow_with_the_boxes(monkeypatch):
    monkeypatch.setattr(assign, "BLOCK_PAIRS_CPU", 1 << 13)
    anchors = grid_anchors()
    largest = []
    for num_boxes in (40, 1000):
        gt_boxes = real_boxes(num_boxes, 96, 0)
        with LargestTensor() as mode:
            label_anchors(anchors, gt_boxes, torch.zeros(num_boxes).long(), 5, MATCHERS["one"])
        largest.append(mode.bytes)
    assert largest[0] == largest[1]
    # Five numbers an anchor; the matrix of float32 would be a thousand.
    assert largest[1] <= max(5 * 4 * len(anchors), 4 << 13) < 4 * 1000 * len(anchors) / 50


def test_a_gpu_is_never_waited_for():
    """Fake tensors have no data: whatever would bring some to the host, raises."""
    with FakeTensorMode():
        try:
            anchors = torch.empty(1000, 4, device="cuda")
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"this torch has no fake CUDA tensors: {error}")
        gt_boxes = torch.empty(50, 4, device="cuda")
        gt_classes = torch.empty(50, dtype=torch.int64, device="cuda")
        labels, boxes = label_batch(
            anchors, [gt_boxes] * 2, [gt_classes] * 2, 5, MATCHERS["retinanet"], impl="torch"
        )
        assert (labels.shape, boxes.shape) == ((2, 1000), (2, 1000, 4))
        assert labels.device.type == boxes.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            MATCHERS["retinanet"](pairwise_iou(Boxes(gt_boxes), Boxes(anchors)))
