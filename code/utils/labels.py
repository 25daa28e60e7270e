"""Foreground classes: what the numbers of a label mean; from a label to one mask per class, and back."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_CLASSES = 255  # what a label of uint8 holds beside the background


@dataclass(frozen=True)
class LabelClass:
    """A foreground class: its name, and the values of the original labels that it is made of."""

    name: str
    values: tuple[int, ...]


MEAN = "mean"  # in the place of a class's name: the mean over all
ONE_CLASS = (LabelClass("foreground", (1,)),)  # of cases and runs that record no classes


def numbered_classes(number: int) -> tuple[LabelClass, ...]:
    """Classes of cases that record none, where --num_classes says how many there are.

    Their names tell them from the `class 1` that prepare_scans.py records: a folder without a record may be tested by
    a run of the former, and holds one foreground beside a run of the latter.
    """
    return tuple(LabelClass(f"label {value}", (value,)) for value in range(1, number + 1))


def classes_as_record(classes: Sequence[LabelClass]) -> list[dict[str, Any]]:
    """Classes as plain data, for a checkpoint."""
    return [dataclasses.asdict(one) for one in classes]


def classes_of_record(record: Iterable[Mapping[str, Any]] | None) -> tuple[LabelClass, ...]:
    """The classes of a checkpoint's `classes`; None, from before there were several, is one foreground."""
    return ONE_CLASS if record is None else tuple(LabelClass(one["name"], tuple(one["values"])) for one in record)


def one_hot(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Mask of each class. Args: label, (W, H, D), 0 to `num_classes`. Returns: (C, W, H, D) boolean."""
    return label == np.arange(1, num_classes + 1, dtype=label.dtype)[:, None, None, None]


def label_map(prob: np.ndarray, exclusive: bool) -> np.ndarray:
    """The class of every voxel: the most probable one, where it exceeds the background's probability.

    Args: prob, (C, W, H, D), of the foreground classes; exclusive, whether they and the background sum to 1 (a
        softmax), so that the background has what they leave; otherwise (a sigmoid each) it has 0.5.
    Returns: (W, H, D) uint8, 0 for the background. For one class both rules are prob > 0.5.
    """
    background = 1 - prob.sum(axis=0) if exclusive else 0.5
    return np.where(prob.max(axis=0) > background, prob.argmax(axis=0) + 1, 0).astype(np.uint8)
