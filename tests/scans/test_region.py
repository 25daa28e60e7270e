"""Boxes: what a text names, and that a box and its image on another grid cover each other."""

import itertools

import numpy as np
import pytest

from scans.files import Scan
from scans.preprocess import Preprocessing
from scans.region import central, hull, parse_roi, size_of, whole
from utils.errors import InputError

SHAPE = (20, 14, 9)


def box(*bounds):
    return tuple(slice(a, b) for a, b in bounds)


def test_a_text_names_a_box():
    assert parse_roi("2:5, 0:14,3:4", SHAPE) == box((2, 5), (0, 14), (3, 4))
    assert parse_roi("4:,:3,:", SHAPE) == box((4, 20), (0, 3), (0, 9))
    assert whole(SHAPE) == parse_roi(":,:,:", SHAPE)


@pytest.mark.parametrize(
    "text", ["", "2:5,0:14", "a:b,0:14,0:9", "1:2,1:2,1:2,1:2", "-3:5,0:14,0:9", "2.5:5,:,:", "middle"]
)
def test_a_text_that_names_none(text):
    with pytest.raises(InputError, match="--roi"):
        parse_roi(text, SHAPE)


@pytest.mark.parametrize("text", ["2:21,:,:", "5:5,:,:", "7:3,:,:", ":,:,9:"])
def test_a_box_outside_the_scan(text):
    with pytest.raises(InputError, match="--roi"):
        parse_roi(text, SHAPE)


def test_the_central_box():
    assert central(SHAPE, (4, 14, 30)) == box((8, 12), (0, 14), (0, 9))
    assert size_of(central(SHAPE, (5, 5, 5))) == (5, 5, 5)


def test_the_hull():
    assert hull([box((2, 5), (0, 3), (1, 2)), box((3, 7), (1, 2), (0, 1))]) == box((2, 7), (0, 3), (0, 2))


def random_scan(seed):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * rng.uniform(0.5, 3, 3), rng.normal(0, 50, 3)
    return Scan(rng.normal(size=SHAPE), affine)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", [None, (1.3, 0.9, 2.0)])
def test_a_box_and_its_image_cover_the_same_place(seed, spacing):
    """Oracle: the outer corners of the touched voxels, in millimetres, point by point."""
    scan = random_scan(seed)
    _, place = Preprocessing(spacing_mm=spacing, orientation="RAS").apply(scan)
    named = box((3, 11), (2, 9), (4, 8))
    moved = place.box_in_image(named)
    covered = np.zeros(place.shape, dtype=bool)
    axes = [np.linspace(a.start - 0.499, a.stop - 0.501, 5 * (a.stop - a.start)) for a in named]
    points = np.array([*itertools.product(*axes)]) @ scan.affine[:3, :3].T + scan.affine[:3, 3]  # mm
    inverse = np.linalg.inv(place.affine)
    voxels = np.round(points @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
    covered[tuple(np.clip(voxels, 0, np.subtract(place.shape, 1)).T)] = True
    expected = tuple(slice(i.min(), i.max() + 1) for i in np.nonzero(covered))
    assert all(a.start <= b.start and b.stop <= a.stop for a, b in zip(moved, expected, strict=True))
    assert all(b.start - a.start <= 1 and a.stop - b.stop <= 1 for a, b in zip(moved, expected, strict=True))
    back = place.box_in_scan(moved)
    assert all(a.start <= b.start and b.stop <= a.stop for a, b in zip(back, named, strict=True))
    if spacing is None:
        assert back == named and covered.sum() == np.prod(size_of(moved))


def test_all_of_the_scan_is_all_of_its_image():
    scan = random_scan(9)
    _, place = Preprocessing(spacing_mm=(1.1, 1.7, 0.8), orientation="LPS").apply(scan)
    assert place.box_in_image(whole(SHAPE)) == whole(place.shape)
    assert place.box_in_scan(whole(place.shape)) == whole(SHAPE)
