"""Original scans of the 2018 Atrial Segmentation Challenge -> the HDF5 cases that training reads.

Each sub-folder of --source with lgemri.nrrd (and laendo.nrrd, 255 = left atrium) becomes a case: z-scored over the
whole scan, cropped, with its geometry. Arrays depend on the files, --crop and --seed alone. Re-running changes
nothing, an interrupted run continues, and a broken scan is reported and left out (exit status 1).
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dataloaders.case_files import DEST, read_list, write_list
from options.flags import LISTS, OFFICIAL
from options.parser import Parser
from options.types import PathHere, at_least
from scans.prepare import Outcome, RawCase, Recipe, prepare_folder, report
from scans.preprocess import Preprocessing
from scans.region import Box, central
from utils.errors import InputError, run_script
from utils.files import repository_path
from utils.resample import Size

IMAGE_FILE, LABEL_FILE = "lgemri.nrrd", "laendo.nrrd"  # of the challenge
ATRIUM = (255,)  # its label value
LEAST_SIDE = 112  # in-plane voxels that the historical crop pads a small atrium to
CROP_MARGIN = (10, 20)  # in-plane voxels around it, the upper end exclusive


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, example="python code/prepare_LA.py --source raw/LA --dest data/LA")
    add = parser.add_argument
    add(
        "--source",
        action=PathHere,
        required=True,
        help=f"folder of the challenge's case folders, each with {IMAGE_FILE} and {LABEL_FILE}",
    )
    add("--dest", action=PathHere, default="data/LA", help="folder to write")
    add(
        "--crop",
        choices=("label", "center", "none"),
        default="label",
        help="label: the published files' crop around the ground truth, in-plane, with random margins; center: "
        "--crop_size about the middle; none: the whole scan. The last two need no label",
    )
    add(
        "--crop_size",
        type=at_least(1),
        nargs=3,
        default=[320, 320, 88],
        metavar=("W", "H", "D"),
        help="voxels of --crop center, at most the scan; half the width of the challenge's larger scans",
    )
    add("--seed", type=at_least(0), default=1337, help="of the margins of --crop label")
    add("--overwrite", action="store_true", help="write everything again, whatever the settings of what is there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the cases and, where the folder has none, the official lists; 1 if a scan was left out, else 0."""
    options = parse_options(argv)
    dest = repository_path(options.dest)
    outcome = prepare_folder(
        dest,
        find_challenge_cases(options),
        recipe_of(options),
        options.overwrite,
        write_lists=lambda _: give_lists(dest),
    )
    for line in [*report(dest, outcome), *missing_cases(dest, outcome)]:
        print(line)
    return 1 if outcome.faults else 0


def find_challenge_cases(options: argparse.Namespace) -> list[RawCase]:
    """The cases of --source, sorted by name: sub-folders with a file of the challenge."""
    root = repository_path(options.source)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; correct --source")
    folders = sorted(
        path for path in root.iterdir() if any((path / name).is_file() for name in (IMAGE_FILE, LABEL_FILE))
    )
    if not folders:
        raise InputError(f"{root} holds no <case>/{IMAGE_FILE}; give the folder of the case folders as --source")
    return [RawCase(f.name, f / IMAGE_FILE, f / LABEL_FILE if (f / LABEL_FILE).is_file() else None) for f in folders]


def recipe_of(options: argparse.Namespace) -> Recipe:
    """What is done to each scan."""
    crops = {
        "label": partial(label_crop, seed=options.seed),
        "center": lambda case, label, shape: central(shape, options.crop_size),
        "none": None,
    }
    settings = {"script": "prepare_LA", "crop": options.crop}
    settings |= {"label": {"seed": options.seed}, "center": {"crop_size": options.crop_size}}.get(options.crop, {})
    return Recipe(Preprocessing(), settings, ATRIUM, crop=crops[options.crop])


def label_crop(case: str, label: np.ndarray | None, shape: Size, seed: int) -> Box:
    """The crop of the published files: in-plane, around the ground truth, random margins; every slice is kept.

    An atrium of less than 112 voxels is first padded to them, half on either side. The upper margin counts from the
    last foreground voxel taken as exclusive end, and is therefore one voxel less, as in the public implementation.
    The margins are a function of (seed, case); those of the published files were not seeded and cannot be made again.
    """
    if label is None:
        raise InputError(f"there is no {LABEL_FILE}, which --crop label needs; give --crop center or --crop none")
    rng = np.random.default_rng([seed, *case.encode()])
    region = []
    for axis, length in enumerate(shape[:2]):
        inside = np.flatnonzero(label.any(axis=(1 - axis, 2)))
        low, high = int(inside[0]), int(inside[-1])
        pad = max(LEAST_SIDE - (high - low), 0) // 2
        before, after = (int(margin) + pad for margin in rng.integers(*CROP_MARGIN, size=2))
        region.append(slice(max(low - before, 0), min(high + after, length)))
    return *region, slice(0, shape[2])


def give_lists(dest: Path) -> None:
    """Write the official lists into a folder that has none."""
    for name in LISTS:
        if not (dest / name).exists():
            write_list(dest / name, read_list(OFFICIAL / name, DEST))


def missing_cases(dest: Path, outcome: Outcome) -> Iterator[str]:
    """A line about each list that names cases which are not there."""
    for name in LISTS:
        named = read_list(dest / name, DEST)
        if missing := [case for case in named if case not in outcome.cases]:
            yield f"{dest / name} names {len(missing)} of {len(named)} cases that are not there, {missing[0]} the first"


if __name__ == "__main__":
    run_script(main)
