"""A checkpoint as a method that predicts."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from methods import METHODS
from methods.base import Method
from utils.errors import InputError


def reported_output(method: Method, options: Namespace) -> str:
    """The output that --head picks, by default the method's first."""
    head = options.head or method.outputs[0]
    if head not in method.outputs:
        raise InputError(f"--head {head} is not among the outputs of {options.exp}: {', '.join(method.outputs)}")
    return head


def trained_method(options: Namespace, state: dict[str, Any], path: Path) -> Method:
    """The method of a run with the weights of its checkpoint `state`, which was read from `path`."""
    if options.method not in METHODS:  # it may have been somebody's own
        raise InputError(
            f"run {options.exp} is of method {options.method}, which is not among METHODS: {', '.join(METHODS)}; "
            "see --exp"
        )
    method = METHODS[options.method].of_run(state["options"])
    load_networks(method, state, path)
    return method


def load_networks(method: Method, state: dict[str, Any], path: Path) -> None:
    """Weights of a checkpoint; one of another method or width is an `InputError`."""
    try:
        method.load_state_dict(state["networks"])
    except RuntimeError:
        was = {key: state["options"].get(key) for key in ("method", "network", "n_filters", "norm", "num_classes")}
        raise InputError(f"{path} does not fit the networks of this run: it was trained with {was}") from None
    method.trained_iterations = state["iteration"]
