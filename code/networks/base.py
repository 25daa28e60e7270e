"""The contract of a segmentation network, and what all of them share: input sizes, dropout, heads."""

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.constants import GROUPS


class Network(nn.Module):
    """A network: a trunk, `features`, and 1x1x1 heads with names.

    A subclass sets `stride`, builds its trunk in `__init__`, calls `add_heads` and implements `features`; a line in
    `networks.NETWORKS` makes it a choice of --network. It takes the arguments of `VNet`. Any input size works: it is
    padded to a multiple of the stride by repeating the border, and the output is cropped back.
    """

    stride: ClassVar[int]  # what each axis of an image for `features` must be a multiple of

    def add_heads(
        self, heads: Iterable[str], n_filters: int, dropout: float, norm: str, sdm_head: str, num_classes: int
    ) -> None:
        """The heads and the dropout before them; the trunk may use the same dropout at its deepest level."""
        self.dropout = nn.Dropout3d(dropout)
        channels = {"seg": num_classes, "sdm": num_classes, "softmax": num_classes + 1}
        self.heads = nn.ModuleDict({name: nn.Conv3d(n_filters, channels[name], 1) for name in heads})
        if sdm_head == "block" and "sdm" in self.heads:
            block = nn.Sequential(*with_norm_relu(nn.Conv3d(n_filters, n_filters, 3, padding=1), norm))
            self.heads["sdm"] = nn.Sequential(block, self.heads["sdm"])

    def features(self, image: Tensor) -> Tensor:
        """What the heads see, before its dropout.

        Args: image, (B, 1, W, H, D) with W, H, D multiples of `stride`.
        Returns: (B, n_filters, W, H, D).
        """
        raise NotImplementedError

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
        short = [-length % self.stride for length in size]
        if any(short):
            image = F.pad(image, [side for s in reversed(short) for side in (s // 2, s - s // 2)], "replicate")
        outputs = self.apply_heads(self.features(image), heads)
        if any(short):
            window = tuple(slice(s // 2, s // 2 + length) for s, length in zip(short, size, strict=True))
            outputs = {name: x[(..., *window)] for name, x in outputs.items()}
        return outputs


def common_stride(module: nn.Module) -> int:
    """The stride that all networks within a module can take."""
    return math.lcm(*(network.stride for network in module.modules() if isinstance(network, Network)))


def with_norm_relu(conv: nn.Module, norm: str) -> list[nn.Module]:
    """A convolution, the norm of that name, and a ReLU."""
    return [conv, norm_layer(norm, conv.out_channels), nn.ReLU()]


def norm_layer(kind: str, channels: int) -> nn.Module:
    """`batch`, `instance` or `group` norm."""
    if kind == "batch":
        return nn.BatchNorm3d(channels)
    if kind == "instance":
        return nn.InstanceNorm3d(channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(min(GROUPS, channels), channels)
    raise ValueError(f"unknown norm {kind!r}")
