"""Where and how networks are computed: device, precision, memory format."""

import contextlib
import ctypes
import os
import platform
import resource
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from networks import Network
from networks.layers import accelerate
from runtime.distributed import ALONE, Ranks
from utils.constants import MIN_BF16_PATCH
from utils.errors import InputError
from utils.machine import available_cores

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BF16_CAPABILITY = 8, 0  # compute capability of GPUs (Ampere) from which on they multiply bfloat16
CPU_OUT_OF_MEMORY = "can't allocate memory"  # within a RuntimeError of PyTorch
MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_MAX = -1, -4  # names of glibc's mallopt, from malloc.h
GRAPHS = 32  # of --compile: for each network with and without gradient, in each mode and batch size
CUBLAS_WORKSPACE = ":4096:8"  # what cuBLAS needs to be deterministic, from its manual


def pick_device(options: Namespace, say: Callable[[str], None] = print, ranks: Ranks = ALONE) -> torch.device:
    """The device that --device and --gpu ask for; without either, the first GPU or the CPU with a notice.

    Of several processes on a machine each takes the GPU of its local rank.
    """
    device = _asked_device(options, say if ranks.leads else _silent, ranks)
    if device.type == "cpu" and options.amp == "fp16":
        raise InputError("--amp fp16 needs a GPU; on the CPU give --amp bf16 or --amp off")
    if device.type == "cpu" and options.amp == "bf16" and min(options.patch_size) < MIN_BF16_PATCH:
        raise InputError(
            f"--amp bf16 on a CPU needs a --patch_size of at least {MIN_BF16_PATCH} along every axis; give --amp off"
        )
    if device.type == "cuda" and options.amp == "bf16" and torch.cuda.get_device_capability(device) < BF16_CAPABILITY:
        raise InputError(f"--amp bf16 is emulated, and slow, on {device}; give --amp fp16 or --amp off")
    return device


def _asked_device(options: Namespace, say: Callable[[str], None], ranks: Ranks) -> torch.device:
    wants_gpu = options.device == "cuda" or options.gpu is not None
    if wants_gpu and options.device == "cpu":
        raise InputError(f"--device cpu and --gpu {options.gpu} contradict each other; give one of them")
    if options.gpu is not None and ranks.size > 1:
        raise InputError(
            f"--gpu {options.gpu} and torchrun contradict each other: each process takes the GPU of its local rank; "
            "leave --gpu out, and pick among the GPUs by CUDA_VISIBLE_DEVICES"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if ranks.size > 1 and ranks.local_size > count and (wants_gpu or (count and options.device is None)):
        raise InputError(
            f"torchrun started {ranks.local_size} processes on this machine, but {count} usable GPUs were found; "
            "lower --nproc_per_node, or give --device cpu"
        )
    if wants_gpu:
        index = ranks.local_rank if options.gpu is None else options.gpu
        if not 0 <= index < count:
            asked = "--device cuda" if options.gpu is None else f"--gpu {index}"
            raise InputError(f"{asked} was asked for, but {count} usable GPUs were found; try --device cpu")
        return torch.device("cuda", index)
    if options.device is None and count:
        return torch.device("cuda", ranks.local_rank)
    if options.device is None:
        say("no GPU found: computing on the CPU")
    return torch.device("cpu")


def _silent(message: str) -> None:
    """Says nothing."""


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


def refuse_synced_recompute(options: Namespace, device: torch.device, ranks: Ranks) -> None:
    """Raise an `InputError` where --recompute meets the batch norm of several processes."""
    if syncs_batch_norm(options, device, ranks) and options.recompute:
        raise InputError(
            "--recompute computes the batch norms of one process again, not of all; "
            "give --no-recompute, or for a new run --no-sync_bn"
        )


def place(method: nn.Module, device: torch.device, options: Namespace, ranks: Ranks = ALONE) -> nn.Module:
    """The method on its device, in the memory format and, with --compile, the form that run fastest.

    The batch norms of several processes on GPUs use the statistics of all their batches (--sync_bn).
    """
    if device.type == "cpu":
        keep_memory()
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))  # PyTorch knows no quota of a container
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL looks for it
        torch.backends.cuda.matmul.allow_tf32 = False  # the steep transform of a distance map magnifies rounding
        torch.backends.cudnn.allow_tf32 = getattr(options, "tf32", False)  # older runs lack it
    if syncs_batch_norm(options, device, ranks):
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    method.to(device=device, memory_format=memory_format(device, options.amp))
    accelerate(method, getattr(options, "recompute", False))  # a flag of training alone, which older runs lack
    if options.compile:
        torch._dynamo.config.cache_size_limit = GRAPHS  # one for all networks of a method; now recompile_limit
        for network in (module for module in method.modules() if isinstance(module, Network)):
            network.compile()
    return method


def syncs_batch_norm(options: Namespace, device: torch.device, ranks: Ranks) -> bool:
    """Whether batch norm joins the statistics of all processes; PyTorch can do that on GPUs alone."""
    return ranks.size > 1 and device.type == "cuda" and options.sync_bn


def precision(device: torch.device, amp: str) -> torch.autocast:
    """Autocast as --amp asks for it."""
    return torch.autocast(device.type, AMP_TYPES.get(amp), enabled=amp != "off")


@contextlib.contextmanager
def enough_memory(device: torch.device, remedy: str) -> Iterator[None]:
    """Running out of memory, of a GPU or of the machine, becomes an `InputError` that names the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or CPU_OUT_OF_MEMORY in str(error):
            raise InputError(f"{device} is out of memory; {remedy}") from error
        raise


def device_with_room(device: torch.device, needed: int) -> torch.device:
    """The device; the CPU for a GPU that has not twice as many bytes free, since the network needs room, too."""
    if device.type != "cuda":
        return device
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by PyTorch, but free
    return device if 2 * needed <= torch.cuda.mem_get_info(device)[0] + cached else torch.device("cpu")


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
