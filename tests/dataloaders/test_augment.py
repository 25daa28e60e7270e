import math
from argparse import Namespace
from collections import Counter
from itertools import product

import numpy as np
import pytest
from scipy import ndimage, stats

from dataloaders.augment import Intensity, Transform, apply_intensity, apply_transform, draw_transform, transposed
from dataloaders.store import read_region

SHAPE, PATCH = (9, 11, 7), (5, 3, 4)  # nothing square: a mixed-up axis changes a shape
SYMMETRIES = list(product(range(4), (None, 0, 1)))


def flags(**changes) -> Namespace:
    off = {"flip": "random", "crop_bound": "inclusive", "aug_zoom": 0.0, "aug_rotate": 0.0, "aug_intensity": 0.0}
    return Namespace(**{**off, **changes})


def numbered(shape) -> np.ndarray:
    """A volume in which every voxel is told apart by its value; the smallest is in no corner."""
    return np.roll(np.arange(math.prod(shape), dtype=np.float32).reshape(shape), 1, axis=(0, 1, 2))


def cropped(transform, volume):
    """The patch that a transform takes from a volume."""
    return apply_transform(transform, read_region(volume, transform.start, transform.size, fill=volume.min()))


def turn(volume, turns, flip_axis):
    """The public implementations' transform of a whole volume."""
    volume = np.rot90(volume, turns)
    return volume if flip_axis is None else np.flip(volume, flip_axis)


def draws(count, seed=0, shape=SHAPE, patch=PATCH, **changes):
    rng = np.random.default_rng(seed)
    return [draw_transform(rng, shape, patch, flags(**changes)) for _ in range(count)]


def starts_in_turned_volume(shape, transforms):
    """Where each crop lies in the whole volume turned first, which it must equal voxel for voxel."""
    volume, starts = numbered(shape), {}
    for transform in transforms:
        crop = cropped(transform, volume)
        turned = turn(volume, transform.quarter_turns, transform.flip_axis)
        start = tuple(int(i) for i in np.argwhere(turned == crop[0, 0, 0])[0])
        there = turned[tuple(slice(s, s + n) for s, n in zip(start, PATCH, strict=True))]
        np.testing.assert_array_equal(crop, there)
        starts.setdefault((transform.quarter_turns, transform.flip_axis), set()).add(start)
    return starts


@pytest.mark.parametrize(("bound", "missing"), [("inclusive", 0), ("exclusive", 1)])
def test_crop_then_turn_is_turn_then_crop_with_every_start(bound, missing):
    starts = starts_in_turned_volume(SHAPE, draws(2500, crop_bound=bound))
    assert set(starts) == set(SYMMETRIES)
    for (turns, _), found in starts.items():
        counts = [n - p + 1 - missing for n, p in zip(transposed(SHAPE, turns), PATCH, strict=True)]
        for axis, count in enumerate(counts):  # with `exclusive`, never the last one of the turned volume
            assert {start[axis] for start in found} == set(range(count))


def linear_map(transform) -> tuple[int, ...]:
    """The in-plane matrix (a, b, c, d) of a symmetry, found from where the voxels of a 3 x 3 square end up."""
    x, y = np.meshgrid(np.arange(-1, 2), np.arange(-1, 2), indexing="ij")
    square = Transform((0, 0, 0), (3, 3, 1), (3, 3, 1), transform.quarter_turns, transform.flip_axis)
    x, y = (cropped(square, axis[..., None]) for axis in (x, y))
    return int(x[2, 1, 0]), int(x[1, 2, 0]), int(y[2, 1, 0]), int(y[1, 2, 0])


@pytest.mark.parametrize("seed", [0, 1, 1337])
@pytest.mark.parametrize(("flip", "reached"), [("random", 8), ("always", 4)])
def test_symmetries_are_equally_likely(flip, reached, seed):
    found = Counter(map(linear_map, draws(2000, seed, flip=flip)))
    assert len(found) == reached
    assert stats.chisquare(list(found.values())).pvalue > 1e-3
    reflections = [a * d - b * c == -1 for a, b, c, d in found]
    assert sum(reflections) == 4  # of `always`, none is a rotation


@pytest.mark.parametrize("bound", ["inclusive", "exclusive"])
def test_last_slice_is_seen_only_with_the_inclusive_bound(bound):
    shape, patch = (112, 112, 88), (112, 112, 80)
    starts = Counter(t.start[2] for t in draws(3000, shape=shape, patch=patch, crop_bound=bound))
    last = 8 if bound == "inclusive" else 7
    assert set(starts) == set(range(last + 1))
    assert (max(starts) + 80 == 88) == (bound == "inclusive")
    assert stats.chisquare(list(starts.values())).pvalue > 1e-3


@pytest.mark.parametrize("bound", ["inclusive", "exclusive"])
def test_volume_that_the_patch_exceeds_by_nothing_or_one(bound):
    assert {t.start for t in draws(20, shape=(5, 5, 5), patch=(5, 5, 5), crop_bound=bound)} == {(0, 0, 0)}
    starts = {t.start[2] for t in draws(50, shape=(5, 5, 6), patch=(5, 5, 5), crop_bound=bound)}
    assert starts == ({0, 1} if bound == "inclusive" else {0})


@pytest.mark.parametrize("shape", [(4, 11, 7), (4, 2, 3), (1, 1, 1), (9, 3, 5)])
def test_small_volume_is_padded_with_its_minimum_and_centred(shape):
    volume, patch = numbered(shape) - 3, (6, 5, 8)
    seen = set()
    for transform in draws(200, shape=shape, patch=patch):
        turned = turn(volume, transform.quarter_turns, transform.flip_axis)
        missing = [max(p - n, 0) for p, n in zip(patch, turned.shape, strict=True)]
        padded = np.pad(turned, [(m // 2, m - m // 2) for m in missing], constant_values=volume.min())
        crop = cropped(transform, volume)
        windows = np.lib.stride_tricks.sliding_window_view(padded, patch).reshape(-1, *patch)
        assert any(np.array_equal(crop, window) for window in windows)
        seen.add((transform.quarter_turns, transform.flip_axis))
    assert seen == set(SYMMETRIES)


def test_without_zoom_and_rotation_nothing_is_interpolated():
    for transform in draws(50):
        assert (transform.zoom, transform.angle, transform.intensity) == (1.0, 0.0, None)
        assert transform.size == transposed(PATCH, transform.quarter_turns)
        values = cropped(transform, numbered(SHAPE))
        assert values.shape == PATCH and np.array_equal(values, np.round(values))


def sampled(volume, transform):
    """The oracle: SciPy's trilinear sampling of the whole volume about the centre of the region, in float64."""
    cos, sin = math.cos(transform.angle), math.sin(transform.angle)
    matrix = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) / transform.zoom
    patch = transposed(transform.patch, transform.quarter_turns)
    centre = np.add(transform.start, (np.array(transform.size) - 1) / 2)
    offset = centre - matrix @ ((np.array(patch) - 1) / 2)
    crop = ndimage.affine_transform(volume.astype(float), matrix, offset, patch, order=1, mode="nearest")
    return turn(crop, transform.quarter_turns, transform.flip_axis)


@pytest.mark.parametrize(("zoom", "angle"), [(0.3, 0), (0.0, 25), (0.25, 15), (0.0, 90)])
def test_zoom_and_rotation_agree_with_scipy(zoom, angle):
    volume = np.random.default_rng(3).normal(size=(40, 37, 30)).astype(np.float32)
    for transform in draws(40, 1, volume.shape, (12, 17, 10), aug_zoom=zoom, aug_rotate=angle):
        crop = cropped(transform, volume)
        assert crop.shape == (12, 17, 10) and crop.dtype == np.float32
        np.testing.assert_allclose(crop, sampled(volume, transform), atol=2e-4)


def test_zoom_above_one_enlarges_the_anatomy():
    ball = (np.square(np.indices((40, 40, 40)) - 19.5).sum(axis=0) < 8**2).astype(np.float32)
    sizes = {}
    for zoom in (0.8, 1.0, 1.25):
        size = (int(30 / zoom) + 1,) * 3
        start = tuple((40 - n) // 2 for n in size)
        crop = cropped(Transform(start, size, (30, 30, 30), 0, None, zoom, 0.0), ball)
        sizes[zoom] = crop.sum()
    assert sizes[1.25] / sizes[1.0] == pytest.approx(1.25**3, rel=0.03)
    assert sizes[0.8] / sizes[1.0] == pytest.approx(0.8**3, rel=0.03)


def test_image_and_label_stay_aligned():
    label = (np.random.default_rng(0).random((24, 22, 20)) > 0.5).astype(np.uint8)
    image = 3 * label.astype(np.float32) - 1
    for transform in draws(30, shape=label.shape, patch=(10, 12, 8), aug_zoom=0.2, aug_rotate=20):
        soft = cropped(transform, label)
        assert 0 <= soft.min() and soft.max() <= 1
        np.testing.assert_allclose(cropped(transform, image), 3 * soft - 1, atol=1e-5)


def test_every_channel_is_transformed_as_it_would_be_alone():
    volumes = np.random.default_rng(0).random((3, 24, 22, 20)).astype(np.float32)
    for changes in ({}, {"aug_zoom": 0.2, "aug_rotate": 20}):
        for transform in draws(10, shape=volumes.shape[1:], patch=(10, 12, 8), **changes):
            together = cropped(transform, volumes)
            assert together.shape == (3, 10, 12, 8)
            np.testing.assert_array_equal(together, [cropped(transform, volume) for volume in volumes])


def test_zoom_and_rotation_keep_to_their_range():
    transforms = draws(2000, shape=(80, 80, 80), aug_zoom=0.25, aug_rotate=30)
    zooms, angles = np.log([t.zoom for t in transforms]), np.degrees([t.angle for t in transforms])
    for values, limit in ((zooms, math.log(1.25)), (angles, 30)):
        assert np.abs(values).max() <= limit
        assert stats.kstest(values, stats.uniform(-limit, 2 * limit).cdf).pvalue > 1e-3


def test_zoomed_region_of_a_volume_just_large_enough_for_the_patch():
    volume = numbered(PATCH) - 5
    for transform in draws(100, shape=PATCH, aug_zoom=0.5, aug_rotate=45):
        crop = cropped(transform, volume)
        assert crop.shape == PATCH and np.isfinite(crop).all() and crop.min() >= volume.min() - 1e-4


@pytest.mark.parametrize(
    "transform",
    [
        Transform((2, 2, 0), (13, 13, 1), (10, 10, 1), 1, 0, 0.9, 0.1),
        Transform((2, 5, 0), (11, 1, 1), (10, 1, 1), 0, None, 0.9, 0.0),
        Transform((5, 2, 0), (1, 11, 1), (10, 1, 1), 3, 1, 0.9, 0.0),
    ],
)
def test_one_slice(transform):
    volume = numbered((20, 20, 1))
    np.testing.assert_allclose(cropped(transform, volume), sampled(volume, transform), atol=1e-3)


def test_same_random_numbers_same_transform():
    strong = {"aug_zoom": 0.2, "aug_rotate": 10, "aug_intensity": 0.3}
    assert draws(5, seed=4, **strong) == draws(5, seed=4, **strong) != draws(5, seed=5, **strong)


# --- intensity

IMAGE = np.random.default_rng(1).normal(2, 3, (16, 16, 16)).astype(np.float32)


def test_intensity_identity_and_off():
    assert apply_intensity(IMAGE, None) is IMAGE
    np.testing.assert_allclose(apply_intensity(IMAGE, Intensity(1, 0, 1, 0, 7)), IMAGE, atol=1e-5)
    constant = np.full((4, 4, 4), 2, np.float32)
    np.testing.assert_array_equal(apply_intensity(constant, Intensity(2, 1, 2, 1, 7)), constant)


def test_contrast_scales_about_the_mean_and_shift_counts_in_sd():
    changed = apply_intensity(IMAGE, Intensity(1.5, 0.2, 1, 0, 7))
    np.testing.assert_allclose(changed, 1.5 * (IMAGE - IMAGE.mean()) + IMAGE.mean() + 0.2 * IMAGE.std(), atol=1e-4)


def test_gamma_keeps_the_range_and_the_order():
    line = np.array([-1, 0, 1, 3], np.float32).reshape(4, 1, 1)
    changed = apply_intensity(line, Intensity(1, 0, 2, 0, 7)).ravel()
    np.testing.assert_allclose(changed, [-1, -0.75, 0, 3], atol=1e-6)  # 4 ((x + 1) / 4)^2 - 1


def test_noise_is_seeded_and_counts_in_sd():
    noise = apply_intensity(IMAGE, Intensity(1, 0, 1, 0.1, 7)) - IMAGE
    assert noise.std() == pytest.approx(0.1 * IMAGE.std(), rel=0.05)
    assert abs(noise.mean()) < 0.01 * IMAGE.std()
    np.testing.assert_array_equal(noise, apply_intensity(IMAGE, Intensity(1, 0, 1, 0.1, 7)) - IMAGE)
    assert not np.array_equal(noise, apply_intensity(IMAGE, Intensity(1, 0, 1, 0.1, 8)) - IMAGE)


def test_drawn_intensity_keeps_float32_input_and_limits():
    before = IMAGE.copy()
    for transform in draws(200, aug_intensity=0.3):
        change = transform.intensity
        assert max(abs(math.log(change.contrast)), abs(math.log(change.gamma)), abs(change.shift)) <= 0.3
        assert 0 <= change.noise_sd <= 0.15
    assert apply_intensity(IMAGE, change).dtype == np.float32
    np.testing.assert_array_equal(IMAGE, before)
