"""Classic wrong answers, from the mutants that the project's own tests must catch
(tests/test_mutants.py, test_systems.py): what a grader recognises."""
import sys
import types
from functools import partial
from pathlib import Path

from homework.exercises import EXERCISES, Exercise
from homework.grade import Mistake

TESTS = Path(__file__).parent.parent / "tests"
# A mutant of what is called inside: (module, name) → the functions that go wrong by it.
INSIDE = {("train_sft", "masked_mean"): ("sft_loss",),
          ("train_ppo", "masked_mean"): ("policy_loss", "value_loss")}
# The same function by another name.
SAME = {"token_logprobs": "token_logprobs_reference", "render": "Tokenizer.render"}


def with_inside(function, name: str, wrong):
    """A function that calls `wrong` where it calls `name`."""
    return types.FunctionType(function.__code__, {**function.__globals__, name: wrong},
                              function.__name__, function.__defaults__, function.__closure__)


def mistakes_of(exercise: Exercise) -> list[Mistake]:
    """The classic wrong answers to an exercise."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    import test_mutants
    import test_systems

    from data.tokenizer import get_tokenizer
    found, functions = [], {name for _, name in exercise.functions}
    for where, name, says, mutant, *_ in test_mutants.MUTANTS + test_systems.MUTANTS:
        module = getattr(where, "__name__", "")
        wrong = mutant.of(getattr(where, name)) if isinstance(mutant, test_mutants.Edit) else mutant
        for outer in INSIDE.get((module, name), ()):
            if outer in functions:
                right = getattr(where, outer)
                found.append(Mistake(outer, says, with_inside(right, name, wrong)))
        own = SAME.get(name, name)
        if own in functions and (module, name) not in INSIDE:
            if own == "Tokenizer.render":
                wrong = partial(wrong, get_tokenizer("tinytown"))
            found.append(Mistake(own, says, wrong))
    return found


def all_mistakes() -> list[tuple[Exercise, Mistake]]:
    """Every classic wrong answer with its exercise."""
    return [(exercise, mistake) for exercise in EXERCISES for mistake in mistakes_of(exercise)]
