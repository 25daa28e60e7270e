"""--engine openvino: the numbers of PyTorch, for every method, batch and size; what it refuses."""

import sys
from argparse import Namespace

import pytest
import torch

from inference import engines
from inference.engines import OpenVINOMethod, on_engine
from inference.windows import predict_volume
from methods import METHODS
from methods.base import Method
from utils.errors import EXTRAS, InputError

TOLERANCE = 1e-4
CPU = torch.device("cpu")


@pytest.fixture
def build(tiny_options):
    """An untrained method whose batch norms have statistics of their own; a soft transform magnifies no rounding."""

    def make(name: str, *flags: str) -> Method:
        torch.manual_seed(0)
        soft = ("--sdm_k", "10") if name in ("dtml", "dtc") else ()
        method = METHODS[name](tiny_options(name, "--n_filters", "2", *soft, *flags))
        for _ in range(3):
            method.predict(torch.randn(2, 1, 32, 32, 32))
        return method.eval()

    return make


def require_equal(method: Method, image: torch.Tensor, outputs: tuple[str, ...] | None = None) -> None:
    pytest.importorskip("openvino")
    engine = OpenVINOMethod(method, "off")
    with torch.no_grad():
        sides = [(engine.predict(image, outputs), method.predict(image, outputs))]
        if maps := method.signed_maps(image):
            sides.append((engine.signed_maps(image), maps))
        sides.append((engine.predict(image[:1], outputs), method.predict(image[:1], outputs)))  # what is left of a scan
    for own, expected in sides:
        assert own.keys() == expected.keys()
        assert all(expected[name].std() > 1e-3 for name in expected)
        assert all((own[name] - expected[name]).abs().max() < TOLERANCE for name in expected)


def test_all_outputs_of_any_batch(build):
    require_equal(build("supervised"), torch.randn(3, 1, 32, 48, 32))


KINDS = [(name, ()) for name in METHODS] + [
    ("supervised", ("--network", "residual_unet")),
    ("supervised", ("--norm", "group")),
    ("dtml", ("--num_classes", "2")),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", KINDS)
def test_every_method_network_and_norm(build, name, flags):
    method = build(name, *flags)
    require_equal(method, torch.randn(2, 1, 32, 40, 33), method.outputs[:1])  # padded within the network


@pytest.mark.slow
def test_models_of_many_sizes_are_let_go(build, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(engines, "MOST_MODELS", 2)
    engine, held = OpenVINOMethod(build("supervised"), "off"), []
    for length in (32, 48, 32, 64):
        assert engine.predict(torch.randn(1, 1, length, 32, 32))["seg"].shape[2] == length
        held.append((len(engine._models), len(engine._compiled)))
    assert held == [(1, 1), (2, 2), (2, 2), (1, 1)]


@pytest.mark.slow  # compiling takes seconds
def test_a_scan_by_windows(build):
    pytest.importorskip("openvino")
    method = build("supervised")
    options = method.options
    options.stride_xy = options.stride_z = 20
    image = torch.randn(40, 36, 32).numpy()
    scan = [
        predict_volume(on_engine(method, CPU, Namespace(**vars(options), engine=engine)), image, options, CPU)["seg"]
        for engine in ("openvino", "torch")  # the latter puts the fast layers in
    ]
    assert scan[1].std() > 1e-3 and abs(scan[0] - scan[1]).max() < TOLERANCE


@pytest.mark.parametrize("device, compiled, named", [("cuda", False, "--device"), ("cpu", True, "--compile")])
def test_what_it_cannot_do_is_refused(build, device, compiled, named):
    pytest.importorskip("openvino")
    options = Namespace(engine="openvino", compile=compiled, amp="off")
    with pytest.raises(InputError, match=named):
        on_engine(build("supervised"), torch.device(device), options)


def test_a_missing_package_is_named(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModuleNotFoundError) as missing:
        on_engine(build("supervised"), CPU, Namespace(engine="openvino"))
    assert missing.value.name in EXTRAS
