"""What a user of the public left-atrium codes runs: the yardsticks of the benchmark, as those codes compute them."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from skimage.segmentation import find_boundaries
from torch import Tensor, nn

from dataloaders.batch import Batch
from networks.vnet import VNet
from utils.losses import dice_loss

HEADS = ("seg", "sdm")


class ReferenceVNet(nn.Module):
    """A V-Net layer by layer in PyTorch's own forms, contiguous, both heads at every pass."""

    def __init__(self, network: VNet):
        super().__init__()
        self.network = network
        for name in HEADS:
            if name not in network.heads:  # computed and thrown away
                network.heads[name] = nn.Conv3d(network.encoder[0][0].out_channels, 1, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        net, x, skips = self.network, image, []
        for block, down in zip(net.encoder, net.down, strict=False):
            x = _plain(block, x)
            skips.append(x)
            x = _plain(down, x)
        x = net.dropout(_plain(net.encoder[-1], x))
        for up, block in zip(net.up, net.decoder, strict=True):
            x = _plain(block, _plain(up, x) + skips.pop())
        x = net.dropout(x)
        heads = {name: F.conv3d(x, net.heads[name].weight, net.heads[name].bias) for name in HEADS}
        return heads | {"sdm": heads["sdm"].tanh()}


def _plain(block: nn.Sequential, x: Tensor) -> Tensor:
    for layer in block:
        x = layer(x)
    return x


def signed_distances(label: Tensor) -> Tensor:
    """Signed distance maps by SciPy and scikit-image, one label after the other; labels (B, 1, W, H, D)."""
    maps = np.zeros(label.shape, dtype=np.float32)
    for index, mask in enumerate(label[:, 0].numpy() > 0.5):
        if not mask.any():
            continue
        inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
        boundary = find_boundaries(mask, mode="inner")
        inside, outside = ((d - d.min()) / (d.max() - d.min()) for d in (inside, outside))
        sdm = outside - inside
        sdm[boundary] = 0
        maps[index, 0] = sdm
    return torch.from_numpy(maps)


def dtml_step(m_s: VNet, m_d: VNet, labels: Tensor, k: float, weight: float) -> Callable[[Batch], float]:
    """A DTML step of the public protocol: maps of all labels, two backward passes over a retained graph.

    Neither loss detaches the other network, so each of the two passes runs through both.

    Args: labels, (B, 1, W, H, D), of the unlabeled cases too, as the public loader hands them out; k, the steepness
        of the transform; weight, that of the consistency loss.
    Returns: a function that makes one step and returns the supervised terms and the consistency, summed.
    """
    device = next(m_s.parameters()).device
    networks = [ReferenceVNet(network).to(device) for network in (m_s, m_d)]
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4) for n in networks]

    def step(batch: Batch) -> float:
        signed_distances(labels)
        seg, sdm = networks[0](batch.image)["seg"], networks[1](batch.image)["sdm"]
        prob, soft = seg.sigmoid(), torch.sigmoid(-k * sdm)
        count = batch.num_labeled
        cross_entropy = F.binary_cross_entropy_with_logits(seg[:count], batch.label)
        supervised = 0.5 * (cross_entropy + dice_loss(prob[:count], batch.label))
        mask = dice_loss(soft[:count], batch.label)
        consistency = weight * ((prob - soft) ** 2).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        (supervised + consistency).backward(retain_graph=True)
        (mask + consistency).backward()
        for optimizer in optimizers:
            optimizer.step()
        return (supervised + mask + consistency).item()

    return step


@torch.no_grad()
def window_by_window(
    m_s: VNet, m_d: VNet, image: np.ndarray, patch: Sequence[int], stride: Sequence[int]
) -> np.ndarray:
    """Probability of M_s over a volume (W, H, D): one window after the other, both networks and heads at each."""
    device = next(m_s.parameters()).device
    networks = [ReferenceVNet(network).to(device).eval() for network in (m_s, m_d)]
    total, visits = np.zeros(image.shape, np.float32), np.zeros(image.shape, np.float32)
    counts = [math.ceil((n - p) / s) + 1 for n, p, s in zip(image.shape, patch, stride, strict=True)]
    for place in itertools.product(*map(range, counts)):
        start = [min(i * s, n - p) for i, s, n, p in zip(place, stride, image.shape, patch, strict=True)]
        window = tuple(slice(a, a + p) for a, p in zip(start, patch, strict=True))
        crop = torch.from_numpy(np.ascontiguousarray(image[window]))[None, None].to(device)
        probs = [network(crop)["seg"].sigmoid() for network in networks]
        total[window] += probs[0][0, 0].cpu().numpy()
        visits[window] += 1
    return total / visits


def crops_from_files(paths: Sequence[Path], patch: Sequence[int], rng: np.random.Generator) -> Tensor:
    """A batch as the public loader makes it: decode image and label whole, rotate and flip them whole, then crop."""
    crops = []
    for path in paths:
        with h5py.File(path) as file:
            volumes = [file[key][:] for key in ("image", "label")]
        turns, axis = int(rng.integers(4)), int(rng.integers(2))
        volumes = [np.flip(np.rot90(volume, turns), axis).copy() for volume in volumes]
        start = [int(rng.integers(max(n - p, 1))) for n, p in zip(volumes[0].shape, patch, strict=True)]
        window = tuple(slice(a, a + p) for a, p in zip(start, patch, strict=True))
        crops.append(np.stack([volume[window].astype(np.float32) for volume in volumes]))
    return torch.from_numpy(np.stack(crops))
