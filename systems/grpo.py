"""GRPO: PPO without a value model. Several responses to a prompt are each other's baseline.

    maximise  E[ min(ρ_t A_i, clip(ρ_t, 1 ± ε) A_i) − β KL ],  ρ_t = π_θ/π_old(a_t)
    A_i = (r_i − mean of its group)/(std of its group + 1e-4)              → group_advantages
    k3  = exp(−ℓ) − 1 + ℓ,  ℓ = log π_θ − log π_ref                        → train_ppo.kl_estimates
    L   = mean_i 1/|y_i| Σ_t (−min(ρ_t A_i, clip(ρ_t, 1 ± ε) A_i) + β k3)  → grpo_loss

Beside train_ppo.py: no value model and no GAE, every token of a response has the response's
advantage; the KL is a term of the loss, by k3, instead of a part of the reward; no pretraining mix.
With --verifier the reward is a rule that cannot be fooled (RLVR): the town's gold score.

Its known biases (Liu et al. 2025, "Dr. GRPO") are its divisions: by the group's std, so prompts too
easy or too hard, whose responses score almost alike, weigh more; by each response's own length, so
a long wrong answer is discouraged less than a short one.

Differences from the paper: (1) a reward for whole responses alone, none for steps of reasoning; (2)
one round, where the paper renews reward model and reference; (3) two updates a rollout instead of
one: in the second, ρ is no longer 1; (4) a response that never ends has a fixed score with a reward
model.

    python -m systems.grpo --run out/tinytown
    python -m systems.grpo --run out/tinytown --verifier
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from common.run import Flags, adamw, learning_rate, load_gpt, main, start
from data.batches import Prompt, pad_rows, read_prompt_rows, response_row
from data.tinytown.gold import gold_scores
from data.tinytown.report import load_pyplot, save_plot
from kernels import masked_mean
from model import GPT
from rollout import Response, Reward, ended_scores, load_reward
from systems import plots
from systems.table import measured
from train_ppo import Episode, check_ratio, clip_fraction, kl_estimates, pick


@dataclass(slots=True)
class Config(Flags):
    run: str = "out/tinytown"      # Tinytown run in which it is measured
    data: tuple = ()               # prompts; empty: data/rl.jsonl inside run
    init: str = ""                 # SFT checkpoint, also the reference; empty: sft inside run
    reward: str = ""               # reward model, or module:function; empty: rm inside run
    verifier: bool = False         # reward by the town's gold score instead
    out: str = ""                  # empty: systems/grpo, or grpo_verifier, inside run
    steps: int = 64                # rollouts
    prompts: int = 8               # a rollout
    group: int = 8                 # responses to each (paper: 64)
    minibatches: int = 2           # optimiser steps a rollout (paper: 1)
    micro_batch: int = 8           # rows a forward pass; 0: all of a minibatch
    max_new_tokens: int = 48       # longest response
    missing_end_score: float = -3.0   # of a response that never ends, as in PPO
    beta: float = 0.3              # weight of k3 (paper: 0.04)
    cliprange: float = 0.2         # ε
    lr: float = 2e-4               # peak; cosine to a tenth (paper: 1e-6 for 7 B parameters)
    warmup: int = 10               # optimiser steps

    @property
    def batch_size(self) -> int:
        """Episodes a rollout."""
        return self.prompts * self.group


LIMITS = dict(steps=(1, 10**7), prompts=(1, 10**5), group=(2, 10**4), minibatches=(1, 10**6),
              beta=(0, 100), cliprange=(0, 10))


# ----------------------------------------------------------------------------- equations

def group_advantages(scores: Tensor, group: int) -> Tensor:
    """A_i = (r_i − mean of its group)/(std of its group + 1e-4) (Shao et al. 2024, 4.1.2). (B,)

    scores (B,): of whole responses, those to one prompt in a row, `group` to each. The std is of a
    sample, over group − 1, and 1e-4 is added, as in TRL; the paper does not say. However bad a
    response, its advantage is within ±(group − 1)/√group, 2.5 for 8. Equal scores give exactly 0:
    nothing to learn.
    """
    scores = scores.view(-1, group)                                       # (prompts, group)
    scores = scores - scores[:, :1]    # else the mean of equal numbers, rounded, may differ
    std = scores.std(1, keepdim=True, correction=1)
    return ((scores - scores.mean(1, keepdim=True)) / (std + 1e-4)).flatten()


def grpo_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor,
              advantages: Tensor, mask: Tensor, cliprange: float, beta: float) -> Tensor:
    """GRPO (Shao et al. 2024, eq. 3): −min(ρA, clip(ρ, 1−ε, 1+ε)A) + β·k3, its mean over each
    response's tokens, then over responses. Scalar.

    logprobs, old_logprobs, ref_logprobs (B, T), nats; advantages (B,); mask (B, T): 1 = response
    token. At ρ = 1 k3 has the expected gradient of KL(π_ref‖π), not of KL(π‖π_ref): for a single
    token the optimum is π = β π_ref/(λ − A), λ such that it sums to 1, not ∝ π_ref exp(A/β).
    """
    mask = mask.bool()
    logprobs, old_logprobs, ref_logprobs = (
        torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs, ref_logprobs))
    ratio = torch.exp(logprobs - old_logprobs)                              # (B, T)  ρ
    unclipped = ratio * advantages[:, None]
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange) * advantages[:, None]
    _, _, k3 = kl_estimates(logprobs, ref_logprobs)
    losses = -torch.minimum(unclipped, clipped) + beta * k3                 # (B, T)
    means = torch.where(mask, losses, 0.0).sum(1) / mask.sum(1).clamp(min=1)    # (B,)
    return masked_mean(means, mask.any(1))


# ----------------------------------------------------------------------------- rollout

@torch.no_grad()
def rollout(run, policy: GPT, reward: Reward, prompts: list[Prompt],
            config: Config) -> list[Episode]:
    """Sample and score a group of responses to each prompt, group after group, and log them."""
    asked = [prompt for prompt in prompts for _ in range(config.group)]
    uniforms = torch.rand(len(asked), config.max_new_tokens, generator=run.generator)

    def answer(asked: list[Prompt], uniforms: Tensor) -> list[tuple[Response, float]]:
        sampled = policy.generate([prompt.ids for prompt in asked], config.max_new_tokens,
                                  stop_token=run.tokenizer.end, uniforms=uniforms)
        responses = [Response(ids, *run.tokenizer.response_text(ids)) for ids in sampled]
        # The gold score knows what never ended.
        scores = (reward(asked, responses) if config.verifier
                  else ended_scores(reward, asked, responses, config.missing_end_score))
        return list(zip(responses, scores))

    answers = run.map(answer, asked, uniforms.to(run.device), model=policy)
    run.append("rollouts", [
        {"messages": prompt.messages, "response": response.text, "ended": response.ended,
         "score": round(score, 4)} for prompt, (response, score) in zip(asked, answers)])
    run.log(score=sum(score for _, score in answers) / len(asked),
            length=sum(len(response.ids) for response, _ in answers) / len(asked),
            end_rate=sum(response.ended for response, _ in answers) / len(asked))
    return [Episode(asked[row], *found, row) for row, found in enumerate(answers)]


@torch.no_grad()
def as_sampled(run, policy: GPT, ref_policy: GPT, part: list[Episode]) -> tuple[Tensor, ...]:
    """(tokens, mask, old_logprobs, ref_logprobs), (b, t) each, of a pass. Computed in the passes of
    training, so that the first update sees exactly these numbers again (ρ ≡ 1)."""
    rows = [response_row(episode.prompt.ids, episode.response.ids) for episode in part]
    tokens, mask, _ = pad_rows(rows, run.tokenizer.pad, run.device)
    return tokens, mask, policy.logprobs(tokens, mask)[0], ref_policy.logprobs(tokens, mask)[0]


# ----------------------------------------------------------------------------- training

def train(config: Config, reward: Callable | None = None) -> dict:
    """Run GRPO and save the policy. Returns means over the last tenth of the steps. reward: a
    function of (conversations, response texts), instead of config.reward."""
    run = start(config, LIMITS)
    policy, tokenizer = load_gpt(config.init)   # no dropout: the ratio would not start at 1
    reward, _ = ((gold_scores, None) if config.verifier
                 else load_reward(reward or config.reward, tokenizer, run))
    ref_policy = run.reference(policy)
    policy, context = run.train(policy), policy.config.block_size
    prompts = read_prompt_rows(config.data, tokenizer, context - config.max_new_tokens)
    optimizer = adamw(policy, config.lr, weight_decay=0.0, eps=1e-5)
    updates = config.steps * config.minibatches

    for step in run.steps(config.steps, tokenizer, policy=policy, optimizer=optimizer):
        some = pick(prompts, config.prompts, run.draw)
        episodes = rollout(run, policy, reward, some, config)
        scores = torch.tensor([episode.score for episode in episodes], device=run.device)
        advantages = group_advantages(scores, config.group)                 # (B,)
        # Every group is dealt out to all minibatches; sorted by length, passes pad little.
        minibatches = [sorted(episodes[i::config.minibatches], key=lambda row: len(row.ids))
                       for i in range(config.minibatches)]
        passes = [[(part, *as_sampled(run, policy, ref_policy, part))
                   for part in run.passes(minibatch)] for minibatch in minibatches]
        for index, minibatch in enumerate(minibatches):
            for part, tokens, mask, old_logprobs, ref_logprobs in passes[index]:    # (b, t)
                logprobs, _ = policy.logprobs(tokens, mask)
                advantage = advantages[[episode.row for episode in part]]           # (b,)
                loss = grpo_loss(logprobs, old_logprobs, ref_logprobs, advantage, mask,
                                 config.cliprange, config.beta)
                if index == 0:
                    check_ratio(logprobs, old_logprobs)
                kl = (old_logprobs - ref_logprobs).sum(1).mean()    # k1, nats a response
                fraction = clip_fraction(logprobs, old_logprobs, mask, config.cliprange)
                run.backward(loss, weight=len(part) / len(minibatch), kl=kl, loss=loss,
                             clip_fraction=fraction)
            update = step * config.minibatches + index
            lr = learning_rate(update, updates, config.lr, config.warmup)
            run.update({optimizer: lr}, minibatch)

    return run.finish(policy)


def compared(config: Config) -> dict[str, dict]:
    """GRPO, the table, and RUN/systems/grpo.png."""
    data = config.data or (f"{config.run}/data/rl.jsonl",)
    found = measured(train, replace(config, data=data), "grpo" + "_verifier" * config.verifier)
    if pyplot := load_pyplot():
        figure = plots.beside_ppo(pyplot, Path(config.run))
        save_plot(figure, Path(config.run) / "systems" / "grpo.png")
        pyplot.close("all")
    return found


if __name__ == "__main__":
    main(compared, Config)
