"""Grading: four rungs of checks for each exercise, and which classic mistake a wrong answer is.

    1 shapes, types, gradients    worth nothing, and nothing counts without it
    2 numbers worked by hand      half of the points
    3 properties                  three tenths
    4 behaviour                   a fifth: a small model learns with it and must get there

A rung is climbed from the one below: 3 and 4 count only where 2 is right, so that an answer of
zeros, which has many fine properties, scores nothing.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from homework.behaviour import BEHAVIOUR
from homework.cases import HAND, PROPERTIES, Case
from homework.compare import equal, outcome, plain, shape, shown
from homework.exercises import Exercise
from homework.process import Answer, Failed, Here

RUNGS = {"shapes": 0.0, "numbers by hand": 0.5, "properties": 0.3, "behaviour": 0.2}


class Rung(NamedTuple):
    """What a rung scored, and one line that says why not more."""
    name: str
    points: float
    most: float
    message: str


class Mistake(NamedTuple):
    """A classic wrong answer: the function's name, what is wrong, the wrong function."""
    name: str
    says: str
    function: Callable


# ----------------------------------------------------------------------------- the right answers

def right_answer(case: Case) -> Answer | None:
    """The right function's answer; None where it is an error."""
    if case.raises:
        return None
    found = Here().call(case.module, case.name, *case.args, grad=case.grad)
    if case.expected is not None and not equal(plain(found.value), plain(case.expected)):
        raise AssertionError(f"{case.name}, {case.label}: by hand {case.expected}, but the right "
                             f"function gives {plain(found.value)}")
    return found


# ----------------------------------------------------------------------------- the rungs

def check_shapes(student, case: Case, wanted: Answer) -> str:
    """What is wrong with the form of an answer, "" if nothing is."""
    try:
        found = student.call(case.module, case.name, *case.args, grad=case.grad)
    except Failed as error:
        return f"{case.name}: {error}"
    if shape(found.value) != shape(wanted.value):
        return f"{case.name} returns {shape(found.value)}, expected {shape(wanted.value)}"
    for place, own, one in zip(case.grad, found.grads, wanted.grads):
        if one is not None and one.abs().sum() > 0 and own is None:
            return f"{case.name}: no gradient reaches argument {place + 1}; was it detached?"
    if found.changed:
        return f"{case.name} writes into its arguments; make a new tensor"
    return ""


class Wrong(NamedTuple):
    """A wrong answer: to what, what came ([] for an error), what is wrong with it."""
    case: Case
    found: list
    text: str


def wrong_answers(student, cases: list[Case], right: list[Answer | None]) -> list[Wrong]:
    """The cases that a student's function gets wrong. right: an answer for each case; None where an
    error is right."""
    found = []
    for case, wanted in zip(cases, right):
        own, error = outcome(student, case)
        if wanted is None:
            text = "" if error else "an error was expected, and none came"
        elif error:
            text = error
        elif not equal(own[0], plain(wanted.value), case.tiny):
            text = f"expected {shown(plain(wanted.value))}, got {shown(own[0])}"
        elif not equal(own[1], plain(wanted.grads), case.tiny):
            text = f"expected the gradient {shown(plain(wanted.grads))}, got {shown(own[1])}"
        else:
            text = ""
        found += [Wrong(case, own, text)] * bool(text)
    return found


def recognised(wrong: list[Wrong], mistakes: list[Mistake]) -> str:
    """The classic mistake that gives what the student's function gave in every wrong case of one
    function."""
    for mistake in mistakes:
        same = [one for one in wrong if one.case.name == mistake.name]
        if same and all(equal_outcomes(
                outcome(Here({mistake.name: mistake.function}), one.case)[0], one.found,
                one.case.tiny) for one in same):
            return f" This is what one gets by this mistake: {mistake.says}."
    return ""


def equal_outcomes(one: list, other: list, tiny: bool) -> bool:
    """Whether two outcomes are the same, NaN for NaN."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(equal_outcomes(*pair, tiny)
                                              for pair in zip(one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isnan(one) and math.isnan(other) or equal(one, other, tiny)
    return one is None and other is None


def grade(exercise: Exercise, student, mistakes: list[Mistake] = []) -> list[Rung]:
    """All rungs of an exercise. student: whoever answers calls. mistakes: of its functions."""
    hand = HAND[exercise.number]()
    drawn = PROPERTIES[exercise.number](torch.Generator().manual_seed(exercise.number))
    right = list(map(right_answer, hand))
    first = {case.name: (case, wanted) for case, wanted in reversed(list(zip(hand, right)))}
    problems = list(filter(None, (check_shapes(student, *one) for one in first.values())))
    messages = {"shapes": problems[0] if problems else ""}
    below = "not looked at: the rung before comes first"

    def say(wrong: list[Wrong], more: list[Wrong]) -> str:
        if not wrong:
            return ""
        case, _, text = wrong[0]
        mistake = recognised(wrong + more, mistakes) or recognised(wrong, mistakes)
        return f"{case.name}, {case.label}: {text[:300]}{mistake}"
    wrong = [] if problems else wrong_answers(student, hand, right)
    more = [] if problems else wrong_answers(student, drawn, list(map(right_answer, drawn)))
    messages["numbers by hand"] = below if problems else say(wrong, more)
    ready = not any(messages.values())
    messages["properties"] = say(more, []) if ready else below
    messages["behaviour"] = behaves(exercise, student) if ready else below
    return [Rung(name, 0.0 if text else RUNGS[name] * exercise.points,
                 RUNGS[name] * exercise.points, text) for name, text in messages.items()]


def behaves(exercise: Exercise, student) -> str:
    """Why a model does not learn with the student's function, "" if it does."""
    try:
        found = BEHAVIOUR[exercise.number](student)
    except Failed as error:
        return str(error)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return "the function's answers are of a form that nothing learns from"
    return "" if found.met else f"{found.says}: {found.value:.3g}, at most {found.most:g} expected"
