"""Prepared cases against the raw files they come from; what a second run does; what is a fault."""

import hashlib
import json
import os
import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest

from dataloaders import case_files
from scans import prepare
from scans.files import find_scans, read_scan, write_scan
from scans.prepare import MANIFEST, RawCase, Recipe, prepare_folder, report
from scans.preprocess import RECORD, Preprocessing
from utils.errors import InputError

PLAIN = Recipe(Preprocessing(), {"script": "test"})


@pytest.fixture
def raw(raw_scans, tmp_path):
    """A copy of the raw scans that a test may damage."""
    return shutil.copytree(raw_scans, tmp_path / "raw")


def sources_in(raw) -> list[RawCase]:
    labels = find_scans(raw / "labels")
    return [RawCase(case, path, labels.get(case)) for case, path in find_scans(raw / "images").items()]


def run(raw, dest, recipe=PLAIN, overwrite=False, split=None):
    return prepare_folder(dest, sources_in(raw), recipe, overwrite, lambda outcome: None, split)


def state_of(dest) -> dict:
    """Content and time of writing of every case file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(dest.glob("*/*.h5"))}


def test_cases_hold_the_normalised_scan_its_label_and_its_geometry(raw, tmp_path):
    outcome = run(raw, tmp_path / "out")
    assert (outcome.labeled, outcome.unlabeled) == ([f"scan{i}" for i in range(4)], ["scan4", "scan5"])
    assert outcome.faults == {} and outcome.changed
    for source in sources_in(raw):
        scan = read_scan(source.image)
        image = case_files.read_image(tmp_path / "out", source.case)
        np.testing.assert_allclose(image, (scan.array - scan.array.mean()) / scan.array.std(), atol=1e-5)
        assert case_files.has_label(tmp_path / "out", source.case) == (source.label is not None)
        if source.label:
            label = case_files.read_label(tmp_path / "out", source.case)
            np.testing.assert_array_equal(label, read_scan(source.label).array > 0)
        spacing, origin, direction = case_files.read_geometry(tmp_path / "out", source.case)
        np.testing.assert_allclose((spacing, origin), (scan.spacing_mm, scan.origin_mm), atol=1e-5)
        np.testing.assert_allclose(np.reshape(direction, (3, 3)), scan.direction, atol=1e-6)


def test_manifest_says_what_the_cases_come_from(raw, tmp_path):
    dest = tmp_path / "out"
    run(raw, dest, split={"folds": 3})
    manifest = json.loads((dest / MANIFEST).read_text())
    case, path = manifest["cases"]["scan1"], raw / "images" / "scan1.nrrd"
    array, label = read_scan(path).array, read_scan(raw / "labels" / "scan1.nrrd").array
    assert case["image"] == {"file": "scan1.nrrd", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert case["shape"] == list(array.shape) == case["prepared_shape"]
    np.testing.assert_allclose(case["spacing_mm"], [2, 2, 2.25])
    np.testing.assert_allclose(case["label_ml"], (label > 0).sum() * 2 * 2 * 2.25 / 1000)
    intensity = [case["intensity"][name] for name in ("min", "max", "mean", "std")]
    np.testing.assert_allclose(intensity, [array.min(), array.max(), array.mean(), array.std()])
    assert manifest["cases"]["scan5"]["label"] is None and manifest["cases"]["scan5"]["label_ml"] is None
    assert manifest["settings"]["script"] == "test" and manifest["split"] == {"folds": 3}
    assert json.loads((dest / RECORD).read_text()) == Preprocessing().as_record()


def test_resampled_and_turned_cases_stay_in_their_place(raw, tmp_path):
    recipe = Recipe(Preprocessing((3.0, 3.0, 3.0), "none", orientation="RAS"), {}, foreground=(2,))
    run(raw, tmp_path / "out", recipe)
    for case in ("scan0", "scan3"):
        raw_label = read_scan(next((raw / "labels").glob(f"{case}.*")))
        made = case_files.read_label(tmp_path / "out", case)
        spacing, origin, direction = case_files.read_geometry(tmp_path / "out", case)
        np.testing.assert_allclose(spacing, 3, atol=0.1)
        to_lps = np.reshape(direction, (3, 3)) * spacing
        centre = to_lps @ np.argwhere(made).mean(axis=0) + origin
        true = nib.affines.apply_affine(raw_label.affine, np.argwhere(raw_label.array == 2).mean(axis=0))
        assert np.linalg.norm(centre * (-1, -1, 1) - true) < 0.5  # mm
        assert np.argmax(np.abs(direction[:3])) == 0 and direction[0] < 0  # the first axis runs to the right


def test_a_crop_moves_the_origin(raw, tmp_path):
    recipe = Recipe(Preprocessing(), {}, crop=lambda case, label, shape: (slice(3, 20), slice(2, 30), slice(1, 25)))
    outcome = run(raw, tmp_path / "out", recipe)
    scan = read_scan(raw / "images" / "scan1.nrrd")
    whole, _ = Preprocessing().apply(scan)
    np.testing.assert_array_equal(case_files.read_image(tmp_path / "out", "scan1"), whole[3:20, 2:30, 1:25])
    origin = nib.affines.apply_affine(scan.affine, (3, 2, 1)) * (-1, -1, 1)
    np.testing.assert_allclose(case_files.read_geometry(tmp_path / "out", "scan1")[1], origin, atol=1e-6)
    assert outcome.cases["scan1"]["prepared_start"] == [3, 2, 1]


# --- a second run


def test_running_again_changes_nothing(raw, tmp_path):
    run(raw, tmp_path / "out")
    before, manifest = state_of(tmp_path / "out"), (tmp_path / "out" / MANIFEST).read_bytes()
    moved = raw.rename(tmp_path / "elsewhere")  # what counts is the content
    outcome = run(moved, tmp_path / "out")
    assert outcome.kept == 6 and not outcome.changed
    assert state_of(tmp_path / "out") == before and (tmp_path / "out" / MANIFEST).read_bytes() == manifest
    assert "(0 written, 6 were there already)" in report(tmp_path / "out", outcome)[0]


def test_an_interrupted_run_continues_to_the_same_end(raw, tmp_path, monkeypatch):
    run(raw, tmp_path / "whole")
    calls, write_case = [], prepare.write_case

    def interrupt(dest, case, *rest):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(case)
        write_case(dest, case, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "write_case", interrupt)
        run(raw, tmp_path / "parts")
    assert calls == ["scan0", "scan1", "scan2"]
    outcome = run(raw, tmp_path / "parts")
    assert outcome.kept == 3 and outcome.changed
    assert (tmp_path / "parts" / MANIFEST).read_bytes() == (tmp_path / "whole" / MANIFEST).read_bytes()
    for name in outcome.cases:
        np.testing.assert_array_equal(
            case_files.read_image(tmp_path / "parts", name), case_files.read_image(tmp_path / "whole", name)
        )


def test_a_changed_or_damaged_file_is_written_again(raw, tmp_path):
    run(raw, tmp_path / "out")
    edit(raw / "images" / "scan3.nii.gz", lambda array, affine: nib.Nifti1Image(array[::-1], affine))
    os.truncate(case_files.case_path(tmp_path / "out", "scan4"), 50)
    assert run(raw, tmp_path / "out").kept == 4
    expected, _ = Preprocessing().apply(read_scan(raw / "images" / "scan3.nii.gz"))
    np.testing.assert_array_equal(case_files.read_image(tmp_path / "out", "scan3"), expected)
    assert case_files.read_image(tmp_path / "out", "scan4").size


def test_other_settings_need_overwrite(raw, tmp_path):
    run(raw, tmp_path / "out", split={"seed": 1})
    before = state_of(tmp_path / "out")
    other = Recipe(Preprocessing(normalise="none"), {"script": "test", "normalise": "none"})
    with pytest.raises(InputError, match="normalise.*--overwrite"):
        run(raw, tmp_path / "out", other, split={"seed": 1})
    with pytest.raises(InputError, match="seed.*--overwrite"):
        run(raw, tmp_path / "out", split={"seed": 2})
    assert state_of(tmp_path / "out") == before
    outcome = run(raw, tmp_path / "out", other, overwrite=True)
    assert outcome.kept == 0 and outcome.changed
    assert case_files.read_image(tmp_path / "out", "scan0").max() > 100
    assert run(raw, tmp_path / "out", other).kept == 6
    assert run(raw, tmp_path / "out", other, overwrite=True).kept == 0


def test_a_folder_of_other_cases_is_never_touched(raw, tmp_path, phantom):
    dest = shutil.copytree(phantom, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in dest.rglob("*")}
    for case in ("phantom_000", "another"):  # of a foreign folder nothing is replaced, and nothing is mixed into it
        sources = [RawCase(case, raw / "images" / "scan0.nii.gz", None)]
        for overwrite in (False, True):
            with pytest.raises(InputError, match="phantom_00.*--dest"):
                prepare_folder(dest, sources, PLAIN, overwrite, lambda outcome: None)
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*")} == before
    (dest / MANIFEST).write_text("[]")
    with pytest.raises(InputError, match="no manifest"):
        prepare_folder(dest, sources, PLAIN, True, lambda outcome: None)


# --- faults


def edit(path, change):
    image = nib.load(path)
    nib.save(change(np.asanyarray(image.dataobj), image.affine), path)


def test_every_fault_is_reported_and_the_other_scans_are_prepared(raw, tmp_path):
    images, labels = raw / "images", raw / "labels"
    edit(images / "scan0.nii.gz", lambda array, affine: nib.Nifti1Image(np.full_like(array, 7), affine))
    os.truncate(images / "scan1.nrrd", 500)
    (images / "scan4.nrrd").write_text("junk")
    edit(labels / "scan3.nii.gz", lambda array, affine: nib.Nifti1Image(array, affine + np.eye(4)[:, [3, 0, 1, 2]]))
    outcome = run(raw, tmp_path / "out")
    assert list(outcome.cases) == ["scan2", "scan5"] and outcome.labeled == ["scan2"]
    words = {"scan0": "constant", "scan1": "scan1.nrrd is damaged", "scan3": "another grid", "scan4": "scan4.nrrd"}
    assert {case: words[case] in fault for case, fault in outcome.faults.items()} == dict.fromkeys(words, True)
    assert not any(case_files.case_path(tmp_path / "out", case).exists() for case in words)
    lines = report(tmp_path / "out", outcome)
    assert len(lines) == 6 and lines[1].startswith("fault: scan0: ") and lines[-1] == "4 of 6 scans were left out"
    assert set(json.loads((tmp_path / "out" / MANIFEST).read_text())["faults"]) == set(words)
    run(raw.parent / "raw", tmp_path / "out")  # the faults stay, and so do the valid cases


@pytest.mark.parametrize(
    "change, foreground, word",
    [
        (lambda array: array, (3,), "holds no 3 \\(found: 0, 1, 2\\)"),
        (lambda array: 0 * array, None, "holds no value but 0"),
        (lambda array: array / 3, None, "no whole numbers"),
        (lambda array: array.astype(np.int16) - 1, None, "--foreground"),  # is -1 the background?
    ],
)
def test_labels_that_cannot_be_used(raw, tmp_path, change, foreground, word):
    edit(raw / "labels" / "scan0.nii.gz", lambda array, affine: nib.Nifti1Image(change(array), affine))
    source = RawCase("scan0", raw / "images" / "scan0.nii.gz", raw / "labels" / "scan0.nii.gz")
    with pytest.raises(InputError, match=word):
        prepare.prepare_case(source, Recipe(Preprocessing(), {}, foreground))


def pair_of(raw) -> RawCase:
    return RawCase("scan0", raw / "images" / "scan0.nii.gz", raw / "labels" / "scan0.nii.gz")


def test_label_values_that_are_nearly_whole(raw):
    path = raw / "labels" / "scan0.nii.gz"
    expected = prepare.prepare_case(pair_of(raw), PLAIN)[1]
    edit(path, lambda array, affine: nib.Nifti1Image(array * 1.0000001 + 1e-7, affine))
    for foreground in (None, (1, 2)):
        _, label, record, _ = prepare.prepare_case(pair_of(raw), Recipe(Preprocessing(), {}, foreground))
        np.testing.assert_array_equal(label, expected)
        assert record["label_values"] == [0, 1, 2]


def test_a_label_that_lies_apart_is_accepted_by_a_flag(raw):
    def move(array, affine):
        affine = affine.copy()
        affine[0, 3] += 0.2 * 2  # voxels of 2 mm
        return nib.Nifti1Image(array, affine)

    edit(raw / "labels" / "scan0.nii.gz", move)
    with pytest.raises(InputError, match="0.20 voxels.*--grid_tolerance"):
        prepare.prepare_case(pair_of(raw), PLAIN)
    assert prepare.prepare_case(pair_of(raw), Recipe(Preprocessing(), {}, grid_tolerance=0.5))[1].any()


def test_the_volume_of_a_label_on_sheared_axes(raw):
    shear = np.eye(4)
    shear[1, 2] = 0.5  # of a tilted gantry
    for folder in ("images", "labels"):
        edit(raw / folder / "scan0.nii.gz", lambda array, affine: nib.Nifti1Image(array, affine @ shear))
    _, label, record, _ = prepare.prepare_case(pair_of(raw), PLAIN)
    np.testing.assert_allclose(record["label_ml"], np.count_nonzero(label) * 2 * 2 * 2 / 1000)
    assert (
        record["sheared"]
        and not prepare.prepare_case(RawCase("b", raw / "images/scan5.nii.gz", None), PLAIN)[2]["sheared"]
    )


def test_a_flipped_label_is_turned_without_loss(raw):
    expected = prepare.prepare_case(pair_of(raw), PLAIN)[1]
    flip = np.diag([-1.0, 1, 1, 1])

    def turn(array, affine):
        flip[0, 3] = len(array) - 1
        return nib.Nifti1Image(array[::-1], affine @ flip)

    edit(raw / "labels" / "scan0.nii.gz", turn)
    np.testing.assert_array_equal(prepare.prepare_case(pair_of(raw), PLAIN)[1], expected)


@pytest.mark.parametrize("suffix", [".seg.nrrd", ".nrrd"])
def test_a_label_of_a_part_is_one_of_slicer(raw, suffix):
    expected, scan = prepare.prepare_case(pair_of(raw), PLAIN)[1], read_scan(raw / "labels" / "scan0.nii.gz")
    place = scan.affine.copy()
    place[:3, 3] += place[:3, :3] @ (3, 2, 1)
    label = raw / f"part{suffix}"
    write_scan(label, scan.array[3:33, 2:30, 1:29], place)
    assert expected[3:33, 2:30, 1:29].sum() == expected.sum()
    source = RawCase("scan0", raw / "images" / "scan0.nii.gz", label)
    if suffix == ".seg.nrrd":
        np.testing.assert_array_equal(prepare.prepare_case(source, PLAIN)[1], expected)
    else:
        with pytest.raises(InputError, match="another grid"):
            prepare.prepare_case(source, PLAIN)


def test_an_image_is_no_label(raw):
    image = raw / "images" / "scan0.nii.gz"
    with pytest.raises(InputError, match="--labels"):
        prepare.prepare_case(RawCase("scan0", image, image), PLAIN)
    copy = shutil.copy(image, raw / "labels" / "scan0.nii.gz")
    with pytest.raises(InputError, match="--labels"):
        prepare.prepare_case(RawCase("scan0", image, copy), PLAIN)
    edit(copy, lambda array, affine: nib.Nifti1Image(array + 1, affine))
    with pytest.raises(InputError, match="--foreground"):
        prepare.prepare_case(RawCase("scan0", image, copy), PLAIN)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_ends_costs_one_scan(raw, tmp_path, monkeypatch, error):
    def read(path):
        if "scan1" in path.name:
            raise error
        return read_scan(path)

    monkeypatch.setattr(prepare, "read_scan", read)
    outcome = run(raw, tmp_path / "out", Recipe(Preprocessing((3.0, 3.0, 3.0)), {}))
    assert list(outcome.faults) == ["scan1"] and "--spacing_mm" in outcome.faults["scan1"]
    assert len(outcome.cases) == 5


def test_a_grid_that_memory_cannot_hold_is_refused_before_it_is_made(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.Preprocessing, "apply", lambda *args: pytest.fail("made it"))
    outcome = run(raw, tmp_path / "out", Recipe(Preprocessing((0.01, 0.01, 0.01)), {}))
    assert len(outcome.faults) == 6 and all("--spacing_mm" in fault for fault in outcome.faults.values())


@pytest.mark.parametrize("case", ["scan 4 ", "train.list", "manifest.json", "lat\udce9in"])
def test_a_name_that_no_list_or_folder_can_hold(raw, tmp_path, case):
    path = (raw / "images" / "scan4.nrrd").rename(raw / "images" / f"{case}.nrrd")
    assert str(path) in run(raw, tmp_path / "out").faults[case]


def test_one_scan_under_two_ids_is_a_fault(raw, tmp_path):
    other = read_scan(raw / "images" / "scan1.nrrd")  # another format and type, other axes and geometry
    nib.save(nib.Nifti1Image(other.array[::-1].astype(np.float32), np.eye(4)), raw / "images" / "scan7.nii.gz")
    outcome = run(raw, tmp_path / "out")
    assert list(outcome.faults) == ["scan7"] and "scan1" in outcome.faults["scan7"]
    assert not case_files.case_path(tmp_path / "out", "scan7").exists()


def test_one_scan_that_was_prepared_in_two_ways_is_known(raw, tmp_path):
    run(raw, tmp_path / "out")
    run(raw, tmp_path / "other", Recipe(Preprocessing((3.0, 3.0, 3.0), "percentile"), {}))
    (tmp_path / "other" / "scan1").rename(tmp_path / "out" / "copy")
    assert case_files.same_scans(tmp_path / "out", ["scan0", "scan1", "copy"]) == [("scan1", "copy")]


def test_a_label_that_resampling_wipes_out_is_a_fault(raw):
    def one_voxel(array, affine):
        return nib.Nifti1Image((np.arange(array.size) == 999).reshape(array.shape).astype(np.uint8), affine)

    edit(raw / "labels" / "scan0.nii.gz", one_voxel)
    source = RawCase("scan0", raw / "images" / "scan0.nii.gz", raw / "labels" / "scan0.nii.gz")
    with pytest.raises(InputError, match="vanishes.*--spacing_mm"):
        prepare.prepare_case(source, Recipe(Preprocessing((9.0, 9.0, 9.0)), {}))


def test_a_full_disk_stops_the_run(raw, tmp_path, monkeypatch):
    def full(*arguments):
        raise InputError("cannot write")

    monkeypatch.setattr(prepare, "write_case", full)
    with pytest.raises(InputError, match="cannot write"):
        run(raw, tmp_path / "out")


def test_fingerprint_covers_every_file_of_a_scan(tmp_path):
    header = tmp_path / "a.mhd"
    header.write_text("NDims = 3\nElementDataFile = a.raw\n")
    (tmp_path / "a.raw").write_bytes(b"voxels")
    first = prepare._fingerprint(header)
    (tmp_path / "a.raw").write_bytes(b"others")
    assert prepare._fingerprint(header)["sha256"] != first["sha256"]
    folder = prepare._fingerprint(tmp_path)["sha256"]
    (tmp_path / "a.raw").rename(tmp_path / "b.raw")
    assert prepare._fingerprint(tmp_path)["sha256"] != folder


def test_case_files_name_their_source(raw, tmp_path):
    run(raw, tmp_path / "out")
    with h5py.File(case_files.case_path(tmp_path / "out", "scan0")) as file:
        assert json.loads(file.attrs["source"])["image"]["file"] == "scan0.nii.gz"
