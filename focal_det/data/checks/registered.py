"""Data sets by their registered names."""

from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_det.data.registration import dataset_classes

from .coco import parse_coco, read_coco
from .findings import Finding, found, is_id, type_of


class Dataset(NamedTuple):
    """A registered data set, as far as it can be read.

    Attributes:
        records: copies of Detectron2's dictionaries; annotations with their ``id`` where known.
        classes: names in the order of the class indices, None if unknown.
        json_file: the annotation file, None if there is none in COCO's format.
        image_root: folder that the files must be in, None if unknown.
        findings: what is wrong with the annotation file or its loading.
    """

    records: list[Any]
    classes: list[str] | None
    json_file: str | None
    image_root: str | None
    findings: list[Finding]


def read_dataset(name: str) -> Dataset:
    """Load a registered data set; what Detectron2 cannot load is read as far as possible.

    Args:
        name: a name in Detectron2's ``DatasetCatalog``.

    Raises:
        KeyError: no such data set.
    """
    if name not in DatasetCatalog:
        raise KeyError(f"no data set {name!r} is registered")
    metadata = MetadataCatalog.get(name)
    records: Any = None
    failures = []
    # First, since loading makes the annotation file where it is generated.
    try:
        records = DatasetCatalog.get(name)
        if not isinstance(records, list):
            failures.append(
                found("unloadable", f"{name!r} must be a list of dicts, got {type_of(records)}")
            )
            records = []
        elif not records:
            failures.append(found("no-images", f"{name!r} has no image"))
    except Exception as error:  # whatever a user's function may raise; reported
        failures.append(found("unloadable", f"{type(error).__name__}: {error}"))

    classes = metadata.get("thing_classes")
    findings: list[Finding] = []
    parsed: list[dict[str, Any]] = []
    image_root = metadata.get("image_root")
    is_coco = metadata.get("evaluator_type", "coco") == "coco"
    json_file = metadata.get("json_file") if is_coco else None
    if json_file is not None:
        content, findings = read_coco(json_file)
        if content is not None:
            parsed, problems = parse_coco(content, image_root or "")
            findings += problems
            classes = dataset_classes(name)
    records = parsed if records is None else _with_annotation_ids(records, parsed)
    return Dataset(records, classes, json_file, image_root, findings + failures)


def _with_annotation_ids(records: list[Any], parsed: list[dict[str, Any]]) -> list[Any]:
    """Copies of `records` whose annotations have the ``id`` of the annotation file."""
    ids = {record["image_id"]: [x["id"] for x in record["annotations"]] for record in parsed}
    copies = []
    for record in records:
        annotations = record.get("annotations") if isinstance(record, dict) else None
        if isinstance(annotations, list) and all(isinstance(x, dict) for x in annotations):
            image_id = record.get("image_id")
            known = ids.get(image_id, []) if is_id(image_id) else []
            # Detectron2 leaves objects with a broken polygon out: then the order tells nothing.
            names: list[dict[str, Any]] = [{} for _ in annotations]
            if len(known) == len(annotations):
                names = [{"id": each} for each in known]
            named = [{**name, **x} for name, x in zip(names, annotations, strict=True)]
            record = {**record, "annotations": named}
        copies.append(dict(record) if isinstance(record, dict) else record)
    return copies
