"""A whole scan on its way through the trained runs: read, placed on their grids, estimated, predicted, put back."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataloaders import case_files
from inference.ensemble import PROB, SDM, Member
from inference.windows import predict_volume, window_shape, window_starts
from options.parsing import window_stride
from scans import region
from scans.files import READABLE, Scan, case_id, find_scans, orientation_of, read_scan
from scans.preprocess import Placement, Preprocessing, read_record
from scans.region import Box
from utils.errors import InputError
from utils.nifti import affine_ras
from utils.resample import scaled_shape

OUTSIDE = {PROB: 0.0, SDM: 1.0}  # what a map is outside the region of interest
MUCH_LARGER = 2.0  # times the voxels of a typical training volume; among the LA cases the largest has 1.5
CUT_MEAN = 0.1  # mean that tells a part of a z-scored scan from all of it; the LA cases have 0.05 to 1.9
OTHER_SPACING = 1.25  # ratio of voxel sizes that is worth a warning
FEATURE_MAPS = 5  # of full resolution and width, that a V-Net holds at once; measured on a CPU, with some reserve
FLOAT = 4  # bytes
AXIS_OF = dict(zip("LRPASI", "xxyyzz", strict=True))  # anatomical axis of a direction


def find_inputs(path: Path) -> dict[str, Path]:
    """Files by case id: one scan or one HDF5 case, a folder of scans, or a data folder of HDF5 cases."""
    if path.is_dir():
        return {case.parent.name: case for case in sorted(path.glob(f"*/{case_files.CASE_FILE}"))} or find_scans(path)
    case = path.parent.name if path.name == case_files.CASE_FILE else case_id(path)
    if case is None or not path.is_file():
        kinds = ", ".join((*READABLE, f"<case>/{case_files.CASE_FILE}"))
        raise InputError(f"--input {path} is no scan; give a file ({kinds}) or a folder of scans")
    return {case: path}


def is_raw(path: Path) -> bool:
    """Whether an input is a scan as scanners and viewers know it, and no case that was prepared for training."""
    return path.name != case_files.CASE_FILE


def read_input(path: Path) -> tuple[Scan, Preprocessing | None]:
    """A scan, and how it is prepared already: None for a raw one. No label is read."""
    if is_raw(path):
        return read_scan(path), None
    root, case = path.parent.parent, path.parent.name
    scan = Scan(case_files.read_image(root, case), affine_ras(*case_files.read_geometry(root, case)))
    return scan, Preprocessing.from_record(read_record(root))


@dataclass(frozen=True)
class View:
    """A scan as a member sees it: what is to be done to it, where its image will lie, and the part to look at."""

    member: Member
    recipe: Preprocessing
    place: Placement
    box: Box  # of the processed image

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of the box at --scale."""
        return scaled_shape(region.size_of(self.box), self.member.options.scale)

    @property
    def windows(self) -> int:
        """Their number."""
        options = self.member.options
        lengths = np.maximum(self.shape, options.patch_size).tolist()
        axes = zip(lengths, window_shape(options, self.shape), window_stride(options), strict=True)
        return math.prod(len(window_starts(*axis)) for axis in axes)


class Plan:
    """What the prediction of one scan will take, known before anything is computed; then the prediction itself."""

    def __init__(self, members: Sequence[Member], path: Path, roi: str):
        self.scan, prepared = read_input(path)
        self.raw = prepared is None
        recipes = [_left_to_do(member, prepared) for member in members]
        places = [recipe.place(self.scan) for recipe in recipes]
        self.box = self._asked_box(members, places, roi)
        self.views = [
            View(member, recipe, place, place.box_in_image(self.box))
            for member, recipe, place in zip(members, recipes, places, strict=True)
        ]

    def _asked_box(self, members: Sequence[Member], places: Sequence[Placement], roi: str) -> Box:
        if roi == region.FULL:
            return region.whole(self.scan.array.shape)
        if roi == region.CENTER:
            return region.hull(map(_central_box, members, places))
        return region.parse_roi(roi, self.scan.array.shape)

    @property
    def windows(self) -> int:
        """Their number, of all members."""
        return sum(view.windows for view in self.views)

    def memory(self) -> tuple[int, int]:
        """Estimate of the bytes that the volumes take, and the network on its windows."""
        first, voxels = self.views[0].member, self.scan.array.size
        maps = len(first.predictor.outputs) * len(first.classes)
        processed = max(math.prod(view.place.shape) for view in self.views)
        padded = max(math.prod(np.maximum(view.shape, view.member.options.patch_size).tolist()) for view in self.views)
        predicting = FLOAT * (voxels * (1 + maps) + processed * 2 + padded * (2 + 2 * maps))
        resampling = max(view.recipe.memory(self.scan) for view in self.views)
        network = max(_voxels_at_once(view) * view.member.options.n_filters for view in self.views)
        return self.scan.array.nbytes + max(predicting, resampling), FLOAT * FEATURE_MAPS * network

    def warnings(self) -> list[str]:
        """In what the scan differs from those of the training, and where a viewer may lay the mask elsewhere."""
        warnings = [warning for view in self.views for warning in self._warnings(view)]
        if self.scan.sheared and self.scan.header is None:
            warnings.append(
                "the slices lean, as of a tilted gantry: the sform of the mask says so, but ITK, and with it 3D Slicer "
                "and ITK-SNAP, shows it upright, some mm off"
            )
        return list(dict.fromkeys(warnings))

    def _warnings(self, view: View) -> Iterator[str]:
        run, typical, affine = f"run {view.member.exp}", view.member.typical, view.place.affine
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
                f"voxels of {by(spacing)} mm, but {by(typical['spacing_mm'])} mm in {run}'s training; resample the "
                "scan, or train on scans prepared with --spacing_mm"
            )
        larger = math.prod(region.size_of(view.box)) / math.prod(typical["shape"])
        whole = self.box == region.whole(self.scan.array.shape)
        zscored = view.member.preprocessing.normalise == "zscore"
        if larger > MUCH_LARGER:
            yield (
                f"the scan has {larger:.1f} times the voxels of {run}'s training volumes (of the LA set: crops around "
                "the atrium); a --roi around the structure keeps false ones out"
            )
        elif self.raw and whole and zscored and abs(typical["mean"] or 0) > CUT_MEAN:
            yield (
                f"{run} was trained on parts of scans, z-scored before they were cut out, and this scan is no larger "
                "than those; if it is a part, its intensities come out otherwise: give the whole scan and a --roi"
            )

    def predict(self, device: torch.device) -> dict[str, np.ndarray]:
        """Mean maps of all members on the grid of the scan: {"prob", "sdm"}, (C, W, H, D) float32.

        Outside the box the probability is 0 and the signed distance 1.
        """
        total: dict[str, np.ndarray] = {}
        for recipe in dict.fromkeys(view.recipe for view in self.views):
            image, place = recipe.apply(self.scan)
            for view in (view for view in self.views if view.recipe == recipe):
                member = view.member
                for name, values in predict_volume(member.predictor, image[view.box], member.options, device).items():
                    seen = np.full((len(values), *place.shape), OUTSIDE[name], dtype=np.float32)
                    seen[:, *view.box] = values
                    restored = np.stack([place.restore(channel) for channel in seen])
                    total[name] = total.get(name, 0) + restored / len(self.views)
        for name, values in total.items():
            inside = values[:, *self.box].copy()
            values.fill(OUTSIDE[name])
            values[:, *self.box] = inside
        return total


def _left_to_do(member: Member, prepared: Preprocessing | None) -> Preprocessing:
    if prepared is None:
        return member.recipe
    if prepared != member.preprocessing:
        raise InputError(
            f"the case was prepared in another way than the training scans of run {member.exp}; give the raw scan "
            "as --input"
        )
    return Preprocessing(normalise="none")


def _central_box(member: Member, place: Placement) -> Box:
    if member.typical is None:
        raise InputError(
            f"run {member.exp} does not know the size of its training volumes (it was trained by an older version); "
            "give --roi x0:x1,y0:y1,z0:z1"
        )
    return place.box_in_scan(region.central(place.shape, [round(length) for length in member.typical["shape"]]))


def _voxels_at_once(view: View) -> int:
    """Voxels of the windows that share a forward pass."""
    options = view.member.options
    return min(options.window_batch, view.windows) * math.prod(window_shape(options, view.shape))


def by(numbers: Sequence[float]) -> str:
    """Sizes as people read them."""
    return " x ".join(f"{number:.3g}" for number in numbers)
