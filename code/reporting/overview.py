"""Draw docs/figures/overview.svg, the overview of DTML: in the folder code/, `python -m reporting.overview`.

The scans in it are synthetic: ellipses for an atrium, veins, aorta and spine, with blur and noise. The maps are
computed from them: the signed distance map and its soft mask by the functions that the training uses.
"""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from scipy import ndimage

from utils.sdm import SDM_STEEPNESS, signed_distance

OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "figures" / "overview.svg"
SIZE = (11.0, 4.95)  # inches, and the coordinates of everything below
DPI = 150  # of the embedded pictures; all else is vectors
SIDE = 112  # pixels of a synthetic slice
THUMB = 1.2  # inches: side of a picture
INK = "#333333"
SEG, SDM, CON, LABEL = "#0072B2", "#D55E00", "#00815E", "#E69F00"  # after Okabe & Ito, the green a shade darker
SUP = "#8A5A00"  # losses against the label: its colour, dark enough for writing
VEINS = (
    (0.22, 0.43, 0.34, 22),
    (0.24, 0.6, 0.28, -32),
    (0.77, 0.4, 0.34, -32),
    (0.76, 0.63, 0.34, 38),
)  # x, y, length, angle
TOP, MIDDLE, BOTTOM = 3.65, 2.45, 1.25  # inches: heights of the rows
SCANS, BUS, NETS, MAPS, MASKS, LABELS = 0.85, 2.02, 3.08, 5.0, 7.3, 9.72  # inches: centres of the columns


def ellipse(x: float, y: float, width: float, height: float, degrees: float = 0.0) -> np.ndarray:
    """Boolean picture (SIDE, SIDE) of a filled ellipse; coordinates and diameters in the unit square."""
    rows, columns = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    angle = np.deg2rad(degrees)
    u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
    v = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
    return (2 * u / width) ** 2 + (2 * v / height) ** 2 <= 1


def synthetic_slice(seed: int, turn: float) -> tuple[np.ndarray, np.ndarray]:
    """An axial slice like those of the scans, and the mask of its atrium: (SIDE, SIDE) float and boolean."""
    rng = np.random.default_rng(seed)
    atrium = ellipse(0.5, 0.5, 0.54, 0.35, turn)
    for x, y, length, degrees in VEINS:
        bend, stretch = rng.uniform(-20, 20), rng.uniform(0.8, 1.3)
        atrium |= ellipse(x, y + rng.uniform(-0.03, 0.03), length * stretch, 0.09, degrees + bend + turn / 2)
    atrium = ndimage.gaussian_filter(atrium.astype(float), 2.5) > 0.5
    dx, dy = rng.uniform(-0.06, 0.06, 2)
    aorta, spine = ellipse(0.67 + dx, 0.85 + dy / 2, 0.2, 0.2), ellipse(0.42 + dx, 0.98 + dy / 2, 0.36, 0.3)
    scan = 0.1 + 0.26 * ellipse(0.52, 0.2, 0.86, 0.52, turn)  # lung, and the muscle of the heart
    for region, gray, wall in (
        (ellipse(0.36 + dy, 0.1, 0.36, 0.3, turn), 0.62, 0.4),  # right heart
        (ellipse(0.7 + dy, 0.14, 0.3 + dx, 0.3 + dx), 0.68, 0.4),  # outflow tract
        (atrium, 0.72, 0.5),
        (aorta, 0.66, 0.85),
        (spine, 0.16, 0.7),
    ):
        scan[ndimage.binary_dilation(region, iterations=2)] = wall
        scan[region] = gray
    noise = ndimage.gaussian_filter(rng.normal(size=scan.shape), 1.0)
    return ndimage.gaussian_filter(scan, 0.8) + 0.13 * noise, atrium


def picture(ax: Axes, image: np.ndarray, x: float, y: float, frame: str, **style) -> None:
    """A square picture with a frame, centred at (x, y)."""
    half = THUMB / 2
    ax.imshow(image, extent=(x - half, x + half, y - half, y + half), interpolation="bilinear", zorder=2, **style)
    ax.add_patch(Rectangle((x - half, y - half), THUMB, THUMB, fill=False, edgecolor=frame, linewidth=1.4, zorder=3))


def stack(ax: Axes, image: np.ndarray, x: float, y: float) -> None:
    """A scan on top of others."""
    for offset in (0.16, 0.08):
        corner = (x - THUMB / 2 + offset, y - THUMB / 2 + offset)
        ax.add_patch(Rectangle(corner, THUMB, THUMB, facecolor="#555555", edgecolor="white", linewidth=1.0, zorder=1))
    picture(ax, image, x, y, "white", cmap="gray", vmin=0, vmax=1)


def outline(ax: Axes, mask: np.ndarray, x: float, y: float, color: str, **style) -> None:
    """Contour of a mask over a picture centred at (x, y)."""
    steps = (np.arange(SIDE) + 0.5) / SIDE * THUMB - THUMB / 2
    smooth = ndimage.gaussian_filter(mask.astype(float), 1.0)
    ax.contour(x + steps, y - steps, smooth, [0.5], colors=[color], zorder=4, **style)


def network(ax: Axes, x: float, y: float, color: str) -> None:
    """A V-Net as its levels, from full to coarse resolution and back."""
    levels = (1.0, 0.76, 0.52, 0.28, 0.52, 0.76, 1.0)
    step = 0.17
    lefts = [x + (index - 3) * step for index in range(len(levels))]
    for left, height in zip(lefts, levels, strict=True):
        box = FancyBboxPatch((left - 0.05, y - height / 2), 0.1, height, boxstyle="round,pad=0,rounding_size=0.03")
        box.set(facecolor=color, edgecolor="none", zorder=2)
        ax.add_patch(box)


def arrow(
    ax: Axes, start: tuple, end: tuple, color: str = INK, both: bool = False, bend: str = "arc3", **style
) -> None:
    """An arrow between two points."""
    style = {"linewidth": 1.6, "zorder": 5} | style
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="<|-|>" if both else "-|>",
            mutation_scale=13,
            color=color,
            connectionstyle=bend,
            shrinkA=0,
            shrinkB=0,
            **style,
        )
    )


def write(ax: Axes, x: float, y: float, text: str, color: str = INK, size: float = 11.5, **style) -> None:
    """Centred text."""
    ax.text(x, y, text, **{"color": color, "fontsize": size, "ha": "center", "va": "center", "zorder": 6} | style)


def draw_inputs(ax: Axes, mask: np.ndarray, scan: np.ndarray, other: np.ndarray) -> None:
    """Scans on the left; every one goes into both networks."""
    stack(ax, scan, SCANS, TOP)
    outline(ax, mask, SCANS, TOP, LABEL, linewidths=1.6)
    stack(ax, other, SCANS, BOTTOM)
    write(ax, SCANS, TOP + 0.95, "labeled scans")
    write(ax, SCANS, BOTTOM - 0.82, "unlabeled scans")
    for y in (TOP, BOTTOM):
        ax.plot([SCANS + 0.82, BUS], [y, y], color=INK, linewidth=1.6)
        arrow(ax, (BUS, y), (NETS - 0.66, y))
    ax.plot([BUS, BUS], [BOTTOM, TOP], color=INK, linewidth=1.6)


def draw_networks(ax: Axes) -> None:
    """M_s above, M_d below: the same V-Net with parameters of its own."""
    for y, name, head, color in ((TOP, "$M_s$", "sigmoid", SEG), (BOTTOM, "$M_d$", "tanh", SDM)):
        network(ax, NETS, y, color)
        write(ax, NETS, y + 0.74, name, color, 15)
        write(ax, NETS, y - 0.72, f"V-Net, {head} head", color)


def draw_outputs(ax: Axes, mask: np.ndarray) -> None:
    """Probability map of M_s; signed distance map of M_d and the mask that the transform makes of it."""
    prob = ndimage.gaussian_filter(mask.astype(float), 2.5)
    sdm = signed_distance(mask[:, :, None])[:, :, 0]
    soft = 1 / (1 + np.exp(np.clip(SDM_STEEPNESS * sdm, -50, 50)))
    picture(ax, prob, MASKS, TOP, SEG, cmap="gray", vmin=0, vmax=1)
    picture(ax, sdm, MAPS, BOTTOM, SDM, cmap="RdBu", vmin=-1, vmax=1)
    outline(ax, mask, MAPS, BOTTOM, INK, linewidths=0.8)
    picture(ax, soft, MASKS, BOTTOM, SDM, cmap="gray", vmin=0, vmax=1)
    arrow(ax, (NETS + 0.66, TOP), (MASKS - 0.66, TOP), SEG)
    arrow(ax, (NETS + 0.66, BOTTOM), (MAPS - 0.66, BOTTOM), SDM)
    arrow(ax, (MAPS + 0.66, BOTTOM), (MASKS - 0.66, BOTTOM), SDM)
    write(ax, (MAPS + MASKS) / 2, BOTTOM + 0.22, r"$\sigma(-k\,z)$", SDM, 13)
    write(ax, (MAPS + MASKS) / 2, BOTTOM - 0.3, "sigmoid\ntransform", SDM)
    write(ax, MASKS, TOP + 0.78, "probability map")
    write(ax, MAPS, BOTTOM - 0.82, "signed distance map $z$")
    write(ax, MASKS, BOTTOM - 0.82, "soft mask")


def draw_losses(ax: Axes, mask: np.ndarray) -> None:
    """L_con between the two masks on all scans; L_seg and L_mask where there is a label."""
    arrow(ax, (MASKS, BOTTOM + 0.64), (MASKS, TOP - 0.64), CON, both=True, linewidth=2.6)
    write(ax, MASKS - 0.14, MIDDLE + 0.13, r"$\mathcal{L}_\mathrm{con}$", CON, 16, ha="right")
    write(ax, MASKS - 0.14, MIDDLE - 0.2, "all scans", CON, ha="right")
    picture(ax, mask, LABELS, MIDDLE, LABEL, cmap="gray", vmin=0, vmax=1)
    write(ax, LABELS + 0.7, MIDDLE, "label", ha="left")
    between = (MASKS + THUMB / 2 + LABELS) / 2
    for y, side, name in ((TOP, 1, "seg"), (BOTTOM, -1, "mask")):
        bend = "angle,angleA=90,angleB=0,rad=8"
        arrow(ax, (LABELS, MIDDLE + side * 0.64), (MASKS + 0.64, y), SUP, True, bend, linestyle=(0, (4, 2)))
        write(ax, between, y + side * 0.26, rf"$\mathcal{{L}}_\mathrm{{{name}}}$", SUP, 16)
        write(ax, between, y - side * 0.22, "labeled scans only", SUP)


def draw() -> Figure:
    """The whole figure."""
    figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    scan, mask = synthetic_slice(8, 10)
    other, _ = synthetic_slice(13, -16)
    draw_inputs(ax, mask, scan, other)
    draw_networks(ax)
    draw_outputs(ax, mask)
    draw_losses(ax, mask)
    ax.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]), aspect="equal")
    ax.set_axis_off()
    return figure


def main() -> None:
    """Write the figure; the same bytes each time."""
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "overview", "image.composite_image": False}):
        draw().savefig(OUTPUT, metadata={"Date": None, "Title": "Overview of dual-task mutual learning (DTML)"})


if __name__ == "__main__":
    main()
