"""Methods and engines at the smallest size."""

from collections.abc import Callable

import pytest
import torch

from dataloaders.split import Split
from engine import Engine
from methods import METHODS
from methods.base import Method

NO_CASES = Split([], [], [])  # batches come from the tests


@pytest.fixture
def build(tiny_options) -> Callable[..., Method]:
    """A seeded method in training mode: build("dtc", "--sdm_k", "20")."""

    def make(name: str, *flags: str) -> Method:
        torch.manual_seed(0)
        return METHODS[name](tiny_options(name, *flags)).train()

    return make


@pytest.fixture
def build_engine(tiny_options, tmp_path) -> Callable[..., Engine]:
    """An engine before iteration 150 of 200, where ramps are high and delayed terms have set in."""

    def make(name: str, *flags: str, seed: int = 0, device: str = "cpu") -> Engine:
        torch.manual_seed(seed)
        options = tiny_options(name, *flags)
        engine = Engine(options, METHODS[name](options), NO_CASES, tmp_path, torch.device(device, 0))
        engine.iteration = 150
        engine.method.train()
        return engine

    return make
