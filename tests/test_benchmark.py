import json

import numpy as np
import pytest
import torch

import benchmark
from benchmark_reference import signed_distances
from utils.errors import InputError
from utils.sdm import signed_distance_batch

TINY = ("--patch_size", "32", "32", "32", "--n_filters", "8")


def test_reference_step_gives_the_same_loss():
    row = benchmark.time_step(TINY, "off", 2)  # raises where the losses differ
    assert row["ratio"] > 0 and row["ours"] > 0 and row["reference"] > 0


def test_another_loss_is_noticed(monkeypatch):
    monkeypatch.setattr(benchmark, "dtml_step", lambda *arguments: lambda batch: 1.0)
    with pytest.raises(InputError, match="losses of both sides differ"):
        benchmark.time_step(TINY, "off", 2)


def test_reference_maps_are_ours():
    labels = torch.from_numpy(benchmark.balls(2, (24, 20, 16))).float()[:, None]
    torch.testing.assert_close(signed_distances(labels), signed_distance_batch(labels), rtol=0, atol=1e-6)
    assert np.ptp(labels.numpy()) == 1


def test_table_and_file(monkeypatch, tmp_path, capsys):
    measured = {"ratio": 3.0, "ours": 1.0, "reference": 3.0, "spread": [2.0, 4.0]}
    monkeypatch.setattr(benchmark, "ROWS", {"a row": (2.5, lambda: measured)})
    assert benchmark.main(["--json", str(tmp_path / "rows.json")]) == 0
    assert "a row" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row == {"name": "a row", "target": 2.5, "unit": "s", **measured}


def test_only_picks_rows_and_refuses_unknown_ones():
    assert list(benchmark.chosen_rows(benchmark.parse_options(["--only", "maps"]))) == ["distance maps of a batch"]
    with pytest.raises(InputError, match="fits no row"):
        benchmark.chosen_rows(benchmark.parse_options(["--only", "nothing"]))


def test_reference_inference_gives_the_same_map():
    row = benchmark.time_inference(TINY, (40, 36, 32), "off", "paper", 2)  # raises where the maps differ
    assert row["ratio"] > 0


def test_another_map_is_noticed(monkeypatch):
    monkeypatch.setattr(benchmark, "window_by_window", lambda m_s, m_d, image, *others: np.ones_like(image))
    with pytest.raises(InputError, match="probabilities of both sides differ"):
        benchmark.time_inference(TINY, (40, 36, 32), "off", "paper", 2)


def test_batches_of_both_sides_have_the_crops_of_the_paper():
    assert benchmark.time_batch(2)["ratio"] > 1


@pytest.mark.slow
def test_memory_of_a_step_is_that_of_the_step():
    row = benchmark.memory_of_step(benchmark.CPU_SIZE, "off")
    assert 0 < row["ours"] < 2 and row["unit"] == "GiB"
