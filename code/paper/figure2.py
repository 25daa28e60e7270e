"""Figure 2 of the paper: slices and surfaces of the expert's atrium and of every system's, case by case.

A column per system. Above, the axial slice with the largest labeled area, with contours; below, at the same scale
in mm, the surface seen from behind and a little from above, where the pulmonary veins enter. The colour of a surface
is its distance to the expert's. Projection is orthographic, and faces that look away are left out, so that the
vector file stays small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import ndimage

from dataloaders import case_files
from evaluation import figures, surfaces
from utils.errors import InputError
from utils.files import atomic

TRUTH = "ground truth"
CONTOURS = {TRUTH: (figures.LABEL_COLOR, 1.8), "prediction": (figures.PREDICTION_COLORS[0], 0.8)}  # points
PRINT_DPI = 200
COLUMN, GUTTER, HEAD, CAPTION, FOOT, GAP = 2.1, 0.3, 0.3, 0.22, 0.65, 0.08  # inches
FACES = 200_000  # of all surfaces together, before those that look away are left out: a PDF of 2 to 4 MB
ELEVATION = np.deg2rad(20)
# From behind, the patient's left (+x) is on the left of the page. Rows: to the right, up, to the viewer.
VIEW = np.array([[-1, 0, 0], [0, -np.sin(ELEVATION), np.cos(ELEVATION)], [0, np.cos(ELEVATION), np.sin(ELEVATION)]])
LIGHT = np.array([-0.4, 0.6, 0.7]) / np.linalg.norm([-0.4, 0.6, 0.7])  # in the rows of VIEW: from the upper left
AMBIENT = 0.4  # brightness of a face in the shade
LAST_COLOR_MM = 5.0  # distance from which a surface has the last colour
DISTANCE_COLORS = LinearSegmentedColormap.from_list("distance", ["#EDEDED", "#E9A3C9", "#C51B7D", "#4D004B"])


@dataclass(frozen=True)
class Case:
    """A test case with the masks of every system; all arrays (W, H, D)."""

    title: str
    image: np.ndarray
    label: np.ndarray
    spacing_mm: tuple[float, float, float]
    masks: Mapping[str, np.ndarray]  # name of the system -> its prediction
    captions: Mapping[str, str] = field(default_factory=dict)  # name of the system -> its scores


class Surface(NamedTuple):
    """The visible faces of a mask, the farthest first."""

    corners: np.ndarray  # (F, 3, 2), mm to the right and up
    colors: np.ndarray  # (F, 3), RGB


def load_case(
    root: Path,
    case: str,
    predictions: Mapping[str, Path],
    title: str,
    captions: Mapping[str, str],
    num_classes: int = 1,
) -> Case:
    """A case from its scan in `root` and the NIfTI files that test_LA.py wrote."""
    image, label = case_files.read_image(root, case), case_files.read_label(root, case, num_classes) > 0
    masks = {}
    for name, path in predictions.items():
        try:
            masks[name] = np.asarray(nib.load(path).dataobj) > 0
        except (OSError, EOFError, nib.filebasedimages.ImageFileError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); predictions are in the run folders alone, not among the stored "
                "results: name the folder with --model_path, or run the row again with another --out"
            ) from None
        if masks[name].shape != image.shape:
            raise InputError(f"{path} has shape {masks[name].shape}, the scan {image.shape}; test that run again")
    return Case(title, image, label, case_files.read_spacing(root, case), masks, captions)


def write_figure(cases: Sequence[Case], path: Path) -> list[Path]:
    """Write `<path>.png` and `<path>.pdf`: two rows per case, a column per system. All cases have the same systems."""
    names = [TRUTH, *cases[0].masks]
    surfaces = [case_surfaces(case, FACES // (len(cases) * len(names))) for case in cases]
    widest = max(case.image.shape[0] * case.spacing_mm[0] for case in cases)  # mm
    views = [_extent([surface for surface in shown if surface is not None], widest) for shown in surfaces]
    figure, axes = _layout(cases, views, widest, len(names))
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name, fontsize=10, weight="bold")
    for case, shown, (middle, low, high), slices, solids in zip(
        cases, surfaces, views, axes[::2], axes[1::2], strict=True
    ):
        _draw_slices(slices, case)
        title = {"transform": slices[0].transAxes, "rotation": 90, "ha": "center", "va": "center", "size": 9}
        slices[0].text(-0.08, 0, case.title, **title)
        for ax, name, surface in zip(solids, names, shown, strict=True):
            ax.set(xlim=(middle - widest / 2, middle + widest / 2), ylim=(low, high))
            _draw_surface(ax, surface, case.captions.get(name, ""))
        for x, side in ((0.02, "L"), (0.98, "R")):  # of the patient
            solids[0].text(x, 0.5, side, transform=solids[0].transAxes, ha="center", va="center", size=8, color="gray")
    _draw_legend(figure)
    written = [path.with_suffix(".png"), path.with_suffix(".pdf")]
    for file in written:
        extra = {"metadata": {"CreationDate": None}} if file.suffix == ".pdf" else {}
        with rc_context({"pdf.fonttype": 42}), atomic(file, "--out") as temporary:  # fonts that journals accept
            figure.savefig(temporary, format=file.suffix[1:], dpi=PRINT_DPI, **extra)
    return written


# --- surfaces


def case_surfaces(case: Case, faces: int) -> list[Surface | None]:
    """The surface of the label, then of each prediction; None for an empty mask. Args: faces, see `surfaces.mesh`."""
    shell = case.label & ~ndimage.binary_erosion(case.label)
    distance = ndimage.distance_transform_edt(~shell, case.spacing_mm) if shell.any() else None  # mm
    expert = visible_surface(case.label, case.spacing_mm, faces)
    return [expert, *(visible_surface(mask, case.spacing_mm, faces, distance) for mask in case.masks.values())]


def visible_surface(
    mask: np.ndarray, spacing_mm: Sequence[float], faces: int, distance: np.ndarray | None = None
) -> Surface | None:
    """What is seen of a mask, (W, H, D) boolean, from the viewer's side.

    Args: distance, (W, H, D), mm, gives each face its colour; None is distance 0 everywhere.
    """
    if not mask.any():
        return None
    corners, normals = (vectors @ VIEW.T for vectors in surface_triangles(mask, spacing_mm, faces))
    tilt = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, 2]
    order = np.argsort(corners[:, :, 2].mean(axis=1))
    order = order[tilt[order] > 0]
    corners, normals = corners[order], normals[order]
    brightness = AMBIENT + (1 - AMBIENT) * np.clip(normals @ LIGHT, 0, 1)
    centres = corners.mean(axis=1) @ VIEW / spacing_mm  # VIEW is a rotation: back to voxels
    far = np.zeros(len(centres))
    if distance is not None:
        far = surfaces.sample(distance, centres)
    return Surface(corners[:, :, :2], DISTANCE_COLORS(far / LAST_COLOR_MM)[:, :3] * brightness[:, None])


def surface_triangles(mask: np.ndarray, spacing_mm: Sequence[float], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Triangles around a mask that is not empty, (F, 3 corners, 3) in mm, and their normals, (F, 3), outwards.

    Normals are smooth: those of the corners, averaged. Args: most, see `surfaces.mesh`.
    """
    shape = surfaces.mesh(mask, most)
    mean = (shape.normals / spacing_mm)[shape.faces].mean(axis=1)  # normals shrink where the grid stretches
    return (shape.vertices * spacing_mm)[shape.faces], mean / np.maximum(np.linalg.norm(mean, axis=1)[:, None], 1e-9)


# --- drawing


def _layout(
    cases: Sequence[Case], views: Sequence[tuple[float, float, float]], widest: float, columns: int
) -> tuple[Figure, np.ndarray]:
    """Axes of slices and, below them, of surfaces for each case, all at one scale."""
    inch = COLUMN / widest  # per mm
    talls = []
    for case, (_, low, high) in zip(cases, views, strict=True):
        talls += [inch * case.image.shape[1] * case.spacing_mm[1], inch * (high - low)]
    width = GUTTER + columns * (COLUMN + GAP)
    height = HEAD + sum(talls) + (len(talls) - 1) * CAPTION + FOOT
    edges = {"left": GUTTER / width, "right": 1 - GAP / width, "top": 1 - HEAD / height, "bottom": FOOT / height}
    gaps = {"wspace": GAP / COLUMN, "hspace": CAPTION / np.mean(talls), "height_ratios": talls}
    figure = Figure(figsize=(width, height), dpi=PRINT_DPI)
    return figure, figure.subplots(len(talls), columns, squeeze=False, gridspec_kw=edges | gaps)


def _extent(surfaces: Sequence[Surface], default: float) -> tuple[float, float, float]:
    """Middle from left to right, lowest and highest point of all surfaces of a case, in mm."""
    if not surfaces:
        return 0.0, 0.0, default / 4
    corners = np.concatenate([surface.corners.reshape(-1, 2) for surface in surfaces])
    (left, low), (right, high) = corners.min(axis=0), corners.max(axis=0)
    return (left + right) / 2, low - 2.0, high + 2.0


def _draw_slices(axes: Sequence[Axes], case: Case) -> None:
    """The slice with the largest label in every column: the expert's contour, and above it that of the system."""
    index = int(np.argmax(case.label.sum(axis=(0, 1)))) if case.label.any() else case.label.shape[2] // 2
    step, plane = case.spacing_mm[:2], figures.AXIAL
    picture, window = plane.slice(case.image, index), figures.gray_window(case.image)
    for ax, mask in zip(axes, [None, *case.masks.values()], strict=True):
        figures.draw_scan(ax, picture, step, *window)
        ax.set_anchor("C")
        for shown, (color, width) in zip((case.label, mask), CONTOURS.values(), strict=True):
            if shown is not None:
                figures.draw_contour(ax, plane.slice(shown, index), step, color, width)
    figures.write_edges(axes[0], plane, f"{index + 1}/{case.image.shape[2]}", anatomical=True)
    figures.draw_scale_bar(axes[0])
    for text in axes[0].texts:
        text.set_fontsize(7)  # tiles are smaller here than where these come from


def _draw_surface(ax: Axes, surface: Surface | None, caption: str) -> None:
    """A surface and, below it, its scores."""
    ax.set_axis_off()
    if surface is None:
        ax.text(0.5, 0.5, "empty", transform=ax.transAxes, ha="center", va="center", size=9, color="gray")
    else:  # edges of the faces' colour close the hairlines between them
        ax.add_collection(
            PolyCollection(surface.corners, facecolors=surface.colors, edgecolors=surface.colors, linewidths=0.2)
        )
    ax.text(0.5, -0.02, caption, transform=ax.transAxes, ha="center", va="top", size=8)


def _draw_legend(figure: Figure) -> None:
    """Below everything: whose contours, and what the colours of the surfaces are."""
    width, height = figure.get_size_inches()
    lines = [Line2D([], [], color=color, linewidth=line) for color, line in CONTOURS.values()]
    figure.legend(lines, list(CONTOURS), loc="lower left", bbox_to_anchor=(0, 0), frameon=False, fontsize=8)
    bar = figure.add_axes((1.4 / width, 0.18 / height, 2.8 / width, 0.08 / height))
    colors = ScalarMappable(Normalize(0, LAST_COLOR_MM), DISTANCE_COLORS)
    scale = figure.colorbar(colors, cax=bar, orientation="horizontal", extend="max")
    scale.outline.set_linewidth(0.5)
    bar.tick_params(length=2, pad=1, labelsize=7)
    bar.set_title("surfaces, from behind: distance to the ground truth's [mm]", fontsize=7, pad=3)
