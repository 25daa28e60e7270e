"""Augmentation in two parts: draw the parameters, then apply them to the image and to its label.

A crop is taken first and turned afterwards; for odd quarter turns it has the transposed in-plane size, so that
non-square patches work. The result is that of turning the whole volume first and cropping it afterwards, as the
public implementations do, at a fraction of the cost.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from utils.constants import PLANE
from utils.resample import Size


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
    turned_shape, size = transposed(shape, turns), _region_size(patch, zoom, angle)
    start = tuple(_draw_start(rng, *pair, options.crop_bound) for pair in zip(turned_shape, size, strict=True))
    start = _start_before_turning(start, size, turned_shape, turns, flip_axis)
    intensity = _draw_intensity(rng, options.aug_intensity)
    return Transform(start, transposed(size, turns), patch, turns, flip_axis, zoom, angle, intensity)


def transposed(size: Size, turns: int = 1) -> Size:
    """A size before or after a number of quarter turns in the axial plane."""
    return (size[1], size[0], size[2]) if turns % 2 else size


def _region_size(patch: Size, zoom: float, angle: float) -> Size:
    """Voxels that hold every sample of a zoomed and rotated patch: the spans between outermost centres, plus one."""
    if zoom == 1.0 and angle == 0.0:
        return patch
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    width, height, depth = (length - 1 for length in patch)
    spans = (width * cos + height * sin, width * sin + height * cos, depth)
    return tuple(math.ceil(span / zoom) + 1 for span in spans)


def _draw_start(rng: np.random.Generator, length: int, size: int, bound: str) -> int:
    """A uniform start along one axis; a volume shorter than the region is centred in it."""
    if length <= size:
        return -((size - length) // 2)
    last = length - size - (bound == "exclusive")  # the public implementations never reach the last start
    return int(rng.integers(last + 1))


def _start_before_turning(start: Size, size: Size, shape: Size, turns: int, flip_axis: int | None) -> Size:
    """Where a region of the turned volume (of that `shape`) begins in the volume itself.

    The bound of --crop_bound and the centring of a small volume thus hold for the turned volume, as in the public
    codes: their forced flip makes either end of an in-plane axis the one that is never reached.
    """
    near, far = list(start), [length - n - s for length, n, s in zip(shape, size, start, strict=True)]
    if flip_axis is not None:
        near[flip_axis], far[flip_axis] = far[flip_axis], near[flip_axis]
    in_plane = ((near[0], near[1]), (near[1], far[0]), (far[0], far[1]), (far[1], near[0]))[turns]
    return *in_plane, near[2]


def _draw_intensity(rng: np.random.Generator, strength: float) -> Intensity | None:
    if strength == 0:
        return None
    contrast, shift, gamma = rng.uniform(-strength, strength, 3).tolist()  # Python floats keep arrays float32
    noise_sd = rng.uniform(0, strength / 2)
    return Intensity(math.exp(contrast), shift, math.exp(gamma), noise_sd, int(rng.integers(2**31)))


def apply_transform(transform: Transform, region: np.ndarray) -> np.ndarray:
    """Bring the region that a transform asks for to the patch: resample if need be, then turn and flip.

    Args: region, (..., W, H, D) of size `transform.size`.
    Returns: (..., W, H, D) of size `transform.patch`: of the same type, possibly a view; float32 after resampling.
    """
    crop = region
    if (transform.zoom, transform.angle) != (1.0, 0.0):
        upright = transposed(transform.patch, transform.quarter_turns)
        crop = _resample(crop, upright, transform.zoom, transform.angle)
    crop = np.rot90(crop, transform.quarter_turns, axes=PLANE)
    return crop if transform.flip_axis is None else np.flip(crop, PLANE[transform.flip_axis])


def _resample(crop: np.ndarray, patch: Size, zoom: float, angle: float) -> np.ndarray:
    """Trilinear sample of a zoomed and axially rotated grid about the centre of `crop`, (..., W, H, D).

    First along z, then in the plane with the slices as channels: six times as fast as one 3-D sampling.
    """
    x, y, z = ((torch.arange(n) - (n - 1) / 2) / zoom for n in patch)  # voxels of the region, from its centre
    slices = torch.from_numpy(np.ascontiguousarray(np.moveaxis(crop, -1, -3), dtype=np.float32))  # (..., D, W, H)
    last = crop.shape[-1] - 1
    z = (z + last / 2).clamp(0, last)
    below = z.floor().long()
    above = (below + 1).clamp_max(last)
    slices = torch.lerp(slices[..., below, :, :], slices[..., above, :, :], (z - below)[:, None, None])
    x, y = torch.meshgrid(x, y, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    half = [max(n - 1, 1) / 2 for n in crop.shape[-3:]]
    grid = torch.stack([(sin * x + cos * y) / half[1], (cos * x - sin * y) / half[0]], dim=-1)
    channels = slices.reshape(1, -1, *slices.shape[-2:])
    sampled = F.grid_sample(channels, grid[None], padding_mode="border", align_corners=True)
    return sampled.reshape(*slices.shape[:-2], *patch[:2]).movedim(-3, -1).contiguous().numpy()


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
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(change.noise_seed)).numpy()
    return image + change.noise_sd * sd * noise
