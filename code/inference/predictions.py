"""The folder that predict.py writes: masks, predictions.csv with a row per scan, predictions.json with the settings."""

import contextlib
import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.colors import look
from runtime import runs
from scans.files import OUTPUT_FLAG
from utils import files
from utils.errors import InputError
from utils.labels import ONE_CLASS, LabelClass

try:
    import fcntl
except ImportError:  # Windows: one command at a time
    fcntl = None

FIELDS = ("case", "file", "output", "volume_ml", "empty", "touches_border", "seconds", "error")
LABELS_JSON, LABELS_TXT = "labels.json", "labels.txt"  # beside the masks
ITKSNAP_HEAD = """# ITK-SnAP Label Description File
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
    0     0    0    0        0  0  0    "Clear Label\""""


def volume_column(one: LabelClass) -> str:
    """Column of predictions.csv with the volume of a class."""
    return f"volume_ml_{one.name}"


def itksnap_line(one: LabelClass, index: int) -> str:
    """A class as ITK-SNAP's label descriptions have it."""
    red, green, blue = bytes.fromhex(look(index)["color"][1:])
    return f'{one.values[0]:5} {red:5} {green:4} {blue:4}        1  1  1    "{one.name}"'


class Predictions:
    """A folder of predictions, which several commands may share: a row is added under a lock, once its scan is done.

    A folder holds predictions of one group of settings: without `resume` or `overwrite` an existing one is an
    `InputError`, and with `resume` other settings are one.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        classes: Sequence[LabelClass] = ONE_CLASS,
    ):
        self.folder, self.csv, self.classes = folder, folder / runs.PREDICTIONS_CSV, classes
        self.fields = (*FIELDS, *(volume_column(one) for one in classes)) if len(classes) > 1 else FIELDS
        self._json = folder / runs.PREDICTIONS_JSON
        self._settings = json.loads(json.dumps(settings))
        self._resume, self._overwrite = resume, overwrite
        self._warned = False  # that there are no locks

    def claim(self, inputs: Iterable[Path], outputs: Sequence[Path]) -> None:
        """Make the folder and note the settings; an output that is there, is an input, or belongs to two scans is an
        `InputError`.
        """
        # unlike Path.resolve, os.path.realpath takes links that lead to themselves
        scans = {os.path.realpath(path) for path in inputs}
        for path, count in Counter(outputs).items():
            if count > 1:  # the mask of a scan `a_prob` and the probability of a scan `a`
                raise InputError(f"{path} would be written for two scans; rename one of them")
            if {os.path.realpath(path), os.path.realpath(self.folder)} & scans:
                raise InputError(f"{path} would overwrite a scan; give another --output")
        with files.writing(self.folder, OUTPUT_FLAG):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if self._overwrite:
                self.csv.unlink(missing_ok=True)
            elif self._resume and (self.csv.exists() or self._json.exists()):
                self._require_settings()
            elif not self._resume:
                for path in (self.csv, self._json, *outputs):
                    if os.path.exists(path):  # unlike Path.exists, it takes names that are too long for the system
                        raise InputError(f"{path} exists; give --resume, --overwrite or another --output")
            files.write_json(self._json, self._settings, OUTPUT_FLAG)
            if self.classes != ONE_CLASS:
                self._write_names()

    def _write_names(self) -> None:
        """Names of the values in the masks: labels.json as in a dataset.json, labels.txt for ITK-SNAP."""
        names = {"0": "background"} | {str(one.values[0]): one.name for one in self.classes}
        files.write_json(self.folder / LABELS_JSON, {"labels": names}, OUTPUT_FLAG)
        lines = [ITKSNAP_HEAD, *(itksnap_line(one, number) for number, one in enumerate(self.classes))]
        with files.atomic(self.folder / LABELS_TXT, OUTPUT_FLAG) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _require_settings(self) -> None:
        try:
            made_with = json.loads(self._json.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{self._json} cannot be read ({error}); give --overwrite or another --output") from None
        names = sorted({*self._settings, *made_with})
        if others := [name for name in names if made_with.get(name) != self._settings.get(name)]:
            raise InputError(
                f"the predictions in {self.folder} were made with other settings ({', '.join(others)}: see "
                f"{self._json.name}); give these, --overwrite or another --output"
            )

    def rows(self) -> dict[str, dict[str, str]]:
        """The rows of predictions.csv by case."""
        if not self.csv.exists():
            return {}
        with open(self.csv, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return {row["case"]: row for row in csv.DictReader(file)}

    def missing(self, scans: Mapping[str, Path], masks: Mapping[str, Path]) -> list[str]:
        """The cases that have no mask yet; a mask that was made from another file is an `InputError`."""
        rows, missing = self.rows(), []
        for case, file in scans.items():
            row = rows.get(case)
            if row is None or row["error"]:
                missing.append(case)
            elif row["file"] != str(file):
                raise InputError(f"{masks[case]} is of {row['file']}, not of {file}; give another --output")
            elif not masks[case].exists():
                missing.append(case)
        return missing

    def add(self, case: str, **values: str) -> None:
        """Add or replace the row of a case; values left out are empty."""
        with self._locked():
            rows = {**self.rows(), case: {**dict.fromkeys(self.fields, ""), "case": case, **values}}
            with (
                files.atomic(self.csv, OUTPUT_FLAG) as temporary,
                open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
            ):
                writer = csv.DictWriter(file, self.fields)
                writer.writeheader()
                writer.writerows(row for _, row in sorted(rows.items()))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the commands that write into the folder; the lock ends with its process."""
        if fcntl is None:
            yield
            return
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:  # of some network file systems
                if not self._warned:
                    print(f"no locks in {self.folder} ({error.strerror}): run one command at a time into it")
                self._warned = True
            yield
        finally:
            os.close(handle)
