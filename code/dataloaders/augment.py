"""Augmentation in two parts: draw the parameters, then apply them to the image and to its label.

A crop is taken first and turned afterwards; for odd quarter turns it has the transposed in-plane size, so that
non-square patches work. The result has the distribution of turning the whole volume first (methods of the
public codes), at a fraction of the cost.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Size = tuple[int, int, int]
Reader = Callable[[Size, Size], np.ndarray]  # (start, size) -> voxels; the region may exceed the volume


@dataclass(frozen=True)
class Intensity:
    """Contrast, brightness, gamma and noise of one crop; the identity is (1, 0, 1, 0)."""

    contrast: float
    shift: float
    gamma: float
    noise_sd: float
    noise_seed: int


@dataclass(frozen=True)
class Transform:
    """What happens to one crop, in voxels of the volume it is taken from."""

    start: Size
    size: Size  # of the region that is read
    patch: Size  # of the result
    quarter_turns: int
    flip_axis: int | None
    zoom: float = 1.0  # > 1 enlarges the anatomy
    angle: float = 0.0  # radians, in the axial plane
    intensity: Intensity | None = None


def draw_transform(rng: np.random.Generator, shape: Size, patch: Size, options: Any) -> Transform:
    """Draw one crop of a volume of `shape` (W, H, D); reads --flip, --crop_bound and --aug_*.

    All eight in-plane symmetries are equally likely; `--flip always` reaches the four reflections only.
    """
    turns = int(rng.integers(4))
    flip_axis = int(rng.integers(2)) if options.flip == "always" or rng.random() < 0.5 else None
    zoom = math.exp(rng.uniform(-1, 1) * math.log1p(options.aug_zoom))
    angle = math.radians(options.aug_rotate) * rng.uniform(-1, 1)
    size = _region_size(patch if turns % 2 == 0 else (patch[1], patch[0], patch[2]), zoom, angle)
    start = tuple(_draw_start(rng, *pair, options.crop_bound) for pair in zip(shape, size, strict=True))
    return Transform(start, size, patch, turns, flip_axis, zoom, angle, _draw_intensity(rng, options.aug_intensity))


def _region_size(patch: Size, zoom: float, angle: float) -> Size:
    if zoom == 1.0 and angle == 0.0:
        return patch
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    width, height, depth = patch
    extent = (width * cos + height * sin, width * sin + height * cos, depth)
    return tuple(math.ceil(length / zoom) for length in extent)


def _draw_start(rng: np.random.Generator, length: int, size: int, bound: str) -> int:
    """A uniform start; a volume shorter than the region is centred in it."""
    if length <= size:
        return -((size - length) // 2)
    last = length - size - (bound == "exclusive")  # the public codes never reach the last start
    return int(rng.integers(last + 1))


def _draw_intensity(rng: np.random.Generator, strength: float) -> Intensity | None:
    if strength == 0:
        return None
    contrast, shift, gamma = rng.uniform(-strength, strength, 3)
    noise_sd = rng.uniform(0, strength / 2)
    return Intensity(math.exp(contrast), shift, math.exp(gamma), noise_sd, int(rng.integers(2**31)))


def apply_transform(transform: Transform, read: Reader) -> np.ndarray:
    """Read the region and bring it to the patch: resample if asked for, then turn and flip.

    Returns: (W, H, D) float32 of size `transform.patch`, contiguous.
    """
    crop = read(transform.start, transform.size).astype(np.float32, copy=False)
    turned = transform.patch if transform.quarter_turns % 2 == 0 else _transposed(transform.patch)
    if (transform.zoom, transform.angle) != (1.0, 0.0):
        crop = _resample(crop, turned, transform.zoom, transform.angle)
    crop = np.rot90(crop, transform.quarter_turns, axes=(0, 1))
    if transform.flip_axis is not None:
        crop = np.flip(crop, transform.flip_axis)
    return np.ascontiguousarray(crop)


def _transposed(patch: Size) -> Size:
    return patch[1], patch[0], patch[2]


def _resample(crop: np.ndarray, patch: Size, zoom: float, angle: float) -> np.ndarray:
    """Trilinear sample of a zoomed and axially rotated grid around the centre of `crop`."""
    axes = [(torch.arange(n) - (n - 1) / 2) / zoom for n in patch]  # voxels of the region, from its centre
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    half = [max(n - 1, 1) / 2 for n in crop.shape]
    grid = torch.stack([z / half[2], (sin * x + cos * y) / half[1], (cos * x - sin * y) / half[0]], dim=-1)
    volume = torch.from_numpy(np.ascontiguousarray(crop))[None, None]
    return F.grid_sample(volume, grid[None].float(), padding_mode="border", align_corners=True)[0, 0].numpy()


def apply_intensity(image: np.ndarray, change: Intensity | None) -> np.ndarray:
    """Change contrast, brightness and gamma about the crop's own mean, sd and range, and add Gaussian noise."""
    if change is None:
        return image
    low, high = float(image.min()), float(image.max())
    if high <= low:
        return image
    sd = float(image.std())
    image = ((image - low) / (high - low)) ** change.gamma * (high - low) + low
    mean = float(image.mean())
    image = (image - mean) * change.contrast + mean + change.shift * sd
    noise = np.random.default_rng(change.noise_seed).standard_normal(image.shape, dtype=np.float32)
    return (image + change.noise_sd * sd * noise).astype(np.float32)
