"""Figures for people: one picture per test case, a panel for TensorBoard, training curves.

Scans are drawn the way radiologists read them. Array axes x, y, z run to the patient's left, posterior and
superior (ITK's LPS; liver, spine and aorta show that the LA files follow it). So the patient's right is on the
left, anterior or head is up, and the sagittal view looks from the left. Only the object-oriented Agg interface
of matplotlib is used: no global state, so that worker processes and threads can draw at the same time.
"""

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

from utils.runs import atomic

LABEL_COLOR = "#E69F00"  # this and the next: Okabe & Ito's palette, told apart with every common colour vision
PREDICTION_COLORS = ("#56B4E9", "#CC79A7", "#009E73", "#F0E442")
CURVE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
WINDOW_PERCENTILES = (1.0, 99.5)  # of the gray values: noise floor to black, bright wall just short of white
DPI = 150
WIDTH, MAX_HEIGHT = 8.5, 10.0  # inches, of a case figure
GRAYS = 64  # gray levels drawn: noise hides the steps, and the file is half as large as with 256
PALETTE = 256  # colours of a case figure's PNG: the grays, the contours and their soft edges
MARGIN, GAP, TITLE_LINE = 0.1, 0.06, 0.22  # inches
SCALE_BAR_MM = 20
TILE, PANEL_DPI = 2.2, 100  # inches: side of a tile of the training panel, 220 pixels for any patch size
SMOOTHED_FROM = 200  # points of a curve from which a running mean over 1/40 of them is drawn in front
CASING = withStroke(linewidth=2.5, foreground="black")  # dark rim that keeps writing legible on bright tissue


class Plane(NamedTuple):
    """One of the three views: array axes across and down the picture, and what its edges are called."""

    name: str
    normal: int
    across: int
    down: int
    flipped: bool  # the down axis runs against the array: z counts towards the head
    edges: str  # left, right, top, bottom


AXIAL = Plane("axial", 2, 0, 1, False, "RLAP")
CORONAL = Plane("coronal", 1, 0, 2, True, "RLSI")
SAGITTAL = Plane("sagittal", 0, 1, 2, True, "APSI")


def case_figure(
    image: np.ndarray,
    label: np.ndarray | None,
    predictions: Mapping[str, np.ndarray],
    path: Path | str,
    title: str,
    spacing_mm: Sequence[float],
    anatomical: bool = True,
) -> None:
    """One PNG of a test case: three planes at one scale in mm, contours of the label and of every prediction.

    Each plane shows the slice with the largest area of the label; without a label (or with an empty one) that
    of all predictions together; without any foreground the middle one.

    Args:
        image: (W, H, D), finite.
        label: (W, H, D), foreground above 0.5; None for a scan that no one labeled.
        predictions: name as in the legend -> (W, H, D), foreground above 0.5.
        title: case id and scores; may have several lines.
        anatomical: False for arrays whose axes are not known to be LPS: no R, L, A, P, S, I at the edges.
    """
    masks = {} if label is None else {"label": np.asarray(label) > 0.5}
    masks |= {name: np.asarray(mask) > 0.5 for name, mask in predictions.items()}
    for name, mask in masks.items():
        if mask.shape != image.shape:
            raise ValueError(f"{name} has shape {mask.shape}, the image {image.shape}")
    colors = _colors(masks, label is not None)
    centre = _informative_voxel(masks, label is not None, image.shape)
    figure, axes, corner = _three_planes(np.multiply(image.shape, spacing_mm), title)
    window = _window(image)
    for plane, ax in zip((AXIAL, SAGITTAL, CORONAL), axes, strict=True):
        _draw_plane(ax, plane, image, masks, colors, centre, spacing_mm, window)
        _write_edges(ax, plane, centre, image.shape, anatomical)
    _draw_scale_bar(axes[0])
    _draw_legend(corner, masks, colors)
    picture = Image.fromarray(_pixels(figure)).quantize(PALETTE, dither=Image.Dither.NONE)
    with atomic(Path(path)) as temporary:
        picture.save(temporary, format="PNG", optimize=True, dpi=(DPI, DPI))


def training_panel(
    image: np.ndarray, label: np.ndarray | None, probs: Mapping[str, np.ndarray], sdm: np.ndarray | None = None
) -> np.ndarray:
    """A row of tiles for TensorBoard: the middle axial slice of scan, label, each probability and the SDM.

    Args:
        image: (W, H, D); label: (W, H, D), in [0, 1], or None; probs: name -> (W, H, D), in [0, 1];
        sdm: signed distance map, (W, H, D), negative inside, without a unit.
    Returns: (height, width, 3), uint8; the same height for every patch of one in-plane shape.
    """
    middle = image.shape[2] // 2
    across, down = image.shape[:2]
    contour = None if label is None else label[:, :, middle].T > 0.5
    tiles = 1 + (label is not None) + len(probs) + (sdm is not None)
    figure, axes = _tiles(tiles, min(1.5, max(0.5, down / across)))
    low, high = _window(image)
    scan = {"cmap": "gray", "vmin": low, "vmax": high}
    slices = [(f"scan, slice {middle + 1} of {image.shape[2]}", image, scan, None)]
    if label is not None:
        slices.append(("label", image, scan, contour))
    slices += [
        (f"probability, {name}", prob, {"cmap": "magma", "vmin": 0, "vmax": 1}, contour) for name, prob in probs.items()
    ]
    if sdm is not None:
        limit = float(np.abs(sdm[:, :, middle]).max()) or 1.0
        slices.append(("signed distance, inside < 0", sdm, {"cmap": "RdBu", "vmin": -limit, "vmax": limit}, contour))
    for ax, (name, volume, style, outline) in zip(axes, slices, strict=True):
        picture = ax.imshow(volume[:, :, middle].T, interpolation="nearest", aspect="auto", **style)
        ax.set_title(name, fontsize=9, pad=4)
        if outline is not None:
            _contour(ax, outline, LABEL_COLOR, (1.0, 1.0), 1.5)
        if style["cmap"] != "gray":
            _color_bar(figure, ax, picture)
    return _pixels(figure)


def curves_figure(
    series: Mapping[str, Sequence[tuple[float, float]]], path: Path | str, title: str, ylabel: str
) -> None:
    """Training curves: name -> (iteration, value). Values that are not finite leave a gap. PNG, SVG or PDF."""
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    ax = figure.add_subplot()
    for index, (name, points) in enumerate(series.items()):
        color = CURVE_COLORS[index % len(CURVE_COLORS)]
        style = ("-", "--", ":")[index // len(CURVE_COLORS) % 3]
        x, y = np.asarray(points, dtype=float).reshape(-1, 2).T
        smooth = len(x) >= SMOOTHED_FROM
        ax.plot(
            x,
            y,
            style,
            color=color,
            linewidth=0.6 if smooth else 1.6,
            alpha=0.35 if smooth else 1.0,
            label=None if smooth else name,
            marker="o" if len(x) == 1 else None,
        )
        if smooth:
            ax.plot(*_running_mean(x, y, len(x) // 40), style, color=color, linewidth=1.8, label=name)
    ax.set(title=title, xlabel="iteration", ylabel=ylabel)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.01)
    if series:
        ax.legend(frameon=False)
    path = Path(path)
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=DPI)


# --- parts of a case figure


def _colors(masks: Mapping[str, np.ndarray], labeled: bool) -> dict[str, str]:
    """Colour of each mask: the label always keeps its own."""
    names = list(masks)[labeled:]
    colors = {name: PREDICTION_COLORS[i % len(PREDICTION_COLORS)] for i, name in enumerate(names)}
    return {"label": LABEL_COLOR, **colors} if labeled else colors


def _informative_voxel(masks: Mapping[str, np.ndarray], labeled: bool, shape: Sequence[int]) -> list[int]:
    """Index of the slice to show along each array axis."""
    wanted = masks["label"] if labeled else np.zeros(shape, bool)
    if not wanted.any():
        wanted = np.any(list(masks.values()), axis=0) if masks else wanted
    if not wanted.any():
        return [side // 2 for side in shape]
    areas = [wanted.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    return [int(np.argmax(area)) for area in areas]


def _three_planes(size_mm: Sequence[float], title: str) -> tuple[Figure, list[Axes], Axes]:
    """Figure with axial (top left), sagittal (top right), coronal (below) and a corner for the legend.

    All planes have the same scale and share their edges, as in a viewer with four panes.
    """
    x, y, z = size_mm
    top, bottom = max(y, z), z  # mm: heights of the two rows
    head = MARGIN + TITLE_LINE * len(title.splitlines())
    scale = min((WIDTH - 2 * MARGIN - GAP) / (x + y), (MAX_HEIGHT - head - MARGIN - GAP) / (top + bottom))
    width, height = scale * (x + y) + 2 * MARGIN + GAP, scale * (top + bottom) + head + MARGIN + GAP
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.text(MARGIN / width, 1 - MARGIN / height / 2, title, va="top", fontsize=11, weight="bold", parse_math=False)

    def pane(left_mm: float, up_mm: float, width_mm: float, height_mm: float, column: int, row: int) -> Axes:
        left, up = MARGIN + column * GAP + scale * left_mm, MARGIN + row * GAP + scale * up_mm
        ax = figure.add_axes((left / width, up / height, scale * width_mm / width, scale * height_mm / height))
        ax.set_axis_off()
        return ax

    axial = pane(0, bottom + top - y, x, y, 0, 1)
    sagittal = pane(x, bottom + top - z, y, z, 1, 1)
    coronal = pane(0, 0, x, z, 0, 0)
    return figure, [axial, sagittal, coronal], pane(x, 0, y, bottom + top - z, 1, 0)


def _draw_plane(
    ax: Axes,
    plane: Plane,
    image: np.ndarray,
    masks: Mapping[str, np.ndarray],
    colors: Mapping[str, str],
    centre: Sequence[int],
    spacing_mm: Sequence[float],
    window: tuple[float, float],
) -> None:
    """Gray slice and contours; axes in mm from the upper left corner of the picture."""
    step = (spacing_mm[plane.across], spacing_mm[plane.down])
    gray = _slice(image, plane, centre)
    extent = (0, gray.shape[1] * step[0], gray.shape[0] * step[1], 0)
    ax.imshow(
        gray,
        cmap=colormaps["gray"].resampled(GRAYS),
        vmin=window[0],
        vmax=window[1],
        extent=extent,
        interpolation="bilinear",
        interpolation_stage="data",
    )
    for name, mask in masks.items():
        _contour(ax, _slice(mask, plane, centre), colors[name], step, 2.2 if name == "label" else 1.2)


def _slice(volume: np.ndarray, plane: Plane, centre: Sequence[int]) -> np.ndarray:
    """The slice as it is drawn, (rows, columns)."""
    picture = np.take(volume, centre[plane.normal], axis=plane.normal).T
    return picture[::-1] if plane.flipped else picture


def _contour(ax: Axes, mask: np.ndarray, color: str, step: Sequence[float], width: float) -> None:
    """Outline of a 2-D mask; closed also where the mask touches the border, nothing for an empty mask."""
    if not mask.any():
        return
    padded = np.pad(mask.astype(np.float32), 1)
    rows, columns = ((np.arange(-1, side + 1) + 0.5) * size for side, size in zip(mask.shape, step[::-1], strict=True))
    limits = ax.axis()
    outline = ax.contour(columns, rows, padded, levels=[0.5], colors=[color], linewidths=width)
    outline.set_path_effects([withStroke(linewidth=width + 0.8, foreground=(0, 0, 0, 0.6))])
    ax.axis(limits)


def _write_edges(ax: Axes, plane: Plane, centre: Sequence[int], shape: Sequence[int], anatomical: bool) -> None:
    """Name and slice number in the upper left corner; patient sides at the four edges."""
    axis = "xyz"[plane.normal]
    style = {"transform": ax.transAxes, "color": "white", "fontsize": 9, "path_effects": [CASING]}
    name = f"{plane.name}  " if anatomical else ""
    ax.text(0.015, 0.98, f"{name}{axis} {centre[plane.normal] + 1}/{shape[plane.normal]}", va="top", **style)
    if not anatomical:
        return
    left, right, top, bottom = plane.edges
    ax.text(0.015, 0.5, left, ha="left", va="center", **style)
    ax.text(0.985, 0.5, right, ha="right", va="center", **style)
    ax.text(0.5, 0.98, top, ha="center", va="top", **style)
    ax.text(0.5, 0.02, bottom, ha="center", va="bottom", **style)


def _draw_scale_bar(ax: Axes) -> None:
    """A bar of 20 mm in the lower right corner."""
    right, low = ax.get_xlim()[1], ax.get_ylim()[0]
    x, y = right * 0.97, low * 0.96
    ax.plot([x - SCALE_BAR_MM, x], [y, y], color="white", linewidth=2.5, path_effects=[withStroke(linewidth=4)])
    ax.text(
        x - SCALE_BAR_MM / 2,
        y - low * 0.015,
        f"{SCALE_BAR_MM} mm",
        color="white",
        ha="center",
        va="bottom",
        fontsize=8,
        path_effects=[CASING],
    )


def _draw_legend(ax: Axes, masks: Mapping[str, np.ndarray], colors: Mapping[str, str]) -> None:
    names = [name if mask.any() else f"{name} (empty)" for name, mask in masks.items()]
    lines = [Line2D([], [], color=colors[name], linewidth=2.5) for name in masks]
    if lines:
        ax.legend(lines, names, loc="upper left", frameon=False, fontsize=10, borderaxespad=0.6)


# --- parts of a training panel


def _tiles(count: int, height_per_width: float) -> tuple[Figure, list[Axes]]:
    """A row of `count` axes without ticks, room for a title above and a colour bar below each."""
    gap, head, foot = 0.12, 0.24, 0.34  # inches
    width, height = count * (TILE + gap) + gap, TILE * height_per_width + head + foot
    figure = Figure(figsize=(width, height), dpi=PANEL_DPI)
    axes = []
    for index in range(count):
        left = gap + index * (TILE + gap)
        ax = figure.add_axes((left / width, foot / height, TILE / width, TILE * height_per_width / height))
        ax.set_axis_off()
        axes.append(ax)
    return figure, axes


def _color_bar(figure: Figure, ax: Axes, picture) -> None:
    """A thin horizontal bar under a tile, as wide as the tile."""
    box = ax.get_position()
    inch = 1 / figure.get_figheight()
    cax = figure.add_axes((box.x0, box.y0 - 0.15 * inch, box.width, 0.09 * inch))
    low, high = picture.get_clim()
    ends = [low, (low + high) / 2, high]
    bar = figure.colorbar(picture, cax=cax, orientation="horizontal", ticks=ends)
    cax.set_xticks(ends, [f"{value:.2g}" for value in ends], fontsize=7)
    for tick, side in zip(cax.get_xticklabels(), ("left", "center", "right"), strict=True):
        tick.set_horizontalalignment(side)  # inside the bar's own width, clear of the next one's
    cax.tick_params(length=2, pad=1)
    bar.outline.set_linewidth(0.5)


def _pixels(figure: Figure) -> np.ndarray:
    """(height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# --- shared


def _window(image: np.ndarray) -> tuple[float, float]:
    """Gray values shown black and white; never equal, also for a constant image."""
    low, high = (float(value) for value in np.percentile(image, WINDOW_PERCENTILES))
    return low, high if high > low else low + 1.0


def _running_mean(x: np.ndarray, y: np.ndarray, span: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean over `span` neighbours of x and of the finite y."""
    kernel, finite = np.ones(span), np.isfinite(y)
    count = np.convolve(finite, kernel, "valid")
    total = np.convolve(np.where(finite, y, 0.0), kernel, "valid")
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return np.convolve(x, kernel, "valid") / span, mean
