"""How the time of a training step grows with model size, tokens a row, rows and K, and its peak memory.

    python -m bench.scaling
    python -m bench.scaling --one '{"size": "0.86 M", "rows": 16, "length": 256}'       one case in this process
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
from common import adamw
from data.batches import ranking_batch
from data.readers import Ranking
from model import GPT, GPTConfig, RewardModel
from train_base import pretraining_loss
from train_rm import ranking_loss, ranking_rewards

BASE = dict(size="0.86 M", rows=16, length=128)
CASES = ([dict(BASE)] + [dict(BASE, size="30 M", rows=4)] + [dict(BASE, size="124 M", rows=4)]
         + [dict(BASE, length=length) for length in (32, 64, 256)] + [dict(BASE, rows=rows) for rows in (1, 4, 64)]
         + [dict(BASE, K=K, rows=4) for K in (2, 4, 9)])


def one(case: dict) -> None:
    """Print seconds, tokens a second, share of the machine's matrix product, and MiB of the whole process."""
    torch.manual_seed(0)
    layers, heads, width, vocabulary, context = SIZES[case["size"]]
    model = GPT(GPTConfig(context, vocabulary, layers, heads, width))
    K, rows, length = case.get("K", 0), case["rows"], case["length"]
    if K:                                          # prompt: half of `length`; each response: the other half
        draw = random.Random(0)
        tokens = lambda n: [draw.randrange(500) for _ in range(n)]                       # noqa: E731
        rankings = [Ranking([], [""] * K, [float(k) for k in range(K)]) for _ in range(rows)]
        batch = ranking_batch(rankings, [(tokens(length // 2), [tokens(length // 2) for _ in range(K)]) for _ in range(rows)], 0)
        model = RewardModel(model)
        loss = lambda: ranking_loss(ranking_rewards(model, batch), batch.scores, batch.mask)          # noqa: E731
        count = batch.tokens.numel()
    else:
        text = torch.randint(0, 500, (rows, length))
        mask = torch.ones_like(text, dtype=torch.bool)
        mask[:, 0] = False
        loss = lambda: pretraining_loss(model.logprobs(text, mask, equal_weights=True)[0], mask)                          # noqa: E731
        count = text.numel()
    optimizer = adamw(model, 1e-4)
    times = []
    while len(times) < 7:
        start = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    share = None if K else round(training_flops(case["size"], count, length) / seconds / matmul_rate(), 3)
    print(json.dumps({**case, "tokens": count, "seconds": round(seconds, 4), "tokens_per_second": round(count / seconds),
                      "flop_utilisation": share, "peak_MiB": round(resident("VmHWM"))}))


def main() -> None:
    for case in CASES:
        line = subprocess.run([sys.executable, "-m", "bench.scaling", "--one", json.dumps(case)], capture_output=True, text=True,
                              check=True).stdout.strip().splitlines()[-1]
        print(line, file=sys.stderr)
        emit({"scaling": json.loads(line)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=json.loads)
    case = parser.parse_args().one
    one(case) if case else main()
