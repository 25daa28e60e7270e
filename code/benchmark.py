"""What a training step, a distance map and a metric cost here, beside what a user would otherwise run.

Both sides run in turns in one process (A B A B ...), on the same data, weights and threads; the ratio is the median of
the ratios of neighbouring runs, the spread their quartiles. Before anything is timed both sides must agree.
"""

import copy
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from medpy.metric import binary

from benchmark_reference import crops_from_files, dtml_step, signed_distances, window_by_window
from dataloaders import la_heart
from dataloaders.batch import Batch, BatchStream, CaseStore
from engine import Engine
from inference import predict_volume
from methods.dtml import DTML
from train import parse_options as training_options
from utils import options as flags
from utils import runs
from utils.device import memory_format, place
from utils.errors import InputError, run_script
from utils.metrics import evaluate
from utils.sdm import signed_distance_batch

CPU = torch.device("cpu")
SAME_LOSS, SAME_DISTANCE, SAME_METRIC, SAME_PROBABILITY = 1e-5, 1e-6, 1e-6, 1e-4
REPEATS = {"step": 7, "map": 9, "metric": 5, "batch": 15}  # pairs of runs
PAPER_PATCH, PAPER_STRIDE = (112, 112, 80), (18, 18, 4)
# DTML as the paper has it, whatever the preset's own settings; no dropout, or the losses could not be compared.
METHOD = "--method dtml --dropout 0 --device cpu --mask_loss dice --sdm_k 1500 --sdm_k_start 0".split()


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


def step_sides(size: Sequence[str], amp: str) -> tuple[Callable[[], float], Callable[[], float]]:
    """A DTML step here, and by the public protocol, which is float32; a call makes a step and returns its loss."""
    options = training_options([*METHOD, "--amp", amp, *size])
    runs.seed_everything(0)
    method = DTML(options)
    theirs = copy.deepcopy(method)
    labels = torch.from_numpy(balls(options.batch_size, options.patch_size)).float()[:, None]
    image = labels + torch.randn(labels.shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(image, labels[: options.labeled_bs].clone(), ("ball",) * options.batch_size)
    engine = Engine(options, method, SimpleNamespace(validation=[]), Path(), CPU)
    own_batch = batch.to(CPU, memory_format(CPU, amp))
    reference = dtml_step(theirs.m_s, theirs.m_d, labels, method.k, method.consistency_weight(0))

    def ours() -> float:
        return sum(float(value) for name, value in engine.step(own_batch).items() if name.startswith("loss/"))

    return ours, lambda: reference(batch)


def time_step(size: Sequence[str], amp: str, pairs: int) -> dict[str, float]:
    """Seconds of a step; in float32 both sides must have the same loss."""
    ours, reference = step_sides(size, amp)
    losses = ours(), reference()
    if amp == "off" and abs(losses[0] - losses[1]) > SAME_LOSS:
        raise InputError(
            f"the losses of both sides differ: {losses[0]:.7f} here, {losses[1]:.7f} by the public protocol"
        )
    return timed_in_turns(ours, reference, pairs)


def peak_of_step(side: int, size: Sequence[str], amp: str) -> float:
    """Memory in GiB that two steps of one side add to this process at their peak; for a process of its own.

    Linux hands the peak of a process on to those that it starts, so it is reset first.
    """
    call = step_sides(size, amp)[side]
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    call()
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """Resident memory of this process in GiB: VmRSS now, VmHWM at its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 2**20  # given in kB


def memory_of_step(size: Sequence[str], amp: str) -> dict[str, float]:
    """Peak memory of a step, each side in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        ours, reference = pool.map(peak_of_step, (0, 1), (size, size), (amp, amp))
    ratio = reference / ours
    return {"ratio": ratio, "ours": ours, "reference": reference, "spread": [ratio, ratio], "unit": "GiB"}


def time_inference(size: Sequence[str], shape: Sequence[int], amp: str, protocol: str, pairs: int) -> dict[str, float]:
    """A whole scan at the paper's strides, scaled like the patch; --protocol fast against the same reference."""
    options = training_options([*METHOD, "--amp", amp, *size, "--scale", "1"])
    stride = [max(1, round(s * n / p)) for s, n, p in zip(PAPER_STRIDE, options.patch_size, PAPER_PATCH, strict=True)]
    options.stride_xy, options.stride_z = stride[0], stride[2]
    vars(options).update(flags.protocol_defaults(protocol, options.patch_size))
    runs.seed_everything(0)
    method = place(DTML(options), CPU, options).eval()
    image = balls(1, shape)[0] + np.random.default_rng(0).standard_normal(shape, np.float32)
    theirs = [copy.deepcopy(network).to(memory_format=torch.contiguous_format) for network in (method.m_s, method.m_d)]

    def ours() -> np.ndarray:
        return predict_volume(method, image, options, CPU, ("seg",))["seg"]

    def reference() -> np.ndarray:
        return window_by_window(*theirs, image, options.patch_size, stride)

    if amp == "off" and protocol == "paper" and np.abs(ours() - reference()).max() > SAME_PROBABILITY:
        raise InputError("the probabilities of both sides differ")
    return timed_in_turns(ours, reference, pairs)


def time_batch(pairs: int) -> dict[str, float]:
    """A batch of four crops from files of the size of the LA scans to augmented tensors."""
    with tempfile.TemporaryDirectory() as folder:
        cases = [f"case{index}" for index in range(4)]
        for index, label in enumerate(balls(4, (200, 150, 88))):
            image = label + np.random.default_rng(index).standard_normal(label.shape, np.float32)
            la_heart.write_case(Path(folder), cases[index], image.astype(np.float32), label.astype(np.uint8), {})
        options = training_options([*METHOD, "--root_path", folder])
        stream = BatchStream(options, CaseStore(options, cases[:2], cases[2:]), cases[:2], cases[2:])
        iterations, rng = itertools.count(), np.random.default_rng(0)
        paths = [la_heart.case_path(Path(folder), case) for case in cases]

        def ours() -> Batch:
            return stream[next(iterations) % options.max_iterations]

        return timed_in_turns(ours, lambda: crops_from_files(paths, options.patch_size, rng), pairs)


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
SMALL, NATIVE = (96, 80, 48), (200, 150, 88)  # a scan at half resolution, and a whole one
ROWS: dict[str, tuple[float, Callable[[], dict[str, float]]]] = {  # target, measurement
    "step, cpu preset, bf16": (2.5, lambda: time_step(CPU_SIZE, "bf16", REPEATS["step"])),
    "step, cpu preset, float32": (2.5, lambda: time_step(CPU_SIZE, "off", REPEATS["step"])),
    "memory of a step, cpu preset, bf16": (1 / 0.6, lambda: memory_of_step(CPU_SIZE, "bf16")),
    "memory of a step, cpu preset, float32": (1 / 0.6, lambda: memory_of_step(CPU_SIZE, "off")),
    "scan, cpu preset, paper's strides, float32": (3.0, lambda: time_inference(CPU_SIZE, SMALL, "off", "paper", 3)),
    "scan, cpu preset, paper's strides, bf16": (3.0, lambda: time_inference(CPU_SIZE, SMALL, "bf16", "paper", 3)),
    "scan, cpu preset, fast, bf16": (25.0, lambda: time_inference(CPU_SIZE, SMALL, "bf16", "fast", 3)),
    "batch from files": (20.0, lambda: time_batch(REPEATS["batch"])),
    "distance maps of a batch": (4.0, lambda: time_maps(REPEATS["map"])),
    "metrics of a case": (8.0, lambda: time_metrics(REPEATS["metric"])),
}
LONG_ROWS = {
    "step, paper's size, bf16": (2.5, lambda: time_step((), "bf16", 3)),
    "step, paper's size, float32": (2.5, lambda: time_step((), "off", 3)),
    "memory of a step, paper's size, bf16": (1 / 0.6, lambda: memory_of_step((), "bf16")),
    "memory of a step, paper's size, float32": (1 / 0.6, lambda: memory_of_step((), "off")),
    "scan, paper's size and strides, bf16": (3.0, lambda: time_inference((), NATIVE, "bf16", "paper", 2)),
    "scan, paper's size, fast, bf16": (25.0, lambda: time_inference((), NATIVE, "bf16", "fast", 2)),
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
    print(f"{'':44}{'ratio':>7}{'quartiles':>14}{'target':>8}{'ours':>11}{'reference':>12}  unit")
    for name, (target, measure) in chosen.items():
        row = {"name": name, "target": target, "unit": "s", **measure()}
        low, high = row["spread"]
        print(
            f"{name:44}{row['ratio']:7.2f}{low:8.2f}-{high:<5.2f}{target:8.1f}{row['ours']:11.4f}"
            f"{row['reference']:12.4f}  {row['unit']}",
            flush=True,
        )
        rows.append(row)
    if options.json:
        runs.write_json(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
