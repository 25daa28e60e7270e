"""Weights of the public left-atrium codes (UA-MT, SASSNet, DTC, DTML) for the V-Net of this project.

Those codes share one V-Net, for one class, with batch norm. Only names differ: `block_three.conv.3.weight` there is
`encoder.2.3.weight` here. Their `vnet.py` (UA-MT) ends in `out_conv`, two classes; their `vnet_sdf.py` (SASSNet,
DTC, DTML) ends in `out_conv`, the signed distance map before its tanh, and `out_conv2`, the segmentation. In
DTML's pair of files, `*_seg.pth` trained only the latter and `*_dis.pth` only the former.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from networks.vnet import VNet
from utils.errors import InputError

Weights = dict[str, Tensor]

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STAGES = (
    {f"encoder.{level}": f"block_{NUMBERS[level]}.conv" for level in range(5)}
    | {f"down.{level}": f"block_{NUMBERS[level]}_dw.conv" for level in range(4)}
    | {f"up.{level}": f"block_{NUMBERS[4 + level]}_up.conv" for level in range(4)}
    | {f"decoder.{level}": f"block_{NUMBERS[5 + level]}.conv" for level in range(4)}
)
FIRST = "block_one.conv.0.weight"  # every published file has it; its length is the width of the network
OUTPUT_LAYERS = ("out_conv", "out_conv2")
SEGMENTATION_HEADS = {1: "seg", 2: "softmax"}  # by number of channels
OPTIONAL = "num_batches_tracked"  # a counter without effect here, absent from files of PyTorch 0.4.0 and older


def load_published(network: VNet, path: Path) -> list[str]:
    """Load a published state dict into a V-Net, in place; the same input then gives the same output.

    The dictionary may lie inside another one (as "state_dict", "net", ...) and carry the prefix `module.` of
    DataParallel. A segmentation of other channels than the head's is no match: softmax and seg do not mix.
    Returns: names of the network's heads that the file lacks; they keep their values.
    Raises: InputError for a file that cannot be read, or holds another architecture, width or norm.
    """
    weights = _read(path)
    layers = {
        head: layer for head, layer in _head_layers(weights).items() if _fits(network, head, weights[f"{layer}.weight"])
    }
    names = {ours: theirs for ours in network.state_dict() if (theirs := _published_name(ours, layers)) is not None}
    _require_fit(network, weights, names, path)
    loaded = {ours: weights[theirs] for ours, theirs in names.items() if theirs in weights}
    network.load_state_dict(network.state_dict() | loaded)
    return [head for head in network.heads if head not in layers]


def _read(path: Path) -> Weights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; see --pretrained") from None
    except Exception as error:  # unpickling runs into anything
        raise InputError(f"{path} is not a readable state dict ({type(error).__name__}); see --pretrained") from error
    nested = content if isinstance(content, dict) else {}
    found = {key: w for key, value in {"": content, **nested}.items() if FIRST in (w := _tensors(value))}
    if not found:
        raise InputError(
            f"{path} holds no V-Net in the layout of UA-MT, SASSNet, DTC and DTML (no {FIRST}); see --pretrained"
        )
    if len(found) > 1:
        raise InputError(
            f"{path} holds several networks ({', '.join(map(str, found))}); save one by itself for --pretrained"
        )
    return next(iter(found.values()))


def _tensors(value: Any) -> Weights:
    items = value.items() if isinstance(value, dict) else ()
    return {str(key).removeprefix("module."): item for key, item in items if isinstance(item, Tensor)}


def _head_layers(weights: Weights) -> dict[str, str]:
    """{head of this project: layer of the file}."""
    channels = {layer: len(weights[f"{layer}.weight"]) for layer in OUTPUT_LAYERS if f"{layer}.weight" in weights}
    layers = {}
    if "out_conv2" in channels and channels.get("out_conv") == 1:
        layers["sdm"] = "out_conv"
    segmentation = "out_conv2" if "out_conv2" in channels else "out_conv"
    if channels.get(segmentation) in SEGMENTATION_HEADS:
        layers[SEGMENTATION_HEADS[channels[segmentation]]] = segmentation
    return layers


def _fits(network: VNet, head: str, weight: Tensor) -> bool:
    """Whether a head is of the form of the public implementations, a single convolution, and of as many classes."""
    own = network.heads[head] if head in network.heads else None
    return isinstance(own, nn.Conv3d) and len(own.weight) == len(weight)


def _published_name(ours: str, layers: dict[str, str]) -> str | None:
    """`encoder.2.3.weight` -> `block_three.conv.3.weight`; None for a head that the file lacks."""
    part, which, rest = ours.split(".", maxsplit=2)
    if part == "heads":
        return f"{layers[which]}.{rest}" if which in layers else None
    return f"{STAGES[f'{part}.{which}']}.{rest}"


def _require_fit(network: VNet, weights: Weights, names: dict[str, str], path: Path) -> None:
    width, own_width = len(weights[FIRST]), network.encoder[0][0].out_channels
    if width != own_width:
        raise InputError(f"{path} has width {width} and the network {own_width}: give --n_filters {width}")
    if not any(isinstance(module, nn.BatchNorm3d) for module in network.modules()):
        raise InputError(f"{path}, of width {width}, is for batch norm: give --norm batch and --n_filters {width}")
    ours = {theirs: network.state_dict()[name].shape for name, theirs in names.items()}
    missing = [name for name in ours if name not in weights and not name.endswith(OPTIONAL)]
    foreign = [name for name in weights if name not in ours and not name.startswith(OUTPUT_LAYERS)]
    unlike = [name for name in ours if name in weights and weights[name].shape != ours[name]]
    for problem, where in {"is missing": missing, "is not part of it": foreign, "has another shape": unlike}.items():
        if where:
            raise InputError(
                f"{path} is not the V-Net of UA-MT, SASSNet, DTC and DTML at width {width} (--n_filters): "
                f"{where[0]} {problem}; give another file to --pretrained"
            )
