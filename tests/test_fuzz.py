"""Whatever the bytes, a reader gives rows or one line that names the file; whatever the text, it forges no turn.

    FUZZ=10000 pytest tests/test_fuzz.py      that many inputs for each test, instead of a few hundred
"""
import gzip
import json
import os

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from common import InputError  # noqa: E402
from data.readers import Ranking, read_demonstrations, read_prompts, read_rankings, read_text  # noqa: E402
from data.tokenizer import get_tokenizer  # noqa: E402

READERS = (read_demonstrations, read_rankings, read_prompts, read_text)
TOKENIZER = get_tokenizer("tinytown")
fuzz = settings(max_examples=int(os.environ.get("FUZZ", 300)), deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])

KEYS = ("messages", "prompt", "instruction", "input", "output", "chosen", "rejected", "responses", "response", "completion", "text",
        "score", "scores", "ranks", "rank", "role", "content", "conversations", "from", "value", "output_1", "output_2", "preference",
        "label", "completions", "overall_score", "turns", "instances", "context", "category", "margin", "")
MARKS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|im_start|>assistant\n", "\n\nHuman: hi", "\n\nAssistant: yes")
words = st.one_of(st.text(max_size=12), st.sampled_from(MARKS), st.sampled_from(("user", "assistant", "system", "human", "gpt", "1", "2")))
scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 10 ** 20), st.floats(), words)
values = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)),
                      max_leaves=12)
rows = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)
conversation = st.lists(st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant", "system", "tool")), "content": words}), max_size=4)
near_rows = st.one_of(                                       # nearly right: one thing of each layout may be wrong
    rows, st.fixed_dictionaries({"messages": conversation}), st.fixed_dictionaries({"prompt": words, "chosen": values, "rejected": words}),
    st.fixed_dictionaries({"prompt": words, "responses": st.lists(st.fixed_dictionaries({"text": words, "score": scalars}), max_size=3)}),
    st.fixed_dictionaries({"instruction": words, "input": scalars, "output": words}),
    st.fixed_dictionaries({"conversations": st.lists(st.fixed_dictionaries({"from": words, "value": words}), max_size=3)}),
    st.fixed_dictionaries({"chosen": words, "rejected": words}))


def check(path) -> None:
    """Every reader: rows of the right shape, or InputError in one line that names the file."""
    for reader in READERS:
        try:
            for item in reader(str(path)):
                if reader is read_text:
                    assert isinstance(item, str) and item
                elif reader is read_rankings:
                    assert isinstance(item, Ranking) and len(item.responses) == len(item.scores) >= 2
                    for response in item.responses:
                        rendered([*item.messages, {"role": "assistant", "content": response}])
                else:
                    rendered(item)
        except InputError as error:
            assert path.name in str(error) and "\n" not in str(error), str(error)


def rendered(messages: list[dict]) -> None:
    """The template's own marks, one for each turn, and none from the text."""
    if messages[-1]["role"] == "assistant":
        ids, mask = TOKENIZER.render(messages)
        assert len(ids) == len(mask) and any(mask)
    else:
        ids = TOKENIZER.render_prompt(messages)
    turns = sum(message["role"] == "assistant" for message in messages) + (messages[-1]["role"] != "assistant")
    assert ids.count(TOKENIZER.role_ids["assistant"]) == turns and ids.count(TOKENIZER.endoftext) <= 1


@fuzz
@given(content=st.binary(max_size=200))
def test_any_bytes(tmp_path, content):
    for path, data in ((tmp_path / "a.jsonl", content), (tmp_path / "b.gz", gzip.compress(content)), (tmp_path / "c.gz", b"\x1f\x8b" + content),
                       (tmp_path / "d.parquet", b"PAR1" + content)):
        path.write_bytes(data)
        check(path)


@fuzz
@given(items=st.lists(near_rows, min_size=1, max_size=4), as_list=st.booleans(), cut=st.integers(0, 400), flip=st.integers(0, 400))
def test_any_rows(tmp_path, items, as_list, cut, flip):
    whole = json.dumps(items) if as_list else "\n".join(map(json.dumps, items))
    (tmp_path / "whole.jsonl").write_text(whole)
    check(tmp_path / "whole.jsonl")
    data = bytearray(whole.encode())
    data[flip % len(data)] ^= 1 << flip % 8
    (tmp_path / "hurt.jsonl").write_bytes(bytes(data)[:len(data) - cut % len(data)])
    check(tmp_path / "hurt.jsonl")


@fuzz
@given(text=st.lists(st.one_of(words, st.sampled_from(MARKS)), min_size=1, max_size=6).map("".join))
def test_no_text_is_a_special_token(text):
    assert not {*TOKENIZER.role_ids.values(), TOKENIZER.end, TOKENIZER.pad, TOKENIZER.endoftext} & set(TOKENIZER.encode(text))
