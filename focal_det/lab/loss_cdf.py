"""Who makes up the loss: its cumulative share over examples, easiest first (Figure 4).

A trained detector is run over images; its examples are the (anchor, class) terms, foreground
(y = +1) and background (y = -1) apart. For each gamma the focal loss of every term is taken,
normalised to sum 1 on each side, and summed up from the lowest to the highest (arXiv 1708.02002,
section 5.1, "Analysis of the Focal Loss"). alpha cancels. The paper leaves open whether its
"windows" are anchors or such terms.

The loss falls as x_t rises, whatever gamma is: one order serves all. So terms are counted in narrow
bins of x_t, with the exact sum of their losses in each bin. Memory does not depend on their number,
and at the edges of bins the shares are exact.
"""

from typing import Any

import torch
from torch import Tensor

from focal_det.losses import FocalLoss

GAMMAS = (0.0, 0.5, 1.0, 2.0)
LIMIT, NUM_BINS = 40.0, 1 << 14  # of x_t; what is beyond falls into the outermost bins
POINTS = 201
ANCHORS = 1 << 14  # that are taken in at once


class LossCDF:
    """Counts terms and sums their losses, in bins of x_t.

    Args:
        gammas: of the focal losses.
    """

    def __init__(self, gammas: tuple[float, ...] = GAMMAS) -> None:
        self.losses = {gamma: FocalLoss(alpha=None, gamma=gamma) for gamma in gammas}
        self.counts = {side: torch.zeros(NUM_BINS, dtype=torch.int64) for side in SIDES}
        self.sums = {
            side: {gamma: torch.zeros(NUM_BINS, dtype=torch.float64) for gamma in gammas}
            for side in SIDES
        }

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in the terms of some anchors.

        Args:
            logits: (R, K).
            labels: (R,), ``0..K-1`` foreground, ``K`` background, ``-1`` ignored.
        """
        valid = labels >= 0
        # In parts, since each takes several times its size in float64.
        for part, of_part in zip(
            logits[valid].split(ANCHORS), labels[valid].split(ANCHORS), strict=True
        ):
            terms, classes = part.double().cpu(), of_part.cpu()
            positive = torch.zeros_like(terms, dtype=torch.bool)
            rows = (classes < terms.shape[1]).nonzero().squeeze(1)
            positive[rows, classes[rows]] = True
            self._add("foreground", terms[positive])
            self._add("background", -terms[~positive])

    def _add(self, side: str, x_t: Tensor) -> None:
        # By falling x_t, that is by rising loss.
        bins = ((LIMIT - x_t) / (2 * LIMIT) * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        self.counts[side] += torch.bincount(bins, minlength=NUM_BINS)
        for gamma, loss in self.losses.items():
            # A loss of one class whose only label is its own: y x = x_t.
            own = torch.zeros(len(x_t), dtype=torch.int64)
            values = loss.elementwise(x_t[:, None], own)[:, 0]
            self.sums[side][gamma].index_add_(0, bins, values)

    def curves(self, points: int = POINTS) -> dict[str, Any]:
        """The cumulative shares, as :func:`focal_det.lab.figures.figure_4` takes them.

        Args:
            points: how many fractions, evenly spaced from 0 to 1.

        Returns:
            ``fraction`` of the examples; for each side, by gamma as text, the share of the loss
            that they make up, interpolated inside a bin; ``counts`` by side.

        Raises:
            ValueError: a side has no example, or the losses of one are not finite or all 0.
        """
        fractions = torch.linspace(0, 1, points, dtype=torch.float64)
        made: dict[str, Any] = {"fraction": fractions.tolist(), "counts": {}}
        for side in SIDES:
            total = int(self.counts[side].sum())
            if total == 0:
                raise ValueError(f"the images hold no {side} example")
            made["counts"][side] = total
            filled = self.counts[side] > 0
            reached = _from_zero(self.counts[side][filled].cumsum(0).double() / total)
            made[side] = {}
            for gamma, sums in self.sums[side].items():
                if not 0 < sums.sum() < float("inf"):  # not a number is neither
                    raise ValueError(
                        f"the {side} losses of gamma {gamma:g} sum up to {float(sums.sum())}: "
                        "no share can be taken of that"
                    )
                share = _from_zero(sums[filled].cumsum(0) / sums.sum())
                made[side][f"{gamma:g}"] = _interpolate(fractions, reached, share).tolist()
        return made


SIDES = ("foreground", "background")


def _from_zero(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values])


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """`ys` at `x`, linear between the rising `xs`, whose first is 0 and last 1."""
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    left = right - 1
    weight = (x - xs[left]) / (xs[right] - xs[left])
    return ys[left] + weight.clamp(0, 1) * (ys[right] - ys[left])
