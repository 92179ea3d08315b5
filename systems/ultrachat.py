"""UltraChat: dialogues that two models simulate, one as the user, one as the assistant.

    people's conversations, roles exchanged → SFT of the base: the *user model*      → exchange
    topics → user model opens → assistant answers → user goes on → assistant answers → simulate
    cut off, repeated, held out or there before: left out, by rules alone            → filtered
    SFT of the base on single turns alone, or with a share of dialogues              → one table

The loss is on every assistant turn, the first as well as the last (→ Tokenizer.render). The
assistant is the run's PPO model. The user model learns what people say and ask in 200 conversations
and no answer to their last question. For reference: these 200 users, answered by the assistant and
repeated, and people's conversations as they are.

Differences from the paper: its user is ChatGPT with a prompt; this base can play nobody untuned. A
topic is who speaks and what about ("Ada, food"), not a question or a text to rework. Two rounds, as
the town's conversations have (paper: about four).

    python -m systems.ultrachat --run out/tinytown
"""
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from common.run import DeviceFlags, InputError, load_gpt, main, start, write_json
from data.batches import Prompt, prompt_rows
from data.readers import read_demonstrations, read_prompts
from data.tinytown import town
from data.tinytown.gold import gold_scores
from data.tinytown.report import markdown, rounded
from data.tokenizer import Tokenizer
from model import GPT
from rollout import respond
from systems.best_of_n import seed_of
from systems.lima import fit, several_turns
from systems.table import compare, inside


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run: its base, ppo and prompts are read
    out: str = ""                  # empty: systems/ultrachat inside run
    people: int = 200              # conversations that the user model learns from (paper: none)
    user_steps: int = 100          # its updates
    topics: int = 1500             # dialogues that are begun (paper: over 1.5 million kept)
    rows: int = 2000               # of every set
    share: float = 0.3             # of them dialogues
    temperature: float = 0.7       # of the assistant; the user's is 1
    steps: int = 320               # updates of every set
    lr: float = 2e-3               # peak
    max_new_tokens: int = 48


LIMITS = dict(people=(1, 10**6), topics=(1, 10**6), rows=(10, 10**6), share=(0.01, 0.99))
ROUNDS = 2                         # as the town's conversations have
Dialogue = list[dict]              # messages


def topic_of(slots: dict[str, str]) -> str:
    """Who speaks and what about: a name, a kind of fact, a thing or a mood, as far as known."""
    return ", ".join(slots[slot] for slot in ("name", "kind", "thing", "mood") if slot in slots)


def new_topics(count: int, draw: random.Random) -> list[str]:
    """Topics in that form; of a thing half of the time without its owner."""
    found = []
    for _ in range(count):
        kind, thing, mood = map(draw.choice, (list(town.OWN_QUESTIONS), town.THINGS, [*town.MOODS]))
        about = draw.choices((kind, thing, mood), (4, 1, 1))[0]
        alone = about == thing and draw.random() < 0.5
        found.append(about if alone else f"{draw.choice(town.NAMES)}, {about}")
    return found


def exchange(topic: str, said: Dialogue) -> Dialogue:
    """A dialogue as the user model has it: the topic is what it is asked, the user's turns are its
    own answers, the assistant's are what it is asked next."""
    other = {"user": "assistant", "assistant": "user"}
    turns = [{"role": other[turn["role"]], "content": turn["content"]} for turn in said]
    return [{"role": "user", "content": topic}, *turns]


def fault(said: Dialogue) -> str:
    """Why a dialogue is left out, "" if nothing is wrong: "repeated" (a turn said twice, or a
    sentence twice in one turn), "held out" (up to one of the user's turns it is a prompt of
    validation or test). Nobody asks whether the answers are good."""
    texts = [turn["content"] for turn in said]
    if any(len(set(some)) < len(some) for some in (texts, *map(town.sentences, texts))):
        return "repeated"
    splits = {town.split_of(said[:k]) for k in range(1, len(said), 2)}
    return "held out" if splits & {"val", "test"} else ""


def filtered(dialogues: list[Dialogue]) -> tuple[list[Dialogue], Counter]:
    """(the dialogues without a fault, each once; how many were kept, or left out by why)."""
    why, kept = Counter(), []
    for said in dialogues:
        reason = fault(said) or ("there before" if said in kept else "kept")
        why[reason] += 1
        kept += [said] * (reason == "kept")
    return kept, why


class Speaker(NamedTuple):
    """A model that plays one of the two, and how daring it is."""
    model: GPT
    tokenizer: Tokenizer
    role: str
    temperature: float

    def speak(self, begun: list[tuple[str, Dialogue]], title: str,
              config: Config) -> list[tuple[str, Dialogue]]:
        """Topics and dialogues with a turn more, as far as there was room and it came to an end."""
        asked = [exchange(*one) if self.role == "user" else one[1] for one in begun]
        prompts = [Prompt(said, self.tokenizer.render_prompt(said)) for said in asked]
        room = self.model.config.block_size - config.max_new_tokens
        fits = [place for place, prompt in enumerate(prompts) if len(prompt.ids) <= room]
        found = respond(self.model, [prompts[place] for place in fits], self.tokenizer,
                        config.max_new_tokens, seed=seed_of(config.seed, title), title=title,
                        temperature=self.temperature)
        texts = [one.text.strip() if one.ended else "" for one in found]
        return [(begun[place][0], [*begun[place][1], {"role": self.role, "content": text}])
                for place, text in zip(fits, texts) if text]


def simulate(user: Speaker, assistant: Speaker, topics: list[str], config: Config) -> list:
    """Dialogues of ROUNDS rounds on these topics, as far as every turn came to an end."""
    dialogues = [(topic, []) for topic in topics]
    for turn in range(2 * ROUNDS):
        dialogues = (user, assistant)[turn % 2].speak(dialogues, f"turn {turn + 1}", config)
    return [said for _, said in dialogues]


def answered(prompts: list[Dialogue], assistant: Speaker, config: Config) -> list[Dialogue]:
    """Prompts with the assistant's answers, as far as they ended."""
    return [said for _, said in assistant.speak([("", x) for x in prompts], "answers", config)]


def mixed(single: list[Dialogue], several: list[Dialogue], config: Config) -> list[Dialogue]:
    """`rows` rows, a share of them dialogues, repeated where they are too few."""
    count = round(config.share * config.rows)
    return single[:config.rows - count] + [several[i % len(several)] for i in range(count)]


# ----------------------------------------------------------------------------- measuring

def described(dialogues: list[Dialogue], tokenizer: Tokenizer) -> dict[str, float]:
    """Lengths, diversity and, in shares, topics of dialogues; "other": of no kind of the town's."""
    tokens = {role: [len(tokenizer.encode(turn["content"])) for said in dialogues for turn in said
                     if turn["role"] == role] for role in ("user", "assistant")}
    kinds = Counter(found[0].name.partition("_")[0] if (found := town.understand(said[:-1]))
                    else "other" for said in dialogues)
    return {"dialogues": len(dialogues), "rounds": len(tokens["user"]) / len(dialogues),
            **{f"tokens, {role}": sum(some) / len(some) for role, some in tokens.items()},
            "openings": len({said[0]["content"] for said in dialogues}),
            "prompts": len({json.dumps(said[:-1]) for said in dialogues}),
            **{kind: kinds[kind] / len(dialogues) for kind in "own remember comfort other".split()}}


def by_turns(policies: dict[str, str], tokenizer: Tokenizer, config: Config) -> dict[str, dict]:
    """Gold on all conversations of the test split and on the run's single turns, at T = 0, 1."""
    room = load_gpt(f"{config.run}/base")[0].config.block_size - config.max_new_tokens
    own = read_prompts(f"{config.run}/data/test.jsonl")
    more = [row["messages"] for row in town.prompts("test", 6000, config.seed)]
    more = {json.dumps(said): said for said in more if several_turns(said)}
    kinds = {"conversations": list(more.values()),
             "single turns": [said for said in own if not several_turns(said)]}
    asked = {kind: prompt_rows(some, tokenizer, room) for kind, some in kinds.items()}
    found = {}
    for name, folder in policies.items():
        model, found[name] = load_gpt(folder)[0].eval(), {}
        for kind, some in asked.items():
            for t in (0.0, 1.0):
                gold = gold_scores(some, respond(model, some, tokenizer, config.max_new_tokens,
                                                 seed=config.seed, temperature=t))
                found[name][f"{len(some)} {kind}, T = {t:g}"] = sum(gold) / len(gold)
    return found


def measure(config: Config) -> dict:
    """User model, dialogues, every set trained and compared; writes table.json into out."""
    run, config = start(config, LIMITS), inside(config, "ultrachat")
    model, tokenizer = load_gpt(f"{config.run}/ppo")
    assistant = Speaker(run.freeze(model), tokenizer, "assistant", config.temperature)
    people = read_demonstrations(f"{config.run}/data/sft.jsonl")
    talks = [said for said in people if several_turns(said[:-1])]
    if not talks:
        raise InputError(f"{config.run}/data/sft.jsonl: no conversation of several turns in it")
    known = [said[:-1] for said in talks[:config.people]]
    folder = fit("user", [{"messages": exchange(topic_of(town.understand(said)[1]), said)}
                          for said in known], replace(config, steps=config.user_steps))
    user = Speaker(run.freeze(load_gpt(folder)[0]), tokenizer, "user", 1.0)
    topics = new_topics(config.topics, random.Random(f"topics-{config.seed}"))
    made, why = filtered(simulate(user, assistant, topics, config))
    if not made:
        raise InputError(f"--topics {config.topics}: none was kept; raise it or --user_steps")
    single = [said[:-1] for said in people if not several_turns(said[:-1])]
    single = answered(single[:2 * config.rows], assistant, config)
    sets = {"single": single[:config.rows]} | {name: mixed(single, some, config) for name, some in (
        ("simulated", made), ("known_users", answered(known, assistant, config)),
        ("people", talks))}
    policies = {name: fit(name, [{"messages": said} for said in rows], config)
                for name, rows in sets.items()} | {"assistant": f"{config.run}/ppo"}
    found = {"table": compare(config, policies),
             "gold": rounded(by_turns(policies, tokenizer, config)),
             "dialogues": rounded({"people": described(talks, tokenizer),
                                   "simulated": described(made, tokenizer)}),
             "filtered": {"begun": len(topics), "cut off": len(topics) - why.total(), **why}}
    for title in ("gold", "dialogues"):
        print(markdown([title, *next(iter(found[title].values()))],
                       [[name, *(str(x) if isinstance(x, int) else x for x in one.values())]
                        for name, one in found[title].items()]))
    print(", ".join(f"{count} {reason}" for reason, count in found["filtered"].items()))
    write_json(Path(config.out) / "table.json", found, indent=1)
    return found


if __name__ == "__main__":
    main(measure, Config)
