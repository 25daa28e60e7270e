"""Segment scans that nobody labeled, with one trained run or the mean of several.

Reads NIfTI, NRRD, MetaImage and DICOM, prepares each scan as the run's training scans were, and writes a
mask in the geometry of the scan, <output>/<case>.nii.gz, for a viewer to lay over it. predictions.csv has a row
per scan: volume, whether it is empty or touches the border. The run folder is all that is needed: it may be copied
to another machine.

Accuracy on scans that were not cropped around the atrium, as the training scans were, is not measured. Not for
clinical use.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataloaders.store import available_memory
from evaluation.metrics import largest_component
from inference.ensemble import (
    PROB,
    SDM,
    SYMMETRIES,
    Member,
    Plan,
    count_windows,
    doubts,
    load_member,
    make_plan,
    memory_bytes,
    predict_scan,
)
from inference.onnx_export import OPSET, export_onnx
from inference.predictions import Predictions
from inference.progress import Progress, in_units
from inference.sources import find_sources, read_source
from inference.windows import THRESHOLD
from options import flags
from options.parser import Parser
from options.parsing import of_training
from runtime import runs
from runtime.device import pick_device, place
from scans import region
from scans.files import READABLE, write_scan
from utils import files
from utils.errors import InputError, run_script

ONE_FILE = {".nii": "nii.gz", ".mhd": "mha"}  # formats that are written in another way than they are read
LESS_MEMORY = f"give --roi, or {flags.LESS_WINDOW}"
FAILED = 1  # exit status if some scan could not be segmented
MM3_PER_ML = 1000
NOTICE = "Accuracy on uncropped scans is not measured. Not for clinical use."


def make_parser() -> Parser:
    """Flags of a prediction; what a run was trained with is taken from the run."""
    parser = Parser(
        usage="%(prog)s --exp NAME [NAME ...] --input SCAN --output DIR [flags]\n"
        "       %(prog)s --exp NAME --export FILE.onnx [flags]",
        description=__doc__,
        example="python code/predict.py --exp my_run --input scans/ --output predictions/",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--exp", nargs="+", required=True, metavar="NAME", help="run to use; of several, the mean")
    run.add_argument("--model_path", default="model", help="folder of all runs")
    run.add_argument("--weights", choices=("last", "best_val"), default="last", help="checkpoint to use")
    scans = parser.add_argument_group("scans")
    scans.add_argument(
        "--input",
        metavar="SCAN",
        help="a scan (.nii.gz, .nrrd, .mha, DICOM folder), a folder of them, or a data folder of prepared HDF5 cases",
    )
    scans.add_argument("--output", metavar="DIR", help="folder to write; made if needed")
    scans.add_argument(
        "--roi",
        default=region.FULL,
        help="where to look, elsewhere the mask is 0: full; center, a box of the size of the training volumes; or "
        "x0:x1,y0:y1,z0:z1 in voxels of the input scan, in the order of its file's axes, from 0, ends not included",
    )
    scans.add_argument(
        "--save",
        nargs="*",
        choices=(PROB, SDM),
        default=[],
        help="maps to write beside the mask: <case>_prob, the foreground probability; <case>_sdm, the network's signed "
        "distance map, negative inside, in [-1, 1] without a unit, where the method has one",
    )
    scans.add_argument(
        "--format",
        choices=("nii.gz", "nrrd", "mha", "input"),
        default="nii.gz",
        help="format to write; input: that of the scan, with .nii.gz for .nii, DICOM and HDF5, .mha for .mhd",
    )
    existing = scans.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="keep what --output holds, made with these settings; add what is missing"
    )
    existing.add_argument("--overwrite", action="store_true", help="write again what --output holds")
    result = parser.add_argument_group("inference")
    flags.add_window_arguments(result, protocol="fast")
    result.add_argument("--head", help="output of the method to use (default: as in training, or the method's first)")
    result.add_argument(
        "--post", choices=("none", "lcc"), default="lcc", help="lcc: the largest connected component alone; none: all"
    )
    result.add_argument(
        "--tta",
        nargs="?",
        choices=tuple(SYMMETRIES),
        const="flips",
        default="none",
        help="mean over views of each patch: flips (what --tta alone means), as it is, flipped along axis 0, along "
        "axis 1, along both, 4 passes; all, these and the same after a quarter turn in that plane, 8 passes",
    )
    parser.add_argument_group("export").add_argument(
        "--export",
        metavar="FILE.onnx",
        help="write the network of the output as ONNX (opset 18), preprocessing and window as metadata; no scan needed",
    )
    flags.add_device_options(parser)
    parser.set_defaults(stride_xy=None, stride_z=None, blend=None, window=None)  # --protocol or the run decides
    return parser


def parse_options(argv: Sequence[str] | None, exp: str, trained: dict[str, Any]) -> Namespace:
    """Options of one run: by hand > --protocol > those of its training."""
    parser = make_parser()
    given = parser.given(argv)
    protocol = given.get("protocol", parser.get_default("protocol"))
    parser.layer(of_training(trained), flags.protocol_defaults(protocol, trained["patch_size"]))
    return Namespace(**{**trained, **parser.defaults(), **given, "exp": exp})


def main(argv: Sequence[str] | None = None) -> int:
    """Segment every scan, or export the network; returns the exit status."""
    asked = make_parser().parse_args(argv)
    members = [_member(argv, asked, exp) for exp in dict.fromkeys(asked.exp)]
    if asked.export:
        return export(members, asked)
    region.require_roi(asked.roi)
    if not (asked.input and asked.output):
        raise InputError("give --input and --output, or --export FILE.onnx")
    scans = find_sources(files.repository_path(asked.input))
    device = on_device(members)
    folder = files.repository_path(asked.output)
    predictions = Predictions(folder, settings(members, asked), asked.resume, asked.overwrite)
    outputs = {case: output_paths(folder, case, path, asked) for case, path in scans.items()}
    predictions.claim(scans.values(), [path for paths in outputs.values() for path in paths.values()])
    todo = [case for case, path in scans.items() if not predictions.done(case, path, outputs[case]["mask"])]
    if len(todo) < len(scans):
        print(f"{len(scans) - len(todo)} of {len(scans)} scans are segmented already")
    for number, case in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {scans[case]}")
        try:
            row = segment(scans[case], outputs[case], members, asked, device)
        except (InputError, MemoryError, torch.OutOfMemoryError) as error:
            message = error if isinstance(error, InputError) else f"out of memory on {device}; {LESS_MEMORY}"
            row = {"error": str(message)}
            print(f"error: {message}", file=sys.stderr)
        predictions.add(case, file=str(scans[case]), **row)
    failed = [case for case in scans if predictions.rows[case]["error"]]
    print(f"{len(scans) - len(failed)} of {len(scans)} scans segmented: {folder / runs.PREDICTIONS_CSV}")
    if failed:
        print(
            f"error: {len(failed)} of {len(scans)} scans failed ({', '.join(failed)}); see the column error",
            file=sys.stderr,
        )
    return FAILED if failed else 0


def _member(argv: Sequence[str] | None, asked: Namespace, exp: str) -> Member:
    path = runs.checkpoint_path(runs.existing_run(asked.model_path, exp), asked.weights)
    state = runs.load_checkpoint(path)
    wanted = (PROB, SDM) if SDM in asked.save else (PROB,)
    return load_member(path, state, parse_options(argv, exp, state["options"]), wanted, asked.tta)


def on_device(members: Sequence[Member]) -> torch.device:
    """Place the networks on the device that was asked for; one that lacks a run's precision is an `InputError`."""
    device = pick_device(members[0].options)
    for member in members:
        pick_device(member.options, say=lambda line: None)
        place(member.predictor, device, member.options)
    return device


def output_paths(folder: Path, case: str, scan: Path, asked: Namespace) -> dict[str, Path]:
    """Files to write for a scan: `mask`, and the maps of --save."""
    suffix = asked.format
    if suffix == "input":
        own = next((end for end in READABLE if scan.name.lower().endswith(end)), ".nii.gz")  # DICOM and HDF5 have none
        suffix = ONE_FILE.get(own, own.removeprefix("."))
    maps = {name: folder / f"{case}_{name}.{suffix}" for name in asked.save}
    return {**maps, "mask": folder / f"{case}.{suffix}"}


def settings(members: Sequence[Member], asked: Namespace) -> dict[str, Any]:
    """What decides a mask, as plain data."""
    of_the_command = {name: getattr(asked, name) for name in ("weights", "roi", "post", "tta", "save", "format")}
    return {**of_the_command, "runs": [member.settings() for member in members], "notice": NOTICE}


def segment(
    scan_path: Path, outputs: dict[str, Path], members: Sequence[Member], asked: Namespace, device: torch.device
) -> dict[str, str]:
    """Segment one scan and write its files; the mask last, so that it stands for all. Returns its row."""
    start = time.perf_counter()
    plan = make_plan(members, read_source(scan_path), asked.roi)
    windows = count_windows(members, plan)
    announce(members, plan, windows)
    with Progress(windows, device) as progress:
        for member in members:
            member.predictor.on_windows = progress
        maps = predict_scan(members, plan, device)
    mask = maps[PROB] > THRESHOLD
    if asked.post == "lcc":
        mask = largest_component(mask)
    for name, path in outputs.items():
        write_scan(path, mask if name == "mask" else maps[name], plan.scan.affine, plan.scan.header)
    volume = np.count_nonzero(mask) * abs(np.linalg.det(plan.scan.affine[:3, :3])) / MM3_PER_ML
    seconds, empty, touches = time.perf_counter() - start, not mask.any(), touches_border(mask[plan.box])
    remarks = " (empty)" if empty else " (touches the border)" if touches else ""
    print(f"  {volume:.1f} mL{remarks} in {seconds:.0f} s: {outputs['mask'].name}")
    return {
        "output": outputs["mask"].name,
        "volume_ml": f"{volume:.3f}",
        "empty": yes_no(empty),
        "touches_border": yes_no(touches),
        "seconds": f"{seconds:.1f}",
    }


def announce(members: Sequence[Member], plan: Plan, windows: int) -> None:
    """Say how much work a scan is, and what speaks against it; too much for the memory is an `InputError`."""
    volumes, network = memory_bytes(members, plan)
    shape, spacing = plan.scan.array.shape, plan.scan.spacing_mm
    print(
        f"  {' x '.join(map(str, shape))} voxels of {' x '.join(f'{mm:.3g}' for mm in spacing)} mm; {windows} windows; "
        f"memory about {in_units(volumes)} for the volumes, {in_units(network)} for the network"
    )
    if plan.box != region.whole(shape):
        print(f"  looking at {','.join(f'{axis.start}:{axis.stop}' for axis in plan.box)}")
    for doubt in doubts(members, plan):
        print(f"  warning: {doubt}")
    free = available_memory()
    if volumes > free:
        raise InputError(f"the volumes need about {in_units(volumes)}, {in_units(free)} are free; give a smaller --roi")


def touches_border(mask: np.ndarray) -> bool:
    """Whether a mask reaches a face of its volume, so that part of the structure may lie outside."""
    return any(bool(np.moveaxis(mask, axis, 0)[[0, -1]].any()) for axis in range(mask.ndim))


def yes_no(value: bool) -> str:
    """As predictions.csv writes it."""
    return "yes" if value else "no"


def export(members: Sequence[Member], asked: Namespace) -> int:
    """Write the network of the reported output as ONNX."""
    if len(members) > 1:
        raise InputError("--export writes the network of one run; name one with --exp")
    (member,), path = members, files.repository_path(asked.export)
    if path.suffix != ".onnx":
        raise InputError(f"--export {asked.export} must end in .onnx")
    if path.exists() and not asked.overwrite:
        raise InputError(f"{path} exists; give --overwrite or another --export")
    with files.writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {**member.settings(), "tta": asked.tta, "threshold": THRESHOLD, "notice": NOTICE}
    difference = export_onnx(member.predictor, member.options.patch_size, metadata, path)
    print(f"{path}: opset {OPSET}; on a random patch onnxruntime differs from PyTorch by {difference:.1e} at most")
    return 0


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
