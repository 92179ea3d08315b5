"""UltraChat: exchanged roles, the filter, two models in turn, the sets."""
import json
import random
from collections import Counter

import pytest
from test_mutants import Edit, catching

from common.errors import InputError
from common.run import load_gpt
from data.batches import demonstration_rows
from data.tinytown import town as the_town
from data.tinytown.town import conversation, split_of, understand
from data.tokenizer import get_tokenizer
from rollout import Response
from systems import ultrachat as system

# ----------------------------------------------------------------------------- roles and topics

SAID = [{"role": role, "content": text} for role, text in (
    ("user", "Hello, I am Ada."), ("assistant", "Hello Ada, how can I help?"),
    ("user", "What do I eat?"), ("assistant", "You eat bread."))]


def test_roles_are_exchanged():
    assert system.exchange("Ada, food", SAID[:3]) == [
        {"role": "user", "content": "Ada, food"},
        {"role": "assistant", "content": "Hello, I am Ada."},
        {"role": "user", "content": "Hello Ada, how can I help?"},
        {"role": "assistant", "content": "What do I eat?"}]
    assert system.exchange("Ada, food", []) == [{"role": "user", "content": "Ada, food"}]
    assert SAID[0]["role"] == "user"                        # the dialogue itself is left alone


def test_exchanged_twice_it_is_the_dialogue():
    _, topic, *said = system.exchange("x", system.exchange("Ada, food", SAID))
    assert topic == {"role": "assistant", "content": "Ada, food"} and said == SAID


def targets(messages: list[dict]) -> list[str]:
    """What is learned of a row, turn after turn."""
    tokenizer = get_tokenizer("tinytown")
    row, = demonstration_rows([messages], tokenizer, 128)
    taught = [token if use else tokenizer.pad for token, use in zip(*row)]
    parts = " ".join(map(str, taught)).split(f" {tokenizer.end}")
    ids = [[int(token) for token in part.split() if int(token) != tokenizer.pad] for part in parts]
    return [tokenizer.decode(part) for part in ids if part]


def test_the_loss_is_on_every_assistant_turn_and_the_user_models_on_every_users():
    assert targets(SAID) == ["Hello Ada, how can I help?", "You eat bread."]
    assert targets(system.exchange("Ada, food", SAID[:3])) == ["Hello, I am Ada.", "What do I eat?"]


@pytest.mark.parametrize("text, topic", [
    ("Hello, I am Ada.\nHello Ada, how can I help?\nWhat do I eat?", "Ada, food"),
    ("My best thing is a key.\nThat is nice.\nWhat is my best thing?", "key"),
    ("Hello, I am Ada and I like my key best.\nHello Ada, how can I help?\nWhat is my best thing?",
     "Ada, key"), ("I am sad.\nWho are you?\nI am Ada.", "Ada, sad")])
def test_topics_of_peoples_conversations(text, topic):
    assert system.topic_of(understand(conversation(text))[1]) == topic


def test_new_topics_have_the_form_of_peoples():
    found = Counter(system.new_topics(6000, random.Random(0)))
    facts, moods = list(the_town.OWN_QUESTIONS), list(the_town.MOODS)
    all_of_them = {f"{name}, {about}" for name in the_town.NAMES
                   for about in (*facts, *moods, *the_town.THINGS)} | {*the_town.THINGS}
    assert set(found) <= all_of_them and len(found) > 0.8 * len(all_of_them)
    share = sum(count for topic, count in found.items()
                if topic.rpartition(" ")[2] in facts) / 6000
    assert share == pytest.approx(4 / 6, abs=0.03)
    assert sum(found[thing] for thing in the_town.THINGS) / 6000 == pytest.approx(1 / 12, abs=0.02)


# ----------------------------------------------------------------------------- the filter

def dialogue(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def some_dialogue(split: str, part: int) -> list[dict]:
    """One whose first `part` messages are a prompt of this split, and no other is held out."""
    for name in the_town.NAMES:
        for kind in the_town.OWN_QUESTIONS:
            said = dialogue(f"Hello, I am {name}.", f"Hello {name}, how can I help?",
                            the_town.OWN_QUESTIONS[kind][0], "You eat soup.")
            splits = {k: split_of(said[:k]) for k in (1, 3)}
            others = [splits[k] for k in splits if k != part]
            if splits[part] == split and not {*others} & {"val", "test"}:
                return said
    raise AssertionError("no such dialogue")


def test_what_is_held_out_is_left_out_whichever_turn_it_ends_with():
    for part in (1, 3):
        for split in ("val", "test"):
            assert system.fault(some_dialogue(split, part)) == "held out"
        for split in ("sft", "rank", "rl"):
            assert system.fault(some_dialogue(split, part)) == ""


def test_repetition():
    good = some_dialogue("sft", 3)
    texts = [turn["content"] for turn in good]
    assert system.fault(dialogue(texts[0], texts[0], *texts[2:])) == "repeated"
    assert system.fault(dialogue(*texts[:3], "You eat soup. You eat soup.")) == "repeated"
    assert system.fault(dialogue(*texts[:3], "You eat soup. You eat pie.")) == ""


def test_each_dialogue_once_and_the_rest_counted():
    good, bad = some_dialogue("sft", 3), some_dialogue("test", 3)
    other = [*good[:-1], {"role": "assistant", "content": "You eat pie."}]
    kept, why = system.filtered([good, bad, other, good, bad])
    assert kept == [good, other]
    assert why == {"kept": 2, "held out": 2, "there before": 1}
    assert system.filtered([]) == ([], {})


def test_the_filter_does_not_ask_for_gold():
    """Wrong or right, an answer is kept."""
    good = some_dialogue("sft", 3)
    wrong = [*good[:-1], {"role": "assistant", "content": "I do not care."}]
    assert len(system.filtered([good, wrong])[0]) == 2


# ----------------------------------------------------------------------------- two models in turn

class Scripted:
    """Instead of `respond`: what is asked is kept, what is answered comes from a function."""

    def __init__(self, monkeypatch, answer):
        self.asked, self.answer = [], answer
        monkeypatch.setattr(system, "respond", self)

    def __call__(self, model, prompts, tokenizer, most, **sampling):
        self.asked.append([prompt.messages for prompt in prompts])
        return [as_response(self.answer(prompt.messages)) for prompt in prompts]


def as_response(text: str):
    return Response([], text.removesuffix("…"), not text.endswith("…"))


@pytest.fixture(scope="module")
def speakers(town):
    model, tokenizer = load_gpt(str(town / "sft"))
    return [system.Speaker(model.eval(), tokenizer, role, 1.0) for role in ("user", "assistant")]


CONFIG = system.Config(max_new_tokens=16)


def test_two_models_speak_in_turn(monkeypatch, speakers):
    script = Scripted(monkeypatch, lambda said: f" turn {len(said)} of {said[0]['content']} ")
    one, two = system.simulate(*speakers, ["Ada, food", "key"], CONFIG)
    # The user reads topic and dialogue, exchanged; the assistant the dialogue alone.
    assert [turn["role"] for turn in one] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in two] == [
        "turn 1 of key", "turn 1 of turn 1 of key", "turn 3 of key", "turn 3 of turn 1 of key"]
    assert [len(batch) for batch in script.asked] == [2] * 4
    assert script.asked[0][1] == [{"role": "user", "content": "key"}]
    assert script.asked[1][1] == two[:1] and script.asked[3][1] == two[:3]
    assert script.asked[2][1] == system.exchange("key", two[:2])
    for batch in script.asked:
        assert all(messages[-1]["role"] == "user" for messages in batch)


def test_what_does_not_end_is_not_gone_on_with(monkeypatch, speakers):
    topics = ["Ada, food", "key", "lamp", "bell"]
    ends = {"key": "Ada…", "lamp": " "}
    script = Scripted(monkeypatch, lambda said: ends.get(said[0]["content"], "Yes."))
    found = system.simulate(*speakers, topics, CONFIG)
    assert len(found) == 2 and [len(batch) for batch in script.asked] == [4, 2, 2, 2]
    # No room: the context is as long as the model's.
    Scripted(monkeypatch, lambda said: "Ada Ben Cora Dan Eve " * 20)
    assert system.simulate(*speakers, topics, CONFIG) == []


def test_answers_stand_behind_their_prompts(monkeypatch, speakers):
    prompts = [SAID[:3], SAID[:1], dialogue("Where does Ben live?")]
    Scripted(monkeypatch, lambda said: "…" if len(said) == 1 and "Ada" in said[0]["content"]
             else said[-1]["content"])
    assert system.answered(prompts, speakers[1], CONFIG) == [
        [*prompt, {"role": "assistant", "content": prompt[-1]["content"]}]
        for prompt in (prompts[0], prompts[2])]


def test_a_share_of_dialogues():
    single, several = [[i] for i in range(20)], [["a"], ["b"], ["c"]]
    config = system.Config(rows=10, share=0.4)
    assert system.mixed(single, several, config) == [*single[:6], ["a"], ["b"], ["c"], ["a"]]


def test_what_dialogues_are_like():
    tokenizer = get_tokenizer("tinytown")
    odd = dialogue("Hello, I am Ada.", "Yes.", "No.", "Yes. No.")
    found = system.described([SAID, SAID[:3] + odd[3:], odd], tokenizer)
    users = [len(tokenizer.encode(text)) for text in ("Hello, I am Ada.", "What do I eat?", "No.")]
    assert found == {
        "dialogues": 3, "rounds": 2, "openings": 1, "prompts": 2, "other": pytest.approx(1 / 3),
        "own": pytest.approx(2 / 3), "remember": 0, "comfort": 0,
        "tokens, user": pytest.approx((3 * users[0] + 2 * users[1] + users[2]) / 6),
        "tokens, assistant": found["tokens, assistant"]}


# ----------------------------------------------------------------------------- the command

def test_the_command_end_to_end(town, tmp_path, monkeypatch, capsys):
    for name in ("base", "sft", "rm"):
        (tmp_path / name).symlink_to(town / name)
    (tmp_path / "ppo").symlink_to(town / "sft")
    (tmp_path / "data").mkdir()
    for name in ("base.txt", "sft.jsonl", "test.jsonl", "rank_val.jsonl"):
        (tmp_path / "data" / name).symlink_to(town / "data" / name)
    (tmp_path / "data/sft_val.jsonl").symlink_to(town / "data/sft.jsonl")
    fewer = the_town.prompts
    monkeypatch.setattr(the_town, "prompts", lambda split, count, seed: fewer(split, 200, seed))
    config = system.Config(run=str(tmp_path), topics=40, rows=40, steps=2, user_steps=60, lr=5e-3,
                           max_new_tokens=24)
    found = system.measure(config)
    out = tmp_path / "systems/ultrachat"
    assert json.loads((out / "table.json").read_text()) == found
    assert list(found["gold"]) == ["single", "simulated", "known_users", "people", "assistant"]
    assert list(found["table"]) == ["sft", *found["gold"]]
    assert "| simulated | " in capsys.readouterr().out
    counts = dict(found["filtered"])
    assert counts.pop("begun") == 40 == sum(counts.values())
    assert counts["kept"] == found["dialogues"]["simulated"]["dialogues"]
    # Nothing held out is trained on, and of the users no answer to the last question.
    for path in out.glob("*.jsonl"):
        rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
        if path.stem == "user":
            exchanged = [system.exchange("", said)[2:] for said in rows]
            assert {split_of(said) for said in exchanged} == {"sft"}
            continue
        assert len(rows) == 40
        for said in rows:
            assert split_of(said[:-1]) not in ("val", "test")
    stamp = (out / "simulated/model.pt").stat().st_mtime_ns
    assert system.measure(config) == found                  # the same again, nothing trained anew
    assert (out / "simulated/model.pt").stat().st_mtime_ns == stamp


def test_no_conversations(town, tmp_path):
    for name in ("base", "ppo"):
        (tmp_path / name).symlink_to(town / "sft")
    (tmp_path / "data").mkdir()
    row = {"messages": dialogue("Where does Ben live?", "Ben lives at the inn.")}
    (tmp_path / "data/sft.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="sft.jsonl: no conversation of several turns in it"):
        system.measure(system.Config(run=str(tmp_path)))


def test_nothing_kept(town, tmp_path, monkeypatch):
    for name in ("base", "sft", "data"):
        (tmp_path / name).symlink_to(town / name)
    (tmp_path / "ppo").symlink_to(town / "sft")
    monkeypatch.setattr(system, "fit", lambda *_: str(town / "sft"))
    Scripted(monkeypatch, lambda said: "Yes. Yes.")
    with pytest.raises(InputError, match="--topics 5: none was kept; raise it or --user_steps"):
        system.measure(system.Config(run=str(tmp_path), topics=5))


MUTANTS = [
    (system, "exchange", "roles as they were", Edit('other[turn["role"]]', 'turn["role"]'),
     test_roles_are_exchanged),
    (system, "exchange", "without the topic", Edit(
        'return [{"role": "user", "content": topic}, *turns]', "return turns"),
     test_roles_are_exchanged),
    (system, "fault", "validation kept", Edit('{"val", "test"}', '{"test"}'),
     test_what_is_held_out_is_left_out_whichever_turn_it_ends_with),
    (system, "fault", "the opening alone looked at", Edit("range(1, len(said), 2)", "(1,)"),
     test_what_is_held_out_is_left_out_whichever_turn_it_ends_with),
    (system, "fault", "the whole alone looked at", Edit("range(1, len(said), 2)",
                                                        "(len(said) - 1,)"),
     test_what_is_held_out_is_left_out_whichever_turn_it_ends_with),
    (system, "fault", "sentences not looked at", Edit("(texts, *map(town.sentences, texts))",
                                                      "(texts,)"),
     test_repetition),
    (system, "filtered", "kept twice", Edit("said in kept", "False"),
     test_each_dialogue_once_and_the_rest_counted),
    (system, "mixed", "dialogues on top", Edit("config.rows - count", "config.rows"),
     test_a_share_of_dialogues),
]


test_a_classic_wrong_answer_is_caught = catching(MUTANTS)
