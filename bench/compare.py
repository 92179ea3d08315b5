"""What every comparison shares: contestants in turn, medians, the machine, one row of figures per
comparison."""
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata

import torch

SIZES = {"0.86 M": (4, 4, 128, 512, 256),            # layers, heads, width, vocabulary, context
         "30 M": (6, 6, 384, 50304, 512),
         "124 M": (12, 12, 768, 50304, 1024)}


def interleave(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round. A contestant that returns a float has timed itself.

    All run once unmeasured, then in turn, and every other round reverses the order, so that a
    machine that slows down slows all of them.
    """
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds):
        for name in list(contestants)[::1 if round_ % 2 == 0 else -1]:
            start = time.perf_counter()
            took = contestants[name]()
            seconds[name].append(took if isinstance(took, float) else time.perf_counter() - start)
        print(f"round {round_ + 1}: " + ", ".join(
            f"{name} {times[-1]:.3g} s" for name, times in seconds.items()), file=sys.stderr)
    return seconds


def row(piece: str, peer: str, ours: list[float], theirs: list[float], amount: float, unit: str,
        bar: float | None = None, aim: float | None = None, note: str = "") -> dict:
    """One line of the table: how many times faster than the peer, by pairs of one round.

    amount: units of work a run.
    """
    ratios = [b / a for a, b in zip(ours, theirs)]
    return {"piece": piece, "against": peer, "ratio": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)], "rounds": len(ratios),
            "bar": bar, "aim": aim, "ours": round(amount / statistics.median(ours), 2),
            "theirs": round(amount / statistics.median(theirs), 2), "unit": unit, "note": note}


def missing(piece: str, peer: str, why: str, bar: float | None = None,
            aim: float | None = None) -> dict:
    """A line that could not be measured here."""
    return {"piece": piece, "against": peer, "ratio": None, "bar": bar, "aim": aim,
            "note": f"not measured: {why}"}


def emit(*rows: dict) -> None:
    """Print rows as JSON lines, for `bench.run` to collect."""
    for line in rows:
        print(json.dumps(line), flush=True)


def has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware; where it does not, PyTorch emulates it a hundred
    times slower than fp32."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def matmul_rate(size: int = 1024, rounds: int = 10) -> float:
    """Floating-point operations a second of a square fp32 matrix product.

    The best of several rounds: what the machine can do.
    """
    a, b = torch.randn(2, size, size)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(times)


def training_flops(size: str, tokens: int, context: int) -> float:
    """Floating-point operations of forward and backward.

    6 for each matmul weight (the tied head once) and token, and 12·L·C·T a token for attention's
    two products of the whole context.
    """
    layers, _, width, vocabulary, _ = SIZES[size]
    weights = layers * 12 * width ** 2 + vocabulary * width
    return tokens * (6 * weights + 12 * layers * width * context)


def machine() -> dict:
    """Processor, threads and versions."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file
                        if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {}
    for package in ("torch", "transformers", "trl", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"cpu": name, "capability": torch.backends.cpu.get_cpu_capability(), "bf16": has_bf16(),
            "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}
