import numpy as np
import pytest
from PIL import Image

from dataloaders import case_files
from paper import figure2
from paper.figure2 import (
    DISTANCE_COLORS,
    LAST_COLOR_MM,
    Case,
    case_surfaces,
    load_case,
    surface_triangles,
    visible_surface,
    write_figure,
)
from utils.errors import InputError
from utils.nifti import write_nifti

SPACING = (1.0, 2.0, 0.5)
MANY = 10**6


def ball(shape=(30, 30, 30), centre=(15, 15, 15), radius=9.0):
    grid = np.indices(shape).T - centre
    return ((grid**2).sum(axis=-1) < radius**2).T


def enclosed(triangles):
    """Volume inside a closed surface whose corners run counter-clockwise seen from outside (divergence theorem)."""
    return np.einsum("fi,fi->", triangles[:, 0], np.cross(triangles[:, 1], triangles[:, 2])) / 6


@pytest.mark.parametrize(
    "mask", [ball(), ball(centre=(2, 15, 27)), np.ones((9, 9, 9), bool)], ids=["", "border", "full"]
)
def test_a_mesh_is_closed_and_encloses_the_mask(mask):
    triangles, _ = surface_triangles(mask, SPACING, MANY)
    assert enclosed(triangles) == pytest.approx(mask.sum() * np.prod(SPACING), rel=0.1)
    edges = np.round(np.concatenate([triangles[:, [i, (i + 1) % 3]] for i in range(3)]), 4)
    forth = {edge.tobytes() for edge in edges}
    assert forth == {np.ascontiguousarray(edge[::-1]).tobytes() for edge in edges}  # no open edge


def test_normals_look_outwards_and_position_is_that_of_the_mask():
    mask = ball(centre=(12, 16, 14))
    triangles, normals = surface_triangles(mask, SPACING, MANY)
    outwards = triangles.mean(axis=1) - np.multiply((12, 16, 14), SPACING)
    assert ((normals * outwards).sum(axis=1) > 0).all()
    triangles, normals = surface_triangles(ball(), (1, 1, 1), MANY)
    radial = triangles.mean(axis=1) - 15
    cosine = (normals * radial).sum(axis=1) / np.linalg.norm(radial, axis=1)
    assert np.quantile(cosine, 0.05) > 0.97  # the steps of the voxels are smoothed
    triangles, normals = surface_triangles(mask, SPACING, MANY)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, rtol=1e-4)
    middle = (triangles.min(axis=(0, 1)) + triangles.max(axis=(0, 1))) / 2
    np.testing.assert_allclose(middle, np.multiply((12, 16, 14), SPACING), atol=0.05)


def test_seen_from_behind_left_is_left_and_the_head_is_up():
    mask = np.zeros((40, 40, 40), bool)
    mask[30:34, 18:22, 30:34] = True  # to the patient's left and towards the head
    mask[6:10, 18:22, 6:10] = True  # right and feet
    corners = visible_surface(mask, (1, 1, 1), MANY).corners
    left, right = corners[corners[:, 0, 0] < -20], corners[corners[:, 0, 0] > -20]
    assert left[..., 1].mean() > right[..., 1].mean() + 15


def test_only_faces_that_look_at_the_viewer_are_kept_and_the_nearest_is_drawn_last():
    mask = np.zeros((20, 40, 20), bool)
    mask[5:15, 5:10, 5:15] = mask[5:15, 30:35, 5:15] = True  # one box in front (towards the chest), one behind
    surface = visible_surface(mask, (1, 1, 1), MANY)
    assert len(surface.corners) < 0.6 * len(surface_triangles(mask, (1, 1, 1), MANY)[0])
    height = surface.corners[..., 1].mean(axis=1)  # from above, what is farther away appears higher
    assert height[: len(height) // 4].mean() > height[-len(height) // 4 :].mean()
    a, b, c = surface.corners.transpose(1, 0, 2)
    assert (np.cross(np.c_[b - a, np.zeros(len(a))], np.c_[c - a, np.zeros(len(a))])[:, 2] > 0).all()


def hue(surface):
    """Colours without shading: each face's brightest channel is 1."""
    return surface.colors / surface.colors.max(axis=1, keepdims=True)


def test_colour_is_the_distance_to_the_experts_surface():
    label = np.zeros((40, 40, 40), bool)
    label[10:30, 10:30, 10:30] = True
    inside = np.zeros_like(label)
    inside[16:24, 16:24, 16:24] = True  # 6 voxels within, at 0.5 mm
    case = Case("", np.zeros(label.shape), label, (0.5, 0.5, 0.5), {"same": label, "inside": inside})
    expert, same, smaller = case_surfaces(case, MANY)
    np.testing.assert_allclose(hue(expert), np.broadcast_to(1.0, hue(expert).shape), atol=1e-6)  # a gray: distance 0
    np.testing.assert_allclose(hue(same), hue(expert), atol=0.12)
    third = np.array(DISTANCE_COLORS(3.0 / LAST_COLOR_MM)[:3])
    np.testing.assert_allclose(np.median(hue(smaller), axis=0), third / third.max(), atol=0.1)


def test_each_face_has_the_colour_of_its_own_place():
    label = np.zeros((50, 20, 30), bool)
    label[6:14, 6:14, 18:26] = True
    both = label.copy()
    both[36:44, 6:14, 4:12] = True  # far off, to the patient's left
    _, surface = case_surfaces(Case("", np.zeros(label.shape), label, (0.5, 1.0, 2.0), {"both": both}), MANY)
    left = surface.corners[:, 0, 0] < -0.5 * 25
    far = np.array(DISTANCE_COLORS(1.0)[:3])
    np.testing.assert_allclose(hue(surface)[left], np.broadcast_to(far / far.max(), (left.sum(), 3)), atol=0.02)
    assert hue(surface)[~left].min() > 0.6


def test_a_prediction_that_fills_the_scan_is_far_from_the_label_everywhere():
    label = ball(radius=5)
    case = Case("", np.zeros(label.shape), label, (1, 1, 1), {"all": np.ones_like(label)})
    far, shown = np.array(DISTANCE_COLORS(1.0)[:3]), hue(case_surfaces(case, MANY)[1])
    np.testing.assert_allclose(shown, np.broadcast_to(far / far.max(), shown.shape), atol=0.02)


def test_empty_masks_have_no_surface():
    nothing = np.zeros((12, 12, 12), bool)
    case = Case("", np.zeros(nothing.shape), nothing, (1, 1, 1), {"some": ball((12, 12, 12), (6, 6, 6), 3)})
    expert, some = case_surfaces(case, MANY)
    assert expert is None
    np.testing.assert_allclose(hue(some), 1.0, atol=1e-6)  # no distance to nothing
    assert visible_surface(nothing, (1, 1, 1), MANY) is None


@pytest.fixture
def cases():
    image = np.random.default_rng(0).normal(size=(40, 30, 24))
    label, nothing = ball(image.shape, (20, 15, 12), 8), np.zeros(image.shape, bool)
    masks = {"V-Net 16/0": ball(image.shape, (18, 15, 12), 8), "DTML, L_dis 16/64": nothing}
    wide = Case("worst  b", np.zeros((60, 20, 24)), np.zeros((60, 20, 24), bool), (1, 1, 1), dict.fromkeys(masks))
    wide.masks.update({name: ball(wide.image.shape, (30, 10, 12), 6) for name in masks})
    return [Case("best  a", image, label, SPACING, masks, {"V-Net 16/0": "Dice 81.2 %, 95HD - vox"}), wide]


def test_figure_is_written_as_png_and_pdf_and_is_repeatable(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(figure2, "FACES", 1200)
    monkeypatch.setattr(figure2, "PRINT_DPI", 80)
    files = write_figure(cases, tmp_path / "figure2")
    assert [file.name for file in files] == ["figure2.png", "figure2.pdf"]
    first = [file.read_bytes() for file in files]
    assert first[0][1:4] == b"PNG" and first[1][:4] == b"%PDF"
    picture = np.asarray(Image.open(files[0]).convert("RGB")).astype(int)
    assert picture.shape[1] == pytest.approx(figure2.PRINT_DPI * (0.3 + 3 * 2.18), abs=3)
    orange = np.abs(picture - (0xE6, 0x9F, 0x00)).max(axis=2) < 30
    blue = np.abs(picture - (0x56, 0xB4, 0xE9)).max(axis=2) < 30
    assert orange.sum() > 100 and blue.sum() > 30
    again = [file.read_bytes() for file in write_figure(cases, tmp_path / "figure2")]
    assert again == first
    with pytest.raises(InputError, match="--out"):
        write_figure(cases, tmp_path / "missing" / "figure2")


@pytest.mark.slow
def test_a_figure_of_many_faces_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    rough = ball((90, 90, 90), (45, 45, 45), 40) & (rng.random((90, 90, 90)) < 0.8)  # far more faces than an atrium
    label = ball((90, 90, 90), (45, 45, 45), 40)
    case = Case("a", np.zeros(label.shape), label, (1, 1, 1), {f"system {i}": rough for i in range(2)})
    write_figure([case], tmp_path / "figure2")
    assert (tmp_path / "figure2.pdf").stat().st_size < 5e6


def test_load_case(phantom, tmp_path):
    (case,) = (phantom / "test.list").read_text().split()[:1]
    label = case_files.read_label(phantom, case)
    write_nifti(tmp_path / "a.nii.gz", label > 0, (1, 1, 1))
    loaded = load_case(phantom, case, {"V-Net": tmp_path / "a.nii.gz"}, "best", {"V-Net": "Dice"})
    np.testing.assert_array_equal(loaded.masks["V-Net"], label > 0)
    np.testing.assert_array_equal(loaded.label, label > 0)
    assert loaded.spacing_mm == case_files.read_spacing(phantom, case) and loaded.title == "best"


@pytest.mark.parametrize("fault", ["missing", "damaged", "truncated", "other size"])
def test_a_prediction_that_cannot_be_used_is_named(phantom, tmp_path, fault):
    (case,) = (phantom / "test.list").read_text().split()[:1]
    path = tmp_path / "a.nii.gz"
    size = (4, 4, 4) if fault == "other size" else case_files.read_shape(phantom, case)
    if fault != "missing":
        write_nifti(path, np.random.default_rng(0).random(size), (1, 1, 1))
    if fault == "damaged":
        path.write_bytes(b"nothing")
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="a.nii.gz"):
        load_case(phantom, case, {"V-Net": path}, "", {})
