"""Preprocessing against numbers worked by hand, and the way back against the geometry of the scan."""

import json

import nibabel as nib
import numpy as np
import pytest

from scans.files import Scan
from scans.preprocess import RECORD, Preprocessing, read_record
from utils.errors import InputError

ROTATED = np.array([[0.0, -1.0, 0.0], [0.6, 0.0, -0.8], [0.8, 0.0, 0.6]])


def scan_of(array: np.ndarray, spacing=(1.0, 1.0, 1.0), axes=ROTATED) -> Scan:
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = 5, -6, 7
    return Scan(array, affine)


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 900, (8, 6, 10)).astype(np.int16)


def test_default_is_the_rule_of_the_published_files(array):
    image, place = Preprocessing().apply(scan_of(array))
    assert image.dtype == np.float32 and image.flags.c_contiguous
    np.testing.assert_allclose(image, (array - array.mean()) / array.std(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(place.affine, scan_of(array).affine, atol=1e-12)
    assert Preprocessing.from_record(None) == Preprocessing()


def test_percentiles_become_0_and_1(array):
    image, _ = Preprocessing(normalise="percentile", percentiles=(10, 90)).apply(scan_of(array))
    low, high = np.percentile(array, [10, 90])
    np.testing.assert_allclose(image, np.clip((array - low) / (high - low), 0, 1), atol=1e-6)
    assert (image.min(), image.max()) == (0, 1)


def test_none_keeps_the_values(array):
    np.testing.assert_array_equal(Preprocessing(normalise="none").apply(scan_of(array))[0], array)


def test_resampling_keeps_extent_and_place():
    # Brightness is linear in the position, so every voxel of the processed grid is known from its own position.
    scan = scan_of(np.zeros((9, 12, 16)), (2.0, 1.0, 0.5))
    at = nib.affines.apply_affine(scan.affine, np.argwhere(np.ones(scan.array.shape, bool)))
    slope = np.array([0.3, -0.2, 0.1])
    scan = Scan((at @ slope).reshape(scan.array.shape), scan.affine)
    image, place = Preprocessing((1.0, 1.0, 1.0), "none", orientation="RAS").apply(scan)
    assert image.shape == (12, 8, 18)  # axes 1, 2, 0 run to R, A, S: sizes and spacings travel with them
    assert nib.aff2axcodes(place.affine) == ("R", "A", "S")
    expected = (nib.affines.apply_affine(place.affine, np.argwhere(np.ones(image.shape, bool))) @ slope).reshape(
        image.shape
    )
    inner = (slice(1, -1),) * 3  # the outermost half voxel has no neighbour to interpolate with
    np.testing.assert_allclose(image[inner], expected[inner], atol=1e-5)


@pytest.mark.parametrize("orientation", [None, "RAS", "SPL"])
@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0), (3.0, 0.5, 1.1)])
def test_the_way_back_ends_on_the_grid_of_the_scan(orientation, spacing):
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (30, 22, 17)), indexing="ij"))
    ball = ((grid - np.array([0.2, -0.1, 0.1])[:, None, None, None]) ** 2).sum(axis=0) < 0.4
    scan = scan_of(ball.astype(np.float32), (1.0, 1.2, 1.5))
    place = Preprocessing(spacing, "none", orientation=orientation).apply(scan)[1]
    label = place.place_label(ball)
    assert label.dtype == np.uint8 and label.shape == place.shape and set(np.unique(label)) == {0, 1}
    mask = place.restore(label) > 0.5
    assert mask.shape == ball.shape
    dice = 2 * (mask & ball).sum() / (mask.sum() + ball.sum())
    assert dice == 1 if spacing is None else dice > (0.9 if spacing == (1.0, 1.0, 1.0) else 0.8)
    voxels = [np.argwhere(m).mean(axis=0) for m in (mask, ball)]
    assert np.abs(voxels[0] - voxels[1]).max() < 0.25  # not shifted


def test_maps_come_back_unchanged_without_resampling(array):
    scan = scan_of(array)
    image, place = Preprocessing(orientation="RAS").apply(scan)
    np.testing.assert_array_equal(place.restore(image), Preprocessing().apply(scan)[0])
    with pytest.raises(ValueError, match="shape"):
        place.restore(image[1:])


def test_label_takes_more_than_half_of_a_voxel():
    label = np.zeros((4, 2, 2), bool)
    label[0], label[1, 0, 0], label[2, 0] = True, True, True
    place = Preprocessing((2.0, 2.0, 2.0), "none").apply(scan_of(label.astype(np.float32), axes=np.eye(3)))[1]
    # first voxel: 5 of 8 parts, second: 2 of 8
    np.testing.assert_array_equal(place.place_label(label), [[[1]], [[0]]])


def test_numbers_of_classes_are_never_interpolated():
    label = np.zeros((8, 2, 2), np.uint8)
    label[0], label[1, 0], label[1, 1, 0] = 1, 3, 2  # parts of 8: class 1 has 4, class 3 two, class 2 one
    label[2:4, 0], label[3, 1, 0], label[2, 1, 0] = 3, 1, 2  # classes 3, 1, 2 and background have 4, 1, 1, 2
    label[4, 0], label[5, 1] = 1, 2  # two classes with two parts each do not outweigh four parts of background
    label[6] = 3  # nor does one class with as many
    scan = scan_of(label.astype(np.float32), axes=np.eye(3))
    place = Preprocessing((2.0, 2.0, 2.0), "none").apply(scan)[1]
    np.testing.assert_array_equal(place.place_label(label).ravel(), [1, 3, 0, 0])
    same = Preprocessing(None, "none", orientation="RAS").apply(scan)[1].place_label(label)
    np.testing.assert_array_equal(np.bincount(same.ravel()), np.bincount(label.ravel()))


@pytest.mark.parametrize("normalise", ["zscore", "percentile"])
def test_scans_that_cannot_be_normalised(normalise, array):
    for value in (1, 0.1, 1e30):
        with pytest.raises(InputError, match="constant"):
            Preprocessing(normalise=normalise).apply(scan_of(np.full((13, 11, 7), value)))
    broken = array.astype(np.float32)
    broken[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="--fill_nan"):
        Preprocessing(normalise=normalise).apply(scan_of(broken))


@pytest.mark.parametrize("normalise", ["zscore", "percentile", "none"])
def test_values_beyond_float32(normalise, array):
    with pytest.raises(InputError, match="float32"):
        Preprocessing(normalise=normalise).apply(scan_of(array * 1e200))


def test_a_value_fills_nan(array):
    broken = array.astype(np.float32)
    broken[0] = np.nan
    broken[0, 0, :2] = np.inf, -np.inf
    filled = np.concatenate([np.full_like(broken[:1], 5), broken[1:]])
    image, _ = Preprocessing(fill_nan=5).apply(scan_of(broken))
    np.testing.assert_allclose(image, Preprocessing().apply(scan_of(filled))[0])


def test_record_makes_the_round_trip(tmp_path):
    chosen = Preprocessing((0.625, 0.7, 1.0), "percentile", (1.0, 99.0), "RAS")
    (tmp_path / RECORD).write_text(json.dumps(chosen.as_record()))
    assert Preprocessing.from_record(read_record(tmp_path)) == chosen
    assert read_record(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    "text, word",
    [
        ("{", "cannot be read"),
        ('{"spacing_mm": [1, 1]}', "three positive"),
        ('{"spacing_mm": [1, -1, 1]}', "three positive"),
        ('{"spacing_mm": [1, "a", 1]}', "invalid"),
        ('{"normalise": "minmax"}', "zscore, percentile, none"),
        ('{"percentiles": [99, 1]}', "0..100"),
        ('{"orientation": "RRS"}', "one letter each"),
        ('{"orientation": "RA"}', "one letter each"),
        ('{"voxels": 3}', "unknown entry voxels"),
    ],
)
def test_records_that_cannot_be_used(tmp_path, text, word):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(InputError, match=word) as caught:
        read_record(tmp_path)
    assert str(tmp_path / RECORD) in str(caught.value)
