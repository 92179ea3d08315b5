"""What a student can run: the numbers worked by hand, and the finale."""
from homework.behaviour import distance, optimum, prefer, start, tiny_ppo
from homework.cases import HAND
from homework.compare import equal, outcome, plain, shown
from homework.exercises import Exercise
from homework.process import Here

PPO = ("kl_penalized_rewards", "gae", "whiten", "policy_loss", "value_loss")


def check(exercise: Exercise) -> bool:
    """Print what the functions in this folder give beside what was worked by hand; whether all of
    it is right."""
    right = True
    print(f"{exercise.number}  {exercise.title}")
    for case in HAND[exercise.number]():
        found, error = outcome(Here(), case)
        fine = not error and equal(found[0], plain(case.expected))
        right &= fine
        print(f"   {'right' if fine else 'WRONG'}  {case.name}, {case.label}")
        if not fine:
            told = error or f"expected {shown(plain(case.expected))}, got {shown(found[0])}"
            print(f"          {told}")
            if not error:
                print(f"          for {', '.join(map(str, case.args))}")
    return right


def finale(beta: float) -> None:
    """PPO and DPO with the functions in this folder, held against π*."""
    goal = optimum(beta)
    print(f"total variation, β = {beta:g}\n"
          f"reference → π*             {distance(start().distribution(), goal):.4f}")
    for samples in (16, 64, 256):
        reached = tiny_ppo(Here(), *PPO, beta=beta, samples=samples)
        print(f"PPO → π*, {samples:3} answers a step {distance(reached, goal):.4f}")
    print(f"DPO → π*                   {prefer(Here()).value:.4f}  "
          "(three responses of its own, every pair known, β = 0.5)")
