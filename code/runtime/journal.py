"""What a run says while it trains: lines in log.txt, curves in curves.csv, TensorBoard."""

import csv
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from runtime import runs
from utils import files

WRITE_EVERY = 5.0  # seconds between two writings of curves.csv, which is written whole

CurveRow = dict[str, float]


class Journal:
    """Log, curves and TensorBoard of one run folder; continues those of a resumed run from its iteration."""

    def __init__(self, folder: Path, iteration: int = 0):
        self.folder = folder
        self.rows = [row for row in read_curves(folder) if row["iteration"] <= iteration]
        with files.writing(folder / runs.LOG):
            self._log = open(folder / runs.LOG, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
            self._board = SummaryWriter(folder / runs.TENSORBOARD, purge_step=iteration + 1)
        self._written = float("-inf")  # when

    def say(self, message: str) -> None:
        """A line for the terminal, above the progress bar, and for log.txt."""
        tqdm.write(message)
        self._write(message)

    def _write(self, message: str) -> None:
        with files.writing(self.folder / runs.LOG):
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n")
            self._log.flush()

    def report(self, message: str, show: bool) -> None:
        """A line of progress for log.txt and, with `show`, for the terminal."""
        if show:
            print(message, flush=True)
        self._write(message)

    def scalars(self, iteration: int, values: Mapping[str, float | Tensor]) -> None:
        """One row of the curves; tensors are fetched from their device here."""
        numbers = {name: float(value) for name, value in values.items()}
        self.rows.append({"iteration": iteration, **numbers})
        if time.monotonic() - self._written >= WRITE_EVERY:
            self.write_curves()
        with files.writing(self.folder / runs.TENSORBOARD):
            if losses := [value for name, value in numbers.items() if name.startswith("loss/")]:
                self._board.add_scalar("loss", sum(losses), iteration)  # the first chart
            for name, value in numbers.items():
                self._board.add_scalar(name if "/" in name else f"training/{name}", value, iteration)

    def image(self, iteration: int, name: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 for TensorBoard."""
        with files.writing(self.folder / runs.TENSORBOARD):
            self._board.add_image(name, picture, iteration, dataformats="HWC")

    def write_curves(self) -> None:
        """Bring curves.csv up to date, as before each checkpoint: a resumed run continues its curves from there."""
        columns = list(dict.fromkeys(["iteration", *(name for row in self.rows for name in row)]))
        with files.atomic(self.folder / runs.CURVES) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        self._written = time.monotonic()

    def close(self) -> None:
        """Write what is left, and close the files."""
        try:
            self.write_curves()
        finally:
            with files.writing(self.folder / runs.TENSORBOARD):
                self._board.close()
            with files.writing(self.folder / runs.LOG):
                self._log.close()


class Silence:
    """The journal of a rank that does not lead: nothing is said or written."""

    def say(self, message: str) -> None:
        """Says nothing."""

    def scalars(self, iteration: int, values: Mapping[str, float | Tensor]) -> None:
        """Writes nothing."""

    def write_curves(self) -> None:
        """Writes nothing."""


def read_curves(folder: Path) -> list[CurveRow]:
    """Rows of curves.csv; empty where there is none."""
    path = folder / runs.CURVES
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [{**row, "iteration": int(row["iteration"])} for row in rows]
