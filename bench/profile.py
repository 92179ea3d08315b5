"""Where the time goes in the three pieces that are bound by one core's arithmetic or by memory, and
the least that this machine could need: Tinytown's shape, 0.86 M parameters, fp32.

    python -m bench.profile

A group's milliseconds are those inside its kernels, by PyTorch's profiler; the rest is what is left
of a step that was timed without it: other kernels, and the way to all of them. A floor is
floating-point operations at the rate of a 1,024 × 1,024 product, or bytes at the rate at which a
tensor of that size is summed. Moving and the rest have none: a compiler could fuse most of it.
"""
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from bench.compare import SIZES, emit, matmul_rate
from common.machine import keep_freed_memory
from common.run import adamw
from model import GPT, GPTConfig
from train_base import pretraining_loss

LAYERS, HEADS, WIDTH, VOCABULARY, CONTEXT = SIZES["0.86 M"]
ROWS, PROMPT, NEW = 64, 64, 64
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")
ATTENTION = ("aten::bmm", "aten::_softmax", "aten::_scaled_dot_product_flash_attention_for_cpu",
             "aten::_scaled_dot_product_flash_attention_for_cpu_backward")
MOVING = ("aten::copy_", "aten::cat", "aten::index", "aten::_index_put_impl_")


def seconds(run: Callable, rounds: int = 9) -> float:
    """Median of some calls, after two that warm up."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def kernels_of(run: Callable) -> dict[str, float]:
    """Seconds of one call inside each group's kernels."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    taken = {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}
    return {name: sum(taken.get(op, 0) for op in ops)
            for name, ops in (("products", PRODUCTS), ("attention", ATTENTION),
                              ("moving", MOVING))}


def reading_rate(size: float) -> float:
    """Bytes a second at which a tensor of that many bytes is summed, again and again."""
    x = torch.ones(int(size) // 4)
    return size / seconds(x.sum)


def report(piece: str, took: float, found: dict[str, float], floors: dict[str, float]) -> None:
    """A row for each group: milliseconds, floor."""
    for group, part in (found | {"rest": took - sum(found.values())}).items():
        emit({"profile": {"piece": piece, "ms": round(1e3 * took, 2), "group": group,
                          "group_ms": round(1e3 * part, 2),
                          "floor_ms": round(1e3 * floors[group], 2) if group in floors else None}})


def decoding(rate: float) -> None:
    """A step of generation, the reading of the prompts left out."""
    model = GPT(GPTConfig(CONTEXT, VOCABULARY, LAYERS, HEADS, WIDTH)).eval()
    prompts = torch.randint(1, 500, (ROWS, PROMPT)).tolist()

    def generate(count: int) -> None:
        model.generate(prompts, count, temperature=0.7)

    # All steps less the first one, which reads the prompts.
    whole, first = (seconds(lambda: generate(count)) for count in (NEW, 1))
    kernels, prompt = (kernels_of(lambda: generate(count)) for count in (NEW, 1))
    took = (whole - first) / (NEW - 1)
    found = {group: (kernels[group] - prompt[group]) / (NEW - 1) for group in kernels}
    weights = LAYERS * 12 * WIDTH ** 2 + VOCABULARY * WIDTH
    cache = 4 * 2 * LAYERS * ROWS * WIDTH * (PROMPT + NEW / 2)                # bytes, in the mean
    report(f"decoding step, {ROWS} rows, {PROMPT} to {PROMPT + NEW} tokens", took, found,
           {"products": 2 * ROWS * weights / rate, "attention": cache / reading_rate(cache)})


def training(rows: int, length: int, rate: float) -> None:
    """Forward, backward and AdamW."""
    model = GPT(GPTConfig(CONTEXT, VOCABULARY, LAYERS, HEADS, WIDTH))
    optimizer = adamw(model, 1e-4)
    tokens = torch.randint(0, 500, (rows, length))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False

    def step() -> None:
        pretraining_loss(model.loglikelihood(tokens, mask), mask).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    weights = LAYERS * 12 * WIDTH ** 2 + VOCABULARY * WIDTH
    # q·kᵀ and its product with v over the causal half: 2 forward, 5 backward
    attention = 7 * rows * LAYERS * WIDTH * length ** 2
    report(f"training step, {rows} × {length} tokens", seconds(step), kernels_of(step),
           {"products": 6 * rows * length * weights / rate, "attention": attention / rate})


def main() -> None:
    keep_freed_memory()                                     # as every script does
    torch.manual_seed(0)
    rate = matmul_rate()
    decoding(rate)
    training(16, 256, rate)
    training(64, 96, rate)                                  # PPO's 64 episodes of 64 + 32 tokens


if __name__ == "__main__":
    main()
