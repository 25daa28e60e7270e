"""The methods by name: adding one takes a file beside these and a line here."""

from methods.base import Method
from methods.dtml import DTML
from methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {"supervised": Supervised, "dtml": DTML}
