"""Self-Instruct: a base model writes its own instructions and answers, and is tuned on them.

    175 seed tasks, answered by people
      → lists of 3 seeds and 1 of its own, gone on with      → write_instructions
      → filters; what passes joins the pool                  → filter_instructions
      → a choice? P(" Yes") : P(" No").  An input? P("Text") : P("Answer")
      → input, then output; of a choice the output first     → write_instances, instance_fault
      → SFT of the base on the seeds, and with more and more of its own beside them → one table

    F = 2 · LCS / (m + n), m and n words; new only if F < 0.7 to every other      → rouge_l

Nothing here is in chat form until the last step: the writer is asked in the forms that plain text
has (TOWN), a published model in the paper's (PAPER). Instructions that are held out for validation
or test are thrown away, whichever way round they stand with their input.

The town is small: "Where does Ada live?" and "Where does Ben live?" share three words of four, so
that below 0.7 little is new but mistakes. Hence 0.9 there, and a table of three thresholds; and no
list of words that are no text ("map" and "draw" are words of this town).

Seeds are of 16 kinds of task and all good; what the base answers is as uneven as the talk that it
has read. So the last table has two sides: kinds that no seed shows are learned, those that seeds
show are diluted. To say what more instructions do, not what fewer seeds do, the seeds are repeated
to the same share of every set.

Differences from the paper: 3 + 1 instructions in a prompt instead of 6 + 2, as the town's lists
are short; one question instead of 31 examples tells choices; in Tinytown no examples before an
input or output; no penalty for words that were used; the seeds' share (`--seed_share 0`: each once,
as there); the judge of what is valid is a rule.

    python -m systems.self_instruct --run out/tinytown
    python -m systems.self_instruct --init smollm2 --seeds seed_tasks.jsonl --rounds 2 --lists 16 \\
                                    --max_new_tokens 160
"""
import json
import random
import re
import string
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from common.files import read_log
from common.run import DeviceFlags, InputError, load_gpt, main, start, write_text
from data.tinytown.tasks import Task, conversation, town_seeds
from systems.lima import fit
from systems.table import made, refuse_others
from systems.writer import BLOCKLIST, PAPER, TOWN, Form, Writer, read_seeds
from systems.written import counted, report

SEEDS, SIZES = 175, (250, 1000)    # seed tasks; instructions of its own beside them, before all
SHOWN, OWN = 4, 1                  # instructions of a prompt, and how many of them are its own


@dataclass(slots=True)
class Config(DeviceFlags):
    run: str = "out/tinytown"      # Tinytown run: its base and prompts are read
    init: str = ""                 # model that writes; empty: base inside run
    seeds: str = ""                # file of seed tasks: write only, tune nothing; empty: the town's
    out: str = ""                  # empty: systems/self_instruct inside run, or in out with --seeds
    rounds: int = 8
    lists: int = 400               # lists a round
    threshold: float = 0.0         # ROUGE-L that is too much; 0: 0.9, with --seeds 0.7 (paper)
    temperature: float = 0.8       # of instructions (paper: 0.7)
    answer_temperature: float = 0.5   # of inputs and outputs (paper: 0)
    instances: int = 2             # of a task that takes an input (paper: up to 5)
    max_new_tokens: int = 48
    seed_share: float = 0.375      # of the rows of every set, by repetition (paper: each once)
    steps: int = 320               # updates of every set
    lr: float = 2e-3               # peak


LIMITS = dict(rounds=(1, 10**4), lists=(1, 10**6), threshold=(0, 2), temperature=(0, 100),
              answer_temperature=(0, 100), instances=(1, 100), seed_share=(0, 0.99),
              steps=(1, 10**6))


# ----------------------------------------------------------------------------- equations

def words(text: str) -> list[str]:
    """Lower-case words of letters a to z and digits; all else parts them."""
    return re.findall(r"[a-z0-9]+", text.lower())


def longest_common(a: list[str], b: list[str]) -> int:
    """Length of the longest sequence of words that stands in both in this order, with or without
    others between."""
    row = [0] * (len(b) + 1)               # row[j]: of what of a was read so far, and of b[:j]
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]


def rouge_l(target: str, prediction: str) -> float:
    """ROUGE-L: F = 2PR/(P + R) = 2 · LCS/(m + n), P = LCS/n, R = LCS/m, in [0, 1].

    m, n: words of target and prediction (→ words), no stemming; 0 if either has none. Symmetric. A
    word moved costs as much as a word changed.
    """
    a, b = words(target), words(prediction)
    return 2 * longest_common(a, b) / (len(a) + len(b)) if a and b else 0.0


def filter_instructions(candidates: list[str], pool: list[str], threshold: float = 0.7,
                        blocklist: tuple[str, ...] = BLOCKLIST) -> list[tuple[str, str]]:
    """(instruction, "keep" or why not), in order; one that is kept joins the pool for the next.

    pool: seeds and what was kept before. Kept only if F < threshold to all of it, as the paper
    says; its code keeps F = threshold too. blocklist: whole words, of either case. Reasons, in the
    order in which they are looked for: "too short" (under 4 words), "too long" (over 150), "word:
    map", "a program", "punctuation" (to begin with), "not ASCII" (likewise), "too similar".
    """
    known, verdicts = [words(text) for text in pool], []
    for text in candidates:
        verdict = fault(text.strip(), blocklist)
        if not verdict and too_similar(words(text), known, threshold):
            verdict = "too similar"
        if not verdict:
            known.append(words(text))
        verdicts.append((text, verdict or "keep"))
    return verdicts


def fault(text: str, blocklist: tuple[str, ...]) -> str:
    """What is wrong with an instruction by itself, "" if nothing is."""
    count = len(text.split())
    blocked = next((word for word in blocklist
                    if re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)), "")
    checks = {"too short": count < 4, "too long": count > 150, f"word: {blocked}": blocked,
              "a program": text.startswith("Write a program"),
              "punctuation": text[:1] in string.punctuation, "not ASCII": not text[:1].isascii()}
    return next((reason for reason, found in checks.items() if found), "")


def too_similar(new: list[str], known: list[list[str]], threshold: float) -> bool:
    """Whether ROUGE-L to any of the known is the threshold or more."""
    distinct = set(new)
    for other in known:
        total = len(new) + len(other)
        # Words that the other lacks are in no common sequence: a bound that spares most counting.
        most = len(new) - len(distinct.difference(other))
        if new and other and 2 * most / total >= threshold:
            if 2 * longest_common(new, other) / total >= threshold:
                return True
    return False


# ----------------------------------------------------------------------------- what it writes

def write_instructions(writer: Writer, rounds: int, threshold: float,
                       path: Path | None = None) -> list[dict]:
    """Rows {"round", "instruction", "verdict"} of everything that was proposed. path: where they
    are kept after every round; rounds that stand there are not written anew."""
    form, config = writer.form, writer.config
    draw, own = random.Random(f"self-instruct-{config.seed}"), []
    rows = read_log(path) if path and path.exists() else []
    seeds = [" ".join(seed.instruction.split()) for seed in writer.seeds]
    for k in range(1, rounds + 1):
        prompts = []
        for _ in range(config.lists):
            some = draw.sample(own, min(OWN, len(own)))
            some += draw.sample(seeds, min(SHOWN - len(some), len(seeds)))
            prompts.append(writer.listing(draw.sample(some, len(some))))
        if any(row["round"] == k for row in rows):
            prompts = []
        found = []                                                  # (instruction, why dropped)
        for response in writer.go_on(prompts, config.temperature, f"round {k}"):
            found += [(text, cut or "held out" * form.leaks(Task(text)))
                      for text, cut in writer.items(response)]
        left = [text for text, why in found if not why]
        passed = iter(filter_instructions(left, seeds + own, threshold, form.blocklist))
        for text, why in found:
            verdict = why or next(passed)[1]
            rows.append({"round": k, "instruction": text, "verdict": verdict})
        if path and prompts:
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        own = [row["instruction"] for row in rows if row["verdict"] == "keep" and row["round"] <= k]
    return rows


def write_instances(writer: Writer, instructions: list[str]) -> list[dict]:
    """Rows {"instruction", "given", "answer", "choice", "verdict"}: an instance of each, or several
    where there is an input."""
    form, config = writer.form, writer.config
    draw = random.Random(f"instances-{config.seed}")
    heads = [form.task.format(text) for text in instructions]
    choices = writer.prefers([writer.shown(draw, 0, f"{head}\n{form.is_choice}") for head in heads],
                             " Yes", " No")
    inputs = writer.prefers([writer.shown(draw, 1, f"{head}\n") for head in heads],
                            form.given, form.answer)
    tasks, firsts, prompts = [], [], []
    for text, head, choice, takes_input in zip(instructions, heads, choices, inputs):
        first = form.label if choice else form.given if takes_input else form.answer
        for _ in range(config.instances if choice or takes_input else 1):
            tasks.append(Task(text, choice=choice))
            firsts.append(first)
            prompts.append(writer.shown(draw, 1 + choice, f"{head}\n{first}:"))
    replies, rows = writer.go_on(prompts, config.answer_temperature, "instances"), []
    for task, first, reply in zip(tasks, firsts, replies):
        second = form.answer if first == form.given else form.given
        parts = [part.strip() for part in reply.text.partition(f"\n{second}:")[::2]]
        given, answer = parts if first == form.given else parts[::-1]
        task = task._replace(given=given, answer=answer)
        verdict = instance_fault(task, reply.ended, form) or "held out" * form.leaks(task)
        rows.append(task._asdict() | {"verdict": verdict or "keep"})
    return without_contradictions(rows)


def instance_fault(task: Task, ended: bool, form: Form) -> str:
    """What is wrong with an instance, "" if nothing is."""
    texts, marks = (task.given, task.answer), {form.given, form.answer, form.label}
    told = [part for part in re.split(r"(?<=[a-z][.!?])\s+|\n", task.answer) if part]
    checks = {"endless": not ended, "no output": not task.answer,
              "output is the input": task.given == task.answer,
              "ends in a colon": any(text.endswith(":") for text in texts),
              "too long": any(len(text.split()) > form.most_words for text in texts),
              "another field": any(f"{mark}:" in text for mark in marks for text in texts),
              "repeats": len(set(told)) < len(told)}
    return next((reason for reason, found in checks.items() if found), "")


def without_contradictions(rows: list[dict]) -> list[dict]:
    """The same rows; a task that gives one input two outputs keeps none of its instances, and no
    instance is kept twice."""
    outputs, seen = defaultdict(set), set()
    for row in rows:
        if row["verdict"] == "keep" and row["given"]:
            outputs[row["instruction"], row["given"]].add(row["answer"])
    torn = {instruction for (instruction, _), answers in outputs.items() if len(answers) > 1}
    for row in rows:
        if row["verdict"] == "keep":
            whole = tuple(row.values())
            row["verdict"] = ("two outputs" if row["instruction"] in torn
                              else "twice" if whole in seen else "keep")
            seen.add(whole)
    return rows


# ----------------------------------------------------------------------------- the command

def write_tasks(config: Config, run) -> tuple[Writer, list[Task]]:
    """The writer, and the tasks of its own that passed; what is there is not made anew."""
    home, source = Path(config.out), config.init or f"{config.run}/base"
    if config.seeds and not config.init:
        raise InputError("--init: name the model that is to write from these --seeds, such as "
                         "smollm2")
    model, tokenizer = load_gpt(source)
    if model.config.block_size < 2 * config.max_new_tokens:
        raise InputError(f"--max_new_tokens {config.max_new_tokens}: more than half of the "
                         f"context, {model.config.block_size} tokens; lower it")
    seeds = read_seeds(config.seeds) if config.seeds else town_seeds(config.seed, SEEDS)
    refuse_others(config, source)
    writer = Writer(run.freeze(model), tokenizer, PAPER if config.seeds else TOWN, seeds, config)
    proposed = write_instructions(writer, config.rounds, config.threshold,
                                  home / "instructions.jsonl")
    kept = [row["instruction"] for row in proposed if row["verdict"] == "keep"]
    instances = made(home / "instances.jsonl", lambda: kept and write_instances(writer, kept))
    tasks = [Task(*list(row.values())[:-1]) for row in instances if row["verdict"] == "keep"]
    print(f"Instructions:\n\n{counted(proposed, 'round')}\nInstances:\n\n"
          f"{counted(instances, 'choice')}")
    if not tasks:
        raise InputError(f"{home}: none of {len(proposed)} instructions passed all filters; remove "
                         f"that folder and let a model write that was trained for longer")
    for task in random.Random(config.seed).sample(tasks, min(5, len(tasks))):
        print(writer.form.card(task), end="\n\n")
    return writer, tasks


def tune(writer: Writer, tasks: list[Task]) -> dict[int, str]:
    """SFT of the base on the seeds, and with more and more instructions beside them: number of
    instructions → folder."""
    config, draw = writer.config, random.Random(f"sets-{writer.config.seed}")
    own = list(dict.fromkeys(task.instruction for task in tasks))
    draw.shuffle(own)
    folders = {}
    for size in (0, *(size for size in SIZES if size < len(own)), len(own)):
        chosen = set(own[:size])
        some = [task for task in tasks if task.instruction in chosen]
        some += writer.seeds * repeats(len(some), len(writer.seeds), config.seed_share)
        rows = [conversation(task, draw) for task in some]
        folders[size] = fit(f"own_{size}" if size else "seeds", rows, config)
    return folders


def repeats(own: int, seeds: int, share: float) -> int:
    """How often the seeds must stand beside so many tasks to be about this share of all rows; once
    at least."""
    return max(1, round(share / (1 - share) * own / seeds))


def measure(config: Config) -> dict:
    """Everything; with the town's seeds also what it is worth (written.report)."""
    run, form = start(config, LIMITS), PAPER if config.seeds else TOWN
    place = "out/self_instruct" if config.seeds else f"{config.run}/systems/self_instruct"
    config = replace(config, out=config.out or place, threshold=config.threshold or form.threshold)
    writer, tasks = write_tasks(config, run)
    if config.seeds:
        print(f"written: {config.out}/instances.jsonl, {len(tasks)} to keep")
        return {"tasks": len(tasks)}
    rows = made(Path(config.out) / "thresholds.jsonl", lambda: [
        {"threshold": threshold} | row for threshold in (0.7, 0.8, 0.9)
        for row in write_instructions(writer, min(4, config.rounds), threshold)])
    return report(tasks, rows, tune(writer, tasks), config, run)


if __name__ == "__main__":
    main(measure, Config)
