"""RSO, statistical rejection sampling: preference pairs as if the best policy had written them.

    π*(y|x) ∝ π_SFT(y|x) exp(r(x, y)/β)                                    the target of DPO and PPO
    sample n from π_SFT; take y if u < exp((r(y) − r_max)/β)               → rejection_sample
    label pairs of those taken by r; fit, with h as in train_dpo.py,
        −log σ(β_h h)    sigmoid-norm                                      → train_dpo.dpo_loss
        max(0, 1 − γ h)  hinge-norm                                        → hinge_loss

DPO assumes that its pairs come from the policy that it looks for; this makes it so. Beside it are
samples of π_SFT as they come, labelled by r (`sft_sampled`); DPO on people's rankings is the third
source. β → 0 takes the best, β → ∞ any.

Differences from the paper: T = 1 instead of 0.7 with top-k 40; 4 of 32 samples taken instead of 8
of 64, and all their six pairs, by r, instead of four at random; β in standard deviations of the
reward over all prompts (paper: 0.5, of logits), which within a prompt are less, so that it selects
more mildly than it reads.

    python -m systems.rso --run out/tinytown
"""
import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import train_dpo
from common.run import DeviceFlags, load_gpt, main, start, write_json, write_text
from data.batches import Prompt, read_prompt_rows
from data.tinytown.rank import ranking_line
from rollout import Response, ended_scores, load_reward
from systems.best_of_n import several
from systems.table import again, compare


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run: its sft, rm and prompts are read
    reward: str = ""               # reward model; empty: rm inside run
    out: str = ""                  # folder of what is made; empty: systems/rso inside run
    prompts: int = 1000            # of rl.jsonl, whose rankings nobody has made
    samples: int = 32              # n of each (paper: 64)
    taken: int = 4                 # of them (paper: 8)
    epochs: int = 1                # over the pairs
    beta: float = 1.0              # of the rejection, in standard deviations of the reward
    pair_beta: float = 0.15        # β_h of sigmoid-norm, as Tinytown's DPO
    gamma: float = 0.3             # γ of hinge-norm (paper: 0.05)
    missing_end_score: float = -3.0   # of a response that never ends, as in PPO
    max_new_tokens: int = 48


LIMITS = dict(prompts=(1, 10**6), samples=(2, 10**4), taken=(2, 10**4), epochs=(1, 1000),
              beta=(1e-6, 10**6), pair_beta=(1e-6, 100), gamma=(1e-6, 100))


# ----------------------------------------------------------------------------- equations

def rejection_sample(scores: list[float], count: int, beta: float,
                     uniforms: Iterable[float]) -> list[int]:
    """Places of `count` responses, each visited one taken with probability exp((r − r_max)/β), in
    the order in which they were taken.

    scores: of N ≥ count responses. Passes over what is left, in order of place; r_max is the
    highest score left when a pass starts, so each pass takes one at least. uniforms: in [0, 1), one
    a visit. Equal texts are different responses here, each with its own chance. Raises ValueError
    for a count that is not there, and where the uniforms run out.
    """
    if not 0 < count <= len(scores):
        raise ValueError(f"{count} of {len(scores)} responses cannot be taken")
    left, taken, following = list(range(len(scores))), [], iter(uniforms)
    while len(taken) < count:
        highest = max(scores[i] for i in left)
        for i in list(left):
            u = next(following, None)
            if u is None:
                raise ValueError("the uniforms ran out")
            if u < math.exp((scores[i] - highest) / beta):
                taken.append(i)
                left.remove(i)
            if len(taken) == count:
                break
    return taken


def hinge_loss(policy_chosen_logprobs: Tensor, policy_rejected_logprobs: Tensor,
               ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor, gamma: float) -> Tensor:
    """Hinge-norm (Liu et al. 2024, eq. 10): max(0, 1 − γ h), h as in `dpo_loss`. (B,)

    All four (B,): sums over response tokens, nats. A pair with h ≥ 1/γ has no gradient: the policy
    stops moving away from the reference there, which SLiC's hinge without reference does not.
    """
    logits_diff = ((policy_chosen_logprobs - ref_chosen_logprobs)
                   - (policy_rejected_logprobs - ref_rejected_logprobs))    # (B,)  h
    return F.relu(1 - gamma * logits_diff)


def hinge_norm(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor,
               ref_rejected: Tensor, gamma: float, _) -> tuple[Tensor, Tensor, Tensor]:
    """`hinge_loss` with the results of `dpo_loss`, for `train_dpo.train`; no smoothing."""
    losses = hinge_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, gamma)
    return (losses, gamma * (policy_chosen - ref_chosen).detach(),
            gamma * (policy_rejected - ref_rejected).detach())


# ----------------------------------------------------------------------------- pipeline

class Pool(NamedTuple):
    """n samples of the SFT model to each prompt and what the reward model says of them."""
    prompts: list[Prompt]
    responses: list[list[Response]]
    scores: Tensor                     # (prompts, n)


def sample_pool(config: Config) -> Pool:
    """Sample from the SFT model and score; a response that never ends has the score it has in
    PPO."""
    run = start(config, LIMITS)
    policy, tokenizer = load_gpt(f"{config.run}/sft")
    policy = run.freeze(policy)
    reward, _ = load_reward(config.reward or f"{config.run}/rm", tokenizer, run)
    room = policy.config.block_size - config.max_new_tokens
    prompts = read_prompt_rows((f"{config.run}/data/rl.jsonl",), tokenizer, room)[:config.prompts]
    flat = several(policy, prompts, config.samples, tokenizer, "pool", config)
    asked = [prompt for prompt in prompts for _ in range(config.samples)]
    found = torch.tensor(ended_scores(reward, asked, flat, config.missing_end_score))
    return Pool(prompts, [flat[i:i + config.samples] for i in range(0, len(flat), config.samples)],
                found.view(len(prompts), -1))


def write_rankings(pool: Pool, config: Config, beta: float, path: Path) -> str:
    """Take some responses to each prompt, towards π* with this β, rank them by the reward model,
    and write the rankings. β = ∞: any. Returns the path."""
    draw = random.Random(config.seed)
    ended = torch.tensor([[one.ended for one in responses] for responses in pool.responses])
    # One response alone, or all alike: any are taken.
    spread = pool.scores[ended].std(correction=0).nan_to_num().item() or 1.0
    lines = []
    for prompt, responses, row in zip(pool.prompts, pool.responses, pool.scores.tolist()):
        uniforms = iter(draw.random, None)                   # without end
        places = rejection_sample(row, config.taken, beta * spread, uniforms)
        lines.append(ranking_line(prompt.messages, [responses[i] for i in places],
                                  [row[i] for i in places]))
    write_text(path, "".join(lines))
    return str(path)


def fit(rankings: str, out: Path, config: Config, hinge: bool = False) -> dict:
    """Train from the SFT model on all pairs of these rankings, sigmoid-norm or hinge-norm."""
    settings = train_dpo.Config(
        data=(rankings,), val=f"{config.run}/rank_val/rankings.jsonl", init=f"{config.run}/sft",
        out=str(out), seed=config.seed, device=config.device, dtype=config.dtype, batch_size=16,
        epochs=config.epochs, beta=config.gamma if hinge else config.pair_beta, **again(str(out)))
    return train_dpo.train(settings, hinge_norm if hinge else train_dpo.dpo_loss)


def rso(config: Config) -> dict[str, float]:
    """Make the pairs of each source and fit both losses. Returns the folders of the policies and
    the seconds that each took."""
    started = time.time()
    home = Path(config.out or f"{config.run}/systems/rso")
    pool = sample_pool(config)
    sampling = time.time() - started
    sources = {"sft": write_rankings(pool, config, math.inf, home / "sft_pairs.jsonl"),
               "rso": write_rankings(pool, config, config.beta, home / "rso_pairs.jsonl")}
    seconds = {}
    for name, source, hinge in (("sft_sampled", "sft", False), ("rso_sigmoid", "rso", False),
                                ("rso_hinge", "rso", True)):
        final = fit(sources[source], home / name, config, hinge)
        seconds[name] = final["seconds"] + sampling
    return seconds


def compared(config: Config) -> None:
    """RSO, and the table."""
    home = Path(config.out or f"{config.run}/systems/rso")
    seconds = rso(config)
    found = compare(config, {name: str(home / name) for name in seconds}, seconds)
    write_json(home / "table.json", found, indent=1)


if __name__ == "__main__":
    main(compared, Config)
