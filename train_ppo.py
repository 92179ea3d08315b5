"""Stage 3, RLHF: PPO-ptx. The policy is pushed towards reward, held near the SFT model, and keeps its language.

    maximise  E[ r(x, y) − β log(π_θ(y|x)/π_SFT(y|x)) ] + γ_ptx E_pretrain[ log π_θ(x) ]      (InstructGPT, eq. 2)

    R_t  = −β (log π_old(a_t) − log π_ref(a_t)) + 1[t = last]·r(x, y)             → kl_penalized_rewards
    δ_t  = R_t + γ V_{t+1} − V_t;   A_t = Σ_k (γλ)^k δ_{t+k}                      → gae, whiten
    L_π  = −E min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t),  ρ_t = π_θ(a_t)/π_old(a_t)      → policy_loss
    L_V  = ½ E max((V − G)², (clip(V, V_old ± ε_V) − G)²),  G_t = A_t + V_t       → value_loss
    L    = L_π + c_V L_V + γ_ptx · pretraining loss

Differences from InstructGPT: (1) GAE with λ = 0.95 as in Ziegler et al., where InstructGPT does not name one;
(2) advantages are whitened over the whole rollout; (3) no moving average of the weights; (4) the pretraining mix takes
`ptx_windows` windows a minibatch instead of 8 times the episodes.

    python train_ppo.py --preset tinytown --init out/tinytown/sft --reward out/tinytown/rm \\
                        --data out/tinytown/data/rl.jsonl --ptx_data out/tinytown/data/base.txt --out out/tinytown/ppo
    python train_ppo.py --init out/mine/sft --reward my_module:my_function --data PROMPTS.jsonl --out out/mine/ppo
"""
import copy
import importlib
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from checkpoint import Run
from common import InputError, Log, Machine, adamw, check_range, learning_rate, main, open_log, optimizer_step, setup
from data.batches import by_length, pad_rows, prompt_rows, response_row
from data.readers import read_prompts
from data.text import text_stream
from data.tokenizer import Tokenizer
from kernels import masked_mean
from lora import Reference, add_lora, merge_lora
from memory import report_memory
from model import GPT, RewardModel, before, load_gpt, load_reward_model, save_model
from parallel import gathered, place, share, summed, together, world
from train_base import pretraining_loss

# A reward is any function of (conversations, response texts) that returns one number for each; a reward model reads ids.
Reward = Callable[[list[list[dict]], list[str]], list[float]]


@dataclass(slots=True)
class Config:
    data: tuple = ()               # prompts
    init: str = ""                 # SFT checkpoint: the start and, frozen, the reference
    reward: str = ""               # reward-model checkpoint, or module:function taking (conversations, responses)
    ptx_data: tuple = ()           # plain text of pretraining; needed when ptx_coef > 0
    out: str = "out/ppo"           # folder for the checkpoint, metrics and rollouts
    steps: int = 100               # rollouts (InstructGPT: 256,000 episodes in all)
    batch_size: int = 64           # episodes a rollout (InstructGPT: 512)
    minibatches: int = 2           # optimiser steps an inner epoch (InstructGPT: 8)
    micro_batch: int = 0           # episodes a forward pass, of similar length; 0: a minibatch's all at once
    inner_epochs: int = 1          # passes over a rollout (InstructGPT: 1; Ziegler et al.: 4)
    max_new_tokens: int = 48       # longest response
    temperature: float = 1.0       # of rollouts and of all log-probabilities; no top-k or top-p: they would not match
    beta: float = 0.05             # KL coefficient (InstructGPT: 0.02)
    target_kl: float = 0.0         # nats a response; above 0, β adapts towards it (Ziegler et al.: 6)
    horizon: int = 10_000          # episodes over which β adapts (Ziegler et al.: 10,000)
    max_kl: float = 100.0          # nats a response: beyond this KL the run stops, as nothing good comes after it
    gamma: float = 1.0             # discount
    lam: float = 0.95              # λ of GAE (Ziegler et al.)
    cliprange: float = 0.2         # ε
    cliprange_value: float = 0.2   # ε_V
    vf_coef: float = 0.1           # c_V
    ptx_coef: float = 1.0          # γ_ptx, times a mean over tokens (InstructGPT: 27.8); 0: plain PPO
    ptx_windows: int = 8           # windows of pretraining text a minibatch
    ptx_window: int = 64           # tokens of such a window
    missing_end_score: float = -3.0   # score of a response that never ends, instead of the reward's
    lr: float = 1e-4               # policy; peak, cosine to a tenth
    value_lr: float = 3e-4         # value model
    warmup: int = 10               # optimiser steps (InstructGPT: 10 iterations)
    lora_rank: int = 0             # train low-rank adapters of this rank, merged at the end; 0: all weights
    max_norm: float = 1.0          # gradient clipping
    sample_every: int = 20         # rollouts between printed samples
    save_every: int = 0            # steps between checkpoints for --resume; 0: every ten minutes
    resume: bool = False           # go on from the last checkpoint in out
    shard: bool = False            # under torchrun: each process keeps a part of weights, gradients and moments
    seed: int = 1
    device: str = "auto"           # auto, cuda, mps, cpu
    dtype: str = "auto"            # auto, float32, bfloat16, float16


# Tinytown's β is over seven times InstructGPT's: learned from labels of which a quarter is flipped, rewards differ by tenths.
PRESETS = {"tinytown": dict(steps=56, micro_batch=8, lr=3e-4, value_lr=5e-4, beta=0.15),
           "cpu": dict(device="cpu", dtype="float32"),                   # the others: an SFT model of GPT-2's size
           "gpt2": dict(device="cuda", dtype="bfloat16", steps=500, batch_size=128, minibatches=4, micro_batch=16,
                        max_new_tokens=128, lr=1e-5, value_lr=1e-5, ptx_windows=8, ptx_window=256),
           "t4": dict(device="cuda", dtype="float16", steps=500, batch_size=64, minibatches=4, micro_batch=4,
                      max_new_tokens=128, lr=1e-5, value_lr=1e-5, ptx_windows=4, ptx_window=256),
           "mps": dict(device="mps", dtype="float32", steps=500, batch_size=64, minibatches=4, micro_batch=4,
                       max_new_tokens=128, lr=1e-5, value_lr=1e-5, ptx_windows=4, ptx_window=256)}


# ----------------------------------------------------------------------------- equations

def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token estimates of KL(π‖π_ref) from samples of π (Schulman), with ℓ = log π − log π_ref:

        k1 = ℓ        k2 = ℓ²/2        k3 = exp(−ℓ) − 1 + ℓ

    Any equal shapes; nats. k1 and k3 are unbiased; k1 may be negative on a sample, k3 never; k2 is biased but small
    in variance. k1 is what the reward subtracts, so it is not clamped.
    """
    logratio = logprobs - ref_logprobs
    return logratio, logratio.square() / 2, torch.expm1(-logratio) + logratio


def kl_penalized_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Reward of every token, R_t = −β(log π(a_t) − log π_ref(a_t)) + 1[t = last]·score. (B, T), 0 outside the mask.

    scores (B,): of whole responses; 0.0 is a score like any other. logprobs, ref_logprobs (B, T), nats. mask (B, T):
    1 = response token, end token included; the score lands on each row's last 1. A row sums to score − β·KL estimate.
    Raises ValueError for a row without a response token, where the score would vanish.
    """
    mask = mask.bool()
    if not mask.any(1).all():
        raise ValueError("a row without response tokens has no place for its score")
    kl, _, _ = kl_estimates(logprobs, ref_logprobs)                                         # (B, T)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)                                     # (B, T) one per row
    return torch.where(mask, -beta * kl, 0.0) + torch.where(last, scores[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: δ_t = R_t + γV_{t+1} − V_t, A_t = δ_t + γλA_{t+1}; returns G_t = A_t + V_t.

    rewards, values, mask (B, T): V_t is the value of the state *before* token t; mask 1 = response token, one
    unbroken stretch a row. The value after the last token is 0. Whatever stands outside the mask, NaN included, is
    not read. λ = 1 gives Σ γ^k R_{t+k} − V_t, λ = 0 the TD error. Returns (advantages, returns), 0 outside the mask.
    """
    mask = mask.bool()
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])                           # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to variance 1 and, if shift_mean, to mean 0, over the places where mask is 1; 0 elsewhere.

    x, mask: equal shapes. Population variance, plus 1e-8. Rewards keep their mean (shift_mean=False): shifting it
    would pay or fine for every token survived.
    """
    mask = mask.bool()
    x = torch.where(mask, x, 0.0)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """PPO's clipped objective, −mean min(ρA, clip(ρ, 1−ε, 1+ε)A), over response tokens. Scalar.

    All (B, T); mask 1 = response token. At ρ = 1 the loss is −mean(A), its gradient −A: not zero. Clipping binds only
    where it lowers the objective: a token that moved the wrong way is always pulled back.
    """
    mask = mask.bool()
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))                      # (B, T)  ρ
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -masked_mean(torch.minimum(unclipped, clipped), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float) -> Tensor:
    """Clipped value loss, ½ mean max((V − G)², (clip(V, V_old − ε, V_old + ε) − G)²), over response tokens. Scalar.

    All (B, T); mask 1 = response token. The larger error counts: clipping never makes the loss smaller.
    """
    mask = mask.bool()
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * masked_mean(torch.maximum((values - returns).square(), (clipped - returns).square()), mask)


def adapted_beta(beta: float, kl: float, target_kl: float, episodes: int, horizon: int) -> float:
    """Ziegler et al.'s controller: β·(1 + clip(KL/target − 1, ±0.2)·episodes/horizon); kl in nats per response."""
    error = max(-0.2, min(0.2, kl / target_kl - 1))
    return beta * (1 + error * episodes / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(G − V)/Var(G) over response tokens; 1 = the value model foresees every return, 0 = no better than a mean."""
    error, returns = (returns - values)[mask.bool()], returns[mask.bool()]
    return 1 - error.var(correction=0) / returns.var(correction=0).clamp(min=1e-8)


# ----------------------------------------------------------------------------- reward and rollout

def model_reward(model: RewardModel, tokenizer: Tokenizer) -> Reward:
    """A trained reward model as a function of (prompts, responses), ids as they were sampled: text encoded anew may be cut
    into other tokens, and an end token that was never written is no part of a response. Too long a row is scored at its cut."""
    @torch.no_grad()
    def reward(prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        rows = []
        for prompt, response in zip(prompts, responses):
            ids, mask = response_row(prompt, response)
            rows.append((ids[:model.config.block_size], mask[:model.config.block_size]))
        scores = torch.zeros(len(rows))
        for part in by_length([len(ids) for ids, _ in rows], 32):
            tokens, _, lengths = pad_rows([rows[i] for i in part], tokenizer.pad, model.head.weight.device)
            scores[part] = model(tokens, lengths).cpu()
        return scores.tolist()
    reward.reads_ids = True
    return reward


def load_reward(name: str, vocabulary: str, device) -> tuple[Reward, RewardModel | None]:
    """The reward that `--reward` names, and the model behind it if there is one: it must share the policy's vocabulary,
    as the value model, its copy, reads the policy's token ids."""
    if not name:
        raise InputError("--reward: name a reward-model folder, or module:function")
    if ":" in name and not Path(name).exists():
        module, _, function = name.partition(":")
        try:
            return getattr(importlib.import_module(module), function), None
        except (ImportError, AttributeError) as error:
            raise InputError(f"--reward {name}: {error}; expected module:function, the module in this folder") from error
    model, tokenizer = load_reward_model(name)
    if tokenizer.name != vocabulary:
        raise InputError(f"--reward {name}: reads the {tokenizer.name} vocabulary, but the policy of --init writes {vocabulary}; "
                         f"train the reward model from the same SFT model")
    model.to(device).eval()
    return model_reward(model, tokenizer), model


Part = tuple[Tensor, slice]        # rows of a rollout for one forward pass, and the columns that hold their tokens


def split(lengths: list[int], minibatches: int, micro_batch: int, device) -> list[list[Part]]:
    """Cut a rollout into minibatches, and each into parts of up to `micro_batch` rows of similar length (0: one part).

    The gradients of the parts add up to the minibatch's: parts save memory and padding, and change nothing else.
    """
    cut = []
    for rows in torch.arange(len(lengths)).tensor_split(minibatches):
        rows = share(sorted(rows.tolist(), key=lengths.__getitem__))
        size = micro_batch or len(rows)
        cut.append([(torch.tensor(part, device=device), slice(max(lengths[i] for i in part)))
                    for part in (rows[i:i + size] for i in range(0, len(rows), size))])
    return cut


@dataclass(slots=True)
class Rollout:
    """What one batch of episodes leaves for learning. Tensors are (B, T), aligned with tokens, 0 outside the mask."""
    minibatches: list[list[Part]]
    texts: list[str]
    ended: list[bool]
    scores: Tensor               # (B,) of whole responses
    tokens: Tensor
    mask: Tensor                 # bool; 1 = response token, end token included
    logprobs: Tensor             # of the policy that sampled
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor               # of the state before each token


@torch.no_grad()
def rollout(policy: GPT, ref_policy: GPT, value_model: RewardModel, reward: Reward, conversations: list[list[dict]],
            prompts: list[list[int]], tokenizer: Tokenizer, config: Config, generator: torch.Generator) -> Rollout:
    """Sample one response to each prompt and score it. Log-probabilities are computed in the parts of training, so that
    the first update sees exactly these numbers again (ratio ≡ 1).
    """
    device = policy.wte.weight.device
    uniforms = torch.rand(len(prompts), config.max_new_tokens, generator=generator).to(device)
    with together(policy):
        responses = gathered(policy.generate(share(prompts), config.max_new_tokens, temperature=config.temperature,
                                             stop_token=tokenizer.end, uniforms=share(uniforms)))
    texts, ended = map(list, zip(*(tokenizer.response_text(response) for response in responses)))
    whole = [i for i in share(list(range(len(prompts)))) if ended[i]]           # what never ended is not scored
    asked = (prompts, responses) if getattr(reward, "reads_ids", False) else (conversations, texts)
    found = dict(zip(whole, reward(*([x[i] for i in whole] for x in asked)))) if whole else {}
    scores = torch.tensor(gathered([found.get(i, config.missing_end_score) for i in share(list(range(len(prompts))))]),
                          dtype=torch.float32, device=device)
    tokens, mask, lengths = pad_rows([response_row(p, r) for p, r in zip(prompts, responses)], tokenizer.pad, device)
    minibatches = split(lengths.tolist(), config.minibatches, config.micro_batch, device)
    numbers = torch.zeros(4, *tokens.shape, device=device)
    logprobs, ref_logprobs, entropy, values = numbers
    for rows, columns in (part for parts in minibatches for part in parts):
        x, m = tokens[rows, columns], mask[rows, columns]                                   # (b, t)
        logprobs[rows, columns], entropy[rows, columns] = policy.logprobs(x, m, config.temperature)
        ref_logprobs[rows, columns], _ = ref_policy.logprobs(x, m, config.temperature)
        values[rows, columns] = state_values(value_model, x, m)
    return Rollout(minibatches, texts, ended, scores, tokens, mask, *summed(numbers))


def state_values(value_model: RewardModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """V of the state before each response token, (B, T), 0 elsewhere: the same alignment as log-probabilities."""
    values = value_model.scalars(tokens, wanted=before(mask))                               # (N,)
    return values.new_zeros(tokens.shape).masked_scatter(mask, values)


def evaluate(batch: Rollout, rewards: Tensor, returns: Tensor) -> dict[str, float]:
    """Every rollout statistic, defined once. Sums are per response, means per response token."""
    k1, _, k3 = kl_estimates(batch.logprobs, batch.ref_logprobs)
    return {"score": batch.scores.mean().item(),                         # of the reward, missing ends included
            "kl": torch.where(batch.mask, k1, 0.0).sum(1).mean().item(),   # nats per response from the reference, k1
            "kl_k3": torch.where(batch.mask, k3, 0.0).sum(1).mean().item(),
            "objective": rewards.sum(1).mean().item(),                   # score − β·kl
            "entropy": masked_mean(batch.entropy, batch.mask).item(),
            "length": batch.mask.sum(1).float().mean().item(),           # tokens, end token included
            "end_rate": sum(batch.ended) / len(batch.ended),
            "explained_variance": explained_variance(batch.values, returns, batch.mask).item()}


def check_health(numbers: dict[str, float], memory: dict, config: Config) -> None:
    """InputError where the run has nothing more to learn: KL beyond config.max_kl, or no response of five rollouts ended."""
    memory["endless"] = 0 if numbers["end_rate"] > 0 else memory["endless"] + 1
    if not numbers["kl"] <= config.max_kl:
        raise InputError(f"KL from the reference is {numbers['kl']:.1f} nats a response, over --max_kl {config.max_kl}: the policy has "
                         f"run away from it. Raise --beta, lower --lr, or look at the samples in rollouts.jsonl")
    if memory["endless"] == 5:
        raise InputError("in five rollouts no response ended, so that all got the same score: raise --max_new_tokens, or train "
                         "the SFT model until its responses end")


# ----------------------------------------------------------------------------- training

def update(machine: Machine, policy: GPT, value_model: RewardModel, batch: Rollout, parts: list[Part], advantages: Tensor,
           returns: Tensor, config: Config) -> dict[str, Tensor]:
    """Gradients of L_π + c_V L_V on one minibatch of a rollout; returns what the log shows."""
    total, shown = summed(sum(batch.mask[rows].sum() for rows, _ in parts)), []
    for part in parts:
        mask, old_logprobs, old_values = batch.mask[part], batch.logprobs[part], batch.values[part]   # (b, t)
        logprobs, _ = policy.logprobs(batch.tokens[part], mask, config.temperature)         # (b, t)
        values = state_values(value_model, batch.tokens[part], mask)                        # (b, t)
        loss_policy = policy_loss(logprobs, old_logprobs, advantages[part], mask, config.cliprange)
        loss_value = value_loss(values, old_values, returns[part], mask, config.cliprange_value)
        weight = mask.sum() / total               # means of parts, so weighted, add up to the mean of the minibatch
        machine.backward(weight * (loss_policy + config.vf_coef * loss_value))
        ratio = torch.exp(logprobs.detach() - old_logprobs)                                 # 1 outside the mask
        clipped = masked_mean(((ratio - 1).abs() > config.cliprange).float(), mask)
        shown.append(torch.stack([weight * loss_policy.detach(), weight * loss_value.detach(), weight * clipped,
                                  (ratio - 1).abs().max()]))
    numbers = torch.stack(shown).double()                                                   # (parts, 4)
    return dict(zip(("policy_loss", "value_loss", "clip_fraction"), numbers.sum(0))) | {"ratio_error": numbers[:, 3].max()}


def record(file: TextIO, step: int, conversations: list[list[dict]], batch: Rollout) -> None:
    """Append the episodes of a rollout to rollouts.jsonl, for whoever wants to read or grade them afterwards."""
    for messages, text, ended, score in zip(conversations, batch.texts, batch.ended, batch.scores.tolist()):
        file.write(json.dumps({"step": step, "messages": messages, "response": text, "ended": ended, "score": round(score, 4)}) + "\n")
    file.flush()


def first_sample(step: int, messages: list[dict], batch: Rollout) -> str:
    """The rollout's first episode in one line, with its score and its KL from the reference (k1, nats)."""
    kl = (batch.logprobs - batch.ref_logprobs)[0].sum().item()
    return f"[{step}] {messages[-1]['content']!r} → {batch.texts[0]!r} score {batch.scores[0].item():.2f} kl {kl:.2f}"


def train(config: Config, reward: Reward | None = None) -> dict:
    """Run PPO-ptx and save the policy. `reward` overrides config.reward. Returns metrics averaged over the last tenth."""
    check_range(config, steps=(1, 10**7), batch_size=(max(2, world()), 10**6), minibatches=(1, config.batch_size // world()),
                micro_batch=(0, 10**6), inner_epochs=(1, 100), max_new_tokens=(1, 10**5), temperature=(0.01, 10),
                beta=(0, 100), target_kl=(0, 10**4), horizon=(1, 10**9), max_kl=(0, 10**6), gamma=(0, 1), lam=(0, 1),
                cliprange=(0, 10), cliprange_value=(0, 10**6), ptx_coef=(0, 10**4),
                ptx_windows=(world() if config.ptx_coef > 0 else 1, 10**6), lr=(0, 1), value_lr=(0, 1), vf_coef=(0, 10**6),
                lora_rank=(0, 10**5), sample_every=(1, 10**9))
    if not config.data:
        raise InputError("--data: name one or more files of prompts")
    if not config.init:
        raise InputError("--init: name the folder of an SFT checkpoint: the policy's start and its reference")
    if config.ptx_coef > 0 and not config.ptx_data:
        raise InputError("--ptx_data: name the pretraining text, or set --ptx_coef 0 for PPO without the mix")
    machine = setup(config)
    policy, tokenizer = load_gpt(config.init)            # no dropout anywhere: the ratio would not start at 1
    reward_model = None
    if reward is None:
        reward, reward_model = load_reward(config.reward, tokenizer.name, machine.device)
    value_model = copy.deepcopy(reward_model) if reward_model else RewardModel(copy.deepcopy(policy))
    value_model.requires_grad_(True)
    ref_policy = Reference(policy) if config.lora_rank else copy.deepcopy(policy).requires_grad_(False).eval().to(machine.device)
    if config.lora_rank:
        add_lora(policy, config.lora_rank)
        add_lora(value_model.gpt, config.lora_rank)
    policy, value_model = (place(model, machine.device, config.seed, config.shard).eval() for model in (policy, value_model))
    room = policy.config.block_size - config.max_new_tokens
    conversations, prompts = prompt_rows(read_prompts(*config.data), tokenizer, room)
    text = text_stream(config.ptx_data, tokenizer, machine.device) if config.ptx_coef > 0 else None
    check_range(config, ptx_window=(2, policy.config.block_size if text else 10**6))
    draw = random.Random(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    text_generator = torch.Generator().manual_seed(config.seed)
    optimizers = {adamw(model, peak, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-5): peak
                  for model, peak in ((policy, config.lr), (value_model, config.value_lr))}
    updates = config.steps * config.inner_epochs * config.minibatches
    memory = {"beta": config.beta, "history": [], "endless": 0}        # what else changes from rollout to rollout
    longest = max(map(len, prompts)) + config.max_new_tokens
    frozen = [model for model in (reward_model, ref_policy) if isinstance(model, torch.nn.Module)]
    mine = -(-config.batch_size // world())
    largest = longest * (config.micro_batch or -(-mine // config.minibatches))
    report_memory(machine, max(largest, config.ptx_windows * config.ptx_window if text else 0),
                  trained=[policy, value_model], frozen=frozen, cached=longest * mine, rows=mine)
    run = Run(config, config.steps, policy=policy, value_model=value_model, draw=draw, generator=generator, memory=memory,
              text_generator=text_generator, scaler=machine.scaler, **dict(zip(("optimizer", "value_optimizer"), optimizers)))
    log = Log(config.out, config.steps, "ppo", run.start)
    rollouts = open_log(Path(config.out) / "rollouts.jsonl", run.start)

    for step in range(run.start, config.steps):
        beta = memory["beta"]
        chosen = draw.sample(range(len(prompts)), config.batch_size) if len(prompts) >= config.batch_size else (
            draw.choices(range(len(prompts)), k=config.batch_size))
        with machine.autocast():
            batch = rollout(policy, ref_policy, value_model, reward, [conversations[i] for i in chosen],
                            [prompts[i] for i in chosen], tokenizer, config, generator)
        rewards = kl_penalized_rewards(batch.scores, batch.logprobs, batch.ref_logprobs, batch.mask, beta)   # (B, T)
        advantages, returns = gae(rewards, batch.values, batch.mask, config.gamma, config.lam)               # (B, T)
        numbers = evaluate(batch, rewards, returns) | {"beta": beta}
        record(rollouts, step + 1, [conversations[i] for i in chosen], batch)
        check_health(numbers, memory, config)
        advantages = whiten(advantages, batch.mask)

        learned = []
        for epoch in range(config.inner_epochs):
            for index, parts in enumerate(batch.minibatches):
                count = (step * config.inner_epochs + epoch) * config.minibatches + index
                with machine.autocast():
                    shown = update(machine, policy, value_model, batch, parts, advantages, returns, config)
                    if epoch == index == 0 and not shown["ratio_error"] <= 1e-3:
                        raise RuntimeError(f"step {step + 1}: the first minibatch's ratio is off 1 by "
                                           f"{shown['ratio_error']:.2g}; old log-probabilities are not the policy's")
                    if text:
                        tokens, mask = map(share, text.random_windows(config.ptx_windows, config.ptx_window, text_generator))
                        logprobs, _ = policy.logprobs(tokens, mask, equal_weights=True)
                        shown["pretraining_loss"] = pretraining_loss(logprobs, mask) * (len(tokens) / config.ptx_windows)
                        machine.backward(config.ptx_coef * shown["pretraining_loss"])
                        log.tokens += tokens.numel()
                rates = {optimizer: learning_rate(count, updates, peak, config.warmup) for optimizer, peak in optimizers.items()}
                norm = optimizer_step(machine, config.max_norm, rates,
                    summed((shown["policy_loss"] + shown["value_loss"]).item()), lambda: list(map(tokenizer.decode, batch.tokens.tolist())))
                learned.append(shown)
        numbers |= {name: summed(sum(row[name].item() for row in learned)) / len(learned) for name in learned[0]}
        numbers.pop("ratio_error")
        numbers |= {"lr": next(iter(rates.values())), "grad_norm": norm}
        if config.target_kl > 0:
            memory["beta"] = adapted_beta(beta, numbers["kl"], config.target_kl, config.batch_size, config.horizon)
        if (step + 1) % config.sample_every == 0:
            log.bar.write(first_sample(step + 1, conversations[chosen[0]], batch), file=sys.stderr)
        log.tokens += batch.tokens.numel() // world()
        log.write(step + 1, show=("score", "kl", "entropy", "length", "end_rate"), **numbers)
        log.bar.update()
        memory["history"].append(numbers)
        run.after(step)

    rollouts.close()
    merge_lora(policy)
    save_model(config.out, policy, config, tokenizer)
    tail = memory["history"][-max(1, config.steps // 10):]
    return log.close(**{name: round(sum(row[name] for row in tail) / len(tail), 4) for name in tail[0]})


if __name__ == "__main__":
    main(train, Config, PRESETS)
