"""Instruction Backtranslation (Humpback): a model writes the instructions that good texts answer.

    seed pairs (x, y) the other way round → M_yx                                → tune
    unlabelled texts y                    → x̂ ~ M_yx(· | y)                     → self_augment
    pairs (x̂, y) → ratings a by M_t       → A_k = {(x̂, y): a ≥ k}               → rate, curate
    seeds → M_0;  seeds and A_k → M_t+1, always from the base                   → tune

    precision = |A_k ∩ good| / |A_k|,  recall = |A_k ∩ good| / |good|           → curation

The seeds show 16 of 26 kinds of task; the unlabelled texts are answers to all of them, half of them
good, and prose that answers nothing. Beside what is curated stand as many pairs by chance, and the
best by gold (`oracle`). A large model turns a pair round after a few seeds and rates one when it is
asked to; a base of 0.7 million parameters cannot, so it practises both before, on pairs of the town
that are none of those here (→ data/tinytown/pairs.py), and some practice is mixed into every set.

Differences from the paper: that practice; no system turns for the source of a pair. With `--rater`
a published chat model rates instead of M_t, asked as in the paper.

    python -m systems.backtranslation --run out/tinytown
"""
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import train_sft
from common.run import DeviceFlags, InputError, load_gpt, main, start, write_json, write_text
from data.batches import Prompt
from data.tinytown.pairs import RATED, TURNED, practice, turned, unlabelled, worth
from data.tinytown.report import load_pyplot, markdown, rounded, save_plot
from data.tinytown.tasks import Task, conversation, leaks, town_seeds
from rollout import respond
from systems.table import again, compare, inside, made, refuse_others
from systems.written import by_kind

GOOD = 0.8                         # gold of a good pair
SIZES = (150,)                     # augmented pairs in the figure, beside as many as were kept
MIXED = 200                        # rows of practice in all that is tuned on later
RATING = """How good is the text below as an answer to the question?

1: no answer, or to something else    2: about the question, but most is left out
3: of use, but written for others     4: a whole answer, which could be clearer
5: a whole, true and clear answer to just this question, as an expert would write it

Say why in a sentence or two. Then end with the line "Score: n", n being the number.

Question: {}\nText: {}"""


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run: its base and prompts are read
    out: str = ""                  # empty: systems/backtranslation inside run
    practice: int = 76_800         # rows that the base practises on, each once
    practice_lr: float = 3e-3      # peak there
    seeds: int = 100               # good pairs (paper: 3,200)
    texts: int = 2000              # unlabelled (paper: 502,000)
    temperature: float = 0.3       # of instructions: names and things are to be copied
    rounds: int = 2                # of curation (paper: 2)
    k: int = 5                     # least rating that is kept (paper: 5)
    rater: str = ""                # a chat model that rates, such as smollm2; empty: M_t
    steps: int = 160               # updates of every model after practice
    lr: float = 1e-3               # their peak
    max_new_tokens: int = 48


LIMITS = dict(practice=(1, 10**8), seeds=(1, 10**4), texts=(1, 10**6), temperature=(0, 100),
              rounds=(1, 100), k=(1, 5), steps=(1, 10**6))


# ----------------------------------------------------------------------------- equations

def parse_rating(reply: str) -> int | None:
    """n of a reply that ends in "Score: n", 1 to 5; only white space may follow. None for all else:
    a looser pattern would take "Score: 45", or the 5 of "4 of 5", for a good rating."""
    match = re.search(r"\bScore: ([1-5])\s*\Z", reply)
    return int(match[1]) if match else None


def curate(pairs: list, ratings: list[int | None], k: int) -> list:
    """A_k = {(x̂, y): a ≥ k}, in order. A pair without a rating is not kept."""
    return [pair for pair, a in zip(pairs, ratings, strict=True) if a is not None and a >= k]


def curation(gold: list[float], ratings: list[int | None], k: int) -> dict[str, float]:
    """How well ratings choose good pairs, gold ≥ GOOD: how many are kept, the base rate, precision,
    recall, Pearson's r of rating and gold. None where there is nothing to divide by."""
    kept = curate([score >= GOOD for score in gold], ratings, k)
    good = sum(score >= GOOD for score in gold)
    rated = [(float(a), score) for a, score in zip(ratings, gold) if a is not None]
    r = torch.corrcoef(torch.tensor(rated).T)[0, 1].item() if len(rated) > 1 else float("nan")
    return {"kept": len(kept), "base rate": good / len(gold),
            "precision": sum(kept) / len(kept) if kept else None,
            "recall": sum(kept) / good if good else None, "r": None if r != r else r}


# ----------------------------------------------------------------------------- the steps

def tune(name: str, rows: list[dict], init: str, config: Config, **changed) -> str:
    """SFT on rows {"instruction", "output"}, about as many updates for every set, plain text mixed
    in; the same rows are not trained on anew. changed: other settings. Returns its folder."""
    out, text = f"{config.out}/{name}", "".join(json.dumps(row) + "\n" for row in rows)
    path = Path(f"{out}.jsonl")
    if not (path.exists() and path.read_text() == text and Path(f"{out}/final.json").exists()):
        write_text(path, text)
        settings = dict(epochs=max(1, round(config.steps * 32 / len(rows))), lr=config.lr)
        train_sft.train(train_sft.Config(
            data=(str(path),), val=f"{config.run}/data/sft_val.jsonl", init=init, out=out,
            ptx_data=(f"{config.run}/data/base.txt",), seed=config.seed, device=config.device,
            dtype=config.dtype, **settings | changed, **again(out)))
    return out


def replies(folder: str, asked: list[str], config: Config, run, most: int,
            temperature: float = 0.0) -> list[str | None]:
    """What a model replies to each text; None where that does not end, or leaves no room for it."""
    model, tokenizer = load_gpt(folder)
    prompts = [Prompt([], tokenizer.render_prompt([{"role": "user", "content": text}]))
               for text in asked]
    places = [place for place, prompt in enumerate(prompts)
              if len(prompt.ids) <= model.config.block_size - most]
    found: list[str | None] = [None] * len(asked)
    for place, reply in zip(places, respond(
            run.freeze(model), [prompts[place] for place in places], tokenizer, most,
            seed=config.seed, title=Path(folder).name, temperature=temperature)):
        found[place] = reply.text.strip() if reply.ended else None
    return found


def self_augment(backward: str, texts: list[str], config: Config, run) -> list[dict]:
    """Pairs {"instruction", "output"}: x̂ ~ M_yx(· | y). Instructions that do not end or are held
    out are dropped, and pairs that are there already."""
    asked = replies(backward, [TURNED.format(text) for text in texts], config, run,
                    config.max_new_tokens, config.temperature)
    return [{"instruction": x, "output": y} for x, y in dict.fromkeys(zip(asked, texts))
            if x and not leaks(Task(x))]


def rate(rater: str, pairs: list[dict], config: Config, run) -> list[int | None]:
    """The rating of each pair by M_t, or by the chat model `config.rater`; None without one."""
    form, most = (RATING, 150) if config.rater else (RATED, 8)
    asked = [form.format(*pair.values()) for pair in pairs]
    return [parse_rating(reply or "") for reply in
            replies(config.rater or rater, asked, config, run, most)]


# ----------------------------------------------------------------------------- measuring

def curve(pyplot, found: dict[str, dict]):
    """Gold over the number of augmented pairs, curated and not, a panel for each temperature."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    for axis, t in zip(axes, ("0", "1")):
        for kind in ("curated", "uncurated", "oracle"):
            points = {int(name.rpartition("_")[2]): one["gold"][t] for name, one in found.items()
                      if name.startswith(f"{kind}_")} | {0: found["seeds"]["gold"][t]}
            axis.plot(*zip(*sorted(points.items())), "o-", label=kind)
        axis.set(title=f"T = {t}", xlabel="augmented pairs beside the seeds", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="gold, mean over test prompts")
    axes[1].legend()
    return figure


def measure(config: Config) -> dict:
    """All steps, and a forward model of every set; writes table.json and gold.png into out."""
    run, config = start(config, LIMITS), inside(config, "backtranslation")
    refuse_others(config, f"{config.run}/base")
    home, draw = Path(config.out), random.Random(f"backtranslation-{config.seed}")
    rows = made(home / "base.jsonl", lambda: practice(
        random.Random(f"practice-{config.seed}"), config.practice))
    base = tune("base", rows, f"{config.run}/base", config, epochs=1, lr=config.practice_lr)
    seeds = [conversation(task, draw)["messages"] for task in town_seeds(config.seed, config.seeds)]
    seeds = [{"instruction": x["content"], "output": y["content"]} for x, y in seeds]
    mixed = practice(draw, MIXED)
    backward = tune("backward", [turned(*seed.values()) for seed in seeds] + mixed, base, config)
    texts = unlabelled(draw, config.texts)
    pairs = made(home / "pairs.jsonl", lambda: self_augment(backward, texts, config, run))
    gold = [worth(*pair.values()) for pair in pairs]

    policy, rounds = tune("seeds", seeds + mixed, base, config), {}
    folders = {"seeds": policy}
    for t in range(config.rounds + 1):               # the last model rates, too, to be measured
        ratings = rate(policy, pairs, config, run)
        rounds[f"M_{t}"] = curation(gold, ratings, config.k)
        if t == config.rounds:
            break
        kept = curate(pairs, ratings, config.k)
        if not kept:
            raise InputError(f"--k {config.k}: none of {len(pairs)} pairs is rated so high by "
                             f"M_{t}; lower it")
        name = f"round_{t + 1}" if t + 1 < config.rounds else f"curated_{len(kept)}"
        policy = folders[name] = tune(name, seeds + kept + mixed, base, config)
    print(markdown(["rater", *rounds["M_0"]], [[name, str(one["kept"]), *list(one.values())[1:]]
                                               for name, one in rounds.items()]))

    best = sorted(range(len(pairs)), key=lambda place: -gold[place])[:len(kept)]
    sets = {f"oracle_{len(kept)}": [pairs[place] for place in best]}
    for size in (*SIZES, len(kept), len(pairs)):
        if size < len(kept):
            sets[f"curated_{size}"] = draw.sample(kept, size)
        if size <= len(pairs):
            sets[f"uncurated_{size}"] = draw.sample(pairs, size)
    folders |= {name: tune(name, seeds + some + mixed, base, config) for name, some in sets.items()}
    found = compare(config, folders)
    kinds = by_kind({"sft": f"{config.run}/sft", **folders}, config, run)
    print(markdown(["gold", *kinds["sft"]], [[name, *row.values()] for name, row in kinds.items()]))
    write_json(home / "table.json", rounded({"table": found, "kinds": kinds, "rounds": rounds}),
               indent=1)
    if pyplot := load_pyplot():
        save_plot(curve(pyplot, found), home / "gold.png")
        pyplot.close("all")
    return found


if __name__ == "__main__":
    main(measure, Config)
