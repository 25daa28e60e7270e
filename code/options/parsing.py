"""From a command line to the options of a run: precedence of defaults, checks, and what depends on other flags.

A flag that is given > --compat > the method's own preset > --preset > the method's defaults > those of flags.py.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from options import flags
from options.methods import MethodFlags, flags_of_method
from options.parser import Parser
from options.presets import COMPAT, PRESETS, cpu_has_bf16
from utils.constants import GROUPS, MIN_BF16_PATCH
from utils.errors import InputError
from utils.schedules import RAMP_UNIT

LR_STEP_FRACTION = 2500 / flags.PAPER_ITERATIONS
SAVE_FRACTION = 1000 / flags.PAPER_ITERATIONS

OF_THE_MACHINE = ("device", "gpu", "compile", "model_path")  # what a test or a prediction does not take from training


def of_training(trained: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a training run that a test or a prediction of its run goes by."""
    return {key: value for key, value in trained.items() if key not in OF_THE_MACHINE}


def resolve(options: Namespace, uses_unlabeled: bool) -> Namespace:
    """Check the values and fill in what depends on others: schedule lengths, batch layout, paths."""
    groups_fit = options.norm != "group" or options.n_filters % GROUPS == 0 or GROUPS % options.n_filters == 0
    _require(options, "n_filters", groups_fit, f"must be a multiple of {GROUPS} with --norm group")
    if not uses_unlabeled:
        options.unlabelnum = 0
    if options.labeled_bs is None:
        whole = options.unlabelnum == 0 or options.batch_size == 1
        options.labeled_bs = options.batch_size if whole else options.batch_size // 2
    _require(options, "labeled_bs", 1 <= options.labeled_bs <= options.batch_size, "must be in [1, --batch_size]")
    if options.window == "patch":
        refuse_gaps(options.patch_size, window_stride(options))
    fractions = {"lr_step": LR_STEP_FRACTION, "save_every": SAVE_FRACTION}
    for name, fraction in fractions.items():
        if getattr(options, name) is None:
            setattr(options, name, max(1, round(fraction * options.max_iterations)))
    options.val_every = options.val_every or options.save_every
    if hasattr(options, "consistency_rampup"):
        units, share = options.consistency_rampup, round(options.rampup_share * options.max_iterations)
        options.ramp_iterations = share if units is None else units * RAMP_UNIT
    return options


def window_stride(options: Namespace) -> tuple[int, int, int]:
    """Steps of the window along W, H, D."""
    return options.stride_xy, options.stride_xy, options.stride_z


def refuse_gaps(patch: Sequence[int], stride: Sequence[int]) -> None:
    """Windows that do not reach each other are bad input; sizes in voxels along each axis."""
    if any(step > length for step, length in zip(stride, patch, strict=True)):
        raise InputError(
            f"windows of {tuple(patch)} voxels in steps of {tuple(stride)} leave gaps; lower --stride_xy or --stride_z"
        )


def refuse_recomputing(options: Namespace) -> None:
    """--recompute with what it cannot be combined with is bad input; options, those of a resumed run included."""
    if options.recompute and options.norm != "batch":
        raise InputError(f"--recompute computes batch norms again, not --norm {options.norm}; give --no-recompute")
    if options.recompute and options.compile:
        raise InputError("--recompute has no effect on compiled networks; give --no-recompute or drop --compile")


def _require(options: Namespace, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise InputError(f"--{name} {getattr(options, name)} {rule}")


def parse_training(
    argv: Sequence[str] | None, description: str, methods: Mapping[str, type[MethodFlags]], method: str | None = None
) -> tuple[Namespace, set[str]]:
    """The options of a training run, and the names of the flags that were given.

    --method, --preset and --compat are read first: they decide which flags there are and what their defaults are.
    With `method`, that is the method and there is no such flag.
    """
    first = Parser(add_help=False)
    first.add_argument("--method", default="dtml")
    first.add_argument("--preset", default="paper")
    first.add_argument("--compat", default="off")
    chosen, _ = first.parse_known_args(argv)
    key = method or (chosen.method if chosen.method in methods else "dtml")
    cls = methods[key]
    parser = training_parser(description, methods, key, choose=method is None)
    own = cls.presets.get(chosen.preset, {})
    parser.layer(cls.defaults, PRESETS.get(chosen.preset, {}), own, COMPAT.get(chosen.compat, {}))
    given = parser.given(argv)
    options = Namespace(**{**parser.defaults(), **given, "method": key})
    if options.resume and options.overwrite:
        parser.error("--resume and --overwrite contradict each other")
    names = set(given) | ({"method"} if method else set())
    _fit_preset(options, names, cls.uses_unlabeled)
    if options.unlabelnum and not cls.uses_unlabeled and "unlabelnum" in names:
        raise InputError(
            f"--unlabelnum {options.unlabelnum} asks for unlabeled cases, and --method {key} uses none; "
            "drop it or choose another --method"
        )
    return resolve(options, cls.uses_unlabeled), names


def training_parser(
    description: str, methods: Mapping[str, type[MethodFlags]], method: str, choose: bool = True
) -> Parser:
    """The flags of a training run by one method; `choose` adds --method."""
    parser = Parser(
        usage="%(prog)s [flags]",
        description=description,
        common=(*flags.COMMON, *(flag.removeprefix("--") for flag in flags_of_method(methods[method]))),
        example=f"python code/train{f'.py --method {method}' if choose else '_dtml.py'} {flags.TRAINING_EXAMPLE}",
    )
    if choose:
        parser.add_argument("--method", choices=tuple(methods), default="dtml", help="what to train")
    flags.add_preset_options(parser)
    flags.add_path_options(parser)
    flags.add_data_options(parser)
    flags.add_run_options(parser)
    flags.add_training_options(parser)
    methods[method].add_arguments(parser.add_argument_group(f"method {method}"))
    if methods[method].weighs_consistency:
        flags.add_consistency_options(parser)
    flags.add_augmentation_options(parser)
    flags.add_device_options(parser)
    flags.add_inference_options(parser)
    return parser


def _fit_preset(options: Namespace, given: set[str], uses_unlabeled: bool) -> None:
    """Give up what a preset chose for its own batch, patch or processor where others were given."""
    all_labeled = options.unlabelnum == 0 or not uses_unlabeled
    if "labeled_bs" not in given and ("batch_size" in given or all_labeled):
        options.labeled_bs = None
    fits = min(options.patch_size) >= MIN_BF16_PATCH and options.device != "cuda" and options.gpu is None
    if "amp" not in given and not (fits and cpu_has_bf16()):
        options.amp = "off"
