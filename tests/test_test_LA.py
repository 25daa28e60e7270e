"""The test command: what it prints and writes, which settings it takes from where, what it refuses."""

import csv
import json
import math
import os
import shlex
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
from dataloaders import case_files
from evaluation.metrics import largest_component
from inference import scoring
from methods import METHODS
from methods.base import Method
from runtime import runs
from runtime.distributed import Ranks
from utils import files
from utils.errors import InputError

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
        for name in (runs.LAST, runs.BEST_VAL):
            runs.save_checkpoint(folder / name, state | {"cases": cases or TRAINED_ON})
        return folder

    return build


def where(folder: Path, *flags: str) -> list[str]:
    return ["--exp", folder.name, "--model_path", str(folder.parent), "--device", "cpu", *flags]


def strict_json(path: Path) -> dict:
    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def score(folder: Path, *flags: str) -> dict:
    """Score a run on the CPU and read what was written."""
    assert test_LA.main(where(folder, *flags)) == 0
    return strict_json(folder / runs.METRICS_JSON)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / runs.METRICS_CSV, newline="") as file:
        return list(csv.DictReader(file))


def read(phantom: Path, case: str, key: str) -> np.ndarray:
    with h5py.File(phantom / case / "mri_norm2.h5") as file:
        return file[key][()]


def refused(*argv: str) -> str:
    with pytest.raises(InputError) as error:
        test_LA.main(list(argv))
    return str(error.value)


# --- from training to scores


def test_another_engine_gives_the_same_scores(make_run):
    pytest.importorskip("openvino")
    folder = make_run()
    torchs, openvinos = (score(folder, *NO_FILES, "--engine", engine) for engine in ("torch", "openvino"))
    assert openvinos["options"]["engine"] == "openvino" and openvinos["cases"] == torchs["cases"]


def test_views_of_a_patch_are_averaged_before_it_is_scored(make_run, monkeypatch):
    """What a method sees in one half of a patch alone is seen by half of the flipped views: no more than 1/2."""
    folder, bright = make_run(), Bright.predict

    def right_half(method, image, outputs=None):
        right = (torch.arange(image.shape[2]) >= image.shape[2] // 2).view(-1, 1, 1)
        return {name: prob * right for name, prob in bright(method, image, outputs).items()}

    monkeypatch.setattr(Bright, "predict", right_half)
    plain, seen = (score(folder, *NO_FILES, *flags) for flags in ((), ("--tta",)))
    assert (plain["options"]["tta"], seen["options"]["tta"]) == ("none", "flips")
    assert plain["summary"]["seg/none"]["dice"]["mean"] > 0.1 and seen["summary"]["seg/none"]["dice"]["mean"] == 0


def test_checkpoints_of_a_training_run_are_scored_in_folders_of_their_own(phantom, tmp_path, capsys):
    small = "--preset demo --patch_size 32 32 32 --n_filters 2 --batch_size 2 --labelnum 3 --image_every 0".split()
    run = ["--model_path", str(tmp_path), "--exp", "run", "--device", "cpu"]
    long = ["--max_iterations", "2", "--save_every", "1", "--keep_checkpoints"]
    assert train_dtml.main([*small, *run, *long, "--root_path", str(phantom)]) == 0
    folder = tmp_path / "run"
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("code/test_LA.py ")[2])
    for name, place, iteration in (("last", folder, 2), ("iteration_1", folder / "iteration_1", 1)):
        assert test_LA.main([*command, "--device", "cpu", "--weights", name, "--skip", "figures"]) == 0
        content = strict_json(place / runs.METRICS_JSON)
        assert (content["exp"], content["iteration"], content["reported"]["weights"]) == ("run", iteration, name)
        assert [path.name for path in sorted((place / runs.PREDICTIONS).iterdir())] == [f"{c}.nii.gz" for c in CASES]
        assert set(content["summary"]) == {f"{h}/{post}" for h in ("seg", "sdm", "mean") for post in ("none", "lcc")}
        assert content["trained_on"]["labeled"] == ["phantom_000", "phantom_001", "phantom_002"]
        assert content["commit"]["training"] == content["commit"]["test"] == runs.commit()
    assert "iteration_3.pth" in refused(*run, "--weights", "iteration_3")
    assert "--weights" in refused(*run, "--weights", "../run/last")


def test_best_val_leaves_what_last_has_written(make_run):
    folder = make_run()
    score(folder, "--skip", "figures")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    score(folder, "--weights", "best_val", "--head", "dark")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert strict_json(folder / "best_val" / runs.METRICS_JSON)["reported"]["weights"] == "best_val"


# --- what is written


def test_scores_are_those_of_the_written_predictions(make_run, phantom, capsys):
    folder = make_run()
    content = score(folder, "--verify_metrics")
    # two cases with two filters: medpy compares bright and dark, and has no distance for an empty prediction
    assert {"8", "4"} <= set(capsys.readouterr().out.partition("--verify_metrics")[2].split())
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
            assert float(row["hd95_mm"]) == pytest.approx(binary.hd95(prediction, label, spacing), abs=1e-6)
            assert float(row["volume_ml"]) == pytest.approx(prediction.sum() * np.prod(spacing) / 1000)
        assert (folder / runs.FIGURES / f"{case}.png").read_bytes().startswith(b"\x89PNG")
    dice = [float(row["dice"]) for row in rows if (row["head"], row["post"]) == ("seg", "lcc")]
    summary = content["summary"]["seg/lcc"]["dice"]
    assert summary["mean"] == pytest.approx(np.mean(dice)) and summary["sd"] == pytest.approx(np.std(dice, ddof=1))


def test_the_json_says_how_the_scores_came_about_and_is_strict(make_run, phantom):
    folder = make_run()
    content = score(folder, *NO_FILES, "--stride_xy", "8")
    assert content["exp"] == "a" and content["iteration"] == 7 and content["training_seconds"] == 1.5
    assert 0 < content["test_seconds"] < 600
    assert content["options"]["stride_xy"] == 8 and content["options"]["seed"] == 1337
    assert content["versions"]["torch"] == torch.__version__ and content["versions"]["python"].startswith("3.")
    lists = {f"{kind}_list": str(phantom / f"{kind}.list") for kind in ("train", "test")}
    assert content["data"] == {"folder": str(phantom), "official": False, **lists}
    assert content["trained_on"] == TRAINED_ON
    missed = content["summary"]["nothing/none"]
    assert missed["asd_vox"]["missed"] == 2 and missed["asd_vox"]["mean"] is None
    assert missed["asd_vox"]["mean_penalised"] > 30 and missed["dice"]["mean"] == 0
    case = next(c for c in content["cases"] if c["head"] == "nothing")
    assert case["hd95_vox"] is None and case["dice"] == 0
    assert not (folder / runs.PREDICTIONS).exists() and not (folder / runs.FIGURES).exists()
    public = score(folder, *NO_FILES, "--eval_empty", "zeros")["summary"]["nothing/none"]["hd95_vox"]
    assert (public["missed"], public["mean"]) == (0, 0)


def test_the_volume_of_sheared_voxels(tmp_path):
    """A step of 1 mm in the third axis that leans by 60 degrees: voxels of half a cubic millimetre."""
    label = np.ones((10, 10, 10), np.uint8)
    geometry = {"spacing_mm": (1, 1, 1), "direction": (1, 0, math.sqrt(0.75), 0, 1, 0, 0, 0, 0.5)}
    case_files.write_case(tmp_path, "a", np.arange(1000).reshape(label.shape), label, geometry)
    options = Namespace(root_path=str(tmp_path), eval_empty="nan", verify_metrics=False, post="none", skip=NO_FILES)
    (row, _) = scoring.score_case(("a", {"seg": label > 0}), "seg", options, tmp_path)
    np.testing.assert_allclose((row["volume_ml"], row["label_ml"]), 0.5)


@pytest.mark.parametrize("direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (-1, 0, 0, 0, -1, 0, 0, 0, 1)])
def test_pictures_name_sides_only_where_they_are_known(monkeypatch, tmp_path, direction):
    drawn = []
    monkeypatch.setattr(scoring, "case_figure", lambda *arguments, anatomical: drawn.append(anatomical))
    image, scores = np.zeros((4, 4, 4), np.float32), {"dice": 0.0, "hd95_vox": math.nan}
    geometry = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), direction
    scoring.write_prediction(tmp_path, "heart", image, image, image, geometry, scores, ["predictions"])
    assert drawn == [direction[0] > 0]


# --- what is printed


def test_one_table_and_the_rest_only_if_asked(make_run, capsys):
    folder = make_run()
    score(folder, *NO_FILES)
    out = capsys.readouterr().out
    assert out.count("\n----") == 1 and "missed" not in out and "86.03" not in out  # the paper's Dice of other scans
    assert all(words in out for words in (*CASES, "mean ± sd", "95HD [vox]", "95HD [mm]"))
    score(folder, *NO_FILES, "--verbose")
    out = capsys.readouterr().out
    assert out.count("\n----") == 2 and "(2 missed)" in out and "nothing" in out


def test_paths_and_the_next_command_hold_where_one_stands(make_run, tmp_path, capsys, monkeypatch):
    make_run()
    monkeypatch.chdir(tmp_path)
    assert test_LA.main(["--exp", "a", "--model_path", ".", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(path in lines[-2] for path in ("a/metrics.csv", "a/predictions", "a/figures"))
    python, script, *argv = shlex.split(lines[-1].partition(": ")[2])
    assert python == "python" and Path(script) == Path(test_LA.__file__)
    assert test_LA.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "report: a/report.html" in lines and "predict.py" in lines[-1]


def test_the_reported_output_and_filter_are_those_of_the_flags(make_run, phantom):
    folder = make_run()
    content = score(folder, "--head", "dark", "--post", "lcc", "--skip", "figures")
    assert content["reported"] == {"head": "dark", "post": "lcc", "weights": "last"}
    mask = np.asarray(nib.load(folder / runs.PREDICTIONS / f"{CASES[0]}.nii.gz").dataobj).astype(bool)
    np.testing.assert_array_equal(mask, largest_component(read(phantom, CASES[0], "image") < 1.5))


@pytest.mark.parametrize("names", ["a b", "a a"])
def test_runs_are_compared_case_by_case(make_run, tmp_path, capsys, names):
    make_run("a", level=1.5), make_run("b", level=0.5)
    argv = ["--model_path", str(tmp_path), "--device", "cpu", *NO_FILES]
    assert test_LA.main(["--exp", *names.split(), *argv]) == 0
    out = capsys.readouterr().out
    dice = {
        exp: [float(r["dice"]) for r in rows_of(tmp_path / exp) if (r["head"], r["post"]) == ("seg", "none")]
        for exp in set(names.split())
    }
    difference = 100 * (np.mean(dice[names[-1]]) - np.mean(dice["a"]))
    assert out.count("\n---") == 1 and f"{difference:+.2f} [" in out


# --- which settings: flags > --compat if given > those of the training


def options_of(trained: Namespace, *argv: str) -> Namespace:
    return test_LA.parse_options(["--exp", "a", *argv], "a", vars(trained))


def test_settings_come_from_the_training_unless_given(tiny_options):
    trained = tiny_options("dtml", "--post", "lcc", "--split", "dev", "--model_path", "/elsewhere", "--compile")
    options = options_of(trained)
    assert (options.post, options.split, options.stride_xy) == ("lcc", "dev", 16)
    assert options_of(trained, "--post", "none").post == "none"
    assert options.patch_size == [32, 32, 32]
    assert (options.device, options.gpu, options.compile, options.model_path) == (None, None, False, "model")


@pytest.mark.parametrize(
    ("trained", "given", "expected"),  # post, eval_empty, head
    [
        ("", "", ("none", "nan", None)),
        ("", "--compat public", ("lcc", "zeros", None)),
        ("", "--compat public --post none", ("none", "zeros", None)),
        ("--compat public", "", ("lcc", "zeros", None)),
        ("--compat public", "--eval_empty nan", ("lcc", "nan", None)),
        ("--compat public", "--compat off", ("none", "nan", None)),
        ("--compat public", "--compat off --post lcc", ("lcc", "nan", None)),
        ("--compat public --post none --head mean", "", ("none", "zeros", "mean")),
        ("--compat public --post none --head mean", "--compat public", ("lcc", "zeros", None)),
        ("--compat public --post none --head mean", "--compat off", ("none", "nan", "mean")),  # its own choice stays
    ],
)
def test_compat_is_taken_from_the_training_or_from_the_flag(tiny_options, trained, given, expected):
    options = options_of(tiny_options("dtml", *trained.split()), *given.split())
    assert (options.post, options.eval_empty, options.head) == expected
    assert options.flip == ("always" if "public" in trained else "random")  # what it was trained with stays


# --- bad input


def test_runs_are_known_before_the_first_is_scored(make_run, tmp_path):
    folder = make_run()
    before = sorted(folder.iterdir())
    error = refused(*where(folder), "--exp", "a", "b")
    assert "'b'" in error and "--exp" in error and sorted(folder.iterdir()) == before


def test_a_checkpoint_that_is_missing_damaged_or_of_another_network(make_run):
    folder = make_run()
    (folder / runs.BEST_VAL).unlink()
    assert runs.BEST_VAL in refused(*where(folder, "--weights", "best_val"))
    state = runs.load_checkpoint(folder / runs.LAST)
    runs.save_checkpoint(folder / runs.LAST, state | {"networks": {"other": torch.zeros(1)}})
    assert str(folder / runs.LAST) in refused(*where(folder))
    os.truncate(folder / runs.LAST, 100)
    assert str(folder / runs.LAST) in refused(*where(folder))
    another = state | {"options": state["options"] | {"method": "of_later"}}
    runs.save_checkpoint(folder / runs.LAST, another)
    assert all(word in refused(*where(folder)) for word in ("of_later", "METHODS", "--exp"))


@pytest.mark.parametrize("group", TRAINED_ON)
def test_cases_known_from_training_are_refused(make_run, group):
    folder = make_run(cases=TRAINED_ON | {group: [CASES[1]]})
    error = refused(*where(folder))
    assert CASES[1] in error and "--test_list" in error and not (folder / runs.METRICS_CSV).exists()


def test_a_training_case_under_another_id_is_refused(make_run, phantom, tmp_path):
    scans = Path(shutil.copytree(phantom, tmp_path / "scans"))
    shutil.copytree(scans / CASES[1], scans / "copy")
    (scans / "test.list").write_text("copy\n")
    error = refused(*where(make_run(cases=TRAINED_ON | {"unlabeled": [CASES[1]]}), "--root_path", str(scans)))
    assert CASES[1] in error and "copy" in error and "--test_list" in error


def without_label(file: h5py.File) -> None:
    del file["label"]


def with_another_shape(file: h5py.File) -> None:
    del file["label"]
    file["label"] = np.zeros((3, 3, 3), np.uint8)


def with_nan(file: h5py.File) -> None:
    file["image"][0, 0, 0] = math.nan


@pytest.mark.parametrize("damage", [without_label, with_another_shape, with_nan, "truncated", "missing"])
def test_a_damaged_case_is_refused_before_anything_is_written(make_run, phantom, tmp_path, damage):
    folder, scans = make_run(), Path(shutil.copytree(phantom, tmp_path / "scans"))
    path = scans / CASES[1] / "mri_norm2.h5"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        with h5py.File(path, "r+") as file:
            damage(file)
    before = sorted(folder.iterdir())
    assert str(path) in refused(*where(folder, "--root_path", str(scans)))
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--head mean", "--head dark nothing"),
        ("--test_list nowhere.list", "nowhere.list --test_list"),
        ("--root_path nowhere", "nowhere --root_path"),
        ("--stride_z 0", "--stride_z"),
        ("--stride_xy 33", "--stride_xy"),
        ("--score_workers -1", "--score_workers"),
        ("--report --skip predictions", "--report --skip"),
        ("--gpu 0", "--gpu"),
        ("--amp fp16", "--amp"),
        ("--exp ../a", "--exp"),
        ("--device cuda", "--device"),
    ],
)
def test_flags_that_make_no_sense(make_run, monkeypatch, flags, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = refused(*where(make_run(), *NO_FILES, *flags.split()))
    assert all(word in error for word in named.split()), error


def test_a_lack_of_memory_names_the_flag(make_run, monkeypatch):
    monkeypatch.setattr(Bright, "predict", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("of a GPU")))
    assert "--window_batch" in refused(*where(make_run()))


def test_a_full_disk(make_run, monkeypatch):
    folder = make_run()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert str(folder / runs.METRICS_CSV) in refused(*where(folder, *NO_FILES))
    assert not list(folder.glob(".*"))


def test_scores_that_differ_from_medpy_are_no_scores(make_run, monkeypatch):
    evaluate, folder = scoring.evaluate, make_run()
    monkeypatch.setattr(scoring, "evaluate", lambda *args: evaluate(*args) | {"dice": 0.123})
    score(folder, *NO_FILES)
    with pytest.raises(RuntimeError, match="dice"):
        score(folder, *NO_FILES, "--verify_metrics")


# --- several processes


EVERY_FILE = pytest.mark.parametrize("flags", [("--skip", "figures"), pytest.param((), marks=pytest.mark.slow)])


def assert_same_files(first: Path, second: Path, flags: tuple[str, ...]) -> None:
    """Scores, predictions and pictures, to the last byte; but for what names the run or was timed."""
    assert (first / runs.METRICS_CSV).read_bytes() == (second / runs.METRICS_CSV).read_bytes()
    contents = [strict_json(folder / runs.METRICS_JSON) for folder in (first, second)]
    for content in contents:
        del content["exp"], content["test_seconds"], content["date"], content["options"]
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
    predict = scoring.predict_labels

    def noted(method, case, *rest):
        with (tmp_path / "noted").open("a") as file:
            file.write(f"{os.environ['RANK']} {case}\n")
        return predict(method, case, *rest)

    monkeypatch.setattr(scoring, "predict_labels", noted)
    outcomes = in_ranks(lambda: test_LA.main(where(shared, *flags)), size)
    assert [outcome.status for outcome in outcomes] == [0] * size, outcomes
    assert [outcome.output for outcome in outcomes[1:]] == [""] * (size - 1)
    assert outcomes[0].output.count("mean ± sd") == 1
    assert_same_files(alone, shared, flags)
    assert sorted((tmp_path / "noted").read_text().splitlines()) == [f"{i} {case}" for i, case in enumerate(CASES)]


@pytest.mark.parametrize("flags", [("--head", "mean"), ("--stride_z", "0")])
def test_bad_input_of_a_test_is_said_by_one_rank(make_run, in_ranks, flags):
    argv = where(make_run(), *flags)
    first, second = in_ranks(lambda: test_LA.main(argv))
    assert (first.status, second.status, second.output) == (2, 2, "")
    assert first.output.count("error: ") == 1 and flags[0] in first.output


@EVERY_FILE
def test_cases_scored_in_processes_give_the_same_files(make_run, flags):
    alone, shared = make_run("alone"), make_run("shared")
    score(alone, "--score_workers", "0", *flags), score(shared, "--score_workers", "2", *flags)
    assert_same_files(alone, shared, flags)


@pytest.mark.parametrize(
    ("cores", "asked", "cases", "ranks", "workers"),
    [(8, 3, 2, 1, 2), (8, 3, 20, 1, 3), (8, None, 7, 1, 0), (8, None, 8, 1, 3), (8, None, 10, 2, 1)]
    + [
        (1, None, 20, 1, 0),
        (2, None, 20, 1, 0),
        (3, None, 20, 1, 1),
        (1, None, 20, 2, 0),
        (100, None, 20, 1, scoring.MAX_WORKERS),
    ],
)
def test_how_many_processes_score(monkeypatch, cores, asked, cases, ranks, workers):
    monkeypatch.setattr(scoring, "available_cores", lambda: cores)
    assert scoring.score_workers(Namespace(score_workers=asked), cases, Ranks(0, ranks, 0, ranks)) == workers
