"""The folder that predict.py writes: masks, predictions.csv with a row per scan, predictions.json with the settings."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime import runs
from utils import files
from utils.errors import InputError

COLUMNS = ("case", "file", "output", "volume_ml", "empty", "touches_border", "seconds", "error")
Row = dict[str, str]


class Predictions:
    """Rows of predictions.csv by case, written whole after each scan, so that none is lost when a later one fails.

    A folder holds predictions of one group of settings: without `resume` or `overwrite` an existing one is an
    `InputError`, and with `resume` other settings are one.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resume: bool = False, overwrite: bool = False):
        self.folder = folder
        self.rows: dict[str, Row] = {}
        self._replace = resume or overwrite
        settings = json.loads(json.dumps(settings))
        if (folder / runs.PREDICTIONS_CSV).exists() and not self._replace:
            raise InputError(f"{folder} holds predictions; give --resume, --overwrite or another --output")
        if resume and (folder / runs.PREDICTIONS_CSV).exists():
            self._require(settings)
            with open(folder / runs.PREDICTIONS_CSV, newline="", encoding="utf-8") as file:
                self.rows = {row["case"]: row for row in csv.DictReader(file)}
        self._settings = settings

    def _require(self, settings: dict[str, Any]) -> None:
        path = self.folder / runs.PREDICTIONS_JSON
        try:
            made_with = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); give --overwrite or another --output") from None
        names = sorted({*settings, *made_with})
        if others := [name for name in names if made_with.get(name) != settings.get(name)]:
            raise InputError(
                f"the predictions in {self.folder} were made with other settings ({', '.join(others)}: see "
                f"{runs.PREDICTIONS_JSON}); give these, --overwrite or another --output"
            )

    def claim(self, inputs: Iterable[Path], outputs: Sequence[Path]) -> None:
        """Make the folder and note the settings; an output that is there, is an input, or is wanted twice is an
        `InputError`.
        """
        scans = {path.resolve() for path in inputs}
        for path in outputs:
            if outputs.count(path) > 1:  # the mask of a scan `a_prob` and the probability of a scan `a`
                raise InputError(f"{path} would be written for two scans; rename one of them")
            if path.resolve() in scans or self.folder.resolve() in scans:
                raise InputError(f"{path} would overwrite a scan; give another --output")
            if path.exists() and not self._replace:
                raise InputError(f"{path} exists; give --overwrite or another --output")
        with files.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self.folder / runs.PREDICTIONS_JSON, self._settings)

    def done(self, case: str, file: Path, output: Path) -> bool:
        """Whether a scan was segmented; a case that came from another file is an `InputError`."""
        row = self.rows.get(case)
        if row is None or row["error"]:
            return False
        if row["file"] != str(file):
            raise InputError(f"{output} is of {row['file']}, not of {file}; give another --output")
        return output.exists()

    def add(self, case: str, **values: str) -> None:
        """Add or replace the row of a case, and write predictions.csv; values left out are empty."""
        self.rows[case] = {**dict.fromkeys(COLUMNS, ""), "case": case, **values}
        path = self.folder / runs.PREDICTIONS_CSV
        with files.atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(row for _, row in sorted(self.rows.items()))
