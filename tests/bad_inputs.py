"""Bad inputs of every kind, each tried on the door that a user comes through.

`tests/test_bad_inputs.py` asserts what each must give and holds the outcomes against
docs/bad_inputs.json, which is made by

    python tests/bad_inputs.py
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import logging
import os
import pickle
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

with warnings.catch_warnings():
    # fvcore scripts its focal loss when it is imported; PyTorch warns that this will go.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*")
    import focal_det

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from focal_det.data import DigitsClutterSpec, generate, register_from_env
from focal_det.data.guarded import BadImageError, GuardedMapper
from focal_det.engine.checkpoint import Checkpointer
from focal_det.losses import LOSS_REGISTRY, FocalLoss, OHEMLoss
from focal_det.safe_loading import UnsafeFileError, convert

ROOT = Path(__file__).resolve().parent.parent
OUTCOMES = ROOT / "docs" / "bad_inputs.json"
DIGITS = ROOT / "configs" / "demo" / "focal_retinanet_digits.yaml"
WIDTH, HEIGHT = 48, 32
NAN, INF = float("nan"), float("inf")


class Case(NamedTuple):
    """One bad input.

    Attributes:
        area: what it is an input of.
        input: what is wrong with it, one line of Markdown.
        attempt: makes it in the folder that it is given and has it read. It returns what came of
            it, or raises.
        raises: the exception that must come, None for none.
        says: what the message or the returned text must contain; ``DIR`` stands for the folder.
    """

    area: str
    input: str
    attempt: Callable[[Path], str]
    raises: type[BaseException] | None
    says: tuple[str, ...]


CASES: list[Case] = []


def add(
    area: str,
    input: str,
    attempt: Callable[[Path], Any],
    *says: str,
    raises: type[BaseException] | None = None,
) -> None:
    """Add a case; see :class:`Case`."""
    CASES.append(Case(area, input, attempt, raises, says))


def outcome(case: Case, folder: Path) -> str:
    """What a case gives, with its folder as ``DIR``.

    Args:
        case: one of :data:`CASES`.
        folder: empty, and its own.

    Raises:
        AssertionError: another exception, or none, or a text that lacks what it must say.
    """
    raised: BaseException | None = None
    with isolated():
        try:
            text = case.attempt(folder)
        except (Exception, SystemExit) as error:
            raised, text = error, str(error)
    text = text.replace(str(folder.resolve()), "DIR").replace(str(folder), "DIR")
    # How far a decoder comes depends on its version.
    text = re.sub(r"\d+ bytes", "N bytes", text)
    if type(raised) is not (case.raises or type(None)):
        raise AssertionError(f"{case.input}: got {raised!r}, not {case.raises}") from raised
    for part in case.says:
        assert part in text, f"{case.input}: no {part!r} in {text!r}"
    return text if raised is None else f"{type(raised).__name__}: {text}"


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Environment, catalogs, registry and log stay as they were; nothing is printed."""
    data, metadata = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    losses = dict(LOSS_REGISTRY._obj_map)
    modules = set(sys.modules)
    silent = io.StringIO()
    level = logging.root.manager.disable
    with (
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(silent),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)
            DatasetCatalog.data, MetadataCatalog.data = data, metadata
            LOSS_REGISTRY._obj_map = losses
            for name in set(sys.modules) - modules:
                if name.startswith("focal_det_plugin_"):
                    del sys.modules[name]


def records() -> list[dict[str, str]]:
    """All outcomes: ``area``, ``input`` and ``outcome`` of each case, in their order."""
    made = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            made.append(
                {
                    "area": case.area,
                    "input": case.input,
                    "outcome": outcome(case, Path(folder)),
                }
            )
    return made


def render(records: Sequence[dict[str, str]]) -> str:
    """A Markdown table for each area.

    Args:
        records: of :func:`records`, or of docs/bad_inputs.json.
    """
    parts = []
    for area in dict.fromkeys(record["area"] for record in records):
        rows = [record for record in records if record["area"] == area]
        lines = [f"### {area}", "", "| input | what it gives |", "|---|---|"]
        for row in rows:
            wrong = row["input"].replace("|", r"\|")
            lines.append(f"| {wrong} | {_escaped(row['outcome'])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """Text that means itself inside of a Markdown table."""
    text = re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))
    return text.replace("$", r"\$")


# --------------------------------------------------------------------------------------------------
# Annotation files, images, boxes and classes: tools/check_dataset.py


def annotation(number: int, image: int, box: Any, category: Any = 1) -> dict[str, Any]:
    """One in COCO's format."""
    given = {"id": number, "image_id": image, "bbox": box, "category_id": category}
    return {**given, "area": 80, "iscrowd": 0}


def clean_set() -> dict[str, Any]:
    """COCO's format, two images with an object each, nothing wrong."""
    sizes = {"width": WIDTH, "height": HEIGHT}
    return {
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "ant"}],
        "images": [
            {"id": 11, "file_name": "a.png", **sizes},
            {"id": 12, "file_name": "b.png", **sizes},
        ],
        "annotations": [
            annotation(101, 11, [5, 5, 10, 8]),
            annotation(102, 12, [20, 9, 8, 10], category=2),
        ],
    }


@functools.cache
def tool(name: str) -> Any:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def register(folder: Path, content: Any) -> None:
    """The set "mine": two images and the annotation file that holds `content`, JSON or text."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "set.json").write_text(text)
    register_coco_instances("mine", {}, str(folder / "set.json"), str(folder))


def check(folder: Path, kind: str) -> str:
    """Run tools/check_dataset.py on "mine": exit status and the first finding of a kind."""
    path = folder / "report.json"
    with contextlib.redirect_stderr(io.StringIO()):
        command = ["mine", "--config-file", str(DIGITS), "--jobs", "1", "--json", str(path)]
        status = tool("check_dataset").main(command)
    report = json.loads(path.read_text())
    found = [finding for finding in report["findings"] if finding["kind"] == kind]
    if not found:
        return f"exit {status}, found {[finding['kind'] for finding in report['findings']]}"
    (first, *_) = found
    text = tool("check_dataset").checks.Finding(**first)
    return f"check_dataset exits with {status}, {first['severity']} {kind}: {text}"


def checked(
    kind: str,
    change: Callable[[dict[str, Any]], object] = lambda content: None,
    files: Callable[[Path], object] = lambda folder: None,
) -> Callable[[Path], str]:
    """An attempt: change the clean set or its files, then check it.

    Args:
        kind: of the finding that is looked for.
        change: changes the content of the annotation file in place; what it returns, if it is
            text or a list, is the content instead.
        files: changes the files.
    """

    def attempt(folder: Path) -> str:
        content = clean_set()
        changed = change(content)
        register(folder, changed if isinstance(changed, (str, list)) else content)
        files(folder)
        return check(folder, kind)

    return attempt


def fields(section: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the first entry of a section; ``...`` takes a field out."""

    def change(content: dict[str, Any]) -> None:
        for key, value in values.items():
            content[section][0][key] = value
            if value is ...:
                del content[section][0][key]

    return change


def without(section: str) -> Callable[[dict[str, Any]], None]:
    """A change that takes a section out."""

    def change(content: dict[str, Any]) -> None:
        del content[section]

    return change


def also(section: str, entry: Any) -> Callable[[dict[str, Any]], None]:
    """A change that adds an entry to a section."""
    return lambda content: content[section].append(entry)


ERROR, WARNING = "check_dataset exits with 1, error ", "check_dataset exits with 0, warning "
FILE = "Annotation file"

add(
    FILE,
    "not there",
    checked("annotations-unreadable", files=lambda folder: (folder / "set.json").unlink()),
    ERROR,
    "DIR/set.json: annotation file not found",
)
for input, text, says in (
    ("empty", "", "not JSON, or cut off"),
    ("no JSON", "<xml/>", "not JSON, or cut off: Expecting value: line 1 column 1"),
    ("cut off in the middle", json.dumps(clean_set())[:200], "not JSON, or cut off"),
    ("nested 100,000 deep", "[" * 100_000, "RecursionError"),
):
    add(
        FILE,
        input,
        checked("annotations-unreadable", lambda content, text=text: text),
        f"{ERROR}annotations-unreadable: DIR/set.json: ",
        says,
    )
for input, change, says in (
    ("a list (COCO's results)", lambda content: [content], "the top level must be an object"),
    ("without `images`", without("images"), "'images' must be a list with entries, got nothing"),
    ("without `categories`", without("categories"), "'categories' must be a list with entries"),
    (
        "`annotations` is an object",
        lambda content: content.update(annotations={}),
        "'annotations' must be a list with entries, got dict",
    ),
    ("an image without file_name", fields("images", file_name=...), "images[0] has no file_name"),
    ("an image without height", fields("images", height=...), "images[0] has no height"),
    ("an image whose id is a list", fields("images", id=[1]), "images[0]: id must be a number or"),
    ("image ids of two types", fields("images", id="11"), "some image ids are numbers and some"),
    ("a category that is a string", also("categories", "cat"), "categories[2] must be an object"),
    ("an annotation without id", fields("annotations", id=...), "annotations[0] has no id"),
    (
        "an annotation without image_id",
        fields("annotations", image_id=...),
        "annotations[0] has no image_id",
    ),
    ("an annotation without bbox", fields("annotations", bbox=...), "annotations[0] has no bbox"),
):
    add(FILE, input, checked("malformed", change), f"{ERROR}malformed: ", says)
for input, kind, change, says in (
    ("two images of one id", "duplicate-image-id", fields("images", id=12), "the same id 12"),
    (
        "two annotations of one id",
        "duplicate-annotation-id",
        fields("annotations", id=102),
        "the same id 102",
    ),
    (
        "two categories of one id",
        "duplicate-category-id",
        fields("categories", id=2),
        "the same id 2",
    ),
    (
        "an annotation of an image that is not there",
        "unknown-image",
        fields("annotations", image_id=99),
        "annotation 101: image_id 99 is not among the images",
    ),
    (
        "an annotation of a category that is not there",
        "unknown-category",
        fields("annotations", category_id=9),
        "annotation 101: category_id 9 is not among the categories",
    ),
    ("the flag `ignore`", "ignore-flag", fields("annotations", ignore=1), "use iscrowd"),
    (
        "a polygon of two points",
        "broken-polygon",
        fields("annotations", segmentation=[[5, 5, 15, 13]]),
        "segmentation has no polygon of 6 numbers or more",
    ),
    ("iscrowd of 2", "crowd-flag", fields("annotations", iscrowd=2), "allowed are 0 and 1"),
):
    add(FILE, input, checked(kind, change), f"{ERROR}{kind}: ", says)
for input, kind, change, says in (
    (
        "two categories of one name",
        "duplicate-category-name",
        fields("categories", name="ant"),
        "the same name 'ant'",
    ),
    (
        "no `area` and no `iscrowd`",
        "no-evaluation-fields",
        fields("annotations", area=..., iscrowd=...),
        "annotation 101: has no area and no iscrowd",
    ),
    ("one file named twice", "duplicate-file-name", fields("images", file_name="b.png"), "id 11"),
    (
        "an image without objects",
        "no-objects",
        lambda content: content["annotations"].pop(0),
        "image 'DIR/a.png' (id 11): has no object",
    ),
):
    add(FILE, input, checked(kind, change), f"{WARNING}{kind}: ", says)
add(
    FILE,
    "no image",
    checked("no-images", lambda content: content.update(images=[], annotations=[])),
    f"{ERROR}no-images: 'mine' has no image",
)

PICTURE = "Image file"


def cut_in_half(path: Path) -> None:
    """Keep the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_jpeg(folder: Path) -> None:
    """A JPEG named a.png, of which half is there."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png", format="JPEG")
    cut_in_half(folder / "a.png")


def cut_bmp(folder: Path) -> None:
    """The same without compression."""
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png", format="BMP")
    cut_in_half(folder / "a.png")


def rotated(folder: Path) -> None:
    """A file that is stored lying, with the EXIF orientation that stands it up."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png", format="JPEG", exif=exif)


def sixteen_bits(folder: Path) -> None:
    """A grey image of 16 bits, as microscopes and medical scanners make them."""
    pixels = np.full((HEIGHT, WIDTH), 4095, dtype=np.uint16)
    Image.fromarray(pixels).save(folder / "a.png")


def folder_instead(folder: Path) -> None:
    """A folder of the image's name."""
    (folder / "a.png").unlink()
    (folder / "a.png").mkdir()


for input, kind, files, says in (
    ("not there", "missing-file", lambda folder: (folder / "a.png").unlink(), "no such file"),
    ("empty", "empty-file", lambda folder: (folder / "a.png").write_text(""), "is empty"),
    (
        "a text file",
        "unreadable-image",
        lambda folder: (folder / "a.png").write_text("<html>not found</html>"),
        "UnidentifiedImageError: ",
    ),
    ("a folder", "unreadable-image", folder_instead, "IsADirectoryError: "),
    ("half of a JPEG file", "unreadable-image", cut_jpeg, "OSError: "),
    ("half of a BMP file", "unreadable-image", cut_bmp, "OSError: image file is truncated"),
    (
        "of another size than the annotation says",
        "size-mismatch",
        lambda folder: Image.new("RGB", (40, 30)).save(folder / "a.png"),
        "the file is 40 x 30 (width x height, after its EXIF rotation), the annotation says "
        "48 x 32",
    ),
    (
        "of the stated size, but for its EXIF rotation",
        "size-mismatch",
        rotated,
        "the file is 32 x 48 (width x height, after its EXIF rotation), the annotation says "
        "48 x 32",
    ),
    ("grey of 16 bits", "deep-pixels", sixteen_bits, "go up to 4095, and all above 255 become"),
):
    add(
        PICTURE, input, checked(kind, files=files), f"{ERROR}{kind}: image 'DIR/a.png' (id 11): ",
        says,
    )  # fmt: skip
add(
    PICTURE,
    "a path that leaves the image folder",
    checked("outside-root", fields("images", file_name="/etc/passwd")),
    f"{ERROR}outside-root: image '/etc/passwd' (id 11): file_name '/etc/passwd'",
    "is not inside the image root 'DIR'",
)
add(
    PICTURE,
    "a width that is text",
    checked("size-fields", fields("images", width="48")),
    f"{ERROR}size-fields: image 'DIR/a.png' (id 11): height 32, width '48': both must be",
)

BOX = "Box and class"
for input, kind, box, says in (
    ("NaN in a box", "box-not-finite", [5, NAN, 10, 8], "bbox [5, nan, 10, 8] holds a number"),
    ("infinity in a box", "box-not-finite", [5, 5, INF, 8], "bbox [5, 5, inf, 8] holds a number"),
    ("a negative width", "box-negative-size", [15, 5, -10, 8], "has a negative width or height"),
    ("no width", "box-zero-area", [5, 5, 0, 8], "has no area"),
    ("outside of the image", "box-outside-image", [60, 5, 10, 8], "the image is 48 x 32"),
    ("three numbers", "box-format", [5, 5, 10], "must be 4 numbers, got [5, 5, 10]"),
    ("no numbers", "box-format", [], "must be 4 numbers, got []"),
    ("numbers as text", "box-format", ["5", "5", "9", "8"], "must be 4 numbers, got ['5', '5',"),
    ("null in a box", "box-format", [5, 5, None, 8], "must be 4 numbers, got [5, 5, None, 8]"),
    ("a box that is an object", "box-format", {"x": 5}, "must be 4 numbers, got {'x': 5}"),
):
    add(
        BOX,
        input,
        checked(kind, fields("annotations", bbox=box)),
        f"{ERROR}{kind}: image 'DIR/a.png' (id 11), annotation 101: bbox ",
        says,
    )
add(
    BOX,
    "standing out of the image",
    checked("box-partly-outside", fields("annotations", bbox=[40, 5, 12, 8])),
    f"{WARNING}box-partly-outside: ",
    "bbox [40, 5, 12, 8] stands out of the image: the image is 48 x 32",
)
add(
    BOX,
    "one object labelled twice",
    checked("near-duplicate-box", also("annotations", annotation(103, 11, [5, 5, 10, 8]))),
    f"{WARNING}near-duplicate-box: ",
    "annotation 103: IoU with annotation 101 of the same class is 0.95 or more",
)
add(
    BOX,
    "so long that no anchor overlaps it by half",
    checked("boxes-without-anchor", fields("annotations", bbox=[0, 5, 48, 1])),
    f"{WARNING}boxes-without-anchor: 1 of 2 boxes (50.0%) overlap with no anchor by 0.5 or more",
)


def record(folder: Path, **changes: Any) -> dict[str, Any]:
    """One of Detectron2's dictionaries, with fields of its object changed."""
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png")
    given = {"bbox": [5, 5, 10, 8], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    return {
        "file_name": str(folder / "a.png"),
        "image_id": 11,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [{**given, **changes}],
    }


def check_made(kind: str, make: Callable[[Path], Any]) -> Callable[[Path], str]:
    """An attempt: register a function of one's own, then check the set."""

    def attempt(folder: Path) -> str:
        DatasetCatalog.register("mine", lambda: make(folder))
        MetadataCatalog.get("mine").thing_classes = ["cup", "ant"]
        return check(folder, kind)

    return attempt


for input, kind, make, says in (
    (
        "a box mode that Detectron2 does not support",
        "box-mode",
        lambda folder: [record(folder, bbox_mode=BoxMode.XYWH_REL)],
        "allowed are BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS",
    ),
    (
        "a class above the last",
        "class-out-of-range",
        lambda folder: [record(folder, category_id=2)],
        "category_id is 2, allowed is 0..1",
    ),
    (
        "a class by its name",
        "class-out-of-range",
        lambda folder: [record(folder, category_id="cup")],
        "category_id is 'cup', allowed is 0..1",
    ),
):
    add(
        BOX,
        input,
        check_made(kind, make),
        f"{ERROR}{kind}: image 'DIR/a.png' (id 11), annotation #0: ",
        says,
    )

OWN = "Data set registered by a function"
for input, kind, make, says in (
    ("it raises", "unloadable", lambda folder: (folder / "no.csv").read_text(), "FileNotF"),
    ("it returns None", "unloadable", lambda folder: None, "'mine' must be a list of dicts, got"),
    ("it returns no image", "no-images", lambda folder: [], "'mine' has no image"),
    (
        "an entry is a path",
        "malformed",
        lambda folder: ["a.png"],
        "entry 0 of the data set must be",
    ),
    ("an entry without file_name", "malformed", lambda folder: [{}], "must have a file_name"),
    (
        "annotations that are no list",
        "malformed",
        lambda folder: [{**record(folder), "annotations": {}}],
        "annotations must be a list of dicts",
    ),
):
    add(OWN, input, check_made(kind, make), f"{ERROR}{kind}: ", says)

# --------------------------------------------------------------------------------------------------
# Training


def mapped(policy: str, make: Callable[[Path], dict[str, Any]]) -> Callable[[Path], str]:
    """An attempt: hand a record to the mapper that training uses."""

    def attempt(folder: Path) -> str:
        mapper = DatasetMapper(True, augmentations=[], image_format="BGR")
        guarded = GuardedMapper(mapper, policy, num_classes=2)
        sample = guarded(make(folder))
        return f"sample {sample}, skipped {guarded.skipped}"

    return attempt


def spoilt(folder: Path) -> dict[str, Any]:
    """A record whose file is no image."""
    made = record(folder)
    (folder / "a.png").write_text("no image")
    return made


TRAINING = "Image in training"
NAMED = "image 'DIR/a.png' (image_id 11) cannot be used: "
for input, make, says in (
    ("no image", spoilt, "UnidentifiedImageError: "),
    ("not there", lambda folder: {**record(folder), "file_name": str(folder / "b")}, "DIR/b"),
    ("another size", lambda folder: {**record(folder), "width": 9}, "SizeMismatchError: "),
    ("NaN in a box", lambda folder: record(folder, bbox=[5, NAN, 9, 9]), "[5, nan, 9, 9]"),
    ("a negative width", lambda folder: record(folder, bbox=[5, 5, -9, 9]), "[5, 5, -9, 9]"),
    ("three numbers in a box", lambda folder: record(folder, bbox=[5, 5, 9]), "AssertionError: "),
    ("a class above the last", lambda folder: record(folder, category_id=2), "allowed is 0..1"),
    ("no class", lambda folder: record(folder, category_id=None), "TypeError: "),
):
    named = NAMED if "there" not in input else "image 'DIR/b' (image_id 11) cannot be used: "
    add(TRAINING, input, mapped("stop", make), named, says, raises=BadImageError)
add(
    TRAINING,
    "no image, with `DATALOADER.ON_BAD_IMAGE skip`",
    mapped("skip", spoilt),
    "sample None, skipped {'UnidentifiedImageError': 1}",
)


def all_bad(folder: Path) -> str:
    """Skip the same image again and again."""
    mapper = DatasetMapper(True, augmentations=[], image_format="BGR")
    guarded, bad = GuardedMapper(mapper, "skip"), spoilt(folder)
    return f"skipped {[guarded(bad) for _ in range(1000)]}"


add(
    TRAINING,
    "not one image that can be read, with `DATALOADER.ON_BAD_IMAGE skip`",
    all_bad,
    "100 images in a row were skipped, so this is about more than a few bad images",
    "image 'DIR/a.png' (image_id 11)",
    raises=BadImageError,
)


def config(*options: Any) -> CfgNode:
    """The demo's config with options."""
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(str(DIGITS))
    cfg.merge_from_list(list(options))
    return cfg


def step(classes: Sequence[int]) -> Callable[[Path], str]:
    """An attempt: the loss of an image with objects of these classes, K = 10."""

    def attempt(folder: Path) -> str:
        instances = Instances((64, 64))
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 5.0, 30.0, 30.0]] * len(classes)))
        instances.gt_classes = torch.tensor(classes)
        model = build_model(config())
        return str(model([{"image": torch.zeros(3, 64, 64), "instances": instances}]))

    return attempt


for value in (10, -1):
    add(
        TRAINING,
        f"gt_classes of {value}, K = 10, in the model",
        step([3, value]),
        f"gt_classes holds {value}, allowed is 0..9 (MODEL.RETINANET.NUM_CLASSES = 10",
        raises=ValueError,
    )

# --------------------------------------------------------------------------------------------------
# Losses

LOSS = "Call of a loss"
LOGITS, LABELS = torch.zeros(4, 3), torch.tensor([0, 2, 3, -1])
for input, logits, labels, says in (
    ("a label above K", LOGITS, LABELS + 1, "labels must lie in -1..3"),
    ("a label of -2", LOGITS, LABELS - 1, "labels must lie in -1..3"),
    ("labels that are floats", LOGITS, LABELS.float(), "labels must be integers (int64), got"),
    ("labels that are bools", LOGITS, LABELS > 0, "labels must be integers (int64), got"),
    ("one-hot labels", LOGITS, LOGITS.long(), "labels must have the shape of logits without its"),
    ("fewer labels than anchors", LOGITS, LABELS[:3], "(4,), got (3,)"),
    (
        "logits that are integers",
        LOGITS.long(),
        LABELS,
        "(..., K) with K >= 1, got (4, 3) torch.in",
    ),
    (
        "logits of float8",
        LOGITS.to(torch.float8_e4m3fn),
        LABELS,
        "logits must be a tensor of float16, bfloat16, float32 or float64",
    ),
    ("one logit without a shape", LOGITS[0, 0], LABELS, "of shape (..., K) with K >= 1, got ()"),
    ("no class", LOGITS[:, :0], LABELS, "with K >= 1, got (4, 0)"),
):
    add(
        LOSS,
        input,
        lambda folder, logits=logits, labels=labels: str(FocalLoss()(logits, labels)),
        says,
        raises=ValueError,
    )
for input, logits, labels, says in (
    ("logits in a list", LOGITS.tolist(), LABELS, "logits must be a tensor, got list"),
    ("labels in NumPy", LOGITS, LABELS.numpy(), "labels must be a tensor, got ndarray"),
    ("no labels", LOGITS, None, "labels must be a tensor, got NoneType"),
):
    add(
        LOSS,
        input,
        lambda folder, logits=logits, labels=labels: str(FocalLoss()(logits, labels)),
        says,
        raises=TypeError,
    )
add(
    LOSS,
    "OHEM without boxes",
    lambda folder: str(OHEMLoss()(LOGITS, LABELS)),
    "OHEMLoss needs boxes, (..., 4) XYXY, for its NMS; got None",
    raises=ValueError,
)
add(
    LOSS,
    "OHEM with boxes of 3 numbers",
    lambda folder: str(OHEMLoss()(LOGITS, LABELS, boxes=torch.zeros(4, 3))),
    "boxes must have the shape of labels and a last dimension of 4, (4, 4), got (4, 3)",
    raises=ValueError,
)

# --------------------------------------------------------------------------------------------------
# Config


def built(*options: Any) -> Callable[[Path], str]:
    """An attempt: build the model of a config."""
    return lambda folder: type(build_model(config(*options))).__name__


CONFIG = "Config value"
OURS, RETINANET = "MODEL.FOCAL_DET", "MODEL.RETINANET"
for key, value, loss, says in (
    (f"{RETINANET}.FOCAL_LOSS_GAMMA", -1.0, "FocalLoss", "gamma must be >= 0, got -1.0"),
    (f"{RETINANET}.FOCAL_LOSS_GAMMA", NAN, "FocalLoss", "gamma must be >= 0, got nan"),
    (f"{RETINANET}.FOCAL_LOSS_GAMMA", INF, "FocalLoss", "must be finite and >= 0, got inf"),
    (f"{RETINANET}.FOCAL_LOSS_ALPHA", 2.0, "FocalLoss", "alpha must be in [0, 1], got 2.0"),
    (f"{OURS}.BALANCED_CE.ALPHA", 1.5, "BalancedCrossEntropyLoss", "in [0, 1], got 1.5"),
    (f"{OURS}.FL_STAR.GAMMA", 0.0, "FocalLossStar", "gamma must be > 0, got 0.0"),
    (f"{OURS}.FL_STAR.BETA", INF, "FocalLossStar", "beta must be a finite number, got inf"),
    (f"{OURS}.HINGE.THRESHOLD", 1.5, "HingeLoss", "threshold must be in [0, 1], got 1.5"),
    (f"{OURS}.OHEM.BATCH_SIZE", 0, "OHEMLoss", "batch_size must be >= 1, got 0"),
    (f"{OURS}.OHEM.NMS_THRESH", 1.5, "OHEMLoss", "nms_thresh must be in [0, 1], got 1.5"),
    (f"{OURS}.OHEM.NEG_POS_RATIO", -1.0, "OHEMLoss", "neg_pos_ratio must be >= 0, got -1.0"),
):
    add(
        CONFIG,
        f"`{key} {value}`",
        built(f"{OURS}.LOSS.NAME", loss, key, value),
        key,
        says,
        raises=ValueError,
    )
for key, value, says in (
    (f"{OURS}.LOSS.NAME", "FocalLos", "'FocalLos', which is not one of: BalancedCrossEntropyLoss"),
    (f"{OURS}.NORMALIZER.NAME", "mean", "'mean', which is not one of: ema, batch, image"),
    (f"{OURS}.HEAD.NAME", "Head", "'Head', which is not one of: FocalRetinaNetHead"),
    (f"{OURS}.IMPL", "fast", "must be one of auto, eager, torch, triton, got 'fast'"),
    (f"{RETINANET}.NUM_CLASSES", 0, "must be >= 1, got 0"),
    (f"{RETINANET}.NUM_CONVS", 0, "must be >= 1, got 0"),
    (f"{RETINANET}.PRIOR_PROB", 0.0, "must be in (0, 1), got 0.0"),
    (
        f"{RETINANET}.NORM",
        "XN",
        "or a norm of Detectron2 (GN, BN, SyncBN, FrozenBN, ...), got 'XN'",
    ),
    (f"{RETINANET}.IN_FEATURES", ["p9"], "names p9, but the backbone build_slim_resnet_fpn"),
    (f"{RETINANET}.IN_FEATURES", [], "names nothing, but the backbone build_slim_resnet_fpn"),
    (f"{RETINANET}.IOU_THRESHOLDS", [0.5, 0.4], "is [0.5, 0.4] and MODEL.RETINANET.IOU_LABELS [0"),
    (
        f"{RETINANET}.IOU_LABELS",
        [0, 1],
        "must be in (0, 1] and rise, the labels one more than they",
    ),
    (f"{RETINANET}.IOU_LABELS", [0, -1, 2], "each of them -1, 0 or 1, with 1 for the highest"),
    (f"{RETINANET}.IOU_LABELS", [1, -1, 0], "with 1 for the highest overlaps, and for those al"),
    (f"{RETINANET}.IOU_LABELS", [0, 1, 0], "with 1 for the highest overlaps, and for those alone"),
    (f"{RETINANET}.IOU_LABELS", [1, 1, 1], "with 1 for the highest overlaps, and for those alone"),
    (f"{RETINANET}.IOU_THRESHOLDS", [40, 50], "the thresholds must be in (0, 1] and rise, the"),
    (f"{RETINANET}.IOU_THRESHOLDS", [0.4, NAN], "the thresholds must be in (0, 1] and rise, the"),
    (f"{RETINANET}.IOU_THRESHOLDS", ["a", 0.5], "the thresholds must be in (0, 1] and rise, the"),
    (f"{RETINANET}.BBOX_REG_WEIGHTS", (1.0, 1.0, 0.0, 1.0), "must be 4 numbers above 0, got (1.0"),
    (f"{RETINANET}.BBOX_REG_WEIGHTS", ("a", 1.0, 1.0, 1.0), "must be 4 numbers above 0, got ('a'"),
    (f"{RETINANET}.BBOX_REG_LOSS_TYPE", "iou", "one of smooth_l1, giou, diou, ciou, got 'iou'"),
    (f"{RETINANET}.SMOOTH_L1_LOSS_BETA", -1.0, "must be >= 0, got -1.0"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[32, 0]], "must be numbers above 0, one or more of each"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[]], "must be numbers above 0, one or more of each level"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [["32"]], "must be numbers above 0, one or more of each"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], 16, [32]], "must be numbers above 0, one or more of"),
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.0, 1.0]], "must be numbers above 0, one or mor"),
    ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0], "must be above 0, got [1.0, 0.0, 1.0]"),
    ("MODEL.RESNETS.DEPTH", 19, "must be one of 18, 34, got 19"),
    (f"{OURS}.LOSS.NAME", 3, "Type mismatch (<class 'str'> vs. <class 'int'>)"),
    (f"{OURS}.NORMALIZER.SYNC", "yes", "Type mismatch (<class 'bool'> vs. <class 'str'>)"),
    (f"{RETINANET}.FOCAL_LOSS_GAMMA", 2, "Type mismatch (<class 'float'> vs. <class 'int'>)"),
):
    add(CONFIG, f"`{key} {value}`", built(key, value), key, says, raises=ValueError)
add(
    CONFIG,
    "a key that does not exist",
    built(f"{OURS}.LOS.NAME", "FocalLoss"),
    f"Non-existent key: {OURS}.LOS.NAME",
    raises=AssertionError,
)
add(
    CONFIG,
    "`IMPL fast` with OHEMLoss",
    built(f"{OURS}.LOSS.NAME", "OHEMLoss", f"{OURS}.IMPL", "fast"),
    f"{OURS}.IMPL",
    "got 'fast'",
    raises=ValueError,
)


def without_our_keys(folder: Path) -> str:
    """Build our meta-architecture from a config that add_config never saw."""
    cfg = get_cfg()
    cfg.MODEL.pop("FOCAL_DET", None)
    cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
    return type(build_model(cfg)).__name__


add(
    CONFIG,
    "add_config was forgotten",
    without_our_keys,
    "the config has no MODEL.FOCAL_DET: call focal_det.add_config(cfg)",
    raises=ValueError,
)


def class_count(folder: Path) -> str:
    """Train with another number of classes than the data set has."""
    register_coco_instances("mine", {}, str(folder / "set.json"), str(folder))
    (folder / "set.json").write_text(json.dumps(clean_set()))
    cfg = config("DATASETS.TRAIN", ("mine",), "DATASETS.TEST", ())
    return type(DefaultTrainer.build_model(cfg)).__name__


add(
    CONFIG,
    "NUM_CLASSES of 10 for a set of 2 classes",
    class_count,
    "MODEL.RETINANET.NUM_CLASSES (in a LazyConfig: model.num_classes) is 10, but 'mine' "
    "(DATASETS.TRAIN) has 2 classes (cup, ant). It must be 2",
    raises=ValueError,
)
add(
    CONFIG,
    "`DATALOADER.ON_BAD_IMAGE ignore`",
    lambda folder: str(GuardedMapper(lambda record: record, "ignore")),
    "DATALOADER.ON_BAD_IMAGE) must be one of stop, skip, got 'ignore'",
    raises=ValueError,
)


def merged(text: str) -> Callable[[Path], str]:
    """An attempt: merge a config file of this text."""

    def attempt(folder: Path) -> str:
        cfg = get_cfg()
        focal_det.add_config(cfg)
        (folder / "a.yaml").write_text(text)
        cfg.merge_from_file(str(folder / "a.yaml"))
        return "merged"

    return attempt


for input, text, raises, says in (
    (
        "a file that names itself as `_BASE_`",
        "_BASE_: a.yaml",
        ValueError,
        "'DIR/a.yaml' is its own _BASE_: DIR/a.yaml -> DIR/a.yaml",
    ),
    (
        "a file with a tag of Python's",
        'OUTPUT_DIR: !!python/object/apply:os.system ["ls"]',
        UnsafeFileError,
        "'DIR/a.yaml' is refused: line 1 has the tag '!!python/object/apply:os.system'",
    ),
):
    add(CONFIG, input, merged(text), says, raises=raises)

# --------------------------------------------------------------------------------------------------
# Environment and command line


def from_environment(value: str) -> Callable[[Path], str]:
    """An attempt: FOCAL_DET_DATASETS with this value, ``DIR`` being the folder."""

    def attempt(folder: Path) -> str:
        register(folder, clean_set())
        os.environ["FOCAL_DET_DATASETS"] = value.replace("DIR", str(folder))
        register_from_env()
        return f"registered {sorted(DatasetCatalog.data)}"

    return attempt


ENVIRONMENT = "FOCAL_DET_DATASETS"
for value, says in (
    ("DIR/set.json", "expected 3 parts separated by ':', got 1"),
    ("x:DIR/set.json", "expected 3 parts separated by ':', got 2"),
    ("x:DIR/set.json:DIR:y", "got 4"),
    (":DIR/set.json:DIR", "the part 'name' is empty"),
    ("x::DIR", "the part 'annotations.json' is empty"),
    ("x:DIR/no.json:DIR", "annotations file not found: DIR/no.json"),
    ("x:DIR/set.json:DIR/no", "image directory not found: DIR/no"),
    ("x:DIR/set.json:DIR,x:DIR/set.json:DIR", "the name 'x' occurs twice"),
    ("mine:DIR/set.json:DIR/..", "a data set 'mine' exists already"),
):
    add(
        ENVIRONMENT,
        f"`{value}`",
        from_environment(value),
        "FOCAL_DET_DATASETS: entry ",
        says,
        "name:annotations.json:image_dir",
        raises=ValueError,
    )


def with_plugin(entry: str, content: str | None = None) -> Callable[[Path], str]:
    """An attempt: FOCAL_DET_PLUGINS with this entry, a file of this content if there is one."""

    def attempt(folder: Path) -> str:
        if content is not None:
            (folder / entry).write_text(content)
        os.environ["FOCAL_DET_PLUGINS"] = str(folder / entry) if ".py" in entry else entry
        focal_det.add_config(get_cfg())
        return "accepted"

    return attempt


PLUGIN = "FOCAL_DET_PLUGINS"
CLASS = "from focal_det.losses import *\n@LOSS_REGISTRY.register()\nclass {}:\n    {}\n"
for input, entry, content, says in (
    ("a file that is not there", "no.py", None, "DIR/no.py is not a file"),
    ("a module that is not there", "no_such_module", None, "No module named 'no_such_module'"),
    ("a file with a syntax error", "mine.py", "def f(:\n", "invalid syntax (mine.py, line 1)"),
    ("a file that imports what is not there", "mine.py", "import no_such", "No module named 'no_"),
    (
        "a loss of a name that is taken",
        "mine.py",
        CLASS.format("HingeLoss(FocalLoss)", "pass"),
        "An object named 'HingeLoss' was already registered",
    ),
):
    add(
        PLUGIN,
        input,
        with_plugin(entry, content),
        "FOCAL_DET_PLUGINS: ",
        says,
        raises=ImportError,
    )
add(
    PLUGIN,
    "a loss whose argument has no default",
    with_plugin("mine.py", CLASS.format("Mine(FocalLoss)", "def __init__(self, margin): ...")),
    "argument 'margin' of Mine needs a default that a config can hold",
    raises=TypeError,
)


def typed(name: str, *arguments: str) -> Callable[[Path], str]:
    """An attempt: a script of tools/ with arguments; what it prints to stderr."""

    def attempt(folder: Path) -> str:
        errors = io.StringIO()
        module = tool(name)
        run = getattr(module, "invoke_main", None) or module.main
        with contextlib.redirect_stderr(errors), mock.patch.object(sys, "argv", [name, *arguments]):
            try:
                run()
            except SystemExit as stopped:
                message = errors.getvalue().split("error: ")[-1].strip()
                return f"exit status {stopped.code}: {message}"
        return "accepted"

    return attempt


COMMAND = "Command line"
for name, arguments, says in (
    ("check_dataset", ["digits_cluter_val"], "near it are digits_clutter_val"),
    ("check_dataset", ["digits_clutter_val", "--jobs", "0"], "--jobs and --assign must be 1"),
    ("check_dataset", ["a", "--config-file", "lazy.py"], "not a LazyConfig, got 'lazy.py'"),
    ("train_net", ["--config-file", "no.yaml"], "--config-file must name a .yaml or .py file, got"),
    ("demo", ["--iters", "0"], "--iters must be a whole number of steps, 1 or more, got '0'"),
    ("demo", ["--losses", "FocalLos"], "'FocalLos', which is not one of"),
    ("benchmark_losses", ["--shapes", "8x8"], "--shapes must be HEIGHTxWIDTHxCLASSES, got 8x8"),
):
    add(
        COMMAND,
        f"`tools/{name}.py {' '.join(arguments)}`",
        typed(name, *arguments),
        "exit status 2: ",
        says,
    )

STEP = {
    "iteration": 7, "rank": 0, "world_size": 1, "precision": "float32", "loss_scale": 1.0,
    "ranks": [{"rank": 0, "term": "loss_cls", "value": "nan", "losses": ["loss_cls"],
               "image": None}],
}  # fmt: skip
"""As much of a report as tools/replay.py asks for before it builds the model."""


def replayed(*arguments: str, **files: str) -> Callable[[Path], str]:
    """An attempt: tools/replay.py on a kept step, of which some files have another text."""

    def attempt(folder: Path) -> str:
        (folder / "report.json").write_text(files.get("report", json.dumps(STEP)))
        (folder / "config.yaml").write_text(files.get("config", DIGITS.read_text()))
        torch.save([], folder / "batch.pt")
        torch.save({"model": {}}, folder / "model.pth")
        if "batch" in files:
            (folder / "batch.pt").write_text(files["batch"])
        return typed("replay", str(folder), *arguments)(folder)

    return attempt


REPLAY = "Kept step (`tools/replay.py`)"
for input, attempt, says in (
    (
        "half of report.json",
        replayed(report=json.dumps(STEP)[:50]),
        "DIR/report.json cannot be used: JSONDecodeError",
    ),
    (
        "the first bytes of batch.pt",
        replayed(batch="PK\x03\x04"),
        "DIR/batch.pt cannot be used: ValueError: 'DIR/batch.pt' cannot be read: it is damaged",
    ),
    ("an empty config.yaml", replayed(config=""), "DIR/config.yaml is empty: name the config of"),
    (
        "a loss that no plugin registers",
        replayed(config="MODEL: {META_ARCHITECTURE: FocalRetinaNet, FOCAL_DET: {LOSS: {NAME: A}}}"),
        "Parts of your own must be named by FOCAL_DET_PLUGINS",
    ),
    (
        "`--device cuda:99`",
        replayed("--device", "cuda:99"),
        "--device cuda:99 is not on this machine",
    ),
):
    add(REPLAY, input, attempt, "exit status 2: ", says)

DIGITS_AREA = "Embedded data set"
for input, attempt, raises, says in (
    (
        "an image_size of 31",
        lambda folder: str(DigitsClutterSpec(image_size=31)),
        ValueError,
        "image_size must be >= 32, got 31",
    ),
    (
        "a seed that is text",
        lambda folder: str(DigitsClutterSpec(seed="1")),
        TypeError,
        "seed",
    ),
    (
        "a folder that holds something else",
        lambda folder: (folder / "mine.txt").touch() or str(generate(DigitsClutterSpec(), folder)),
        FileExistsError,
        "DIR is not empty and has no manifest.json",
    ),
):
    add(DIGITS_AREA, input, attempt, says, raises=raises)

# --------------------------------------------------------------------------------------------------
# Checkpoints

CHECKPOINT = "Checkpoint"


class Payload:
    """What a crafted file would run: it makes the file DIR/ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def loaded(name: str, write: Callable[[Path], object]) -> Callable[[Path], str]:
    """An attempt: write a checkpoint of this name and load it."""

    def attempt(folder: Path) -> str:
        write(folder / name)
        try:
            return str(Checkpointer(torch.nn.Linear(4, 2)).load(str(folder / name)))
        finally:
            assert not (folder / "ran").exists(), "the payload was run"

    return attempt


def half_of_one(path: Path) -> None:
    """A checkpoint whose second half is missing."""
    torch.save({"model": {"weight": torch.zeros(100)}}, path)
    cut_in_half(path)


for input, name, write, raises, says in (
    ("not there", "no.pth", lambda path: None, AssertionError, "DIR/no.pth not found"),
    ("empty", "a.pth", Path.touch, ValueError, "'DIR/a.pth' cannot be read: it is damaged"),
    ("its first half", "a.pth", half_of_one, ValueError, "'DIR/a.pth' cannot be read"),
    (
        "text in place of a .pkl",
        "a.pkl",
        lambda path: path.write_text("no"),
        ValueError,
        "'DIR/a.pkl' cannot be read: it is damaged or of another format",
    ),
    (
        "a .pkl with a list",
        "a.pkl",
        lambda path: path.write_bytes(pickle.dumps([1, 2])),
        ValueError,
        "'DIR/a.pkl' is no checkpoint: it holds a list",
    ),
    (
        "a .pth whose model is a list",
        "a.pth",
        lambda path: torch.save({"model": [1, 2]}, path),
        ValueError,
        "'DIR/a.pth' is no checkpoint: its 'model' is a list",
    ),
    (
        "a .pkl whose blobs are a list",
        "a.pkl",
        lambda path: path.write_bytes(pickle.dumps({"blobs": [1, 2]})),
        ValueError,
        "'DIR/a.pkl' is no checkpoint: its 'blobs' is a list",
    ),
    (
        "a .pkl that runs a program",
        "a.pkl",
        lambda path: path.write_bytes(pickle.dumps({"model": Payload(path.parent / "ran")})),
        UnsafeFileError,
        "'DIR/a.pkl' is refused: it contains ",
    ),
    (
        "a .pth that runs a program",
        "a.pth",
        lambda path: torch.save({"model": Payload(path.parent / "ran")}, path),
        UnsafeFileError,
        "'DIR/a.pth' is refused: it contains ",
    ),
):
    add(CHECKPOINT, input, loaded(name, write), says, raises=raises)


for input, content in (
    ("a .pth with arrays", {"model": {"weight": np.zeros((2, 4), np.float32)}}),
    ("a .pth with a training's arguments", {"state_dict": {}, "args": argparse.Namespace()}),
):
    add(
        CHECKPOINT,
        input,
        loaded("a.pth", lambda path, content=content: torch.save(content, path)),
        "'DIR/a.pth' is refused: it contains ",
        "python -m focal_det.safe_loading.convert DIR/a.pth OUT.pth --trust",
        raises=UnsafeFileError,
    )


def converted(folder: Path) -> str:
    """The command that converts, typed without saying that the author is trusted."""
    path = folder / "a.pkl"
    path.write_bytes(pickle.dumps({"model": Payload(folder / "ran")}))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            convert.main([str(path), str(folder / "OUT.pth")])
    except SystemExit as stopped:
        assert not (folder / "ran").exists(), "the payload was run"
        return f"exit status {stopped.code}: {errors.getvalue().split('error: ')[-1].strip()}"
    return "converted"


add(
    CHECKPOINT,
    "converted without `--trust`",
    converted,
    "exit status 2: ",
    "'DIR/a.pkl' would be executed, with all that its author put into it: add --trust",
)


def other_shape(folder: Path) -> str:
    """Weights of 3 classes into a layer of 2; what is kept and what is said."""
    torch.save({"model": torch.nn.Linear(4, 3).state_dict()}, folder / "a.pth")
    model = torch.nn.Linear(4, 2)
    before = model.weight.clone()
    checkpointer = Checkpointer(model)
    with mock.patch.object(checkpointer.logger, "warning") as warning:
        checkpointer.load(str(folder / "a.pth"))
    assert torch.equal(model.weight, before)
    return "loads, with a warning: " + " ".join(str(warning.call_args_list[0].args[0]).split())


add(
    CHECKPOINT,
    "of another number of classes",
    other_shape,
    "Skip loading parameter 'weight' to the model due to incompatible shapes: (3, 4) in the "
    "checkpoint but (2, 4) in the model!",
)


if __name__ == "__main__":
    OUTCOMES.write_text(json.dumps(records(), indent=1) + "\n", encoding="utf-8")
    print(f"Written: {OUTCOMES}")
