"""Train any method: parse, build, hand over to the engine."""

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence

import torch

from dataloaders.split import Split, training_split
from engine import Engine, Stopped
from methods import METHODS
from methods.base import Method
from utils import runs
from utils.device import pick_device
from utils.errors import InputError, run_script
from utils.journal import Journal
from utils.options import parse_in_two_strides, repository_path

SIGNAL_EXIT = 128  # exit status of a run that a signal stopped: 128 + its number, as shells count


def parse_options(argv: Sequence[str] | None = None, method: str | None = None) -> Namespace:
    """All flags of a training, checked and resolved."""
    options = parse_in_two_strides(argv, __doc__.splitlines()[0], METHODS, method)
    options.exp = options.exp or runs.default_exp(options)
    return options


def settle(options: Namespace) -> Split:
    """The cases of a run; --labelnum and --unlabelnum become the numbers of those that it uses."""
    split = training_split(options)
    options.labelnum = len(split.labeled) + len(split.validation)
    options.unlabelnum = len(split.unlabeled)
    return split


def train(options: Namespace) -> int:
    """Train a run from its options. Returns the exit status."""
    split = settle(options)
    device = pick_device(options)
    runs.seed_everything(options.seed)
    torch.use_deterministic_algorithms(options.deterministic)
    method = METHODS[options.method](options)
    notices = _load_pretrained(method, options)
    folder = runs.prepare_run(options)
    state = runs.load_checkpoint(folder / runs.LAST) if (folder / runs.LAST).exists() else None
    engine = Engine(options, method, split, folder, device)
    if state is not None:
        engine.load(state)
    runs.write_json(folder / runs.OPTIONS, vars(options))
    journal = Journal(folder, engine.iteration)
    journal.say(
        f"{options.exp}: {len(split.labeled)} labeled and {len(split.unlabeled)} unlabeled cases"
        + (f", {len(split.validation)} for validation" if split.validation else "")
        + (f"; resumed at iteration {engine.iteration}" if state is not None else "")
    )
    for notice in notices:
        journal.say(notice)
    try:
        engine.train(journal)
    except Stopped as stop:
        journal.say(f"stopped and saved at iteration {engine.iteration}; continue with --resume")
        return SIGNAL_EXIT + stop.number
    except InputError as error:
        journal.say(f"stopped: {error}")
        raise
    finally:
        journal.close()
    print(
        f"done: {engine.iteration} iterations in {engine.seconds:.0f} s; next: test with",
        _test_command(options),
    )
    return 0


def _load_pretrained(method: Method, options: Namespace) -> list[str]:
    """Published weights, unless the run continues; before its folder is touched, so that a bad file costs nothing."""
    saved = (runs.run_folder(options.model_path, options.exp) / runs.LAST).exists()
    if not options.pretrained or (saved and options.resume and not options.overwrite):
        return []
    return method.load_pretrained([repository_path(name.strip()) for name in options.pretrained.split(",")])


def _test_command(options: Namespace) -> str:
    where = [] if options.model_path == "model" else ["--model_path", options.model_path]
    return shlex.join(["python", "code/test_LA.py", "--exp", options.exp, *where])


def main(argv: Sequence[str] | None = None) -> int:
    """Train and return the exit status."""
    return train(parse_options(argv))


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
