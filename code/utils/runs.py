"""Run folder, log, checkpoint, seed: the one place that knows the names of files."""

import contextlib
import json
import os
import random
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import InputError
from utils.options import repository_path

LAST, BEST_VAL = "last.pth", "best_val.pth"
LOG, OPTIONS, CURVES = "log.txt", "options.json", "curves.csv"
METRICS_CSV, METRICS_JSON = "metrics.csv", "metrics.json"
PREDICTIONS, FIGURES, TENSORBOARD = "predictions", "figures", "tensorboard"


def run_folder(model_path: str, exp: str) -> Path:
    """`<model_path>/<exp>`."""
    return repository_path(model_path) / exp


def default_exp(options: Namespace) -> str:
    """Name of a run that was not named by --exp."""
    return f"{options.method}_{options.preset}_l{options.labelnum}_s{options.seed}"


def prepare_run(options: Namespace) -> Path:
    """The folder of a new or resumed run; an existing run without --resume or --overwrite is an error."""
    folder = run_folder(options.model_path, options.exp)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is not a folder; choose another --exp or --model_path")
    if (folder / OPTIONS).exists():
        if options.overwrite:
            shutil.rmtree(folder)
        elif not options.resume:
            raise InputError(f"run {options.exp} exists in {folder}; give --resume, --overwrite or another --exp")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def existing_run(model_path: str, exp: str) -> Path:
    """The folder of a run that was trained; names the runs that exist if this one does not."""
    folder = run_folder(model_path, exp)
    if not (folder / OPTIONS).exists():
        known = sorted(path.parent.name for path in repository_path(model_path).glob(f"*/{OPTIONS}"))
        there = f"there are: {', '.join(known)}" if known else "there is none yet"
        raise InputError(f"no run {exp!r} in {repository_path(model_path)} ({there}); see --exp and --model_path")
    return folder


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once everything is on the disk, or vanishes."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; see --model_path") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """A checkpoint, whole or not at all."""
    with atomic(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise InputError(f"cannot write {path}: {error}; see --model_path") from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint of this project; only plain data and tensors are unpickled."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}; train first or see --exp") from None
    except Exception as error:
        raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__}); see --exp") from error
    if not isinstance(state, dict) or "networks" not in state:
        raise InputError(f"{path} is not a checkpoint of this project; published weights go to --pretrained")
    return state


def seed_everything(seed: int) -> None:
    """Seed every generator that a method may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the legacy generator is what users' own code may draw from
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """States of all generators, as plain data and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Undo what has been drawn since `rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
