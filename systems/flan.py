"""FLAN, T0, Natural Instructions and Tülu: what to tune on so that unseen tasks are followed.

    word games, told by their instruction, in 40 clusters; 8 held out by name
      → SFT of the base on 2, 4, 8, 16, 32 clusters           → tune_on_clusters
      → on 1, 2, 4, 8 phrasings, asked in ten unseen ones     → tune_on_phrasings
      → on some of four elements of a task's description      → tune_on_schema
    good demonstrations of the town in six groups
      → SFT on one group alone and on mixtures of all         → tune_on_mixtures

    p_i = min(n_i, cap)^(1/τ) / Σ_j min(n_j, cap)^(1/τ)                     → mixing_weights

The points of a part have equally many updates and rows; games are drawn anew for every row and for
every question. Exact match, greedily; for mixtures the gold score.
The town's own 38 kinds of instruction are too few to carry over to kinds that no row shows; hence
games (data/tinytown/games.py). A cluster there is a rule and a kind of word; one that is held out
is a new pair of a rule and a kind, each of which other clusters teach. That is milder than FLAN.
Differences from the papers: 0.7 million parameters and, where the run has a larger base, 4 million
(FLAN: tuning harms models below 8 billion); no pretraining mix; mixtures are drawn with repetition.

    python -m systems.flan --run out/tinytown
"""
import math
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import train_sft
from common.run import DeviceFlags, load_gpt, main, start, write_json, write_text
from data.batches import prompt_rows, read_prompt_rows
from data.tinytown import games, town
from data.tinytown.gold import gold_scores
from data.tinytown.report import load_pyplot, markdown, rounded, save_plot
from evaluate import TEMPERATURES
from rollout import respond
from systems.lima import as_lines
from systems.table import again, fresh, inside

CLUSTERS, LARGER, PHRASINGS = (2, 4, 8, 16, 32), (8, 32), (1, 2, 4, 8)   # how many
ALONE = ("generation", "chat", "edits")
SIDES = {"seen": games.SEEN, "held out": games.HELD_OUT}
# What is told of a task beside its text; the last is all but the definition.
SCHEMAS = (("definition",), ("definition", "avoid"), ("definition", "avoid", "good"),
           ("definition", "avoid", "good", "bad"), ("avoid", "good", "bad"))
GROUPS = {"generation": "generation", "open qa": "facts", "brainstorming": "lists", "chat": "chat",
          "rewrite": "edits", "summarization": "edits", "closed qa": "short answers",
          "classification": "short answers", "extract": "short answers", "other": "short answers"}


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run: its base and prompts are read
    out: str = ""                  # empty: systems/flan inside run
    steps: int = 450               # updates on 32 games each
    lr: float = 4e-3               # peak; pretraining's: to find words in a text is new to the base
    large_lr: float = 1.6e-3       # of the larger base; also pretraining's
    asked: int = 480               # games that a figure is measured on
    mix_steps: int = 300           # updates on 32 demonstrations each
    mix_lr: float = 2e-3           # peak
    pool: int = 2000               # demonstrations that mixtures are drawn from
    cap: int = 400                 # of a group, in the capped mixture; generation has 900 or so


LIMITS = dict(steps=(1, 10**6), asked=(16, 10**6), mix_steps=(1, 10**6), cap=(1, 10**7),
              pool=(100, 10**7))


def mixing_weights(sizes: list[int], cap: int = 3000, temperature: float = 1.0) -> list[float]:
    """Share of each source in a mixture, adding up to 1: p_i ∝ min(n_i, cap)^(1/temperature).

    sizes: examples n_i of each. Examples-proportional mixing with a rate cap, above which a larger
    source gets no larger share (FLAN, after T5). temperature: 1 proportional, towards ∞ equal.
    Raises ValueError for no sizes, one below 1, a cap below 1, a temperature not above 0.
    """
    if not sizes or not all(size >= 1 for size in sizes) or not cap >= 1 or not temperature > 0:
        raise ValueError(f"sizes {sizes}, cap {cap}, temperature {temperature}: expected sizes and "
                         f"a cap of at least 1, a temperature above 0")
    logs = [math.log(min(size, cap)) / temperature for size in sizes]
    parts = [math.exp(one - max(logs)) for one in logs]         # the largest is 1: no overflow
    return [part / sum(parts) for part in parts]


def threshold(curve: dict[int, float]) -> int:
    """The first size, of ascending ones, half way from a curve's first value to its last."""
    first, *_, last = curve.values()
    return next(n for n, value in curve.items() if abs(value - first) >= abs(last - first) / 2)


def tune(name: str, rows: list[dict], config: Config, lr: float, base: str = "base"):
    """A base of the run after SFT on each row once; not anew where the same rows were trained
    on."""
    out, text = f"{config.out}/{name}", as_lines(rows)
    path, val = Path(f"{out}.jsonl"), Path(f"{config.out}/val.jsonl")
    same = path.exists() and path.read_text() == text
    if not same or not fresh(f"{out}/final.json", f"{config.run}/{base}/model.pt"):
        write_text(path, text)
        write_text(val, as_lines(rows[:32]))               # one has to be there; it is not used
        train_sft.train(train_sft.Config(
            data=(str(path),), val=str(val), init=f"{config.run}/{base}", out=out, epochs=1,
            lr=lr, warmup=20, seed=config.seed, device=config.device, dtype=config.dtype,
            **again(out)))
    return start(config).freeze(load_gpt(out)[0])


def exact_match(model, rows: list[dict], config: Config) -> float:
    """Share of the rows whose answer the model gives greedily, to the letter."""
    tokenizer = load_gpt(f"{config.run}/base")[1]
    prompts = prompt_rows([row["messages"][:1] for row in rows], tokenizer, 116)
    answers = respond(model, prompts, tokenizer, 12, seed=config.seed, temperature=0)
    return sum(answer.ended and answer.text == row["messages"][1]["content"]
               for answer, row in zip(answers, rows)) / len(rows)


def tune_on_clusters(config: Config) -> tuple[dict[str, dict], object]:
    """FLAN: exact match by the number of clusters, of the larger base too where the run has one;
    and the small model of all of them."""
    order, draw = list(games.SEEN), random.Random(f"clusters-{config.seed}")
    draw.shuffle(order)
    held, found = games.rows_of(draw, games.HELD_OUT, config.asked, range(8)), {}
    for count in CLUSTERS:
        rows = games.rows_of(draw, order[:count], 32 * config.steps, range(8))
        own = games.rows_of(draw, order[:count], config.asked, range(8))
        models = {str(count): tune(f"clusters_{count}", rows, config, config.lr)}
        if count in LARGER and (Path(config.run) / "base_large/final.json").exists():
            models[f"{count}, larger"] = tune(f"clusters_{count}_larger", rows, config,
                                              config.large_lr, "base_large")
        for name, model in models.items():
            each = {cluster: exact_match(model, held[i::len(games.HELD_OUT)], config)
                    for i, cluster in enumerate(games.HELD_OUT)}
            found[name] = {"seen": exact_match(model, own, config),
                           "held out": statistics.mean(each.values()), **each}
    return found, models[str(count)]


def tune_on_phrasings(all_of_them, config: Config) -> dict[str, list[float]]:
    """T0: exact match in each unseen phrasing. all_of_them: the model tuned on all the others."""
    draw, found = random.Random(f"phrasings-{config.seed}"), {}
    tests = {kind: [games.rows_of(draw, clusters, config.asked // 4, [len(games.TRAINED) + i])
                    for i in range(len(games.UNSEEN))] for kind, clusters in SIDES.items()}
    for count in PHRASINGS:
        rows = games.rows_of(draw, games.SEEN, 32 * config.steps, range(count))
        model = (all_of_them if count == len(games.TRAINED) else
                 tune(f"phrasings_{count}", rows, config, config.lr))
        for kind in SIDES:
            found[f"{count}, {kind}"] = [exact_match(model, some, config) for some in tests[kind]]
    return found


def tune_on_schema(config: Config) -> dict[str, dict[str, float]]:
    """Natural Instructions: exact match by the elements of a description, tuned and asked alike."""
    draw, found = random.Random(f"schema-{config.seed}"), {}
    for parts in SCHEMAS:
        rows = games.described_rows(draw, games.SEEN, 32 * config.steps, parts)
        model = tune("schema_" + "_".join(parts), rows, config, config.lr)
        tests = {kind: games.described_rows(draw, clusters, config.asked, parts)
                 for kind, clusters in SIDES.items()}
        found[", ".join(parts)] = {kind: exact_match(model, tests[kind], config) for kind in tests}
    return found


def by_group(model, prompts: list, tokenizer, temperature: float) -> dict[str, float]:
    """Mean gold of each group of use cases, and the mean of these."""
    answers = respond(model, prompts, tokenizer, 48, seed=0, temperature=temperature)
    gold = {group: [] for group in GROUPS.values()}
    for prompt, score in zip(prompts, gold_scores(prompts, answers)):
        gold[GROUPS[town.understand(prompt.messages)[0].use_case]].append(score)
    means = {group: statistics.mean(scores) for group, scores in gold.items() if scores}
    return {"mean": statistics.mean(means.values())} | means


def tune_on_mixtures(config: Config) -> dict[str, dict[str, float]]:
    """Tülu: gold of every group, after tuning on one group alone or on a mixture of all."""
    draw, sources = random.Random(f"mixtures-{config.seed}"), {name: [] for name in GROUPS.values()}
    for messages, family, slots in town.instructions("sft", config.pool, config.seed):
        answer = {"role": "assistant", "content": family.good(draw, **slots)}
        sources[GROUPS[family.use_case]].append({"messages": [*messages, answer]})
    sizes = [len(rows) for rows in sources.values()]
    mixtures = {f"{name} alone": [float(name == one) for one in sources] for name in ALONE}
    mixtures |= {"proportional": mixing_weights(sizes, max(sizes)),
                 "capped": mixing_weights(sizes, config.cap), "equal": mixing_weights(sizes, 1)}
    tokenizer, found = load_gpt(f"{config.run}/base")[1], {}
    test, val = (read_prompt_rows((f"{config.run}/data/{name}.jsonl",), tokenizer, 80)
                 for name in ("test", "rank_val"))                    # rank_val chooses best T
    for name, weights in mixtures.items():
        drawn = draw.choices(list(sources.values()), weights, k=32 * config.mix_steps)
        rows = [draw.choice(source) for source in drawn]
        model = tune(f"mixture_{name.replace(' ', '_')}", rows, config, config.mix_lr)
        best = max(TEMPERATURES, key=lambda t: by_group(model, val, tokenizer, t)["mean"])
        greedy, warm, top = (by_group(model, test, tokenizer, t) for t in (0, 1, best))
        found[name] = {"mean, T = 0": greedy.pop("mean"), "T = 1": warm["mean"],
                       "best T": top["mean"], "(T)": best, **greedy}
    return found


def draw_figure(pyplot, clusters: dict[str, dict], boxes: dict[str, list[float]]):
    """Exact match over the number of clusters; boxes over unseen phrasings."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4), constrained_layout=True)
    for kind, color in zip(SIDES, ("C0", "C1")):
        for more, counts, line in (("", CLUSTERS, "o-"), (", larger", LARGER, "s--")):
            points = [(n, clusters[f"{n}{more}"][kind]) for n in counts if f"{n}{more}" in clusters]
            if points:
                left.plot(*zip(*points), line, color=color, label=kind + more)
    left.set(xlabel="clusters tuned on", ylabel="exact match, T = 0", ylim=(0, 1))
    left.legend()
    right.boxplot(list(boxes.values()), tick_labels=list(boxes), whis=(0, 100))
    right.set(xlabel="phrasings tuned on, clusters", title="ten unseen phrasings", ylim=(0, 1))
    return figure


def measure(config: Config) -> dict:
    """All four parts; prints their tables, writes table.json and flan.png into out."""
    start(config, LIMITS)
    config = inside(config, "flan")
    clusters, model = tune_on_clusters(config)
    boxes = tune_on_phrasings(model, config)
    spread = {name: {"median": statistics.median(v), "standard deviation": statistics.pstdev(v),
                     "lowest": min(v), "highest": max(v)} for name, v in boxes.items()}
    tables = {"clusters": clusters, "phrasings": spread, "schema": tune_on_schema(config),
              "mixture": tune_on_mixtures(config)}
    for name, rows in tables.items():
        head = [name, *next(iter(rows.values()))]
        print(markdown(head, [[row, *values.values()] for row, values in rows.items()]))
    turn = threshold({count: clusters[str(count)]["held out"] for count in CLUSTERS})
    print(f"half of the gain on held-out clusters is there from {turn} clusters on")
    write_json(Path(config.out) / "table.json", rounded(tables | {"unseen": boxes}), indent=1)
    if pyplot := load_pyplot():
        save_plot(draw_figure(pyplot, clusters, boxes), Path(config.out) / "flan.png")
        pyplot.close("all")
    return tables


if __name__ == "__main__":
    main(measure, Config)
