"""What several methods share: student and teacher, the two players of a game, the refusal of batches without
unlabeled cases."""

import copy

import pytest
import torch

from methods import METHODS
from methods.mean_teacher import MeanTeacherMethod
from utils.errors import InputError

MEAN_TEACHERS = [name for name, method in METHODS.items() if issubclass(method, MeanTeacherMethod)]
TWO_PLAYERS = ["asdnet", "sassnet"]
ALL_LABELED = ["--labeled_bs 4", "--batch_size 2 --labeled_bs 2"]


@pytest.mark.parametrize("method", [*TWO_PLAYERS, "ua_mt"])  # ua_mt: --cons_on unlabeled, its default
@pytest.mark.parametrize("flags", ["--unlabelnum 0", "--unlabelnum 0 --labeled_bs 2", *ALL_LABELED])
def test_methods_that_need_unlabeled_cases_say_so(build, method, flags):
    with pytest.raises(InputError, match=r"(?s)--labeled_bs.*--unlabelnum"):
        build(method, *flags.split())


def test_published_weights_are_for_vnets(build, tmp_path):
    with pytest.raises(InputError, match=r"(?s)--pretrained.*--network"):
        build("dtml", "--network", "residual_unet").load_pretrained([tmp_path / "file.pth"])


@pytest.mark.parametrize("method", MEAN_TEACHERS)
def test_mean_teachers_that_agree_on_all_cases_do_without(build, make_batch, method):
    network = build(method, "--cons_on", "all", "--unlabelnum", "0")
    assert all(torch.isfinite(term) for term in network.training_step(make_batch(2, 0, size=16), 0).values())
    with pytest.raises(InputError, match="--cons_on"):
        build(method, "--cons_on", "unlabeled", "--unlabelnum", "0")


@pytest.mark.parametrize("method", MEAN_TEACHERS)
def test_student_and_teacher_are_both_tested_the_student_first(build, monkeypatch, method):
    network, image = build(method).eval(), torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        network.teacher.network.heads["softmax"].weight.mul_(3)
        probs = network.predict(image)
        for name, vnet in (("seg", network.student), ("teacher", network.teacher.network)):
            torch.testing.assert_close(probs[name], vnet(image)["softmax"].softmax(dim=1)[:, 1:])
        monkeypatch.setattr(network.teacher.network, "forward", None)  # not run where it is not asked for
        assert list(network.predict(image, ["seg"])) == ["seg"]
    assert tuple(probs) == ("seg", "teacher") and not torch.equal(probs["seg"], probs["teacher"])


@pytest.mark.parametrize("method", MEAN_TEACHERS)
def test_the_first_update_copies_the_student_but_not_its_batch_norm_statistics(build, make_batch, method):
    network = build(method)
    turn = network.turns()[0]
    sum(turn.step(make_batch(size=16), 0).values()).backward()
    turn.optimizer.step()
    student, teacher = network.student, network.teacher.network
    assert not torch.equal(student.heads["softmax"].weight, teacher.heads["softmax"].weight)
    network.after_step(0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    assert not torch.equal(student.encoder[0][1].running_mean, teacher.encoder[0][1].running_mean)
    assert teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("method", TWO_PLAYERS)
def test_no_turn_changes_or_reaches_the_other_player(build_engine, make_batch, method):
    engine, batch = build_engine(method), make_batch(1, 1)
    method = engine.method
    for turn, own, other in zip(engine.turns, ("network", "critic"), ("critic", "network"), strict=True):
        method.zero_grad(set_to_none=True)
        before = copy.deepcopy(method.state_dict())
        engine._take_turn(turn, batch, rate=0.01)
        after = method.state_dict()
        assert {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])} == {own}
        assert all(parameter.grad is None for parameter in getattr(method, other).parameters())
        assert all(parameter.grad is not None for parameter in getattr(method, own).parameters())


@pytest.mark.parametrize("method", TWO_PLAYERS)
def test_the_critic_keeps_its_own_rate(build_engine, make_batch, method):
    for flags, rate in ((), 1e-4), (("--critic_lr", "0.002"), 0.002):
        engine = build_engine(method, "--lr_step", "10", *flags)
        engine.step(make_batch(1, 1))
        rates = [turn.optimizer.param_groups[0]["lr"] for turn in engine.turns]
        assert rates == [pytest.approx(0.01 * 0.1**15), rate]
