"""Networks as ONNX: onnxruntime gives PyTorch's numbers at any size, and the file says how to use it."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from inference.ensemble import Predictor
from inference.onnx_export import INPUT_NAME, OPSET, OUTPUT_NAME, export_onnx
from methods import METHODS
from utils.errors import EXTRAS

TOLERANCE = 1e-4


def network_of(
    tiny_options, method: str = "supervised", head: str = "seg", *flags: str, tta: str = "none"
) -> Predictor:
    """An untrained network whose batch norm has statistics of its own."""
    torch.manual_seed(0)
    built = METHODS[method](tiny_options(method, "--n_filters", "2", "--dropout", "0.5", *flags))
    for _ in range(3):
        built.predict(torch.randn(2, 1, 32, 32, 32))
    return Predictor(built.eval(), head, tta=tta)


def ran(path, image: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run([OUTPUT_NAME], {INPUT_NAME: image.numpy()})[0]


@pytest.mark.slow  # the fast set exports a V-Net in the example of docs/predict.md
@torch.no_grad()
def test_the_same_numbers_at_any_size_and_what_the_file_says(tiny_options, tmp_path):
    network, path = network_of(tiny_options), tmp_path / "net.onnx"
    difference = export_onnx(network, (32, 32, 32), {"scale": 0.5, "names": ["a", "b"]}, path)
    assert difference < TOLERANCE
    for shape in ((1, 1, 32, 32, 32), (3, 1, 48, 32, 64)):
        image = torch.randn(shape)
        expected = network(image).numpy()
        assert expected.std() > 1e-3
        np.testing.assert_allclose(ran(path, image), expected, atol=TOLERANCE)
    model = onnx.load(path)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]
    assert {p.key: json.loads(p.value) for p in model.metadata_props} == {"scale": 0.5, "names": ["a", "b"]}
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.slow
@torch.no_grad()
def test_a_patch_that_is_no_multiple_of_16_is_fixed(tiny_options, tmp_path):
    network, path = network_of(tiny_options), tmp_path / "net.onnx"
    assert export_onnx(network, (32, 40, 33), {}, path) < TOLERANCE
    image = torch.randn(2, 1, 32, 40, 33)
    np.testing.assert_allclose(ran(path, image), network(image).numpy(), atol=TOLERANCE)


def test_without_the_exporter_there_is_no_file(tiny_options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError) as missing:
        export_onnx(network_of(tiny_options), (32, 32, 32), {}, tmp_path / "net.onnx")
    assert missing.value.name in EXTRAS and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("classes", ["1", "2"])
@pytest.mark.parametrize("method", METHODS)
def test_every_output_of_every_method(tiny_options, tmp_path, method, classes):
    for head in METHODS[method](tiny_options(method)).outputs:
        soft = ("--sdm_k", "10") if method in ("dtml", "dtc") else ()  # 1500 turns rounding into 1e-3
        network, path = network_of(tiny_options, method, head, *soft, "--num_classes", classes), tmp_path / "net.onnx"
        assert export_onnx(network, (32, 32, 32), {}, path) < TOLERANCE
        assert ran(path, torch.randn(1, 1, 32, 32, 32)).shape == (1, int(classes), 32, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["instance", "group"])
def test_every_norm(tiny_options, tmp_path, norm):
    network = network_of(tiny_options, "supervised", "seg", "--norm", norm)
    assert export_onnx(network, (32, 32, 32), {}, tmp_path / "net.onnx") < TOLERANCE
