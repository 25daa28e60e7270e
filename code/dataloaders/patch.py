"""Which size of crops fits the volumes of a data folder."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from options.presets import PRESETS
from utils.constants import MIN_PATCH
from utils.errors import InputError
from utils.files import REPOSITORY, shown
from utils.resample import Size

STEP = 16  # voxels: the networks pad each side to a multiple
LARGEST = (112, 112, 80)  # the paper's
MOST_ON_A_CPU = 64**3  # voxels of a crop whose training takes minutes
LEAST_FILLED = 0.5  # part of a crop that the median volume must fill


def fitting_patch(shapes: Iterable[Size]) -> list[int]:
    """Multiples of 16 voxels that hold the median volume, between what the networks need and the paper's."""
    sides = zip(np.median([*shapes], axis=0), LARGEST, strict=True)
    return [min(max(STEP * math.ceil(side / STEP), MIN_PATCH), largest) for side, largest in sides]


def require_fit(patch: Sequence[int], shapes: Iterable[Size]) -> None:
    """Crops that would hold more padding than voxels, where smaller ones fit, are an `InputError`."""
    median, fitting = np.median(shapes := [*shapes], axis=0), fitting_patch(shapes)
    filled = np.prod(np.minimum(median, patch)) / math.prod(patch)
    if filled < LEAST_FILLED and math.prod(fitting) < math.prod(patch):
        raise InputError(
            f"crops of {_by(patch)} voxels would mostly be padding: the median volume has {_by(median)}; "
            f"give --patch_size {' '.join(map(str, fitting))}"
        )


def uneven_notice(patch: Sequence[int]) -> list[str]:
    """What it costs that the networks pad a patch; empty where they need not."""
    padded = [STEP * math.ceil(side / STEP) for side in patch]
    more = math.prod(padded) / math.prod(patch) - 1
    return [f"the networks pad crops to {_by(padded)}, {more:.0%} more voxels; multiples of 16 cost none"] * (more > 0)


def training_command(root: Path, shapes: Iterable[Size], labeled: int, unlabeled: bool, preset: str = "paper") -> str:
    """A command that trains on a folder, with crops that fit at the scale of the preset."""
    script = shown(REPOSITORY / "code" / ("train_dtml.py" if unlabeled else "train.py"))
    method = "" if unlabeled else " --method supervised"
    chosen = f" --preset {preset}" if PRESETS[preset] else ""
    size = " ".join(map(str, fitting_patch(np.multiply([*shapes], PRESETS[preset].get("scale", 1)))))
    return f"python {script}{method}{chosen} --root_path {shown(root)} --labelnum {labeled} --patch_size {size}"


def cpu_preset(shapes: Iterable[Size]) -> str:
    """The preset that trains on a CPU: at native resolution where the patch is small, at half of it elsewhere."""
    return "hippocampus" if math.prod(fitting_patch(shapes)) <= MOST_ON_A_CPU else "cpu"


def _by(sides: Iterable[float]) -> str:
    return " x ".join(f"{side:g}" for side in sides)
