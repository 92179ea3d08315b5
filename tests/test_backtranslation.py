"""Instruction backtranslation: ratings, curation, the town's practice, the sets to tune on."""
import json
import math
import random
import re
from functools import lru_cache

import pytest
from test_mutants import Edit, catching

from common.errors import InputError
from common.run import load_gpt, start
from data.tinytown import pairs as town_pairs
from data.tinytown import talk, tasks, town
from data.tinytown.gold import gold_score
from rollout import Response
from systems import backtranslation as system

# ----------------------------------------------------------------------------- ratings


@pytest.mark.parametrize("reply, rating", [
    ("Score: 1", 1), ("Score: 5", 5), ("It is right.\nScore: 4", 4), ("Good. Score: 3 \n\n", 3),
    ("Score: 2\nNo.\nScore: 5", 5), ("(Score: 4", 4),
    ("", None), ("10502", None), ("5", None), ("Score: 10502", None), ("Score: 45", None),
    ("Score: 4.5", None), ("Score: 4.", None), ("Score: 4/5", None), ("Score: 4 of 5", None),
    ("score: 4", None), ("score: 7", None), ("SCORE: 4", None), ("Score: 0", None),
    ("Score: 6", None), ("Score: -4", None), ("Score: four", None), ("Score:4", None),
    ("Score 4", None), ("**Score: 4**", None), ("Score: 4\nIt is good.", None),
    ("Score: 4 because it is good", None), ("Underscore: 4", None), ("Score: ４", None)])
def test_parse_rating(reply, rating):
    assert system.parse_rating(reply) == rating


def test_what_is_rated_k_or_more_is_kept_and_what_is_not_rated_is_not():
    assert system.curate(list("abcde"), [5, None, 4.5, 4.499, 1], 4.5) == ["a", "c"]
    assert system.curate(list("ab"), [None, None], 1) == []
    with pytest.raises(ValueError):
        system.curate(list("ab"), [5], 4)


def test_precision_and_recall_by_hand():
    # Good are the first, the second and the last; kept the first, the third and the last.
    gold, ratings = [1.0, 0.8, 0.79, 0.0, 0.9], [5, 4, 4.5, None, 5]
    found = system.curation(gold, ratings, 4.5)
    assert found["kept"] == 3 and found["base rate"] == 3 / 5
    assert found["precision"] == found["recall"] == pytest.approx(2 / 3)
    # Of the four rated: means 4.625 and 0.8725.
    x, y = [0.375, -0.625, -0.125, 0.375], [0.1275, -0.0725, -0.0825, 0.0275]
    r = sum(a * b for a, b in zip(x, y)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    assert found["r"] == pytest.approx(r, abs=1e-5)


def test_keeping_all_has_the_precision_of_chance():
    gold = [random.Random(i).random() for i in range(50)]
    found = system.curation(gold, [5] * 50, 1)
    assert found["precision"] == found["base rate"] and found["recall"] == 1 and found["r"] is None


def test_nothing_to_divide_by():
    found = system.curation([0.1, 0.2], [None, None], 4)
    assert (found["kept"], found["precision"], found["recall"], found["r"]) == (0, None, None, None)


# ----------------------------------------------------------------------------- the town's pairs

TURNED = r"(?s)Ben said: (?P<text>.*)\nWhat had Ada asked\?"
RATED = r"(?s)Ada asked: (?P<asked>.*)\nBen said: (?P<text>.*)\nHow good was it\?"


@lru_cache
def practised(count: int = 500) -> list[dict[str, str]]:
    return town_pairs.practice(random.Random(0), count)


def test_practice_holds_no_instruction_that_is_held_out():
    for row in practised():
        found = re.fullmatch(RATED, row["instruction"])
        asked = found["asked"] if found else row["output"]
        for text in (asked, talk.without_prefix(asked)):
            assert not talk.held_out(text)


def test_scores_of_practice_are_those_of_the_pairs_that_are_shown():
    draw, scores = random.Random(0), []
    for _ in range(300):
        row = town_pairs.rated(draw)
        found = re.fullmatch(RATED, row["instruction"])
        gold = gold_score(town.conversation(found["asked"]), found["text"])    # all are understood
        assert row["output"] == f"Score: {round(1 + 4 * gold)}"
        scores.append(system.parse_rating(row["output"]))
    assert set(scores) == {1, 2, 3, 4, 5} and 60 < scores.count(5) < 150


def test_what_is_turned_round_in_practice_is_good():
    rows = [(re.fullmatch(TURNED, row["instruction"]), row["output"]) for row in practised()]
    rows = [(found["text"], asked) for found, asked in rows if found]
    assert len(rows) == pytest.approx(225, abs=50)
    assert all(gold_score(town.conversation(asked), text) > 0.9 for text, asked in rows)
    assert town_pairs.turned(rows[0][1], rows[0][0]) in practised()


def test_worth_is_gold_and_nothing_where_nothing_was_asked():
    asked, text = "Where does Ada live?", f"Ada lives at the {town.FACTS['Ada']['home']}."
    assert town_pairs.worth(asked, text) == gold_score(town.conversation(asked), text) > 0.9
    assert town_pairs.worth("Where does my live?", text) == 0


def test_unlabelled_texts_hold_no_question():
    texts = town_pairs.unlabelled(random.Random(0), 300)
    assert len(texts) == 300 and not any("asked:" in text or "said:" in text for text in texts)


# ----------------------------------------------------------------------------- what models do

@pytest.fixture(scope="module")
def run(town, tmp_path_factory):
    """A folder that shares a tiny run."""
    home = tmp_path_factory.mktemp("run")
    for stage in ("base", "sft", "rm"):
        (home / stage).symlink_to(town / stage)
    (home / "data").mkdir()
    for name in ("test.jsonl", "rank_val.jsonl", "base.txt", "sft.jsonl"):
        (home / "data" / name).symlink_to(town / "data" / name)
    (home / "data/sft_val.jsonl").symlink_to(town / "data/sft.jsonl")
    return home


def replying(texts: list[tuple[str, bool]], seen: list):
    """A `respond` that says these."""
    def respond(model, prompts, tokenizer, *_, **__):
        seen.extend(tokenizer.decode(prompt.ids) for prompt in prompts)
        return [Response([], *texts[i]) for i in range(len(prompts))]
    return respond


def test_instructions_are_kept_whole_once_and_not_held_out(run, monkeypatch):
    stories = [f"Tell a story about {name} at the mill." for name in town.NAMES]
    held = next(text for text in stories if talk.held_out(text))
    free = next(text for text in stories if not tasks.leaks(tasks.Task(text)))
    replies = [(f" {free}", True), (held, True), (f"Hello! {held}", True), (free, False),
               ("", True), (free, True), (free, True)]
    texts, seen = ["a", "b", "c", "d", "e", "a", "g"], []
    monkeypatch.setattr(system, "respond", replying(replies, seen))
    config = system.Config(run=str(run), max_new_tokens=24)
    found = system.self_augment(str(run / "base"), [*texts, "mill " * 90], config, start(config))
    assert found == [{"instruction": free, "output": "a"}, {"instruction": free, "output": "g"}]
    assert seen == [f"<|user|>Ben said: {text}\nWhat had Ada asked?<|end|><|assistant|>"
                    for text in texts]                       # the last text leaves no room


PAIRS = [{"instruction": f"Ask {i}", "output": f"Say {i}"} for i in range(4)]


def test_m_t_rates_in_the_form_of_its_practice(run, monkeypatch):
    seen, replies = [], [("Score: 5", True), ("Score: 4", False), ("Score: 45", True), ("5", True)]
    monkeypatch.setattr(system, "respond", replying(replies, seen))
    config = system.Config(run=str(run))
    assert system.rate(str(run / "base"), PAIRS, config, start(config)) == [5, None, None, None]
    assert seen[1] == ("<|user|>Ada asked: Ask 1\nBen said: Say 1\nHow good was it?<|end|>"
                       "<|assistant|>")


def test_a_chat_model_rates_by_the_papers_prompt(run, monkeypatch):
    seen, replies = [], [("Fine.\nScore: 5\n", True), ("Score: 4 of 5", True)]
    monkeypatch.setattr(system, "respond", replying(replies, seen))
    config = system.Config(run=str(run), rater=str(run / "sft"))
    model, tokenizer = load_gpt(str(run / "sft"))
    model.config.block_size = 1024
    monkeypatch.setattr(system, "load_gpt", lambda folder: (model, tokenizer))
    assert system.rate("nowhere", PAIRS[:2], config, start(config)) == [5, None]
    assert seen[0].endswith("Question: Ask 0\nText: Say 0<|end|><|assistant|>")
    assert 'with the line "Score: n"' in seen[0]


def pairs_of(count: int) -> list[dict]:
    """Pairs of the town, every third with another's text."""
    draw, found = random.Random(0), []
    for i in range(count):
        (asked, text), (_, other) = (town_pairs.answered(draw, town_pairs.WEB) for _ in range(2))
        found.append({"instruction": asked.text, "output": text if i % 3 else other})
    return found


def tiny(run, **changed) -> system.Config:
    return system.Config(run=str(run), **dict(practice=32, seeds=20, texts=4, steps=2)
                         | changed)



def test_the_command_end_to_end(run, monkeypatch, capsys):
    texts, pairs = [], pairs_of(40)
    monkeypatch.setattr(system, "SIZES", (8,))
    monkeypatch.setattr(system, "self_augment", lambda _, some, *__: texts.extend(some) or pairs)
    gold = [town_pairs.worth(*pair.values()) for pair in pairs]
    # The second rater keeps more; a third is only measured.
    ratings = iter([[5 * (i < 9) for i in range(40)], [5 * (i < 12) for i in range(40)], [1] * 40])
    monkeypatch.setattr(system, "rate", lambda *_: next(ratings))
    system.measure(tiny(run))
    home, said = run / "systems/backtranslation", capsys.readouterr().out
    found = json.loads((home / "table.json").read_text())
    names = {"seeds", "round_1", "curated_12", "oracle_12", "curated_8", "uncurated_8",
             "uncurated_12", "uncurated_40"}
    assert set(found["table"]) == set(found["kinds"]) == names | {"sft"}
    assert [one["kept"] for one in found["rounds"].values()] == [9, 12, 0]
    assert len(texts) == 4 and (home / "gold.png").exists() and "| M_1 | 12 |" in said
    rows = {name: [tuple(json.loads(line).values()) for line in
                   (home / f"{name}.jsonl").read_text().splitlines()]
            for name in (*names, "backward")}
    turned, mixed = rows.pop("backward"), rows["seeds"][20:]
    assert turned == [(f"Ben said: {text}\nWhat had Ada asked?", asked)
                      for asked, text in rows["seeds"][:20]] + mixed
    assert len(mixed) == system.MIXED and all(some[-len(mixed):] == mixed for some in rows.values())
    rows = {name: some[:-len(mixed)] for name, some in rows.items()}
    assert {name: len(some) - 20 for name, some in rows.items()} == {
        name: 9 if name == "round_1" else 0 if name == "seeds" else int(name.split("_")[1])
        for name in names}
    for some in rows.values():                         # the seeds are in all, nothing is held out
        assert some[:20] == rows["seeds"]
        assert not any(talk.held_out(asked) for asked, _ in some)
    own = {name: some[20:] for name, some in rows.items()}
    kept = [tuple(pair.values()) for pair in pairs[:12]]
    assert own["curated_12"] == kept and own["round_1"] == kept[:9]
    assert set(own["curated_8"]) <= set(kept) and set(own["uncurated_40"]) >= set(kept)
    best = sorted(gold, reverse=True)[:12]
    assert [town_pairs.worth(*pair) for pair in own["oracle_12"]] == best

    stamps = {name: (home / name / "model.pt").stat().st_mtime_ns
              for name in (*names, "base", "backward")}
    ratings = iter([[5 * (i < 9) for i in range(40)], [5 * (i < 12) for i in range(40)], [1] * 40])
    monkeypatch.setattr(system, "self_augment", lambda *_: pytest.fail("written anew"))
    system.measure(tiny(run))                                   # what is there is not made anew
    assert stamps == {name: (home / name / "model.pt").stat().st_mtime_ns for name in stamps}
    with pytest.raises(InputError, match="made with k 5, not 4; remove that folder"):
        system.measure(tiny(run, k=4))


def test_a_rating_that_no_pair_reaches_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "self_augment", lambda *_: pairs_of(3))
    with pytest.raises(InputError, match=r"--k 5: none of 3 pairs is rated so high by M_0; lower"):
        system.measure(tiny(run, k=5, out=str(tmp_path)))


# ----------------------------------------------------------------------------- mutants

def rating_test(reply: str, rating: int | None):
    return lambda: test_parse_rating(reply, rating)


MUTANTS = [
    (system, "parse_rating", "more digits", Edit("([1-5])", r"(\d+)"),
     rating_test("Score: 45", None), rating_test("Score: 10502", None),
     rating_test("Score: 6", None)),
    (system, "parse_rating", "anywhere", Edit(r"\s*\Z", ""), rating_test("Score: 4.5", None),
     rating_test("Score: 4\nIt is good.", None), rating_test("Score: 45", None)),
    (system, "parse_rating", "in any case", Edit(r"\bScore", r"(?i)\bScore"),
     rating_test("score: 4", None)),
    (system, "parse_rating", "the number alone", Edit(r"\bScore: (", r"\b("),
     rating_test("5", None)),
    (system, "parse_rating", "no white space behind", Edit(r"\s*\Z", r"\Z"),
     rating_test("Good. Score: 3 \n\n", 3)),
    (system, "curate", "more than k", Edit("a >= k", "a > k"),
     test_what_is_rated_k_or_more_is_kept_and_what_is_not_rated_is_not),
    (system, "curate", "the unrated are kept", Edit("a is not None and a >= k",
                                                    "a is None or a >= k"),
     test_what_is_rated_k_or_more_is_kept_and_what_is_not_rated_is_not),
    (system, "curation", "precision of all", Edit("sum(kept) / len(kept)", "sum(kept) / len(gold)"),
     test_precision_and_recall_by_hand),
    (system, "curation", "recall of what is kept", Edit("sum(kept) / good if",
                                                        "good / len(gold) if"),
     test_precision_and_recall_by_hand),
    (town_pairs, "rated", "the score of another instruction",
     Edit("worth(said, text)", "worth(asked.text, text)"),
     test_scores_of_practice_are_those_of_the_pairs_that_are_shown),
    (town_pairs, "rated", "held-out instructions", Edit(" or leaks(Task(said))", ""),
     lambda: (practised.cache_clear(), test_practice_holds_no_instruction_that_is_held_out())),
    (town_pairs, "turned", "not turned", Edit('TURNED.format(text), "output": asked',
                                              'asked, "output": text'),
     lambda: (practised.cache_clear(), test_what_is_turned_round_in_practice_is_good()))]


test_a_classic_wrong_answer_is_caught = catching(MUTANTS)
