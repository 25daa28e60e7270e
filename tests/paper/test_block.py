from options import flags as options
from paper import block as paper_block

OFFICIAL = [(options.OFFICIAL / name).read_text().split() for name in ("train.list", "test.list")]


def heading(tiny_options, flags: str = "--preset paper", train: list | None = None, test: list | None = None) -> str:
    """The heading of the paper's figures for a run of DTML on some cases."""
    train = OFFICIAL[0] if train is None else train
    trained = tiny_options("dtml", *flags.split())
    trained.labelnum, trained.unlabelnum = 16, len(train) - 16
    state = {"cases": {"labeled": train[:14], "validation": train[14:16], "unlabeled": train[16:]}}
    scores = [{"case": case} for case in (OFFICIAL[1] if test is None else test)]
    same = paper_block.is_paper_setting(scores, trained, state)
    return paper_block.SAME_SETTING if same else paper_block.NOT_COMPARABLE


def test_the_papers_row_stands_beside_ours_for_its_own_setting_alone(tiny_options):
    train, test = OFFICIAL
    assert (len(train), len(test)) == (80, 20)
    assert heading(tiny_options) == paper_block.SAME_SETTING
    assert heading(tiny_options, train=train[:16]) == paper_block.SAME_SETTING  # the paper's 16 + 0
    for other in (
        heading(tiny_options, "--preset cpu"),
        heading(tiny_options, train=train[:64]),
        heading(tiny_options, train=train[1:] + train[:1]),
        heading(tiny_options, test=test[:19]),
        heading(tiny_options, test=train[64:]),
        heading(tiny_options, train=[f"mine{i}" for i in range(80)], test=[f"mine{i}" for i in range(80, 100)]),
    ):
        assert other == paper_block.NOT_COMPARABLE
