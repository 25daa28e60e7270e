"""What the figures show, read from the drawn artists: orientation, scale, contours, slices, colours."""

from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage

from evaluation import figures
from evaluation.colors import look, pale
from evaluation.figures import AXIAL, CORONAL, SAGITTAL, case_figure, curves_figure, training_panel

pytestmark = [pytest.mark.filterwarnings("error::UserWarning"), pytest.mark.filterwarnings("error::RuntimeWarning")]

SPACING = (0.5, 0.75, 2.0)
FINE = figures.DPI


@pytest.fixture(autouse=True)
def coarse(monkeypatch) -> None:
    """Few pixels: drawing and compressing them is what takes the time."""
    monkeypatch.setattr(figures, "DPI", 40)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Every figure that was turned into pixels, for a look at its artists."""
    kept, pixels = [], figures._pixels
    monkeypatch.setattr(figures, "_pixels", lambda figure: kept.append(figure) or pixels(figure))
    return kept


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(24, 20, 16)).astype(np.float32)


def box(shape, *ranges) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*bounds) for bounds in ranges)] = True
    return mask


def contours(ax) -> list[tuple[str, np.ndarray]]:
    """(colour, vertices) of each contour set of an axes, in the order drawn."""
    sets = [artist for artist in ax.collections if len(artist.get_paths())]
    return [(to_hex(lines.get_edgecolor()[0]).upper(), lines.get_paths()[0].vertices) for lines in sets]


def writing(ax) -> dict[str, tuple[float, float]]:
    return {text.get_text(): text.get_position() for text in ax.texts}


# --- the case figure


def test_views_are_anatomical():
    """Voxel (1, 2, 3) of (5, 6, 7), axes to the left, posterior and head: where a radiologist looks for it."""
    volume = box((5, 6, 7), (1, 2), (2, 3), (3, 4))
    for plane, shape, place in (
        (AXIAL, (6, 5), (2, 1)),  # row y from anterior, column x from the patient's right
        (CORONAL, (7, 5), (7 - 1 - 3, 1)),  # row z from the head
        (SAGITTAL, (7, 6), (7 - 1 - 3, 2)),  # column y from anterior
    ):
        view = plane.slice(volume, (1, 2, 3)[plane.normal])
        assert view.shape == shape
        assert np.argwhere(view).tolist() == [list(place)]


def test_letters_stand_on_the_right_sides(tmp_path, image, drawn):
    case_figure(image, None, {}, tmp_path / "a.png", "case", SPACING)
    for ax, left, right, top, bottom in zip(drawn[0].axes, "RAR", "LPL", "ASS", "PII", strict=True):
        places = writing(ax)
        assert places[left][0] < 0.1 and places[right][0] > 0.9 and places[top][1] > 0.9 and places[bottom][1] < 0.1


def test_unknown_axes_get_no_letters(tmp_path, image, drawn):
    case_figure(image, None, {}, tmp_path / "a.png", "case", SPACING, anatomical=False)
    assert [set(writing(ax)) - {"2 mm"} for ax in drawn[0].axes] == [{"z 9/16"}, {"x 13/24"}, {"y 11/20"}]


def test_one_scale_in_mm_for_all_planes(tmp_path, image, drawn):
    case_figure(image, None, {}, tmp_path / "a.png", "case", SPACING)
    extents = [(ax.get_xlim()[1], ax.get_ylim()[0]) for ax in drawn[0].axes]
    assert extents == [(12.0, 15.0), (15.0, 32.0), (12.0, 32.0)]  # axial, sagittal, coronal: (across, down) in mm
    corners = [ax.transData.transform([(0, 0), (10, 0), (0, 10)]) for ax in drawn[0].axes]
    pixels = [np.linalg.norm(corner[1:] - corner[0], axis=1) for corner in corners]
    np.testing.assert_allclose(pixels, pixels[0][0], rtol=0.02)


def test_contour_of_one_voxel_spans_that_voxel(tmp_path, image, drawn):
    case_figure(image, box(image.shape, (3, 4), (4, 5), (5, 6)), {}, tmp_path / "a.png", "case", SPACING)
    ((_, vertices),) = contours(drawn[0].axes[0])
    np.testing.assert_allclose(vertices.min(axis=0), (3 * 0.5, 4 * 0.75))
    np.testing.assert_allclose(vertices.max(axis=0), (4 * 0.5, 5 * 0.75))
    ((_, vertices),) = contours(drawn[0].axes[2])  # coronal: z = 5 of 16 lies 10 slices below the upper edge
    np.testing.assert_allclose(vertices.min(axis=0), (3 * 0.5, 10 * 2.0))


def test_mask_on_the_border_has_a_closed_contour_and_moves_no_limit(tmp_path, image, drawn):
    case_figure(image, np.ones(image.shape), {}, tmp_path / "a.png", "case", SPACING)
    ax = drawn[0].axes[0]
    ((_, vertices),) = contours(ax)
    np.testing.assert_allclose((vertices.min(axis=0), vertices.max(axis=0)), ((0, 0), (12, 15)))
    np.testing.assert_array_equal(vertices[0], vertices[-1])
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 12), (15, 0))


def test_slices_have_the_largest_area_of_the_label(tmp_path, image, drawn):
    label = box(image.shape, (2, 20), (3, 5), (4, 6))
    label[7, 3:15, 4] = True  # x: the row makes slice 7 largest; y: 3 and 4 tie, first; z: slice 4
    elsewhere = box(image.shape, (0, 24), (15, 20), (10, 16))
    case_figure(image, label, {"seg": elsewhere}, tmp_path / "a.png", "case", SPACING)
    names = [next(name for name in writing(ax) if "/" in name) for ax in drawn[0].axes]
    assert names == ["axial  z 5/16", "sagittal  x 8/24", "coronal  y 4/20"]


@pytest.mark.parametrize("label", [None, np.zeros((24, 20, 16))], ids=["unlabeled", "empty label"])
def test_without_a_label_the_predictions_choose_the_slices(tmp_path, image, drawn, label):
    predictions = {"seg": box(image.shape, (2, 3), (3, 4), (4, 5)), "sdm": np.zeros(image.shape)}
    case_figure(image, label, predictions, tmp_path / "a.png", "case", SPACING)
    assert "axial  z 5/16" in writing(drawn[0].axes[0])


def test_each_class_has_its_colour_and_its_name(tmp_path, image, drawn):
    label = box(image.shape, (2, 9), (3, 9), (4, 9)).astype(np.uint8)
    label[9:12, 3:9, 4:9] = 2
    prediction = np.where(label == 2, 0, label)
    case_figure(image, label, {"prediction": prediction}, tmp_path / "a.png", "case", SPACING, ["rim", "core"])
    rim, core = (look(index)["color"] for index in (0, 1))
    assert [color for color, _ in contours(drawn[0].axes[0])] == [pale(rim), pale(core), rim]
    legend = drawn[0].axes[1].get_legend()
    names = ["rim, label", "core, label", "rim, prediction", "core, prediction (empty)"]
    assert [text.get_text() for text in legend.get_texts()] == names
    assert [to_hex(line.get_color()).upper() for line in legend.get_lines()] == [pale(rim), pale(core), rim, core]


def test_label_and_predictions_keep_their_colours_and_empty_ones_are_named(tmp_path, image, drawn):
    mask = box(image.shape, (2, 9), (3, 9), (4, 9))
    predictions = {"seg": np.zeros(image.shape), "sdm": mask.astype(np.float32) * 0.6, "mean": mask}
    case_figure(image, mask, predictions, tmp_path / "a.png", "case", SPACING)
    assert [color for color, _ in contours(drawn[0].axes[0])] == ["#E69F00", "#CC79A7", "#009E73"]
    legend = drawn[0].axes[1].get_legend()
    colors = [to_hex(line.get_color()).upper() for line in legend.get_lines()]
    assert [text.get_text() for text in legend.get_texts()] == ["label", "seg (empty)", "sdm", "mean"]
    assert colors == ["#E69F00", "#56B4E9", "#CC79A7", "#009E73"]
    case_figure(image, None, predictions, tmp_path / "b.png", "case", SPACING)  # the same colours without a label
    assert [color for color, _ in contours(drawn[1].axes[0])] == ["#CC79A7", "#009E73"]


def test_title_and_names_stay_inside_the_picture(tmp_path, drawn):
    image = np.zeros((200, 150, 88), np.float32)
    name = "M_s, Dice 89.1 %, HD95 7.2 voxel, largest component kept"
    case_figure(
        image, image, {name: image}, tmp_path / "a.png", r"06SR5RBREL16DQ6M8LWS $\nomath$" + "\nDice 89 %", (0.625,) * 3
    )
    figure = drawn[0]
    texts = [
        *figure.texts,
        *figure.axes[1].get_legend().get_texts(),
        *(text for ax in figure.axes for text in ax.texts),
    ]
    width, height = figure.bbox.width, figure.bbox.height
    for text in texts:
        area = text.get_window_extent()
        assert 0 <= area.x0 and area.x1 <= width and 0 <= area.y0 and area.y1 <= height, text.get_text()
    assert texts[0].get_window_extent().y0 >= figure.axes[0].get_window_extent().y1


def test_file_of_a_full_size_case(tmp_path, monkeypatch):
    """The size of the largest LA scans: enough pixels to be legible, small enough to keep one per case."""
    monkeypatch.setattr(figures, "DPI", FINE)
    noise = np.random.default_rng(0).normal(size=(244, 160, 88)).astype(np.float32)
    image = ndimage.gaussian_filter(noise, 1.0)  # scans are as smooth: reconstructed at twice their resolution
    mask = box(image.shape, (40, 200), (30, 120), (10, 70))
    case_figure(image, mask, {"seg": np.roll(mask, 4, 0)}, tmp_path / "a.png", "case", (0.625,) * 3)
    assert (tmp_path / "a.png").stat().st_size < 400_000
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and 1000 < picture.width < 1300 and 600 < picture.height < 1000
        assert round(picture.info["dpi"][0]) == 150
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 2, 3), (3, 2, 40)])
def test_odd_shapes_and_constant_images(tmp_path, shape):
    case_figure(np.zeros(shape), np.ones(shape), {"seg": np.zeros(shape)}, tmp_path / "a.png", "case", (1, 1, 1))
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_wrong_shape_raises_and_writes_nothing(tmp_path, image):
    with pytest.raises(ValueError, match=r"\(24, 20, 16\).*\(20, 24, 16\)"):
        case_figure(image, None, {"seg": np.zeros((20, 24, 16))}, tmp_path / "a.png", "case", SPACING)
    assert not list(tmp_path.iterdir())


def test_window_leaves_out_the_tails():
    image = np.arange(1001.0).reshape(7, 11, 13)
    assert figures.gray_window(image) == pytest.approx((10.0, 995.0))
    assert figures.gray_window(np.full((2, 2, 2), 3.0)) == (3.0, 4.0)


def test_nothing_is_left_in_pyplot_and_threads_agree(tmp_path, image):
    def draw(name: int) -> bytes:
        case_figure(image, image > 1, {}, tmp_path / f"{name}.png", "case", SPACING)
        return (tmp_path / f"{name}.png").read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(draw, range(4)))) == 1
    assert plt.get_fignums() == []


# --- the training panel


def tiles(figure: Figure) -> dict[str, np.ndarray]:
    return {ax.get_title(): ax.images[0].get_array() for ax in figure.axes if ax.get_title()}


def test_panel_shows_the_middle_slice_of_scan_probability_and_map(image, drawn):
    label, seg, sdm = (np.random.default_rng(seed).random(image.shape) for seed in (1, 2, 3))
    panel = training_panel(image, label[None], {"seg": seg[None], "mean": label[None]}, sdm[None] - 0.5)
    assert panel.dtype == np.uint8 and panel.ndim == 3 and panel.shape[2] == 3
    for picture, volume in zip(tiles(drawn[0]).values(), (image, seg, sdm - 0.5), strict=True):
        np.testing.assert_array_equal(picture, volume[:, :, 8].T)


def test_panel_scales(image, drawn):
    sdm = np.zeros(image.shape)
    sdm[3, 4, 8], sdm[5, 6, 8], sdm[0, 0, 0] = -0.25, 0.125, 1.0  # the last one is not in the slice
    training_panel(image, None, {"seg": image[None]}, sdm[None])
    limits = [ax.images[0].get_clim() for ax in drawn[0].axes if ax.get_title()]
    assert limits[1:] == [(0, 1), (-0.25, 0.25)]


def test_panel_contour_lies_on_the_pixels_of_the_label(image, drawn):
    training_panel(image, box(image.shape, (3, 5), (6, 9), (8, 9))[None], {"seg": image[None]})
    for ax in [ax for ax in drawn[0].axes if ax.get_title()]:
        ((_, vertices),) = contours(ax)
        np.testing.assert_allclose((vertices.min(axis=0), vertices.max(axis=0)), ((2.5, 5.5), (4.5, 8.5)))


def test_panel_of_several_classes(image, drawn):
    """A contour of its own colour for each; the most probable class, and the distance to the closest."""
    label = np.stack([box(image.shape, (3, 5), (6, 9), (8, 9)), box(image.shape, (10, 15), (6, 9), (8, 9))])
    prob, sdm = np.random.default_rng(0).random((2, 2, *image.shape))
    training_panel(image, label, {"seg": prob}, sdm)
    shown = [ax for ax in drawn[0].axes if ax.get_title()]
    for ax in shown:
        colors, vertices = zip(*contours(ax), strict=True)
        assert len(set(colors)) == 2
        assert [corners[:, 0].min() for corners in vertices] == [2.5, 9.5]
    np.testing.assert_array_equal(shown[1].images[0].get_array(), prob.max(axis=0)[:, :, 8].T)
    np.testing.assert_array_equal(shown[2].images[0].get_array(), sdm.min(axis=0)[:, :, 8].T)


@pytest.mark.parametrize("label", [None, np.zeros((24, 20, 16))], ids=["unlabeled", "empty label"])
def test_panel_without_foreground_or_distance(image, drawn, label):
    label, empty = label if label is None else label[None], image[None] * 0
    panel = training_panel(image, label, {"seg": empty}, empty)
    shown = [ax for ax in drawn[0].axes if ax.get_title()]
    assert len(shown) == 3
    assert not any(contours(ax) for ax in shown)
    assert shown[-1].images[0].get_clim() == (-1, 1)
    assert training_panel(image, label, {}).shape[1] < panel.shape[1]


def test_panel_has_one_size_for_all_patches():
    small, large = (np.random.default_rng(0).random((side, side, 8)) for side in (32, 112))
    panels = [training_panel(patch, patch[None], {"seg": patch[None]}, patch[None]) for patch in (small, large)]
    assert panels[0].shape == panels[1].shape
    assert panels[0].shape[0] >= 220


# --- curves


def test_curves_of_any_length(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: kept.append(self) or path.write_bytes(b"x"))
    long = [(step, float(step % 2)) for step in range(0, 4000, 10)]
    series = {"one": [(5, 0.5)], "few": [(0, 1.0), (10, np.nan), (20, 0.5)], "none": [], "long": long}
    curves_figure(series, tmp_path / "a.png", "losses", "loss")
    ax = kept[0].axes[0]
    one, few, none, raw, mean = ax.lines
    assert one.get_marker() == "o" and len(none.get_xdata()) == 0
    np.testing.assert_array_equal(few.get_ydata(), [1.0, np.nan, 0.5])
    assert len(raw.get_xdata()) == 400 and len(mean.get_xdata()) == 391
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "few", "none", "long"]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("losses", "iteration", "loss")


def test_many_curves_are_means_alone_on_a_logarithmic_axis(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: kept.append(self) or path.write_bytes(b"x"))
    positive = [(step, 1.0 + step % 3) for step in range(60)]
    for count in (2, figures.MANY_CURVES + 1):
        curves_figure({str(index): positive for index in range(count)}, tmp_path / "a.png", "losses", "loss")
    few, many = (figure.axes[0] for figure in kept)
    assert (len(few.lines), len(many.lines)) == (4, figures.MANY_CURVES + 1)
    assert {len(line.get_xdata()) for line in many.lines} == {56}  # means over 5
    assert few.get_yscale() == many.get_yscale() == "log"
    curves_figure({"zero": [(0, 0.0), (1, 1.0)]}, tmp_path / "a.png", "losses", "loss")
    assert kept[-1].axes[0].get_yscale() == "linear"


def test_running_mean_by_hand():
    x, y = figures._running_mean(np.arange(4.0), np.array([1.0, np.nan, 3.0, 8.0]), 2)
    np.testing.assert_allclose(x, [0.5, 1.5, 2.5])
    np.testing.assert_allclose(y, [1.0, 3.0, 5.5])
    assert np.isnan(figures._running_mean(np.arange(2.0), np.full(2, np.nan), 2)[1]).all()


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_curves_file_follows_its_suffix(tmp_path, name, start):
    curves_figure({}, tmp_path / name, "no curve yet", "loss")
    assert (tmp_path / name).read_bytes().startswith(start)
