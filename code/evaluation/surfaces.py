"""From masks to surfaces: a mesh of bounded size around a mask, and how far each point lies from another surface."""

from typing import NamedTuple

import edt
import numpy as np
from scipy import ndimage
from skimage.measure import marching_cubes

SMOOTHING_VOX = 0.8  # sd of the Gaussian that takes the steps off a mask; below a voxel, so that thin veins stay
BORDER_VOX = 6  # around a mask, so that its surface is closed: more than the Gaussian and any step reach


class Mesh(NamedTuple):
    """Triangles around a mask."""

    vertices: np.ndarray  # (V, 3), in voxels: a voxel's centre has its index
    faces: np.ndarray  # (F, 3), rows of `vertices`, counter-clockwise for who looks from outside
    normals: np.ndarray  # (V, 3), outwards


def mesh(mask: np.ndarray, most: int) -> Mesh:
    """The smoothed surface of a mask, (W, H, D) boolean and not empty.

    The grid is coarsened, up to 5 voxels, until there are at most `most` triangles.
    """
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    solid = np.pad(mask[box], BORDER_VOX).astype(np.float32)
    smooth = ndimage.gaussian_filter(solid, SMOOTHING_VOX)
    solid = smooth if smooth.max() > 0.5 else solid  # a few scattered voxels would vanish
    for step in range(1, BORDER_VOX):
        vertices, faces, normals, _ = marching_cubes(solid, 0.5, step_size=step)
        if len(faces) <= most:
            break
    return Mesh(vertices + np.subtract([side.start for side in box], BORDER_VOX), faces[:, ::-1], normals)


def signed_surface_distance(mask: np.ndarray) -> np.ndarray:
    """Distance of every voxel's centre to the faces of a mask's voxels, in voxels: positive outside, negative inside.

    Args: mask, (W, H, D) boolean, neither empty nor full. Returns: (W, H, D) float32, at least 0.5 in absolute value.
    """
    outside, inside = (edt.edt(np.ascontiguousarray(part), black_border=False) for part in (~mask, mask))
    return np.where(mask, 0.5 - inside, outside - 0.5).astype(np.float32)


def sample(volume: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Values of a volume at points, (N, 3) in voxels, linearly interpolated; the border continues outside."""
    return ndimage.map_coordinates(volume, points.T, order=1, mode="nearest")
