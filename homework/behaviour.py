"""The last rung: does learning with the student's function get where theory says it must?

Models here are tables of a few dozen numbers, so that the goal is known exactly. They live in the
grader's process; of the student's it asks for values and gradients, one call a step. Each check
takes whoever answers calls (process.py) and returns (what was measured, its value, at most).
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from homework.cases import b, t


class Found(NamedTuple):
    """A figure that must not exceed a bound."""
    says: str
    value: float
    most: float

    @property
    def met(self) -> bool:
        return self.value <= self.most


def pulled(student, module: str, name: str, *args, grad: tuple[int, ...]) -> Tensor:
    """A loss of the student's as one that autograd knows here: its gradients for args[i], i in
    grad, come from the student's process."""
    answer = student.call(module, name, *args, grad=grad, pull=0)
    return sum((args[place] * slope).sum() for place, slope in zip(grad, answer.grads)
               if isinstance(slope, Tensor))


def descend(parameters: list[Tensor], loss: Callable[[], Tensor], steps: int, lr: float) -> None:
    """Adam on a loss whose gradients alone are true."""
    optimizer = torch.optim.Adam(parameters, lr)
    for step in range(steps):
        total = loss()
        if not isinstance(total, Tensor) or not total.requires_grad:
            return                                      # no gradient: nothing is learned
        optimizer.zero_grad()
        total.backward()
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step()


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation, in [0, 1]; 1 where there is NaN."""
    return min(1.0, 0.5 * (p - q).abs().sum().nan_to_num(2.0).item())


# ----------------------------------------------------------------------------- one by one

def shift(student) -> Found:
    """A model of letter pairs learns "abcabc…" and goes on with it."""
    tokens = torch.tensor([[0, 1, 2] * 4])                                  # (1, 12)
    mask = torch.arange(12)[None] > 2
    read = student.call("model", "before", mask).value                      # (1, 12)
    logits = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    right = 0.0
    if isinstance(read, Tensor) and read.shape == mask.shape and read.sum() == mask.sum():
        seen, wanted = tokens[read.bool()], tokens[mask]
        descend([logits], lambda: -logits[seen].log_softmax(-1).gather(
            -1, wanted[:, None]).mean(), 60, 0.3)
        letter = 0
        for place in range(1, 10):
            letter = int(logits[letter].argmax())
            right += letter == place % 3
    return Found("share of wrong letters, when a table that learned “abc…” goes on", 1 - right / 9,
                 0.0)


def mean(student) -> Found:
    """The number that is nearest to all tokens is their mean."""
    x, mask = t([1, 2, 90], [3, 90, 90]), b([1, 1, 0], [1, 0, 0])
    m = torch.zeros((), dtype=torch.float64, requires_grad=True)
    descend([m], lambda: pulled(student, "kernels", "masked_mean", (x - m).square(), mask,
                                grad=(0,)), 80, 0.2)
    return Found("distance of the fitted number from the mean of three tokens", abs(m.item() - 2),
                 0.05)


def head(student) -> Found:
    """A head on one-hot states learns how often each word follows each state."""
    draw = torch.Generator().manual_seed(0)
    goal = torch.randn(4, 5, dtype=torch.float64, generator=draw).softmax(-1)
    contexts = torch.arange(200) % 4
    targets = goal[contexts].multinomial(1, generator=draw)[:, 0]
    weight = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)

    def loss():
        return -pulled(student, "kernels", "token_logprobs_reference",
                       torch.eye(4, dtype=torch.float64)[contexts], weight, targets, 1.0,
                       grad=(1,)) / 200
    descend([weight], loss, 60, 0.5)
    seen = torch.zeros(4, 5, dtype=torch.float64)
    seen.index_put_((contexts, targets), torch.ones(200, dtype=torch.float64), accumulate=True)
    return Found("distance of what the head says from what was seen, mean of four states",
                 sum(distance(weight[:, i].detach().softmax(0), seen[i] / 50)
                     for i in range(4)) / 4, 0.03)


def imitate(student) -> Found:
    """The likeliest letters are those of responses, not those of prompts."""
    tokens = torch.tensor([[0, 1, 2, 2, 2, 3], [1, 0, 0, 2, 3, 1], [0, 2, 2, 1, 1, 0]])
    mask = b([0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0])    # 2 six times, 3 twice
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    descend([logits], lambda: pulled(student, "train_sft", "sft_loss",
                                     logits.log_softmax(0)[tokens], mask, grad=(0,)), 150, 0.3)
    return Found("distance of the model from the letters of the responses",
                 distance(logits.detach().softmax(0), t(0, 0, 0.75, 0.25)), 0.03)


def rank(student) -> Found:
    """Three to one for the first, ties beside: the rewards must lie log 3 apart."""
    scores = t([1, 0], [1, 0], [1, 0], [0, 1], [1, 1], [1, 1])
    mask = torch.ones(6, 2).bool()
    rewards = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    descend([rewards], lambda: pulled(student, "train_rm", "ranking_loss",
                                      rewards.expand(6, 2), scores, mask, grad=(0,)), 100, 0.1)
    lead = (rewards[0] - rewards[1]).item()
    return Found("distance of the lead from log 3", abs(lead - math.log(3)), 0.05)


def divergence(student) -> Found:
    """Both unbiased estimates find the exact KL of two known distributions; k3 varies less."""
    draw = torch.Generator().manual_seed(1)
    p, q = (torch.randn(8, dtype=torch.float64, generator=draw).mul(0.6).softmax(0)
            for _ in range(2))
    drawn = p.multinomial(4000, replacement=True, generator=draw)
    value = student.call("train_ppo", "kl_estimates", p.log()[drawn], q.log()[drawn]).value
    exact = (p * (p / q).log()).sum().item()
    wrong = 1.0
    if isinstance(value, list) and len(value) == 3 and all(
            isinstance(one, Tensor) and one.shape == drawn.shape for one in value):
        k1, _, k3 = value
        wrong = max(abs(k1.mean().item() - exact), abs(k3.mean().item() - exact),
                    0.0 if k3.var() < k1.var() else 1.0)
    return Found(f"distance of the means of k1 and k3 from the exact KL, {exact:.3f} nats", wrong,
                 0.03)


def regress(student) -> Found:
    """Values follow the mean return, though each step is clipped."""
    returns = t([1, 3, 9], [5, 9, 9])
    mask = b([1, 1, 0], [1, 0, 0])
    value = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(40):
        old = value.detach().expand(2, 3).clone()
        descend([value], lambda: pulled(student, "train_ppo", "value_loss", value.expand(2, 3), old,
                                        returns, mask, 0.2, grad=(0,)), 3, 0.2)
    return Found("distance of the fitted value from the mean return", abs(value.item() - 3), 0.25)


# ----------------------------------------------------------------------------- tiny PPO and DPO

LETTERS, LENGTH, BETA, UPDATES = 4, 2, 0.3, 100         # letter 0 ends a response
RESPONSES = [(0,), *((x, y) for x in (1, 2, 3) for y in range(LETTERS))]


def worth(response: tuple[int, ...]) -> float:
    """A score in [−1, 1] for every response."""
    total = sum((i + 2) * (7 * letter + 3) for i, letter in enumerate(response))
    return (37 * total % 101) / 50 - 1


def padded(responses: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """(tokens, response mask) of responses, (B, LENGTH) each."""
    return (torch.tensor([(*one, *[0] * (LENGTH - len(one))) for one in responses]),
            torch.tensor([[i < len(one) for i in range(LENGTH)] for one in responses]))


def states(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(place, letter before it; 0 at the first), an index into a table for every token."""
    return torch.arange(LENGTH), torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)


class Table(NamedTuple):
    """A policy: logits by place and letter before, (LENGTH, LETTERS, LETTERS)."""
    logits: Tensor

    def logprobs(self, tokens: Tensor) -> Tensor:
        """(B, LENGTH) → log π of each letter, (B, LENGTH)."""
        log_p = self.logits[states(tokens)].log_softmax(-1)
        return log_p.gather(-1, tokens[..., None])[..., 0]

    def distribution(self) -> Tensor:
        """Probability of every response, (R,)."""
        tokens, mask = padded(RESPONSES)
        return torch.where(mask, self.logprobs(tokens), 0.0).sum(1).exp()


def start() -> Table:
    draw = torch.Generator().manual_seed(5)
    return Table(torch.randn(LENGTH, LETTERS, LETTERS, dtype=torch.float64, generator=draw) * 0.3)


def optimum(beta: float) -> Tensor:
    """π*(y) ∝ π_ref(y) · exp(r(y)/β), (R,)."""
    weights = start().distribution() * (t(*map(worth, RESPONSES)) / beta).exp()
    return weights / weights.sum()


def tiny_ppo(student, *own: str, beta: float = BETA, samples: int = 256, lr: float = 0.1) -> Tensor:
    """The distribution in which PPO ends, over all responses. own: the functions of train_ppo.py
    that the student's process computes; the others are the right ones. samples: of an update. lr:
    of Adam, falling to 0."""
    import train_ppo
    from homework.process import Here
    right = Here()
    ask = {name: student if name in own else right
           for name in ("kl_penalized_rewards", "gae", "whiten", "policy_loss", "value_loss")}

    def values_of(name: str, *args):
        return ask[name].call("train_ppo", name, *args).value

    def loss_of(name: str, *args):
        if name not in own:
            return getattr(train_ppo, name)(*args)
        return pulled(student, "train_ppo", name, *args, grad=(0,))
    draw, ref, policy = torch.Generator().manual_seed(0), start(), start()
    policy.logits.requires_grad_()
    table = torch.zeros(LENGTH, LETTERS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([policy.logits, table], lr)
    for update in range(UPDATES):
        optimizer.param_groups[0]["lr"] = lr * (1 - update / UPDATES)
        drawn = policy.distribution().detach().multinomial(samples, True, generator=draw)
        some = [RESPONSES[i] for i in drawn]
        tokens, mask = padded(some)
        old, reference = policy.logprobs(tokens).detach(), ref.logprobs(tokens)
        values = table[states(tokens)]
        rewards = values_of("kl_penalized_rewards", t(*map(worth, some)), old, reference, mask,
                            beta)
        found = values_of("gae", rewards, values.detach(), mask, 1.0, 1.0)
        advantages, returns = found if isinstance(found, list) and len(found) == 2 else [None] * 2
        if not all(isinstance(one, Tensor) and one.shape == mask.shape
                   for one in (rewards, advantages, returns)):
            break
        advantages = values_of("whiten", advantages, mask, True)
        for _ in range(2):
            values = table[states(tokens)]
            loss = (loss_of("policy_loss", policy.logprobs(tokens), old, advantages, mask, 0.2)
                    + loss_of("value_loss", values, values.detach(), returns, mask, 10.0))
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return policy.distribution().detach()


def ppo_with(name: str) -> Callable:
    """PPO on all responses of two letters, one function of it the student's."""
    def check(student) -> Found:
        reached, goal = tiny_ppo(student, name), optimum(BETA)
        return Found("distance of PPO from π* ∝ π_ref·exp(r/β) "
                     f"(the reference is {distance(start().distribution(), goal):.2f} away)",
                     distance(reached, goal), 0.12)
    return check


def prefer(student) -> Found:
    """Pairs in the proportions of Bradley and Terry: DPO must reach π_ref·exp(r/β)."""
    chosen, rejected = zip(*[(0, 1)] * 3, (1, 0), *[(1, 2)] * 3, (2, 1), *[(0, 2)] * 9, (2, 0))
    ref, beta = t(0.2, 0.5, 0.3).log(), 0.5
    goal = (ref + t(2, 1, 0) * math.log(3) / beta).softmax(0)
    logits = ref.clone().requires_grad_()

    def loss():
        log_p = logits.log_softmax(0)
        return pulled(student, "train_dpo", "dpo_loss", log_p[list(chosen)], log_p[list(rejected)],
                      ref[list(chosen)], ref[list(rejected)], beta, 0.0, grad=(0, 1))
    descend([logits], loss, 200, 0.2)
    return Found("distance of DPO from π_ref·exp(r/β)", distance(logits.detach().softmax(0), goal),
                 0.02)


def draw_the_best(student) -> Found:
    """The formula against twenty thousand draws of the best of eight."""
    draw = torch.Generator().manual_seed(2)
    probs, rewards = t(0.4, 0.3, 0.2, 0.1), t(0, 2, 1, 2)
    drawn = probs.multinomial(160_000, True, generator=draw).view(-1, 8)
    best = drawn.gather(1, rewards[drawn].argmax(1, keepdim=True))[:, 0]
    value = student.call("systems.best_of_n", "best_of_n_distribution", probs, rewards, 8).value
    said = value if isinstance(value, Tensor) and value.shape == probs.shape else t(0, 0, 0, 0)
    return Found("distance of the formula from 20,000 draws", distance(
        said, best.bincount(minlength=4).double() / len(best)), 0.02)


def cover(student) -> Found:
    """A true win rate of 0.6 must lie within two standard errors in 19 of 20 experiments."""
    draw, hits = torch.Generator().manual_seed(3), 0
    for _ in range(100):
        scores = (torch.rand(60, generator=draw) < 0.6).double()
        value = student.call("rollout", "win_rate", scores, torch.full((60, 1), 0.5).double()).value
        if isinstance(value, list) and len(value) == 2:
            hits += abs(value[0] - 0.6) <= 2 * value[1]
    return Found("distance of the share within two errors from 0.95", abs(hits / 100 - 0.95), 0.05)


BEHAVIOUR = {1: shift, 2: mean, 3: head, 4: imitate, 5: rank, 6: divergence,
             7: ppo_with("kl_penalized_rewards"), 8: ppo_with("gae"), 9: ppo_with("whiten"),
             10: ppo_with("policy_loss"), 11: regress, 12: prefer, 13: draw_the_best, 14: cover}
