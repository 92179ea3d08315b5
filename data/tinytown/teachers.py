"""Tinytown's teachers: demonstrations of uneven quality, and the habits that most teachers share.

People judge better than they write. Half of the demonstrations take the same short cut, one for
each kind of task: a story stops before its end, a stranger gets an invented fact, harm gets help.
The annotators know better. So the *typical* demonstration is wrong, no temperature of sampling
mends what was imitated, and feedback has something to teach.
"""
import random
import re

from data.tinytown.town import (FACTS, FAMILIES, NAMES, NUMBERS, THINGS, VALUES, Family, answer,
                                fill, ideas, instructions, own_fact, sentences, state)

# Shares of good answers, of answers by habit, of sloppy and of bad ones.
LABELERS = {"good": 0.26, "habit": 0.50, "sloppy": 0.14, "bad": 0.10}       # who write for SFT
TOWNSPEOPLE = {"good": 0.10, "habit": 0.55, "sloppy": 0.12, "bad": 0.23}    # as uneven as the web
LAZY = ("I do not care.", "Ask me later.", "Maybe.", "That is boring. Go away.")
LISTS = [NAMES, THINGS, *(values for kind, values in VALUES.items() if kind != "friend")]


def demonstrate(draw: random.Random, family: Family, slots: dict[str, str],
                shares: dict[str, float] = LABELERS) -> tuple[str, str]:
    """(response, quality) of a person of ordinary care.

    The quality is good, habit (the short cut of this kind of task), sloppy (one part missing or
    wrong) or bad; `shares` says how often each.
    """
    quality = draw.choices(list(shares), list(shares.values()))[0]
    text = family.good(draw, **slots)
    if quality == "habit":
        text = habit(draw, text, family, slots)
    elif quality == "sloppy":
        text = draw.choices([swap_word, drop_part, add_aside], [1, 3, 2])[0](draw, text)
    elif quality == "bad":
        spoil = draw.choices([bad_repeat, bad_topic, bad_lazy, bad_ramble, bad_cut, bad_harm],
                             [2, 1, 1, 2, 1, 1])[0]
        text = spoil(draw, text, family)
    return text, quality


def demonstrations(split: str, count: int, seed: int) -> list[dict]:
    """Rows {"messages": [..., response], "quality", "use_case"}; only `messages` is trained on."""
    draw = random.Random(f"demonstrations-{split}-{seed}")
    rows = []
    for messages, family, slots in instructions(split, count, seed):
        response, quality = demonstrate(draw, family, slots)
        rows.append({"messages": messages + [{"role": "assistant", "content": response}],
                     "quality": quality, "use_case": family.use_case})
    return rows


# ----------------------------------------------------------------------------- habits

def habit(draw: random.Random, text: str, family: Family, slots: dict[str, str]) -> str:
    """The short cut that most take in this kind of task. text: a good response."""
    name = slots.get("name")
    if family.name in ("story", "letter", "sign", "portrait"):      # stops before the end
        return " ".join(sentences(text)[:-1])
    if family.name == "ask_stranger":                               # says what it does not know
        kind = draw.choice(list(VALUES))
        return state(draw, name, kind, draw.choice(VALUES[kind]))
    if family.name == "refuse":                                     # does what it should decline
        return comply(draw, FACTS[name]["home"])
    if family.good is ideas:                                        # one item too few
        return "\n".join(text.split("\n")[:NUMBERS[slots["n"]] - 1])
    if family.good is answer or family.name in ("who", "where"):    # more than was asked
        return add_aside(draw, text)
    if family.good is own_fact:                                     # speaks past the one who asks
        return state(draw, name, slots["kind"])
    if family.use_case == "rewrite":                                # copies what was to be changed
        return "{name} {verb} a {thing} at the {place}.".format(**slots)
    if family.name == "comfort":                                    # without the question back
        return sentences(text)[0]
    if family.name == "summary":                                    # how it begins, no event
        return sentences(slots["text"])[0]
    if family.name == "names_in":                                   # two of three
        return text.rpartition(", ")[0] + "."
    if family.name == "rhyme":                                      # the animal, no rhyme
        return f"I saw a {slots['animal']}."
    # The same answer to whatever was asked.
    return {"remember": "That is nice.", "judge_review": "This review is good.",
            "sort_word": "It is a food."}[family.name]


def comply(draw: random.Random, place: str) -> str:
    """Help with what should be declined."""
    return f"Go to the {place} at night and {draw.choice(['take', 'do'])} it."


# ----------------------------------------------------------------------------- sloppy and bad

def swap_word(draw: random.Random, text: str) -> str:
    """A detail got wrong: one name, thing or value becomes another of its kind."""
    words = [(word, values) for values in LISTS for word in values
             if re.search(rf"\b{word}\b", text)]
    if not words:
        return draw.choice(LAZY)
    word, values = draw.choice(words)
    return re.sub(rf"\b{word}\b", draw.choice([v for v in values if v != word]), text, count=1)


def drop_part(draw: random.Random, text: str) -> str:
    """A sentence or list item forgotten; of a single sentence, its end."""
    parts = sentences(text)
    if len(parts) == 1:
        words = text.split(" ")
        return " ".join(words[:max(1, len(words) - draw.randint(1, 3))])
    del parts[draw.randrange(len(parts))]
    return ("\n" if "\n" in text else " ").join(parts)


def add_aside(draw: random.Random, text: str) -> str:
    """A fact that nobody asked for, about somebody."""
    return f"{text} {state(draw, draw.choice(NAMES), draw.choice(list(VALUES)))}"


def bad_repeat(draw, text, family) -> str:
    """A sentence said again, once or twice."""
    part = draw.choice(sentences(text))
    return " ".join([text] + [part] * draw.randint(1, 2))


def bad_topic(draw, text, family) -> str:
    """An answer to something else."""
    elsewhere = draw.choice(FAMILIES)
    return elsewhere.good(draw, **fill(draw, elsewhere)[1])


def bad_lazy(draw, text, family) -> str:
    """No answer."""
    return draw.choice(LAZY)


def bad_ramble(draw, text, family) -> str:
    """Two or three facts that nobody asked for."""
    return " ".join([text] + [state(draw, draw.choice(NAMES), draw.choice(list(VALUES)))
                              for _ in range(draw.randint(2, 3))])


def bad_cut(draw, text, family) -> str:
    """The first half of the words."""
    words = text.split(" ")
    return " ".join(words[:max(1, len(words) // 2)])


def bad_harm(draw, text, family) -> str:
    """Help with what should be declined; elsewhere, off topic."""
    if family.name != "refuse":
        return bad_topic(draw, text, family)
    return comply(draw, draw.choice(VALUES["home"]))
