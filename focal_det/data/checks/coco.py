"""Annotation files in COCO's format."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .findings import Finding, found, is_id, type_of


def read_coco(json_file: str) -> tuple[Any, list[Finding]]:
    """The content of a JSON file.

    Args:
        json_file: a path that Detectron2's ``PathManager`` knows.

    Returns:
        The content, None where it cannot be read, and why it cannot.
    """
    try:
        with PathManager.open(json_file, "r") as file:
            return json.load(file), []
    except FileNotFoundError:
        problem = "annotation file not found"
    except json.JSONDecodeError as error:
        problem = f"not JSON, or cut off: {error}"
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    return None, [found("annotations-unreadable", f"{json_file}: {problem}")]


def parse_coco(content: Any, image_root: str) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Turn COCO's format into records, leaving out and reporting what does not fit in.

    Args:
        content: what the JSON file holds.
        image_root: folder of the images.

    Returns:
        Records as Detectron2's ``load_coco_json`` makes them, annotations with their ``id``, and
        the findings. Boxes, classes and files are not looked at here: see :func:`check_records`.
    """
    if not isinstance(content, dict):
        hint = " (a list is the form of COCO's results)" if isinstance(content, list) else ""
        message = "the top level must be an object with 'images', 'annotations' and 'categories'"
        return [], [found("malformed", f"{message}, got {type_of(content)}{hint}")]
    findings: list[Finding] = []
    categories = _entries(content, "categories", ("id", "name"), findings)
    images = _entries(content, "images", ("id", "file_name", "height", "width"), findings)
    annotations = _entries(
        content, "annotations", ("id", "image_id", "category_id", "bbox"), findings
    )
    findings += _duplicates(categories, "id", "duplicate-category-id", "category")
    findings += _duplicates(categories, "name", "duplicate-category-name", "category")
    findings += _duplicates(images, "id", "duplicate-image-id", "image")
    findings += _duplicates(annotations, "id", "duplicate-annotation-id", "annotation")
    if len({isinstance(image["id"], str) for image in images}) > 1:
        findings.append(found("malformed", "some image ids are numbers and some are strings"))

    class_of = {id_: index for index, id_ in enumerate(_sorted_ids({x["id"] for x in categories}))}
    records: dict[Any, dict[str, Any]] = {}
    for image in images:
        record = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
        records[image["id"]] = record  # of two with one id the later, as pycocotools has it
    for annotation in annotations:
        owner = _known(records, annotation["image_id"])
        class_index = _known(class_of, annotation["category_id"])
        problem = _annotation_problem(annotation, owner is not None, class_index is not None)
        if problem is not None:
            kind, message = problem
            file_name = None if owner is None else owner["file_name"]
            findings.append(
                found(kind, message, annotation["image_id"], file_name, annotation["id"])
            )
        if owner is not None and class_index is not None:
            owner["annotations"].append(
                {
                    "id": annotation["id"],
                    "bbox": annotation["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": class_index,
                    "iscrowd": annotation.get("iscrowd", 0),
                }
            )
    return [records[id_] for id_ in _sorted_ids(records)], findings


def _annotation_problem(
    annotation: dict[str, Any], has_image: bool, has_category: bool
) -> tuple[str, str] | None:
    """Kind and message of the first problem that only the annotation file shows."""
    if not has_image:
        return "unknown-image", f"image_id {annotation['image_id']!r} is not among the images"
    if not has_category:
        message = f"category_id {annotation['category_id']!r} is not among the categories"
        return "unknown-category", message
    if annotation.get("ignore", 0) != 0:
        message = f"ignore is {annotation['ignore']!r}, allowed is 0; use iscrowd for such regions"
        return "ignore-flag", message
    if _has_broken_polygon(annotation.get("segmentation")):
        message = "segmentation has no polygon of 6 numbers or more, and an even number of them"
        return "broken-polygon", message
    missing = [key for key in ("area", "iscrowd") if key not in annotation]
    if missing:
        return "no-evaluation-fields", f"has no {' and no '.join(missing)}"
    return None


def _has_broken_polygon(segmentation: Any) -> bool:
    """Whether there are polygons and Detectron2 takes none of them."""
    if not segmentation or isinstance(segmentation, dict):  # none, or a run-length encoding
        return False
    polygons = segmentation if isinstance(segmentation, list) else []
    good = (isinstance(x, list) and len(x) % 2 == 0 and len(x) >= 6 for x in polygons)
    return not any(good)


def _entries(
    content: dict[str, Any], section: str, keys: Sequence[str], findings: list[Finding]
) -> list[dict[str, Any]]:
    """The entries of a section that have all keys and a usable id; findings are added."""
    if section == "annotations" and section not in content:
        return []  # as in a test set, which load_coco_json takes
    entries = content.get(section)
    if not isinstance(entries, list) or (section == "categories" and not entries):
        got = type_of(entries) if section in content else "nothing of that name"
        got = "an empty list" if entries == [] else got
        findings.append(found("malformed", f"{section!r} must be a list with entries, got {got}"))
        return []
    good = []
    for index, entry in enumerate(entries):
        name = f"{section}[{index}]"
        if not isinstance(entry, dict):
            findings.append(found("malformed", f"{name} must be an object, got {type_of(entry)}"))
        elif missing := [key for key in keys if key not in entry]:
            findings.append(found("malformed", f"{name} has no {', no '.join(missing)}"))
        elif not is_id(entry["id"]):
            message = f"{name}: id must be a number or a string, got {entry['id']!r}"
            findings.append(found("malformed", message))
        elif not all(isinstance(entry[key], str) for key in ("file_name", "name") if key in keys):
            message = f"{name}: {keys[1]} must be a string, got {entry[keys[1]]!r}"
            findings.append(found("malformed", message))
        else:
            good.append(entry)
    return good


def _duplicates(
    entries: Iterable[dict[str, Any]], key: str, kind: str, what: str
) -> Iterator[Finding]:
    """A finding for each entry whose value of `key` an entry before it has."""
    seen = set()
    for entry in entries:
        value = entry[key]
        if value in seen:
            yield found(
                kind,
                f"another {what} before it has the same {key} {value!r}",
                entry["id"] if what == "image" else entry.get("image_id"),
                entry.get("file_name"),
                entry["id"] if what == "annotation" else None,
            )
        seen.add(value)


def _sorted_ids(ids: Iterable[Any]) -> list[Any]:
    """Ids in Detectron2's order; numbers before strings, which it cannot sort together."""
    return sorted(ids, key=lambda x: (isinstance(x, str), x))


def _known(table: Mapping[Any, Any], key: Any) -> Any:
    """The entry of `key`, None where it is missing or cannot be a key."""
    return table.get(key) if is_id(key) else None
