"""What --classes and dataset.json say."""

import json
from argparse import ArgumentTypeError

import pytest

from scans.classes import dataset_names, label_classes, named, written
from utils.errors import InputError
from utils.labels import LabelClass


def test_classes_as_the_command_line_gives_them():
    apart = label_classes("1,4")
    assert [one.values for one in apart] == [(1,), (4,)]
    assert named(apart, {4: "tumour"}) == (LabelClass("class 1", (1,)), LabelClass("tumour", (4,)))
    merged = named(label_classes("edge of it=1+3, core=4"), {})
    assert merged == (LabelClass("edge of it", (1, 3)), LabelClass("core", (4,)))
    assert named(label_classes(written(merged)), {}) == merged


@pytest.mark.parametrize("text", ["one", "a=", "=1", "0,1", "a=1,b=1", "mean=1,b=2", "1,,2", "a=1.5"])
def test_classes_that_mean_nothing(text):
    with pytest.raises(ArgumentTypeError):
        label_classes(text)


def test_two_classes_of_one_name():
    with pytest.raises(InputError, match="--classes"):
        named(label_classes("a=1,a=2"), {})


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "background", "1": "Anterior", "2": "Posterior"},  # of the Decathlon
        {"background": 0, "Anterior": 1, "Posterior": 2, "whole": [1, 2], "ignore": 3},  # of nnU-Net v2
    ],
)
def test_names_of_dataset_json(tmp_path, labels):
    (tmp_path / "imagesTr").mkdir()
    assert dataset_names(tmp_path) == {}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    for folder in (tmp_path, tmp_path / "imagesTr"):
        assert dataset_names(folder) == {1: "Anterior", 2: "Posterior"}


@pytest.mark.parametrize("content", ["{", "[]", '{"labels": {"liver": "one"}}', '{"labels": 3}'])
def test_a_damaged_dataset_json(tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(InputError, match="dataset.json"):
        dataset_names(tmp_path)
