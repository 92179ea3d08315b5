"""Stage 3 without RL: direct preference optimisation (DPO) of the policy on preference pairs.

    h = [log π_θ(y_w|x) − log π_ref(y_w|x)] − [log π_θ(y_l|x) − log π_ref(y_l|x)]
    L(θ) = −E log σ(β h)                                                          → dpo_loss
    implicit reward  r̂(x, y) = β [log π_θ(y|x) − log π_ref(y|x)]

The best policy under a reward and a KL penalty is π*(y|x) ∝ π_ref(y|x) exp(r(x,y)/β). Solved for r and put into the
Bradley–Terry model, the unknown normaliser cancels between the two responses: no reward model, no sampling.

A ranking gives all its C(K,2) pairs from one forward pass over its prompt and K responses (→ ranking_dpo_loss), as in
the reward model's loss. Differences from the paper: that, and AdamW instead of RMSprop.

    python train_dpo.py --preset tinytown --init out/tinytown/sft --data out/tinytown/rank/rankings.jsonl --out out/tinytown/dpo
    python train_dpo.py --init out/mine/sft --data FILE.json --out out/mine/dpo       # prompt, chosen, rejected
"""
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import Run
from common import InputError, Log, adamw, check_range, learning_rate, main, optimizer_step, setup
from data.batches import RankingBatch, buckets, even, group_size, packed_shape, ranking_batch, ranking_splits
from lora import add_lora, merge_lora
from memory import most_tokens, report_memory
from model import GPT, load_gpt, save_model
from parallel import parts, place, summed
from train_rm import better_pairs


@dataclass(slots=True)
class Config:
    data: tuple = ()               # preference pairs or rankings; a margin they may carry is not used
    val: str = ""                  # held-out pairs or rankings; empty: every tenth row of data
    fold: int = 0                  # which tenth is held out, 0 to 9: all ten make a cross-validation
    init: str = ""                 # SFT checkpoint: the start and, frozen, the reference
    out: str = "out/dpo"           # folder for the checkpoint and metrics
    beta: float = 0.1              # strength of the tie to the reference (paper: 0.1; 0.5 for TL;DR)
    label_smoothing: float = 0.0   # ε: share of preferences believed flipped (conservative DPO)
    epochs: int = 1
    lr: float = 1e-4               # peak; cosine to a tenth (paper: 5e-7 for billions of parameters)
    warmup: int = 20               # steps (paper: 150)
    batch_size: int = 32           # pairs or rankings a step (paper: 64)
    micro_batch: int = 0           # pairs or rankings a forward pass; 0: all of the step's at once
    max_tokens: int = 0            # longest row, prompt included; 0: the model's context
    lora_rank: int = 0             # train low-rank adapters of this rank, merged at the end; 0: all weights
    weight_decay: float = 0.0
    max_norm: float = 1.0          # gradient clipping (paper: 10)
    eval_every: int = 0            # steps between looks at the held-out loss, whose best model stays in out/best; 0: at the end
    save_every: int = 0            # steps between checkpoints for --resume; 0: every ten minutes
    resume: bool = False           # go on from the last checkpoint in out
    shard: bool = False            # under torchrun: each process keeps a part of weights, gradients and moments
    seed: int = 1
    device: str = "auto"           # auto, cuda, mps, cpu
    dtype: str = "auto"            # auto, float32, bfloat16, float16


PRESETS = {"tinytown": dict(beta=0.15, lr=1e-4, batch_size=16),
           "cpu": dict(device="cpu", dtype="float32"),                   # the others: an SFT model of GPT-2's size
           "gpt2": dict(device="cuda", dtype="bfloat16", lr=5e-6, batch_size=64, warmup=150, micro_batch=16),
           "t4": dict(device="cuda", dtype="float16", lr=5e-6, batch_size=64, warmup=150, micro_batch=4),
           "mps": dict(device="mps", dtype="float32", lr=5e-6, batch_size=64, warmup=150, micro_batch=2)}


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


def ranking_dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor, beta: float,
                     label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """DPO on all pairs of a ranking: mean of `dpo_loss` over a prompt's pairs, then over prompts. Scalar, nats.

    logprobs, ref_logprobs (B, K): of whole responses. scores (B, K): of the labeler, higher = better; ties count for no
    pair. mask (B, K): 1 = a response. Without smoothing it is the reward model's `ranking_loss` of the implicit rewards
    β·log(π/π_ref); with K = 2 it is the mean of `dpo_loss`. Returns also the (4, P) numbers of the P pairs, for the log:
    log π and implicit reward of chosen and rejected.
    """
    prompt, chosen, rejected = better_pairs(scores, mask).nonzero(as_tuple=True)            # (P,) each
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        logprobs[prompt, chosen], logprobs[prompt, rejected],
        ref_logprobs[prompt, chosen], ref_logprobs[prompt, rejected], beta, label_smoothing)
    weight = 1 / prompt.bincount()[prompt].to(losses.dtype)                                 # (P,) sums to 1 a prompt
    pairs = torch.stack([logprobs[prompt, chosen], logprobs[prompt, rejected], chosen_rewards, rejected_rewards]).detach()
    return (weight * losses).sum() / weight.sum().clamp(min=1), pairs


def response_logprobs(model: GPT, batch: RankingBatch) -> Tensor:
    """log π(y|x) of whole responses, (B, K): log-probabilities summed over their tokens; 0 where there is no response."""
    logprobs, _ = model.logprobs(batch.tokens, batch.response_mask, positions=batch.positions, attention_mask=batch.attention_mask)
    return batch.sums(logprobs)


@torch.no_grad()
def reference_logprobs(model: GPT, batches: Iterable[RankingBatch]) -> list[Tensor]:
    """log π_ref of every response, once and up front; in the batches of training, so that step 1 repeats them."""
    return [response_logprobs(model, batch) for batch in batches]


def summary(pairs: list[Tensor]) -> dict[str, float]:
    """What the log shows of (4, P) numbers: how often and by how much the chosen response has the higher reward."""
    count = max(1, summed(sum(x.shape[1] for x in pairs)))
    chosen_logprob, rejected_logprob, chosen_reward, rejected_reward = (
        summed(sum(x[i].sum().item() for x in pairs)) / count for i in range(4))
    hits = sum((x[2] > x[3]).sum().item() + 0.5 * (x[2] == x[3]).sum().item() for x in pairs)     # ties count half
    return {"accuracy": summed(hits) / count,
            "margin": summed(sum((x[2] - x[3]).sum().item() for x in pairs)) / count, "chosen_logprob": chosen_logprob, "rejected_logprob": rejected_logprob,
            "chosen_reward": chosen_reward, "rejected_reward": rejected_reward}


@torch.no_grad()
def evaluate(model: GPT, batches: list[RankingBatch], references: list[Tensor], beta: float) -> dict[str, float]:
    """Loss and `summary` over held-out rankings."""
    losses, pairs = zip(*(ranking_dpo_loss(response_logprobs(model, batch), reference, batch.scores, batch.mask, beta)
                          for batch, reference in zip(batches, references)))
    untied = [batch.untied for batch in batches]
    return {"loss": sum(loss.item() * n for loss, n in zip(losses, untied)) / sum(untied), **summary(list(pairs))}


def train(config: Config) -> dict:
    """Train on pairs or rankings and save the policy. Returns the final metrics on held-out ones."""
    check_range(config, beta=(1e-6, 100), label_smoothing=(0, 0.5), epochs=(1, 1000), lr=(0, 1), batch_size=(1, 10**6),
                micro_batch=(0, 10**6), max_tokens=(0, 10**7), lora_rank=(0, 10**5), fold=(0, 9))
    if not config.data:
        raise InputError("--data: name one or more files of preference pairs or rankings")
    if not config.init:
        raise InputError("--init: name the folder of an SFT checkpoint: the policy's start and its reference")
    machine = setup(config)
    policy, tokenizer = load_gpt(config.init)            # no dropout: it would add noise to every log-ratio
    if config.lora_rank:
        add_lora(policy, config.lora_rank)
    policy = place(policy, machine.device, config.seed, config.shard).eval()
    draw = random.Random(config.seed)
    limit = min(config.max_tokens or policy.config.block_size, policy.config.block_size)
    (rankings, groups), val_split = ranking_splits(config.data, config.val, tokenizer, limit, config.fold)

    order = sorted(range(len(val_split[0])), key=lambda i: group_size(val_split[1][i]))
    val_split = tuple([split[i] for i in order] for split in val_split)                   # as the reward model's

    def batch_of(indices):
        return ranking_batch([rankings[i] for i in indices], [groups[i] for i in indices], tokenizer.pad, machine.device)

    batches = even(buckets([group_size(group) for group in groups], config.batch_size, draw), config.shard)
    passes = [parts(indices, config.micro_batch) for indices in batches]                    # this process's of each batch
    val_batches = [ranking_batch(*part, tokenizer.pad, machine.device)
                   for part in zip(*([split[i:i + 32] for i in range(0, len(split), 32)] for split in val_split))]
    with machine.autocast():
        references = [reference_logprobs(policy, map(batch_of, mine)) for mine in passes]   # (B, K) each
        val_references = reference_logprobs(policy, val_batches)

    order = [number for _ in range(config.epochs) for number in draw.sample(range(len(batches)), len(batches))]
    optimizer = adamw(policy, config.lr, weight_decay=config.weight_decay)
    shapes = [packed_shape(*group) for group in groups]
    report_memory(machine, most_tokens(batches, shapes, config.micro_batch), trained=[policy])
    run = Run(config, len(order), model=policy, optimizer=optimizer, scaler=machine.scaler)
    log = Log(config.out, len(order), "dpo", run.start)

    for step, number in list(enumerate(order))[run.start:]:
        untied = max(1, sum(rankings[i].untied for i in batches[number]))                   # rankings in the step that hold a pair
        step_loss, pairs = 0.0, []
        for batch, reference in zip(map(batch_of, passes[number]), references[number]):
            with machine.autocast():
                logprobs = response_logprobs(policy, batch)                                 # (B, K)
            loss, numbers = ranking_dpo_loss(logprobs, reference, batch.scores, batch.mask, config.beta, config.label_smoothing)
            if step == 0 and not abs(loss.item() - math.log(2)) <= 1e-3:
                raise RuntimeError(f"first DPO loss is {loss.item():.4f}, not log 2: policy and reference differ")
            loss = loss * (batch.untied / untied)
            machine.backward(loss)
            step_loss += loss.item()
            pairs.append(numbers.cpu())
            log.tokens += batch.tokens.numel()
        step_loss = summed(step_loss)
        lr = learning_rate(step, len(order), config.lr, config.warmup)
        norm = optimizer_step(machine, config.max_norm, {optimizer: lr}, step_loss, lambda: [
            tokenizer.decode(prompt + sum(responses, [])) for prompt, responses in map(groups.__getitem__, batches[number])])
        numbers = {"loss": step_loss, **summary(pairs), "lr": lr, "grad_norm": norm}
        if config.eval_every and (step + 1) % config.eval_every == 0:
            with machine.autocast():
                held_out = evaluate(policy, val_batches, val_references, config.beta)
            numbers |= {f"val_{name}": value for name, value in held_out.items()}
            run.best(held_out["loss"], lambda folder: save_model(folder, policy, config, tokenizer))
        log.write(step + 1, show=("loss", "accuracy", "margin"), **numbers)
        log.bar.update()
        run.after(step)

    with machine.autocast():
        final = evaluate(policy, val_batches, val_references, config.beta)
    merge_lora(policy)
    save_model(config.out, policy, config, tokenizer)
    return log.close(**{name: round(value, 4) for name, value in final.items()})


if __name__ == "__main__":
    main(train, Config, PRESETS)
