"""Go over a data folder and report every fault at once: lists, missing cases, damaged or unsound files.

Exit status: 0 for a sound folder, 1 if there are faults.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from dataloaders.la_heart import find_faults, has_label, read_label, read_shape, read_spacing, scan_list
from utils.errors import run_script

ROOT = Path(__file__).resolve().parents[1]
LISTS = {"official": ("train.list", "test.list"), "dev": ("dev_train.list", "dev_test.list")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which cases are meant."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--root_path", type=Path, default=ROOT / "data" / "LA", help="folder of the cases (data/LA)"
    )
    group.add_argument("--split", choices=LISTS, default="official", help="pair of lists (official)")
    group.add_argument("--train_list", type=Path, help="training ids, one a line (<root_path>, by --split)")
    group.add_argument("--test_list", type=Path, help="test ids, one a line (<root_path>, by --split)")
    group.add_argument("--labelnum", type=int, default=16, help="labeled cases: first of the list (16)")


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; lists that were not named are taken from the data folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(argv)
    train_list, test_list = LISTS[options.split]
    options.train_list = options.train_list or options.root_path / train_list
    options.test_list = options.test_list or options.root_path / test_list
    return options


def main(argv: list[str] | None = None) -> int:
    """Print every fault and a summary of the sound cases; 1 if there are faults, else 0."""
    options = parse_options(argv)
    train, faults = scan_list(options.train_list, "--train_list")
    test, test_faults = scan_list(options.test_list, "--test_list")
    faults += [*test_faults, *split_faults(train, test, options.labelnum)]
    labeled = {*train[: max(options.labelnum, 0)], *test}
    cases = list(dict.fromkeys(train + test))
    sound = []
    for case in tqdm(cases, desc="cases", disable=None):  # None: a bar on a terminal only
        found = find_faults(options.root_path, case, expect_label=case in labeled)
        faults += found
        sound += [] if found else [case]
    faults = list(dict.fromkeys(faults))  # one missing folder is one fault, not one per case
    print(f"{options.root_path}: {len(train)} training cases, {len(test)} test cases")
    for line in [*summarize(options.root_path, sound), *(f"fault: {fault}" for fault in faults)]:
        print(line)
    print(f"{len(faults)} fault{'' if len(faults) == 1 else 's'} found" if faults else "no faults found")
    return 1 if faults else 0


def split_faults(train: list[str], test: list[str], labelnum: int) -> Iterator[str]:
    """What is wrong between the lists: cases in both, or not as many cases as labels are asked for."""
    overlap = [case for case in test if case in set(train)]
    if overlap:
        yield (
            f"{len(overlap)} cases are in both lists ({', '.join(overlap)}); "
            "take them out of --train_list or of --test_list"
        )
    if train and not 1 <= labelnum <= len(train):
        yield f"--labelnum is {labelnum}, but --train_list has {len(train)} cases; give 1 to {len(train)}"


def summarize(root: Path, cases: list[str]) -> Iterator[str]:
    """Lines about sound cases: how many, range of shapes, voxel sizes, share of labeled voxels."""
    yield f"sound cases      {len(cases)}"
    if not cases:
        return
    axes = list(zip(*(read_shape(root, case) for case in cases), strict=True))
    yield "shape            " + " x ".join(f"{min(axis)}-{max(axis)}" for axis in axes) + " voxels"
    spacings = sorted({read_spacing(root, case) for case in cases})
    yield "spacing          " + "; ".join(" x ".join(f"{mm:g}" for mm in s) for s in spacings) + " mm"
    shares = [100 * float(read_label(root, case).mean()) for case in cases if has_label(root, case)]
    if shares:
        yield f"labeled voxels   {min(shares):.1f}-{max(shares):.1f} % of a volume ({len(shares)} cases)"


if __name__ == "__main__":
    run_script(main)
