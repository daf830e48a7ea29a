"""What is wrong with a data set is found, named and counted; what is right is let pass."""

import copy
import json
import math
import re
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import read_image
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from PIL import Image

import focal_det
from focal_det.data import checks
from focal_det.data.checks import anchors, images

XYWH, XYXY, ROTATED = BoxMode.XYWH_ABS, BoxMode.XYXY_ABS, BoxMode.XYWHA_ABS
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _own_catalogs():
    data, metadata = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield
    DatasetCatalog.data, MetadataCatalog.data = data, metadata


def annotation(number, image, box, category=7, **others):
    area = box[2] * box[3]
    given = {"id": number, "image_id": image, "bbox": box, "category_id": category}
    return {**given, "area": area, "iscrowd": 0, **others}


def clean_content():
    """Three images of 48 x 32, whose category ids have gaps and are unsorted."""
    sizes = {"width": 48, "height": 32}
    return {
        "categories": [{"id": 7, "name": "cup"}, {"id": 2, "name": "ant"}],
        "images": [
            {"id": number, "file_name": f"{name}.png", **sizes}
            for number, name in ((11, "a"), (12, "b"), (13, "c"))
        ],
        "annotations": [
            annotation(101, 11, [1, 2, 10, 8]),
            annotation(102, 11, [20, 2, 10, 8.5], category=2),
            annotation(103, 12, [0, 0, 48, 32]),
            annotation(104, 13, [5, 5, 9, 9]),
        ],
    }


@pytest.fixture
def folder(tmp_path):
    """Holds the images of clean_content."""
    for name in "abc":
        Image.new("RGB", (48, 32)).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def register(folder):
    """A function from the content of an annotation file to a registered data set's name."""

    def add(content, name="shapes"):
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "shapes.json").write_text(text)
        DatasetCatalog.data.pop(name, None)
        MetadataCatalog.data.pop(name, None)
        register_coco_instances(name, {}, str(folder / "shapes.json"), str(folder))
        return name

    return add


def all_findings(name):
    data = checks.read_dataset(name)
    found = [x for of_image in checks.check_images(data.records) for x in of_image]
    num_classes = None if data.classes is None else len(data.classes)
    return [
        *data.findings,
        *found,
        *checks.check_records(data.records, num_classes, data.image_root),
    ]


def places(findings):
    """What was found, and where."""
    return Counter((x.kind, x.image_id, x.annotation) for x in findings)


def test_a_clean_set_has_no_finding(register):
    assert all_findings(register(clean_content())) == []


def test_every_kind_has_a_severity_and_a_line_of_meaning():
    for kind, (severity, meaning) in checks.KINDS.items():
        assert severity in (checks.ERROR, checks.WARNING), kind
        assert 10 < len(meaning) <= 75, kind


# --------------------------------------------------------------------------------------------------
# Annotation files


def change(section, index, **fields):
    """A function that sets fields of an entry; a field that is set to ... is taken out."""

    def apply(content):
        for key, value in fields.items():
            if value is ...:
                content[section][index].pop(key)
            else:
                content[section][index][key] = value

    return apply


def add(section, entry):
    return lambda content: content[section].append(entry)


def put(section, value):
    return lambda content: content.__setitem__(section, value)


ANNOTATIONS, IMAGES, CATEGORIES = "annotations", "images", "categories"


@pytest.mark.parametrize(
    ("changes", "expected", "text"),
    [
        # What Detectron2 refuses: everything else is looked at all the same.
        (add(CATEGORIES, 5), [("malformed", None, None), ("unloadable", None, None)], "[2] must"),
        (
            change(CATEGORIES, 1, name=...),
            [("malformed", None, None), ("unknown-category", 11, 102), ("unloadable", None, None)],
            "categories[1] has no name",
        ),
        (put(CATEGORIES, []), None, "'categories' must be a list with entries, got an empty list"),
        (put(CATEGORIES, {}), None, "'categories' must be a list with entries, got dict"),
        (lambda content: content.pop(CATEGORIES), None, "got nothing of that name"),
        (lambda content: content.pop(IMAGES), None, "'images' must be a list with entries, got"),
        (put(IMAGES, "a"), None, "'images' must be a list with entries, got str"),
        (put(ANNOTATIONS, {"1": 2}), None, "'annotations' must be a list with entries, got dict"),
        (
            change(ANNOTATIONS, 0, id=...),
            [("malformed", None, None), ("unloadable", None, None)],
            "annotations[0] has no id",
        ),
        (
            change(ANNOTATIONS, 0, image_id=..., category_id=...),
            [("malformed", None, None), ("unloadable", None, None)],
            "annotations[0] has no image_id, no category_id",
        ),
        (
            change(IMAGES, 2, height=..., file_name=...),
            [("malformed", None, None), ("unknown-image", 13, 104), ("unloadable", None, None)],
            "images[2] has no file_name, no height",
        ),
        (
            change(IMAGES, 2, file_name=3),
            [("malformed", None, None), ("unknown-image", 13, 104), ("unloadable", None, None)],
            "images[2]: file_name must be a string, got 3",
        ),
        (
            change(IMAGES, 2, id=[13]),
            [("malformed", None, None), ("unknown-image", 13, 104), ("unloadable", None, None)],
            "images[2]: id must be a number or a string, got [13]",
        ),
        (
            change(IMAGES, 2, id="13"),
            [
                ("malformed", None, None),
                ("no-objects", "13", None),
                ("unknown-image", 13, 104),
                ("unloadable", None, None),
            ],
            "some image ids are numbers and some are strings",
        ),
        (
            add(ANNOTATIONS, annotation(101, 12, [1, 1, 5, 5])),
            [("duplicate-annotation-id", 12, 101), ("unloadable", None, None)],
            "another annotation before it has the same id 101",
        ),
        (
            change(ANNOTATIONS, 3, category_id=3),
            [("no-objects", 13, None), ("unknown-category", 13, 104), ("unloadable", None, None)],
            "category_id 3 is not among the categories",
        ),
        (
            change(ANNOTATIONS, 3, category_id=[2]),
            [("no-objects", 13, None), ("unknown-category", 13, 104), ("unloadable", None, None)],
            "category_id [2] is not among the categories",
        ),
        (
            change(ANNOTATIONS, 3, ignore=1),
            [("ignore-flag", 13, 104), ("unloadable", None, None)],
            "ignore is 1, allowed is 0",
        ),
        (
            change(ANNOTATIONS, 3, bbox=[]),
            [("box-format", 13, 104), ("unloadable", None, None)],
            "bbox must be 4 numbers, got []",
        ),
        # What it takes.
        (
            change(CATEGORIES, 1, name="cup"),
            [("duplicate-category-name", None, None)],
            "another category before it has the same name 'cup'",
        ),
        (
            add(CATEGORIES, {"id": 2, "name": "bee"}),
            [("duplicate-category-id", None, None)],
            "another category before it has the same id 2",
        ),
        (
            change(IMAGES, 1, id=11),
            [("duplicate-image-id", 11, None), ("unknown-image", 12, 103)],
            "another image before it has the same id 11",
        ),
        (
            change(ANNOTATIONS, 3, image_id=99),
            [("no-objects", 13, None), ("unknown-image", 99, 104)],
            "image_id 99 is not among the images",
        ),
        (
            change(ANNOTATIONS, 3, segmentation=[[1, 1, 9, 9]]),
            [("broken-polygon", 13, 104), ("no-objects", 13, None)],
            "no polygon of 6 numbers or more",
        ),
        (
            change(ANNOTATIONS, 3, area=..., iscrowd=...),
            [("no-evaluation-fields", 13, 104)],
            "has no area and no iscrowd",
        ),
        (
            change(ANNOTATIONS, 3, bbox=...),
            [("malformed", None, None), ("box-format", 13, "#0")],
            "annotations[3] has no bbox",
        ),
        (
            change(IMAGES, 0, width="48"),
            [("size-fields", 11, None)],
            "height 32, width '48': both must be whole numbers of pixels, 1..1000000",
        ),
        (
            change(IMAGES, 0, width=0),
            [("size-fields", 11, None)],
            "height 32, width 0: both must be",
        ),
        (
            change(IMAGES, 0, width=32, height=48),
            [("size-mismatch", 11, None)],
            "the file is 48 x 32 (width x height, after its EXIF rotation), the annotation says "
            "32 x 48",
        ),
        (
            change(IMAGES, 1, file_name="a.png"),
            [("duplicate-file-name", 12, None)],
            "the image with id 11 has the same file",
        ),
        (
            change(IMAGES, 1, file_name="../b.png"),
            [("missing-file", 12, None), ("outside-root", 12, None)],
            "is not inside the image root",
        ),
        (
            change(IMAGES, 1, file_name="/etc/hostname"),
            [("outside-root", 12, None), ("unreadable-image", 12, None)],
            "is not inside the image root",
        ),
        (change(IMAGES, 1, file_name="n.png"), [("missing-file", 12, None)], "no such file"),
        (
            change(ANNOTATIONS, 3, bbox=[NAN, 1, 2, 3]),
            [("box-not-finite", 13, 104)],
            "bbox [nan, 1, 2, 3] holds a number that is not finite",
        ),
        (
            change(ANNOTATIONS, 3, iscrowd=2),
            [("crowd-flag", 13, 104), ("no-objects", 13, None)],
            "iscrowd is 2, allowed are 0 and 1",
        ),
        (change(ANNOTATIONS, 3, iscrowd=1), [("no-objects", 13, None)], "has no object"),
        (
            add(ANNOTATIONS, annotation(105, 13, [5, 5, 9, 9])),
            [("near-duplicate-box", 13, 105)],
            "IoU with annotation 104 of the same class is 0.95 or more",
        ),
        (lambda content: content.pop(ANNOTATIONS), [("no-objects", None, None)], "no image of the"),
    ],
)
def test_a_change_of_the_annotation_file_is_found_and_placed(register, changes, expected, text):
    content = clean_content()
    changes(content)
    found = all_findings(register(content))
    if expected is not None:
        assert places(found) == Counter(expected)
    assert any(text in str(x) for x in found), [str(x) for x in found]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not JSON, or cut off: Expecting value: line 1 column 1"),
        ("no JSON", "not JSON, or cut off: Expecting value: line 1 column 1"),
        (json.dumps(clean_content())[:-40], "not JSON, or cut off: "),
        ("[]", "the top level must be an object with 'images', 'annotations' and 'categories', "
         "got list (a list is the form of COCO's results)"),
        ("3", "got int"),
        ("[" * 100_000, "RecursionError"),
    ],
)  # fmt: skip
def test_an_annotation_file_that_holds_something_else(register, text, problem):
    found = all_findings(register(text))
    assert [x.kind for x in found] == [
        "malformed" if "got" in problem else "annotations-unreadable",
        "unloadable",
    ]
    assert problem in found[0].message


def test_an_annotation_file_that_is_not_there(folder):
    register_coco_instances("lost", {}, str(folder / "no.json"), str(folder))
    first, second = all_findings("lost")
    assert str(first) == f"{folder}/no.json: annotation file not found"
    assert second.kind == "unloadable"
    assert "FileNotFoundError" in second.message


def test_an_annotation_file_of_another_encoding(folder, register):
    name = register(clean_content())
    text = json.dumps(clean_content()).replace("cup", "cupé")
    (folder / "shapes.json").write_bytes(text.encode("latin-1"))
    assert [x.kind for x in all_findings(name)] == ["annotations-unreadable", "unloadable"]


def test_records_are_detectron2s_own_with_the_ids_of_the_file(register):
    name = register(clean_content())
    data = checks.read_dataset(name)
    loaded = DatasetCatalog.get(name)
    ids = [[x["id"] for x in record["annotations"]] for record in data.records]
    assert ids == [[101, 102], [103], [104]]
    for record in data.records:
        for each in record["annotations"]:
            del each["id"]
    assert data.records == loaded
    assert data.classes == ["ant", "cup"]
    assert data.json_file.endswith("shapes.json")


def test_what_detectron2_cannot_load_is_read_as_it_would_be(register):
    content = clean_content()
    content["images"].insert(0, content["images"].pop())  # ids not in their order
    content["images"].insert(0, {**content["images"][1], "file_name": "lost.png"})  # ids 11, 13, 11
    content["categories"][0]["id"] = 10  # after 2, as numbers go
    for each in content["annotations"]:
        each["category_id"] = 10 if each["category_id"] == 7 else 2
    expected = checks.read_dataset(register(content)).records
    assert [x["file_name"][-5:] for x in expected] == ["a.png", "b.png", "c.png"]
    content["annotations"][0]["ignore"] = 1
    data = checks.read_dataset(register(content))
    assert [x.kind for x in data.findings] == ["duplicate-image-id", "ignore-flag", "unloadable"]
    for record in expected:
        for each in record["annotations"]:
            each.setdefault("iscrowd", 0)
    assert data.records == expected


def test_objects_that_detectron2_drops_cost_no_more_than_the_names(register):
    """The order of the others tells their ids no longer: they are named by their index."""
    content = clean_content()
    content["annotations"][0]["segmentation"] = [[1, 1, 9, 9]]
    content["annotations"][1]["bbox"][2] = -1
    found = all_findings(register(content))
    assert places(found) == Counter([("broken-polygon", 11, 101), ("box-negative-size", 11, "#0")])


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="no data set 'nowhere' is registered"):
        checks.read_dataset("nowhere")
    assert "nowhere" not in MetadataCatalog


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: 1 / 0, ("unloadable", "ZeroDivisionError: division by zero")),
        (lambda: iter([]), ("unloadable", "'mine' must be a list of dicts, got list_iterator")),
        (list, ("no-images", "'mine' has no image")),
    ],
)
def test_a_registered_function_that_gives_nothing_of_use(made, expected):
    DatasetCatalog.register("mine", made)
    data = checks.read_dataset("mine")
    assert [(x.kind, x.message) for x in data.findings] == [expected]
    assert data.records == []


def test_what_is_read_is_a_copy():
    mine = [{"file_name": "a.png", "image_id": 1, "annotations": [{"bbox": [1, 2, 3, 4]}]}]
    DatasetCatalog.register("mine", lambda: mine)
    before = copy.deepcopy(mine)
    (record,) = checks.read_dataset("mine").records
    record["height"] = record["annotations"][0]["id"] = 5
    assert mine == before


# --------------------------------------------------------------------------------------------------
# Records


def record(*boxes, mode=XYWH, **others):
    given = [{"bbox": box, "bbox_mode": mode, "category_id": 0} for box in boxes]
    return {
        "file_name": "a.png", "image_id": 1, "height": 32, "width": 48, "annotations": given,
        **others,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("box", "mode", "kind"),
    [
        ([1, 2, 3, 4], XYWH, None),
        ((1, 2, 3, 4), XYWH, None),
        (np.array([1, 2, 3, 4]), XYWH, None),
        (torch.tensor([1.0, 2.0, 3.0, 4.0]), XYWH, None),
        ([np.float32(1), np.int64(2), 3, 4], XYWH, None),
        ([1, 2, 3, 4], 1, None),  # a saved mode is a plain number
        ([1, 2, 3, 4], XYXY, None),
        ([9, 9, 4, 4, 45.0], ROTATED, None),
        ([1, 2, 3, 4], BoxMode.XYWH_REL, "box-mode"),
        ([1, 2, 3, 4], BoxMode.XYXY_REL, "box-mode"),
        ([1, 2, 3, 4], 5, "box-mode"),
        ([1, 2, 3, 4], "XYWH_ABS", "box-mode"),
        ([1, 2, 3, 4], None, "box-mode"),
        ([1, 2, 3, 4], [1], "box-mode"),
        (None, XYWH, "box-format"),
        (7, XYWH, "box-format"),
        ({}, XYWH, "box-format"),
        ("1234", XYWH, "box-format"),
        ([], XYWH, "box-format"),
        ([1, 2, 3], XYWH, "box-format"),
        ([1, 2, 3, 4, 5], XYWH, "box-format"),
        ([9, 9, 4, 4], ROTATED, "box-format"),
        ([[1, 2, 3, 4]], XYWH, "box-format"),
        (np.ones((4, 1)), XYWH, "box-format"),
        (["1", "2", "3", "4"], XYWH, "box-format"),
        ([1, 2, None, 4], XYWH, "box-format"),
        ([1, 2, True, 4], XYWH, "box-format"),
        ([1, 2, 3j, 4], XYWH, "box-format"),
        ([NAN, 2, 3, 4], XYWH, "box-not-finite"),
        ([1, 2, 3, INF], XYWH, "box-not-finite"),
        ([1, -INF, 3, 4], XYXY, "box-not-finite"),
        ([1, 2, 3, 10**400], XYWH, "box-not-finite"),  # too large for any float
        ([1, 2, 3, 1e39], XYWH, "box-not-finite"),  # too large for float32
        ([1, 2, -3, 4], XYWH, "box-negative-size"),
        ([1, 2, 3, -0.1], XYWH, "box-negative-size"),
        ([10, 2, 9, 4], XYXY, "box-negative-size"),
        ([1, 4, 3, 2], XYXY, "box-negative-size"),
        ([1, 2, 0, 4], XYWH, "box-zero-area"),
        ([1, 2, 3, 0.0], XYWH, "box-zero-area"),
        ([1, 2, 1, 4], XYXY, "box-zero-area"),
        ([1, 2, 3, 1e-6], XYWH, "box-zero-area"),  # Detectron2 drops what is not above 1e-5
        ([1, 2, 3, 1e-4], XYWH, None),
        # 48 x 32: touching the border from outside is outside, a pixel of slack is let pass
        ([48, 2, 3, 4], XYWH, "box-outside-image"),
        ([47.9, 2, 1, 4], XYWH, None),
        ([1, 32, 3, 4], XYWH, "box-outside-image"),
        ([-3, 2, 3, 4], XYWH, "box-outside-image"),
        ([1, -4, 3, 4], XYWH, "box-outside-image"),
        ([-1, -1, 50, 34], XYWH, None),
        ([-1.1, 2, 3, 4], XYWH, "box-partly-outside"),
        ([1, -1.1, 3, 4], XYWH, "box-partly-outside"),
        ([45, 2, 4.1, 4], XYWH, "box-partly-outside"),
        ([1, 30, 3, 3.1], XYWH, "box-partly-outside"),
        ([45, 2, 49.1, 4], XYXY, "box-partly-outside"),
    ],
)
def test_every_way_of_a_box_to_be_wrong(box, mode, kind):
    problem = checks.box_problem({"bbox": box, "bbox_mode": mode}, (32, 48))
    assert (problem and problem[0]) == kind
    if kind == "box-mode":
        assert repr(mode) in problem[1]
        assert "BoxMode.XYXY_ABS, BoxMode.XYWH_ABS" in problem[1]
    elif kind is not None:
        assert repr(box) in problem[1]


def test_without_the_size_of_its_image_a_box_is_nowhere_outside():
    for box in ([48, 2, 3, 4], [-9, 2, 3, 4]):
        assert checks.box_problem({"bbox": box, "bbox_mode": XYWH}) is None


@pytest.mark.parametrize(
    ("value", "num_classes", "good"),
    [
        (0, 3, True), (2, 3, True), (np.int64(2), 3, True), (7, None, True),
        (999_999, None, True), (10**6, None, False), (2**70, None, False),
        (3, 3, False), (-1, 3, False), (-1, None, False), (1.0, 3, False), ("1", 3, False),
        (True, 3, False), (None, 3, False), ([1], 3, False),
    ],
)  # fmt: skip
def test_classes_are_whole_numbers_below_k(value, num_classes, good):
    problem = checks.class_problem({"category_id": value}, num_classes)
    assert (problem is None) == good
    if problem is not None:
        allowed = "0..2" if num_classes else "0..999999"
        assert problem == (
            "class-out-of-range", f"category_id is {value!r}, allowed is {allowed}"
        )  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "entry 0 of the data set must be a dict, got int"),
        (None, "entry 0 of the data set must be a dict, got None"),
        ({}, "entry 0 of the data set must have a file_name that is a string, got None"),
        (record(file_name=7), "must have a file_name that is a string, got 7"),
        (record(annotations=None), "(a.png): annotations must be a list of dicts"),
        (record(annotations=[3]), "(a.png): annotations must be a list of dicts"),
    ],
)
def test_an_entry_that_is_no_record(entry, message):
    (found,) = checks.check_records([entry])
    assert found.kind == "malformed"
    assert message in found.message
    assert list(checks.check_images([entry])) == [[]]
    assert checks.usable_objects([entry]) == []
    assert checks.count_objects([], [entry])["images"] == 1


@pytest.mark.parametrize(
    ("sizes", "kinds"),
    [
        ({}, []),  # then Detectron2 takes the file's
        ({"height": 32, "width": 48}, []),
        ({"height": np.int64(32), "width": 48}, []),
        ({"height": 32}, ["size-fields"]),
        ({"width": 48}, ["size-fields"]),
        ({"height": 32.0, "width": 48}, ["size-fields"]),
        ({"height": None, "width": None}, ["size-fields"]),
        ({"height": True, "width": 48}, ["size-fields"]),
        ({"height": -32, "width": 48}, ["size-fields"]),
        ({"height": 32, "width": 1_000_001}, ["size-fields"]),
        ({"height": 10**400, "width": 48}, ["size-fields"]),
        ({"height": np.array([1, 2]), "width": 48}, ["size-fields"]),
    ],
)
def test_size_fields(folder, sizes, kinds):
    entry = record([1, 2, 3, 4], file_name=str(folder / "a.png"))
    del entry["height"], entry["width"]
    entry |= sizes
    assert [x.kind for x in checks.check_records([entry])] == kinds
    assert checks.check_image(entry) == []  # nothing is said twice


def test_ids_of_any_kind_do_not_stop_the_check():
    entries = [record([1, 2, 3, 4], image_id=x, file_name=f"{x}") for x in ([1], {}, NAN, None)]
    assert checks.check_records(entries * 2)
    entries = [record([1, 2, 3, -4], image_id=x) for x in (np.int64(3), 2.0, 2.5, "a", (1,), INF)]
    found = [x for x in checks.check_records(entries) if x.kind == "box-negative-size"]
    assert [x.image_id for x in found] == [3, 2, "2.5", "a", "(1,)", "inf"]
    json.dumps([vars(x) for x in found])


def test_a_file_inside_of_the_root_however_it_is_spelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root, name, inside in (
        ("imgs", "imgs/a.png", True),
        ("imgs/", "imgs/sub/../a.png", True),
        (f"{tmp_path}/imgs", "imgs/a.png", True),
        ("imgs", f"{tmp_path}/imgs/a.png", True),
        ("imgs", "imgs/../a.png", False),
        ("imgs", "imgs2/a.png", False),
        ("imgs", "/a.png", False),
    ):
        found = checks.check_records([record([1, 2, 3, 4], file_name=name)], 1, root)
        assert [x.kind for x in found] == ([] if inside else ["outside-root"]), (root, name)
    found = checks.check_records([record([1, 2, 3, 4], file_name="/a.png")], 1, None)
    assert found == []


@pytest.mark.parametrize(
    ("second", "same"),
    [
        ([10, 10, 20, 20], True),
        ([10, 10, 20, 19], True),  # IoU 380 / 400
        ([10, 10, 20, 18.9], False),
        ([10.4, 10, 20, 20], True),  # 392 / 408
        ([11.1, 10, 20, 20], False),  # 378 / 422
    ],
)
def test_near_duplicates_begin_at_an_iou_of_95_percent(second, same):
    entry = record([10, 10, 20, 20], second)
    found = checks.check_records([entry], 2)
    assert [(x.kind, x.annotation) for x in found] == (
        [("near-duplicate-box", "#1")] if same else []
    )
    for fields in ({"category_id": 1}, {"iscrowd": 1}):
        other = copy.deepcopy(entry)
        other["annotations"][0].update(fields)
        assert checks.check_records([other], 2) == []


def test_of_many_near_duplicates_each_names_the_first():
    boxes = [[x, 0, 8, 8] for x in (0, 10, 20)] * 100 + [[30, 0, 8, 8]] * 2  # over one block
    found = checks.check_records([record(*boxes)], 1)
    assert [x.annotation for x in found] == [f"#{i}" for i in (*range(3, 300), 301)]
    firsts = [x.message.split()[3] for x in found]
    assert firsts == [f"#{i % 3}" for i in range(3, 300)] + ["#300"]


def test_bad_boxes_are_not_compared():
    entry = record([NAN, 1, 2, 3], [NAN, 1, 2, 3], [1, 2, 3, 0], [1, 2, 3, 0])
    assert {x.kind for x in checks.check_records([entry], 1)} == {
        "box-not-finite", "box-zero-area"
    }  # fmt: skip


def test_each_image_without_objects_is_named_unless_all_are():
    empty = [record(file_name=f"{i}", image_id=i) for i in range(3)]
    full = record([1, 2, 3, 4], file_name="f", image_id=9)
    assert [x.image_id for x in checks.check_records([*empty, full])] == [0, 1, 2]
    (found,) = checks.check_records(empty)
    assert str(found) == "no image of the data set has an object"
    for entry in empty:
        del entry["annotations"]  # a test set's
    assert len(checks.check_records(empty)) == 1


# --------------------------------------------------------------------------------------------------
# Image files


def save_rotated(path, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)


def test_every_way_of_a_file_to_be_no_image(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    for form in ("png", "jpg", "bmp", "webp"):
        path = tmp_path / f"cut.{form}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    expected = {
        "none.png": "missing-file",
        "no/none.png": "missing-file",
        "empty.png": "empty-file",
        "text.png": "unreadable-image",
        "folder.png": "unreadable-image",
        "cut.png": "unreadable-image",
        "cut.jpg": "unreadable-image",
        "cut.bmp": "unreadable-image",
        "cut.webp": "unreadable-image",
    }
    entries = [record(file_name=str(tmp_path / name), image_id=name) for name in expected]
    for jobs in (1, 3):
        found = [(x.image_id, x.kind) for y in checks.check_images(entries, jobs) for x in y]
        assert found == list(expected.items())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_of_image_is_read(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (48, 32)).save(path)
    assert checks.check_image(record(file_name=str(path))) == []


@pytest.mark.parametrize(
    ("values", "brightest"),
    [
        (np.uint16, 65535),
        (np.uint16, 256),
        (np.uint16, 255),
        (np.int32, 70000),
        (np.float32, 255.5),
        (np.float32, 1.0),
    ],
)
def test_pixels_that_training_makes_white_are_found(tmp_path, values, brightest):
    pixels = np.zeros((32, 48), dtype=values)
    pixels[3, 4] = brightest
    if values is np.float32:
        pixels[5, 6] = NAN
    path = tmp_path / ("a.png" if values is np.uint16 else "a.tif")
    Image.fromarray(pixels).save(path)
    entry = record(file_name=str(path))
    white = int((read_image(str(path), "BGR")[3, 4] == 255).all() and brightest != 255)
    found = checks.check_image(entry)
    assert len(found) == white == int(brightest > 255)
    for each in found:
        assert (each.kind, each.severity) == ("deep-pixels", checks.ERROR)
        assert f"pixels of mode {Image.open(path).mode!r} go up to {brightest:g}, " in each.message
    (*others, last) = checks.check_image({**entry, "width": 9})
    assert (others, last.kind) == (found, "size-mismatch")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_after_exif_rotation(tmp_path, orientation):
    path = tmp_path / "a.jpg"
    save_rotated(path, (48, 32) if orientation < 5 else (32, 48), orientation)
    entry = record(file_name=str(path))
    assert checks.check_image(entry) == []
    (found,) = checks.check_image({**entry, "height": 48, "width": 32})
    assert found.kind == "size-mismatch"
    assert "the file is 48 x 32" in found.message


def test_sizes_that_are_not_stated_are_filled_in_as_detectron2_does(tmp_path):
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    entry = record([40, 2, 20, 4], file_name=str(tmp_path / "a.png"))
    del entry["height"], entry["width"]
    assert checks.check_records([entry]) == []
    assert checks.check_image(entry) == []
    assert (entry["height"], entry["width"]) == (32, 48)
    assert [x.kind for x in checks.check_records([entry])] == ["box-partly-outside"]
    del entry["height"]
    assert checks.check_image(entry) == []  # check_records has it
    assert "height" not in entry


def test_images_come_in_order_and_an_interrupt_waits_for_none(tmp_path, monkeypatch):
    started, go_on = [], threading.Event()

    def slow(entry):
        started.append(entry)
        if entry > 0:
            go_on.wait(10)
        return [entry]

    monkeypatch.setattr(images, "check_image", slow)
    found = checks.check_images(range(1000), jobs=2)
    assert next(found) == [0]
    go_on.set()
    found.close()
    assert len(started) < 1000
    assert list(checks.check_images(range(50), jobs=4)) == [[i] for i in range(50)]


# --------------------------------------------------------------------------------------------------
# Statistics


def test_usable_objects_are_what_training_sees():
    entry = record([1, 2, 3, 4], [40, -5, 20, 10], [1, 2, 0, 4], [5, 5, 5, 5], [6, 6, 5, 5])
    entry["annotations"][3]["iscrowd"] = 1
    entry["annotations"][4]["category_id"] = 2
    for each in entry["annotations"][:2]:
        each["category_id"] = 1
    (kept,) = checks.usable_objects([entry, record(height=None)], 2)
    assert kept.boxes.tolist() == [[1, 2, 4, 6], [40, 0, 48, 5]]
    assert kept.classes == [1, 1]
    assert kept.size == (32, 48)
    assert [x.boxes.shape for x in checks.usable_objects([record()])] == [(0, 4)]
    # In float32 nothing of it is left inside of the image.
    (kept,) = checks.usable_objects([record([48 - 1e-9, 2, 3, 4], [1, 2, 3, 4])])
    assert (kept.boxes.tolist(), kept.classes) == ([[1, 2, 4, 6]], [0])


def test_counts(tmp_path):
    entries = [record([1, 2, 4, 4], [10, 2, 4, 16]), record(), record([1, 2, 8, 2])]
    entries[2]["annotations"][0]["category_id"] = 2
    entries[0]["annotations"].append({**entries[0]["annotations"][0], "iscrowd": 1})
    kept = checks.usable_objects(entries, 3)
    counts = checks.count_objects(kept, entries, ["a", "b", "c"])
    assert counts == {
        "images": 3,
        "images_without_objects": 1,
        "objects": 3,
        "crowds": 1,
        "objects_per_class": {"a": 2, "b": 0, "c": 1},
        "objects_per_image": {"5%": 0.1, "25%": 0.5, "50%": 1.0, "75%": 1.5, "95%": 1.9},
        "box_size": {"5%": 4.0, "25%": 4.0, "50%": 4.0, "75%": 6.0, "95%": 7.6},
        "box_aspect": {"5%": 0.33, "25%": 0.62, "50%": 1.0, "75%": 2.5, "95%": 3.7},
    }
    assert checks.count_objects(kept, entries)["objects_per_class"] == {"0": 2, "2": 1}
    same_names = checks.count_objects(kept, entries, ["a", ["b"], "a"])
    assert same_names["objects_per_class"] == {"a (0)": 2, "['b']": 0, "a (2)": 1}
    empty = checks.count_objects([], [])
    assert (empty["objects"], empty["box_size"], empty["objects_per_class"]) == (0, {}, {})


@pytest.mark.parametrize("index", [20_000, 10**9, 2**70])
def test_class_indices_of_any_size_are_counted_or_found(index):
    """Where the names of the classes are not known, an index may be an id of some data base."""
    entry = record([1, 2, 4, 4], [20, 2, 4, 4], [20, 2, 4, 4])
    entry["annotations"][0]["category_id"] = index
    too_large = index >= checks.MOST_CLASSES
    expected = [("near-duplicate-box", "#2")]
    if too_large:
        expected.insert(0, ("class-out-of-range", "#0"))
    assert [(x.kind, x.annotation) for x in checks.check_records([entry])] == expected
    kept = checks.usable_objects([entry])
    counts = checks.count_objects(kept, [entry])["objects_per_class"]
    assert counts == ({"0": 2} if too_large else {"0": 2, str(index): 1})


# --------------------------------------------------------------------------------------------------
# Anchors


@pytest.fixture(scope="module")
def digits_cfg(root):
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(str(root / "configs" / "demo" / "focal_retinanet_digits.yaml"))
    return cfg


@pytest.fixture(scope="module")
def setup(digits_cfg):
    return checks.anchor_setup(digits_cfg)


def random_objects(seed, count, size):
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    centres = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    sides = 3 * 40 ** torch.rand(count, 2, generator=generator)
    boxes = Boxes(torch.cat([centres - sides / 2, centres + sides / 2], dim=1))
    boxes.clip(size)
    return checks.Objects(boxes.tensor, [0] * count, size)


def all_anchors(setup, size):
    """Detectron2's own anchors for an image of this padded size, by level."""
    features = [torch.empty(1, 1, math.ceil(size[0] / s), math.ceil(size[1] / s))
                for s in setup.generator.strides]  # fmt: skip
    return setup.generator(features)


def test_setup_is_the_configs(setup, digits_cfg):
    assert setup.generator.strides == [8, 16, 32]
    assert setup.foreground_iou == 0.5
    assert (setup.min_size, setup.max_size, setup.size_divisibility) == (128, 128, 32)
    other = digits_cfg.clone()
    other.MODEL.RETINANET.IOU_THRESHOLDS, other.MODEL.RETINANET.IOU_LABELS = [0.3], [0, 1]
    assert checks.anchor_setup(other).foreground_iou == 0.3
    other.MODEL.RETINANET.IN_FEATURES = ["p3", "p6"]
    with pytest.raises(ValueError, match=r"IN_FEATURES names p6, but the backbone .* has p2|p3"):
        checks.anchor_setup(other)
    for thresholds, labels in (
        ([0.5, 0.4], [0, -1, 1]), ([0.4, 0.4], [0, -1, 1]), ([0.0, 0.5], [0, -1, 1]),
        ([0.4, 0.5], [0, 1]), ([0.4, 0.5], [0, 2, 1]), ([0.4, 0.5], [0, -1, 0]),
    ):  # fmt: skip
        other = digits_cfg.clone()
        other.MODEL.RETINANET.IOU_THRESHOLDS = thresholds
        other.MODEL.RETINANET.IOU_LABELS = labels
        with pytest.raises(ValueError, match="IOU_THRESHOLDS is ") as error:
            checks.anchor_setup(other)
        assert f"{thresholds} and MODEL.RETINANET.IOU_LABELS {labels}" in str(error.value)
    other = digits_cfg.clone()
    other.MODEL.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    with pytest.raises(ValueError, match="'RotatedAnchorGenerator'; anchors of DefaultAnchor"):
        checks.anchor_setup(other)


# At once as they are, resized to 128 and padded, wide, high, and smaller than a stride.
SIZES = [(128, 128), (100, 128), (37, 128), (128, 61), (300, 500), (5, 128)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_the_nearest_anchors_are_the_best_of_all(digits_cfg, size, offset):
    cfg = digits_cfg.clone()
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = offset
    setup = checks.anchor_setup(cfg)
    boxes, padded = anchors.resized(random_objects(1, 200, size), setup)
    cells = list(setup.generator.cell_anchors)
    sizes = torch.tensor([padded] * len(boxes), dtype=torch.float32)
    reached, centred = anchors._best_ious(boxes, sizes, cells, setup.generator)
    for level, each in enumerate(all_anchors(setup, padded)):
        expected = pairwise_iou(Boxes(boxes), each).amax(1)
        torch.testing.assert_close(reached[:, level], expected, rtol=1e-4, atol=1e-6)
    assert (centred >= reached - 1e-6).all()


def test_levels_beyond_the_padding_have_an_anchor_more(setup):
    """P6 and P7: images are padded for P5 alone, and a part of a stride has an anchor, too."""
    coarse = setup._replace(
        generator=DefaultAnchorGenerator(
            sizes=[[64.0], [96.0]], aspect_ratios=[[1.0]], strides=[64, 128], offset=0.5
        )
    )
    picture = checks.Objects(torch.tensor([[60.0, 60.0, 128.0, 128.0]]), [0], (96, 128))
    boxes, padded = anchors.resized(picture, coarse)
    assert padded == (96, 128)
    cells = list(coarse.generator.cell_anchors)
    reached, _ = anchors._best_ious(boxes, torch.tensor([[96.0, 128.0]]), cells, coarse.generator)
    for level, each in enumerate(all_anchors(coarse, padded)):
        expected = pairwise_iou(Boxes(boxes), each).amax(1)
        torch.testing.assert_close(reached[:, level], expected, rtol=1e-4, atol=1e-6)


def test_resizing_and_padding_are_those_of_the_model(setup):
    boxes, padded = anchors.resized(
        checks.Objects(torch.tensor([[10.0, 20.0, 50.0, 60.0]]), [0], (200, 400)), setup
    )
    assert padded == (64, 128)  # resized to 64 x 128: the longer side may be 128
    torch.testing.assert_close(boxes, torch.tensor([[3.2, 6.4, 16.0, 19.2]]))
    flat, _ = anchors.resized(
        checks.Objects(torch.tensor([[100.0, 0.0, 400.0, 33.0]]), [0], (33, 400)), setup
    )
    torch.testing.assert_close(flat, torch.tensor([[32.0, 0.0, 128.0, 11.0]]))  # 10.56 rounded
    same = setup._replace(min_size=0, size_divisibility=0)
    assert anchors.resized(checks.Objects(boxes, [0], (201, 401)), same)[1] == (201, 401)


def test_coverage_counts_the_boxes_that_only_low_quality_matches_reach(setup):
    pictures = [random_objects(seed, 40, size) for seed, size in enumerate(SIZES)]
    pictures.append(random_objects(0, 0, (64, 64)))
    best, level_of = [], []
    for picture in pictures:
        boxes, padded = anchors.resized(picture, setup)
        if len(boxes):
            each = [pairwise_iou(Boxes(boxes), x).amax(1) for x in all_anchors(setup, padded)]
            best.append(torch.stack(each).amax(0))
            level_of.append(torch.stack(each).argmax(0))
    best, level_of = torch.cat(best), torch.cat(level_of)
    coverage = checks.anchor_coverage(pictures, setup)
    assert coverage["boxes"] == len(best) == 240
    assert coverage["unreached"] == int((best < 0.5).sum())
    assert 0.2 < coverage["share"] < 0.8
    assert coverage["share"] == pytest.approx(float((best < 0.5).float().mean()))
    assert 0 < coverage["share_if_centred"] < coverage["share"]
    for level, stated in enumerate(coverage["levels"]):
        here = level_of == level
        assert stated["stride"] == 8 * 2**level
        assert stated["boxes"] == int(here.sum())
        assert stated["unreached"] == int((best[here] < 0.5).sum())
        assert stated["share"] == pytest.approx(float((best[here] < 0.5).float().mean()))
    assert coverage["levels"][0]["sizes"] == [10, 13, 16, 20]


def test_sizes_that_fit_are_quantiles_and_their_share_is_what_the_config_would_give(
    setup, digits_cfg
):
    pictures = [random_objects(seed, 80, (128, 128)) for seed in range(4)]
    coverage = checks.anchor_coverage(pictures, setup)
    cfg = digits_cfg.clone()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [x["fitting_sizes"] for x in coverage["levels"]]
    again = checks.anchor_coverage(pictures, checks.anchor_setup(cfg))
    assert again["share"] == pytest.approx(coverage["share_with_fitting_sizes"], abs=1e-6)
    assert again["share"] != coverage["share"]

    squares = torch.tensor([[64 - s / 2, 64 - s / 2, 64 + s / 2, 64 + s / 2] for s in range(5, 13)])
    one_level = checks.anchor_coverage([checks.Objects(squares, [0] * 8, (128, 128))], setup)
    # Of 5 ... 12 the quantiles 1/8, 3/8, 5/8, 7/8: 5 + 7 q. Levels without a box keep their sizes.
    assert one_level["levels"][0]["fitting_sizes"] == [5.9, 7.6, 9.4, 11.1]
    assert one_level["levels"][1]["fitting_sizes"] == one_level["levels"][1]["sizes"]
    assert one_level["levels"][1]["share"] is None
    # 5, 6 and 7 have less than half the area of the anchor of 10; 5.9 and 7.6 are near enough.
    assert (one_level["share"], one_level["share_with_fitting_sizes"]) == (0.375, 0.0)


def test_sizes_that_are_stated_twice_and_ratios_of_any_number(digits_cfg):
    cfg = digits_cfg.clone()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[20, 10, 10], [40], [80]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0, 0.5], [1.0], [3.0, 1.0, 0.2]]
    pictures = [random_objects(seed, 60, (128, 128)) for seed in range(3)]
    coverage = checks.anchor_coverage(pictures, checks.anchor_setup(cfg))
    assert [x["sizes"] for x in coverage["levels"]] == [[20, 10, 10], [40], [80]]
    assert [len(x["fitting_sizes"]) for x in coverage["levels"]] == [3, 1, 1]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [x["fitting_sizes"] for x in coverage["levels"]]
    again = checks.anchor_coverage(pictures, checks.anchor_setup(cfg))
    assert again["share"] == pytest.approx(coverage["share_with_fitting_sizes"], abs=1e-6)


@pytest.mark.parametrize("key", ["SIZES", "ASPECT_RATIOS"])
@pytest.mark.parametrize("values", [[[10], [0]], [[-1.0]], [[10, NAN]], [0.0, 1.0], []])
def test_anchors_without_an_area_are_refused(digits_cfg, key, values):
    cfg = digits_cfg.clone()
    cfg.MODEL.ANCHOR_GENERATOR[key] = values
    with pytest.raises(ValueError, match=rf"ANCHOR_GENERATOR\.{key} must be numbers above 0"):
        checks.anchor_setup(cfg)


def test_a_box_in_the_middle_of_its_anchor_is_reached(setup):
    exact = torch.tensor([[64 - 5.0, 64 - 5.0, 64 + 5.0, 64 + 5.0]])  # stride 8, anchor of 10
    beside = exact + 4  # between four of them: 36 / 164
    for boxes, reached, if_centred in ((exact, 0.0, 0.0), (beside, 1.0, 0.0)):
        coverage = checks.anchor_coverage([checks.Objects(boxes, [0], (128, 128))], setup)
        assert coverage["share"] == reached
        assert coverage["share_if_centred"] == if_centred
    long = torch.tensor([[10.0, 50.0, 110.0, 56.0]])
    coverage = checks.anchor_coverage([checks.Objects(long, [0], (128, 128))], setup)
    assert coverage["share_if_centred"] == 1.0  # no stride is to blame for 17:1


def test_coverage_of_nothing(setup):
    for pictures in ([], [random_objects(0, 0, (64, 64))]):
        coverage = checks.anchor_coverage(pictures, setup)
        assert coverage["boxes"] == 0
        assert coverage["share"] is coverage["share_with_fitting_sizes"] is None
        assert checks.check_coverage(coverage) == []
        json.dumps(coverage, allow_nan=False)


def test_many_boxes_are_taken_in_blocks(setup, monkeypatch):
    pictures = [random_objects(5, 70, (128, 128))]
    whole = checks.anchor_coverage(pictures, setup)
    monkeypatch.setattr(anchors, "BLOCK_BOXES", 32)
    assert checks.anchor_coverage(pictures, setup) == whole


def test_a_few_boxes_without_an_anchor_are_no_news():
    coverage = {
        "boxes": 100, "unreached": 5, "share": 0.05, "foreground_iou": 0.5, "min_size": 800,
        "max_size": 1333,
    }  # fmt: skip
    assert checks.check_coverage(coverage) == []
    (found,) = checks.check_coverage({**coverage, "unreached": 6, "share": 0.06})
    assert found.kind == "boxes-without-anchor"
    assert str(found) == (
        "6 of 100 boxes (6.0%) overlap with no anchor by 0.5 or more at MIN_SIZE_TEST 800, "
        "MAX_SIZE_TEST 1333"
    )


def test_foreground_and_background_are_those_of_detectron2s_matcher(setup):
    pictures = [random_objects(3, 12, (100, 128)), random_objects(3, 0, (64, 64))]
    matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    boxes, padded = anchors.resized(pictures[0], setup)
    levels = all_anchors(setup, padded)
    _, labels = matcher(pairwise_iou(Boxes(boxes), Boxes.cat(levels)))
    count = {value: int((labels == value).sum()) for value in (1, 0, -1)}
    empty = sum(len(level) for level in all_anchors(setup, (128, 128)))
    ratio = checks.foreground_ratio(pictures, setup)
    assert count[1] > 10
    assert count[-1] > 10
    assert ratio == {
        "images": 2,
        "foreground": count[1],
        "background": count[0] + empty,
        "ignored": count[-1],
        "background_per_foreground": (count[0] + empty) / count[1],
        "foreground_per_level": [
            int((part == 1).sum()) for part in labels.split([len(x) for x in levels])
        ],
    }
    assert checks.foreground_ratio([], setup)["background_per_foreground"] is None


# --------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def tool(load_tool):
    """tools/check_dataset.py as a module."""
    return load_tool("check_dataset")


@pytest.fixture
def run(tool, root, register, folder, capsys):
    """A function from content and options to exit status, output and the JSON that is written."""

    def call(content, *options):
        name = register(content)
        config = root / "configs" / "demo" / "focal_retinanet_digits.yaml"
        path = folder / "out" / "report.json"
        status = tool.main([name, "--config-file", str(config), "--json", str(path), *options])
        output = capsys.readouterr().out
        assert f"Written: {path}" in output
        return status, output, json.loads(path.read_text(), parse_constant=pytest.fail)

    return call


def test_warnings_leave_the_exit_status_at_0(run):
    content = clean_content()
    content["annotations"].pop()
    status, output, report = run(content, "--jobs", "2")
    assert status == 0
    assert (report["errors"], report["warnings"]) == (0, len(report["findings"]))
    assert "has no object" in output
    objects = report["statistics"]["objects"]
    assert objects["objects_per_class"] == {"ant": 1, "cup": 2}
    assert (objects["images"], objects["images_without_objects"]) == (3, 1)
    assert "shapes" in output
    assert "3 images, 1 of them without objects; 3 objects, 0 crowds" in output


def test_an_error_makes_it_1_and_is_named(run, folder):
    content = clean_content()
    content["annotations"][0]["bbox"] = [1, 2, NAN, 3]
    status, output, report = run(content)
    assert status == 1
    assert report["errors"] == 1
    assert report["findings"][0] == {
        "kind": "box-not-finite",
        "severity": "error",
        "message": "bbox [1, 2, nan, 3] holds a number that is not finite",
        "image_id": 11,
        "file_name": f"{folder}/a.png",
        "annotation": 101,
    }
    assert f"  image '{folder}/a.png' (id 11), annotation 101: bbox [1, 2, nan, 3] " in output
    assert re.search(r"^error +box-not-finite +1  ", output, re.M)


def test_what_cannot_be_loaded_is_reported(run):
    status, output, report = run("{")
    assert status == 1
    assert [x["kind"] for x in report["findings"]] == ["annotations-unreadable", "unloadable"]
    assert "anchors" not in report["statistics"]
    assert "not JSON, or cut off" in output


def test_images_can_be_skipped_and_findings_limited(run, folder):
    for path in folder.glob("*.png"):
        path.write_text("no image")
    content = clean_content()
    assert run(content)[0] == 1
    status, output, _ = run(content, "--skip-images", "--show", "0")
    assert status == 0
    assert "unreadable-image" not in output
    content["annotations"] = [annotation(i, 11, [1, 2, -3, 4]) for i in range(5)]
    _, output, _ = run(content, "--skip-images", "--show", "2")
    assert output.count("has a negative width or height") == 2
    assert "... and 3 more (--show, --json)" in output


def test_options_change_the_anchors(run):
    _, _, report = run(clean_content())
    assert report["statistics"]["anchors"]["min_size"] == 128
    assert report["statistics"]["assignment"]["images"] == 3
    _, _, report = run(
        clean_content(), "--assign", "2", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"
    )
    assert report["statistics"]["anchors"]["min_size"] == 64
    assert report["statistics"]["assignment"]["images"] == 2
    assert report["opts"] == ["INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["digits_cluter_val"], "NAME must be a registered data set, got 'digits_cluter_val'"),
        (["digits_cluter_val"], "near it are digits_clutter_val, digits_clutter_train"),
        (["qqqq"], "there are "),
        (["shapes", "--config-file", "no.yaml"], "must name a YAML file, got 'no.yaml'"),
        (["shapes", "--config-file", __file__], "must name a YAML file, not a LazyConfig, got"),
        (["shapes", "--jobs", "0"], "--jobs and --assign must be 1 or more"),
        (["shapes", "--assign", "0"], "--jobs and --assign must be 1 or more"),
        (["shapes", "--show", "-1"], "--show 0 or more"),
        (["shapes", "MODEL.NO_KEY", "1"], "Non-existent key: MODEL.NO_KEY"),
        (["shapes", "MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator",
          "MODEL.ANCHOR_GENERATOR.ANGLES", "[[0]]"], "'RotatedAnchorGenerator'"),
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_be_carried_out(tool, register, capsys, options, message):
    register(clean_content())
    with pytest.raises(SystemExit) as stopped:
        tool.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1", ": no YAML: while parsing"),
        ("- a", ": a config must map keys to values, got"),
        ("", ": a config must map keys to values, got 'None'"),
        ("MODEL: 3", "' is no config: TypeError: "),
        ("_BASE_: mine.yaml", "' is its own _BASE_: "),
    ],
)
def test_a_config_file_that_is_none(tool, register, folder, capsys, text, problem):
    register(clean_content())
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        tool.main(["shapes", "--config-file", str(folder / "mine.yaml")])
    assert stopped.value.code == 2
    assert f"mine.yaml{problem}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "problem"),
    [("a.png/out.json", "File exists"), ("a.png/b/out.json", "Not a directory"), (".", "a folder")],
)
def test_a_place_where_nothing_can_be_written_is_found_first(
    tool, register, folder, capsys, monkeypatch, place, problem
):
    monkeypatch.setattr(tool, "examine", pytest.fail)
    register(clean_content())
    with pytest.raises(SystemExit) as stopped:
        tool.main(["shapes", "--json", str(folder / place)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "--json '" in error
    assert problem in error


def test_the_embedded_set_is_clean_but_for_images_without_objects(tool, root, tmp_path, capsys,
                                                                  monkeypatch):  # fmt: skip
    from focal_det.data import DigitsClutterSpec, register_digits_clutter, registration

    spec = DigitsClutterSpec(train_images=6, val_images=40)
    monkeypatch.setitem(registration.EMBEDDED, "digits_clutter", spec)
    for split in ("train", "val"):
        DatasetCatalog.data.pop(f"digits_clutter_{split}", None)
        MetadataCatalog.data.pop(f"digits_clutter_{split}", None)
    register_digits_clutter(tmp_path / "digits")
    config = root / "configs" / "demo" / "focal_retinanet_digits.yaml"
    assert tool.main(["digits_clutter_val", "--config-file", str(config)]) == 0
    output = capsys.readouterr().out
    assert "40 images" in output
    kinds = {line.split()[1] for line in output.splitlines() if line.startswith("warning")}
    assert "no-objects" in kinds
    assert kinds <= {"no-objects", "boxes-without-anchor"}
