"""The rows of the paper's tables: which method, with which flags, and which printed figures."""

from argparse import Namespace
from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One row. `flags` are those by which it differs from the method's defaults."""

    key: str
    name: str  # as the paper's tables call it
    method: str
    flags: tuple[str, ...] = ()
    variant: str | None = None  # of paper/printed.py
    all_labeled: bool = False
    unlabeled: bool = True
    equal_time: tuple[str, str] | None = None  # trains for the seconds of the first row at the second one's step time

    def title(self, options: Namespace) -> str:
        """The name with the numbers of labeled and unlabeled scans of a training."""
        return f"{self.name} {options.labelnum}/{options.unlabelnum}"


_ROWS = (  # in the order in which they are worth having: the baselines and DTML first
    System("v_net", "V-Net", "supervised", unlabeled=False),
    System("m_d", "M_d only", "dtml", ("--branch", "sdm", "--unlabelnum", "0"), "sdm_only", unlabeled=False),
    System("dtml", "DTML", "dtml"),
    System(
        "v_net_equal_time",
        "V-Net, DTML's seconds",
        "supervised",
        (),
        "equal_time",
        unlabeled=False,
        equal_time=("dtml", "v_net"),
    ),
    System("dtml_labeled", "DTML", "dtml", ("--unlabelnum", "0"), unlabeled=False),
    System("ua_mt", "UA-MT", "ua_mt"),
    System("dtc", "DTC", "dtc"),
    System("sassnet", "SASSNet", "sassnet"),
    System("asdnet", "ASDNet", "asdnet"),
    System("tcse", "TCSE", "tcse"),
    System("double_uncertainty", "Double-Uncertainty", "double_uncertainty"),
    System("dtml_dis", "DTML, L_dis", "dtml", ("--sdm_supervision", "sdm"), "dis"),
    System("dtml_both", "DTML, L_dis + L_mask", "dtml", ("--sdm_supervision", "both"), "dis+mask"),
    System("v_net_all", "V-Net", "supervised", all_labeled=True, unlabeled=False),
)
SYSTEMS = {system.key: system for system in _ROWS}
BASELINES = ("v_net", "m_d")  # labels only, with either head
_RIVALS = ("asdnet", "tcse", "ua_mt", "dtc", "sassnet", "double_uncertainty")
TABLES = {  # rows in the paper's order; "M_d only" stands in all of them, in the paper only in Table 2
    "table1": ("m_d", "dtml_dis", "dtml", "dtml_both"),
    "table2": (*BASELINES, "dtml_labeled"),
    "table3": ("v_net_all", *BASELINES, "v_net_equal_time", *_RIVALS, "dtml"),
}
TITLES = {
    "table1": "DTML by the supervision of M_d: L_dis, L_mask (the row DTML), or both",
    "table2": "DTML without unlabeled scans; the paper's row of M_s repeats its V-Net figure for figure",
    "table3": "Semi-supervised methods",
}
PAIRS = {  # (first, second): the statistics beside a table are of second - first
    "table1": (("dtml_dis", "dtml"), ("dtml_both", "dtml")),
    "table2": tuple((key, "dtml_labeled") for key in BASELINES),
    "table3": tuple((key, other) for key in BASELINES for other in (*_RIVALS, "dtml"))
    + (("v_net_equal_time", "dtml"),),
}
PAIRED_METRICS = {  # in Table 2 as in the paper; in Table 3 the one that it ranks by, or there would be 56 lines
    "table1": ("dice", "jaccard", "asd_vox", "hd95_vox"),
    "table2": ("dice", "jaccard", "asd_vox", "hd95_vox"),
    "table3": ("dice",),
}
FIGURE = ("v_net", "dtml")
