"""PRO, preference ranking optimisation: the Plackett–Luce likelihood of a whole ranking, and the
best response's likelihood.

    s_i = log π(y_i|x) / |y_i|,   responses sorted best first
    L = −Σ_{k<n} log [ exp(s_k/T_k^k) / Σ_{i≥k} exp(s_i/T_k^i) ]     → pro_loss, plackett_luce_loss
        − w · log π(y_best|x)
    1/T_k^i = r_k − r_i for i > k,   1/T_k^k = max_{i>k} (r_k − r_i)

Each factor asks: of what is left, which is best? Bradley–Terry is the case of two. The temperatures
weigh a comparison by the difference of the scores, so scores must mean something: places of a
ranking are equally far apart.

Differences from the paper: its weight w is 0.05 (n − 1)²; the ranking's own places serve as scores
where there is no reward model.

    python -m systems.pro --run out/tinytown
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
    out: str = ""                  # empty: systems/pro inside run
    sft_coef: float = 0.5          # w, of the best response's log-probability
    epochs: int = 1
    lr: float = 1e-4               # peak; cosine to a tenth
    warmup: int = 20               # steps
    batch_size: int = 16           # rankings a step
    max_tokens: int = 0            # longest row, prompt included; 0: the model's context


LIMITS = dict(sft_coef=(0, 1000), epochs=(1, 1000))


def pro_loss(logprobs: Tensor, lengths: Tensor, scores: Tensor,
             mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """PRO (Song et al. 2023, eq. 7 to 9): (rank, sft), (B,) each; formulas above.

    logprobs, lengths, scores (B, K): sums over response tokens in nats, tokens (end token
    included), scores with higher = better, in any order. mask (B, K): 1 = a response; None: all
    are. Equal scores are not compared; a response than which none is worse has no factor. Of
    several best ones the first is imitated.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    logprobs = torch.where(mask, logprobs, 0.0)                             # (B, K)
    s = logprobs / torch.where(mask, lengths, 1)                            # (B, K)
    worse = better_pairs(scores, mask)                                      # (B, k, i)
    rates = torch.where(worse, scores[:, :, None] - scores[:, None, :], 0.0)    # (B, k, i)  1/T
    rank = plackett_luce_loss(s, rates, worse)                              # (B,)
    best = torch.where(mask, scores, -torch.inf).argmax(1, keepdim=True)    # (B, 1)
    return rank, -logprobs.gather(1, best).squeeze(1)                       # (B,) each


def plackett_luce_loss(s: Tensor, rates: Tensor, worse: Tensor) -> Tensor:
    """−Σ_k log [ exp(s_k/T_k^k) / (exp(s_k/T_k^k) + Σ_{i worse than k} exp(s_i/T_k^i)) ]. (B,)

    s (B, K), in any order. rates (B, K, K): 1/T_k^i; 1/T_k^k is their maximum over i. worse
    (B, K, K): 1 where i is worse than k. With rates of 1 this is −log of Plackett and Luce's
    probability of the order, which over all K! orders sums to 1.
    """
    own = torch.where(worse, rates, 0.0).amax(2)                            # (B, K)  1/T_k^k
    rivals = (rates * s[:, None, :]).masked_fill(~worse, -torch.inf)        # (B, k, i)
    left = torch.cat([(own * s)[:, :, None], rivals], dim=2)                # (B, k, 1 + i)
    factors = left.logsumexp(2) - own * s                                   # (B, K)
    return torch.where(worse.any(2), factors, 0.0).sum(1)


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
            rank, sft = pro_loss(logprobs, x.lengths, x.scores, x.mask)     # (B,) each
            loss = (rank + config.sft_coef * sft).mean()
            run.backward(loss, weight=len(part) / len(batch), rank_loss=rank.mean(),
                         sft_loss=sft.mean())
        lr = learning_rate(step, len(plan), config.lr, config.warmup)
        run.update({optimizer: lr}, batch)

    return run.finish(policy)


if __name__ == "__main__":
    main(lambda config: measured(train, config, "pro"), Config)
