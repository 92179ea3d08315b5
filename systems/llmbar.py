"""LLMBar: pairs of outputs of which one does what the instruction says and the other looks as if.

    vanilla   both outputs → P(a) against P(b) after "Output ("            → judge.next_logprobs
    guided    the same below rules, metrics for this instruction and an answer to it, which the
              judge has written before (metrics + reference + rules of the paper)
    both in both orders: what counts is whether they agree                 → judge.swap_agreement

Any chat model judges; people agree on 94 % of the items.

Differences from the paper: prompts in our own words; verdicts from probabilities, as written ones
(--written) cost more and some name nothing; no chain of thought, which mostly hurt.

    python -m systems.llmbar --init smollm2 --data llmbar      # a folder; goes on if cut off
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from common.files import progress, read_log
from common.run import DeviceFlags, InputError, load_gpt, main, start, write_json, write_text
from data.batches import Prompt, report
from data.rows import describe, read_rows, wrong
from data.tinytown.report import markdown, rounded
from data.tokenizer import Tokenizer
from model import GPT
from rollout import respond
from systems.judge import COLUMNS, figures, more_words, next_logprobs, parse_verdict

# What a chat model is asked.
METRICS = """Someone will be given this instruction:

{asked}

Which three questions show whether an answer does what the instruction says? Write only them."""
GUIDE = """Judge by these rules:
- First of all an output must do what the instruction says, all of it and nothing else. Facts, \
style and tone come after that.
- An output that reads well but does another thing is the worse one.
- Neither the order nor the length of the outputs matters.

Questions that help to judge:
{metrics}

One possible answer, which may have faults:
{reference}

"""
QUESTION = """{guide}Here are an instruction and two outputs for it.

Instruction: {asked}

Output (a): {first}

Output (b): {second}

Which output does better what the instruction says? Reply "Output (a)" or "Output (b)", no more."""
VERDICTS = "Output (a)", "Output (b)"
PEOPLE = 0.94                      # how often people agree on LLMBar
CHUNK = 8                          # items that are judged, then written down


@dataclass(slots=True)
class Config(DeviceFlags):
    data: str = ""                 # folder of LLMBar's .json files
    init: str = ""                 # what judges them: a checkpoint, or smollm2
    out: str = "out/llmbar"        # folder of verdicts.jsonl and table.json
    most: int = 0                  # items of each file; 0: all
    notes: int = 96                # most tokens of the metrics, and of the judge's own answer
    written: int = 0               # most tokens of a written verdict; 0: from probabilities


LIMITS = dict(most=(0, 10**6), notes=(1, 10**4), written=(0, 10**4))
NEEDED = dict(data="name the folder of LLMBar's .json files", init="name the model that judges")


# ----------------------------------------------------------------------------- items

class Item(NamedTuple):
    """An instruction, two outputs, and which of them does what it says, 1 or 2."""
    asked: str
    outputs: tuple[str, str]
    label: int


def read_item(row: dict, where: str) -> Item:
    """The item of a row; LLMBar calls its instruction `input`. InputError by row and field."""
    asked = "\n\n".join(str(row[field]) for field in ("instruction", "input") if row.get(field))
    outputs = row.get("output_1"), row.get("output_2")
    for field, text in zip(("instruction", "output_1", "output_2"), (asked, *outputs)):
        if not isinstance(text, str) or not text.strip():
            raise wrong(where, field, "a text", describe(text or None), "add it or remove the item")
    if row.get("label") not in (1, 2):
        raise wrong(where, "label", "1 or 2, the better output", describe(row.get("label")),
                    "correct it or remove the item")
    return Item(asked, outputs, row["label"])


def read_items(folder: str, most: int = 0) -> dict[str, list[Item]]:
    """The items of every .json file of a folder, by the file's name; most: of each, 0: all."""
    paths = sorted(Path(folder).rglob("*.json"))
    if not paths:
        raise InputError(f"--data {folder}: expected a folder with LLMBar's files (natural.json, "
                         f"adversarial_*.json), found no .json file; name another folder")
    return {str(path.relative_to(folder).with_suffix("")): [
        read_item(row, where) for where, row in read_rows(path)[:most or None]] for path in paths}


# ----------------------------------------------------------------------------- judging

class Chat(NamedTuple):
    """A chat model that judges items, and how."""
    model: GPT
    tokenizer: Tokenizer
    config: Config

    def prompt(self, text: str) -> Prompt:
        messages = [{"role": "user", "content": text}]
        return Prompt(messages, self.tokenizer.render_prompt(messages))

    def write(self, prompts: list[Prompt], most: int) -> list[str]:
        """Greedy replies."""
        return [reply.text.strip() for reply in respond(self.model, prompts, self.tokenizer, most,
                                                        seed=self.config.seed, temperature=0.0)]

    def questions(self, item: Item, guide: str = "") -> list[Prompt]:
        """An item in the order of the data and in the other."""
        return [self.prompt(QUESTION.format(guide=guide, asked=item.asked, first=first,
                                            second=second))
                for first, second in (item.outputs, item.outputs[::-1])]

    def guides(self, items: list[Item]) -> list[str]:
        """Rules for each item, with metrics and an answer that the judge writes now."""
        asked = [self.prompt(text) for item in items
                 for text in (METRICS.format(asked=item.asked), item.asked)]
        texts = self.write(asked, self.config.notes)
        return [GUIDE.format(metrics=metrics, reference=reference)
                for metrics, reference in zip(texts[::2], texts[1::2])]

    def judge(self, items: list[Item], guided: bool) -> list[dict]:
        """{"shown", "swapped"} of each item: log-odds of the first place in both orders. A written
        verdict counts 1 or −1, and None where it names no output."""
        guides = self.guides(items) if guided else [""] * len(items)
        asked = [one for item, guide in zip(items, guides) for one in self.questions(item, guide)]
        if self.config.written:
            replies = self.write(asked, self.config.written)
            leads = [{1: 1.0, 2: -1.0}.get(parse_verdict(reply)) for reply in replies]
        else:
            logprobs = next_logprobs(self.model, self.tokenizer, [one.ids for one in asked],
                                     VERDICTS)
            leads, replies = (logprobs[:, 0] - logprobs[:, 1]).tolist(), []
        return [{"shown": leads[i], "swapped": leads[i + 1], "replies": replies[i:i + 2]}
                for i in range(0, len(leads), 2)]

    def that_fit(self, items: list[Item]) -> list[Item]:
        """The items that leave room for a guide and a verdict: the same for both prompts."""
        room = self.model.config.block_size - 2 * self.config.notes - max(self.config.written, 16)
        guide = GUIDE.format(metrics="", reference="")
        kept = [item for item in items if len(self.questions(item, guide)[0].ids) <= room]
        report(len(items), len(items) - len(kept), 0, room)
        return kept


def judged(chat: Chat, name: str, items: list[Item], guided: bool, path: Path) -> list[dict]:
    """`Chat.judge` for all items of a set, written to the file at `path` as they come. What stands
    there of the same model, prompts and item is not asked again. InputError if no reply names an
    output."""
    known = {row["key"]: row for row in read_log(path)} if path.exists() else {}
    write_text(path, "".join(json.dumps(row) + "\n" for row in known.values()))    # whole lines
    weights = sum(p.double().sum().item() for p in chat.model.parameters())
    asked = (weights, METRICS, GUIDE, QUESTION, guided and chat.config.notes, chat.config.written)
    keys = [hashlib.sha256(repr((asked, item)).encode()).hexdigest()[:16] for item in items]
    left = [place for place, key in enumerate(keys) if key not in known]
    left.sort(key=lambda place: len(repr(items[place])))        # of similar length together
    with open(path, "a") as file, progress(len(left), name, "item") as bar:
        for start_at in range(0, len(left), CHUNK):
            places = left[start_at:start_at + CHUNK]
            for place, row in zip(places, chat.judge([items[i] for i in places], guided)):
                known[keys[place]] = {"key": keys[place], "set": name, **row}
                file.write(json.dumps(known[keys[place]]) + "\n")
            file.flush()
            bar.update(len(places))
    rows = [known[key] for key in keys]
    if not any(told(row) for row in rows):
        raise InputError(f"{name}: no item of {len(rows)} has a reply that names an output in both "
                         f"orders, the first is {rows[0]['replies'][0][:60]!r}; leave out "
                         f"--written, so that verdicts come from probabilities, or take another "
                         f"--init")
    return rows


def told(row: dict) -> bool:
    """Whether there is a verdict in both orders."""
    return None not in (row["shown"], row["swapped"])


def measure(config: Config) -> dict:
    """Judge all sets by both prompts in both orders; writes verdicts.jsonl and table.json."""
    run = start(config, LIMITS, NEEDED)
    home, sets, found = Path(config.out), read_items(config.data, config.most), {}
    model, tokenizer = load_gpt(config.init)
    chat = Chat(run.freeze(model), tokenizer, config)
    for name, items in sets.items():
        items = chat.that_fit(items)
        gold = torch.tensor([item.label for item in items])
        longer = torch.tensor([more_words(*item.outputs) for item in items])
        found[name] = {"the longer": figures(longer, -longer, gold, longer) | {"items": len(items)}}
        for kind in ("vanilla", "guided"):
            rows = judged(chat, f"{name}, {kind}", items, kind == "guided", home / "verdicts.jsonl")
            kept = torch.tensor([told(row) for row in rows])
            leads = [torch.tensor([row[order] for row in rows if told(row)])
                     for order in ("shown", "swapped")]
            found[name][kind] = (figures(*leads, gold[kept], longer[kept])
                                 | {"items": int(kept.sum())})
    print(f"Judge: {config.init}. People agree on {PEOPLE:.0%}.\n")
    print(markdown(["set", "judge", "items", *COLUMNS.values()],
                   [[name, kind, str(one["items"]), *(one[key] for key in COLUMNS)]
                    for name, kinds in found.items() for kind, one in kinds.items()]))
    write_json(home / "table.json", rounded(found), indent=1)
    return found


if __name__ == "__main__":
    main(measure, Config)
