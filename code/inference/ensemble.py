"""Trained runs as one predictor of whole scans: each with its own preprocessing, their mean on the scan's grid."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inference.sources import Source
from inference.trained import reported_output, trained_method
from inference.windows import predict_volume, window_shape, window_starts
from methods.base import Method
from networks.vnet import MIN_PATCH
from options.parsing import window_stride
from scans import region
from scans.files import Scan, orientation_of
from scans.preprocess import Placement, Preprocessing
from scans.region import Box
from utils.errors import InputError
from utils.resample import Size, scaled_shape

PROB, SDM = "prob", "sdm"
OUTSIDE = {PROB: 0.0, SDM: 1.0}  # what a map is outside the region of interest
Symmetry = tuple[int, int | None]  # quarter turns in the axial plane, then a flip along axis 0 or 1
SYMMETRIES: dict[str, tuple[Symmetry, ...]] = {
    "none": ((0, None),),
    "flips": ((0, None), (0, 0), (0, 1), (2, None)),  # the last one flips both axes
    "all": tuple((turns, flip) for turns in range(4) for flip in (None, 0)),
}
PLANE = (2, 3)  # in-plane axes of (B, 1, W, H, D)

MUCH_LARGER = 2.0  # times the voxels of a typical training volume; among the LA cases the largest has 1.5
CUT_MEAN = 0.1  # mean that tells a part of a z-scored scan from all of it; the LA cases have 0.05 to 1.9
OTHER_SPACING = 1.25  # ratio of voxel sizes that is worth a warning
FEATURE_MAPS = 5  # of full resolution and width, that a V-Net holds at once; measured on a CPU, with some reserve
FLOAT = 4  # bytes
AXIS_OF = dict(zip("LRPASI", "xxyyzz", strict=True))  # anatomical axis of a direction
NORMALISING = 20  # bytes per voxel that preprocessing takes, in double precision


class Predictor(nn.Module):
    """Probability, and by wish signed distance, of patches: the mean over in-plane symmetries of the patch."""

    outputs = (PROB, SDM)

    def __init__(self, method: Method, head: str, wanted: Sequence[str] = (PROB,), tta: str = "none"):
        super().__init__()
        self.method, self.head, self.outputs = method, head, tuple(wanted)
        self.symmetries = SYMMETRIES[tta]
        self.on_windows: Callable[[int], None] = lambda count: None  # told how many patches are done

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Args: image, (B, 1, W, H, D). Returns: {"prob": in [0, 1], "sdm": in [-1, 1]}, each of that shape."""
        maps = self._mean(image, tuple(outputs or self.outputs))
        self.on_windows(len(image))
        return maps

    def _mean(self, image: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        views = [self._seen(image, wanted, *symmetry) for symmetry in self.symmetries]
        return {name: torch.stack([view[name] for view in views]).mean(dim=0) for name in wanted}

    def _seen(self, image: Tensor, wanted: Sequence[str], turns: int, flip: int | None) -> dict[str, Tensor]:
        """The maps of the turned image, turned back."""
        axes = [] if flip is None else [PLANE[flip]]
        turned = torch.rot90(image, turns, PLANE).flip(axes) if turns or axes else image
        maps = {}
        if PROB in wanted:
            maps[PROB] = self.method.predict(turned, (self.head,))[self.head]
        if SDM in wanted:
            maps[SDM] = next(iter(self.method.signed_maps(turned).values()))
        return {name: torch.rot90(x.flip(axes), -turns, PLANE) if turns or axes else x for name, x in maps.items()}

    def forward(self, image: Tensor) -> Tensor:
        """Probability of patches, (B, 1, W, H, D), and nothing else: what is exported."""
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

    def settings(self) -> dict[str, Any]:
        """What decides its maps, as plain data."""
        names = ("method", "scale", "patch_size", "stride_xy", "stride_z", "blend", "window", "amp")
        return {
            "exp": self.exp,
            "iteration": self.iteration,
            "head": self.predictor.head,
            **{name: getattr(self.options, name) for name in names},
            "preprocessing": self.preprocessing.as_record(),
            "typical_scan": self.typical,
        }


def load_member(path: Path, state: dict[str, Any], options: Namespace, wanted: Sequence[str], tta: str) -> Member:
    """A run from its checkpoint at `path`; nothing else is read, no data folder is needed."""
    method = trained_method(options, state, path).eval()
    if SDM in wanted and not _has_map(method):
        raise InputError(f"--save sdm: method {options.method} of {options.exp} has no signed distance map")
    return Member(
        options.exp,
        options,
        Predictor(method, reported_output(method, options), wanted, tta),
        Preprocessing.from_record(state.get("preprocessing")),
        state.get("typical_scan"),
        state["iteration"],
    )


@torch.no_grad()
def _has_map(method: Method) -> bool:
    return bool(method.signed_maps(torch.zeros((1, 1, *[MIN_PATCH] * 3))))


@dataclass
class Plan:
    """One scan, ready to be predicted: its images as the members see them, and the box to look at."""

    scan: Scan
    box: Box  # of the scan
    images: dict[str, tuple[np.ndarray, Placement]]  # by name of the member; those prepared alike are one object
    raw: bool  # not prepared before

    def seen_box(self, member: Member) -> Box:
        """The box on the grid of a member's image."""
        return region.to_processed(self.box, self.scan.affine, self.images[member.exp][1])

    def scaled(self, member: Member) -> Size:
        """Shape of the box as a member's network sees it, at --scale."""
        return scaled_shape(region.size_of(self.seen_box(member)), member.options.scale)


def make_plan(members: Sequence[Member], source: Source, roi: str) -> Plan:
    """Preprocess a scan, unless it is prepared, and find the box that `roi` (--roi) names."""
    scan, shape = source.scan, source.scan.array.shape
    processed = {kind: kind.apply(scan) for kind in {_left_to_do(member, source) for member in members}}
    images = {member.exp: processed[_left_to_do(member, source)] for member in members}
    if roi == region.FULL:
        box = region.whole(shape)
    elif roi == region.CENTER:
        box = region.hull(_central_box(member, scan, images[member.exp][1]) for member in members)
    else:
        box = region.parse_roi(roi, shape)
    return Plan(scan, box, images, raw=source.prepared is None)


def _left_to_do(member: Member, source: Source) -> Preprocessing:
    if source.prepared is None:
        return member.preprocessing
    if source.prepared != member.preprocessing:
        raise InputError(
            f"the case was prepared in another way than the training scans of run {member.exp}; give the raw scan"
        )
    return Preprocessing(normalise="none")


def _central_box(member: Member, scan: Scan, placement: Placement) -> Box:
    if member.typical is None:
        raise InputError(
            f"run {member.exp} does not know the size of its training volumes (it was trained by an older version); "
            "give --roi x0:x1,y0:y1,z0:z1"
        )
    box = region.central(placement.shape, [round(length) for length in member.typical["shape"]])
    return region.to_scan(box, scan.affine, scan.array.shape, placement)


def count_windows(members: Sequence[Member], plan: Plan) -> int:
    """Windows of all members."""
    return sum(_windows(member, plan) for member in members)


def _windows(member: Member, plan: Plan) -> int:
    options, shape = member.options, plan.scaled(member)
    lengths = np.maximum(shape, options.patch_size).tolist()
    axes = zip(lengths, window_shape(options, shape), window_stride(options), strict=True)
    return math.prod(len(window_starts(*axis)) for axis in axes)


def memory_bytes(members: Sequence[Member], plan: Plan) -> tuple[int, int]:
    """Estimate of what a prediction takes: for the volumes, and for the network on its patches."""
    voxels, maps = plan.scan.array.size, len(members[0].predictor.outputs)
    processed = sum({id(image): image.size for image, _ in plan.images.values()}.values())
    window = max(math.prod(np.maximum(plan.scaled(member), member.options.patch_size).tolist()) for member in members)
    predicting = FLOAT * (voxels * (1 + maps) + processed * 2 + window * (2 + 2 * maps))
    volumes = plan.scan.array.nbytes + max(predicting, NORMALISING * voxels)
    network = max(_voxels_at_once(member, plan) * member.options.n_filters for member in members)
    return volumes, FLOAT * FEATURE_MAPS * network


def _voxels_at_once(member: Member, plan: Plan) -> int:
    """Voxels of the windows that share a forward pass."""
    options, shape = member.options, plan.scaled(member)
    return min(options.window_batch, _windows(member, plan)) * math.prod(window_shape(options, shape))


def doubts(members: Sequence[Member], plan: Plan) -> list[str]:
    """What speaks against a sound result, in sentences that name a remedy."""
    return list(dict.fromkeys(doubt for member in members for doubt in _doubts(member, plan)))


def _doubts(member: Member, plan: Plan) -> Iterator[str]:
    run, typical = f"run {member.exp}", member.typical
    affine = plan.images[member.exp][1].affine
    if typical is None:
        return
    code = orientation_of(affine)
    if AXIS_OF[code[2]] != AXIS_OF[typical["orientation"][2]]:
        yield (
            f"the slices of the scan are cut across another direction ({code}) than in {run}'s training "
            f"({typical['orientation']}); turn the scan, or train on scans prepared with --orientation"
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    ratio = spacing / typical["spacing_mm"]
    if max(ratio.max(), 1 / ratio.min()) > OTHER_SPACING:
        yield (
            f"voxels of {_by(spacing)} mm, but {_by(typical['spacing_mm'])} mm in {run}'s training; resample the scan, "
            "or train on scans prepared with --spacing_mm"
        )
    larger = math.prod(region.size_of(plan.seen_box(member))) / math.prod(typical["shape"])
    whole = plan.box == region.whole(plan.scan.array.shape)
    if larger > MUCH_LARGER:
        yield (
            f"the scan has {larger:.1f} times the voxels of {run}'s training volumes (of the LA set: crops around the "
            "atrium); a --roi around the structure keeps false ones out"
        )
    elif plan.raw and whole and member.preprocessing.normalise == "zscore" and abs(typical["mean"] or 0) > CUT_MEAN:
        yield (
            f"{run} was trained on parts of scans, z-scored before they were cut out, and this scan is no larger than "
            "those; if it is a part, its intensities come out otherwise: give the whole scan and a --roi"
        )


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.3g}" for number in numbers)


def predict_scan(members: Sequence[Member], plan: Plan, device: torch.device) -> dict[str, np.ndarray]:
    """Mean maps of all members on the grid of the scan: {"prob", "sdm"}, (W, H, D) float32.

    Outside the box the probability is 0 and the signed distance 1.
    """
    total: dict[str, np.ndarray] = {}
    for member in members:
        image, placement = plan.images[member.exp]
        box = plan.seen_box(member)
        for name, values in predict_volume(member.predictor, image[box], member.options, device).items():
            seen = np.full(placement.shape, OUTSIDE[name], dtype=np.float32)
            seen[box] = values
            total[name] = total.get(name, 0) + placement.restore(seen) / len(members)
    for name, values in total.items():
        kept = values[plan.box].copy()
        values.fill(OUTSIDE[name])
        values[plan.box] = kept
    return total
