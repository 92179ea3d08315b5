"""How the time of a training step grows with model size, tokens a row, rows and K; and its peak
memory.

    python -m bench.scaling                        every case, each in a process of its own
    python -m bench.scaling --one '{"size": "0.86 M", "rows": 16, "length": 256}'   one of them
"""
import argparse
import json
import random
import statistics
import subprocess
import sys
import time

import torch

from bench.compare import SIZES, emit, matmul_rate, training_flops
from bench.kernel import resident
from common.run import adamw
from data.batches import RankingRow, ranking_batch
from model import GPT, GPTConfig, RewardModel
from train_base import pretraining_loss
from train_rm import ranking_loss, ranking_rewards

BASE = dict(size="0.86 M", rows=16, length=128)
CASES = ([dict(BASE)] + [dict(BASE, size="30 M", rows=4)] + [dict(BASE, size="124 M", rows=4)]
         + [dict(BASE, length=length) for length in (32, 64, 256, 512, 1024)]
         + [dict(BASE, rows=rows) for rows in (1, 4, 64)]
         + [dict(BASE, K=K, rows=4) for K in (2, 4, 9)])


def windows(rows: int, length: int):
    """(loss of a language model on random windows, their tokens)."""
    tokens = torch.randint(0, 500, (rows, length))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False

    def loss(model: GPT) -> torch.Tensor:
        return pretraining_loss(model.loglikelihood(tokens, mask), mask)
    return loss, tokens.numel()


def rankings(rows: int, length: int, K: int):
    """(loss of a reward model on random rankings, their tokens). Half of `length` is the prompt,
    the other half each response."""
    draw = random.Random(0)

    def half() -> list[int]:
        return [draw.randrange(500) for _ in range(length // 2)]

    scores = [float(k) for k in range(K)]
    batch = ranking_batch([RankingRow(half(), [half() for _ in range(K)], scores)
                           for _ in range(rows)], pad=0)

    def loss(model: RewardModel) -> torch.Tensor:
        return ranking_loss(ranking_rewards(model, batch), batch.scores, batch.mask)
    return loss, batch.tokens.numel()


def one(case: dict) -> None:
    """Print seconds, tokens a second, share of the machine's matrix product, and MiB of the
    process."""
    torch.manual_seed(0)
    layers, heads, width, vocabulary, context = SIZES[case["size"]]
    K, rows, length = case.get("K", 0), case["rows"], case["length"]
    model = GPT(GPTConfig(max(context, length), vocabulary, layers, heads, width))
    if K:
        model = RewardModel(model)
        loss, tokens = rankings(rows, length, K)
    else:
        loss, tokens = windows(rows, length)
    optimizer = adamw(model, 1e-4)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])                      # the first two warm up
    share = None
    if not K:
        share = training_flops(case["size"], tokens, length) / seconds / matmul_rate()
        share = round(share, 3)
    print(json.dumps({**case, "tokens": tokens, "seconds": round(seconds, 4),
                      "tokens_per_second": round(tokens / seconds), "flop_utilisation": share,
                      "peak_MiB": round(resident("VmHWM"))}))


def growth_plot(pyplot, cases: list[dict]):
    """Cost of a token over context and over rows, and of a ranking over K."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.8),
                                                    constrained_layout=True)
    for axis, name, title in ((left, "length", "tokens a row, 16 rows"),
                              (middle, "rows", "rows of 128 tokens")):
        other = "rows" if name == "length" else "length"
        points = sorted((case[name], 1e6 * case["seconds"] / case["tokens"]) for case in cases
                        if case["size"] == BASE["size"] and not case.get("K")
                        and case[other] == BASE[other])
        axis.plot(*zip(*points), marker="o")
        axis.set(title="a training step, 0.86 M, per token", xlabel=title, ylabel="µs a token",
                 xscale="log", ylim=(0, None))
        axis.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
    cost = {case["K"]: 1e3 * case["seconds"] / case["rows"] for case in cases if case.get("K")}
    right.plot(*zip(*sorted(cost.items())), marker="o", label="in one row")
    pair = cost[min(cost)]                            # K = 2: one pair
    Ks = range(min(cost), max(cost) + 1)
    right.plot(Ks, [pair * K * (K - 1) / 2 for K in Ks], linestyle="--",
               label="as K(K − 1)/2 pairs, each as long as the one at K = 2")
    right.set(title="the reward model, per ranking", xlabel="K", ylabel="ms", ylim=(0, None))
    right.legend(fontsize=8)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    return figure


def main() -> None:
    for case in CASES:
        done = subprocess.run([sys.executable, "-m", "bench.scaling", "--one", json.dumps(case)],
                              stdout=subprocess.PIPE, text=True, check=True)
        line = done.stdout.strip().splitlines()[-1]
        print(line, file=sys.stderr)
        emit({"scaling": json.loads(line)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=json.loads)
    case = parser.parse_args().one
    one(case) if case else main()
