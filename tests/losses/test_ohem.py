"""OHEM: what is selected, and that only the selected anchors count."""

import math
from typing import Any

import pytest
import torch
from loss_cases import crowd, scene
from torch import Tensor
from torchvision.ops import nms

from focal_det.losses import CrossEntropyLoss, OHEMLoss, ohem, reference

RULES: list[dict[str, Any]] = [
    {"batch_size": 1},
    {"batch_size": 4},
    {"batch_size": 8, "nms_thresh": 0.7},
    {"batch_size": 8, "nms_thresh": 0.1},
    {"batch_size": 6, "nms_thresh": 0.0},
    {"batch_size": 6, "nms_thresh": 1.0},
    {"batch_size": 500},
    {"batch_size": 8, "neg_pos_ratio": 3.0},
    {"batch_size": 9, "neg_pos_ratio": 1.0},
    {"batch_size": 7, "neg_pos_ratio": 0.5, "nms_thresh": 0.3},
    {"batch_size": 10, "neg_pos_ratio": 2.5, "nms_thresh": 0.7},
    {"batch_size": 2, "neg_pos_ratio": 3.0},
    {"batch_size": 500, "neg_pos_ratio": 3.0},
]


def value_and_gradient(
    loss: OHEMLoss, logits: Tensor, labels: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, labels, boxes=boxes)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def kept_anchors(grad: Tensor) -> list[int]:
    """Cross entropy leaves no gradient at 0, so the kept anchors are those that have one."""
    return grad.abs().sum(-1).nonzero().squeeze(1).tolist()


def assert_as_reference(
    rule: dict[str, Any], logits: Tensor, labels: Tensor, boxes: Tensor
) -> list[int]:
    """Selection, value and gradient of one image; returns the kept anchors."""
    arguments = (logits.tolist(), labels.tolist(), boxes.tolist())
    expected = reference.ohem_kept(*arguments, **rule)
    total, slopes = reference.ohem(*arguments, **rule)
    value, grad = value_and_gradient(OHEMLoss(**rule), logits, labels, boxes)
    assert kept_anchors(grad) == expected
    assert value.item() == pytest.approx(total, rel=1e-5, abs=1e-30)
    torch.testing.assert_close(grad, torch.tensor(slopes).reshape(grad.shape), rtol=1e-5, atol=0)
    return expected


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_random_scenes(rule: dict[str, Any]) -> None:
    """Crowded and sparse, with and without objects and ignored anchors, one class or several."""
    sizes = set()
    for seed in range(12):
        anchors = (1, 5, 20, 45)[seed % 4]
        logits, labels = scene(anchors, 1 + seed % 3, seed=seed)
        if seed % 6 == 5:
            labels[labels < logits.shape[1]] = -1 if seed == 5 else logits.shape[1]
        boxes = crowd(anchors, seed=seed, extent=(40.0, 200.0)[seed % 2])
        sizes.add(len(assert_as_reference(rule, logits, labels, boxes)))
    assert len(sizes) > 1 or rule["batch_size"] <= 2


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ties_go_to_the_lower_index(rule: dict[str, Any]) -> None:
    """Many anchors of equal loss, overlapping and not."""
    for seed in range(4):
        logits, labels = scene(6, 2, seed=seed)
        index = torch.randint(0, 6, (40,), generator=torch.Generator().manual_seed(seed))
        assert_as_reference(rule, logits[index], labels[index], crowd(40, seed=seed, extent=120.0))


def line_of_boxes(count: int) -> Tensor:
    """Boxes (count, 4) of 10 x 10 that do not touch."""
    x = 20.0 * torch.arange(count).unsqueeze(1)
    return torch.cat([x, torch.zeros(count, 1), x + 10, torch.full((count, 1), 10.0)], dim=1)


def test_scene_made_by_hand() -> None:
    """Six anchors, K = 1, background but for one; loss falls with the index.

    Boxes 0 and 1 are one box, so 1 goes; 2 covers half of 0: IoU is exactly .5, which does not
    exceed the threshold, so 2 stays; 3 is ignored; 4 and 5 stand alone, 5 is the object.
    A batch of three is {0, 2, 4}; of four, {0, 2, 4, 5}. Background at logit x costs
    ln(1 + e^x), an object ln(1 + e^-x).
    """
    logits = torch.tensor([[4.0], [3.0], [2.0], [9.0], [1.0], [0.5]])
    labels = torch.tensor([1, 1, 1, -1, 1, 0])
    boxes = torch.tensor(
        [[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 5],
         [50, 0, 60, 10], [80, 0, 90, 10]],
        dtype=torch.float32,
    )  # fmt: skip
    three = sum(math.log(1 + math.exp(x)) for x in (4.0, 2.0, 1.0))
    four = three + math.log(1 + math.exp(-0.5))
    for batch_size, kept, expected in [(3, [0, 2, 4], three), (4, [0, 2, 4, 5], four)]:
        value, grad = value_and_gradient(OHEMLoss(batch_size), logits, labels, boxes)
        assert kept_anchors(grad) == kept
        assert value.item() == pytest.approx(expected, rel=1e-6)
    # Just below one half, 2 goes too.
    value, grad = value_and_gradient(OHEMLoss(4, nms_thresh=0.49), logits, labels, boxes)
    assert kept_anchors(grad) == [0, 4, 5]
    # 1:3 of a batch of four: one positive (5) and three negatives.
    value, grad = value_and_gradient(OHEMLoss(4, neg_pos_ratio=3.0), logits, labels, boxes)
    assert kept_anchors(grad) == [0, 2, 4, 5]
    # 1:1 of a batch of four: two positives may be kept, one is there, so one negative.
    value, grad = value_and_gradient(OHEMLoss(4, neg_pos_ratio=1.0), logits, labels, boxes)
    assert kept_anchors(grad) == [0, 5]


def test_quotas_of_1_to_3() -> None:
    """batch 128: at most 32 positives and 96 negatives, the highest of each."""
    logits = torch.linspace(3, -3, 400).unsqueeze(1)
    labels = torch.ones(400, dtype=torch.int64)
    labels[::4] = 0  # object losses rise with the index, background losses fall
    _, grad = value_and_gradient(OHEMLoss(128, 0.5, 3.0), logits, labels, line_of_boxes(400))
    kept = kept_anchors(grad)
    assert [i for i in kept if i % 4 == 0] == list(range(400 - 4 * 32, 400, 4))
    assert [i for i in kept if i % 4 != 0] == [i for i in range(128) if i % 4 != 0]


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_without_positives_one_negative_is_kept(ratio: float) -> None:
    logits = torch.tensor([[0.0], [2.0], [1.0]])
    _, grad = value_and_gradient(
        OHEMLoss(128, neg_pos_ratio=ratio),
        logits,
        torch.ones(3, dtype=torch.int64),
        line_of_boxes(3),
    )
    assert kept_anchors(grad) == [1]


def test_positives_all_suppressed() -> None:
    """A harder negative on the same box removes the only object: NMS runs over all."""
    logits = torch.tensor([[5.0], [5.0], [1.0]])
    labels = torch.tensor([1, 0, 1])
    boxes = line_of_boxes(3)
    boxes[1] = boxes[0]
    assert assert_as_reference({"neg_pos_ratio": 3.0}, logits, labels, boxes) == [0]
    assert assert_as_reference({}, logits, labels, boxes) == [0, 2]


def test_score_is_the_sum_over_classes() -> None:
    """Anchor 1 has the larger sum, anchor 0 the larger single term."""
    logits = torch.tensor([[3.0, -9.0, -9.0], [2.0, 2.0, 2.0]])
    labels = torch.tensor([3, 3])
    _, grad = value_and_gradient(OHEMLoss(1), logits, labels, line_of_boxes(2))
    assert kept_anchors(grad) == [1]


def test_nms_does_not_ask_for_the_class() -> None:
    logits = torch.tensor([[-3.0, -9.0], [-9.0, -2.0]])
    boxes = line_of_boxes(2)
    boxes[1] = boxes[0]
    _, grad = value_and_gradient(OHEMLoss(), logits, torch.tensor([0, 1]), boxes)
    assert kept_anchors(grad) == [0]


def test_ignored_anchors_take_no_part() -> None:
    """An ignored anchor with the highest loss suppresses nothing and fills no place."""
    logits = torch.tensor([[9.0], [1.0], [float("nan")], [0.0]])
    labels = torch.tensor([-1, 1, -1, 1])
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3 + [[50.0, 0, 60, 10]])
    _, grad = value_and_gradient(OHEMLoss(2), logits, labels, boxes)
    assert kept_anchors(grad) == [1, 3]


def few_places(anchors: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A scene whose boxes lie at seven places only, the hardest anchors nearly all at one.

    NMS leaves a handful of hundreds, so any short prefix by falling loss falls short of a batch.
    """
    logits, labels = scene(anchors, 2, seed=seed)
    hardness = reference_scores(logits, labels)
    place = torch.randint(0, 7, (anchors,), generator=torch.Generator().manual_seed(seed))
    place[hardness > hardness.quantile(0.2)] = 0
    boxes = line_of_boxes(7)[place] + 0.2 * torch.rand(
        anchors, 4, generator=torch.Generator().manual_seed(seed + 1)
    )
    return logits, labels, boxes


def reference_scores(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.tensor(
        [
            reference.sum_over_anchors(reference.cross_entropy, [row], [label])[0]
            for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_growing_the_prefix_is_exact(batch_size: int, ratio: float) -> None:
    """Hundreds of anchors for a batch of one to three."""
    rule = {"batch_size": batch_size, "neg_pos_ratio": ratio}
    for seed in range(3):
        assert_as_reference(rule, *few_places(300, seed))
        logits, labels = scene(300, 2, seed=seed)
        assert_as_reference(rule, logits, labels, crowd(300, seed=seed, extent=30.0))


def test_positives_at_the_end_of_the_order_are_found() -> None:
    """Two easy objects among 300 harder negatives, far beyond the first prefix."""
    logits = torch.cat([torch.linspace(5, 1, 300), torch.tensor([4.0, 6.0])]).unsqueeze(1)
    labels = torch.cat([torch.ones(300, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)])
    rule = {"batch_size": 8, "neg_pos_ratio": 3.0}
    kept = assert_as_reference(rule, logits, labels, line_of_boxes(302))
    assert kept == [0, 1, 2, 3, 4, 5, 300, 301]


def test_large_scene_equals_nms_over_all_and_runs_it_over_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """30,000 anchors: the same selection as torchvision's NMS over all, from a part of them."""
    seen = []

    def spy(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        seen.append(len(boxes))
        return nms(boxes, scores, threshold)

    monkeypatch.setattr(ohem, "nms", spy)
    logits, labels = scene(30_000, 3, seed=8)
    boxes = crowd(30_000, seed=8, extent=500.0)
    _, grad = value_and_gradient(OHEMLoss(), logits, labels, boxes)
    assert sum(seen) < 10_000
    scores = CrossEntropyLoss().elementwise(logits, labels).sum(-1)
    scores[labels == -1] = -1.0
    expected = nms(boxes, scores, 0.5)[:128]
    assert kept_anchors(grad) == sorted(expected.tolist())


@pytest.mark.parametrize("ratio", [0.0, 3.0])
def test_images_are_mined_apart(ratio: float) -> None:
    """(N, R, K) is N images; boxes at one place in two images do not suppress each other."""
    loss = OHEMLoss(8, neg_pos_ratio=ratio)
    scenes = [(*scene(40, 3, seed=seed), crowd(40, seed=5)) for seed in (0, 1)]
    alone = [value_and_gradient(loss, *inputs) for inputs in scenes]
    together = [torch.stack(x) for x in zip(*scenes, strict=True)]
    value, grad = value_and_gradient(loss, *together)
    torch.testing.assert_close(value, alone[0][0] + alone[1][0])
    torch.testing.assert_close(grad, torch.stack([alone[0][1], alone[1][1]]))


@pytest.mark.parametrize("ratio", [0.0, 3.0])
def test_levels_are_mined_together(ratio: float) -> None:
    """Three levels of two images select what the concatenation of the levels selects."""
    loss = OHEMLoss(6, neg_pos_ratio=ratio)
    shapes = [(2, 3, 4, 2), (2, 2, 2, 2), (2, 1, 1, 2)]
    logits, labels, boxes = [], [], []
    for seed, shape in enumerate(shapes):
        x, y = scene(math.prod(shape), 3, seed=seed)
        logits.append(x.view(*shape, 3).requires_grad_())
        labels.append(y.view(shape))
        boxes.append(crowd(math.prod(shape), seed=seed).view(*shape, 4))
    sums = loss.per_image(logits, labels, boxes)
    grads = torch.autograd.grad(sums.total.sum(), logits)

    def join(levels: Any, last: int) -> Tensor:
        return torch.cat([x.detach().reshape(2, -1, last) for x in levels], dim=1)

    joined_labels = torch.cat([y.reshape(2, -1) for y in labels], dim=1)
    for image in range(2):
        inputs = (join(logits, 3)[image], joined_labels[image], join(boxes, 4)[image])
        value, grad = value_and_gradient(loss, *inputs)
        torch.testing.assert_close(sums.total[image].detach(), value)
        torch.testing.assert_close(join(grads, 3)[image], grad)
        own = CrossEntropyLoss().elementwise(inputs[0], inputs[1])
        is_own = torch.arange(3) == inputs[1].unsqueeze(-1)
        is_own &= (grad.abs().sum(-1) > 0).unsqueeze(-1)
        torch.testing.assert_close(sums.foreground[image], own[is_own].sum())


def test_leading_dimension_is_the_image() -> None:
    """(N, H, W, A, K) as (N, R, K); (R, K) is one image, as (1, R, K)."""
    loss = OHEMLoss(5)
    logits, labels = scene(2 * 24, 3, seed=2)
    boxes = crowd(48, seed=2)
    flat = loss(logits.view(2, 24, 3), labels.view(2, 24), boxes=boxes.view(2, 24, 4))
    deep = loss(
        logits.view(2, 2, 3, 4, 3), labels.view(2, 2, 3, 4), boxes=boxes.view(2, 2, 3, 4, 4)
    )
    assert torch.equal(flat, deep)
    one = loss(logits[:24], labels[:24], boxes=boxes[:24])
    batch_of_one = loss(logits[None, :24], labels[None, :24], boxes=boxes[None, :24])
    assert torch.equal(one, batch_of_one)
    assert one < flat


@pytest.mark.parametrize("ratio", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(0,), (1, 0), (2, 0, 3), (0, 6)], ids=str)
def test_no_anchors(shape: tuple[int, ...], ratio: float) -> None:
    value, grad = value_and_gradient(
        OHEMLoss(neg_pos_ratio=ratio),
        torch.zeros(*shape, 3),
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(*shape, 4),
    )
    assert value.item() == 0.0
    assert grad.shape == (*shape, 3)


@pytest.mark.parametrize("ratio", [0.0, 3.0])
def test_one_image_all_ignored(ratio: float) -> None:
    loss = OHEMLoss(5, neg_pos_ratio=ratio)
    logits, labels = scene(20, 3)
    boxes = crowd(20)
    value, _ = value_and_gradient(loss, logits, labels, boxes)
    both, grad = value_and_gradient(
        loss,
        torch.stack([logits, logits]),
        torch.stack([labels, torch.full_like(labels, -1)]),
        torch.stack([boxes, boxes]),
    )
    torch.testing.assert_close(both, value)
    assert (grad[1] == 0).all()
    assert grad[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Scored in float32 or better, so 16-bit logits select as their float64 values do."""
    logits, labels = scene(40, 3, seed=9)
    logits, boxes = logits.to(dtype), crowd(40, seed=9, extent=150.0)
    value, grad = value_and_gradient(OHEMLoss(7), logits, labels, boxes)
    kept = reference.ohem_kept(logits.tolist(), labels.tolist(), boxes.tolist(), 7)
    assert kept_anchors(grad) == kept
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(
        value_and_gradient(OHEMLoss(7), logits, labels, boxes.to(torch.float64))[1], grad
    )


def test_boxes_are_required_and_checked() -> None:
    logits, labels = scene(6, 3)
    with pytest.raises(ValueError, match="OHEMLoss needs boxes"):
        OHEMLoss()(logits, labels)
    with pytest.raises(ValueError, match=r"\(6, 4\), got \(5, 4\)"):
        OHEMLoss()(logits, labels, boxes=torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"\(6, 4\), got \(6, 5\)"):
        OHEMLoss()(logits, labels, boxes=torch.zeros(6, 5))
    with pytest.raises(ValueError, match=r"labels must lie in -1\.\.3"):
        OHEMLoss()(logits, labels.clamp(max=2) + 2, boxes=torch.zeros(6, 4))


def test_there_is_no_elementwise_form() -> None:
    assert not hasattr(OHEMLoss(), "elementwise")


def test_selection_does_not_depend_on_the_gradient_being_wanted() -> None:
    logits, labels = scene(40, 3)
    boxes = crowd(40)
    value, _ = value_and_gradient(OHEMLoss(5), logits, labels, boxes)
    with torch.no_grad():
        assert torch.equal(OHEMLoss(5)(logits, labels, boxes=boxes), value)


def test_scalar_twins_of_nms_and_iou() -> None:
    """Shares 50 of 150: 1/3. NMS: box 1 goes at .3, all stay at .34."""
    boxes = [(0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 15.0, 10.0), (15.0, 0.0, 25.0, 10.0)]
    assert reference.iou(boxes[0], boxes[1]) == pytest.approx(1 / 3)
    assert reference.iou(boxes[1], boxes[2]) == 0.0
    assert reference.iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0
    assert reference.greedy_nms(boxes, [3.0, 2.0, 1.0], 0.3) == [0, 2]
    assert reference.greedy_nms(boxes, [1.0, 2.0, 3.0], 0.34) == [2, 1, 0]
    assert reference.greedy_nms(boxes, [1.0, 1.0, 1.0], 1 / 3) == [0, 1, 2]
