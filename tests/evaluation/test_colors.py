import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from evaluation.colors import COLORS, look
from evaluation.figures import LABEL_COLOR
from paper.systems import SYSTEMS

# What linear RGB becomes to an eye without one kind of cones (Machado et al., IEEE TVCG 2009, severity 1).
EYES = {
    "normal": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen(colors: list[str], eye: str) -> np.ndarray:
    """CIELAB of colours as an eye sees them, (N, 3)."""
    rgb = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in colors])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    shown = np.clip(linear @ np.transpose(EYES[eye]), 0, 1)
    return rgb2lab(np.where(shown <= 0.0031308, 12.92 * shown, 1.055 * shown ** (1 / 2.4) - 0.055)[None])[0]


@pytest.mark.parametrize("eye", EYES)
def test_every_row_of_the_paper_and_the_label_are_told_apart(eye):
    lab = seen([LABEL_COLOR, *COLORS], eye)
    apart = deltaE_ciede2000(lab[:, None], lab[None]) + 100 * np.eye(len(lab))
    assert len(COLORS) >= len(SYSTEMS) and apart.min() > 11


def test_colours_are_seen_on_paper_and_are_no_gray_of_a_scan():
    lightness, a, b = seen(list(COLORS), "normal").T
    assert lightness.min() > 35 and lightness.max() < 82 and np.hypot(a, b).min() > 35


def test_looks_never_repeat_in_a_report_of_any_size_in_use():
    looks = [tuple(look(index).values()) for index in range(3 * len(COLORS) // 2)]
    assert len(set(looks)) == len(looks)
