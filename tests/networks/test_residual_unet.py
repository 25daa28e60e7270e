"""The residual-encoder U-Net, where it differs from the V-Net's layers."""

import torch
import torch.nn.functional as F

from networks.residual_unet import Halve


def test_halving_is_average_pooling():
    x = torch.rand(2, 3, 8, 6, 4, dtype=torch.float64).to(memory_format=torch.channels_last_3d).requires_grad_()
    weights = torch.rand(2, 3, 4, 3, 2, dtype=torch.float64)
    ours, theirs = Halve()(x), F.avg_pool3d(x, 2)
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == theirs.stride()  # channels last in both
    torch.testing.assert_close(*(torch.autograd.grad((weights * y).sum(), x) for y in (ours, theirs)))
