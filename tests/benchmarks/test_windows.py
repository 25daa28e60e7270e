import pytest

import test_LA
import train
from benchmarks.windows import compare_windows, paper_stride, window_settings, window_table
from options.flags import protocol_defaults
from utils.errors import InputError

PATCH = (32, 32, 32)


def test_the_strides_of_the_paper_are_scaled_like_the_patch():
    assert paper_stride((112, 112, 80)) == (18, 18, 4)
    assert paper_stride((64, 64, 48)) == (10, 10, 2)
    assert paper_stride((3, 3, 3)) == (1, 1, 1)


def test_every_row_is_made_of_flags_of_a_test():
    for flags in window_settings(PATCH).values():
        assert test_LA.make_parser().parse_args(["--exp", "a", *flags])
    rows = list(window_settings(PATCH))
    assert "--amp off" in rows[0] and "--protocol fast" in rows and "--protocol whole" in rows


def test_a_row_for_every_setting_from_the_scores_of_a_run(phantom, tmp_path, capsys):
    where = ["--root_path", str(phantom), "--model_path", str(tmp_path), "--exp", "run", "--device", "cpu"]
    size = ["--preset", "demo", "--patch_size", *map(str, PATCH), "--max_iterations", "1", "--image_every", "0"]
    train.main([*where, *size, "--method", "supervised", "--labelnum", "2"])
    rows = compare_windows(where)
    assert [row["flags"] for row in rows] == list(window_settings(PATCH))
    first, by_flags = rows[0], {row["flags"]: row for row in rows}
    assert first["change"] == 0 and first["change_sd"] == 0 and first["ratio"] == 1
    for row in rows:
        assert row["change"] == pytest.approx(row["dice"] - first["dice"], abs=1e-9) and row["seconds"] > 0
    fast = protocol_defaults("fast", PATCH)
    same = f"--stride_xy {fast['stride_xy']} --stride_z {fast['stride_z']} --blend {fast['blend']}"
    for row, flags in (("--protocol fast", same), ("--protocol whole", "--protocol whole")):
        capsys.readouterr()
        test_LA.main([*where, *flags.split(), "--skip", "predictions", "figures"])
        assert f"{by_flags[row]['dice']:.2f}" in capsys.readouterr().out
    table = window_table(rows)
    assert len(table.splitlines()) == 2 + len(rows) and "95HD [vox]" in table


def test_several_runs_are_refused():
    with pytest.raises(InputError, match="--exp"):
        compare_windows(["--exp", "a", "b"])
