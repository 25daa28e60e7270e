"""The paper's figures below a run's own, under a heading that says whether they compare."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from dataloaders.case_files import scan_list
from dataloaders.split import cases_of_training
from evaluation.tables import printed_table
from options.flags import OFFICIAL
from paper.printed import PrintedRow, printed_row

SAME_SETTING = "the paper's row, for the same lists, preset and number of labels"
NOT_COMPARABLE = "the paper's full-scale figures on the official 20 cases: another setting, not comparable"


def paper_block(scores: Sequence[dict[str, Any]], options: Namespace, state: dict[str, Any]) -> str:
    """The paper's figures under a heading that says whether they compare; empty where it has none."""
    row = paper_row(options)
    if row is None:
        return ""
    heading = SAME_SETTING if is_paper_setting(scores, options, state) else NOT_COMPARABLE
    return f"{heading}\n\n{printed_table(row)}"


def is_paper_setting(scores: Sequence[dict[str, Any]], options: Namespace, state: dict[str, Any]) -> bool:
    """Whether the paper's figures may stand beside these: its preset, its cases, its number of labels."""
    train, test = (scan_list(OFFICIAL / name, "")[0] for name in ("train.list", "test.list"))
    trained = cases_of_training(state)
    same_cases = trained == train[: len(trained)] and {score["case"] for score in scores} == set(test)
    return options.preset == "paper" and bool(trained) and same_cases and printed_row(*_row_key(options)) is not None


def paper_row(options: Namespace) -> PrintedRow | None:
    """The printed row of these numbers of scans, else that of the paper's 16 labeled and 64 or no unlabeled ones."""
    method, _, unlabeled, variant = _row_key(options)
    return printed_row(*_row_key(options)) or printed_row(method, 16, 64 if unlabeled else 0, variant)


def _row_key(options: Namespace) -> tuple[str, int, int, str | None]:
    variant = None
    if options.method == "dtml":
        supervision = {"mask": None, "sdm": "dis", "both": "dis+mask"}[options.sdm_supervision]
        variant = supervision if options.branch == "both" else f"{options.branch}_only"
    return options.method, options.labelnum, options.unlabelnum, variant
