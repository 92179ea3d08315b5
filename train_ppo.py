"""Stage 3, RLHF: PPO-ptx. The policy is pushed towards reward, held near the SFT model, and keeps
its language.

    maximise  E[ r(x, y) − β log(π_θ(y|x)/π_SFT(y|x)) ] + γ_ptx E_pretrain[ log π_θ(x) ]
                                                                           (InstructGPT, eq. 2)
    R_t  = −β (log π_old(a_t) − log π_ref(a_t)) + 1[t = last]·r(x, y)      → kl_penalized_rewards
    δ_t  = R_t + γ V_{t+1} − V_t;   A_t = Σ_k (γλ)^k δ_{t+k}               → gae, whiten
    L_π  = −E min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t),  ρ_t = π_θ/π_old(a_t)    → policy_loss
    L_V  = ½ E max((V − G)², (clip(V, V_old ± ε_V) − G)²),  G_t = A_t + V_t → value_loss
    L    = L_π + c_V L_V + γ_ptx · pretraining loss                        → train

Differences from InstructGPT: (1) GAE with λ = 0.95 as in Ziegler et al., where InstructGPT does not
name one; (2) advantages are whitened over the whole rollout; (3) no moving average of the weights;
(4) the pretraining mix takes `ptx_windows` windows a minibatch instead of 8 times the episodes.

    python train_ppo.py --preset tinytown --init out/tinytown/sft --reward out/tinytown/rm \\
                        --data out/tinytown/data/rl.jsonl --ptx_data out/tinytown/data/base.txt \\
                        --out out/tinytown/ppo
    python train_ppo.py --init out/mine/sft --reward my_module:my_function --data PROMPTS.jsonl \\
                        --ptx_coef 0 --out out/mine/ppo
"""
import copy
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common.run import Flags, InputError, adamw, learning_rate, load_gpt, main, start
from data.batches import Prompt, pad_rows, read_prompt_rows, response_row
from data.text import mix_stream
from kernels import masked_mean
from model import GPT, RewardModel, before
from rollout import Response, ended_scores, load_reward
from train_base import pretraining_loss


@dataclass(slots=True)
class Config(Flags):
    data: tuple = ()               # prompts
    init: str = ""                 # SFT checkpoint: the start and, frozen, the reference
    reward: str = ""               # reward-model checkpoint, or module:function
    ptx_data: tuple = ()           # plain text of pretraining; needed when ptx_coef > 0
    out: str = "out/ppo"           # folder for the checkpoint, metrics and rollouts
    steps: int = 100               # rollouts (InstructGPT: 256,000 episodes in all)
    batch_size: int = 64           # episodes a rollout (InstructGPT: 512)
    minibatches: int = 2           # optimiser steps an inner epoch (InstructGPT: 8)
    inner_epochs: int = 1          # passes over a rollout (InstructGPT: 1; Ziegler et al.: 4)
    max_new_tokens: int = 48       # longest response
    temperature: float = 1.0       # of rollouts and of all log-probabilities, so without top-p
    beta: float = 0.05             # KL coefficient (InstructGPT: 0.02); constant without target_kl
    target_kl: float = 0.0         # nats a response; above 0, β adapts to it (Ziegler et al.: 6)
    horizon: int = 10_000          # episodes over which β adapts (Ziegler et al.: 10,000)
    max_kl: float = 100.0          # nats a response: beyond this KL the run stops
    gamma: float = 1.0             # discount
    lam: float = 0.95              # λ of GAE (Ziegler et al.)
    cliprange: float = 0.2         # ε
    cliprange_value: float = 0.2   # ε_V
    vf_coef: float = 0.1           # c_V; V has weights of its own: only clipping feels it
    ptx_coef: float = 1.0          # γ_ptx, times a mean over tokens (InstructGPT: 27.8); 0: PPO
    ptx_windows: int = 8           # windows of pretraining text a minibatch
    ptx_window: int = 64           # tokens of such a window
    missing_end_score: float = -3.0   # score of a response that never ends
    lr: float = 1e-4               # policy; peak, cosine to a tenth
    value_lr: float = 3e-4         # value model
    warmup: int = 10               # optimiser steps (InstructGPT: 10 iterations)
    lora_rank: int = 0             # low-rank adapters of this rank, merged at the end; 0: none
    sample_every: int = 20         # rollouts between printed samples


# Tinytown's β is over seven times InstructGPT's: learned from labels of which a quarter is flipped,
# rewards differ by tenths. The presets of GPUs are for an SFT model of GPT-2's size.
PRESETS = {
    "tinytown": dict(steps=64, micro_batch=8, lr=3e-4, value_lr=5e-4, beta=0.15),
    "cpu": dict(device="cpu", dtype="float32"),
    "gpt2": dict(device="cuda", dtype="bfloat16", steps=500, batch_size=128, minibatches=4,
                 micro_batch=16, max_new_tokens=128, lr=1e-5, value_lr=1e-5, ptx_windows=8,
                 ptx_window=256),
    "t4": dict(device="cuda", dtype="float16", steps=500, batch_size=64, minibatches=4,
               micro_batch=4, max_new_tokens=128, lr=1e-5, value_lr=1e-5, ptx_windows=4,
               ptx_window=256),
    "mps": dict(device="mps", dtype="float32", steps=500, batch_size=64, minibatches=4,
                micro_batch=4, max_new_tokens=128, lr=1e-5, value_lr=1e-5, ptx_windows=4,
                ptx_window=256)}
LIMITS = dict(steps=(1, 10**7), batch_size=(2, 10**6), minibatches=(1, 10**6),
              inner_epochs=(1, 100), temperature=(0.01, 10), beta=(0, 100), target_kl=(0, 10**4),
              horizon=(1, 10**9), max_kl=(0, 10**6), gamma=(0, 1), lam=(0, 1), cliprange=(0, 10),
              cliprange_value=(0, 10**6), ptx_coef=(0, 10**4), ptx_windows=(1, 10**6),
              ptx_window=(2, 10**6), value_lr=(0, 1), vf_coef=(0, 10**6), sample_every=(1, 10**9))
NEEDED = dict(data="name one or more files of prompts",
              init="name the folder of an SFT checkpoint: the policy's start and its reference")


# ----------------------------------------------------------------------------- equations

def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token estimates of KL(π‖π_ref) from samples of π (Schulman), with ℓ = log π − log π_ref:

        k1 = ℓ        k2 = ℓ²/2        k3 = exp(−ℓ) − 1 + ℓ

    Any equal shapes; nats. k1 and k3 are unbiased; k1 may be negative on a sample, k3 never; k2 is
    biased but small in variance. k1 is what the reward subtracts, so it is not clamped.
    """
    logratio = logprobs - ref_logprobs
    return logratio, logratio.square() / 2, torch.expm1(-logratio) + logratio


def kl_penalized_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor,
                         mask: Tensor, beta: float) -> Tensor:
    """Reward of every token, R_t = −β(log π(a_t) − log π_ref(a_t)) + 1[t = last]·score. (B, T), 0
    outside the mask.

    scores (B,): of whole responses; 0.0 is a score like any other. logprobs, ref_logprobs (B, T),
    nats. mask (B, T): 1 = response token, end token included; the score lands on each row's last 1.
    A row sums to score − β·KL estimate. Raises ValueError for a row without a response token, where
    the score would vanish.
    """
    mask = mask.bool()
    if not mask.any(1).all():
        raise ValueError("a row without response tokens has no place for its score")
    kl, _, _ = kl_estimates(logprobs, ref_logprobs)                         # (B, T)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)                     # (B, T)
    return torch.where(mask, -beta * kl, 0.0) + torch.where(last, scores[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
        lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: δ_t = R_t + γV_{t+1} − V_t, A_t = δ_t + γλA_{t+1}; returns
    G_t = A_t + V_t.

    rewards, values, mask (B, T): V_t is the value of the state *before* token t; mask 1 = response
    token, one unbroken stretch a row. The value after the last token is 0. Whatever stands outside
    the mask, NaN included, is not read. λ = 1 gives Σ γ^k R_{t+k} − V_t, λ = 0 the TD error.
    Returns (advantages, returns), 0 outside the mask.
    """
    mask = mask.bool()
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])           # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to variance 1 and, if shift_mean, to mean 0, over the places where mask is 1; 0
    elsewhere.

    x, mask: equal shapes. Population variance, plus 1e-8. Rewards keep their mean
    (shift_mean=False): shifting it would pay or fine for every token survived.
    """
    mask = mask.bool()
    x = torch.where(mask, x, 0.0)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                cliprange: float) -> Tensor:
    """PPO's clipped objective, −mean min(ρA, clip(ρ, 1−ε, 1+ε)A), over response tokens. Scalar.

    All (B, T); mask 1 = response token. At ρ = 1 the loss is −mean(A), its gradient −A: not zero.
    Clipping binds only where it lowers the objective: a token that moved the wrong way is always
    pulled back.
    """
    mask = mask.bool()
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))      # (B, T)  ρ
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -masked_mean(torch.minimum(unclipped, clipped), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
               cliprange_value: float) -> Tensor:
    """Clipped value loss, ½ mean max((V − G)², (clip(V, V_old − ε, V_old + ε) − G)²), over response
    tokens. Scalar.

    All (B, T); mask 1 = response token. The larger error counts: clipping never makes the loss
    smaller.
    """
    mask = mask.bool()
    values, old_values, returns = (torch.where(mask, x, 0.0)
                                   for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * masked_mean(errors, mask)


def clip_fraction(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor,
                  cliprange: float) -> Tensor:
    """Share of response tokens whose ratio ρ lies outside 1 ± ε. All (B, T); scalar."""
    ratio = torch.exp(logprobs.detach() - old_logprobs)                     # (B, T)
    return masked_mean(((ratio - 1).abs() > cliprange).float(), mask)


def adapted_beta(beta: float, kl: float, target_kl: float, episodes: int,
                 horizon: int) -> float:
    """Ziegler et al.'s controller: β·(1 + clip(KL/target − 1, ±0.2)·episodes/horizon); kl in nats
    per response."""
    error = max(-0.2, min(0.2, kl / target_kl - 1))
    return beta * (1 + error * episodes / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(G − V)/Var(G) over response tokens; 1 = the value model foresees every return, 0 = no
    better than a mean."""
    error, returns = (returns - values)[mask.bool()], returns[mask.bool()]
    return 1 - error.var(correction=0) / returns.var(correction=0).clamp(min=1e-8)


# ----------------------------------------------------------------------------- rollout

class Episode(NamedTuple):
    """A response to a prompt, what it is worth, and its row in the rollout's tensors."""
    prompt: Prompt
    response: Response
    score: float
    row: int

    @property
    def ids(self) -> list[int]:
        """Prompt and response."""
        return self.prompt.ids + self.response.ids


@dataclass(slots=True)
class Rollout:
    """What one batch of episodes leaves for learning. Tensors are (B, T), aligned with tokens, 0
    outside the mask."""
    episodes: list[Episode]
    scores: Tensor               # (B,) of whole responses
    tokens: Tensor
    mask: Tensor                 # bool; 1 = response token, end token included
    logprobs: Tensor             # of the policy that sampled
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor               # of the state before each token
    advantages: Tensor
    returns: Tensor

    def minibatches(self, count: int) -> list[list[Episode]]:
        """Cut into so many, and sort each by length: passes over a part of it then pad little."""
        cut = torch.arange(len(self.episodes)).tensor_split(count)
        return [sorted((self.episodes[i] for i in rows), key=lambda episode: len(episode.ids))
                for rows in cut]

    def place(self, episodes: list[Episode]) -> tuple[Tensor, slice]:
        """The rows of these episodes, and the columns that hold their tokens."""
        rows = torch.tensor([episode.row for episode in episodes], device=self.tokens.device)
        return rows, slice(max(len(episode.ids) for episode in episodes))

    def part(self, episodes: list[Episode]) -> "Rollout":
        """These episodes alone, tensors (b, t)."""
        at = self.place(episodes)
        return Rollout(episodes, self.scores[at[0]], self.tokens[at], self.mask[at],
                       self.logprobs[at], self.ref_logprobs[at], self.entropy[at],
                       self.values[at], self.advantages[at], self.returns[at])


@torch.no_grad()
def rollout(run, policy: GPT, ref_policy: GPT, value_model: RewardModel, reward,
            prompts: list[Prompt], config: Config) -> Rollout:
    """Sample one response to each prompt and score it.

    Log-probabilities are computed once more than sampling did, in the passes of training, so that
    the first update sees exactly these numbers again (ratio ≡ 1).
    """
    tokenizer = run.tokenizer
    uniforms = torch.rand(len(prompts), config.max_new_tokens, generator=run.generator)

    def answer(prompts: list[Prompt], uniforms: Tensor) -> list[tuple[Response, float]]:
        sampled = policy.generate([prompt.ids for prompt in prompts], config.max_new_tokens,
                                  temperature=config.temperature, stop_token=tokenizer.end,
                                  uniforms=uniforms)
        responses = [Response(ids, *tokenizer.response_text(ids)) for ids in sampled]
        return list(zip(responses, ended_scores(
            reward, prompts, responses, config.missing_end_score)))

    answers = run.map(answer, prompts, uniforms.to(run.device), model=policy)
    episodes = [Episode(prompt, *found, row)
                for row, (prompt, found) in enumerate(zip(prompts, answers))]
    scores = torch.tensor([episode.score for episode in episodes], device=run.device)
    rows = [response_row(prompt.ids, response.ids) for prompt, response, *_ in episodes]
    tokens, mask, _ = pad_rows(rows, tokenizer.pad, run.device)             # (B, T)
    numbers = torch.zeros(6, *tokens.shape, device=run.device)
    batch = Rollout(episodes, scores, tokens, mask, *numbers)   # its last six are views of numbers
    for minibatch in batch.minibatches(config.minibatches):
        for part in run.passes(minibatch):
            at, x = batch.place(part), batch.part(part)                     # (b, t)
            batch.logprobs[at], batch.entropy[at] = policy.logprobs(
                x.tokens, x.mask, config.temperature)
            batch.ref_logprobs[at], _ = ref_policy.logprobs(
                x.tokens, x.mask, config.temperature)
            batch.values[at] = state_values(value_model, x.tokens, x.mask)
    return Rollout(episodes, scores, tokens, mask, *run.sum(numbers))


def state_values(value_model: RewardModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """V of the state before each response token, (B, T), 0 elsewhere: the same alignment as
    log-probabilities."""
    values = value_model.scalars(tokens, wanted=before(mask))               # (N,)
    return values.new_zeros(tokens.shape).masked_scatter(mask, values)


def evaluate(batch: Rollout, rewards: Tensor) -> dict[str, float]:
    """Every rollout statistic, defined once. Sums are per response, means per response token."""
    k1, _, k3 = kl_estimates(batch.logprobs, batch.ref_logprobs)
    ended = [episode.response.ended for episode in batch.episodes]
    return {"score": batch.scores.mean().item(),                 # missing ends included
            # Nats a response from the reference; k1, then k3.
            "kl": torch.where(batch.mask, k1, 0.0).sum(1).mean().item(),
            "end_rate": sum(ended) / len(ended),
            "length": batch.mask.sum(1).float().mean().item(),  # tokens, end token included
            "kl_k3": torch.where(batch.mask, k3, 0.0).sum(1).mean().item(),
            "objective": rewards.sum(1).mean().item(),           # score − β·kl
            "entropy": masked_mean(batch.entropy, batch.mask).item(),
            "explained_variance": explained_variance(batch.values, batch.returns,
                                                     batch.mask).item()}


def record(run, batch: Rollout, rewards: Tensor, now: dict, config: Config) -> float:
    """Log a rollout's statistics, and its episodes in rollouts.jsonl for whoever wants to read or
    grade them; print a sample now and then. Returns the KL from the reference, nats a response.

    Raises InputError where the run has nothing more to learn: KL beyond config.max_kl, or five
    rollouts in which no response ended.
    """
    numbers = evaluate(batch, rewards)
    run.log(**numbers, beta=now["beta"])
    run.append("rollouts", [
        {"messages": episode.prompt.messages, "response": episode.response.text,
         "ended": episode.response.ended, "score": round(episode.score, 4)}
        for episode in batch.episodes])
    if run.due(config.sample_every):
        prompt, response, score, _ = batch.episodes[0]
        kl = (batch.logprobs - batch.ref_logprobs)[0].sum().item()
        tqdm.write(f"[{run.step + 1}] {prompt.messages[-1]['content']!r} → {response.text!r} "
                   f"score {score:.2f} kl {kl:.2f}", file=sys.stderr)
    now["endless"] = 0 if numbers["end_rate"] > 0 else now["endless"] + 1
    if not numbers["kl"] <= config.max_kl:
        raise InputError(f"KL from the reference is {numbers['kl']:.1f} nats a response, over "
                         f"--max_kl {config.max_kl}: the policy has run away from it. Raise "
                         f"--beta, lower --lr, or look at the samples in rollouts.jsonl")
    if now["endless"] == 5:
        raise InputError("in five rollouts no response ended, so that all got the same score: "
                         "raise --max_new_tokens, or train the SFT model until its responses end")
    return numbers["kl"]


def check_ratio(logprobs: Tensor, old_logprobs: Tensor) -> None:
    """RuntimeError where the policy is not, before its first update, the one that sampled."""
    error = (torch.exp(logprobs.detach() - old_logprobs) - 1).abs().max()
    if not error <= 1e-3:
        raise RuntimeError(f"the first minibatch's ratio is off 1 by {error:.2g}; old "
                           f"log-probabilities are not the policy's")


def expect_memory(run, prompts: list[Prompt], config: Config) -> None:
    """Say how much memory a minibatch, the mix and sampling will take."""
    longest = max(len(prompt.ids) for prompt in prompts) + config.max_new_tokens
    rows = len(run.share(range(config.batch_size))[0])
    minibatch = [(1, longest)] * -(-config.batch_size // config.minibatches)
    mix = [(config.ptx_windows, config.ptx_window)] * (config.ptx_coef > 0)
    run.expect([minibatch, mix], cached=longest * rows, rows=rows)


# ----------------------------------------------------------------------------- training

def learning_rates(peaks: dict, update: int, config: Config) -> dict:
    """Optimizer → its learning rate at this update: warm-up, then cosine to a tenth."""
    updates = config.steps * config.inner_epochs * config.minibatches
    return {optimizer: learning_rate(update, updates, peak, config.warmup)
            for optimizer, peak in peaks.items()}


def pick(prompts: list[Prompt], count: int, draw: random.Random) -> list[Prompt]:
    """So many prompts at random, each at most once if there are enough."""
    if len(prompts) >= count:
        return draw.sample(prompts, count)
    return draw.choices(prompts, k=count)


def train(config: Config, reward: Callable | None = None) -> dict:
    """Run PPO-ptx and save the policy. Returns metrics averaged over the last tenth.

    reward: a function of (conversations, response texts), instead of config.reward.
    """
    run = start(config, LIMITS, NEEDED)
    policy, tokenizer = load_gpt(config.init)   # no dropout: the ratio would not start at 1
    reward, reward_model = load_reward(reward or config.reward, tokenizer, run)
    # V starts as the reward model, as InstructGPT's, or else as the policy with a new head.
    value_model = copy.deepcopy(reward_model or RewardModel(policy))
    ref_policy = run.reference(policy)
    policy, value_model = run.train(policy), run.train(value_model)
    context = policy.config.block_size
    prompts = read_prompt_rows(config.data, tokenizer, context - config.max_new_tokens)
    text = mix_stream(config, tokenizer, context, run.device)
    optimizer = adamw(policy, config.lr, weight_decay=0.0, eps=1e-5)
    value_optimizer = adamw(value_model, config.value_lr, weight_decay=0.0, eps=1e-5)
    peaks = {optimizer: config.lr, value_optimizer: config.value_lr}
    now = {"beta": config.beta, "update": 0, "endless": 0}   # saved too, for --resume
    expect_memory(run, prompts, config)

    for step in run.steps(config.steps, tokenizer, policy=policy, value_model=value_model,
                          optimizer=optimizer, value_optimizer=value_optimizer, now=now):
        # ----------------------------------- sample and score; all (B, T)
        some = pick(prompts, config.batch_size, run.draw)
        batch = rollout(run, policy, ref_policy, value_model, reward, some, config)
        rewards = kl_penalized_rewards(batch.scores, batch.logprobs, batch.ref_logprobs,
                                       batch.mask, now["beta"])
        advantages, batch.returns = gae(rewards, batch.values, batch.mask, config.gamma,
                                        config.lam)
        batch.advantages = whiten(advantages, batch.mask)
        kl = record(run, batch, rewards, now, config)
        # ----------------------------------- improve: L = L_π + c_V L_V + γ_ptx L_ptx
        # Gradients add up until the update. Inner epochs repeat the same minibatches.
        minibatches = batch.minibatches(config.minibatches) * config.inner_epochs
        for index, minibatch in enumerate(minibatches):
            targets = sum(len(episode.response.ids) for episode in minibatch)
            for part in run.passes(minibatch):
                x = batch.part(part)                                        # (b, t)
                logprobs, _ = policy.logprobs(x.tokens, x.mask, config.temperature)
                values = state_values(value_model, x.tokens, x.mask)
                l_pi = policy_loss(logprobs, x.logprobs, x.advantages, x.mask,
                                   config.cliprange)
                l_v = value_loss(values, x.values, x.returns, x.mask,
                                 config.cliprange_value)
                loss = l_pi + config.vf_coef * l_v
                fraction = clip_fraction(logprobs, x.logprobs, x.mask, config.cliprange)
                if index == 0:
                    check_ratio(logprobs, x.logprobs)
                run.backward(loss, weight=x.mask.sum() / targets, policy_loss=l_pi,
                             value_loss=l_v, clip_fraction=fraction)
            if text:
                tokens, mask = run.share(*text.random_windows(
                    config.ptx_windows, config.ptx_window, run.text_generator))  # (w, T)
                l_ptx = pretraining_loss(policy.loglikelihood(tokens, mask), mask)
                loss = config.ptx_coef * l_ptx
                run.backward(loss, weight=len(tokens) / config.ptx_windows,
                             pretraining_loss=l_ptx)
            run.update(learning_rates(peaks, now["update"], config), minibatch)
            now["update"] += 1
        if config.target_kl > 0:
            now["beta"] = adapted_beta(now["beta"], kl, config.target_kl, config.batch_size,
                                       config.horizon)

    return run.finish(policy)


if __name__ == "__main__":
    main(train, Config, PRESETS)
