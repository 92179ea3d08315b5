"""SLiC-HF: calibrate sequence likelihoods on preferences, without a reference model.

    L = max(0, δ − log π(y_w|x) + log π(y_l|x)) − λ log π(y*|x)            → slic_loss

The first term wants the better response δ nats above the worse one; the second, the regularisation,
keeps a target y* likely: here the best response of the ranking. With λ = 0 only differences count:
all responses of a ranking may become unlikely together, and probability goes to text that no
ranking holds, longer, often without an end. (RSO's authors saw little of λ, from 0 to 500.)

Differences from the paper: all C(K,2) pairs of a ranking in one step; its regularisation target is
a demonstration or the best candidate, ours the latter.

    python -m systems.slic --run out/tinytown --lam 0.3
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
    out: str = ""                  # empty: systems/slic inside run
    delta: float = 1.0             # δ, nats (paper: 1)
    lam: float = 0.3               # λ, weight of the target's likelihood
    epochs: int = 1
    lr: float = 1e-4               # peak; cosine to a tenth
    warmup: int = 20               # steps
    batch_size: int = 16           # rankings a step
    max_tokens: int = 0            # longest row, prompt included; 0: the model's context


LIMITS = dict(delta=(0, 1000), lam=(0, 1000), epochs=(1, 1000))


def slic_loss(chosen_logprobs: Tensor, rejected_logprobs: Tensor, target_logprobs: Tensor,
              delta: float = 1.0, lam: float = 0.5) -> Tensor:
    """SLiC-HF (Zhao et al. 2023, eq. 4): max(0, δ − log π(y_w) + log π(y_l)) − λ log π(y*). (B,)

    All three (B,): log-probabilities of whole responses, summed over tokens, end token included,
    in nats. A pair that is δ apart has no gradient of the first term. There is no reference: the
    loss does not notice how far the policy moves, only λ does.
    """
    hinge = F.relu(delta - chosen_logprobs + rejected_logprobs)             # (B,)
    return hinge - lam * target_logprobs


def ranking_slic_loss(logprobs: Tensor, scores: Tensor, mask: Tensor, delta: float,
                      lam: float) -> Tensor:
    """Mean of `slic_loss` over a ranking's pairs, then over rankings. Scalar.

    logprobs, scores, mask (B, K) as in `ranking_dpo_loss`. The target is the ranking's best
    response, the first among equals; a ranking without a pair counts for nothing.
    """
    prompt, chosen, rejected = better_pairs(scores, mask).nonzero(as_tuple=True)    # (P,)
    best = torch.where(mask.bool(), scores, -torch.inf).argmax(1)                   # (B,)
    losses = slic_loss(logprobs[prompt, chosen], logprobs[prompt, rejected],
                       logprobs[prompt, best[prompt]], delta, lam)                  # (P,)
    weight = 1 / prompt.bincount()[prompt].to(losses.dtype)     # (P,) sums to 1 a ranking
    return (weight * losses).sum() / weight.sum().clamp(min=1)


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
            loss = ranking_slic_loss(logprobs, x.scores, x.mask, config.delta, config.lam)
            run.backward(loss, weight=x.untied / len(batch), loss=loss)
        lr = learning_rate(step, len(plan), config.lr, config.warmup)
        run.update({optimizer: lr}, batch)

    return run.finish(policy)


if __name__ == "__main__":
    main(lambda config: measured(train, config, "slic"), Config)
