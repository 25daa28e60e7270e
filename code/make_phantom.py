"""Write a small synthetic data set in the left-atrium layout, so that every command runs without the scans.

Each case is an atrium with an appendage and 3-5 pulmonary veins among chambers and vessels of the same
brightness, seen through partial volume, an uneven coil field and noise. Arrays depend on --seed alone.
"""

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from dataloaders.case_files import SPACING_KEY, case_path, class_attributes, write_case, write_list
from evaluation.metrics import largest_component
from options.flags import LISTS
from options.parser import Parser
from options.types import PathHere, at_least, between
from utils.errors import InputError, run_script
from utils.files import repository_path
from utils.labels import LabelClass

PHANTOM_JSON = "phantom.json"
PHANTOM_VERSION = 1  # of the recipe below: raise it with whatever changes an array
MIN_SIDE = 16  # voxels; below, veins and walls vanish
FIELD_MM = 87.2  # cube root of the imaged volume: 96 x 96 x 72 mm, as in the released scans (119 x 91 x 55)
GROWTH = 8  # in-plane sizes vary by case between the given one and 1 + 1/GROWTH of it
SCAN_SHARE = 0.35  # of the scan that the crop shows: the released files are z-scored before they are cropped
GRAY_STEPS = 256  # gray values are multiples of 1/256: last-bit differences between machines vanish
FAR_MM = 10.0  # distances beyond do not matter and are cut

LUNG, FAT, MUSCLE, BONE, SCAR = 0.06, 0.25, 0.45, 0.38, 1.45  # brightness, blood = 1; scar takes up contrast

# Patient frame: x to the left, y to the back, z to the head. Where the pulmonary veins leave the atrium:
RIGHT_VEINS = [(-0.80, 0.45, 0.45), (-0.85, 0.40, -0.45), (-0.95, 0.25, 0.05)]  # superior, inferior, middle
LEFT_VEINS = [(0.75, 0.45, 0.50), (0.80, 0.55, -0.35)]  # superior, inferior
VEINS = np.array(RIGHT_VEINS + LEFT_VEINS)
APPENDAGE = np.array([0.75, -0.6, 0.3])
BLOOD_POOLS = ("left ventricle", "right atrium", "ascending aorta", "descending aorta", "pulmonary artery")
TWO_CLASSES = (LabelClass("atrium", (1,)), LabelClass("appendage", (2,)))
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """What all drawing shares: the random stream, voxel centres in the patient frame (3, W, H, D), voxel size."""

    rng: np.random.Generator
    points: np.ndarray  # mm
    voxel_mm: float


def make_case(seed: int, index: int, shape: Shape = (64, 64, 48), classes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """One phantom case: a function of its arguments, the same on every machine.

    Args: shape, smallest (W, H, D); W and H grow by up to an eighth, D is fixed; classes, 1 or 2.
    Returns: image, float32, multiples of 1/256, z-scored like a scan of which it is a crop; label, uint8, one
        connected component, of two classes the appendage is 2. Both (W', H', D).
    """
    rng = np.random.default_rng([seed, index])
    size = (*(side + int(rng.integers(side // GROWTH + 1)) for side in shape[:2]), shape[2])
    scene = draw_pose(rng, size, spacing_of(shape))
    radii = np.array([30.0, 21.0, 19.0]) * rng.uniform(0.9, 1.1, 3)  # mm; adult atria are 35-65 mm across
    seen, annotated, appendage = draw_atrium(scene, radii)
    tissue = paint(scene, seen, annotated, draw_neighbours(scene, radii))
    label = largest_component(annotated < 0).astype(np.uint8)
    if classes == 2:
        label[(label > 0) & appendage] = 2
    return acquire(rng, tissue), label


def spacing_of(shape: Shape) -> float:
    """Isotropic voxel size in mm: the anatomy fills any grid alike."""
    return round(FIELD_MM / float(np.prod(shape)) ** (1 / 3), 3)


def draw_pose(rng: np.random.Generator, size: Shape, voxel_mm: float) -> Scene:
    """Random size, shift and rotation of the patient within the grid."""
    scale = rng.uniform(1.0, 1.15)
    shift = rng.uniform(-1, 1, 3) * (4, 4, 2) + (0, 5, 0)  # mm; the chambers in front need room
    turn = Rotation.from_euler("xyz", rng.uniform(-18, 18, 3), degrees=True).as_matrix()
    axes = [(np.arange(n) - (n - 1) / 2) * voxel_mm - s for n, s in zip(size, shift, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    return Scene(rng, np.einsum("ji,j...->i...", turn / scale, grid), voxel_mm / scale)


def draw_atrium(scene: Scene, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed distances in mm, negative inside, of the blood that is seen and of what is annotated; where the appendage
    is nearer than the body and the veins.
    """
    body = chamber(scene, np.zeros(3), radii)
    count = int(scene.rng.integers(3, 6))
    veins = np.full_like(body, FAR_MM)
    for direction in scene.rng.permutation(VEINS)[:count]:
        width = scene.rng.uniform(4.0, 6.0) * (1.25 if count == 3 else 1.0)  # mm; a common trunk is wider
        veins = np.minimum(veins, branch(scene, radii, direction, width, scene.rng.uniform(18, 32)))
    appendage = branch(scene, radii, APPENDAGE, scene.rng.uniform(6, 8), scene.rng.uniform(10, 16))
    trunk = blend(body, appendage, 3.0)
    # veins go on beyond their annotated stubs, which end near the body, as in the challenge
    stubs = np.maximum(veins, body - scene.rng.uniform(6, 10))
    return blend(trunk, veins, 4.0), blend(trunk, stubs, 4.0), appendage < np.minimum(body, stubs)


def draw_neighbours(scene: Scene, radii: np.ndarray) -> dict[str, np.ndarray]:
    """Signed distances in mm of what surrounds the atrium; chambers overlap it and are cut back in `paint`."""
    _, back, up = radii

    def near(x: float, y: float, z: float) -> np.ndarray:
        return np.array([x, y, z]) + scene.rng.normal(0, 2.0, 3)

    def vessel(start: np.ndarray, end: np.ndarray, width: float) -> np.ndarray:
        along = np.linspace(0, 1, 6)[:, None]
        bow = scene.rng.normal(0, 4.0, 3) * along * (1 - along)
        widths = np.full(6, width * scene.rng.uniform(0.85, 1.15))
        return tube(scene, start + along * (end - start) + bow, widths)

    return {
        "left ventricle": chamber(scene, near(20, -back - 13, -12), np.array([21, 22, 22])),
        "right atrium": chamber(scene, near(-25, -back - 5, -6), np.array([17, 19, 24])),
        "ascending aorta": vessel(near(-4, -back - 10, -8), near(-10, -back - 13, 50), 11.0),
        "descending aorta": vessel(near(16, back + 11, -60), near(14, back + 11, 60), 9.0),
        "pulmonary artery": vessel(near(24, -6, up + 12), near(-60, 4, up + 9), 7.5),
        "oesophagus": vessel(near(4, back + 6, -60), near(4, back + 7, 60), 5.0),
        "spine": chamber(scene, near(-8, back + 28, 0), np.array([19, 16, 90])),
    }


def chamber(scene: Scene, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """An ellipsoid with a smooth random surface: signed distance in mm, right to first order at the surface."""
    radii = radii[:, None, None, None]
    scaled = (scene.points - centre[:, None, None, None]) / radii
    length = np.sqrt((scaled**2).sum(axis=0)) + 1e-9
    bumps = np.zeros_like(length)
    for cubic in (False, True) * 4:
        wave = np.einsum("i,i...->...", unit_vector(scene.rng), scaled) / length
        bump = wave * wave * wave if cubic else wave * wave - 1 / 3  # mean 0: the size stays
        bumps += scene.rng.uniform(-0.25, 0.25) * bump
    steepness = np.sqrt(((scaled / radii) ** 2).sum(axis=0)) + 1e-9
    return length * (length - 1 - bumps) / steepness


def branch(scene: Scene, radii: np.ndarray, direction: np.ndarray, width: float, reach: float) -> np.ndarray:
    """A tapered, curved tube from within the body of `radii` to `reach` mm outside: signed distance in mm."""
    direction = direction + scene.rng.normal(0, 0.15, 3)
    direction /= np.sqrt((direction**2).sum())
    surface = direction / np.sqrt(((direction / radii) ** 2).sum())
    bend = np.cross(direction, unit_vector(scene.rng)) * reach * scene.rng.uniform(0.2, 0.5)
    along = np.linspace(0, 1, 8)[:, None]
    centres = 0.5 * surface + along * (0.5 * surface + reach * direction) + along**2 * bend
    return tube(scene, centres, width * np.linspace(1, scene.rng.uniform(0.45, 0.75), 8))


def tube(scene: Scene, centres: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Signed distance in mm to a chain of cones, at most `FAR_MM`. Args: centres (K, 3), widths (K,), in mm."""
    low, high = centres.min(axis=0) - FAR_MM - widths.max(), centres.max(axis=0) + FAR_MM + widths.max()
    near = np.all([(low[a] < scene.points[a]) & (scene.points[a] < high[a]) for a in range(3)], axis=0)
    points = scene.points[:, near]
    nearest = np.full(points.shape[1], FAR_MM)
    for start, end, width, width_end in zip(centres, centres[1:], widths, widths[1:], strict=False):
        axis, offset = end - start, points - start[:, None]
        along = np.clip(np.einsum("i,ij->j", axis, offset) / (axis**2).sum(), 0, 1)
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


def smooth_field(rng: np.random.Generator, size: Shape, cells: int) -> np.ndarray:
    """Random field of `cells` bumps per axis: (W, H, D), values within [-1, 1]."""
    field = rng.uniform(-1, 1, (cells, cells, cells))
    for n in size:  # cubic splines along one axis after the other; the axes come back to their order
        spline = ndimage.zoom(np.eye(cells), (n / cells, 1), order=3, mode="nearest")  # (n, cells)
        field = np.einsum("abc,na->bcn", field, spline)
    return np.clip(field, -1, 1)


def paint(scene: Scene, seen: np.ndarray, annotated: np.ndarray, around: dict[str, np.ndarray]) -> np.ndarray:
    """Tissue brightness from signed distances, with partial volume at every border: (W, H, D), blood = 1."""
    size = seen.shape
    wall = 1.2 + smooth_field(scene.rng, size, 5)  # mm; thin, and in places too thin to be seen
    chambers = [np.maximum(around[name], wall - seen) for name in BLOOD_POOLS]
    heart = np.minimum.reduce([seen, *chambers])
    texture = smooth_field(scene.rng, size, 9)
    image = np.full(size, LUNG)

    def cover(distance: np.ndarray, brightness: float | np.ndarray) -> None:
        image[:] += np.clip(0.5 - distance / scene.voxel_mm, 0, 1) * (brightness - image)

    cover(scene.points[1] + 52, MUSCLE * (1 + 0.3 * texture))  # chest wall
    cover(around["spine"], BONE * (1 + 0.4 * texture))
    cover(heart - 4.5 - 3.5 * smooth_field(scene.rng, size, 5), FAT * (1 + 0.5 * texture))
    cover(around["oesophagus"], MUSCLE * (1 + 0.2 * texture))
    cover(np.maximum(around["left ventricle"] - 8, wall - seen), MUSCLE * (1 + 0.1 * texture))
    for field in chambers:
        cover(field - 1.5, MUSCLE)
        cover(field, scene.rng.uniform(0.9, 1.1))
    cover(seen - wall, MUSCLE)
    scarred = 3.5 - 10 * smooth_field(scene.rng, size, 5)  # negative in patches of the wall
    cover(np.maximum(np.abs(annotated - 1.2) - 1.2, scarred), SCAR)
    cover(seen, 1 + 0.04 * texture)
    return image


def acquire(rng: np.random.Generator, tissue: np.ndarray) -> np.ndarray:
    """The scan of a tissue map: coil field, point spread, Rician noise, z-score, rounded; float32."""
    coil = 1 + 0.3 * smooth_field(rng, tissue.shape, 2) + 0.2 * smooth_field(rng, tissue.shape, 3)
    signal = ndimage.gaussian_filter(tissue * coil, rng.uniform(0.5, 0.8))
    noise = rng.normal(0, rng.uniform(0.08, 0.18), (2, *tissue.shape))  # blood to noise 5-12; real scans 5-10
    scan = np.sqrt((signal + noise[0]) ** 2 + noise[1] ** 2)
    mean = SCAN_SHARE * scan.mean()  # as if the rest of the scan were zero
    spread = np.sqrt(SCAN_SHARE * (scan**2).mean() - mean**2)
    return (np.round((scan - mean) / spread * GRAY_STEPS) / GRAY_STEPS).astype(np.float32)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, example="python code/make_phantom.py --dest data/phantom")
    add = parser.add_argument
    add("--dest", action=PathHere, default="data/phantom", help="folder to write")
    add("--train", type=at_least(1), default=24, help="training cases, labeled and unlabeled together")
    add("--test", type=at_least(1), default=6, help="test cases")
    add("--seed", type=at_least(0), default=2021, help="number that all arrays follow from")
    add(
        "--shape",
        type=at_least(MIN_SIDE),
        nargs=3,
        default=[64, 64, 48],
        metavar=("W", "H", "D"),
        help="smallest size in voxels",
    )
    add("--classes", type=between(1, 2), default=1, help="1: the atrium whole; 2: atrium and appendage")
    add("--overwrite", action="store_true", help="write again what is there, whatever its parameters")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the data set unless it is there; the folder appears whole or not at all."""
    options = parse_options(argv)
    dest = repository_path(options.dest).resolve()  # a link to another disk stays a link
    ids = [f"phantom_{index:03d}" for index in range(options.train + options.test)]
    recipe = {"version": PHANTOM_VERSION, "seed": options.seed, "shape": options.shape}
    recipe |= {"classes": options.classes} if options.classes > 1 else {}
    recipe |= {LISTS[0]: ids[: options.train], LISTS[1]: ids[options.train :]}
    if is_there(dest, recipe, options.overwrite):
        print(f"{dest} holds this phantom already")
        return 0
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".phantom-", dir=dest.parent) as folder:
            fresh = Path(folder) / "new"  # its own folder: the temporary one is closed to other users
            write_cases(fresh, recipe)
            if dest.exists():
                os.replace(dest, Path(folder) / "old")
            os.replace(fresh, dest)
    except OSError as error:
        raise InputError(f"{dest} cannot be written ({error}); make room, or choose another --dest") from error
    print(f"wrote {options.train} + {options.test} cases to {dest}")
    return 0


def is_there(dest: Path, recipe: dict, overwrite: bool) -> bool:
    """Whether the phantom of this recipe is complete; an error where writing would destroy something else."""
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return False
    try:
        there = json.loads((dest / PHANTOM_JSON).read_text())
    except (OSError, ValueError):
        raise InputError(f"{dest} is there and is no phantom; choose another --dest, or move it away") from None
    if overwrite:
        return False
    if there != recipe:
        raise InputError(f"{dest} holds a phantom of other parameters; pass --overwrite, or another --dest")
    files = [case_path(dest, case) for name in LISTS for case in recipe[name]] + [dest / name for name in LISTS]
    return all(file.is_file() for file in files)


def write_cases(folder: Path, recipe: dict) -> None:
    """All files of the data set."""
    ids, classes = recipe[LISTS[0]] + recipe[LISTS[1]], TWO_CLASSES if recipe.get("classes") == 2 else ()
    for index, case in enumerate(tqdm(ids, desc="phantom", disable=None)):  # None: only on a terminal
        image, label = make_case(recipe["seed"], index, tuple(recipe["shape"]), recipe.get("classes", 1))
        attributes = {SPACING_KEY: (spacing_of(recipe["shape"]),) * 3}
        write_case(folder, case, image, label, attributes | (class_attributes(classes) if classes else {}))
    for name in LISTS:
        write_list(folder / name, recipe[name])
    (folder / PHANTOM_JSON).write_text(json.dumps(recipe) + "\n")


if __name__ == "__main__":
    run_script(main)
