"""The command line: a config's fields are the flags, and what can be fixed ends in one line."""
import argparse
import errno
import inspect
import io
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, fields

from common import parallel
from common.errors import InputError, first_line, is_out_of_memory

# Ranges of flags that several scripts have.
LIMITS = {name: (0, 10 ** 9) for name in ("warmup", "weight_decay", "max_norm", "eval_every",
                                          "save_every", "seed")}
LIMITS |= dict(lr=(0, 1), batch_size=(1, 10 ** 6), micro_batch=(0, 10 ** 6),
               max_tokens=(0, 10 ** 7), lora_rank=(0, 10 ** 5),
               max_new_tokens=(1, 10 ** 5))
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
        errno.EEXIST)                                       # no room, or no right to write
LOST = ("onnection closed", "onnection reset", "roken pipe", "remote process", "Timed out")


@dataclass(slots=True)
class DeviceFlags:
    """Flags of every command that computes."""
    seed: int = 1
    device: str = "auto"           # auto, cuda, mps, cpu
    dtype: str = "auto"            # auto, float32, bfloat16, float16


@dataclass(slots=True)
class Flags(DeviceFlags):
    """Flags of every training script."""
    out: str = "out"               # folder for the checkpoint and metrics
    micro_batch: int = 0           # rows a forward pass; 0: all of a step's at once
    max_norm: float = 1.0          # norm to which each optimizer's gradient is clipped
    save_every: int = 0            # steps between states for --resume; 0: every ten minutes
    resume: bool = False           # go on from the last state in out
    overwrite: bool = False        # replace the finished run in out
    shard: bool = False            # torchrun: each process keeps a part of weights and moments


def parse_args(config_class: type, argv: list[str] | None = None,
               presets: dict[str, dict] | None = None):
    """Fill a config dataclass from `--field value` flags.

    Order of precedence: flag, then `--preset NAME` (a dict of field values), then the dataclass
    default. A boolean field takes `--field true|false`, or `--field` for true; a tuple field one
    value or several. An unknown flag is an error. `-h` shows the comment beside each field.
    """
    parser = argparse.ArgumentParser(description=sys.modules[config_class.__module__].__doc__,
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument("--preset", choices=sorted(presets),
                            help="start from these values instead of the defaults")
    said = comments(config_class)
    shapes = {bool: dict(nargs="?", const=True), tuple: dict(nargs="+")}
    for field in own_first(config_class):
        kind = type(field.default)
        help_ = f"{said.get(field.name, '')} [default {field.default!r}]".strip()
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS,
                            type={bool: parse_bool, tuple: str}.get(kind, kind),
                            metavar=field.name.upper(), help=help_.replace("%", "%%"),
                            **shapes.get(kind, {}))
    flags = vars(parser.parse_args(argv))
    values = dict((presets or {}).get(flags.pop("preset", None), {}))
    values |= {name: tuple(map(at_home, value)) if isinstance(value, list) else at_home(value)
               for name, value in flags.items()}
    return config_class(**values)


def at_home(value):
    """A path with the home folder in place of ~, which shells leave alone after `=`."""
    return os.path.expanduser(value) if isinstance(value, str) and value[:2] == "~/" else value


def own_first(config_class: type) -> list:
    """The fields of a config, those of its own class before those it inherits."""
    own = config_class.__dict__["__annotations__"]
    return sorted(fields(config_class), key=lambda field: field.name not in own)


def comments(config_class: type) -> dict[str, str]:
    """Field → the comment beside it in the source, of the classes it inherits from too."""
    found = {}
    for parent in reversed(config_class.__mro__[:-1]):
        found |= re.findall(r"^ +(\w+):.*?  # (.*)$", inspect.getsource(parent), re.MULTILINE)
    return found


def parse_bool(text: str) -> bool:
    """`true` or `false`, nothing else."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return text.lower() == "true"


def check_flags(config, limits: dict[str, tuple], needed: dict[str, str]) -> None:
    """Raise InputError unless low ≤ config.field ≤ high for each `field: (low, high)`, and unless
    each field of `needed` is given; there its text says what to name.

    Of several processes each needs a row of every batch, and a window of every text.
    """
    each, limits = parallel.world(), LIMITS | limits
    if getattr(config, "ptx_data", ()) and getattr(config, "ptx_coef", 1) > 0:
        limits["ptx_windows"] = (each, limits["ptx_windows"][1])
    limits["batch_size"] = (max(each, limits["batch_size"][0]), limits["batch_size"][1])
    for name, (low, high) in limits.items():
        if hasattr(config, name) and not low <= getattr(config, name) <= high:
            value = getattr(config, name)
            raise InputError(f"--{name} {value}: must lie between {low} and {high}")
    if hasattr(config, "minibatches"):
        most = config.batch_size // each
        if config.minibatches > most:
            raise InputError(f"--minibatches {config.minibatches}: must lie between 1 and {most}")
    for name, what in needed.items():
        if not getattr(config, name):
            raise InputError(f"--{name}: {what}")


def main(run, config_class: type, presets: dict[str, dict] | None = None) -> None:
    """Call `run(config)` from the command line; what the person can fix is one line."""
    for stream in (sys.stdout, sys.stderr):      # a Windows console's code page lacks our letters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    config = parse_args(config_class, presets=presets)
    try:
        with parallel.processes():
            run(config)
        parallel.leave()
    except InputError as error:
        if parallel.rank() > 0:     # rank 0 may have the same to say; torchrun ends us meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except OSError as error:
        if error.errno not in FULL:
            raise
        sys.exit(f"error: {error}; a disk that is full or a folder that may not be written to? "
                 f"Make room, or choose another --out")
    except (MemoryError, RuntimeError) as error:
        if parallel.world() > 1 and any(word in str(error) for word in LOST):    # gloo's and NCCL's
            sys.exit(f"error: another process of this run has ended ({first_line(error)}); its own "
                     f"message says why. To go on from the last checkpoint, run the same command "
                     f"with --resume")
        if not is_out_of_memory(error):
            raise
        flags = [flag for flag in ("micro_batch 1", "max_tokens 256", "lora_rank 8")
                 if hasattr(config, flag.split()[0])]
        remedy = " or ".join(f"--{flag}" for flag in flags) or "a smaller model"
        sys.exit(f"error: out of memory ({first_line(error)}); try {remedy}")
