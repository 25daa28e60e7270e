"""A trained method on the engine that computes its predictions: PyTorch, or OpenVINO on a CPU."""

import warnings
from argparse import Namespace
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Method
from runtime.device import enough_memory, place
from utils.errors import InputError
from utils.machine import available_cores

PRECISIONS = {"off": "f32", "bf16": "bf16"}  # of --amp; OpenVINO's own default depends on the processor
MOST_MODELS = 8  # at hand: maps and turned views of a patch need four, --window whole one more for every scan


def on_engine(method: Method, device: torch.device, options: Namespace) -> nn.Module:
    """The method ready to predict: on its device or, with --engine openvino, compiled for the CPU."""
    if options.engine == "torch":
        with enough_memory(device, "give another --gpu, or --device cpu"):
            return place(method, device, options)
    import openvino  # noqa: F401  that it is missing is said before any scan is read

    if device.type != "cpu":
        raise InputError("--engine openvino computes on the CPU; give --device cpu")
    if options.compile:
        raise InputError("--compile compiles for PyTorch, not for --engine openvino; give one of them")
    return OpenVINOMethod(method, options.amp)


@cache
def _core() -> Any:
    """OpenVINO's: one, for each sets a stack for signals, and one that goes would take that of another along."""
    import openvino

    return openvino.Core()


class OpenVINOMethod(nn.Module):
    """Predicts what a method does: in float32 to 1e-4, before a steep transform of distances magnifies it."""

    def __init__(self, method: Method, amp: str):
        super().__init__()
        self.method, self.amp = method.eval(), amp
        self.outputs, self.exclusive = method.outputs, method.exclusive
        self._models: dict[tuple, tuple[Any, Any]] = {}  # by call and size: a model for any batch, names of its outputs
        self._compiled: dict[tuple, Any] = {}  # by the same and the batch; a model for any is slower

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        """As `Method.predict`."""
        return self._run("predict", image, tuple(outputs or self.outputs))

    def signed_maps(self, image: Tensor) -> dict[str, Tensor]:
        """As `Method.signed_maps`."""
        return self._run("signed_maps", image)

    def _run(self, call: str, image: Tensor, *args: tuple[str, ...]) -> dict[str, Tensor]:
        key = (call, *args, image.shape[1:])
        if key not in self._models:
            if len(self._models) == MOST_MODELS:
                self._models, self._compiled = {}, {}
            self._models[key] = self._model(call, image, args)
        model, spec = self._models[key]
        if (key, len(image)) not in self._compiled:
            model.reshape({model.inputs[0]: list(image.shape)})
            threads = min(torch.get_num_threads(), available_cores())
            config = {"INFERENCE_PRECISION_HINT": PRECISIONS[self.amp], "INFERENCE_NUM_THREADS": threads}
            self._compiled[key, len(image)] = _core().compile_model(model, "CPU", config)
        maps = self._compiled[key, len(image)](image.numpy())
        return spec.unflatten([torch.from_numpy(maps[index]) for index in range(len(maps))])

    def _model(self, call: str, image: Tensor, args: tuple) -> tuple[Any, Any]:
        """A model for windows of this size, and the structure of its outputs."""
        import openvino

        example = torch.zeros(2, *image.shape[1:])  # a batch of one would be taken for fixed
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within PyTorch
            network = _Call(self.method, call, args)
            program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            return openvino.convert_model(program), program.call_spec.out_spec


class _Call(nn.Module):
    """A method of a module as its forward pass, which is what can be exported."""

    def __init__(self, module: nn.Module, call: str, args: tuple):
        super().__init__()
        self.module, self.call, self.args = module, call, args

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return getattr(self.module, self.call)(image, *self.args)
