"""Every shared flag in titled groups; defaults are the paper's, which presets and methods change."""

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from options.presets import COMPAT, PRESETS
from options.types import PathHere, PathsHere, at_least, between, positive, share, split_name
from utils.constants import MIN_PATCH
from utils.files import REPOSITORY, repository_path
from utils.labels import MOST_CLASSES
from utils.schedules import RAMP_UNIT

OFFICIAL = REPOSITORY / "data" / "LA"  # where the official lists are, whatever --root_path holds
LISTS = ("train.list", "test.list")  # in a data folder; those of another --split have its name before theirs
PAPER_ITERATIONS = 6000  # what schedule lengths are fractions of
NETWORK_NAMES = ("vnet", "residual_unet")  # the keys of networks.NETWORKS, which needs PyTorch
MAX_SEED = 2**63 - 1  # what PyTorch takes
COMMON = (  # what --help of a training run shows; --help_all shows the rest
    "method preset root_path labelnum exp resume overwrite max_iterations batch_size labeled_bs base_lr patch_size "
    "n_filters init_from seed val_cases num_workers device gpu amp"
).split()
TRAINING_EXAMPLE = "--root_path data/LA --labelnum 16 --exp my_run --gpu 0"
PROTOCOLS = ("paper", "fast", "whole")
LESS_WINDOW = "lower --window_batch or give --window patch"  # against a lack of memory


def add_path_options(parser: ArgumentParser) -> None:
    """Where the scans and their lists are."""
    group = parser.add_argument_group("scans")
    group.add_argument(
        "--root_path", action=PathHere, default="data/LA", help="folder of the cases, <root_path>/<case>/mri_norm2.h5"
    )
    group.add_argument(
        "--split",
        type=split_name,
        default="official",
        metavar="NAME",
        help="pair of lists in --root_path: official for train.list and test.list, another NAME for NAME_train.list "
        "and NAME_test.list, e.g. dev",
    )
    group.add_argument(
        "--train_list", action=PathHere, help="file of training case ids, labeled first (default: that of --split)"
    )
    group.add_argument("--test_list", action=PathHere, help="file of test case ids (default: that of --split)")


def add_data_options(parser: ArgumentParser) -> None:
    """Which cases are labeled, and how they are read."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--labelnum",
        type=at_least(1),
        default=16,
        help="labeled cases: the first of the training list (default: 16; all of them in a folder of prepare_scans.py)",
    )
    group.add_argument(
        "--labeled_list", action=PathHere, help="file of the labeled case ids, instead of the first --labelnum"
    )
    group.add_argument(
        "--unlabelnum", type=at_least(0), help="unlabeled cases: the first N after the labeled ones (default: all)"
    )
    add_classes_option(group)
    group.add_argument(
        "--scale", type=positive, default=1.0, help="resample volumes by this factor; tests score natively"
    )
    group.add_argument("--cache", choices=("ram", "none"), default="ram", help="keep decoded cases in memory or not")
    group.add_argument(
        "--num_workers", type=at_least(0), default=4, help="loader processes; batches do not depend on it"
    )


def add_classes_option(group) -> None:
    """How many classes the labels have, where the cases do not record it."""
    group.add_argument(
        "--num_classes",
        type=between(1, MOST_CLASSES),
        help="foreground classes of the labels (default: those that the labeled cases record, else 1)",
    )


def add_augmentation_options(parser: ArgumentParser) -> None:
    """What happens to a training crop."""
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--flip",
        choices=("random", "always"),
        default="random",
        help="random: all 8 in-plane symmetries; always: the public implementations' forced flip, reflections only",
    )
    group.add_argument(
        "--crop_bound",
        choices=("inclusive", "exclusive"),
        default="inclusive",
        help="exclusive: the public implementations' crop, which never reaches the last slice",
    )
    group.add_argument(
        "--aug_zoom", type=at_least(0.0), default=0.0, help="zoom by a factor in [1/(1+z), 1+z], isotropic"
    )
    group.add_argument(
        "--aug_rotate", type=at_least(0.0), default=0.0, help="largest rotation in the axial plane, in degrees"
    )
    group.add_argument(
        "--aug_intensity",
        type=at_least(0.0),
        default=0.0,
        help="strength of random contrast, brightness, gamma and noise",
    )


def add_training_options(parser: ArgumentParser) -> None:
    """Network, optimisation, schedules and how the run is carried out."""
    network = parser.add_argument_group("network")
    network.add_argument(
        "--network",
        choices=NETWORK_NAMES,
        default=NETWORK_NAMES[0],
        help="V-Net, as in the papers, or a residual-encoder U-Net after nnU-Net's",
    )
    network.add_argument(
        "--patch_size",
        type=at_least(MIN_PATCH),
        nargs=3,
        default=[112, 112, 80],
        metavar=("W", "H", "D"),
        help="crop, in voxels",
    )
    network.add_argument("--n_filters", type=at_least(1), default=16, help="width: channels at full resolution")
    network.add_argument("--dropout", type=share, default=0.5, help="probability of the channel-wise dropout")
    network.add_argument("--norm", choices=("batch", "instance", "group"), default="batch", help="normalisation layer")
    network.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute the outputs of batch norm and ReLU again for the backward pass instead of keeping them: about "
        "two thirds of the memory for a twentieth more time; on a CPU the same numbers",
    )
    network.add_argument(
        "--init_from", metavar="RUN", help="start from the last weights of another run below --model_path (fine-tuning)"
    )
    network.add_argument(
        "--pretrained",
        action=PathsHere,
        help="start from weights published by UA-MT, SASSNet, DTC or DTML (.pth; two files separated by a comma "
        "for a method of two networks)",
    )

    network.add_argument(
        "--sync_bn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="batch norm over the batches of all processes (several GPUs under torchrun); on CPUs each has its own",
    )

    optim = parser.add_argument_group("optimisation")
    optim.add_argument(
        "--max_iterations",
        type=at_least(0),
        default=PAPER_ITERATIONS,
        help="iterations to train; 0 saves the weights that training would start from, e.g. of --pretrained",
    )
    optim.add_argument(
        "--batch_size", type=at_least(1), default=4, help="volumes per batch, of each process of torchrun"
    )
    optim.add_argument(
        "--labeled_bs",
        type=at_least(1),
        help="labeled volumes per batch (default: half; all of it without unlabeled cases)",
    )
    optim.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="optimizer of the segmenters")
    optim.add_argument("--base_lr", type=positive, default=0.01, help="learning rate at the start")
    optim.add_argument("--momentum", type=share, default=0.9, help="momentum of SGD")
    optim.add_argument("--weight_decay", type=at_least(0.0), default=1e-4, help="weight decay")
    optim.add_argument(
        "--lr_schedule", choices=("steps", "cosine", "constant"), default="steps", help="course of the learning rate"
    )
    optim.add_argument(
        "--lr_step",
        type=at_least(1),
        help="iterations between two steps of the rate (default: 2500/6000 of --max_iterations)",
    )
    optim.add_argument("--lr_gamma", type=positive, default=0.1, help="factor of a step of the rate")
    optim.add_argument("--warmup", type=at_least(0), default=0, help="iterations of linear warm-up of the rate")
    optim.add_argument("--seed", type=between(0, MAX_SEED), default=1337, help="seed of weights, batches and dropout")
    optim.add_argument("--deterministic", action="store_true", help="deterministic kernels, at some cost in speed")


def add_consistency_options(parser: ArgumentParser) -> None:
    """The consistency weight that the semi-supervised methods share."""
    group = parser.add_argument_group("consistency")
    group.add_argument("--consistency", type=at_least(0.0), default=0.1, help="final weight of the consistency loss")
    group.add_argument(
        "--consistency_rampup",
        type=at_least(0.0),
        help=f"length of the Gaussian ramp-up in units of {RAMP_UNIT} iterations, as in the public implementations "
        "(default: --rampup_share; the paper's 40 are its 6000 iterations)",
    )
    group.add_argument(
        "--rampup_share",
        type=between(0.0, 1.0),
        default=1.0,
        help="length of the ramp-up as a share of --max_iterations, at most 1",
    )
    group.add_argument(
        "--ramp",
        choices=("smooth", "stairs"),
        default="smooth",
        help="stairs: the public implementations' 40 stairs, or one per unit of --consistency_rampup",
    )


def add_run_options(parser: ArgumentParser) -> None:
    """Where a run is written, and what it does besides training."""
    run = parser.add_argument_group("run")
    run.add_argument("--model_path", action=PathHere, default="model", help="folder of all runs")
    run.add_argument("--exp", help="name of the run (default: from method, preset, labels and seed)")
    run.add_argument(
        "--resume",
        action="store_true",
        help="continue from last.pth with the options of the run; starts fresh where there is none",
    )
    run.add_argument("--overwrite", action="store_true", help="delete an existing run of this name first")
    run.add_argument(
        "--save_every", type=at_least(1), help="iterations between checkpoints (default: 1000/6000 of --max_iterations)"
    )
    run.add_argument(
        "--keep_checkpoints",
        action="store_true",
        help="keep every checkpoint beside last.pth, as iteration_<N>.pth; see --weights of test_LA.py",
    )
    run.add_argument("--log_every", type=at_least(1), default=10, help="iterations between lines of the curves")
    run.add_argument(
        "--report_every",
        type=at_least(0),
        default=100,
        help="iterations between lines of log.txt on losses, pace and Dice, a multiple of --log_every; 0 for none",
    )
    run.add_argument(
        "--log_gradients",
        action="store_true",
        help="also log the norm of each term's gradient; these iterations take a backward pass more for each term",
    )
    run.add_argument(
        "--image_every", type=at_least(0), default=200, help="iterations between TensorBoard images; 0 for none"
    )
    run.add_argument(
        "--val_cases", type=at_least(0), default=0, help="last labeled cases kept out of training to pick best_val.pth"
    )
    run.add_argument("--val_every", type=at_least(1), help="iterations between validations (default: as --save_every)")


def add_device_options(parser: ArgumentParser, engine: bool = False) -> None:
    """Where and how the networks are computed; `engine` adds what only predictions can choose."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: the first GPU, or the CPU with a notice")
    group.add_argument(
        "--gpu", type=at_least(0), help="index of the GPU; not with torchrun, where each process has its own"
    )
    group.add_argument(
        "--amp",
        choices=("off", "bf16", "fp16"),
        default="off",
        help="mixed precision; transform and losses stay float32",
    )
    group.add_argument(
        "--tf32",
        action="store_true",
        help="let a GPU round the inputs of convolutions to TF32 (10 bits); without it float32 means float32",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the networks")
    if engine:
        group.add_argument(
            "--engine",
            choices=("torch", "openvino"),
            default="torch",
            help="what computes the networks; openvino: on a CPU, from requirements-extra.txt, same output to 1e-4",
        )


def add_window_arguments(group, protocol: str | None = None) -> None:
    """The sliding window; of trained runs, with a default of `--protocol`, also that and `--tta`."""
    if protocol:
        group.add_argument(
            "--protocol",
            choices=PROTOCOLS,
            default=protocol,
            help="windows by name. paper: as the run was trained to be tested; fast: steps of a third of a "
            "patch in the plane and of half a patch across; whole: one window around the whole scan",
        )
        group.add_argument(
            "--tta",
            nargs="?",
            choices=("none", "flips", "all"),
            const="flips",
            default="none",
            help="mean over views of each patch: flips (what --tta alone means), as it is, flipped along axis 0, along "
            "axis 1, along both, 4 passes; all, these and the same after a quarter turn in that plane, 8 passes",
        )
    group.add_argument("--stride_xy", type=at_least(1), default=18, help="in-plane stride of the window, in voxels")
    group.add_argument("--stride_z", type=at_least(1), default=4, help="axial stride of the window, in voxels")
    group.add_argument(
        "--blend", choices=("uniform", "gaussian"), default="uniform", help="weight of a window's voxels"
    )
    group.add_argument(
        "--window",
        choices=("patch", "whole"),
        default="patch",
        help="size of a window: --patch_size, or the whole scan in one pass, whose memory grows with the scan",
    )
    group.add_argument("--window_batch", type=at_least(1), default=4, help="windows per forward pass")


def protocol_defaults(protocol: str, patch: Sequence[int]) -> dict[str, Any]:
    """The window flags that --protocol stands for, for a patch (W, H, D); flags win over it, it over the run's own."""
    if protocol == "paper":
        return {}
    if protocol == "whole":
        return {"window": "whole"}
    return {"window": "patch", "stride_xy": min(patch[:2]) // 3, "stride_z": patch[2] // 2, "blend": "uniform"}


def add_inference_options(parser: ArgumentParser, protocol: str | None = None) -> None:
    """The sliding window, with --protocol where it has a default, and what is scored."""
    group = parser.add_argument_group("inference")
    add_window_arguments(group, protocol)
    group.add_argument(
        "--head",
        help="output to report: seg, sdm, mean, teacher, where the method has it (default: its first); all are scored",
    )
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
        help="distances of an empty prediction: undefined and counted as missed, or 0, as in the public implementation",
    )


def add_preset_options(parser: ArgumentParser) -> None:
    """Named groups of defaults."""
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="paper",
        help="named settings: of the paper; cpu, for real scans without a GPU; hippocampus, for small ones, in "
        "minutes; demo, for the phantom, in minutes. Flags that are given win",
    )
    add_compat_option(parser)


def add_compat_option(parser: ArgumentParser) -> None:
    """One switch for the habits of the public implementations."""
    parser.add_argument(
        "--compat",
        choices=("off", *COMPAT),
        default="off",
        help="public: the habits of the public implementations that docs/methods.md names, at once",
    )


def list_paths(options: Namespace) -> tuple[Path, Path]:
    """The training and the test list that --split, --train_list and --test_list pick."""
    prefix = "" if options.split == "official" else f"{options.split}_"
    root = repository_path(options.root_path)
    named = (options.train_list, options.test_list)
    return tuple(
        repository_path(given) if given else root / f"{prefix}{default}"
        for given, default in zip(named, LISTS, strict=True)
    )
