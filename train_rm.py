"""Stage 2, reward model: a scalar r_θ(x, y) that orders responses as the labelers did (Bradley–Terry).

    P(y_w ≻ y_l | x) = σ(r_θ(x, y_w) − r_θ(x, y_l))
    L(θ) = −E_x [ 1/C(K,2) · Σ_{(w,l)} log σ(r_θ(x, y_w) − r_θ(x, y_l)) ]         → pairwise_loss, ranking_loss

All C(K,2) pairs of a ranking come from one batch element: its prompt and its K responses are computed once and serve
K(K−1)/2 comparisons, and every response is learned from once an epoch. The reward is a linear head on the last token's
state of a copy of the SFT model.

Differences from InstructGPT: tied responses are left out of the sum (as there) but a ranking may carry a margin
(Llama 2); the rest, one epoch and a bias that makes demonstrations average 0 included, is the same.

    python train_rm.py --preset tinytown --init out/tinytown/sft --data out/tinytown/rank/rankings.jsonl \\
                       --demonstrations out/tinytown/data/sft_val.jsonl --out out/tinytown/rm
    python train_rm.py --data FILE.jsonl.gz --out out/mine/rm       # pairs, HH-RLHF transcripts or rankings
"""
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import Run
from common import InputError, Log, adamw, check_range, learning_rate, main, optimizer_step, setup
from data.batches import (Group, RankingBatch, Row, buckets, by_length, demonstration_rows, even, group_size, packed_shape,
                          pad_rows, ranking_batch, ranking_groups, ranking_splits, response_row)
from data.readers import Ranking, read_demonstrations, read_rankings
from lora import add_lora, merge_lora
from memory import most_tokens, report_memory
from model import RewardModel, load_gpt, save_model
from parallel import parts, place, summed


@dataclass(slots=True)
class Config:
    data: tuple = ()               # rankings or preference pairs
    val: str = ""                  # held-out rankings; empty: every tenth ranking of data
    fold: int = 0                  # which tenth is held out, 0 to 9: all ten make a cross-validation
    clean: str = ""                # held-out rankings in the true order (Tinytown); only reported
    demonstrations: str = ""       # their mean reward becomes 0; empty: the best response of every training ranking
    init: str = ""                 # SFT checkpoint to copy; empty: a new small model on GPT-2's vocabulary
    out: str = "out/rm"            # folder for the checkpoint and metrics
    epochs: int = 1                # a second epoch overfits (InstructGPT); 0 only measures
    lr: float = 5e-4               # peak; cosine to a tenth. InstructGPT: 9e-6 for 6 B parameters
    warmup: int = 20               # steps
    batch_size: int = 16           # rankings a step (InstructGPT: 64)
    micro_batch: int = 0           # rankings a forward pass; 0: all of the step's at once
    max_tokens: int = 0            # longest row, prompt included; 0: the model's context
    lora_rank: int = 0             # train low-rank adapters of this rank, merged at the end; 0: all weights
    weight_decay: float = 0.0
    max_norm: float = 1.0          # gradient clipping
    eval_every: int = 0            # steps between looks at the held-out loss, whose best model stays in out/best; 0: at the end
    save_every: int = 0            # steps between checkpoints for --resume; 0: every ten minutes
    resume: bool = False           # go on from the last checkpoint in out
    shard: bool = False            # under torchrun: each process keeps a part of weights, gradients and moments
    seed: int = 1
    device: str = "auto"           # auto, cuda, mps, cpu
    dtype: str = "auto"            # auto, float32, bfloat16, float16


PRESETS = {"tinytown": dict(batch_size=16, lr=5e-4),
           "cpu": dict(device="cpu", dtype="float32"),                   # the others: an SFT model of GPT-2's size
           "gpt2": dict(device="cuda", dtype="bfloat16", lr=1e-5, batch_size=64, micro_batch=16),
           "t4": dict(device="cuda", dtype="float16", lr=1e-5, batch_size=64, micro_batch=4),
           "mps": dict(device="mps", dtype="float32", lr=1e-5, batch_size=64, micro_batch=2)}


def pairwise_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Bradley–Terry negative log-likelihood of each preference: −log σ(r_w − r_l − margin). In nats.

    chosen_rewards, rejected_rewards (B,): rewards of the preferred and the other response; any shapes that broadcast.
    margin: by how much the preferred one should lead (Llama 2); 0 gives the lecture's loss. Equal rewards give log 2,
    and adding a constant to both changes nothing: the scale has no zero until a bias is set. Returns (B,).
    """
    return -F.logsigmoid(chosen_rewards - rejected_rewards - margin)


def ranking_loss(rewards: Tensor, scores: Tensor, mask: Tensor | None = None, margin: Tensor | float = 0.0) -> Tensor:
    """K-wise Bradley–Terry loss: mean of `pairwise_loss` over a prompt's pairs, then over prompts. Scalar, nats.

    L = 1/B Σ_x 1/|pairs(x)| Σ_{i,j: score_i > score_j} −log σ(r_i − r_j)         (InstructGPT, eq. 1)

    rewards (B, K): of the model. scores (B, K): of the labeler, higher = better; ties count for no pair. mask (B, K):
    1 = a response, for rankings of unequal K. margin: 0 or (B, 1). Because of the inner mean a ranking of 9 responses
    (36 pairs) weighs as much as one of 4 (6 pairs). Prompts without a pair are left out of the outer mean. Raises
    ValueError for K < 2, where there is nothing to compare.
    """
    if rewards.shape[-1] < 2:
        raise ValueError(f"rewards {tuple(rewards.shape)}: a ranking needs K ≥ 2 responses")
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    rewards = torch.where(mask, rewards, 0.0)
    pairs = better_pairs(scores, mask)                                                      # (B, K, K)
    margin = margin[..., None] if torch.is_tensor(margin) else margin
    losses = pairwise_loss(rewards[:, :, None], rewards[:, None, :], margin)                # (B, K, K)
    count = pairs.sum((1, 2))                                                               # (B,)
    per_prompt = torch.where(pairs, losses, 0.0).sum((1, 2)) / count.clamp(min=1)           # (B,)
    return per_prompt.sum() / (count > 0).sum().clamp(min=1)


def better_pairs(scores: Tensor, mask: Tensor) -> Tensor:
    """(B, K, K) bool: 1 at [b, i, j] where response i of prompt b was ranked above response j."""
    return (scores[:, :, None] > scores[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def ranking_accuracy(rewards: Tensor, scores: Tensor, mask: Tensor) -> tuple[float, int]:
    """(pairs that the rewards put in the labeler's order, pairs). Equal rewards count half."""
    pairs = better_pairs(scores, mask.bool())
    difference = rewards[:, :, None] - rewards[:, None, :]
    right = (difference[pairs] > 0).sum() + 0.5 * (difference[pairs] == 0).sum()
    return float(right), int(pairs.sum())


def ranking_rewards(model: RewardModel, batch: RankingBatch) -> Tensor:
    """The reward of every response, read off its last token, (B, K); 0 where there is no response."""
    return batch.grid(model.scalars(batch.tokens, batch.positions, batch.attention_mask, wanted=batch.ends))


@torch.no_grad()
def evaluate(model: RewardModel, rankings: list[Ranking], groups: list[Group], pad: int, device) -> dict:
    """{"accuracy": share of pairs in the given order, "loss": ranking loss} over all rankings."""
    model.eval()
    right = pairs = total = prompts = 0.0
    for part in by_length([group_size(group) for group in groups], 32):
        batch = ranking_batch([rankings[i] for i in part], [groups[i] for i in part], pad, device)
        rewards = ranking_rewards(model, batch)                                             # (B, K)
        hits, count = ranking_accuracy(rewards, batch.scores, batch.mask)
        right, pairs = right + hits, pairs + count
        total += ranking_loss(rewards, batch.scores, batch.mask, batch.margin).item() * batch.untied
        prompts += batch.untied
    return {"accuracy": right / max(1, pairs), "loss": total / max(1, prompts)}


@torch.no_grad()
def set_bias(model: RewardModel, rows: list[Row], pad: int, device) -> None:
    """Shift the reward so that these demonstrations average 0."""
    model.eval()
    scores = []
    for part in by_length([len(tokens) for tokens, _ in rows], 64):
        tokens, _, lengths = pad_rows([rows[i] for i in part], pad, device)
        scores.append(model(tokens, lengths))
    model.bias += torch.cat(scores).mean()


def train(config: Config) -> dict:
    """Train on rankings and save. Returns the final metrics: accuracy and loss on held-out rankings, accuracy_clean."""
    check_range(config, epochs=(0, 1000), lr=(0, 1), batch_size=(1, 10**6), micro_batch=(0, 10**6),
                max_tokens=(0, 10**7), lora_rank=(0, 10**5), fold=(0, 9))
    if not config.data:
        raise InputError("--data: name one or more files of rankings or preference pairs")
    machine = setup(config)
    gpt, tokenizer = load_gpt(config.init)
    model = RewardModel(gpt)
    if config.lora_rank:
        add_lora(gpt, config.lora_rank)
    model = place(model, machine.device, config.seed, config.shard)
    limit = min(config.max_tokens or gpt.config.block_size, gpt.config.block_size)
    (rankings, groups), val = ranking_splits(config.data, config.val, tokenizer, limit, config.fold)
    draw = random.Random(config.seed)
    sizes = [group_size(group) for group in groups]
    batches = even([batch for _ in range(config.epochs) for batch in buckets(sizes, config.batch_size, draw)], config.shard)
    if config.demonstrations:
        reference = demonstration_rows(read_demonstrations(config.demonstrations), tokenizer, limit)[:1000]
    else:
        reference = [response_row(prompt, max(zip(ranking.scores, responses), key=lambda pair: pair[0])[1])
                     for ranking, (prompt, responses) in zip(rankings, groups)][:1000]
    optimizer = adamw(model, config.lr, weight_decay=config.weight_decay)
    shapes = [packed_shape(*group) for group in groups]
    report_memory(machine, most_tokens(batches, shapes, config.micro_batch), trained=[model])
    run = Run(config, len(batches), model=model, optimizer=optimizer, scaler=machine.scaler)
    log = Log(config.out, len(batches), "reward model", run.start)

    for step, indices in list(enumerate(batches))[run.start:]:
        untied = max(1, sum(rankings[i].untied for i in indices))         # rankings in the whole step that hold a pair
        step_loss, hits, pairs = 0.0, 0.0, 0
        for part in parts(indices, config.micro_batch):
            batch = ranking_batch([rankings[i] for i in part], [groups[i] for i in part], tokenizer.pad, machine.device)
            with machine.autocast():
                rewards = ranking_rewards(model, batch)                                     # (B, K)
            loss = ranking_loss(rewards, batch.scores, batch.mask, batch.margin) * (batch.untied / untied)
            machine.backward(loss)
            step_loss += loss.item()
            right, count = ranking_accuracy(rewards.detach(), batch.scores, batch.mask)
            hits, pairs = hits + right, pairs + count
            log.tokens += batch.tokens.numel()
        step_loss, hits, pairs = map(summed, (step_loss, hits, pairs))
        lr = learning_rate(step, len(batches), config.lr, config.warmup)
        norm = optimizer_step(machine, config.max_norm, {optimizer: lr}, step_loss,
                              lambda: [tokenizer.decode(prompt + sum(responses, [])) for prompt, responses in map(groups.__getitem__, indices)])
        numbers = {"loss": step_loss, "accuracy": hits / max(1, pairs), "lr": lr, "grad_norm": norm}
        if config.eval_every and (step + 1) % config.eval_every == 0:
            with machine.autocast():
                set_bias(model, reference, tokenizer.pad, machine.device)
                numbers |= {f"val_{name}": value for name, value in evaluate(model, *val, tokenizer.pad, machine.device).items()}
            run.best(numbers["val_loss"], lambda folder: save_model(folder, model, config, tokenizer))
        log.write(step + 1, show=("loss", "accuracy"), **numbers)
        log.bar.update()
        run.after(step)

    with machine.autocast():
        set_bias(model, reference, tokenizer.pad, machine.device)
        final = evaluate(model, *val, tokenizer.pad, machine.device)
        if config.clean:
            clean = ranking_groups(read_rankings(config.clean), tokenizer, limit)
            final["accuracy_clean"] = evaluate(model, *clean, tokenizer.pad, machine.device)["accuracy"]
    merge_lora(model)
    save_model(config.out, model, config, tokenizer)
    return log.close(**{name: round(value, 4) for name, value in final.items()})


if __name__ == "__main__":
    main(train, Config, PRESETS)
