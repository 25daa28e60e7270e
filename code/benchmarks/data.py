"""Rows about data: batches from files, the start of a training run, distance maps, metrics."""

import itertools
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from medpy.metric import binary

from benchmarks.reference import crops_from_files, signed_distances
from benchmarks.timing import Measurement, balls, compared, made_up_cases, stream_of, timed_in_turns
from dataloaders import case_files
from dataloaders.batch import Batch
from evaluation.metrics import evaluate
from train import parse_options as training_options
from utils.errors import InputError
from utils.sdm import signed_distance_batch

SAME_DISTANCE, SAME_METRIC = 1e-6, 1e-6
LABELED_CASES = 16  # of the cases, as in the paper
CASES = 80  # of the LA set, for training
START_LIMIT = 10.0  # seconds that 80 cases may take until the first batch
METRIC_SHAPE = (200, 200, 88)  # voxels
SPECKLES = 200  # false voxels far from the body, as a network leaves them


def time_batch(pairs: int) -> Measurement:
    """A batch of four crops from files of the size of the LA scans to augmented tensors, cases kept in memory."""
    with made_up_cases(4) as (root, cases):
        options = _options(root)
        stream = stream_of(options, cases, 2)
        iterations, rng = itertools.count(), np.random.default_rng(0)
        paths = [case_files.case_path(root, case) for case in cases]

        def ours() -> Batch:
            return stream[next(iterations) % options.max_iterations]

        return timed_in_turns(ours, lambda: crops_from_files(paths, options.patch_size, rng), pairs)


def _options(root: Path, *flags: str) -> Namespace:
    return training_options(["--method", "dtml", "--root_path", str(root), *flags])


def time_start(flags: tuple[str, ...], repeats: int) -> Measurement:
    """Seconds that 80 cases take until the first batch, beside the limit."""
    with made_up_cases(CASES) as (root, cases):
        options, seconds = _options(root, *flags), []
        for _ in range(repeats):
            start = time.perf_counter()
            _ = stream_of(options, cases, LABELED_CASES)[0]
            seconds.append(time.perf_counter() - start)
    return compared([(taken, START_LIMIT) for taken in seconds])


def time_maps(pairs: int) -> Measurement:
    """Signed distance maps of a batch of crops."""
    labels = torch.from_numpy(balls(4, (112, 112, 80))).float()[:, None]
    difference = (signed_distance_batch(labels) - signed_distances(labels)).abs().max().item()
    if difference > SAME_DISTANCE:
        raise InputError(f"distance maps of both sides differ by {difference:g}")
    return timed_in_turns(lambda: signed_distance_batch(labels), lambda: signed_distances(labels), pairs)


def time_metrics(speckled: bool, pairs: int) -> Measurement:
    """Dice, Jaccard, ASD and 95HD of one case of native size, surfaces 3 voxels apart; with false voxels far away."""
    label, prediction = balls(1, METRIC_SHAPE)[0], balls(1, METRIC_SHAPE, shift=0.03)[0]
    if speckled:
        rng = np.random.default_rng(0)
        prediction[tuple(rng.integers(0, length, SPECKLES) for length in prediction.shape)] = True

    def medpy() -> list[float]:
        return [float(f(prediction, label)) for f in (binary.dc, binary.jc, binary.asd, binary.hd95)]

    row = evaluate(prediction, label)
    if not np.allclose(list(row.values())[:4], medpy(), rtol=0, atol=SAME_METRIC):
        raise InputError("the metrics of both sides differ")
    return timed_in_turns(lambda: evaluate(prediction, label), medpy, pairs)
