"""Every shared flag in titled groups: the only home of defaults, presets and their precedence.

By hand > --compat > --preset > the method's own defaults > the defaults here (which are the paper's).
"""

import argparse
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from networks.vnet import GROUPS, MIN_PATCH
from utils.errors import InputError
from utils.schedules import RAMP_UNIT

REPOSITORY = Path(__file__).resolve().parents[2]
LISTS = ("train.list", "test.list")  # in a data folder; those of another --split have its name before theirs
PAPER_ITERATIONS = 6000  # what schedule lengths are fractions of
LR_STEP_FRACTION = 2500 / PAPER_ITERATIONS
SAVE_FRACTION = 1000 / PAPER_ITERATIONS


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively; elsewhere bf16 would be slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: a release may lack them
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "cpu": {  # chosen on lines 49-64 of dev_train.list, trained on lines 1-48: docs/results/cpu_preset.md
        "scale": 0.5,
        "patch_size": [64, 64, 48],
        "n_filters": 8,
        "dropout": 0.0,
        "max_iterations": 3000,
        "lr_schedule": "cosine",
        "aug_zoom": 0.2,
        "aug_rotate": 15.0,
        "aug_intensity": 0.2,
        "num_workers": 0,
        "amp": "bf16" if cpu_has_bf16() else "off",
        "stride_xy": 16,
        "stride_z": 16,
    },
    "demo": {  # minutes on two cores: the phantom of make_phantom.py; docs/results/phantom.md
        "root_path": "data/phantom",
        "labelnum": 4,
        "patch_size": [48, 48, 32],
        "n_filters": 8,
        "dropout": 0.0,
        "max_iterations": 400,
        "base_lr": 0.03,
        "lr_schedule": "cosine",
        "num_workers": 0,
        "stride_xy": 16,
        "stride_z": 16,
    },
}
COMPAT: dict[str, dict[str, Any]] = {
    "public": {
        "flip": "always",
        "crop_bound": "exclusive",
        "ramp": "stairs",
        "sdm_empty": "zeros",
        "con_scale": 2.0,
        "eval_empty": "zeros",
        "post": "lcc",
        "head": "seg",
    },
}


AT_LEAST = {
    **dict.fromkeys(
        "max_iterations batch_size n_filters labelnum lr_step save_every val_every log_every "
        "stride_xy stride_z window_batch".split(),
        1,
    ),
    **dict.fromkeys(
        "unlabelnum num_workers warmup image_every val_cases seed weight_decay consistency consistency_rampup "
        "aug_zoom aug_rotate aug_intensity".split(),
        0,
    ),
}
POSITIVE = {"scale", "base_lr", "lr_gamma"}
SHARES = {"dropout", "momentum"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults as one would type them, except those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.default == [] or "default" in action.help:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def add_path_options(parser: ArgumentParser) -> None:
    """Where the scans and their lists are."""
    group = parser.add_argument_group("scans")
    group.add_argument("--root_path", default="data/LA", help="folder of the cases, <root_path>/<case>/mri_norm2.h5")
    group.add_argument(
        "--split",
        choices=("official", "dev"),
        default="official",
        help="pair of lists in --root_path: train.list and test.list, or dev_train.list and dev_test.list",
    )
    group.add_argument("--train_list", help="file of training case ids, labeled first (default: that of --split)")
    group.add_argument("--test_list", help="file of test case ids (default: that of --split)")


def add_data_options(parser: ArgumentParser) -> None:
    """Which cases are labeled, and how they are read."""
    group = parser.add_argument_group("data")
    group.add_argument("--labelnum", type=int, default=16, help="labeled cases: the first so many of the training list")
    group.add_argument("--labeled_list", help="file of the labeled case ids, instead of the first --labelnum")
    group.add_argument(
        "--unlabelnum", type=int, help="unlabeled cases: the first so many after the labeled ones (default: all)"
    )
    group.add_argument("--scale", type=float, default=1.0, help="resample volumes by this factor; tests score natively")
    group.add_argument("--cache", choices=("ram", "none"), default="ram", help="keep decoded cases in memory or not")
    group.add_argument("--num_workers", type=int, default=4, help="loader processes; batches do not depend on it")


def add_augmentation_options(parser: ArgumentParser) -> None:
    """What happens to a training crop."""
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--flip",
        choices=("random", "always"),
        default="random",
        help="random: all 8 in-plane symmetries; always: the public codes' forced flip, reflections only",
    )
    group.add_argument(
        "--crop_bound",
        choices=("inclusive", "exclusive"),
        default="inclusive",
        help="exclusive: the public codes' crop, which never reaches the last slice",
    )
    group.add_argument("--aug_zoom", type=float, default=0.0, help="zoom by a factor in [1/(1+z), 1+z], isotropic")
    group.add_argument("--aug_rotate", type=float, default=0.0, help="rotate by up to so many degrees, axial plane")
    group.add_argument(
        "--aug_intensity",
        type=float,
        default=0.0,
        help="strength of random contrast, brightness, gamma and noise",
    )


def add_training_options(parser: ArgumentParser) -> None:
    """Network, optimisation, schedules and how the run is carried out."""
    network = parser.add_argument_group("network")
    network.add_argument(
        "--patch_size",
        type=int,
        nargs=3,
        default=[112, 112, 80],
        metavar=("W", "H", "D"),
        help="crop, in voxels",
    )
    network.add_argument("--n_filters", type=int, default=16, help="width: channels at full resolution")
    network.add_argument("--dropout", type=float, default=0.5, help="probability of the channel-wise dropout")
    network.add_argument("--norm", choices=("batch", "instance", "group"), default="batch", help="normalisation layer")
    network.add_argument(
        "--pretrained",
        help="start from weights published by UA-MT, SASSNet, DTC or DTML (.pth; two files separated by a comma "
        "for a method of two networks)",
    )

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--max_iterations", type=int, default=PAPER_ITERATIONS, help="length of the training")
    optim.add_argument("--batch_size", type=int, default=4, help="volumes per batch")
    optim.add_argument(
        "--labeled_bs",
        type=int,
        help="labeled volumes per batch (default: half; all of it without unlabeled cases)",
    )
    optim.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="optimizer of the segmenters")
    optim.add_argument("--base_lr", type=float, default=0.01, help="learning rate at the start")
    optim.add_argument("--momentum", type=float, default=0.9, help="momentum of SGD")
    optim.add_argument("--weight_decay", type=float, default=1e-4, help="weight decay")
    optim.add_argument(
        "--lr_schedule",
        choices=("steps", "cosine", "constant"),
        default="steps",
        help="course of the learning rate",
    )
    optim.add_argument(
        "--lr_step",
        type=int,
        help="iterations between two steps of the rate (default: 2500/6000 of the training)",
    )
    optim.add_argument("--lr_gamma", type=float, default=0.1, help="factor of a step of the rate")
    optim.add_argument("--warmup", type=int, default=0, help="iterations of linear warm-up of the rate")
    optim.add_argument("--seed", type=int, default=1337, help="seed of weights, batches and dropout")
    optim.add_argument("--deterministic", action="store_true", help="deterministic kernels, at some cost in speed")


def add_consistency_options(parser: ArgumentParser) -> None:
    """The consistency weight that the semi-supervised methods share."""
    group = parser.add_argument_group("consistency")
    group.add_argument("--consistency", type=float, default=0.1, help="final weight of the consistency loss")
    group.add_argument(
        "--consistency_rampup",
        type=float,
        help=f"length of the Gaussian ramp-up in units of {RAMP_UNIT} iterations, as in the public codes "
        "(default: the whole training; the paper's 40 are its 6000 iterations)",
    )
    group.add_argument(
        "--ramp",
        choices=("smooth", "stairs"),
        default="smooth",
        help="stairs: the public codes' 40 stairs, or one per unit of --consistency_rampup",
    )


def add_run_options(parser: ArgumentParser) -> None:
    """Where a run is written, and what it does besides training."""
    run = parser.add_argument_group("run")
    run.add_argument("--model_path", default="model", help="folder of all runs")
    run.add_argument("--exp", help="name of the run: everything is written to <model_path>/<exp>/")
    existing = run.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue from last.pth with the options of the run; starts fresh where there is none",
    )
    existing.add_argument("--overwrite", action="store_true", help="delete an existing run of this name first")
    run.add_argument(
        "--save_every", type=int, help="iterations between checkpoints (default: 1000/6000 of the training)"
    )
    run.add_argument("--log_every", type=int, default=10, help="iterations between lines of the curves")
    run.add_argument("--image_every", type=int, default=200, help="iterations between TensorBoard images; 0 for none")
    run.add_argument(
        "--val_cases",
        type=int,
        default=0,
        help="last labeled cases kept out of training to pick best_val.pth",
    )
    run.add_argument("--val_every", type=int, help="iterations between validations (default: as --save_every)")


def add_device_options(parser: ArgumentParser) -> None:
    """Where and how the networks are computed."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: the first GPU, or the CPU with a notice")
    group.add_argument("--gpu", type=int, help="index of the GPU")
    group.add_argument(
        "--amp",
        choices=("off", "bf16", "fp16"),
        default="off",
        help="mixed precision; transform and losses stay float32",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the networks")


def add_window_arguments(group) -> None:
    """The sliding window."""
    group.add_argument("--stride_xy", type=int, default=18, help="in-plane stride of the window, in voxels")
    group.add_argument("--stride_z", type=int, default=4, help="axial stride of the window, in voxels")
    group.add_argument(
        "--blend", choices=("uniform", "gaussian"), default="uniform", help="weight of a window's voxels"
    )
    group.add_argument("--window_batch", type=int, default=4, help="windows per forward pass")


def add_protocol_argument(group, default: str) -> None:
    """The sliding window by name."""
    group.add_argument(
        "--protocol",
        choices=("paper", "fast"),
        default=default,
        help="paper: the strides and blend of the run; fast: steps of half a patch, Gaussian blend",
    )


def protocol_defaults(protocol: str, patch: Sequence[int]) -> dict[str, Any]:
    """The window flags that --protocol stands for, for a patch (W, H, D): between those by hand and the run's own."""
    if protocol == "paper":
        return {}
    return {"stride_xy": min(patch[:2]) // 2, "stride_z": patch[2] // 2, "blend": "gaussian"}


def add_inference_options(parser: ArgumentParser) -> None:
    """The sliding window and what is scored."""
    group = parser.add_argument_group("inference")
    add_window_arguments(group)
    group.add_argument("--head", help="output to report (default: the method's first); all are scored")
    group.add_argument(
        "--post",
        choices=("none", "lcc"),
        default="none",
        help="prediction to report: as it is, or its largest connected component; both are scored",
    )
    group.add_argument(
        "--eval_empty",
        choices=("nan", "zeros"),
        default="nan",
        help="distances of an empty prediction: undefined and counted as missed, or the public code's 0",
    )


def add_preset_options(parser: ArgumentParser) -> None:
    """Named groups of defaults."""
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="paper", help="named settings; flags given by hand win"
    )
    add_compat_option(parser)


def add_compat_option(parser: ArgumentParser) -> None:
    """One switch for the quirks of the public codes."""
    parser.add_argument(
        "--compat",
        choices=("off", *COMPAT),
        default="off",
        help="public: every quirk of the public codes at once",
    )


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
    fractions = {"lr_step": LR_STEP_FRACTION, "save_every": SAVE_FRACTION}
    for name, fraction in fractions.items():
        if getattr(options, name) is None:
            setattr(options, name, max(1, round(fraction * options.max_iterations)))
    options.val_every = options.val_every or options.save_every
    if hasattr(options, "consistency_rampup"):
        units = options.consistency_rampup
        options.ramp_iterations = options.max_iterations if units is None else units * RAMP_UNIT
    return options


def require_values(options: Namespace) -> None:
    """Refuse numbers that no run or test can be made with; flags that a script does not have are passed over."""
    for name, value in vars(options).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} {value} must be a finite number")
        low = AT_LEAST.get(name)
        if low is not None and value is not None and value < low:
            raise InputError(f"--{name} {value} must be at least {low}")
    for name in POSITIVE & vars(options).keys():
        _require(options, name, getattr(options, name) > 0, "must be positive")
    for name in SHARES & vars(options).keys():
        _require(options, name, 0 <= getattr(options, name) < 1, "must be in [0, 1)")
    if "patch_size" in options:
        sizes = " ".join(map(str, options.patch_size))
        if min(options.patch_size) < MIN_PATCH:
            raise InputError(f"--patch_size {sizes} must be at least {MIN_PATCH} along every axis")


def _require(options: Namespace, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise InputError(f"--{name} {getattr(options, name)} {rule}")


def repository_path(path: str | Path) -> Path:
    """A path as the flags mean it: relative ones start at the repository, not at the current folder."""
    return REPOSITORY / path


def list_paths(options: Namespace) -> tuple[Path, Path]:
    """The training and the test list that --split, --train_list and --test_list pick."""
    prefix = "" if options.split == "official" else f"{options.split}_"
    root = repository_path(options.root_path)
    named = (options.train_list, options.test_list)
    return tuple(
        repository_path(given) if given else root / f"{prefix}{default}"
        for given, default in zip(named, LISTS, strict=True)
    )


def parse_in_two_strides(
    argv: Sequence[str] | None, description: str, methods: Mapping[str, Any], method: str | None = None
) -> tuple[Namespace, set[str]]:
    """Read --method and --preset first, then everything strictly with that method's own group of flags.

    Returns: the options, and the names of those that were given by hand.
    """
    parser = ArgumentParser(
        usage="%(prog)s [flags]", description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    if method is None:
        parser.add_argument("--method", choices=tuple(methods), default="dtml", help="what to train")
    add_preset_options(parser)
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", choices=tuple(methods), default="dtml")
    add_preset_options(first)
    chosen, _ = first.parse_known_args(argv)
    key = method or chosen.method
    cls = methods[key]
    cls.add_arguments(parser.add_argument_group(f"method {key}"))
    if hasattr(cls, "consistency_weight"):
        add_consistency_options(parser)
    for add in (
        add_path_options,
        add_data_options,
        add_augmentation_options,
        add_training_options,
        add_run_options,
        add_device_options,
        add_inference_options,
    ):
        add(parser)
    own = cls.presets.get(chosen.preset, {})
    layer_defaults(parser, cls.defaults, PRESETS[chosen.preset], own, COMPAT.get(chosen.compat, {}))
    options = parser.parse_args(argv)
    options.method = key
    by_hand = _given_by_hand(parser, argv, options) | ({"method"} if method else set())
    return resolve(options, cls.uses_unlabeled), by_hand


def _given_by_hand(parser: ArgumentParser, argv: Sequence[str] | None, options: Namespace) -> set[str]:
    """Names of the flags that stand on the command line: those that take the place of a mark."""
    mark = object()
    marked = parser.parse_args(argv, Namespace(**dict.fromkeys(vars(options), mark)))
    return {name for name, value in vars(marked).items() if value is not mark}
