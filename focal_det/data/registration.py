"""Data sets that exist in every process: the embedded ones and those named in the environment.

Detectron2's catalogs are plain dictionaries of the running process. A set registered in a user's
``main()`` is therefore unknown to a spawned worker and to Detectron2's own ``train_net.py``.
:func:`register_all` runs wherever ``focal_det`` is imported, so that these sets are known there.

It may run while ``import detectron2`` is under way (see ``focal_det.env``), hence only names of
Detectron2's submodules are used here.
"""

from __future__ import annotations

import functools
import json
import os
from typing import Any

from detectron2.data.catalog import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from focal_det.safe_loading.paths import check_inside

from .digits_clutter import CLASS_NAMES, EMBEDDED, SPLITS, generate

__all__ = [
    "ENV_VARIABLE",
    "dataset_classes",
    "register_all",
    "register_digits_clutter",
    "register_from_env",
]

ENV_VARIABLE = "FOCAL_DET_DATASETS"
_ENTRY_FORM = "name:annotations.json:image_dir"
# What Detectron2 and pycocotools come to in a file that is not COCO's.
_OF_ANOTHER_FORM = (
    *(AssertionError, AttributeError, IndexError, KeyError),
    *(RecursionError, TypeError, ValueError),
)


def register_all() -> None:
    """Registers the embedded data sets and those in ``FOCAL_DET_DATASETS``. Idempotent."""
    for name in EMBEDDED:
        register_digits_clutter(name=name)
    register_from_env()


def register_digits_clutter(
    root: str | os.PathLike[str] | None = None, name: str = "digits_clutter"
) -> None:
    """Registers ``<name>_train`` and ``<name>_val`` of an embedded data set.

    Nothing is written yet: the data set is generated when either of them is first loaded, once for
    all processes that ask for it. Class names, paths and evaluator type are in the metadata at
    once.

    Args:
        root: directory of the data set. By default `name` in the directory named by
            ``DETECTRON2_DATASETS``, or in ``datasets`` where that is unset. Where the data set is
            registered already, None changes nothing.
        name: a key of :data:`focal_det.data.digits_clutter.EMBEDDED`, which differ in how rare
            digits are.

    Raises:
        KeyError: there is no such embedded data set.
        ValueError: the data set is registered with another root.
    """
    if name not in EMBEDDED:
        raise KeyError(f"name must be one of {', '.join(EMBEDDED)}, got {name!r}")
    if root is None:
        if all(f"{name}_{split}" in DatasetCatalog for split in SPLITS):
            return
        root = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), name)
    root = os.path.abspath(os.path.expanduser(root))
    for split in SPLITS:
        part = f"{name}_{split}"
        json_file = os.path.join(root, f"{split}.json")
        image_root = os.path.join(root, "images", split)
        if part in DatasetCatalog:
            known = MetadataCatalog.get(part).get("json_file")
            if known != json_file:
                raise ValueError(
                    f"root is {root!r}, but {part} is registered with annotations {known!r}; "
                    "set DETECTRON2_DATASETS before focal_det is imported to place it elsewhere"
                )
            continue
        DatasetCatalog.register(part, functools.partial(_load_embedded, name, root, split))
        MetadataCatalog.get(part).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            thing_classes=list(CLASS_NAMES),
        )


def _load_embedded(name: str, root: str, split: str) -> list[dict[str, Any]]:
    """Detectron2's dataset dicts of a split, after generating the data set if need be."""
    generate(EMBEDDED[name], root, progress=True)
    records: list[dict[str, Any]] = load_coco_json(
        os.path.join(root, f"{split}.json"),
        os.path.join(root, "images", split),
        f"{name}_{split}",
    )
    return records


def register_from_env(value: str | None = None) -> None:
    """Registers COCO-format data sets named in an environment variable.

    ``FOCAL_DET_DATASETS`` holds entries ``name:annotations.json:image_dir`` separated by commas.
    Relative paths are meant from the working directory. Annotations are not read before the data
    set is loaded, so this costs next to nothing at import. All entries are checked before the
    first is registered.

    Args:
        value: the entries; None takes them from the environment, where an unset variable means
            none.

    Raises:
        ValueError: an entry has not the form above, names a missing file or directory, or names a
            data set that exists with another definition (one of Detectron2's own, for example).
            The message quotes the entry.
    """
    if value is None:
        value = os.environ.get(ENV_VARIABLE, "")
    new: dict[str, tuple[str, str]] = {}
    for entry in filter(None, (part.strip() for part in value.split(","))):
        name, json_file, image_root = _parse_entry(entry)
        if name in new:
            raise _entry_error(entry, f"the name {name!r} occurs twice")
        new[name] = (json_file, image_root)
        if name in DatasetCatalog:
            known = MetadataCatalog.get(name)
            paths = [known.get("json_file"), known.get("image_root")]
            if [os.path.abspath(p) if p else p for p in paths] != [json_file, image_root]:
                raise _entry_error(
                    entry,
                    f"a data set {name!r} exists already, with annotations {paths[0]!r} "
                    f"and images {paths[1]!r}; choose another name",
                )
    for name, (json_file, image_root) in new.items():
        if name not in DatasetCatalog:
            DatasetCatalog.register(
                name, functools.partial(_load_inside, json_file, image_root, name)
            )
            MetadataCatalog.get(name).set(
                json_file=json_file, image_root=image_root, evaluator_type="coco"
            )


def _load_inside(json_file: str, image_root: str, name: str) -> list[dict[str, Any]]:
    """Detectron2's dataset dicts of a COCO file, all of whose images are inside their folder.

    Raises:
        ValueError: one is not, see :func:`focal_det.safe_loading.check_inside`; or the file is not
            of COCO's form.
    """
    try:
        records: list[dict[str, Any]] = load_coco_json(json_file, image_root, name)
    except _OF_ANOTHER_FORM as error:
        raise ValueError(
            f"{name!r}: {json_file} cannot be read as COCO annotations: "
            f"{type(error).__name__}: {error} (tools/check_dataset.py {name} says more)"
        ) from error
    for record in records:
        record["file_name"] = check_inside(image_root, record["file_name"])
    return records


def _parse_entry(entry: str) -> tuple[str, str, str]:
    """Name, absolute annotations file and absolute image directory of one checked entry."""
    parts = [part.strip() for part in entry.split(":")]
    if len(parts) != 3:
        raise _entry_error(entry, f"expected 3 parts separated by ':', got {len(parts)}")
    for what, part in zip(_ENTRY_FORM.split(":"), parts, strict=True):
        if not part:
            raise _entry_error(entry, f"the part {what!r} is empty")
    name = parts[0]
    json_file, image_root = (os.path.abspath(os.path.expanduser(part)) for part in parts[1:])
    if not os.path.isfile(json_file):
        raise _entry_error(entry, f"annotations file not found: {json_file}")
    if not os.path.isdir(image_root):
        raise _entry_error(entry, f"image directory not found: {image_root}")
    return name, json_file, image_root


def _entry_error(entry: str, problem: str) -> ValueError:
    return ValueError(
        f"{ENV_VARIABLE}: entry {entry!r}: {problem}. "
        f"Entries have the form {_ENTRY_FORM} and are separated by commas"
    )


def dataset_classes(name: str) -> list[str] | None:
    """Class names of a registered data set, without loading its images' annotations.

    Args:
        name: a name in Detectron2's catalog.

    Returns:
        ``thing_classes`` of the metadata if set, else the categories in its JSON file sorted by
        id, which is the order of Detectron2's contiguous class indices; None if the data set is
        unknown or its classes cannot be told.
    """
    # Asking the catalog for an unknown name would create it.
    if name not in MetadataCatalog:
        return None
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    if classes is not None:
        return list(classes)
    json_file = metadata.get("json_file")
    if not json_file:
        return None
    try:
        stat = os.stat(json_file)
        key = (stat.st_mtime_ns, stat.st_size)
    except OSError:  # not of this machine's disks, or missing
        key = None
    names = _read_classes(json_file, key)
    return None if names is None else list(names)


@functools.lru_cache(maxsize=64)
def _read_classes(json_file: str, _version: tuple[int, int] | None) -> tuple[str, ...] | None:
    """Names of the categories by rising id; a file is parsed once while it stays as it is."""
    try:
        with PathManager.open(json_file, "r") as file:
            categories = json.load(file)["categories"]
        return tuple(category["name"] for category in sorted(categories, key=lambda c: c["id"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # This is for early checks only. A file that cannot be read is reported, with its reason,
        # when the data set is loaded.
        return None
