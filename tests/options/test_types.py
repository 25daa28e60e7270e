"""Types of flags: what they take, what they refuse."""

from argparse import ArgumentParser, ArgumentTypeError

import pytest

from options.types import PathHere, PathsHere, at_least, between, number, positive, share, split_name
from utils.files import REPOSITORY, repository_path, shown


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


def test_a_split_is_a_name_not_a_path():
    assert [split_name(name) for name in ("official", "fold1")] == ["official", "fold1"]
    for text in ("", "lists/fold1", "..\\fold1"):
        with pytest.raises(ArgumentTypeError):
            split_name(text)


def test_whole_numbers_stay_whole():
    assert isinstance(at_least(1)("2"), int) and isinstance(at_least(1.0)("2"), float)


def test_paths_start_at_the_current_folder_and_defaults_at_the_repository(tmp_path, monkeypatch):
    parser = ArgumentParser()
    parser.add_argument("--model_path", action=PathHere, default="model")
    parser.add_argument("--pretrained", action=PathsHere)

    def parsed(*argv: str) -> list[str]:
        return list(vars(parser.parse_args(argv)).values())

    monkeypatch.chdir(tmp_path)
    (tmp_path / "c,d").touch()
    assert parsed() == ["model", None] and repository_path(parsed()[0]) == REPOSITORY / "model"
    assert parsed("--model_path", "../x/") == [str(tmp_path.parent / "x"), None]
    assert parsed("--pretrained", "a, /b") == ["model", f"{tmp_path / 'a'},/b"]
    assert parsed("--pretrained", "c,d") == ["model", str(tmp_path / "c,d")]
    assert (shown(tmp_path / "a b"), shown(REPOSITORY)) == ("'a b'", str(REPOSITORY))
    monkeypatch.chdir(REPOSITORY / "docs")
    assert parsed("--model_path", "../model/mine") == ["model/mine", None]  # as a copied repository needs it
