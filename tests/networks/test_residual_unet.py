"""The residual-encoder U-Net, where it differs from the V-Net's layers."""

import torch
import torch.nn.functional as F

from networks.residual_unet import Halve


def test_halving_is_average_pooling():
    x = torch.rand(2, 3, 8, 6, 4, dtype=torch.float64).to(memory_format=torch.channels_last_3d).requires_grad_()
    weights = torch.rand(2, 3, 4, 3, 2, dtype=torch.float64)
    results = []
    for halve in (Halve(), lambda x: F.avg_pool3d(x, 2)):
        y = halve(x)
        results += [y, *torch.autograd.grad((weights * y).sum(), x)]
    assert y.is_contiguous(memory_format=torch.channels_last_3d) == results[0].is_contiguous(
        memory_format=torch.channels_last_3d
    )
    torch.testing.assert_close(results[:2], results[2:])
