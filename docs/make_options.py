"""Write docs/options.md from the parsers of the commands: python docs/make_options.py."""

import argparse
import importlib
import sys
from pathlib import Path
from unittest import mock

CODE = Path(__file__).resolve().parents[1] / "code"
COMMANDS = "train test_LA predict prepare_scans prepare_LA check_data make_phantom reproduce benchmark".split()
INTRODUCTION = """# Every flag

Written by `python docs/make_options.py`. Defaults are those of the paper; `--preset` and a method change some of them
(`--preset NAME --method NAME --help_all` shows what holds). `train_dtml.py` is `train.py` with `--method dtml`.
"""


class _Parser(Exception):
    """Carries a command's parser out of it."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command, caught when it would read the command line."""
    module = importlib.import_module(command)
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", lambda self, *_: _stop(self)):
        try:
            module.main([])
        except _Parser as caught:
            return caught.args[0]
    raise RuntimeError(f"{command}.py parses no command line")


def _stop(parser: argparse.ArgumentParser) -> None:
    raise _Parser(parser)


def page() -> str:
    """The whole page."""
    from options.methods import FLAGS
    from options.parsing import training_parser

    sections = [INTRODUCTION]
    for command in COMMANDS:
        if command == "train":
            parser = training_parser("", FLAGS, "supervised")
            sections.append(_section("train.py", parser))
            sections += [_section(f"train.py --method {key}", _own(cls), cls.defaults) for key, cls in FLAGS.items()]
        else:
            sections.append(_section(f"{command}.py", parser_of(command)))
    return "\n".join(section for section in sections if section)


def _own(cls) -> argparse.ArgumentParser:
    """A method's own flags, with those of the consistency weight where it has one."""
    from options import flags

    parser = argparse.ArgumentParser(add_help=False)
    cls.add_arguments(parser)
    if cls.weighs_consistency:
        flags.add_consistency_options(parser)
    return parser


def _section(title: str, parser: argparse.ArgumentParser, defaults: dict | None = None) -> str:
    parser.set_defaults(**(defaults or {}))
    actions = [action for action in parser._actions if action.dest not in ("help", "help_all")]
    if not actions:
        return ""
    shared = (defaults or {}).keys() - {action.dest for action in actions}
    changed = ", ".join(f"`--{flag} {defaults[flag]}`" for flag in sorted(shared))
    note = [f"Another default of shared flags: {changed}.\n"] if changed else []
    header = ["| flag | value | default | |", "|---|---|---|---|"]
    return "\n".join([f"## {title}\n", *note, *header, *map(_row, actions), ""])


def _row(action: argparse.Action) -> str:
    name = "`, `".join(action.option_strings) or action.dest
    text = " ".join(action.help.split()).replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")
    return f"| `{name}` | {_value(action)} | {_default(action.default)} | {text} |"


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "switch"
    if action.choices is not None:
        text = ", ".join(map(str, action.choices))
    else:
        text = {int: "a whole number", float: "a number", None: "text"}.get(action.type, str(action.type))
        text = "text" if text.startswith("<") else text
    many = {None: "", "*": " (any number of them)", "+": " (one or more)", "?": " (or none)"}
    return text + many.get(action.nargs, f" ({action.nargs} of them)")


def _default(default) -> str:
    if default is None or default is False or default == []:
        return ""
    if isinstance(default, Path) and default.is_relative_to(CODE.parent):
        default = default.relative_to(CODE.parent)
    return f"`{' '.join(map(str, default)) if isinstance(default, list | tuple) else default}`"


if __name__ == "__main__":
    sys.path.insert(0, str(CODE))
    (CODE.parent / "docs" / "options.md").write_text(page(), encoding="utf-8")
