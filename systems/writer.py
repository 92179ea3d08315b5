"""A model that writes plain text, asked in forms that it has read: Self-Instruct's writer.

    TOWN     lists and cards of Tinytown's text, for its base model
    PAPER    the paper's lists and cards, for a published model, with seed tasks before a new one
"""
import random
import re
import zlib
from collections.abc import Callable
from typing import NamedTuple

from common.run import DeviceFlags, InputError
from data.batches import Prompt
from data.rows import read_rows
from data.tinytown.tasks import Task, leaks
from data.tokenizer import Tokenizer
from model import GPT
from rollout import Response, respond, sequence_logprobs

# The paper's: tasks about what is no text.
BLOCKLIST = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map",
             "maps", "draw", "plot", "go to", "video", "audio", "music", "flowchart", "diagram")


class Form(NamedTuple):
    """The words that a plain-text model is asked with, and what of its own is kept."""
    listing: str                             # stands before a list of instructions
    item: str                                # number and instruction
    task: str                                # an instruction
    is_choice: str                           # asks whether it is one
    given: str                               # before an input
    answer: str                              # before an output
    label: str                               # before the output of a choice
    shots: int                               # seed tasks before a new one
    most_words: int                          # of an input or an output
    threshold: float
    blocklist: tuple[str, ...]
    leaks: Callable[[Task], bool]
    about: tuple[str, str, str] = ("", "", "")   # before shots: of is_choice, input first, output

    def card(self, task: Task) -> str:
        """A whole task; of a choice the output stands first."""
        given = f"\n{self.given}: {task.given}" * bool(task.given)
        head = self.task.format(task.instruction)
        return (f"{head}\n{self.label}: {task.answer}{given}" if task.choice else
                f"{head}{given}\n{self.answer}: {task.answer}")


TOWN = Form("What people asked in town.", "{}. {}", "A task. {}", "Is it a choice?", "Text",
            "Answer", "Answer", 0, 40, 0.9, (), leaks)
PAPER = Form("Come up with a series of tasks:", "Task {}: {}", "Task: {}", "Is it classification?",
             "Input", "Output", "Class label", 6, 200, 0.7, BLOCKLIST, lambda task: False,
             ("Can the following task be regarded as a classification task with finite output "
              "labels?", "Come up with examples for the following tasks.",
              "Given the classification task definition and the class labels, generate an input "
              "that corresponds to each of the class labels."))


class Writer(NamedTuple):
    """A model that goes on with plain text, the form in which it is asked, its seed tasks."""
    model: GPT
    tokenizer: Tokenizer
    form: Form
    seeds: list[Task]
    config: DeviceFlags                      # the system's, with seed and max_new_tokens

    def prompt(self, before: list[str], text: Callable[[list[str]], str]) -> Prompt:
        """text(before) as ids, with as many of the last of `before` as leave room to go on."""
        room = self.model.config.block_size - self.config.max_new_tokens
        while True:
            ids = [self.tokenizer.endoftext, *self.tokenizer.encode(text(before))]
            if len(ids) <= room or not before:
                return Prompt([], ids[-room:])
            before = before[1:]

    def listing(self, some: list[str]) -> Prompt:
        """A list of instructions, up to the number of the next."""
        def text(some: list[str]) -> str:
            items = [self.form.item.format(i, one) for i, one in enumerate([*some, ""], 1)]
            return "\n".join([self.form.listing, *items]).strip()
        return self.prompt(some, text)

    def items(self, response: Response) -> list[tuple[str, str]]:
        """The instructions that go on with a list, each with "" or "cut off"."""
        number = re.compile(re.escape(self.form.item.format(0, "").strip()).replace("0", r"\d+"))
        first, *more = response.text.split("\n")
        more = [line[match.end():] for line in more if (match := number.match(line))]
        cut = [""] * len(more) + ["" if response.ended else "cut off"]
        return list(zip(map(str.strip, [first, *more]), cut))

    def go_on(self, prompts: list[Prompt], temperature: float, title: str) -> list[Response]:
        """Text after each prompt, up to its end, which a blank line is too."""
        found, seed = [], zlib.crc32(f"{title} {self.config.seed}".encode())
        for one in respond(self.model, prompts, self.tokenizer, self.config.max_new_tokens,
                           seed=seed, title=title, stop=self.tokenizer.endoftext,
                           temperature=temperature):
            text, ended = self.tokenizer.response_text(one.ids[:-1] if one.ended else one.ids)
            text, blank, _ = text.partition("\n\n")
            found.append(Response(one.ids, text, bool(one.ended or ended or blank)))
        return found

    def prefers(self, prompts: list[Prompt], first: str, second: str) -> list[bool]:
        """Whether P(first) > P(second) after each prompt."""
        scores = [sequence_logprobs(self.model, prompts, [Response(
            self.tokenizer.encode(word), word, False)] * len(prompts), self.tokenizer.pad)
            for word in (first, second)]
        return (scores[0] > scores[1]).tolist()

    def shown(self, draw: random.Random, about: int, last: str) -> Prompt:
        """A new task behind some short seeds. about: 0 asks whether it is a choice, 1 for an input
        first, 2 for a choice's output first."""
        form, some = self.form, []
        if form.shots:
            some = [seed for seed in self.seeds if len(form.card(seed)) < 300
                    and (about == 0 or seed.choice == (about == 2))]
            some = draw.sample(some, min(form.shots, len(some)))
        before = [form.card(seed) if about else f"{form.task.format(seed.instruction)}\n"
                  f"{form.is_choice} {'Yes' if seed.choice else 'No'}" for seed in some]
        return self.prompt(before, lambda shots: "\n\n".join(
            [text for text in (form.about[about], *shots, last) if text]))


def read_seeds(path: str) -> list[Task]:
    """Seed tasks in the paper's layout: rows {"instruction", "instances": [{"input", "output"}],
    "is_classification"}; of several instances the first. InputError names file and line."""
    tasks: dict[str, Task] = {}
    for where, row in read_rows(path):                 # which makes a row of each instance
        fields = [row.get(name) for name in ("instruction", "input", "output")]
        if not (all(isinstance(text, str) for text in fields) and "is_classification" in row):
            raise InputError(f"{where}: expected a seed task, an object with \"instruction\", "
                             f"\"is_classification\" and \"instances\" of \"input\" and "
                             f"\"output\"; name a file of such rows with --seeds")
        instruction, given, answer = map(str.strip, fields)
        tasks.setdefault(instruction, Task(instruction, given, answer,
                                           bool(row["is_classification"])))
    return list(tasks.values())
