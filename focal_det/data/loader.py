"""A training loader whose batches depend on a seed and their number alone.

Detectron2's loader is a stream: where it stands is spread over its sampler, its worker processes
and their random states, and a resumed run begins anew. Here the order of the images comes from the
seed, images are grouped into batches before they are read, and each image is augmented with random
states derived from (seed, position in the stream). So batch n is the same in a run that was
interrupted, with any number of data workers, and, without grouping by aspect ratio, its images are
those of a run with another number of processes.
"""

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from .guarded import STOP, GuardedMapper

logger = logging.getLogger(f"detectron2.{__name__}")

Record = dict[str, Any]
"""An image in Detectron2's data set format, or what a mapper makes of it."""

RETINANETS = ("FocalRetinaNet", "RetinaNet")
"""Meta-architectures whose number of classes is ``MODEL.RETINANET.NUM_CLASSES``."""

MOST_DRAWS = 100
"""Images that are tried for one place in a batch before a mapper is held to refuse all."""


class TrainLoader:
    """Infinite batches of mapped images for this process.

    Args:
        dataset: records, a list or a map-style data set.
        mapper: makes a training sample of a record; where it returns None, another image is drawn.
        make_sampler: makes the infinite stream of indices; it is called with NumPy seeded, so that
            Detectron2's samplers, which ask NumPy for a seed they are not given, are reproducible.
        batch_size: images in a batch of this process.
        aspect_ratio_grouping: batches of only landscape or only portrait images, which need less
            padding.
        num_workers: data worker processes; 0 reads in this one.
        collate_fn: makes a batch of samples; by default it is their list.
        options: of PyTorch's ``DataLoader``, such as ``pin_memory``.
        seed: what all randomness comes from; the same in all processes.

    Raises:
        ValueError: `batch_size` or `num_workers` out of range.
    """

    def __init__(
        self,
        dataset: Sequence[Record] | Dataset[Record],
        mapper: Callable[[Record], Any],
        make_sampler: Callable[[], Sampler[int]],
        batch_size: int,
        *,
        aspect_ratio_grouping: bool = True,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
        self.dataset = _packed(dataset)
        self.mapper, self.make_sampler, self.batch_size = mapper, make_sampler, batch_size
        self.num_workers, self.collate_fn, self.options = num_workers, collate_fn, options
        self.seed = seed
        self._first = 0
        self._landscape = _orientations(dataset) if aspect_ratio_grouping else None

    def start_at(self, batch: int) -> None:
        """Begin with this batch, counted from 0, the next time that the loader is iterated."""
        self._first = batch

    def __iter__(self) -> Iterator[Any]:
        batches = itertools.islice(self._index_batches(), self._first, None)
        # A generator does nothing of this before the first batch is asked for; Detectron2 0.6 makes
        # the iterator before it knows where training begins.
        yield from DataLoader(
            _SeededSamples(self.dataset, self.mapper, self.seed),
            batch_sampler=cast(Any, batches),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn or list,
            # Of its own, so that making an iterator takes nothing from the process's random state.
            generator=torch.Generator().manual_seed(self.seed),
            **self.options,
        )

    def _index_batches(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (position in the stream of all processes, index of the image)."""
        with seeded(self.seed, 0):
            sampler = self.make_sampler()
        rank, world = comm.get_rank(), comm.get_world_size()
        groups: tuple[list[tuple[int, int]], ...] = ([], [])
        for number, index in enumerate(sampler):
            group = groups[0 if self._landscape is None else self._landscape[index]]
            group.append((number * world + rank, index))
            if len(group) == self.batch_size:
                yield group[:]
                group.clear()


def build_train_loader(cfg: CfgNode, mapper: Callable[[Record], Any] | None = None) -> Any:
    """What Detectron2's function of this name makes of a config, as a :class:`TrainLoader`.

    Args:
        cfg: the config. A negative ``SEED`` stands for one that is drawn for all processes;
            ``DATALOADER.ON_BAD_IMAGE`` says what becomes of images that cannot be used.
        mapper: by default Detectron2's ``DatasetMapper``.

    Returns:
        The loader; Detectron2's own for an iterable data set, which has no positions.
    """
    mapper = GuardedMapper(
        DatasetMapper(cfg, is_train=True) if mapper is None else mapper,
        cfg.DATALOADER.ON_BAD_IMAGE,
        cfg.MODEL.RETINANET.NUM_CLASSES if cfg.MODEL.META_ARCHITECTURE in RETINANETS else None,
    )
    # With a sampler given, it makes none; that waits until the seed is known.
    parts = build._train_loader_from_config(cfg, mapper=mapper, sampler=_NoSampler())
    dataset = _packed(parts.pop("dataset"))
    if isinstance(dataset, IterableDataset):
        return _not_exact(build.build_detection_train_loader(cfg, mapper=mapper), mapper)

    def make_sampler() -> Sampler[int]:
        made = build._train_loader_from_config(cfg, mapper=mapper, dataset=dataset)
        return cast(Sampler[int], made["sampler"])

    return TrainLoader(
        dataset,
        mapper,
        make_sampler,
        images_per_process(parts["total_batch_size"]),
        aspect_ratio_grouping=parts["aspect_ratio_grouping"],
        num_workers=parts["num_workers"],
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
    )


def build_lazy_train_loader(
    dataset: Any,
    *,
    mapper: Callable[[Record], Any],
    total_batch_size: int,
    sampler: Sampler[int] | None = None,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    seed: int = -1,
    on_bad_image: str = STOP,
    num_classes: int | None = None,
    **options: Any,
) -> Any:
    """A :class:`TrainLoader` from the arguments of ``build_detection_train_loader``.

    Args:
        dataset, mapper, total_batch_size, aspect_ratio_grouping, num_workers, collate_fn: as there.
        sampler: as there; one of your own must give the same indices in each run. Detectron2's
            draw a seed of their own if they are given none.
        seed: negative for one that is drawn for all processes.
        on_bad_image: what becomes of images that cannot be used; see :class:`GuardedMapper`.
        num_classes: K, for the range of the classes; None for not known.
        options: of PyTorch's ``DataLoader``.
    """
    mapper = GuardedMapper(mapper, on_bad_image, num_classes)
    if isinstance(dataset, IterableDataset):
        loader = build.build_detection_train_loader(
            dataset,
            mapper=mapper,
            total_batch_size=total_batch_size,
            aspect_ratio_grouping=aspect_ratio_grouping,
            num_workers=num_workers,
            collate_fn=collate_fn,
            **options,
        )
        return _not_exact(loader, mapper)
    if sampler is not None and seed < 0:
        logger.warning(
            "dataloader.train.sampler may draw another order when the run is resumed: set "
            "train.seed, or the sampler's own"
        )
    dataset = _packed(dataset)
    return TrainLoader(
        dataset,
        mapper,
        lambda: TrainingSampler(len(dataset)) if sampler is None else sampler,
        images_per_process(total_batch_size),
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
        collate_fn=collate_fn,
        seed=seed if seed >= 0 else comm.shared_random_seed(),
        **options,
    )


def images_per_process(total_batch_size: int) -> int:
    """Images in a batch of each process.

    Raises:
        ValueError: the total is not a positive multiple of the number of processes.
    """
    world = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH (in a LazyConfig: dataloader.train.total_batch_size) is "
            f"{total_batch_size}; it is the total over all processes and must be a positive "
            f"multiple of their number, {world}"
        )
    return total_batch_size // world


@contextmanager
def seeded(seed: int, position: int) -> Iterator[None]:
    """Run with Python's, NumPy's and PyTorch's CPU states derived from two numbers.

    The states are put back afterwards: whoever reads images in the training process leaves no
    trace in its randomness.
    """
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence([seed, position]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would seed GPUs too
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])


class _SeededSamples(Dataset[Any]):
    """Mapped images by (position, index)."""

    def __init__(self, dataset: Any, mapper: Callable[[Record], Any], seed: int) -> None:
        # The wrapper lets data workers that are spawned have mappers that pickle cannot.
        self.dataset, self.mapper, self.seed = dataset, PicklableWrapper(mapper), seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        # 0 is the sampler's.
        with seeded(self.seed, position + 1):
            for _ in range(MOST_DRAWS):
                sample = self.mapper(self.dataset[index])
                if sample is not None:
                    return sample
                index = random.randrange(len(self.dataset))
        raise RuntimeError(
            f"the mapper refused {MOST_DRAWS} images in a row (returned None for them): is any "
            "image of the training sets usable?"
        )


class _NoSampler(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(())


def _orientations(dataset: Sequence[Record] | Dataset[Record]) -> list[bool]:
    """Whether each image is wider than high.

    Raises:
        ValueError: an image without its size.
    """
    wide = []
    for index in range(len(cast(Sized, dataset))):
        record = dataset[index]
        if "width" not in record or "height" not in record:
            name = record.get("file_name", f"number {index}")
            raise ValueError(
                f"image {name!r} has no width and height, which DATALOADER.ASPECT_RATIO_GROUPING "
                "needs (in a LazyConfig: dataloader.train.aspect_ratio_grouping): add them, or "
                "set it to False"
            )
        wide.append(bool(record["width"] > record["height"]))
    return wide


def _packed(dataset: Any) -> Any:
    """A list as Detectron2 keeps it: in one buffer, which forked data workers do not copy."""
    return DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset


def _not_exact(loader: Any, mapper: GuardedMapper) -> Any:
    loader.mapper = mapper  # where ReportSkipped looks for it
    logger.warning(
        "the training data set is an iterable, which has no positions: a resumed run will begin "
        "it anew"
    )
    return loader
