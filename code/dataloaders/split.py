"""Which cases are labeled, unlabeled, held out for validation, and tested."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from dataloaders.la_heart import read_list
from utils.errors import InputError
from utils.options import list_paths


@dataclass(frozen=True)
class Split:
    """Case ids of a training run."""

    labeled: list[str]
    unlabeled: list[str]
    validation: list[str]


def training_split(options: Namespace) -> Split:
    """Labeled cases are the first --labelnum of the list (or --labeled_list), the rest is unlabeled.

    The last --val_cases of the labeled ones are held out for validation.
    """
    train_path, test_path = list_paths(options)
    cases = read_list(train_path, "--train_list")
    if test_path.exists():
        _refuse_overlap(cases, train_path, read_list(test_path, "--test_list"), test_path)
    labeled = _labeled(options, cases, train_path)
    chosen = set(labeled)
    unlabeled = [case for case in cases if case not in chosen][: options.unlabelnum]
    if not 0 <= options.val_cases < len(labeled):
        raise InputError(f"--val_cases {options.val_cases} must leave at least one of {len(labeled)} labeled cases")
    kept = len(labeled) - options.val_cases
    if options.batch_size > options.labeled_bs and not unlabeled:
        raise InputError(
            f"{train_path} has no unlabeled cases beyond {len(labeled)} labeled ones; "
            "lower --labelnum or give --unlabelnum 0"
        )
    return Split(labeled[:kept], unlabeled, labeled[kept:])


def cases_to_test(options: Namespace) -> list[str]:
    """Case ids of the test list."""
    return read_list(list_paths(options)[1], "--test_list")


def _labeled(options: Namespace, cases: list[str], path: Path) -> list[str]:
    if options.labeled_list:
        labeled = read_list(Path(options.labeled_list), "--labeled_list")
        if strangers := [case for case in labeled if case not in set(cases)]:
            raise InputError(f"case {strangers[0]} of --labeled_list {options.labeled_list} is not in {path}")
        return labeled
    if options.labelnum > len(cases):
        raise InputError(f"--labelnum {options.labelnum} asks for more than the {len(cases)} cases of {path}")
    return cases[: options.labelnum]


def _refuse_overlap(train: list[str], train_path: Path, test: list[str], test_path: Path) -> None:
    if both := [case for case in train if case in set(test)]:
        raise InputError(
            f"{len(both)} cases, {both[0]} the first, are in {train_path} and in {test_path}; "
            "mend the lists or see --train_list and --test_list"
        )
