"""The cumulative loss against a plain sort of all terms, with scalar losses that share no code."""

import pytest
import torch

from focal_det.lab.loss_cdf import GAMMAS, LossCDF
from focal_det.losses import reference


def sorted_shares(x_t, gamma, points):
    """Share of the loss of the easiest fraction of the terms, at evenly spaced fractions."""
    losses = sorted(reference.focal(x, 1, alpha=None, gamma=gamma)[0] for x in x_t)
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    shares = []
    for index in range(points):
        position = index * len(losses) / (points - 1)
        whole = min(int(position), len(losses) - 1)
        between = sums[whole] + (position - whole) * (sums[whole + 1] - sums[whole])
        shares.append(between / sums[-1])
    return shares


@pytest.fixture
def scene():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(300, 3, generator=generator) - 2
    labels = torch.randint(-1, 4, (300,), generator=generator)
    return logits, labels


def test_the_curves_are_those_of_a_plain_sort(scene):
    logits, labels = scene
    sides = {"foreground": [], "background": []}
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if label < 0:
            continue
        for index, x in enumerate(row):
            sides["foreground" if index == label else "background"].append(
                x if index == label else -x
            )
    cdf = LossCDF()
    for part in torch.arange(300).split(70):  # it streams
        cdf.add(logits[part], labels[part])
    made = cdf.curves(points=21)
    assert made["counts"] == {side: len(x_t) for side, x_t in sides.items()}
    assert made["fraction"] == pytest.approx([index / 20 for index in range(21)])
    for side, x_t in sides.items():
        for gamma in GAMMAS:
            expected = sorted_shares(x_t, gamma, 21)
            # A bin is .005 wide: within it the order is not kept.
            assert made[side][f"{gamma:g}"] == pytest.approx(expected, abs=2e-3)


def test_focusing_moves_the_loss_to_the_hardest_background(scene):
    cdf = LossCDF()
    cdf.add(*scene)
    background = cdf.curves()["background"]
    middle = [background[f"{gamma:g}"][150] for gamma in GAMMAS]  # of the easiest 3/4
    assert middle == sorted(middle, reverse=True)
    assert middle[-1] < middle[0] / 2


def test_logits_beyond_the_bins_count_too():
    cdf = LossCDF()
    cdf.add(torch.tensor([[1e4], [-1e4]]), torch.tensor([0, 1]))  # both right beyond doubt
    cdf.add(torch.tensor([[-1e4], [1e4]]), torch.tensor([0, 1]))  # both wrong
    made = cdf.curves(points=3)
    assert made["counts"] == {"foreground": 2, "background": 2}
    assert made["foreground"]["2"] == pytest.approx([0, 0, 1])


def test_images_without_objects_alone_have_no_foreground_curve():
    cdf = LossCDF()
    cdf.add(torch.zeros(4, 2), torch.full((4,), 2))
    with pytest.raises(ValueError, match="no foreground example"):
        cdf.curves()
