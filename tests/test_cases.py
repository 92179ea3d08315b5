"""Files and commands that people really have: nothing silent, nothing false.

Each case is a kind of file from public reports: the fields that change the meaning, what is no text
at all, wrappers, empty columns, reward functions that answer oddly, finished runs.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train_dpo
import train_ppo
import train_rm
import train_sft
from common.cli import parse_args
from common.errors import InputError
from data import show
from data.batches import ranking_rows, read_untied
from data.readers import read_demonstrations, read_prompts, read_rankings, read_text
from data.tokenizer import get_tokenizer
from rollout import Response, find_function, load_reward, text_reward
from test_readers import assistant, user

ROOT = Path(__file__).parent.parent


def system(content):
    return {"role": "system", "content": content}


HUE = [user("A hue?"), assistant("Red.")]


def write(tmp_path, content, name="rows.json"):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path / name


def lines(tmp_path, *rows):
    return write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "rows.jsonl")


def complaint(read, *arguments):
    with pytest.raises(InputError) as caught:
        read(*arguments)
    return str(caught.value)


# ------------------------------------------------------------- fields that change what a row means

@pytest.mark.parametrize("label", ["label", "kto_tag"])
def test_what_is_labelled_bad_is_not_imitated(tmp_path, capsys, label):
    path = lines(tmp_path, {"prompt": "A hue?", "completion": "Red.", label: True},
                 {"prompt": "A hue?", "completion": "Find it.", label: False})
    assert read_demonstrations(path) == [HUE]
    assert "dropped 1 of 2 rows: labelled false (1)" in capsys.readouterr().err
    assert "unpaired labels" in complaint(read_rankings, path)
    assert len(read_prompts(path)) == 2


def test_a_label_of_another_kind_is_asked_about(tmp_path):
    path = lines(tmp_path, {"prompt": "A hue?", "completion": "Red.", "label": 0})
    assert "field label" in complaint(read_demonstrations, path)


@pytest.mark.parametrize("row, question", [
    ({"instruction": "And two?", "output": "Six."}, "And two?"),
    ({"prompt": "And two?", "completion": "Six."}, "And two?"),
    ({"instruction": "And", "input": "two?", "output": "Six."}, "And\n\ntwo?")])
def test_system_and_history_become_turns(tmp_path, row, question):
    more = {"system": "One word.", "history": [["One and two?", "Three."]]}
    assert read_demonstrations(lines(tmp_path, row | more)) == [
        [system("One word."), user("One and two?"), assistant("Three."), user(question),
         assistant("Six.")]]
    assert read_prompts(lines(tmp_path, row | more))[0][:2] == [
        system("One word."), user("One and two?")]
    empty = {"system": "", "history": []}
    assert read_demonstrations(lines(tmp_path, row | empty)) == [
        [user(question), assistant("Six.")]]


def test_system_beside_pairs_messages_and_sharegpt(tmp_path):
    pair = {"system": "Be brief.", "question": "A hue?", "chosen": "Red.", "rejected": "No."}
    assert read_rankings(lines(tmp_path, pair))[0].messages == [system("Be brief."), user("A hue?")]
    dialogue = {"system": "Be brief.", "messages": HUE}
    assert read_demonstrations(lines(tmp_path, dialogue)) == [[system("Be brief."), *HUE]]
    shared = {"system": "Be brief.", "conversations": [{"from": "human", "value": "A hue?"},
                                                       {"from": "gpt", "value": "Red."}]}
    assert read_demonstrations(lines(tmp_path, shared)) == [[system("Be brief."), *HUE]]
    both = {"system": "Be brief.", "messages": [system("Be long."), *HUE]}
    assert "field system" in complaint(read_demonstrations, lines(tmp_path, both))


@pytest.mark.parametrize("row, field", [
    ({"messages": HUE, "tools": [{"name": "weather"}]}, "tools"),
    ({"messages": HUE, "functions": "[{}]"}, "functions"),
    ({"messages": HUE, "history": [["a", "b"]]}, "history"),
    ({"messages": HUE, "input": "Of the sky."}, "input"),
    ({"instruction": "A hue?", "output": "Red.", "response": "Blue."}, "response"),
    ({"prompt": "A hue?", "completion": "Red.", "answer": "Blue."}, "answer"),
    ({"problem": "1 + 1?", "solution": "It is 2.", "answer": "2"}, "answer"),
    ({"problem": "1 + 1?", "answer": "2", "solution": "It is 2."}, "solution"),
    ({"instruction": "A hue?", "output": "Yes", "response": "Yes, but never."}, "response"),
    ({"instruction": "A hue?", "output": "Now go.", "response": "No"}, "response"),
    ({"instruction": "Answer.", "prompt": "A hue?", "output": "Red."}, "prompt"),
    ({"messages": [user("A hue?"), assistant("Red.") | {"weight": 0}]}, "messages[1].weight"),
    ({"messages": [user("A hue?"), assistant("Red.") | {"train": False}]}, "messages[1].train"),
    ({"conversations": [{"from": "human", "value": "a"},
                        {"from": "gpt", "value": "b", "weight": 0}]}, "messages[1].weight"),
    ({"prompt": "a", "completion": "b", "history": ["one", "two"]}, "history[0]")])
def test_what_would_change_the_meaning_is_refused_by_name(tmp_path, row, field):
    assert f"field {field}:" in complaint(read_demonstrations, lines(tmp_path, row))


@pytest.mark.parametrize("more", [
    {"tools": []}, {"tools": "[]"}, {"tools": None}, {"response": "Red."}, {"system": None},
    {"text": "### A hue? ### Red."}, {"prompt": "### A hue?"}, {"id": 7}])
def test_what_changes_nothing_is_let_be(tmp_path, capsys, more):
    path = lines(tmp_path, {"instruction": "A hue?", "output": "Red."} | more)
    assert read_demonstrations(path) == [HUE]
    assert capsys.readouterr().err == ""


def test_other_fields_are_named_once_a_file(tmp_path, capsys):
    rows = [{"prompt": "A hue?", "completion": "Red.", "id": i, "mood": "good", "stars": i}
            for i in range(3)]
    assert len(read_demonstrations(lines(tmp_path, *rows))) == 3
    assert capsys.readouterr().err == "rows.jsonl: left alone: mood, stars\n"


def test_weights_of_one_are_no_obstacle(tmp_path):
    turns = [user("A hue?"), assistant("Red.") | {"weight": 1, "train": True}]
    assert read_demonstrations(lines(tmp_path, {"messages": turns})) == [HUE]


# ------------------------------------------------------------------- what is no text, and wrappers

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 38523191\n"
PAGE = "\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"


@pytest.mark.parametrize("content, words", [
    (POINTER.encode(), "git lfs pull"), (PAGE.encode(), "an HTML page"),
    (b"<html>\n", "an HTML page"), (b"PK\x03\x04sheet", "an Excel sheet"),
    (b"ARROW1\0\0", "an Arrow file"), (b"\x80\x04\x95", "a pickle"),
    (b"\x28\xb5\x2f\xfd", "a zstd"), (b"BZh91AY", "bzip2"),
    ('{"prompt": "a"}'.encode("utf-16"), "UTF-16")])
@pytest.mark.parametrize("read", [read_text, read_demonstrations, read_rankings, read_prompts])
def test_what_stands_in_place_of_a_file_is_named(tmp_path, read, content, words):
    (tmp_path / "data.txt").write_bytes(content)
    assert words in complaint(read, tmp_path / "data.txt")


def test_a_table_is_named(tmp_path):
    for mark in ",;\t":
        table = write(tmp_path, f"prompt{mark}completion\nA hue?{mark}Red.\n", "table.csv")
        assert "save the table as .jsonl" in complaint(read_demonstrations, table)


@pytest.mark.parametrize("row", [
    {"prompt": "A hue?", "chosen": json.dumps(HUE), "rejected": json.dumps(HUE)},
    {"prompt": "A hue?", "chosen": json.dumps({"messages": HUE}), "rejected": str(HUE)},
    {"chosen": "[{'from': 'human', 'value': 'a'}]", "rejected": "b", "instruction": "c"}])
def test_messages_between_quotes_are_not_text(tmp_path, row):
    assert "messages written as text" in complaint(read_rankings, lines(tmp_path, row))


def test_text_is_split_wherever_a_document_ends(tmp_path):
    path = write(tmp_path, "One.<|endoftext|>Two. <|endoftext|> Three.\n<|endoftext|>\nFour.")
    assert read_text(path) == ["One.", "Two.", "Three.", "Four."]
    assert read_text(lines(tmp_path, {"text": "One.<|endoftext|>Two."})) == ["One.", "Two."]
    row = {"prompt": "A hue?", "completion": "Red.<|endoftext|>"}
    assert read_demonstrations(lines(tmp_path, row)) == [HUE]


ROW, HELD_OUT = {"prompt": "A hue?", "completion": "Red."}, {"prompt": "No.", "completion": "No."}


@pytest.mark.parametrize("content", [
    {"features": [{"feature_idx": 0, "name": "prompt", "type": {}}],
     "rows": [{"row_idx": 0, "row": ROW, "truncated_cells": []}]},
    {"row_idx": 0, "row": ROW, "truncated_cells": []},
    {"test": [HELD_OUT] * 3, "train": [ROW]}, {"data": {"train": [ROW], "test": [HELD_OUT]}},
    {"version": 2, "data": [ROW]}, {"17": ROW}, {"prompt": ["A hue?"], "completion": ["Red."]},
    [ROW], ROW])
def test_the_right_part_of_a_file_is_taken(tmp_path, content):
    assert read_demonstrations(write(tmp_path, content)) == [HUE]


def test_which_split_is_said_or_asked(tmp_path, capsys):
    read_demonstrations(write(tmp_path, {"test": [HELD_OUT], "train": [ROW], "val": [HELD_OUT]}))
    assert "read its list train, left out test, val" in capsys.readouterr().err
    said = complaint(read_demonstrations, write(tmp_path, {"easy": [ROW], "hard": [ROW]}))
    assert "easy, hard" in said
    cut = {"row_idx": 0, "row": ROW, "truncated_cells": ["completion"]}
    assert "truncated_cells" in complaint(read_demonstrations, write(tmp_path, {"rows": [cut]}))


# ----------------------------------------------------------------------------- harmless emptiness

def test_null_columns_are_absent(tmp_path):
    rows = [{**ROW, "messages": None}, {"prompt": None, "completion": None, "messages": HUE}]
    assert read_demonstrations(lines(tmp_path, *rows)) == [HUE, HUE]
    pair = {"prompt": "A hue?", "chosen": "Red.", "rejected": "No.", "responses": None,
            "margin": None}
    assert read_rankings(lines(tmp_path, pair))[0].scores == [1.0, 0.0]


def test_empty_documents_are_counted(tmp_path, capsys):
    path = lines(tmp_path, {"text": ""}, {"text": "A town."}, {"text": " \n"})
    assert read_text(path) == ["A town."]
    assert "dropped 2 of 3 documents: empty" in capsys.readouterr().err
    assert "found none" in complaint(read_text, lines(tmp_path, {"text": ""}))


@pytest.mark.parametrize("turns", [
    [{"from": "system", "value": ""}, {"from": "human", "value": "A hue?"},
     {"from": "gpt", "value": "Red."}], [system(" "), *HUE]])
def test_an_empty_system_turn_is_none(tmp_path, turns):
    for field in ("conversations", "messages")["role" in turns[0]:]:
        assert read_demonstrations(lines(tmp_path, {field: turns})) == [HUE]


def test_broken_rows_are_reported_together(tmp_path):
    broken = [{"prompt": "a", "completion": ""}, {"prompt": 3, "completion": "b"}]
    said = complaint(read_demonstrations, lines(tmp_path, ROW, *broken))
    assert "2 broken rows" in said and "line 2" in said and "line 3" in said
    said = complaint(read_demonstrations, lines(tmp_path, ROW, *broken * 4))
    assert "8 broken rows, the first five" in said and said.count("\n") == 5
    said = complaint(read_demonstrations, lines(tmp_path, ROW, *[broken[0]] * 4))
    assert "line 2" in said and "and 3 more rows like it" in said and "\n" not in said


def test_rows_are_dropped_for_the_reason_that_is_true(tmp_path, capsys):
    start = "\n\nHuman: A hue?\n\nAssistant:"
    rows = [{"chosen": f"{start} Red.", "rejected": f"{start} No."},
            {"chosen": f"{start} Red.", "rejected": f"{start} Red."},
            {"chosen": f"{start} Red.", "rejected": start}]
    assert len(read_rankings(lines(tmp_path, *rows))) == 1
    said = capsys.readouterr().err
    assert "dropped 2 of 3 rows" in said
    assert "identical replies (1)" in said and "an empty turn (1)" in said


# ----------------------------------------------------------------------------- figures

def test_identical_pairs_are_ties(tmp_path, capsys):
    tokenizer = get_tokenizer("tinytown")
    same = [{"prompt": "A hue?", "chosen": "Red.", "rejected": "Red."}] * 3
    other = {"prompt": "A hue?", "chosen": "Red.", "rejected": "No."}
    rows = read_untied((str(lines(tmp_path, other, *same)),), tokenizer, 64)
    assert len(rows) == 1
    assert "4 rankings: 3 left out, all their responses tied or equal" in capsys.readouterr().err
    assert "every ranking is tied" in complaint(
        read_untied, (str(lines(tmp_path, *same)),), tokenizer, 64)


def test_responses_of_equal_tokens_are_ties(tmp_path):
    tokenizer = get_tokenizer("tinytown")
    ranking, = read_rankings(lines(tmp_path, {
        "prompt": "A hue?", "responses": ["Red.", "Blue.", "Red."], "scores": [3, 2, 1]}))
    row, = ranking_rows([ranking], tokenizer, 64)
    assert row.scores == [3, 2, 3]


def test_parquet_is_read_in_a_process_of_its_own(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet
    path = tmp_path / "rows.parquet"
    for values, words in (([b"Red."], None), ([b"\xff\xfe"], "bytes that are no text")):
        table = pyarrow.table({"prompt": ["A hue?"], "completion": values})
        parquet.write_table(table, path)
        if words:
            assert words in complaint(read_demonstrations, path)
        else:
            assert read_demonstrations(path) == [HUE]


# ----------------------------------------------------------------------------- remedies that fit

def test_content_in_parts(tmp_path):
    part = {"type": "text", "text": "A hue?"}
    row = {"messages": [{"role": "user", "content": [part]},
                        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]}
    assert read_demonstrations(lines(tmp_path, row)) == [HUE]
    row["messages"][0]["content"].append({"type": "image_url", "image_url": {}})
    assert "'image_url'" in complaint(read_demonstrations, lines(tmp_path, row))


def test_messages_under_conversations_and_a_single_message_as_reply(tmp_path):
    assert read_demonstrations(lines(tmp_path, {"conversations": HUE})) == [HUE]
    for question in ({"messages": [user("A hue?")]}, {"prompt": "A hue?"},
                     {"conversations": [{"from": "human", "value": "A hue?"}]}):
        for reply in (assistant, lambda text: {"from": "gpt", "value": text}):
            row = question | {"chosen": reply("Red."), "rejected": reply("No.")}
            ranking, = read_rankings(lines(tmp_path, row))
            assert (ranking.messages, ranking.responses) == ([user("A hue?")], ["Red.", "No."])


def test_tool_turns_are_named(tmp_path):
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "a1"}]}
    result = {"role": "tool", "content": "3 degrees"}
    for turns in ([user("Warm?"), calls, result], [user("Warm?"), result]):
        row = {"messages": turns, "chosen": assistant("No."), "rejected": assistant("Yes.")}
        said = complaint(read_rankings, lines(tmp_path, row))
        assert "tool" in said and "messages[1]" in said
    shared = {"conversations": [{"from": "human", "value": "Warm?"},
                                {"from": "function_call", "value": "{}"}]}
    assert "tool turns are not read" in complaint(read_demonstrations, lines(tmp_path, shared))


@pytest.mark.parametrize("preference, scores", [(1.9987, (0, 1)), (1.2, (1, 0)), (1.5, (0, 0)),
                                                (1.0, (1, 0)), (2, (0, 1))])
def test_the_nearer_number_wins(tmp_path, preference, scores):
    row = {"instruction": "A hue?", "output_1": "One.", "output_2": "Two.",
           "preference": preference}
    ranking, = read_rankings(lines(tmp_path, row))
    assert dict(zip(ranking.responses, ranking.scores)) == dict(zip(("One.", "Two."), scores))
    for wrong in (0, 3, 0.99, float("nan")):
        assert "field preference" in complaint(read_rankings, lines(
            tmp_path, row | {"preference": wrong}))


def test_hh_is_the_same_split_or_whole(tmp_path):
    start = "\n\nHuman: A hue?\n\nAssistant:"
    whole = lines(tmp_path, {"chosen": f"{start} Red.", "rejected": f"{start} No."})
    expected = read_rankings(whole)
    split = lines(tmp_path, {"prompt": start, "chosen": " Red.", "rejected": " No."})
    assert read_rankings(split) == expected


@pytest.mark.parametrize("row, turns", [
    ({"question": "A hue?", "answer": "Red."}, HUE),
    ({"problem": "A hue?", "solution": "Red."}, HUE),
    ({"query": "A hue?", "response": "Red."}, HUE),
    ({"inputs": "A hue?", "targets": "Red."}, HUE),
    ({"instruction": "A hue?", "response": "Red."}, HUE),
    ({"prompt": "A hue?", "output": "Red."}, HUE),
    ({"prompt": "A", "input": "hue?", "completion": "Red."},
     [user("A\n\nhue?"), assistant("Red.")]),
    ({"system_prompt": "Be brief.", "question": "A hue?", "response": "Red."},
     [system("Be brief."), *HUE]),
    ({"input": "A hue?", "output": "Red.", "reward": 0.5}, HUE),
    ({"conversation": HUE}, HUE),
    ({"dialog": HUE}, HUE)])
def test_further_names(tmp_path, row, turns):
    assert read_demonstrations(lines(tmp_path, row)) == [turns]


# ----------------------------------------------------------------------------- data.show

def shown(capsys, path):
    show.describe(show.Config(data=(str(path),), tokenizer="tinytown", examples=0))
    return capsys.readouterr().out


def test_show_reads_as_the_script_will(tmp_path, capsys):
    rows = [{"instruction": f"A hue? {i}", "input": "", "output": "Red."} for i in range(3)]
    path = write(tmp_path, [rows[0], rows[1] | {"output": ""}, rows[2]])
    out = shown(capsys, path)
    assert "read as demonstrations" in out and "1 broken" in out
    assert "row 2: field output" in out
    scores = [{"prompt": "A hue?", "responses": ["a", "b"], "scores": [1, 0]}] * 3
    nan = json.dumps(scores[:2] + [scores[2] | {"scores": [1, float("nan")]}])
    out = shown(capsys, write(tmp_path, nan))
    assert "read as rankings" in out and "1 broken" in out and "row 3" in out


def test_show_knows_self_instruct(tmp_path, capsys):
    row = {"instruction": "A hue?", "instances": [{"input": None, "output": "Red."}] * 2}
    out = shown(capsys, lines(tmp_path, row))
    assert "2 rows, read as demonstrations (Self-Instruct: 2)" in out


def test_show_counts_and_names_what_is_left(tmp_path, capsys):
    out = shown(capsys, lines(tmp_path, ROW | {"label": False}, ROW | {"label": True, "mood": "x"}))
    assert "labelled false (1)" in out and "left alone: mood" in out


def test_show_gives_each_kinds_reason(tmp_path):
    said = complaint(show.describe, show.Config(data=(str(lines(tmp_path, {"colour": "red"})),),
                                                tokenizer="tinytown"))
    assert said.count("colour") == 3
    assert all(f"as {kind}:" in said for kind in ("rankings", "demonstrations", "prompts"))


# ----------------------------------------------------------------------------- rewards

RESPONSES = [Response([1], text, True) for text in ("Red.", "Blue.", "Green.")]
PROMPTS = [type("Asked", (), {"messages": [user("A hue?")]})] * 3


@pytest.mark.parametrize("answer, words", [
    ([1.0, 2.0], "2 numbers for 3 responses"), (3.0, "expected a list of 3 numbers"),
    (None, "expected a list of 3 numbers"), ([1.0, None, 2.0], "None for the response 'Blue.'"),
    ([1.0, 2.0, float("nan")], "nan for the response 'Green.'"),
    ([float("inf"), 1, 2], "inf for the response 'Red.'"), ([1, "2", 3], "'2' for the response")])
def test_what_a_reward_function_answers_is_checked(answer, words):
    said = complaint(text_reward(lambda conversations, texts: answer, "mine:score"), PROMPTS,
                     RESPONSES)
    assert said.startswith("--reward mine:score: ") and words in said and "\n" not in said


def test_tensors_and_arrays_are_numbers():
    import numpy
    import torch
    for answer in (torch.tensor([1., 2., 3.]), numpy.array([1, 2, 3]), (1, 2, True + 2)):
        assert text_reward(lambda conversations, texts: answer)(PROMPTS, RESPONSES) == [1, 2, 3]


def test_a_constant_reward_is_said_once(capsys):
    reward = text_reward(lambda conversations, texts: [0.5] * len(texts), "mine:flat")
    reward(PROMPTS, RESPONSES)
    reward(PROMPTS, RESPONSES)
    said = capsys.readouterr().err
    assert said.count("nothing can be learned") == 1 and "mine:flat" in said
    text_reward(lambda conversations, texts: [1.0] * len(texts))(PROMPTS[:1], RESPONSES[:1])
    assert capsys.readouterr().err == ""            # one response says nothing


def test_a_reward_beside_ones_own_data(tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(
        "def score(conversations, texts):\n    return [float(len(text)) for text in texts]\n")
    (tmp_path / "broken_reward.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    tokenizer = get_tokenizer("tinytown")
    for name in ("own_reward:score", "./own_reward.py:score", f"{tmp_path}/own_reward.py:score"):
        reward, _ = load_reward(name, tokenizer, None)
        assert reward(PROMPTS, RESPONSES) == [4, 5, 6]
    for name, words in (("own_reward:nothing", "nothing"), ("./none.py:score", "none.py"),
                        ("broken_reward:score", "ZeroDivisionError"), ("nowhere:f", "nowhere")):
        said = complaint(find_function, name)
        assert said.startswith(f"--reward {name}: ") and words in said and "\n" not in said


# ----------------------------------------------------------------------------- runs and models

def test_a_finished_run_is_not_replaced(town, tmp_path):
    rows = lines(tmp_path, *[ROW] * 4)
    config = dict(data=(str(rows),), init=str(town / "sft"), out=str(tmp_path / "out"), epochs=1,
                  batch_size=2)
    train_sft.train(train_sft.Config(**config))
    kept = (tmp_path / "out/model.pt").read_bytes()
    said = complaint(train_sft.train, train_sft.Config(**config, lr=1e-2))
    assert "holds a finished run" in said and "--overwrite" in said and "\n" not in said
    assert (tmp_path / "out/model.pt").read_bytes() == kept
    train_sft.train(train_sft.Config(**config, lr=1e-2, overwrite=True))
    assert (tmp_path / "out/model.pt").read_bytes() != kept


def test_an_adapter_or_another_file_is_no_model(town, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write(adapter, {"base_model_name_or_path": "gpt2"}, "adapter_config.json")
    (tmp_path / "ckpt.pt").write_bytes(b"PK\x03\x04rest")
    rows = str(lines(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}))
    for train in (train_dpo, train_rm, train_ppo):
        data = dict(data=(rows,), out=str(tmp_path / "out"))
        said = complaint(train.train, train.Config(init=str(adapter), **data))
        assert "a PEFT adapter of gpt2" in said and "merge" in said
        said = complaint(train.train, train.Config(init=str(tmp_path / "ckpt.pt"), **data))
        assert "not a GGUF file; pass a folder" in said


def run(*arguments, folder=ROOT, **more):
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True,
                          timeout=120, env=os.environ | more)


def test_raw_text_from_nothing(town):
    done = run("sample.py", "--init", str(town / "base"), "--raw", "--max_new_tokens", "5")
    assert done.returncode == 0 and b">" not in done.stdout and done.stdout.strip()


def test_a_windows_pipe_gets_utf8(tmp_path):
    path = lines(tmp_path, ROW | {"prompt": "Ein Löwe → 🦊?"})
    for command in (["train_dpo.py", "-h"], ["-m", "data.show", str(path), "--tokenizer",
                                             "tinytown"]):
        done = run(*command, PYTHONIOENCODING="cp1252")
        assert done.returncode == 0, done.stderr
        done.stdout.decode("utf-8")


def test_home_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    config = parse_args(train_sft.Config, ["--out=~/out", "--data", "~/a.json", "b.json",
                                           "--init", "~nobody"])
    assert config.out == "/home/ada/out" and config.data == ("/home/ada/a.json", "b.json")
    assert config.init == "~nobody"
