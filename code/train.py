"""Train a method on few labeled and many unlabeled scans.

Everything is written to <model_path>/<exp>/; stop at any time and continue with --resume. Defaults are the paper's; a
preset changes many at once, a flag that is given always wins. Score the run with test_LA.py --exp NAME. For several
devices: torchrun --nproc_per_node N code/train.py ...
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from options.methods import FLAGS
from options.parser import Parser
from options.parsing import parse_training, refuse_recomputing
from options.presets import PRESETS
from options.types import PathHere
from utils.errors import run_script
from utils.files import repository_path


def parse_flags(argv: Sequence[str] | None = None, method: str | None = None) -> tuple[Namespace, set[str]]:
    """The options that a command line means, and the names of the flags that were given; without PyTorch.

    `method` leaves no choice of one. Where --resume names a run and no --method, the flags are those of the run's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    first = Parser(add_help=False)
    first.add_argument("--method")
    first.add_argument("--exp")
    first.add_argument("--model_path", action=PathHere, default="model")
    first.add_argument("--resume", action="store_true")
    asked, _ = first.parse_known_args(argv)
    known, stored, methods = method or asked.method, None, FLAGS
    if known is None and asked.resume and asked.exp:
        known = stored = _stored_method(asked.model_path, asked.exp)
    if known not in (None, *FLAGS):  # declares its flags itself
        from methods import METHODS as methods
    if stored in methods:
        argv = ["--method", stored, *argv]
    others = "train.py trains other methods." if method else "Flags of another method: --method NAME --help."
    options, given = parse_training(argv, f"{__doc__}{others}", methods, method)
    return options, given - {"method"} if stored else given


def _stored_method(model_path: str, exp: str) -> str | None:
    """The method of the run that --resume continues; None for a fresh start, or where that cannot be read."""
    from runtime import runs  # PyTorch

    folder = repository_path(model_path) / exp
    try:
        return json.loads((folder / runs.OPTIONS).read_text())["method"] if (folder / runs.LAST).exists() else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def parse_options(argv: Sequence[str] | None = None, method: str | None = None) -> Namespace:
    """All flags of a training run, checked and resolved; with --resume those of the run."""
    options, given = parse_flags(argv, method)
    from dataloaders.split import labels_there
    from runtime import runs  # PyTorch

    if "labelnum" not in given and "labelnum" not in PRESETS[options.preset]:
        options.labelnum = labels_there(options) or options.labelnum
    options.exp = options.exp or runs.default_exp(options)
    stored = runs.stored_options(options)
    if stored and stored["method"] != options.method:
        given |= {"method"}
    options = runs.resumed_options(options, given, stored)
    refuse_recomputing(options)
    return options


def main(argv: Sequence[str] | None = None, method: str | None = None) -> int:
    """Train and return the exit status."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        parse_flags(argv, method)  # --help and typing errors do not wait for PyTorch
    from runtime.distributed import joined
    from training import train

    with joined() as ranks:
        return train(ranks.from_leader(lambda: parse_options(argv, method)), ranks)


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
