"""Figures for people: one picture per test case, a panel for TensorBoard, training curves.

Scans are drawn as a radiologist expects them. Array axes x, y, z run to the patient's left, posterior and superior,
as in the LA files (liver, spine and aorta show it) and in ITK's LPS convention: patient right is left in the picture,
anterior or head is up, and the sagittal view looks from the left. Only the object-oriented Agg API is used, so
that worker processes and threads can draw at the same time.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from PIL import Image

LABEL_COLOR = "#E69F00"  # this and the next: Okabe & Ito, told apart with every common colour vision
PREDICTION_COLORS = ("#56B4E9", "#CC79A7", "#009E73", "#F0E442")
