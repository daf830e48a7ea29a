"""Anchor assignment and post-processing for the benchmark: inputs, variants, and their equality.

Letters: R anchors, M boxes of an image, A = 9 anchors per location, K classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, ImageList, pairwise_iou
from torch import Tensor

from focal_det.modeling.assign import match_batch

from .losses import ANCHORS, Shape, anchor_levels
from .models import CLASSES, build, difference, random_boxes

BOX_COUNTS = (1, 30, 100, 300, 1000)
STATES = ("untrained", "trained", "early")
CLUSTERS = 35  # of 81 candidates, neighbours of one class around an object, in a trained model
THRESHOLD_LOGIT = math.log(0.05 / 0.95)

Calls = dict[str, Callable[[], Any]]
Case = tuple[dict[str, Any], Calls, str | None]
"""What its rows share, the calls, and how their results differ (None where they are identical)."""


def assignment_cases(
    shape: Shape, counts: Sequence[int], seed: int, device: str = "cpu"
) -> Iterator[Case]:
    """A case for each number of boxes; see :func:`assignment_calls`."""
    for count in counts:
        calls = assignment_calls(shape, count, seed, device)
        common = {"part": "assignment", "size": f"{shape.height}x{shape.width}", "boxes": count}
        yield common, calls, assignment_difference(calls)


def postprocessing_cases(
    shape: Shape, seed: int, config_file: Path, device: str = "cpu"
) -> Iterator[Case]:
    """A case for each state of a model; see :func:`postprocessing_calls`."""
    for state in STATES:
        calls, candidates = postprocessing_calls(shape, state, seed, config_file, device)
        common = {
            "part": "postprocessing",
            "size": f"{shape.height}x{shape.width}",
            "state": state,
            "candidates": candidates,
        }
        yield common, calls, postprocessing_difference(calls)


def assignment_calls(shape: Shape, count: int, seed: int, device: str = "cpu") -> Calls:
    """Built-in and ours, from anchors and boxes to matches (R,) and labels (R,).

    Args:
        shape: of the image.
        count: M.
        seed: of the boxes.
        device: to run on.
    """
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.cat(anchor_levels(shape)).to(device)
    boxes = random_boxes(count, shape.height, shape.width, generator).to(device)
    matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    return {
        "detectron2": lambda: matcher(pairwise_iou(Boxes(boxes), Boxes(anchors))),
        "focal_det": lambda: tuple(x[0] for x in match_batch(anchors, [boxes], matcher)),
    }


def assignment_difference(calls: Calls) -> str | None:
    """How the two assignments differ; None where they are identical."""
    names = ("matches", "labels")
    results = zip(names, *(call() for call in calls.values()), strict=True)
    return next((f"the {name} differ" for name, a, b in results if not torch.equal(a, b)), None)


def postprocessing_calls(
    shape: Shape, state: str, seed: int, config_file: Path, device: str = "cpu"
) -> tuple[Calls, int]:
    """Built-in and ours, from a head's raw output for one image to its detections.

    Args:
        shape: of the image; K = 80.
        state: what the scores look like, one of :data:`STATES`.
        seed: of the predictions.
        config_file: the YAML base config of both RetinaNets.
        device: to run on.

    Returns:
        The calls, and the number of scores above the threshold.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = [x.to(device) for x in _random_scores(shape, state, generator)]
    deltas = [
        (torch.randn(1, ANCHORS * 4, h, w, generator=generator) * 0.1).to(device)
        for h, w in shape.levels()
    ]
    images = ImageList(torch.empty(1, device=device), [(shape.height, shape.width)])
    features = [torch.empty(1, 1, h, w, device=device) for h, w in shape.levels()]
    candidates = sum(int((x > THRESHOLD_LOGIT).sum()) for x in logits)

    def run(name: str) -> Callable[[], Any]:
        model: Any = build(_MODELS[name], 18, config_file).to(device).eval()
        infer = torch.no_grad()(model.forward_inference)
        return lambda: infer(images, features, [logits, deltas])

    return {name: run(name) for name in _MODELS}, candidates


_MODELS = {"detectron2": "retinanet", "focal_det": "focal_det"}


def postprocessing_difference(calls: Calls) -> str | None:
    """How the two lists of detections differ; None where they are identical."""
    (expected,), (found,) = (call() for call in calls.values())
    return difference(found, expected)


def _random_scores(shape: Shape, state: str, generator: torch.Generator) -> list[Tensor]:
    """Logits (1, A x K, H, W) a level.

    ``untrained``: around the prior of 1%, none above the threshold. ``early``: the same, spread
    so that 5% are. ``trained``: background far below, and clusters around some objects.
    """
    mean, spread = {"untrained": (-4.6, 0.1), "early": (-4.6, 1.0), "trained": (-7.0, 0.5)}[state]
    logits = [
        torch.randn(1, ANCHORS * CLASSES, h, w, generator=generator).mul_(spread).add_(mean)
        for h, w in shape.levels()
    ]
    if state == "trained":
        for _ in range(CLUSTERS):
            _add_cluster(logits[: _pick(3, generator) + 1][-1], generator)
    return logits


def _add_cluster(level: Tensor, generator: torch.Generator) -> None:
    """Raise the scores of one class for all anchors of 3 x 3 neighbouring locations."""
    row, column = (_pick(max(1, size - 2), generator) for size in level.shape[-2:])
    scores = level.view(ANCHORS, CLASSES, *level.shape[-2:])
    scores = scores[:, _pick(CLASSES, generator), row : row + 3, column : column + 3]
    scores.copy_(torch.rand(scores.shape, generator=generator) * 6 + THRESHOLD_LOGIT)


def _pick(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, count, (), generator=generator))
