"""Segment scans that nobody labeled, with one trained run or the mean of several.

Reads NIfTI, NRRD, MetaImage and DICOM, prepares each scan as the run's training scans were, and writes a
mask in the geometry of the scan, <output>/<case>.nii.gz, for a viewer to lay over it. predictions.csv has a row
per scan: volume, whether it is empty or touches the border. With several classes a mask has the values of the
label files; labels.json and, for ITK-SNAP, labels.txt name them. The run folder is all that is needed: it may be
copied to another machine.

Accuracy on scans that were not cropped around the atrium, as the training scans were, is not measured. Not for
clinical use.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

from options import flags
from options.parser import Parser
from options.parsing import of_training
from options.types import PathHere, number
from utils.errors import InputError, run_script


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
    run.add_argument("--model_path", action=PathHere, default="model", help="folder of all runs")
    run.add_argument("--weights", choices=("last", "best_val"), default="last", help="checkpoint to use")
    scans = parser.add_argument_group("scans")
    scans.add_argument(
        "--input",
        action=PathHere,
        metavar="SCAN",
        help="a scan (.nii.gz, .nrrd, .mha, DICOM folder), a folder of them, or a data folder of prepared HDF5 cases",
    )
    scans.add_argument("--output", action=PathHere, metavar="DIR", help="folder to write; made if needed")
    scans.add_argument(
        "--roi",
        default="full",
        help="where to look, elsewhere the mask is 0: full; center, a box of the size of the training volumes; or "
        "x0:x1,y0:y1,z0:z1 in voxels of the input scan, in the order of its file's axes, from 0, ends not included",
    )
    scans.add_argument(
        "--save",
        nargs="*",
        choices=("prob", "sdm"),
        default=[],
        help="maps to write beside the mask: <case>_prob, the foreground probability; <case>_sdm, the network's signed "
        "distance map, negative inside, in [-1, 1] without a unit, where the method has one; each class has its own",
    )
    scans.add_argument(
        "--format",
        choices=("nii.gz", "nrrd", "mha", "input"),
        default="nii.gz",
        help="format to write; input: that of the scan, with .nii.gz for .nii, DICOM and HDF5, .mha for .mhd, .nrrd "
        "for .nhdr",
    )
    scans.add_argument(
        "--fill_nan",
        type=number,
        metavar="VALUE",
        help="replaces voxels that are NaN or infinite (default: as in the preparation of the training scans)",
    )
    existing = scans.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="keep what --output holds, made with these settings; add what is missing"
    )
    existing.add_argument("--overwrite", action="store_true", help="write again what --output holds")
    result = parser.add_argument_group("inference")
    flags.add_window_arguments(result, protocol="fast")
    result.add_argument(
        "--head",
        help="output to use: seg, sdm, mean, teacher, where the method has it (default: as in training, or its first)",
    )
    result.add_argument(
        "--post", choices=("none", "lcc"), default="lcc", help="lcc: the largest connected component alone; none: all"
    )
    parser.add_argument_group("export").add_argument(
        "--export",
        action=PathHere,
        metavar="FILE.onnx",
        help="write the network of the output as ONNX (opset 18), preprocessing and window as metadata; no scan needed",
    )
    flags.add_device_options(parser, engine=True)
    parser.set_defaults(stride_xy=None, stride_z=None, blend=None, window=None)  # --protocol or the run decides
    return parser


def parse_options(argv: Sequence[str] | None, exp: str, trained: dict[str, Any]) -> Namespace:
    """Options of one run: flags that are given > --protocol > those of its training."""
    parser = make_parser()
    given = parser.given(argv)
    protocol = given.get("protocol", parser.get_default("protocol"))
    parser.layer(of_training(trained), flags.protocol_defaults(protocol, trained["patch_size"]))
    return Namespace(**{**trained, **parser.defaults(), **given, "exp": exp})


def main(argv: Sequence[str] | None = None) -> int:
    """Segment every scan, or export the network; returns the exit status."""
    asked = make_parser().parse_args(argv)
    if not (asked.export or (asked.input and asked.output)):
        raise InputError("give --input and --output, or --export FILE.onnx")
    from inference import segmenting  # PyTorch, which --help does not wait for

    members = segmenting.load_members(asked, partial(parse_options, argv))
    return segmenting.export(members, asked) if asked.export else segmenting.segment_all(members, asked)


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
