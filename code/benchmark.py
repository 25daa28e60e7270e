"""What a training step, a distance map and a metric cost here, beside what a user would otherwise run.

Both sides run in turns in one process (A B A B ...), on the same data, weights and threads; the ratio is the median of
the ratios of neighbouring runs, the spread their quartiles. Before anything is timed both sides must agree.
"""

import copy
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from medpy.metric import binary

from benchmark_reference import dtml_step, signed_distances
from dataloaders.batch import Batch
from engine import Engine
from methods.dtml import DTML
from train import parse_options as training_options
from utils import options as flags
from utils import runs
from utils.device import memory_format
from utils.errors import InputError, run_script
from utils.metrics import evaluate
from utils.sdm import signed_distance_batch

CPU = torch.device("cpu")
SAME_LOSS, SAME_DISTANCE, SAME_METRIC = 1e-5, 1e-6, 1e-6
REPEATS = {"step": 7, "map": 9, "metric": 5}  # pairs of runs


def timed_in_turns(ours: Callable[[], object], reference: Callable[[], object], pairs: int) -> dict[str, float]:
    """Median seconds of both sides and of their ratio; the spread is between the quartiles of the ratios."""
    seconds = []
    for _ in range(pairs):
        pair = []
        for side in (ours, reference):
            start = time.perf_counter()
            side()
            pair.append(time.perf_counter() - start)
        seconds.append(pair)
    ratios = [theirs / own for own, theirs in seconds]
    low, _, high = statistics.quantiles(ratios, n=4)
    own, theirs = (statistics.median(side) for side in zip(*seconds, strict=True))
    return {"ratio": statistics.median(ratios), "ours": own, "reference": theirs, "spread": [low, high]}


def balls(count: int, shape: Sequence[int], shift: float = 0.0) -> np.ndarray:
    """Rough balls, (count, *shape) boolean: what is segmented where there are no scans."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(-1, 1, length) for length in shape), indexing="ij")
    noise = 0.05 * np.sin(9 * axes[0]) * np.cos(7 * axes[1]) * np.sin(8 * axes[2])
    centres = rng.uniform(-0.2, 0.2, (count, 3)) + shift
    return np.stack([sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) + noise < 0.3 for centre in centres])


def time_step(size: Sequence[str], amp: str, pairs: int) -> dict[str, float]:
    """A step of DTML against the public protocol, which is float32; in float32 both give the same loss."""
    options = training_options(
        ["--method", "dtml", "--dropout", "0", "--device", "cpu", "--amp", amp, "--mask_loss", "dice", *size]
    )
    runs.seed_everything(0)
    method = DTML(options)
    method.k = method.k_start = options.sdm_k
    theirs = copy.deepcopy(method)
    labels = torch.from_numpy(balls(options.batch_size, options.patch_size)).float()[:, None]
    generator = torch.Generator().manual_seed(0)
    image = labels + torch.randn(labels.shape, generator=generator)
    batch = Batch(image, labels[: options.labeled_bs].clone(), ("ball",) * options.batch_size)
    engine = Engine(options, method, SimpleNamespace(validation=[]), Path(), CPU)
    reference = dtml_step(theirs.m_s, theirs.m_d, labels, method.k, 0.0)
    own_batch = batch.to(CPU, memory_format(CPU, amp))
    values = engine.step(own_batch)
    own_loss, loss = sum(float(values[f"loss/{name}"]) for name in ("seg", "mask")), reference(batch)
    if amp == "off" and abs(own_loss - loss) > SAME_LOSS:
        raise InputError(f"the losses of both sides differ: {own_loss:.7f} here, {loss:.7f} by the public protocol")
    return timed_in_turns(lambda: engine.step(own_batch), lambda: reference(batch), pairs)


def time_maps(pairs: int) -> dict[str, float]:
    """Signed distance maps of a batch of crops."""
    labels = torch.from_numpy(balls(4, (112, 112, 80))).float()[:, None]
    difference = (signed_distance_batch(labels) - signed_distances(labels)).abs().max().item()
    if difference > SAME_DISTANCE:
        raise InputError(f"distance maps of both sides differ by {difference:g}")
    return timed_in_turns(lambda: signed_distance_batch(labels), lambda: signed_distances(labels), pairs)


def time_metrics(pairs: int) -> dict[str, float]:
    """Dice, Jaccard, ASD and 95HD of one case of native size."""
    label, prediction = balls(1, (200, 200, 88))[0], balls(1, (200, 200, 88), shift=0.03)[0]

    def medpy() -> list[float]:
        return [float(f(prediction, label)) for f in (binary.dc, binary.jc, binary.asd, binary.hd95)]

    row = evaluate(prediction, label)
    if not np.allclose(list(row.values())[:4], medpy(), rtol=0, atol=SAME_METRIC):
        raise InputError("the metrics of both sides differ")
    return timed_in_turns(lambda: evaluate(prediction, label), medpy, pairs)


CPU_SIZE = ("--preset", "cpu")
ROWS: dict[str, tuple[float, Callable[[], dict[str, float]]]] = {  # target, measurement
    "step, cpu preset, bf16": (2.5, lambda: time_step(CPU_SIZE, "bf16", REPEATS["step"])),
    "step, cpu preset, float32": (2.5, lambda: time_step(CPU_SIZE, "off", REPEATS["step"])),
    "distance maps of a batch": (4.0, lambda: time_maps(REPEATS["map"])),
    "metrics of a case": (8.0, lambda: time_metrics(REPEATS["metric"])),
}
LONG_ROWS = {
    "step, paper's size, bf16": (2.5, lambda: time_step((), "bf16", 3)),
    "step, paper's size, float32": (2.5, lambda: time_step((), "off", 3)),
}


def parse_options(argv: Sequence[str] | None = None) -> Namespace:
    """Flags of the benchmark."""
    parser = ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="also the rows that take long")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows whose name contains one of these words")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file, too")
    options = parser.parse_args(argv)
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads {options.threads} must be at least 1")
    return options


def chosen_rows(options: Namespace) -> dict[str, tuple[float, Callable[[], dict[str, float]]]]:
    """The rows that --only and --full ask for."""
    rows = ROWS | LONG_ROWS
    if not options.only:
        return rows if options.full else ROWS
    chosen = {name: row for name, row in rows.items() if any(word in name for word in options.only)}
    if not chosen:
        raise InputError(f"--only {' '.join(options.only)} fits no row; rows are: {'; '.join(rows)}")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the rows; returns the exit status."""
    options = parse_options(argv)
    rows, chosen = [], chosen_rows(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"{'':30}{'ratio':>7}{'quartiles':>14}{'target':>8}{'ours [s]':>11}{'reference [s]':>15}")
    for name, (target, measure) in chosen.items():
        row = {"name": name, "target": target, "unit": "s", **measure()}
        low, high = row["spread"]
        print(
            f"{name:30}{row['ratio']:7.2f}{low:8.2f}-{high:<5.2f}{target:8.1f}{row['ours']:11.4f}"
            f"{row['reference']:15.4f}",
            flush=True,
        )
        rows.append(row)
    if options.json:
        runs.write_json(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
