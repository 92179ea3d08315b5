"""Stage 3 without RL: direct preference optimisation (DPO) of the policy on preference pairs.

    h = [log π_θ(y_w|x) − log π_ref(y_w|x)] − [log π_θ(y_l|x) − log π_ref(y_l|x)]
    L(θ) = −E log σ(β h)                                                   → dpo_loss
    L(θ) = E (h − 1/(2β))², IPO: train(config, ipo_loss)                   → ipo_loss
    implicit reward  r̂(x, y) = β [log π_θ(y|x) − log π_ref(y|x)]

The best policy under a reward and a KL penalty is π*(y|x) ∝ π_ref(y|x) exp(r(x,y)/β). Solved for r
and put into the Bradley–Terry model, the unknown normaliser cancels between the two responses: no
reward model, no sampling.

A ranking gives all its C(K,2) pairs from one forward pass over its prompt and K responses
(→ ranking_dpo_loss), as in the reward model's loss. Differences from the paper: that, AdamW instead
of RMSprop, and batches that are the same in every epoch, in another order.

    python train_dpo.py --preset tinytown --init out/tinytown/sft \\
                        --data out/tinytown/rank/rankings.jsonl --out out/tinytown/dpo
    python train_dpo.py --init out/mine/sft --data FILE.json --out out/mine/dpo   # pairs
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.run import Flags, adamw, learning_rate, load_gpt, main, start
from data.batches import (RankingBatch, RankingRow, buckets, ranking_batch, ranking_batches,
                          ranking_splits)
from model import GPT
from train_rm import better_pairs


@dataclass(slots=True)
class Config(Flags):
    data: tuple = ()               # preference pairs or rankings; their margin is not used
    val: str = ""                  # held-out pairs or rankings; empty: every tenth row of data
    fold: int = 0                  # which tenth is held out, 0 to 9 (cross-validation)
    init: str = ""                 # SFT checkpoint: the start and, frozen, the reference
    out: str = "out/dpo"           # folder for the checkpoint and metrics
    beta: float = 0.1              # tie to the reference (paper: 0.1; 0.5 for TL;DR)
    label_smoothing: float = 0.0   # ε: share of preferences believed flipped (conservative DPO)
    epochs: int = 1
    lr: float = 1e-4               # peak; cosine to a tenth (paper: 5e-7 for billions of weights)
    warmup: int = 20               # steps (paper: 150)
    batch_size: int = 32           # pairs or rankings a step (paper: 64)
    max_tokens: int = 0            # longest row, prompt included; 0: the model's context
    lora_rank: int = 0             # low-rank adapters of this rank, merged at the end; 0: none
    weight_decay: float = 0.0
    eval_every: int = 0            # steps between held-out losses (best: out/best); 0: at the end


PRESETS = {
    "tinytown": dict(beta=0.15, lr=1e-4, batch_size=16),
    "cpu": dict(device="cpu", dtype="float32"),           # the others: an SFT model of GPT-2's size
    "gpt2": dict(device="cuda", dtype="bfloat16", lr=5e-6, batch_size=64, warmup=150,
                 micro_batch=16),
    "t4": dict(device="cuda", dtype="float16", lr=5e-6, batch_size=64, warmup=150, micro_batch=4),
    "mps": dict(device="mps", dtype="float32", lr=5e-6, batch_size=64, warmup=150, micro_batch=2)}
LIMITS = dict(beta=(1e-6, 100), label_smoothing=(0, 0.5), epochs=(1, 1000), fold=(0, 9))
NEEDED = dict(data="name one or more files of preference pairs or rankings",
              init="name the folder of an SFT checkpoint: the policy's start and its reference")


# ----------------------------------------------------------------------------- equations

def dpo_loss(policy_chosen_logprobs: Tensor, policy_rejected_logprobs: Tensor,
             ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor, beta: float,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """DPO (Rafailov et al., eq. 7), with conservative label smoothing ε:

        L = −(1 − ε) log σ(β h) − ε log σ(−β h),   h = (log π/π_ref)(y_w) − (log π/π_ref)(y_l)

    All four (B,): log-probability of a whole response, summed over its tokens, end token included,
    in nats; a mean would change h by a factor of the length. Returns (losses, chosen_rewards,
    rejected_rewards), (B,) each; the rewards are β·log(π/π_ref), detached. With policy = reference
    every loss is log 2, yet the gradient is not zero; β → 0 gives log 2 whatever the policy.
    """
    chosen_logratios = policy_chosen_logprobs - ref_chosen_logprobs         # (B,)
    rejected_logratios = policy_rejected_logprobs - ref_rejected_logprobs   # (B,)
    logits_diff = chosen_logratios - rejected_logratios                     # (B,)  h
    losses = (-(1 - label_smoothing) * F.logsigmoid(beta * logits_diff)
              - label_smoothing * F.logsigmoid(-beta * logits_diff))        # (B,)
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def ipo_loss(policy_chosen_logprobs: Tensor, policy_rejected_logprobs: Tensor,
             ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor, beta: float,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """IPO (Azar et al., eq. 17): L = (1 − ε)(h − 1/(2β))² + ε(h + 1/(2β))².

    Arguments and results as `dpo_loss`, h from sums over tokens too; β is the paper's τ. DPO drives
    h to infinity where one response always wins, whatever β; this pulls it to 1/(2β), and where a
    share q of the labels is flipped to (1 − 2q)/(2β).
    """
    chosen_logratios = policy_chosen_logprobs - ref_chosen_logprobs         # (B,)
    rejected_logratios = policy_rejected_logprobs - ref_rejected_logprobs   # (B,)
    logits_diff = chosen_logratios - rejected_logratios                     # (B,)  h
    target = 1 / (2 * beta)
    losses = ((1 - label_smoothing) * (logits_diff - target).square()
              + label_smoothing * (logits_diff + target).square())          # (B,)
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def ranking_dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor,
                     beta: float, label_smoothing: float = 0.0,
                     pair_loss: Callable = dpo_loss) -> tuple[Tensor, Tensor]:
    """DPO on all pairs of a ranking: mean of `dpo_loss` over a prompt's pairs, then over prompts.
    Scalar, nats. pair_loss: another function with the arguments and results of `dpo_loss`.

    logprobs, ref_logprobs (B, K): of whole responses. scores (B, K): of the labeler, higher =
    better; ties count for no pair. mask (B, K): 1 = a response. Without smoothing it is the reward
    model's `ranking_loss` of the implicit rewards β·log(π/π_ref); with K = 2 it is the mean of
    `dpo_loss`. Returns also the (4, P) numbers of the P pairs, for the log: log π and implicit
    reward of chosen and rejected.
    """
    prompt, chosen, rejected = better_pairs(scores, mask).nonzero(as_tuple=True)   # (P,)
    losses, chosen_rewards, rejected_rewards = pair_loss(
        logprobs[prompt, chosen], logprobs[prompt, rejected],
        ref_logprobs[prompt, chosen], ref_logprobs[prompt, rejected], beta, label_smoothing)
    weight = 1 / prompt.bincount()[prompt].to(losses.dtype)     # (P,) sums to 1 a prompt
    pairs = torch.stack([logprobs[prompt, chosen], logprobs[prompt, rejected],
                         chosen_rewards, rejected_rewards]).detach()                # (4, P)
    return (weight * losses).sum() / weight.sum().clamp(min=1), pairs


def pair_sums(pairs: Tensor) -> dict[str, tuple[float, int]]:
    """What the log shows of (4, P) numbers, as sums over pairs and their count: how often and by
    how much the chosen response has the higher implicit reward."""
    lead = pairs[2] - pairs[3]                                              # (P,)
    right = (lead > 0).sum() + 0.5 * (lead == 0).sum()                     # ties count half
    names = ("chosen_logprob", "rejected_logprob", "chosen_reward", "rejected_reward")
    sums = {"accuracy": right, "margin": lead.sum()} | dict(zip(names, pairs.sum(1)))
    return {name: (total.item(), len(lead)) for name, total in sums.items()}


# ----------------------------------------------------------------------------- training

def response_logprobs(model: GPT, batch: RankingBatch) -> Tensor:
    """log π(y|x) of whole responses, (B, K): log-probabilities summed over their tokens; 0 where
    there is no response."""
    logprobs, _ = model.logprobs(
        batch.tokens, batch.response_mask, positions=batch.positions,
        attention_mask=batch.attention_mask)                                # (R, T)
    return batch.sums(logprobs)


@torch.no_grad()
def set_reference(model: GPT, rows: list[RankingRow], pad: int, device) -> None:
    """Store log π_ref of every response in its row; training reads it from there."""
    logprobs = response_logprobs(model, ranking_batch(rows, pad, device))   # (B, K)
    for row, values in zip(rows, logprobs.tolist()):
        row.ref_logprobs = values[:len(row.responses)]


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[RankingBatch], beta: float,
             pair_loss: Callable = dpo_loss) -> dict[str, float]:
    """Loss and the means of `pair_sums` over held-out rankings."""
    total, prompts, found = 0.0, 0, []
    for x in batches:
        logprobs = response_logprobs(model, x)                              # (B, K)
        loss, pairs = ranking_dpo_loss(logprobs, x.ref_logprobs, x.scores, x.mask, beta,
                                       pair_loss=pair_loss)
        total, prompts = total + loss.item() * x.untied, prompts + x.untied
        found.append(pair_sums(pairs))
    sums = {name: [sum(column) for column in zip(*(part[name] for part in found))]
            for name in found[0]}
    means = {name: value / max(1, count) for name, (value, count) in sums.items()}
    return {"loss": total / prompts} | means


def check_start(logprobs: Tensor, ref_logprobs: Tensor) -> None:
    """RuntimeError if policy and reference differ before the first step: h would not start at 0."""
    error = (logprobs.detach() - ref_logprobs).abs().max()
    if not error <= 1e-2:
        raise RuntimeError(f"at the first step log π is off log π_ref by {error:.2g}: policy and "
                           f"reference differ")


def train(config: Config, pair_loss: Callable = dpo_loss) -> dict:
    """Train on pairs or rankings and save the policy. Returns the held-out metrics."""
    run = start(config, LIMITS, NEEDED)
    policy, tokenizer = load_gpt(config.init)   # no dropout: log-ratios would be noisy
    policy, pad, context = run.train(policy), tokenizer.pad, policy.config.block_size
    rows, held_out = ranking_splits(config.data, config.val, tokenizer, context,
                                    config.fold, config.max_tokens)
    held_out.sort(key=lambda row: len(row.ids))
    batches = buckets(rows, config.batch_size, 1, run.draw, run.dealt)
    plan = [batch for _ in range(config.epochs)
            for batch in run.draw.sample(batches, len(batches))]
    # π_ref, once and up front. The first step's passes repeat these, so that h starts at 0.
    parts = [part for batch in batches for part in run.passes(batch)]
    for part in parts + [held_out[i:i + 32] for i in range(0, len(held_out), 32)]:
        set_reference(policy, part, pad, run.device)
    optimizer = adamw(policy, config.lr, weight_decay=config.weight_decay)
    run.expect([[row.shape for row in batch] for batch in plan])

    for step, batch in run.steps(plan, tokenizer, model=policy, optimizer=optimizer):
        prompts = max(1, sum(row.untied for row in batch))   # rankings that hold a pair
        for part in run.passes(batch):
            x = ranking_batch(part, pad, run.device)
            logprobs = response_logprobs(policy, x)                         # (B, K)
            loss, pairs = ranking_dpo_loss(logprobs, x.ref_logprobs, x.scores, x.mask,
                                           config.beta, config.label_smoothing, pair_loss)
            if step == 0:
                check_start(logprobs, x.ref_logprobs)
            run.backward(loss, weight=x.untied / prompts, loss=loss, **pair_sums(pairs))
        lr = learning_rate(step, len(plan), config.lr, config.warmup)
        run.update({optimizer: lr}, batch)
        if run.due(config.eval_every):
            batches = ranking_batches(held_out, pad, run.device)
            found = evaluate(policy, batches, config.beta, pair_loss)
            run.best(policy, found["loss"], **found)

    batches = ranking_batches(held_out, pad, run.device)
    return run.finish(policy, **evaluate(policy, batches, config.beta, pair_loss))


if __name__ == "__main__":
    main(train, Config, PRESETS)
