"""The foreground classes of a run: those that its labeled cases record, or as many as --num_classes says."""

from argparse import Namespace
from collections.abc import Collection, Sequence
from pathlib import Path

from dataloaders.case_files import case_path, read_classes
from utils.errors import InputError
from utils.files import repository_path
from utils.labels import ONE_CLASS, LabelClass, numbered_classes


def settle_classes(options: Namespace, cases: Sequence[str]) -> tuple[LabelClass, ...]:
    """The classes of the labeled `cases`, which must agree; --num_classes becomes their number."""
    root = repository_path(options.root_path)
    classes = read_classes(root, cases[0])
    for case in cases[1:]:
        if (other := read_classes(root, case)) != classes:
            raise InputError(
                f"{case_path(root, case)} records {in_words(other)}, case {cases[0]} {in_words(classes)}; prepare all "
                "cases with the same --classes, or leave some out with --labeled_list"
            )
    if fault := contradiction(options.num_classes, case_path(root, cases[0]), classes):
        raise InputError(fault)
    classes = classes_by_number(options.num_classes, classes)
    options.num_classes = len(classes)
    return classes


def classes_by_number(number: int | None, recorded: tuple[LabelClass, ...]) -> tuple[LabelClass, ...]:
    """The classes that --num_classes stands for beside those that cases record, which hold if there are as many."""
    return recorded if number in (None, len(recorded)) else numbered_classes(number)


def contradiction(number: int | None, path: Path, classes: Sequence[LabelClass]) -> str | None:
    """What is wrong with --num_classes where the case at `path` records other classes; None if nothing is."""
    if number in (None, len(classes)) or classes == ONE_CLASS:
        return None
    return (
        f"--num_classes {number} contradicts {path}, which records {in_words(classes)}; leave it out, or name another "
        "--root_path"
    )


def refuse_absent(absent: Collection[int], classes: Sequence[LabelClass]) -> None:
    """Classes that no labeled case holds, by number, are an `InputError`: nothing would teach them."""
    if absent:
        names = in_words([classes[number - 1] for number in sorted(absent)])
        raise InputError(
            f"no labeled case holds {names}; label other cases (--labelnum, --labeled_list), or tell fewer classes "
            "apart (--num_classes; --classes of prepare_scans.py)"
        )


def in_words(classes: Sequence[LabelClass]) -> str:
    """E.g. "2 classes (anterior, posterior)"."""
    names = ", ".join(one.name for one in classes)
    return f"the class {names}" if len(classes) == 1 else f"{len(classes)} classes ({names})"
