"""Which values of label files make which class: what --classes says, and the names that dataset.json has for them."""

import dataclasses
import json
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.errors import InputError
from utils.labels import MEAN, MOST_CLASSES, LabelClass
from utils.nifti import MOST_VALUE

DATASET_JSON = "dataset.json"  # of the Medical Segmentation Decathlon and of nnU-Net


def label_values(text: str) -> tuple[int, ...]:
    """Label values as the command line gives them: "1,2"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text} must be whole numbers, separated by commas") from None


def label_classes(text: str) -> tuple[LabelClass, ...]:
    """Classes as the command line gives them: "1,2" or "name=value+value,name=value"; without a name it is empty."""
    classes = []
    for part in text.split(","):
        name, given, numbers = part.rpartition("=")
        try:
            values = tuple(int(number) for number in numbers.split("+"))
        except ValueError:
            raise ArgumentTypeError(f"{part} must be value[+value] or name=value[+value], of whole numbers") from None
        if not all(0 < value <= MOST_VALUE for value in values) or (given and not name.strip()) or name.strip() == MEAN:
            raise ArgumentTypeError(f"{part} must have values of 1 to {MOST_VALUE}, and a name other than {MEAN}")
        classes.append(LabelClass(name.strip(), values))
    values = [value for one in classes for value in one.values]
    if len(set(values)) < len(values) or len(classes) > MOST_CLASSES:
        raise ArgumentTypeError(f"{text} must have each value once, and {MOST_CLASSES} classes at most")
    return tuple(classes)


def named(classes: Sequence[LabelClass], names: Mapping[int, str]) -> tuple[LabelClass, ...]:
    """The classes, those without a name called as in dataset.json or else after their values."""
    found = tuple(
        dataclasses.replace(one, name=one.name or names.get(one.values[0]) or default_name(one)) for one in classes
    )
    if len({one.name for one in found}) < len(found):
        raise InputError(f"--classes gives two classes one name: {', '.join(one.name for one in found)}")
    return found


def default_name(one: LabelClass) -> str:
    """Of a class that nobody named."""
    return f"class {'+'.join(map(str, one.values))}"


def written(classes: Sequence[LabelClass]) -> str:
    """The classes as --classes takes them, a name only where it says more than the values."""
    return ",".join(
        values if one.name == default_name(one) else f"{one.name}={values}"
        for one in classes
        for values in ["+".join(map(str, one.values))]
    )


def dataset_names(images: Path) -> dict[int, str]:
    """Names of label values in the dataset.json beside the scans, or beside their folder; {} without one.

    Both forms are read: {"1": "liver"} of the Decathlon and nnU-Net v1, {"liver": 1} of nnU-Net v2, whose regions of
    several values and whose `ignore` are no classes.
    """
    path = next((p for p in (images / DATASET_JSON, images.parent / DATASET_JSON) if p.is_file()), None)
    if path is None:
        return {}
    try:
        labels = json.loads(path.read_text(encoding="utf-8-sig")).get("labels", {})
        pairs = [(key, name) if key.isdecimal() else (name, key) for key, name in labels.items()]
        names = {int(value): str(name) for value, name in pairs if not isinstance(value, list)}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}); correct its labels, or move it away") from None
    return {value: name for value, name in names.items() if value and name not in ("ignore", MEAN)}
