"""RRHF: rank responses by their mean log-probability, and imitate the best one.

    p_i = log π(y_i|x) / |y_i|
    L = Σ_{r_i < r_j} max(0, p_i − p_j) − w · log π(y_best|x)              → rrhf_loss

No reference, no reward model at training time: the scores may come from anywhere. The hinge has no
margin, which noise exploits. Let a share q of the labels be flipped and d = p_better − p_worse:

    (1 − q) max(0, −d) + q max(0, d)    is smallest at d = 0, for every q > 0:

noisy labels pull all responses to one and the same mean log-probability. (With a margin δ the
minimum is at d = δ for q < ½.) So use it with a scorer that does not contradict itself.

Differences from the paper: rankings of people too; the loss is a mean over rankings, each a sum
over its pairs: 36 of nine responses, 6 of four. Its code divides the SFT term by the padded length;
here it is the sum that the paper writes.

    python -m systems.rrhf --run out/tinytown
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from common.run import Flags, adamw, learning_rate, load_gpt, main, start
from data.batches import buckets, ranking_batch, read_untied
from systems.table import measured
from train_dpo import response_logprobs
from train_rm import better_pairs


@dataclass(slots=True)
class Config(Flags):
    run: str = "out/tinytown"      # Tinytown run in which it is measured
    data: tuple = ()               # rankings; empty: rank/some.jsonl inside run
    init: str = ""                 # SFT checkpoint; empty: sft inside run
    out: str = ""                  # empty: systems/rrhf inside run
    sft_coef: float = 1.0          # w, weight of the best response's likelihood (paper: 1)
    epochs: int = 1                # paper: 3
    lr: float = 1e-4               # peak; cosine to a tenth (paper: 2e-5 for 7 B parameters)
    warmup: int = 20               # steps
    batch_size: int = 16           # rankings a step
    max_tokens: int = 0            # longest row, prompt included; 0: the model's context


LIMITS = dict(sft_coef=(0, 1000), epochs=(1, 1000))


def rrhf_loss(logprobs: Tensor, lengths: Tensor, scores: Tensor,
              mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RRHF (Yuan et al. 2023, eq. 2 and 4): (rank, sft), (B,) each, with p = logprobs/lengths,

        rank = Σ_{r_i < r_j} max(0, p_i − p_j)        sft = −logprobs of the best response

    logprobs, lengths, scores (B, K): sums over response tokens in nats, tokens (end token
    included), scores with higher = better. mask (B, K): 1 = a response; None: all are. Ties are no
    pair; of several best ones the first is imitated. A row without a response gives 0 and 0.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    logprobs = torch.where(mask, logprobs, 0.0)                             # (B, K)
    p = logprobs / torch.where(mask, lengths, 1)                            # (B, K)
    gaps = p[:, None, :] - p[:, :, None]                                    # (B, K, K)  p_j − p_i
    rank = torch.where(better_pairs(scores, mask), gaps.clamp(min=0), 0.0).sum((1, 2))
    best = torch.where(mask, scores, -torch.inf).argmax(1, keepdim=True)    # (B, 1)
    return rank, -logprobs.gather(1, best).squeeze(1)                       # (B,) each


def train(config: Config) -> dict:
    """Train on rankings and save the policy. Returns means over the last tenth of the steps."""
    run = start(config, LIMITS)
    policy, tokenizer = load_gpt(config.init)
    policy, context = run.train(policy), policy.config.block_size
    rows = read_untied(config.data, tokenizer, context, config.max_tokens)
    plan = buckets(rows, config.batch_size, config.epochs, run.draw, run.dealt)
    optimizer = adamw(policy, config.lr, weight_decay=0.0)

    for step, batch in run.steps(plan, tokenizer, model=policy, optimizer=optimizer):
        for part in run.passes(batch):
            x = ranking_batch(part, tokenizer.pad, run.device)
            logprobs = response_logprobs(policy, x)                         # (B, K)
            rank, sft = rrhf_loss(logprobs, x.lengths, x.scores, x.mask)    # (B,) each
            loss = (rank + config.sft_coef * sft).mean()
            run.backward(loss, weight=len(part) / len(batch), rank_loss=rank.mean(),
                         sft_loss=sft.mean())
        lr = learning_rate(step, len(plan), config.lr, config.warmup)
        run.update({optimizer: lr}, batch)

    return run.finish(policy)


if __name__ == "__main__":
    main(lambda config: measured(train, config, "rrhf"), Config)
