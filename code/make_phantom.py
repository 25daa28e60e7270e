"""Write a small synthetic data set in the left-atrium layout, so that every command runs without the scans.

Each case is an atrium with an appendage and 3-5 pulmonary veins among chambers and vessels of the same
brightness, seen through partial volume, an uneven coil field and noise. Arrays depend on --seed alone.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "phantom.json"
VERSION = 1  # of the recipe below: raise it with whatever changes an array
MIN_SIDE = 16  # voxels; below, vein stubs and walls are thinner than half a voxel
FIELD_MM = 87.2  # cube root of the imaged volume: 96 x 96 x 72 mm, as in the released scans (119 x 91 x 55)
GROWTH = 8  # in-plane sizes vary by case between the given one and 1 + 1/GROWTH of it
SCAN_SHARE = 0.35  # of the scan that the crop shows: the released files are z-scored before they are cropped
GRAY_STEPS = 256  # gray values are multiples of 1/256: last-bit differences between machines vanish
FAR_MM = 9.0  # distances beyond do not matter and are cut

# Brightness of tissues, blood = 1; late enhancement makes fibrotic wall brighter than blood
LUNG, FAT, MUSCLE, BONE, SCAR = 0.06, 0.25, 0.45, 0.38, 1.45

# Axes of the patient frame: x to the left, y to the back, z to the head. Directions of the veins:
VEINS = np.array(
    [
        (-0.80, 0.45, 0.45),  # right superior
        (-0.85, 0.40, -0.45),  # right inferior
        (0.75, 0.45, 0.50),  # left superior
        (0.80, 0.55, -0.35),  # left inferior
        (-0.95, 0.25, 0.05),  # right middle, the most frequent extra vein
    ]
)
APPENDAGE = np.array([0.75, -0.6, 0.3])
BLOOD_POOLS = ("left ventricle", "right atrium", "ascending aorta", "descending aorta", "pulmonary artery")


@dataclass(frozen=True)
class Space:
    """Voxel centres in the patient frame of one case: `points` (3, W, H, D) and the voxel size, both in mm."""

    points: np.ndarray
    voxel_mm: float


def make_case(seed: int, index: int, shape: tuple[int, int, int] = (64, 64, 48)) -> tuple[np.ndarray, np.ndarray]:
    """One phantom case: a function of its arguments, the same on every machine.

    Args: shape, smallest (W, H, D); W and H grow by up to an eighth, D is fixed.
    Returns: image, float32, multiples of 1/256, z-scored like a scan of which it is a crop; label, uint8, one
        connected component. Both (W', H', D).
    """
    rng = np.random.default_rng([seed, index])
    size = (*(side + int(rng.integers(side // GROWTH + 1)) for side in shape[:2]), shape[2])
    space = draw_pose(rng, size, spacing_of(shape))
    radii = np.array([30.0, 21.0, 19.0]) * rng.uniform(0.88, 1.12, 3)  # mm; 40-65 mm across in adults
    blood, inside = draw_atrium(rng, space, radii)
    label = largest_component(inside < 0)
    tissue = paint(rng, space, blood, draw_neighbours(rng, space, radii))
    return acquire(rng, tissue), label.astype(np.uint8)


def spacing_of(shape: tuple[int, int, int]) -> float:
    """Isotropic voxel size in mm: the anatomy fills any grid alike."""
    return round(FIELD_MM / float(np.prod(shape)) ** (1 / 3), 3)


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 6-connected part."""
    parts, _ = ndimage.label(mask)
    return parts == np.bincount(parts.ravel())[1:].argmax() + 1


def draw_pose(rng: np.random.Generator, size: tuple[int, ...], voxel_mm: float) -> Space:
    """Random size, shift and rotation of the patient within the grid."""
    scale = rng.uniform(0.95, 1.2)
    shift = rng.uniform(-1, 1, 3) * (4, 4, 2) + (0, 5, 0)  # mm; the chambers in front need room
    turn = np.eye(3)
    for (a, b), degrees in zip(((0, 1), (0, 2), (1, 2)), rng.uniform(-18, 18, 3), strict=True):
        plane = np.eye(3)
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        plane[a, a], plane[a, b], plane[b, a], plane[b, b] = cos, -sin, sin, cos
        turn = turn @ plane
    axes = [(np.arange(n) - (n - 1) / 2) * voxel_mm - s for n, s in zip(size, shift, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    return Space(np.tensordot(turn.T / scale, grid, axes=1), voxel_mm / scale)


def draw_atrium(rng: np.random.Generator, space: Space, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance in mm, negative inside, of the blood that is seen and of what is annotated.

    Veins go on beyond their annotated stubs, which end at some distance from the body, as in the challenge.
    """
    body = chamber(rng, space, (0, 0, 0), radii)
    count = int(rng.integers(3, 6))
    present = np.sort(rng.permutation(len(VEINS))[:count])
    veins = np.full_like(body, FAR_MM)
    for direction in VEINS[present]:
        width = rng.uniform(4.0, 6.0) * (1.25 if count == 3 else 1.0)  # mm; a common trunk is wider
        veins = np.minimum(veins, branch(rng, space, radii, direction, width, rng.uniform(18, 32)))
    appendage = branch(rng, space, radii, APPENDAGE, rng.uniform(6, 8), rng.uniform(10, 16))
    trunk = blend(body, appendage, 3.0)
    stubs = np.maximum(veins, body - rng.uniform(6, 10))
    return blend(trunk, veins, 4.0), blend(trunk, stubs, 4.0)


def draw_neighbours(rng: np.random.Generator, space: Space, radii: np.ndarray) -> dict[str, np.ndarray]:
    """Signed distances in mm of what surrounds the atrium; chambers overlap it and are cut back in `paint`."""
    _, back, up = radii

    def near(x: float, y: float, z: float) -> np.ndarray:
        return np.array([x, y, z]) + rng.normal(0, 2.0, 3)

    def vessel(start: np.ndarray, end: np.ndarray, width: float) -> np.ndarray:
        along = np.linspace(0, 1, 6)[:, None]
        bow = rng.normal(0, 4.0, 3) * along * (1 - along)
        return tube(space, start + along * (end - start) + bow, np.full(6, width * rng.uniform(0.85, 1.15)))

    return {
        "left ventricle": chamber(rng, space, near(20, -back - 13, -12), np.array([21, 22, 22])),
        "right atrium": chamber(rng, space, near(-25, -back - 5, -6), np.array([17, 19, 24])),
        "ascending aorta": vessel(near(-4, -back - 10, -8), near(-10, -back - 13, 50), 11.0),
        "descending aorta": vessel(near(16, back + 11, -60), near(14, back + 11, 60), 9.0),
        "pulmonary artery": vessel(near(24, -6, up + 12), near(-60, 4, up + 9), 7.5),
        "oesophagus": vessel(near(4, back + 6, -60), near(4, back + 7, 60), 5.0),
        "spine": chamber(rng, space, near(-8, back + 28, 0), np.array([19, 16, 90])),
    }


def chamber(rng: np.random.Generator, space: Space, centre: tuple | np.ndarray, radii: np.ndarray) -> np.ndarray:
    """An ellipsoid with a smooth random surface: signed distance in mm, right to first order at the surface."""
    radii = radii[:, None, None, None]
    scaled = (space.points - np.asarray(centre, dtype=np.float64)[:, None, None, None]) / radii
    length = np.sqrt((scaled**2).sum(axis=0)) + 1e-9
    bumps = np.zeros_like(length)
    for cubic in (False, True) * 4:
        wave = np.tensordot(unit_vector(rng), scaled, axes=1) / length
        bumps += rng.uniform(-0.2, 0.2) * wave * wave * (wave if cubic else 1)
    steepness = np.sqrt(((scaled / radii) ** 2).sum(axis=0)) + 1e-9
    return length * (length - 1 - bumps) / steepness


def branch(
    rng: np.random.Generator,
    space: Space,
    radii: np.ndarray,
    direction: np.ndarray,
    width: float,
    reach: float,
) -> np.ndarray:
    """A tapered, curved tube from within the body of `radii` to `reach` mm outside: signed distance in mm."""
    direction = direction + rng.normal(0, 0.15, 3)
    direction /= np.sqrt((direction**2).sum())
    surface = direction / np.sqrt(((direction / radii) ** 2).sum())
    bend = np.cross(direction, unit_vector(rng)) * reach * rng.uniform(0.2, 0.5)
    along = np.linspace(0, 1, 8)[:, None]
    centres = 0.5 * surface + along * (0.5 * surface + reach * direction) + along**2 * bend
    return tube(space, centres, width * np.linspace(1, rng.uniform(0.45, 0.75), 8))


def tube(space: Space, centres: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Signed distance in mm to a chain of cones, at most `FAR_MM`. Args: centres (K, 3), widths (K,), in mm."""
    margin = widths.max() + FAR_MM
    low, high = centres.min(axis=0) - margin, centres.max(axis=0) + margin
    near = np.all([(low[a] < space.points[a]) & (space.points[a] < high[a]) for a in range(3)], axis=0)
    points = space.points[:, near]
    nearest = np.full(points.shape[1], FAR_MM)
    for start, end, width, width_end in zip(centres, centres[1:], widths, widths[1:], strict=False):
        axis, offset = end - start, points - start[:, None]
        along = np.clip(axis @ offset / (axis @ axis), 0, 1)
        distance = np.sqrt(((offset - axis[:, None] * along) ** 2).sum(axis=0))
        nearest = np.minimum(nearest, distance - width - (width_end - width) * along)
    field = np.full(near.shape, FAR_MM)
    field[near] = nearest
    return field


def blend(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """Union of two signed distances with a fillet of about `width` mm (quadratic smooth minimum)."""
    share = np.clip(0.5 + 0.5 * (b - a) / width, 0, 1)
    return b + (a - b) * share - width * share * (1 - share)


def unit_vector(rng: np.random.Generator) -> np.ndarray:
    """A random direction, (3,)."""
    vector = rng.normal(size=3)
    return vector / np.sqrt((vector**2).sum())


def smooth_field(rng: np.random.Generator, size: tuple[int, ...], cells: int) -> np.ndarray:
    """Random field of `cells` bumps per axis: (W, H, D), values within [-1, 1]."""
    coarse = rng.uniform(-1, 1, (cells, cells, cells))
    return np.clip(ndimage.zoom(coarse, [n / cells for n in size], order=3, mode="nearest"), -1, 1)


def paint(
    rng: np.random.Generator, space: Space, blood: np.ndarray, around: dict[str, np.ndarray]
) -> np.ndarray:
    """Tissue brightness from signed distances, with partial volume at every border: (W, H, D), blood = 1."""
    size = blood.shape
    wall = 1.2 + smooth_field(rng, size, 5)  # mm; thin, and in places too thin to be seen
    chambers = [np.maximum(around[name], wall - blood) for name in BLOOD_POOLS]
    heart = np.minimum.reduce([blood, *chambers])
    texture = smooth_field(rng, size, 9)
    image = np.full(size, LUNG)

    def cover(distance: np.ndarray, brightness: float | np.ndarray) -> None:
        share = np.clip(0.5 - distance / space.voxel_mm, 0, 1)
        np.add(image, share * (brightness - image), out=image)

    cover(space.points[1] + 52, MUSCLE * (1 + 0.3 * texture))  # chest wall
    cover(around["spine"], BONE * (1 + 0.4 * texture))
    cover(heart - 6 - 5 * smooth_field(rng, size, 5), FAT * (1 + 0.5 * texture))
    cover(around["oesophagus"], MUSCLE * (1 + 0.2 * texture))
    cover(np.maximum(around["left ventricle"] - 8, wall - blood), MUSCLE * (1 + 0.1 * texture))
    for field in chambers:
        cover(field - 1.5, MUSCLE)
        cover(field, rng.uniform(0.9, 1.1))
    cover(blood - 2, MUSCLE)
    scar = smooth_field(rng, size, 5) - 0.35
    cover(np.maximum(np.abs(blood - 1.2) - 1.2, -10 * scar), SCAR)
    cover(blood, 1 + 0.04 * texture)
    return image


def acquire(rng: np.random.Generator, tissue: np.ndarray) -> np.ndarray:
    """The scan of a tissue map: coil field, point spread, Rician noise, z-score, rounded; float32."""
    slope = np.tensordot(unit_vector(rng), np.stack(np.meshgrid(*map(centred, tissue.shape), indexing="ij")), 1)
    coil = 1 + 0.25 * slope + 0.2 * smooth_field(rng, tissue.shape, 3)
    signal = ndimage.gaussian_filter(tissue * coil, rng.uniform(0.5, 0.8))
    sigma = rng.uniform(0.07, 0.18)  # blood to noise 5-14, the range of the real scans
    noise = rng.normal(0, sigma, (2, *tissue.shape))
    scan = np.sqrt((signal + noise[0]) ** 2 + noise[1] ** 2)
    mean = SCAN_SHARE * scan.mean()  # as if the rest of the scan were zero
    spread = np.sqrt(SCAN_SHARE * (scan**2).mean() - mean**2)
    return (np.round((scan - mean) / spread * GRAY_STEPS) / GRAY_STEPS).astype(np.float32)


def centred(count: int) -> np.ndarray:
    """Coordinates of `count` voxels in [-1, 1]."""
    return np.linspace(-1, 1, count)
