"""The prediction command: masks lie over their scans, what a run folder alone decides, what is refused."""

import csv
import errno
import fcntl
import json
import os
import shlex
import shutil
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

import predict
import train
from dataloaders.case_files import read_image, read_spacing
from evaluation.metrics import largest_component
from inference import plan, segmenting
from inference.predictions import Predictions
from methods import METHODS
from methods.base import Method
from runtime import runs
from utils import files
from utils.errors import InputError, run_script

LEVEL = 1.0  # of the z-scored image
SHAPE = (26, 22, 18)
TYPICAL = {"shape": [12.0, 10.0, 9.0], "spacing_mm": [1.0, 1.0, 1.0], "orientation": "LPS", "mean": 0.0}


class Bright(Method):
    """Calls voxels above `level` foreground, with a map of the same sign; or, with a kernel, what a filter likes."""

    outputs = ("seg", "dark")

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.level = nn.Parameter(torch.tensor(LEVEL))
        self.kernel = nn.Parameter(torch.zeros(1, 1, 3, 3, 3))
        self.kernel.data[..., 1, 1, 1] = 1

    def predict(self, image, outputs=None):
        bright = torch.sigmoid(4 * (F.conv3d(image, self.kernel, padding=1) - self.level))
        probs = {"seg": bright, "dark": 1 - bright}
        return {name: probs[name] for name in outputs or self.outputs}

    def signed_maps(self, image):
        return {"sdm": torch.tanh(self.level - image)}


class Mapless(Bright):
    """Without a signed distance map."""

    def signed_maps(self, image):
        return {}


@pytest.fixture
def make_run(tmp_path, monkeypatch, tiny_options) -> Callable[..., Path]:
    """A run of `Bright`, as if trained on data that are gone; returns its folder."""
    monkeypatch.setitem(METHODS, "supervised", Bright)
    monkeypatch.setitem(METHODS, "dtml", Mapless)

    def build(exp: str = "a", *flags: str, method: str = "supervised", **changes) -> Path:
        where = ("--root_path", str(tmp_path / "gone"), "--model_path", str(tmp_path / "model"), "--exp", exp)
        options = tiny_options(method, *where, *flags)
        networks = METHODS[method](options).state_dict()
        weights = {name: changes.pop(name) for name in set(networks) & set(changes)}
        networks |= {name: torch.as_tensor(value, dtype=torch.float32) for name, value in weights.items()}
        folder = tmp_path / "model" / exp
        folder.mkdir(parents=True)
        files.write_json(folder / runs.OPTIONS, vars(options))
        state = {"networks": networks, "options": vars(options), "iteration": 7, "typical_scan": TYPICAL, **changes}
        runs.save_checkpoint(folder / runs.LAST, state)
        return folder

    return build


def affine(seed: int, spacing=(1.0, 1.0, 1.0), order=(0, 1, 2)) -> np.ndarray:
    """A geometry: a rotation about a random axis (none for seed 0), axes exchanged and flipped for odd seeds."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0] if seed else np.eye(3)
    matrix = np.eye(4)
    matrix[:3, :3] = turn[:, list(order)] * ([-1, 1, 1] if seed % 2 else [1, 1, 1]) * spacing
    matrix[:3, 3] = rng.normal(0, 40, 3)
    return matrix


def blob(shape=SHAPE, seed: int = 0, centre=(0.6, 0.45, 0.5)) -> np.ndarray:
    """Int16 scan: a bright ellipsoid off the centre, a small bright spot apart, noise."""
    axes = np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij")
    distance = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, (0.2, 0.25, 0.22), strict=True))
    image = 100 + 400 * (distance < 1) + np.random.default_rng(seed).normal(0, 10, shape)
    image[1:3, 1:3, 1:3] = 500
    return image.astype(np.int16)


def write(path: Path, array: np.ndarray, matrix: np.ndarray) -> Path:
    """A scan by the library of its format, not by ours."""
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(array, matrix), path)
        return path
    image = sitk.GetImageFromArray(array.T)
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    lps = np.diag([-1, -1, 1])
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((lps @ matrix[:3, 3]).tolist())
    image.SetDirection((lps @ matrix[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path))
    return path


def z_scored(array: np.ndarray) -> np.ndarray:
    return (array - array.mean(dtype=float)) / array.std(dtype=float)


def run(folder: Path, scan: Path, out: Path, *flags: str, status: int = 0) -> Path:
    """Segment with one run on the CPU; returns the output folder."""
    where = ["--exp", folder.name, "--model_path", str(folder.parent), "--input", str(scan), "--output", str(out)]
    assert predict.main([*where, "--device", "cpu", *flags]) == status
    return out


def rows_of(out: Path) -> dict[str, dict[str, str]]:
    with open(out / runs.PREDICTIONS_CSV, newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def load(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def refused(capsys, *argv: str) -> str:
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_script(lambda: predict.main([*argv, "--device", "cpu"]))
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# --- the mask lies over the scan

GEOMETRIES = {
    "plain": affine(0),
    "anisotropic": affine(0, (0.6, 0.7, 2.5)),
    "flipped and rotated": affine(1, (0.7, 0.7, 1.5)),
    "rotated, axes exchanged": affine(2, (1.2, 0.8, 0.9), (2, 1, 0)),
    "flipped, axes exchanged": affine(3, (0.5, 1.5, 0.8), (1, 2, 0)),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_a_mask_has_the_grid_of_its_scan(make_run, tmp_path, geometry, suffix):
    matrix, array = GEOMETRIES[geometry], blob()
    scan = write(tmp_path / f"heart{suffix}", array, matrix)
    out = run(make_run(), scan, tmp_path / "out", "--post", "none")
    mask = nib.load(out / "heart.nii.gz")
    np.testing.assert_allclose(mask.affine, matrix, atol=1e-4)
    np.testing.assert_array_equal(load(out / "heart.nii.gz"), z_scored(array) > LEVEL)
    seen_by_itk, itk_scan = sitk.ReadImage(str(out / "heart.nii.gz")), sitk.ReadImage(str(scan))
    assert seen_by_itk.GetSize() == itk_scan.GetSize()
    for corner in ((0, 0, 0), (25, 0, 0), (0, 21, 0), (25, 21, 17)):
        places = [image.TransformIndexToPhysicalPoint(corner) for image in (seen_by_itk, itk_scan)]
        np.testing.assert_allclose(*places, atol=1e-3)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_after_resampling_the_mask_still_lies_over_the_scan(make_run, tmp_path, geometry):
    matrix, array = GEOMETRIES[geometry], blob((52, 44, 36))
    record = {"spacing_mm": [0.9, 0.8, 1.1], "orientation": "RAS"}
    out = run(make_run(preprocessing=record), write(tmp_path / "heart.nrrd", array, matrix), tmp_path / "out")
    mask = load(out / "heart.nii.gz").astype(bool)
    body, _ = ndimage.label(z_scored(array) > LEVEL)
    expected = body == body[31, 20, 18]
    assert mask.shape == array.shape
    assert 2 * (mask & expected).sum() / (mask.sum() + expected.sum()) > 0.93
    apart = np.subtract(ndimage.center_of_mass(mask), ndimage.center_of_mass(expected))
    assert np.abs(apart).max() < 0.15  # voxels


@pytest.mark.parametrize(
    "asked, source, written",
    [
        ("nrrd", "heart.nii", "heart.nrrd"),
        ("mha", "heart.nrrd", "heart.mha"),
        ("input", "heart.nrrd", "heart.nrrd"),
        ("input", "heart.nii", "heart.nii.gz"),
        ("input", "heart.nhdr", "heart.nrrd"),
        ("input", "heart.mhd", "heart.mha"),
    ],
)
def test_formats(make_run, tmp_path, asked, source, written):
    scan = write(tmp_path / source, blob(), GEOMETRIES["flipped and rotated"])
    out = run(make_run(), scan, tmp_path / "out", "--format", asked, "--post", "none")
    image = sitk.ReadImage(str(out / written))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, z_scored(blob()) > LEVEL)
    np.testing.assert_allclose(image.GetOrigin(), sitk.ReadImage(str(scan)).GetOrigin(), atol=1e-3)
    assert rows_of(out)["heart"]["output"] == written


SHEARED = affine(1)
SHEARED[:3, 0] += 0.3 * SHEARED[:3, 1]


def test_every_viewer_lays_the_mask_over_its_scan(make_run, tmp_path):
    """Some go by the sform, others, with ITK, by the qform."""
    image = nib.Nifti1Image(blob(), affine(0))
    image.set_qform(affine(1), 1), image.set_sform(affine(2), 2)
    nib.save(image, tmp_path / "heart.nii.gz")
    out = run(make_run(), tmp_path / "heart.nii.gz", tmp_path / "out")
    one, other = (nib.load(path / "heart.nii.gz").header for path in (tmp_path, out))
    for form in ("sform", "qform"):
        (place, code), (same, again) = (getattr(header, f"get_{form}")(coded=True) for header in (one, other))
        assert code == again > 0
        np.testing.assert_allclose(place, same, atol=1e-5)


def test_a_sheared_scan_keeps_its_grid(make_run, tmp_path, capsys):
    scan, folder = write(tmp_path / "heart.nii.gz", blob(), SHEARED), make_run()
    out = run(folder, scan, tmp_path / "out")
    np.testing.assert_allclose(nib.load(out / "heart.nii.gz").affine, SHEARED, atol=1e-4)
    assert "3D Slicer" not in capsys.readouterr().out  # which lays scan and mask alike
    leaning = sitk.GetImageFromArray(blob().T)
    leaning.SetDirection((1, 0, 0.6, 0, 1, 0, 0, 0, 0.8))
    sitk.WriteImage(leaning, str(tmp_path / "leaning.nrrd"))
    run(folder, tmp_path / "leaning.nrrd", tmp_path / "other")
    assert "3D Slicer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, matrix, changes, remedy",
    [
        (["--format", "nrrd"], SHEARED, {}, ".nii.gz"),
        (["--roi", "center"], affine(0), {"typical_scan": None}, "--roi"),
        (["--stride_z", "33"], affine(0), {}, "--stride_z"),
    ],
)
def test_what_keeps_one_scan_from_its_mask_is_in_its_row(make_run, tmp_path, flags, matrix, changes, remedy):
    scan = write(tmp_path / "heart.nii.gz", blob(), matrix)
    assert remedy in rows_of(run(make_run(**changes), scan, tmp_path / "out", *flags, status=1))["heart"]["error"]


def test_maps_by_flag(make_run, tmp_path):
    array = blob()
    scan = write(tmp_path / "heart.nii.gz", array, affine(1))
    out = run(make_run(), scan, tmp_path / "out", "--save", "prob", "sdm")
    prob, sdm = (load(out / f"heart_{name}.nii.gz") for name in ("prob", "sdm"))
    np.testing.assert_allclose(prob, 1 / (1 + np.exp(-4 * (z_scored(array) - LEVEL))), atol=1e-5)
    np.testing.assert_allclose(sdm, np.tanh(LEVEL - z_scored(array)), atol=1e-5)
    assert nib.load(out / "heart_prob.nii.gz").get_data_dtype() == np.float32
    plain = run(make_run("b"), scan, tmp_path / "plain")
    assert not list(plain.glob("*_prob*")) and not list(plain.glob("*_sdm*"))


def test_the_largest_component_is_the_default(make_run, tmp_path):
    array = blob()
    scan, folder = write(tmp_path / "heart.nii.gz", array, affine(0)), make_run("a", "--post", "none")
    alone = load(run(folder, scan, tmp_path / "lcc") / "heart.nii.gz")
    both = load(run(folder, scan, tmp_path / "none", "--post", "none") / "heart.nii.gz")
    parts, count = ndimage.label(both, np.ones((3, 3, 3)))
    assert count == 2 and both[1, 1, 1] and not alone[1, 1, 1]
    np.testing.assert_array_equal(alone, parts == np.bincount(parts.ravel())[1:].argmax() + 1)


# --- what the run decides


def test_a_run_folder_copied_elsewhere_suffices(make_run, tmp_path):
    folder = make_run("a", "--head", "dark", "--scale", "0.5")
    moved = shutil.copytree(folder, tmp_path / "other machine" / "renamed")
    shutil.rmtree(folder.parent)
    scan = write(tmp_path / "heart.nii.gz", blob(), affine(0))
    out = run(moved, scan, tmp_path / "out")
    made_with = json.loads((out / runs.PREDICTIONS_JSON).read_text())["runs"][0]
    assert (made_with["exp"], made_with["head"], made_with["scale"]) == ("renamed", "dark", 0.5)
    assert load(out / "heart.nii.gz")[0, 0, 10] and not load(out / "heart.nii.gz")[15, 10, 9]
    assert load(run(moved, scan, tmp_path / "seg", "--head", "seg") / "heart.nii.gz")[15, 10, 9]


def test_another_engine_gives_the_same_maps(make_run, tmp_path):
    pytest.importorskip("openvino")
    folder, scan = make_run(), write(tmp_path / "scan.nii.gz", blob(), affine(0))
    flags = ("--save", "prob", "sdm", "--tta", "all")
    torchs, openvinos = (run(folder, scan, tmp_path / e, *flags, "--engine", e) for e in ("torch", "openvino"))
    for name in ("scan_prob", "scan_sdm"):
        np.testing.assert_allclose(load(openvinos / f"{name}.nii.gz"), load(torchs / f"{name}.nii.gz"), atol=1e-4)
    with pytest.raises(InputError, match="engine"):
        run(folder, scan, torchs, *flags, "--engine", "openvino", "--resume")


def test_given_window_settings_before_protocol_before_run(make_run, tmp_path):
    folder = make_run("a", "--patch_size", "48", "32", "40", "--stride_xy", "7", "--stride_z", "5")

    def windows(*argv: str) -> tuple:
        stored = runs.load_checkpoint(folder / runs.LAST)["options"]
        options = predict.parse_options(["--exp", "a", *argv], "a", stored)
        assert options.window == "patch"
        return options.stride_xy, options.stride_z, options.blend

    assert windows() == windows("--protocol", "fast") == (10, 20, "uniform")
    assert windows("--protocol", "paper") == (7, 5, "uniform")
    assert windows("--stride_z", "3", "--blend", "gaussian") == (10, 3, "gaussian")
    assert windows("--protocol", "paper", "--stride_xy", "9") == (9, 5, "uniform")


def test_from_training_to_a_mask(phantom, tmp_path):
    """A real network, by the commands themselves; the scan is one that has no label."""
    where = ["--root_path", str(phantom), "--model_path", str(tmp_path), "--exp", "run", "--device", "cpu"]
    small = "--preset demo --patch_size 32 32 32 --n_filters 2 --batch_size 2 --labelnum 3 --image_every 0".split()
    assert train.main(["--method", "dtc", *small, *where, "--max_iterations", "1"]) == 0
    scan = write(tmp_path / "scan.nrrd", read_image(phantom, "phantom_006"), affine(0))
    state = runs.load_checkpoint(tmp_path / "run" / runs.LAST)
    images = [read_image(phantom, case) for case in (*state["cases"]["labeled"], *state["cases"]["unlabeled"])]
    assert state["typical_scan"] == {
        "shape": np.median([image.shape for image in images], axis=0).tolist(),
        "spacing_mm": list(read_spacing(phantom, "phantom_000")),
        "orientation": "LPS",
        "mean": pytest.approx(np.median([image.mean() for image in images]), abs=1e-5),
    }
    out = run(tmp_path / "run", scan, tmp_path / "out", "--save", "prob", "sdm", "--roi", "center")
    assert load(out / "scan.nii.gz").shape == read_image(phantom, "phantom_006").shape
    assert -1 <= load(out / "scan_sdm.nii.gz").min() < load(out / "scan_sdm.nii.gz").max() <= 1


def test_prepared_cases_are_taken_as_they_are(make_run, tmp_path, capsys):
    """An LA crop, whose intensities were normalised before it was cut out; without a label."""
    array = blob((14, 12, 10)).astype(np.float32) / 200
    for case in ("one", "two"):
        (tmp_path / "LA" / case).mkdir(parents=True)
        with h5py.File(tmp_path / "LA" / case / "mri_norm2.h5", "w") as file:
            file["image"], file.attrs["spacing_mm"] = array, (1.0, 1.0, 1.5)
    folder = make_run(typical_scan=TYPICAL | {"spacing_mm": [1.0, 1.0, 1.5], "mean": 0.9})
    out = run(folder, tmp_path / "LA", tmp_path / "out", "--post", "none", "--format", "input")
    np.testing.assert_array_equal(load(out / "one.nii.gz"), array > LEVEL)
    np.testing.assert_allclose(nib.load(out / "two.nii.gz").affine, np.diag([-1, -1, 1.5, 1]))
    assert "warning" not in capsys.readouterr().out
    one = run(folder, tmp_path / "LA" / "two" / "mri_norm2.h5", tmp_path / "single")
    assert list(rows_of(one)) == ["two"]
    other = run(make_run("b", preprocessing={"orientation": "RAS"}), tmp_path / "LA", tmp_path / "other", status=1)
    assert "--input" in rows_of(other)["one"]["error"]


# --- several runs, several views


def test_an_ensemble_is_the_mean_of_its_members(make_run, tmp_path):
    scan = write(tmp_path / "heart.nii.gz", blob(), affine(1, (0.7, 0.7, 1.5)))
    make_run("a"), make_run("b", level=2.0), make_run("c", preprocessing={"spacing_mm": [1.0, 1.0, 1.0]})
    where = ["--model_path", str(tmp_path / "model"), "--input", str(scan), "--device", "cpu", "--save", "prob", "sdm"]
    maps = {}
    for exps in ("a", "b", "c", "abc"):
        assert predict.main(["--exp", *exps, "--output", str(tmp_path / exps), *where]) == 0
        maps[exps] = [load(tmp_path / exps / f"heart_{name}.nii.gz") for name in ("prob", "sdm")]
    for index in range(2):
        expected = np.mean([maps[exp][index] for exp in "abc"], axis=0)
        np.testing.assert_allclose(maps["abc"][index], expected, atol=1e-6)
        assert np.abs(maps["abc"][index] - maps["a"][index]).max() > 0.1
    np.testing.assert_array_equal(load(tmp_path / "abc" / "heart.nii.gz"), largest_component(maps["abc"][0] > 0.5))


def turned(array: np.ndarray, turns: int, flip: int | None) -> np.ndarray:
    array = np.rot90(array, turns)
    return array if flip is None else np.flip(array, flip)


@pytest.mark.parametrize(
    "tta, views",
    [
        (["--tta"], [(0, None), (0, 0), (0, 1), (2, None)]),
        (["--tta", "all"], [(turns, flip) for turns in range(4) for flip in (None, 0)]),
    ],
)
def test_views_are_averaged_and_turn_with_the_scan(make_run, tmp_path, tta, views):
    """Oracle: predictions of turned scans, turned back; a filter that knows left from right."""
    kernel = np.zeros((1, 1, 3, 3, 3))
    kernel[0, 0, 1, 1, 1], kernel[0, 0, 2, 1, 1], kernel[0, 0, 1, 0, 1] = 1, 0.8, -0.5
    folder, array = make_run("a", "--patch_size", "32", "32", "32", kernel=kernel), blob((24, 24, 18))

    def prob(name: str, array: np.ndarray, *flags: str) -> np.ndarray:
        scan = write(tmp_path / f"{name}.nii.gz", np.ascontiguousarray(array), affine(0))
        return load(run(folder, scan, tmp_path / name, "--save", "prob", *flags) / f"{name}_prob.nii.gz")

    single = [prob(f"view{i}", turned(array, *view)) for i, view in enumerate(views)]
    back = [
        np.rot90(p if flip is None else np.flip(p, flip), -turns)
        for p, (turns, flip) in zip(single, views, strict=True)
    ]
    mean = prob("mean", array, *tta)
    np.testing.assert_allclose(mean, np.mean(back, axis=0), atol=1e-5)
    assert np.abs(mean - back[0]).max() > 0.1
    for i, view in enumerate(views):
        np.testing.assert_allclose(prob(f"again{i}", turned(array, *view), *tta), turned(mean, *view), atol=1e-5)


# --- region of interest


def test_a_box_restricts_the_mask_and_changes_nothing_within(make_run, tmp_path):
    array, folder = blob(), make_run()
    scan = write(tmp_path / "heart.nii.gz", array, affine(3, (0.7, 1.1, 2.0), (1, 2, 0)))
    out = run(folder, scan, tmp_path / "box", "--roi", "14:24,2:12,5:", "--save", "prob", "sdm", "--post", "none")
    expected = np.zeros(SHAPE, bool)
    expected[14:24, 2:12, 5:] = (z_scored(array) > LEVEL)[14:24, 2:12, 5:]  # scored as a whole, not as a box
    np.testing.assert_array_equal(load(out / "heart.nii.gz"), expected)
    outside = np.ones(SHAPE, bool)
    outside[14:24, 2:12, 5:] = False
    assert not load(out / "heart_prob.nii.gz")[outside].any() and (load(out / "heart_sdm.nii.gz")[outside] == 1).all()


def test_a_box_on_a_resampled_grid_is_cut_at_the_voxels_that_were_named(make_run, tmp_path):
    array = blob()
    folder = make_run(preprocessing={"spacing_mm": [1.4, 0.9, 1.3], "orientation": "LPI"}, level=-9.0)
    scan = write(tmp_path / "heart.nii.gz", array, affine(3, (0.7, 1.1, 2.0), (1, 2, 0)))
    mask = load(run(folder, scan, tmp_path / "box", "--roi", "3:9,2:12,5:16") / "heart.nii.gz")
    assert mask[3:9, 2:12, 5:16].all() and mask.sum() == 6 * 10 * 11


def test_the_central_box_has_the_size_of_the_training_volumes(make_run, tmp_path):
    folder = make_run(level=-9.0)  # everything is foreground
    scan = write(tmp_path / "heart.nii.gz", blob(), affine(0))
    mask = load(run(folder, scan, tmp_path / "out", "--roi", "center") / "heart.nii.gz")
    assert mask[7:19, 6:16, 4:13].all() and mask.sum() == 12 * 10 * 9


# --- predictions.csv


def test_rows(make_run, tmp_path):
    matrix, folder = affine(1, (0.5, 0.8, 2.0)), make_run()
    assert np.linalg.det(matrix[:3, :3]) < 0
    write(tmp_path / "scans" / "inside.nii.gz", blob(), matrix)
    write(tmp_path / "scans" / "border.nrrd", blob(centre=(0.6, 0.45, 0.9)), matrix)
    write(tmp_path / "scans" / "nothing.mha", np.where(blob() > 300, -300, blob()), matrix)
    out = run(folder, tmp_path / "scans", tmp_path / "out", "--format", "mha")
    rows = rows_of(out)
    assert list(rows) == ["border", "inside", "nothing"]
    counted = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "inside.mha"))).sum()
    assert float(rows["inside"]["volume_ml"]) == pytest.approx(counted * 0.5 * 0.8 * 2.0 / 1000, abs=1e-3)
    assert rows["inside"]["file"] == str(tmp_path / "scans" / "inside.nii.gz")
    assert {case: (row["empty"], row["touches_border"], row["error"]) for case, row in rows.items()} == {
        "border": ("no", "yes", ""),
        "inside": ("no", "no", ""),
        "nothing": ("yes", "no", ""),
    }
    assert float(rows["nothing"]["volume_ml"]) == 0 and all(float(row["seconds"]) >= 0 for row in rows.values())


def test_a_cut_by_the_box_counts_as_border(make_run, tmp_path):
    scan = write(tmp_path / "heart.nii.gz", blob(), affine(0))
    out = run(make_run(), scan, tmp_path / "out", "--roi", "15:,:,:")
    assert rows_of(out)["heart"]["touches_border"] == "yes"


def test_a_broken_scan_costs_no_other_its_mask(make_run, tmp_path, capsys):
    scans = tmp_path / "scans"
    for name in "abd":
        write(scans / f"{name}.nii.gz", blob(), affine(0))
    (scans / "c.nii.gz").write_bytes(b"no scan")
    os.symlink("e.nii.gz", scans / "e.nii.gz")
    os.truncate(scans / "b.nii.gz", 1000)
    folder = make_run()
    out = run(folder, scans, tmp_path / "out", status=1)
    rows = rows_of(out)
    assert [case for case, row in rows.items() if row["error"]] == ["b", "c", "e"] and len(rows) == 5
    assert str(scans / "c.nii.gz") in rows["c"]["error"] and rows["c"]["output"] == ""
    assert sorted(path.name for path in out.iterdir() if path.suffix == ".gz") == ["a.nii.gz", "d.nii.gz"]
    assert "(b, c, e)" in capsys.readouterr().err
    write(scans / "b.nii.gz", blob(), affine(0)), (scans / "c.nii.gz").unlink(), (scans / "e.nii.gz").unlink()
    before = (out / "a.nii.gz").stat().st_mtime_ns
    run(folder, scans, out, "--resume")
    assert (out / "b.nii.gz").exists() and (out / "a.nii.gz").stat().st_mtime_ns == before


def test_an_old_mask_does_not_stand_for_a_scan_that_failed(make_run, tmp_path):
    scan, folder, out = write(tmp_path / "heart.nii.gz", blob(), affine(0)), make_run(), tmp_path / "out"
    run(folder, scan, out)
    scan.write_bytes(b"no scan")
    run(folder, scan, out, "--overwrite", status=1)
    write(scan, blob(seed=1), affine(0))
    run(folder, scan, out, "--resume")
    assert rows_of(out)["heart"]["error"] == ""


# --- what is there already


def test_nothing_is_replaced_unless_asked_for(make_run, tmp_path, capsys):
    scan, folder, out = write(tmp_path / "scans" / "heart.nii.gz", blob(), affine(0)), make_run(), tmp_path / "out"
    argv = ["--exp", "a", "--model_path", str(folder.parent), "--input", str(scan), "--output"]
    for flags in ([], ["--overwrite"], ["--resume"]):
        assert str(scan) in refused(capsys, *argv, str(scan.parent), *flags)
    out.mkdir()
    (out / "heart.nii.gz").write_text("mine")
    assert str(out / "heart.nii.gz") in refused(capsys, *argv, str(out))
    assert (out / "heart.nii.gz").read_text() == "mine" and len(list(out.iterdir())) == 1
    run(folder, scan, out, "--overwrite")
    assert not load(out / "heart.nii.gz")[1, 1, 1]
    assert "--overwrite" in refused(capsys, *argv, str(out))
    assert "(post:" in refused(capsys, *argv, str(out), "--resume", "--post", "none")
    run(folder, scan, out, "--overwrite", "--post", "none")
    assert load(out / "heart.nii.gz")[1, 1, 1]
    argv[5] = str(write(tmp_path / "b" / "heart.nii.gz", blob(), affine(0)))
    error = refused(capsys, *argv, str(out), "--resume", "--post", "none")
    assert str(scan) in error and argv[5] in error


def test_two_scans_that_would_share_an_output(make_run, tmp_path, capsys):
    for name in ("a", "a_prob"):
        write(tmp_path / "scans" / f"{name}.nii.gz", blob(), affine(0))
    argv = ["--exp", make_run().name, "--model_path", str(tmp_path / "model"), "--input", str(tmp_path / "scans")]
    assert "a_prob.nii.gz" in refused(capsys, *argv, "--output", str(tmp_path / "o"), "--save", "prob")


def test_two_commands_share_a_folder(make_run, tmp_path, monkeypatch):
    """Each has read the rows before the other adds one; the lock is that of the folder."""
    settings, out = {"x": 1}, tmp_path / "out"
    both = [Predictions(out, settings, resume=True) for _ in range(2)]
    for case, predictions in zip("ab", both, strict=True):
        predictions.claim([], [out / f"{case}.nii.gz"])
    both[0].add("a", file="a.nii"), both[1].add("b", file="b.nii"), both[0].add("c", file="c.nii")
    assert list(both[1].rows()) == ["a", "b", "c"]
    with pytest.raises(InputError, match="--resume"):
        Predictions(out, settings).claim([], [])
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    writer = threading.Thread(target=both[0].add, args=("d",))
    writer.start()
    writer.join(0.2)
    assert writer.is_alive() and "d" not in both[0].rows()
    os.close(handle)
    writer.join(10)
    assert "d" in both[0].rows()


def test_no_mask_is_written_among_the_slices_of_a_scan(tmp_path):
    with pytest.raises(InputError, match="--output"):
        Predictions(tmp_path, {}).claim([tmp_path], [tmp_path / "a.nii.gz"])


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    predictions = Predictions(tmp_path / "out", {})
    predictions.claim([], [])
    predictions.add("a", file="a.nii")
    assert list(predictions.rows()) == ["a"]
    assert capsys.readouterr().out.count(os.strerror(errno.ENOLCK)) == 1


def test_names_that_a_system_cannot_hold_or_spells_otherwise(make_run, tmp_path, capsys):
    """A mask's name is longer than its scan's; macOS writes an accent as a character of its own."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    write(scans / "ok.nii.gz", blob(), affine(0)), write(scans / "Mu\u0308ller.nrrd", blob(), affine(0))
    for length in (244, 251):
        (scans / ("x" * length + ".nii")).write_bytes(nib.Nifti1Image(blob(), affine(0)).to_bytes())
    rows = rows_of(run(make_run(), scans, out, status=1))
    assert {case for case, row in rows.items() if not row["error"]} == {"ok", "M\xfcller", "x" * 244}
    assert "--output" in rows["x" * 251]["error"]
    write(scans / "M\xfcller.nii.gz", blob(), affine(0))
    argv = ["--exp", "a", "--model_path", str(tmp_path / "model"), "--input", str(scans), "--output", str(out)]
    assert str(scans / "M\xfcller.nii.gz") in refused(capsys, *argv, "--resume")


def test_a_value_fills_the_nan_border_of_a_registration(make_run, tmp_path):
    image = blob().astype(np.float32)
    image[:3] = np.nan
    scan, folder = write(tmp_path / "heart.nii.gz", image, affine(0)), make_run()
    assert "--fill_nan" in rows_of(run(folder, scan, tmp_path / "out", status=1))["heart"]["error"]
    out = run(folder, scan, tmp_path / "filled", "--fill_nan", "0")
    zeros = run(folder, write(tmp_path / "heart.nii.gz", np.nan_to_num(image), affine(0)), tmp_path / "zeros")
    assert (out / "heart.nii.gz").read_bytes() == (zeros / "heart.nii.gz").read_bytes()


@pytest.mark.parametrize("where", ["read only", "a file"])
def test_an_output_that_cannot_be_written_is_said_before_the_work(make_run, tmp_path, capsys, monkeypatch, where):
    scan, out, folder = write(tmp_path / "heart.nii.gz", blob(), affine(0)), tmp_path / "out", make_run()

    def read_only(*args, **kwargs):  # for root, a folder without the right to write is one like any other
        raise OSError(errno.EROFS, "Read-only file system")

    if where == "read only":
        out.mkdir()
        monkeypatch.setattr(files.tempfile, "mkstemp", read_only)
    else:
        out.touch()
    argv = ["--exp", folder.name, "--model_path", str(folder.parent), "--input", str(scan)]
    error = refused(capsys, *argv, "--output", str(out))
    assert "--output" in error and "--model_path" not in error
    error = refused(capsys, *argv[:4], "--export", str(out / "below" / "a.onnx"))
    assert "--export" in error and "--model_path" not in error


def test_it_ends_with_paths_that_work_from_the_current_folder(make_run, tmp_path, capsys, monkeypatch):
    write(tmp_path / "my scans" / "heart.nii.gz", blob(), affine(0)), make_run()
    monkeypatch.chdir(tmp_path)
    flags = "--exp a --model_path model --output out --device cpu --input".split()
    assert predict.main([*flags, "my scans"]) == 0
    said = [word for line in capsys.readouterr().out.splitlines()[-3:] for word in shlex.split(line)]
    paths = ("out", "out/predictions.csv", "my scans/heart.nii.gz", "out/heart.nii.gz")
    assert all(path in said and Path(path).exists() for path in paths)


# --- what is said


@pytest.mark.parametrize(
    "flags",
    [
        ("--roi", "1:51,3:,:20", "--window_batch", "3"),
        ("--protocol", "paper", "--tta"),
        ("--protocol", "whole"),
        ("--stride_xy", "9", "--stride_z", "5"),
    ],
)
def test_the_announced_windows_are_those_that_are_computed(make_run, tmp_path, monkeypatch, flags):
    counted = []

    class Watched(segmenting.Progress):
        def __exit__(self, *error):
            counted.append((self.bar.total, self.done))
            super().__exit__(*error)

    monkeypatch.setattr(segmenting, "Progress", Watched)
    scan = write(tmp_path / "heart.nii.gz", blob((90, 70, 44)), affine(0, (1.1, 1.3, 0.7)))
    folders = [make_run("a", "--scale", "0.7"), make_run("b", preprocessing={"spacing_mm": [1.0, 1.0, 1.0]})]
    run(folders[0], scan, tmp_path / "one", *flags), run(folders[1], scan, tmp_path / "two", *flags)
    assert len(counted) == 2 and all(announced == done for announced, done in counted)
    assert all((done == 1) == ("whole" in flags) for _, done in counted)


SMALL, ON_PARTS = (14, 12, 10), {"typical_scan": TYPICAL | {"mean": 0.9}}


@pytest.mark.parametrize(
    "matrix, shape, flags, changes, remedy",
    [
        (affine(0), SMALL, [], {}, None),
        (affine(0), (30, 30, 30), [], {}, "--roi"),
        (affine(0, (1, 1, 1.3)), SHAPE, [], {}, "--spacing_mm"),
        (affine(0, order=(2, 0, 1)), SHAPE, [], {}, "--orientation"),
        (affine(0), SMALL, [], ON_PARTS, "--roi"),
        (affine(0), SHAPE, ["--roi", "center"], ON_PARTS, None),
        (affine(0), SMALL, [], ON_PARTS | {"preprocessing": {"normalise": "percentile"}}, None),
    ],
)
def test_warnings_name_a_remedy(make_run, tmp_path, capsys, matrix, shape, flags, changes, remedy):
    run(make_run(**changes), write(tmp_path / "heart.nii.gz", blob(shape), matrix), tmp_path / "out", *flags)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  warning: ")]
    assert any(remedy in line and "run a" in line for line in warnings) if remedy else not warnings


CPU_ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), CPU_ALLOCATOR])
@pytest.mark.parametrize("step", ["read_scan", "predict_volume"])
def test_out_of_memory_costs_that_scan_alone(make_run, tmp_path, monkeypatch, error, step):
    for case in "ab":
        write(tmp_path / "scans" / f"{case}.nii.gz", blob(), affine(0))
    calls = iter([error, None])

    def full_at_first(*args):
        if failure := next(calls):
            raise failure
        return known(*args)

    known = getattr(plan, step)
    monkeypatch.setattr(plan, step, full_at_first)
    rows = rows_of(run(make_run(), tmp_path / "scans", tmp_path / "out", status=1))
    assert "--roi" in rows["a"]["error"] and "--window_batch" in rows["a"]["error"]
    assert rows["b"]["error"] == "" and (tmp_path / "out" / "b.nii.gz").exists()


def test_a_grid_that_memory_cannot_hold_is_refused_before_it_is_made(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(plan.Preprocessing, "apply", lambda *args: pytest.fail("made it"))
    folder = make_run(preprocessing={"spacing_mm": [0.001, 0.001, 0.001]})
    scan = write(tmp_path / "heart.nii.gz", blob(), affine(0))
    assert "--roi" in rows_of(run(folder, scan, tmp_path / "out", status=1))["heart"]["error"]
    monkeypatch.setattr(segmenting, "available_memory", lambda: 10**9)
    monkeypatch.setattr(plan.Preprocessing, "memory", lambda *arguments: 2 * 10**9)
    error = rows_of(run(make_run("b"), scan, tmp_path / "other", status=1))["heart"]["error"]
    assert "--roi" in error and "--window" not in error  # the volumes are as large whatever the window


# --- bad input


REFUSED = {  # flags: what the sentence names
    "--exp a z": "--exp",
    "--exp a --input none.nii": "--input",
    "--exp a --input model/a/last.pth": "--input",
    "--exp a --input model/a": "model/a",
    "--exp a --roi middle": "--roi",
    "--exp a --head far": "--head",
    "--exp a b --save sdm": "--save sdm",
    "--exp a --stride_xy 0": "--stride_xy",
    "--exp c": "--exp",
    "--exp a --output": "--output",
    "--exp a --export a.onnx": "a.onnx",
    "--exp a b --export b.onnx": "--exp",
    "--exp a --export b.pt": "--export",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refusals(make_run, tmp_path, capsys, monkeypatch, flags):
    make_run("a"), make_run("b", method="dtml"), write(tmp_path / "heart.nii.gz", blob(), affine(0))
    stored = runs.load_checkpoint(make_run("c") / runs.LAST)
    stored["options"]["method"] = "of somebody"
    runs.save_checkpoint(tmp_path / "model" / "c" / runs.LAST, stored)
    (tmp_path / "a.onnx").write_text("mine")
    monkeypatch.chdir(tmp_path)
    where = "--model_path model --input heart.nii.gz --output out".split()
    assert REFUSED[flags] in refused(capsys, *where, *flags.split())
    assert not (tmp_path / "out").exists() and (tmp_path / "a.onnx").read_text() == "mine"


def test_without_scans_there_is_nothing_to_do(capsys):
    assert "--input" in refused(capsys, "--exp", "a", "--output", "out")


# --- ONNX


def test_an_exported_network_says_how_to_use_it(make_run, tmp_path, capsys):
    folder, path = make_run(preprocessing={"spacing_mm": [1.0, 1.0, 2.0]}, level=0.5), tmp_path / "x" / "a.onnx"
    argv = ["--exp", "a", "--model_path", str(folder.parent), "--head", "dark", "--export", str(path)]
    assert predict.main(argv) == 0
    assert str(path) in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).normal(size=(2, 1, 32, 48, 32)).astype(np.float32)
    (dark,) = session.run(None, {"image": image})
    np.testing.assert_allclose(dark, 1 / (1 + np.exp(4 * (image - 0.5))), atol=1e-5)
    said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert said["preprocessing"]["spacing_mm"] == [1.0, 1.0, 2.0] and said["preprocessing"]["normalise"] == "zscore"
    assert (said["patch_size"], said["stride_xy"], said["scale"]) == ([32, 32, 32], 10, 1.0)
    assert (said["head"], said["threshold"]) == ("dark", 0.5) and "Not for clinical use" in said["notice"]
