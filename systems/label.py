"""The crowdworker's page: people say which answer is better, and what they say trains.

    talk to the assistant; at every turn two answers, the chosen one goes on:
        python -m systems.label --init out/tinytown/sft --out out/mine/labels.jsonl
    K = 4 to 9 answers to each of given prompts, put in order, with ties:
        python -m systems.label --rank --init out/tinytown/sft --data PROMPTS --out FILE
    answers that are there already, as by a second annotator (without --init):
        python -m systems.label --rank --data RANKINGS --out FILE
    two checkpoints, blind; the win rate is printed at the end (Ctrl-C):
        python -m systems.label --compare out/tinytown/ppo out/tinytown/dpo --out FILE
    how far annotators agree (→ systems/agreement.py):
        python -m systems.label --agreement FILE FILE

Two answers are rated on the eight steps of Anthropic's interface, from "A is better" to "B is
better", or tie; the step gives Llama 2's margin. The file is one of rankings in the project's
layout: `train_rm.py --data` (margin included) and `train_dpo.py --data` read it as it is.

    desk.py         who has what before them, the file, undo, what survives a killed server
    page.py         the server, and what it refuses
    label.html      the page
    agreement.py    Cohen's kappa between annotators
"""
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common.run import DeviceFlags, InputError, load_gpt, main, start
from data.batches import Prompt, read_prompt_rows
from data.readers import read_rankings
from data.tokenizer import Tokenizer
from data.turns import text
from model import GPT
from rollout import respond, win_rate
from systems.agreement import agreement, table
from systems.best_of_n import seed_of
from systems.desk import Desk, Item, Labels, Write
from systems.page import LOOPBACK, server

MOST = 9                           # answers that fit on a page


@dataclass(slots=True)
class Config(DeviceFlags):
    init: str = ""                 # checkpoint that answers; with --rank empty: data's answers
    out: str = ""                  # file of labels; one that is there goes on
    rank: bool = False             # order K answers to the prompts of data instead of talking
    data: tuple = ()               # with --rank: prompts, or without --init rankings or pairs
    compare: tuple = ()            # two checkpoints to talk to at once, blind
    agreement: tuple = ()          # files of labels: print how far their annotators agree
    least: int = 4                 # smallest K of --rank (InstructGPT: 4)
    most: int = 9                  # largest K (InstructGPT: 9)
    temperature: float = 1.0
    max_new_tokens: int = 48
    host: str = "127.0.0.1"        # another address is open to the network, and has a token
    port: int = 8000               # 0: any free one


LIMITS = dict(least=(2, MOST), most=(2, MOST), temperature=(0, 10), port=(0, 65535))


# ----------------------------------------------------------------------------- answers

def answers_of(model: GPT, tokenizer: Tokenizer, messages: list[dict], k: int, seed: int,
               config: Config, name: str) -> list[dict]:
    """k different answers, or fewer if eight times k samples hold no more; those that the readers
    refuse, as empty ones, are left out. InputError if there is none, or no room for it."""
    prompt = Prompt(messages, tokenizer.render_prompt(messages))
    room, found = model.config.block_size - config.max_new_tokens, {}
    if len(prompt.ids) > room:
        raise InputError(f"{len(prompt.ids)} tokens, and the model's context leaves room for "
                         f"{room}: say it shorter, or begin a new conversation")
    for attempt in range(8):
        for response in respond(model, [prompt] * k, tokenizer, config.max_new_tokens,
                                seed=seed_of(seed, str(attempt)), temperature=config.temperature):
            try:
                answer = {"text": text(response.text, "text", ""), "ended": response.ended,
                          "model": name}
            except InputError:
                continue
            found.setdefault(answer["text"], answer)
        if len(found) >= k:
            break
    if not found:
        raise InputError(f"{name}: no answer with text in it in {8 * k} samples; ask otherwise")
    return list(found.values())[:k]


def writer(models: list[tuple[str, GPT, Tokenizer]], config: Config) -> Write:
    """Answers of one model, or, of two, one of each, in random order."""
    def write(messages: list[dict], k: int, seed: int) -> list[dict]:
        each = k // len(models)
        found = [answer for name, model, tokenizer in models for answer in answers_of(
            model, tokenizer, messages, each, seed_of(seed, name), config, name)]
        random.Random(seed).shuffle(found)
        if len(found) < 2:
            raise InputError("the model says the same each time; raise --temperature")
        return found
    return write


# ----------------------------------------------------------------------------- the command

def given_items(paths: tuple[str, ...]) -> list[Item]:
    """The prompts of rankings or pairs and their answers, equal ones once; an item that has no two
    of them is left out and counted. InputError for more than a page shows."""
    found, rankings = [], read_rankings(*paths)
    for one in rankings:
        answers = {text: {"text": text, "ended": i not in one.cut}
                   for i, text in enumerate(one.responses)}
        if len(answers) > MOST:
            raise InputError(f"{', '.join(paths)}: {len(answers)} answers to "
                             f"{one.messages[-1]['content']!r:.60}; a page shows {MOST}: leave "
                             f"some out")
        if len(answers) > 1:
            found.append((one.messages, list(answers.values())))
    if len(found) < len(rankings):
        print(f"{len(rankings)} rankings: {len(rankings) - len(found)} left out, all their "
              f"answers equal", file=sys.stderr)
    return found


def check(config: Config) -> None:
    """InputError for flags that do not go together."""
    if not config.out:
        raise InputError("--out: name a file for the labels, such as out/mine/labels.jsonl")
    if config.compare and (len(config.compare) != 2 or len(set(config.compare)) != 2):
        raise InputError("--compare: name two different checkpoint folders")
    if config.compare and (config.rank or config.init):
        raise InputError("--compare: goes without --init and --rank")
    if config.rank != bool(config.data):
        raise InputError("--rank and --data: go together; name one or more files of prompts"
                         if config.rank else "--data: is read with --rank alone")
    if not (config.init or config.compare or config.rank):
        raise InputError("--init: name the folder of the checkpoint that answers")
    if config.least > config.most:
        raise InputError(f"--least {config.least}: must not be above --most {config.most}")


def desk_of(config: Config) -> Desk:
    """The desk that the flags describe: file locked, models loaded, prompts read."""
    check(config)
    run = start(config, LIMITS)
    labels, items, write = Labels(Path(config.out)), None, None
    models = [(name, *load_gpt(name)) for name in config.compare or filter(None, [config.init])]
    for name, model, _ in models:
        run.freeze(model)
        if model.config.block_size <= config.max_new_tokens:
            raise InputError(f"--max_new_tokens {config.max_new_tokens}: the context of {name} is "
                             f"{model.config.block_size} tokens")
    if models:
        write = writer(models, config)
    if config.rank and models:
        _, model, tokenizer = models[0]
        room = model.config.block_size - config.max_new_tokens
        prompts = read_prompt_rows(config.data, tokenizer, room)
        items = [(prompt.messages, None) for prompt in prompts]
    elif config.rank:
        items = given_items(config.data)
    kind = "rank" if config.rank else "compare" if config.compare else "talk"
    return Desk(labels, write, items, kind, [kind, config.data, config.init, config.compare],
                config.seed, config.least, config.most)


def summary(rows: list[dict], compared: tuple[str, ...]) -> str:
    """How many labels there are; of two checkpoints how often the first won, ties half, and its
    standard error over comparisons (two or more), as if the turns of a conversation were
    independent."""
    people = {row.get("annotator") for row in rows}
    said = (f"{len(rows)} label{'s' * (len(rows) != 1)} by {len(people)} "
            f"annotator{'s' * (len(people) != 1)}")
    scores = [{one.get("model"): one["score"] for one in row["responses"]} for row in rows]
    scores = [[one[name] for name in compared] for one in scores if set(one) == set(compared)]
    if not compared or len(scores) < 2:
        return said
    first, second = torch.tensor(scores).T                                         # (n,) each
    won, lost = int((first > second).sum()), int((first < second).sum())
    rate, error = win_rate(first, second[:, None])
    return (f"{said}\n{compared[0]} against {compared[1]}: {100 * rate:.1f} ± {100 * error:.1f} % "
            f"of {len(scores)} comparisons ({won} won, {len(scores) - won - lost} tied, {lost} "
            f"lost)")


def label(config: Config) -> None:
    """Serve the page until Ctrl-C, or print the agreement of files."""
    if config.agreement:
        print(table(agreement(config.agreement)), end="")
        return
    desk = desk_of(config)
    token = "" if config.host in LOOPBACK else desk.state["token"]
    page = Path(__file__).with_suffix(".html").read_text("utf-8")
    web = server(page, desk.act, config.host, config.port, token)
    signal.signal(signal.SIGTERM, signal.default_int_handler)          # ends as Ctrl-C does
    link = f"http://{config.host}:{web.server_port}/{token and '#' + token}"
    print(f"{config.out}: {summary(desk.labels.rows, ())}\nopen {link}   (Ctrl-C ends)", flush=True)
    try:
        web.serve_forever()
    except KeyboardInterrupt:
        with desk.busy:                        # an action that was begun is finished
            print(f"\n{config.out}: {summary(desk.labels.rows, config.compare)}")


if __name__ == "__main__":
    main(label, Config)
