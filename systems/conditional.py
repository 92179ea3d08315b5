"""Conditional tokens: imitate good and bad responses alike, each under its word; ask for good ones.

    L = −Σ_t log π_θ(y_t | word, x, y_<t) / N                              → train_sft.sft_loss
    binary: the best response to a prompt under "good", the worst under "bad"  → best_and_worst
    Quark: samples of π_SFT, each under the word of its reward's quantile      → quantile_places
    L + β Σ_t KL(π_SFT(·|x, y_<t) ‖ π_θ(·|word, x, y_<t)) / N              → exact_kl

The word is a system turn before the prompt, in training and when the policy is asked; the reference
never reads it. The minimum of L is Bayes' rule, π(y|x, word) ∝ P(word|x, y) π(y|x): under "good" no
more than imitation of the best. AlpacaFarm found this no better than SFT; that says something only
where the word moves the score both ways, so the table asks one policy for good, nothing and bad. It
does so little after annotators' noisy rankings, and much where a reward model has done the sorting.

Differences from the papers: (1) words in a system turn, not new tokens of the vocabulary; (2) one
round of samples, all of π_SFT, where Quark goes on with its best word and keeps the pool; (3) no
entropy bonus, which Quark's code has. Its KL, and AlpacaFarm's, is the other one, KL(π_θ ‖ π_SFT);
here is the paper's.

    python -m systems.conditional --run out/tinytown
    python -m systems.conditional --run out/tinytown --quark true
"""
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.run import (Flags, adamw, learning_rate, load_gpt, main, start, write_json, write_text)
from data.batches import (RankingRow, Row, buckets, pad_rows, ranking_rows, read_untied,
                          response_row)
from data.readers import read_rankings
from data.tinytown.rank import ranking_line
from data.tokenizer import Tokenizer
from evaluate import Policy
from model import GPT, before
from systems import rso
from systems.table import compare, inside
from train_sft import sft_loss

BINARY = "bad", "good"                                       # from the worst to the best
QUANTILES = "awful", "poor", "fair", "good", "great"


@dataclass(slots=True)
class Config(Flags):
    run: str = "out/tinytown"      # Tinytown run in which it is measured
    data: tuple = ()               # rankings; empty: rank/some.jsonl inside run; Quark: samples
    init: str = ""                 # SFT checkpoint, the reference too; empty: sft inside run
    reward: str = ""               # of Quark's samples; empty: rm inside run
    out: str = ""                  # empty: systems/conditional (quark) inside run
    quark: bool = False            # words for the quantiles of all scores, and the KL
    kl_coef: float = 0.05          # β of Quark (paper: 0.05)
    prompts: int = 500             # of rl.jsonl, to which Quark samples
    samples: int = 16              # responses to each (Quark: one a prompt and round)
    epochs: int = 4
    lr: float = 2e-3               # peak; cosine to a tenth (paper: 1e-5 for GPT-2 large)
    warmup: int = 20               # steps
    batch_size: int = 32           # responses a step (paper: 128)
    max_tokens: int = 0            # longest row, prompt and word included; 0: the model's context


LIMITS = dict(kl_coef=(0, 1000), prompts=(1, 10**6), samples=(2, 10**4), epochs=(1, 1000))


# ----------------------------------------------------------------------------- equations

def quantile_places(scores: Tensor, count: int) -> Tensor:
    """Which of `count` quantiles of equal size each score is in, 0 = lowest: ⌊count · rank/N⌋ with
    ranks from 0. scores (N,) → (N,) long.

    Sizes differ by one at most (Quark's lowest gets all that is left over). Of equal scores the
    earlier one ranks lower (stable sort): they may part. With scores of all prompts together a word
    also tells which prompts are easy. Raises ValueError without a score for each quantile.
    """
    if not 0 < count <= len(scores):
        raise ValueError(f"{len(scores)} scores do not make {count} quantiles")
    ranks = scores.argsort(stable=True).argsort()                           # (N,)
    return ranks * count // len(scores)


def exact_kl(ref_logprobs: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """KL(π_ref ‖ π) at each token, not sampled but summed over the vocabulary (Quark's KL term):

        Σ_v π_ref(v) [log π_ref(v) − log π(v)]

    ref_logprobs, logprobs (B, T, V) or (N, V): finite, of the distributions that tokens come from.
    mask (B, T) or (N,): 1 = response token. Returns its shape, nats; exactly 0 where mask is 0.
    Unlike in PPO the mean is over π_ref: π pays for what it no longer says. Beside −log π(y) the
    minimum is a mixture, (p_data + β π_ref)/(1 + β): β = 0.05 leaves π_ref a twenty-first.
    """
    mask = mask.bool()[..., None]                                           # (B, T, 1)
    ref_logprobs = torch.where(mask, ref_logprobs, 0.0)                     # (B, T, V)
    logprobs = torch.where(mask, logprobs, 0.0)                             # (B, T, V)
    return (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum(-1)


class Example(NamedTuple):
    """A response after its word and the prompt, and after the prompt alone."""
    row: Row
    ref_row: Row

    @property
    def ids(self) -> list[int]:
        return self.row.ids


def best_and_worst(rows: list[RankingRow]) -> list[tuple]:
    """(word, prompt, response): of each ranking the worst and the best, of equal ones the first."""
    return [(word, row.prompt, row.responses[row.scores.index(score)]) for row in rows
            for word, score in zip(BINARY, (min(row.scores), max(row.scores)))]


def by_quantile(rows: list[RankingRow]) -> list[tuple]:
    """(word, prompt, response): all responses, by the quantiles of all scores."""
    scores = torch.tensor([score for row in rows for score in row.scores])
    said = [(row.prompt, response) for row in rows for response in row.responses]
    places = quantile_places(scores, len(QUANTILES)).tolist()
    return [(QUANTILES[place], *one) for place, one in zip(places, said)]


def examples(config: Config, tokenizer: Tokenizer, context: int) -> list[Example]:
    """What is trained on. A ranking with a response that does not fit after the longest word is
    left out and counted on stderr."""
    turns = {word: tokenizer.render([{"role": "system", "content": word}])[0]
             for word in (QUANTILES if config.quark else BINARY)}
    room = min(config.max_tokens or context, context) - max(map(len, turns.values()))
    said = (by_quantile(ranking_rows(read_rankings(*config.data), tokenizer, room))
            if config.quark else best_and_worst(read_untied(config.data, tokenizer, room)))
    return [Example(response_row(turns[word] + prompt, response), response_row(prompt, response))
            for word, prompt, response in said]


def predictions(model: GPT, rows: list[Row], pad: int, device) -> tuple[Tensor, Tensor]:
    """log π(· | all before) over the vocabulary at each response token, (N, V), and these tokens,
    (N,): row by row, whatever stands before the responses and in whichever column."""
    tokens, mask, _ = pad_rows(rows, pad, device)                           # (B, T)
    with model.autocast():
        states = model.hidden(tokens, wanted=before(mask))                  # (N, C)
        logits = F.linear(states, model.output_weight)                      # (N, V)
    return logits.float().log_softmax(-1), tokens[mask]


# ----------------------------------------------------------------------------- training

def sampled(config: Config) -> Config:
    """The config; for Quark, where it names no data, with scored samples, made here."""
    if not config.quark or config.data:
        return config
    pool = rso.sample_pool(rso.Config(
        run=config.run, reward=config.reward, prompts=config.prompts, samples=config.samples,
        seed=config.seed, device=config.device, dtype=config.dtype))
    path = Path(f"{config.out}_samples.jsonl")     # beside the folder, whose .jsonl are logs
    write_text(path, "".join(ranking_line(prompt.messages, *scored) for prompt, *scored in zip(
        pool.prompts, pool.responses, pool.scores.tolist())))
    return replace(config, data=(str(path),))


def train(config: Config) -> dict:
    """Train and save the policy. Returns means over the last steps; seconds include sampling."""
    started, config = time.time(), replace(sampled(config), run="")   # --resume asks what changed
    run = start(config, LIMITS)
    policy, tokenizer = load_gpt(config.init)
    policy, pad, context = run.train(policy), tokenizer.pad, policy.config.block_size
    ref = run.reference(policy) if config.quark else None
    rows = examples(config, tokenizer, context)
    plan = buckets(rows, config.batch_size, config.epochs, run.draw, run.dealt)
    optimizer = adamw(policy, config.lr, weight_decay=0.0)
    run.expect([[example.row.shape for example in batch] for batch in plan])

    for step, batch in run.steps(plan, tokenizer, model=policy, optimizer=optimizer):
        targets = sum(sum(example.row.mask) for example in batch)     # of the whole step
        for part in run.passes(batch):
            told, plain = zip(*part)
            logprobs, tokens = predictions(policy, told, pad, run.device)   # (N, V), (N,)
            every = torch.ones_like(tokens)
            loss = sft_loss(logprobs.gather(1, tokens[:, None])[:, 0], every)
            kl = torch.zeros_like(loss)
            if config.quark:
                ref_logprobs, same = predictions(ref, plain, pad, run.device)
                if not torch.equal(tokens, same):
                    raise RuntimeError("policy and reference read different responses")
                kl = exact_kl(ref_logprobs, logprobs, every).mean()
            weight = len(tokens) / targets
            run.backward(loss + config.kl_coef * kl, weight, loss=loss, kl=kl)
        lr = learning_rate(step, len(plan), config.lr, config.warmup)
        run.update({optimizer: lr}, batch)

    return run.finish(policy) | {"seconds": round(time.time() - started, 1)}


def compared(config: Config) -> dict[str, dict]:
    """Train in places inside the run; compare the policy, asked three ways, with SFT's."""
    started, name = time.time(), "quark" if config.quark else "conditional"
    config = replace(config, out=config.out or f"{config.run}/systems/{name}")
    config = inside(sampled(config), name)
    train(replace(config, run=""))              # --resume asks whether what is read has changed
    policy, words = load_gpt(config.out)[0], QUANTILES if config.quark else BINARY
    policies = {f"{name}_{asked}": Policy(policy, system=word) for asked, word in (
        ("good", words[-1]), ("none", ""), ("bad", words[0]))}
    found = compare(config, policies, {f"{name}_good": time.time() - started})
    write_json(Path(config.out) / "table.json", found, indent=1)
    return found


if __name__ == "__main__":
    main(compared, Config)
