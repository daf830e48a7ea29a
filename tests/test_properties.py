"""What holds for any input: of losses, of the assignment of anchors, and of merging configs.

Hypothesis looks for inputs that break a property and shows the smallest it finds. It is told to
look at the same ones each time.
"""

import itertools
import math
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.structures import Boxes, Instances, pairwise_iou
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import focal_det
from focal_det.config import default_keys, detectron2_default
from focal_det.kernels import IMPLEMENTATIONS
from focal_det.losses import (
    LOSS_REGISTRY,
    BalancedCrossEntropyLoss,
    ClassificationLoss,
    CrossEntropyLoss,
    ElementwiseLoss,
    FocalLoss,
    FocalLossStar,
    HingeLoss,
    OHEMLoss,
    build_loss,
    reference,
)
from focal_det.losses.registry import get_key
from focal_det.modeling import assign, build_normalizer
from focal_det.modeling.assign import label_anchors, match_anchors
from focal_det.modeling.head import build_dense_head
from focal_det.modeling.normalizer import SHORT_NAMES

# A busy machine is no reason to fail.
looked_at = partial(
    settings,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
double = partial(torch.tensor, dtype=torch.float64)
floats = partial(st.floats, allow_subnormal=False)

# --------------------------------------------------------------------------------------------------
# Losses

LOGITS = floats(-30, 30) | st.sampled_from([0.0, 20.0, -20.0, 87.5, -87.5, 710.0, 1e4, -1e4])
ALPHAS = st.none() | st.just(-1.0) | floats(0, 1)

TWINS = st.one_of(
    st.just((CrossEntropyLoss(), reference.cross_entropy)),
    ALPHAS.map(
        lambda a: (
            BalancedCrossEntropyLoss(a),
            partial(reference.balanced_cross_entropy, alpha=a),
        )
    ),
    st.builds(
        lambda a, g: (FocalLoss(a, g), partial(reference.focal, alpha=a, gamma=g)),
        ALPHAS,
        floats(0, 6) | st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    ),
    st.builds(
        lambda a, g, b: (
            FocalLossStar(a, g, b),
            partial(reference.focal_star, alpha=a, gamma=g, beta=b),
        ),
        ALPHAS,
        floats(0.1, 6),
        floats(-5, 5),
    ),
    floats(0, 1).map(lambda t: (HingeLoss(t), partial(reference.hinge, threshold=t))),
)
"""An elementwise loss and its scalar twin."""

ANY_LOSS = TWINS.map(lambda twins: twins[0])


@st.composite
def scenes(draw: st.DrawFn, images: int = 1, most: int = 6) -> tuple[Tensor, Tensor]:
    """Logits (images x R, K) in float64 and labels (images x R,)."""
    num_classes, anchors = draw(st.integers(1, 4)), images * draw(st.integers(0, most))
    row = st.lists(LOGITS, min_size=num_classes, max_size=num_classes)
    logits = draw(st.lists(row, min_size=anchors, max_size=anchors))
    label = st.integers(-1, num_classes)
    labels = draw(st.lists(label, min_size=anchors, max_size=anchors))
    return double(logits).reshape(anchors, num_classes), torch.tensor(labels, dtype=torch.int64)


def value_and_gradient(
    loss: ClassificationLoss, logits: Tensor, labels: Tensor, boxes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    assert leaf.stride() == logits.stride()
    value = loss(leaf, labels, boxes)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def assert_close(found: Tensor, expected: Tensor, loss: ClassificationLoss) -> None:
    """Up to some roundings in float64; the hinge subtracts probabilities, of which some are 1."""
    atol = 1e-14 if isinstance(loss, HingeLoss) else 1e-30
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=atol)


@looked_at(max_examples=200)
@given(TWINS, scenes())
def test_sum_and_gradient_are_those_of_the_reference(
    twins: tuple[ElementwiseLoss, reference.Term], scene: tuple[Tensor, Tensor]
) -> None:
    (loss, term), (logits, labels) = twins, scene
    total, slopes = reference.sum_over_anchors(term, logits.tolist(), labels.tolist())
    value, gradient = value_and_gradient(loss, logits, labels)
    assert_close(value, double(total), loss)
    assert_close(gradient, double(slopes).reshape(logits.shape), loss)


@looked_at(max_examples=60)
@given(ANY_LOSS, scenes(), st.integers(0, 6))
def test_two_parts_add_up_to_the_whole(
    loss: ElementwiseLoss, scene: tuple[Tensor, Tensor], cut: int
) -> None:
    logits, labels = scene
    value, gradient = value_and_gradient(loss, logits, labels)
    parts = [
        value_and_gradient(loss, logits[part], labels[part])
        for part in (slice(None, cut), slice(cut, None))
    ]
    assert_close(parts[0][0] + parts[1][0], value, loss)
    assert_close(torch.cat([parts[0][1], parts[1][1]]), gradient, loss)


@looked_at(max_examples=60)
@given(ANY_LOSS, scenes(), st.data())
def test_the_order_of_the_anchors_does_not_matter(
    loss: ElementwiseLoss, scene: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    logits, labels = scene
    order = torch.tensor(data.draw(st.permutations(range(len(labels)))), dtype=torch.int64)
    value, gradient = value_and_gradient(loss, logits, labels)
    shuffled, shuffled_gradient = value_and_gradient(loss, logits[order], labels[order])
    assert_close(shuffled, value, loss)
    assert_close(shuffled_gradient, gradient[order], loss)


@looked_at(max_examples=60)
@given(ANY_LOSS, scenes(), st.sampled_from([1, 40]), st.data())
def test_ignored_anchors_do_not_matter(
    loss: ElementwiseLoss, scene: tuple[Tensor, Tensor], copies: int, data: st.DataObject
) -> None:
    """Whatever their logits are, be they many among the others or few."""
    logits, labels = scene[0].repeat(copies, 1), scene[1].repeat(copies)
    any_logit = LOGITS | st.sampled_from([math.nan, math.inf, -math.inf])
    others = double(data.draw(st.lists(any_logit, min_size=4, max_size=4)))
    places = data.draw(st.lists(st.integers(0, len(labels)), max_size=4))
    more_logits, more_labels = logits, labels
    for place in places:
        extra = others[: logits.shape[1]].unsqueeze(0)
        more_logits = torch.cat([more_logits[:place], extra, more_logits[place:]])
        ignored = torch.tensor([-1])
        more_labels = torch.cat([more_labels[:place], ignored, more_labels[place:]])
    value, gradient = value_and_gradient(loss, logits, labels)
    more_value, more_gradient = value_and_gradient(loss, more_logits, more_labels)
    assert_close(more_value, value, loss)
    counts = more_labels != -1
    assert (more_gradient[~counts] == 0).all()
    assert_close(more_gradient[counts], gradient[labels != -1], loss)


@looked_at(max_examples=60)
@given(ANY_LOSS, scenes(), st.booleans(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_strides_do_not_matter(
    loss: ElementwiseLoss,
    scene: tuple[Tensor, Tensor],
    classes_first: bool,
    row_step: int,
    class_step: int,
    start: int,
) -> None:
    logits, labels = scene
    rows, classes = logits.shape
    shape = (start + rows * row_step, start + classes * class_step)
    memory = torch.full(shape[::-1] if classes_first else shape, math.nan, dtype=torch.float64)
    view = (memory.t() if classes_first else memory)[start::row_step, start::class_step]
    view.copy_(logits)
    value, gradient = value_and_gradient(loss, logits, labels)
    view_value, view_gradient = value_and_gradient(loss, view, labels)
    assert_close(view_value, value, loss)
    assert_close(view_gradient, gradient, loss)


@looked_at(max_examples=60)
@given(ANY_LOSS, scenes(images=2), st.tuples(floats(-3, 3), floats(-3, 3)))
def test_weights_multiply_the_sum_of_each_image(
    loss: ElementwiseLoss, scene: tuple[Tensor, Tensor], weights: tuple[float, float]
) -> None:
    logits, labels = scene[0].unflatten(0, (2, -1)), scene[1].unflatten(0, (2, -1))
    leaf = logits.requires_grad_()
    sums = loss.per_image([leaf], [labels], weights=double(weights))
    (gradient,) = torch.autograd.grad(sums.total.sum(), leaf)
    for image, weight in enumerate(weights):
        value, alone = value_and_gradient(loss, logits[image], labels[image])
        assert_close(sums.total[image].detach(), weight * value, loss)
        assert_close(gradient[image], weight * alone, loss)


@looked_at(max_examples=60)
@given(ALPHAS, scenes())
def test_focal_losses_without_focus_are_cross_entropy(
    alpha: float | None, scene: tuple[Tensor, Tensor]
) -> None:
    cross_entropy = BalancedCrossEntropyLoss(alpha)
    for loss in (FocalLoss(alpha, 0.0), FocalLossStar(alpha, 1.0, 0.0)):
        results = (value_and_gradient(x, *scene) for x in (loss, cross_entropy))
        for found, expected in zip(*results, strict=True):
            assert_close(found, expected, loss)


@looked_at(max_examples=100)
@given(ANY_LOSS, LOGITS, LOGITS, st.booleans())
def test_a_better_logit_never_costs_more(
    loss: ElementwiseLoss, one: float, other: float, is_foreground: bool
) -> None:
    low, high = sorted([one, other])
    label = torch.tensor([0 if is_foreground else 1])
    costs = [loss(double([[x]]), label).item() for x in (low, high)]
    better, worse = costs[::-1] if is_foreground else costs
    assert 0 <= better <= worse * (1 + 1e-12) + 1e-15


REGISTERED = st.sampled_from(sorted(name for name, _ in LOSS_REGISTRY))
SIDES = floats(-1e6, 1e6, width=32) | st.integers(0, 12).map(float)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@looked_at(max_examples=200)
@given(REGISTERED, scenes(most=12), DTYPES, st.data())
def test_every_registered_loss_is_finite(
    name: str, scene: tuple[Tensor, Tensor], dtype: torch.dtype, data: st.DataObject
) -> None:
    loss = LOSS_REGISTRY.get(name)()
    logits, labels = scene[0].to(dtype), scene[1]
    box = st.lists(SIDES, min_size=4, max_size=4)
    boxes = data.draw(st.lists(box, min_size=len(labels), max_size=len(labels)))
    value, gradient = value_and_gradient(
        loss, logits, labels, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    )
    assert value.dim() == 0
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert 0 <= value < math.inf
    assert (gradient.shape, gradient.dtype) == (logits.shape, dtype)
    assert gradient.isfinite().all()
    assert (gradient[labels == -1] == 0).all()
    if (labels == -1).all():
        assert value == 0


@looked_at(max_examples=150)
@given(
    scenes(most=10),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    st.data(),
)
def test_ohem_is_the_references(
    scene: tuple[Tensor, Tensor],
    batch_size: int,
    nms_thresh: float,
    ratio: float,
    data: st.DataObject,
) -> None:
    """Whole-number boxes, so that no rounding decides whether an overlap is at the threshold."""
    logits, labels = scene
    box = st.tuples(*[st.integers(0, 8)] * 2, *[st.integers(1, 6)] * 2)
    sizes = data.draw(st.lists(box, min_size=len(labels), max_size=len(labels)))
    boxes = [[float(side) for side in (x, y, x + w, y + h)] for x, y, w, h in sizes]
    arguments = (logits.tolist(), labels.tolist(), boxes)
    scores = sorted(
        reference.sum_over_anchors(reference.cross_entropy, [row], [label])[0]
        for row, label in zip(*arguments[:2], strict=True)
        if label != -1
    )
    # Which of two equal losses is larger is a matter of rounding.
    assume(all(b - a > 1e-9 * b for a, b in itertools.pairwise(scores)))
    total, slopes = reference.ohem(*arguments, batch_size, nms_thresh, ratio)
    loss = OHEMLoss(batch_size, nms_thresh, ratio)
    value, gradient = value_and_gradient(loss, logits, labels, double(boxes).reshape(-1, 4))
    assert_close(value, double(total), loss)
    assert_close(gradient, double(slopes).reshape(logits.shape), loss)


# --------------------------------------------------------------------------------------------------
# Assignment

WHOLE = st.integers(0, 12).map(float)
REAL = floats(-20, 120, width=32)
ODD = st.sampled_from([math.nan, math.inf, -math.inf, 1e-30, 3e19, -3e19])


def boxes_of(*sides: st.SearchStrategy[float], most: int) -> st.SearchStrategy[Tensor]:
    """(B, 4), each box of sides of one kind; inside out and empty as often as not."""
    box = st.one_of([st.lists(side, min_size=4, max_size=4) for side in sides])
    ordered = box.map(lambda x: [*map(min, x[:2], x[2:]), *map(max, x[:2], x[2:])])
    return st.lists(box | ordered, max_size=most).map(lambda x: torch.tensor(x).reshape(-1, 4))


ANCHORS = boxes_of(WHOLE, REAL, most=12)
GT_BOXES = boxes_of(WHOLE, REAL, WHOLE | ODD, most=7)


@st.composite
def matchers(draw: st.DrawFn) -> Matcher:
    values = st.sampled_from([0.1, 0.125, 0.25, 1 / 3, 0.4, 0.5, 0.75, 1.0])
    thresholds = sorted(draw(st.lists(values, min_size=1, max_size=3, unique=True)))
    size = len(thresholds) + 1
    labels = draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=size, max_size=size))
    return Matcher(thresholds, labels, allow_low_quality_matches=draw(st.booleans()))


@looked_at(max_examples=300)
@given(ANCHORS, GT_BOXES, matchers(), st.integers(1, 20), st.integers(1, 4))
def test_matches_are_detectron2s_to_the_bit(
    anchors: Tensor, gt_boxes: Tensor, matcher: Matcher, block_pairs: int, block_boxes: int
) -> None:
    expected = matcher(pairwise_iou(Boxes(gt_boxes), Boxes(anchors)))
    with mock.patch.multiple(assign, BLOCK_PAIRS_CPU=block_pairs, BLOCK_BOXES=block_boxes):
        found = match_anchors(anchors, gt_boxes, matcher)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@looked_at(max_examples=100)
@given(ANCHORS, GT_BOXES, matchers(), st.data())
def test_labels_are_those_of_detectron2s_retinanet(
    anchors: Tensor, gt_boxes: Tensor, matcher: Matcher, data: st.DataObject
) -> None:
    size = len(gt_boxes)
    classes = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    gt_classes = torch.tensor(classes, dtype=torch.int64)
    instances = Instances((1, 1), gt_boxes=Boxes(gt_boxes), gt_classes=gt_classes)
    retinanet = SimpleNamespace(anchor_matcher=matcher, num_classes=3)
    expected = RetinaNet.label_anchors(retinanet, [Boxes(anchors)], [instances])
    found = label_anchors(anchors, gt_boxes, gt_classes, 3, matcher)
    for one, (other,) in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# --------------------------------------------------------------------------------------------------
# Configs

NAMES = {
    "MODEL.FOCAL_DET.LOSS.NAME": sorted(name for name, _ in LOSS_REGISTRY),
    "MODEL.FOCAL_DET.NORMALIZER.NAME": sorted(SHORT_NAMES),
    "MODEL.FOCAL_DET.IMPL": ["auto", "eager", "torch"],
}
OURS = default_keys()
DETECTRON2S = {
    key: detectron2_default(key)
    for key in (
        "MODEL.RETINANET.FOCAL_LOSS_ALPHA",
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA",
        "MODEL.RETINANET.NUM_CLASSES",
        "MODEL.RETINANET.PRIOR_PROB",
        "SOLVER.BASE_LR",
        "SOLVER.IMS_PER_BATCH",
        "DATASETS.TRAIN",
        "OUTPUT_DIR",
    )
}
DEFAULTS = {**OURS, **DETECTRON2S}


def valid_values(key: str) -> st.SearchStrategy[Any]:
    """Values of a key that any part of a detector takes."""
    default = DEFAULTS[key]
    if key in NAMES:
        return st.sampled_from(NAMES[key])
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, float):
        numbers = floats(0, 1, exclude_min=True)
        return st.none() | numbers if key.endswith("ALPHA") else numbers
    if isinstance(default, int):
        return st.integers(1, 2000)
    if isinstance(default, tuple):
        # Not what Python would read as a number, a keyword or a tuple.
        names = st.from_regex("[a-z]{3}_train", fullmatch=True)
        return st.lists(names, max_size=3).map(tuple)
    return st.just(default)


OVERRIDES = st.lists(
    st.sampled_from(sorted(DEFAULTS)).flatmap(
        lambda key: st.tuples(st.just(key), valid_values(key))
    ),
    unique_by=lambda override: override[0],
    max_size=8,
)


def merged(overrides: list[tuple[str, Any]]) -> CfgNode:
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_list(list(itertools.chain(*overrides)))
    return cfg


@looked_at(max_examples=60)
@given(OVERRIDES, st.data())
def test_neither_order_nor_repetition_matters(
    overrides: list[tuple[str, Any]], data: st.DataObject
) -> None:
    """Of overrides and of add_config, which Detectron2's own keys need not wait for."""
    expected = merged(overrides)
    for key, value in overrides:
        assert get_key(expected, key) == value
    for key, default in DEFAULTS.items():
        if key not in dict(overrides):
            assert get_key(expected, key) == default
    cfg = get_cfg()
    shuffled = data.draw(st.permutations(overrides))
    for key, value in sorted(shuffled, key=lambda override: override[0] in OURS):
        if key in OURS or data.draw(st.booleans()):
            focal_det.add_config(cfg)
        cfg.merge_from_list([key, value])
    focal_det.add_config(cfg)
    assert cfg == expected
    focal_det.add_config(cfg)
    assert cfg == expected


@looked_at(max_examples=30)
@given(OVERRIDES)
def test_a_dumped_config_reloads_to_the_same(overrides: list[tuple[str, Any]]) -> None:
    expected = merged(overrides)
    cfg = merged([])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(expected.dump(), encoding="utf-8")
        cfg.merge_from_file(str(path))
    # Of Detectron2's own keys some are tuples of tuples, which come back as tuples of lists.
    assert yaml.safe_load(cfg.dump()) == yaml.safe_load(expected.dump())
    for key in DEFAULTS:
        assert get_key(cfg, key) == get_key(expected, key)
    assert repr(build_loss(cfg)) == repr(build_loss(expected))
    assert repr(build_normalizer(cfg)) == repr(build_normalizer(expected))


OTHER_TYPES: dict[type, st.SearchStrategy[Any]] = {
    bool: st.integers() | floats(0, 1),
    int: floats(0, 1) | st.booleans() | st.just([1]),
    float: st.integers() | st.booleans() | st.just("much"),
    str: st.integers() | floats(0, 1) | st.just(["FocalLoss"]),
    tuple: st.integers() | st.just("name"),
}


@looked_at(max_examples=100)
@given(st.sampled_from(sorted(DEFAULTS)), st.data())
def test_a_value_of_another_type_is_refused_with_its_key(key: str, data: st.DataObject) -> None:
    cfg = merged([])
    kind = type(DEFAULTS[key])
    value = data.draw(OTHER_TYPES[kind])
    with pytest.raises(ValueError, match=rf"Type mismatch.* config key: {key}$"):
        cfg.merge_from_list([key, value])
    assert cfg == merged([])


READERS = {
    "MODEL.FOCAL_DET.HEAD.NAME": partial(build_dense_head, input_shape=[]),
    "MODEL.FOCAL_DET.IMPL": build_loss,
    "MODEL.FOCAL_DET.LOSS.NAME": build_loss,
    "MODEL.FOCAL_DET.NORMALIZER.NAME": build_normalizer,
}
UNKNOWN = st.text(max_size=12).filter(lambda name: name not in {*SHORT_NAMES, *IMPLEMENTATIONS})


@looked_at(max_examples=60)
@given(st.sampled_from(sorted(READERS)), UNKNOWN)
def test_an_unknown_name_is_refused_with_its_key(key: str, name: str) -> None:
    cfg = merged([])
    node, _, leaf = key.rpartition(".")
    get_key(cfg, node)[leaf] = name
    with pytest.raises(ValueError, match=rf"{key}\b") as error:
        READERS[key](cfg)
    assert repr(name) in str(error.value)


ABOVE_1 = floats(1, exclude_min=True) | st.just(math.nan)
BELOW_0 = floats(max_value=0, exclude_max=True) | st.just(math.nan)
OUT_OF_RANGE = {
    ("FocalLoss", "MODEL.RETINANET.FOCAL_LOSS_ALPHA"): ABOVE_1,
    ("FocalLoss", "MODEL.RETINANET.FOCAL_LOSS_GAMMA"): BELOW_0 | st.just(math.inf),
    ("BalancedCrossEntropyLoss", "MODEL.FOCAL_DET.BALANCED_CE.ALPHA"): ABOVE_1,
    ("FocalLossStar", "MODEL.FOCAL_DET.FL_STAR.ALPHA"): ABOVE_1,
    ("FocalLossStar", "MODEL.FOCAL_DET.FL_STAR.GAMMA"): BELOW_0 | st.sampled_from([0.0, math.inf]),
    ("FocalLossStar", "MODEL.FOCAL_DET.FL_STAR.BETA"): st.sampled_from(
        [math.inf, -math.inf, math.nan]
    ),
    ("HingeLoss", "MODEL.FOCAL_DET.HINGE.THRESHOLD"): ABOVE_1 | BELOW_0 | st.none(),
    ("OHEMLoss", "MODEL.FOCAL_DET.OHEM.BATCH_SIZE"): st.integers(max_value=0) | st.none(),
    ("OHEMLoss", "MODEL.FOCAL_DET.OHEM.NMS_THRESH"): ABOVE_1 | BELOW_0 | st.none(),
    ("OHEMLoss", "MODEL.FOCAL_DET.OHEM.NEG_POS_RATIO"): BELOW_0 | st.just(math.inf) | st.none(),
}


@looked_at(max_examples=120)
@given(st.sampled_from(sorted(OUT_OF_RANGE)), st.data())
def test_a_value_out_of_range_is_refused_with_its_key(
    place: tuple[str, str], data: st.DataObject
) -> None:
    loss, key = place
    value = data.draw(OUT_OF_RANGE[place])
    cfg = merged([("MODEL.FOCAL_DET.LOSS.NAME", loss), (key, value)])
    with pytest.raises(ValueError, match=rf"{key}\b") as error:
        build_loss(cfg)
    assert f"got {value!r}" in str(error.value)
