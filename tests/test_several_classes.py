"""Two classes from training to scores, report and masks; on real scans as docs/several_classes.md does it."""

import csv
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from medpy.metric import binary

import predict
import prepare_scans
import test_LA
import train
from dataloaders import case_files
from evaluation.metrics import largest_components
from methods import METHODS
from methods.base import Method
from paper.jobs import Job
from paper.work import draw_figure
from runtime import runs
from scans.classes import dataset_names
from utils.errors import InputError
from utils.labels import MEAN, LabelClass, classes_as_record

NAMES = ["atrium", "appendage"]
SMALL = "--patch_size 32 32 32 --n_filters 2 --batch_size 2 --labelnum 3 --max_iterations 2 --image_every 0".split()


def rows_in(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def model(two_classes, phantom, tmp_path_factory) -> Path:
    """Runs `two` and `other`, of two classes, and `one`, of one; so short that they mark something everywhere."""
    folder = tmp_path_factory.mktemp("model")
    for exp, root, method in (
        ("two", two_classes, "supervised"),
        ("other", two_classes, "dtml"),
        ("one", phantom, "dtml"),
    ):
        flags = ["--preset", "demo", *SMALL, "--device", "cpu", "--method", method, "--root_path", root]
        assert train.main([*map(str, flags), "--model_path", str(folder), "--exp", exp]) == 0
    return folder


@pytest.fixture
def copied(model, tmp_path) -> list[str]:
    """The flags that name a copy of the runs."""
    return ["--model_path", str(shutil.copytree(model, tmp_path / "model")), "--device", "cpu"]


def test_scores_of_each_class_and_their_mean(copied, two_classes, tmp_path, capsys):
    assert test_LA.main(["--exp", "two", "--verify_metrics", *copied]) == 0
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines() if line.startswith((*NAMES, "mean"))] == [
        "mean ± sd",
        *NAMES,
    ]
    folder = tmp_path / "model" / "two"
    rows, content = rows_in(folder / runs.METRICS_CSV), json.loads((folder / runs.METRICS_JSON).read_text())
    cases = case_files.read_list(two_classes / "test.list", "")
    assert [(row["case"], row["class"]) for row in rows if row["post"] == "none"] == [
        (case, name) for case in cases for name in (*NAMES, MEAN)
    ]
    for case in cases:
        label = case_files.read_label(two_classes, case, 2)
        mask = np.asarray(nib.load(folder / runs.PREDICTIONS / f"{case}.nii.gz").dataobj)
        for post, found in (("none", mask), ("lcc", largest_components(mask))):
            dice = [binary.dc(found == number, label == number) for number in (1, 2)]
            scored = [float(row["dice"]) for row in rows if (row["case"], row["post"]) == (case, post)]
            np.testing.assert_allclose(scored, [*dice, np.mean(dice)])
    assert [one["name"] for one in content["classes"]] == NAMES
    means = {name: summary["seg/none"]["dice"]["mean"] for name, summary in content["class_summary"].items()}
    assert content["summary"]["seg/none"]["dice"]["mean"] == pytest.approx(np.mean([*means.values()]))


def test_runs_are_compared_by_their_mean_or_by_a_class(copied, capsys):
    for flags, said in (([], "atrium, appendage"), (["--class", "appendage"], "appendage")):
        assert test_LA.main(["--exp", "two", "other", "--skip", "figures", *copied, *flags, "--report"]) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, word",
    [(["--exp", "two", "--class", "valve"], "--class"), (["--exp", "one", "--class", "foreground"], "--class")],
)
def test_a_class_that_a_run_does_not_have(copied, flags, word, tmp_path):
    with pytest.raises(InputError, match=word):
        test_LA.main([*flags, *copied])
    assert not (tmp_path / "model" / flags[1] / runs.METRICS_JSON).exists()


@pytest.mark.parametrize("exp", ["one", "two"])
def test_a_test_folder_of_other_classes_is_refused(copied, two_classes, phantom, tmp_path, exp):
    other = {"one": two_classes, "two": phantom}[exp]
    with pytest.raises(InputError, match="--root_path"):
        test_LA.main(["--exp", exp, "--root_path", str(other), *copied])
    assert not (tmp_path / "model" / exp / runs.METRICS_JSON).exists()


@pytest.fixture
def unnamed(two_classes, tmp_path) -> Path:
    """A copy of the folder of two classes whose cases record none."""
    folder = Path(shutil.copytree(two_classes, tmp_path / "unnamed"))
    for path in folder.glob("*/*.h5"):
        with h5py.File(path, "a") as file:
            del file.attrs[case_files.NAMES_KEY], file.attrs[case_files.VALUES_KEY]
    return folder


def test_classes_that_no_case_records_are_trained_tested_and_drawn(unnamed, tmp_path):
    where = ["--model_path", str(tmp_path), "--device", "cpu"]
    flags = ["--preset", "demo", *SMALL, "--method", "supervised", "--root_path", str(unnamed), "--num_classes", "2"]
    assert train.main([*flags, *where, "--exp", "run"]) == 0
    assert test_LA.main(["--exp", "run", *where]) == 0
    assert {row["class"] for row in rows_in(tmp_path / "run" / runs.METRICS_CSV)} > {MEAN}
    trained = Namespace(**runs.load_checkpoint(tmp_path / "run" / runs.LAST)["options"])
    job = Job("v_net", "run", (), trained, tmp_path)
    draw_figure(Namespace(seeds=[trained.seed], only=["v_net"], cases=["phantom_007"]), [job], tmp_path)
    assert (tmp_path / "figure2.png").exists()


def test_a_run_of_named_classes_is_not_tested_on_cases_that_record_none(copied, unnamed, tmp_path):
    path = tmp_path / "model" / "two" / runs.LAST
    for names in (NAMES, ("class 1", "class 2")):  # the latter are recorded by prepare_scans.py --classes 1,2
        classes = [LabelClass(name, (number,)) for number, name in enumerate(names, 1)]
        runs.save_checkpoint(path, runs.load_checkpoint(path) | {"classes": classes_as_record(classes)})
        with pytest.raises(InputError, match="--root_path"):
            test_LA.main(["--exp", "two", "--root_path", str(unnamed), *copied])


class Bands(Method):
    """Intensities about 1 are the first class, about 2 the second."""

    outputs, exclusive = ("seg",), True

    def predict(self, image, outputs=None):
        levels = torch.arange(3).view(1, 3, 1, 1, 1)
        return {"seg": torch.softmax(-4 * (image - levels).square(), dim=1)[:, 1:]}


def test_masks_have_the_values_of_the_label_files(copied, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "supervised", Bands)
    path = tmp_path / "model" / "two" / runs.LAST
    state = runs.load_checkpoint(path) | {"networks": {}}
    state["classes"] = [{"name": "left, upper", "values": [420, 1]}, {"name": "b", "values": [7]}]
    runs.save_checkpoint(path, state)
    rng, affine = np.random.default_rng(0), np.diag([2.0, 1.0, 1.5, 1.0])
    nib.save(nib.Nifti1Image(rng.normal(size=(30, 34, 32)).astype(np.float32), affine), tmp_path / "scan.nii.gz")
    where = ["--input", str(tmp_path / "scan.nii.gz"), "--output", str(tmp_path / "out")]
    assert predict.main(["--exp", "two", *copied, *where, "--save", "prob", "--post", "none"]) == 0
    assert "labels.txt" in capsys.readouterr().out.splitlines()[-1]
    image = nib.load(tmp_path / "out" / "scan.nii.gz")
    np.testing.assert_allclose(image.affine, affine)
    mask = np.asarray(image.dataobj)
    assert mask.dtype == np.uint16 and set(np.unique(mask)) == {0, 7, 420}
    names = ("scan_prob_left_upper.nii.gz", "scan_prob_b.nii.gz")
    prob = np.stack([np.asarray(nib.load(tmp_path / "out" / name).dataobj) for name in names])
    background = 1 - prob.sum(axis=0)
    expected = np.where(prob.max(axis=0) > background, np.array([420, 7])[prob.argmax(axis=0)], 0)
    np.testing.assert_array_equal(mask, expected)
    (row,) = rows_in(tmp_path / "out" / runs.PREDICTIONS_CSV)
    for name, value in (("left, upper", 420), ("b", 7)):
        assert float(row[f"volume_ml_{name}"]) == pytest.approx((mask == value).sum() * 3 / 1000, abs=5e-4)
    assert float(row["volume_ml"]) == pytest.approx((mask > 0).sum() * 3 / 1000, abs=5e-4)
    shutil.copy(tmp_path / "out" / "labels.json", tmp_path / "dataset.json")
    assert dataset_names(tmp_path) == {420: "left, upper", 7: "b"}
    lines = [line.split(maxsplit=7) for line in (tmp_path / "out" / "labels.txt").read_text().splitlines()]
    assert [(line[0], line[-1]) for line in lines[-2:]] == [("420", '"left, upper"'), ("7", '"b"')]


def test_one_class_is_written_as_ever(copied, tmp_path, two_classes, phantom):
    case = case_files.case_path(phantom, "phantom_007")
    assert predict.main(["--exp", "one", *copied, "--input", str(case), "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "phantom_007.nii.gz",
        "predictions.csv",
        "predictions.json",
    }


def test_an_ensemble_has_one_set_of_classes(copied, two_classes, tmp_path):
    where = ["--input", str(case_files.case_path(two_classes, "phantom_007")), "--output", str(tmp_path / "out")]
    assert predict.main(["--exp", "two", "other", *copied, *where]) == 0
    with pytest.raises(InputError, match="--exp two and one"):
        predict.main(["--exp", "two", "one", *copied, *where, "--overwrite"])


@pytest.fixture
def hippocampus() -> Path:
    """The folder of the scans with scans.csv, as docs/hippocampus.md has it."""
    folder = os.environ.get("DTML_HIPPOCAMPUS_DIR")
    if not folder or not (Path(folder) / "scans.csv").is_file():
        pytest.skip("no hippocampus scans: set DTML_HIPPOCAMPUS_DIR to the folder with scans.csv")
    return Path(folder)


@pytest.mark.data
def test_anterior_and_posterior_hippocampus(hippocampus, tmp_path):
    """docs/several_classes.md with a V-Net of 300 iterations, which learns both classes, and a DTML of 20."""
    data, where = tmp_path / "data", ["--model_path", str(tmp_path / "model"), "--device", "cpu"]
    flags = ["--images", hippocampus / "scans.csv", "--dest", data, "--classes", "anterior=1,posterior=2"]
    assert prepare_scans.main([*map(str, flags)]) == 0
    cases = case_files.read_list(data / "test.list", "")[:8]
    case_files.write_list(data / "few.list", cases)
    for method, iterations in (("supervised", "300"), ("dtml", "20")):
        run = ["--method", method, "--preset", "hippocampus", "--exp", method, "--max_iterations", iterations]
        assert train.main([*run, "--root_path", str(data), "--image_every", "0", *where]) == 0
    assert test_LA.main(["--exp", "supervised", "dtml", "--test_list", str(data / "few.list"), *where]) == 0
    summary = json.loads((tmp_path / "model" / "supervised" / runs.METRICS_JSON).read_text())["class_summary"]
    assert all(summary[name]["seg/none"]["dice"]["mean"] > 0.5 for name in ("anterior", "posterior"))
    with open(hippocampus / "scans.csv", newline="") as file:
        images = {row["id"]: row for row in csv.DictReader(file)}
    scan = hippocampus / images[cases[0]]["image"]
    assert predict.main(["--exp", "supervised", "--input", str(scan), "--output", str(tmp_path / "out"), *where]) == 0
    found, truth = nib.load(tmp_path / "out" / scan.name), nib.load(hippocampus / images[cases[0]]["label"])
    np.testing.assert_allclose(found.affine, truth.affine)
    for value in (1, 2):
        assert binary.dc(np.asarray(found.dataobj) == value, np.asarray(truth.dataobj) == value) > 0.5
