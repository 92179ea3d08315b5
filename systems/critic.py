"""What Constitutional AI asks of an AI: critiques by principles, revisions, preferences.

    q_j(y) = P(fine) / (P(fine) + P(fault)), the next word under principle j       → Critic.fine
    q_j < ½ finds a fault; then the critic goes on with a better answer    → critique_and_revise
    p = 1/J Σ_j (1 + q_j(a) − q_j(b)) / 2, how far a is preferred to b             → ai_preference
    L = −p log σ(β h) − (1 − p) log σ(−β h),   h = log π/π_ref (a) − log π/π_ref (b)
                                                                           → soft_dpo_loss
The critic is a base model in plain text, which has heard people find fault with each other's
answers. The constitution asks in three wordings whether somebody is hurt; the town's other
questions (true? what was asked? said well?) are there to be compared with it.
"""
import random
from dataclasses import dataclass

import torch
from torch import Tensor

import train_dpo
from common.run import adamw, learning_rate, load_gpt, start
from data.batches import Prompt, buckets, ranking_batch, read_untied
from data.tinytown.rank import ranking_line
from data.tinytown.talk import CRITIQUES
from data.tokenizer import Tokenizer
from model import GPT
from rollout import Response, respond
from systems.best_of_n import seed_of
from systems.judge import GRADED, next_logprobs, text_of

SAID = "Ada asked: {}\nBen said: {}\nCora said: "
# A principle: where the critic goes on, its word for a fine answer, its word for one with a fault.
CONSTITUTION = {CRITIQUES["harmless"][0]: (SAID + CRITIQUES["harmless"][0], " No", " Yes"),
                "1 of 5. It would hurt": (f"{GRADED} 1 of 5. It", " was", " would"),
                "3 of 5. It would hurt": (f"{GRADED} 3 of 5. It", " was", " would")}
PRINCIPLES = CONSTITUTION | {query: (SAID + query, " Yes", " No")
                             for part, (query, _) in CRITIQUES.items() if part != "harmless"}
REVISION = SAID + " ".join(CRITIQUES["harmless"]) + " Better say:"


# ----------------------------------------------------------------------------- equations

def ai_preference(first: Tensor, second: Tensor) -> Tensor:
    """Soft label: how far the first of two answers is preferred, p = mean_j (1 + q_j − q'_j) / 2.

    first, second (J, n): q of the two answers under J principles, in [0, 1]. Returns (n,) in
    [0, 1]. If each answer is fine by a coin of its own, it is how often the first alone is fine,
    ties halved: of two that harm alike, or not at all, p is about ½, whatever their odds.
    """
    return (0.5 + (first - second) / 2).mean(0)


def soft_dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, p: Tensor, beta: float) -> Tensor:
    """DPO with soft targets, p ℓ(h) + (1 − p) ℓ(−h), ℓ(h) = −log σ(β h). (B,), nats.

    logprobs, ref_logprobs (B, 2): of both whole responses, summed over tokens. p (B,): how far the
    first is preferred. Conservative DPO with an ε = 1 − p of its own for each pair: the minimum is
    at h = log(p / (1 − p)) / β, finite for p < 1, and 0 for p = ½.
    """
    (a, b), (ref_a, ref_b) = logprobs.unbind(1), ref_logprobs.unbind(1)
    return train_dpo.dpo_loss(a, b, ref_a, ref_b, beta, label_smoothing=1 - p)[0]


# ----------------------------------------------------------------------------- the critic

@dataclass(frozen=True, slots=True)
class Critic:
    """A base model that is asked about answers to prompts."""
    model: GPT
    tokenizer: Tokenizer
    temperature: float           # of revisions
    most: int                    # tokens of a revision
    seed: int

    def texts(self, template: str, asked: list[Prompt], answers: list[Response]) -> list[list[int]]:
        """A template, filled in; of what leaves no room to go on, the end."""
        texts = [text_of(template, prompt.messages, one) for prompt, one in zip(asked, answers)]
        return [[self.tokenizer.endoftext, *self.tokenizer.encode(text)][
            self.most - self.model.config.block_size:] for text in texts]

    def fine(self, principles: dict[str, tuple], asked: list[Prompt],
             answers: list[Response]) -> Tensor:
        """q of n answers under J principles, (J, n) in [0, 1]."""
        return torch.stack([next_logprobs(
            self.model, self.tokenizer, self.texts(template, asked, answers),
            tuple(words)).softmax(-1)[:, 0] for template, *words in principles.values()])

    def revise(self, asked: list[Prompt], answers: list[Response], title: str) -> list[Response]:
        """What it says is better than each answer, which it has told to hurt somebody; the same
        answer where it never ends."""
        contexts = [Prompt([], ids) for ids in self.texts(REVISION, asked, answers)]
        found = respond(self.model, contexts, self.tokenizer, self.most,
                        seed=seed_of(self.seed, title), stop=self.tokenizer.endoftext,
                        temperature=self.temperature)
        return [Response([], new.text.strip(), True) if new.ended and new.text.strip() else old
                for new, old in zip(found, answers)]


def critique_and_revise(critic: Critic, asked: list[Prompt], answers: list[Response],
                        rounds: int) -> list[list[Response]]:
    """In each round a principle is drawn for each answer; where it finds a fault the answer is
    revised. Returns the answers before and after each round."""
    draw, stages = random.Random(f"principles-{critic.seed}"), [list(answers)]
    for k in range(rounds):
        now = list(stages[-1])
        q = critic.fine(CONSTITUTION, asked, now)                           # (J, n)
        faulty = [i for i in range(len(now)) if q[draw.randrange(len(q)), i] < 0.5]
        revised = critic.revise([asked[i] for i in faulty], [now[i] for i in faulty], f"round {k}")
        for i, new in zip(faulty, revised):
            now[i] = new
        stages.append(now)
    return stages


# ----------------------------------------------------------------------------- labels

def ai_labels(critic: Critic, asked: list[Prompt],
              *two: list[Response]) -> tuple[list[str], Tensor]:
    """Rankings of two answers to each prompt, as lines of a file, with scores p and 1 − p by the
    constitution; and q of both under all principles, (2, J, n), for tables."""
    q = torch.stack([critic.fine(PRINCIPLES, asked, some) for some in two])
    p = ai_preference(*q[:, :len(CONSTITUTION)]).tolist()
    return [ranking_line(prompt.messages, pair, [one, 1 - one])
            for prompt, *pair, one in zip(asked, *two, p)], q


def learn(flags: train_dpo.Config) -> dict:
    """DPO with soft targets on rankings of two responses, whose scores are p and 1 − p. Returns
    means over the last tenth of the steps."""
    run, (policy, tokenizer) = start(flags, train_dpo.LIMITS), load_gpt(flags.init)
    policy = run.train(policy)
    rows = read_untied(flags.data, tokenizer, policy.config.block_size)
    plan = buckets(rows, flags.batch_size, flags.epochs, run.draw)
    for first in range(0, len(rows), 32):
        train_dpo.set_reference(policy, rows[first:first + 32], tokenizer.pad, run.device)
    optimizer = adamw(policy, flags.lr, weight_decay=0.0)

    for step, batch in run.steps(plan, tokenizer, model=policy, optimizer=optimizer):
        x = ranking_batch(batch, tokenizer.pad, run.device)
        logprobs = train_dpo.response_logprobs(policy, x)                   # (B, 2)
        loss = soft_dpo_loss(logprobs, x.ref_logprobs, x.scores[:, 0], flags.beta).mean()
        run.backward(loss, loss=loss)
        run.update({optimizer: learning_rate(step, len(plan), flags.lr, flags.warmup)}, batch)

    return run.finish(policy)
