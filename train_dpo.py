"""Stage 3 without RL: direct preference optimisation (DPO) of the policy on preference pairs.

    h = [log π_θ(y_w|x) − log π_ref(y_w|x)] − [log π_θ(y_l|x) − log π_ref(y_l|x)]
    L(θ) = −E log σ(β h)                                                          → dpo_loss
    implicit reward  r̂(x, y) = β [log π_θ(y|x) − log π_ref(y|x)]

The best policy under a reward and a KL penalty is π*(y|x) ∝ π_ref(y|x) exp(r(x,y)/β). Solved for r and put into the
Bradley–Terry model, the unknown normaliser cancels between the two responses: no reward model, no sampling.

Differences from the paper: AdamW instead of RMSprop; rankings of K > 2 responses give several pairs each.

    python train_dpo.py --preset tinytown --init out/tinytown/sft --data out/tinytown/data/rankings.jsonl --out out/tinytown/dpo
    python train_dpo.py --init out/mine/sft --data FILE.json --out out/mine/dpo       # prompt, chosen, rejected
"""
import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common import InputError, Log, adamw, check_range, learning_rate, main, optimizer_step, save_checkpoint, setup
from data.batches import Row, buckets, pad_rows, ranking_rows
from data.readers import Ranking, read_rankings
from data.tokenizer import Tokenizer
from model import GPT, load_gpt

Pair = tuple[Row, Row]             # chosen, rejected: the prompt and one response each


@dataclass(slots=True)
class Config:
    data: tuple = ()               # preference pairs or rankings
    val: str = ""                  # held-out pairs or rankings; empty: every tenth row of data
    init: str = ""                 # SFT checkpoint: the start and, frozen, the reference
    out: str = "out/dpo"           # folder for the checkpoint and metrics
    beta: float = 0.1              # strength of the tie to the reference (paper: 0.1; 0.5 for TL;DR)
    label_smoothing: float = 0.0   # ε: share of preferences believed flipped (conservative DPO)
    pairs_per_ranking: int = 1     # most pairs taken from one ranking, drawn at random among those not tied
    epochs: int = 1
    lr: float = 1e-4               # peak; cosine to a tenth (paper: 5e-7 for billions of parameters)
    warmup: int = 20               # steps (paper: 150)
    batch_size: int = 32           # pairs a step (paper: 64)
    micro_batch: int = 0           # pairs a forward pass; 0: all of the step's at once
    weight_decay: float = 0.0
    max_norm: float = 1.0          # gradient clipping (paper: 10)
    seed: int = 1
    device: str = "auto"           # auto, cpu, cuda, …
    dtype: str = "auto"            # auto, float32, bfloat16


PRESETS = {"tinytown": dict(beta=0.4, lr=2e-4, batch_size=32, pairs_per_ranking=3)}


def dpo_loss(policy_chosen_logprobs: Tensor, policy_rejected_logprobs: Tensor, ref_chosen_logprobs: Tensor,
             ref_rejected_logprobs: Tensor, beta: float, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """DPO (Rafailov et al., eq. 7), with conservative label smoothing ε:

        L = −(1 − ε) log σ(β h) − ε log σ(−β h),   h = (log π/π_ref)(y_w) − (log π/π_ref)(y_l)

    All four (B,): log-probability of a whole response, summed over its tokens, end token included, in nats; a mean
    would change h by a factor of the length. Returns (losses, chosen_rewards, rejected_rewards), (B,) each; the rewards
    are β·log(π/π_ref), detached. With policy = reference every loss is log 2, yet the gradient is not zero; β → 0
    gives log 2 whatever the policy.
    """
    chosen_logratios = policy_chosen_logprobs - ref_chosen_logprobs                         # (B,)
    rejected_logratios = policy_rejected_logprobs - ref_rejected_logprobs                   # (B,)
    logits_diff = chosen_logratios - rejected_logratios                                     # (B,)  h
    losses = (-(1 - label_smoothing) * F.logsigmoid(beta * logits_diff)
              - label_smoothing * F.logsigmoid(-beta * logits_diff))                        # (B,)
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def pairs_of(rankings: list[Ranking], rows: list[list[Row]], most: int, draw: random.Random) -> list[Pair]:
    """Up to `most` (chosen, rejected) pairs of each ranking, drawn at random among those that are not tied."""
    pairs = []
    for ranking, parts in zip(rankings, rows):
        s = ranking.scores
        untied = [(i, j) for i in range(len(s)) for j in range(len(s)) if s[i] > s[j]]
        pairs += [(parts[i], parts[j]) for i, j in draw.sample(untied, min(most, len(untied)))]
    return pairs


def read_pairs(config: Config, tokenizer: Tokenizer, limit: int, draw: random.Random) -> tuple[list[Pair], list[Pair]]:
    """(pairs to train on, pairs held out): of config.data and config.val, or with every tenth row of data held out."""
    rankings, rows = ranking_rows(read_rankings(*config.data), tokenizer, limit)
    if config.val:
        val_pairs = pairs_of(*ranking_rows(read_rankings(config.val), tokenizer, limit), config.pairs_per_ranking, draw)
    else:
        val_pairs = pairs_of(rankings[::10], rows[::10], config.pairs_per_ranking, draw)
        keep = [i for i in range(len(rows)) if i % 10 or len(rows) == 1]
        rankings, rows = [rankings[i] for i in keep], [rows[i] for i in keep]
    pairs = pairs_of(rankings, rows, config.pairs_per_ranking, draw)
    if not pairs or not val_pairs:
        raise InputError("no untied pair to train on or to hold out: every ranking is tied, or there is only one row")
    return pairs, val_pairs


def pair_logprobs(model: GPT, pairs: list[Pair], pad: int, device) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) log-probabilities of whole responses, (B,) each, from one forward pass over both."""
    tokens, mask, _ = pad_rows([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs], pad, device)
    logprobs, _ = model.logprobs(tokens, mask)                                              # (2B, T)
    chosen, rejected = logprobs.sum(-1).chunk(2)
    return chosen, rejected


@torch.no_grad()
def reference_logprobs(model: GPT, pairs: list[Pair], batches: list[list[int]], pad: int, device) -> Tensor:
    """log π_ref of every pair, (n, 2), once and up front; in the batches of training, so that step 1 repeats them."""
    stored = torch.zeros(len(pairs), 2, device=device)
    for batch in batches:
        stored[batch] = torch.stack(pair_logprobs(model, [pairs[i] for i in batch], pad, device), dim=-1)
    return stored


@torch.no_grad()
def evaluate(model: GPT, pairs: list[Pair], reference: Tensor, beta: float, batches: list[list[int]], pad: int, device) -> dict:
    """Over held-out pairs: loss, accuracy (chosen has the higher implicit reward, ties half), implicit rewards."""
    columns = []
    for batch in batches:
        chosen, rejected = pair_logprobs(model, [pairs[i] for i in batch], pad, device)
        columns.append(torch.stack(dpo_loss(chosen, rejected, *reference[batch].T, beta)))
    losses, chosen_rewards, rejected_rewards = torch.cat(columns, dim=1)
    margin = chosen_rewards - rejected_rewards
    return {"loss": losses.mean().item(), "accuracy": ((margin > 0).float() + 0.5 * (margin == 0)).mean().item(),
            "chosen_reward": chosen_rewards.mean().item(), "rejected_reward": rejected_rewards.mean().item()}


def train(config: Config) -> dict:
    """Train on pairs and save the policy. Returns the final metrics on held-out pairs."""
    check_range(config, beta=(1e-6, 100), label_smoothing=(0, 0.5), pairs_per_ranking=(1, 10**4), epochs=(1, 1000),
                lr=(0, 1), batch_size=(1, 10**6), micro_batch=(0, 10**6))
    if not config.data:
        raise InputError("--data: name one or more files of preference pairs or rankings")
    machine = setup(config)
    policy, tokenizer = load_gpt(config.init)            # no dropout: it would add noise to every log-ratio
    policy.to(machine.device).eval()
    limit, pad, device = policy.config.block_size, tokenizer.pad, machine.device
    draw = random.Random(config.seed)
    pairs, val_pairs = read_pairs(config, tokenizer, limit, draw)
    sizes = [len(chosen[0]) + len(rejected[0]) for chosen, rejected in pairs]
    batches = buckets(sizes, config.micro_batch or config.batch_size, draw)       # one forward pass each
    val_batches = [list(range(i, min(i + 64, len(val_pairs)))) for i in range(0, len(val_pairs), 64)]
    with machine.autocast():
        reference = reference_logprobs(policy, pairs, batches, pad, device)                 # (n, 2)
        val_reference = reference_logprobs(policy, val_pairs, val_batches, pad, device)

    group = max(1, config.batch_size // config.micro_batch) if config.micro_batch else 1    # forward passes a step
    per_epoch = [batches[i:i + group] for i in range(0, len(batches), group)]
    order = [step for _ in range(config.epochs) for step in draw.sample(per_epoch, len(per_epoch))]
    optimizer = adamw(policy, config.lr, weight_decay=config.weight_decay)
    log = Log(config.out, len(order), "dpo")

    for step, micro_batches in enumerate(order):
        count, rewards, step_loss = sum(map(len, micro_batches)), [], 0.0
        for batch in micro_batches:
            with machine.autocast():
                chosen, rejected = pair_logprobs(policy, [pairs[i] for i in batch], pad, device)
            losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, *reference[batch].T, config.beta,
                                                                config.label_smoothing)
            if step == 0 and not torch.allclose(losses, torch.full_like(losses, math.log(2)), atol=1e-3):
                raise RuntimeError(f"first DPO loss is {losses.mean():.4f}, not log 2: policy and reference differ")
            (losses.sum() / count).backward()
            step_loss += losses.sum().item() / count
            rewards.append(torch.stack([chosen.detach(), rejected.detach(), chosen_rewards, rejected_rewards]))
            log.tokens += sum(sizes[i] for i in batch)
        lr = learning_rate(step, len(order), config.lr, config.warmup)
        norm = optimizer_step(optimizer, lr, config.max_norm)
        chosen, rejected, chosen_rewards, rejected_rewards = torch.cat(rewards, dim=1)
        log.write(step + 1, show=("loss", "accuracy", "margin"), loss=step_loss,
                  accuracy=(chosen_rewards > rejected_rewards).float().mean().item(),
                  margin=(chosen_rewards - rejected_rewards).mean().item(), chosen_logprob=chosen.mean().item(),
                  rejected_logprob=rejected.mean().item(), chosen_reward=chosen_rewards.mean().item(),
                  rejected_reward=rejected_rewards.mean().item(), lr=lr, grad_norm=norm)
        log.bar.update()

    with machine.autocast():
        final = evaluate(policy, val_pairs, val_reference, config.beta, val_batches, pad, device)
    save_checkpoint(config.out, policy, "language model", config, tokenizer=tokenizer.name)
    return log.close(**{name: round(value, 4) for name, value in final.items()})


if __name__ == "__main__":
    main(train, Config, PRESETS)
