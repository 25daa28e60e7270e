import numpy as np
import pytest

from utils.labels import ONE_CLASS, LabelClass, classes_as_record, classes_of_record, label_map, one_hot

THREE = np.array([0, 1, 2, 3, 2], np.uint8).reshape(5, 1, 1)


def test_one_hot_has_a_mask_per_foreground_class():
    masks = one_hot(THREE, 3)
    assert masks.shape == (3, 5, 1, 1) and masks.dtype == bool
    assert masks[:, :, 0, 0].astype(int).tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0]]


def test_a_label_comes_back_from_its_masks():
    for exclusive in (True, False):
        np.testing.assert_array_equal(label_map(one_hot(THREE, 3).astype(np.float32), exclusive), THREE)


@pytest.mark.parametrize(
    ("probs", "exclusive", "expected"),
    [
        ((0.4, 0.35), True, 1),  # the background has 0.25
        ((0.3, 0.3), True, 0),  # the background has 0.4
        ((0.2, 0.41), True, 2),  # no class has a majority; the background has 0.39
        ((0.4, 0.35), False, 0),
        ((0.6, 0.9), False, 2),
        ((0.9, 0.9), False, 1),  # a tie is the first one's
        ((0.5, 0.0), True, 0),
        ((0.5, 0.0), False, 0),
    ],
)
def test_the_rule_of_a_label_map(probs, exclusive, expected):
    assert label_map(np.array(probs, np.float32).reshape(2, 1, 1, 1), exclusive).item() == expected


@pytest.mark.parametrize("exclusive", [True, False])
def test_for_one_class_both_rules_are_the_threshold_to_the_bit(exclusive):
    half = np.float32(0.5)
    near = [half, np.nextafter(half, np.float32(0)), np.nextafter(half, np.float32(1)), 0, 1, 1e-9, 1 - 1e-7]
    prob = np.concatenate([near, np.random.default_rng(0).random(9993)]).astype(np.float32).reshape(1, 100, 10, 10)
    mask = label_map(prob, exclusive)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, prob[0] > 0.5)


def test_classes_survive_a_record():
    classes = (LabelClass("anterior", (1,)), LabelClass("rest", (2, 5)))
    assert classes_of_record(classes_as_record(classes)) == classes
    assert classes_of_record(None) == ONE_CLASS
