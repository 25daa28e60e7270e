"""Mask -> signed distance map (SDM), and SDM -> soft mask."""

import edt
import numpy as np
import torch

from utils.constants import SDM_EMPTY_RULES


def signed_distance(mask: np.ndarray, empty: str = "sign") -> np.ndarray:
    """Signed distance map of one mask: 0 on the inner boundary, negative inside, positive outside.

    Inside stands the distance to the nearest background voxel, outside that to the nearest foreground voxel, each
    side divided by its own largest distance in this crop, so the map has no unit. The inner boundary is the
    foreground voxels with a 6-neighbour in the background; where the crop cuts the object there is none. An
    object up to two voxels thick is all boundary, hence 0. After Xue et al., AAAI 2020; the same function in the
    public implementations of SASSNet, DTC and DTML. DTML's Eq. 1 has the distance to the boundary itself, in voxels.

    Args:
        mask: (W, H, D), boolean, or numbers of which those above 0.5 are foreground.
        empty: what a crop without foreground becomes: "sign" +1 everywhere, "zeros" 0 as in the public
            implementations.
    Returns: (W, H, D), float32 in [-1, 1]; -1 everywhere for a full crop under both rules, since the public
        implementations divide 0 by 0 there.
    """
    if empty not in SDM_EMPTY_RULES:
        raise ValueError(f"empty must be one of {SDM_EMPTY_RULES}, not {empty!r}")
    mask = np.asarray(mask)
    if mask.ndim != 3:
        raise ValueError(f"mask must be a volume (W, H, D), not of shape {mask.shape}")
    mask = np.ascontiguousarray(mask if mask.dtype == bool else mask > 0.5)
    if not mask.any():
        return np.full(mask.shape, 1.0 if empty == "sign" else 0.0, dtype=np.float32)
    if mask.all():
        return np.full(mask.shape, -1.0, dtype=np.float32)

    # Two labels and no 0: each voxel gets its distance to the nearest of the other label, both sides in one pass.
    distance = edt.edt(mask.view(np.uint8) + 1, black_border=False, parallel=torch.get_num_threads())
    inside = distance * mask
    sdm = distance - inside  # what is left: the distance outside
    # The public implementations first subtract the minimum of each side; it is 0, for neither is empty.
    sdm /= sdm.max()
    sdm -= inside / inside.max()
    sdm[inside == 1] = 0
    return sdm


def signed_distance_batch(label: torch.Tensor, empty: str = "sign") -> torch.Tensor:
    """`signed_distance` of every class of every label of a batch, on the CPU.

    Args: label, (L, C, W, H, D) in [0, 1], of which label > 0.5 is the mask; `empty` as in `signed_distance`.
    Returns: (L, C, W, H, D), float32 in [-1, 1].
    """
    if label.ndim != 5:
        raise ValueError(f"label must be (L, C, W, H, D), not {tuple(label.shape)}")
    masks = (label > 0.5).numpy()
    sdm = np.empty(masks.shape, dtype=np.float32)
    for index in np.ndindex(masks.shape[:2]):
        sdm[index] = signed_distance(masks[index], empty)
    return torch.from_numpy(sdm)


def prob_from_sdm(sdm: torch.Tensor, k: float) -> torch.Tensor:
    """Soft mask of a signed distance map: sigmoid(-k * sdm), near 1 inside, where the map is negative.

    DTML's Eq. 2 with its sign corrected: as printed it turns the background into foreground. Computed in float32
    at least, under autocast too: in half precision a large k turns rounding into whole units of the exponent.

    The gradient with respect to the map is k / 4 at 0 and below 1 % of that where |k * sdm| > 6: with k = 1500 it
    lives where |sdm| < 0.004, well under a voxel. Where a network's map is farther from 0, next to nothing comes
    back through this transform; a smaller k widens the band.

    Args: sdm, any shape, in [-1, 1]; k, the steepness, positive.
    Returns: the same shape, in [0, 1]; exactly 0.5 where the map is 0.
    """
    return torch.sigmoid(-k * sdm.to(torch.promote_types(sdm.dtype, torch.float32)))
