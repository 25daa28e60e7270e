"""The parser of every command: bad flags are an `InputError`, help is short or whole, spelling is suggested."""

import argparse
import difflib
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from options.methods import methods_with
from options.types import Number, PathHere
from utils.errors import InputError

_ABSENT = object()  # in the place of the value of a flag that was not given


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults as one would type them, except those that say nothing; values are called by their kind."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = action.type.kind if isinstance(action.type, Number) else action.type
        if kind in (int, float):
            return "N" if kind is int else "X"
        return "PATH" if isinstance(action, PathHere) else "NAME"

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.default == [] or "default" in action.help:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(ArgumentParser):
    """An `ArgumentParser` that knows which flags were given and raises `InputError`.

    With `common` flags, --help shows these alone and --help_all every one.
    """

    def __init__(self, *args: Any, common: Sequence[str] = (), example: str = "", **kwargs: Any):
        kwargs = {"formatter_class": HelpFormatter, "allow_abbrev": False} | kwargs
        super().__init__(*args, epilog=f"example: {example}" if example else None, **kwargs)
        self.common = common
        if common:
            self.add_argument("--help_all", action=_HelpAll, nargs=0, help="show every flag and exit")

    def error(self, message: str) -> None:
        """Bad input, like any other."""
        message = re.sub(r"^argument (\S+): (?=\S+ must be )", r"\1 ", message).removeprefix("argument ")
        raise InputError(f"{message}; see --help")

    def print_help(self, file: Any = None, everything: bool = False) -> None:
        """Print the common flags or, where none is marked as such, all."""
        if not self.common or everything:
            super().print_help(file)
            return
        shown = {"--help", "--help_all", *(f"--{name}" for name in self.common)}
        expert = [action for action in self._actions if shown.isdisjoint(action.option_strings)]
        before = [action.help for action in expert]
        for action in expert:
            action.help = argparse.SUPPRESS
        super().print_help(file)
        for action, text in zip(expert, before, strict=True):
            action.help = text

    def parse_args(self, args: Sequence[str] | None = None, namespace: Namespace | None = None) -> Namespace:
        """The flags; one that is not declared is bad input that says what it may be."""
        try:
            options, unknown = self.parse_known_args(args, namespace)
        except InputError:
            for action in self._actions:
                action.required = False  # what is lacking may be there, misspelt
            unknown = self.parse_known_args(args)[1]
            if not unknown:
                raise
        if unknown:
            self.error(self._explained(unknown))
        return options

    def given(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """The flags that stand on the command line, each with its value."""
        absent = {action.dest: _ABSENT for action in self._actions if action.default is not argparse.SUPPRESS}
        values = self.parse_args(argv, Namespace(**absent))
        return {name: value for name, value in vars(values).items() if value is not _ABSENT}

    def defaults(self) -> dict[str, Any]:
        """The value of each flag where it is not given."""
        return {a.dest: a.default for a in self._actions if a.default is not argparse.SUPPRESS}

    def layer(self, *layers: Mapping[str, Any]) -> None:
        """Set defaults from layers, the strongest last; entries whose flag is not declared here are passed over."""
        declared = {action.dest for action in self._actions}
        for layer in layers:
            self.set_defaults(**{key: value for key, value in layer.items() if key in declared})

    def _explained(self, unknown: Sequence[str]) -> str:
        flag = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        known = [name for action in self._actions for name in action.option_strings]
        if having := methods_with(flag):
            command = "" if "--method" in known else "train.py "
            return f"{flag} is a flag of {command}--method {' or '.join(having)}"
        similar = difflib.get_close_matches(flag, known, n=1)
        return f"unknown flag {flag}" + (f"; did you mean {similar[0]}?" if similar else "")


class _HelpAll(argparse.Action):
    def __call__(self, parser: Parser, *args: Any) -> None:
        parser.print_help(everything=True)
        parser.exit()
