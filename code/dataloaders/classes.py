"""The foreground classes of a run: those that its labeled cases record, or as many as --num_classes says."""

from argparse import Namespace
from collections.abc import Collection, Sequence

from dataloaders.case_files import case_path, read_classes
from utils.errors import InputError
from utils.files import repository_path
from utils.labels import ONE_CLASS, LabelClass


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
    if options.num_classes is None:
        options.num_classes = len(classes)
    if options.num_classes != len(classes):
        if classes != ONE_CLASS:
            raise InputError(
                f"--num_classes {options.num_classes} contradicts {case_path(root, cases[0])}, which records "
                f"{in_words(classes)}; leave it out, or name another --root_path"
            )
        classes = tuple(LabelClass(f"class {number}", (number,)) for number in range(1, options.num_classes + 1))
    return classes


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
