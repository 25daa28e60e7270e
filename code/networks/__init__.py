"""The networks by name (--network): adding one takes a file beside these and a line here."""

from networks.base import Network
from networks.residual_unet import ResidualUNet
from networks.vnet import VNet

NETWORKS: dict[str, type[Network]] = {"vnet": VNet, "residual_unet": ResidualUNet}
