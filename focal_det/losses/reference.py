"""Scalar float64 twins of the losses, for checking the fast ones.

Everything here is plain Python ``math``, written from the formulas of "Focal Loss for Dense
Object Detection" (arXiv 1708.02002) one number at a time.
It shares no code with the tensor implementation, so a mistake would have to be made twice, in two
different ways, to go unseen. Tests and benchmarks import it; training never does.

Notation follows the paper: ``x`` is the logit of one binary classifier, ``y`` is +1 for foreground
and -1 for background, ``x_t = y x`` and ``p_t = sigmoid(x_t)``.
Every loss returns the pair ``(value, slope)``, where the slope is the derivative by ``x``.
All are finite for ``|x| <= 1e4`` and any ``gamma`` the loss allows.
"""

import math
from collections.abc import Callable, Sequence

Term = Callable[[float, int], tuple[float, float]]
"""A loss with its parameters bound: ``(x, y) -> (value, slope)``."""

Box = Sequence[float]
"""``(x1, y1, x2, y2)`` in pixels."""


def sigmoid(x: float) -> float:
    """Logistic function; each branch calls ``exp`` on a number that cannot overflow."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


def log_sigmoid(x: float) -> float:
    """``log(sigmoid(x))``, kept accurate where the sigmoid rounds to 0 or to 1."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def alpha_weight(y: int, alpha: float | None) -> float:
    """``alpha_t`` of section 3.1: ``alpha`` for foreground and ``1 - alpha`` for background.

    ``None`` or a negative number switches the weighting off.
    """
    if alpha is None or alpha < 0:
        return 1.0
    return alpha if y == 1 else 1.0 - alpha


def cross_entropy(x: float, y: int) -> tuple[float, float]:
    """Equations 1 and 2: ``CE = -log(p_t)``. Appendix B: ``dCE/dx = y (p_t - 1)``."""
    x_t = y * x
    return -log_sigmoid(x_t), -y * sigmoid(-x_t)


def balanced_cross_entropy(x: float, y: int, alpha: float | None = 0.75) -> tuple[float, float]:
    """Equation 3: ``-alpha_t log(p_t)``."""
    value, slope = cross_entropy(x, y)
    weight = alpha_weight(y, alpha)
    return weight * value, weight * slope


def focal(x: float, y: int, alpha: float | None = 0.25, gamma: float = 2.0) -> tuple[float, float]:
    """Equations 4 and 5: ``FL = -alpha_t (1 - p_t)^gamma log(p_t)``.

    Appendix B: ``dFL/dx = alpha_t y (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1)``.
    ``1 - p_t`` is written ``sigmoid(-x_t)``, which stays above 0 long after ``p_t`` rounds to 1.
    """
    x_t = y * x
    p_t, miss, log_p_t = sigmoid(x_t), sigmoid(-x_t), log_sigmoid(x_t)
    modulation = math.exp(gamma * log_sigmoid(-x_t))
    weight = alpha_weight(y, alpha)
    value = -weight * modulation * log_p_t
    slope = weight * y * modulation * (gamma * p_t * log_p_t - miss)
    return value, slope


def focal_star(
    x: float, y: int, alpha: float | None = 0.25, gamma: float = 2.0, beta: float = 1.0
) -> tuple[float, float]:
    """Appendix A: ``FL* = -log(p_t*) / gamma`` with ``p_t* = sigmoid(gamma x_t + beta)``.

    Appendix B: ``dFL*/dx = y (p_t* - 1)``. Both are multiplied by ``alpha_t``, as for ``FL``.
    """
    x_star = gamma * y * x + beta
    weight = alpha_weight(y, alpha)
    return -weight * log_sigmoid(x_star) / gamma, -weight * y * sigmoid(-x_star)


def hinge(x: float, y: int, threshold: float = 0.5) -> tuple[float, float]:
    """``max(0, threshold - p_t)``.

    The paper (section 5.1) tells only that this loss is 0 above some ``p_t``.
    At the corner, where either one-sided derivative would do, the slope is 0.
    """
    p_t, miss = sigmoid(y * x), sigmoid(-y * x)
    if p_t >= threshold:
        return 0.0, 0.0
    return threshold - p_t, -y * p_t * miss


def sum_over_anchors(
    term: Term, logits: Sequence[Sequence[float]], labels: Sequence[int]
) -> tuple[float, list[list[float]]]:
    """Sum of ``term`` over the anchors that count and their classes.

    Args:
        term: The loss of one binary classifier.
        logits: R rows of K numbers.
        labels: R labels: a class in ``0..K-1``, K for background, -1 for an ignored anchor.

    Returns:
        The sum and its derivatives, in the shape of ``logits``.
    """
    values: list[float] = []
    slopes: list[list[float]] = []
    for row, label in zip(logits, labels, strict=True):
        if label == -1:
            slopes.append([0.0] * len(row))
            continue
        pairs = [term(x, 1 if label == k else -1) for k, x in enumerate(row)]
        values.extend(value for value, _ in pairs)
        slopes.append([slope for _, slope in pairs])
    return math.fsum(values), slopes


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 when both boxes are empty."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def greedy_nms(boxes: Sequence[Box], scores: Sequence[float], threshold: float) -> list[int]:
    """Indices that survive non-maximum suppression, highest score first.

    A box goes when it overlaps a kept one by **more than** ``threshold``; of equal scores the
    lower index is taken first.
    """
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if all(iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def ohem_kept(
    logits: Sequence[Sequence[float]],
    labels: Sequence[int],
    boxes: Sequence[Box],
    batch_size: int = 128,
    nms_thresh: float = 0.5,
    neg_pos_ratio: float = 0.0,
) -> list[int]:
    """Anchors of one image that online hard example mining keeps, in rising order.

    Section 5.2 scores each example by its loss, applies non-maximum suppression and takes the
    highest. The score here is the cross entropy summed over classes; ignored anchors neither
    suppress nor count. "OHEM 1:3" is ``neg_pos_ratio=3``; 0 takes whatever is highest.
    """
    valid = [i for i, label in enumerate(labels) if label != -1]
    scores = [sum_over_anchors(cross_entropy, [logits[i]], [labels[i]])[0] for i in valid]
    survivors = [valid[i] for i in greedy_nms([boxes[i] for i in valid], scores, nms_thresh)]
    if neg_pos_ratio == 0:
        return sorted(survivors[:batch_size])
    positives = [i for i in survivors if labels[i] < len(logits[i])]
    negatives = [i for i in survivors if labels[i] == len(logits[i])]
    positives = positives[: math.floor(batch_size / (1 + neg_pos_ratio))]
    # An image without a kept positive must still give one gradient.
    quota = math.floor(neg_pos_ratio * len(positives)) if positives else 1
    return sorted(positives + negatives[:quota])


def ohem(
    logits: Sequence[Sequence[float]],
    labels: Sequence[int],
    boxes: Sequence[Box],
    batch_size: int = 128,
    nms_thresh: float = 0.5,
    neg_pos_ratio: float = 0.0,
) -> tuple[float, list[list[float]]]:
    """Cross entropy of one image over the anchors of `ohem_kept`, with its derivatives."""
    kept = set(ohem_kept(logits, labels, boxes, batch_size, nms_thresh, neg_pos_ratio))
    masked = [label if i in kept else -1 for i, label in enumerate(labels)]
    return sum_over_anchors(cross_entropy, logits, masked)
