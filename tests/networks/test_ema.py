"""The teacher's moving average, its noise, and statistics over repeated passes."""

import weakref

import pytest
import torch
from torch import nn

from methods.mean_teacher import Teacher, mean_over_passes
from methods.ua_mt import UAMT
from networks.ema import frozen_copy, update_ema
from utils.errors import InputError


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """Student and teacher of different weights and different batch-norm statistics."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv3d(1, 3, 1), nn.BatchNorm3d(3))
    teacher = frozen_copy(student)
    student(torch.randn(2, 1, 4, 4, 4))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.rand_like(parameter))
    return student, teacher


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_frozen_copy_has_its_own_memory_and_no_gradient():
    student = nn.Linear(2, 2)
    teacher = frozen_copy(student)
    assert same(student, teacher)
    nn.init.zeros_(student.weight)
    assert not same(student, teacher)
    assert student.weight.requires_grad and not any(p.requires_grad for p in teacher.parameters())


def test_update_is_the_weighted_mean_of_the_parameters_and_leaves_the_buffers(pair):
    student, teacher = pair
    weights = zip(teacher.parameters(), student.parameters(), strict=True)
    expected = [0.9 * t.double() + 0.1 * s.double() for t, s in weights]
    buffers = [b.clone() for b in teacher.buffers()]
    update_ema(teacher, student, 0.9)
    for parameter, value in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.double(), value, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(b, old) for b, old in zip(teacher.buffers(), buffers, strict=True))


def test_decay_0_copies_exactly(pair):
    student, teacher = pair
    update_ema(teacher, student, 0.0)
    assert same(student, teacher)


@pytest.mark.parametrize(("iteration", "decay"), [(0, 0.0), (1, 0.5), (3, 0.75), (99, 0.99), (5000, 0.99)])
def test_the_teacher_starts_with_the_true_average(pair, tiny_options, iteration, decay):
    student, _ = pair
    teacher = Teacher(student, tiny_options("ua_mt"))
    with torch.no_grad():
        teacher.network[0].weight.zero_()
    teacher.update(student, iteration)
    torch.testing.assert_close(teacher.network[0].weight, (1 - decay) * student[0].weight)


def test_the_teacher_is_saved_but_not_trained(tiny_options):
    method = UAMT(tiny_options("ua_mt"))
    assert sum(key.startswith("teacher.") for key in method.state_dict()) == len(method.student.state_dict())
    driven = {id(p) for turn in method.turns() for group in turn.optimizer.param_groups for p in group["params"]}
    assert driven == {id(p) for p in method.student.parameters()}


def test_noise_is_clipped_normal_and_drawn_per_voxel(tiny_options):
    teacher, silent = (UAMT(tiny_options("ua_mt", "--noise_sd", sd)).teacher for sd in ("0.1", "0"))
    torch.manual_seed(0)
    image = torch.full((2, 1, 32, 32, 32), 5.0)
    noise = teacher.perturb(image) - image
    assert float(noise.abs().max()) == pytest.approx(0.2, abs=1e-6)
    assert float((noise.abs() > 0.1999).float().mean()) == pytest.approx(0.0455, abs=0.005)  # two-sided, 2 sd
    assert float(noise.mean()) == pytest.approx(0, abs=2e-3)
    assert float((noise.abs() < 0.1).float().mean()) == pytest.approx(0.6827, abs=0.01)  # 1 sd
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(silent.perturb(image), image)


@pytest.mark.parametrize(
    ("volumes", "passes", "calls"),
    [(2, 8, [4, 4, 4, 4]), (2, 7, [4, 4, 4, 2]), (4, 8, [4] * 8), (3, 2, [3, 3]), (1, 8, [4, 4]), (2, 1, [2])],
)
def test_passes_run_in_groups_of_at_most_the_batch(volumes, passes, calls):
    seen = []

    def measure(image):
        seen.append(image.clone())
        return {"x": image + len(seen)}

    image = torch.arange(volumes, dtype=torch.float32).view(-1, 1, 1, 1, 1).expand(-1, 1, 2, 2, 2)
    mean = mean_over_passes(measure, image, passes, group=4)["x"]
    assert [len(x) for x in seen] == calls
    order = torch.arange(volumes).repeat(calls[0] // volumes)
    assert torch.equal(
        seen[0][:, 0, 0, 0, 0].long(), order
    )  # the volumes in turn, as `repeat` of the public implementation
    shift = sum((index + 1) * size // volumes for index, size in enumerate(calls)) / passes
    torch.testing.assert_close(mean, image + shift)


def test_means_are_float32_without_gradient_and_no_map_is_kept():
    alive: list[weakref.ref] = []
    scale = torch.ones(1, requires_grad=True)

    def measure(image):
        assert sum(reference() is not None for reference in alive) <= 1  # the previous one, still bound
        maps = (scale * torch.rand_like(image)).bfloat16()
        alive.append(weakref.ref(maps))
        return {"x": maps}

    mean = mean_over_passes(measure, torch.zeros(2, 1, 4, 4, 4), 8, group=2)["x"]
    assert mean.dtype == torch.float32 and not mean.requires_grad and len(alive) == 8


@pytest.mark.parametrize(
    "flags",
    [
        ["--ema_decay", "1"],
        ["--ema_decay", "-0.1"],
        ["--noise_sd", "-1"],
        ["--noise_clip", "nan"],
        ["--mc_passes", "0"],
    ],
)
def test_bad_flags_are_named(tiny_options, flags):
    with pytest.raises(InputError, match=flags[0]):
        UAMT(tiny_options("ua_mt", *flags))


def test_cons_on_picks_the_volumes(tiny_options, make_batch):
    batch = make_batch(3, 1)
    for choice, count in (("unlabeled", 1), ("all", 4)):
        teacher = UAMT(tiny_options("ua_mt", "--cons_on", choice)).teacher
        assert torch.equal(batch.image[teacher.sees(batch)], batch.image[-count:])
