"""What every script owes its user: a silent import and a --help that names the defaults."""

import argparse
import re
import runpy
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

import train
from utils.errors import InputError
from utils.files import REPOSITORY

CODE = Path(train.__file__).parent
SCRIPTS = sorted(path.stem for path in CODE.glob("*.py") if 'if __name__ == "__main__":' in path.read_text())
NOT_WORTH_SAYING = (None, False, argparse.SUPPRESS, [])  # as a default


class Parsed(Exception):
    """Carries the parser of a script out of it."""


@pytest.fixture
def parser_of(monkeypatch):
    """The parser that a script reads its command line with."""

    def parser(script: str, *argv: str) -> ArgumentParser:
        def stop(self, *args, **kwargs):
            if self.add_help:  # else it is the first of the two strides
                raise Parsed(self)
            return known(self, *args, **kwargs)

        known = ArgumentParser.parse_known_args
        with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
            patch.setattr(ArgumentParser, "parse_known_args", stop)
            patch.setattr(sys, "argv", [f"{script}.py", *argv])
            runpy.run_path(str(CODE / f"{script}.py"), run_name="__main__")
        return parsed.value.args[0]

    return parser


def flags_of(parser: ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.dest not in ("help", "help_all")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing(script, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ArgumentParser, "parse_known_args", lambda *args: pytest.fail("parsed a command line"))
    runpy.run_path(str(CODE / f"{script}.py"), run_name=script)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_printed_and_ends_well(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(CODE / f"{script}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert out.startswith("usage: ") and len(out.splitlines()) > 5


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_that_names_its_default(script, parser_of):
    parser = parser_of(script)
    assert parser.description
    for action in flags_of(parser):
        formatter = parser.formatter_class(parser.prog, width=10_000)
        formatter.add_argument(action)
        text = formatter.format_help()
        assert action.help, action.dest
        if action.required or action.default in NOT_WORTH_SAYING:
            continue
        assert re.search(rf"[(: ]{re.escape(shown(action.default))}[) ;]", text), f"{text} lacks {action.default}"


def shown(default) -> str:
    """A default as a help text writes it: a path within the repository, numbers with spaces between."""
    if isinstance(default, Path):
        return str(default.relative_to(REPOSITORY))
    return " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_ends_with_an_example_and_a_misspelt_flag_brings_the_right_one(script, parser_of):
    parser = parser_of(script)
    assert re.fullmatch(rf"example: python code/{script}.py( .+)?", parser.epilog)
    flag = next(name for action in flags_of(parser) for name in action.option_strings if len(name) > 5)
    with pytest.raises(InputError, match=rf"{flag}\b(?!x)"):
        parser.parse_args([f"{flag}x"])


@pytest.mark.parametrize("preset", ["cpu", "demo"])
def test_help_shows_the_defaults_of_the_preset_that_is_asked_for(preset, capsys):
    texts = []
    for argv in (["--help"], ["--preset", preset, "--help"]):
        with pytest.raises(SystemExit):
            train.main(argv)
        texts.append(" ".join(capsys.readouterr().out.split()))
    assert "(default: 112 112 80)" in texts[0] and "(default: 112 112 80)" not in texts[1]
