"""Cases on disk: from a list file to the arrays of its cases, and the writing of both.

Layout: `<root>/<case>/mri_norm2.h5` with the data sets `image` (float32) and `label` (uint8, 0 to C for C foreground
classes; LA: 1 = left atrium), both (W, H, D). Attributes, all optional: `spacing_mm`, `origin_mm` and `direction`, the
geometry in ITK's terms (LPS; the direction as 9 numbers row by row); `class_names` and `class_values`, JSON lists of
the names and of the original label values of the classes. A fault is one sentence that names the file, the data set
and what fixes it.
"""

import glob
import hashlib
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from utils.errors import InputError
from utils.files import atomic, is_utf8, writing
from utils.labels import MOST_CLASSES, ONE_CLASS, LabelClass
from utils.nifti import VOXEL_MM
from utils.words import counted

CASE_FILE = "mri_norm2.h5"
MANIFEST = "manifest.json"  # in a folder that was prepared: where each case comes from
IMAGE_KEY = "image"
LABEL_KEY = "label"
SPACING_KEY = "spacing_mm"
ORIGIN_KEY = "origin_mm"
DIRECTION_KEY = "direction"
NAMES_KEY, VALUES_KEY = "class_names", "class_values"
VOXELS_KEY = "voxels"  # SHA-256 of the raw scan's values: equal for one scan under two ids
LABEL_ROUNDING = 1e-3  # by which stored label values may miss whole numbers
DEST = "--dest"  # the flag by which scripts that write a data folder name it
SPACING_MM = (0.625, 0.625, 0.625)  # of the 2018 Atrial Segmentation Challenge; its files do not carry it

_DTYPES = {IMAGE_KEY: np.float32, LABEL_KEY: np.uint8}


def read_list(path: Path, flag: str) -> list[str]:
    """Case ids of a list file, in its order: one per line, blank lines ignored, no id twice.

    Args: path; flag, the option that names this file, e.g. "--train_list", for the error message.
    """
    cases, faults = scan_list(path, flag)
    _raise_first(faults)
    return cases


def scan_list(path: Path, flag: str) -> tuple[list[str], list[str]]:
    """The ids of a list file, each once, and a sentence for everything that is wrong with the file."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return [], [f"list file {path} does not exist; name the right file with {flag} (default: in --root_path)"]
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"list file {path} cannot be read as text ({error}); name the right file with {flag}"]
    ids = [line.strip() for line in lines if line.strip()]
    cases = list(dict.fromkeys(ids))
    faults = [
        f"list file {path} names case {case} {count} times; keep one line, or name another {flag}"
        for case, count in Counter(ids).items()
        if count > 1
    ]
    faults += [
        f"list file {path} names {case}, a path; write the name of a folder in --root_path, or name another {flag}"
        for case in cases
        if not is_name(case)
    ]
    if not cases:
        faults = [f"list file {path} names no case; write one case id per line, or name another {flag}"]
    return cases, faults


def is_name(case: str) -> bool:
    """Whether a case id is the name of a folder, not a path that may leave the data folder or spell another id."""
    plain = [case] == case.strip().splitlines() and not case.startswith(".") and not set(case) & set("/\\\0")
    return plain and is_utf8(case)


def write_list(path: Path, cases: Sequence[str]) -> None:
    """A list file that `read_list` reads, whole or not at all."""
    with atomic(path, DEST) as temporary:
        temporary.write_text("".join(f"{case}\n" for case in cases), encoding="utf-8")


def case_path(root: Path, case: str) -> Path:
    """The HDF5 file of a case."""
    return Path(root) / case / CASE_FILE


def read_image(root: Path, case: str) -> np.ndarray:
    """Whole image: (W, H, D), float32, finite. The label is not touched."""
    image, faults = _load(root, case, IMAGE_KEY)
    _raise_first(faults)
    return image


def read_label(root: Path, case: str, num_classes: int = 1) -> np.ndarray:
    """Whole label: (W, H, D), uint8, 0 to `num_classes`, of the shape of the image."""
    label, faults = _load(root, case, LABEL_KEY, num_classes)
    _raise_first(faults)
    return label


def read_classes(root: Path, case: str) -> tuple[LabelClass, ...]:
    """The foreground classes that a case records; one if it records none."""
    with _opened(root, case) as file:
        names, values = file.attrs.get(NAMES_KEY), file.attrs.get(VALUES_KEY)
    if names is None and values is None:
        return ONE_CLASS
    try:
        pairs = zip(json.loads(names), json.loads(values), strict=True)
        classes = tuple(LabelClass(str(name), tuple(map(int, group))) for name, group in pairs)
    except (TypeError, ValueError):
        classes = ()
    if not classes:
        rule = "a JSON list of names there, and one of as many lists of whole numbers in 'class_values'"
        raise _invalid(root, case, NAMES_KEY, names, f"{rule} (here {values!r})")
    return classes


def class_attributes(classes: Sequence[LabelClass]) -> dict[str, str]:
    """What a case's attributes say of its classes, for `write_case`."""
    names, values = [one.name for one in classes], [one.values for one in classes]
    return {NAMES_KEY: json.dumps(names), VALUES_KEY: json.dumps(values)}


def read_crop(root: Path, case: str, key: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Only the voxels [start, start + size) of one data set, in the type of the whole-volume readers.

    Values are not checked: that would need the whole volume. A crop that leaves the volume is a ValueError.
    """
    with _opened(root, case) as file:
        data = _dataset(file, key)
        stop = [first + length for first, length in zip(start, size, strict=True)]
        # h5py would silently shorten such a slice
        if any(a < 0 or b > n or b <= a for a, b, n in zip(start, stop, data.shape, strict=True)):
            raise ValueError(f"crop from {tuple(start)} to {tuple(stop)} leaves the volume {data.shape}")
        return _whole(data[tuple(map(slice, start, stop))], key).astype(_DTYPES[key])


def read_shape(root: Path, case: str) -> tuple[int, int, int]:
    """(W, H, D) of the image, without reading a voxel."""
    with _opened(root, case) as file:
        return _dataset(file, IMAGE_KEY).shape


def read_spacing(root: Path, case: str) -> tuple[float, float, float]:
    """Voxel size along W, H, D in mm: the file's attribute `spacing_mm`, or else the challenge's 0.625."""
    spacing = _attribute(root, case, SPACING_KEY, SPACING_MM)
    if min(spacing) < VOXEL_MM[0] or max(spacing) > VOXEL_MM[1]:
        raise _invalid(root, case, SPACING_KEY, spacing, "three sizes in mm, {:g} to {:g}".format(*VOXEL_MM))
    return spacing


def read_geometry(root: Path, case: str) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Spacing, origin and direction as `utils.nifti.write_nifti` takes them; LPS axes from 0 unless stored."""
    origin = _attribute(root, case, ORIGIN_KEY, (0.0, 0.0, 0.0))
    direction = _attribute(root, case, DIRECTION_KEY, tuple(np.eye(3).ravel().tolist()))
    axes = np.reshape(direction, (3, 3))
    if not np.allclose(np.linalg.norm(axes, axis=0), 1, atol=1e-3) or abs(np.linalg.det(axes)) < 1e-3:
        raise _invalid(root, case, DIRECTION_KEY, direction, "three independent unit columns")
    return read_spacing(root, case), origin, direction


def _attribute(root: Path, case: str, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """An attribute of as many finite numbers as the default has."""
    with _opened(root, case) as file:
        stored = file.attrs.get(key, default)
    try:
        values = np.asarray(stored, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (len(default),) or not np.isfinite(values).all():
        raise _invalid(root, case, key, stored, f"{len(default)} finite numbers")
    return tuple(values.tolist())


def _invalid(root: Path, case: str, key: str, stored: Any, rule: str) -> InputError:
    shown = " ".join(repr(stored).split())  # numpy breaks lines
    return InputError(f"{case_path(root, case)}: attribute '{key}' is {shown}; write {rule}")


def write_case(
    root: Path, case: str, image: np.ndarray, label: np.ndarray | None, attributes: Mapping[str, Any]
) -> None:
    """Write one case, whole or not at all; its folder is made. The label may be missing, the attributes go along."""
    buffer = io.BytesIO()  # a full disk must fail in Python's own write, not within the HDF5 library
    with h5py.File(buffer, "w") as file:
        for key, array in ((IMAGE_KEY, image), (LABEL_KEY, label)):
            if array is not None:
                file.create_dataset(key, data=array.astype(_DTYPES[key]), compression="gzip")
        file.attrs.update(attributes)
    path = case_path(root, case)
    with writing(path, DEST):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path, DEST) as temporary:
        temporary.write_bytes(buffer.getvalue())


def has_label(root: Path, case: str) -> bool:
    """Whether the file holds a label; its values are not read."""
    with _opened(root, case) as file:
        return LABEL_KEY in file


def same_scans(root: Path, cases: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of ids whose images have equal voxels, as prepared or as scanned: one scan under two names.

    Cases that cannot be read are left out. Images are compared by shape and middle slice before they are read.
    """
    names = list(dict.fromkeys(cases))
    alike = [*_alike(root, names, _raw_clue), *_alike(root, names, _shape_clue, _slice_clue, _image_clue)]
    return list(dict.fromkeys(alike))


def _alike(root: Path, cases: list[str], *clues: Callable[[h5py.File], Any]) -> list[tuple[str, str]]:
    """The first of those that are equal in each clue, with each of the others; None is equal to nothing."""
    same = [cases]
    for clue in clues:
        groups: dict[Any, list[str]] = {}
        for number, group in enumerate(same):
            for case in group:
                try:
                    with _opened(root, case) as file:
                        found = clue(file)
                except InputError:  # said where the case is read
                    continue
                if found is not None:
                    groups.setdefault((number, found), []).append(case)
        same = [group for group in groups.values() if len(group) > 1]
    return [(group[0], other) for group in same for other in group[1:]]


def _raw_clue(file: h5py.File) -> str | None:
    return str(file.attrs[VOXELS_KEY]) if VOXELS_KEY in file.attrs else None


def _shape_clue(file: h5py.File) -> tuple[int, ...]:
    return _dataset(file, IMAGE_KEY).shape


def _slice_clue(file: h5py.File) -> bytes:
    data = _dataset(file, IMAGE_KEY)
    return data[..., data.shape[2] // 2].astype(np.float32).tobytes()


def _image_clue(file: h5py.File) -> str:
    return hashlib.sha256(_dataset(file, IMAGE_KEY)[()].astype(np.float32)).hexdigest()


def find_faults(root: Path, case: str, expect_label: bool = True, num_classes: int | None = None) -> list[str]:
    """Every fault of one case, as sentences; empty for a valid one.

    Args: expect_label, False for an unlabeled case, which may lack a label; one that is there is checked; num_classes,
        the largest value of the label, None for what the case records.
    """
    faults = _load(root, case, IMAGE_KEY)[1]
    try:
        classes = num_classes or len(read_classes(root, case))
        if expect_label or has_label(root, case):
            faults += _load(root, case, LABEL_KEY, classes)[1]
        read_geometry(root, case)
    except InputError as error:
        faults.append(str(error))
    return list(dict.fromkeys(faults))  # a file that does not open says so once


def _raise_first(faults: list[str]) -> None:
    if faults:
        raise InputError(faults[0])


@contextmanager
def _opened(root: Path, case: str) -> Iterator[h5py.File]:
    """The open file of a case; whatever cannot be opened or read becomes an `InputError`."""
    path = case_path(root, case)
    if not Path(root).is_dir():
        raise InputError(f"data folder {root} does not exist; name the folder of the cases with --root_path")
    if not path.is_file():
        raise InputError(_absence(Path(root), case))
    try:
        with h5py.File(path, "r") as file:
            yield file
    except MemoryError as error:
        raise InputError(f"{path} needs more memory than there is ({error}); write smaller volumes") from error
    except (OSError, RuntimeError) as error:  # h5py raises both for truncated and for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "lock file" in reason:
            raise InputError(
                f"{path} is locked: another process writes it, or its file system has no locks; wait for that process, "
                "or set HDF5_USE_FILE_LOCKING=FALSE"
            ) from error
        if getattr(error, "errno", None):  # of the system, not of the library
            raise InputError(
                f"{path} cannot be read: {os.strerror(error.errno)}; see its rights and its disk"
            ) from error
        raise InputError(f"{path} is damaged or no HDF5 file ({reason}); write the case again") from error


def _absence(root: Path, case: str) -> str:
    """What is there instead of a missing case, and what to do; one sentence for a folder without any."""
    missing = f"{case_path(root, case)} does not exist"
    places = [glob.escape(case) + place for place in ("/*.h5", "*.h5")] if is_name(case) else []
    for other in (file for place in places for file in root.glob(place)):  # *_norm.h5, or the slices of SSL4MIS
        return f"{missing}, but {other} does; move it there if it holds whole volumes"
    if not next(root.glob(f"*/{CASE_FILE}"), None):
        return (
            f"{root} holds no case, <case>/{CASE_FILE}: data/README.md says where the left-atrium data are, "
            "prepare_scans.py prepares other scans, and --root_path names the folder; make demo needs none"
        )
    for other in root.iterdir():
        if unicodedata.normalize("NFC", other.name) == unicodedata.normalize("NFC", case):
            return f"{missing}: {other} has its accents in other characters; copy that name into the list"
    return f"{missing}; correct case {case} in its list, or the folder --root_path"


def _dataset(file: h5py.File, key: str) -> h5py.Dataset:
    """The data set `key`, known to be a 3-D array of numbers."""
    data = file.get(key)  # None where the name is missing, or what it points to is damaged
    if not isinstance(data, h5py.Dataset):
        found = ", ".join(file) or "nothing"
        unread = ", or name lists that ask for no label of it (--train_list and --labelnum, --test_list)"
        fix = "write the case again" + (unread if key == LABEL_KEY else "")
        raise InputError(f"{file.filename} holds no data set '{key}' (found: {found}); {fix}")
    if data.ndim != 3 or 0 in data.shape:
        raise InputError(f"{file.filename}: '{key}' has shape {data.shape}; it must be a volume (W, H, D)")
    try:
        kind = data.dtype
    except (TypeError, ValueError) as error:  # numbers that NumPy does not know, such as floats of damaged widths
        raise InputError(f"{file.filename} is damaged: '{key}' has an unknown type ({error})") from error
    if kind.kind not in "fiub":
        raise InputError(f"{file.filename}: '{key}' has type {kind}; it must hold real numbers")
    filters = data.id.get_create_plist()
    for code, _, _, name in map(filters.get_filter, range(filters.get_nfilters())):
        if not h5py.h5z.filter_avail(code):
            raise InputError(f"{file.filename}: '{key}' needs the filter {name.decode()} ({code}); write it with gzip")
    return data


def _load(root: Path, case: str, key: str, num_classes: int = 1) -> tuple[np.ndarray | None, list[str]]:
    """One whole data set, None where it cannot be used, and a sentence for each of its faults."""
    try:
        with _opened(root, case) as file:
            image_shape = _dataset(file, IMAGE_KEY).shape  # a label without an image is of no use
            values = _whole(_dataset(file, key)[()], key)
    except InputError as error:
        return None, [str(error)]
    where = f"{case_path(root, case)}: '{key}'"
    if key == IMAGE_KEY:
        faults = _image_faults(where, values)
    else:
        faults = _label_faults(where, values, image_shape, num_classes)
    return (None if faults else values.astype(_DTYPES[key])), faults


def _whole(values: np.ndarray, key: str) -> np.ndarray:
    """Label values that miss whole numbers by rounding alone, as these numbers; all others as they are."""
    if key == IMAGE_KEY or values.dtype.kind != "f":
        return values
    return np.where(np.abs(values - np.round(values)) <= LABEL_ROUNDING, np.round(values), values)


def _image_faults(where: str, image: np.ndarray) -> list[str]:
    with np.errstate(over="ignore"):  # a double beyond float32 becomes inf, and is reported as such
        bad = int(np.count_nonzero(~np.isfinite(image.astype(np.float32))))
    if bad:
        return [f"{where} is NaN or infinite in {counted(bad, 'voxel')}; write finite values"]
    flat = image.min() == image.max()  # what is read where chunks or a linked file are missing, too
    return [f"{where} is {image.flat[0]:g} everywhere; write the scan's voxels, or leave the case out"] if flat else []


def _label_faults(where: str, label: np.ndarray, image_shape: tuple[int, ...], num_classes: int) -> list[str]:
    faults = []
    if label.shape != image_shape:
        faults.append(f"{where} has shape {label.shape}, '{IMAGE_KEY}' {image_shape}; write both on one grid")
    foreign = np.unique(label[np.isin(label, np.arange(num_classes + 1), invert=True)])
    if foreign.size:
        some = ", ".join(str(value) for value in foreign[:5])
        known = "0 and 1" if num_classes == 1 else f"0 to {num_classes}"
        faults.append(f"{where} has values other than {known} ({some}); {_remedy(foreign)}")
    return faults


def _remedy(foreign: np.ndarray) -> str:
    """What to do about label values that no class has."""
    merge = "write 1 for the foreground and 0 elsewhere"
    are_classes = np.isin(foreign, np.arange(MOST_CLASSES + 1)).all()
    return f"train with --num_classes {int(foreign.max())}, or {merge}" if are_classes else merge
