"""What careful people in Tinytown write down: facts, stories, letters, signs, lists, reviews.

None of it is in chat form and all of it is good. `talk.py` adds what people say.
"""
import random

from data.tinytown.town import (MOODS, NAMES, NUMBERS, PAST, REVIEWS, THINGS, VALUES, ideas, letter,
                                rhyme, sign, some_of, state, story, summary)


def some_facts(draw: random.Random) -> str:
    """Several attributes of one resident."""
    name = draw.choice(NAMES)
    return " ".join(state(draw, name, kind)
                    for kind in some_of(draw, list(VALUES), draw.randint(3, 6)))


def one_attribute(draw: random.Random) -> str:
    """One attribute of several residents."""
    kind = draw.choice(list(VALUES))
    return " ".join(state(draw, name, kind) for name in draw.sample(NAMES, 4))


def titled_story(draw: random.Random) -> str:
    """A story under a title that says what is in it; some with a summary."""
    name, thing, place = draw.choice(NAMES), draw.choice(THINGS), draw.choice(VALUES["home"])
    mood = draw.choice(list(MOODS))
    title, known = draw.choice([
        (f"A {mood} story about {name} and a {thing}.", {"thing": thing, "mood": mood}),
        (f"A story about {name}, a {thing} and the {place}.", {"thing": thing, "place": place}),
        (f"A {mood} story about {name} at the {place}.", {"place": place, "mood": mood})])
    told = story(draw, name, **known)
    short = f"\nIn short: {summary(draw, told)}" if draw.random() < 0.4 else ""
    return f"{title}\n{told}{short}"


def titled_letter(draw: random.Random) -> str:
    """A letter under a line that says from whom, to whom and about what."""
    name, other = draw.sample(NAMES, 2)
    thing = draw.choice(THINGS)
    return (f"A letter from {name} to {other} about a {thing}.\n"
            f"{letter(draw, name, other, thing)}")


def titled_sign(draw: random.Random) -> str:
    """A sign under a line that says what for."""
    food, place = draw.choice(VALUES["food"]), draw.choice(VALUES["home"])
    return f"A sign with {food} for the {place}.\n{sign(draw, place, food)}"


def titled_rhyme(draw: random.Random) -> str:
    """A rhyme under its subject."""
    animal = draw.choice(VALUES["animal"])
    return f"A rhyme about a {animal}.\n{rhyme(draw, animal)}"


def titled_list(draw: random.Random) -> str:
    """A numbered list under its topic and length."""
    topic = draw.choice(["gifts", "dishes", "animals", "colours"])
    n = draw.choice(list(NUMBERS))
    return f"A list of {n} {topic}.\n{ideas(draw, n, topic=topic)}"


def judged_review(draw: random.Random) -> str:
    """A review, and whether it was good or bad."""
    mood = draw.choice(["good", "bad"])
    review = draw.choice(REVIEWS[mood]).format(food=draw.choice(VALUES["food"]))
    return f"A review of the {draw.choice(VALUES['home'])}. {review} It was {mood}."


def sorted_words(draw: random.Random) -> str:
    """Words, each with its kind, as a picture book has them."""
    words = draw.sample(VALUES["animal"] + VALUES["food"], 4)
    return " ".join(f"{word}: {'an animal' if word in VALUES['animal'] else 'a food'}."
                    for word in words)


def event(draw: random.Random) -> str:
    """The same event in the present and in the past."""
    name, other, third = draw.sample(NAMES, 3)
    thing, place, verb = draw.choice(THINGS), draw.choice(VALUES["home"]), draw.choice(list(PAST))
    return (f"{name} {verb} a {thing} at the {place}. {other} and {third} saw {name} there. "
            f"So {name} {PAST[verb]} the {thing} at the {place}.")


# Percent of the pretraining text; the rest is talk.
PROSE = {some_facts: 10, one_attribute: 2, titled_story: 14, titled_letter: 7, titled_sign: 4,
         titled_rhyme: 2, titled_list: 4, judged_review: 2, sorted_words: 2, event: 7}


def prose(draw: random.Random) -> str:
    """A document of any of these kinds."""
    return draw.choices(list(PROSE), list(PROSE.values()))[0](draw)
