"""Constitutional AI: a model that helps with everything is made harmless by its own critiques and
by an AI's preferences. People say what helps; nobody says what harms.

    demonstrations that help with every request → SFT                      → helpful_only_rows
    SL: red-team prompts → its answers → critique by a principle drawn at random, revision, four
        times over → SFT on revisions and its own ordinary answers         → critique_and_revise
    RL: two answers to each red-team prompt → the AI's soft labels p       → ai_preference
        these and people's rankings of ordinary answers → DPO              → soft_dpo_loss

RL alone can not start: of two answers that both harm none is preferred. The SL stage gives it
something to choose from. The AI is the town's base: systems/critic.py.

Differences from the paper: the AI is asked about each answer alone, not for (A) or (B), which this
base can not tell; no chain of thought, hence no clamp of p to 40–60 %; a critique may find nothing,
and then nothing is revised; DPO instead of a preference model and PPO; people's labels have p = 1.

    python -m systems.constitutional --run out/tinytown
"""
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import train_dpo
import train_sft
from common.run import DeviceFlags, load_gpt, main, start, write_json, write_text
from data.batches import Prompt, prompt_rows, read_prompt_rows
from data.readers import read_rankings
from data.tinytown.gold import gold_scores, refuses
from data.tinytown.rank import ranking_line
from data.tinytown.report import markdown, rounded
from data.tinytown.teachers import comply
from data.tinytown.town import FACTS, harmful_prompts, prompts, understand
from evaluate import graded
from rollout import Response, respond
from systems.best_of_n import seed_of, several
from systems.critic import (CONSTITUTION, PRINCIPLES, Critic, ai_labels, ai_preference,
                            critique_and_revise, learn)
from systems.lima import as_lines
from systems.table import again, compare, inside


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run: its data, base and rank are read
    out: str = ""                  # empty: systems/constitutional inside run
    epochs: int = 3                # of the helpful-only model
    lr: float = 1.5e-3             # its peak
    red: int = 300                 # red-team prompts of each stage (paper: 182,831)
    rounds: int = 4                # of critique and revision (paper: 4)
    ordinary: int = 900            # own answers to ordinary prompts in the SL stage
    temperature: float = 0.5       # of these and of revisions: less noise is learned again
    sl_epochs: int = 3             # (paper: 1)
    sl_lr: float = 5e-4            # peak
    rankings: int = 1500           # of people, ordinary prompts, a pair of each (paper: 135,296)
    beta: float = 0.15             # as Tinytown's DPO
    rl_lr: float = 1e-4            # peak
    max_new_tokens: int = 48


LIMITS = dict(red=(2, 300), rounds=(1, 100), ordinary=(1, 10**5), temperature=(0, 100),
              sl_lr=(0, 1), rankings=(1, 10**6), beta=(1e-6, 100), rl_lr=(0, 1))
NEWLY = {"overwrite": False, "resume": False}     # flags that change no model


# ----------------------------------------------------------------------------- what is trained on

def is_harmful(messages: list[dict]) -> bool:
    """Whether a request should be declined."""
    return understand(messages)[0].name == "refuse"


def helpful_only_rows(path: str, seed: int) -> list[dict]:
    """Demonstrations of a file; every harmful request is helped with: no label of harm is left."""
    draw, rows = random.Random(f"comply-{seed}"), []
    for *asked, answer in (json.loads(line)["messages"] for line in open(path)):
        if is_harmful(asked):
            place = FACTS[understand(asked)[1]["name"]]["home"]
            answer = {"role": "assistant", "content": comply(draw, place)}
        rows.append({"messages": [*asked, answer]})
    return rows


def imitated(asked: list[Prompt], answers: list[Response]) -> list[dict]:
    """Answers that ended, as demonstrations."""
    return [{"messages": [*prompt.messages, {"role": "assistant", "content": answer.text}]}
            for prompt, answer in zip(asked, answers) if answer.ended and answer.text.strip()]


def helpfulness_labels(path: str, count: int, seed: int) -> list[str]:
    """People's: two answers of unlike rank from each of `count` rankings of ordinary prompts, the
    better one first, p = 1, as lines of a file of rankings with scores p and 1 − p."""
    draw, lines = random.Random(f"helpfulness-{seed}"), []
    rankings = [one for one in read_rankings(path) if one.untied and not is_harmful(one.messages)]
    for one in draw.sample(rankings, min(count, len(rankings))):
        pairs = [(i, k) for i, better in enumerate(one.scores)
                 for k, worse in enumerate(one.scores) if better > worse]
        two = [Response([], one.responses[i], i not in one.cut) for i in draw.choice(pairs)]
        lines.append(ranking_line(one.messages, two, [1.0, 0.0]))
    return lines


# ----------------------------------------------------------------------------- training

def made(train: Callable, rows: str, flags) -> str:
    """Train on rows, the text of OUT.jsonl, unless it is done with these flags. Returns OUT."""
    out, path = Path(flags.out), Path(f"{flags.out}.jsonl")
    done = (out / "final.json").exists() and path.read_text() == rows
    before = json.loads((out / "config.json").read_text())["run"] if done else {}
    if before | NEWLY != json.loads(json.dumps(asdict(flags))) | NEWLY:
        write_text(path, rows)
        train(replace(flags, **again(flags.out)))
    return flags.out


def tune(name: str, rows: list[dict], init: str, epochs: int, lr: float, config: Config) -> str:
    """SFT. Returns the model's folder."""
    out = f"{config.out}/{name}"
    return made(train_sft.train, as_lines(rows), train_sft.Config(
        data=(f"{out}.jsonl",), val=f"{config.run}/data/sft_val.jsonl", init=init, out=out,
        ptx_data=(f"{config.run}/data/base.txt",), epochs=epochs, lr=lr, seed=config.seed,
        device=config.device, dtype=config.dtype))


# ----------------------------------------------------------------------------- measuring

def mean(values) -> float | None:
    """Mean of a tensor or list, of bools too; None of nothing."""
    return torch.as_tensor(values).double().mean().item() if len(values) else None


def helps(answers: list[Response]) -> Tensor:
    """1 for an answer that tells how to do harm (as `comply`), else 0, (n,): for tables alone. Gold
    is stricter, where an answer off topic is not harmless."""
    return torch.tensor([float("at night" in answer.text) for answer in answers])


def right(p: Tensor, lead: Tensor) -> float:
    """Share of labels p (n,) that prefer the better answer, ½ counted half. lead (n,): 1 if the
    first is better, −1 if the second is, 0 if neither: not counted."""
    return mean((1 + (p - 0.5).sign() * lead)[lead != 0] / 2)


def outcomes(folder: str, harmful: list[Prompt], test: list[Prompt], config: Config) -> dict:
    """Of one policy at T = 0 and T = 1: harmful requests helped with, declined, gold on them, gold
    on ordinary ones, share of these refused."""
    (model, tokenizer), found = load_gpt(folder), {}
    for t in (0.0, 1.0):
        bad, other = (respond(model.eval(), asked, tokenizer, config.max_new_tokens,
                              seed=seed_of(config.seed, "outcomes"), temperature=t)
                      for asked in (harmful, test))
        figures = {"helped": helps(bad), "declined": graded(harmful, bad)["harmless"] > 0,
                   "their gold": gold_scores(harmful, bad),
                   "gold of others": gold_scores(test, other),
                   "others refused": [refuses(answer.text) for answer in other]}
        found |= {f"{name}, T = {t:g}": mean(values) for name, values in figures.items()}
    return found


def measure(config: Config) -> dict:
    """Both stages, and RL without the first; prints the tables, writes table.json."""
    run, config = start(config, LIMITS), inside(config, "constitutional")
    base, tokenizer = load_gpt(f"{config.run}/base")
    room, most = base.config.block_size - config.max_new_tokens, config.max_new_tokens
    critic = Critic(run.freeze(base), tokenizer, config.temperature, most, config.seed)
    harmful, test = (read_prompt_rows((f"{config.run}/data/{name}.jsonl",), tokenizer, room)
                     for name in ("harmful", "test"))
    red, ordinary = (prompt_rows([row["messages"] for row in rows], tokenizer, room) for rows in (
        harmful_prompts("rl", 2 * config.red, config.seed),
        prompts("rl", config.ordinary, config.seed)))
    test, ordinary = ([one for one in some if not is_harmful(one.messages)]
                      for some in (test, ordinary))
    red, red_of_rl = red[:config.red], red[config.red:]
    rows = helpful_only_rows(f"{config.run}/data/sft.jsonl", config.seed)
    helpful = tune("helpful_only", rows, f"{config.run}/base", config.epochs, config.lr, config)

    model = run.freeze(load_gpt(helpful)[0])
    first = several(model, red, 1, tokenizer, "red team", config)
    stages = critique_and_revise(critic, red, first, config.rounds)
    own = respond(model, ordinary, tokenizer, most, seed=config.seed, title="ordinary",
                  temperature=config.temperature)
    rows = imitated(red + ordinary, stages[-1] + own)
    sl_cai = tune("sl_cai", rows, helpful, config.sl_epochs, config.sl_lr, config)
    folders = {"helpful_only": helpful, "sl_cai": sl_cai}
    answers, shares = first + stages[-1] + own, [mean(helps(stage)) for stage in stages]
    faults = critic.fine(PRINCIPLES, red + red + ordinary, answers) < 0.5           # (J, n)
    harm = helps(answers) == 1
    table = {name: [mean(one[harm]), mean(harm[one])] for name, one in zip(PRINCIPLES, faults)}
    table |= {"constitution": [None, None], "all": [None, None]}        # means of their q

    people = helpfulness_labels(f"{config.run}/rank/rankings.jsonl", config.rankings, config.seed)
    for name, init in (("rlaif_alone", helpful), ("sl_cai_rlaif", sl_cai)):
        flat = several(run.freeze(load_gpt(init)[0]), red_of_rl, 2, tokenizer, name, config)
        labels, q = ai_labels(critic, red_of_rl, flat[::2], flat[1::2])
        out = f"{config.out}/{name}"
        folders[name] = made(learn, "".join(labels + people), train_dpo.Config(
            data=(f"{out}.jsonl",), init=init, out=out, beta=config.beta, lr=config.rl_lr,
            batch_size=16, seed=config.seed, device=config.device, dtype=config.dtype))
        lead = helps(flat[1::2]) - helps(flat[::2])
        print(f"{name}: {int(lead.abs().sum())} of {len(lead)} pairs differ in harm")
        for row, some in zip(table.values(), [*q.split(1, 1), q[:, :len(CONSTITUTION)], q]):
            row.append(right(ai_preference(*some), lead))

    print("harmful before and after each round:", *(f"{share:.3f}" for share in shares), "\n")
    print(markdown(["principle", "finds harm", "rightly", "labels right, rlaif_alone",
                    "sl_cai_rlaif"], [[name, *row] for name, row in table.items()]))
    found = {name: outcomes(folder, harmful, test, config) for name, folder in folders.items()}
    print(markdown(["policy", *found["sl_cai"]], [[k, *one.values()] for k, one in found.items()]))
    found = {"outcomes": found, "principles": table, "revisions": shares,
             "table": compare(config, folders)}
    write_json(Path(config.out) / "table.json", rounded(found), indent=1)
    return found


if __name__ == "__main__":
    main(measure, Config)
