"""Metrics against medpy and against values worked out on paper."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from medpy.metric import binary
from scipy import ndimage
from skimage.measure import label as sk_label

from evaluation import metrics
from evaluation.metrics import (
    class_mean,
    evaluate,
    largest_component,
    largest_components,
    summarise,
    verify_against_medpy,
    volume_diagonal,
)
from utils.errors import InputError

CODE = Path(metrics.__file__).parents[1]
SHAPE = (24, 20, 16)
SPACINGS = [None, (0.625, 0.625, 0.625), (0.7, 1.3, 2.9)]


def blob(seed: int, share: float = 0.3, sigma: float = 2.0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A smooth random mask that fills `share` of the volume, in several pieces, some cut by the border."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return noise > np.quantile(noise, 1 - share)


def voxels(*where: tuple[int, int, int], shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    for index in where:
        mask[index] = True
    return mask


def medpy_row(prediction: np.ndarray, label: np.ndarray, spacing_mm: tuple | None) -> dict[str, float]:
    row = {"dice": binary.dc(prediction, label), "jaccard": binary.jc(prediction, label)}
    row |= {"asd_vox": binary.asd(prediction, label), "hd95_vox": binary.hd95(prediction, label)}
    if spacing_mm is not None:
        row["asd_mm"] = binary.asd(prediction, label, voxelspacing=spacing_mm)
        row["hd95_mm"] = binary.hd95(prediction, label, voxelspacing=spacing_mm)
    return row


def assert_equals_medpy(prediction: np.ndarray, label: np.ndarray, spacing_mm: tuple | None = None) -> None:
    row = evaluate(prediction, label, spacing_mm)
    expected = medpy_row(prediction, label, spacing_mm)
    assert {key for key in row if key in metrics.METRICS} == set(expected)
    for metric, value in expected.items():
        assert row[metric] == pytest.approx(value, rel=0, abs=1e-9), metric
        assert type(row[metric]) is float


@pytest.mark.parametrize("voxels_per_point", [0, 40, 10**9], ids=["tree", "as shipped", "transform"])
@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_equals_medpy_on_random_masks(monkeypatch, voxels_per_point, spacing_mm):
    monkeypatch.setattr(metrics, "VOXELS_PER_POINT", voxels_per_point)
    for seed, share in enumerate([0.02, 0.1, 0.3, 0.6, 0.95]):
        assert_equals_medpy(blob(seed, share), blob(seed + 100, 0.3), spacing_mm)
        assert_equals_medpy(blob(seed, share), blob(seed, share * 0.9), spacing_mm)  # much surface in common


@pytest.mark.parametrize("spacing_mm", [None, (0.5, 1.0, 3.0)])
@pytest.mark.parametrize("shift", [1, 3, 4, 5, 9])
def test_equals_medpy_on_both_sides_of_the_reach_of_the_shells(shift, spacing_mm):
    label, moved = np.zeros((2, 40, 24, 24), dtype=bool)
    label[6:16, 5:15, 5:15] = True
    moved[6 + shift : 16 + shift, 5:15, 5:15] = True
    assert_equals_medpy(moved, label, spacing_mm)


def test_near_points_take_the_shells_a_distant_few_the_tree_and_many_the_transform(monkeypatch):
    """Each pair is evaluated with the other ways of searching taken out."""
    label = np.zeros((60, 60, 60), dtype=bool)
    label[10:30, 10:30, 10:30] = True
    dented, speckled, far = label.copy(), label.copy(), np.zeros_like(label)
    dented[10, 18:22, 18:22] = False
    speckled[50, 50, 50] = True
    far[30:60:2, 30:60:2, 30:60:2] = True
    for prediction, unused in [
        (dented, ("cKDTree", "transform")),
        (speckled, ("transform",)),
        (far, ("cKDTree",)),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "VOXELS_PER_POINT", 200)
            if "cKDTree" in unused:
                patch.setattr(metrics, "cKDTree", None)
            if "transform" in unused:
                patch.setattr(metrics.ndimage, "distance_transform_edt", None)
            evaluate(prediction, label)


@pytest.mark.data
def test_equals_medpy_on_real_scans(la_dir):
    cases = sorted(la_dir.glob("*/mri_norm2.h5"))[:4]
    assert cases
    for path in cases:
        with h5py.File(path) as file:
            label = file["label"][:] > 0
        signed = ndimage.distance_transform_edt(~label) - ndimage.distance_transform_edt(label)
        noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(label.shape), 6)
        assert_equals_medpy(signed + 2.5 / noise.std() * noise < 0, label, (0.625, 0.625, 0.625))


@pytest.mark.parametrize("face", range(6))
def test_equals_medpy_where_masks_touch_the_border(face):
    axis, last = face % 3, face >= 3
    slab = [slice(4, 12)] * 3
    slab[axis] = slice(-5, None) if last else slice(0, 5)
    prediction, label = np.zeros(SHAPE, dtype=bool), np.zeros(SHAPE, dtype=bool)
    prediction[tuple(slab)] = True
    label[tuple(slab)] = True
    label[6:9, 6:9, 6:9] ^= True
    assert_equals_medpy(prediction, label, (1.0, 2.0, 3.0))


@pytest.mark.parametrize("margin", [0, 1, 7])
def test_a_margin_of_background_follows_medpy(margin):
    """With a margin the cut through the crop is no volume border any more, without one it is."""
    prediction, label = np.ones((6, 5, 4), dtype=bool), voxels((2, 2, 2), (3, 2, 2), shape=(6, 5, 4))
    assert_equals_medpy(np.pad(prediction, margin), np.pad(label, margin))


def test_swapping_the_masks_changes_asd_and_nothing_else():
    prediction, label = blob(1, 0.2), blob(2, 0.4)
    row, swapped = evaluate(prediction, label), evaluate(label, prediction)
    for metric in ("dice", "jaccard", "hd95_vox"):
        assert row[metric] == pytest.approx(swapped[metric], abs=1e-12)
    assert abs(row["asd_vox"] - swapped["asd_vox"]) > 0.01


def test_thin_masks_and_single_voxels_equal_medpy():
    sheet = np.zeros(SHAPE, dtype=bool)
    sheet[:, 7, :] = True
    assert_equals_medpy(sheet, voxels((23, 19, 15)), (0.7, 1.3, 2.9))
    assert_equals_medpy(voxels((0, 0, 0)), sheet, (0.7, 1.3, 2.9))
    assert_equals_medpy(blob(3, shape=(30, 20, 1)), blob(4, shape=(30, 20, 1)))


def test_two_voxels_by_hand():
    row = evaluate(voxels((0, 0, 0)), voxels((0, 3, 4)), spacing_mm=(9.0, 2.0, 0.5))
    assert row["dice"] == row["jaccard"] == 0.0
    assert row["asd_vox"] == row["hd95_vox"] == 5.0
    assert row["asd_mm"] == row["hd95_mm"] == pytest.approx(np.sqrt(6**2 + 2**2))


def test_voxels_on_the_volume_border_are_surface():
    row = evaluate(np.ones((3, 3, 3)), voxels((1, 1, 1), shape=(3, 3, 3)))
    assert row["asd_vox"] == pytest.approx((6 * 1 + 12 * np.sqrt(2) + 8 * np.sqrt(3)) / 26)
    assert row["dice"] == pytest.approx(2 / 28)
    assert row["jaccard"] == pytest.approx(1 / 27)


def test_asd_is_directed_and_hd95_pools_both_sets():
    prediction, label = voxels((0, 0, 0)), voxels((0, 0, 0), (0, 0, 10))
    assert evaluate(prediction, label)["asd_vox"] == 0.0
    assert evaluate(label, prediction)["asd_vox"] == 5.0
    # Pooled: 0, 0, 10; the 95th percentile lies at 0.95 * 2 = 1.9, nine tenths of the way from 0 to 10.
    assert evaluate(prediction, label)["hd95_vox"] == pytest.approx(9.0)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32, np.float64])
def test_the_type_of_a_mask_does_not_matter(dtype):
    prediction, label = blob(6), blob(7)
    assert evaluate(prediction.astype(dtype), label.astype(dtype)) == evaluate(prediction, label)


def test_memory_order_does_not_matter():
    prediction, label = np.asfortranarray(blob(8)), blob(9)[::-1]
    assert evaluate(prediction, label) == evaluate(prediction.copy(order="C"), label.copy(order="C"))


def test_diagonals_and_volumes_come_with_the_row():
    prediction, label = voxels((0, 0, 0), (1, 1, 1), shape=(3, 4, 12)), voxels((0, 0, 0), shape=(3, 4, 12))
    row = evaluate(prediction, label, spacing_mm=(2, 2, 2))
    assert row["diagonal_vox"] == 13.0
    assert row["diagonal_mm"] == 26.0
    assert (row["volume_ml"], row["label_ml"]) == (0.016, 0.008)
    assert "volume_ml" not in evaluate(prediction, label)


@pytest.mark.parametrize("mask", [voxels(), blob(5)], ids=["empty", "blob"])
def test_two_equal_masks_agree_perfectly(mask):
    row = evaluate(mask, mask.copy(), spacing_mm=(1, 2, 3))
    assert [row[metric] for metric in metrics.METRICS] == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("swap", [False, True])
def test_one_empty_mask_is_a_miss(swap):
    pair = (voxels((1, 1, 1)), voxels()) if swap else (voxels(), voxels((1, 1, 1)))
    row = evaluate(*pair, spacing_mm=(1, 2, 3))
    assert row["dice"] == row["jaccard"] == 0.0
    assert all(np.isnan(row[metric]) for metric in metrics.METRICS[2:])
    assert row["diagonal_vox"] > 0


def test_the_public_rule_scores_an_empty_prediction_zero():
    for label in (blob(1), voxels()):
        row = evaluate(voxels(), label, spacing_mm=(1, 2, 3), empty="zeros")
        assert [row[metric] for metric in metrics.METRICS] == [0, 0, 0, 0, 0, 0]
        assert row["diagonal_vox"] == volume_diagonal(SHAPE)
    assert np.isnan(evaluate(blob(1), voxels(), empty="zeros")["asd_vox"])
    assert evaluate(blob(1), blob(2), empty="zeros") == evaluate(blob(1), blob(2))


@pytest.mark.parametrize(
    "prediction, label, more, message",
    [
        (voxels(), voxels(shape=(24, 20, 15)), {}, "same shape"),
        (voxels()[0], voxels()[0], {}, "volume"),
        (voxels() + 0.3, voxels(), {}, "0 and 1"),
        (voxels(), np.full(SHAPE, np.nan), {}, "0 and 1"),
        (voxels(), voxels() + np.uint8(2), {}, "0 and 1"),
        (voxels(), voxels(), {"empty": "nought"}, "empty"),
        (voxels(), voxels(), {"spacing_mm": (1.0, 1.0)}, "three positive"),
        (voxels(), voxels(), {"spacing_mm": (1.0, 1.0, 0.0)}, "spacing"),
        (voxels(), voxels(), {"spacing_mm": (1.0, 1.0, np.nan)}, "spacing"),
    ],
)
def test_wrong_calls_raise(prediction, label, more, message):
    with pytest.raises(ValueError, match=message):
        evaluate(prediction, label, **more)


def test_largest_component_joins_over_corners():
    diagonal = voxels((5, 5, 5), (6, 6, 6), (7, 7, 7))
    mask = diagonal | voxels((0, 0, 0), (0, 0, 1))
    assert np.array_equal(largest_component(mask), diagonal)


def test_the_first_of_equally_large_components_stays():
    assert np.array_equal(largest_component(voxels((9, 1, 1), (1, 1, 9), (1, 9, 1))), voxels((1, 1, 9)))


def test_largest_component_equals_the_public_implementation():
    for seed in range(5):
        mask = blob(seed, 0.15, sigma=1.0)
        labels = sk_label(mask)
        public = labels == np.argmax(np.bincount(labels.flat)[1:]) + 1
        assert public.sum() < mask.sum()
        assert np.array_equal(largest_component(mask.astype(np.uint8)), public)


def test_largest_component_of_empty_and_full():
    assert not largest_component(voxels()).any()
    kept = largest_component(np.ones(SHAPE, dtype=np.uint8))
    assert kept.all() and kept.dtype == bool
    mask = voxels((1, 1, 1), (5, 5, 5))
    largest_component(mask)[:] = True
    assert mask.sum() == 2  # the input is neither changed nor shared


def test_volume_diagonal():
    assert volume_diagonal((3, 4, 12)) == 13.0
    assert volume_diagonal((3, 4, 12), (1.0, 0.5, 0.5)) == pytest.approx(7.0)
    with pytest.raises(ValueError, match="spacing"):
        volume_diagonal((3, 4, 12), (1.0, 1.0))


def row_of(asd: float, dice: float = 0.5, diagonal: float = 100.0) -> dict:
    return {"case": "A1", "dice": dice, "asd_vox": asd, "diagonal_vox": diagonal}


def test_summary_by_hand():
    summary = summarise([row_of(1.0, 0.6), row_of(3.0, 0.9), row_of(np.nan, 0.0, diagonal=50.0)])
    assert set(summary) == {"dice", "asd_vox"}
    assert summary["asd_vox"]["mean"] == 2.0
    assert summary["asd_vox"]["sd"] == pytest.approx(np.sqrt(2))
    assert summary["asd_vox"]["missed"] == 1
    assert summary["asd_vox"]["mean_penalised"] == 18.0
    assert summary["dice"]["mean"] == summary["dice"]["mean_penalised"] == pytest.approx(0.5)
    assert summary["dice"]["missed"] == 0


def test_summary_of_evaluated_cases_charges_each_unit_its_own_diagonal():
    rows = [evaluate(voxels(), blob(1), (2, 2, 2)), evaluate(blob(1), blob(1), (2, 2, 2))]
    summary = summarise(rows)
    assert tuple(summary) == metrics.METRICS
    assert summary["hd95_mm"]["mean_penalised"] == pytest.approx(volume_diagonal(SHAPE, (2, 2, 2)) / 2)
    assert summary["hd95_vox"]["mean_penalised"] == pytest.approx(volume_diagonal(SHAPE) / 2)


@pytest.mark.filterwarnings("error")
def test_summary_of_one_case_and_of_misses_only():
    assert summarise([row_of(2.0)])["asd_vox"] == {"mean": 2, "sd": 0, "missed": 0, "mean_penalised": 2}
    missed = summarise([row_of(np.nan), row_of(np.nan)])["asd_vox"]
    assert np.isnan(missed["mean"]) and np.isnan(missed["sd"])
    assert missed["missed"] == 2 and missed["mean_penalised"] == 100.0
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


def test_verification_passes_on_true_values():
    for spacing_mm in SPACINGS:
        pair = blob(1), blob(2).astype(np.uint8)
        verify_against_medpy(evaluate(*pair, spacing_mm), *pair, spacing_mm)
    verify_against_medpy(evaluate(voxels(), blob(1)), voxels(), blob(1))


@pytest.mark.parametrize("metric", metrics.METRICS)
@pytest.mark.parametrize("error", [2e-6, -2e-6, np.nan])
def test_verification_names_metric_and_values(metric, error):
    row = evaluate(blob(1), blob(2), (1, 1, 2))
    true, row[metric] = row[metric], row[metric] + error
    with pytest.raises(RuntimeError, match=metric) as caught:
        verify_against_medpy(row, blob(1), blob(2), (1, 1, 2))
    assert repr(row[metric]) in str(caught.value)
    assert f"{true:.4f}"[:5] in str(caught.value).split("here")[1]


def test_without_medpy_only_the_verification_fails(monkeypatch):
    check = "import sys, evaluation.metrics; sys.exit('medpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=CODE).returncode == 0
    monkeypatch.setitem(sys.modules, "medpy.metric", None)
    with pytest.raises(InputError, match="--verify_metrics"):
        verify_against_medpy(evaluate(blob(1), blob(2)), blob(1), blob(2))


# --- several classes


def test_each_class_keeps_its_largest_component():
    label = np.zeros(SHAPE, np.uint8)
    label[0, :3], label[2:4, :4], label[5, 0], label[7:9] = 1, 2, 1, 2
    kept = largest_components(label)
    assert kept.dtype == np.uint8
    for number in (1, 2):
        np.testing.assert_array_equal(kept == number, largest_component(label == number))
    assert not largest_components(np.zeros(SHAPE, np.uint8)).any()


def test_a_missed_class_is_counted_and_never_flatters():
    hit = evaluate(voxels((0, 0, 0), (1, 0, 0)), voxels((1, 0, 0), (2, 0, 0)), (1.0, 1.0, 1.0))
    miss = evaluate(voxels(), voxels((3, 3, 3)), (1.0, 1.0, 1.0))
    rows = [class_mean([hit, hit]), class_mean([hit, miss]), class_mean([miss, miss])]
    assert [row["dice"] for row in rows] == [0.5, 0.25, 0.0]
    assert [row["missed_classes"] for row in rows] == [0, 1, 2]
    assert rows[1]["asd_vox"] == hit["asd_vox"] and np.isnan(rows[2]["asd_vox"])
    summary = summarise(rows)
    assert (summary["dice"]["missed"], summary["asd_vox"]["missed"]) == (0, 3)
    assert summary["asd_vox"]["mean"] == hit["asd_vox"]
    penalised = [summarise([a, b])["asd_mm"]["mean_penalised"] for a, b in ((hit, hit), (hit, miss), (miss, miss))]
    assert summary["asd_mm"]["mean_penalised"] == pytest.approx(np.mean(penalised))
