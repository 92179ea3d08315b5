"""Tinytown's pairs for instruction backtranslation: an instruction, a text, what they are worth.

    turned  "Ben said: A⏎What had Ada asked?"              → Q
    rated   "Ada asked: Q⏎Ben said: A⏎How good was it?"    → Score: 4     (of half of them Q is not
                                                                          what A answers)
A base of 0.7 million parameters can neither turn a pair round nor rate one; it practises on these.
No instruction of validation or test stands in any of it.
"""
import random

from data.tinytown.gold import gold_score
from data.tinytown.prose import PROSE
from data.tinytown.talk import Heard, heard
from data.tinytown.tasks import Task, leaks
from data.tinytown.teachers import demonstrate, swap_word
from data.tinytown.town import conversation, understand

TURNED = "Ben said: {}\nWhat had Ada asked?"
RATED = "Ada asked: {}\nBen said: {}\nHow good was it?"
# Shares of answers: of unlabelled ones; of those that are rated in practice; of those turned round.
WEB = {"good": 0.5, "habit": 0.2, "sloppy": 0.15, "bad": 0.15}
MIXED = {"good": 0.7, "habit": 0.12, "sloppy": 0.09, "bad": 0.09}
CAREFUL = {"good": 1.0}


def answered(draw: random.Random, shares: dict[str, float]) -> tuple[Heard, str]:
    """An instruction of one turn, and an answer to it."""
    asked = heard(draw, single=True)
    return asked, demonstrate(draw, asked.family, asked.slots, shares)[0]


def worth(asked: str, text: str) -> float:
    """Gold of a text as the answer to an instruction; 0 if the town does not understand it."""
    messages = conversation(asked)
    return gold_score(messages, text) if understand(messages) else 0.0


def unlabelled(draw: random.Random, count: int) -> list[str]:
    """Texts without instructions: answers, and some prose, which answers nothing."""
    return [answered(draw, WEB)[1] if draw.random() < 0.85 else draw.choice(list(PROSE))(draw)
            for _ in range(count)]


def turned(asked: str, text: str) -> dict[str, str]:
    """A pair the other way round, as a demonstration."""
    return {"instruction": TURNED.format(text), "output": asked}


def rated(draw: random.Random) -> dict[str, str]:
    """A pair and its score, 1 + 4 · gold, as a demonstration. Half of the instructions are not what
    was answered: a detail is another, or all of it, of the same kind or of any."""
    asked, text = answered(draw, MIXED)
    said, change = asked.text, draw.choices(("none", "detail", "kind", "any"), (50, 25, 15, 10))[0]
    if change == "detail":
        said = swap_word(draw, said)
    elif change != "none":
        other = heard(draw, single=True)
        while change == "kind" and other.family is not asked.family:
            other = heard(draw, single=True)
        said = other.text
    if understand(conversation(said)) is None or leaks(Task(said)):
        return rated(draw)
    return {"instruction": RATED.format(said, text),
            "output": f"Score: {round(1 + 4 * worth(said, text))}"}


def practice(draw: random.Random, count: int) -> list[dict[str, str]]:
    """Demonstrations of both kinds."""
    rows = []
    for _ in range(count):
        asked, text = answered(draw, CAREFUL)
        rows.append(turned(asked.text, text) if draw.random() < 0.45 else rated(draw))
    return rows
