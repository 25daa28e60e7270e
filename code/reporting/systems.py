"""The rows of the paper's tables: which method, with which flags, and which printed figures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One row. `flags` are those by which it differs from the method's defaults."""

    key: str
    name: str  # as the paper's tables call it
    method: str
    flags: tuple[str, ...] = ()
    variant: str | None = None  # of reporting/printed.py
    all_labeled: bool = False
    unlabeled: bool = True


_ROWS = (  # in the order in which they are worth having: the baselines and DTML first
    System("v_net", "V-Net", "supervised", unlabeled=False),
    System("m_d", "M_d only", "dtml", ("--branch", "sdm", "--unlabelnum", "0"), "sdm_only", unlabeled=False),
    System("dtml", "DTML", "dtml"),
    System("dtml_labeled", "DTML", "dtml", ("--unlabelnum", "0"), unlabeled=False),
    System("ua_mt", "UA-MT", "ua_mt"),
    System("dtc", "DTC", "dtc"),
    System("sassnet", "SASSNet", "sassnet"),
    System("asdnet", "ASDNet", "asdnet"),
    System("tcse", "TCSE", "tcse"),
    System("double_uncertainty", "Double-Uncertainty", "double_uncertainty"),
    System("dtml_dis", "DTML, L_dis", "dtml", ("--sdm_supervision", "sdm"), "dis"),
    System("dtml_both", "DTML, L_dis + L_mask", "dtml", ("--sdm_supervision", "both"), "dis+mask"),
    System("v_net_all", "V-Net, all labels", "supervised", all_labeled=True, unlabeled=False),
)
SYSTEMS = {system.key: system for system in _ROWS}
TABLES = {
    "table1": ("dtml_dis", "dtml", "dtml_both"),
    "table2": ("v_net", "m_d", "dtml_labeled"),  # the paper's M_s row is its V-Net row, digit for digit
    "table3": (
        "v_net_all",
        "v_net",
        "m_d",
        "asdnet",
        "tcse",
        "ua_mt",
        "dtc",
        "sassnet",
        "double_uncertainty",
        "dtml",
    ),
}
FIGURE = ("v_net", "dtml")
