"""A dataset mapper that names the image it fails on, and can leave such images out."""

import atexit
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.data import DatasetMapper
from torch import Tensor

from .checks import MOST_CLASSES, box_problem, class_problem

# Below Detectron2's logger, whose handlers every Detectron2 script sets up.
logger = logging.getLogger(f"detectron2.{__name__}")

STOP, SKIP = "stop", "skip"
# Detectron2 leaves these out itself, and a few are in COCO: no reason to stop a training.
HARMLESS = ("box-zero-area",)


class BadImageError(ValueError):
    """An image that cannot be trained on; the message names it, the cause says why."""


class BadLabelError(ValueError):
    """An object whose box or class cannot be meant as it is."""


class GuardedMapper:
    """Wraps a dataset mapper: what fails is named by file and id, or left out and counted.

    An image is bad if the mapper raises an exception or gives out a box that is not finite or has
    no area, or a class that is out of range. Detectron2's ``DatasetMapper`` leaves objects out
    without a word: with it an image is bad, too, if a box of its record is malformed, not finite or
    of negative size. Objects without an area and those outside of the image it leaves out as ever.
    Of any other mapper, a subclass included, only what it gives out is looked at, since it may
    leave out what it cannot use and number the classes anew.

    Copies in data workers, forked or spawned, count together with the mapper that was made first;
    each process of a training on several GPUs makes its own.

    Args:
        mapper: turns one of Detectron2's dataset dictionaries into a sample.
        on_bad_image: ``stop`` to raise an error; ``skip`` to return None, whereupon Detectron2's
            loader draws another image.
        num_classes: K, for the range of the classes; None for not known.
        max_in_a_row: bad images that a process may meet one after another before ``skip`` stops,
            too: an image folder that is not there is not to be skipped for ever.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        mapper: Callable[[dict[str, Any]], Any],
        on_bad_image: str = STOP,
        num_classes: int | None = None,
        max_in_a_row: int = 100,
    ) -> None:
        if on_bad_image not in (STOP, SKIP):
            raise ValueError(
                f"on_bad_image (DATALOADER.ON_BAD_IMAGE) must be one of {STOP}, {SKIP}, "
                f"got {on_bad_image!r}"
            )
        if max_in_a_row < 1:
            raise ValueError(f"max_in_a_row must be >= 1, got {max_in_a_row}")
        self.mapper = mapper
        self.on_bad_image = on_bad_image
        self.num_classes = num_classes
        self.max_in_a_row = max_in_a_row
        self._in_a_row = 0
        self._tally = _Tally()

    @property
    def skipped(self) -> dict[str, int]:
        """How many images were left out so far, in all processes, by the type of the exception."""
        return self._tally.counts()

    def __call__(self, record: dict[str, Any]) -> Any:
        """The mapper's sample; None for an image that is left out.

        Args:
            record: one of Detectron2's dataset dictionaries.

        Raises:
            BadImageError: a bad image, where they are not to be skipped; or too many in a row.
        """
        takes_raw = type(self.mapper) is DatasetMapper
        annotations = (record.get("annotations") or ()) if takes_raw else ()
        try:
            sample = self.mapper(record)
            self._check_labels(annotations, sample)
        except Exception as error:  # whatever a mapper raises: it is chained or counted
            name = f"image {record.get('file_name')!r} (image_id {record.get('image_id')!r})"
            problem = f"{name} cannot be used: {type(error).__name__}: {error}".rstrip(".")
            if self.on_bad_image == STOP:
                raise BadImageError(
                    f"{problem}. Mend it or take it out of the data set, or set "
                    f"DATALOADER.ON_BAD_IMAGE to {SKIP!r}; tools/check_dataset.py finds all of them"
                ) from error
            self._skip(type(error).__name__, problem, error)
            return None
        self._in_a_row = 0
        return sample

    def _skip(self, kind: str, problem: str, error: Exception) -> None:
        self._in_a_row += 1
        if self._tally.add(kind):
            logger.warning(
                f"skipped: {problem}. This is the first {kind}; further ones are only counted"
            )
        if self._in_a_row >= self.max_in_a_row:
            raise BadImageError(
                f"{self._in_a_row} images in a row were skipped, so this is about more than a few "
                f"bad images; the last: {problem}"
            ) from error

    def _check_labels(self, annotations: Sequence[Mapping[str, Any]], sample: Any) -> None:
        """Raise BadLabelError for the first bad object, before or behind the mapper.

        Args:
            annotations: of the record, where they are to be looked at.
            sample: of the mapper; one without ground-truth boxes (for inference) is let pass.
        """
        instances = sample.get("instances") if isinstance(sample, dict) else None
        if instances is None or not instances.has("gt_boxes"):
            return
        for index, annotation in enumerate(annotations):
            if annotation.get("iscrowd", 0) != 0:  # which mappers leave out
                continue
            problems = (box_problem(annotation), class_problem(annotation, self.num_classes))
            for problem in problems:
                if problem is not None and problem[0] not in HARMLESS:
                    raise BadLabelError(f"annotation #{index}: {problem[1]}")
        boxes: Tensor = instances.gt_boxes.tensor
        bad = ~boxes.isfinite().all(1) | ~instances.gt_boxes.nonempty()
        if bad.any():
            box = boxes[bad][0].tolist()
            raise BadLabelError(f"the mapper gives a box that is not finite or has no area: {box}")
        if instances.has("gt_classes"):
            last = (MOST_CLASSES if self.num_classes is None else self.num_classes) - 1
            classes: Tensor = instances.gt_classes
            out = classes[(classes < 0) | (classes > last)].tolist()
            if out:
                raise BadLabelError(f"the mapper gives the class {out[0]}, allowed is 0..{last}")


class _Tally:
    """Counts by kind that all processes share which have a copy of it, however it was copied.

    A folder with a file for each kind, of one byte for each count. Detectron2 pickles mappers by
    cloudpickle, which shared memory does not survive; a path does, and appending to a file is
    atomic. The folder is not made before there is something to count.
    """

    def __init__(self) -> None:
        name = f"focal_det_skipped_{uuid.uuid4().hex}"
        self.folder = os.path.join(tempfile.gettempdir(), name)
        atexit.register(_remove, self.folder, os.getpid())

    def add(self, kind: str) -> bool:
        """Count one of a kind; whether it is the first of all processes."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        path = os.path.join(self.folder, kind)
        append = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        try:
            file, is_first = os.open(path, append | os.O_EXCL, 0o600), True
        except FileExistsError:
            file, is_first = os.open(path, append, 0o600), False
        try:
            os.write(file, b".")
        finally:
            os.close(file)
        return is_first

    def counts(self) -> dict[str, int]:
        """How often each kind was counted."""
        if not os.path.isdir(self.folder):
            return {}
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}


def _remove(folder: str, owner: int) -> None:
    # A forked worker has this call in its list, too.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
