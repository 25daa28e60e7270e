"""From scans as files to a data folder: prepared cases, a manifest, the record of the preprocessing.

Each prepared case carries what it was made from (hashes and settings), so that a second run skips what is there, an
interrupted one continues, and a changed file or setting is noticed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from dataloaders.case_files import (
    CASE_FILE,
    DEST,
    DIRECTION_KEY,
    LABEL_ROUNDING,
    MANIFEST,
    ORIGIN_KEY,
    SPACING_KEY,
    VOXELS_KEY,
    case_path,
    class_attributes,
    is_name,
    write_case,
)
from scans.files import GRID_TOLERANCE, SEGMENTATION, Scan, on_grid_of, orientation_of, read_scan
from scans.formats import files_of
from scans.preprocess import RECORD, Preprocessing
from scans.region import Box
from utils.errors import InputError
from utils.files import shown, write_json, writing
from utils.labels import LabelClass, one_hot
from utils.machine import available_memory
from utils.resample import Size

SOURCE_KEY = "source"  # attribute of a prepared case: its line of the manifest, and the settings
RECIPE_VERSION = 1  # of what is done below: raise it with whatever changes an array
ML_PER_MM3 = 1e-3
MOST_VALUES = 100  # of a label; an image has more


@dataclass(frozen=True)
class RawCase:
    """A scan to prepare: its case id, its image and, if it is labeled, its label; each a file or a DICOM folder."""

    case: str
    image: Path
    label: Path | None


@dataclass(frozen=True)
class Recipe:
    """What decides on the arrays of a case.

    foreground: values of the label that are foreground; None is every value but 0.
    classes: in its place, the classes to tell apart; a value of none of them, 0 and `ignored` is an `InputError`.
    crop: (case, label or None, shape) -> region to keep of the processed volume; None keeps all.
    grid_tolerance: voxels by which the corners of a label may lie off those of its scan.
    settings: all of it as plain data, for the manifest.
    """

    preprocessing: Preprocessing
    settings: dict[str, Any]
    foreground: tuple[int, ...] | None = None
    classes: tuple[LabelClass, ...] = ()
    ignored: tuple[int, ...] = ()
    crop: Callable[[str, np.ndarray | None, Size], Box] | None = None
    grid_tolerance: float = GRID_TOLERANCE


@dataclass(frozen=True)
class Outcome:
    """Records of the valid cases and faults of the others, by case id, in the order of the sources."""

    cases: dict[str, dict[str, Any]]
    faults: dict[str, str]
    kept: int  # cases that were there already
    changed: bool  # whether the lists have to be drawn anew: other cases, other labels, another split
    lists: dict[str, list[str]]  # those that the run before drew: their cases by file name

    @property
    def labeled(self) -> list[str]:
        return [case for case, record in self.cases.items() if record["label"]]

    @property
    def unlabeled(self) -> list[str]:
        return [case for case, record in self.cases.items() if not record["label"]]


def prepare_folder(
    dest: Path,
    sources: Sequence[RawCase],
    recipe: Recipe,
    overwrite: bool,
    write_lists: Callable[[Outcome], Mapping[str, Sequence[str]] | None],
    split: Mapping[str, Any] | None = None,
) -> Outcome:
    """Write every case, the lists and the manifest; a scan that cannot be used is a fault, and the others go on.

    Args:
        write_lists: called when all cases are there, before the manifest says so; gives the lists that it draws.
        split: settings that decide on the lists; kept in the manifest, so that they do not change unnoticed.
    A folder that was prepared with other settings is an `InputError`, unless `overwrite` is set; one with cases that
    were not prepared at all always is.
    """
    head = {"settings": {"version": RECIPE_VERSION, **recipe.settings}, "split": dict(split or {})}
    head = json.loads(json.dumps(head))  # as it will be read again
    old = _claim(dest, head, overwrite)
    with writing(dest, DEST):
        dest.mkdir(parents=True, exist_ok=True)
    write_json(dest / RECORD, recipe.preprocessing.as_record(), DEST)
    drawn = old.get("lists", {})
    if any(old.get(key) != value for key, value in head.items()):
        write_json(dest / MANIFEST, {**head, "lists": drawn, "cases": {}, "faults": {}}, DEST)
    cases, faults, kept, voxels = {}, {}, 0, {}
    for source in tqdm(sources, desc="scans", disable=None):  # None: a bar on a terminal only
        try:
            record, content = _prepare_or_keep(dest, source, recipe, head["settings"], overwrite)
        except (InputError, OSError) as error:
            faults[source.case] = str(error)
            continue
        except (MemoryError, RuntimeError) as error:  # what NumPy and PyTorch raise
            if isinstance(error, RuntimeError) and "alloc" not in str(error):
                raise
            remedy = "raise --spacing_mm" if recipe.preprocessing.spacing_mm else "prepare it where there is more"
            faults[source.case] = f"{source.image} needs more memory than there is ({error}); {remedy}"
            continue
        first = voxels.setdefault(record.get(VOXELS_KEY, source.case), source.case)
        if first != source.case:
            faults[source.case] = f"{source.image} has the voxels of case {first}; remove one, or a test would know it"
            continue
        if content:
            write_case(dest, source.case, *content)  # not among the faults: a full disk ends the run
        kept += content is None
        cases[source.case] = {key: value for key, value in record.items() if key != "settings"}
    changed = old["split"] != head["split"] or _labels(old.get("cases", {})) != _labels(cases)
    outcome = Outcome(cases, faults, kept, changed, drawn)
    lists = write_lists(outcome) or {}
    write_json(dest / MANIFEST, {**head, "lists": lists, "cases": cases, "faults": faults}, DEST)
    return outcome


def _prepare_or_keep(
    dest: Path, source: RawCase, recipe: Recipe, settings: dict[str, Any], overwrite: bool
) -> tuple[dict[str, Any], tuple | None]:
    """The record of a case and what `write_case` writes, None where the same is there already."""
    if not is_name(source.case) or source.case.endswith((".list", ".json")):  # these lie beside the cases
        raise InputError(f"the name of {source.image} cannot name a folder and stand in a list; rename it")
    files = {"image": _fingerprint(source.image), "label": source.label and _fingerprint(source.label)}
    wanted = {"settings": settings, **files}
    if not overwrite and (record := _prepared(dest, source.case, wanted)):
        return record, None
    image, label, facts, geometry = prepare_case(source, recipe)
    record = {**wanted, **facts}
    return record, (image, label, {**geometry, SOURCE_KEY: json.dumps(record), VOXELS_KEY: record[VOXELS_KEY]})


def _labels(cases: Mapping[str, Any]) -> dict[str, bool]:
    """Which cases there are, and which of them are labeled."""
    return {case: bool(record["label"]) for case, record in cases.items()}


def _claim(dest: Path, wanted: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The manifest of a folder that was prepared before, empty for a new one; an error where it must not be written."""
    path = dest / MANIFEST
    if not path.exists():
        if foreign := next(dest.glob(f"*/{CASE_FILE}"), None):
            raise InputError(f"{dest} holds {foreign.parent.name}, not prepared by this script; give another {DEST}")
        return {"split": None}
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        flat = [{**manifest["settings"], **manifest["split"]} for manifest in (old, wanted)]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no manifest of prepared scans; give another {DEST}, or remove it") from None
    changed = [key for key in flat[0] | flat[1] if flat[0].get(key) != flat[1].get(key)]
    if changed and not overwrite:
        was, now = (one.get(changed[0]) for one in flat)
        raise InputError(
            f"{dest} was prepared with {changed[0]} {was}, now it is {now}; "
            f"pass --overwrite to write all of it again, or give another {DEST}"
        )
    return old


def _prepared(dest: Path, case: str, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a case that was made from these files with these settings; None if it is to be written."""
    try:
        with h5py.File(case_path(dest, case), "r") as file:
            record = json.loads(file.attrs[SOURCE_KEY])
    except (OSError, KeyError, ValueError):
        return None
    return record if all(record.get(key) == value for key, value in wanted.items()) else None


def _fingerprint(path: Path) -> dict[str, str]:
    """Name and SHA-256 of a scan: of its bytes, for several files of all their names and bytes."""
    if not path.exists():
        raise InputError(f"there is no scan {path}; correct the path that was given")
    files = files_of(path)
    digest = hashlib.sha256()
    for file in files:
        if len(files) > 1:
            digest.update(file.name.encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return {"file": path.name, "sha256": digest.hexdigest()}


# --- one case


def prepare_case(
    source: RawCase, recipe: Recipe
) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any], dict[str, Any]]:
    """Image (W, H, D) float32, label uint8 or None, what the manifest says of them, and their geometry."""
    scan = read_scan(source.image)
    if (needed := recipe.preprocessing.memory(scan)) > (free := available_memory()):
        raise MemoryError(f"about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
    raw_label, values = (None, []) if source.label is None else _read_label(source, scan, recipe)
    image, place = recipe.preprocessing.apply(scan)
    label = None if raw_label is None else place.place_label(raw_label)
    if label is not None and not label.any():
        raise InputError(f"the label vanishes at voxels of {recipe.preprocessing.spacing_mm} mm; lower --spacing_mm")
    affine, start = place.affine, (0, 0, 0)
    if recipe.crop:
        region = recipe.crop(source.case, label, image.shape)
        start = tuple(part.start for part in region)
        affine = affine @ _shift(start)
        image, label = image[region], None if label is None else label[region]
    made = Scan(image, affine)
    record = {
        "shape": list(scan.array.shape),
        "spacing_mm": list(scan.spacing_mm),
        "orientation": orientation_of(scan.affine),
        "sheared": scan.sheared,
        "intensity": _intensity(recipe.preprocessing.filled(scan.array)),
        VOXELS_KEY: _voxels_digest(scan),
        "label_values": values,
        "label_ml": None if raw_label is None else _ml(raw_label > 0, scan),
        "prepared_shape": list(image.shape),
        "prepared_spacing_mm": list(made.spacing_mm),
        "prepared_start": list(start),
    }
    attributes = {SPACING_KEY: made.spacing_mm, ORIGIN_KEY: made.origin_mm, DIRECTION_KEY: made.direction.ravel()}
    if recipe.classes and label is not None:
        masks = zip(recipe.classes, one_hot(raw_label, len(recipe.classes)), strict=True)
        record["class_ml"] = {one.name: _ml(mask, scan) for one, mask in masks}
        attributes |= class_attributes(recipe.classes)
    return image, label, record, attributes


def _ml(mask: np.ndarray, scan: Scan) -> float:
    return float(mask.sum() * scan.voxel_mm3 * ML_PER_MM3)


def _intensity(array: np.ndarray) -> dict[str, float]:
    mean, std = array.mean(dtype=np.float64), array.std(dtype=np.float64)
    return {"min": float(array.min()), "max": float(array.max()), "mean": float(mean), "std": float(std)}


def _voxels_digest(scan: Scan) -> str:
    """Of the values alone, whatever file, type, order of axes and geometry holds them."""
    return hashlib.sha256(np.sort(scan.array.astype(np.float32), axis=None)).hexdigest()


def _read_label(source: RawCase, scan: Scan, recipe: Recipe) -> tuple[np.ndarray, list[int]]:
    """The label of a scan, (W, H, D) uint8 0..C, and the values that its file holds."""
    label = read_scan(source.label)
    array, off = on_grid_of(scan, label, part=source.label.name.lower().endswith(SEGMENTATION))
    if np.array_equal(array, scan.array):
        raise InputError(f"{source.label} holds the voxels of its image; correct --labels or the column label")
    if off > recipe.grid_tolerance:
        raise InputError(_misfit(source, scan, label, off))
    values = np.unique(array)
    whole = np.isfinite(values).all() and bool((np.abs(values - np.round(values)) <= LABEL_ROUNDING).all())
    if not whole:
        raise InputError(f"{source.label} holds values that are no whole numbers; give a label, not a probability map")
    if array.dtype.kind == "f":
        array, values = np.round(array), np.unique(np.round(values))
    classes = recipe.classes or (LabelClass("foreground", recipe.foreground or tuple(values[values != 0].tolist())),)
    chosen = recipe.classes or recipe.foreground
    if not chosen and len(values) > MOST_VALUES:
        raise InputError(f"{source.label} holds {len(values)} values, as an image does; give a label, or --foreground")
    named = {value for one in classes for value in one.values}
    if not chosen and values.min() < 0:  # of what stands for the background, or a distance map
        raise InputError(
            f"{source.label} holds negative values ({values.min():g}, …); name the foreground's with --foreground"
        )
    foreign = [value for value in values.tolist() if value not in {0, *named, *recipe.ignored}]
    if recipe.classes and foreign:
        some = ",".join(f"{value:g}" for value in foreign[:MOST_VALUES])
        raise InputError(
            f"{source.label} holds {some}, of none of the --classes; name it there, or make it background with "
            f"--ignore_values {some}"
        )
    label = np.zeros(array.shape, np.uint8)
    for number, one in enumerate(classes, start=1):
        label[np.isin(array, one.values)] = number
    if not label.any():
        found = ", ".join(f"{value:g}" for value in values[:10])
        wanted = " or ".join(map(str, sorted(named))) if chosen else "value but 0"
        raise InputError(f"{source.label} holds no {wanted} (found: {found}); give the scan without its label")
    return label, [int(value) for value in values[:MOST_VALUES]]


def _misfit(source: RawCase, scan: Scan, label: Scan, off: float) -> str:
    if np.isinf(off):
        how = f"shape {label.array.shape} and {scan.array.shape}"
        return f"{source.label} lies on another grid than {source.image} ({how}); resample the label onto its image"
    return (
        f"{source.label} lies on another grid than {source.image}: corners are up to {off:.2f} voxels apart; resample "
        f"the label, or accept it with --grid_tolerance {np.ceil(off * 10) / 10:g} where the voxels are the same"
    )


def _shift(start: Sequence[int]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, 3] = start
    return affine


def report(dest: Path, outcome: Outcome) -> list[str]:
    """Lines for the terminal about a prepared folder: how many cases, and every fault."""
    lines = [
        f"{shown(dest)}: {len(outcome.labeled)} labeled and {len(outcome.unlabeled)} unlabeled cases "
        f"({len(outcome.cases) - outcome.kept} written, {outcome.kept} were there already)"
    ]
    lines += [f"fault: {case}: {fault}" for case, fault in outcome.faults.items()]
    if outcome.faults:
        lines.append(f"{len(outcome.faults)} of {len(outcome.cases) + len(outcome.faults)} scans were left out")
    return lines
