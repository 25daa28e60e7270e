"""3-D critics of the adversarial methods: whole-volume (SASSNet) and per-voxel (ASDNet).

A critic of a training step is not part of a method's test, so neither keeps anything but weights.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky ReLU, as in both public implementations
CRITIC_BETAS = (0.9, 0.99)  # SASSNet's public implementation


class SDMCritic(nn.Module):
    """SASSNet's critic: does this signed distance map belong to a labeled image?

    Map and image are embedded apart, added, and halved four times in all. The published network ends in a
    7x7x5 average pooling, which ties it to patches of 112x112x80; the mean over all voxels is the same number
    there, with the same weights (11,020,290 of them at 64 filters), and works at any patch.

    Args: n_filters, channels after the first halving, doubled at each of the three below; num_classes, C.
    """

    def __init__(self, n_filters: int = 64, dropout: float = 0.5, num_classes: int = 1):
        super().__init__()
        widths = [n_filters * 2**level for level in range(4)]
        self.embed_map = nn.Conv3d(num_classes, n_filters, 4, stride=2, padding=1)
        self.embed_image = nn.Conv3d(1, n_filters, 4, stride=2, padding=1)
        self.down = nn.ModuleList(nn.Conv3d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.dropout = nn.Dropout3d(dropout)
        self.classifier = nn.Linear(widths[-1], 2)

    def forward(self, sdm: Tensor, image: Tensor) -> Tensor:
        """Args: sdm, (B, C, W, H, D), and image, (B, 1, W, H, D), each axis at least 16.

        Returns: (B, 2) float32 logits of (unlabeled, labeled).
        """
        x = F.leaky_relu(self.embed_map(sdm) + self.embed_image(image), SLOPE)
        for conv in self.down:
            x = F.leaky_relu(conv(self.dropout(x)), SLOPE)  # (B, C, W/16, H/16, D/16) at the end
        with torch.autocast(x.device.type, enabled=False):
            return self.classifier(x.float().mean(dim=(2, 3, 4)))


class ConfidenceNet(nn.Module):
    """ASDNet's confidence network: where does this segmentation look like a ground truth?

    Three halvings and three doublings with additive skips. Each doubling takes the output of the one below; in
    the public implementation each takes the encoder's tensor instead, so that only its two upper levels have any
    effect. Batch norm always uses the statistics of the maps at hand, real or predicted, as in the public
    implementation, which never leaves training mode; keeping no running ones, the network does not change when it
    is asked.

    Args: n_filters, channels at full resolution, doubled at each of the three levels below; num_classes, C.
    """

    def __init__(self, n_filters: int = 32, num_classes: int = 1):
        super().__init__()
        steps = list(pairwise(n_filters * 2**level for level in range(4)))
        self.stem = nn.Conv3d(num_classes + 1, n_filters, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv3d(a, b, 4, stride=2, padding=1) for a, b in steps)
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 4, stride=2, padding=1) for a, b in reversed(steps))
        self.norm = nn.ModuleList(nn.BatchNorm3d(a, track_running_stats=False) for a, _ in reversed(steps))
        self.head = nn.Conv3d(n_filters, 1, 1)

    def forward(self, prob: Tensor) -> Tensor:
        """Args: prob, (B, C + 1, W, H, D), background and foreground, each axis at least 16.

        Returns: (B, 1, W, H, D) float32 logits, whose sigmoid is the confidence map.
        """
        x = F.leaky_relu(self.stem(prob), SLOPE)
        skips = []
        for conv in self.down:
            skips.append(x)
            x = F.leaky_relu(conv(x), SLOPE)
        for conv, norm in zip(self.up, self.norm, strict=True):
            skip = skips.pop()
            x = F.relu(norm(conv(x, output_size=skip.shape[2:])))  # an odd length was rounded down on the way
            x = F.relu(x + skip)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.float())


def critic_optimizer(critic: nn.Module, rate: float) -> torch.optim.Adam:
    """The optimizer that the adversarial methods give their critic."""
    return torch.optim.Adam(critic.parameters(), lr=rate, betas=CRITIC_BETAS)
