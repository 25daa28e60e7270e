import pytest

from options.flags import OFFICIAL
from paper.block import NOT_COMPARABLE, SAME_SETTING, paper_block, printed_table
from paper.systems import printed_row

TRAIN, TEST = ((OFFICIAL / name).read_text().split() for name in ("train.list", "test.list"))


def block(tiny_options, flags: str = "--preset paper", train: list = TRAIN, test: list = TEST) -> str:
    """The paper's metrics below those of a run of DTML on some cases."""
    trained = tiny_options("dtml", *flags.split())
    trained.labelnum, trained.unlabelnum = 16, len(train) - 16
    state = {"cases": {"labeled": train[:14], "validation": train[14:16], "unlabeled": train[16:]}}
    return paper_block([{"case": case} for case in test], trained, state)


def test_the_papers_row_stands_beside_ours_for_its_own_setting_alone(tiny_options):
    assert (len(TRAIN), len(TEST)) == (80, 20)
    assert block(tiny_options).startswith(SAME_SETTING)
    assert block(tiny_options, train=TRAIN[:16]).startswith(SAME_SETTING)  # the paper's 16 + 0
    for other in ({"flags": "--preset cpu"}, {"train": TRAIN[:64]}, {"train": TRAIN[1:] + TRAIN[:1]}):
        assert block(tiny_options, **other).startswith(NOT_COMPARABLE)


@pytest.mark.parametrize(
    "lists", [{"test": TEST[:19]}, {"test": TRAIN[64:]}, {"train": [f"mine{i}" for i in range(80)]}, {"train": []}]
)
def test_it_never_stands_under_other_scans(tiny_options, lists):
    assert block(tiny_options, **lists) == ""


def test_the_printed_row():
    header, _, row = printed_table(printed_row("dtml", 16, 64)).splitlines()
    assert header.startswith("as printed") and row.split()[-4:] == ["90.12", "82.14", "1.82", "7.01"]
