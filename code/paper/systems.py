"""The rows of the paper's tables: which method, with which flags, and what was printed for it.

The printed metrics are for the official left-atrium split (80 training, 20 test scans): what was published, not what
this code measured. They stand beside a measured row only where list, preset and number of labels are the same. Compare
with care: every row of DTML's Table 3 but DTML's own repeats metrics published earlier, so the table is a collection
and not one protocol (SASSNet's row keeps the largest component, UA-MT's does not), and DTC's author reports +-0.8 Dice
between seeds and machines.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import NamedTuple


class PrintedRow(NamedTuple):
    """One printed row: means over the 20 test cases, no spread was printed. The unit ends a name."""

    method: str  # key in METHODS
    variant: str | None  # None is the row that the method is known by
    name: str  # as a table shows it
    labeled: int  # training scans
    unlabeled: int
    dice_percent: float
    jaccard_percent: float
    asd_vox: float  # voxels of 0.625 mm
    hd95_vox: float
    note: str  # source, then what a reader must know

    def metrics(self) -> tuple[float, ...]:
        """In the order of the tables' columns."""
        return self[5:9]


# "DTML": Zhang & Zhang, "Dual-Task Mutual Learning for Semi-Supervised Medical Image Segmentation", PRCV 2021.
# Its Table 3 takes over rows of UA-MT (MICCAI 2019), which prints V-Net as "Bayesian V-Net" and implemented ASDNet and
# TCSE anew (well known from there, not compared with it word for word), SASSNet (MICCAI 2020), DTC (AAAI 2021; UG-MCL,
# too, prints its Jaccard as 80.89) and Double-Uncertainty (Wang et al., MICCAI 2020). Table 2 does not state the
# supervision of M_d; L_mask is a reading. Its row of M_s equals that of V-Net digit for digit: evidently taken over.
# fmt: off
PRINTED_ROWS = (
    PrintedRow("supervised", None, "V-Net", 80, 0, 91.14, 83.82, 1.52, 5.75, "DTML Table 3; upper bound"),
    PrintedRow("supervised", None, "V-Net", 16, 0, 86.03, 76.06, 3.51, 14.26, "DTML Table 3; with dropout"),
    PrintedRow("asdnet", None, "ASDNet", 16, 64, 87.90, 78.85, 2.08, 9.24,
               "DTML Table 3; re-implemented by UA-MT's authors"),
    PrintedRow("tcse", None, "TCSE", 16, 64, 88.15, 79.20, 2.44, 9.57,
               "DTML Table 3; re-implemented by UA-MT's authors"),
    PrintedRow("ua_mt", None, "UA-MT", 16, 64, 88.88, 80.21, 2.26, 7.32, "DTML Table 3; no component filter"),
    PrintedRow("dtc", None, "DTC", 16, 64, 89.42, 80.89, 2.10, 7.32,
               "DTML Table 3; DTC's own paper prints Jaccard 80.98"),
    PrintedRow("sassnet", None, "SASSNet", 16, 64, 89.54, 81.24, 2.20, 8.24, "DTML Table 3; largest component kept"),
    PrintedRow("double_uncertainty", None, "Double-Uncertainty", 16, 64, 89.65, 81.35, 2.03, 7.04, "DTML Table 3"),
    PrintedRow("double_uncertainty", None, "Double-Uncertainty", 8, 72, 85.91, 75.75, 3.31, 12.67, "its own paper"),
    PrintedRow("dtml", None, "DTML", 16, 64, 90.12, 82.14, 1.82, 7.01, "DTML Table 3; M_d by L_mask"),
    PrintedRow("dtml", "dis", "DTML, L_dis", 16, 64, 89.72, 81.55, 1.97, 7.64, "DTML Table 1"),
    PrintedRow("dtml", "dis+mask", "DTML, L_dis + L_mask", 16, 64, 89.89, 81.82, 1.93, 6.61, "DTML Table 1"),
    PrintedRow("dtml", "seg_only", "M_s only", 16, 0, 86.03, 76.06, 3.51, 14.26, "DTML Table 2; equals the V-Net row"),
    PrintedRow("dtml", "sdm_only", "M_d only", 16, 0, 88.69, 79.91, 3.12, 11.62, "DTML Table 2"),
    PrintedRow("dtml", None, "DTML", 16, 0, 89.17, 80.68, 2.13, 7.82, "DTML Table 2; no unlabeled scans"),
)
# fmt: on


def printed_row(method: str, labeled: int, unlabeled: int, variant: str | None = None) -> PrintedRow | None:
    """The printed row of a method at these numbers of training scans; None where nothing was printed.

    Args: variant, None for the row that the method is known by. DTML: `dis`, `dis+mask` (supervision of M_d),
        `seg_only`, `sdm_only` (one network).
    """
    asked = (method, labeled, unlabeled, variant)
    return next((row for row in PRINTED_ROWS if (row.method, row.labeled, row.unlabeled, row.variant) == asked), None)


MIXED, LABELED_ONLY, UPPER_BOUND = (16, 64), (16, 0), (80, 0)  # labeled and unlabeled scans of the paper's rows


@dataclass(frozen=True)
class System:
    """One row. `flags` are those by which it differs from the method's defaults."""

    key: str
    name: str  # as the paper's tables call it
    method: str
    flags: tuple[str, ...] = ()
    variant: str | None = None  # of a PrintedRow
    scans: tuple[int, int] = MIXED  # in the paper
    equal_time: tuple[str, str] | None = None  # trains for the seconds of the first row at the second one's step time

    @property
    def printed(self) -> PrintedRow | None:
        """What the paper prints for it; None for a row of ours."""
        return printed_row(self.method, *self.scans, self.variant)

    def title(self, options: Namespace) -> str:
        """The name with the numbers of labeled and unlabeled scans of a training run."""
        return f"{self.name} {options.labelnum}/{options.unlabelnum}"


_EQUAL_TIME = {"variant": "equal_time", "scans": LABELED_ONLY, "equal_time": ("dtml", "v_net")}
_SYSTEMS = (  # in the order in which they are worth having: the baselines and DTML first
    System("v_net", "V-Net", "supervised", scans=LABELED_ONLY),
    System("m_d", "M_d only", "dtml", ("--branch", "sdm", "--unlabelnum", "0"), "sdm_only", LABELED_ONLY),
    System("dtml", "DTML", "dtml"),
    System("v_net_equal_time", "V-Net, DTML's seconds", "supervised", **_EQUAL_TIME),
    System("dtml_labeled", "DTML", "dtml", ("--unlabelnum", "0"), scans=LABELED_ONLY),
    System("ua_mt", "UA-MT", "ua_mt"),
    System("dtc", "DTC", "dtc"),
    System("sassnet", "SASSNet", "sassnet"),
    System("asdnet", "ASDNet", "asdnet"),
    System("tcse", "TCSE", "tcse"),
    System("double_uncertainty", "Double-Uncertainty", "double_uncertainty"),
    System("dtml_dis", "DTML, L_dis", "dtml", ("--sdm_supervision", "sdm"), "dis"),
    System("dtml_both", "DTML, L_dis + L_mask", "dtml", ("--sdm_supervision", "both"), "dis+mask"),
    System("v_net_all", "V-Net", "supervised", scans=UPPER_BOUND),
)
SYSTEMS = {system.key: system for system in _SYSTEMS}
BASELINES = ("v_net", "m_d")  # labels only, with either head
_RIVALS = ("asdnet", "tcse", "ua_mt", "dtc", "sassnet", "double_uncertainty")
TABLES = {  # rows in the paper's order; "M_d only" stands in all of them, in the paper only in Table 2
    "table1": ("m_d", "dtml_dis", "dtml", "dtml_both"),
    "table2": (*BASELINES, "dtml_labeled"),
    "table3": ("v_net_all", *BASELINES, "v_net_equal_time", *_RIVALS, "dtml"),
}
TITLES = {
    "table1": "DTML by the supervision of M_d: L_dis, L_mask (the row DTML), or both",
    "table2": "DTML without unlabeled scans; the paper's row of M_s repeats its V-Net digit for digit",
    "table3": "Semi-supervised methods",
}
PAIRS = {  # (first, second): the statistics beside a table are of second - first
    "table1": (("dtml_dis", "dtml"), ("dtml_both", "dtml")),
    "table2": tuple((key, "dtml_labeled") for key in BASELINES),
    "table3": (*((key, other) for key in BASELINES for other in (*_RIVALS, "dtml")), ("v_net_equal_time", "dtml")),
}
_ALL_METRICS = ("dice", "jaccard", "asd_vox", "hd95_vox")
# In Table 2 as in the paper; in Table 3 the one that it ranks by, or there would be 56 lines.
PAIRED_METRICS = {"table1": _ALL_METRICS, "table2": _ALL_METRICS, "table3": ("dice",)}
FIGURE = ("v_net", "dtml")
