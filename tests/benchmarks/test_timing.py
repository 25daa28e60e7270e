import h5py
import numpy as np
import pytest

from benchmarks import timing
from benchmarks.timing import added_gib, compared, in_own_process, made_up_cases, timed_in_turns
from dataloaders.case_files import case_path


def test_sides_take_turns_and_the_ratio_is_how_much_longer_the_reference_takes(monkeypatch):
    order, clock = [], [0.0]

    def side(name: str, seconds: float):
        order.append(name)
        clock[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    row = timed_in_turns(lambda: side("ours", 0.01), lambda: side("reference", 0.04), 3)
    assert order == ["ours", "reference"] * 3
    assert (row["ratio"], row["ours"], row["reference"]) == pytest.approx((4, 0.01, 0.04)) and row["unit"] == "s"


def test_a_row_is_of_medians_of_neighbouring_measurements():
    row = compared([(1.0, 2.0), (2.0, 8.0), (1.0, 30.0)])
    assert (row["ratio"], row["ours"], row["reference"]) == (4.0, 1.0, 8.0)
    assert compared([(2.0, 1.0)])["spread"] == [0.5, 0.5]


def _grown(mib: int) -> float:
    return added_gib(lambda: np.ones(mib * 2**20, dtype=np.uint8))


@pytest.mark.slow
def test_memory_is_what_a_call_adds_though_it_is_gone_afterwards():
    assert in_own_process(_grown, 200) == pytest.approx(200 / 1024, rel=0.1)


def test_made_up_cases_are_links_beyond_the_first(monkeypatch):
    monkeypatch.setattr(timing, "DISTINCT_FILES", 2)
    monkeypatch.setattr(timing, "LA_SHAPE", (12, 10, 8))
    with made_up_cases(5) as (root, cases):
        images = []
        for case in cases:
            with h5py.File(case_path(root, case)) as file:
                assert file["image"].shape == file["label"].shape == (12, 10, 8)
                images.append(file["image"][:])
        assert not np.array_equal(images[0], images[1])
        for index, image in enumerate(images):
            np.testing.assert_array_equal(image, images[index % 2])
    assert not root.exists()
