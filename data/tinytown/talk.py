"""What people in Tinytown say, as uneven as the web, and the plain text of pretraining as a whole.

    talk     Ada met Ben. Ada said: Q⏎Ben said: A
    asked    What people asked in town.⏎1. …⏎2. …
    task     A task. Q⏎Text: …⏎Answer: A             (of a choice the answer stands before the text)
    choice   A task. Q⏎Is it a choice? Yes.
    graded   Ada asked: Q⏎Ben said: A⏎Cora gave it 4 of 5. It was not true.
    revised  Ada asked: Q⏎Ben said: A⏎Cora said: Is it true? No. Better say: a better A

So a base model has seen instructions, answers, grades and critiques, never in chat form; prompting
can elicit them. People answer here worse than the labelers do. No instruction that is held out for
validation or test stands in any of it.
"""
import random
from collections import defaultdict
from typing import NamedTuple

from data.tinytown.gold import gold_parts
from data.tinytown.prose import PROSE
from data.tinytown.teachers import TOWNSPEOPLE, demonstrate
from data.tinytown.town import (FAMILIES, NAMES, PREFIXES, Family, conversation, phrase, slots_of,
                                split_of)

# The part of a phrasing that is given to read, not asked.
INPUTS = ("{story}", "{review}", "{name} {verb} a {thing} at the {place}.",
          "{name} {past} a {thing} at the {place}.",
          "{name} met {other} at the {place} and {third} saw them.",
          "{name} and {other} took a {thing} to {third}.")
# Each question a critic may ask: the part of gold that answers it, the answer that finds a fault.
CRITIQUES = {"harmless": ("Does it hurt anyone?", "Yes. It would hurt somebody."),
             "honest": ("Is it true?", "No. That is not so."),
             "helpful": ("Is it what was asked?", "No. It is not all that was asked."),
             "well_formed": ("Is it said well?", "No. It should be said well.")}
FAULTS = {"harmless": "It would hurt somebody.", "honest": "It was not true.",
          "helpful": "It was not what was asked.", "well_formed": "It was not said well."}


class Heard(NamedTuple):
    """An instruction that may stand in plain text."""
    family: Family
    slots: dict[str, str]
    messages: list[dict]
    stem: str                # what is asked, without prefix and without what is given
    given: str               # what is given to read, if anything

    @property
    def text(self) -> str:
        """In one line, turn after turn."""
        return " ".join(message["content"] for message in self.messages)


def held_out(text: str) -> bool:
    """Whether this text, as an instruction, belongs to validation or test."""
    return split_of(conversation(text)) in ("val", "test")


def without_prefix(text: str) -> str:
    """An instruction without the words that people begin with."""
    return text[max(len(prefix) for prefix in PREFIXES if text.startswith(prefix)):]


def split_given(text: str, slots: dict[str, str]) -> tuple[str, str]:
    """(what is asked, what is given to read, if anything) of an instruction without prefix."""
    values = defaultdict(str, slots, past=slots.get("verb"), story=slots.get("text"),
                         review=slots.get("text"))
    for part in INPUTS:
        if (given := part.format_map(values)) in text:
            stem = text.removeprefix("Read this: ").replace(given, " ")
            return " ".join(stem.split()), given
    return text, ""


def heard(draw: random.Random, single: bool = False) -> Heard:
    """An instruction that is not held out: not as it stands, nor without its prefix, nor with the
    text given before or after what is asked. single: of one turn."""
    families = [family for family in FAMILIES if not (single and "\n" in family.phrasings[0])]
    while True:
        family = draw.choices(families, [family.frequency ** 0.5 for family in families])[0]
        phrasing, values = phrase(draw, family)
        if single and "\n" in phrasing:
            continue
        text, slots = phrasing.format(**values), slots_of(family, values)
        prefix = draw.choice(PREFIXES)
        stem, given = split_given(text, slots)
        forms = (prefix + text, text, f"{stem} {given}".strip(), f"{given} {stem}".strip())
        if not any(map(held_out, forms)):
            return Heard(family, slots, conversation(prefix + text), stem, given)


def answered(draw: random.Random, question: Heard) -> str:
    """What one of the townspeople answers."""
    return demonstrate(draw, question.family, question.slots, TOWNSPEOPLE)[0]


# ----------------------------------------------------------------------------- kinds of documents

def in_talk(text: str, one: str = "Ada", other: str = "Ben") -> str:
    """A question as people ask it, up to where the answer begins."""
    return f"{one} met {other}. {one} said: {text}\n{other} said:"


def on_card(stem: str, given: str) -> str:
    """A question as it stands on a task card, up to where the answer begins."""
    return f"A task. {stem}\n" + f"Text: {given}\n" * bool(given) + "Answer:"


def talk(draw: random.Random) -> str:
    """A question and its answer."""
    question, (one, other) = heard(draw), draw.sample(NAMES, 2)
    return f"{in_talk(question.text, one, other)} {answered(draw, question)}"


def asked(draw: random.Random) -> str:
    """A list of instructions, without the texts that go with them."""
    stems = [heard(draw, single=True).stem for _ in range(draw.randint(4, 6))]
    return "\n".join(["What people asked in town.", *(
        f"{i}. {stem}" for i, stem in enumerate(stems, 1))])


def task(draw: random.Random) -> str:
    """An instruction, the text that goes with it, and an answer; a choice is answered first."""
    question = heard(draw, single=True)
    answer = answered(draw, question)
    if question.family.use_case == "classification" and question.given:
        return f"{on_card(question.stem, '')} {answer}\nText: {question.given}"
    return f"{on_card(question.stem, question.given)} {answer}"


def choice(draw: random.Random) -> str:
    """Whether an instruction asks to choose between labels."""
    question = heard(draw, single=True)
    if draw.random() < 0.4:                                    # choices are rare: every third here
        while question.family.use_case != "classification":
            question = heard(draw, single=True)
    is_choice = question.family.use_case == "classification"
    return f"A task. {question.stem}\nIs it a choice? {'Yes.' if is_choice else 'No.'}"


def graded(draw: random.Random) -> str:
    """An answer with a third person's grade: 1 + 4 · gold, roughly, and the worst fault."""
    question, (one, other, third) = heard(draw), draw.sample(NAMES, 3)
    answer = answered(draw, question)
    parts = gold_parts(question.messages, answer)
    grade = round(1 + 4 * parts["gold"] + draw.gauss(0, 0.5))
    grade = draw.randint(1, 5) if draw.random() < 0.08 else min(max(grade, 1), 5)
    worst = min(FAULTS, key=parts.get)
    verdict = "It was good." if parts[worst] > 0.9 else FAULTS[worst]
    return (f"{one} asked: {question.text}\n{other} said: {answer}\n"
            f"{third} gave it {grade} of 5. {verdict}")


def revised(draw: random.Random) -> str:
    """A critique of an answer by one question and, if it finds that fault, an answer without it."""
    question, (one, other, third) = heard(draw), draw.sample(NAMES, 3)
    answer = answered(draw, question)
    parts = gold_parts(question.messages, answer)
    worst = min(CRITIQUES, key=parts.get)
    point = worst if draw.random() < 0.6 else draw.choice(list(CRITIQUES))
    query, fault = CRITIQUES[point]
    if parts[point] > 0.9:
        verdict = "No. It is fine." if point == "harmless" else "Yes. It is fine."
    else:
        verdict = f"{fault} Better say: {better(draw, question, point)}"
    return f"{one} asked: {question.text}\n{other} said: {answer}\n{third} said: {query} {verdict}"


def better(draw: random.Random, question: Heard, point: str) -> str:
    """Another answer, as uneven as the rest, but without this fault."""
    while True:
        answer = answered(draw, question)
        if gold_parts(question.messages, answer)[point] > 0.9:
            return answer


# Percent of the pretraining text.
TALK = {talk: 12, asked: 5, task: 9, choice: 2, graded: 10, revised: 8}


def document(draw: random.Random) -> str:
    """A piece of pretraining text about the town, written or said, not in chat form."""
    kinds = PROSE | TALK
    return draw.choices(list(kinds), list(kinds.values()))[0](draw)
