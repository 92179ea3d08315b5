"""Turns of a dialogue, checked: messages, ShareGPT dialogues, HH-RLHF transcripts.

Whatever layout they come from, they leave here as {"role", "content"}: one system turn at most,
then user and assistant in alternation, text in each. Tool calls, pictures and turns that are not to
be trained on are refused by name.
"""
import re
import sys

from common.errors import InputError
from data.rows import describe, is_objects, wrong

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
         "assistant": "assistant", "bard": "assistant", "bing": "assistant", "system": "system"}
TOOL_ROLES = ("tool", "function", "ipython", "observation", "function_call")
# A message that says so is not to be trained on.
TRAINED = ("weight", "train", "training", "trainable", "loss")


# Where an export has put a list of messages, or a dialogue, between quotes.
AS_TEXT = re.compile(r"""\s*[\[{]\s*\{?\s*['"](role|content|messages|from|conversations)['"]\s*:""")


class Unusable(Exception):
    """A row that nobody at the keyboard can mend, with the reason."""


# ----------------------------------------------------------------------------- conversations

def conversation(value, field: str, where: str, first: str = "user",
                 last: str = "assistant") -> list[dict]:
    """Checked messages without other keys: one system turn at most, then turns that alternate
    from `first` to `last`."""
    if not isinstance(value, list) or not value:
        raise wrong(where, field, 'a list of {"role", "content"}', describe(value),
                    "write an entry per turn")
    turns, due = [], first
    for i, message in enumerate(value):
        role, at = role_of(message), f"{field}[{i}]"
        if role in TOOL_ROLES or isinstance(message, dict) and (
                message.get("tool_calls") or message.get("function_call")):
            raise no_tools(where, at)
        if role not in ("system", "user", "assistant"):
            raise wrong(where, f"{at}.role", "system, user or assistant", describe(role),
                        "rename it")
        if untrained := [key for key in TRAINED if message.get(key) in (0, False)
                         and message.get(key) is not None]:
            raise wrong(where, f"{at}.{untrained[0]}", "1 or true, as every answer is trained on",
                        describe(message[untrained[0]]), "cut the dialogue so that what is not to "
                        "be trained on stands before the last answer, or remove the row")
        content = joined(message.get("content"), at, where)
        if role == "system" and i == 0 and not str(content or "").strip():
            continue                                        # an empty system turn is none
        if role == due:
            due = "assistant" if role == "user" else "user"
        elif role != "system" or i > 0:
            raise wrong(where, f"{at}.role", due, role,
                        "after one system turn at most, user and assistant must alternate")
        turns.append({"role": role, "content": text(content, f"{at}.content", where)})
    if role != last:
        raise wrong(where, field, f"a last turn by the {last}", f"one by the {role}",
                    "complete the dialogue")
    return turns


def joined(content, field: str, where: str):
    """The content of a message; of a list of parts the text, if all of them are text."""
    if not is_objects(content) or not content:
        return content
    for part in content:
        if part.get("type", "text") not in ("text", "input_text", "output_text"):
            raise wrong(where, f"{field}.content", "parts of text", describe(part.get("type")),
                        "leave such rows out: only text is read")
    return "".join(str(part.get("text") or "") for part in content)


def no_tools(where: str, field: str) -> InputError:
    """The error for a tool call or a tool's result."""
    return wrong(where, field, "a turn of text", "a tool call or its result",
                 "leave such rows out: tool turns are not read")


def role_of(message) -> str | None:
    """The role of a message; None where there is none."""
    return message.get("role") if isinstance(message, dict) else None


def transcript(value: str, field: str, where: str) -> list[dict]:
    """The turns of an HH-RLHF transcript; [] where one is empty or the assistant speaks first.

    A speaker announced twice in a row, as in the published files, has one turn of two paragraphs.
    """
    head, *parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", text(value, field, where))
    if head or not parts:
        raise wrong(where, field, r"a transcript that begins with '\n\nHuman:'", describe(value),
                    "add a `prompt` to the row if this is the reply alone")
    turns = []
    for speaker, content in zip(parts[::2], parts[1::2]):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            content = turns.pop()["content"] + "\n\n" + content.strip()
        turns.append({"role": role, "content": content.strip()})
    return turns if turns[0]["role"] == "user" and all(turn["content"] for turn in turns) else []


def is_hh(value) -> bool:
    """Whether a prompt is an HH-RLHF transcript."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


# ----------------------------------------------------------------------------- ShareGPT

def sharegpt(value, where: str, answered: bool = True) -> list[dict]:
    """The messages of a ShareGPT dialogue, without assistant turns before the first human one and,
    if it must be answered, without human turns after the last answer: people shared dialogues from
    the middle.

    Two turns of one speaker become one of two paragraphs. Unusable where nothing is left, or where
    a turn is empty; an empty system turn is none.
    """
    if not is_objects(value):
        raise wrong(where, "conversations", 'a list of {"from", "value"}', describe(value),
                    "write an entry per turn")
    turns = []
    for i, one in enumerate(value):
        turn = message_of(one)
        if turn.get("role") in TOOL_ROLES:
            raise no_tools(where, f"conversations[{i}]")
        if not isinstance(turn.get("role"), str) or turn["role"] not in ROLES:
            raise wrong(where, f"conversations[{i}].from", "human, gpt or system",
                        describe(turn.get("role")), "rename it")
        turn["role"] = ROLES[turn["role"]]
        turn["content"] = joined(turn.get("content"), f"conversations[{i}]", where)
        if turn["content"] is None or not str(turn["content"]).strip():
            if turn["role"] == "system":
                continue
            raise Unusable("an empty turn")
        if turns and turns[-1]["role"] == turn["role"] and isinstance(turn["content"], str):
            turn["content"] = f"{turns.pop()['content']}\n\n{turn['content']}"
        turns.append(turn)
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
    systems = [turn for turn in turns[:first] if turn["role"] == "system"]
    turns = turns[first:]
    while turns and answered and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise Unusable("no answer to a human turn")
    return systems + turns


def message_of(value: dict) -> dict:
    """A message under our names: {"from", "value"} is {"role", "content"}."""
    return {{"from": "role", "value": "content"}.get(key, key): item for key, item in value.items()}


# ----------------------------------------------------------------------------- checks

def text(value, field: str, where: str, ends: bool = False) -> str:
    """`value`, which must be a string with something in it besides white space. ends: whether it
    may hold <|endoftext|>; elsewhere one at its end, which no model should spell, is left out."""
    if isinstance(value, str) and not ends:
        value = re.sub(r"\s*<\|endoftext\|>\s*\Z", "", value)
    if not isinstance(value, str) or not value.strip():
        raise wrong(where, field, "text", describe(value), "fill it in or remove the row")
    if AS_TEXT.match(value):
        raise wrong(where, field, "text or messages", "messages written as text",
                    "write them as JSON, without quotes around them")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise wrong(where, field, "Unicode text", "half of a surrogate pair",
                    "write the whole character")
    return value


def number(value, field: str, where: str) -> float:
    """`value` as a float; it must be a finite number, and 0 is one."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:       # NaN fails every comparison
        raise wrong(where, field, "a finite number", describe(value),
                    "correct it or remove the row")
    return float(value)
