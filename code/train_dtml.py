"""Train DTML: the published command, which is train.py with the method set to dtml."""

import sys
from collections.abc import Sequence

from train import main as train
from utils.errors import run_script


def main(argv: Sequence[str] | None = None) -> int:
    """Train DTML and return the exit status."""
    return train(argv, method="dtml")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
