r"""Rows to conversations: the layouts in which people already have their data (→ `rows.py` for the
files themselves). The keys of each row show its layout.

demonstrations  {"instruction", "input" (optional), "output"}           Alpaca
                {"instruction", "instances": [{"input", "output"}]}     Self-Instruct: one row each
                {"messages": [{"role", "content"}, …]}                  the assistant speaks last
                {"prompt", "completion"} or {"prompt", "response"}      text or messages
                {"conversations": [{"from", "value"}, …]}               ShareGPT; see `sharegpt`
                further names for the same: NAMES
pairs           {"prompt", "chosen", "rejected", "margin" (optional)}   text, a message or messages
                {"instruction", "input" (optional), "chosen", "rejected"}
                {"chosen", "rejected"}      whole dialogues: messages, or HH-RLHF transcripts with
                                            "\n\nHuman:" and "\n\nAssistant:" before the turns
                {"instruction" and "input", or "input", "output_1", "output_2",
                 "preference": 1 to 2, or "label": 1 or 2}              AlpacaFarm, LLMBar
rankings        {"prompt" or "instruction" (+ "input") or "messages", "responses"}   our own
                {"instruction", "completions": [{"response", "overall_score"}, …]}   UltraFeedback
prompts         any of the above, or {"prompt"}, {"instruction"} or {"messages"} alone,
                or {"turns"} (MT-Bench: the first)
plain text      {"text"}, or text with <|endoftext|> between documents

A ranking is one prompt with K >= 2 responses, scored (higher is better) or ranked (1 is best), with
ties or without. It is written in one of two ways, the second with "ranks" or "scores":

    {"prompt": "A hue?", "responses": [{"text": "Red.", "score": 0.9}, {"text": "No.", "score": 0}]}
    {"prompt": "A hue?", "responses": ["Red.", "Blue.", "No."], "ranks": [1, 1, 3]}

A response with "ended": false was cut off where its model was stopped: it gets no end token.

Pairs and rankings serve as demonstrations too: the chosen or best response answers the prompt.
`system` and `history` ([[question, answer], …]) beside any of these become turns before it.

A field that is null is absent. One that nothing reads is named once a file, unless it is NEUTRAL;
one that would change the meaning (MEANING) is refused. Several files are read one after the other.
`FILE:0.7 OTHER:0.3` makes a mixture instead (not of plain text): see `mixed`.

Every fault raises InputError: file, line (JSON lines) or row (JSON list), field, remedy; of several
broken rows the first five. In a field such as `responses[2].score`, [0] is the first. Rows that
nobody at the keyboard can mend are dropped, and counted by reason: see `Unusable`.
"""
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import InputError
from data.rows import describe, is_objects, read_content, read_rows, wrong
from data.turns import (ROLES, Unusable, conversation, is_hh, message_of, number, role_of, sharegpt,
                        text, transcript)

# Their name → ours, where a row has none of ours. A further layout that only names things
# otherwise takes a line here.
NAMES = {
    "question": "prompt", "problem": "prompt", "query": "prompt", "inputs": "prompt",
    "answer": "completion", "solution": "completion", "targets": "completion",
    "context": "input", "system_prompt": "system", "system_message": "system",
    "kto_tag": "label", "conversation": "conversations", "dialog": "conversations"}
# Fields that say nothing about what is to be learned.
NEUTRAL = {"id", "idx", "index", "uuid", "prompt_id", "source", "category", "dataset", "language",
           "instances", "is_classification", "name", "text"}
# Fields that a kind of row reads where they mean something, so that one left over is no accident.
OURS = {"messages", "chosen", "rejected", "responses", "scores", "ranks", "margin", "conversations",
        "output_1", "output_2", "completions", "turns"}
REPLIES = {"output", "completion", "response", "answer", "solution", "targets"}
MEANING = {"demonstration": {"prompt", "instruction", "input", "system", "history", "tools",
                             "functions", "label", *REPLIES},
           "ranking": {"prompt", "instruction", "input", "system", "history", "tools", "functions",
                       "label", "preference"},
           "prompt": {"prompt", "instruction", "input", "system", "history", "tools", "functions"}}
ACCEPTED = {
    "demonstration": ("instruction + output, messages, prompt + completion or response, "
                      "or a ranking"),
    "ranking": ("prompt or instruction with chosen + rejected or responses, or chosen + rejected "
                "as dialogues"),
    "prompt": "prompt, instruction, messages, or a demonstration or ranking",
}


class Fields(dict):
    """A row that remembers which of its fields were read."""

    def __init__(self, row: dict):
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)


@dataclass(frozen=True, slots=True)
class Ranking:
    """K responses to one prompt, ordered by people or by a model that stands in for them."""
    messages: list[dict]     # the prompt: {"role", "content"} each; ends with a user turn
    responses: list[str]     # K of them
    scores: list[float]      # K, higher = better, ties allowed
    margin: float = 0.0      # Llama 2's m(r), in units of reward; 0 where the row gives none
    cut: tuple[int, ...] = ()    # which responses never ended: their model was stopped

    @property
    def untied(self) -> bool:
        """Whether any response is better than another."""
        return len(set(self.scores)) > 1


# ----------------------------------------------------------------------------- the four readers

def read_demonstrations(*paths: str | Path) -> list[list[dict]]:
    """Conversations whose last turn is the assistant's, as lists of {"role", "content"}.

    A pair gives its chosen dialogue, a ranking its best response (the first among equals).
    Raises InputError.
    """
    return read_each(paths, demonstration)


def read_rankings(*paths: str | Path) -> list[Ranking]:
    """Rankings of K >= 2 responses; a pair is a ranking of K = 2 with scores [1.0, 0.0].

    A ranking whose scores are all equal is kept, though it holds no pair to learn from.
    Raises InputError.
    """
    return read_each(paths, ranking)


def read_prompts(*paths: str | Path) -> list[list[dict]]:
    """Conversations that end with a user turn; an assistant's last turn is cut off.

    Raises InputError.
    """
    return read_each(paths, prompt)


def read_text(*paths: str | Path) -> list[str]:
    """Documents for base training, without blank lines around them; empty ones are left out and
    counted.

    A file that opens as a JSON object does, or a list of them, gives the "text" of each row. Text
    is split at every <|endoftext|>; where there are none it is one document. Raises InputError.
    """
    documents = []
    for path in paths:
        content = read_content(path)
        if re.match(r'\s*(\[\s*)?\{\s*"', content):
            rows = [(where, row.get("text")) for where, row in read_rows(path)]
            empty = sum(isinstance(value, str) and not value.strip() for _, value in rows)
            if empty:
                print(f"{Path(path).name}: dropped {empty} of {len(rows)} documents: empty",
                      file=sys.stderr)
            found = [piece for where, value in rows
                     if not isinstance(value, str) or value.strip()
                     for piece in documents_in(text(value, "text", where, ends=True))]
        else:
            found = [piece.strip("\n") for piece in documents_in(content.replace("\r\n", "\n"))]
        if not found:
            raise InputError(f"{path}: expected text, found none; name a file with text in it")
        documents += found
    return documents


def documents_in(content: str) -> list[str]:
    """The parts of a text between <|endoftext|>, wherever it stands, but for empty ones."""
    return [piece for piece in re.split(r"[ \t]*<\|endoftext\|>[ \t]*", content)
            if piece.strip()]


@dataclass(slots=True)
class Reading:
    """What one file holds, read as one kind."""
    rows: int                                                # all of them
    items: list = field(default_factory=list)
    broken: list[str] = field(default_factory=list)          # one reason each
    dropped: Counter = field(default_factory=Counter)        # reason → rows
    left: Counter = field(default_factory=Counter)           # field that nothing reads → rows

    def notes(self) -> list[str]:
        """What was not used, and why."""
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.most_common())
        said = [f"dropped {self.dropped.total()} of {self.rows} rows: {reasons}"] * bool(reasons)
        return said + [f"left alone: {', '.join(sorted(self.left))}"] * bool(self.left)


def read_as(convert, rows: list[tuple[str, dict]]) -> Reading:
    """`convert(row, where)` of each (where, row). convert: demonstration, ranking or prompt."""
    reading = Reading(len(rows))
    for where, row in rows:
        try:
            item, left = converted(convert, row, where)
            reading.items.append(item)
            reading.left.update(left)
        except Unusable as reason:
            reading.dropped[str(reason)] += 1
        except InputError as error:
            reading.broken.append(str(error))
    return reading


def converted(convert, row: dict, where: str) -> tuple:
    """(what a row holds, the fields that nothing has read). Raises InputError or Unusable."""
    fields = renamed(row, where)
    item = convert(fields, where)
    return item, left_alone(fields, item, convert.__name__, where)


def left_alone(row: Fields, item, kind: str, where: str) -> set[str]:
    """The fields that nothing has read; InputError for one that changes what the row means."""
    left = {key for key in row.keys() - row.read - NEUTRAL - OURS
            if row.get(key) not in ("", [], {}, "[]")}
    turns = item if isinstance(item, list) else item.messages
    for key in sorted(left & MEANING[kind]):
        if not is_repeated(key, row[key], turns):
            raise wrong(where, key, "nothing, as this layout does not read it", describe(row[key]),
                        "it would change what the row means: put it where it is read, or remove "
                        "the field")
    return left - MEANING[kind] - REPLIES


def is_repeated(key: str, value, turns: list[dict]) -> bool:
    """Whether a field only says again what the turns say: a reply the same, a question the same, a
    part of it, or it inside a template."""
    if not isinstance(value, str):
        return False
    value, role = value.strip(), "assistant" if key in REPLIES else "user"
    said = [turn["content"].strip() for turn in turns if turn["role"] == role]
    if key in REPLIES:
        return value in said
    return any(value in content for content in said) or key in ("prompt", "instruction") and any(
        content in value for content in said)


def read_each(paths: tuple, convert) -> list:
    """The items of each file; what was dropped or left alone is said once a file."""
    files = []
    names, weights = zip(*map(path_and_weight, paths))
    for path in names:
        reading = read_as(convert, read_rows(path))
        if reading.broken:
            raise InputError(first_faults(path, reading.broken))
        if not reading.items:
            raise InputError(f"{path}: expected usable rows, found none "
                             f"({'; '.join(reading.notes())}); name another file")
        for note in reading.notes():
            print(f"{Path(path).name}: {note}", file=sys.stderr)
        files.append(reading.items)
    if not any(weights):
        return [item for items in files for item in items]
    if not all(weights):
        raise InputError(f"{names[weights.index(0)]}: the other files have a weight; "
                         f"give this one too, as {names[weights.index(0)]}:1")
    return mixed(files, weights)


def first_faults(path: str | Path, broken: list[str]) -> str:
    """One fault as it is; of several the first five and their number; of the same fault in each
    row the first."""
    kinds = {fault.split(": ", 1)[-1].split(", found")[0] for fault in broken}
    if len(broken) == 1:
        return broken[0]
    if len(kinds) == 1:
        return f"{broken[0]} (and {len(broken) - 1} more rows like it)"
    more = ", the first five of them" * (len(broken) > 5)
    return f"{path}: {len(broken)} broken rows{more}:\n  " + "\n  ".join(broken[:5])


def path_and_weight(path: str | Path) -> tuple[str | Path, float]:
    """("a.json", 0.7) of "a.json:0.7"; weight 0 where none is given."""
    found = None if Path(path).exists() else re.fullmatch(r"(.+):(\d*\.?\d+)", str(path))
    if found and not float(found[2]) > 0:
        raise InputError(f"{path}: expected a weight above 0, found {found[2]}; "
                         "leave the file out or raise it")
    return (found[1], float(found[2])) if found else (path, 0.0)


def mixed(files: list[list], weights: tuple[float, ...]) -> list:
    """As many rows as these proportions allow without repeats, evenly spaced in each file."""
    total = min(len(items) * sum(weights) / weight for items, weight in zip(files, weights))
    counts = [max(1, round(total * weight / sum(weights))) for weight in weights]
    return [items[i * len(items) // count] for items, count in zip(files, counts)
            for i in range(count)]


# ----------------------------------------------------------------------------- other people's names

def renamed(row: dict, where: str) -> Fields:
    """A row of a published layout under this project's names, its other fields kept."""
    ours = {}
    for key, value in row.items():
        name = NAMES.get(key, key)
        ours[key if name in row or name in ours else name] = value
    keys = ours.keys()
    if "input" in keys and keys & REPLIES and not keys & {"instruction", "prompt", "messages"}:
        ours["prompt"] = ours.pop("input")
    if is_objects(ours.get("messages")) and any("from" in turn for turn in ours["messages"]):
        ours["conversations"] = ours.pop("messages")
    if "conversations" in keys:
        ours["messages"] = sharegpt(ours.pop("conversations"), where, answered="chosen" not in keys)
    if {"output_1", "output_2"} <= keys:
        return preferred(ours, where)
    if {"instruction", "completions"} <= keys:                          # UltraFeedback
        if not is_objects(ours["completions"]):
            raise wrong(where, "completions", "a list of objects", describe(ours["completions"]),
                        "write an object for each")
        ours["responses"] = [{"text": one.get("response"),
                              "score": one.get("overall_score", one.get("score"))}
                             for one in ours.pop("completions")]
    if "turns" in keys and not keys & {"messages", "prompt", "instruction"}:        # MT-Bench
        turns = ours["turns"]
        ours["prompt"] = turns[0] if isinstance(turns, list) and turns else turns
    return Fields(ours)


def preferred(row: dict, where: str) -> Fields:
    """AlpacaFarm's and LLMBar's: two outputs, and which is better. A preference between 1 and 2 is
    for the nearer one, 1.5 for neither."""
    key = "label" if "label" in row else "preference"
    value, outputs = row.pop(key, None), [row.pop("output_1"), row.pop("output_2")]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 1 <= value <= 2 or key == "label" and value not in (1, 2):
        raise wrong(where, key, "1 or 2, the better output", describe(value),
                    "correct it or remove the row")
    if "instruction" not in row:
        row["prompt"] = row.pop("input", None)
    if value == 1.5:
        answers = [{"text": output, "score": 0} for output in outputs]
        return Fields(row | {"responses": answers})
    better, worse = outputs if value < 1.5 else outputs[::-1]
    return Fields(row | {"chosen": better, "rejected": worse})


# ----------------------------------------------------------------------------- one row, by its keys

def demonstration(row: Fields, where: str) -> list[dict]:
    """The conversation that a row demonstrates. Unusable: labelled false (KTO), HH-RLHF that ends
    without a reply, a ranking whose best response was cut off."""
    if isinstance(dict.get(row, "label"), bool) and not row["label"]:
        raise Unusable("labelled false")
    if "responses" in row:
        ranked = ranked_responses(row, where)
        best = max(range(len(ranked.scores)),
                   key=lambda i: (ranked.scores[i], i not in ranked.cut, -i))
        if best in ranked.cut:
            raise Unusable("the best response never ended")
        return ranked.messages + [{"role": "assistant", "content": ranked.responses[best]}]
    for question, answer in (("instruction", "output"), ("prompt", "completion"),
                             ("prompt", "response"), ("instruction", "response"),
                             ("instruction", "completion"), ("prompt", "output")):
        if question in row and answer in row:
            return dialogue(row, answer, where)
    if "chosen" in row or "rejected" in row:
        turns = dialogue(row, "chosen", where)
        if not turns or turns[-1]["role"] != "assistant":
            raise Unusable("no reply at its end" if turns else "an empty turn")
        return turns
    if "messages" in row:
        return with_system(conversation(row["messages"], "messages", where), row, where)
    raise unrecognised(row, where, "demonstration")


def ranking(row: Fields, where: str) -> Ranking:
    """The ranking that a row holds. Unusable: HH-RLHF transcripts that hold none."""
    if "responses" in row:
        return ranked_responses(row, where)
    if "chosen" in row or "rejected" in row:
        return pair(row, where)
    raise unrecognised(row, where, "ranking")


def prompt(row: Fields, where: str) -> list[dict]:
    """The conversation up to the user's last turn. Unusable: HH-RLHF transcripts without a pair."""
    if "chosen" in row or "rejected" in row:
        return pair(row, where).messages
    field = "messages" if "messages" in row else "prompt"
    turns = dict.get(row, field)
    if isinstance(turns, list) and "instruction" not in row:
        answered = turns and role_of(turns[-1]) == "assistant"
        return with_system(conversation(row[field][:-1] if answered else row[field], field, where,
                                        last="user"), row, where)
    if not row.keys() & {"messages", "prompt", "instruction"}:
        raise unrecognised(row, where, "prompt")
    return asked(row, where)


def asked(row: Fields, where: str) -> list[dict]:
    """What a row's `instruction`, `prompt` or `messages` ask, as messages up to a user turn, after
    its `system` and `history`."""
    field = next((key for key in ("instruction", "prompt", "messages") if key in row), "prompt")
    value = row.get(field)
    if isinstance(value, list) or field == "messages":
        return with_system(conversation(value, field, where, last="user"), row, where)
    content = text(value, field, where)
    if is_hh(content):                         # that someone has split into prompt and replies
        turns = transcript(re.sub(r"\n\nAssistant:\s*\Z", "", content), field, where)
        return with_system(conversation(turns, field, where, last="user"), row, where)
    extra = row.get("input") or ""
    if str(extra).strip():
        content += "\n\n" + text(extra, "input", where)
    return with_system(earlier(row, where) + [{"role": "user", "content": content}], row, where)


def earlier(row: Fields, where: str) -> list[dict]:
    """The turns of `history`, a list of [question, answer]."""
    turns, history = [], row.get("history") or []
    if not isinstance(history, list):
        raise wrong(where, "history", "a list of [question, answer]", describe(history),
                    "write the dialogue as messages")
    for i, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise wrong(where, f"history[{i}]", "[question, answer]", describe(turn),
                        "write the dialogue as messages")
        turns += [{"role": role, "content": text(said, f"history[{i}]", where)}
                  for role, said in zip(("user", "assistant"), turn)]
    return turns


def with_system(turns: list[dict], row: Fields, where: str) -> list[dict]:
    """The turns behind what the row's `system` says, if anything."""
    system = row.get("system") or ""
    if not str(system).strip():
        return turns
    if turns[0]["role"] == "system":
        if turns[0]["content"] != system:
            raise wrong(where, "system", "one system turn", "another in the dialogue",
                        "keep one of them")
        return turns
    return [{"role": "system", "content": text(system, "system", where)}, *turns]


def dialogue(row: Fields, field: str, where: str) -> list[dict]:
    """What a row asks and the reply in `field`, which is text, a message, the assistant's messages,
    or a dialogue with both."""
    value = row.get(field)
    if is_transcript(row, field):
        return transcript(value, field, where)
    if isinstance(value, dict):
        value = [message_of(value)]
        if isinstance(value[0].get("role"), str):
            value[0]["role"] = ROLES.get(value[0]["role"], value[0]["role"])
    if not isinstance(value, list):
        reply = text(value, field, where)
        if is_hh(dict.get(row, "prompt")):
            reply = reply.strip()              # as it has no space where the transcript is whole
        return asked(row, where) + [{"role": "assistant", "content": reply}]
    if value and role_of(value[0]) == "assistant":
        return asked(row, where) + conversation(value, field, where, first="assistant")
    return with_system(conversation(value, field, where), row, where)


def is_transcript(row: Fields, field: str) -> bool:
    """True for an HH-RLHF dialogue: `field` is text, and no other key says what it answers."""
    return (isinstance(dict.get(row, field), str)
            and not row.keys() & {"prompt", "instruction", "messages"})


# ----------------------------------------------------------------------------- pairs and rankings

def pair(row: Fields, where: str) -> Ranking:
    """A Ranking of K = 2 from `chosen` and `rejected`.

    The prompt is the longest list of turns that both dialogues share and that ends just before
    assistant turns that differ; the responses are those two turns, without whatever either dialogue
    goes on to say. Whole turns are compared, not characters: replies may begin alike, or one may be
    the other's beginning.

    Unusable: HH-RLHF transcripts that hold no such turns (identical dialogues, or dialogues that
    part at a human turn) or hold an empty turn: the published files have a few. In other layouts
    the same reply twice is a tie.
    """
    chosen, rejected = dialogue(row, "chosen", where), dialogue(row, "rejected", where)
    differ = [i for i, (one, other) in enumerate(zip(chosen, rejected)) if one != other]
    shared = differ[0] if differ else len(chosen) - 1
    roles = [turn["role"] for turn in chosen[shared:][:1] + rejected[shared:][:1]]
    parted = roles == ["assistant", "assistant"] and (differ or chosen == rejected)
    if is_transcript(row, "chosen") and not (parted and differ):
        raise Unusable("identical replies" if chosen == rejected and chosen else
                       "no two replies to one prompt" if chosen and rejected else "an empty turn")
    if not parted:
        raise wrong(where, "rejected", "the turns of chosen up to a reply that differs",
                    f"others from turn {shared + 1} on", "give both dialogues the same prompt")
    margin = number(row.get("margin", 0.0), "margin", where)
    responses = [chosen[shared]["content"], rejected[shared]["content"]]
    return Ranking(chosen[:shared], responses, [1.0 if differ else 0.0, 0.0], margin)


def ranked_responses(row: Fields, where: str) -> Ranking:
    """A Ranking of `responses`: objects with score or rank, or text beside `scores` or `ranks`."""
    messages, responses = asked(row, where), row["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise wrong(where, "responses", "a list of at least 2", describe(responses),
                    "add responses or remove the row: a ranking of one response trains nothing")
    beside = all(isinstance(response, str) for response in responses)
    if beside:
        key = "ranks" if "scores" not in row and "ranks" in row else "scores"
        if not isinstance(row.get(key), list) or len(row[key]) != len(responses):
            raise wrong(where, key, f"a list of {len(responses)} numbers", describe(row.get(key)),
                        "give each response a score, or a rank in `ranks`")
        entries = [{"text": response, key: value} for response, value in zip(responses, row[key])]
    else:
        entries = [response if isinstance(response, dict) else {} for response in responses]
        key = "rank" if any("rank" in one and "score" not in one for one in entries) else "score"
    texts, values, cut = [], [], []
    for i, entry in enumerate(entries):
        texts.append(text(entry.get("text"),
                          f"responses[{i}]" if beside else f"responses[{i}].text", where))
        values.append(number(entry.get(key),
                             f"{key}[{i}]" if beside else f"responses[{i}].{key}", where))
        ended = entry.get("ended")
        if ended is not None and not isinstance(ended, bool):
            raise wrong(where, f"responses[{i}].ended", "true or false", describe(ended),
                        "correct it or remove the field")
        cut += [i] * (ended is False)
    scores = [-value for value in values] if key.startswith("rank") else values
    return Ranking(messages, texts, scores, number(row.get("margin", 0.0), "margin", where),
                   tuple(cut))


def unrecognised(row: dict, where: str, kind: str) -> InputError:
    """The error for a row that is no `kind`: its keys, what is accepted, what it seems to be."""
    keys = ", ".join(describe(key) for key in list(row)[:8]) or "none"
    guess = ("unpaired labels (KTO), which are no preferences" if "label" in row else
             "demonstrations" if row.keys() & {"output", "completion", "response", "messages"} else
             "prompts without answers" if row.keys() & {"prompt", "instruction"} else
             "another layout")
    return InputError(f"{where}: expected a {kind} ({ACCEPTED[kind]}), found the keys {keys}, "
                      f"which look like {guess}; name another file or rename the fields")
