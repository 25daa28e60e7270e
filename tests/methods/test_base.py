"""What several methods share: the student and its teacher, and the refusal of batches without unlabeled cases."""

import pytest
import torch

from methods import METHODS
from methods.mean_teacher import MeanTeacherMethod
from utils.errors import InputError

MEAN_TEACHERS = [name for name, method in METHODS.items() if issubclass(method, MeanTeacherMethod)]


@pytest.mark.parametrize("method", ["asdnet", "sassnet", "ua_mt"])  # ua_mt: --cons_on unlabeled, its default
@pytest.mark.parametrize(
    "flags",
    [
        ["--unlabelnum", "0"],
        ["--unlabelnum", "0", "--labeled_bs", "2"],
        ["--labeled_bs", "4"],
        ["--batch_size", "2", "--labeled_bs", "2"],
    ],
)
def test_methods_that_need_unlabeled_cases_say_so(tiny_options, method, flags):
    options = tiny_options(method, *flags)
    with pytest.raises(InputError, match=f"unlabeled volumes in every batch.*--labeled_bs {options.labeled_bs}, "):
        METHODS[method](options)


@pytest.mark.parametrize("method", MEAN_TEACHERS)
def test_mean_teachers_that_agree_on_all_volumes_do_without(tiny_options, method):
    METHODS[method](tiny_options(method, "--cons_on", "all", "--unlabelnum", "0"))
    with pytest.raises(InputError, match="--cons_on unlabeled needs"):
        METHODS[method](tiny_options(method, "--cons_on", "unlabeled", "--unlabelnum", "0"))


@pytest.mark.parametrize("method", MEAN_TEACHERS)
def test_student_and_teacher_are_both_tested_the_student_first(tiny_options, method):
    network, image = METHODS[method](tiny_options(method)).eval(), torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        network.teacher.network.heads["softmax"].weight.mul_(3)
        probs = network.predict(image)
        for name, vnet in (("seg", network.student), ("teacher", network.teacher.network)):
            torch.testing.assert_close(probs[name], vnet(image)["softmax"].softmax(dim=1)[:, 1:])
    assert tuple(probs) == ("seg", "teacher") and not torch.equal(probs["seg"], probs["teacher"])


@pytest.mark.parametrize("method", MEAN_TEACHERS)
def test_the_teacher_follows_after_every_step(tiny_options, method):
    network = METHODS[method](tiny_options(method))
    with torch.no_grad():
        network.student.heads["softmax"].weight.add_(1)
    network.after_step(0)  # the first update copies
    assert torch.equal(network.student.heads["softmax"].weight, network.teacher.network.heads["softmax"].weight)
