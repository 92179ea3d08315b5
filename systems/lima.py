"""LIMA, less is more for alignment: a thousand chosen demonstrations against ten thousand as they
come.

    an uneven pool → a vote on each row           → votes
                   → the best of each use case    → stratified
                   → SFT of the base, equally many updates for every set → one table

Three questions, as LIMA's ablations ask them: does quality matter (voted, random, all), diversity
(one use case alone), quantity (250 to 8,000 of equal quality)? Then two small additions: a set
without conversations of several turns, and the same with 30 or 100 of them; a set without lists,
and the same with 6 or 30. Held-out loss stands beside, on all rows and on good ones alone: it
contradicts the gold score, so LIMA chose its checkpoint by reading.

A vote is what one annotator sees, or, `careless` of the time, what was meant for another row: in
this town gold scores fall into a few heaps, so that careful annotators would be an oracle.

Differences from the paper: a base of 0.7 million parameters instead of 65 billion, which learns the
form of an answer from these rows, not only its style, at a rate as high; the pretraining mix of
stage 1 goes on; no growing dropout.

From a file of demonstrations, without votes: systems/lima_file.py.

    python -m systems.lima --run out/tinytown
"""
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import train_sft
from common.run import DeviceFlags, InputError, load_gpt, main, start, write_json, write_text
from data.batches import demonstration_rows, read_prompt_rows
from data.readers import read_demonstrations
from data.tinytown.annotators import ANNOTATORS
from data.tinytown.gold import gold_score, gold_scores
from data.tinytown.report import load_pyplot, markdown, rounded, save_plot
from data.tinytown.teachers import demonstrations
from data.tinytown.town import understand
from rollout import respond
from systems import plots
from systems.table import again, compare, fresh, inside


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run: its base and prompts are read
    out: str = ""                  # empty: systems/lima inside run
    only: tuple = ()               # these sets alone; empty: all
    pool: int = 40_000             # uneven demonstrations that are voted on
    careless: float = 0.25         # share of votes that are another row's
    steps: int = 320               # updates of every set: ten epochs of 1,000 rows
    lr: float = 2e-3               # peak


LIMITS = dict(pool=(8000, 10**7), careless=(0, 1), steps=(1, 10**6))


# ----------------------------------------------------------------------------- choosing

def votes(rows: list[dict], careless: float, draw: random.Random) -> list[float]:
    """One annotator's vote on each demonstration, in units of the gold score, higher = better; a
    share `careless` of the rows get the vote that was meant for another."""
    found = []
    for row in rows:
        *messages, response = row["messages"]
        annotator, text = draw.choice(ANNOTATORS), response["content"]
        found.append(annotator.utility(draw, gold_score(messages, text), text, place=1))
    return [draw.choice(found) if draw.random() < careless else vote for vote in found]


def stratified(rows: list[dict], scores: list[float], count: int,
               equal: bool = False) -> list[dict]:
    """The `count` rows of highest score, so that each use case keeps its share of the rows, or, if
    `equal`, has the same share as the others. A use case that runs out leaves its places to the
    best of what is left. Raises ValueError for a count that is not there."""
    if count > len(rows):
        raise ValueError(f"{count} of {len(rows)} rows")
    order = sorted(range(len(rows)), key=lambda place: -scores[place])
    sizes = Counter(row["use_case"] for row in rows)
    quota = {case: count // len(sizes) if equal else count * size // len(rows)
             for case, size in sizes.items()}
    taken: list[int] = []
    for place in order:
        if quota[rows[place]["use_case"]]:
            quota[rows[place]["use_case"]] -= 1
            taken.append(place)
    chosen = set(taken)
    taken += [place for place in order if place not in chosen][:count - len(taken)]
    return [rows[place] for place in taken]


def several_turns(messages: list[dict]) -> bool:
    """Whether a prompt is a conversation."""
    return len(messages) > 2


def asks_for_a_list(messages: list[dict]) -> bool:
    """Whether a prompt wants a numbered list."""
    return understand(messages)[0].use_case == "brainstorming"


def sets_of(pool: list[dict], scores: list[float], draw: random.Random) -> dict[str, list[dict]]:
    """Every set of the table, by name."""
    by_vote = [pool[place] for place in sorted(range(len(pool)), key=lambda i: -scores[i])]
    stories = [row for row in by_vote if row["use_case"] == "generation"
               and "story" in row["messages"][0]["content"]]
    found = {"all_10000": draw.sample(pool, min(10_000, len(pool))),
             "random_1000": draw.sample(pool, 1000),
             "voted_equal_1000": stratified(pool, scores, 1000, equal=True),
             "stories_1000": stories[:1000]}
    for count in (250, 1000, 4000, 8000):
        found[f"voted_{count}"] = stratified(pool, scores, count)
    voted = found["voted_1000"]
    for name, missing, counts in (("turns", several_turns, (0, 30, 100)),
                                  ("lists", asks_for_a_list, (0, 6, 30))):
        without = [row for row in voted if not missing(row["messages"][:-1])]
        more = [row for row in by_vote if missing(row["messages"][:-1])]
        for count in counts:
            found[f"{name}_{count}"] = without + more[:count]
    return found


# ----------------------------------------------------------------------------- measuring

def fit(name: str, rows: list[dict], config: Config, batch_size: int = 32, **changed) -> str:
    """SFT of the base on a set, about as many updates as for the others; not anew where the same
    rows were trained on, from the same model. changed: init, val and others that are not the
    run's. Returns its folder."""
    out, text = f"{config.out}/{name}", as_lines(rows)
    path, settings = Path(f"{out}.jsonl"), changed or dict(
        init=f"{config.run}/base", val=f"{config.run}/data/sft_val.jsonl",
        ptx_data=(f"{config.run}/data/base.txt",))
    same, weights = path.exists() and path.read_text() == text, Path(settings["init"]) / "model.pt"
    if not same or not fresh(f"{out}/final.json", *[weights] * weights.exists()):
        write_text(path, text)
        train_sft.train(train_sft.Config(
            data=(str(path),), out=out, batch_size=batch_size, lr=config.lr, seed=config.seed,
            epochs=max(1, round(config.steps * batch_size / len(rows))),
            device=config.device, dtype=config.dtype, **settings, **again(out)))
    return out


def as_lines(rows: list[dict]) -> str:
    """Demonstrations as the text of a file that train_sft.py reads."""
    return "".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows)


def details(rows: dict[str, list[dict]], config: Config) -> dict[str, dict]:
    """What the common table does not show of each set: what its rows are worth, held-out loss on
    all rows and on good ones, gold on conversations and on lists at T = 0 and T = 1."""
    run, home = start(config, LIMITS), Path(config.out)
    base, tokenizer = load_gpt(f"{config.run}/base")
    val = map(json.loads, Path(f"{config.run}/data/sft_val.jsonl").read_text().splitlines())
    write_text(home / "good_val.jsonl", as_lines([row for row in val if row["quality"] == "good"]))
    good = demonstration_rows(read_demonstrations(home / "good_val.jsonl"), tokenizer,
                              base.config.block_size)
    prompts = read_prompt_rows((f"{config.run}/data/test.jsonl",), tokenizer, 80)
    found = {}
    for name, some in rows.items():
        model = run.freeze(load_gpt(f"{config.out}/{name}")[0])
        worth = [gold_score(row["messages"][:-1], row["messages"][-1]["content"]) for row in some]
        one = {"rows": len(some), "gold_of_rows": sum(worth) / len(worth),
               "val_loss": json.loads((home / name / "final.json").read_text())["val_loss"],
               "good_loss": train_sft.evaluate(model, good, tokenizer.pad, run.device)}
        for kind, asks in (("turns", several_turns), ("lists", asks_for_a_list)):
            asked = [prompt for prompt in prompts if asks(prompt.messages)]
            for t in (0.0, 1.0):
                answers = respond(model, asked, tokenizer, 48, seed=config.seed, temperature=t)
                gold = gold_scores(asked, answers)
                one[f"{kind}, T = {t:g}"] = sum(gold) / len(gold)
        found[name] = one
    return rounded(found)


def measure(config: Config) -> dict:
    """Every set chosen, trained, and compared; writes table.json and lima.png into out."""
    start(config, LIMITS)
    config = inside(config, "lima")
    draw = random.Random(f"lima-{config.seed}")
    pool = demonstrations("sft", config.pool, config.seed)
    rows = sets_of(pool, votes(pool, config.careless, draw), draw)
    for name in config.only:
        if name not in rows:
            raise InputError(f"--only {name}: expected some of {', '.join(rows)}")
    rows = {name: rows[name] for name in config.only or rows}
    found = compare(config, {name: fit(name, some, config) for name, some in rows.items()})
    more = details(rows, config)
    columns = list(next(iter(more.values())))
    print(markdown(["set", *(column.replace("_", " ") for column in columns)],
                   [[name, str(one["rows"]), *list(one.values())[1:]]
                    for name, one in more.items()]))
    write_json(Path(config.out) / "table.json", {"table": found, "sets": more}, indent=1)
    if pyplot := load_pyplot():
        save_plot(plots.bars(pyplot, found), Path(config.out) / "lima.png")
        pyplot.close("all")
    return found


if __name__ == "__main__":
    main(measure, Config)
