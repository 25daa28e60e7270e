"""Scans of any data set (NIfTI, NRRD, MetaImage, DICOM series) -> the HDF5 cases and lists that training reads.

Every scan is normalised over the whole of it and, if asked for, turned and resampled; the recipe lies beside the cases
in preprocessing.json, and a run that is trained on them carries it along. A scan without label is an unlabeled case.
Re-running changes nothing, an interrupted run continues, and a broken scan is reported and left out (exit status 1).
"""

import argparse
import csv
import hashlib
import math
import os
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.case_files import DEST, is_name, read_list, scan_list, write_list
from dataloaders.patch import cpu_preset, training_command
from options.flags import LISTS
from options.parser import Parser
from options.types import PathHere, at_least, positive, share
from options.types import number as real
from scans.classes import dataset_names, label_classes, label_values, named, written
from scans.files import GRID_TOLERANCE, case_id, find_scans
from scans.prepare import Outcome, RawCase, Recipe, prepare_folder, report
from scans.preprocess import NORMALISATIONS, Preprocessing
from utils.errors import InputError, run_script
from utils.files import repository_path, shown
from utils.labels import LabelClass, classes_as_record
from utils.words import counted

CSV_COLUMNS = ("image", "label", "id", "split")
PARTS = ("train", "test")  # what the column `split` may say
CHANNEL = "_0000"  # of nnU-Net: the end of the name of a scan's first channel
RULE = Preprocessing()  # the default: that of the published left-atrium files


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description=__doc__,
        common="images labels dest foreground classes spacing_mm orientation test_fraction overwrite".split(),
        example="python code/prepare_scans.py --images raw/images --labels raw/labels --dest data/mine",
    )
    scans = parser.add_argument_group("scans").add_argument
    scans(
        "--images",
        action=PathHere,
        required=True,
        help="folder of scans (files, or sub-folders of one DICOM series each); a folder of nnU-Net or the Decathlon, "
        "with imagesTr and labelsTr; or a CSV file with the column image and, optionally, label, id and split (train "
        "or test), whose paths start at its own folder",
    )
    scans(
        "--labels", action=PathHere, help="folder of the labels, named like their scans (default: the CSV's, or none)"
    )
    scans("--dest", action=PathHere, required=True, help="folder to write")
    kept = parser.add_mutually_exclusive_group().add_argument
    kept(
        "--foreground",
        type=label_values,
        metavar="V,V",
        help="label values that become one foreground (default: all but 0)",
    )
    kept(
        "--classes",
        type=label_classes,
        metavar="V,V",
        help="label values that stay apart, 1,2 or name=value[+value],name=value; names are those of dataset.json "
        "where the scans have one; a label with another value is refused",
    )
    scans("--ignore_values", type=label_values, metavar="V,V", help="label values that --classes takes as background")
    scans(
        "--grid_tolerance",
        type=at_least(0.0),
        default=GRID_TOLERANCE,
        help="voxels by which the corners of a label may lie off those of its scan",
    )
    scans("--overwrite", action="store_true", help="write everything again, whatever the settings of what is there")
    recipe = parser.add_argument_group("preprocessing").add_argument
    recipe("--spacing_mm", type=positive, nargs=3, metavar=("X", "Y", "Z"), help="resample to it (default: as scanned)")
    recipe(
        "--normalise",
        choices=NORMALISATIONS,
        default=RULE.normalise,
        help="zscore: mean 0 and sd 1 over the whole scan; percentile: clip at --percentiles, which become 0 and 1",
    )
    recipe(
        "--percentiles", type=real, nargs=2, default=list(RULE.percentiles), metavar=("LOW", "HIGH"), help="in percent"
    )
    recipe(
        "--orientation",
        help="turn the axes to run that way, e.g. LPS or RAS; give it where scans differ (default: as scanned)",
    )
    recipe("--fill_nan", type=real, metavar="VALUE", help="replaces voxels that are NaN or infinite (default: refuse)")
    lists = parser.add_argument_group("lists").add_argument
    lists(
        "--test_fraction",
        type=share,
        default=0.2,
        help="random share of the labeled cases that test.list gets; 0 for no such list; a column split overrules it",
    )
    lists(
        "--folds",
        type=at_least(0),
        default=0,
        metavar="K",
        help="write fold0_train.list, fold0_test.list and so on over the labeled cases of train.list, for "
        "--split fold0 and so on; 0 for none",
    )
    lists("--seed", type=at_least(0), default=1337, help="of the random order of the lists")
    options = parser.parse_args(argv)
    if options.folds == 1:
        raise InputError("--folds 1 must be 0, or at least 2")
    if options.ignore_values and not options.classes:
        raise InputError("--ignore_values goes with --classes; without them, --foreground says what is not ignored")
    return options


def main(argv: list[str] | None = None) -> int:
    """Write cases, lists, manifest and preprocessing.json; 1 if a scan was left out, else 0."""
    options = parse_options(argv)
    dest, names = repository_path(options.dest), dataset_names(repository_path(options.images))
    recipe = recipe_of(options, names)
    sources, parts = find_sources(options)
    split = {"seed": options.seed, "folds": options.folds}
    split |= {"split": parts} if parts else {"test_fraction": options.test_fraction}

    if labeled := [source.case for source in sources if source.label]:
        check_lists(draw_lists(labeled, [], parts, options), options.folds)
    elif options.folds:
        raise InputError(f"--folds {options.folds} divides labeled scans, and no scan has a label; give --labels")

    def write_lists(outcome: Outcome) -> dict[str, list[str]]:
        lists = draw_lists(outcome.labeled, outcome.unlabeled, parts, options)
        for name, cases in lists.items():
            if outcome.changed or not (dest / name).exists():
                write_list(dest / name, cases)
        for name in outcome.lists.keys() - lists.keys():  # of an earlier split, unless a user has edited it
            if scan_list(dest / name, DEST)[0] == outcome.lists[name]:
                (dest / name).unlink(missing_ok=True)
        return lists

    outcome = prepare_folder(dest, sources, recipe, options.overwrite, write_lists, split)
    for line in [*report(dest, outcome), *remarks(dest, outcome, recipe, names)]:
        print(line)
    return 1 if outcome.faults else 0


def recipe_of(options: argparse.Namespace, names: Mapping[int, str]) -> Recipe:
    """What is done to each scan. Args: names, of label values, for --classes without them."""
    rule = Preprocessing(
        tuple(options.spacing_mm) if options.spacing_mm else None,
        options.normalise,
        tuple(options.percentiles),
        options.orientation,
        options.fill_nan,
    )
    settings = {"script": "prepare_scans", **rule.as_record(), "foreground": options.foreground}
    classes, ignored = named(options.classes or (), names), options.ignore_values or ()
    if classes:
        settings |= {"classes": classes_as_record(classes), "ignore_values": ignored}
    return Recipe(rule, settings, options.foreground, classes, ignored, grid_tolerance=options.grid_tolerance)


# --- which scans


def find_sources(options: argparse.Namespace) -> tuple[list[RawCase], dict[str, str]]:
    """The scans, sorted by case id, and the part that the column `split` gives each; {} without that column."""
    images = repository_path(options.images)
    if images.is_file():
        if options.labels:
            raise InputError(f"--labels goes with a folder of images; {images} names its labels in the column label")
        sources, parts = read_table(images)
    else:
        labels = options.labels and repository_path(options.labels)
        if (images / "imagesTr").is_dir():
            images, labels = images / "imagesTr", labels or images / "labelsTr"
        sources, parts = pair(without_channel(find_scans(images), images), images, labels), {}
    return sorted(sources, key=lambda source: source.case), parts


def without_channel(scans: dict[str, Path], images: Path) -> dict[str, Path]:
    """Scans by id without nnU-Net's number of the channel, where all names end with it."""
    if other := [case for case in scans if case.endswith("_0001")]:
        if other[0].removesuffix("_0001") + CHANNEL in scans:
            raise InputError(f"{images} holds several channels of {other[0]}; give --images one channel for each scan")
    if not all(case.endswith(CHANNEL) for case in scans):
        return scans
    return {case.removesuffix(CHANNEL): path for case, path in scans.items()}


def pair(scans: dict[str, Path], images: Path, folder: Path | None) -> list[RawCase]:
    """Scans and labels of one name; a label without a scan is an error, for then the names do not fit."""
    labels = find_scans(folder, labels=True) if folder else {}
    if alone := sorted(set(labels) - set(scans)):
        raise InputError(
            f"{len(alone)} of {len(labels)} labels have no scan of their name in {images}, {labels[alone[0]]} the "
            "first; name both alike, or give --images a CSV file"
        )
    if same := [case for case, path in labels.items() if os.path.realpath(path) == os.path.realpath(scans[case])]:
        raise InputError(f"{scans[same[0]]} is given as image and as label; correct --labels")
    return [RawCase(case, path, labels.get(case)) for case, path in scans.items()]


def read_table(path: Path) -> tuple[list[RawCase], dict[str, str]]:
    """The rows of a CSV file; an empty label is an unlabeled scan."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV ({error}); see --images") from error
    if "image" not in columns or set(columns) - set(CSV_COLUMNS) or not rows:
        raise InputError(
            f"{path} has {len(rows)} rows of the columns {', '.join(columns) or '(none)'}; it needs rows with image, "
            f"and may have {', '.join(CSV_COLUMNS[1:])}"
        )
    sources, parts = {}, {}
    for number, row in enumerate(rows, start=2):
        row = {key: (row.get(key) or "").strip() for key in CSV_COLUMNS}
        image, label = path.parent / row["image"], path.parent / row["label"] if row["label"] else None
        case = unicodedata.normalize("NFC", row["id"] or case_id(image) or image.name)
        fault = _row_fault(row, case, case in sources)
        if fault:
            raise InputError(f"{path}, line {number}: {fault}")
        sources[case] = RawCase(case, image, label)
        if "split" in columns:
            parts[case] = row["split"]
    return list(sources.values()), parts


def _row_fault(row: dict[str, str], case: str, known: bool) -> str | None:
    if not row["image"]:
        return "the image is missing"
    if not is_name(case):
        return f"the id {case} cannot name a folder"
    if known:
        return f"the id {case} stands there twice; give each row its own id"
    if row["split"] not in ("", *PARTS):
        return f"split is {row['split']}; write train or test, or leave it empty for train"
    return f"case {case} is to be tested and has no label" if row["split"] == "test" and not row["label"] else None


# --- lists


def draw_lists(
    labeled: list[str], unlabeled: list[str], parts: dict[str, str], options: argparse.Namespace
) -> dict[str, list[str]]:
    """The list files by name: labeled cases in random order, then, in training lists, the unlabeled ones.

    The order is a function of (--seed, case id), so that a new case leaves most others where they are.
    """
    drawn = sorted(
        labeled, key=lambda case: hashlib.sha256(f"{options.seed} {case}".encode(errors="surrogateescape")).digest()
    )
    share = math.ceil(options.test_fraction * len(drawn))
    test = [case for case in drawn if parts[case] == "test"] if parts else drawn[:share]
    tested = set(test)
    train = [case for case in drawn if case not in tested]
    lists = {LISTS[0]: [*train, *unlabeled], LISTS[1]: test}
    for fold in range(options.folds):
        held = train[fold :: options.folds]
        others = [case for index, case in enumerate(train) if index % options.folds != fold]
        lists[f"fold{fold}_{LISTS[0]}"] = others + unlabeled
        lists[f"fold{fold}_{LISTS[1]}"] = held
    return {name: cases for name, cases in lists.items() if cases}


def check_lists(lists: dict[str, list[str]], folds: int) -> None:
    """Refuse lists, of the labeled cases alone, that nothing can be trained with."""
    train = lists.get(LISTS[0], [])
    if not train:
        raise InputError("no labeled case is left for training; lower --test_fraction, or see the column split")
    if folds > len(train):
        raise InputError(f"--folds {folds} needs as many labeled training cases; there are {len(train)}")


def remarks(dest: Path, outcome: Outcome, recipe: Recipe, names: Mapping[int, str]) -> Iterator[str]:
    """What a user should know before training: what was found in the scans, and the command that fits them."""
    records = list(outcome.cases.values())
    if not records:
        return
    yield from contents(records, recipe)
    yield from classes_found(records, recipe, names)
    path = dest / LISTS[0]
    if not outcome.labeled or not path.exists():
        yield "no case is labeled: training needs labels for some of them, with --labels or a column label"
        return
    train = read_list(path, DEST)
    labeled = len(set(train) & set(outcome.labeled))
    unlabeled = len(train) - labeled
    cases = counted(labeled, "labeled case")
    yield f"{shown(path)}: {cases} (--labelnum {labeled} or fewer), then {unlabeled} unlabeled"
    if labeled:
        shapes = [record["prepared_shape"] for record in records]
        known = dest, shapes, labeled, unlabeled > 0
        yield f"train: {training_command(*known)} --exp mine"
        yield f"without a GPU: {training_command(*known, cpu_preset(shapes))} --exp mine"


def contents(records: list[dict[str, Any]], recipe: Recipe) -> Iterator[str]:
    """Sizes, voxel sizes, orientations and label values of the scans, as they came."""
    for title, key, unit in (("sizes", "shape", "voxels"), ("voxel sizes", "spacing_mm", "mm")):
        axes = np.array([record[key] for record in records])
        rows = (axes.min(axis=0), np.median(axes, axis=0), axes.max(axis=0))
        low, middle, high = (" x ".join(f"{value:.4g}" for value in row) for row in rows)
        yield f"{title}: {middle} {unit} (median)" + (f", {low} to {high}" if low != high else "")
    ways = Counter(record["orientation"] for record in records).most_common()
    counts = ", ".join(f"{way} {count}" for way, count in ways)
    if len(ways) > 1 and recipe.preprocessing.orientation is None:
        yield f"the axes of the scans run in different ways ({counts}); --orientation {ways[0][0]} turns them alike"
    else:
        yield f"orientations: {counts}"
    if sheared := sum(record.get("sheared", False) for record in records):
        yield f"sheared by a tilted gantry: {counted(sheared, 'scan')}; test_LA.py measures as if axes were orthogonal"


def classes_found(records: list[dict[str, Any]], recipe: Recipe, names: Mapping[int, str]) -> Iterator[str]:
    """Label values as they came, and what became of them."""
    values = sorted({value for record in records for value in record.get("label_values", [])})
    if values:
        yield "label values: " + ", ".join(map(str, values))
    for one in recipe.classes:
        volumes = [ml for record in records if (ml := record.get("class_ml", {}).get(one.name))]
        yield f"class {one.name} ({'+'.join(map(str, one.values))}): in {counted(len(volumes), 'case')}" + (
            f", {np.median(volumes):.4g} mL (median)" if volumes else "; train.py needs it in a labeled one"
        )
    merged = [value for value in values if (value in recipe.foreground if recipe.foreground else value)]
    if len(merged) > 1 and not recipe.classes:
        apart = written(named([LabelClass("", (value,)) for value in merged], names))
        yield (
            f"the values {', '.join(map(str, merged))} become one foreground; --foreground chooses among them, "
            f"--classes {shlex.quote(apart)} keeps them apart"
        )


if __name__ == "__main__":
    run_script(main)
