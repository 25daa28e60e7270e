"""Metrics that the papers print for the official left-atrium split (80 training, 20 test scans).

They are what was published, not what this code measured, and stand beside a measured row only where list,
preset and number of labels are the same. Compare with care: every row of DTML's Table 3 but DTML's own repeats a
figure published earlier, so the table is a collection and not one protocol (SASSNet's row keeps the largest
component, UA-MT's does not), and DTC's author reports +-0.8 Dice between seeds and machines.
"""

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


# The comment above a row is the source of its values. "DTML": Zhang & Zhang, "Dual-Task Mutual Learning for
# Semi-Supervised Medical Image Segmentation", PRCV 2021. "Not re-checked": well known from that paper,
# but not compared with it word for word.
# fmt: off
ROWS = (
    # DTML Table 3: upper bound, every training scan labeled.
    PrintedRow("supervised", None, "V-Net", 80, 0, 91.14, 83.82, 1.52, 5.75, "DTML Table 3; upper bound"),
    # DTML Table 3; UA-MT (MICCAI 2019) prints the same row as "Bayesian V-Net" (not re-checked).
    PrintedRow("supervised", None, "V-Net", 16, 0, 86.03, 76.06, 3.51, 14.26, "DTML Table 3; with dropout"),
    # DTML Table 3; a re-implementation by the authors of UA-MT, not of ASDNet (not re-checked).
    PrintedRow("asdnet", None, "ASDNet", 16, 64, 87.90, 78.85, 2.08, 9.24,
               "DTML Table 3; re-implemented by UA-MT's authors"),
    # DTML Table 3; a re-implementation by the authors of UA-MT, not of TCSE (not re-checked).
    PrintedRow("tcse", None, "TCSE", 16, 64, 88.15, 79.20, 2.44, 9.57,
               "DTML Table 3; re-implemented by UA-MT's authors"),
    # DTML Table 3, from UA-MT (MICCAI 2019).
    PrintedRow("ua_mt", None, "UA-MT", 16, 64, 88.88, 80.21, 2.26, 7.32, "DTML Table 3; no component filter"),
    # DTML Table 3. DTC's own paper (AAAI 2021) differs in one figure: Jaccard 80.98. UG-MCL repeats 80.89.
    PrintedRow("dtc", None, "DTC", 16, 64, 89.42, 80.89, 2.10, 7.32,
               "DTML Table 3; DTC's own paper prints Jaccard 80.98"),
    # DTML Table 3, from SASSNet (MICCAI 2020).
    PrintedRow("sassnet", None, "SASSNet", 16, 64, 89.54, 81.24, 2.20, 8.24,
               "DTML Table 3; largest component kept"),
    # DTML Table 3, from Wang et al. (MICCAI 2020).
    PrintedRow("double_uncertainty", None, "Double-Uncertainty", 16, 64, 89.65, 81.35, 2.03, 7.04,
               "DTML Table 3"),
    # Wang et al. (MICCAI 2020), 8 labels.
    PrintedRow("double_uncertainty", None, "Double-Uncertainty", 8, 72, 85.91, 75.75, 3.31, 12.67,
               "its own paper"),
    # DTML Table 3, and Table 1's row with M_d supervised by L_mask.
    PrintedRow("dtml", None, "DTML", 16, 64, 90.12, 82.14, 1.82, 7.01, "DTML Table 3; M_d by L_mask"),
    # DTML Table 1: M_d supervised on its distance map alone.
    PrintedRow("dtml", "dis", "DTML, L_dis", 16, 64, 89.72, 81.55, 1.97, 7.64, "DTML Table 1"),
    # DTML Table 1: M_d supervised on both.
    PrintedRow("dtml", "dis+mask", "DTML, L_dis + L_mask", 16, 64, 89.89, 81.82, 1.93, 6.61, "DTML Table 1"),
    # DTML Table 2, digit for digit the V-Net row of Table 3: evidently taken over, not run again.
    PrintedRow("dtml", "seg_only", "M_s only", 16, 0, 86.03, 76.06, 3.51, 14.26,
               "DTML Table 2; equals the V-Net row"),
    # DTML Table 2; the supervision of M_d is not stated there, L_mask is a reading.
    PrintedRow("dtml", "sdm_only", "M_d only", 16, 0, 88.69, 79.91, 3.12, 11.62, "DTML Table 2"),
    # DTML Table 2: both networks and L_con on the labeled scans.
    PrintedRow("dtml", None, "DTML", 16, 0, 89.17, 80.68, 2.13, 7.82, "DTML Table 2; no unlabeled scans"),
)
# fmt: on


def printed_row(method: str, labeled: int, unlabeled: int, variant: str | None = None) -> PrintedRow | None:
    """The printed row of a method at these numbers of training scans; None where nothing was printed.

    Args:
        method: key in METHODS.
        variant: None for the row that the method is known by. DTML: `dis`, `dis+mask` (supervision of M_d),
            `seg_only`, `sdm_only` (one network).
    """
    wanted = (method, labeled, unlabeled, variant)
    return next((row for row in ROWS if (row.method, row.labeled, row.unlabeled, row.variant) == wanted), None)
