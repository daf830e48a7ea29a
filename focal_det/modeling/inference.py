"""From the head's raw outputs to detections, without a permuted copy of them.

Detectron2's RetinaNet brings logits and box deltas into the order of the anchors and takes the
sigmoid of all of them, to keep a few. Here the logits are compared where they lie, and only what
passes is gathered, sorted and turned into scores. The result is Detectron2's, to the bit and in
its order. The predictions stay as they were.

All functions can be scripted with ``torch.jit.script``, hence the constants inside them.

Letters: A anchors per location, K classes, C candidates, D detections.
"""

import math

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor


def detect_single_image(
    anchors: list[Boxes],
    logits: list[Tensor],
    deltas: list[Tensor],
    image_size: tuple[int, int],
    num_classes: int,
    box2box_transform: Box2BoxTransform,
    score_thresh: float,
    topk: int,
    nms_thresh: float,
    max_detections: int,
) -> Instances:
    """Detections of one image.

    Args:
        anchors: one entry a feature level, Hi x Wi x A anchors.
        logits: one (A x K, Hi, Wi) a level, floating dtype, contiguous or channels_last; any other
            strides will do too, at the price of a copy.
        deltas: one (A x 4, Hi, Wi) a level.
        image_size: height and width of the network's input.
        num_classes: K.
        box2box_transform: decodes the deltas.
        score_thresh: only scores above it are considered.
        topk: how many candidates a level at most go on to the suppression.
        nms_thresh: a box is suppressed by a better one of its class with a larger overlap.
        max_detections: D at most.

    Returns:
        ``pred_boxes`` (D, 4), ``scores`` (D,) in the dtype of the logits and ``pred_classes``
        (D,), best first.
    """
    boxes: list[Tensor] = []
    scores: list[Tensor] = []
    classes: list[Tensor] = []
    for level_anchors, level_logits, level_deltas in zip(anchors, logits, deltas):  # noqa: B905
        level_scores, index, level_classes = select_candidates(
            level_logits, num_classes, score_thresh, topk
        )
        chosen_deltas = gather_deltas(level_deltas, index)
        boxes.append(box2box_transform.apply_deltas(chosen_deltas, level_anchors.tensor[index]))
        scores.append(level_scores)
        classes.append(level_classes)
    all_boxes, all_scores, all_classes = torch.cat(boxes), torch.cat(scores), torch.cat(classes)
    # The suppression wants boxes and scores of one dtype, and boxes are float32.
    keep = batched_nms(all_boxes, all_scores.float(), all_classes, nms_thresh)[:max_detections]
    return Instances(
        image_size,
        pred_boxes=Boxes(all_boxes[keep]),
        scores=all_scores[keep],
        pred_classes=all_classes[keep],
    )


def select_candidates(
    logits: Tensor, num_classes: int, score_thresh: float, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best candidates of one image and level.

    Args:
        logits: (A x K, H, W), contiguous or channels_last; any other strides will do too, at the
            price of a copy.
        num_classes: K.
        score_thresh: only scores above it are considered.
        topk: C at most.

    Returns:
        Scores (C,), best first and in the dtype of the logits, indices (C,) into the H x W x A
        anchors in Detectron2's order, and classes (C,).
    """
    channels = logits.shape[0]
    size = logits.shape[1] * logits.shape[2]
    contiguous = logits.is_contiguous()
    in_memory_order = logits if contiguous else logits.permute(1, 2, 0)
    flat = in_memory_order.reshape(-1)

    # NaN fails the comparison, as it does in Detectron2.
    index = _nonzero(flat >= _lowest_logit(score_thresh, logits.dtype))
    values = flat.index_select(0, index)
    if contiguous:
        # topk is not stable: for its choice among equal scores to be Detectron2's, it has to see
        # the scores in Detectron2's order, (H, W, A, K).
        if logits.numel() < 2**31:
            index = index.int()  # sorts in half the time
        channel = index // size
        index, order = ((index - channel * size) * channels + channel).sort()
        values = values.index_select(0, order)

    # Scores are compared as Detectron2 does it; the logits were compared with a margin.
    scores = _sigmoid_in_whole(values, index, logits.numel())
    above = _nonzero(scores > score_thresh)
    num_topk = above.shape[0]
    if isinstance(num_topk, Tensor):  # under torch.jit.trace
        num_topk = torch.clamp(num_topk, max=topk)
    else:
        num_topk = min(num_topk, topk)
    scores, best = scores.index_select(0, above).topk(num_topk)
    index = index[above[best]].long()
    return scores, index // num_classes, index % num_classes


def gather_deltas(deltas: Tensor, index: Tensor) -> Tensor:
    """Box deltas (C, 4) of chosen anchors.

    Args:
        deltas: (A x 4, H, W), any strides.
        index: (C,) into the H x W x A anchors in Detectron2's order.
    """
    num_anchors = deltas.shape[0] // 4
    width = deltas.shape[2]
    location = index // num_anchors
    per_anchor = deltas.unflatten(0, (-1, 4)).permute(2, 3, 0, 1)  # (H, W, A, 4)
    return per_anchor[location // width, location % width, index % num_anchors]


def _lowest_logit(score_thresh: float, dtype: torch.dtype) -> float:
    """A logit at or below all those whose score, in this dtype, is above the threshold.

    Rounding moves the threshold and the scores up by a few units in the last place. The margin is
    eight of them.
    """
    if score_thresh >= 1:
        return math.inf
    accurate = dtype == torch.float32 or dtype == torch.float64
    low = score_thresh * (1 - (2.0**-20 if accurate else 2.0**-4))
    if low < 2.0**-14:  # where the units of float16 are no longer in proportion to the score
        return -math.inf
    return math.log(low) - math.log1p(-low)


def _nonzero(mask: Tensor) -> Tensor:
    """Ascending indices (C,) of what is true in a contiguous 1-d mask."""
    # On a CPU, torch looks at one element after the other. Few are true: find the groups of eight
    # that have some. TorchScript has no view of another type.
    if (
        not torch.jit.is_scripting()  # type: ignore[attr-defined]
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and mask.device.type == "cpu"
        and mask.shape[0] % 8 == 0
    ):
        groups = mask.view(torch.int64)
        if int(groups.count_nonzero()) * 16 < groups.shape[0]:
            some = groups.nonzero().squeeze(1)
            found = groups.index_select(0, some).view(torch.bool).nonzero().squeeze(1)
            return some.index_select(0, found // 8) * 8 + found % 8
    return mask.nonzero().squeeze(1)


def _sigmoid_in_whole(values: Tensor, index: Tensor, total: int) -> Tensor:
    """Sigmoid of some elements of a tensor, to the bit what the sigmoid of the whole has there.

    On a CPU, torch cuts a tensor into one part a thread and takes the elements of a part by
    vectors and the few that remain at its end one by one. The two ways differ in the last bit, so
    it matters where in the whole an element was.

    Args:
        values: (C,), the elements.
        index: (C,), where they are in the whole, ascending.
        total: the number of elements of the whole, which is contiguous.
    """
    if values.device.type != "cpu":
        return values.sigmoid()
    step = 64  # a multiple of the elements that any CPU takes at a time
    grain = 32768  # torch's: fewer elements are not shared between threads

    # By vectors: blocks too small to be shared, with what remains at the end in the padding.
    padded = torch.cat([values, values.new_zeros([step])])
    # What follows depends on the number of candidates.
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return padded.sigmoid()[: values.shape[0]]
    scores = torch.cat([block.sigmoid() for block in padded.split(grain // 2)])[: values.shape[0]]

    # One by one, by running the end of each thread's part.
    threads = 1  # in TorchScript, which cannot ask
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        threads = min(torch.get_num_threads(), (total + grain - 1) // grain)
    part = (total + threads - 1) // threads
    bounds: list[int] = []
    for start in range(0, total, part):
        end = min(start + part, total)
        if (end - start) % step > 0:
            bounds.extend([end - (end - start) % step, end])
    if len(bounds) > 0:
        cuts: list[int] = torch.searchsorted(
            index, torch.tensor(bounds, dtype=index.dtype)
        ).tolist()
        for i in range(0, len(cuts), 2):
            if cuts[i] < cuts[i + 1]:
                where = index[cuts[i] : cuts[i + 1]] - bounds[i]
                rest = values.new_zeros([bounds[i + 1] - bounds[i]])
                rest[where] = values[cuts[i] : cuts[i + 1]]
                scores[cuts[i] : cuts[i + 1]] = rest.sigmoid()[where]
    return scores
