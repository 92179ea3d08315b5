"""Tinytown's 13 annotators, as in AlpacaFarm: each sees a noisy, biased view of the gold score."""
import random
from dataclasses import dataclass

from data.tinytown.gold import gold_score


@dataclass(frozen=True, slots=True)
class Annotator:
    """One labeler: sees the gold score with noise; has a taste for length, lists or the first."""
    noise: float                 # standard deviation of the error, in units of the gold score
    length: float                # taste for length, gold per 20 words
    lists: float = 0.0           # taste for enumerations
    first: float = 0.0           # taste for the response shown first

    def utility(self, draw: random.Random, gold: float, response: str, place: int) -> float:
        return (gold + draw.gauss(0, self.noise) + self.length * len(response.split()) / 20
                + self.lists * ("1." in response) + self.first * (place == 0))


ANNOTATORS = [
    Annotator(0.05, 0.0), Annotator(0.05, 0.02), Annotator(0.1, 0.02), Annotator(0.1, 0.0),
    Annotator(0.05, 0.04), Annotator(0.15, 0.02), Annotator(0.1, 0.05),
    Annotator(0.05, 0.0, lists=0.1), Annotator(0.1, 0.0, lists=0.05),
    Annotator(0.05, 0.0, first=0.1), Annotator(0.1, 0.02, first=0.05),
    Annotator(0.1, 0.08), Annotator(0.15, 0.1)]


def rank_responses(draw: random.Random, messages: list[dict], responses: list[str],
                   ended: list[bool], flip: float = 0.25) -> list[float]:
    """Scores of K responses by one annotator drawn from the pool, higher = better; equal texts tie.

    With `flip` = 0.25 the annotator is careless about some of the responses and puts each first or
    last at a toss, so that a quarter of all pairs come out in the wrong order; with 0 only taste
    and noise remain.
    """
    annotator = draw.choice(ANNOTATORS)
    seen: dict[tuple[str, bool], float] = {}
    for place, key in enumerate(zip(responses, ended)):
        if key not in seen:
            seen[key] = annotator.utility(draw, gold_score(messages, *key), key[0], place)
    order = sorted(seen, key=seen.get)                                   # worst to best
    careless = 1 - (1 - 2 * flip) ** 0.5
    moved = [key for key in order if draw.random() < careless]
    order = [key for key in order if key not in moved]
    for key in moved:
        order.insert(draw.choice((0, len(order))), key)
    return [float(order.index(key)) for key in zip(responses, ended)]
