import numpy as np
import pytest
import torch

from benchmarks import data, timing
from benchmarks.reference import signed_distances
from benchmarks.timing import balls
from utils.errors import InputError
from utils.sdm import signed_distance_batch


@pytest.fixture
def few_cases(monkeypatch):
    monkeypatch.setattr(data, "LABELED_CASES", 2)
    monkeypatch.setattr(data, "CASES", 4)
    monkeypatch.setattr(timing, "LA_SHAPE", (40, 36, 32))


def test_reference_maps_are_ours():
    labels = torch.from_numpy(balls(2, (24, 20, 16))).float()[:, None]
    torch.testing.assert_close(signed_distances(labels), signed_distance_batch(labels), rtol=0, atol=1e-6)
    assert np.ptp(labels.numpy()) == 1


def test_other_maps_are_noticed(monkeypatch):
    monkeypatch.setattr(data, "signed_distances", torch.zeros_like)
    with pytest.raises(InputError, match="distance maps of both sides differ"):
        data.time_maps(1)


def test_other_metrics_are_noticed(monkeypatch):
    monkeypatch.setattr(data, "METRIC_SHAPE", (20, 20, 20))
    monkeypatch.setattr(data, "evaluate", lambda prediction, label: dict.fromkeys("abcd", 0.5))
    with pytest.raises(InputError, match="metrics of both sides differ"):
        data.time_metrics(False, 1)


def test_metrics_are_faster_than_medpy(monkeypatch):
    monkeypatch.setattr(data, "METRIC_SHAPE", (60, 60, 40))
    assert data.time_metrics(True, 3)["ratio"] > 1


@pytest.mark.slow
def test_batches_of_both_sides_have_the_crops_of_the_paper():
    assert data.time_batch(2)["ratio"] > 1


def test_the_start_is_measured_against_its_limit(few_cases):
    row = data.time_start(("--patch_size", "32", "32", "32"), 2)
    assert row["reference"] == data.START_LIMIT and row["ratio"] == pytest.approx(10 / row["ours"], rel=0.9)
