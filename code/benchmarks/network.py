"""Rows about networks: a training step, its memory, the rate it reaches, a whole scan; on a GPU if there is one."""

import copy
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.backends import cudnn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference import dtml_step, window_by_window
from benchmarks.timing import Measurement, added_gib, balls, bench_device, compared, in_own_process, timed_in_turns
from dataloaders.batch import Batch
from engine import Engine
from inference.engines import on_engine
from inference.windows import predict_volume
from methods import METHODS, Method
from methods.dtml import DTML
from options import flags
from runtime import runs
from runtime.device import AMP_TYPES, memory_format, place
from train import parse_options as training_options
from utils.errors import InputError
from utils.sdm import signed_distance_batch

SAME_LOSS, SAME_PROBABILITY = 1e-5, 1e-4  # relative: k = 1500 multiplies the rounding of the map; absolute
# DTML as the paper has it, whatever the preset's own settings; no dropout, or the losses could not be compared.
METHOD = "--method dtml --dropout 0 --mask_loss dice --sdm_k 1500 --sdm_k_start 0".split()
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns: large enough for the full rate of a product
GIGA = 1e9
PAPER_PATCH, PAPER_STRIDE = (112, 112, 80), (18, 18, 4)  # voxels


def paper_stride(patch: Sequence[int]) -> tuple[int, int, int]:
    """The paper's strides, scaled like the patch."""
    return tuple(max(1, round(s * n / p)) for s, n, p in zip(PAPER_STRIDE, patch, PAPER_PATCH, strict=True))


def _options(size: Sequence[str], amp: str, *others: str) -> Namespace:
    return training_options([*METHOD, "--device", bench_device().type, "--amp", amp, *size, *others])


def _engine(options: Namespace, method: type[Method] = DTML) -> Engine:
    runs.seed_everything(0)
    return Engine(options, method(options), SimpleNamespace(validation=[]), Path(), bench_device())


def _ball_batch(options: Namespace, maps: bool = False) -> tuple[torch.Tensor, Batch]:
    """Labels of all crops, (B, 1, W, H, D), and a batch that knows the labeled ones; with their distance `maps`."""
    labels = torch.from_numpy(balls(options.batch_size, options.patch_size)).float()[:, None]
    image = labels + torch.randn(labels.shape, generator=torch.Generator().manual_seed(0))
    known = labels[: options.labeled_bs].clone()
    return labels, Batch(image, known, ("ball",) * len(labels), signed_distance_batch(known) if maps else None)


def step_sides(size: Sequence[str], amp: str) -> tuple[Callable[[], float], Callable[[], float]]:
    """A DTML step here, and by the public protocol, which is float32; a call makes a step and returns its loss."""
    options, device = _options(size, amp), bench_device()
    engine = _engine(options)
    theirs = copy.deepcopy(engine.method).to(memory_format=torch.contiguous_format)
    labels, batch = _ball_batch(options)
    batch = batch.to(device)
    own_batch = batch.to(device, memory_format(device, amp))
    weight = engine.method.consistency_weight(0)
    reference = dtml_step(theirs.m_s, theirs.m_d, labels, engine.method.steepness(0), weight)

    def ours() -> float:
        return sum(float(value) for name, value in engine.step(own_batch).items() if name.startswith("loss/"))

    return ours, lambda: reference(batch)


def time_step(size: Sequence[str], amp: str, pairs: int) -> Measurement:
    """Seconds of a step; in float32 both sides must have the same loss."""
    ours, reference = step_sides(size, amp)
    with cudnn.flags(enabled=True, allow_tf32=False):
        losses = ours(), reference()
    if amp == "off" and not math.isclose(*losses, rel_tol=SAME_LOSS):
        raise InputError(
            f"the losses of both sides differ: {losses[0]:.7f} here, {losses[1]:.7f} by the public protocol"
        )
    return timed_in_turns(ours, reference, pairs)


def time_method(name: str, size: Sequence[str], pairs: int) -> Measurement:
    """Seconds of a step of a method with its own settings and batch, beside the V-Net's with labels alone."""
    return timed_in_turns(*(_step_of(method, size) for method in (name, "supervised")), pairs)


def _step_of(name: str, size: Sequence[str]) -> Callable[[], object]:
    device = bench_device()
    options = training_options(["--method", name, "--device", device.type, *size])
    engine = _engine(options, METHODS[name])
    _, batch = _ball_batch(options, maps=bool(engine.method.sdm_empty))
    batch = batch.to(device, memory_format(device, options.amp))
    engine.step(batch)  # the first one takes its memory, and compiles kernels
    return lambda: engine.step(batch)


def memory_of_step(size: Sequence[str], amp: str, pairs: int) -> Measurement:
    """Memory that a step adds at its peak, each side in a process of its own: what the heap keeps differs by chance."""
    threads = torch.get_num_threads()
    taken = [[in_own_process(_memory_of_side, side, size, amp, threads) for side in (0, 1)] for _ in range(pairs)]
    return {**compared(taken), "unit": "GiB"}


def _memory_of_side(side: int, size: Sequence[str], amp: str, threads: int) -> float:
    torch.set_num_threads(threads)
    call = step_sides(size, amp)[side]

    def two_steps() -> None:  # the second one has the momenta beside its activations
        call()
        call()

    return added_gib(two_steps)


def share_of_matrix_rate(size: Sequence[str], amp: str, pairs: int) -> Measurement:
    """Rate of a step's multiplications and additions beside that of one large matrix product of the same precision.

    `ratio` is the fraction reached: 1 would be a step that does nothing but multiply, at the full rate.
    """
    step, _ = step_sides(size, amp)
    with FlopCounterMode(display=False) as counter:
        step()
    device, edge = bench_device(), MATRIX[bench_device().type]
    matrix = torch.randn(edge, edge, device=device).to(AMP_TYPES.get(amp, torch.float32))

    def product() -> float:
        return float((matrix @ matrix)[0, 0])  # reading one number waits for a GPU

    product()
    timed = timed_in_turns(product, step, pairs)
    work = counter.get_total_flops(), 2 * edge**3  # of the step, of the product
    shares = sorted(work[0] / work[1] / ratio for ratio in (timed["ratio"], *timed["spread"]))
    return {
        "ratio": shares[1],
        "ours": work[0] / timed["reference"] / GIGA,
        "reference": work[1] / timed["ours"] / GIGA,
        "spread": [shares[0], shares[2]],
        "unit": "GFLOP/s",
    }


def time_inference(size: Sequence[str], shape: Sequence[int], amp: str, protocol: str, pairs: int) -> Measurement:
    """A whole scan at the paper's strides, scaled like the patch; --protocol fast against the same reference."""
    options, device = _options(size, amp, "--scale", "1"), bench_device()
    stride = paper_stride(options.patch_size)
    options.stride_xy, options.stride_z = stride[0], stride[2]
    vars(options).update(flags.protocol_defaults(protocol, options.patch_size))
    runs.seed_everything(0)
    method = place(DTML(options), device, options).eval()
    image = balls(1, shape)[0] + np.random.default_rng(0).standard_normal(shape, np.float32)
    theirs = [copy.deepcopy(network).to(memory_format=torch.contiguous_format) for network in (method.m_s, method.m_d)]

    def ours() -> np.ndarray:
        return predict_volume(method, image, options, device, ("seg",))["seg"]

    def reference() -> np.ndarray:
        return window_by_window(*theirs, image, options.patch_size, stride)

    if amp == "off" and protocol == "paper":
        with cudnn.flags(enabled=True, allow_tf32=False):
            if np.abs(ours() - reference()).max() > SAME_PROBABILITY:
                raise InputError("the probabilities of both sides differ")
    else:
        ours()  # the first scan compiles kernels and takes its memory
        if device.type == "cuda":
            reference()
    return timed_in_turns(ours, reference, pairs)


def time_openvino(size: Sequence[str], shape: Sequence[int], amp: str, pairs: int) -> Measurement:
    """A whole scan with --protocol fast by OpenVINO, beside the same by PyTorch with the fast layers."""
    options, device = _options(size, amp, "--scale", "1"), torch.device("cpu")
    vars(options).update(flags.protocol_defaults("fast", options.patch_size))
    runs.seed_everything(0)
    image = np.random.default_rng(0).standard_normal(shape, np.float32)
    method = DTML(options)
    ours, reference = (
        partial(predict_volume, on_engine(copy.deepcopy(method), device, asked), image, options, device, ("seg",))
        for asked in (Namespace(**vars(options), engine=engine) for engine in ("openvino", "torch"))
    )
    if np.abs(ours()["seg"] - reference()["seg"]).max() > SAME_PROBABILITY and amp == "off":
        raise InputError("the probabilities of both sides differ")
    return timed_in_turns(ours, reference, pairs)
