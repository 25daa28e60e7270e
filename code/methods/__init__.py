"""The methods by name: adding one takes a file beside these and a line here."""

from methods.asdnet import ASDNet
from methods.base import Method
from methods.double_uncertainty import DoubleUncertainty
from methods.dtc import DTC
from methods.dtml_plus import DTMLPlus
from methods.dtml_variants import DTMLVariants
from methods.sassnet import SASSNet
from methods.supervised import Supervised
from methods.tcse import TCSE
from methods.ua_mt import UAMT

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "asdnet": ASDNet,
    "tcse": TCSE,
    "ua_mt": UAMT,
    "sassnet": SASSNet,
    "dtc": DTC,
    "double_uncertainty": DoubleUncertainty,
    "dtml": DTMLVariants,
    "dtml_plus": DTMLPlus,
}
