"""The V-Net of this project: blocks, encoder, decoder, and any choice of 1x1x1 heads.

What stands here is what runs. `runtime.device.place` alone gives some layers a faster form (networks/layers.py).
The architecture is that of the public left-atrium implementations (UA-MT, SASSNet, DTC, DTML), which differs from
Milletari et al. (3DV 2016): 3x3x3 kernels, ReLU, batch norm, no residual inside a block, additive skips.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from networks.base import Network, with_norm_relu


class VNet(Network):
    """V-Net with named heads.

    Args:
        heads: any of `seg` (logits of C channels), `sdm` (C channels of tanh, in [-1, 1]), `softmax` (logits of C + 1
            channels, background first).
        n_filters: channels at full resolution; doubled at each of the four levels below.
        dropout: probability of the channel-wise dropout after the deepest block and before the heads.
        norm: `batch`, `instance` or `group`.
        sdm_head: `conv` for the public implementations' head, `block` for the papers' "3D convolution block" (a 3x3x3
            convolution, norm and ReLU) before it.
        num_classes: C, the number of foreground classes.
    """

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
        depths, widths = (1, 2, 3, 3, 3), [n_filters * 2**level for level in range(5)]

        def block(depth: int, width: int, in_channels: int | None = None) -> nn.Sequential:
            layers: list[nn.Module] = []
            for index in range(depth):
                source = in_channels if index == 0 and in_channels else width
                layers += with_norm_relu(nn.Conv3d(source, width, 3, padding=1), norm)
            return nn.Sequential(*layers)

        self.encoder = nn.ModuleList(
            block(depth, width, 1 if level == 0 else None)
            for level, (depth, width) in enumerate(zip(depths, widths, strict=True))
        )
        self.down = nn.ModuleList(
            nn.Sequential(*with_norm_relu(nn.Conv3d(width, 2 * width, 2, stride=2), norm)) for width in widths[:4]
        )
        self.up = nn.ModuleList(
            nn.Sequential(*with_norm_relu(nn.ConvTranspose3d(2 * width, width, 2, stride=2), norm))
            for width in widths[3::-1]
        )
        self.decoder = nn.ModuleList(
            block(depth, width) for depth, width in zip(depths[3::-1], widths[3::-1], strict=True)
        )
        self.add_heads(heads, n_filters, dropout, norm, sdm_head, num_classes)

    def features(self, image: Tensor) -> Tensor:
        """Output of the last decoder block."""
        x, skips = image, []
        for block, down in zip(self.encoder, self.down, strict=False):
            x = block(x)
            skips.append(x)
            x = down(x)
        x = self.dropout(self.encoder[-1](x))
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(up(x) + skips.pop())
        return x
