"""Where and how networks are computed: device, precision, memory format."""

import ctypes
import os
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
MIN_BF16_PATCH = 48  # at 32, oneDNN 3.12 returns garbage for 3x3x3 convolutions of the 2x2x2 map, in any layout
MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_MAX = -1, -4  # names of glibc's mallopt, from malloc.h
CUBLAS_WORKSPACE = ":4096:8"  # what cuBLAS needs to be deterministic, from its manual


def pick_device(options: Namespace, say: Callable[[str], None] = print) -> torch.device:
    """The device that --device and --gpu ask for; without either, the first GPU or the CPU with a notice."""
    device = _asked_device(options, say)
    if device.type == "cpu" and options.amp == "fp16":
        raise InputError("--amp fp16 needs a GPU; on the CPU give --amp bf16 or --amp off")
    if device.type == "cpu" and options.amp == "bf16" and min(options.patch_size) < MIN_BF16_PATCH:
        raise InputError(
            f"--amp bf16 on a CPU needs a --patch_size of at least {MIN_BF16_PATCH} along every axis; give --amp off"
        )
    return device


def _asked_device(options: Namespace, say: Callable[[str], None]) -> torch.device:
    wants_gpu = options.device == "cuda" or options.gpu is not None
    if wants_gpu and options.device == "cpu":
        raise InputError(f"--device cpu and --gpu {options.gpu} contradict each other; give one of them")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wants_gpu:
        index = options.gpu or 0
        if not 0 <= index < count:
            asked = "--device cuda" if options.gpu is None else f"--gpu {index}"
            raise InputError(f"{asked} was asked for, but {count} usable GPUs were found; try --device cpu")
        return torch.device("cuda", index)
    if options.device is None and count:
        return torch.device("cuda", 0)
    if options.device is None:
        say("no GPU found: computing on the CPU")
    return torch.device("cpu")


def set_determinism(deterministic: bool) -> None:
    """With --deterministic only kernels that repeat exactly; without, cuDNN picks the fastest for each shape."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # setting it takes seconds, for its imports
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def memory_format(device: torch.device, amp: str) -> torch.memory_format:
    """Channels last where 3-D convolutions are faster with it: on CPUs, and on GPUs in mixed precision."""
    return torch.channels_last_3d if device.type == "cpu" or amp != "off" else torch.contiguous_format


def place(method: nn.Module, device: torch.device, options: Namespace) -> nn.Module:
    """The method on its device, in the memory format and, with --compile, the form that run fastest."""
    if device.type == "cpu":
        keep_memory()
    method.to(device=device, memory_format=memory_format(device, options.amp))
    if options.compile:
        for network in (module for module in method.modules() if isinstance(module, VNet)):
            network.compile()
    return method


def precision(device: torch.device, amp: str) -> torch.autocast:
    """Autocast as --amp asks for it."""
    return torch.autocast(device.type, AMP_TYPES.get(amp), enabled=amp != "off")


def keep_memory() -> None:
    """Let the C library reuse freed memory instead of returning it to the system after every layer.

    A tensor of some megabytes is otherwise mapped anew each time, and its pages cleared one by one: a tenth of a
    training step on a CPU. Where there is no glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(MALLOC_MMAP_MAX, 0)
        mallopt(MALLOC_TRIM_THRESHOLD, 2**31 - 1)


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
