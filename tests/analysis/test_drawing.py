"""Curves and pictures with boxes."""

import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from focal_det.analysis import drawing

BOX = {"category_id": 1, "bbox": [20, 30, 40, 25]}
NAMES = {1: "seven"}


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def distance_to(data, color):
    """Least colour distance to `color`, over the pixels."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return np.abs(pixels_of(data) - wanted).max(axis=-1).min()


@pytest.fixture
def gray():
    return np.full((90, 120, 3), 128, np.uint8)


def test_objects_are_drawn_where_they_are(gray):
    image = pixels_of(drawing.draw_objects(gray, [BOX], NAMES))
    scale = drawing.PICTURE_SIDE / 90
    assert image.shape == (drawing.PICTURE_SIDE, round(120 * scale), 3)
    changed = np.abs(image - 128).max(axis=-1) > 60
    rows, columns = np.nonzero(changed)
    assert abs(columns.min() - 20 * scale) < 4
    assert abs(columns.max() - 60 * scale) < 4
    assert abs(rows.max() - 55 * scale) < 4
    # The label is above the box, the inside is left as it was.
    assert rows.min() < 30 * scale - 10
    assert not changed[int(34 * scale) : int(51 * scale), int(24 * scale) : int(56 * scale)].any()


def test_an_image_without_boxes_is_only_enlarged(gray):
    image = pixels_of(drawing.draw_objects(gray, [], NAMES))
    assert np.abs(image - 128).max() <= 2


@pytest.mark.parametrize(
    ("kind", "color"),
    [("right", drawing.RIGHT[0]), ("wrong", drawing.WRONG[0]), ("missed", drawing.MISSED[0])],
)
def test_verdicts_have_colours_of_their_own(gray, kind, color):
    verdict = {"right": [], "wrong": [], "missed": []}
    verdict[kind] = [{**BOX, "score": 0.5}]
    data = drawing.draw_verdict(gray, verdict, NAMES)
    assert distance_to(data, color) < 40
    for other in {drawing.RIGHT[0], drawing.WRONG[0]} - {color}:
        assert distance_to(data, other) > 60


def test_large_images_are_not_shrunk():
    large = np.full((400, 500, 3), 128, np.uint8)
    assert pixels_of(drawing.draw_objects(large, [BOX], NAMES)).shape == (400, 500, 3)


def chart(values, **options):
    lines = [("FocalLoss", drawing.STYLES[3], [20, 40], values)]
    return drawing.line_chart(lines, title="Loss", unit="loss", **options)


@pytest.mark.parametrize("values", [[1.0, 0.1], [None, 0.5], [0.0, 0.0], [None, None]])
@pytest.mark.parametrize("options", [{"log": True}, {"top": 100.0}])
def test_charts_are_svg(values, options):
    assert ET.fromstring(chart(values, **options)).tag.endswith("svg")


def test_equal_curves_give_equal_bytes():
    assert chart([1.0, 0.5]) == chart([1.0, 0.5])
    assert chart([1.0, 0.5]) != chart([1.0, 0.6])


def test_losses_differ_in_colour_and_in_line():
    for part in (0, 1):
        assert len({style[part] for style in drawing.STYLES}) == len(drawing.STYLES)
