import math
import multiprocessing
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from dataloaders import store as module
from dataloaders.batch import BatchStream, delivered, make_loader, stream_case
from dataloaders.case_files import case_path, read_label
from dataloaders.store import CaseStore, read_region
from evaluation.metrics import evaluate
from runtime.distributed import ALONE, Ranks
from utils.errors import InputError
from utils.resample import resample, scaled_shape

SHAPE, PATCH = (20, 17, 12), (10, 8, 6)
LABELED, UNLABELED = [f"L{i}" for i in range(5)], [f"U{i}" for i in range(7)]
STRONG = {"aug_zoom": 0.2, "aug_rotate": 15.0, "aug_intensity": 0.3}


def write_case(root, name, image, label=None):
    path = case_path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=image.astype(np.float32), chunks=True, compression="gzip")
        if label is not None:
            file.create_dataset("label", data=label, chunks=True, compression="gzip")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Random cases; image = 2 label - 1, and files of unlabeled cases lack the label."""
    folder, rng = tmp_path_factory.mktemp("cases"), np.random.default_rng(0)
    for name in LABELED + UNLABELED:
        label = (rng.random(SHAPE) > 0.5).astype(np.uint8)
        write_case(folder, name, 2 * label.astype(np.float32) - 1, label if name in LABELED else None)
    return folder


def flags(root, **changes) -> Namespace:
    plain = {
        "root_path": str(root),
        "num_classes": None,
        "scale": 1.0,
        "cache": "ram",
        "patch_size": list(PATCH),
        "seed": 1337,
        "batch_size": 5,
        "labeled_bs": 2,
        "max_iterations": 6,
        "flip": "random",
        "crop_bound": "inclusive",
        "aug_zoom": 0.0,
        "aug_rotate": 0.0,
        "aug_intensity": 0.0,
    }
    return Namespace(**{**plain, **changes})


def make_stream(root, labeled=LABELED, unlabeled=UNLABELED, ranks=ALONE, **changes) -> BatchStream:
    options = flags(root, **changes)
    return BatchStream(options, CaseStore(options, labeled, unlabeled), labeled, unlabeled, ranks)


def assert_same(first, second):
    assert first.cases == second.cases
    assert torch.equal(first.image, second.image) and torch.equal(first.label, second.label)


# --- batches


def test_layout_labeled_first(root):
    batch = make_stream(root)[0]
    assert batch.image.shape == (5, 1, *PATCH) and batch.label.shape == (2, 1, *PATCH)
    assert batch.image.dtype == batch.label.dtype == torch.float32
    assert batch.num_labeled == 2 and batch.image.is_contiguous()
    assert batch.sdm is None  # which only some methods ask for
    assert set(batch.cases[:2]) <= set(LABELED) and set(batch.cases[2:]) <= set(UNLABELED)


def test_labeled_only(root):
    batch = make_stream(root, unlabeled=[], batch_size=4, labeled_bs=4)[0]
    assert batch.num_labeled == len(batch.image) == 4


def test_batch_is_a_function_of_seed_and_iteration(root):
    stream = make_stream(root, **STRONG)
    last = make_stream(root, **STRONG)[5]
    batches = [stream[i] for i in range(6)]
    assert_same(batches[5], last)
    assert_same(batches[2], stream[2])
    assert not torch.equal(batches[0].image, batches[1].image)


@pytest.mark.parametrize("size", [2, 3])
def test_the_batches_of_all_ranks_are_the_batch_of_one_process(root, size):
    whole = make_stream(root, batch_size=5 * size, labeled_bs=2 * size, **STRONG)
    shares = [make_stream(root, ranks=Ranks(rank, size), **STRONG) for rank in range(size)]
    for iteration in (0, 1, 5):
        expected, parts = whole[iteration], [share[iteration] for share in shares]
        labeled = [part.image[:2] for part in parts]
        assert torch.equal(torch.cat([*labeled, *(part.image[2:] for part in parts)]), expected.image)
        assert torch.equal(torch.cat([part.label for part in parts]), expected.label)
        assert sum((part.cases[:2] for part in parts), ()) + sum((part.cases[2:] for part in parts), ()) == (
            expected.cases
        )
        assert len({image.numpy().tobytes() for part in parts for image in part.image}) == 5 * size  # disjoint


def test_processes_of_a_machine_share_its_memory(root, monkeypatch):
    voxels = math.prod(SHAPE)
    need = 12 * voxels * 4 + 5 * voxels
    monkeypatch.setattr(module, "available_memory", lambda: 2 * need / module.MEMORY_SHARE + 1)
    stores = [CaseStore(flags(root), LABELED, UNLABELED, processes) for processes in (1, 2, 3)]
    assert [store.in_memory for store in stores] == [True, True, False]


@pytest.mark.parametrize(("scale", "of_label"), [(1.0, 1), (0.5, 3 * 4)])
def test_the_memory_for_labels_of_several_classes(root, monkeypatch, scale, of_label):
    """At native resolution their numbers are kept, a byte per voxel; at another scale a float for each class."""
    voxels = math.prod(scaled_shape(SHAPE, scale))
    need = 12 * voxels * 4 + 5 * voxels * of_label
    options, fits = flags(root, num_classes=3, scale=scale), []
    for free in (need - 1, need + 1):
        monkeypatch.setattr(module, "available_memory", lambda free=free: free / module.MEMORY_SHARE)
        fits.append(CaseStore(options, LABELED, UNLABELED).in_memory)
    assert fits == [False, True]


def test_seed_changes_crops_and_order(root):
    one = {"labeled": ["L0"], "unlabeled": [], "batch_size": 1, "labeled_bs": 1}
    assert not torch.equal(make_stream(root, seed=1, **one)[0].image, make_stream(root, seed=2, **one)[0].image)
    orders = {tuple(stream_case(UNLABELED, seed, 1, i) for i in range(7)) for seed in range(5)}
    assert len(orders) == 5
    assert stream_case(UNLABELED, 1, 0, 0) == stream_case(UNLABELED, 1, 0, 0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_workers_or_start(root, workers, start):
    torch.set_num_threads(2)  # workers have one
    stream = make_stream(root, **STRONG)
    loaded = list(make_loader(stream, start, workers, pin_memory=False))
    assert len(loaded) == 6 - start
    for iteration, batch in enumerate(loaded, start):
        assert_same(batch, stream[iteration])


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_input_met_by_a_worker_is_one_sentence(root, workers, monkeypatch):
    stream = make_stream(root, **STRONG)

    def fail(*args):
        raise InputError("case L0 has a NaN")

    monkeypatch.setattr(stream.store, "image", fail)
    with pytest.raises(InputError) as error:
        next(delivered(make_loader(stream, 0, workers, pin_memory=False)))
    assert "L0" in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers start as Python's default has it")
def test_workers_share_the_decoded_cases_whatever_the_default_start_method(root, monkeypatch):
    """From Python 3.14 on the default is forkserver, which would pickle them into every worker."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        stream = make_stream(root, **STRONG)
        monkeypatch.setattr(CaseStore, "__reduce_ex__", lambda *_: pytest.fail("a store was pickled"))
        assert_same(next(delivered(make_loader(stream, 0, 1, pin_memory=False))), stream[0])
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_random_numbers_alone(root, workers):
    """Otherwise a resumed run would draw other dropout masks than one that was not interrupted."""
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    list(make_loader(make_stream(root, **STRONG), 0, workers, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_equal(np.random.get_state(), numpy_state)  # noqa: NPY002


def test_streams_are_full_permutations_with_carry_over(root):
    stream = make_stream(root)
    batches = [stream[i].cases for i in range(35)]
    for names, part in ((LABELED, slice(0, 2)), (UNLABELED, slice(2, 5))):  # neither divides the number of cases
        order = [case for cases in batches for case in cases[part]]
        passes = [order[i : i + len(names)] for i in range(0, len(order), len(names))]
        assert all(sorted(one) == names for one in passes)
        assert len({tuple(one) for one in passes}) > len(passes) // 2  # a fresh order each time
        assert Counter(order) == dict.fromkeys(names, len(passes))


def test_more_places_than_cases():
    order = [stream_case(["a", "b"], 1, 0, position) for position in range(8)]
    assert all(set(order[i : i + 2]) == {"a", "b"} for i in range(0, 8, 2))


def test_no_two_random_keys_give_the_same_numbers(root, monkeypatch):
    keys, real = set(), np.random.default_rng

    def spy(key):
        keys.add(tuple(key))
        return real(key)

    stream = make_stream(root)
    monkeypatch.setattr(np.random, "default_rng", spy)
    for iteration in range(20):
        stream[iteration]
    states = {tuple(np.random.SeedSequence(key).generate_state(4)) for key in keys}
    passes = 40 / len(LABELED) + -(-60 // len(UNLABELED))
    assert len(states) == 20 * 5 + passes  # one for every crop and one for every pass


def test_image_and_label_get_the_same_crop(root):
    for changes in ({}, {"aug_zoom": 0.2, "aug_rotate": 20.0}, {"scale": 0.5, "patch_size": [5, 4, 4]}):
        batch = make_stream(root, **changes)[1]
        assert torch.allclose(batch.image[:2], 2 * batch.label - 1, atol=1e-5)
        assert batch.label.std() > 0.1


def test_intensity_changes_images_alone(root):
    plain, changed = make_stream(root)[0], make_stream(root, aug_intensity=0.3)[0]
    assert torch.equal(set_of(plain.label), set_of(changed.label))
    assert len(changed.image.unique()) > 1000


def set_of(values):
    return values.unique()


def test_batch_moves_with_its_memory_format(root):
    batch = replace(make_stream(root)[0], image=torch.rand(2, 3, 4, 5, 6))
    moved = batch.to(torch.device("cpu"), torch.channels_last_3d)
    assert moved.image.is_contiguous(memory_format=torch.channels_last_3d)
    assert_same(moved, batch)


# --- labels


def test_native_labels_are_zero_and_one(root):
    assert set_of(make_stream(root)[0].label).tolist() == [0, 1]


def test_labels_at_half_scale_are_area_averages(tmp_path):
    label = np.zeros((8, 8, 6), np.uint8)
    label[0, 0, 0] = 1  # 1 of 8 voxels of the first block
    label[2:4, 0:2, 0:2] = 1  # a whole block
    label[4:6, 2, 4:6] = 1  # half of a block
    write_case(tmp_path, "a", label.astype(np.float32), label)
    store = CaseStore(flags(tmp_path, scale=0.5, patch_size=[4, 4, 3]), ["a"], [])
    soft = store.label("a", (0, 0, 0), (4, 4, 3))
    expected = np.zeros((4, 4, 3), np.float32)
    expected[0, 0, 0], expected[1, 0, 0], expected[2, 1, 2] = 1 / 8, 1, 1 / 2
    np.testing.assert_array_equal(soft, expected[None])


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_label_of_several_classes_has_a_channel_for_each(tmp_path, scale, cache):
    """Each as if it were alone: area averages of masks, never of class numbers."""
    label = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)
    several = {"num_classes": 3, "scale": scale, "cache": cache, "aug_zoom": 0.3 * (scale == 1)}
    write_case(tmp_path, "all", label.astype(np.float32), label)
    batches = make_stream(tmp_path, ["all"], [], batch_size=2, **several)
    assert batches.batch_bytes == 4 * (2 + 2 * 3) * math.prod(PATCH)
    for number in (1, 2, 3):
        root = tmp_path / str(number)
        write_case(root, "all", label.astype(np.float32), (label == number).astype(np.uint8))
        alone = make_stream(root, ["all"], [], batch_size=2, **several | {"num_classes": 1})
        for iteration in range(4):
            together = batches[iteration].label
            assert together.shape == (2, 3, *PATCH) and together.dtype == torch.float32
            assert torch.equal(together[:, number - 1 : number], alone[iteration].label)


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_a_store_knows_the_classes_that_no_labeled_case_holds(tmp_path, cache):
    for case, values in (("a", (0, 1)), ("b", (0, 4))):
        label = np.random.default_rng(0).choice(values, SHAPE).astype(np.uint8)
        write_case(tmp_path, case, label, label)
    options = flags(tmp_path, num_classes=4, cache=cache)
    assert CaseStore(options, ["a", "b"], []).absent == {2, 3}
    assert CaseStore(options, ["a"], ["b"]).absent == {2, 3, 4}


@pytest.mark.parametrize("size", [(4, 3, 2), (5, 4, 3), (8, 5, 1), (1, 1, 1)])
def test_shrinking_averages_areas(size):
    """Against means over blocks of a grid that is fine enough for every border to lie between its voxels."""
    volume = np.random.default_rng(0).random((8, 6, 5))
    fine, blocks = volume, []
    for axis, (new, old) in enumerate(zip(size, volume.shape, strict=True)):
        fine = fine.repeat(new, axis)
        blocks += [new, old]
    result = resample(volume, size)
    assert result.dtype == np.float32 and result.flags.c_contiguous
    np.testing.assert_allclose(result, fine.reshape(blocks).mean(axis=(1, 3, 5)), rtol=1e-6)
    np.testing.assert_allclose(resample(np.ones(volume.shape, np.uint8), size), 1, rtol=1e-6)


def test_growing_interpolates_over_the_same_extent():
    np.testing.assert_allclose(resample(np.array([0.0, 1.0]).reshape(2, 1, 1), (4, 1, 1)).ravel(), [0, 0.25, 0.75, 1])
    mixed = resample(np.array([[0.0, 1.0], [2.0, 3.0]]).reshape(2, 2, 1), (1, 4, 1))
    np.testing.assert_allclose(mixed.ravel(), [1, 1.25, 1.75, 2])
    assert np.ptp(resample(np.full((7, 5, 3), 2.0), (11, 9, 5))) == 0


def test_same_size_is_the_array_itself():
    volume = np.random.default_rng(0).random((8, 6, 4)).astype(np.float32)
    assert resample(volume, volume.shape) is volume
    assert resample(volume[::-1], volume.shape).flags.c_contiguous  # torch takes no negative strides


def test_scaled_shape():
    assert scaled_shape((200, 145, 88), 1.0) == (200, 145, 88)
    assert scaled_shape((200, 141, 88), 0.5) == (100, 70, 44)
    assert scaled_shape((1, 2, 3), 0.1) == (1, 1, 1)


@pytest.mark.data
def test_soft_labels_of_real_scans_keep_the_mask(la_dir):
    """At half scale and back, area averages keep 99.3 % Dice, and the volume."""
    scores = []
    for path in sorted(la_dir.glob("*/mri_norm2.h5"))[::10]:
        label = read_label(la_dir, path.parent.name)
        soft = resample(label, scaled_shape(label.shape, 0.5))
        scores.append(evaluate(resample(soft, label.shape) > 0.5, label)["dice"])
        assert soft.mean() == pytest.approx(label.mean(), rel=1e-4)
    assert np.mean(scores) > 0.992


@pytest.mark.parametrize("changes", [{}, {"cache": "none"}, {"scale": 0.5, "patch_size": [5, 4, 4]}])
def test_labels_of_unlabeled_cases_are_never_opened(tmp_path, monkeypatch, changes):
    label = np.ones(SHAPE, np.uint8)
    for name in ("L", "U", "V"):
        write_case(tmp_path, name, np.random.default_rng(0).random(SHAPE), label)
    opened, real = set(), h5py.Dataset.__init__

    def spy(dataset, *args, **kwargs):
        real(dataset, *args, **kwargs)
        opened.add((dataset.file.filename.split("/")[-2], dataset.name))

    monkeypatch.setattr(h5py.Dataset, "__init__", spy)
    stream = make_stream(tmp_path, ["L"], ["U", "V"], batch_size=3, labeled_bs=1, **changes)
    list(make_loader(stream, 0, 0, pin_memory=False))
    assert opened == {("L", "/image"), ("L", "/label"), ("U", "/image"), ("V", "/image")}
    with pytest.raises(ValueError, match="unlabeled"):
        stream.store.label("U", (0, 0, 0), (1, 1, 1))


# --- cache


@pytest.mark.parametrize("changes", [{}, {"scale": 0.5, "patch_size": [5, 4, 4]}, {"patch_size": [24, 10, 14]}, STRONG])
def test_cached_and_read_batches_are_equal(root, changes):
    cached, read = make_stream(root, **changes), make_stream(root, cache="none", **changes)
    assert cached.store.in_memory and not read.store.in_memory
    for iteration in range(3):
        assert_same(cached[iteration], read[iteration])


def test_cached_cases_are_not_read_again(root, monkeypatch):
    stream = make_stream(root)
    monkeypatch.setattr(h5py, "File", None)
    stream[0]


def test_only_the_needed_crop_is_read(root, monkeypatch):
    stream = make_stream(root, cache="none")
    sizes, real = [], h5py.Dataset.__getitem__

    def spy(dataset, key):
        values = real(dataset, key)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    stream[0]
    assert sizes == [np.prod(PATCH)] * 7  # five images, two labels


def test_too_little_memory_falls_back_with_one_notice(root, monkeypatch):
    volume, (images, labels) = np.prod(SHAPE), (len(LABELED + UNLABELED), len(LABELED))
    for scale, needed in ((1.0, volume * (4 * images + labels)), (0.5, 10 * 8 * 6 * 4 * (images + labels))):
        monkeypatch.setattr(module, "available_memory", lambda n=needed: n / module.MEMORY_SHARE * 1.01)
        small = {"scale": scale, "patch_size": [4, 4, 4]}
        enough = make_stream(root, **small)
        monkeypatch.setattr(module, "available_memory", lambda n=needed: n / module.MEMORY_SHARE * 0.99)
        short = make_stream(root, **small)
        assert enough.store.in_memory and not enough.store.notices
        assert not short.store.in_memory and len(short.store.notices) == 1 and "memory" in short.store.notices[0]
        assert_same(enough[0], short[0])
        assert not make_stream(root, cache="none", **small).store.notices


# --- volumes smaller than the patch


def test_read_region_beyond_the_volume():
    volume = np.arange(8.0).reshape(2, 2, 2)
    np.testing.assert_array_equal(read_region(volume, (0, 0, 0), (2, 2, 1), 9), volume[:, :, :1])
    region = read_region(volume, (-1, 1, 0), (4, 1, 2), -5)
    np.testing.assert_array_equal(region[:, 0], [[-5, -5], [2, 3], [6, 7], [-5, -5]])


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_small_volumes_are_padded_with_one_notice(root, cache):
    stream = make_stream(root, patch_size=[24, 24, 12], cache=cache)
    (notice,) = stream.store.notices
    assert "12 of 12 volumes are smaller than the patch (24, 24, 12)" in notice
    batch = stream[0]
    inside = torch.zeros(24, 24)
    for image, label in zip(batch.image[:2, 0], batch.label[:, 0], strict=True):
        assert (image == 2 * label - 1).all()  # the padding is -1, the image's minimum, and background
        filled = (label.sum(dim=2) > 0).nonzero()
        low, high = filled.amin(dim=0), filled.amax(dim=0) + 1
        assert sorted((high - low).tolist()) == [17, 20]
        assert ((low - (24 - high)).abs() <= 1).all()
        inside[low[0] : high[0], low[1] : high[1]] += 1
    assert inside.sum() == 2 * 17 * 20


def test_notice_counts_patches_turned_by_90_degrees(root):
    assert not make_stream(root, patch_size=[17, 17, 12]).store.notices
    assert len(make_stream(root, patch_size=[20, 8, 12]).store.notices) == 1  # 20 fits along W, but not along H


# --- bad input


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_bad_label_is_refused_at_once(tmp_path, cache):
    write_case(tmp_path, "a", np.arange(math.prod(SHAPE)).reshape(SHAPE), np.full(SHAPE, 255, np.uint8))
    with pytest.raises(InputError, match="a/mri_norm2.h5.*255"):
        make_stream(tmp_path, ["a"], [], cache=cache)
    write_case(tmp_path, "b", np.arange(math.prod(SHAPE)).reshape(SHAPE), np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(InputError, match="b/mri_norm2.h5.*shape"):
        make_stream(tmp_path, ["b"], [], cache=cache)


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_nan_in_an_image_is_refused(tmp_path, cache):
    write_case(tmp_path, "a", np.full(SHAPE, np.nan), np.zeros(SHAPE, np.uint8))
    with pytest.raises(InputError, match="a/mri_norm2.h5.*NaN"):
        make_stream(tmp_path, ["a"], [], batch_size=1, labeled_bs=1, cache=cache)[0]
