"""Whole-volume probability by sliding window, from any function patch -> probability."""

import itertools
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataloaders import case_files
from evaluation.metrics import overlap
from methods.base import Method
from options.parsing import refuse_gaps, window_stride
from runtime.device import device_with_room, memory_format, precision
from utils.files import repository_path
from utils.labels import label_map, one_hot
from utils.resample import resample, scaled_shape

Predict = Callable[[Tensor], dict[str, Tensor]]
THRESHOLD = 0.5
GAUSSIAN_SD = 1 / 8  # of the patch, as in nnU-Net (Isensee et al., Nature Methods 2021)
GAUSSIAN_FLOOR = 1e-3  # keeps every voxel's weight positive
VOLUMES_BESIDE_OUTPUTS = 2  # of the size of the scan on the device: image and visits


def window_starts(length: int, patch: int, stride: int) -> list[int]:
    """Starts along one axis: ceil((length - patch) / stride) + 1 of them, the last flush with the border."""
    count = math.ceil(max(length - patch, 0) / stride) + 1
    return [min(index * stride, max(length - patch, 0)) for index in range(count)]


def window_weight(patch: Sequence[int], blend: str) -> Tensor:
    """Weight of the voxels of a window, (W, H, D) float32: ones, or a Gaussian about its centre."""
    weight = torch.ones(tuple(patch))
    if blend == "gaussian":
        for axis, length in enumerate(patch):
            at = torch.arange(length) - (length - 1) / 2
            profile = torch.exp(-0.5 * (at / (GAUSSIAN_SD * length)) ** 2).clamp_min(GAUSSIAN_FLOOR)
            weight = weight * profile.view([-1 if a == axis else 1 for a in range(3)])
    return weight


def window_shape(options: Namespace, shape: Sequence[int]) -> tuple[int, ...]:
    """Size of the windows on a volume of `shape` (at --scale): the patch or, with --window whole, all of it.

    A volume is never seen smaller than the patch: `sliding_window` pads it, as training did.
    """
    whole = options.window == "whole"
    return tuple(np.maximum(shape, options.patch_size).tolist()) if whole else tuple(options.patch_size)


@torch.no_grad()
def sliding_window(
    predict: Predict,
    image: Tensor,
    patch: Sequence[int],
    stride: Sequence[int],
    blend: str = "uniform",
    window_batch: int = 4,
) -> dict[str, Tensor]:
    """Average probability of all windows, accumulated on the image's device.

    Args:
        predict: (N, 1, *patch) -> {name: (N, C, *patch)} probabilities, on any device.
        image: (W, H, D) float32. An axis shorter than the patch is padded with the image's minimum, as in
            training; the padding is removed again.
        patch, stride: voxels per axis.
        blend: `uniform` or `gaussian` weight of a window's voxels.
        window_batch: windows per call of `predict`.
    Returns: {name: (C, W, H, D) float32 in [0, 1]}.
    """
    refuse_gaps(patch, stride)
    size = image.shape
    missing = [max(p - n, 0) for p, n in zip(patch, size, strict=True)]
    if any(missing):
        pads = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        image = F.pad(image, pads, value=float(image.min()))
    starts = itertools.product(*map(window_starts, image.shape, patch, stride))
    windows = [tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True)) for start in starts]
    weight = window_weight(patch, blend).to(image.device)
    total: dict[str, Tensor] = {}
    visits = torch.zeros_like(image)
    for first in range(0, len(windows), window_batch):
        group = windows[first : first + window_batch]
        probs = predict(torch.stack([image[window] for window in group])[:, None])
        for name, prob in probs.items():
            if name not in total:
                total[name] = image.new_zeros((prob.shape[1], *image.shape))
            for window, patch_prob in zip(group, prob.float().to(image.device), strict=True):
                total[name][:, *window] += weight * patch_prob
        for window in group:
            visits[window] += weight
    inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, size, strict=True))
    return {name: (sums / visits)[:, *inside] for name, sums in total.items()}


def predict_volume(
    method: Method,
    image: np.ndarray,
    options: Namespace,
    device: torch.device,
    outputs: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Probability of each foreground class of a whole scan on its own grid, at the scale that the run was trained at.

    Args: image, (W, H, D) native. Returns: {output: (C, W, H, D) float32}, native.
    """
    method.eval()
    layout = memory_format(device, options.amp)

    def predict(patches: Tensor) -> dict[str, Tensor]:
        with precision(device, options.amp):
            return method.predict(patches.to(device).contiguous(memory_format=layout), outputs)

    scaled = resample(image, scaled_shape(image.shape, options.scale))
    at_once = len(outputs or method.outputs) + 1  # the last is that which is divided by the visits
    sums = scaled.nbytes * (VOLUMES_BESIDE_OUTPUTS + (options.num_classes or 1) * at_once)
    probs = sliding_window(
        predict,
        torch.from_numpy(scaled).to(device_with_room(device, sums)),
        window_shape(options, scaled.shape),
        window_stride(options),
        options.blend,
        options.window_batch,
    )
    return {
        name: np.stack([resample(channel, image.shape) for channel in prob.cpu().numpy()])
        for name, prob in probs.items()
    }


def dice_of_cases(method: Method, cases: Iterable[str], options: Namespace, device: torch.device) -> list[float]:
    """Mean Dice of labeled cases, of each class, with the reported output, scored at native resolution."""
    root, head, classes = repository_path(options.root_path), options.head or method.outputs[0], options.num_classes
    scores = []
    for case in cases:
        prob = predict_volume(method, case_files.read_image(root, case), options, device, (head,))[head]
        ours = one_hot(label_map(prob, method.exclusive), classes)
        truth = one_hot(case_files.read_label(root, case, classes), classes)
        scores.append([overlap(mask, label)["dice"] for mask, label in zip(ours, truth, strict=True)])
    return np.mean(scores, axis=0).tolist()
