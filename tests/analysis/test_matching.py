"""Which detections are right, in numbers worked out by hand."""

import numpy as np
import pytest

from focal_det.analysis.matching import box_iou, judge, match, operating_point, spread_by_count


def thing(bbox, category_id=1, image_id=1):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox}


def detection(bbox, score, category_id=1, image_id=1):
    return {**thing(bbox, category_id, image_id), "score": score}


def test_iou_of_shifted_squares():
    # 10 x 10 squares, one 5 to the right: overlap 50 of 100 + 100 - 50.
    iou = box_iou([[0, 0, 10, 10]], [[5, 0, 10, 10], [0, 0, 10, 10], [10, 0, 10, 10]])
    np.testing.assert_allclose(iou, [[1 / 3, 1.0, 0.0]])


def test_iou_of_empty_boxes_and_of_no_boxes():
    assert box_iou([[3, 3, 0, 0]], [[3, 3, 0, 0]]).tolist() == [[0.0]]
    assert box_iou([[0, 0, 1, 1]], []).shape == (1, 0)


def test_an_object_is_found_once_by_the_highest_score():
    objects = [thing([0, 0, 10, 10])]
    detections = [detection([0, 0, 10, 9], 0.3), detection([0, 0, 10, 8], 0.9)]
    assert match(detections, objects) == [None, 0]


def test_the_better_overlap_decides_between_free_objects():
    objects = [thing([0, 0, 10, 10]), thing([2, 0, 10, 10])]
    detections = [detection([2, 0, 10, 10], 0.9), detection([1, 0, 10, 10], 0.8)]
    assert match(detections, objects) == [1, 0]


@pytest.mark.parametrize("other", [{"category_id": 2}, {"image_id": 2}])
def test_class_and_image_must_agree(other):
    assert match([detection([0, 0, 10, 10], 0.9)], [thing([0, 0, 10, 10], **other)]) == [None]


@pytest.mark.parametrize(("height", "expected"), [(5.0, 0), (4.9, None)])
def test_an_overlap_of_half_is_enough(height, expected):
    assert match([detection([0, 0, 10, height], 0.9)], [thing([0, 0, 10, 10])]) == [expected]


def test_operating_point_is_where_f1_is_highest():
    objects = [thing([20 * i, 0, 10, 10]) for i in range(4)]
    detections = [
        detection([0, 0, 10, 10], 0.6),  # right: F1 = 2*1/(1+4) = 0.4
        detection([0, 50, 10, 10], 0.5),  # wrong: 2*1/(2+4)
        detection([20, 0, 10, 10], 0.4),  # right: 2*2/(3+4) = 0.571
        detection([0, 70, 10, 10], 0.2),  # wrong: 2*2/(4+4)
    ]
    point = operating_point(detections, objects)
    assert point == pytest.approx(
        {"threshold": 0.4, "precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7}
    )


def test_operating_point_does_not_part_equal_scores():
    objects = [thing([0, 0, 10, 10])]
    detections = [detection([0, 0, 10, 10], 0.5), detection([0, 50, 10, 10], 0.5)]
    point = operating_point(detections, objects)
    assert point == pytest.approx({"threshold": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3})


def test_operating_point_takes_the_highest_of_equal_thresholds():
    objects = [thing([20 * i, 0, 10, 10]) for i in range(2)]
    # 2*1/(1+2) = 2/3, then 2*1/(2+2), 2*1/(3+2), and 2*2/(4+2) = 2/3 again.
    wrong = [detection([0, 50 + 20 * i, 10, 10], 0.5 - 0.1 * i) for i in range(2)]
    detections = [detection([0, 0, 10, 10], 0.9), *wrong, detection([20, 0, 10, 10], 0.1)]
    point = operating_point(detections, objects)
    assert point is not None
    assert point["threshold"] == 0.9


@pytest.mark.parametrize("detections", [[], [detection([0, 50, 10, 10], 0.9)]])
def test_without_a_right_detection_there_is_no_operating_point(detections):
    assert operating_point(detections, [thing([0, 0, 10, 10])]) is None


def test_judge_sorts_detections_and_objects():
    objects = [thing([0, 0, 10, 10]), thing([20, 0, 10, 10])]
    right, wrong = detection([0, 0, 10, 10], 0.7), detection([0, 50, 10, 10], 0.5)
    below = detection([20, 0, 10, 10], 0.4)
    verdict = judge([wrong, below, right], objects, 0.5)
    assert verdict == {"right": [right], "wrong": [wrong], "missed": [objects[1]]}


def test_judge_without_a_threshold_shows_nothing():
    objects = [thing([0, 0, 10, 10])]
    verdict = judge([detection([0, 0, 10, 10], 0.9)], objects, None)
    assert verdict == {"right": [], "wrong": [], "missed": objects}


def test_pictures_are_spread_from_emptiest_to_fullest():
    counts = {1: 3, 2: 0, 3: 1, 4: 2, 5: 2}
    objects = [thing([0, 0, 1, 1], image_id=i) for i, n in counts.items() for _ in range(n)]
    assert spread_by_count(counts, objects, 3) == [2, 4, 1]
    assert spread_by_count(counts, objects, 1) == [2]
    assert spread_by_count(counts, objects, 9) == [2, 3, 4, 5, 1]
    assert spread_by_count([], [], 3) == []
