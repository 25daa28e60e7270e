"""The mean of a prediction over in-plane symmetries of its patch: augmentation at test time, --tta."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from inference.windows import Predict
from utils.constants import PLANE

Symmetry = tuple[int, int | None]  # quarter turns in the axial plane, then a flip along axis 0 or 1
SYMMETRIES: dict[str, tuple[Symmetry, ...]] = {
    "none": ((0, None),),
    "flips": ((0, None), (0, 0), (0, 1), (2, None)),  # the last one flips both axes
    "all": tuple((turns, flip) for turns in range(4) for flip in (None, 0)),
}


def mean_over_views(predict: Predict, image: Tensor, tta: str) -> dict[str, Tensor]:
    """Args: predict, (B, 1, W, H, D) -> {name: (B, C, W, H, D)}; tta, a name in SYMMETRIES. Returns: as `predict`."""
    views = [_seen(predict, image, *symmetry) for symmetry in SYMMETRIES[tta]]
    if len(views) == 1:
        return views[0]  # no copy of the maps of every window
    return {name: torch.stack([view[name] for view in views]).mean(dim=0) for name in views[0]}


def _seen(predict: Predict, image: Tensor, turns: int, flip: int | None) -> dict[str, Tensor]:
    """The maps of the turned image, turned back."""
    axes = [] if flip is None else [PLANE[flip]]
    turned = torch.rot90(image, turns, PLANE).flip(axes) if turns or axes else image
    maps = predict(turned)
    return {name: torch.rot90(x.flip(axes), -turns, PLANE) if turns or axes else x for name, x in maps.items()}


class InViews(nn.Module):
    """A method that predicts the mean over views."""

    def __init__(self, method: nn.Module, tta: str):
        super().__init__()
        self.method, self.tta = method, tta
        self.outputs, self.exclusive = method.outputs, method.exclusive

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        """As `Method.predict`."""
        return mean_over_views(lambda view: self.method.predict(view, outputs), image, self.tta)
