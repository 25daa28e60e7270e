"""Which patch fits: sizes by arithmetic, and when a training run says so."""

from pathlib import Path

import pytest

from dataloaders.patch import cpu_preset, fitting_patch, require_fit, training_command, uneven_notice
from utils.errors import InputError


@pytest.mark.parametrize(
    "shapes, patch",
    [
        ([(40, 41, 30), (36, 52, 30), (40, 41, 30)], [48, 48, 32]),
        ([(10, 300, 300)], [32, 112, 80]),
        ([(32, 64, 65)], [32, 64, 80]),
    ],
)
def test_a_patch_holds_the_median_volume(shapes, patch):
    assert fitting_patch(shapes) == patch
    require_fit(patch, [(200, 200, 200)])


@pytest.mark.parametrize("side, fits", [(16, True), (15, False)])
def test_crops_of_mostly_padding(side, fits):
    if fits:
        return require_fit((32, 48, 64), [(32, 48, 2 * side)])
    with pytest.raises(InputError, match="--patch_size 32 48 32"):
        require_fit((32, 48, 64), [(32, 48, 2 * side)])


def test_few_slices_do_not_forbid_the_smallest_patch():
    require_fit((112, 112, 32), [(300, 300, 9)])


def test_the_price_of_an_uneven_patch():
    assert uneven_notice((112, 112, 80)) == []
    (notice,) = uneven_notice((100, 112, 80))
    assert "112 x 112 x 80" in notice and "12%" in notice


@pytest.mark.parametrize(
    "shape, preset, patch", [((40, 52, 36), "hippocampus", "48 64 48"), ((150, 130, 88), "cpu", "80 80 48")]
)
def test_the_command_for_a_cpu_fits_at_its_scale(shape, preset, patch):
    assert cpu_preset([shape]) == preset
    command = training_command(Path("data/mine"), [shape], 4, True, preset)
    assert f"--preset {preset} " in command and command.endswith(f"--patch_size {patch}")
