r"""Read the layouts in which people already have their data, from `.json`, `.jsonl`, `.txt`,
`.gz` of any of these, or `.parquet`.

The content decides, never the extension: the first bytes show gzip, the text shows a JSON list or
one object per line, and the keys of each row show the layout. Keys that a layout does not name are
ignored.

demonstrations  {"instruction", "input" (optional), "output"}           Alpaca
                {"instruction", "instances": [{"input", "output"}]}     Self-Instruct: one row each
                {"messages": [{"role", "content"}, …]}                  the assistant speaks last
                {"prompt", "completion"} or {"prompt", "response"}      text or messages
                {"instruction", "context", "response"}                  Dolly
                {"conversations": [{"from", "value"}, …]}               ShareGPT; see `sharegpt`
pairs           {"prompt", "chosen", "rejected", "margin" (optional)}   text or messages
                {"instruction", "input" (optional), "chosen", "rejected"}
                {"chosen", "rejected"}      whole dialogues: messages, or HH-RLHF transcripts with
                                            "\n\nHuman:" and "\n\nAssistant:" before the turns
                {"instruction" and "input", or "input", "output_1", "output_2",
                 "preference" or "label": 1 or 2}                       AlpacaFarm, LLMBar
rankings        {"prompt" or "instruction" (+ "input") or "messages", "responses"}   our own
                {"instruction", "completions": [{"response", "overall_score"}, …]}   UltraFeedback
prompts         any of the above, or {"prompt"}, {"instruction"} or {"messages"} alone,
                or {"turns"} (MT-Bench: the first)
plain text      {"text"}, or text with a line that holds only <|endoftext|> between documents

A ranking is one prompt with K >= 2 responses, scored (higher is better) or ranked (1 is best), with
ties or without. It is written in one of two ways, the second with "ranks" or "scores":

    {"prompt": "A hue?", "responses": [{"text": "Red.", "score": 0.9}, {"text": "No.", "score": 0}]}
    {"prompt": "A hue?", "responses": ["Red.", "Blue.", "No."], "ranks": [1, 1, 3]}

Pairs and rankings serve as demonstrations too: the chosen or best response answers the prompt.

Several files are read one after the other. `FILE:0.7 OTHER:0.3` makes a mixture instead (not of
plain text): see `mixed`.

Every fault raises InputError in one line: file, line (JSON lines) or row (JSON list), field,
remedy. In a field such as `responses[2].score`, [0] is the first. Only HH-RLHF transcripts and
ShareGPT dialogues are dropped, and counted: see `pair` and `sharegpt`.
"""
import gzip
import io
import json
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError
from common.files import free_memory

ROW_KEYS = {"messages", "prompt", "instruction", "chosen", "rejected", "responses", "text",
            "conversations", "output_1", "turns"}
ACCEPTED = {
    "demonstration": ("instruction + output, messages, prompt + completion or response, "
                      "or a ranking"),
    "ranking": ("prompt or instruction with chosen + rejected or responses, or chosen + rejected "
                "as dialogues"),
    "prompt": "prompt, instruction, messages, or a demonstration or ranking",
}


@dataclass(frozen=True, slots=True)
class Ranking:
    """K responses to one prompt, ordered by people or by a model that stands in for them."""
    messages: list[dict]     # the prompt: {"role", "content"} each; ends with a user turn
    responses: list[str]     # K of them
    scores: list[float]      # K, higher = better, ties allowed
    margin: float = 0.0      # Llama 2's m(r), in units of reward; 0 where the row gives none

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
    """Documents for base training, without blank lines around them; none is empty.

    A file that opens as a JSON object does, or a list of them, gives the "text" of each row. Any
    other is split at lines that hold only <|endoftext|>; where there are none it is one document.
    Raises InputError.
    """
    documents = []
    for path in paths:
        content = read_content(path)
        if re.match(r'\s*(\[\s*)?\{\s*"', content):
            found = [text(row.get("text"), "text", where) for where, row in read_rows(path)]
        else:
            pieces = re.split(r"(?m)^[ \t]*<\|endoftext\|>[ \t]*$", content.replace("\r\n", "\n"))
            found = [piece.strip("\n") for piece in pieces if piece.strip()]
        if not found:
            raise InputError(f"{path}: expected text, found none; name a file with text in it")
        documents += found
    return documents


def read_each(paths: tuple, convert) -> list:
    """`convert(row, where)` of each row of each file; rows that it answers with None are
    dropped and counted."""
    files = []
    names, weights = zip(*map(path_and_weight, paths))
    for path in names:
        rows = read_rows(path)
        named = ((where, renamed(row, where)) for where, row in rows)
        kept = [item for item in (convert(row, where) for where, row in named if row is not None)
                if item is not None]
        dropped = f"dropped {len(rows) - len(kept)} of {len(rows)} rows: identical or empty replies"
        if not kept:
            raise InputError(f"{path}: expected usable rows, found none ({dropped}); "
                             "name another file")
        if len(kept) < len(rows):
            print(f"{Path(path).name}: {dropped}", file=sys.stderr)
        files.append(kept)
    if not any(weights):
        return [item for items in files for item in items]
    if not all(weights):
        raise InputError(f"{names[weights.index(0)]}: the other files have a weight; "
                         f"give this one too, as {names[weights.index(0)]}:1")
    return mixed(files, weights)


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

def layout(row: dict) -> str:
    """The published layout that a row's keys show, or "" for those that need no renaming."""
    keys = row.keys()
    layouts = (("Dolly", {"instruction", "context", "response"}),
               ("ShareGPT", {"conversations"}),
               ("AlpacaFarm", {"output_1", "output_2", "preference"}),
               ("LLMBar", {"output_1", "output_2", "label"}),
               ("UltraFeedback", {"instruction", "completions"}), ("MT-Bench", {"turns"}))
    own = keys & {"messages", "prompt", "instruction"}
    return next((name for name, needed in layouts
                 if needed <= keys and not (name == "MT-Bench" and own)), "")


def renamed(row: dict, where: str) -> dict | None:
    """A row of a published layout under this project's names; any other row as it is.

    None for a dialogue without a reply.
    """
    name = layout(row)
    if name == "Dolly":
        return {"instruction": row["instruction"], "input": row["context"],
                "output": row["response"]}
    if name == "ShareGPT":
        turns = sharegpt(row["conversations"], where)
        return {"messages": turns} if turns else None
    if name in ("AlpacaFarm", "LLMBar"):
        key = "preference" if name == "AlpacaFarm" else "label"
        if row[key] not in (1, 2) or isinstance(row[key], bool):
            raise wrong(where, key, "1 or 2, the better output", describe(row[key]),
                        "correct it or remove the row")
        better, worse = ("output_1", "output_2") if row[key] == 1 else ("output_2", "output_1")
        question = ({"instruction": row["instruction"], "input": row.get("input")}
                    if "instruction" in row else {"prompt": row.get("input")})
        return {**question, "chosen": row[better], "rejected": row[worse]}
    if name == "UltraFeedback":
        if not is_objects(row["completions"]):
            raise wrong(where, "completions", "a list of objects", describe(row["completions"]),
                        "write an object for each")
        answers = [{"text": one.get("response"),
                    "score": one.get("overall_score", one.get("score"))}
                   for one in row["completions"]]
        return {"instruction": row["instruction"], "responses": answers}
    if name == "MT-Bench":
        turns = row["turns"]
        return {"prompt": turns[0] if isinstance(turns, list) and turns else turns}
    return row


def sharegpt(value, where: str) -> list[dict]:
    """The messages of a ShareGPT dialogue, without assistant turns before the first human one and
    without human turns after the last answer: people shared dialogues from the middle.

    Two turns of one speaker become one of two paragraphs. [] where nothing is left, or where a turn
    is empty, as nobody at the keyboard can mend that.
    """
    roles = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
             "assistant": "assistant", "bard": "assistant", "bing": "assistant", "system": "system"}
    if not is_objects(value):
        raise wrong(where, "conversations", 'a list of {"from", "value"}', describe(value),
                    "write an entry per turn")
    turns = []
    for i, one in enumerate(value):
        if not isinstance(one.get("from"), str) or one["from"] not in roles:
            raise wrong(where, f"conversations[{i}].from", "human, gpt or system",
                        describe(one.get("from")), "rename it")
        if one.get("value") is None or not str(one["value"]).strip():
            return []
        turn = {"role": roles[one["from"]], "content": one["value"]}
        if turns and turns[-1]["role"] == turn["role"] and isinstance(turn["content"], str):
            turn["content"] = f"{turns.pop()['content']}\n\n{turn['content']}"
        turns.append(turn)
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
    systems = [turn for turn in turns[:first] if turn["role"] == "system"]
    turns = turns[first:]
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    return systems + turns if turns else []


# ----------------------------------------------------------------------------- one row, by its keys

def demonstration(row: dict, where: str) -> list[dict] | None:
    """The conversation that a row demonstrates; None for HH-RLHF that ends without a reply."""
    if "responses" in row:
        ranked = ranked_responses(row, where)
        best = ranked.scores.index(max(ranked.scores))
        return ranked.messages + [{"role": "assistant", "content": ranked.responses[best]}]
    for question, answer in (("instruction", "output"), ("prompt", "completion"),
                             ("prompt", "response")):
        if question in row and answer in row:
            return dialogue(row, answer, where)
    if "chosen" in row or "rejected" in row:
        turns = dialogue(row, "chosen", where)
        return turns if turns and turns[-1]["role"] == "assistant" else None
    if "messages" in row:
        return conversation(row["messages"], "messages", where)
    raise unrecognised(row, where, "demonstration")


def ranking(row: dict, where: str) -> Ranking | None:
    """The ranking that a row holds; None for HH-RLHF transcripts that hold none."""
    if "responses" in row:
        return ranked_responses(row, where)
    if "chosen" in row or "rejected" in row:
        return pair(row, where)
    raise unrecognised(row, where, "ranking")


def prompt(row: dict, where: str) -> list[dict] | None:
    """The conversation up to the user's last turn; None for HH-RLHF transcripts without a pair."""
    if "chosen" in row or "rejected" in row:
        ranked = pair(row, where)
        return ranked.messages if ranked else None
    field = "messages" if "messages" in row else "prompt"
    turns = row.get(field)
    if isinstance(turns, list):
        answered = turns and role_of(turns[-1]) == "assistant"
        return conversation(turns[:-1] if answered else turns, field, where, last="user")
    if not row.keys() & {"messages", "prompt", "instruction"}:
        raise unrecognised(row, where, "prompt")
    return asked(row, where)


def asked(row: dict, where: str) -> list[dict]:
    """What a row's `instruction`, `prompt` or `messages` ask, as messages up to a user turn."""
    field = next((key for key in ("instruction", "prompt", "messages") if key in row), "prompt")
    value = row.get(field)
    if isinstance(value, list) or field == "messages":
        return conversation(value, field, where, last="user")
    content = text(value, field, where)
    # HH-RLHF that someone has split into prompt and replies.
    if content.startswith("\n\nHuman:"):
        turns = transcript(re.sub(r"\n\nAssistant:\s*\Z", "", content), field, where)
        return conversation(turns, field, where, last="user")
    extra = row.get("input") or ""
    if field == "instruction" and str(extra).strip():
        content += "\n\n" + text(extra, "input", where)
    return [{"role": "user", "content": content}]


def dialogue(row: dict, field: str, where: str) -> list[dict]:
    """What a row asks and the reply in `field`, which is text, the assistant's messages, or a
    dialogue with both."""
    value = row.get(field)
    if is_transcript(row, field):
        return transcript(value, field, where)
    if not isinstance(value, list):
        reply = {"role": "assistant", "content": text(value, field, where)}
        return asked(row, where) + [reply]
    if value and role_of(value[0]) == "assistant":
        return asked(row, where) + conversation(value, field, where, first="assistant")
    return conversation(value, field, where)


# ----------------------------------------------------------------------------- pairs and rankings

def pair(row: dict, where: str) -> Ranking | None:
    """A Ranking of K = 2 from `chosen` and `rejected`.

    The prompt is the longest list of turns that both dialogues share and that ends just before
    assistant turns that differ; the responses are those two turns, without whatever either dialogue
    goes on to say. Whole turns are compared, not characters: replies may begin alike, or one may be
    the other's beginning.

    Returns None for HH-RLHF transcripts that hold no such turns (identical dialogues, or dialogues
    that part at a human turn) or hold an empty turn: the published files have a few, and nobody at
    the keyboard can mend them. In other layouts the same reply twice is kept, and teaches nothing.
    """
    chosen, rejected = dialogue(row, "chosen", where), dialogue(row, "rejected", where)
    differ = [i for i, (one, other) in enumerate(zip(chosen, rejected)) if one != other]
    shared = differ[0] if differ else len(chosen) - 1
    roles = [turn["role"] for turn in chosen[shared:][:1] + rejected[shared:][:1]]
    parted = roles == ["assistant", "assistant"] and (differ or chosen == rejected)
    if is_transcript(row, "chosen") and not (parted and differ):
        return None
    if not parted:
        raise wrong(where, "rejected", "the turns of chosen up to a reply that differs",
                    f"others from turn {shared + 1} on", "give both dialogues the same prompt")
    margin = number(row.get("margin", 0.0), "margin", where)
    responses = [chosen[shared]["content"], rejected[shared]["content"]]
    return Ranking(chosen[:shared], responses, [1.0, 0.0], margin)


def ranked_responses(row: dict, where: str) -> Ranking:
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
    texts, values = [], []
    for i, entry in enumerate(entries):
        texts.append(text(entry.get("text"),
                          f"responses[{i}]" if beside else f"responses[{i}].text", where))
        values.append(number(entry.get(key),
                             f"{key}[{i}]" if beside else f"responses[{i}].{key}", where))
    scores = [-value for value in values] if key.startswith("rank") else values
    return Ranking(messages, texts, scores, number(row.get("margin", 0.0), "margin", where))


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
        role = role_of(message)
        if role not in ("system", "user", "assistant"):
            raise wrong(where, f"{field}[{i}].role", "system, user or assistant", describe(role),
                        "rename it")
        if role == due:
            due = "assistant" if role == "user" else "user"
        elif role != "system" or i > 0:
            raise wrong(where, f"{field}[{i}].role", due, role,
                        "after one system turn at most, user and assistant must alternate")
        turns.append({"role": role,
                      "content": text(message.get("content"), f"{field}[{i}].content", where)})
    if role != last:
        raise wrong(where, field, f"a last turn by the {last}", f"one by the {role}",
                    "complete the dialogue")
    return turns


def role_of(message) -> str | None:
    """The role of a message; None where there is none."""
    return message.get("role") if isinstance(message, dict) else None


def is_transcript(row: dict, field: str) -> bool:
    """True for an HH-RLHF dialogue: `field` is text, and no other key says what it answers."""
    return (isinstance(row.get(field), str)
            and not row.keys() & {"prompt", "instruction", "messages"})


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


# ----------------------------------------------------------------------------- files

def read_content(path: str | Path) -> str:
    """The text of a file, decompressed if it begins as gzip does, without a byte-order mark;
    parquet as JSON lines."""
    # A text is held as bytes, as a string and as rows: four times its size or more.
    room = free_memory() / 4
    try:
        if Path(path).stat().st_size > room:
            raise too_large(path, Path(path).stat().st_size)
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            pieces, size = [], 0
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                while piece := file.read(2 ** 24):
                    pieces.append(piece)
                    size += len(piece)
                    if size > room:
                        raise too_large(path, size)
            data = b"".join(pieces)
        data = parquet_lines(path, data) if data[:4] == b"PAR1" else data
        return data.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: expected a whole gzip file, found one that is cut short or "
                         "damaged; download or compress it again") from error
    except OSError as error:
        raise InputError(f"{path}: expected a file, found: {error.strerror}; name a file that can "
                         "be read, not a folder") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: expected UTF-8 text, found the byte "
                         f"0x{error.object[error.start]:02x}; save the file as UTF-8") from error


def too_large(path: str | Path, size: int) -> InputError:
    """The error for a file that would not fit into memory."""
    return InputError(f"{path}: {size / 2 ** 20:,.1f} MiB or more, too much for the memory that is "
                      "free; split the file (plain text: into a folder of files, of which only "
                      "one is read at a time)")


def parquet_lines(path: str | Path, data: bytes) -> bytes:
    """The rows of a parquet file as JSON lines; InputError without pyarrow, an optional extra."""
    try:
        from pyarrow import ArrowException, BufferReader, parquet      # ArrowIOError is an OSError
    except ImportError as error:
        raise InputError(f"{path}: a parquet file; pip install pyarrow reads it, "
                         "or save it as .jsonl") from error
    try:
        rows = parquet.read_table(BufferReader(data)).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: expected a whole parquet file, found one that is cut short or "
                         "damaged; download it again") from error
    return "\n".join(json.dumps(row, default=str) for row in rows).encode()


def read_rows(path: str | Path) -> list[tuple[str, dict]]:
    """(where, row) for each row of a JSON list, of an object that holds one, or of JSON lines."""
    content = read_content(path)
    # Not splitlines: it also cuts at U+2028 and the like, which may stand unescaped in a string.
    lines = [(n, line.strip()) for n, line in enumerate(content.split("\n"), start=1)
             if line.strip()]
    if lines and (lines[0][1].startswith("[") or not lines[0][1].endswith("}")):
        rows = [(f"{path}, row 1", parse_json(content, path, 1))]       # one value over all lines
    else:
        rows = [(f"{path}, line {n}", parse_json(line, path, n)) for n, line in lines]
    if len(rows) == 1:
        value = rows[0][1]
        if isinstance(value, dict) and not value.keys() & ROW_KEYS:
            value = next((rows for rows in value.values() if is_objects(rows)), value)
        if isinstance(value, list):
            rows = [(f"{path}, row {n}", row) for n, row in enumerate(value, start=1)]
    if not rows:
        raise InputError(f"{path}: expected at least one row, found none; "
                         "name a file with rows in it")
    return [(where, flat) for where, row in rows for flat in flatten(row, where)]


def flatten(row, where: str) -> list[dict]:
    """The row itself, or one row for each of its `instances`: that is where Self-Instruct keeps
    input and output."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {describe(row)}; "
                         f"write fields in {{}}")
    instances = row.get("instances", [{}])
    if not instances or not is_objects(instances):
        raise wrong(where, "instances", "a list of objects", describe(instances),
                    "write an object for each")
    return [row | instance for instance in instances]


def is_objects(value) -> bool:
    """True for a list that holds nothing but objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def parse_json(content: str, path: str | Path, line: int):
    """The value of the JSON text that begins on `line` of a file."""
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {line + error.lineno - 1}: expected JSON, found a fault in "
                         f"column {error.colno} ({error.msg}); "
                         "write a JSON list or one object per line") from error
    except (RecursionError, ValueError) as error:   # ValueError: a number of thousands of digits
        raise InputError(f"{path}, line {line}: expected rows of plain fields, found JSON nested "
                         "too deeply or a number too long; check what wrote the file") from error


# ----------------------------------------------------------------------------- checks

def text(value, field: str, where: str) -> str:
    """`value`, which must be a string with something in it besides white space."""
    if not isinstance(value, str) or not value.strip():
        raise wrong(where, field, "text", describe(value), "fill it in or remove the row")
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


def describe(value) -> str:
    """A value in a few words, on one line."""
    if isinstance(value, (list, dict)):
        return f"a list of {len(value)}" if isinstance(value, list) else "an object"
    shown = "nothing (missing or null)" if value is None else repr(value)
    return shown if len(shown) <= 40 else shown[:40] + "…"


def wrong(where: str, field: str, expected: str, found: str, remedy: str) -> InputError:
    """The error for one field of one row."""
    return InputError(f"{where}: field {field}: expected {expected}, found {found}; {remedy}")


def unrecognised(row: dict, where: str, kind: str) -> InputError:
    """The error for a row that is no `kind`: its keys, what is accepted, what it seems to be."""
    keys = ", ".join(describe(key) for key in list(row)[:8]) or "none"
    guess = ("demonstrations" if row.keys() & {"output", "completion", "response", "messages"} else
             "prompts without answers" if row.keys() & {"prompt", "instruction"} else
             "another layout")
    return InputError(f"{where}: expected a {kind} ({ACCEPTED[kind]}), found the keys {keys}, "
                      f"which look like {guess}; name another file or rename the fields")
