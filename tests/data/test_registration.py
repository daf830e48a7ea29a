"""Data sets named in the environment and the embedded one exist in every process."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets import register_coco_instances

from focal_det.data import (
    DigitsClutterSpec,
    dataset_classes,
    generate,
    register_all,
    register_digits_clutter,
    register_from_env,
    registration,
)
from focal_det.data.digits_clutter import CLASS_NAMES, EMBEDDED

TINY = DigitsClutterSpec(train_images=3, val_images=2, image_size=48, max_digit_size=30)


@pytest.fixture(autouse=True)
def _own_catalogs() -> Iterator[None]:
    """Each test starts without our sets; afterwards the catalogs are what they were."""
    data, metadata = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    for name in EMBEDDED:
        for split in ("train", "val"):
            DatasetCatalog.data.pop(f"{name}_{split}", None)
            MetadataCatalog.data.pop(f"{name}_{split}", None)
    yield
    DatasetCatalog.data = data
    MetadataCatalog.data = metadata


@pytest.fixture
def coco(tmp_path: Path) -> tuple[str, str]:
    """An annotations file with unsorted category ids that have gaps, and an image directory."""
    (tmp_path / "images").mkdir()
    categories = [{"id": 7, "name": "cup"}, {"id": 2, "name": "ant"}, {"id": 30, "name": "bee"}]
    images = [{"id": 1, "file_name": "a.png", "height": 8, "width": 8}]
    annotations = [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 1, 4, 4], "area": 16}]
    for annotation in annotations:
        annotation["iscrowd"] = 0
    content = {"categories": categories, "images": images, "annotations": annotations}
    (tmp_path / "a.json").write_text(json.dumps(content))
    return str(tmp_path / "a.json"), str(tmp_path / "images")


# --------------------------------------------------------------------------------------------------
# FOCAL_DET_DATASETS


def test_entries_are_registered_for_loading_and_evaluation(coco: tuple[str, str]) -> None:
    json_file, images = coco
    register_from_env(f" one : {json_file} : {images} ,\n two:{json_file}:{images}, ")
    for name in ("one", "two"):
        metadata = MetadataCatalog.get(name)
        assert metadata.evaluator_type == "coco"
        assert (metadata.json_file, metadata.image_root) == (json_file, images)
        (record,) = DatasetCatalog.get(name)
        assert record["file_name"] == os.path.join(images, "a.png")
        assert record["annotations"][0]["category_id"] == 1  # "cup" is the second of ids 2, 7, 30


def test_value_is_taken_from_the_environment(
    coco: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOCAL_DET_DATASETS", "from_env:{}:{}".format(*coco))
    register_from_env()
    assert "from_env" in DatasetCatalog


@pytest.mark.parametrize("value", ["", "  ", ",", None])
def test_nothing_named_registers_nothing(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FOCAL_DET_DATASETS", raising=False)
    before = DatasetCatalog.list()
    register_from_env(value)
    assert DatasetCatalog.list() == before


def test_the_same_definition_again_is_fine(
    coco: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    json_file, images = coco
    register_from_env(f"mine:{json_file}:{images}")
    monkeypatch.chdir(os.path.dirname(json_file))
    register_from_env("mine:./a.json:images/")  # the same paths, spelt otherwise
    register_coco_instances("by_hand", {}, json_file, images)
    register_from_env(f"by_hand:{json_file}:{images}")


def test_relative_paths_survive_a_change_of_directory(
    coco: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(os.path.dirname(coco[0]))
    register_from_env("mine:a.json:images")
    monkeypatch.chdir(tmp_path.parent)
    assert len(DatasetCatalog.get("mine")) == 1


def test_annotations_are_not_parsed_at_registration(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{ this is not JSON")
    register_from_env(f"lazy:{tmp_path / 'bad.json'}:{tmp_path}")
    assert "lazy" in DatasetCatalog


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("bad:{json}", "3 parts separated by ':', got 2"),
        ("bad:{json}:{images}:more", "got 4"),
        (":{json}:{images}", "the part 'name' is empty"),
        ("bad: :{images}", "the part 'annotations.json' is empty"),
        ("bad:{json}:", "the part 'image_dir' is empty"),
        ("bad:{images}/none.json:{images}", "annotations file not found: "),
        ("bad:{images}:{images}", "annotations file not found: "),
        ("bad:{json}:{images}/none", "image directory not found: "),
        ("bad:{json}:{json}", "image directory not found: "),
        ("good:{json}:{images}", "the name 'good' occurs twice"),
        ("coco_2017_train:{json}:{images}", "'coco_2017_train' exists already"),
        ("digits_clutter_val:{json}:{images}", "'digits_clutter_val' exists already"),
    ],
)
def test_a_bad_entry_is_quoted_with_the_form_and_nothing_is_registered(
    entry: str, problem: str, coco: tuple[str, str]
) -> None:
    register_digits_clutter()
    json_file, images = coco
    entry = entry.format(json=json_file, images=images)
    before = DatasetCatalog.list()
    with pytest.raises(ValueError, match="FOCAL_DET_DATASETS") as error:
        register_from_env(f"good:{json_file}:{images},{entry}")
    for part in (repr(entry), problem, "name:annotations.json:image_dir"):
        assert part in str(error.value)
    assert DatasetCatalog.list() == before


def test_another_definition_of_a_taken_name_is_an_error(
    coco: tuple[str, str], tmp_path: Path
) -> None:
    json_file, images = coco
    register_from_env(f"mine:{json_file}:{images}")
    with pytest.raises(ValueError, match="'mine' exists already") as error:
        register_from_env(f"mine:{json_file}:{tmp_path}")
    assert images in str(error.value)


# --------------------------------------------------------------------------------------------------
# The embedded data set


def test_metadata_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all()
    register_all()
    assert sorted(EMBEDDED) == ["digits_clutter", "digits_crowded", "digits_rare", "digits_sparse"]
    for name, split in itertools.product(EMBEDDED, ("train", "val")):
        metadata = MetadataCatalog.get(f"{name}_{split}")
        assert metadata.thing_classes == list(CLASS_NAMES)
        assert metadata.evaluator_type == "coco"
        assert metadata.json_file == str(tmp_path / name / f"{split}.json")
        assert metadata.image_root == str(tmp_path / name / "images" / split)
    assert list(tmp_path.iterdir()) == []


def test_first_use_generates_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registration.EMBEDDED, "digits_clutter", TINY)
    root = tmp_path / "new" / "digits"
    register_digits_clutter(root)
    records = DatasetCatalog.get("digits_clutter_train")
    assert len(records) == TINY.train_images
    assert len(DatasetCatalog.get("digits_clutter_val")) == TINY.val_images
    content = json.loads((root / "train.json").read_text())
    boxes = [a["bbox"] for a in content["annotations"]]
    assert [a["bbox"] for r in records for a in r["annotations"]] == boxes
    classes = [a["category_id"] - 1 for a in content["annotations"]]
    assert [a["category_id"] for r in records for a in r["annotations"]] == classes

    cfg = get_cfg()
    cfg.DATALOADER.NUM_WORKERS = 0
    loader = build_detection_test_loader(cfg, "digits_clutter_val")
    assert [tuple(batch[0]["image"].shape[-2:]) for batch in loader] == [(800, 800)] * 2


def test_each_name_stands_for_its_own_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registration.EMBEDDED, "digits_rare", TINY)
    register_digits_clutter(tmp_path / "rare", "digits_rare")
    assert len(DatasetCatalog.get("digits_rare_train")) == TINY.train_images
    assert DatasetCatalog.list().count("digits_clutter_train") == 0
    with pytest.raises(KeyError, match="digits_sparse, digits_rare, got 'digits'"):
        register_digits_clutter(name="digits")


def test_a_set_made_with_other_knobs_is_not_used(tmp_path: Path) -> None:
    generate(TINY, tmp_path / "digits")
    register_digits_clutter(tmp_path / "digits")
    with pytest.raises(FileExistsError, match="image_size 48"):
        DatasetCatalog.get("digits_clutter_val")


def test_another_root_is_refused(tmp_path: Path) -> None:
    register_digits_clutter(tmp_path / "a")
    register_digits_clutter(tmp_path / "a")
    register_digits_clutter()
    with pytest.raises(ValueError, match="DETECTRON2_DATASETS") as error:
        register_digits_clutter(tmp_path / "b")
    assert str(tmp_path / "a") in str(error.value)


# --------------------------------------------------------------------------------------------------
# Class names


def test_classes_of_a_set_before_it_is_loaded(coco: tuple[str, str]) -> None:
    register_from_env("unread:{}:{}".format(*coco))
    assert dataset_classes("unread") == ["ant", "cup", "bee"]
    assert "thing_classes" not in MetadataCatalog.get("unread").as_dict()
    DatasetCatalog.get("unread")
    assert MetadataCatalog.get("unread").thing_classes == ["ant", "cup", "bee"]


def test_classes_from_metadata() -> None:
    register_digits_clutter()
    assert dataset_classes("digits_clutter_train") == list(CLASS_NAMES)
    coco_classes = dataset_classes("coco_2017_val")
    assert coco_classes is not None
    assert len(coco_classes) == 80


@pytest.mark.parametrize("content", ["{ no JSON", "[]", "{}", '{"categories": [{"id": 1}]}'])
def test_classes_of_a_broken_file_are_unknown(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    register_from_env(f"broken:{tmp_path / 'a.json'}:{tmp_path}")
    assert dataset_classes("broken") is None
    with pytest.raises(ValueError, match=r"'broken': .*a\.json cannot be read as COCO annotations"):
        DatasetCatalog.get("broken")


def test_classes_of_an_unknown_set_are_unknown() -> None:
    assert dataset_classes("no_such_set") is None
    assert "no_such_set" not in MetadataCatalog
    MetadataCatalog.get("only_metadata").evaluator_type = "coco"
    assert dataset_classes("only_metadata") is None


# --------------------------------------------------------------------------------------------------
# Other processes


def test_registration_while_detectron2_is_being_imported(
    coco: tuple[str, str], tmp_path: Path
) -> None:
    """As through DETECTRON2_ENV_MODULE: Detectron2 runs the hook from within its own import."""
    hook = tmp_path / "hook.py"
    hook.write_text(
        "def setup_environment():\n    import focal_det.data\n    focal_det.data.register_all()\n"
    )
    script = (
        "import detectron2\n"
        "from detectron2.data import DatasetCatalog\n"
        "print(len(DatasetCatalog.get('from_env')), 'digits_clutter_train' in DatasetCatalog)\n"
    )
    env = {
        **os.environ,
        "DETECTRON2_ENV_MODULE": str(hook),
        "FOCAL_DET_DATASETS": "from_env:{}:{}".format(*coco),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "True"]
