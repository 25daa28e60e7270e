"""The V-Net of this project: blocks, encoder, decoder, and any choice of 1x1x1 heads.

What stands here is what runs. `runtime.device.place` alone gives some layers a faster form (networks/layers.py).
The architecture is that of the public left-atrium implementations (UA-MT, SASSNet, DTC, DTML), which differs from
Milletari et al. (3DV 2016): 3x3x3 kernels, ReLU, batch norm, no residual inside a block, additive skips.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_CHANNELS = {"seg": 1, "sdm": 1, "softmax": 2}
STRIDE = 16  # four halvings: what each axis must be a multiple of
MIN_PATCH = 32  # below this the deepest feature map has one voxel per axis and batch norm degenerates
SDM_HEADS = ("conv", "block")  # before the tanh: a 1x1x1 convolution alone, or with a 3x3x3 block before it
GROUPS = 8  # channels are always multiples of 8 from width 8 on


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm3d(channels)
    if kind == "instance":
        return nn.InstanceNorm3d(channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(min(GROUPS, channels), channels)
    raise ValueError(f"unknown norm {kind!r}")


def _layer(conv: nn.Module, norm: str) -> list[nn.Module]:
    return [conv, _norm(norm, conv.out_channels), nn.ReLU()]


class VNet(nn.Module):
    """V-Net with named heads.

    Args:
        heads: any of `seg` (1-channel logits), `sdm` (1-channel tanh, in [-1, 1]), `softmax` (2-channel logits).
        n_filters: channels at full resolution; doubled at each of the four levels below.
        dropout: probability of the channel-wise dropout after the deepest block and before the heads.
        norm: `batch`, `instance` or `group`.
        sdm_head: `conv` for the public implementations' head, `block` for the papers' "3D convolution block" (a 3x3x3
            convolution, norm and ReLU) before it.
    Any input size works: it is padded to a multiple of 16 by repeating the border, and the output is cropped back.
    """

    def __init__(
        self,
        heads: Iterable[str] = ("seg",),
        n_filters: int = 16,
        dropout: float = 0.5,
        norm: str = "batch",
        sdm_head: str = "conv",
    ):
        super().__init__()
        depths, widths = (1, 2, 3, 3, 3), [n_filters * 2**level for level in range(5)]

        def block(depth: int, width: int, in_channels: int | None = None) -> nn.Sequential:
            layers: list[nn.Module] = []
            for index in range(depth):
                source = in_channels if index == 0 and in_channels else width
                layers += _layer(nn.Conv3d(source, width, 3, padding=1), norm)
            return nn.Sequential(*layers)

        self.encoder = nn.ModuleList(
            block(depth, width, 1 if level == 0 else None)
            for level, (depth, width) in enumerate(zip(depths, widths, strict=True))
        )
        self.down = nn.ModuleList(
            nn.Sequential(*_layer(nn.Conv3d(width, 2 * width, 2, stride=2), norm)) for width in widths[:4]
        )
        self.up = nn.ModuleList(
            nn.Sequential(*_layer(nn.ConvTranspose3d(2 * width, width, 2, stride=2), norm)) for width in widths[3::-1]
        )
        self.decoder = nn.ModuleList(
            block(depth, width) for depth, width in zip(depths[3::-1], widths[3::-1], strict=True)
        )
        self.dropout = nn.Dropout3d(dropout)
        self.heads = nn.ModuleDict({name: nn.Conv3d(n_filters, HEAD_CHANNELS[name], 1) for name in heads})
        if sdm_head == "block" and "sdm" in self.heads:
            self.heads["sdm"] = nn.Sequential(block(1, n_filters), self.heads["sdm"])

    def features(self, image: Tensor) -> Tensor:
        """Output of the last decoder block, before its dropout.

        Args: image, (B, 1, W, H, D) with W, H, D multiples of 16.
        Returns: (B, n_filters, W, H, D).
        """
        x, skips = image, []
        for block, down in zip(self.encoder, self.down, strict=False):
            x = block(x)
            skips.append(x)
            x = down(x)
        x = self.dropout(self.encoder[-1](x))
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(up(x) + skips.pop())
        return x

    def apply_heads(self, features: Tensor, heads: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Heads on a feature map, in float32 even under autocast: the steep transform of the signed
        distance map amplifies rounding 1500-fold.

        Args: features, (B, n_filters, W, H, D); heads, names to evaluate (default: all).
        Returns: {name: (B, C, W, H, D) float32}; `sdm` has passed its tanh.
        """
        features = self.dropout(features).float()
        with torch.autocast(features.device.type, enabled=False):
            outputs = {name: self.heads[name](features) for name in heads or self.heads}
            return {name: x.tanh() if name == "sdm" else x for name, x in outputs.items()}

    def forward(self, image: Tensor, heads: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Args: image, (B, 1, W, H, D). Returns: {head: (B, C, W, H, D) float32}."""
        size = image.shape[2:]
        short = [-length % STRIDE for length in size]
        if any(short):
            image = F.pad(image, [side for s in reversed(short) for side in (s // 2, s - s // 2)], "replicate")
        outputs = self.apply_heads(self.features(image), heads)
        if any(short):
            window = tuple(slice(s // 2, s // 2 + length) for s, length in zip(short, size, strict=True))
            outputs = {name: x[(..., *window)] for name, x in outputs.items()}
        return outputs
