"""The data set on disk: PNG images and COCO-format JSON, written once for all processes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from .scene import render_scene
from .spec import CLASS_NAMES, SPLITS, DigitsClutterSpec

logger = logging.getLogger(__name__)

# Part of the manifest: raise it with every change that alters a pixel or a box.
GENERATOR_VERSION = 1
MANIFEST_NAME = "manifest.json"


def _read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a finished data set at root, or None where there is nothing yet.

    Raises:
        FileExistsError: root holds something else.
    """
    try:
        with open(root / MANIFEST_NAME, encoding="utf-8") as file:
            return typing.cast("dict[str, Any]", json.load(file))
    except FileNotFoundError:
        if root.is_dir() and any(root.iterdir()):
            raise FileExistsError(
                f"{root} is not empty and has no {MANIFEST_NAME}, so it was not written by "
                "digits_clutter; choose another directory or remove it"
            ) from None
        return None


def _is_complete(root: Path, spec: DigitsClutterSpec) -> bool:
    """Whether root holds the data set of this spec; an error if it holds that of another one."""
    manifest = _read_manifest(root)
    if manifest is None:
        return False
    found = {"version": manifest.get("version"), **manifest.get("spec", {})}
    asked = {"version": GENERATOR_VERSION, **dataclasses.asdict(spec)}
    if found != asked:
        differing = [
            f"{key} {found.get(key)} (asked for: {asked.get(key)})"
            for key in sorted({*found, *asked})
            if found.get(key) != asked.get(key)
        ]
        raise FileExistsError(
            f"{root} holds a digits_clutter data set made with {', '.join(differing)}; "
            "remove that directory to have it made anew, or choose another one"
        )
    return True


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds the lock file at path. The kernel frees it when the process ends, however it ends."""
    import fcntl  # absent on Windows, where the rest of the package works

    with open(path, "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_split(spec: DigitsClutterSpec, split: str, root: Path, bar: tqdm[Any]) -> str:
    """Writes the images and the JSON file of a split; SHA-256 of its raw pixels and its JSON."""
    image_dir = root / "images" / split
    image_dir.mkdir(parents=True)
    digest = hashlib.sha256()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(spec.train_images if split == "train" else spec.val_images):
        pixels, digits = render_scene(spec, split, index)
        digest.update(pixels.tobytes())
        name = f"{index:06d}.png"
        Image.fromarray(pixels).save(image_dir / name, format="PNG", compress_level=1)
        images.append(
            {
                "id": index + 1,
                "file_name": name,
                "height": spec.image_size,
                "width": spec.image_size,
            }
        )
        for digit in digits:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **digit})
        bar.update()
    content = {
        # COCOeval's loadRes copies "info" and "licenses", and fails where they are missing.
        "info": {"description": f"digits_clutter {split}", "version": str(GENERATOR_VERSION)},
        "licenses": [],
        "categories": [
            {"id": i + 1, "name": name, "supercategory": "digit"}
            for i, name in enumerate(CLASS_NAMES)
        ],
        "images": images,
        "annotations": annotations,
    }
    text = json.dumps(content)
    digest.update(text.encode("ascii"))
    (root / f"{split}.json").write_text(text, encoding="ascii")
    return digest.hexdigest()


def generate(
    spec: DigitsClutterSpec, root: str | os.PathLike[str], *, progress: bool = False
) -> Path:
    """Writes the data set to ``root`` unless it is there already.

    ``root`` then holds ``train.json`` and ``val.json`` in COCO's format, ``images/train`` and
    ``images/val`` with PNG files, and ``manifest.json`` with the spec, the generator's version and
    a SHA-256 of each split over raw pixels and JSON.

    The files are first written beside ``root`` and then moved there in one step, so ``root`` is
    never half a data set, even if the process is killed. Processes that ask for the same root at
    once wait for the first one and share its work.

    Args:
        spec: what to generate.
        root: directory to create. Its parents are created, too.
        progress: whether to show a progress bar on a terminal.

    Returns:
        ``root`` as an absolute path.

    Raises:
        FileExistsError: ``root`` holds a data set made with other knobs or by another version of
            the generator (the message says which), or foreign files. Nothing is overwritten.
        ModuleNotFoundError: mlxtend is not installed.
    """
    root = Path(os.path.abspath(os.path.expanduser(root)))
    if _is_complete(root, spec):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(root.parent / f".{root.name}.lock"):
        if _is_complete(root, spec):  # written by another process while this one waited
            return root
        partial = root.parent / f".{root.name}.partial"
        if partial.exists():  # left behind by a process that was killed; we hold the lock
            shutil.rmtree(partial)
        partial.mkdir()
        total = spec.train_images + spec.val_images
        with tqdm(
            total=total, desc=root.name, unit="scene", disable=None if progress else True
        ) as bar:
            checksums = {split: _write_split(spec, split, partial, bar) for split in SPLITS}
        manifest = {
            "generator": "digits_clutter",
            "version": GENERATOR_VERSION,
            "spec": dataclasses.asdict(spec),
            "sha256": checksums,
        }
        (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", "ascii")
        os.rename(partial, root)
    logger.info("wrote %d scenes to %s", total, root)
    return root
