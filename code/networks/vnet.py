"""The one V-Net of this project: blocks, encoder, decoder, and any choice of 1x1x1 heads.

The architecture is that of the public left-atrium codes (UA-MT, SASSNet, DTC, DTML), which differs from
Milletari et al. (3DV 2016): 3x3x3 kernels, ReLU, batch norm, no residual inside a block, additive skips.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.layers import Pointwise, conv_norm_relu

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
    return [conv, _norm(norm, conv.out_channels), nn.ReLU(inplace=True)]


class Layers(nn.Sequential):
    """Convolution, norm, ReLU, and again, each norm and its ReLU in one; of several inputs the sum."""

    def __init__(self, *layers: nn.Module, recompute: bool = False):
        super().__init__(*layers)
        self.recompute = recompute

    def forward(self, *parts: Tensor) -> Tensor:
        recompute = self.recompute and torch.is_grad_enabled()
        for conv, norm in zip(self[::3], self[1::3], strict=True):
            parts = (conv_norm_relu(conv, norm, *parts, recompute=recompute),)
        return parts[0]


class VNet(nn.Module):
    """V-Net with named heads.

    Args:
        heads: any of `seg` (1-channel logits), `sdm` (1-channel tanh, in [-1, 1]), `softmax` (2-channel logits).
        n_filters: channels at full resolution; doubled at each of the four levels below.
        dropout: probability of the channel-wise dropout after the deepest block and before the heads.
        norm: `batch`, `instance` or `group`.
        sdm_head: `conv` for the public codes' head, `block` for the papers' "3D convolution block" (a 3x3x3
            convolution, norm and ReLU) before it.
        recompute: in training, compute the outputs of batch norm and ReLU again for the backward pass instead of
            keeping them: the same numbers with less memory. With `norm="batch"` alone.
    Any input size works: it is padded to a multiple of 16 by repeating the border, and the output is cropped back.
    """

    def __init__(
        self,
        heads: Iterable[str] = ("seg",),
        n_filters: int = 16,
        dropout: float = 0.5,
        norm: str = "batch",
        sdm_head: str = "conv",
        recompute: bool = False,
    ):
        super().__init__()
        if recompute and norm != "batch":
            raise ValueError(f"only batch norms are recomputed, not {norm!r}")
        depths, widths = (1, 2, 3, 3, 3), [n_filters * 2**level for level in range(5)]

        def block(depth: int, width: int, in_channels: int | None = None) -> Layers:
            layers: list[nn.Module] = []
            for index in range(depth):
                source = in_channels if index == 0 and in_channels else width
                layers += _layer(nn.Conv3d(source, width, 3, padding=1), norm)
            return Layers(*layers, recompute=recompute)

        self.encoder = nn.ModuleList(
            block(depth, width, 1 if level == 0 else None)
            for level, (depth, width) in enumerate(zip(depths, widths, strict=True))
        )
        self.down = nn.ModuleList(
            Layers(*_layer(nn.Conv3d(width, 2 * width, 2, stride=2), norm), recompute=recompute) for width in widths[:4]
        )
        self.up = nn.ModuleList(
            Layers(*_layer(nn.ConvTranspose3d(2 * width, width, 2, stride=2), norm), recompute=recompute)
            for width in widths[3::-1]
        )
        self.decoder = nn.ModuleList(
            block(depth, width) for depth, width in zip(depths[3::-1], widths[3::-1], strict=True)
        )
        self.dropout = nn.Dropout3d(dropout)
        self.heads = nn.ModuleDict({name: Pointwise(n_filters, HEAD_CHANNELS[name]) for name in heads})
        if sdm_head == "block" and "sdm" in self.heads:
            self.heads["sdm"] = nn.Sequential(block(1, n_filters), self.heads["sdm"])

    def features(self, image: Tensor) -> Tensor:
        """Output of the last decoder block, before its dropout.

        Args: image, (B, 1, W, H, D) with W, H, D multiples of 16.
        Returns: (B, n_filters, W, H, D).
        """
        x, skips = self._laid_out(image), []
        for block, down in zip(self.encoder, self.down, strict=False):
            x = block(x)
            skips.append(x)
            x = down(x)
        x = self.dropout(self.encoder[-1](x))
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(up(x), skips.pop())
        return x

    def _laid_out(self, image: Tensor) -> Tensor:
        """The image in the memory format of the weights. With one channel a tensor fits both formats, and PyTorch
        takes it for contiguous unless its strides say otherwise; all of the first level would then be contiguous."""
        if not self.down[0][0].weight.is_contiguous(memory_format=torch.channels_last_3d):
            return image
        return image.squeeze(1).contiguous().unsqueeze(-1).movedim(-1, 1)

    def apply_heads(self, features: Tensor, heads: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Heads on a feature map, in float32 even under autocast: the steep transform of the signed
        distance map amplifies rounding 1500-fold.

        Args: features, (B, n_filters, W, H, D); heads, names to evaluate (default: all).
        Returns: {name: (B, C, W, H, D) float32}; `sdm` has passed its tanh.
        """
        features = self.dropout(features)
        with torch.autocast(features.device.type, enabled=False):
            outputs = {name: self.heads[name](features.float()) for name in heads or self.heads}
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
