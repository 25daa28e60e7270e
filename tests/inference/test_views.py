"""Means over symmetric views against what they are by hand."""

import pytest
import torch

from inference.views import InViews, mean_over_views
from methods import METHODS

SHAPE = (2, 1, 4, 4, 3)


def ramp(axis: int) -> torch.Tensor:
    """0, 1, 2, ... along an axis of the patch."""
    return torch.arange(SHAPE[axis]).float().view([-1 if a == axis else 1 for a in range(5)])


@pytest.mark.parametrize(
    ("tta", "weight"),
    [("none", ramp(2) + 10 * ramp(3)), ("flips", 1.5 + 10 * 1.5), ("all", 1.5 + 10 * 1.5)],  # means of 0 to 3
)
def test_views_are_turned_back_before_the_mean(tta, weight):
    image = torch.rand(SHAPE)
    maps = mean_over_views(lambda view: {"seg": view * (ramp(2) + 10 * ramp(3))}, image, tta)
    torch.testing.assert_close(maps["seg"], image * weight)


def test_flips_leave_what_quarter_turns_even_out():
    image, weight = torch.ones(SHAPE), ramp(2) * ramp(2)  # 0, 1, 4, 9: the flipped mean is 4.5, 2.5, 2.5, 4.5
    flipped, turned = (mean_over_views(lambda x: {"seg": x * weight}, image, tta)["seg"] for tta in ("flips", "all"))
    expected = torch.tensor([4.5, 2.5, 2.5, 4.5])
    torch.testing.assert_close(flipped[0, 0, :, 0, 0], expected)
    torch.testing.assert_close(turned[0, 0, :, :, 0], (expected[:, None] + expected) / 2)


def test_a_method_in_views_predicts_the_outputs_asked_for(tiny_options):
    method = METHODS["dtml"](tiny_options("dtml")).eval()
    image, views = torch.randn(1, 1, 32, 32, 32), InViews(method, "flips")
    assert views.outputs == method.outputs
    with torch.no_grad():
        (name,), (prob,) = zip(*views.predict(image, ["sdm"]).items(), strict=True)
        axes = [[], [2], [3], [2, 3]]
        expected = sum(method.predict(image.flip(a), ["sdm"])["sdm"].flip(a) for a in axes) / 4
    assert name == "sdm"
    torch.testing.assert_close(prob, expected)
