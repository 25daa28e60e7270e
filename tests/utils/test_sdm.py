"""Signed distance maps against SciPy and scikit-image, and against values worked by hand."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.segmentation import find_boundaries

from utils.constants import SDM_STEEPNESS
from utils.sdm import prob_from_sdm, signed_distance, signed_distance_batch

SHAPE = (20, 16, 12)


def blob(seed: int, share: float = 0.3, sigma: float = 2.0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A smooth random mask that fills `share` of the volume, in several pieces, some cut by the border."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return noise > np.quantile(noise, 1 - share)


def public_sdm(mask: np.ndarray) -> np.ndarray:
    """The formula of the public implementation, in float64, with other libraries; for masks neither empty nor full."""
    inside = ndimage.distance_transform_edt(mask)
    outside = ndimage.distance_transform_edt(~mask)
    sdm = (outside - outside.min()) / (outside.max() - outside.min())
    sdm -= (inside - inside.min()) / (inside.max() - inside.min())
    sdm[find_boundaries(mask, mode="inner")] = 0
    return sdm


def inner_boundary(mask: np.ndarray) -> np.ndarray:
    """Mask voxels with a 6-neighbour in the background, nothing beyond the crop counting as background."""
    return mask & ~ndimage.binary_erosion(mask, border_value=1)


def one_voxel() -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[3, 4, 5] = True
    return mask


def slab(thickness: int, start: int = 5) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[start : start + thickness] = True
    return mask


MASKS = {
    "small": blob(0, 0.03),
    "middle": blob(1, 0.3),
    "large": blob(2, 0.9),
    "noise": blob(3, 0.5, sigma=0.1),
    "specks": blob(4, 0.02, sigma=0.1),
    "one voxel": one_voxel(),
    "all but one voxel": ~one_voxel(),
    "one voxel thick": slab(1),
    "two voxels thick": slab(2),
    "cut by the crop": slab(4, start=0),
    "flat volume": blob(5, shape=(30, 20, 1)),
    "transposed": blob(6).transpose(2, 0, 1),
    "rotated": np.rot90(blob(7)),
    "fortran": np.asfortranarray(blob(8)),
}


@pytest.mark.parametrize("name", MASKS)
def test_equals_the_public_formula(name):
    mask = MASKS[name]
    before = mask.copy()
    sdm = signed_distance(mask)
    assert sdm.shape == mask.shape and sdm.dtype == np.float32 and sdm.flags.c_contiguous
    np.testing.assert_allclose(sdm, public_sdm(mask), rtol=0, atol=1e-6)
    assert np.array_equal(mask, before)


@pytest.mark.parametrize("name", MASKS)
def test_sign_range_and_zero_set(name):
    mask = MASKS[name]
    boundary = inner_boundary(mask)
    sdm = signed_distance(mask)
    assert sdm.max() == 1
    assert sdm.min() == (-1 if (mask & ~boundary).any() else 0)
    assert np.array_equal(sdm == 0, boundary)
    assert np.array_equal(sdm < 0, mask & ~boundary)


@pytest.mark.parametrize("name", MASKS)
def test_the_transform_returns_the_mask_without_its_boundary(name):
    mask = MASKS[name]
    prob = prob_from_sdm(torch.from_numpy(signed_distance(mask)), SDM_STEEPNESS).numpy()
    assert np.array_equal(prob > 0.5, mask & ~inner_boundary(mask))
    assert np.array_equal(prob == 0.5, inner_boundary(mask))


def test_a_line_by_hand():
    mask = np.array([0, 0, 1, 1, 1, 1, 1, 0], dtype=bool).reshape(8, 1, 1)
    expected = [1, 1 / 2, 0, -2 / 3, -1, -2 / 3, 0, 1 / 2]
    np.testing.assert_allclose(signed_distance(mask).ravel(), expected, atol=1e-7)


def test_where_the_crop_cuts_the_object_there_is_no_boundary():
    mask = np.array([1, 1, 1, 1, 0, 0], dtype=bool).reshape(6, 1, 1)
    expected = [-1, -3 / 4, -1 / 2, 0, 1 / 2, 1]
    np.testing.assert_allclose(signed_distance(mask).ravel(), expected, atol=1e-7)


@pytest.mark.parametrize("empty, value", [("sign", 1), ("zeros", 0)])
def test_empty_and_full_crops(empty, value):
    nothing, everything = np.zeros(SHAPE, dtype=bool), np.ones(SHAPE, dtype=bool)
    for mask, expected in ((nothing, value), (everything, -1)):
        sdm = signed_distance(mask, empty)
        assert sdm.dtype == np.float32 and sdm.shape == SHAPE and (sdm == expected).all()
    assert np.array_equal(signed_distance(blob(1), empty), signed_distance(blob(1)))


def test_numbers_are_cut_at_one_half():
    soft = blob(1) * 0.4 + 0.3  # 0.7 inside, 0.3 outside
    assert np.array_equal(signed_distance(soft), signed_distance(blob(1)))
    assert np.array_equal(signed_distance(blob(1).astype(np.uint8)), signed_distance(blob(1)))
    assert (signed_distance(np.full(SHAPE, 0.5)) == 1).all()


def test_wrong_calls_raise():
    with pytest.raises(ValueError, match="empty"):
        signed_distance(blob(1), empty="zero")
    with pytest.raises(ValueError, match="volume"):
        signed_distance(blob(1)[None])
    for shape in (SHAPE, (2, *SHAPE), (2, 1, 16, 12)):
        with pytest.raises(ValueError, match="label"):
            signed_distance_batch(torch.zeros(shape))


@pytest.mark.parametrize(("empty", "value"), [("sign", 1), ("zeros", 0)])
def test_every_class_has_a_map_of_its_own_and_an_absent_one_lies_outside(empty, value):
    masks = np.stack([[blob(1), blob(2), np.zeros(SHAPE)], [blob(2), np.zeros(SHAPE), blob(1)]]).astype(np.float32)
    sdm = signed_distance_batch(torch.from_numpy(masks), empty)
    assert sdm.shape == masks.shape and (sdm[0, 2] == value).all() and (sdm[1, 1] == value).all()
    for case, number in np.ndindex(2, 3):
        np.testing.assert_array_equal(sdm[case, number], signed_distance(masks[case, number], empty))


def test_a_batch_is_its_cases_one_by_one():
    masks = [blob(1), np.zeros(SHAPE, dtype=bool), blob(2), np.ones(SHAPE, dtype=bool)]
    label = torch.from_numpy(np.stack(masks)[:, None].astype(np.float32))
    for empty in ("sign", "zeros"):
        sdm = signed_distance_batch(label, empty)
        assert sdm.shape == label.shape and sdm.dtype == torch.float32
        for index, mask in enumerate(masks):
            assert np.array_equal(sdm[index, 0].numpy(), signed_distance(mask, empty))


def test_a_batch_may_be_soft_turned_or_of_no_cases():
    mask = torch.from_numpy(blob(1))[None, None]
    soft = (mask.float() * 0.2 + 0.4).requires_grad_()  # 0.6 inside, 0.4 outside
    sdm = signed_distance_batch(soft)
    assert not sdm.requires_grad
    assert torch.equal(sdm, signed_distance_batch(mask.float()))
    turned = signed_distance_batch(soft.transpose(2, 4))
    assert torch.equal(turned, sdm.transpose(2, 4))
    assert signed_distance_batch(torch.zeros(0, 1, *SHAPE)).shape == (0, 1, *SHAPE)


def test_prob_by_hand():
    sdm = torch.tensor([-1.0, -0.001, 0.0, 0.001, 1.0])
    expected = [1.0, 1 / (1 + np.exp(-1.5)), 0.5, 1 / (1 + np.exp(1.5)), 0.0]
    torch.testing.assert_close(prob_from_sdm(sdm, 1500.0), torch.tensor(expected, dtype=torch.float32))
    assert prob_from_sdm(torch.tensor(-1.0), 2.0).item() == pytest.approx(1 / (1 + np.exp(-2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_prob_is_float32_under_autocast(dtype):
    sdm = torch.linspace(-0.004, 0.004, 101).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prob = prob_from_sdm(sdm, SDM_STEEPNESS)
    assert prob.dtype == torch.float32
    exact = torch.sigmoid(-SDM_STEEPNESS * sdm.double())
    torch.testing.assert_close(prob.double(), exact, rtol=0, atol=1e-6)


def test_prob_keeps_float64():
    sdm = torch.tensor([0.001], dtype=torch.float64)
    assert prob_from_sdm(sdm, 1500.0).item() == pytest.approx(1 / (1 + np.exp(1.5)), abs=1e-15)


def test_the_gradient_lives_in_a_narrow_band():
    sdm = torch.tensor([0.0, 0.0041, -0.0041, 0.5, -0.5], requires_grad=True)
    prob_from_sdm(sdm, 1500.0).sum().backward()
    peak = 1500 / 4
    assert sdm.grad[0].item() == pytest.approx(-peak)
    assert (sdm.grad[1:].abs() < 0.01 * peak).all() and torch.isfinite(sdm.grad).all()
    assert torch.equal(sdm.grad[3:], torch.zeros(2))
