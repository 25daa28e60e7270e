"""What the settings of the sliding window cost and give: one trained run, every scan, all settings in turns."""

import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dataloaders import case_files
from evaluation.metrics import evaluate, summarise
from evaluation.tables import text_table
from inference.scoring import valid_cases
from inference.trained import reported_output, trained_method
from inference.windows import THRESHOLD, predict_volume
from methods.base import Method
from runtime import runs
from runtime.device import pick_device, place
from test_LA import make_parser, parse_options
from utils.errors import InputError
from utils.files import repository_path

PAPER_PATCH, PAPER_STRIDE = (112, 112, 80), (18, 18, 4)  # voxels


def paper_stride(patch: Sequence[int]) -> tuple[int, int, int]:
    """The paper's strides, scaled like the patch."""
    return tuple(max(1, round(s * n / p)) for s, n, p in zip(PAPER_STRIDE, patch, PAPER_PATCH, strict=True))


def window_settings(patch: Sequence[int]) -> dict[str, list[str]]:
    """Flags of test_LA.py by row; what the others are compared with comes first."""
    xy, _, z = paper_stride(patch)
    paper = f"--stride_xy {xy} --stride_z {z}"
    quarter, half = (f"--stride_xy {min(patch[:2]) // parts} --stride_z {patch[2] // 2}" for parts in (4, 2))
    rows = [
        f"{paper} --blend uniform --amp off",
        f"{paper} --blend uniform",
        f"{paper} --blend gaussian",
        f"{quarter} --blend uniform",
        "--protocol fast",
        "--protocol fast --blend gaussian",
        f"{half} --blend uniform",
        f"{half} --blend gaussian",
        "--protocol whole",
    ]
    return {row: row.split() for row in rows}


def compare_windows(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Print and return a row per setting: mean Dice and 95HD, change of the Dice, seconds beside the first setting's.

    Args: argv, flags of test_LA.py, which name one run and its scans.
    """
    asked = make_parser().parse_args(argv)
    if len(asked.exp) > 1:
        raise InputError(f"--windows looks at one run, not at {len(asked.exp)}; give one --exp")
    exp = asked.exp[0]
    path = runs.checkpoint_path(runs.existing_run(asked.model_path, exp), asked.weights)
    state = runs.load_checkpoint(path)
    rows = window_settings(state["options"]["patch_size"])
    options = {name: parse_options([*argv, *row], exp, state["options"]) for name, row in rows.items()}
    first = next(iter(options.values()))
    method, device = trained_method(first, state, path), pick_device(first)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in options}
    for case in tqdm(valid_cases(first, state), unit="case", disable=None):
        for name, row in options.items():
            scores[name].append(_score(place(method, device, row), case, row, device))
    return [_row(name, found, next(iter(scores.values()))) for name, found in scores.items()]


def window_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table for people."""
    header = ["flags of test_LA.py", "Dice [%]", "change (sd)", "95HD [vox]", "missed", "seconds", "times faster"]
    cells = [
        [
            row["flags"],
            f"{row['dice']:.2f}",
            f"{row['change']:+.2f} ({row['change_sd']:.2f})",
            f"{row['hd95_vox']:.2f}",
            str(row["missed"]),
            f"{row['seconds']:.2f}",
            f"{row['ratio']:.1f}",
        ]
        for row in rows
    ]
    return text_table(header, cells)


def _score(method: Method, case: str, options: Namespace, device: torch.device) -> dict[str, float]:
    root, head = repository_path(options.root_path), reported_output(method, options)
    image = case_files.read_image(root, case)
    start = time.perf_counter()
    prob = predict_volume(method, image, options, device, (head,))[head][0]
    seconds = time.perf_counter() - start  # the map is on the host: a GPU has finished
    return {**evaluate(prob > THRESHOLD, case_files.read_label(root, case)), "seconds": seconds}


def _row(name: str, scores: list[dict[str, float]], reference: list[dict[str, float]]) -> dict[str, Any]:
    changes = [100 * (own["dice"] - other["dice"]) for own, other in zip(scores, reference, strict=True)]
    summary = summarise(scores)
    return {
        "flags": name,
        "dice": 100 * summary["dice"]["mean"],
        "change": float(np.mean(changes)),
        "change_sd": float(np.std(changes, ddof=1)) if len(changes) > 1 else 0.0,
        "hd95_vox": summary["hd95_vox"]["mean"],
        "missed": summary["hd95_vox"]["missed"],
        "ratio": statistics.median(b["seconds"] / a["seconds"] for a, b in zip(scores, reference, strict=True)),
        "seconds": statistics.median(score["seconds"] for score in scores),
    }
