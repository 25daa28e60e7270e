"""What predict.py reads: scans as they come from a scanner, and cases that are prepared for training already."""

from dataclasses import dataclass
from pathlib import Path

from dataloaders import case_files
from scans.files import READABLE, Scan, case_id, find_scans, read_scan
from scans.preprocess import Preprocessing, read_record
from utils.errors import InputError
from utils.nifti import affine_ras


@dataclass(frozen=True, eq=False)
class Source:
    """A scan, and how it was prepared already; None for a raw one."""

    scan: Scan
    prepared: Preprocessing | None = None


def find_sources(path: Path) -> dict[str, Path]:
    """Files by case id: one scan or one HDF5 case, a folder of scans, or a data folder of HDF5 cases."""
    if path.is_dir():
        cases = sorted(path.glob(f"*/{case_files.CASE_FILE}"))
        return {case.parent.name: case for case in cases} or find_scans(path)
    case = path.parent.name if path.name == case_files.CASE_FILE else case_id(path)
    if case is None or not path.is_file():
        kinds = ", ".join((*READABLE, f"<case>/{case_files.CASE_FILE}"))
        raise InputError(f"--input {path} is no scan; give a file ({kinds}) or a folder of scans")
    return {case: path}


def read_source(path: Path) -> Source:
    """One of `find_sources`; an HDF5 case with the record of its data folder. No label is read."""
    if path.name != case_files.CASE_FILE:
        return Source(read_scan(path))
    root, case = path.parent.parent, path.parent.name
    scan = Scan(case_files.read_image(root, case), affine_ras(*case_files.read_geometry(root, case)))
    return Source(scan, Preprocessing.from_record(read_record(root)))
