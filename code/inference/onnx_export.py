"""A trained network as an ONNX file, for runtimes without PyTorch."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from networks.base import common_stride
from utils import files

OPSET = 18
INPUT_NAME, OUTPUT_NAME = "image", "prob"
TRACED = (2, 3, 4)  # multiples of the stride that differ, so that none is taken for another


def export_onnx(network: nn.Module, patch: Sequence[int], metadata: dict[str, Any], path: Path) -> float:
    """Write a network on the CPU, (B, 1, W, H, D) -> (B, C, W, H, D), to `path`, and run the file once.

    Batch, W, H and D are free, W, H and D multiples of the network's stride; a `patch` that is none fixes them instead,
    and the padding to the next multiple becomes part of the file.

    Args: metadata, plain values, stored in the file as JSON under their names.
    Returns: the largest difference between onnxruntime and PyTorch on one random patch.
    """
    import onnxscript  # noqa: F401  PyTorch would say in its own words that it is missing

    network.eval()
    with files.atomic(path, "--export") as temporary:
        program = _exported(network, patch)
        program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
        program.save(temporary, external_data=False)
        return _difference(network, patch, temporary)


def _exported(network: nn.Module, patch: Sequence[int]) -> Any:
    batch, stride = torch.export.Dim("batch"), common_stride(network)
    if any(length % stride for length in patch):
        example, free = torch.zeros(2, 1, *patch), {0: batch}
    else:
        sizes = [stride * torch.export.Dim(name) for name in ("w", "h", "d")]
        example, free = (
            torch.zeros(2, 1, *(stride * times for times in TRACED)),
            {0: batch, 2: sizes[0], 3: sizes[1], 4: sizes[2]},
        )
    with _quiet():
        return torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            dynamic_shapes=(free,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            opset_version=OPSET,
            verbose=False,
        )


def _difference(network: nn.Module, patch: Sequence[int], path: Path) -> float:
    import onnxruntime

    image = torch.randn((1, 1, *patch), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(image).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return float(np.abs(session.run([OUTPUT_NAME], {INPUT_NAME: image.numpy()})[0] - expected).max())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on torchvision and its own deprecations, which no user can fix."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
