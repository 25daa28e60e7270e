"""Flags that several methods share."""

from networks.base import SDM_HEADS
from options.types import at_least, positive, share
from utils.sdm import EMPTY_RULES, SDM_STEEPNESS


def add_teacher_arguments(group, monte_carlo: bool = False) -> None:
    """Flags of every method with a teacher; `monte_carlo` adds the number of its passes."""
    group.add_argument("--ema_decay", type=share, default=0.99, help="momentum of the teacher's weights, in [0, 1)")
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
        choices=EMPTY_RULES,
        default="sign",
        help="target distance map of a crop without foreground: +1 everywhere, or 0 as in the public implementations",
    )
