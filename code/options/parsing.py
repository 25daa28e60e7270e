"""From a command line to the options of a run: precedence of defaults, checks, and what depends on other flags.

By hand > --compat > the method's own preset > --preset > the method's defaults > the defaults of options.py.
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from networks.vnet import GROUPS, MIN_PATCH
from options import flags
from options.presets import COMPAT, PRESETS
from runtime.device import MIN_BF16_PATCH
from utils.errors import InputError
from utils.schedules import RAMP_UNIT

LR_STEP_FRACTION = 2500 / flags.PAPER_ITERATIONS
SAVE_FRACTION = 1000 / flags.PAPER_ITERATIONS

OF_THE_MACHINE = ("device", "gpu", "compile", "model_path")  # what a test or a prediction does not take from training
AT_LEAST = {  # the smallest value of a flag that makes sense; flags of single methods are among them
    **dict.fromkeys(
        "max_iterations batch_size n_filters labelnum lr_step save_every val_every log_every "
        "stride_xy stride_z window_batch".split(),
        1,
    ),
    **dict.fromkeys(
        "unlabelnum num_workers warmup image_every val_cases seed weight_decay consistency consistency_rampup "
        "rampup_share aug_zoom aug_rotate aug_intensity sdm_k_start con_scale sdm_weight adv_weight att_beta "
        "unc_weight seg_weight feat_weight score_workers".split(),
        0,
    ),
}
AT_MOST = {"seed": 2**63 - 1, "rampup_share": 1}  # a seed: what PyTorch takes
POSITIVE = {"scale", "base_lr", "lr_gamma", "sdm_k", "critic_lr"}
SHARES = {"dropout", "momentum"}


def of_training(trained: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a training that a test or a prediction of its run goes by."""
    return {key: value for key, value in trained.items() if key not in OF_THE_MACHINE}


def layer_defaults(parser: ArgumentParser, *layers: Mapping[str, Any]) -> None:
    """Set defaults from layers, the strongest last; entries whose flag is not declared here are passed over."""
    declared = {action.dest for action in parser._actions}
    for layer in layers:
        parser.set_defaults(**{key: value for key, value in layer.items() if key in declared})


def resolve(options: Namespace, uses_unlabeled: bool) -> Namespace:
    """Check the values and fill in what depends on others: schedule lengths, batch layout, paths."""
    require_values(options)
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


def require_values(options: Namespace) -> None:
    """Refuse numbers that no run or test can be made with; flags that a script does not have are passed over."""
    for name, value in vars(options).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} {value} must be a finite number")
        low = AT_LEAST.get(name)
        if low is not None and value is not None and value < low:
            raise InputError(f"--{name} {value} must be at least {low}")
        if name in AT_MOST and value > AT_MOST[name]:
            raise InputError(f"--{name} {value} must be at most {AT_MOST[name]}")
    for name in POSITIVE & vars(options).keys():
        _require(options, name, getattr(options, name) > 0, "must be positive")
    for name in SHARES & vars(options).keys():
        _require(options, name, 0 <= getattr(options, name) < 1, "must be in [0, 1)")
    if "patch_size" in options:
        sizes = " ".join(map(str, options.patch_size))
        if min(options.patch_size) < MIN_PATCH:
            raise InputError(f"--patch_size {sizes} must be at least {MIN_PATCH} along every axis")


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


def parse_in_two_strides(
    argv: Sequence[str] | None, description: str, methods: Mapping[str, Any], method: str | None = None
) -> tuple[Namespace, set[str]]:
    """Read --method and --preset first, then everything strictly with that method's own group of flags.

    Returns: the options, and the names of those that were given by hand.
    """
    parser = ArgumentParser(
        usage="%(prog)s [flags]", description=description, formatter_class=flags.HelpFormatter, allow_abbrev=False
    )
    if method is None:
        parser.add_argument("--method", choices=tuple(methods), default="dtml", help="what to train")
    flags.add_preset_options(parser)
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", choices=tuple(methods), default="dtml")
    flags.add_preset_options(first)
    chosen, _ = first.parse_known_args(argv)
    key = method or chosen.method
    cls = methods[key]
    cls.add_arguments(parser.add_argument_group(f"method {key}"))
    if hasattr(cls, "consistency_weight"):
        flags.add_consistency_options(parser)
    for add in (
        flags.add_path_options,
        flags.add_data_options,
        flags.add_augmentation_options,
        flags.add_training_options,
        flags.add_run_options,
        flags.add_device_options,
        flags.add_inference_options,
    ):
        add(parser)
    own = cls.presets.get(chosen.preset, {})
    layer_defaults(parser, cls.defaults, PRESETS[chosen.preset], own, COMPAT.get(chosen.compat, {}))
    options = parser.parse_args(argv)
    options.method = key
    by_hand = given_by_hand(parser, argv) | ({"method"} if method else set())
    _fit_preset(options, by_hand)
    if "unlabelnum" in by_hand and options.unlabelnum and not cls.uses_unlabeled:
        raise InputError(
            f"--unlabelnum {options.unlabelnum} asks for unlabeled cases, and --method {key} uses none; "
            "drop it or choose another --method"
        )
    return resolve(options, cls.uses_unlabeled), by_hand


def _fit_preset(options: Namespace, by_hand: set[str]) -> None:
    """Give up what a preset chose for its own batch or patch where others were given by hand."""
    if "labeled_bs" not in by_hand and ("batch_size" in by_hand or options.unlabelnum == 0):
        options.labeled_bs = None
    if "amp" not in by_hand and min(options.patch_size) < MIN_BF16_PATCH:
        options.amp = "off"


def given_by_hand(parser: ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """Names of the flags that stand on the command line: those that take the place of a mark."""
    mark = object()
    marked = parser.parse_args(argv, Namespace(**dict.fromkeys(vars(parser.parse_args(argv)), mark)))
    return {name for name, value in vars(marked).items() if value is not mark}
