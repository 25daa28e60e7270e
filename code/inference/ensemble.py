"""Trained runs that segment together: each predicts patches, as a mean over symmetries, and has its preprocessing."""

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference.trained import reported_output, trained_method
from inference.views import mean_over_views
from methods.base import Method
from scans.preprocess import Preprocessing
from utils.constants import MIN_PATCH
from utils.errors import InputError
from utils.labels import ONE_CLASS, LabelClass, classes_as_record, classes_of_record

PROB, SDM = "prob", "sdm"


class Predictor(nn.Module):
    """Probability, and, where asked for, signed distance of patches: the mean over in-plane symmetries of the patch."""

    def __init__(self, method: Method, head: str, maps: Sequence[str] = (PROB,), tta: str = "none"):
        super().__init__()
        self.method, self.head, self.outputs = method, head, tuple(maps)
        self.tta = tta
        self.on_windows: Callable[[int], None] = lambda count: None  # told how many patches are done

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Args: image, (B, 1, W, H, D). Returns: (B, C, W, H, D) each, {"prob": in [0, 1], "sdm": in [-1, 1]}."""
        maps = self._mean(image, tuple(outputs or self.outputs))
        self.on_windows(len(image))
        return maps

    def _mean(self, image: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return mean_over_views(lambda view: self._maps(view, names), image, self.tta)

    def _maps(self, image: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        maps = {}
        if PROB in names:
            maps[PROB] = self.method.predict(image, (self.head,))[self.head]
        if SDM in names:
            maps[SDM] = next(iter(self.method.signed_maps(image).values()))
        return maps

    def forward(self, image: Tensor) -> Tensor:
        """Probability of patches, (B, C, W, H, D), and nothing else: what is exported."""
        return self._mean(image, (PROB,))[PROB]


@dataclass
class Member:
    """A trained run that takes part in a prediction."""

    exp: str
    options: Namespace
    predictor: Predictor
    preprocessing: Preprocessing
    typical: dict[str, Any] | None  # `typical_scan` of its training; None for runs that did not store it
    iteration: int
    classes: tuple[LabelClass, ...] = ONE_CLASS

    @property
    def recipe(self) -> Preprocessing:
        """What is done to a raw scan: as in training, but for --fill_nan."""
        fill = self.options.fill_nan
        return self.preprocessing if fill is None else dataclasses.replace(self.preprocessing, fill_nan=fill)

    def settings(self) -> dict[str, Any]:
        """What decides its maps, as plain data."""
        names = ("method", "scale", "patch_size", "stride_xy", "stride_z", "blend", "window", "amp")
        return {
            "exp": self.exp,
            "iteration": self.iteration,
            "head": self.predictor.head,
            **{name: getattr(self.options, name) for name in names},
            "preprocessing": self.recipe.as_record(),
            "typical_scan": self.typical,
            **({} if self.classes == ONE_CLASS else {"classes": classes_as_record(self.classes)}),
        }


def load_member(path: Path, state: dict[str, Any], options: Namespace, maps: Sequence[str], tta: str) -> Member:
    """A run from its checkpoint at `path`; nothing else is read, no data folder is needed."""
    method = trained_method(options, state, path).eval()
    if SDM in maps and not _has_map(method):
        raise InputError(f"--save sdm: method {options.method} of {options.exp} has no signed distance map")
    return Member(
        options.exp,
        options,
        Predictor(method, reported_output(method, options), maps, tta),
        Preprocessing.from_record(state.get("preprocessing")),
        state.get("typical_scan"),
        state["iteration"],
        classes_of_record(state.get("classes")),
    )


@torch.no_grad()
def _has_map(method: Method) -> bool:
    return bool(method.signed_maps(torch.zeros((1, 1, *[MIN_PATCH] * 3))))
