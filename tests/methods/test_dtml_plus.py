"""DTML+: its terms, its teachers, and the strongly changed views of unlabeled crops."""

import pytest
import torch
import torch.nn.functional as F

from methods.dtml_plus import paste, strong_view
from utils.errors import InputError
from utils.losses import dice_ce_loss

ITERATION, K = 150, 20.0  # of 200 iterations: the weight of the ramp is well above 0
FLAGS = f"--labeled_bs 2 --batch_size 4 --sdm_k_start 0 --sdm_k {K} --pseudo_weight 0.5 --con_scale 3".split()


@pytest.fixture
def method(build):
    """Its teachers differ from the students, and from each other."""
    torch.manual_seed(0)
    method = build("dtml_plus", *FLAGS).train()
    with torch.no_grad():
        for teacher in (method.teacher_s, method.teacher_d):
            for parameter in teacher.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return method


def inputs_of(method) -> dict[str, torch.Tensor]:
    """What each network sees in the next step, by its name."""
    seen = {}
    for name in ("m_s", "m_d", "teacher_s", "teacher_d"):
        getattr(method, name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    return seen


def test_terms_are_those_of_dtml_and_the_losses_of_the_teachers_labels(method, make_batch):
    method.options.view_strength = 0.0
    batch = make_batch()
    terms, weight = method.training_step(batch, ITERATION), method.consistency_weight(ITERATION)
    with torch.no_grad():
        seg = method.teacher_s(batch.image[2:])["seg"].sigmoid()
        mask = torch.sigmoid(-K * method.teacher_d(batch.image[2:])["sdm"])
        target = ((seg + mask) / 2 > 0.5).float()
        logits, sdm = method.m_s(batch.image)["seg"], method.m_d(batch.image)["sdm"]
    assert 0.01 < target.mean() < 0.99
    pseudo = dice_ce_loss(logits[2:], target) + dice_ce_loss(-K * sdm[2:], target)
    expected = {
        "seg": dice_ce_loss(logits[:2], batch.label),
        "mask": dice_ce_loss(-K * sdm[:2], batch.label),
        "consistency": 3 * weight * F.mse_loss(torch.sigmoid(-K * sdm), logits.sigmoid()),
        "pseudo": 0.5 * weight * pseudo,
    }
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term.detach(), expected[name], rtol=1e-4, atol=1e-6)


def test_students_see_the_changed_view_of_unlabeled_crops_alone_and_teachers_the_crop(method, make_batch):
    seen, image = inputs_of(method), make_batch().image
    method.training_step(make_batch(), ITERATION)
    for name in ("m_s", "m_d"):
        assert torch.equal(seen[name][:2], image[:2])
        assert all(
            not torch.allclose(view, crop, atol=0.01) for view, crop in zip(seen[name][2:], image[2:], strict=True)
        )
    assert torch.equal(seen["m_s"], seen["m_d"])
    assert torch.equal(seen["teacher_s"], image[2:]) and torch.equal(seen["teacher_d"], image[2:])


def test_teachers_follow_with_their_statistics_and_are_never_in_training_mode(method, make_batch):
    method.training_step(make_batch(), ITERATION)  # changes the students' statistics
    assert method.m_s.training and method.m_d.training
    pairs = (method.teacher_s, method.m_s), (method.teacher_d, method.m_d)
    assert not any(module.training for teacher, _ in pairs for module in teacher.modules())

    def tensors(network):
        return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]

    before = [[tensor.clone() for tensor in tensors(teacher)] for teacher, _ in pairs]
    method.after_step(1)  # decay 1/2
    for (teacher, student), old in zip(pairs, before, strict=True):
        for now, then, other in zip(tensors(teacher), old, tensors(student), strict=True):
            torch.testing.assert_close(now, (then + other) / 2)
    assert not torch.equal(before[0][-1], tensors(method.m_s)[-1])
    method.after_step(0)
    for teacher, student in pairs:
        assert all(torch.equal(a, b) for a, b in zip(tensors(teacher), tensors(student), strict=True))


def test_two_published_files_start_both_networks_and_their_averages(method, monkeypatch):
    started = []
    monkeypatch.setattr("methods.base.load_published", lambda network, path: started.append((network, path)) or [])
    method.load_pretrained(["first", "second"])
    networks = method.m_s, method.m_d, method.teacher_s, method.teacher_d
    assert started == list(zip(networks, ["first", "second"] * 2, strict=True))


def test_there_must_be_unlabeled_cases(build):
    with pytest.raises(InputError, match=r"(?s)dtml_plus.*--unlabelnum"):
        build("dtml_plus", "--unlabelnum", "0")


def test_pasted_crops_are_learned_and_teachers_see_them_whole(method, make_batch):
    method.options.view_strength, method.options.paste = 0.0, True
    seen, batch = inputs_of(method), make_batch()
    method.training_step(batch, ITERATION)
    assert torch.equal(seen["teacher_s"], batch.image[2:]) and torch.equal(seen["m_s"][:2], batch.image[:2])
    for crop, own in zip(seen["m_s"][2:], batch.image[2:], strict=True):
        pasted = [((crop == other) & (crop != own)).float().mean() for other in batch.image[:2]]
        assert 0.2 < max(pasted) < 0.8 and min(pasted) == 0


# --- pasted boxes


def test_a_box_or_all_but_it_is_pasted_with_its_label():
    torch.manual_seed(0)
    image, target = torch.zeros(24, 1, 12, 9, 6), torch.zeros(24, 2, 12, 9, 6)
    number = torch.arange(1.0, 5).view(4, 1, 1, 1, 1)
    labeled, label = number.expand(4, 1, 12, 9, 6), torch.cat([number, 10 * number], 1).expand(4, 2, 12, 9, 6)
    mixed, mixed_target = paste(image, target, labeled, label)
    assert torch.equal(mixed_target, torch.cat([mixed, 10 * mixed], 1))  # the labels of the same crop, there alone
    corners = set()
    for crop in mixed[:, 0] > 0:
        box = crop if crop.sum() == 8 * 6 * 4 else ~crop
        assert box.sum() == 8 * 6 * 4
        x, y, z = box.nonzero().amin(0).tolist()
        assert box[x : x + 8, y : y + 6, z : z + 4].all()
        corners.add((x, y, z))
    assert len(corners) > 12
    boxed = [int(crop.gt(0).sum()) == 8 * 6 * 4 for crop in mixed]
    assert any(boxed) and not all(boxed)
    assert sorted(crop.max().item() for crop in mixed) == sorted([1, 2, 3, 4] * 6)  # each as often as the others


# --- strong views


@pytest.fixture
def crops(make_batch) -> torch.Tensor:
    return 5 + 3 * make_batch(3, 1).image


def test_a_strength_of_0_changes_nothing(crops):
    assert strong_view(crops, 0.0) is crops


def test_crops_are_changed_differently_and_keep_what_they_show(crops):
    torch.manual_seed(0)
    same = crops[:1].expand(16, -1, -1, -1, -1)
    views = strong_view(same, 1.0)
    assert views.shape == same.shape and views.isfinite().all()
    assert len({round(float(view.mean()), 4) for view in views}) == len(views)
    alike = torch.corrcoef(torch.cat([crops[0].reshape(1, -1), views.flatten(1)]))[0, 1:]
    assert alike.min() > 0.5 and alike.median() < 0.99


def test_a_view_does_not_depend_on_the_unit_of_the_image(crops):
    """Changes are relative to the crop's own mean and standard deviation."""
    torch.manual_seed(0)
    view = strong_view(crops, 1.0)
    torch.manual_seed(0)
    torch.testing.assert_close(strong_view(100 * crops - 7, 1.0), 100 * view - 7, rtol=1e-3, atol=1e-2)


def test_a_weaker_view_is_nearer_to_the_crop(crops):
    def distance(strength):
        torch.manual_seed(0)
        return float((strong_view(crops, strength) - crops).abs().mean())

    assert distance(0.01) < 0.02 * float(crops.std()) and distance(0.01) < distance(0.5) < distance(1.0)


def test_a_constant_crop_stays_finite():
    assert strong_view(torch.full((4, 1, 8, 8, 8), 3.0), 1.0).isfinite().all()
