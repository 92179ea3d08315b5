"""Tinytown's word games: tasks without end, each told by its instruction.

    Text: Ada fox red mill. Say the animal, then key.        → So: fox key.

A cluster is a rule and a kind of word ("add animal"); a game is one task of it, its own word or
other kind drawn anew, so that nothing but the instruction says what to do. Whole clusters are held
out by name. Phrasings are trained or unseen. The words are the town's, a token each.
"""
import random
from typing import NamedTuple

from data.tinytown.town import NAMES, PAST, THINGS, VALUES

KINDS = {"name": NAMES, "thing": THINGS, "animal": VALUES["animal"], "colour": VALUES["colour"],
         "place": VALUES["home"], "food": VALUES["food"], "job": VALUES["job"],
         "verb": list(PAST.values())}
WORDS = sorted(word for words in KINDS.values() for word in words)
# Rule → how to say what is wanted, three ways for training and one unseen; {k} is the cluster's
# kind, {l} another kind, {w} a word. Then the answer: k, l, w stand for those words.
RULES = {
    "pick": (("the {k}", "the word that is a {k}", "what {k} there is", "only the {k}"), "k"),
    "twice": (("the {k} two times", "the {k} and again the {k}", "two of the {k}",
               "the {k} and one more {k}"), "kk"),
    "add": (("the {k}, then {w}", "the {k} with {w} after it", "{w} after the {k}",
             "the {k} and at the end {w}"), "kw"),
    "before": (("{w}, then the {k}", "the {k} with {w} before it", "{w} before the {k}",
                "{w} and at the end the {k}"), "wk"),
    "pair": (("the {k}, then the {l}", "the {k} with the {l} after it", "the {l} after the {k}",
              "the {k} and at the end the {l}"), "kl"),
}
# Frames of a phrasing: what is wanted goes into {0}, the text into {1}. No. i says what is wanted
# in way i mod 3; of the unseen ones the last three in the unseen way.
TRAINED = ("Say {0}. {1}", "{1} Give me {0}.", "Find {0}. {1}", "{1} I want {0}.",
           "Tell me {0}. {1}", "{1} Write {0}.", "Help me to find {0}. {1}", "{1} Now say {0}.")
UNSEEN = ("Please write {0}. {1}", "{1} Bring {0}.", "Read this for {0}. {1}", "{1} Where is {0}?",
          "We need {0}. {1}", "{1} Can you see {0}?", "Show {0} to me. {1}", "{1} Name {0}.",
          "What is {0}? {1}", "{1} Please help me with {0}.")
NEW_WAY = len(TRAINED) + len(UNSEEN) - 3
CLUSTERS = [f"{rule} {kind}" for rule in RULES for kind in KINDS]
HELD_OUT = ("pick food", "pick verb", "twice job", "twice thing", "add name", "before colour",
            "pair place", "pair animal")
SEEN = [cluster for cluster in CLUSTERS if cluster not in HELD_OUT]
FORMS = {"So:": "So: {}.", "It is": "It is {}."}     # how an answer begins


class Game(NamedTuple):
    """One task: its cluster and what its instruction says."""
    cluster: str
    other: str                       # another kind, {l}
    word: str                        # {w}
    form: str = "So:"

    @property
    def kind(self) -> str:
        return self.cluster.split()[1]

    def wanted(self, phrasing: int) -> str:
        """What is wanted, in the way of this phrasing."""
        ways = RULES[self.cluster.split()[0]][0]
        way = 3 if phrasing >= NEW_WAY else phrasing % 3
        return ways[way].format(k=self.kind, l=self.other, w=self.word)

    def answer(self, text: dict[str, str]) -> str:
        """The right answer to a text (kind → word)."""
        stand = {"k": text[self.kind], "l": text[self.other], "w": self.word}
        pattern = RULES[self.cluster.split()[0]][1]
        return FORMS[self.form].format(" ".join(stand[one] for one in pattern))


def draw_game(draw: random.Random, cluster: str, form: str = "So:") -> Game:
    """A task of a cluster."""
    kind = cluster.split()[1]
    return Game(cluster, draw.choice([one for one in KINDS if one != kind]), draw.choice(WORDS),
                form)


def draw_text(draw: random.Random, game: Game) -> dict[str, str]:
    """Four words of four kinds, those of the game among them, in any order: kind → word."""
    kinds = [game.kind, game.other]
    kinds += draw.sample([kind for kind in KINDS if kind not in kinds], 2)
    return {kind: draw.choice(KINDS[kind]) for kind in draw.sample(kinds, 4)}


def instruction(game: Game, text: dict[str, str], phrasing: int) -> str:
    """The task with its text, in a phrasing: a number into TRAINED, then into UNSEEN."""
    given = f"Text: {' '.join(text.values())}."
    return (TRAINED + UNSEEN)[phrasing].format(game.wanted(phrasing), given)


def demonstration(asked: str, answer: str) -> dict:
    """A row {"messages"}."""
    return {"messages": [{"role": "user", "content": asked},
                         {"role": "assistant", "content": answer}]}


def rows_of(draw: random.Random, clusters: list[str], count: int,
            phrasings: list[int]) -> list[dict]:
    """`count` demonstrations, the clusters and phrasings in equal shares, each of a new game."""
    rows = []
    for i in range(count):
        game = draw_game(draw, clusters[i % len(clusters)])
        text = draw_text(draw, game)
        asked = instruction(game, text, phrasings[i // len(clusters) % len(phrasings)])
        rows.append(demonstration(asked, game.answer(text)))
    return rows


# ----------------------------------------------------------------------------- the schema

def described(draw: random.Random, game: Game, text: dict[str, str], parts: tuple[str, ...]) -> str:
    """The task with its text as Natural Instructions describe one, by some of four elements.

    definition: what is wanted. avoid: how the answer may not begin, which the definition leaves
    open. good: another text with its answer. bad: another one with a wrong answer.
    """
    other = next(form for form in FORMS if form != game.form)
    shown, spoiled = draw_text(draw, game), draw_text(draw, game)
    third = next(kind for kind in spoiled if kind not in (game.kind, game.other))
    wrong = game.answer(spoiled | {game.kind: spoiled[third]})
    says = {"definition": f"Say {game.wanted(0)}.", "avoid": f"Do not begin with {other}.",
            "good": f"Good: {' '.join(shown.values())}. {game.answer(shown)}",
            "bad": f"Bad: {' '.join(spoiled.values())}. {wrong}"}
    return " ".join([*(says[part] for part in parts), f"Text: {' '.join(text.values())}."])


def described_rows(draw: random.Random, clusters: list[str], count: int,
                   parts: tuple[str, ...]) -> list[dict]:
    """As `rows_of`, but described by these elements; answers begin in either way."""
    rows = []
    for i in range(count):
        game = draw_game(draw, clusters[i % len(clusters)], draw.choice(list(FORMS)))
        text = draw_text(draw, game)
        rows.append(demonstration(described(draw, game, text, parts), game.answer(text)))
    return rows
