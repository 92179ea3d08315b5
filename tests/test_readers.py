"""data/readers.py: every layout, every complaint, and the files that others publish."""
import contextlib
import gzip
import io
import itertools
import json
import sys
from pathlib import Path

import pytest

from common.errors import InputError
from data import show as data_show
from data.readers import (Ranking, converted, demonstration, prompt, ranking,
                          read_demonstrations, read_prompts, read_rankings, read_text)
from data.tokenizer import get_tokenizer
from data.turns import Unusable

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data folder at {SHARED}")
READERS = (read_demonstrations, read_rankings, read_prompts)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def write(folder, *rows, name="rows.jsonl"):
    """A file of JSON lines; text stands as it is, anything else is written as JSON."""
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8")
    return path


def complaint(read, path):
    """The one-line message with which `read` refuses `path`."""
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message and ";" in message
    return message


# ------------------------------------------------------------------------ layouts of demonstrations

DEMONSTRATIONS = [
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, [user("Add.\n\n1 2"), assistant("3")]),
    ({"instruction": "Hi.", "input": "", "output": "Ho."}, [user("Hi."), assistant("Ho.")]),
    ({"instruction": "Hi.", "input": " \n", "output": "Ho."}, [user("Hi."), assistant("Ho.")]),
    ({"instruction": "Hi.", "input": None, "output": "Ho."}, [user("Hi."), assistant("Ho.")]),
    ({"instruction": "Hi.", "output": "Ho."}, [user("Hi."), assistant("Ho.")]),
    ({"instruction": "Hi.", "prompt": "### Hi.", "output": "Ho."}, [user("Hi."), assistant("Ho.")]),
    ({"instruction": "Hi.", "output": "Ho.", "chosen": "A.", "rejected": "B."},
     [user("Hi."), assistant("Ho.")]),
    ({"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}]},
     [user("Add.\n\n1 2"), assistant("3")]),
    ({"messages": [user("a"), assistant("b")]}, [user("a"), assistant("b")]),
    ({"messages": [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]},
     [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]),
    ({"messages": [{**user("a"), "name": "A"}, assistant("b")], "prompt": "a"},
     [user("a"), assistant("b")]),
    ({"prompt": "a", "completion": " b"}, [user("a"), assistant(" b")]),
    ({"prompt": "a", "response": "b"}, [user("a"), assistant("b")]),
    ({"prompt": [system("s"), user("a")], "response": "b"},
     [system("s"), user("a"), assistant("b")]),
    ({"prompt": [user("a")], "completion": [assistant("b")]}, [user("a"), assistant("b")]),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, [user("a"), assistant("b")]),
    ({"instruction": "a", "input": "i", "chosen": "b", "rejected": "c"},
     [user("a\n\ni"), assistant("b")]),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
      "rejected": "\n\nHuman: a"},
     [user("a"), assistant("b"), user("c"), assistant("d")]),
    ({"prompt": "a", "responses": ["b", "c", "d"], "scores": [0, 2, 2]},
     [user("a"), assistant("c")]),
]


@pytest.mark.parametrize("row, expected", DEMONSTRATIONS)
def test_demonstration_layouts(tmp_path, row, expected):
    assert read_demonstrations(write(tmp_path, row)) == [expected]


def test_instances_are_a_row_each(tmp_path):
    instances = [{"input": "1", "output": "one"}, {"input": "2", "output": "two"}]
    path = write(tmp_path, {"instruction": "Spell.", "instances": instances})
    assert read_prompts(path) == [[user("Spell.\n\n1")], [user("Spell.\n\n2")]]


# ----------------------------------------------------------------------------- layouts of prompts

PROMPTS = [
    ({"prompt": "a"}, [user("a")]),
    ({"prompt": [system("s"), user("a")]}, [system("s"), user("a")]),
    ({"prompt": [user("a"), assistant("b"), user("c"), assistant("d")]},
     [user("a"), assistant("b"), user("c")]),
    ({"instruction": "a", "input": "i"}, [user("a\n\ni")]),
    ({"instruction": "a", "output": "b"}, [user("a")]),
    ({"messages": [user("a")]}, [user("a")]),
    ({"messages": [user("a"), assistant("b")]}, [user("a")]),
    ({"messages": [user("a"), assistant("b"), user("c")], "prompt": "a"},
     [user("a"), assistant("b"), user("c")]),
    ({"prompt": "a", "completion": "b"}, [user("a")]),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, [user("a")]),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
     [user("a")]),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}, [user("a")]),
    ({"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"},
     [user("a"), assistant("b"), user("c")]),
]


@pytest.mark.parametrize("row, expected", PROMPTS)
def test_prompt_layouts(tmp_path, row, expected):
    assert read_prompts(write(tmp_path, row)) == [expected]


# ----------------------------------------------------------------------------- layouts of rankings

A, B = [user("a")], [1.0, 0.0]
RANKINGS = [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, Ranking(A, ["b", "c"], B)),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, Ranking(A, ["b", "b"], [0.0, 0.0])),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}, Ranking(A, ["b", "c"], B, 2.0)),
    ({"prompt": [user("a")], "chosen": "b", "rejected": "c"}, Ranking(A, ["b", "c"], B)),
    ({"messages": [user("a")], "chosen": "b", "rejected": "c"}, Ranking(A, ["b", "c"], B)),
    ({"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]},
     Ranking(A, ["b", "c"], B)),
    ({"prompt": "a", "chosen": [user("a"), assistant("b")],
      "rejected": [user("a"), assistant("c")]},
     Ranking(A, ["b", "c"], B)),
    ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]},
     Ranking(A, ["b", "b"], [0.0, 0.0])),
    ({"chosen": [system("s"), user("a"), assistant("b"), user("c"), assistant("d")],
      "rejected": [system("s"), user("a"), assistant("b"), user("c"), assistant("e")]},
     Ranking([system("s"), user("a"), assistant("b"), user("c")], ["d", "e"], B)),
    ({"instruction": "a", "input": "i", "output": "x", "chosen": "b", "rejected": "c"},
     Ranking([user("a\n\ni")], ["b", "c"], B)),
    ({"prompt": "a", "responses": [{"text": "b", "score": 0.0},
                                   {"text": "c", "score": -1, "model": "m"}]},
     Ranking(A, ["b", "c"], [0.0, -1.0])),
    ({"instruction": "a", "input": "i",
      "responses": [{"text": "b", "rank": 2}, {"text": "c", "rank": 1}]},
     Ranking([user("a\n\ni")], ["b", "c"], [-2.0, -1.0])),
    ({"messages": [user("a")], "responses": ["b", "c", "d"], "scores": [0.5, 0.5, 0]},
     Ranking(A, ["b", "c", "d"], [0.5, 0.5, 0.0])),
    ({"prompt": "a", "responses": [{"text": "b", "score": 1, "ended": True},
                                   {"text": "c", "score": 0, "ended": None}]},
     Ranking(A, ["b", "c"], B)),
    ({"prompt": "a", "responses": [{"text": "b", "rank": 1, "ended": False},
                                   {"text": "c", "rank": 2},
                                   {"text": "b", "rank": 3, "ended": False}]},
     Ranking(A, ["b", "c", "b"], [-1.0, -2.0, -3.0], cut=(0, 2))),
    ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]},
     Ranking(A, ["b", "c"], [-1.0, -2.0])),
    ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2], "scores": [5, 4]},
     Ranking(A, ["b", "c"], [5.0, 4.0])),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [3, 3], "margin": 0.5},
     Ranking(A, ["b", "c"], [3.0, 3.0], 0.5)),
]


@pytest.mark.parametrize("row, expected", RANKINGS)
def test_ranking_layouts(tmp_path, row, expected):
    found, = read_rankings(write(tmp_path, row))
    assert found == expected
    assert all(type(score) is float for score in found.scores)


def test_rankings_cannot_be_changed():
    with pytest.raises(AttributeError):
        Ranking(A, ["b", "c"], B).margin = 1.0


# ----------------------------------------------------------------------------- HH-RLHF

START = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How?"
TURNS = [user("Hi"), assistant("Hello"), user("How?")]


@pytest.mark.parametrize("chosen, rejected", [
    ("Well.", "Badly."),
    ("Well.", "Well. Very well."),                  # the chosen reply is the beginning of the other
    ("Well. Very well.", "Well."),
    ("We agree.", "We differ."),                    # replies share their first characters
    ("We\n\nagree.", "We\n\ndiffer."),              # and a blank line
    ("x", "y"),
    ("Say 'Human: hi'.", "Say 'Human: ho'."),       # a marker that opens no turn
])
def test_hh_prompt_is_the_common_list_of_turns(tmp_path, chosen, rejected):
    row = {"chosen": f"{START}\n\nAssistant: {chosen}",
           "rejected": f"{START}\n\nAssistant: {rejected}"}
    assert read_rankings(write(tmp_path, row)) == [Ranking(TURNS, [chosen, rejected], B)]


def test_hh_dialogues_that_part_early_give_the_first_reply_that_differs(tmp_path):
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How?\n\nAssistant: Well.",
           "rejected": "\n\nHuman: Hi\n\nAssistant: No.\n\nHuman: How?\n\nAssistant: Well."}
    assert read_rankings(write(tmp_path, row)) == [Ranking([user("Hi")], ["Hello.", "No."], B)]
    row["rejected"] = "\n\nHuman: Hi\n\nAssistant: No.\n\nHuman: Why not?"
    assert read_rankings(write(tmp_path, row)) == [Ranking([user("Hi")], ["Hello.", "No."], B)]


def test_hh_prompt_over_all_short_dialogues(tmp_path):
    """Any two dialogues of up to two exchanges over two phrases agree with the definition to the
    letter."""
    phrases = ("a", "a b")
    dialogues = [turns for n in (2, 4) for turns in itertools.product(phrases, repeat=n)]
    keep = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}

    def written(turns):
        return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}"
                       for i, turn in enumerate(turns))

    rows, expected = [keep], [(("a",), "b", "c")]
    for chosen, rejected in itertools.product(dialogues, repeat=2):
        rows.append({"chosen": written(chosen), "rejected": written(rejected)})
        cuts = [i for i in range(1, min(len(chosen), len(rejected)), 2)
                if chosen[:i] == rejected[:i] and chosen[i] != rejected[i]]
        expected += [(chosen[:i], chosen[i], rejected[i]) for i in cuts]
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        found = read_rankings(write(tmp_path, *rows))
    assert [(tuple(turn["content"] for turn in one.messages), *one.responses)
            for one in found] == expected
    assert all(one.messages[-1]["role"] == "user" for one in found)
    assert f"dropped {len(rows) - len(expected)} of {len(rows)} rows" in printed.getvalue()


def test_hh_speaker_announced_twice_has_one_turn(tmp_path):
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c",
           "rejected": "\n\nHuman: a\n\nAssistant: b"}
    assert read_rankings(write(tmp_path, row)) == [Ranking(A, ["b\n\nc", "b"], B)]


@pytest.mark.parametrize("chosen, rejected, reason", [
    # identical
    (f"{START}\n\nAssistant: Well.", f"{START}\n\nAssistant: Well.", "identical replies"),
    # identical but for white space
    (f"{START}\n\nAssistant: Well.", f"{START}\n\nAssistant:  Well.\n", "identical replies"),
    # part at a human turn
    ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: A\n\nAssistant: c",
     "no two replies to one prompt"),
    # one stops earlier
    (f"{START}\n\nAssistant: Well.", f"{START}\n\nAssistant: Well.\n\nHuman: Good.",
     "no two replies to one prompt"),
    (f"{START}\n\nAssistant: Well.", START, "no two replies to one prompt"),
    # empty replies
    (f"{START}\n\nAssistant:", f"{START}\n\nAssistant: Well.", "an empty turn"),
    (f"{START}\n\nAssistant: Well.", f"{START}\n\nAssistant: ", "an empty turn"),
    # an empty question
    ("\n\nHuman:\n\nAssistant: a", "\n\nHuman:\n\nAssistant: b", "an empty turn"),
    # nobody asked
    ("\n\nAssistant: a", "\n\nAssistant: b", "an empty turn"),
])
def test_hh_pairs_without_use_are_dropped_and_counted(tmp_path, capsys, chosen, rejected,
                                                      reason):
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    path = write(tmp_path, {"chosen": chosen, "rejected": rejected}, good, name="hh.jsonl")
    for read in (read_rankings, read_prompts):
        assert len(read(path)) == 1
        assert capsys.readouterr().err == f"hh.jsonl: dropped 1 of 2 rows: {reason} (1)\n"


def test_hh_dialogue_without_a_last_reply_is_no_demonstration(tmp_path, capsys):
    dialogue = "\n\nHuman: a\n\nAssistant:"
    rows = [{"chosen": chosen, "rejected": "\n\nHuman: x\n\nAssistant: y"}
            for chosen in (f"{dialogue} b", dialogue, f"{dialogue} b\n\nHuman: c")]
    assert read_demonstrations(write(tmp_path, *rows)) == [[user("a"), assistant("b")]]
    assert "dropped 2 of 3 rows" in capsys.readouterr().err


def test_hh_file_of_nothing_but_useless_rows(tmp_path):
    same = "\n\nHuman: a\n\nAssistant: b"
    path = write(tmp_path, *[{"chosen": same, "rejected": same}] * 2)
    assert "dropped 2 of 2 rows" in complaint(read_rankings, path)


# ----------------------------------------------------------------------------- files

ROWS = [{"prompt": f"p{i}\u2028\x85", "response": "r \u20ac"} for i in range(3)]


@pytest.mark.parametrize("content", [
    json.dumps(ROWS),
    json.dumps(ROWS, indent=2, ensure_ascii=False),
    json.dumps({"version": 1, "data": ROWS}),
    json.dumps({"data": ROWS}, indent=1),
    "\n".join(json.dumps(row) for row in ROWS),
    "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n",
    "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n",
    "\ufeff" + "\n".join(json.dumps(row) for row in ROWS),
])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz", "rows"])
def test_content_decides_how_a_file_is_read(tmp_path, content, packed, name):
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    found = read_demonstrations(tmp_path / name)
    assert found == [[user(row["prompt"]), assistant(row["response"])] for row in ROWS]


def test_a_single_row_spread_over_lines(tmp_path):
    path = write(tmp_path, json.dumps({"messages": [user("a"), assistant("b")]}, indent=2))
    assert read_demonstrations(path) == [[user("a"), assistant("b")]]


def test_several_files_in_the_order_given_and_as_text_or_path(tmp_path):
    one, two = (write(tmp_path, {"prompt": "1"}, name="1"),
                write(tmp_path, {"instruction": "2"}, name="2"))
    assert read_prompts(two, str(one)) == [[user("2")], [user("1")]]


@pytest.mark.parametrize("content, expected", [
    ("Once upon\na time.\n", ["Once upon\na time."]),
    ("one\n\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n", ["one", "two\nlines"]),
    ("one\r\n<|endoftext|>\r\ntwo\r\nlines", ["one", "two\nlines"]),
    ("<|endoftext|>\n<|endoftext|>\n  indented <|endoftext|> inside\n",
     ["  indented", "inside"]),
    ("[Enter a king]\n{aside} 17", ["[Enter a king]\n{aside} 17"]),
    ('{"text": "one\\n"}\n\n{"text": "two"}\n', ["one\n", "two"]),
    ('[{"text": "one"},\n {"text": "two", "id": 3}]', ["one", "two"]),
])
@pytest.mark.parametrize("packed", [False, True])
def test_plain_text(tmp_path, content, expected, packed):
    path = tmp_path / "text"
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    assert read_text(path) == expected


# --------------------------------------------------------------------------- complaints about files

@pytest.mark.parametrize("read", [*READERS, read_text])
def test_files_that_cannot_be_read(tmp_path, read):
    assert "No such file" in complaint(read, tmp_path / "absent.json")
    assert "folder" in complaint(read, tmp_path)
    (tmp_path / "latin1.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    assert "line 2: expected UTF-8 text, found the byte 0xe9" in complaint(
        read, tmp_path / "latin1.jsonl")
    (tmp_path / "empty.json").write_bytes(b"\n \n")
    assert "found none" in complaint(read, tmp_path / "empty.json")


def test_gzip_cut_anywhere_or_damaged(tmp_path):
    whole = gzip.compress(json.dumps({"prompt": "a"}).encode())
    path = tmp_path / "rows.jsonl.gz"
    for end in range(2, len(whole)):
        path.write_bytes(whole[:end])
        assert "gzip" in complaint(read_prompts, path)
    for damaged in (whole[:10] + b"\x07" + whole[11:], whole[:-6] + b"\0" + whole[-5:],
                    whole + b"more"):
        path.write_bytes(damaged)
        assert "gzip" in complaint(read_prompts, path)


@pytest.mark.parametrize("content, found", [
    ('{"prompt": "a"}\n\n{"prompt": "b",}\n', "line 3: expected JSON"),
    ('{"prompt": "a"}\n{"prompt": "b"', "line 2: expected JSON"),
    ('{"prompt": "a"}\n{"prompt": "b"} {"prompt": "c"}\n', "line 2: expected JSON"),
    ('{"prompt": "a', "line 1: expected JSON"),
    ("prompt: a\n", "line 1: expected JSON"),
    ('[\n {"prompt": "a"},\n {"prompt": "b"\n]\n', "line 4: expected JSON"),
    ('{\n "prompt": "a"\n "completion": "b"\n}', "line 3: expected JSON"),
    ("[" * 100_000, "line 1: expected rows of plain fields"),
    ('{"prompt": ' + "9" * 5000 + "}", "line 1: expected rows of plain fields"),
    ("[]", "expected at least one row"),
    ('{"data": []}', "expected at least one row"),
    ('{"prompt": "a"}\n[1, 2]\n', "line 2: expected an object, found a list of 2"),
    ('{"prompt": "a"}\nnull\n', "line 2: expected an object, found nothing"),
    ('[{"prompt": "a"}, "b"]', "row 2: expected an object, found 'b'"),
])
def test_json_that_is_broken_or_holds_no_rows(tmp_path, content, found):
    assert found in complaint(read_prompts, write(tmp_path, content))


def test_text_complaints(tmp_path):
    assert "line 2: field text" in complaint(read_text,
                                             write(tmp_path, {"text": "a"}, {"text": 3}))
    assert "line 1: field text" in complaint(read_text, write(tmp_path, {"prompt": "a"}))
    assert "line 2: expected JSON" in complaint(read_text, write(tmp_path, {"text": "a"}, "{text"))
    assert "found none" in complaint(read_text, write(tmp_path, "<|endoftext|>"))


# ---------------------------------------------------------------------------- complaints about rows

# This row serves all three readers.
GOOD = {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}
# reader: rows it refuses, each with the field and what else the message must hold
COMPLAINTS = {
    read_demonstrations: [
        ({"instruction": "a"}, "output"),
        ({"prompt": "a"}, "completion"),
        ({"instruction": "a", "output": 3}, "field output: expected text, found 3"),
        ({"instruction": "a", "output": None}, "look like prompts without answers"),
        ({"instruction": "a", "output": " \n"}, "field output: expected text"),
        ({"instruction": "", "output": "b"}, "field instruction: expected text"),
        ({"instruction": "a", "input": 5, "output": "b"}, "field input: expected text, found 5"),
        ({"instruction": "a", "instances": [], "output": "b"}, "field instances"),
        ({"instruction": "a", "instances": ["b"]}, "field instances"),
        ({"prompt": "a", "response": ["b"]}, "field response[0].role"),
        ({"prompt": ["a"], "response": "b"}, "field prompt[0].role"),
        ({"prompt": "a", "response": "half \ud800"}, "field response: expected Unicode text"),
        ({"messages": []}, "field messages: expected a list of"),
        ({"messages": "a"}, "field messages: expected a list of"),
        ({"messages": [{"role": "human", "content": "a"}]},
         "messages[0].role: expected system, user"),
        ({"messages": [{"role": ["user"], "content": "a"}]},
         "messages[0].role: expected system, user"),
        ({"messages": [{"content": "a"}]}, "messages[0].role: expected system, user"),
        ({"messages": [user("a"), user("b")]}, "messages[1].role: expected assistant, found user"),
        ({"messages": [assistant("a")]}, "messages[0].role: expected user, found assistant"),
        ({"messages": [user("a"), system("b")]},
         "messages[1].role: expected assistant, found system"),
        ({"messages": [user("a"), assistant("b"), user("c")]},
         "last turn by the assistant, found one"),
        ({"messages": [system("a")]}, "last turn by the assistant, found one by the system"),
        ({"messages": [user("a"), assistant("")]}, "messages[1].content: expected text"),
        ({"messages": [user([{"type": "text"}]), assistant("b")]},
         "messages[0].content: expected text"),
        ({"text": "a"}, "another layout"),
    ],
    read_prompts: [
        ({"prompt": ""}, "field prompt: expected text"),
        ({"prompt": None}, "found the keys none"),
        ({"messages": [assistant("b")]}, "field messages"),
        ({"messages": [system("s")]}, "last turn by the user"),
        ({"prompt": "\n\nHuman:\n\nAssistant:"}, "field prompt"),
        ({"text": "a"}, "expected a prompt"),
        ({}, "found the keys none"),
        ({str(i): i for i in range(1000)}, "found the keys '0'"),
    ],
    read_rankings: [
        ({"prompt": "a", "chosen": "b"}, "field rejected: expected text, found nothing"),
        ({"prompt": "a", "rejected": "b"}, "field chosen: expected text, found nothing"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b"},
         "field rejected: expected text, found nothing"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "field rejected: expected text"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "field chosen: expected text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "2"},
         "field margin: expected a finite"),
        ({"prompt": [assistant("a")], "chosen": "b", "rejected": "c"}, "field prompt[0].role"),
        ({"prompt": [user("a"), assistant("b")], "chosen": "b", "rejected": "c"},
         "a last turn by the user"),
        ({"chosen": "b", "rejected": "c"}, "field chosen: expected a transcript"),
        ({"chosen": "x\n\nHuman: a\n\nAssistant: b", "rejected": "c"},
         "field chosen: expected a transcript"),
        ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "field prompt: expected text"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]},
         "field rejected: expected the turns of chosen up to a reply that differs, "
         "found others from turn 1"),
        ({"chosen": [user("a"), assistant("b")],
          "rejected": [user("a"), assistant("b"), user("c"), assistant("d")]}, "field rejected"),
        ({"chosen": [system("s"), user("a"), assistant("b")],
          "rejected": [user("a"), assistant("b")]}, "field rejected"),
        ({"prompt": "a", "responses": ["b"], "scores": [1]},
         "a ranking of one response trains nothing"),
        ({"prompt": "a", "responses": "bc"}, "field responses: expected a list"),
        ({"prompt": "a", "responses": ["b", "c"]}, "field scores: expected a list of 2 numbers"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1]},
         "field scores: expected a list of 2"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": 1}, "field ranks: expected a list of 2"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, "2"]},
         "field ranks[1]: expected a finite"),
        ({"prompt": "a", "responses": ["b", ""], "scores": [1, 2]},
         "field responses[1]: expected text"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, float("nan")]}, "field scores[1]"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [float("-inf"), 1]}, "field scores[0]"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 10 ** 400]}, "field scores[1]"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, True]}, "field scores[1]"),
        ({"prompt": "a", "responses": ["b", {"text": "c", "score": 1}]}, "field responses[0].text"),
        ({"prompt": "a", "responses": [{"text": "b", "score": 1}, {"text": "c"}]},
         "responses[1].score:"),
        *(({"prompt": "a", "responses": [{"text": "b", "score": 1},
                                         {"text": "c", "score": 0, "ended": ended}]},
           "field responses[1].ended: expected true or false") for ended in ("no", 0, 1, [])),
        ({"prompt": "a", "responses": [{"text": "b", "rank": 1}, {"text": "c"}]},
         "field responses[1].rank"),
        ({"prompt": "a", "responses": [{"text": "b", "score": 1}, {"text": " ", "score": 2}]},
         "field responses[1].text"),
        ({"responses": ["b", "c"], "scores": [1, 2]}, "field prompt: expected text, found nothing"),
        ({"prompt": " ", "responses": ["b", "c"], "scores": [1, 2]}, "field prompt: expected text"),
        ({"instruction": "a", "output": "b"}, "look like demonstrations"),
        ({"messages": [user("a"), assistant("b")]}, "look like demonstrations"),
        ({"prompt": "a"}, "look like prompts without answers"),
        ({"in\nput": "a", "x" * 1000: "b"}, "found the keys 'in\\nput', 'xxxx"),
    ],
}


@pytest.mark.parametrize("read, row, found",
                         [(read, *case) for read, cases in COMPLAINTS.items() for case in cases])
def test_complaints_name_file_line_field(tmp_path, read, row, found):
    message = complaint(read, write(tmp_path, GOOD, "", row, GOOD))
    assert found in message and ", line 3: " in message
    message = complaint(read, write(tmp_path, json.dumps([GOOD, row], indent=1), name="rows.json"))
    assert found in message and ", row 2: " in message
    assert len(message) < 500


def test_any_value_in_any_field_is_read_or_refused_in_one_line():
    values = [None, True, 0, -1.5, "", " ", "a", "\n\nHuman: a\n\nAssistant: b", "\n\nAssistant:",
              [], {}, [[]], [None], ["a"], ["a", "b"], [0, 1], [{}],
              [user("a")], [assistant("b")], [user("a"), assistant("b")],
              [{"role": None, "content": []}, 3], [{"text": "a"}, {"score": 1}], {"role": "user"}]
    fields = ["prompt", "instruction", "input", "output", "completion", "response", "messages",
              "chosen", "rejected", "responses", "scores", "ranks", "margin"]
    bases = [{}, GOOD, {"instruction": "a", "output": "b"},
             {"prompt": "a", "responses": ["b", "c"], "scores": [0, 1]},
             {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}]
    was_read = was_refused = 0
    for base, field, value in itertools.product(bases, fields, values):
        for convert in (demonstration, ranking, prompt):
            try:
                item, _ = converted(convert, {**base, field: value}, "rows.jsonl, line 1")
            except Unusable:
                continue
            except InputError as error:
                assert (str(error).startswith("rows.jsonl, line 1: ")
                        and len(str(error).splitlines()) == 1)
                was_refused += 1
            else:
                messages = item.messages if isinstance(item, Ranking) else item or [{"role": None}]
                assert messages[-1]["role"] in (
                    "assistant" if convert is demonstration else "user", None)
                was_read += 1
    assert was_read > 1000 and was_refused > 1000


# ----------------------------------------------------------------------------- published files

def ends_well(conversations, role):
    """Every conversation alternates, opens with the user and ends with `role`; all turns hold
    text."""
    for turns in conversations:
        assert [turn["role"] for turn in turns] == (["user", "assistant"] * len(turns))[:len(turns)]
        assert turns[-1]["role"] == role and all(turn["content"].strip() for turn in turns)
    return True


@shared
def test_published_alpaca():
    path = SHARED / "instruction_data.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    found = read_demonstrations(path)
    assert len(found) == 1100 and ends_well(found, "assistant")
    assert [turns[1]["content"] for turns in found] == [row["output"] for row in rows]
    assert all(row["instruction"] in turns[0]["content"]
               and turns[0]["content"].endswith(row["input"]) for row, turns in zip(rows, found))
    assert read_prompts(path) == [turns[:1] for turns in found]


@shared
def test_published_alpaca_pairs():
    path = SHARED / "instruction_data_with_preference.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    found = read_rankings(path)
    assert [one.responses for one in found] == [[row["chosen"], row["rejected"]] for row in rows]
    ties = [row["chosen"] == row["rejected"] for row in rows]
    assert len(found) == 1100 and sum(ties) == 6
    assert [one.scores for one in found] == [[0.0 if tie else 1.0, 0.0] for tie in ties]
    assert all(one.margin == 0.0 for one in found)
    assert read_demonstrations(path) == read_demonstrations(SHARED / "instruction_data.json")


@shared
def test_published_hh(capsys):
    path = SHARED / "hh_harmless_base_test.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = read_rankings(path)
    assert (len(rows) == 2312 and len(found) == 2308
            and ends_well([one.messages for one in found], "user"))
    assert "dropped 4 of 2312 rows: an empty turn (4)" in capsys.readouterr().err
    assert all(one.responses[0] != one.responses[1] and all(one.responses) for one in found)
    kept = [row for row in rows
            if not any(text.endswith("Assistant:") or text.endswith("Assistant: ")
                       for text in row.values())]
    assert len(kept) == len(found)
    exact = 0
    for one, row in zip(found, kept):
        names = {"user": "Human", "assistant": "Assistant"}
        start = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in one.messages)
        exact += all(row[key] == f"{start}\n\nAssistant: {reply}"
                     for key, reply in zip(("chosen", "rejected"), one.responses))
    assert exact > 0.98 * len(found)     # others: white space, early partings, doubled speakers
    assert read_prompts(path) == [one.messages for one in found]
    assert ends_well(read_demonstrations(path), "assistant")


@shared
def test_published_rankings():
    path = SHARED / "alpaca_eval_rankings.jsonl.gz"
    found = read_rankings(path)
    assert len(found) == 804 and ends_well([one.messages for one in found], "user")
    assert all(len(one.responses) == len(one.scores) == 8 for one in found)
    assert sum(len(set(one.scores)) < 8 for one in found) == 443
    assert any(0.0 in one.scores for one in found)
    best = read_demonstrations(path)
    assert all(turns[-1]["content"] == one.responses[one.scores.index(max(one.scores))]
               for turns, one in zip(best, found))


@shared
def test_published_instances_and_text():
    assert len(read_prompts(SHARED / "user_oriented_instructions.jsonl")) == 252
    assert len(read_demonstrations(SHARED / "self_instruct_seed_tasks.jsonl")) == 175
    play, = read_text(SHARED / "tinyshakespeare.txt")
    assert play.startswith("First Citizen:") and len(play) > 1_000_000


@shared
@pytest.mark.parametrize("name, read, found", [
    ("instruction_data.json", read_rankings, "look like demonstrations"),
    ("user_oriented_instructions.jsonl", read_rankings, "look like demonstrations"),
    ("mt_bench_questions.jsonl", read_demonstrations, "look like prompts without answers"),
    ("tinyshakespeare.txt", read_demonstrations, "line 1: expected JSON"),
])
def test_published_files_for_another_reader(name, read, found):
    assert found in complaint(read, SHARED / name)


# --------------------------------------------------------------------------- other people's layouts

def test_dolly(tmp_path):
    path = write(tmp_path, {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.",
                            "category": "closed_qa"},
                 {"instruction": "Why?", "context": "", "response": "Because.",
                  "category": "open_qa"})
    assert read_demonstrations(path) == [[user("Who?\n\nAda wrote it."), assistant("Ada.")],
                                         [user("Why?"), assistant("Because.")]]
    assert read_prompts(path)[0] == [user("Who?\n\nAda wrote it.")]


def shared_dialogue(*turns):
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}


def test_sharegpt(tmp_path, capsys):
    path = write(tmp_path, shared_dialogue(("system", "Be kind."), ("human", "Hi"), ("gpt", "Ho"),
                                           ("human", "And?"), ("gpt", "No.")),
                 shared_dialogue(("gpt", "from the middle"), ("human", "Hi"), ("chatgpt", "Ho"),
                                 ("human", "unanswered")),
                 shared_dialogue(("gpt", "no question")), shared_dialogue(("human", "no answer")))
    assert read_demonstrations(path) == [
        [system("Be kind."), user("Hi"), assistant("Ho"), user("And?"), assistant("No.")],
        [user("Hi"), assistant("Ho")]]
    assert "dropped 2 of 4 rows" in capsys.readouterr().err
    assert read_prompts(path)[0] == [system("Be kind."), user("Hi"), assistant("Ho"), user("And?")]
    twice = shared_dialogue(("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d"))
    assert read_demonstrations(write(
        tmp_path, twice, shared_dialogue(("human", " "), ("gpt", "a")))) == [
            [user("a\n\nb"), assistant("c\n\nd")]]
    for who in ("robot", ["human"], None):
        assert "conversations[1].from" in complaint(
            read_demonstrations, write(tmp_path, shared_dialogue(("human", "a"), (who, "b"))))
    assert "conversations" in complaint(read_demonstrations,
                                        write(tmp_path, {"conversations": "text"}))


@pytest.mark.parametrize("key", ["preference", "label"])                   # AlpacaFarm, LLMBar
def test_two_outputs_and_which_is_better(tmp_path, key):
    rows = [{"instruction": "Say.", "input": "1", "output_1": "a", "output_2": "b", key: better}
            for better in (1, 2)]
    rows += [{"input": "Ask.", "output_1": "a", "output_2": "b", key: 2}]
    path = write(tmp_path, *rows)
    assert read_rankings(path) == [Ranking([user("Say.\n\n1")], ["a", "b"], [1.0, 0.0]),
                                   Ranking([user("Say.\n\n1")], ["b", "a"], [1.0, 0.0]),
                                   Ranking([user("Ask.")], ["b", "a"], [1.0, 0.0])]
    assert read_demonstrations(path)[1] == [user("Say.\n\n1"), assistant("b")]
    for wrong_value in (0, 3, "1", True):
        assert f"field {key}" in complaint(read_rankings,
                                           write(tmp_path, rows[0] | {key: wrong_value}))


def test_ultrafeedback(tmp_path):
    answers = [{"model": "m", "response": "a", "overall_score": 7.5, "annotations": {}},
               {"response": "b", "overall_score": 2.0}]
    row = {"source": "s", "instruction": "Say.", "completions": answers}
    assert read_rankings(write(tmp_path, row)) == [Ranking([user("Say.")], ["a", "b"], [7.5, 2.0])]
    assert read_demonstrations(write(tmp_path, row)) == [[user("Say."), assistant("a")]]
    assert "responses[1].score" in complaint(
        read_rankings, write(tmp_path, row | {"completions": [answers[0], {"response": "b"}]}))
    assert "completions" in complaint(read_rankings, write(tmp_path, row | {"completions": "ab"}))
    binarized = {"prompt": "Say.", "prompt_id": "0", "chosen": [user("Say."), assistant("a")],
                 "rejected": [user("Say."), assistant("b")],
                 "messages": [user("Say."), assistant("a")], "score_chosen": 8.0,
                 "score_rejected": 6.5}
    assert read_rankings(write(tmp_path, binarized)) == [
        Ranking([user("Say.")], ["a", "b"], [1.0, 0.0])]


def test_mt_bench_gives_its_first_turn(tmp_path):
    path = write(tmp_path, {"question_id": 81, "category": "writing",
                            "turns": ["First.", "Second."]})
    assert read_prompts(path) == [[user("First.")]]
    assert "field prompt" in complaint(read_prompts, write(tmp_path, {"turns": []}))
    assert read_prompts(write(tmp_path, {"messages": [user("Hi")], "turns": 4})) == [[user("Hi")]]


def test_parquet(tmp_path):
    rows = [{"instruction": "Who?", "context": "", "response": "Ada.", "category": "qa"}] * 2
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow
    import pyarrow.parquet
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_demonstrations(path) == [[user("Who?"), assistant("Ada.")]] * 2
    path.write_bytes(path.read_bytes()[:60])
    assert "damaged" in complaint(read_demonstrations, path)


def test_parquet_without_its_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1....PAR1")
    assert "pip install pyarrow" in complaint(read_demonstrations, path)


def test_mixtures(tmp_path):
    a, b = (write(tmp_path, *({"instruction": f"{name}{i}", "output": "x"} for i in range(n)),
                  name=f"{name}.jsonl") for name, n in (("a", 10), ("b", 100)))

    def questions(*files):
        return [turns[0]["content"] for turns in read_demonstrations(*files)]

    assert questions(a, b) == [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(100)]
    half = questions(f"{a}:1", f"{b}:1")
    # As many as can be had of both.
    assert half == [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(0, 100, 10)]
    most = questions(f"{a}:0.1", f"{b}:0.9")
    assert (sum(q[0] == "a" for q in most) == 10 and sum(q[0] == "b" for q in most) == 90
            and len(set(most)) == 100)
    few = questions(f"{a}:0.7", f"{b}:0.3")
    assert sum(q[0] == "a" for q in few) == 10 and sum(q[0] == "b" for q in few) == 4
    assert questions(f"{a}:3") == questions(a)
    with pytest.raises(InputError, match="give this one too"):
        read_demonstrations(f"{a}:1", b)
    with pytest.raises(InputError, match="above 0"):
        read_demonstrations(f"{a}:0", f"{b}:1")
    odd = tmp_path / "odd:1"                                        # a file's own name goes first
    odd.write_text(json.dumps({"instruction": "Hi", "output": "x"}))
    assert questions(odd) == ["Hi"]


@shared
def test_published_outputs_of_llmbar_are_rankings():
    assert sum(len(read_rankings(path)) for path in (SHARED / "llmbar").glob("*.json")) == 419
    assert len(read_prompts(SHARED / "mt_bench_questions.jsonl")) == 80


# ----------------------------------------------------------------------------- data.show

def shown(capsys, path, **changes):
    data_show.describe(data_show.Config(data=(str(path),), tokenizer="tinytown", **changes))
    return capsys.readouterr().out


def test_show_says_what_a_file_holds(tmp_path, capsys):
    rows = [{"instruction": "a b", "context": "", "response": "c " * n, "category": "qa"}
            for n in (1, 2, 3, 40)]
    path = write(tmp_path, *rows,
                 {"instruction": "", "context": "", "response": "x", "category": "qa"})
    out = shown(capsys, path, block_size=20, examples=1)
    assert "5 rows, read as demonstrations (Dolly: 5)" in out
    assert ("1 broken" in out and f"{path}, line 5: field instruction" in out
            and "1 of 4 texts are over 20 tokens" in out)
    tokenizer = get_tokenizer("tinytown")
    lengths = [len(tokenizer.encode("c " * n)) + 1 for n in (1, 2, 3, 40)]
    response = next(line for line in out.splitlines()
                    if line.strip().startswith("response")).split()
    assert (float(response[1]) == pytest.approx(sum(lengths) / 4, abs=0.05)
            and int(response[-1]) == max(lengths))
    assert out.count("⟦") == 1 and "<|user|>a b<|end|><|assistant|>⟦c" in out


def test_show_recognises_kinds(tmp_path, capsys):
    pairs = write(tmp_path, {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1},
                  name="pairs.jsonl")
    assert "read as rankings (AlpacaFarm: 1)" in shown(capsys, pairs)
    ranks = write(tmp_path, {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 1, 0]},
                  name="ranks.jsonl")
    out = shown(capsys, ranks)
    assert ("this project's rankings" in out and "K: 3 (1); 1 with ties" in out
            and out.count("⟦") == 3)
    prompts = write(tmp_path, {"turns": ["a", "b"]}, name="prompts.jsonl")
    assert "read as prompts (MT-Bench: 1)" in shown(capsys, prompts)
    transcripts = write(tmp_path, {"chosen": "\n\nHuman: a\n\nAssistant: b",
                                   "rejected": "\n\nHuman: a\n\nAssistant: b"}, name="hh.jsonl")
    assert "dropped 1 of 1 rows" in shown(capsys, transcripts)
    with pytest.raises(InputError, match="name one or more"):
        data_show.describe(data_show.Config())
