"""Types of flags that carry their bounds. A method declares its flags with them:

group.add_argument("--mc_passes", type=at_least(1), default=8, help="stochastic passes of the teacher")
group.add_argument("--con_scale", type=at_least(0.0), default=1.0, help="factor on the gradient of L_con")
group.add_argument("--gamma", type=share, default=0.5, help="confidence above which a voxel is trusted")
"""

import argparse
import math
import os
from argparse import ArgumentTypeError, Namespace
from dataclasses import dataclass
from typing import Any

from utils.files import from_here


class PathHere(argparse.Action):
    """A path that starts at the current folder when it is given; a default starts at the repository."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Namespace, value: Any, flag: Any = None) -> None:
        setattr(namespace, self.dest, self.meant(value))

    def meant(self, text: str) -> str:
        """The path as options hold it."""
        return from_here(text)


class PathsHere(PathHere):
    """One path, or several with commas between."""

    def meant(self, text: str) -> str:
        """The paths as options hold them; a name may hold a comma itself."""
        return (
            from_here(text) if os.path.exists(text) else ",".join(from_here(part.strip()) for part in text.split(","))
        )


@dataclass(frozen=True)
class Number:
    """A finite number that a flag takes; called by argparse, which names the flag before what is wrong with it."""

    kind: type = float
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # `low` itself is too low
    below: bool = False  # `high` itself is too high

    def __call__(self, text: str) -> int | float:
        try:
            value = self.kind(text)
        except ValueError:
            raise ArgumentTypeError(f"{text} must be {self}") from None
        low_enough = value < self.high if self.below else value <= self.high
        high_enough = value > self.low if self.above else value >= self.low
        if not (math.isfinite(value) and low_enough and high_enough):
            raise ArgumentTypeError(f"{text} must be {self}")
        return value

    def __str__(self) -> str:
        """What it takes, as help and errors say it."""
        what = "a whole number" if self.kind is int else "a number"
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{what} in {'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"
        if math.isfinite(self.low):
            return f"{what} {'greater than' if self.above else 'of at least'} {self.low}"
        return what


def at_least(low: int | float) -> Number:
    """Numbers from `low` on: whole ones for an int, any for a float."""
    return Number(type(low), low)


def between(low: int | float, high: int | float) -> Number:
    """Numbers from `low` to `high`, both included."""
    return Number(type(low), low, high)


def split_name(text: str) -> str:
    """A name of lists in the data folder; a path belongs to --train_list and --test_list."""
    if not text or set(text) & set("/\\\0"):
        raise ArgumentTypeError(
            f"{text!r} must be a name such as dev, not a path; --train_list and --test_list take paths"
        )
    return text


number = Number()
positive = Number(low=0, above=True)
share = Number(low=0, high=1, below=True)
