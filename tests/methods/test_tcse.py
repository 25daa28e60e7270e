"""TCSE's transformations against NumPy and SciPy, and when its consistency loss is zero."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from methods.tcse import Transformation, draw_transformation
from networks.ema import update_ema
from options.methods import TCSE_KINDS
from runtime.device import precision
from utils.errors import InputError

ITERATION = 150  # of 200
SIZE = 16  # of the cubes: the smallest that the V-Net takes
FLIPS = ((), (-3,), (-2,), (-3, -2))


class Pointwise(nn.Module):
    """Logits that depend on a voxel's own intensity only: such a network commutes with turns and flips."""

    def __init__(self, classes=1):
        super().__init__()
        self.classes = classes

    def forward(self, image):
        return {"softmax": torch.cat([-image, 2 * image, 1 - image][: self.classes + 1], 1)}


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flips", FLIPS)
def test_turns_and_flips_are_those_of_numpy_and_exactly_undone(turns, flips):
    volume = torch.rand(2, 6, 6, 5)
    pi = Transformation(turns=turns, flips=flips)
    moved = pi.apply(volume)
    assert np.array_equal(moved.numpy(), np.flip(np.rot90(volume.numpy(), turns, (1, 2)), flips))
    back, valid = pi.undo(moved)
    assert torch.equal(back, volume) and valid.shape == (1, 6, 6, 5) and valid.all()


@pytest.mark.parametrize("zoom", [0.9, 1.1])
def test_zoom_is_linear_interpolation_about_the_centre_of_the_plane(zoom):
    volume = torch.rand(1, 9, 12, 5)
    x, y, z = np.meshgrid(*(np.arange(n, dtype=float) for n in (9, 12, 5)), indexing="ij")
    at = [(x - 4) / zoom + 4, (y - 5.5) / zoom + 5.5, z]
    expected = ndimage.map_coordinates(volume[0].double().numpy(), at, order=1, mode="nearest")
    np.testing.assert_allclose(Transformation(zoom).apply(volume)[0], expected, atol=1e-5)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flips", FLIPS)
@pytest.mark.parametrize("zoom", [0.9, 1.1])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_zoomed_ramp_comes_back_wherever_it_is_known(turns, flips, zoom, amp):
    """Linear interpolation is exact for a ramp, so whatever differs is a misplaced voxel."""
    axes = torch.meshgrid(torch.arange(21.0), torch.arange(21.0), torch.arange(4.0), indexing="ij")
    ramp = (axes[0] - 3 * axes[1] + 7 * axes[2])[None]
    pi = Transformation(zoom, turns, flips)
    with precision(ramp.device, amp):
        back, valid = pi.undo(pi.apply(ramp))
    inner = valid.clone()
    if zoom < 1:  # the outermost voxels are interpolated with the repeated border
        inner[:, [0, -1]] = inner[:, :, [0, -1]] = False
    assert (back - ramp).abs()[inner].max() < 1e-4
    known = 2 * int(10 / 1.1) + 1 if zoom > 1 else 21  # voxels within 10 / zoom of the centre, per in-plane axis
    assert valid.sum() == known * known * 4
    if zoom > 1:
        assert (back - ramp).abs()[~valid].max() > 0.5  # the margin is lost indeed


def test_draws_reach_all_eight_symmetries_and_the_whole_range_of_zooms():
    torch.manual_seed(0)
    pis = [draw_transformation(torch.Size((1, 32, 32, 32)), TCSE_KINDS, 0.1) for _ in range(300)]
    marked = torch.arange(4.0).view(1, 2, 2, 1)
    images = {tuple(Transformation(1.0, pi.turns, pi.flips).apply(marked).flatten().tolist()) for pi in pis}
    assert len(images) == 8
    assert {pi.turns for pi in pis} == {0, 1, 2, 3} and {pi.flips for pi in pis} == set(FLIPS)
    zooms = [pi.zoom for pi in pis]
    assert 0.9 <= min(zooms) < 0.91 and 1.09 < max(zooms) <= 1.1


def test_kinds_can_be_left_out_and_oblong_planes_keep_their_shape():
    torch.manual_seed(0)
    oblong = [draw_transformation(torch.Size((1, 48, 32, 32)), TCSE_KINDS, 0.1) for _ in range(50)]
    assert {pi.turns for pi in oblong} == {0, 2}
    assert all(pi.apply(torch.rand(1, 48, 32, 4)).shape == (1, 48, 32, 4) for pi in oblong[:5])
    assert draw_transformation(torch.Size((1, 32, 32, 32)), (), 0.1) == Transformation()


def test_loss_is_zero_without_perturbation_and_has_a_gradient_otherwise(build, make_batch):
    method, batch = build("tcse", "--pi", "--noise_sd", "0"), make_batch(size=SIZE)
    assert method.training_step(batch, ITERATION)["consistency"] == 0
    with torch.no_grad():
        method.teacher.network.heads["softmax"].weight.add_(0.5)
    term = method.training_step(batch, ITERATION)["consistency"]
    assert term > 0
    term.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert method.student.encoder[0][0].weight.grad.abs().max() > 0
    update_ema(method.teacher.network, method.student, 0.0)
    assert method.training_step(batch, ITERATION)["consistency"] == 0


@pytest.mark.parametrize(("kinds", "tolerance"), [(["turns", "flips"], 1e-12), (["turns", "flips", "zoom"], 1e-5)])
def test_a_network_that_commutes_with_the_transformations_has_no_loss(build, make_batch, kinds, tolerance):
    method, batch = build("tcse", "--pi", *kinds, "--noise_sd", "0"), make_batch(4, 0, size=SIZE)
    axes = torch.meshgrid(*[torch.linspace(-0.5, 0.5, SIZE)] * 3, indexing="ij")
    image = (axes[0] + 2 * axes[1] * axes[2])[None, None].repeat(4, 1, 1, 1, 1)  # smooth: zooms hardly matter
    batch = type(batch)(image, batch.label, batch.cases)
    method.student, method.teacher.network = Pointwise(), Pointwise()
    assert method.training_step(batch, ITERATION)["consistency"] < tolerance * method.consistency_weight(ITERATION)
    method.teacher.network = nn.Sequential(nn.Conv3d(1, 1, 3, padding=1), Pointwise())  # does not commute
    assert method.training_step(batch, ITERATION)["consistency"] > 1e-3 * method.consistency_weight(ITERATION)


def test_each_case_gets_its_own_transformation(build, make_batch, monkeypatch):
    drawn = []

    def draw(*arguments):
        drawn.append(draw_transformation(*arguments))
        return drawn[-1]

    monkeypatch.setattr("methods.tcse.draw_transformation", draw)
    build("tcse").training_step(make_batch(size=SIZE), 0)
    assert len(drawn) == len(set(drawn)) == 4


@pytest.mark.parametrize("classes", [1, 2])
def test_unknown_voxels_do_not_count(build, make_batch, monkeypatch, classes):
    """With an enlargement the loss is the mean over known voxels and all classes, whatever stands in the margin."""
    flags = "--noise_sd", "0", "--num_classes", str(classes)
    method, batch = build("tcse", *flags), make_batch(size=SIZE, classes=classes)
    method.student, method.teacher.network = Pointwise(classes), Pointwise(classes)
    monkeypatch.setattr("methods.tcse.draw_transformation", lambda *_: Transformation(1.1))
    target, valid = method._target(batch.image)
    prob = torch.softmax(method.student(batch.image)["softmax"], 1)
    target = torch.cat([1 - target.sum(1, keepdim=True), target], 1)
    expected = (prob - target)[valid.expand_as(prob)].double().square().mean()
    term = method.training_step(batch, ITERATION)["consistency"]
    torch.testing.assert_close(term.double(), method.consistency_weight(ITERATION) * expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("zoom", ["1", "-0.1", "nan"])
def test_a_zoom_to_nothing_is_refused(build, zoom):
    with pytest.raises(InputError, match="--pi_zoom"):
        build("tcse", "--pi_zoom", zoom)
