"""Choice of device, precision and memory format; GPUs are pretended, so that their branches run everywhere."""

import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from networks.vnet import VNet
from runtime import device
from runtime.device import (
    enough_memory,
    memory_format,
    peak_memory_gib,
    pick_device,
    place,
    precision,
    refuse_synced_recompute,
    set_determinism,
)
from runtime.distributed import Ranks
from utils.errors import InputError


def asked(device: str | None = None, gpu: int | None = None, amp: str = "off", compile: bool = False) -> Namespace:
    return Namespace(device=device, gpu=gpu, amp=amp, compile=compile, recompute=False, patch_size=[48, 64, 48])


@pytest.fixture
def gpus(monkeypatch):
    """Pretend a number of GPUs."""

    def pretend(count: int, capability: tuple[int, int] = (8, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        (0, asked(), "cpu"),
        (0, asked("cpu"), "cpu"),
        (2, asked("cpu"), "cpu"),
        (2, asked(), "cuda:0"),
        (2, asked("cuda"), "cuda:0"),
        (2, asked(gpu=1), "cuda:1"),
        (2, asked("cuda", 1, amp="fp16"), "cuda:1"),
        (0, asked(amp="bf16"), "cpu"),
    ],
)
def test_the_device_that_was_asked_for_or_the_first_gpu(gpus, count, options, expected):
    gpus(count)
    assert pick_device(options) == torch.device(expected)


def test_falling_back_to_the_cpu_is_said_and_asking_for_it_is_not(gpus):
    gpus(0)
    said = []
    pick_device(asked(), said.append)
    assert said == ["no GPU found: computing on the CPU"]
    pick_device(asked("cpu"), said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("count", "options", "flags"),
    [
        (0, asked(gpu=0), ["--gpu 0", "0 usable GPUs", "--device cpu"]),
        (0, asked("cuda"), ["--device cuda", "0 usable GPUs"]),
        (2, asked(gpu=2), ["--gpu 2", "2 usable GPUs"]),
        (2, asked(gpu=-1), ["--gpu -1"]),
        (1, asked("cpu", 0), ["--device cpu", "--gpu 0"]),
        (0, asked(amp="fp16"), ["--amp fp16", "GPU", "--amp bf16"]),
    ],
)
def test_what_the_machine_lacks_is_an_input_error_naming_the_flag(gpus, count, options, flags):
    gpus(count)
    with pytest.raises(InputError) as error:
        pick_device(options)
    assert all(flag in str(error.value) for flag in flags)


def test_each_process_takes_the_gpu_of_its_local_rank(gpus):
    gpus(2)
    ranks = Ranks(rank=3, size=4, local_rank=1, local_size=2)
    for options in (asked(), asked("cuda")):
        assert pick_device(options, ranks=ranks) == torch.device("cuda:1")
    assert pick_device(asked("cpu"), ranks=ranks) == torch.device("cpu")
    gpus(0)
    said = []
    assert pick_device(asked(), said.append, ranks) == torch.device("cpu")
    assert said == []
    pick_device(asked(), said.append, Ranks(0, 2, 0, 2))
    assert said == ["no GPU found: computing on the CPU"]


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (4, asked(gpu=1), ["--gpu 1", "torchrun", "CUDA_VISIBLE_DEVICES"]),
        (1, asked(), ["2 processes", "1 usable GPUs", "--nproc_per_node", "--device cpu"]),
        (0, asked("cuda"), ["2 processes", "0 usable GPUs", "--device cpu"]),
    ],
)
def test_what_contradicts_several_processes_is_an_input_error(gpus, count, options, words):
    gpus(count)
    with pytest.raises(InputError) as error:
        pick_device(options, ranks=Ranks(1, 2, 1, 2))
    assert all(word in str(error.value) for word in words)


def test_batch_norm_is_synchronised_over_processes_on_gpus_alone(monkeypatch):
    gpu, two = torch.device("cuda", 0), Ranks(0, 2, 0, 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(nn.Module, "to", lambda self, **where: self)
    kinds = {}
    for case, flag, where, ranks in (
        ("synced", True, gpu, two),
        ("switched off", False, gpu, two),
        ("CPU", True, torch.device("cpu"), two),
        ("alone", True, gpu, Ranks()),
    ):
        options = asked()
        options.sync_bn = flag
        placed = place(VNet(n_filters=2), where, options, ranks)
        kinds[case] = {type(m) for m in placed.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        assert placed.state_dict().keys() == VNet(n_filters=2).state_dict().keys()
    assert kinds.pop("synced") == {nn.SyncBatchNorm}
    assert all(kind == {nn.BatchNorm3d} for kind in kinds.values())


def test_statistics_of_other_processes_are_not_recomputed():
    options, gpu, two = asked(), torch.device("cuda", 0), Ranks(0, 2, 0, 2)
    options.sync_bn = options.recompute = True
    with pytest.raises(InputError, match="--recompute .* --no-recompute, or .* --no-sync_bn"):
        refuse_synced_recompute(options, gpu, two)
    refuse_synced_recompute(options, gpu, Ranks())
    options.recompute = False
    refuse_synced_recompute(options, gpu, two)


def test_bf16_on_a_cpu_refuses_patches_that_it_would_ruin(gpus):
    options = asked("cpu", amp="bf16")
    options.patch_size = [64, 64, 32]
    gpus(1)
    with pytest.raises(InputError, match="--patch_size"):
        pick_device(options)
    options.device = "cuda"
    assert pick_device(options).type == "cuda"


def test_bf16_on_a_gpu_without_it_is_bad_input(gpus):
    gpus(1, (7, 5))
    assert pick_device(asked(amp="fp16")).type == "cuda"
    with pytest.raises(InputError, match="--amp bf16.*--amp fp16"):
        pick_device(asked(amp="bf16"))


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_float32_on_a_gpu_but_with_tf32_in_convolutions(monkeypatch, tf32):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(nn.Module, "to", lambda self, **where: self)
    options = asked()
    options.tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=not tf32):  # restored at the end
        place(VNet(n_filters=2), torch.device("cuda", 0), options)
        assert torch.backends.cudnn.allow_tf32 == tf32
        assert not torch.backends.cuda.matmul.allow_tf32


def test_gpu_0_without_a_gpu_on_this_machine():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="--gpu 0"):
        pick_device(asked(gpu=0))


def test_channels_last_on_cpus_and_in_mixed_precision():
    assert memory_format(torch.device("cpu"), "off") == torch.channels_last_3d
    assert memory_format(torch.device("cuda"), "bf16") == torch.channels_last_3d
    assert memory_format(torch.device("cuda"), "off") == torch.contiguous_format
    network = place(VNet(n_filters=2), torch.device("cpu"), asked())
    weight = network.encoder[1][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()


def test_compile_is_for_the_vnets_and_only_where_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    method = nn.ModuleDict({"network": VNet(n_filters=2), "critic": nn.Linear(2, 2)})
    place(method, torch.device("cpu"), asked())
    assert compiled == []
    place(method, torch.device("cpu"), asked(compile=True))
    assert compiled == [method["network"]]


def test_no_more_threads_than_a_container_grants(monkeypatch):
    torch.set_num_threads(2)
    for cores in (3, 1):
        monkeypatch.setattr(device, "available_cores", lambda cores=cores: cores)
        place(nn.Linear(2, 2), torch.device("cpu"), asked())
        assert torch.get_num_threads() == min(2, cores)


@pytest.mark.parametrize(("amp", "expected"), [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_flag(amp, expected):
    layer = nn.Linear(4, 4)
    with precision(torch.device("cpu"), amp):
        assert layer(torch.ones(1, 4)).dtype == expected


def test_determinism_is_switched_on_and_off(monkeypatch):
    modes = [False]  # the real switch imports the compiler, which takes seconds
    monkeypatch.setattr(torch, "use_deterministic_algorithms", modes.append)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: modes[-1])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    set_determinism(False)
    assert torch.backends.cudnn.benchmark and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    set_determinism(True)
    assert not torch.backends.cudnn.benchmark and os.environ["CUBLAS_WORKSPACE_CONFIG"] == device.CUBLAS_WORKSPACE
    set_determinism(False)
    assert torch.backends.cudnn.benchmark
    assert modes == [False, True, False]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmany lines"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_bad_input(error):
    with pytest.raises(InputError, match="cpu.*--x"), enough_memory(torch.device("cpu"), "lower --x"):
        raise error


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="shapes"), enough_memory(torch.device("cpu"), ""):
        raise RuntimeError("shapes differ")


def test_peak_memory_is_what_the_kernel_says():
    status = Path("/proc/self/status")
    if not status.exists() or "VmHWM" not in status.read_text():
        pytest.skip("this system does not tell the peak memory of a process")
    kib = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(kib / 2**20, rel=0.05)
