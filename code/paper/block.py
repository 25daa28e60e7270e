"""The paper's metrics below a run's own, on the official lists alone; a heading says whether they compare."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from dataloaders.case_files import scan_list
from dataloaders.split import are_official, cases_of_training
from evaluation.tables import METRIC_COLUMNS, text_table
from options.flags import LISTS, OFFICIAL, list_paths
from paper.systems import PrintedRow, printed_row

SAME_SETTING = "the paper's row, for the same lists, preset and number of labels"
NOT_COMPARABLE = "the paper's row on the same test scans: another setting, not comparable"


def has_official_lists(options: Namespace) -> bool:
    """Whether options name the scans of the challenge's lists, wherever they lie."""
    ours = [scan_list(path, "")[0] for path in list_paths(options)]
    return ours == [scan_list(OFFICIAL / name, "")[0] for name in LISTS]


def paper_block(scores: Sequence[dict[str, Any]], options: Namespace, state: dict[str, Any]) -> str:
    """The paper's metrics under a heading; empty where it has none or where training or test scans are not its own."""
    row = paper_row(options)
    train = scan_list(OFFICIAL / LISTS[0], "")[0]
    trained = cases_of_training(state)
    if row is None or not are_official(trained, [score["case"] for score in scores]):
        return ""
    same = (
        options.preset == "paper" and trained == train[: len(trained)] and printed_row(*_row_key(options)) is not None
    )
    return f"{SAME_SETTING if same else NOT_COMPARABLE}\n\n{printed_table(row)}"


def printed_table(row: PrintedRow) -> str:
    """The paper's metrics, headed so that nobody takes them for ours."""
    label = f"{row.name}, {row.labeled} labeled + {row.unlabeled} unlabeled"
    return text_table(
        ["as printed", *(heading for heading, _, _ in METRIC_COLUMNS.values())],
        [[label, *(f"{x:.2f}" for x in row.metrics())]],
    )


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
