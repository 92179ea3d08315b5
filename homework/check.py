"""What a student can run: the numbers worked by hand, and the finale."""
import inspect

import torch

from homework.behaviour import (RESPONSES, UPDATES, descend, distance, optimum, start, tiny_ppo,
                                worth)
from homework.cases import HAND, Case, t
from homework.compare import equal, outcome, plain, shown
from homework.exercises import Exercise
from homework.process import Here
from homework.worker import find

PPO = ("kl_penalized_rewards", "gae", "whiten", "policy_loss", "value_loss")


def wrong(case: Case) -> str:
    """What is wrong with what a function in this folder gives, "" if nothing is."""
    found, error = outcome(Here(), case)
    if error or not equal(found[0], plain(case.expected)):
        return error or f"expected {shown(plain(case.expected))}, got {shown(found[0])}"
    return "" if None not in found[1] else "right, but no gradient gets through: was it detached?"


def arguments(case: Case) -> str:
    """A case's arguments by their names."""
    names = list(inspect.signature(find(case.module, case.name)).parameters)
    values = (plain(arg) if isinstance(arg, torch.Tensor) else arg for arg in case.args)
    return ", ".join(f"{name}={shown(value) if isinstance(value, list) else value}"
                     for name, value in zip(names, values))


def check(exercise: Exercise) -> bool:
    """Print what the functions in this folder give beside what was worked by hand; whether all of
    it is right."""
    cases = HAND[exercise.number]()
    print(f"{exercise.number}  {exercise.title}")
    texts = [wrong(case) for case in cases]
    for case, text in zip(cases, texts):
        print(f"   {'WRONG' if text else 'right'}  {case.name}, {case.label}")
        if text:
            print(f"          {text}\n          for {arguments(case)}")
    print(f"   {texts.count('')} of {len(cases)} right. The grader also looks at properties "
          f"(padding, extremes, gradients) and at what a model learns.")
    return not any(texts)


def tiny_dpo(beta: float, lr: float) -> torch.Tensor:
    """The distribution in which DPO ends that learns from all pairs of responses, each way as often
    as Bradley and Terry say, σ(r_i − r_j)."""
    import train_dpo
    ref, rewards = start().distribution().log(), t(*map(worth, RESPONSES))
    logits = ref.clone().requires_grad_()
    chosen, rejected = (~torch.eye(len(rewards)).bool()).nonzero(as_tuple=True)
    share = (rewards[chosen] - rewards[rejected]).sigmoid()

    def loss():
        log_p = logits.log_softmax(0)
        losses, _, _ = train_dpo.dpo_loss(log_p[chosen], log_p[rejected], ref[chosen],
                                          ref[rejected], beta)
        return (share * losses).mean()
    descend([logits], loss, 10 * UPDATES, lr)
    return logits.detach().softmax(0)


def finale(beta: float, lr: float) -> None:
    """PPO and DPO with the functions in this folder, held against π*."""
    goal = optimum(beta)
    print(f"Total variation from π*, β = {beta:g}. PPO: {UPDATES} steps of two passes, Adam, "
          f"learning rate {lr:g} falling to 0, γ = λ = 1, ε = 0.2, one seed.\n"
          f"reference              {distance(start().distribution(), goal):.4f}")
    for samples in (16, 64, 256):
        reached = tiny_ppo(Here(), *PPO, beta=beta, samples=samples, lr=lr)
        print(f"PPO, {samples:3} answers a step {distance(reached, goal):.4f}")
    print(f"DPO, all pairs         {distance(tiny_dpo(beta, lr), goal):.4f}")
