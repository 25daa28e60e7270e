"""The folder of a run: its name and the names of its files, its checkpoints and options, the state of generators."""

import math
import os
import random
import shutil
import subprocess
import zipfile
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import files
from utils.errors import InputError
from utils.files import PARTIAL, atomic, repository_path, writing

LAST, BEST_VAL = "last.pth", "best_val.pth"
LOG, OPTIONS, CURVES = "log.txt", "options.json", "curves.csv"
METRICS_CSV, METRICS_JSON = "metrics.csv", "metrics.json"
PREDICTIONS, FIGURES, TENSORBOARD = "predictions", "figures", "tensorboard"
REPORT = "report.html"  # in a run folder, and beside tables
PREDICTIONS_CSV, PREDICTIONS_JSON = "predictions.csv", "predictions.json"  # in a folder that predict.py writes

# What may differ between a run and its continuation, for it decides where and how the run is computed, not what.
FREE_ON_RESUME = frozenset(
    "root_path device gpu amp tf32 compile recompute num_workers cache window_batch save_every keep_checkpoints "
    "log_every report_every log_gradients image_every val_every".split()
)
OF_A_RUN = {"method", "patch_size"}  # what the options of every run have
OF_THE_COMMAND = ("exp", "model_path", "resume", "overwrite")  # a run does not hand these on to its continuation


def run_folder(model_path: str, exp: str) -> Path:
    """`<model_path>/<exp>`, below `<model_path>`."""
    root = Path(os.path.normpath(repository_path(model_path)))
    folder = Path(os.path.normpath(root / exp))
    if root not in folder.parents:
        raise InputError(f"--exp {exp} must name a folder below --model_path {root}")
    return folder


def checkpoint_path(folder: Path, weights: str) -> Path:
    """File of `last`, `best_val` or `iteration_<N>`."""
    return folder / f"{weights}.pth"


def scores_folder(folder: Path, weights: str) -> Path:
    """Where scores, predictions and pictures go: for other weights than `last` a folder of their own in the run's."""
    return folder if checkpoint_path(folder, weights) == folder / LAST else folder / weights


def default_exp(options: Namespace) -> str:
    """Name of a run that was not named by --exp."""
    return f"{options.method}_{options.preset}_l{options.labelnum}_s{options.seed}"


def stored_options(options: Namespace) -> dict[str, Any] | None:
    """The options of the run that --resume continues; None for a fresh start."""
    path = run_folder(options.model_path, options.exp) / LAST
    return load_checkpoint(path)["options"] if options.resume and path.exists() else None


def resumed_options(options: Namespace, given: set[str], stored: dict[str, Any] | None) -> Namespace:
    """The options of a continued run: the stored ones, also where a preset has changed since.

    A flag that is given and differs from the stored one is an `InputError`, but for `FREE_ON_RESUME` and a larger
    --max_iterations: there the flag wins. Entries that are no option of the run's method are dropped.
    """
    if stored is None:
        return options
    free = set(FREE_ON_RESUME)
    if "max_iterations" in given and options.max_iterations > stored.get("max_iterations", math.inf):
        free.add("max_iterations")
    without_effect = {"labelnum"} if stored.get("labeled_list") else set()  # the list decides
    for name in sorted(given.difference(free, OF_THE_COMMAND, without_effect)):
        if getattr(options, name) != stored.get(name):
            raise InputError(
                f"--{name} {getattr(options, name)} contradicts run {options.exp}, which was started with "
                f"{stored.get(name)}; leave it out to continue that run, or give another --exp"
            )
    now = {*OF_THE_COMMAND, *(free & given)}
    if now & {"device", "gpu"}:  # one without the other means a default, not the other's old value
        now |= {"device", "gpu"}
    return Namespace(**{k: value if k in now else stored.get(k, value) for k, value in vars(options).items()})


def claim_run(options: Namespace) -> Path:
    """The folder of a new or resumed run, not yet made; an existing run without --resume or --overwrite is an error."""
    folder = run_folder(options.model_path, options.exp)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is not a folder; choose another --exp or --model_path")
    if _holds_run(folder) and not (options.resume or options.overwrite):
        raise InputError(f"run {options.exp} exists in {folder}; give --resume, --overwrite or another --exp")
    return folder


def prepare_run(folder: Path, overwrite: bool) -> None:
    """Make the folder; with --overwrite delete the run in it. What a killed process left half-written goes too."""
    with writing(folder):
        if overwrite and _holds_run(folder):
            _delete_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f".*{PARTIAL}"):
            path.unlink()


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (OPTIONS, LAST))


def _delete_run(folder: Path) -> None:
    """Empty the folder, but for other runs within it."""
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif not any(_holds_run(file.parent) for name in (OPTIONS, LAST) for file in path.rglob(name)):
            shutil.rmtree(path)


def existing_run(model_path: str, exp: str) -> Path:
    """The folder of a run that was trained; names the runs that exist if this one does not."""
    folder = run_folder(model_path, exp)
    if not (folder / OPTIONS).exists():
        root = repository_path(model_path)
        known = sorted(str(path.parent.relative_to(root)) for path in root.glob(f"**/{OPTIONS}"))
        there = f"there are: {', '.join(known)}" if known else "there is none yet"
        raise InputError(f"no run {exp!r} in {root} ({there}); see --exp and --model_path")
    return folder


@cache
def commit() -> str | None:
    """Version of this code as git names it, with -dirty where files differ from it; None outside a repository."""
    command = ["git", "-C", str(files.REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """A checkpoint, whole or not at all."""
    with atomic(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise InputError(f"cannot write {path}: no room for it is left; make room or see --model_path") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this project; only plain data and tensors are unpickled.

    PyTorch does not look at the checksums in its archive: a damaged file would be loaded with other weights.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(
            f"there is no checkpoint {path}; train first (best_val needs --val_cases, iteration_<N> --keep_checkpoints)"
        ) from None
    except Exception as error:
        raise InputError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}); restore it, or see --exp"
        ) from error
    options = state.get("options") if isinstance(state, dict) else None
    if isinstance(options, dict):
        options.setdefault("network", "vnet")  # the only one before the flag
        options.setdefault("num_classes", 1)  # the only number before the flag
    if not isinstance(options, dict) or not OF_A_RUN <= options.keys() or not {"networks", "iteration"} <= state.keys():
        raise InputError(f"{path} is not a checkpoint of this project; published weights go to --pretrained")
    return state


def seed_everything(seed: int) -> None:
    """Seed every generator that a method may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the legacy generator is what users' own code may draw from
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of all generators that a run on this device draws from, as plain data and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Undo what has been drawn since `rng_state`, on whichever GPU that was."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and device.type == "cuda":  # older checkpoints hold all GPUs of their machine
        torch.cuda.set_rng_state(state["cuda"][min(device.index, len(state["cuda"]) - 1)], device)
