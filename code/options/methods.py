"""The flags of each method, and the shared flags whose defaults it changes: all that a command line knows of it.

They stand here and not in the method's file so that --help and typing errors do not wait for PyTorch. A method inherits
its class; one that is not listed in FLAGS may declare the same entries itself.
"""

from argparse import ArgumentParser
from typing import Any, ClassVar

from options.types import at_least, between, positive, share
from utils.constants import CRITIC_LR, SDM_EMPTY_RULES, SDM_HEADS, SDM_STEEPNESS

TCSE_KINDS = ("zoom", "turns", "flips")  # of transformation; the fields of methods.tcse.Transformation


class MethodFlags:
    """What a method may declare; `Method` and every class below inherit it."""

    uses_unlabeled: ClassVar[bool] = True
    weighs_consistency: ClassVar[bool] = False  # has the flags of the consistency weight
    defaults: ClassVar[dict[str, Any]] = {}  # shared flags whose default differs for this method
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # this method's own flags under a --preset

    @staticmethod
    def add_arguments(group) -> None:
        """Declare the method's own flags; shared flags live in options/flags.py."""


class ConsistencyFlags(MethodFlags):
    """A method with the consistency weight that most share."""

    weighs_consistency = True


def add_ema_decay_argument(group) -> None:
    """The flag of methods with a moving average."""
    group.add_argument("--ema_decay", type=share, default=0.99, help="momentum of the teacher's weights, in [0, 1)")


def add_teacher_arguments(group, monte_carlo: bool = False) -> None:
    """Flags of every method with a teacher; `monte_carlo` adds the number of its passes."""
    add_ema_decay_argument(group)
    group.add_argument(
        "--noise_sd",
        type=at_least(0.0),
        default=0.1,
        help="standard deviation of the noise on the teacher's image (a whole scan has 1)",
    )
    group.add_argument("--noise_clip", type=at_least(0.0), default=0.2, help="largest absolute value of that noise")
    group.add_argument(
        "--cons_on",
        choices=("unlabeled", "all"),
        default="all",
        help="crops of a batch on which student and teacher are to agree",
    )
    if monte_carlo:
        group.add_argument(
            "--mc_passes",
            type=at_least(1),
            default=8,
            help="stochastic passes of the teacher that measure its uncertainty",
        )


def add_sdm_k_argument(group) -> None:
    """The flag of methods that transform a distance map into a mask."""
    group.add_argument(
        "--sdm_k", type=positive, default=SDM_STEEPNESS, help="steepness k of the transform sigmoid(-k z) (DTML, Eq. 2)"
    )


def add_sdm_head_argument(group) -> None:
    """The flag of methods whose network predicts a distance map."""
    group.add_argument(
        "--sdm_head",
        choices=SDM_HEADS,
        default="conv",
        help="layers that predict the map, before the tanh: one 1x1x1 convolution as in the public implementations, or "
        "a block of 3x3x3 convolution, norm and ReLU before it, as the papers have it",
    )


def add_sdm_empty_argument(group) -> None:
    """The flag of methods that regress a distance map."""
    group.add_argument(
        "--sdm_empty",
        choices=SDM_EMPTY_RULES,
        default="sign",
        help="target distance map of a crop without foreground: +1 everywhere, or 0 as in the public implementations",
    )


class SupervisedFlags(MethodFlags):
    uses_unlabeled = False


class ASDNetFlags(ConsistencyFlags):
    defaults = {"consistency": 0.3}

    @staticmethod
    def add_arguments(group) -> None:
        group.add_argument(
            "--sup_loss",
            choices=("ce_dice", "att_dice"),
            default="ce_dice",
            help="supervised loss: that of the other methods, or the paper's Dice with sample attention",
        )
        group.add_argument(
            "--att_beta", type=at_least(0.0), default=2.0, help="exponent of the sample attention (att_dice)"
        )
        group.add_argument("--adv_weight", type=at_least(0.0), default=0.03, help="weight of the adversarial loss")
        group.add_argument(
            "--semi_loss",
            choices=("dice", "nll"),
            default="dice",
            help="loss on confident voxels of unlabeled cases: the paper's Dice, or the log likelihood of the public "
            "implementation",
        )
        group.add_argument(
            "--gamma", type=between(0.0, 1.0), default=0.5, help="confidence above which a voxel is trusted"
        )
        group.add_argument(
            "--semi_start",
            type=at_least(0),
            default=None,
            help="iteration at which the loss on unlabeled cases, weighted by --consistency, sets in and its ramp "
            "begins (default: 25 %% of the training run)",
        )
        group.add_argument("--critic_lr", type=positive, default=CRITIC_LR, help="constant Adam rate of the critic")


class TCSEFlags(ConsistencyFlags):
    @staticmethod
    def add_arguments(group) -> None:
        add_teacher_arguments(group)
        group.add_argument(
            "--pi",
            nargs="*",
            choices=TCSE_KINDS,
            default=list(TCSE_KINDS),
            help="kinds of transformation; none: noise only",
        )
        group.add_argument("--pi_zoom", type=share, default=0.1, help="zoom by a factor in [1 - z, 1 + z], in-plane")


class UAMTFlags(ConsistencyFlags):
    defaults = {"cons_on": "unlabeled"}

    @staticmethod
    def add_arguments(group) -> None:
        add_teacher_arguments(group, monte_carlo=True)
        group.add_argument(
            "--uamt_norm",
            choices=("code", "paper"),
            default="code",
            help="consistency per certain voxel: mean over all classes (public implementation), or sum (paper)",
        )


class DualHeadFlags(ConsistencyFlags):
    @staticmethod
    def add_arguments(group) -> None:
        group.add_argument(
            "--sdm_weight",
            type=at_least(0.0),
            default=0.3,
            help="weight of the SDM regression (--beta of the public implementations)",
        )
        add_sdm_empty_argument(group)
        add_sdm_head_argument(group)


class SASSNetFlags(DualHeadFlags):
    defaults = {"consistency": 0.01}
    presets = {"hippocampus": {"sdm_weight": 1.0}}  # docs/results/hippocampus/preset.md

    @staticmethod
    def add_arguments(group) -> None:
        DualHeadFlags.add_arguments(group)
        # One weight with the shared ramp, which has a name of its own in this method's paper.
        group.add_argument(
            "--adv_weight",
            dest="consistency",
            type=at_least(0.0),
            metavar="WEIGHT",
            help="final weight of the adversarial loss, the same as --consistency: 0.01 is the public implementation's "
            "for 16 labels (0.015 for 8, and 0.001 in the paper) (default: 0.01)",
        )
        group.add_argument("--critic_lr", type=positive, default=CRITIC_LR, help="constant Adam rate of the critic")


class DTCFlags(DualHeadFlags):
    defaults = {"consistency": 1.0}
    presets = {"hippocampus": {"sdm_k": 100.0, "sdm_weight": 1.0}}  # docs/results/hippocampus/preset.md

    @staticmethod
    def add_arguments(group) -> None:
        DualHeadFlags.add_arguments(group)
        add_sdm_k_argument(group)


class DoubleUncertaintyFlags(ConsistencyFlags):
    @staticmethod
    def add_arguments(group) -> None:
        add_teacher_arguments(group, monte_carlo=True)
        group.add_argument(
            "--unc_weight", type=at_least(0.0), default=1.0, help="weight b of the student's own uncertainty"
        )


class DTMLFlags(ConsistencyFlags):
    defaults = {"consistency": 1.0}
    presets = {
        "cpu": {"sdm_k": 100.0, "sdm_k_start": 10.0, "mask_loss": "dice+ce"},  # docs/results/cpu_preset.md
        "hippocampus": {"sdm_k": 100.0, "sdm_k_start": 10.0, "mask_loss": "dice+ce"},
        # docs/results/phantom.md
        "demo": {"sdm_k": 100.0, "sdm_k_start": 10.0, "mask_loss": "dice+ce", "labeled_bs": 3, "rampup_share": 0.375},
    }

    @staticmethod
    def add_arguments(group) -> None:
        group.add_argument(
            "--mask_loss",
            choices=("dice", "dice+ce"),
            default="dice",
            help="form of L_mask: Dice (public implementation), or 0.5 (cross entropy + Dice) on the logits -k z",
        )
        add_sdm_k_argument(group)
        group.add_argument(
            "--sdm_k_start",
            type=at_least(0.0),
            default=0.0,
            help="steepness at the first iteration, growing geometrically to --sdm_k at the last one; 0 is --sdm_k "
            "throughout, as in the paper. A low start gives every voxel a gradient while M_d is still far off",
        )
        group.add_argument(
            "--con_scale",
            type=at_least(0.0),
            default=1.0,
            help="factor on L_con; 2 restores the public implementation, which back-propagates it twice",
        )
        add_sdm_head_argument(group)


class DTMLVariantsFlags(DTMLFlags):
    @staticmethod
    def add_arguments(group) -> None:
        group.add_argument(
            "--branch",
            choices=("both", "seg", "sdm"),
            default="both",
            help="networks to train: both (DTML), M_s only, or M_d only (Table 2; without L_con)",
        )
        group.add_argument(
            "--sdm_supervision",
            choices=("mask", "sdm", "both"),
            default="mask",
            help="supervision of M_d: L_mask on the soft mask, L_dis on the distance map, or both (Table 1)",
        )
        DTMLFlags.add_arguments(group)
        add_sdm_empty_argument(group)


class DTMLPlusFlags(DTMLFlags):
    # As many labeled crops as the V-Net sees; from k = 10 on M_d can diverge: docs/results/hippocampus/dtml_plus.md.
    defaults = {"consistency": 1.0, "batch_size": 6, "labeled_bs": 4}
    defaults |= {"mask_loss": "dice+ce", "sdm_k": 100.0, "sdm_k_start": 1.0}
    presets = {"hippocampus": {"labeled_bs": 4}, "demo": {"rampup_share": 0.375}}

    @staticmethod
    def add_arguments(group) -> None:
        DTMLFlags.add_arguments(group)
        group.add_argument(
            "--pseudo_weight",
            type=at_least(0.0),
            default=1.0,
            help="factor on the losses of pseudo-labels, which --consistency and its ramp weigh, too",
        )
        group.add_argument(
            "--view_strength",
            type=at_least(0.0),
            default=1.0,
            help="strength of the changes of intensity under which unlabeled crops are learned; 0 for none",
        )
        group.add_argument(
            "--paste",
            action="store_true",
            help="put a box of a labeled crop into each unlabeled one, or the reverse, with the labels there",
        )
        add_ema_decay_argument(group)


FLAGS: dict[str, type[MethodFlags]] = {
    "supervised": SupervisedFlags,
    "asdnet": ASDNetFlags,
    "tcse": TCSEFlags,
    "ua_mt": UAMTFlags,
    "sassnet": SASSNetFlags,
    "dtc": DTCFlags,
    "double_uncertainty": DoubleUncertaintyFlags,
    "dtml": DTMLVariantsFlags,
    "dtml_plus": DTMLPlusFlags,
}


def flags_of_method(method: type[MethodFlags]) -> list[str]:
    """The flags that a method declares itself."""
    parser = ArgumentParser(add_help=False)
    method.add_arguments(parser)
    return [name for action in parser._actions for name in action.option_strings]


def methods_with(flag: str) -> list[str]:
    """The methods that declare a flag."""
    return [key for key, method in FLAGS.items() if flag in flags_of_method(method)]
