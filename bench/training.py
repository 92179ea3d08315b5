"""One training step: forward, backward, AdamW, on full windows of text, against `transformers`.

    python -m bench.training [--size "0.86 M"]
"""
import argparse
import statistics
from functools import partial

import torch

from bench.compare import SIZES, emit, interleave, matmul_rate, row, training_flops
from bench.generation import ours, theirs
from common.run import adamw
from train_base import pretraining_loss

SHAPE = {"0.86 M": (16, 256), "30 M": (8, 256), "124 M": (4, 256)}          # rows, tokens a row
STEPS = {"0.86 M": 4, "30 M": 1, "124 M": 1}                                # a run
ROUNDS = {"0.86 M": 9, "30 M": 5, "124 M": 5}
BARS = {"0.86 M": (1.35, 1.6), "124 M": (1.25, 1.5)}


def main(sizes: list[str]) -> None:
    torch.manual_seed(0)
    for size in sizes:
        rows, length = SHAPE[size]
        tokens = torch.randint(0, 500, (rows, length))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, 0] = False
        model, model_compiled = ours(size).train(), ours(size).train()
        peer, compiled = theirs(size).train(), theirs(size).train()
        # As train_base.py --compile true.
        model_compiled.hidden = torch.compile(model_compiled.hidden)
        compiled.compile()
        peer_optimizer = torch.optim.AdamW(peer.parameters(), 1e-4, weight_decay=0.1)
        fused = torch.optim.AdamW(compiled.parameters(), 1e-4, weight_decay=0.1, fused=True)

        def step(network, its_optimizer):
            for _ in range(STEPS[size]):
                pretraining_loss(network.loglikelihood(tokens, mask), mask).backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                its_optimizer.step()
                its_optimizer.zero_grad(set_to_none=True)

        def peer_step(network, its_optimizer):
            for _ in range(STEPS[size]):
                network(input_ids=tokens, labels=tokens).loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                its_optimizer.step()
                its_optimizer.zero_grad(set_to_none=True)

        seconds = interleave({
            "ours": partial(step, model, adamw(model, 1e-4)),
            "ours, compiled": partial(step, model_compiled, adamw(model_compiled, 1e-4)),
            "eager": partial(peer_step, peer, peer_optimizer),
            "compiled": partial(peer_step, compiled, fused)}, ROUNDS[size])
        work = rows * length * STEPS[size]
        peak = matmul_rate()
        share = training_flops(size, work, length) / statistics.median(seconds["ours"]) / peak
        note = f"{share:.0%} of this machine's {peak / 1e9:.0f} GFLOP/s in a matrix product"
        emit(row(f"training step {size}, {rows} × {length}, fp32 both", "transformers, eager",
                 seconds["ours"], seconds["eager"], work, "tokens/s",
                 *BARS.get(size, (None, None)), note))
        best = min(("ours", "ours, compiled"), key=lambda name: sum(seconds[name]))
        emit(row(f"training step {size}, each at its best (fp32 here)",
                 "transformers, compiled, fused AdamW", seconds[best], seconds["compiled"], work,
                 "tokens/s", 1.0, 1.3, f"the faster of ours with and without --compile: {best}"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), action="append")
    main(parser.parse_args().size or list(SIZES))
