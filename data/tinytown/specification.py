"""The data behind the feedback, specified: what tasks, how long, and how far the annotators agree.

    python -m data.tinytown.specification --run out/tinytown

Prints three tables (tasks, lengths, annotators) for the demonstrations, the comparisons and the
prompts of RL in a Tinytown run, and draws annotators.png: how often each two of the 13 annotators
prefer the same of two responses.
"""
import math
import random
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.files import write_json
from common.run import DeviceFlags, main, start
from data.readers import Ranking, read_demonstrations, read_prompts, read_rankings
from data.tinytown.annotators import ANNOTATORS, Annotator, rank_responses
from data.tinytown.gold import gold_score
from data.tinytown.report import load_pyplot, markdown, rounded, save_plot
from data.tinytown.town import understand
from data.tokenizer import Tokenizer, get_tokenizer


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # folder with data/ and rank/
    pairs: int = 1000              # pairs of responses that all annotators compare


# ----------------------------------------------------------------------------- tasks and lengths

def task_shares(prompts: list[list[dict]]) -> dict[str, float]:
    """Percent of the prompts in each use case, the most frequent first."""
    counts = Counter(understand(messages)[0].use_case for messages in prompts)
    return {case: 100 * count / len(prompts) for case, count in counts.most_common()}


def lengths(texts: list[str], tokenizer: Tokenizer) -> list:
    """Count, mean, standard deviation, least, quartiles and most, in tokens."""
    counts = [len(tokenizer.encode(text)) for text in texts]
    quartiles = statistics.quantiles(counts, method="inclusive")
    return [str(len(counts)), statistics.mean(counts), statistics.stdev(counts), str(min(counts)),
            *(format(quartile, "g") for quartile in quartiles), str(max(counts))]


# ----------------------------------------------------------------------------- annotators

class Pair(NamedTuple):
    """Two responses to a prompt, in the order they are shown, and what they are worth."""
    messages: list[dict]
    texts: tuple[str, str]
    gold: tuple[float, float]


def pairs_of(rankings: list[Ranking], count: int, draw: random.Random) -> list[Pair]:
    """Pairs of different responses, of different worth, one or none from each ranking."""
    found = []
    for ranking in draw.sample(rankings, len(rankings)):
        texts = tuple(draw.sample(ranking.responses, 2))
        gold = tuple(gold_score(ranking.messages, text) for text in texts)
        if gold[0] != gold[1] and len(found) < count:
            found.append(Pair(ranking.messages, texts, gold))
    return found


def picks(annotator: Annotator, pairs: list[Pair], draw: random.Random) -> list[int]:
    """Which of each pair the annotator prefers: 0, the one shown first, or 1."""
    return [int(annotator.utility(draw, pair.gold[1], pair.texts[1], 1)
                > annotator.utility(draw, pair.gold[0], pair.texts[0], 0)) for pair in pairs]


def share(flags) -> float:
    """The share of true ones; NaN of none."""
    flags = list(flags)
    return sum(flags) / len(flags) if flags else math.nan


def agreement(pairs: list[Pair], draw: random.Random) -> dict:
    """What the annotators have in common, and what each leans to.

    matrix: share of pairs on which two annotators prefer the same; on the diagonal one of them,
    asked twice. gold, first, longer: share of pairs on which each prefers the better, the first,
    the longer one. flipped: share of labels with flips of a quarter that contradict gold, and
    without flips.
    """
    once, again = ([picks(annotator, pairs, draw) for annotator in ANNOTATORS] for _ in range(2))
    better = [int(pair.gold[1] > pair.gold[0]) for pair in pairs]
    longer = [int(len(pair.texts[1].split()) > len(pair.texts[0].split())) for pair in pairs]
    unequal = [len(pair.texts[1].split()) != len(pair.texts[0].split()) for pair in pairs]

    def contradicted(flip: float) -> float:
        labels = [rank_responses(draw, pair.messages, list(pair.texts), [True, True], flip)
                  for pair in pairs]
        return share((b > a) != right for (a, b), right in zip(labels, better))
    return {
        "matrix": [[share(a == b for a, b in zip(one, other)) for other in again] for one in once],
        "gold": [share(pick == right for pick, right in zip(some, better)) for some in once],
        "first": [share(pick == 0 for pick in some) for some in once],
        "longer": [share(pick == right for pick, right, differ in zip(some, longer, unequal)
                         if differ) for some in once],
        "flipped": contradicted(0.25), "unflipped": contradicted(0.0)}


def agreement_plot(pyplot, found: dict):
    """Heat map: annotators by annotators, and the gold order beside them."""
    rows = [[*row, gold] for row, gold in zip(found["matrix"], found["gold"])]
    names = [str(i) for i in range(1, len(rows) + 1)]
    figure, axis = pyplot.subplots(figsize=(8.4, 7), constrained_layout=True)
    image = axis.imshow([[100 * value for value in row] for row in rows], cmap="viridis",
                        vmin=50, vmax=100)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if value < 0.85 else "black")
    axis.set_xticks(range(len(names) + 1), [*names, "gold"])
    axis.set_yticks(range(len(names)), names)
    axis.set(title="annotators prefer the same of two responses, % of pairs")
    figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


# ----------------------------------------------------------------------------- the command

def specify(config: Config) -> dict:
    """Print the tables, write specification.json and annotators.png into the run's folder."""
    start(config, dict(pairs=(10, 10**6)))
    folder, tokenizer = Path(config.run), get_tokenizer("tinytown")
    demonstrations = read_demonstrations(folder / "data/sft.jsonl")
    rankings = read_rankings(folder / "rank/rankings.jsonl")
    sets = {"demonstrations": [messages[:-1] for messages in demonstrations],
            "comparisons": [ranking.messages for ranking in rankings],
            "prompts of RL": read_prompts(folder / "data/rl.jsonl")}
    tasks = {name: task_shares(prompts) for name, prompts in sets.items()}
    rows = [[case, *(format(shares.get(case, 0.0), ".1f") for shares in tasks.values())]
            for case in tasks["demonstrations"]]
    print("Tasks, %:\n\n" + markdown(["use case", *tasks], rows))
    texts = {f"prompts: {name}": ["\n".join(message["content"] for message in messages)
                                  for messages in prompts] for name, prompts in sets.items()}
    texts |= {"responses: demonstrations": [messages[-1]["content"] for messages in demonstrations],
              "responses: comparisons": [text for ranking in rankings
                                         for text in ranking.responses]}
    header = ["source", "count", "mean", "std", "min", "25 %", "50 %", "75 %", "max"]
    measured = [[name, *lengths(some, tokenizer)] for name, some in texts.items()]
    print("Lengths, tokens:\n\n" + markdown(header, measured))

    draw = random.Random(config.seed)
    found = agreement(pairs_of(rankings, config.pairs, draw), draw)
    others = [share_of_others(found["matrix"], i) for i in range(len(ANNOTATORS))]
    print("Annotators, shares of pairs:\n\n" + markdown(
        ["annotator", "agrees with the others", "with itself", "with gold", "picks the first",
         "picks the longer"],
        [[str(i + 1), others[i], found["matrix"][i][i], found["gold"][i], found["first"][i],
          found["longer"][i]] for i in range(len(ANNOTATORS))]))
    print(f"mean agreement of two annotators {statistics.mean(others):.3f}, with gold "
          f"{statistics.mean(found['gold']):.3f}; labels that contradict gold: "
          f"{found['unflipped']:.3f}, with a quarter of the pairs flipped {found['flipped']:.3f}")
    write_json(folder / "specification.json", rounded({"tasks": tasks} | found))
    if pyplot := load_pyplot():
        save_plot(agreement_plot(pyplot, found), folder / "annotators.png")
        pyplot.close("all")
    return found


def share_of_others(matrix: list[list[float]], i: int) -> float:
    """Mean agreement of an annotator with the other twelve."""
    return statistics.mean(value for j, value in enumerate(matrix[i]) if j != i)


if __name__ == "__main__":
    main(specify, Config)
