"""Go over a data folder and report every fault at once: lists, missing cases, damaged or invalid files.

Exit status: 0 for a valid folder, 1 if there are faults.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataloaders.case_files import (
    case_path,
    find_faults,
    has_label,
    read_classes,
    read_label,
    read_shape,
    read_spacing,
    same_scans,
    scan_list,
)
from dataloaders.classes import classes_by_number, contradiction
from dataloaders.patch import training_command
from dataloaders.split import labels_there
from options.flags import add_classes_option, add_path_options, list_paths
from options.parser import Parser
from options.types import PathHere
from utils.errors import run_script
from utils.files import repository_path, shown
from utils.words import counted


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, example="python code/check_data.py --root_path data/LA --labelnum 16")
    add_path_options(parser)
    parser.add_argument(
        "--labelnum",
        type=int,
        help="first cases of the training list that need a label (default: 16; in a folder of prepare_scans.py, all "
        "that have one)",
    )
    parser.add_argument(
        "--labeled_list", action=PathHere, help="file of the cases that need one, instead of the first --labelnum"
    )
    add_classes_option(parser)
    options = parser.parse_args(argv)
    if options.labelnum is None:
        options.labelnum = labels_there(options) or 16
    return options


def main(argv: list[str] | None = None) -> int:
    """Print every fault and a summary of the valid cases; 1 if there are faults, else 0."""
    options = parse_options(argv)
    root, (train_list, test_list) = repository_path(options.root_path), list_paths(options)
    train, faults = scan_list(train_list, "--train_list")
    test, test_faults = scan_list(test_list, "--test_list")
    labeled, label_faults = labeled_cases(options, train)
    faults += [*test_faults, *split_faults(train, test), *label_faults]
    labeled.update(test)
    cases = list(dict.fromkeys(train + test))
    valid = []
    for case in tqdm(cases, desc="cases", disable=None):  # None: a bar on a terminal only
        found = find_faults(root, case, case in labeled, options.num_classes)
        faults += found
        valid += [] if found else [case]
    faults += [
        f"cases {one} and {other} are one scan; take one out of --train_list or of --test_list"
        for one, other in same_scans(root, cases)
    ]
    faults += class_faults(root, valid, options.num_classes)
    faults = list(dict.fromkeys(faults))  # one missing folder is one fault, not one per case
    print(f"{root}: {counted(len(train), 'training case')}, {counted(len(test), 'test case')}")
    for line in [*summarize(root, valid, options.num_classes), *(f"fault: {fault}" for fault in faults)]:
        print(line)
    if faults:
        print(f"{counted(len(faults), 'fault')} found")
        return 1
    own = len(labeled - set(test))
    shapes = [read_shape(root, case) for case in train]
    print(f"no faults found; next: {training_command(root, shapes, own, len(train) > own)}{further_flags(options)}")
    return 0


def further_flags(options: argparse.Namespace) -> str:
    """The flags that named classes, or other lists than those of the folder."""
    paths = {name: getattr(options, name) for name in ("train_list", "test_list", "labeled_list")}
    flags = [f" --{name} {shown(repository_path(path))}" for name, path in paths.items() if path]
    flags += [f" --num_classes {options.num_classes}"] if options.num_classes else []
    return "".join([*flags, "" if options.split == "official" else f" --split {options.split}"])


def labeled_cases(options: argparse.Namespace, train: list[str]) -> tuple[set[str], list[str]]:
    """The training cases that need a label, and what is wrong with the way they are asked for."""
    if options.labeled_list:
        cases, faults = scan_list(repository_path(options.labeled_list), "--labeled_list")
        known = set(train)
        strangers = [case for case in cases if case not in known]
        if train and strangers:
            faults.append(f"case {strangers[0]} of --labeled_list {options.labeled_list} is not in --train_list")
        return set(cases) - set(strangers), faults
    number = options.labelnum
    wrong = train and not 1 <= number <= len(train)
    fault = f"--labelnum is {number}, but --train_list has {counted(len(train), 'case')}; give 1 to {len(train)}"
    return set(train[: max(number, 0)]), [fault] if wrong else []


def split_faults(train: list[str], test: list[str]) -> Iterator[str]:
    """What is wrong between the lists: cases in both."""
    trained = set(train)
    overlap = [case for case in test if case in trained]
    if overlap:
        yield (
            f"{counted(len(overlap), 'case')} in both lists ({', '.join(overlap)}); "
            "take them out of --train_list or of --test_list"
        )


def summarize(root: Path, cases: list[str], num_classes: int | None) -> Iterator[str]:
    """Lines about valid cases: their number, range of shapes, voxel sizes, share of labeled voxels."""
    yield f"valid cases      {len(cases)}"
    if not cases:
        return
    axes = list(zip(*(read_shape(root, case) for case in cases), strict=True))
    yield "shape            " + " x ".join(f"{min(axis)}-{max(axis)}" for axis in axes) + " voxels"
    spacings = sorted({read_spacing(root, case) for case in cases})
    yield "spacing          " + "; ".join(" x ".join(f"{mm:g}" for mm in s) for s in spacings) + " mm"
    labeled = [case for case in cases if has_label(root, case)]
    recorded = max((read_classes(root, case) for case in labeled), key=len, default=())
    classes = classes_by_number(num_classes, recorded)
    counts = [np.bincount(read_label(root, case, len(classes)).ravel(), minlength=len(classes) + 1) for case in labeled]
    if counts:
        shares = 100 * np.array([voxels[1:] / voxels.sum() for voxels in counts])  # (cases, C)
        total, number = shares.sum(axis=1), counted(len(labeled), "case")
        yield f"labeled voxels   {total.min():.1f}-{total.max():.1f} % of a volume ({number})"
    for one, share in zip(classes, shares.T, strict=True) if len(classes) > 1 else ():
        there = share[share > 0]
        sizes = f"{there.min():.1f}-{there.max():.1f} % of a volume " if len(there) else ""
        yield f"class {one.name}: {sizes}({counted(len(there), 'case')})"


def class_faults(root: Path, cases: list[str], num_classes: int | None) -> Iterator[str]:
    """A labeled case whose classes are not those of the first, and a --num_classes that contradicts the first."""
    labeled = [case for case in cases if has_label(root, case)]
    classes = [read_classes(root, case) for case in labeled]
    if other := next((case for case, own in zip(labeled, classes, strict=True) if own != classes[0]), None):
        yield (
            f"cases {labeled[0]} and {other} have different classes; prepare all of them with the same --classes of "
            "prepare_scans.py"
        )
    if labeled and (fault := contradiction(num_classes, case_path(root, labeled[0]), classes[0])):
        yield fault


if __name__ == "__main__":
    run_script(main)
