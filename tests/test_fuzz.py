"""Any bytes, any text, any flags.

A reader turns any bytes into rows, or into one line that names the file. No text forges a turn. A
run starts with any flags, or says in one line why not.

    FUZZ=10000 pytest tests/test_fuzz.py    # that many inputs for each test of a reader,
                                            # a thirtieth of them for each test of a run
"""
import gzip
import json
import os
import random
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from common import estimate, log, resume  # noqa: E402
from common.checkpoint import load_gpt, load_reward_model  # noqa: E402
from common.errors import InputError  # noqa: E402
from data.readers import (Ranking, read_demonstrations, read_prompts,  # noqa: E402
                          read_rankings, read_text)
from data.tokenizer import get_tokenizer  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from test_checkpoint import SCRIPTS, config_of  # noqa: E402

READERS = (read_demonstrations, read_rankings, read_prompts, read_text)
TOKENIZER = get_tokenizer("tinytown")
COUNT = int(os.environ.get("FUZZ", 150))
calm = dict(deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])
fuzz, fuzz_runs = (settings(max_examples=COUNT, **calm),
                   settings(max_examples=max(1, COUNT // 30), **calm))

KEYS = ("messages", "prompt", "instruction", "input", "output", "chosen", "rejected", "responses",
        "response", "completion", "text", "score", "scores", "ranks", "rank", "role", "content",
        "conversations", "from", "value", "output_1", "output_2", "preference", "label",
        "completions", "overall_score", "turns", "instances", "context", "category", "margin", "",
        "system", "history", "tools", "kto_tag", "question", "answer", "weight", "tool_calls",
        "type", "row", "rows", "train", "test", "truncated_cells")
MARKS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
         "<|im_start|>assistant\n", "\n\nHuman: hi", "\n\nAssistant: yes")
words = st.one_of(st.text(max_size=12), st.sampled_from(MARKS),
                  st.sampled_from(("user", "assistant", "system", "human", "gpt", "1", "2")))
scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 10 ** 20), st.floats(), words)
values = st.recursive(
    scalars, lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)),
    max_leaves=12)
rows = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)
conversation = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant", "system", "tool")),
                           "content": words}), max_size=4)
near_rows = st.one_of(                      # nearly right: one thing of each layout may be wrong
    rows, st.fixed_dictionaries({"messages": conversation}),
    st.fixed_dictionaries({"prompt": words, "chosen": values, "rejected": words}),
    st.fixed_dictionaries({"prompt": words, "responses": st.lists(
        st.fixed_dictionaries({"text": words, "score": scalars}), max_size=3)}),
    st.fixed_dictionaries({"instruction": words, "input": scalars, "output": words}),
    st.fixed_dictionaries({"conversations": st.lists(
        st.fixed_dictionaries({"from": words, "value": words}), max_size=3)}),
    st.fixed_dictionaries({"chosen": words, "rejected": words}),
    st.fixed_dictionaries({"prompt": words, "completion": words, "label": scalars}),
    st.fixed_dictionaries({"instruction": words, "output": words, "system": values,
                           "history": values}),
    st.fixed_dictionaries({"instruction": words, "output_1": words, "output_2": words,
                           "preference": st.one_of(st.floats(0.5, 2.5), scalars)}),
    st.fixed_dictionaries({"conversations": st.lists(st.fixed_dictionaries(
        {"role": st.sampled_from(("user", "assistant", "tool")),
         "content": st.one_of(words, st.lists(st.fixed_dictionaries(
             {"type": st.sampled_from(("text", "image_url")), "text": scalars}), max_size=2))}),
        max_size=3), "chosen": values, "rejected": values}))
wrapped = st.one_of(                        # what may stand around rows
    st.dictionaries(st.sampled_from(("train", "test", "data", "rows", "0")),
                    st.one_of(st.lists(near_rows, max_size=3), near_rows), max_size=3),
    st.fixed_dictionaries({"rows": st.lists(st.fixed_dictionaries(
        {"row": near_rows, "truncated_cells": values}), max_size=3)}),
    st.dictionaries(st.sampled_from(KEYS), st.lists(words, max_size=2), max_size=3))


def check(path) -> None:
    """Every reader: rows of the right shape, or InputError in one line that names the file."""
    for reader in READERS:
        try:
            for item in reader(str(path)):
                if reader is read_text:
                    assert isinstance(item, str) and item
                elif reader is read_rankings:
                    assert (isinstance(item, Ranking)
                            and len(item.responses) == len(item.scores) >= 2)
                    for response in item.responses:
                        rendered([*item.messages, {"role": "assistant", "content": response}])
                else:
                    rendered(item)
        except InputError as error:
            said = str(error).split("\n")                 # of several broken rows five at most
            assert all(path.name in line for line in said) and len(said) <= 6, str(error)


def rendered(messages: list[dict]) -> None:
    """The template's own marks, one for each turn, and none from the text."""
    if messages[-1]["role"] == "assistant":
        ids, mask = TOKENIZER.render(messages)
        assert len(ids) == len(mask) and any(mask)
    else:
        ids = TOKENIZER.render_prompt(messages)
    turns = (sum(message["role"] == "assistant" for message in messages)
             + (messages[-1]["role"] != "assistant"))
    assert (ids.count(TOKENIZER.role_ids["assistant"]) == turns
            and ids.count(TOKENIZER.endoftext) <= 1)


@fuzz
@given(content=st.binary(max_size=200))
def test_any_bytes(tmp_path, content):
    for path, data in ((tmp_path / "a.jsonl", content),
                       (tmp_path / "b.gz", gzip.compress(content)),
                       (tmp_path / "c.gz", b"\x1f\x8b" + content),
                       (tmp_path / "d.parquet", b"PAR1" + content)):
        path.write_bytes(data)
        check(path)


@fuzz
@given(items=st.lists(near_rows, min_size=1, max_size=4), as_list=st.booleans(),
       cut=st.integers(0, 400), flip=st.integers(0, 400))
def test_any_rows(tmp_path, items, as_list, cut, flip):
    whole = json.dumps(items) if as_list else "\n".join(map(json.dumps, items))
    (tmp_path / "whole.jsonl").write_text(whole)
    check(tmp_path / "whole.jsonl")
    data = bytearray(whole.encode())
    data[flip % len(data)] ^= 1 << flip % 8
    (tmp_path / "hurt.jsonl").write_bytes(bytes(data)[:len(data) - cut % len(data)])
    check(tmp_path / "hurt.jsonl")


@fuzz
@given(content=wrapped)
def test_any_wrapper(tmp_path, content):
    (tmp_path / "wrapped.json").write_text(json.dumps(content))
    check(tmp_path / "wrapped.json")


@fuzz
@given(text=st.lists(st.one_of(words, st.sampled_from(MARKS)), min_size=1, max_size=6).map("".join))
def test_no_text_is_a_special_token(text):
    assert not ({*TOKENIZER.role_ids.values(), TOKENIZER.end, TOKENIZER.pad, TOKENIZER.endoftext}
                & set(TOKENIZER.encode(text)))


# ----------------------------------------------------------------------------- checkpoints

def damaged(data: bytes, place: float, bit: int, how: str) -> bytes:
    """A flipped bit, the beginning, the end doubled, or a piece of zeros."""
    at = int(place * (len(data) - 1))
    if how == "flip":
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]
    return {"cut": data[:at], "more": data + data[at:],
            "zeros": data[:at] + bytes(min(64, len(data) - at)) + data[at + 64:]}[how]


damage = dict(place=st.floats(0, 1), bit=st.integers(0, 7),
              how=st.sampled_from(("flip", "cut", "more", "zeros")))


@fuzz
@given(name=st.sampled_from(("model.pt", "config.json")), stage=st.sampled_from(("sft", "rm")),
       **damage)
def test_any_damage_to_a_model(town, tmp_path, name, stage, place, bit, how):
    """One line that names the folder, or the model as it was, where the damage did not touch it."""
    folder, load = tmp_path / stage, load_gpt if stage == "sft" else load_reward_model
    shutil.copytree(town / stage, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(damaged((town / stage / name).read_bytes(), place, bit, how))
    try:
        model, _ = load(str(folder))
    except InputError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        return
    whole, _ = load(str(town / stage))
    assert all((a == b).all()
               for a, b in zip(model.state_dict().values(), whole.state_dict().values()))


@pytest.fixture(scope="module")
def saved(town, tmp_path_factory) -> Path:
    """The state of a run."""
    out = tmp_path_factory.mktemp("saved")
    SCRIPTS["base"].train(config_of("base", town, out, save_every=8))
    return next(out.glob("resume/step_*.pt"))


@fuzz
@given(**damage)
def test_any_damage_to_the_state_of_a_run(saved, tmp_path, place, bit, how):
    data, path = saved.read_bytes(), tmp_path / saved.name
    path.write_bytes(damaged(data, place, bit, how))
    if path.read_bytes() == data:
        return
    with pytest.raises(InputError, match=f"{path.name}: damaged .its checksum does not fit its "
                                         "name.; delete it and begin anew"):
        resume.read(path, None)


@fuzz
@given(field=st.sampled_from(("model_type", "vocab_size", "n_positions", "n_embd", "n_layer",
                              "n_head", "activation_function", "tokenizer")),
       value=values, **damage)
def test_any_published_description(tmp_path, field, value, place, bit, how):
    """A Hugging Face folder whose config.json says something else, or is damaged."""
    pytest.importorskip("safetensors")
    folder = tmp_path / "gpt2"
    if not folder.exists():
        GPT(GPTConfig(16, 512, 1, 1, 16)).save_pretrained(folder)
        shutil.copy(folder / "config.json", tmp_path / "config.json")
    described = json.loads((tmp_path / "config.json").read_text())
    for data in (json.dumps(described | {field: value}).encode(),
                 damaged((tmp_path / "config.json").read_bytes(), place, bit, how)):
        (folder / "config.json").write_bytes(data)
        try:
            load_gpt(str(folder))
        except InputError as error:
            assert str(folder) in str(error) and "\n" not in str(error)


# ----------------------------------------------------------------------------- flags

class Running(Exception):
    """A run has taken its first step."""


ODD = {int: (-1, 0, 1, 3, 1000, 10 ** 6, 10 ** 9),
       float: (-1.0, 0.0, 1e-9, 0.5, 1e9, float("nan"), float("inf")), bool: (False, True),
       str: ("", "nope", "out/nope", "..", "float16"), tuple: ((), ("nope",), ("",), ("..",))}


def first_step(stage: str, town: Path, folder: Path, changes: dict) -> None:
    """The first step is taken, or one line says why not."""
    def first(self, *args, **numbers):
        raise Running

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log.Log, "step", first)
        # What is let through must not fill the machine.
        patch.setattr(estimate, "available", lambda device: 2 ** 31)
        try:
            SCRIPTS[stage].train(config_of(stage, town, folder, **changes))
        except Running:
            pass
        except InputError as error:
            assert "\n" not in str(error), changes


@pytest.mark.parametrize("stage", SCRIPTS)
def test_nought_and_minus_one_for_each_number(stage, town, tmp_path):
    for field in fields(SCRIPTS[stage].Config):
        for value in ((0, -1) if type(field.default) is int else
                      (0.0, -1.0) if type(field.default) is float else ()):
            first_step(stage, town, tmp_path / f"{field.name}{value}", {field.name: value})


@fuzz_runs
@given(stage=st.sampled_from(tuple(SCRIPTS)), seed=st.integers(0, 2 ** 30))
def test_any_flags(town, tmp_path, stage, seed):
    """One to three odd values: the first step is taken, or one line says what is wrong."""
    draw = random.Random(seed)
    odd = draw.sample([field for field in fields(SCRIPTS[stage].Config)
                       if field.name not in ("device", "out", "compile", "resume")],
                      draw.randint(1, 3))
    first_step(stage, town, tmp_path / str(seed),
               {field.name: draw.choice(ODD[type(field.default)]) for field in odd})
