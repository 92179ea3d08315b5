"""Stage 2, reward model: a scalar r_θ(x, y) that orders responses as the labelers did.

    P(y_w ≻ y_l | x) = σ(r_θ(x, y_w) − r_θ(x, y_l))                        (Bradley–Terry)
    L(θ) = −E_x [ 1/C(K,2) · Σ_{(w,l)} log σ(r_θ(x, y_w) − r_θ(x, y_l)) ]  → pairwise_loss,
                                                                             ranking_loss
All C(K,2) pairs of a ranking come from one batch element: each of its K responses is computed once
and serves K − 1 comparisons, and is learned from once an epoch. The reward is a linear head on the
last token's state of a copy of the SFT model.

Difference from InstructGPT: a ranking may carry a margin (Llama 2). The rest is the same: tied
responses are left out of the sum, there is one epoch, a bias makes demonstrations average 0.

    python train_rm.py --preset tinytown --init out/tinytown/sft \\
                       --data out/tinytown/rank/rankings.jsonl \\
                       --demonstrations out/tinytown/data/sft_val.jsonl --out out/tinytown/rm
    python train_rm.py --data FILE.jsonl.gz --out out/mine/rm   # pairs, transcripts or rankings
"""
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.run import Flags, adamw, learning_rate, load_gpt, main, start
from data.batches import (RankingBatch, bias_batches, buckets, ranking_batch, ranking_batches,
                          ranking_splits, read_ranking_rows)
from model import RewardModel


@dataclass(slots=True)
class Config(Flags):
    data: tuple = ()               # rankings or preference pairs
    val: str = ""                  # held-out rankings; empty: every tenth ranking of data
    fold: int = 0                  # which tenth is held out, 0 to 9 (cross-validation)
    clean: str = ""                # held-out rankings in the true order (Tinytown); only reported
    demonstrations: str = ""       # mean reward 0 for (1,000 of) these; empty: best responses
    init: str = ""                 # SFT checkpoint to copy; empty: a new small model
    out: str = "out/rm"            # folder for the checkpoint and metrics
    epochs: int = 1                # a second epoch overfits (InstructGPT); 0 only measures
    lr: float = 5e-4               # peak; cosine to a tenth. InstructGPT: 9e-6 for 6 B parameters
    warmup: int = 20               # steps
    batch_size: int = 16           # rankings a step (InstructGPT: 64)
    max_tokens: int = 0            # longest row, prompt included; 0: the model's context
    lora_rank: int = 0             # low-rank adapters of this rank, merged at the end; 0: none
    weight_decay: float = 0.0
    eval_every: int = 0            # steps between held-out losses (best: out/best); 0: at the end


PRESETS = {
    "tinytown": dict(batch_size=16, lr=5e-4),
    "cpu": dict(device="cpu", dtype="float32"),           # the others: an SFT model of GPT-2's size
    "gpt2": dict(device="cuda", dtype="bfloat16", lr=1e-5, batch_size=64, micro_batch=16),
    "t4": dict(device="cuda", dtype="float16", lr=1e-5, batch_size=64, micro_batch=4),
    "mps": dict(device="mps", dtype="float32", lr=1e-5, batch_size=64, micro_batch=2)}
LIMITS = dict(epochs=(0, 1000), fold=(0, 9))
NEEDED = dict(data="name one or more files of rankings or preference pairs")


# ----------------------------------------------------------------------------- equations

def pairwise_loss(chosen_rewards: Tensor, rejected_rewards: Tensor,
                  margin: Tensor | float = 0.0) -> Tensor:
    """Bradley–Terry negative log-likelihood of each preference: −log σ(r_w − r_l − margin). In
    nats.

    chosen_rewards, rejected_rewards (B,): rewards of the preferred and the other response; any
    shapes that broadcast. margin: by how much the preferred one should lead (Llama 2); 0 gives the
    lecture's loss. Equal rewards give log 2, and adding a constant to both changes nothing: the
    scale has no zero until a bias is set. Returns (B,).
    """
    return -F.logsigmoid(chosen_rewards - rejected_rewards - margin)


def ranking_loss(rewards: Tensor, scores: Tensor, mask: Tensor | None = None,
                 margin: Tensor | float = 0.0) -> Tensor:
    """K-wise Bradley–Terry loss: mean of `pairwise_loss` over a prompt's pairs, then over prompts.
    Scalar, nats.

    L = 1/B Σ_x 1/|pairs(x)| Σ_{i,j: score_i > score_j} −log σ(r_i − r_j)      (InstructGPT, eq. 1)

    rewards (B, K): of the model. scores (B, K): of the labeler, higher = better; ties count for no
    pair. mask (B, K): 1 = a response, for rankings of unequal K. margin: 0 or (B, 1). Because of
    the inner mean a ranking of 9 responses (36 pairs) weighs as much as one of 4 (6 pairs). Prompts
    without a pair are left out of the outer mean. Raises ValueError for K < 2, where there is
    nothing to compare.
    """
    if rewards.shape[-1] < 2:
        raise ValueError(f"rewards {tuple(rewards.shape)}: a ranking needs K ≥ 2 responses")
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    rewards = torch.where(mask, rewards, 0.0)
    pairs = better_pairs(scores, mask)                                      # (B, K, K)
    margin = margin[..., None] if torch.is_tensor(margin) else margin
    losses = pairwise_loss(rewards[:, :, None], rewards[:, None, :], margin)  # (B, K, K)
    count = pairs.sum((1, 2))                                               # (B,)
    per_prompt = torch.where(pairs, losses, 0.0).sum((1, 2)) / count.clamp(min=1)  # (B,)
    return per_prompt.sum() / (count > 0).sum().clamp(min=1)


def better_pairs(scores: Tensor, mask: Tensor) -> Tensor:
    """(B, K, K) bool: 1 at [b, i, j] where response i of prompt b was ranked above response j."""
    return (scores[:, :, None] > scores[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def ranking_accuracy(rewards: Tensor, scores: Tensor, mask: Tensor) -> tuple[float, int]:
    """(pairs that the rewards put in the labeler's order, pairs). Equal rewards count half."""
    pairs = better_pairs(scores, mask.bool())                               # (B, K, K)
    difference = (rewards[:, :, None] - rewards[:, None, :])[pairs]         # (P,)
    right = (difference > 0).sum() + 0.5 * (difference == 0).sum()
    return float(right), int(pairs.sum())


# ----------------------------------------------------------------------------- training

def ranking_rewards(model: RewardModel, batch: RankingBatch) -> Tensor:
    """The reward of every response, read off its last token, (B, K); 0 where there is none."""
    return batch.grid(model.scalars(batch.tokens, batch.positions, batch.attention_mask,
                                    wanted=batch.ends))


@torch.no_grad()
def evaluate(model: RewardModel, batches: Iterable[RankingBatch]) -> dict[str, float]:
    """{"accuracy": share of pairs in the given order, "loss": ranking loss} over all rankings."""
    model.eval()
    right = pairs = total = prompts = 0.0
    for x in batches:
        rewards = ranking_rewards(model, x)                                 # (B, K)
        hits, count = ranking_accuracy(rewards, x.scores, x.mask)
        right, pairs = right + hits, pairs + count
        total += ranking_loss(rewards, x.scores, x.mask, x.margin).item() * x.untied
        prompts += x.untied
    return {"accuracy": right / max(1, pairs), "loss": total / max(1, prompts)}


@torch.no_grad()
def set_bias(model: RewardModel, batches: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Shift the reward so that these demonstrations average 0; batches as of `pad_rows`."""
    model.eval()
    scores = torch.cat([model(tokens, lengths) for tokens, _, lengths in batches])
    model.bias += scores.mean()


def train(config: Config) -> dict:
    """Train on rankings and save. Returns accuracy and loss on held-out rankings, …"""
    run = start(config, LIMITS, NEEDED)
    gpt, tokenizer = load_gpt(config.init)
    model = run.train(RewardModel(gpt))
    pad, context = tokenizer.pad, gpt.config.block_size
    rows, held_out = ranking_splits(config.data, config.val, tokenizer, context,
                                    config.fold, config.max_tokens)
    demonstrations = bias_batches(config.demonstrations, rows, tokenizer, context,
                                  config.max_tokens, run.device)
    plan = buckets(rows, config.batch_size, config.epochs, run.draw, run.dealt)
    optimizer = adamw(model, config.lr, weight_decay=config.weight_decay)
    run.expect([[row.shape for row in batch] for batch in plan])

    for step, batch in run.steps(plan, tokenizer, model=model, optimizer=optimizer):
        prompts = max(1, sum(row.untied for row in batch))   # rankings that hold a pair
        for part in run.passes(batch):
            x = ranking_batch(part, pad, run.device)
            rewards = ranking_rewards(model, x)                             # (B, K)
            loss = ranking_loss(rewards, x.scores, x.mask, x.margin)
            accuracy = ranking_accuracy(rewards.detach(), x.scores, x.mask)
            run.backward(loss, weight=x.untied / prompts, loss=loss, accuracy=accuracy)
        lr = learning_rate(step, len(plan), config.lr, config.warmup)
        run.update({optimizer: lr}, batch)
        if run.due(config.eval_every):
            set_bias(model, demonstrations)
            found = evaluate(model, ranking_batches(held_out, pad, run.device))
            run.best(model, found["loss"], **found)

    set_bias(model, demonstrations)
    final = evaluate(model, ranking_batches(held_out, pad, run.device))
    if config.clean:
        clean = read_ranking_rows(config.clean, tokenizer, context, config.max_tokens)
        found = evaluate(model, ranking_batches(clean, pad, run.device))
        final["accuracy_clean"] = found["accuracy"]
    return run.finish(model, **final)


if __name__ == "__main__":
    main(train, Config, PRESETS)
