import itertools
import math
from argparse import Namespace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from dataloaders.case_files import case_path
from inference.windows import dice_of_cases, predict_volume, sliding_window, window_starts, window_weight
from methods import METHODS
from runtime.device import device_with_room
from utils.errors import InputError

CPU = torch.device("cpu")
PATCH, STRIDE = (8, 6, 5), (3, 4, 2)


def constant(patches):
    return {"seg": torch.full_like(patches, 0.3)}


def position_dependent(patches):
    """Two outputs, of two classes, that depend on every voxel around and on the place in the window."""
    kernel = torch.arange(27, dtype=patches.dtype).reshape(1, 1, 3, 3, 3).sin()
    ramp = torch.linspace(-1, 1, patches[0].numel(), dtype=patches.dtype).reshape(patches.shape[1:])
    logits = F.conv3d(patches, kernel, padding=1) + ramp + patches.mean(dim=(1, 2, 3, 4), keepdim=True)
    logits = torch.cat((logits, logits.sin()), dim=1)
    return {"seg": torch.sigmoid(logits), "sdm": torch.sigmoid(-2 * logits)}


def one_at_a_time(image, patch, stride, weight):
    """The protocol in float64: for every window pad, predict, add; divide by the visits; cut the padding off."""
    missing = [max(p - n, 0) for p, n in zip(patch, image.shape, strict=True)]
    padded = np.pad(image, [(m // 2, m - m // 2) for m in missing], constant_values=image.min()).astype(np.float64)
    total, visits = {}, np.zeros(padded.shape)
    counts = [math.ceil((n - p) / s) + 1 for n, p, s in zip(padded.shape, patch, stride, strict=True)]
    for index in itertools.product(*map(range, counts)):
        start = [min(s * i, n - p) for i, s, n, p in zip(index, stride, padded.shape, patch, strict=True)]
        window = tuple(slice(a, a + p) for a, p in zip(start, patch, strict=True))
        for name, prob in position_dependent(torch.from_numpy(padded[window])[None, None]).items():
            total.setdefault(name, np.zeros((2, *padded.shape)))[:, *window] += weight * prob[0].numpy()
        visits[window] += weight
    assert visits.min() > 0
    inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, image.shape, strict=True))
    return {name: (sums / visits)[:, *inside] for name, sums in total.items()}


# --- windows


@pytest.mark.parametrize("length", [1, 5, 8, 9, 10, 11, 17, 40])
@pytest.mark.parametrize("patch", [1, 5, 8])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_starts_cover_the_axis_and_end_flush(length, patch, stride):
    starts = window_starts(length, patch, stride)
    assert len(starts) == max(math.ceil((length - patch) / stride), 0) + 1
    assert starts[0] == 0 and starts[-1] == max(length - patch, 0)
    assert all(0 < b - a <= stride for a, b in itertools.pairwise(starts))
    if stride <= patch:
        covered = {start + offset for start in starts for offset in range(patch)}
        assert covered >= set(range(length))


def test_number_of_windows_of_the_published_protocol():
    """112 x 112 x 80 at strides 18, 18, 4: 45 to 84 windows for the released scans, all of 88 slices."""
    counts = {
        (112, 112, 80): 1,
        (113, 112, 80): 2,
        (130, 130, 84): 8,
        (131, 112, 88): 9,
        (176, 144, 88): 45,
        (184, 144, 88): 45,
        (208, 160, 88): 84,
        (244, 160, 88): 108,
    }
    for shape, count in counts.items():
        calls = []

        def predict(patches, calls=calls):
            calls.append(len(patches))
            return {}

        sliding_window(predict, torch.zeros(shape), (112, 112, 80), (18, 18, 4), window_batch=8)
        assert sum(calls) == count and max(calls) <= 8


def test_gaussian_weight():
    weight = window_weight((12, 9, 1), "gaussian")
    assert weight.shape == (12, 9, 1) and weight.min() > 0
    assert weight.flip(0, 1).equal(weight)
    assert weight[5, 4, 0] == weight.max() and weight[0, 0, 0] == weight.min()
    sd = 12 / 8
    assert float(weight[7, 4, 0] / weight[5, 4, 0]) == pytest.approx(math.exp(-0.5 * (1.5**2 - 0.5**2) / sd**2))
    assert window_weight((3, 4, 5), "uniform").eq(1).all()


# --- averaging


@pytest.mark.parametrize("blend", ["uniform", "gaussian"])
@pytest.mark.parametrize("shape", [(20, 17, 12), (8, 6, 5), (3, 17, 4), (1, 1, 1)])
def test_constant_network_gives_a_constant_map(shape, blend):
    prob = sliding_window(constant, torch.rand(shape), PATCH, STRIDE, blend)["seg"]
    assert prob.shape == (1, *shape) and prob.dtype == torch.float32
    np.testing.assert_allclose(prob, 0.3, atol=1e-6)


@pytest.mark.parametrize("blend", ["uniform", "gaussian"])
@pytest.mark.parametrize("shape", [(20, 17, 12), (9, 6, 6), (3, 17, 4), (5, 3, 2)])
@pytest.mark.parametrize("window_batch", [1, 2, 4, 7, 1000])
def test_equals_one_window_at_a_time(shape, blend, window_batch):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = one_at_a_time(image, PATCH, STRIDE, window_weight(PATCH, blend).double().numpy())
    result = sliding_window(position_dependent, torch.from_numpy(image), PATCH, STRIDE, blend, window_batch)
    assert result.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(result[name], expected[name], atol=1e-5)


def test_windows_that_leave_gaps_are_refused():
    with pytest.raises(InputError, match="--stride_xy or --stride_z"):
        sliding_window(constant, torch.zeros(20, 20, 20), PATCH, (3, 7, 2))
    assert sliding_window(constant, torch.zeros(20, 20, 20), PATCH, PATCH)["seg"].isfinite().all()


def test_image_is_left_as_it_was():
    image = torch.rand(5, 7, 3)
    before = image.clone()
    sliding_window(position_dependent, image, PATCH, STRIDE)
    assert image.equal(before)


# --- whole scans


class Fake(torch.nn.Module):
    """A method that predicts from gray values alone, and records how it was called."""

    outputs = ("seg", "sdm")
    exclusive = False

    def __init__(self, formula):
        super().__init__()
        self.formula, self.asked, self.modes, self.autocast = formula, set(), set(), set()

    def predict(self, image, outputs=None):
        self.asked.add(outputs)
        self.modes.add((self.training, torch.is_grad_enabled()))
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        return {name: self.formula(image) for name in outputs or self.outputs}


def flags(**changes) -> Namespace:
    plain = {
        "num_classes": 1,
        "scale": 1.0,
        "patch_size": [16, 16, 16],
        "stride_xy": 9,
        "stride_z": 8,
        "blend": "uniform",
        "window": "patch",
        "window_batch": 4,
        "amp": "off",
        "head": None,
    }
    return Namespace(**{**plain, **changes})


def blob(shape) -> np.ndarray:
    """A smooth body, off centre: positive inside, negative outside, like a signed distance in voxels."""
    points = np.indices(shape) - np.array([0.45, 0.55, 0.4])[:, None, None, None] * np.reshape(shape, (3, 1, 1, 1))
    radii = np.array([0.3, 0.25, 0.3])[:, None, None, None] * np.reshape(shape, (3, 1, 1, 1))
    return ((1 - np.sqrt(((points / radii) ** 2).sum(axis=0))) * radii.min()).astype(np.float32)


@pytest.mark.parametrize("blend", ["uniform", "gaussian"])
def test_native_scale_is_the_identity(blend):
    image = np.random.default_rng(0).random((23, 17, 12)).astype(np.float32)
    (prob,) = predict_volume(Fake(torch.clone), image, flags(blend=blend), CPU)["seg"]
    assert prob.dtype == np.float32
    np.testing.assert_allclose(prob, image, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.5])
@pytest.mark.parametrize("shape", [(48, 40, 36), (47, 41, 35), (61, 31, 33)])
def test_prediction_returns_to_the_native_grid(shape, scale):
    field = blob(shape)
    (prob,) = predict_volume(Fake(torch.sigmoid), field, flags(scale=scale), CPU)["seg"]
    assert prob.shape == shape and 0 <= prob.min() and prob.max() <= 1
    mask, label = prob > 0.5, field > 0
    assert 2 * (mask & label).sum() / (mask.sum() + label.sum()) > 0.98
    shift = np.subtract(ndimage.center_of_mass(mask), ndimage.center_of_mass(label))
    assert np.abs(shift).max() < 0.15  # voxels


@pytest.mark.parametrize("shape", [(23, 17, 30), (23, 9, 30)], ids=["larger than the patch", "smaller along an axis"])
def test_the_whole_window_sees_the_scan_once_and_never_less_than_a_patch(shape):
    seen = []

    def formula(patches):
        seen.append(tuple(patches.shape))
        return patches.clone()

    image = np.random.default_rng(0).random(shape).astype(np.float32)
    options = flags(window="whole", blend="gaussian")
    (prob,) = predict_volume(Fake(formula), image, options, CPU, ("seg",))["seg"]
    np.testing.assert_allclose(prob, image, atol=1e-6)
    assert seen == [(1, 1, *np.maximum(shape, 16))]


def test_sums_are_kept_on_the_host_where_a_gpu_has_no_room(monkeypatch):
    """Four floats per voxel and as much again for the network; without a GPU, what it has free is made up."""
    gpu, room = torch.device("cuda", 0), 2 * 4 * (3 + 1) * 20 * 20 * 20
    for free, expected in ((room, gpu), (room - 1, CPU)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free - 7, 10**12))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)  # 7 of them free
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
        assert device_with_room(gpu, room // 2) == expected
    assert device_with_room(CPU, 10**15) == CPU
    asked = []
    monkeypatch.setattr("inference.windows.device_with_room", lambda device, needed: asked.append(needed) or CPU)
    predict_volume(Fake(torch.sigmoid), blob((20, 20, 20)), flags(), CPU, ("seg",))
    predict_volume(Fake(torch.sigmoid), blob((20, 20, 20)), flags(num_classes=3), CPU, ("seg",))
    assert asked == [room // 2, room // 2 // 4 * (2 + 3 * 2)]  # image, visits, sums and quotients of each class


def test_only_the_wanted_outputs_without_dropout_or_gradients():
    method = Fake(torch.sigmoid)
    method.train()
    assert set(predict_volume(method, blob((20, 20, 20)), flags(), CPU, ("sdm",))) == {"sdm"}
    assert set(predict_volume(method, blob((20, 20, 20)), flags(), CPU)) == {"seg", "sdm"}
    assert method.asked == {("sdm",), None}
    assert method.modes == {(False, False)}


def test_dtml_runs_only_the_networks_that_the_outputs_need(tiny_options):
    method = METHODS["dtml"](tiny_options("dtml"))
    calls = {name: [] for name, _ in method.named_children()}
    for name, network in method.named_children():
        network.register_forward_hook(lambda *_, name=name: calls[name].append(name))
    options, image = flags(patch_size=[32, 32, 32], stride_xy=32, stride_z=32), blob((32, 32, 32))
    predict_volume(method, image, options, CPU, ("seg",))
    assert sorted(map(len, calls.values())) == [0, 1]
    predict_volume(method, image, options, CPU)
    assert sorted(map(len, calls.values())) == [1, 2]  # all three outputs in one pass


def test_mixed_precision_is_on_only_where_asked_for():
    for amp, expected in (("off", False), ("bf16", True)):
        method = Fake(torch.sigmoid)
        assert predict_volume(method, blob((16, 16, 16)), flags(amp=amp), CPU)["seg"].dtype == np.float32
        assert method.autocast == {expected}


def test_arrays_that_torch_cannot_take_as_they_are():
    image = blob((20, 18, 16))
    for odd in (image[::-1], np.asfortranarray(image), image.astype(np.float64)):
        (prob,) = predict_volume(Fake(torch.sigmoid), odd, flags(), CPU)["seg"]
        np.testing.assert_allclose(prob, 1 / (1 + np.exp(-odd)), atol=1e-6)


def test_dice_of_cases(tmp_path):
    """One case found, one missed, one half found: mean Dice (1 + 0 + 2/3) / 3."""
    label = np.zeros((16, 16, 16), np.uint8)
    label[4:8, 4:12, 4:12] = 1
    half = label.copy()
    half[4:6] = 0
    for name, seen in (("found", label), ("missed", 0 * label), ("half", half)):
        case_path(tmp_path, name).parent.mkdir()
        with h5py.File(case_path(tmp_path, name), "w") as file:
            file["image"], file["label"] = seen + 0.01 * np.indices(seen.shape)[0], label
    method, options = Fake(torch.clone), flags(root_path=str(tmp_path))
    assert dice_of_cases(method, ["found", "missed", "half"], options, CPU) == [pytest.approx((1 + 0 + 2 / 3) / 3)]
    assert method.asked == {("seg",)}
    assert dice_of_cases(method, ["found"], flags(root_path=str(tmp_path), head="sdm"), CPU) == [1]
    assert method.asked == {("seg",), ("sdm",)}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_every_class_returns_to_the_native_grid(scale):
    field = blob((40, 36, 32))
    method = Fake(lambda image: torch.cat((image, 1 - image / 2, image - 3), dim=1).sigmoid())
    probs = predict_volume(method, field, flags(scale=scale), CPU, ("seg",))["seg"]
    assert probs.shape == (3, *field.shape)
    for prob, formula in zip(probs, (lambda x: x, lambda x: 1 - x / 2, lambda x: x - 3), strict=True):
        (alone,) = predict_volume(Fake(lambda x, f=formula: f(x).sigmoid()), field, flags(scale=scale), CPU)["seg"]
        np.testing.assert_array_equal(prob, alone)


def test_dice_of_cases_has_a_number_per_class(tmp_path):
    """The image says which class is seen: the first whole, of the second a half, and the third where it is not."""
    label = np.zeros((16, 16, 16), np.uint8)
    label[2:6], label[6:10, 4:12], label[12:] = 1, 2, 3
    seen = label.copy()
    seen[6:8], seen[12:] = 0, 0
    seen[:1] = 3
    case_path(tmp_path, "a").parent.mkdir()
    with h5py.File(case_path(tmp_path, "a"), "w") as file:
        file["image"], file["label"] = seen.astype(np.float32), label
    method = Fake(lambda image: torch.cat([(image == number).float() for number in (1, 2, 3)], dim=1))
    for method.exclusive in (True, False):
        dice = dice_of_cases(method, ["a"], flags(root_path=str(tmp_path), num_classes=3), CPU)
        assert dice == [1, pytest.approx(2 / 3), 0]
