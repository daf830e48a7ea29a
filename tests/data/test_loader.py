"""Training batches that depend on a seed and their number alone."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.utils.data import IterableDataset, Sampler

from focal_det import add_config
from focal_det.data.guarded import BadImageError
from focal_det.data.loader import (
    TrainLoader,
    build_lazy_train_loader,
    build_train_loader,
    seeded,
)
from focal_det.engine.skipped import ReportSkipped

RECORDS = [
    {"file_name": f"{i}.png", "image_id": i, "width": 10 + 10 * (i % 3), "height": 20}
    for i in range(11)
]

BOX, CLASS = Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]])), torch.tensor([2])


def draw(record):
    """A mapper that asks every source of randomness that augmentations use."""
    numbers = (random.random(), np.random.rand(), torch.rand(()).item())
    return {**record, "draws": numbers}


def refuse_some(record):
    return None if record["image_id"] % 3 == 0 else draw(record)


def make(mapper=draw, **changes):
    settings = {"aspect_ratio_grouping": False, "seed": 5, **changes}
    sampler = settings.pop("make_sampler", lambda: TrainingSampler(len(RECORDS)))
    return TrainLoader(RECORDS, mapper, sampler, settings.pop("batch_size", 3), **settings)


def take(loader, number, first=0):
    loader.start_at(first)
    batches = iter(loader)
    return [next(batches) for _ in range(number)]


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("mapper", [draw, refuse_some])
def test_it_goes_on_where_it_stood(grouping, mapper):
    """Images, augmentation, and the images drawn for those that a mapper refused."""
    whole = take(make(mapper, aspect_ratio_grouping=grouping), 12)
    for first in (1, 5, 11):
        rest = take(make(mapper, aspect_ratio_grouping=grouping), 12 - first, first)
        assert rest == whole[first:]


def test_data_workers_make_no_difference():
    assert take(make(num_workers=2), 6, first=3) == take(make(), 6, first=3)


def test_every_image_comes_once_an_epoch_and_differently_each_time():
    samples = [sample for batch in take(make(batch_size=1), 22) for sample in batch]
    epochs = samples[:11], samples[11:]
    for epoch in epochs:
        assert sorted(x["image_id"] for x in epoch) == list(range(11))
    assert len({x["draws"] for x in samples}) == 22


def test_seeds_give_other_orders_and_draws():
    a, b = (take(make(seed=seed), 4) for seed in (1, 2))
    assert [x["image_id"] for y in a for x in y] != [x["image_id"] for y in b for x in y]
    assert {x["draws"] for y in a for x in y}.isdisjoint(x["draws"] for y in b for x in y)


def test_groups_are_all_wide_or_all_high():
    """Width 30 is wide, 20 (a square) and 10 are not, as Detectron2 has it."""
    batches = take(make(aspect_ratio_grouping=True), 20)
    kinds = [{x["width"] > x["height"] for x in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert {True} in kinds
    assert {False} in kinds


def test_two_processes_share_the_images_of_one(monkeypatch):
    def sampler():
        return TrainingSampler(len(RECORDS), seed=3)

    alone = [x for batch in take(make(batch_size=4, make_sampler=sampler), 5) for x in batch]
    halves = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        mine = take(make(batch_size=2, make_sampler=sampler), 5)
        halves.append([x for batch in mine for x in batch])
    assert [x for pair in zip(*halves, strict=True) for x in pair] == alone


def test_samplers_without_a_seed_are_reproducible():
    factors = torch.linspace(1, 2.5, len(RECORDS))
    runs = [
        take(make(make_sampler=lambda: RepeatFactorTrainingSampler(factors)), 8) for _ in range(2)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_process_keeps_its_own_randomness(workers):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    take(make(num_workers=workers), 3)
    assert states() == before
    with seeded(1, 2):
        assert states() != before
    assert states() == before


def test_a_mapper_that_refuses_all_is_an_error():
    with pytest.raises(RuntimeError, match="refused 100 images in a row"):
        take(make(lambda record: None), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
    ],
)
def test_arguments_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_grouping_needs_sizes():
    sizeless = [{"file_name": "a.png", "image_id": 0}]
    with pytest.raises(
        ValueError, match=r"'a\.png' has no width and height.*ASPECT_RATIO_GROUPING"
    ):
        TrainLoader(sizeless, draw, lambda: TrainingSampler(1), 1, aspect_ratio_grouping=True)


def test_from_the_arguments_of_detectron2s_function():
    class Backwards(Sampler):
        def __iter__(self):
            while True:
                yield from range(len(RECORDS) - 1, -1, -1)

    common = {"mapper": draw, "total_batch_size": 2, "aspect_ratio_grouping": False}
    given = take(build_lazy_train_loader(RECORDS, sampler=Backwards(), seed=1, **common), 2)
    assert [x["image_id"] for batch in given for x in batch] == [10, 9, 8, 7]
    drawn = [take(build_lazy_train_loader(RECORDS, seed=3, **common), 3) for _ in range(2)]
    assert drawn[0] == drawn[1]
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH .*is 0; .*multiple of their number, 1"):
        build_lazy_train_loader(RECORDS, mapper=draw, total_batch_size=0)


class Stream(IterableDataset):
    """Images without end, every third of which is broken."""

    def __iter__(self):
        for number in itertools.count():
            yield {**RECORDS[number % len(RECORDS)], "image_id": number}


def break_some(record):
    if record["image_id"] % 3 == 0:
        raise OSError("broken")
    return record


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("lazy", [False, True])
def test_of_a_stream_images_are_skipped_and_counted_too(monkeypatch, grouping, workers, lazy):
    """Detectron2's own loader reads it."""
    stream = Stream()
    if lazy:
        common = {"total_batch_size": 2, "num_workers": workers, "on_bad_image": "skip"}
        loader = build_lazy_train_loader(
            stream, mapper=break_some, aspect_ratio_grouping=grouping, **common
        )
    else:
        monkeypatch.setitem(DatasetCatalog.data, "stream", lambda: stream)
        cfg = get_cfg()
        add_config(cfg)
        cfg.DATASETS.TRAIN, cfg.SOLVER.IMS_PER_BATCH = ("stream",), 2
        cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.ON_BAD_IMAGE = workers, "skip"
        cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
        loader = build_train_loader(cfg, break_some)
    batches = iter(loader)
    for _ in range(4):
        assert all(x["image_id"] % 3 for x in next(batches))
    hook = ReportSkipped(loader)
    hook.trainer = SimpleNamespace(iter=0, max_iter=1, storage=EventStorage())
    hook.after_step()
    assert hook.trainer.storage.latest()["skipped_images"][0] >= 4


def test_a_class_out_of_range_is_named_with_a_lazy_config_too():
    loader = build_lazy_train_loader(
        [{**RECORDS[0], "annotations": []}],
        mapper=lambda record: {"instances": Instances((1, 1), gt_boxes=BOX, gt_classes=CLASS)},
        total_batch_size=1,
        num_classes=2,
        seed=1,
    )
    with pytest.raises(BadImageError, match=r"'0\.png' .* gives the class 2, allowed is 0\.\.1"):
        take(loader, 1)


def test_the_place_may_be_said_after_the_iterator_is_made():
    """Detectron2 0.6 makes it first."""
    loader = make()
    batches = iter(loader)
    loader.start_at(5)
    assert next(batches) == take(make(), 1, first=5)[0]


def test_options_of_pytorchs_loader():
    loader = build_lazy_train_loader(
        RECORDS,
        mapper=draw,
        total_batch_size=2,
        aspect_ratio_grouping=False,
        num_workers=1,
        seed=3,
        prefetch_factor=1,
    )
    plain = build_lazy_train_loader(
        RECORDS, mapper=draw, total_batch_size=2, aspect_ratio_grouping=False, seed=3
    )
    assert take(loader, 2) == take(plain, 2)
