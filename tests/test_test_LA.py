"""The test command: what it prints and writes, which settings it takes from where, what it refuses."""

import csv
import json
import math
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from medpy.metric import binary
from torch import nn

import test_LA
import train_dtml
from evaluation.metrics import largest_component
from methods import METHODS
from methods.base import Method
from runtime import runs
from runtime.distributed import Ranks
from utils import files
from utils.errors import run_script

CASES = ["phantom_006", "phantom_007"]
TRAINED_ON = {"labeled": ["phantom_000", "phantom_001"], "unlabeled": ["phantom_002"], "validation": ["phantom_003"]}
NO_FILES = ("--skip", "predictions", "figures")


class Bright(Method):
    """Calls the bright voxels foreground; `dark` is its opposite, `nothing` is empty."""

    outputs = ("seg", "dark", "nothing")

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.level = nn.Parameter(torch.tensor(1.5))

    def predict(self, image, outputs=None):
        bright = torch.sigmoid(10 * (image - self.level))
        probs = {"seg": bright, "dark": 1 - bright, "nothing": torch.zeros_like(bright)}
        return {name: probs[name] for name in outputs or self.outputs}


@pytest.fixture
def make_run(phantom, tmp_path, monkeypatch, tiny_options) -> Callable[..., Path]:
    """A run of `Bright`, as if it had been trained with some flags; returns its folder."""
    monkeypatch.setitem(METHODS, "supervised", Bright)

    def build(exp: str = "a", *flags: str, level: float = 1.5, cases: dict | None = None) -> Path:
        where = ("--root_path", str(phantom), "--model_path", str(tmp_path), "--exp", exp)
        options = tiny_options("supervised", *where, *flags)
        method = Bright(options)
        method.level.data.fill_(level)
        folder = tmp_path / exp
        folder.mkdir()
        files.write_json(folder / runs.OPTIONS, vars(options))
        state = {"networks": method.state_dict(), "options": vars(options), "iteration": 7, "seconds": 1.5}
        runs.save_checkpoint(folder / runs.LAST, state | {"cases": cases or TRAINED_ON})
        return folder

    return build


def score(folder: Path, *flags: str) -> dict:
    """Score a run on the CPU and read what was written."""
    argv = ["--exp", folder.name, "--model_path", str(folder.parent), "--device", "cpu", *flags]
    assert test_LA.main(argv) == 0
    return json.loads((folder / runs.METRICS_JSON).read_text(), parse_constant=not_strict)


def not_strict(constant: str):
    raise ValueError(f"{constant} is no JSON")


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / runs.METRICS_CSV, newline="") as file:
        return list(csv.DictReader(file))


def read(phantom: Path, case: str, key: str) -> np.ndarray:
    with h5py.File(phantom / case / "mri_norm2.h5") as file:
        return file[key][()]


def refused(capsys, *argv: str) -> str:
    """The one line on stderr of a test that ends with status 2."""
    with pytest.raises(SystemExit) as end:
        run_script(lambda: test_LA.main(list(argv)))
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# --- from training to scores


def test_what_training_wrote_is_found_and_scored(phantom, tmp_path, capsys):
    small = "--preset demo --patch_size 32 32 32 --n_filters 2 --batch_size 2 --labelnum 3 --image_every 0".split()
    where = ["--root_path", str(phantom), "--model_path", str(tmp_path), "--exp", "run", "--device", "cpu"]
    assert train_dtml.main([*small, *where, "--max_iterations", "1"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].partition("code/test_LA.py ")[2].split()
    assert test_LA.main([*command, "--device", "cpu", "--skip", "figures"]) == 0
    content = json.loads((tmp_path / "run" / runs.METRICS_JSON).read_text(), parse_constant=not_strict)
    assert set(content["summary"]) == {f"{head}/{post}" for head in ("seg", "sdm", "mean") for post in ("none", "lcc")}
    assert content["reported"] == {"head": "seg", "post": "none", "weights": "last"}
    assert content["trained_on"]["labeled"] == ["phantom_000", "phantom_001", "phantom_002"]
    assert sorted(path.name for path in (tmp_path / "run" / runs.PREDICTIONS).iterdir()) == [
        f"{case}.nii.gz" for case in CASES
    ]


def test_checkpoints_that_a_run_kept_are_scored_in_folders_of_their_own(phantom, tmp_path, capsys):
    small = "--preset demo --patch_size 32 32 32 --n_filters 2 --batch_size 2 --labelnum 3 --image_every 0".split()
    where = ["--model_path", str(tmp_path), "--exp", "run", "--device", "cpu"]
    long = ["--max_iterations", "2", "--save_every", "1", "--keep_checkpoints"]
    assert train_dtml.main([*small, *where, *long, "--root_path", str(phantom)]) == 0
    folder = tmp_path / "run"
    assert runs.kept_checkpoints(folder) == ["iteration_1", "iteration_2"]
    assert test_LA.main([*where, "--weights", "iteration_1", "--skip", "figures"]) == 0
    assert not (folder / runs.METRICS_JSON).exists() and not (folder / runs.PREDICTIONS).exists()
    content = json.loads((folder / "iteration_1" / runs.METRICS_JSON).read_text())
    assert (content["exp"], content["iteration"], content["reported"]["weights"]) == ("run", 1, "iteration_1")
    assert len(list((folder / "iteration_1" / runs.PREDICTIONS).iterdir())) == len(CASES)
    capsys.readouterr()
    assert "iteration_3.pth" in refused(capsys, *where, "--weights", "iteration_3")
    assert "--weights" in refused(capsys, *where, "--weights", "../run/last")


# --- what is written


def test_scores_are_those_of_the_written_predictions(make_run, phantom):
    folder = make_run()
    content = score(folder, "--skip", "figures", "--verify_metrics")
    rows = rows_of(folder)
    assert [(row["case"], row["head"], row["post"]) for row in rows] == [
        (case, head, post) for case in CASES for head in Bright.outputs for post in ("none", "lcc")
    ]
    for case in CASES:
        image = nib.load(folder / runs.PREDICTIONS / f"{case}.nii.gz")
        mask, label = np.asarray(image.dataobj).astype(bool), read(phantom, case, "label").astype(bool)
        np.testing.assert_array_equal(mask, read(phantom, case, "image") > 1.5)  # patches change nothing here
        with h5py.File(phantom / case / "mri_norm2.h5") as file:
            spacing = file.attrs["spacing_mm"]
        assert image.header.get_zooms() == pytest.approx(spacing, rel=1e-6)
        for post, prediction in (("none", mask), ("lcc", largest_component(mask))):
            row = next(r for r in rows if (r["case"], r["head"], r["post"]) == (case, "seg", post))
            assert float(row["dice"]) == pytest.approx(binary.dc(prediction, label), abs=1e-9)
            assert float(row["asd_vox"]) == pytest.approx(binary.asd(prediction, label), abs=1e-6)
            assert float(row["hd95_vox"]) == pytest.approx(binary.hd95(prediction, label), abs=1e-6)
            assert float(row["hd95_mm"]) == pytest.approx(binary.hd95(prediction, label, spacing), abs=1e-6)
    dice = [float(row["dice"]) for row in rows if (row["head"], row["post"]) == ("seg", "lcc")]
    summary = content["summary"]["seg/lcc"]["dice"]
    assert summary["mean"] == pytest.approx(np.mean(dice)) and summary["sd"] == pytest.approx(np.std(dice, ddof=1))


def test_the_json_says_how_the_scores_came_about_and_is_strict(make_run):
    folder = make_run()
    content = score(folder, *NO_FILES, "--stride_xy", "8")
    assert content["exp"] == "a" and content["iteration"] == 7 and content["training_seconds"] == 1.5
    assert 0 < content["test_seconds"] < 600
    assert (
        content["options"]["stride_xy"] == 8 and content["options"]["seed"] == 1337 and content["options"]["exp"] == "a"
    )
    assert content["versions"]["torch"] == torch.__version__ and content["versions"]["python"].startswith("3.")
    assert content["trained_on"] == TRAINED_ON
    missed = content["summary"]["nothing/none"]
    assert missed["asd_vox"]["missed"] == 2 and missed["asd_vox"]["mean"] is None
    assert missed["asd_vox"]["mean_penalised"] > 30 and missed["dice"]["mean"] == 0
    case = next(c for c in content["cases"] if c["head"] == "nothing")
    assert case["hd95_vox"] is None and case["dice"] == 0
    assert not (folder / runs.PREDICTIONS).exists() and not (folder / runs.FIGURES).exists()


def test_a_case_gets_its_picture(make_run):
    folder = make_run()
    score(folder, "--skip", "predictions")
    pictures = sorted((folder / runs.FIGURES).iterdir())
    assert [path.name for path in pictures] == [f"{case}.png" for case in CASES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


# --- what is printed


def test_tables_of_cases_and_of_outputs(make_run, capsys):
    score(make_run(), *NO_FILES)
    out = capsys.readouterr().out
    assert "a: output seg, post-processing none, iteration 7" in out
    for words in (*CASES, "mean ± sd", "seg, none", "seg, lcc", "dark, none", "nothing, lcc", "(2 missed)"):
        assert words in out, words


def test_the_reported_output_and_filter_are_those_of_the_flags(make_run, capsys, phantom):
    folder = make_run()
    content = score(folder, "--head", "dark", "--post", "lcc", "--skip", "figures")
    assert content["reported"] == {"head": "dark", "post": "lcc", "weights": "last"}
    assert "a: output dark, post-processing lcc" in capsys.readouterr().out
    mask = np.asarray(nib.load(folder / runs.PREDICTIONS / f"{CASES[0]}.nii.gz").dataobj).astype(bool)
    np.testing.assert_array_equal(mask, largest_component(read(phantom, CASES[0], "image") < 1.5))


def test_empty_predictions_are_missed_unless_the_public_rule_is_asked_for(make_run):
    folder = make_run()
    assert score(folder, *NO_FILES)["summary"]["nothing/none"]["hd95_vox"]["missed"] == 2
    public = score(folder, *NO_FILES, "--eval_empty", "zeros")["summary"]["nothing/none"]["hd95_vox"]
    assert (public["missed"], public["mean"]) == (0, 0)


def test_two_runs_are_compared_case_by_case(make_run, tmp_path, capsys):
    make_run("a", level=1.5), make_run("b", level=0.5)
    argv = ["--exp", "a", "b", "--model_path", str(tmp_path), "--device", "cpu", *NO_FILES]
    assert test_LA.main(argv) == 0
    table = capsys.readouterr().out.split("Dice minus first")[1]
    dice = {
        exp: [float(r["dice"]) for r in rows_of(tmp_path / exp) if (r["head"], r["post"]) == ("seg", "none")]
        for exp in "ab"
    }
    difference = 100 * (np.mean(dice["b"]) - np.mean(dice["a"]))
    assert f"{difference:+.2f} [" in table and "a (seg, none)" in table and "b (seg, none)" in table


def test_a_method_that_this_project_lacks_is_named(make_run, monkeypatch, capsys):
    folder = make_run("a")
    monkeypatch.delitem(METHODS, "supervised")
    error = refused(capsys, "--exp", "a", "--model_path", str(folder.parent))
    assert "run a is of method supervised, which is not among METHODS: asdnet" in error


def test_too_large_groups_of_windows_name_their_flag(make_run, monkeypatch, capsys):
    folder = make_run("a")

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Bright, "predict", out_of_memory)
    error = refused(capsys, "--exp", "a", "--model_path", str(folder.parent), "--device", "cpu")
    assert "out of memory; lower --window_batch" in error


# --- which settings: by hand > --compat by hand > those of the training


def options_of(trained: Namespace, *argv: str) -> Namespace:
    return test_LA.parse_options(["--exp", "a", *argv], "a", vars(trained))


def test_settings_come_from_the_training_unless_given(tiny_options):
    trained = tiny_options("dtml", "--post", "lcc", "--split", "dev", "--model_path", "/elsewhere", "--compile")
    assert (options_of(trained).post, options_of(trained).split, options_of(trained).stride_xy) == ("lcc", "dev", 16)
    assert options_of(trained, "--post", "none").post == "none"
    assert options_of(trained).patch_size == [32, 32, 32]
    machine = options_of(trained)
    assert (machine.device, machine.gpu, machine.compile, machine.model_path) == (None, None, False, "model")


def test_compat_is_taken_from_the_training_or_from_the_flag(tiny_options):
    public = {"post": "lcc", "eval_empty": "zeros", "head": None}
    plain, compat = tiny_options("dtml"), tiny_options("dtml", "--compat", "public")
    for options in (options_of(plain, "--compat", "public"), options_of(compat)):
        assert {name: getattr(options, name) for name in public} == public
    assert options_of(plain).post == "none"
    assert options_of(plain, "--compat", "public", "--post", "none").post == "none"
    assert options_of(compat, "--eval_empty", "nan").eval_empty == "nan"


def test_compat_by_hand_replaces_that_of_the_training(tiny_options):
    compat = tiny_options("dtml", "--compat", "public")
    off = options_of(compat, "--compat", "off")
    assert (off.compat, off.post, off.eval_empty, off.head) == ("off", "none", "nan", None)
    assert (off.flip, off.con_scale) == ("always", 2.0)  # what it was trained with stays
    assert options_of(compat, "--compat", "off", "--post", "lcc").post == "lcc"
    own = tiny_options("dtml", "--compat", "public", "--post", "none", "--head", "mean")
    assert (options_of(own).post, options_of(own).head) == ("none", "mean")
    again, off = options_of(own, "--compat", "public"), options_of(own, "--compat", "off")
    assert (again.post, again.head, again.eval_empty) == ("lcc", None, "zeros")
    assert (off.post, off.head, off.eval_empty) == ("none", "mean", "nan")  # what it chose by itself stays


# --- the paper's row


def test_the_papers_row_stands_on_its_own_scans_alone(make_run, capsys):
    score(make_run(), *NO_FILES)
    assert "86.03" not in capsys.readouterr().out


# --- bad input


def where(folder: Path, *flags: str) -> list[str]:
    return ["--exp", folder.name, "--model_path", str(folder.parent), "--device", "cpu", *NO_FILES, *flags]


def test_an_unknown_run_and_a_missing_checkpoint(make_run, tmp_path, capsys):
    folder = make_run()
    assert "no run 'b'" in refused(capsys, "--exp", "b", "--model_path", str(tmp_path))
    assert "best_val.pth" in refused(capsys, *where(folder, "--weights", "best_val"))
    before = sorted(folder.iterdir())
    assert "no run 'b'" in refused(capsys, "--exp", "a", "b", "--model_path", str(tmp_path))
    assert sorted(folder.iterdir()) == before  # known before the first run is scored


def test_a_wrong_checkpoint(make_run, capsys):
    folder = make_run()
    state = runs.load_checkpoint(folder / runs.LAST)
    runs.save_checkpoint(folder / runs.LAST, state | {"networks": {"other": torch.zeros(1)}})
    assert f"{folder / runs.LAST} does not fit" in refused(capsys, *where(folder))
    os.truncate(folder / runs.LAST, 100)
    assert str(folder / runs.LAST) in refused(capsys, *where(folder))


def test_cases_known_from_training_are_refused(make_run, capsys):
    for index, group in enumerate(TRAINED_ON):
        folder = make_run(f"run{index}", cases=TRAINED_ON | {group: [CASES[1]]})
        error = refused(capsys, *where(folder))
        assert f"1 cases of the test list, {CASES[1]} the first, were in the training of run{index}" in error
        assert "--test_list" in error and not (folder / runs.METRICS_CSV).exists()


def no_label(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["label"]


def other_shape(path: Path) -> None:
    no_label(path)
    with h5py.File(path, "r+") as file:
        file["label"] = np.zeros((3, 3, 3), np.uint8)


def nan_in_image(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["image"][0, 0, 0] = math.nan


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def missing(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_label, "'label'"),
        (other_shape, "shape (3, 3, 3)"),
        (nan_in_image, "NaN"),
        (truncated, "damaged"),
        (missing, "does not exist"),
    ],
)
def test_a_damaged_case_is_refused_before_anything_is_written(make_run, phantom, tmp_path, capsys, damage, words):
    folder = make_run()
    scans = Path(shutil.copytree(phantom, tmp_path / "scans"))
    damage(scans / CASES[1] / "mri_norm2.h5")
    before = sorted(folder.iterdir())
    argv = where(folder, "--root_path", str(scans))
    error = refused(capsys, *[flag for flag in argv if flag not in NO_FILES])
    assert f"{CASES[1]}/mri_norm2.h5" in error and words in error
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--head mean", ["--head mean", "a: seg, dark, nothing"]),
        ("--test_list nowhere.list", ["nowhere.list does not exist", "--test_list"]),
        ("--root_path nowhere", ["nowhere", "--root_path"]),
        ("--stride_z 0", ["--stride_z 0"]),
        ("--stride_xy 33", ["--stride_xy"]),
        ("--report --skip predictions", ["--report", "--skip predictions"]),
        ("--gpu 0", ["--gpu 0"]),
        ("--amp fp16", ["--amp fp16"]),
        ("--exp ../a", ["--exp ../a"]),
    ],
)
def test_flags_that_make_no_sense(make_run, capsys, flags, words):
    error = refused(capsys, *where(make_run()), *flags.split())
    assert all(word in error for word in words), error


def test_a_gpu_that_is_not_there(make_run, tmp_path, capsys, monkeypatch):
    make_run()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda was asked for" in refused(
        capsys, "--exp", "a", "--model_path", str(tmp_path), "--device", "cuda"
    )


def test_a_full_disk(make_run, capsys, monkeypatch):
    folder = make_run()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert f"cannot write {folder / runs.METRICS_CSV}: No space" in refused(capsys, *where(folder))
    assert not list(folder.glob(".*"))


def test_scores_that_differ_from_medpy_are_no_scores(make_run, monkeypatch):
    evaluate = test_LA.evaluate
    monkeypatch.setattr(test_LA, "evaluate", lambda *args: evaluate(*args) | {"dice": 0.123})
    folder = make_run()
    score(folder, *NO_FILES)
    with pytest.raises(RuntimeError, match="dice differs from medpy: 0.123"):
        score(folder, *NO_FILES, "--verify_metrics")


# --- several processes


EVERY_FILE = pytest.mark.parametrize("flags", [("--skip", "figures"), pytest.param((), marks=pytest.mark.slow)])


def assert_same_files(first: Path, second: Path, flags: tuple[str, ...]) -> None:
    """Scores, predictions and pictures, to the last byte; but for what names the run or was timed."""
    assert (first / runs.METRICS_CSV).read_bytes() == (second / runs.METRICS_CSV).read_bytes()
    contents = [json.loads((folder / runs.METRICS_JSON).read_text()) for folder in (first, second)]
    for content in contents:
        del content["exp"], content["test_seconds"], content["options"]
    assert contents[0] == contents[1]
    for kind in (runs.PREDICTIONS,) if flags else (runs.PREDICTIONS, runs.FIGURES):
        names = sorted(path.name for path in (first / kind).iterdir())
        assert len(names) == len(CASES) and names == sorted(path.name for path in (second / kind).iterdir())
        assert all((first / kind / name).read_bytes() == (second / kind / name).read_bytes() for name in names)


@EVERY_FILE
@pytest.mark.parametrize("size", [2, 3])  # one of three has no case
def test_cases_dealt_out_to_ranks_give_the_same_files(make_run, in_ranks, tmp_path, monkeypatch, size, flags):
    alone, shared = make_run("alone"), make_run("shared")
    score(alone, *flags)
    predict = test_LA.predict_masks

    def noted(method, case, *rest):
        with (tmp_path / "noted").open("a") as file:
            file.write(f"{os.environ['RANK']} {case}\n")
        return predict(method, case, *rest)

    monkeypatch.setattr(test_LA, "predict_masks", noted)
    argv = ["--exp", "shared", "--model_path", str(tmp_path), "--device", "cpu", *flags]
    outcomes = in_ranks(lambda: test_LA.main(argv), size)
    assert [outcome.status for outcome in outcomes] == [0] * size, outcomes
    assert [outcome.output for outcome in outcomes[1:]] == [""] * (size - 1)
    assert outcomes[0].output.count("mean ± sd") == 1
    assert_same_files(alone, shared, flags)
    assert sorted((tmp_path / "noted").read_text().splitlines()) == [f"{i} {case}" for i, case in enumerate(CASES)]


def test_bad_input_of_a_test_is_said_by_one_rank(make_run, in_ranks, tmp_path):
    make_run("a")
    argv = ["--exp", "a", "--model_path", str(tmp_path), "--device", "cpu", "--head", "mean"]
    first, second = in_ranks(lambda: test_LA.main(argv))
    assert (first.status, second.status, second.output) == (2, 2, "")
    assert first.output.startswith("error: --head mean")


@EVERY_FILE
def test_cases_scored_in_processes_give_the_same_files(make_run, flags):
    alone, shared = make_run("alone"), make_run("shared")
    score(alone, "--score_workers", "0", *flags), score(shared, "--score_workers", "2", *flags)
    assert_same_files(alone, shared, flags)


def test_how_many_processes_score(make_run, capsys, monkeypatch):
    monkeypatch.setattr(test_LA, "available_cores", lambda: 8)
    asked, default = Namespace(score_workers=3), Namespace(score_workers=None)
    assert [test_LA.score_workers(asked, cases) for cases in (2, 20)] == [2, 3]
    assert [test_LA.score_workers(default, cases) for cases in (7, 8)] == [0, 3]
    assert test_LA.score_workers(default, 10, Ranks(0, 2, 0, 2)) == 1
    for cores, workers in ((1, 0), (2, 0), (3, 1), (100, test_LA.MAX_WORKERS)):
        monkeypatch.setattr(test_LA, "available_cores", lambda cores=cores: cores)
        assert test_LA.score_workers(default, 20) == workers
    assert "--score_workers -1" in refused(capsys, *where(make_run(), "--score_workers", "-1"))


def test_report_is_written_and_says_so(make_run, capsys):
    folder = make_run()
    score(folder, "--skip", "figures", "--report")
    assert f"report: {folder / runs.REPORT}" in capsys.readouterr().out
    assert "86.03" not in (folder / runs.REPORT).read_text(encoding="utf-8")  # the paper's, of other scans


@pytest.mark.parametrize(
    ("direction", "letters"), [((1, 0, 0, 0, 1, 0, 0, 0, 1), True), ((-1, 0, 0, 0, -1, 0, 0, 0, 1), False)]
)
def test_pictures_name_sides_only_where_they_are_known(monkeypatch, tmp_path, direction, letters):
    drawn = []
    monkeypatch.setattr(test_LA, "case_figure", lambda *arguments, anatomical: drawn.append((arguments[4], anatomical)))
    image = np.zeros((4, 4, 4), np.float32)
    score = {"dice": 0.0, "hd95_vox": float("nan")}
    geometry = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), direction
    test_LA.write_case(tmp_path, "heart", image, image, image, geometry, score, ["predictions"])
    assert drawn == [("heart\nDice 0.00 %, 95HD - voxels", letters)]
