"""One run's plumbing, shared by every script: command line, device, schedule, step, files, log, progress.

Nothing here appears on a slide. What a lecture has a symbol for stands in the script that teaches it.
"""
import argparse
import contextlib
import errno
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

import parallel
from parallel import rank, sum_gradients, summed

LIMITS = {name: (0, 10 ** 9) for name in ("warmup", "weight_decay", "max_norm", "eval_every", "save_every", "seed")}     # of every script


class InputError(ValueError):
    """Something the person at the keyboard can fix; `main` prints it in one line, without a traceback."""


# ----------------------------------------------------------------------------- command line

def parse_args(config_class: type, argv: list[str] | None = None, presets: dict[str, dict] | None = None):
    """Fill a config dataclass from `--field value` flags.

    Order of precedence: flag, then `--preset NAME` (a dict of field values), then the dataclass default. A boolean
    field takes `--field true|false`, or `--field` for true; a tuple field one value or several. An unknown flag is an
    error. `-h` shows the comment beside each field.
    """
    comments = dict(re.findall(r"^ +(\w+):.*?  # (.*)$", inspect.getsource(config_class), re.MULTILINE))
    parser = argparse.ArgumentParser(description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument("--preset", choices=sorted(presets), help="start from these values instead of the defaults")
    for field in fields(config_class):
        parse = {bool: parse_bool, tuple: str}.get(type(field.default), type(field.default))
        shape = {bool: dict(nargs="?", const=True), tuple: dict(nargs="+")}.get(type(field.default), {})
        parser.add_argument(f"--{field.name}", type=parse, default=argparse.SUPPRESS, metavar=field.name.upper(), **shape,
                            help=f"{comments.get(field.name, '')} [default {field.default!r}]".strip().replace("%", "%%"))
    flags = vars(parser.parse_args(argv))
    values = dict((presets or {}).get(flags.pop("preset", None), {}))
    values.update({name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()})
    return config_class(**values)


def parse_bool(text: str) -> bool:
    """`true` or `false`, nothing else."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return text.lower() == "true"


def check_range(config, **limits: tuple[float, float]) -> None:
    """Raise InputError unless low <= config.field <= high for each `field=(low, high)`."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise InputError(f"--{name} {value}: must lie between {low} and {high}")


def main(train, config_class: type, presets: dict[str, dict] | None = None) -> None:
    """Run `train(config)` from the command line; what the person can fix is one line, not a traceback."""
    config = parse_args(config_class, presets=presets)
    try:
        with parallel.processes():
            train(config)
        parallel.leave()
    except InputError as error:
        if parallel.rank() > 0:             # rank 0 may have the same to say; then torchrun ends this process meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2)
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise
        sys.exit(f"error: {error}; a disk that is full or a folder that may not be written to? Make room, or choose another --out")
    except (MemoryError, RuntimeError) as error:
        lost = ("onnection closed", "onnection reset", "roken pipe", "remote process", "Timed out")        # gloo's and NCCL's words
        if parallel.world() > 1 and any(word in str(error) for word in lost):
            sys.exit(f"error: another process of this run has ended ({str(error).splitlines()[0]}); its own message says why. To go on "
                     f"from the last checkpoint, run the same command with --resume")
        if not is_out_of_memory(error):
            raise
        fields_ = config_class.__dataclass_fields__
        remedies = [f"--{flag}" for flag in ("micro_batch 1", "max_tokens 256", "lora_rank 8") if flag.split()[0] in fields_]
        sys.exit(f"error: out of memory ({(str(error) or 'of the host').splitlines()[0]}); try "
                 f"{' or '.join(remedies) or 'a smaller model'}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out; the CPU's allocator and MPS say so in words only."""
    words = ("can't allocate memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


# ----------------------------------------------------------------------------- device and numbers

@dataclass(slots=True)
class Machine:
    """Where and in which precision a run computes."""
    device: torch.device
    dtype: torch.dtype
    scaler: torch.amp.GradScaler       # does something in fp16 only, whose range would lose small gradients
    out: Path = Path("out")            # where a batch is written whose gradient is not finite

    def backward(self, objective: torch.Tensor) -> None:
        """Gradients of what is minimised; `optimizer_step` takes the scale off them again."""
        self.scaler.scale(objective).backward()

    def autocast(self):
        """Matrix products in `dtype`; everything that sums stays in fp32. Does nothing in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def setup(config) -> Machine:
    """Seed every generator, pick device and precision from `config.device`, `config.dtype`, and print the config.

    Device "auto" is CUDA, then Apple's MPS, then the CPU; a device that is named is the only one asked whether it is
    there. dtype "auto" is bf16 where the hardware multiplies it (CUDA since Ampere, CPUs with AVX-512 BF16; a CPU without
    those instructions emulates bf16 a hundred times slower than fp32), fp16 on older CUDA, else fp32.
    """
    name = config.device
    check_range(config, **{field: limits for field, limits in LIMITS.items() if hasattr(config, field)})
    alone = parallel.world() == 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if alone and torch.backends.mps.is_available() else "cpu"
    if not alone and (name == "mps" or name.startswith("cuda:")):
        raise InputError(f"--device {name}: several processes take --device cuda, each its own GPU, or --device cpu")
    if name == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > max(1, torch.cuda.device_count()):
        raise InputError(f"--device {name}: there are fewer such devices than processes; start fewer, or take --device cpu")
    torch.manual_seed(config.seed)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try --device cpu") from error
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if config.dtype not in ("auto", *names):
        raise InputError(f"--dtype {config.dtype}: expected auto, float32, bfloat16 or float16")
    dtype = names.get(config.dtype) or best_dtype(device)
    if getattr(config, "shard", False):
        check_shard(config, dtype)
    print(" ".join(f"{name}={value}" for name, value in asdict(config).items()), file=sys.stderr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    scaler.scale(torch.zeros((), device=device))          # makes the scale, which a process without rows in its first step needs too
    return Machine(device, dtype, scaler, Path(getattr(config, "out", "out")))


def check_shard(config, dtype: torch.dtype) -> None:
    """InputError for what does not go together with --shard: all processes compute the same number of passes."""
    if parallel.world() == 1:
        print("--shard: does nothing in a run of one process; start several with torchrun", file=sys.stderr)
        return
    if dtype == torch.float16 or getattr(config, "lora_rank", 0) or getattr(config, "compile", False):
        raise InputError("--shard: does not go together with float16, --lora_rank or --compile; leave one of them out")
    each = parallel.world() * getattr(config, "minibatches", 1)
    for name, divisor in (("batch_size", each), ("ptx_windows", parallel.world() if getattr(config, "ptx_data", ()) else 1)):
        if getattr(config, name, 0) % divisor:
            raise InputError(f"--shard: --{name} {getattr(config, name)} must be a multiple of {divisor}")


def best_dtype(device: torch.device) -> torch.dtype:
    """The type in which this device multiplies fastest without emulation."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bf16 = device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") and (
        torch.cpu.get_capabilities().get("avx512_bf16", False))
    return torch.bfloat16 if has_bf16 else torch.float32


def available(device: torch.device = torch.device("cpu")) -> float:
    """Bytes that are free on the device, or that PyTorch holds there unused; infinity where nothing says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        with open("/proc/meminfo") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else float("inf")


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, final: float = 0.1, shape: str = "cosine") -> float:
    """Peak after `warmup` linear steps, then cosine or linear decay to `final` × peak at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress
    return peak * (final + (1 - final) * decay)


def adamw(model: torch.nn.Module, lr: float, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and gains alone; fused (0.9 M parameters: 6 times faster)."""
    parallel.reshard(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def optimizer_step(machine: Machine, max_norm: float, rates: dict[torch.optim.Optimizer, float], objective: float = 0.0,
                   texts: Callable[[], list[str]] = list) -> float:
    """For each optimizer: sum its gradient over processes, clip it to `max_norm`, step at its learning rate, clear. Returns the
    first one's norm before clipping. Where a gradient is zero nothing moves, by momentum or decay either: the batch had no target.

    An objective or gradient that is not finite raises InputError before anything has moved; `texts()`, what was in the batch, is
    written beside the log. In fp16 gradients may overflow: then the step is left out, and the scale halved.
    """
    norms = {}
    for optimizer in rates:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        sum_gradients(parameters)
        machine.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        norms[optimizer] = float(norm if type(norm) is torch.Tensor else norm.full_tensor())       # of sharded weights
    overflow = machine.scaler.is_enabled() and machine.scaler.get_scale() > 1
    if not (math.isfinite(objective) and (overflow or all(map(math.isfinite, norms.values())))):
        path = machine.out / "bad_batch.json"
        if rank() == 0:
            write_atomically(path, lambda partial: partial.write_text(json.dumps(texts(), indent=1, ensure_ascii=False) + "\n"))
        raise InputError(f"objective {objective}, norm of the gradient {' and '.join(map(str, norms.values()))}: not finite, so this step was "
                         f"not taken. The batch is in {path}. Look for what is odd in it, or begin anew, in another --out, with a "
                         f"lower --lr, a longer --warmup or --dtype float32")
    for optimizer, lr in rates.items():
        for group in optimizer.param_groups:
            group["lr"] = lr
        if norms[optimizer] != 0:
            machine.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    machine.scaler.update()
    return next(iter(norms.values()))


# ----------------------------------------------------------------------------- files

def write_atomically(path: Path, write) -> None:
    """Call `write(temporary_path)`, flush to disk, then rename: `path` is always whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    write_and_flush(temporary, write)
    os.replace(temporary, path)


def write_and_flush(path: Path, write) -> None:
    """Call `write(path)` and flush the file to disk."""
    write(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def peak_memory() -> float:
    """GiB that this process has held at most: on CUDA if it used that, else in main memory; 0 where nothing says."""
    if torch.cuda.is_initialized():
        return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / 2 ** 30
    try:
        with open("/proc/self/status") as file:               # getrusage would count the peak of the process that started this
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2 ** 20
    except (OSError, StopIteration):
        try:
            import resource
        except ImportError:
            return 0.0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def progress(total: int, title: str, unit: str, start: int = 0) -> tqdm:
    """A progress bar with the time left; every second on a terminal, twice a minute in a log file."""
    return tqdm(total=total, initial=start, desc=title, unit=unit, dynamic_ncols=True, disable=rank() > 0,
                mininterval=1 if sys.stderr.isatty() else 30)


def open_log(path: Path, start: int) -> TextIO:
    """A file of JSON rows to append to, a new one unless start > 0. On all but rank 0 what is written goes nowhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path if rank() == 0 else os.devnull, "a" if start else "w")


def read_log(path: Path) -> list[dict]:
    """The rows of such a file; a last one that was cut off in the middle is left out."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


class Log:
    """`metrics.jsonl` of one run and its progress bar: one row of numbers per `write`, the key ones beside the bar."""

    def __init__(self, folder: str | Path, total: int, title: str, start: int = 0):
        self.folder, self.file = Path(folder), open_log(Path(folder) / "metrics.jsonl", start)
        self.bar = progress(total, title, "step", start)
        self.start, self.tokens, self.before = time.time(), 0, 0.0
        if start and rank() == 0:
            self.before = max((row["seconds"] for row in read_log(self.folder / "metrics.jsonl")), default=0.0)

    def write(self, step: int, show: tuple[str, ...] = (), **numbers: float) -> None:
        """Append a row and show the numbers named in `show` beside the progress bar."""
        row = {"step": step, "seconds": round(self.before + time.time() - self.start, 2), **numbers}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if show:
            self.bar.set_postfix({name: f"{numbers[name]:.3g}" for name in show}, refresh=False)

    def close(self, **final: float) -> dict:
        """End the bar, write `final.json` with wall seconds, tokens per second and this process's peak memory, and return those
        numbers. Steps whose gradient was zero, as no token or pair in them was a target, are counted."""
        self.bar.close()
        self.file.close()
        seconds = time.time() - self.start
        result = {**final, "seconds": round(self.before + seconds, 1), "tokens_per_second": round(summed(self.tokens) / seconds),
                  "memory_gib": round(peak_memory(), 2)}
        if rank() == 0:
            if empty := sum(row.get("grad_norm") == 0 for row in read_log(self.folder / "metrics.jsonl")):
                result["empty_steps"] = empty
            write_atomically(self.folder / "final.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
        print(" ".join(f"{name}={value}" for name, value in result.items()))
        return result
