"""Which cases are labeled, unlabeled, held out for validation, and tested."""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders.case_files import MANIFEST, read_list, same_scans, scan_list
from options.flags import LISTS, OFFICIAL, list_paths
from utils.errors import InputError
from utils.files import repository_path
from utils.words import counted


@dataclass(frozen=True)
class Split:
    """Case ids of a training run."""

    labeled: list[str]
    unlabeled: list[str]
    validation: list[str]


def training_split(options: Namespace) -> Split:
    """Labeled cases are the first --labelnum of the list (or --labeled_list), the rest is unlabeled.

    The last --val_cases of the labeled ones are held out for validation. If batches have no place for unlabeled
    cases there are none.
    """
    train_path, test_path = list_paths(options)
    cases = read_list(train_path, "--train_list")
    if options.test_list or test_path.exists():  # training itself needs no test list
        test = read_list(test_path, "--test_list")
        _refuse_overlap(cases, train_path, test, test_path)
    else:
        test = []
    refuse_copies(repository_path(options.root_path), (), [*cases, *test])
    labeled = _labeled(options, cases, train_path)
    if not 0 <= options.val_cases < len(labeled):
        raise InputError(f"--val_cases {options.val_cases} must leave at least one of {len(labeled)} labeled cases")
    kept = len(labeled) - options.val_cases
    places = options.batch_size - options.labeled_bs
    return Split(labeled[:kept], _unlabeled(options, cases, labeled, train_path) if places else [], labeled[kept:])


def labels_there(options: Namespace) -> int | None:
    """Training cases with a label in a folder of prepare_scans.py, which lists them first; None for another folder."""
    try:
        manifest = json.loads((repository_path(options.root_path) / MANIFEST).read_text(encoding="utf-8"))
        labeled = {case for case, record in manifest["cases"].items() if record["label"]}
        own = manifest["settings"]["script"] == "prepare_scans"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    train, _ = scan_list(list_paths(options)[0], "--train_list")  # its faults are told where the list is used
    return len(labeled.intersection(train)) or None if own else None


def cases_to_test(options: Namespace) -> list[str]:
    """Case ids of the test list."""
    return read_list(list_paths(options)[1], "--test_list")


def _labeled(options: Namespace, cases: list[str], path: Path) -> list[str]:
    if options.labeled_list:
        labeled = read_list(repository_path(options.labeled_list), "--labeled_list")
        known = set(cases)
        if strangers := [case for case in labeled if case not in known]:
            raise InputError(f"case {strangers[0]} of --labeled_list {options.labeled_list} is not in {path}")
        return labeled
    if options.labelnum > len(cases):
        raise InputError(f"--labelnum {options.labelnum} is more than the {counted(len(cases), 'case')} of {path}")
    return cases[: options.labelnum]


def _unlabeled(options: Namespace, cases: list[str], labeled: list[str], path: Path) -> list[str]:
    taken = set(labeled)
    rest = [case for case in cases if case not in taken]
    wanted = len(rest) if options.unlabelnum is None else options.unlabelnum
    if not 0 <= wanted <= len(rest):
        raise InputError(f"--unlabelnum {wanted} must be in [0, {len(rest)}], the cases of {path} that are not labeled")
    if not wanted:
        none_left = f"beside {len(labeled)} labeled ones {path} gives none; lower --labelnum or"
        why = "this run uses none;" if rest else none_left
        raise InputError(
            f"batches of --batch_size {options.batch_size} and --labeled_bs {options.labeled_bs} need unlabeled cases, "
            f"but {why} raise --labeled_bs to {options.batch_size}"
        )
    return rest[:wanted]


def _refuse_overlap(train: list[str], train_path: Path, test: list[str], test_path: Path) -> None:
    tested = set(test)
    if both := [case for case in train if case in tested]:
        raise InputError(
            f"{train_path} and {test_path} share {counted(len(both), 'case')}, {both[0]} the first; "
            "take them out of one, or name other lists with --train_list and --test_list"
        )


def refuse_copies(root: Path, known: Sequence[str], cases: Sequence[str]) -> None:
    """Refuse a case that is a known one, or another of them, under another id."""
    looked_at = set(cases)
    for one, other in same_scans(root, [*known, *cases]):
        if other in looked_at:
            raise InputError(f"cases {one} and {other} are one scan; take one out of --train_list or --test_list")


def are_official(trained: Sequence[str], tested: Sequence[str]) -> bool:
    """Whether a run was trained on training scans, and tested on the test scans, of the challenge's lists."""
    train, test = (scan_list(OFFICIAL / name, "")[0] for name in LISTS)
    return bool(trained) and set(trained) <= set(train) and set(tested) == set(test)


def cases_of_training(state: dict[str, Any]) -> list[str]:
    """All cases that a run has seen, labeled ones first."""
    return [case for group in ("labeled", "validation", "unlabeled") for case in state.get("cases", {}).get(group, [])]


def settle(options: Namespace) -> Split:
    """The cases of a run; --labelnum and --unlabelnum become the numbers of those that it uses."""
    split = training_split(options)
    options.labelnum = len(split.labeled) + len(split.validation)
    options.unlabelnum = len(split.unlabeled)
    return split
