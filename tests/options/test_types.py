"""Types of flags: what they take, what they refuse."""

from argparse import ArgumentTypeError

import pytest

from options.types import at_least, between, number, positive, share


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        (at_least(1), ["1", "7"], ["0", "-1", "1.5", "x", "nan"]),
        (at_least(0.0), ["0", "1e-4"], ["-1e-9", "inf", "nan", "x"]),
        (between(0, 3), ["0", "3"], ["-1", "4"]),
        (positive, ["1e-9"], ["0", "-1", "inf"]),
        (share, ["0", "0.999"], ["1", "-0.1"]),
        (number, ["-3", "2.5"], ["inf", "nan", ""]),
    ],
)
def test_bounds(kind, taken, refused):
    assert [kind(text) for text in taken] == [float(text) for text in taken]
    for text in refused:
        with pytest.raises(ArgumentTypeError):
            kind(text)


def test_whole_numbers_stay_whole():
    assert isinstance(at_least(1)("2"), int) and isinstance(at_least(1.0)("2"), float)
