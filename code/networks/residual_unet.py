"""A residual-encoder U-Net after nnU-Net's ResEnc M (Isensee et al., MICCAI 2024), with widths and norms of the V-Net.

As there: a stem; residual blocks on the way down, of which the first of each level halves; on the way up a transposed
convolution, the skip beside it, and one convolution. Differs: five levels instead of six, ReLU instead of leaky ReLU,
channels that double at each level, dropout.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from networks.base import Network, norm_layer, with_norm_relu

BLOCKS = (1, 3, 4, 6, 6)  # residual blocks of the levels, as in ResEnc M


class Halve(nn.Module):
    """The mean of every 2x2x2 voxels. The gradient of AvgPool3d has no form on a GPU that repeats exactly."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5, 7))


class ResidualBlock(nn.Module):
    """ReLU(two 3x3x3 convolutions + the input); for another size or width the input is averaged and projected."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str):
        super().__init__()
        self.convs = nn.Sequential(
            *with_norm_relu(nn.Conv3d(in_channels, channels, 3, stride, padding=1), norm),
            nn.Conv3d(channels, channels, 3, padding=1),
            norm_layer(norm, channels),
        )
        pool = [Halve()] if stride > 1 else []
        project = [nn.Conv3d(in_channels, channels, 1), norm_layer(norm, channels)] if in_channels != channels else []
        self.skip = nn.Sequential(*pool, *project)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.convs(x) + self.skip(x))


class ResidualUNet(Network):
    """Residual-encoder U-Net with named heads; for its arguments see `VNet`."""

    stride = 16  # four halvings

    def __init__(
        self,
        heads: Iterable[str] = ("seg",),
        n_filters: int = 16,
        dropout: float = 0.5,
        norm: str = "batch",
        sdm_head: str = "conv",
        num_classes: int = 1,
    ):
        super().__init__()
        widths = [n_filters * 2**level for level in range(len(BLOCKS))]
        self.stem = nn.Sequential(*with_norm_relu(nn.Conv3d(1, n_filters, 3, padding=1), norm))
        self.encoder = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(source, width, 1 if level == 0 else 2, norm),
                *(ResidualBlock(width, width, 1, norm) for _ in range(blocks - 1)),
            )
            for level, (source, width, blocks) in enumerate(zip([n_filters, *widths[:-1]], widths, BLOCKS, strict=True))
        )
        steps = list(pairwise(reversed(widths)))
        self.up = nn.ModuleList(nn.ConvTranspose3d(deep, width, 2, stride=2) for deep, width in steps)
        self.decoder = nn.ModuleList(
            nn.Sequential(*with_norm_relu(nn.Conv3d(2 * width, width, 3, padding=1), norm)) for _, width in steps
        )
        self.add_heads(heads, n_filters, dropout, norm, sdm_head, num_classes)

    def features(self, image: Tensor) -> Tensor:
        """Output of the last decoder block."""
        x, skips = self.stem(image), []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        x = self.dropout(skips.pop())
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(torch.cat((up(x), skips.pop()), dim=1))
        return x
