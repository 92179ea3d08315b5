"""Tinytown in plain text: how a base model is asked, and what it can do without being tuned.

    FORMS          ways to put an instruction to a model that knows no chat form
    plain_prompts  prompts in one of them, with a few answered examples before each
    plain_tasks    facts, questions and summaries to complete: what alignment may cost
"""
import random
from collections.abc import Callable

from data.batches import Prompt
from data.tinytown.prose import titled_story
from data.tinytown.talk import heard, in_talk, on_card, split_given, without_prefix
from data.tinytown.town import FACTS, QUESTIONS, STATEMENTS, understand
from data.tokenizer import Tokenizer


def as_talk(messages: list[dict]) -> str:
    """As people ask each other."""
    return in_talk(in_one_line(messages))


def as_task(messages: list[dict]) -> str:
    """As on a task card; a choice is answered before its text, and then the text stands above."""
    return on_card(*split_given(without_prefix(in_one_line(messages)), understand(messages)[1]))


FORMS: dict[str, Callable[[list[dict]], str]] = {"talk": as_talk, "task": as_task}


def in_one_line(messages: list[dict]) -> str:
    """Turn after turn, as plain text has them."""
    return " ".join(message["content"] for message in messages)


def plain_prompts(prompts: list[Prompt], form: str, shots: int, tokenizer: Tokenizer, room: int,
                  seed: int) -> list[Prompt]:
    """The same prompts as plain text, each after up to `shots` examples with good answers, as many
    as fit into `room` tokens."""
    draw, ask, rendered = random.Random(f"{form}-{seed}"), FORMS[form], []
    for prompt in prompts:
        ids = [tokenizer.endoftext, *tokenizer.encode(ask(prompt.messages))]
        for _ in range(shots):
            example = heard(draw)
            answer = example.family.good(draw, **example.slots)
            before = [tokenizer.endoftext,
                      *tokenizer.encode(f"{ask(example.messages)} {answer}")]
            if len(before) + len(ids) > room:
                break
            ids = before + ids
        rendered.append(Prompt(prompt.messages, ids))
    return rendered


def plain_tasks(stories: int = 100) -> list[dict]:
    """Rows {"kind", "text", "answers"}: text to go on with, sentences that are right.

    Every fact of the town as a cloze and as a question, and stories to sum up.
    """
    draw, rows = random.Random("plain tasks"), []
    for name, facts in FACTS.items():
        for kind, value in facts.items():
            right = [form.format(name=name, value=value) for form in STATEMENTS[kind]]
            start = right[0].removesuffix(f" {value}.")
            rows.append({"kind": "fact", "text": start, "answers": [f"{value}."]})
            question = draw.choice(QUESTIONS[kind]).format(name=name)
            rows.append({"kind": "question", "answers": right,
                         "text": as_task([{"role": "user", "content": question}])})
    while stories:
        told, _, short = titled_story(draw).partition("\nIn short: ")
        if short:
            rows.append({"kind": "summary", "text": f"{told}\nIn short:", "answers": [short]})
            stories -= 1
    return rows
