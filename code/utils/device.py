"""Where and how networks are computed: device, precision, memory format."""

import platform
import resource
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from networks.vnet import VNet
from utils.errors import InputError

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(options: Namespace, say: Callable[[str], None] = print) -> torch.device:
    """The device that --device and --gpu ask for; without either, the first GPU or the CPU with a notice."""
    wants_gpu = options.device == "cuda" or options.gpu is not None
    if wants_gpu and options.device == "cpu":
        raise InputError(f"--device cpu and --gpu {options.gpu} contradict each other; give one of them")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wants_gpu:
        index = options.gpu or 0
        if not 0 <= index < count:
            raise InputError(f"--gpu {index} was asked for, but {count} usable GPUs were found; try --device cpu")
        return torch.device("cuda", index)
    if options.device is None and count:
        return torch.device("cuda", 0)
    if options.device is None:
        say("no GPU found: computing on the CPU")
    return torch.device("cpu")


def memory_format(device: torch.device, amp: str) -> torch.memory_format:
    """Channels last where 3-D convolutions are faster with it: on CPUs, and on GPUs in mixed precision."""
    return torch.channels_last_3d if device.type == "cpu" or amp != "off" else torch.contiguous_format


def place(method: nn.Module, device: torch.device, options: Namespace) -> nn.Module:
    """The method on its device, in the memory format and, with --compile, the form that run fastest."""
    method.to(device=device, memory_format=memory_format(device, options.amp))
    if options.compile:
        for network in (module for module in method.modules() if isinstance(module, VNet)):
            network.compile()
    return method


def precision(device: torch.device, amp: str) -> torch.autocast:
    """Autocast as --amp asks for it."""
    return torch.autocast(device.type, AMP_TYPES.get(amp), enabled=amp != "off")


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def machine(device: torch.device) -> dict[str, str | int | None]:
    """What computes: processor, threads and GPU, to be read beside seconds."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere, and on ARM, the general name must do
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
