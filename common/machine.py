"""Where and in which precision a run computes, and how much memory there is."""
import contextlib
import ctypes
import os
import sys
from typing import NamedTuple

import torch

from common import parallel
from common.errors import InputError, first_line
from common.files import free_memory

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Machine(NamedTuple):
    """A device, the type of its matrix products, and the loss scale that fp16 alone needs."""
    device: torch.device
    dtype: torch.dtype
    scaler: torch.amp.GradScaler       # does nothing but in fp16, whose range loses small gradients


def find_machine(config) -> Machine:
    """Device and precision of `config.device` and `config.dtype`.

    Device "auto" is CUDA, then Apple's MPS, then the CPU; a device that is named is the only one
    asked whether it is there. dtype "auto" is bf16 where that is surely faster (CUDA since Ampere,
    CPUs with AMX), fp16 on older CUDA, else fp32: with AVX-512 BF16 alone Intel's CPUs take 1.5 to
    2 times as long as in fp32, AMD's half as long for wide models; without it bf16 is emulated, a
    hundred times slower. Raises InputError.
    """
    name, alone = config.device, parallel.world() == 1
    if name == "auto":
        mps = alone and not torch.cuda.is_available() and torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not alone and (name == "mps" or name.startswith("cuda:")):
        raise InputError(f"--device {name}: several processes take --device cuda, each its own "
                         f"GPU, or --device cpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "cuda" and here > max(1, torch.cuda.device_count()):
        raise InputError(f"--device {name}: there are fewer such devices than processes; start "
                         f"fewer, or take --device cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable here ({first_line(error)}); try --device "
                         f"cpu") from error
    if config.dtype not in ("auto", *PRECISIONS):
        raise InputError(f"--dtype {config.dtype}: expected auto, float32, bfloat16 or float16")
    if device.type == "cpu":
        keep_freed_memory()
    dtype = PRECISIONS.get(config.dtype) or best_dtype(device)
    if getattr(config, "shard", False):
        check_shard(config, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    # This makes the scale; a process without rows in its first step needs it too.
    scaler.scale(torch.zeros((), device=device))
    return Machine(device, dtype, scaler)


def check_shard(config, dtype: torch.dtype) -> None:
    """InputError for what does not go together with --shard, where all processes must compute the
    same number of passes."""
    if parallel.world() == 1:
        print("--shard: does nothing in a run of one process; start several with torchrun",
              file=sys.stderr)
        return
    alone = getattr(config, "lora_rank", 0) or getattr(config, "compile", False)
    if dtype == torch.float16 or alone:
        raise InputError("--shard: does not go together with float16, --lora_rank or --compile; "
                         "leave one of them out")
    divisors = {"batch_size": parallel.world() * getattr(config, "minibatches", 1)}
    if getattr(config, "ptx_data", ()):
        divisors["ptx_windows"] = parallel.world()
    for name, divisor in divisors.items():
        if getattr(config, name, 0) % divisor:
            raise InputError(f"--shard: --{name} {getattr(config, name)} must be a multiple of "
                             f"{divisor}")


def best_dtype(device: torch.device) -> torch.dtype:
    """The type in which this device multiplies fastest without emulation."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        if torch.cpu.get_capabilities().get("amx_bf16", False):
            return torch.bfloat16
    return torch.float32


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what a step frees for the next one, instead of asking the system
    anew for every large tensor: sampling 1,024 rows takes a seventh less time on a CPU, a training
    step of PPO 4 % less. Elsewhere this does nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for parameter in (-1, -3):                          # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 2 ** 30)


def available(device: torch.device) -> float:
    """Bytes that are free on the device, or that PyTorch holds there unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return free_memory()


def peak_memory() -> float:
    """GiB that this process has held at most: on CUDA if it used that, else in main memory; 0
    where nothing says."""
    if torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        return sum(map(torch.cuda.max_memory_allocated, devices)) / 2 ** 30
    try:
        with open("/proc/self/status") as file:     # getrusage would count the parent's peak
            return next(int(line.split()[1]) for line in file
                        if line.startswith("VmHWM")) / 2 ** 20
    except (OSError, StopIteration):
        try:
            import resource
        except ImportError:
            return 0.0
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)
