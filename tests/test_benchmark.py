import json

import pytest

import benchmark
from benchmarks import rows
from utils.errors import InputError


def test_table_and_file(monkeypatch, tmp_path, capsys):
    measured = {"ratio": 3.0, "ours": 1.0, "reference": 3.0, "spread": [2.0, 4.0], "unit": "s"}
    monkeypatch.setattr(rows, "BENCHMARKS", {"a row": (2.5, lambda: measured)})
    assert benchmark.main(["--json", str(tmp_path / "rows.json")]) == 0
    assert "a row" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row == {"name": "a row", "target": 2.5, **measured}


@pytest.mark.parametrize("name", ["missing/rows.json", "."])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(monkeypatch, tmp_path, name):
    monkeypatch.setattr(rows, "BENCHMARKS", {"a row": (2.5, lambda: pytest.fail("measured"))})
    with pytest.raises(InputError, match=f"{tmp_path}.*--json"):
        benchmark.main(["--json", str(tmp_path / name)])


def test_only_picks_rows_and_refuses_unknown_ones():
    assert list(rows.chosen_rows(False, ["maps"])) == ["distance maps of a batch"]
    with pytest.raises(InputError, match="--only"):
        benchmark.main(["--only", "nothing"])


def test_full_adds_the_paper_s_size():
    short, full = (rows.chosen_rows(full, None) for full in (False, True))
    assert "step, paper's size, bf16" in full.keys() - short.keys() and short.keys() < full.keys()
