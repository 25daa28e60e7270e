"""What a run says while it trains: lines in log.txt, curves in curves.csv, TensorBoard."""

import csv
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils import runs

Row = dict[str, float]


class Journal:
    """Log, curves and TensorBoard of one run folder; continues those of a resumed run from its iteration."""

    def __init__(self, folder: Path, iteration: int = 0):
        self.folder = folder
        self.rows = [row for row in read_curves(folder) if row["iteration"] <= iteration]
        self._log = open(folder / runs.LOG, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._board = SummaryWriter(folder / runs.TENSORBOARD, purge_step=iteration + 1 if iteration else None)

    def say(self, message: str) -> None:
        """A line for the terminal, above the progress bar, and for log.txt."""
        tqdm.write(message)
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n")
        self._log.flush()

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """One row of the curves."""
        self.rows.append({"iteration": iteration, **values})
        self._write_curves()
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)

    def image(self, iteration: int, name: str, picture: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 for TensorBoard."""
        self._board.add_image(name, picture, iteration, dataformats="HWC")

    def _write_curves(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with runs.atomic(self.folder / runs.CURVES) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def close(self) -> None:
        """Flush everything."""
        self._log.close()
        self._board.close()


def read_curves(folder: Path) -> list[Row]:
    """Rows of curves.csv; empty where there is none."""
    path = folder / runs.CURVES
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
