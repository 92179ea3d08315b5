"""LIMA's choice among the demonstrations of a file, for any chat model.

    demonstrations → the model's own grade of each, 1 to 5                   → grades
                   → sets of equal size: graded, random, longest, of one use case → sets_of_file
                   → SFT by low-rank adapters, equally many updates for every set → one table

As there are no votes, the model grades, each use case (an instruction's first word) keeps its share
(lima.stratified), and held-out loss is all that is measured: on 100 rows of the same file, and on
--val, demonstrations of another kind. LIMA found that such a loss says little about answers: read
some (sample.py).

    python -m systems.lima_file --init smollm2 --data FILE.json --val OTHER.jsonl
"""
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import train_sft
from common.run import DeviceFlags, InputError, load_gpt, main, start, write_json, write_text
from data.batches import demonstration_rows
from data.readers import read_demonstrations
from data.tinytown.report import markdown, rounded
from systems.judge import expected_grade, next_logprobs
from systems.lima import as_lines, fit, stratified


@dataclass(slots=True)
class Config(DeviceFlags):
    data: tuple = ()               # demonstrations to choose from
    val: str = ""                  # demonstrations of another kind, for a second loss
    init: str = ""                 # chat model that grades them and is tuned
    out: str = "out/lima"
    chosen: int = 250              # rows of a set
    steps: int = 48                # updates of every set, of 16 rows
    lr: float = 5e-4               # peak, of low-rank adapters


LIMITS = dict(chosen=(1, 10**7), steps=(1, 10**6))
NEEDED = dict(data="name one or more files of demonstrations",
              init="name a chat model, such as smollm2")
HELD_OUT, BATCH, MOST_TOKENS = 100, 16, 256        # of a file of demonstrations
GRADE = """Here are an instruction and an answer to it.

Instruction: {}

Answer: {}

How good is the answer, from 1 (bad) to 5 (very good)? Reply with the number alone."""


def use_case(messages: list[dict]) -> str:
    """The first word that the user says: "Rewrite", "What"."""
    said = next(message["content"] for message in messages if message["role"] == "user")
    return said.split()[0].strip(":,.").capitalize()


def grades(model, tokenizer, rows: list[dict]) -> list[float]:
    """A chat model's expected grade of each demonstration, 1 to 5."""
    contexts = []
    for row in rows:
        *asked, answer = [message["content"] for message in row["messages"]]
        question = GRADE.format("\n".join(asked), answer)
        ids = tokenizer.render_prompt([{"role": "user", "content": question}])
        contexts.append(ids[-model.config.block_size:])
    return expected_grade(next_logprobs(model, tokenizer, contexts, tuple("12345"))).tolist()


def sets_of_file(pool: list[dict], scores: list[float], count: int,
                 draw: random.Random) -> dict[str, list[dict]]:
    """All rows, and sets of `count`: at random, of the highest grades, the longest answers, and of
    the largest use case."""
    case = Counter(row["use_case"] for row in pool).most_common(1)[0][0]
    alike = [row for row in pool if row["use_case"] == case][:count]
    words = [len(row["messages"][-1]["content"].split()) for row in pool]
    longest = sorted(range(len(pool)), key=lambda place: -words[place])[:count]
    return {f"all_{len(pool)}": pool, f"random_{count}": draw.sample(pool, count),
            f"graded_{count}": stratified(pool, scores, count),
            f"longest_{count}": [pool[place] for place in longest],
            f"{case.lower()}_{len(alike)}": alike}


def measure(config: Config) -> dict:
    """Every set, and the model tuned on it: held-out losses in nats a token; writes table.json into
    out."""
    run = start(config, LIMITS, NEEDED)
    home, draw = Path(config.out), random.Random(f"lima-{config.seed}")
    model, tokenizer = load_gpt(config.init)
    rows = [{"messages": messages, "use_case": use_case(messages)}
            for messages in read_demonstrations(*config.data)]
    if len(rows) < HELD_OUT + config.chosen:
        raise InputError(f"--data: {len(rows)} demonstrations; {HELD_OUT} are held out, so lower "
                         f"--chosen {config.chosen} to {max(1, len(rows) - HELD_OUT)} at most, or "
                         f"name more files")
    draw.shuffle(rows)
    held, pool = rows[:HELD_OUT], rows[HELD_OUT:]
    write_text(home / "held_out.jsonl", as_lines(held))
    scores = grades(run.freeze(model), tokenizer, pool)
    grade_of = {id(row): score for row, score in zip(pool, scores)}
    sets, found = sets_of_file(pool, scores, config.chosen, draw), {}
    tests = {"held out": str(home / "held_out.jsonl")} | ({"val": config.val} if config.val else {})
    asked = {name: demonstration_rows(read_demonstrations(path), tokenizer, MOST_TOKENS)
             for name, path in tests.items()}
    for name, some in {"before": [], **sets}.items():
        folder = config.init if name == "before" else fit(
            name, some, config, BATCH, init=config.init, val=tests["held out"], ptx_data=(),
            lora_rank=8, max_tokens=MOST_TOKENS)
        tuned = run.freeze(load_gpt(folder)[0])
        losses = {f"loss, {test}": train_sft.evaluate(tuned, lines, tokenizer.pad, run.device, 8)
                  for test, lines in asked.items()}
        words = [len(row["messages"][-1]["content"].split()) for row in some]
        found[name] = {"rows": len(some), "use cases": len({row["use_case"] for row in some}),
                       "grade": sum(grade_of[id(row)] for row in some) / max(1, len(some)),
                       "words": sum(words) / max(1, len(some)), **losses}
    found = rounded(found)
    print(markdown(["set", *found["before"]],
                   [[name, *(str(x) if isinstance(x, int) else x for x in one.values())]
                    for name, one in found.items()]))
    write_json(home / "table.json", found, indent=1)
    return found


if __name__ == "__main__":
    main(measure, Config)
