"""The guard names, counts or passes, whatever mapper it wraps and wherever that runs."""

import copy
import logging
import math
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tempfile

import cloudpickle
import pytest
import torch
from detectron2.data import DatasetMapper, MapDataset
from detectron2.data.common import DatasetFromList
from detectron2.data.transforms import RandomCrop
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torch.utils.data import DataLoader

from focal_det.data.guarded import BadImageError, BadLabelError, GuardedMapper

NAN, INF = math.nan, math.inf


def make_mapper(is_train=True, augmentations=()):
    return DatasetMapper(is_train, augmentations=list(augmentations), image_format="BGR")


@pytest.fixture
def records(tmp_path):
    """Six images of 48 x 32 with an object each; the files of 1 and 4 are broken."""
    made = []
    for index in range(6):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (48, 32)).save(path)
        box = {"bbox": [1, 2, 10, 8], "bbox_mode": BoxMode.XYWH_ABS, "category_id": index % 3}
        made.append(
            {
                "file_name": str(path),
                "image_id": 100 + index,
                "height": 32,
                "width": 48,
                "annotations": [box],
            }
        )
    (tmp_path / "1.png").write_text("no image")
    (tmp_path / "4.png").unlink()
    return made


@pytest.fixture
def log(caplog, monkeypatch):
    # A Detectron2 script that ran in this process may have cut propagation.
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    caplog.set_level(logging.INFO, logger="detectron2.focal_det")

    def lines():
        return [x.getMessage() for x in caplog.records if "focal_det" in x.name]

    return lines


def wrong(record, **fields):
    """The record with fields of its object changed."""
    changed = copy.deepcopy(record)
    changed["annotations"][0].update(fields)
    return changed


# --------------------------------------------------------------------------------------------------
# Stop


def test_good_images_are_what_the_mapper_makes_of_them(records):
    plain, guarded = make_mapper(), GuardedMapper(make_mapper(), num_classes=3)
    expected, sample = plain(records[0]), guarded(records[0])
    assert expected.keys() == sample.keys()
    assert torch.equal(expected["image"], sample["image"])
    assert torch.equal(expected["instances"].gt_boxes.tensor, sample["instances"].gt_boxes.tensor)
    assert guarded.skipped == {}


def test_a_bad_image_is_named_by_file_and_id_and_chained_to_its_cause(records):
    guarded = GuardedMapper(make_mapper())
    with pytest.raises(BadImageError) as error:
        guarded(records[1])
    assert str(error.value).startswith(
        f"image {records[1]['file_name']!r} (image_id 101) cannot be used: UnidentifiedImageError: "
    )
    assert "DATALOADER.ON_BAD_IMAGE to 'skip'" in str(error.value)
    assert type(error.value.__cause__).__name__ == "UnidentifiedImageError"
    with pytest.raises(BadImageError, match="FileNotFoundError") as error:
        guarded(records[4])
    assert isinstance(error.value.__cause__, FileNotFoundError)
    assert guarded.skipped == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bbox": [NAN, 2, 3, 4]}, "bbox [nan, 2, 3, 4] holds a number that is not finite"),
        ({"bbox": [1, 2, INF, 4]}, "bbox [1, 2, inf, 4] holds a number that is not finite"),
        ({"bbox": [9, 2, -3, 4]}, "bbox [9, 2, -3, 4] has a negative width or height"),
        ({"category_id": 3}, "category_id is 3, allowed is 0..2"),
        ({"category_id": -1}, "category_id is -1, allowed is 0..2"),
    ],
)
def test_labels_that_detectron2_takes_drops_or_clips_without_a_word(records, fields, message):
    record = wrong(records[0], **fields)
    make_mapper()(record)
    with pytest.raises(BadImageError) as error:
        GuardedMapper(make_mapper(), num_classes=3)(record)
    assert f"annotation #0: {message}" in str(error.value)
    assert "(image_id 100)" in str(error.value)
    assert isinstance(error.value.__cause__, BadLabelError)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"bbox": [1, 2, 3]}, AssertionError),
        ({"bbox_mode": BoxMode.XYWH_REL}, AssertionError),
        ({"bbox": "none"}, Exception),
        ({"category_id": None}, TypeError),
    ],
)
def test_labels_that_detectron2_fails_on_get_the_name_of_the_image(records, fields, cause):
    with pytest.raises(BadImageError, match="image_id 100") as error:
        GuardedMapper(make_mapper())(wrong(records[0], **fields))
    assert isinstance(error.value.__cause__, cause)


def test_sizes_that_disagree_get_the_name_of_the_image(records):
    with pytest.raises(BadImageError, match=r"image_id 100.*SizeMismatchError.*\(48, 32\)"):
        GuardedMapper(make_mapper())({**records[0], "width": 32})


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"bbox": [1, 2, 0, 4]}, 0),  # in COCO; left out by Detectron2
        ({"bbox": [60, 2, 5, 4]}, 0),
        ({"bbox": [-5, 2, 9, 4]}, 1),
        ({"bbox": [NAN, 2, 3, 4], "iscrowd": 1}, 0),
    ],
)
def test_what_training_leaves_out_anyhow_is_no_reason_to_stop(records, fields, left):
    sample = GuardedMapper(make_mapper(), num_classes=3)(wrong(records[0], **fields))
    assert len(sample["instances"]) == left


def test_without_num_classes_only_what_is_no_class_is_wrong(records):
    guarded = GuardedMapper(make_mapper())
    assert len(guarded(wrong(records[0], category_id=999))["instances"]) == 1
    for wrong_class in (-1, 10**6):
        says = f"category_id is {wrong_class}, allowed is 0..999999"
        with pytest.raises(BadImageError, match=re.escape(says)):
            guarded(wrong(records[0], category_id=wrong_class))


def test_labels_do_not_matter_for_inference(records):
    record = wrong(records[0], bbox=[NAN, 2, -3, 4], category_id=77)
    assert "image" in GuardedMapper(make_mapper(is_train=False), num_classes=3)(record)


def test_no_labels_and_crops_without_objects_are_fine(records):
    guarded = GuardedMapper(make_mapper(augmentations=[RandomCrop("absolute", (4, 4))]))
    for _ in range(20):
        guarded(records[0])
    assert len(guarded({**records[0], "annotations": []})["instances"]) == 0
    without = dict(records[0])
    del without["annotations"]
    assert "image" in guarded(without)


def from_mapper(boxes, classes=(0,)):
    def mapper(record):
        instances = Instances((32, 48))
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.gt_classes = torch.tensor(classes)
        return {"image": torch.zeros(3, 32, 48), "instances": instances}

    return mapper


@pytest.mark.parametrize(
    ("boxes", "classes", "message"),
    [
        ([[1, 2, NAN, 4]], [0], "a box that is not finite or has no area: [1.0, 2.0, nan, 4.0]"),
        ([[1, 2, 3, 4], [1, 2, INF, 4]], [0, 0], "has no area: [1.0, 2.0, inf, 4.0]"),
        ([[1, 2, 1, 4]], [0], "has no area: [1.0, 2.0, 1.0, 4.0]"),
        ([[5, 2, 3, 4]], [0], "has no area: [5.0, 2.0, 3.0, 4.0]"),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], [2, 3], "the mapper gives the class 3, allowed is 0..2"),
        ([[1, 2, 3, 4]], [-1], "the mapper gives the class -1, allowed is 0..2"),
    ],
)
def test_what_comes_out_of_a_mapper_is_looked_at_too(records, boxes, classes, message):
    with pytest.raises(BadImageError) as error:
        GuardedMapper(from_mapper(boxes, classes), num_classes=3)(records[0])
    assert message in str(error.value)


def test_a_negative_class_is_none_however_many_there_are(records):
    with pytest.raises(BadImageError, match=r"gives the class -1, allowed is 0\.\."):
        GuardedMapper(from_mapper([[1, 2, 3, 4]], [-1]))(records[0])


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_of_a_mapper_of_ones_own_only_what_it_gives_out_counts(records, policy):
    """It may number the classes anew and leave out objects that it cannot use."""

    class Own(DatasetMapper):
        def __call__(self, record):
            record = copy.deepcopy(record)
            usable = [x for x in record["annotations"] if x["bbox"][2] > 0]
            record["annotations"] = [{**x, "category_id": x["category_id"] - 17} for x in usable]
            return super().__call__(record)

    inner = Own(True, augmentations=[], image_format="BGR")
    record = wrong(records[0], category_id=18)
    record["annotations"].append({**record["annotations"][0], "bbox": [9, 2, -3, 4]})
    for mapper in (inner, lambda record: inner(record)):
        guarded = GuardedMapper(mapper, policy, num_classes=2)
        assert guarded(record)["instances"].gt_classes.tolist() == [1]
        assert guarded.skipped == {}


def test_mappers_that_take_the_annotations_out_of_the_record(records):
    def mapper(record):
        record.pop("annotations")
        return from_mapper([[1, 2, 3, NAN]])(record)

    with pytest.raises(BadImageError, match="gives a box that is not finite"):
        GuardedMapper(mapper)(records[0])


@pytest.mark.parametrize("sample", [None, (1, 2), {"image": 1}])
def test_samples_of_other_forms_are_passed_on(records, sample):
    for policy in ("stop", "skip"):
        guarded = GuardedMapper(lambda record: sample, policy)
        assert guarded(records[0]) is sample
        assert guarded.skipped == {}


@pytest.mark.parametrize("policy", ["ignore", "Stop", "", None])
def test_another_policy_is_refused(policy):
    with pytest.raises(ValueError, match=r"ON_BAD_IMAGE\) must be one of stop, skip, got") as error:
        GuardedMapper(make_mapper(), policy)
    assert repr(policy) in str(error.value)


def test_another_limit_is_refused():
    with pytest.raises(ValueError, match="max_in_a_row must be >= 1, got 0"):
        GuardedMapper(make_mapper(), "skip", max_in_a_row=0)


def test_an_interrupt_is_no_bad_image(records):
    def mapper(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GuardedMapper(mapper, "skip")(records[0])


# --------------------------------------------------------------------------------------------------
# Skip and count


def test_skipped_images_are_counted_and_the_first_of_each_kind_is_named(records, log):
    guarded = GuardedMapper(make_mapper(), "skip", num_classes=3)
    bad = [records[1], records[4], wrong(records[0], bbox=[9, 2, -3, 4])]
    for record in (*bad, records[0], *bad, records[2], bad[0]):
        sample = guarded(record)
        assert (sample is None) == (record in bad)
    assert guarded.skipped == {
        "UnidentifiedImageError": 3,
        "FileNotFoundError": 2,
        "BadLabelError": 2,
    }
    lines = log()
    assert len(lines) == 3
    for line, record, kind in zip(
        lines, bad, ("UnidentifiedImageError", "FileNotFoundError", "BadLabelError"), strict=True
    ):
        assert line.startswith(f"skipped: image {record['file_name']!r} (image_id")
        assert line.endswith(f"This is the first {kind}; further ones are only counted")


def test_images_that_all_fail_are_not_skipped_for_ever(records):
    guarded = GuardedMapper(make_mapper(), "skip", max_in_a_row=3)
    for _ in range(2):
        assert guarded(records[1]) is guarded(records[4]) is None
        assert guarded(records[0]) is not None  # the row begins anew
    assert guarded(records[1]) is guarded(records[1]) is None
    with pytest.raises(BadImageError, match=r"3 images in a row were skipped.*4\.png") as error:
        guarded(records[4])
    assert isinstance(error.value.__cause__, FileNotFoundError)


def test_detectron2s_loader_draws_another_image(records):
    guarded = GuardedMapper(make_mapper(), "skip")
    dataset = MapDataset(DatasetFromList(records), guarded)
    ids = [dataset[index]["image_id"] for index in range(6)]
    assert [ids[i] for i in (0, 2, 3, 5)] == [100, 102, 103, 105]
    assert set(ids) <= {100, 102, 103, 105}
    assert sum(guarded.skipped.values()) >= 2


def read_all(records, guarded, method):
    """The ids that two data workers of this kind give."""
    dataset = MapDataset(DatasetFromList(records * 4), guarded)
    loader = DataLoader(dataset, num_workers=2, multiprocessing_context=method, collate_fn=list)
    return [batch[0]["image_id"] for batch in loader]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_data_workers_skip_is_counted_in_the_main_process(records, method, capfd):
    guarded = GuardedMapper(make_mapper(), "skip")
    ids = read_all(records, guarded, method)
    assert len(ids) == 24
    assert not {101, 104} & set(ids)
    # Each broken image is tried by whoever it falls to; drawing another may hit one again.
    counts = guarded.skipped
    assert counts.keys() == {"UnidentifiedImageError", "FileNotFoundError"}
    assert min(counts.values()) >= 4
    # And the first of a kind is the first of all workers.
    output = capfd.readouterr()
    assert (output.out + output.err).count("This is the first") <= 2


def test_a_worker_that_stops_names_the_image_in_the_main_process(records):
    with pytest.raises(BadImageError) as error:
        read_all(records, GuardedMapper(make_mapper()), "fork")
    assert f"image {records[1]['file_name']!r} (image_id 101) cannot be used" in str(error.value)
    assert "UnidentifiedImageError" in str(error.value)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, "pickle", "cloudpickle"])
def test_copies_count_together(records, copied):
    guarded = GuardedMapper(make_mapper(), "skip")
    if isinstance(copied, str):
        module = {"pickle": pickle, "cloudpickle": cloudpickle}[copied]
        other = module.loads(module.dumps(guarded))
    else:
        other = copied(guarded)
    guarded(records[1])
    other(records[1])
    other(records[4])
    assert guarded.skipped == other.skipped == {"UnidentifiedImageError": 2, "FileNotFoundError": 1}
    assert GuardedMapper(make_mapper(), "skip").skipped == {}


def count_many(guarded, record):
    for _ in range(300):
        guarded(record)


def test_no_count_is_lost_between_processes(records):
    guarded = GuardedMapper(make_mapper(), "skip", max_in_a_row=1000)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_many, args=(guarded, records[4])) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert guarded.skipped == {"FileNotFoundError": 1200}


def test_nothing_is_left_behind(tmp_path):
    """The folder of the counts goes with the process that made it, not with a worker."""
    script = f"""
import os, sys
from focal_det.data.guarded import GuardedMapper
guarded = GuardedMapper(lambda record: 1 / 0, "skip")
if os.fork() == 0:
    guarded({{"file_name": "a"}})
    sys.exit(0)
os.wait()
print(guarded.skipped, len(os.listdir({str(tmp_path)!r})))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "{'ZeroDivisionError': 1} 1", done.stderr
    assert os.listdir(tmp_path) == []


def test_as_long_as_nothing_is_skipped_there_is_no_folder(tmp_path, monkeypatch, records):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for policy in ("stop", "skip"):
        guarded = GuardedMapper(make_mapper(), policy)
        guarded(records[0])
        assert guarded.skipped == {}
    with pytest.raises(BadImageError):
        GuardedMapper(make_mapper())(records[1])
    assert not (tmp_path / "temporary").exists()
    guarded(records[1])
    (folder,) = (tmp_path / "temporary").iterdir()
    assert folder.name.startswith("focal_det_skipped_")
    assert folder.stat().st_mode & 0o077 == 0
