"""The three normalizers: numbers, state, and what a checkpoint carries."""

import pytest
import torch

from focal_det.modeling import (
    BatchNormalizer,
    EMANormalizer,
    ImageNormalizer,
    build_normalizer,
)


def test_ema_is_detectron2s_recursion():
    """90 + .1 x 30 = 93, then 83.7 + .1 x 1 = 83.8: a batch without objects counts as 1."""
    normalizer = EMANormalizer()
    torch.testing.assert_close(normalizer(torch.tensor([10, 20])), torch.tensor([93.0, 93.0]))
    torch.testing.assert_close(normalizer(torch.tensor([0, 0])), torch.tensor([83.8, 83.8]))
    assert normalizer.value.item() == pytest.approx(83.8)


def test_batch_counts_this_batch_alone():
    normalizer = BatchNormalizer()
    assert normalizer(torch.tensor([10, 20])).tolist() == [30.0, 30.0]
    assert normalizer(torch.tensor([0, 0])).tolist() == [1.0, 1.0]


def test_image_divides_each_image_by_its_own_count_and_takes_the_mean():
    normalizer = ImageNormalizer()
    divisors = normalizer(torch.tensor([10, 0, 20]))
    losses = torch.tensor([5.0, 3.0, 4.0])
    assert (losses / divisors).sum().item() == pytest.approx((5 / 10 + 3 / 1 + 4 / 20) / 3)
    assert normalizer.value.item() == pytest.approx((10 + 1 + 20) / 3)


@pytest.mark.parametrize("kind", [EMANormalizer, BatchNormalizer, ImageNormalizer])
def test_state_stays_where_it_is_told_not_to_update(kind):
    normalizer = kind()
    before = normalizer.value.item()
    first = normalizer(torch.tensor([40, 2]), update=False)
    assert normalizer.value.item() == before
    assert torch.equal(first, normalizer(torch.tensor([40, 2]), update=False))


@pytest.mark.parametrize("kind", [EMANormalizer, BatchNormalizer, ImageNormalizer])
def test_a_checkpoint_carries_the_state(kind):
    trained, fresh = kind(), kind()
    trained(torch.tensor([40, 2]))
    fresh.load_state_dict(trained.state_dict())
    assert fresh.value.item() == trained.value.item() != kind().value.item()


def test_weights_without_the_state_leave_the_start_value():
    normalizer = EMANormalizer()
    missing, unexpected = normalizer.load_state_dict({}, strict=True)
    assert (missing, unexpected) == ([], [])
    assert normalizer.value.item() == 100.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ema", EMANormalizer), ("batch", BatchNormalizer), ("image", ImageNormalizer)],
)
def test_names_and_sync_are_read_from_the_config(small_cfg, name, kind):
    small_cfg.MODEL.FOCAL_DET.NORMALIZER.NAME = name
    small_cfg.MODEL.FOCAL_DET.NORMALIZER.SYNC = False
    normalizer = build_normalizer(small_cfg)
    assert type(normalizer) is kind
    assert normalizer.sync is False


def test_unknown_name_lists_the_valid_ones(small_cfg):
    small_cfg.MODEL.FOCAL_DET.NORMALIZER.NAME = "mean"
    with pytest.raises(ValueError, match=r"NORMALIZER.NAME is 'mean'.*ema, batch, image"):
        build_normalizer(small_cfg)
