"""Figures for people: one picture per test case, a panel for TensorBoard, training curves.

Scans are drawn the way radiologists read them. Array axes x, y, z run to the patient's left, posterior and
superior (ITK's LPS; liver, spine and aorta show that the LA files follow it). So the patient's right is on the
left, anterior or head is up, and the sagittal view looks from the left. Only the object-oriented Agg interface
of matplotlib is used: no global state, so that worker processes and threads can draw at the same time.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image

from evaluation.colors import look, pale
from utils.files import atomic

LABEL = "label"  # name of the expert's mask in legends
# Okabe & Ito's palette, told apart with every common colour vision; those of classes come from colors.look.
LABEL_COLOR = "#E69F00"
PREDICTION_COLORS = ("#56B4E9", "#CC79A7", "#009E73", "#F0E442")
CURVE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
WINDOW_PERCENTILES = (1.0, 99.5)  # of the gray values: noise floor to black, bright wall just short of white
DPI = 150
MIN_WIDTH, WIDTH, MAX_HEIGHT = 5.0, 7.5, 10.0  # inches, of a case figure
MARGIN, TITLE_LINE = 0.1, 0.22  # inches
GRAYS = 64  # gray levels of a picture: noise hides the steps, and files take half to two thirds of the bytes of 256
SCALE_BARS_MM = (100, 50, 20, 10, 5, 2, 1)  # the longest that spans at most a quarter of the axial view
NAME_LENGTH = 32  # characters of a legend's line
LABEL_LINE, PREDICTION_LINE = 2.6, 1.1  # points: the label shows as a rim where a prediction covers it
TILE, PANEL_DPI = 2.2, 100  # inches: side of a tile of the training panel, 220 pixels for any patch size
SMOOTHED_FROM = 40  # points of a curve from which a running mean over 1/40 of them, at least 5, is drawn in front
MANY_CURVES = 6  # beyond, the means stand alone and the legend beside them
WRITING = {"color": "white", "fontsize": 9, "path_effects": [withStroke(linewidth=2.5, foreground="black")]}


class Contour(NamedTuple):
    """A mask, (W, H, D) boolean, and how its outline is drawn."""

    name: str
    mask: np.ndarray
    color: str
    width: float  # points


class Plane(NamedTuple):
    """One of the three views: array axes across and down the picture, and what its edges are called."""

    name: str
    normal: int
    across: int
    down: int
    edges: str  # left, right, top, bottom

    def slice(self, volume: np.ndarray, index: int) -> np.ndarray:
        """The slice as it is drawn, (rows, columns): z counts towards the head, so it runs up the picture."""
        picture = np.take(volume, index, axis=self.normal).T
        return picture[::-1] if self.down == 2 else picture


AXIAL = Plane("axial", 2, 0, 1, "RLAP")
CORONAL = Plane("coronal", 1, 0, 2, "RLSI")
SAGITTAL = Plane("sagittal", 0, 1, 2, "APSI")


def case_figure(
    image: np.ndarray,
    label: np.ndarray | None,
    predictions: Mapping[str, np.ndarray],
    path: Path | str,
    title: str,
    spacing_mm: Sequence[float],
    classes: Sequence[str] = ("foreground",),
    anatomical: bool = True,
) -> None:
    """One PNG of a test case: three planes at one scale in mm, contours of the label and of every prediction.

    Each of several classes has its colour, pale for the label.

    Each plane shows the slice with the largest area of the label; without a label (or with an empty one) that
    of all predictions together; without any foreground the middle one.

    Args:
        image: (W, H, D), finite.
        label: (W, H, D), 0..C; None for a scan that no one labeled.
        predictions: name as in the legend -> (W, H, D), 0..C.
        title: case id and scores; may have several lines.
        classes: names of the classes 1..C.
        anatomical: False for arrays whose axes are not known to be LPS: no R, L, A, P, S, I at the edges.
    """
    maps = ({} if label is None else {LABEL: np.asarray(label)}) | {k: np.asarray(v) for k, v in predictions.items()}
    if any(found.shape != image.shape for found in maps.values()):
        raise ValueError(f"image {image.shape}, masks {[found.shape for found in maps.values()]}")
    contours = _contours(maps, classes)
    figure, axes = _three_planes(np.multiply(image.shape, spacing_mm), title)
    centre = informative_voxel({name: found > 0.5 for name, found in maps.items()}, image.shape)
    low, high = gray_window(image)
    for plane, ax in axes.items():
        step = (spacing_mm[plane.across], spacing_mm[plane.down])
        index = centre[plane.normal]
        draw_scan(ax, plane.slice(image, index), step, low, high)
        for contour in contours:
            draw_contour(ax, plane.slice(contour.mask, index), step, contour.color, contour.width)
        write_edges(ax, plane, f"{index + 1}/{image.shape[plane.normal]}", anatomical)
    draw_scale_bar(axes[AXIAL])
    _draw_legend(axes[SAGITTAL], contours)
    with atomic(Path(path)) as temporary:
        Image.fromarray(_pixels(figure)).save(temporary, format="PNG", optimize=True, dpi=(DPI, DPI))


def training_panel(
    image: np.ndarray,
    label: np.ndarray | None,
    probs: Mapping[str, np.ndarray],
    sdm: np.ndarray | None = None,
) -> np.ndarray:
    """Three tiles for TensorBoard: the middle slice of the scan, a probability, and the SDM or another probability.

    The label's contours lie over every tile, each class's in a colour of its own. Of several classes the probability is
    that of the most probable one, and the distance that to the closest.

    Args:
        image: (W, H, D).
        label: (C, W, H, D), in [0, 1]; None for an unlabeled crop.
        probs: name -> (C, W, H, D), in [0, 1].
        sdm: signed distance maps, (C, W, H, D), without a unit, negative inside; coloured symmetrically about 0.
    Returns: (height, width, 3), uint8.
    """
    probs = {name: prob.max(axis=0) for name, prob in probs.items()}
    sdm = None if sdm is None else sdm.min(axis=0)
    middle = image.shape[2] // 2
    low, high = gray_window(image)
    gray, heat = {"cmap": "gray", "vmin": low, "vmax": high}, {"cmap": "magma", "vmin": 0, "vmax": 1}
    crop = "unlabeled" if label is None else "labeled"
    tiles = [(f"{crop} crop, slice {middle + 1} of {image.shape[2]}", image, gray)]
    shown = [*probs.items()][: 2 if sdm is None else 1]
    tiles += [(f"probability, {name}", prob, heat) for name, prob in shown]
    if sdm is not None:
        limit = float(np.abs(sdm[:, :, middle]).max()) or 1.0
        tiles.append(("signed distance, inside < 0", sdm, {"cmap": "RdBu", "vmin": -limit, "vmax": limit}))
    figure, axes = _row_of_tiles(len(tiles), image.shape[1] / image.shape[0])
    for ax, (name, volume, style) in zip(axes, tiles, strict=True):
        picture = ax.imshow(volume[:, :, middle].T, interpolation="nearest", aspect="auto", **style)
        ax.set_title(name, fontsize=9, pad=4)
        for number, mask in enumerate(() if label is None else label):
            color = LABEL_COLOR if len(label) == 1 else look(number)["color"]
            draw_contour(ax, mask[:, :, middle].T > 0.5, (1.0, 1.0), color, 1.5, corner=-0.5)
        if style is not gray:
            _draw_color_bar(figure, ax, picture)
    return _pixels(figure)


def curves_figure(
    series: Mapping[str, Sequence[tuple[float, float]]], path: Path | str, title: str, ylabel: str
) -> None:
    """Training curves, name -> (iteration, value), as PNG, SVG or PDF. A value that is not finite is a gap.

    The axis of the values is logarithmic if all of them are positive.
    """
    many = len(series) > MANY_CURVES
    figure = Figure(figsize=(9.0 if many else 7.0, 4.4), layout="constrained")
    ax = figure.add_subplot()
    positive = all(value > 0 for points in series.values() for _, value in points if np.isfinite(value))
    for index, (name, points) in enumerate(series.items()):
        color = CURVE_COLORS[index % len(CURVE_COLORS)]
        style = ("-", "--", ":")[index // len(CURVE_COLORS) % 3]
        x, y = np.asarray(points, dtype=float).reshape(-1, 2).T
        if len(x) < SMOOTHED_FROM:
            ax.plot(x, y, style, color=color, linewidth=1.6, marker="o" if len(x) == 1 else None, label=name)
        else:
            if not many:
                ax.plot(x, y, color=color, linewidth=0.6, alpha=0.35)
            ax.plot(*_running_mean(x, y, max(5, len(x) // 40)), style, color=color, linewidth=1.8, label=name)
    ax.set(title=title, xlabel="iteration", ylabel=ylabel, yscale="log" if series and positive else "linear")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}" if positive else "")
    ax.tick_params(axis="y", which="minor", labelsize=8)
    ax.grid(alpha=0.3, which="both")
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.01)
    if series:
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}
        ax.legend(frameon=False, **beside)
    path = Path(path)
    with atomic(path, "--out") as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=DPI)


def _contours(maps: Mapping[str, np.ndarray], classes: Sequence[str]) -> list[Contour]:
    """Every class of every label map, the label's below those of predictions."""
    colors = iter(PREDICTION_COLORS * len(maps))
    contours = []
    for name, found in maps.items():
        width = LABEL_LINE if name == LABEL else PREDICTION_LINE
        own = LABEL_COLOR if name == LABEL else next(colors)
        for number, title in enumerate(classes, start=1):
            if len(classes) == 1:
                contours.append(Contour(name, found > 0.5, own, width))
            else:
                color = look(number - 1)["color"]
                shade = pale(color) if name == LABEL else color
                contours.append(Contour(f"{title}, {name}", found == number, shade, width))
    return contours


def _three_planes(size_mm: Sequence[float], title: str) -> tuple[Figure, dict[Plane, Axes]]:
    """Axial at the top left, sagittal beside it, coronal below: one scale, as in a viewer with four panes."""
    x, y, z = size_mm
    top = max(y, z)  # mm: height of the upper row
    head = MARGIN + TITLE_LINE * len(title.splitlines())
    inch_per_mm = min((WIDTH - 3 * MARGIN) / (x + y), (MAX_HEIGHT - head - 2 * MARGIN) / (top + z))
    used, height = inch_per_mm * (x + y) + 3 * MARGIN, inch_per_mm * (top + z) + head + 2 * MARGIN
    width = max(used, MIN_WIDTH)
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.text(MARGIN / width, 1 - MARGIN / height, title, va="top", fontsize=11, weight="bold", parse_math=False)
    rim = {"left": MARGIN, "right": used - MARGIN, "bottom": MARGIN, "top": height - head}  # inches
    rim = {side: inches / (width if side in ("left", "right") else height) for side, inches in rim.items()}
    gaps = {"wspace": 2 * MARGIN / (inch_per_mm * (x + y)), "hspace": 2 * MARGIN / (inch_per_mm * (top + z))}
    grid = figure.add_gridspec(2, 2, width_ratios=(x, y), height_ratios=(top, z), **rim, **gaps)
    axes = {AXIAL: grid[0, 0], SAGITTAL: grid[0, 1], CORONAL: grid[1, 0]}
    return figure, {plane: figure.add_subplot(cell, anchor="NW") for plane, cell in axes.items()}


def informative_voxel(masks: Mapping[str, np.ndarray], shape: Sequence[int]) -> list[int]:
    """Index of the slice to show along each array axis."""
    shown = masks.get(LABEL, np.zeros(shape, bool))
    if not shown.any():
        shown = np.logical_or.reduce([shown, *masks.values()])
    if not shown.any():
        return [side // 2 for side in shape]
    return [int(np.argmax(shown.sum(axis=tuple({0, 1, 2} - {axis})))) for axis in range(3)]


def draw_scan(ax: Axes, picture: np.ndarray, step: Sequence[float], low: float, high: float) -> None:
    """Gray slice; axes in mm from its upper left corner."""
    extent = (0, picture.shape[1] * step[0], picture.shape[0] * step[1], 0)
    gray = colormaps["gray"].resampled(GRAYS)
    smooth = {"interpolation": "bilinear", "interpolation_stage": "data"}
    ax.imshow(picture, cmap=gray, vmin=low, vmax=high, extent=extent, **smooth)
    ax.set_axis_off()


def draw_contour(
    ax: Axes, mask: np.ndarray, step: Sequence[float], color: str, width: float, corner: float = 0.0
) -> None:
    """Outline of a 2-D mask; closed also where the mask touches the border, nothing for an empty mask.

    Args: step, size of a pixel (across, down); corner, coordinate of the picture's upper left corner.
    """
    if not mask.any():
        return
    rows, columns = (
        corner + (np.arange(-1, side + 1) + 0.5) * size for side, size in zip(mask.shape, step[::-1], strict=True)
    )
    limits = ax.axis()
    lines = ax.contour(columns, rows, np.pad(mask.astype(float), 1), [0.5], colors=[color], linewidths=width)
    lines.set_path_effects([withStroke(linewidth=width + 0.6, foreground=(0, 0, 0, 0.6))])
    ax.axis(limits)


def write_edges(ax: Axes, plane: Plane, number: str, anatomical: bool) -> None:
    """Name and slice number in the upper left corner; the patient's sides at the four edges."""
    style = WRITING | {"transform": ax.transAxes}
    name = f"{plane.name}  " if anatomical else ""
    ax.text(0.015, 0.98, f"{name}{'xyz'[plane.normal]} {number}", va="top", **style)
    if anatomical:
        left, right, top, bottom = plane.edges
        ax.text(0.015, 0.5, left, ha="left", va="center", **style)
        ax.text(0.985, 0.5, right, ha="right", va="center", **style)
        ax.text(0.5, 0.98, top, ha="center", va="top", **style)
        ax.text(0.5, 0.02, bottom, ha="center", va="bottom", **style)


def draw_scale_bar(ax: Axes) -> None:
    """A bar of a round number of mm in the lower right corner."""
    across, down = ax.get_xlim()[1], ax.get_ylim()[0]
    bar = next((length for length in SCALE_BARS_MM if length <= across / 4), SCALE_BARS_MM[-1])
    x, y = 0.97 * across, 0.96 * down
    ax.plot([x - bar, x], [y, y], color="white", linewidth=2.5, path_effects=WRITING["path_effects"])
    ax.text(x - bar / 2, 0.98 * y, f"{bar} mm", ha="center", va="bottom", **WRITING)


def _draw_legend(ax: Axes, contours: Sequence[Contour]) -> None:
    """Names of the contours, below these axes."""
    names = [textwrap.fill(one.name if one.mask.any() else f"{one.name} (empty)", NAME_LENGTH) for one in contours]
    lines = [Line2D([], [], color=one.color, linewidth=2.5) for one in contours]
    ax.legend(lines, names, loc="upper left", bbox_to_anchor=(0, 0), frameon=False, fontsize=9, handlelength=1.5)


def _row_of_tiles(count: int, height_per_width: float) -> tuple[Figure, list[Axes]]:
    """Axes without ticks, side by side; room for a title above and a colour bar below each."""
    gap, head, foot, tall = 0.12, 0.24, 0.34, TILE * height_per_width  # inches
    width, height = count * (TILE + gap) + gap, tall + head + foot
    figure = Figure(figsize=(width, height), dpi=PANEL_DPI)
    lefts = [gap + index * (TILE + gap) for index in range(count)]
    axes = [figure.add_axes((x / width, foot / height, TILE / width, tall / height)) for x in lefts]
    for ax in axes:
        ax.set_axis_off()
    return figure, axes


def _draw_color_bar(figure: Figure, ax: Axes, picture) -> None:
    """A thin horizontal bar under a tile, as wide as the tile."""
    box, inch = ax.get_position(), 1 / figure.get_figheight()
    cax = figure.add_axes((box.x0, box.y0 - 0.15 * inch, box.width, 0.09 * inch))
    low, high = picture.get_clim()
    ends = (low, (low + high) / 2, high)
    figure.colorbar(picture, cax=cax, orientation="horizontal").outline.set_linewidth(0.5)
    cax.set_xticks(ends, [f"{value:.2g}" for value in ends], fontsize=7)
    cax.tick_params(length=2, pad=1)
    for text, side in zip(cax.get_xticklabels(), ("left", "center", "right"), strict=True):
        text.set_horizontalalignment(side)  # inside the bar's own width, clear of the next bar's writing


def _pixels(figure: Figure) -> np.ndarray:
    """The drawn figure, (height, width, 3), uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def gray_window(image: np.ndarray) -> tuple[float, float]:
    """Gray values shown black and white; never equal, also for a constant image."""
    low, high = (float(value) for value in np.percentile(image, WINDOW_PERCENTILES))
    return low, high if high > low else low + 1.0


def _running_mean(x: np.ndarray, y: np.ndarray, span: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean over `span` neighbours of x and of the finite y."""
    kernel, finite = np.ones(span), np.isfinite(y)
    count = np.convolve(finite, kernel, "valid")
    total = np.convolve(np.where(finite, y, 0.0), kernel, "valid")
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5)
    return np.convolve(x, kernel, "valid") / span, mean
