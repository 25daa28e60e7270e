"""What predict.py does: every scan through the trained runs to its mask and its row, or the network to an ONNX file."""

import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.metrics import MM3_PER_ML, largest_components
from inference.engines import on_engine
from inference.ensemble import PROB, SDM, Member, load_member
from inference.onnx_export import OPSET, export_onnx
from inference.plan import Plan, by, find_inputs, is_raw
from inference.predictions import LABELS_TXT, Predictions, volume_column
from inference.progress import Progress, in_units
from inference.windows import THRESHOLD
from options import flags
from runtime import runs
from runtime.device import enough_memory, pick_device
from scans import region
from scans.files import READABLE, write_scan
from utils import files
from utils.errors import InputError
from utils.labels import ONE_CLASS, LabelClass, label_map
from utils.machine import available_memory

ONE_FILE = {".nii": "nii.gz", ".mhd": "mha", ".nhdr": "nrrd"}  # formats that are not written as they are read
SMALLER_BOX = f"give a smaller --roi, or {flags.LESS_WINDOW}"
NO_WORD = re.compile(r"\W+")  # in the name of a class, no part of the name of a file
FAILED = 1  # exit status if some scan could not be segmented
NOTICE = "Accuracy on uncropped scans is not measured. Not for clinical use."


def load_members(asked: Namespace, options_of: Callable[[str, dict[str, Any]], Namespace]) -> list[Member]:
    """The runs of --exp. Args: options_of, from a run's name and its stored options to those of its prediction."""
    members, maps = [], (PROB, SDM) if SDM in asked.save else (PROB,)
    for exp in dict.fromkeys(asked.exp):
        path = runs.checkpoint_path(runs.existing_run(asked.model_path, exp), asked.weights)
        state = runs.load_checkpoint(path)
        members.append(load_member(path, state, options_of(exp, state["options"]), maps, asked.tta))
    for member in members:
        if member.classes != members[0].classes:
            ours, theirs = (", ".join(one.name for one in m.classes) for m in (members[0], member))
            raise InputError(
                f"--exp {members[0].exp} and {member.exp} have different classes ({ours}; {theirs}); the mean is over "
                "runs of one preparation"
            )
    return members


def segment_all(members: Sequence[Member], asked: Namespace) -> int:
    """Segment every scan of --input; returns the exit status."""
    region.require_roi(asked.roi)
    scans = find_inputs(files.repository_path(asked.input))
    device = on_device(members)
    folder = files.repository_path(asked.output)
    classes = members[0].classes
    predictions = Predictions(folder, record_of(members, asked), asked.resume, asked.overwrite, classes)
    outputs = {case: output_paths(folder, case, path, asked, classes) for case, path in scans.items()}
    predictions.claim(scans.values(), [path for paths in outputs.values() for path in paths.values()])
    todo = predictions.missing(scans, {case: paths["mask"] for case, paths in outputs.items()})
    if len(todo) < len(scans):
        print(f"{len(scans) - len(todo)} of {len(scans)} scans are segmented already")
    failed = []
    for number, case in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {scans[case]}")
        try:
            with enough_memory(device, SMALLER_BOX):
                row = segment(scans[case], outputs[case], members, asked, device)
        except InputError as error:
            row = {"error": str(error)}
            failed.append(case)
            print(f"error: {error}", file=sys.stderr)
        predictions.add(case, file=str(scans[case]), **row)
    print(f"{len(scans) - len(failed)} of {len(scans)} scans segmented: {files.shown(folder)}")
    print(f"volumes and remarks: {files.shown(folder / runs.PREDICTIONS_CSV)}")
    if failed:
        print(
            f"error: {len(failed)} of {len(scans)} scans failed ({', '.join(failed)}); see the column error, and give "
            "the same command with --resume once that is fixed",
            file=sys.stderr,
        )
        return FAILED
    case = next(iter(scans))
    if is_raw(scans[case]):
        names = "" if classes == ONE_CLASS else f" -l {files.shown(folder / LABELS_TXT)}"
        print(f"to look at one: itksnap -g {files.shown(scans[case])} -s {files.shown(outputs[case]['mask'])}{names}")
    return 0


def on_device(members: Sequence[Member]) -> torch.device:
    """Place the networks on the device that was asked for; one that lacks a run's precision is an `InputError`."""
    device = pick_device(members[0].options)
    for member in members:
        pick_device(member.options, say=lambda line: None)
        member.predictor.method = on_engine(member.predictor.method, device, member.options)
    return device


def output_paths(
    folder: Path, case: str, scan: Path, asked: Namespace, classes: Sequence[LabelClass] = ONE_CLASS
) -> dict[str | tuple[str, int], Path]:
    """Files to write for a scan: `mask`, and the maps of --save by name and index of the class."""
    suffix = asked.format
    if suffix == "input":
        own = next((end for end in READABLE if scan.name.lower().endswith(end)), ".nii.gz")  # DICOM and HDF5 have none
        suffix = ONE_FILE.get(own, own.removeprefix("."))
    ends = [f"_{NO_WORD.sub('_', one.name)}" for one in classes] if len(classes) > 1 else [""]
    maps = {(m, index): folder / f"{case}_{m}{end}.{suffix}" for m in asked.save for index, end in enumerate(ends)}
    return {**maps, "mask": folder / f"{case}.{suffix}"}


def record_of(members: Sequence[Member], asked: Namespace) -> dict[str, Any]:
    """What decides a mask, as plain data."""
    of_the_command = {name: getattr(asked, name) for name in ("weights", "roi", "post", "tta", "save", "format")}
    of_the_command |= {"engine": asked.engine} if asked.engine != "torch" else {}
    return {**of_the_command, "runs": [member.settings() for member in members], "notice": NOTICE}


def segment(
    path: Path, outputs: dict[str, Path], members: Sequence[Member], asked: Namespace, device: torch.device
) -> dict[str, str]:
    """Segment one scan and write its files; the mask last, so that it stands for all. Returns its row."""
    start = time.perf_counter()
    plan = Plan(members, path, asked.roi)
    announce(plan)
    with Progress(plan.windows, device) as progress:
        for member in members:
            member.predictor.on_windows = progress
        maps = plan.predict(device)
    label = label_map(maps[PROB], all(member.predictor.method.exclusive for member in members))
    if asked.post == "lcc":
        label = largest_components(label)
    values = original_values(label, members[0].classes)
    for name, output in outputs.items():
        volume = values if name == "mask" else maps[name[0]][name[1]]
        write_scan(output, volume, plan.scan.affine, plan.scan.header)
    seconds, touches = time.perf_counter() - start, touches_border(label[plan.box] > 0)
    return row_of(label, members[0].classes, plan.scan.voxel_mm3, touches, seconds, outputs["mask"].name)


def original_values(label: np.ndarray, classes: Sequence[LabelClass]) -> np.ndarray:
    """A label map 0..C with the values of the label files; of several that make one class, the first."""
    values = np.array([0, *(one.values[0] for one in classes)])
    return values.astype(np.min_scalar_type(values.max()))[label]


def row_of(
    label: np.ndarray, classes: Sequence[LabelClass], voxel_mm3: float, touches: bool, seconds: float, name: str
) -> dict[str, str]:
    """The row of a scan, which is said as well. Args: label, (W, H, D), 0..C."""
    volumes = [np.count_nonzero(label == n) * voxel_mm3 / MM3_PER_ML for n in range(1, len(classes) + 1)]
    empty, parts, by_class = not label.any(), "", {}
    if len(classes) > 1:
        by_class = {volume_column(one): f"{ml:.3f}" for one, ml in zip(classes, volumes, strict=True)}
        parts = f" ({', '.join(f'{one.name} {ml:.1f}' for one, ml in zip(classes, volumes, strict=True))})"
    remarks = " (empty)" if empty else " (touches the border)" if touches else ""
    print(f"  {sum(volumes):.1f} mL{parts}{remarks} in {seconds:.0f} s: {name}")
    return {
        "output": name,
        "volume_ml": f"{sum(volumes):.3f}",
        "empty": "yes" if empty else "no",
        "touches_border": "yes" if touches else "no",
        "seconds": f"{seconds:.1f}",
        **by_class,
    }


def announce(plan: Plan) -> None:
    """Say how much work a scan is, and how it differs from the training; too much for the memory is an `InputError`."""
    volumes, network = plan.memory()
    shape = plan.scan.array.shape
    print(
        f"  {' x '.join(map(str, shape))} voxels of {by(plan.scan.spacing_mm)} mm; {plan.windows} windows; "
        f"memory about {in_units(volumes)} for the volumes, {in_units(network)} for the network"
    )
    if plan.box != region.whole(shape):
        print(f"  looking at {','.join(f'{axis.start}:{axis.stop}' for axis in plan.box)}")
    for warning in plan.warnings():
        print(f"  warning: {warning}")
    free = available_memory()
    if volumes > free:
        raise InputError(
            f"the volumes need about {in_units(volumes)}, {in_units(free)} are free; give a smaller --roi, or use a "
            "machine with more memory"
        )


def touches_border(mask: np.ndarray) -> bool:
    """Whether a mask reaches a face of its volume, so that part of the structure may lie outside."""
    return any(bool(np.moveaxis(mask, axis, 0)[[0, -1]].any()) for axis in range(mask.ndim))


def export(members: Sequence[Member], asked: Namespace) -> int:
    """Write the network of the reported output as ONNX."""
    if len(members) > 1:
        raise InputError("--export writes the network of one run; name one with --exp")
    (member,), path = members, files.repository_path(asked.export)
    if path.suffix != ".onnx":
        raise InputError(f"--export {asked.export} must end in .onnx")
    if path.exists() and not asked.overwrite:
        raise InputError(f"{path} exists; give --overwrite or another --export")
    with files.writing(path.parent, "--export"):
        path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {**member.settings(), "tta": asked.tta, "threshold": THRESHOLD, "notice": NOTICE}
    difference = export_onnx(member.predictor, member.options.patch_size, metadata, path)
    print(
        f"{files.shown(path)}: opset {OPSET}; on a random patch onnxruntime differs from PyTorch by "
        f"{difference:.1e} at most"
    )
    return 0
