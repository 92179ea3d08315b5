"""Tinytown's tasks as Self-Instruct has them: an instruction apart from its input and its answer.

    town_seeds    seed tasks of most kinds, with good answers
    conversation  a task as a demonstration, by one of several templates
    kind_of       which kind of task an instruction asks for, whatever its input
    leaks         whether it is held out for validation or test, whichever way round it stands
    validity      shares of tasks that are right, field by field
"""
import random
import re
from collections import defaultdict
from functools import lru_cache
from typing import NamedTuple

from data.tinytown import town
from data.tinytown.gold import gold_score
from data.tinytown.talk import INPUTS, held_out, split_given, without_prefix

# Kinds of task without a seed, some of nearly every use case.
UNSEEN = ("letter", "rhyme", "ask_colour", "ask_home", "ask_job", "dishes", "colours", "other_name",
          "judge_review", "where")


class Task(NamedTuple):
    """An instruction and an instance of it, as far as they are known."""
    instruction: str
    given: str = ""          # its input, if it takes one
    answer: str = ""
    choice: bool = False     # whether it is one between labels: written before the input


def leaks(task: Task) -> bool:
    """Whether an instruction of the town is held out: by itself or without the words that people
    begin with, alone, before its input or after it."""
    given = " ".join(task.given.split())
    return any(held_out(form) for text in {task.instruction, without_prefix(task.instruction)}
               for form in {text, f"{text} {given}".strip(), f"{given} {text}".strip()})


def town_seeds(seed: int, count: int = 175) -> list[Task]:
    """Tasks of the town with good answers, about equally many of every kind that is not
    UNSEEN; none is held out."""
    draw, kinds, found = random.Random(f"seeds-{seed}"), defaultdict(list), {}
    most = -(-count // (len(single_turn()) - len(UNSEEN)))
    for messages, family, slots in town.instructions("sft", 20_000, seed):
        if len(messages) > 1 or family.name in UNSEEN or len(kinds[family.name]) == most:
            continue
        stem, given = split_given(without_prefix(messages[0]["content"]), slots)
        task = Task(stem, given, family.good(draw, **slots),
                    family.use_case == "classification")
        if (stem, given) not in found and not leaks(task):
            found[stem, given] = task
            kinds[family.name].append(task)
    return draw.sample(list(found.values()), min(count, len(found)))


def single_turn() -> list[town.Family]:
    """The kinds of task that are no conversation."""
    return [family for family in town.FAMILIES if "\n" not in family.phrasings[0]]


def conversation(task: Task, draw: random.Random) -> dict:
    """A task as a demonstration: its input before or after it, and any of the words that people
    begin with, as the paper's several templates; but never as a prompt that is held out."""
    given = " ".join(task.given.split())
    bodies = {f"{task.instruction} {given}".strip(), f"{given} {task.instruction}".strip()}
    forms = [prefix + body for prefix in town.PREFIXES for body in sorted(bodies)]
    asked = draw.choice([form for form in forms if not held_out(form)])
    return {"messages": [{"role": "user", "content": asked},
                         {"role": "assistant", "content": task.answer}]}


@lru_cache(maxsize=1)
def stems() -> list[tuple[str, re.Pattern]]:
    """(kind, pattern) of every phrasing of one turn, without its input."""
    found = []
    for family in single_turn():
        for phrasing in family.phrasings:
            if "\n" not in phrasing:
                given = next((part for part in INPUTS if part in phrasing), "\n")
                stem = phrasing.removeprefix("Read this: ").replace(given, " ")
                found.append((family.name, town.pattern_of(" ".join(stem.split()))))
    return found


def kind_of(instruction: str) -> str | None:
    """The kind of task that an instruction asks for, whatever its input; None: not the town's."""
    return next((kind for kind, stem in stems() if stem.fullmatch(instruction)), None)


def validity(tasks: list[Task], good: float = 0.9) -> list[float]:
    """Shares of tasks with a right instruction; with a right input beside it; of these, with a
    right output (gold ≥ good); of all, with all fields right."""
    valid = understood = right = 0
    for task in tasks:
        valid += kind_of(task.instruction) is not None
        forms = (f"{task.instruction} {task.given}".strip(), f"{task.given} {task.instruction}",
                 f"Read this: {task.given} {task.instruction}")
        asked = next(filter(town.understand, map(town.conversation, forms)), None)
        understood += asked is not None
        right += asked is not None and gold_score(asked, task.answer) >= good
    shares = (valid, understood, right * len(tasks) / max(1, understood), right)
    return [share / len(tasks) for share in shares]
