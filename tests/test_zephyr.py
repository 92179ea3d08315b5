"""Zephyr: pairs, judges, and the three steps."""
import json
import math
import random
from collections import Counter

import pytest
import torch
from test_mutants import Edit, catching

from common.errors import InputError
from common.run import load_gpt
from data.batches import Prompt
from data.readers import read_rankings
from data.tinytown.gold import gold_score
from data.tinytown.town import FACTS, conversation, split_of
from rollout import Response
from systems import zephyr

# ----------------------------------------------------------------------------- choosing


def drawn(scores: list[float], choose: str = "best_against_random") -> Counter:
    """How often each pair comes out of 3000. By name, so that mutants are seen."""
    draw = random.Random(0)
    return Counter(getattr(zephyr, choose)(scores, draw) for _ in range(3000))


def test_the_best_meets_each_of_the_others_equally_often():
    found = drawn([2.0, 5.0, -1.0, 3.0])
    assert set(found) == {(1, 0), (1, 2), (1, 3)}
    assert min(found.values()) > 900                        # of 3000, a third each


def test_the_score_of_the_loser_does_not_matter():
    draw = lambda: random.Random(7)                         # noqa: E731
    for others in ([0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [-math.inf, 0.0, -9.0]):
        assert (zephyr.best_against_random([9.0, *others], draw())
                == zephyr.best_against_random([9.0, 0.0, 0.0, 0.0], draw()))


def test_any_of_several_best_may_be_chosen_and_never_meets_itself():
    found = drawn([1.0, 1.0, 0.0])
    assert set(found) == {(0, 1), (0, 2), (1, 0), (1, 2)}
    assert min(found.values()) > 600                        # of 3000, a quarter each
    assert set(drawn([0.0, 0.0])) == {(0, 1), (1, 0)}


def test_the_best_against_the_worst():
    assert set(drawn([2.0, 5.0, -1.0, 3.0], "best_against_worst")) == {(1, 2)}
    assert set(drawn([4.0, 4.0], "best_against_worst")) == {(0, 1), (1, 0)}


@pytest.mark.parametrize("scores", [[], [1.0]])
def test_a_pair_needs_two(scores):
    for choose in (zephyr.best_against_random, zephyr.best_against_worst):
        with pytest.raises(ValueError, match=f"{len(scores)} answers: a pair needs two"):
            choose(scores, random.Random(0))


# ----------------------------------------------------------------------------- pairs

ASKED = [Prompt(conversation(text), [i]) for i, text in enumerate(
    ("Where does Ada live?", "Where does Ben live?", "Where does Cora live?"))]


def right(prompt: Prompt) -> Response:
    name = prompt.messages[0]["content"].split()[2]
    return Response([], f"{name} lives at the {FACTS[name]['home']}.", True)


BAD, ENDLESS = Response([], "I do not care.", True), Response([], "Ada Ada Ada", False)
ANSWERS = [(right(prompt), BAD) for prompt in ASKED]


def test_pairs_and_what_they_are_worth(tmp_path):
    """Right in two of three; the third prefers the bad answer."""
    text, worth = zephyr.feedback(ASKED, ANSWERS, [[2., 1.], [.3, .2], [0., 1.]],
                                  zephyr.best_against_random, seed=0)
    good, bad = ([gold_score(prompt.messages, answers[k].text) for prompt, answers
                  in zip(ASKED, ANSWERS)] for k in (0, 1))
    assert worth == {"pairs": 3, "accuracy": pytest.approx(2 / 3),
                     "gold of chosen": pytest.approx((good[0] + good[1] + bad[2]) / 3),
                     "of rejected": pytest.approx((bad[0] + bad[1] + good[2]) / 3)}
    (tmp_path / "pairs.jsonl").write_text(text)
    found = read_rankings(str(tmp_path / "pairs.jsonl"))
    assert [ranking.messages for ranking in found] == [prompt.messages for prompt in ASKED]
    assert [max(zip(ranking.scores, ranking.responses))[1] for ranking in found] == [
        ANSWERS[0][0].text, ANSWERS[1][0].text, BAD.text]


def test_nothing_is_learned_from_equal_texts_or_scores():
    answers = [(BAD, BAD), ANSWERS[1], ANSWERS[2]]
    _, worth = zephyr.feedback(ASKED, answers, [[2., 1.], [1., 1.], [1., 0.]],
                               zephyr.best_against_random, seed=0)
    assert worth["pairs"] == 1 and worth["accuracy"] == 1


def test_equally_good_answers_say_nothing_of_the_judge():
    same = (BAD, Response([], "Maybe.", True))               # both of no worth
    _, worth = zephyr.feedback(ASKED, [same, same, ANSWERS[2]], [[2., 1.], [1., 2.], [1., 0.]],
                               zephyr.best_against_random, seed=0)
    assert worth["pairs"] == 3 and worth["accuracy"] == 1


def test_an_endless_answer_is_never_chosen():
    answers = [(ENDLESS, BAD), (ENDLESS, ENDLESS), (BAD, ENDLESS)]
    scores = zephyr.scored(lambda prompts, some: [5.0] * len(some), ASKED, answers)
    assert scores == [[-math.inf, 5], [-math.inf] * 2, [5, -math.inf]]
    text, worth = zephyr.feedback(ASKED, answers, scores, zephyr.best_against_random, seed=0)
    assert worth["pairs"] == 2 and text.count('"score": 1.0') == 2
    for line in text.splitlines():
        best = max(json.loads(line)["responses"], key=lambda one: one["score"])
        assert best["text"] == BAD.text and best["ended"]


# ----------------------------------------------------------------------------- judges

@pytest.fixture(scope="module")
def known(town) -> dict:
    model, tokenizer = load_gpt(str(town / "base"))
    return zephyr.judges(model.eval(), tokenizer, lambda prompts, answers: [7.] * len(answers), 1)


def test_scores_stand_beside_their_answers(known):
    some = [(BAD, right(ASKED[0]), BAD, BAD), (BAD, BAD, BAD, right(ASKED[1]))]
    for name in ("oracle", "annotator"):
        rows = zephyr.scored(known[name], ASKED, some)
        assert [row.index(max(row)) for row in rows] == [1, 3]


def test_the_base_grades_from_1_to_5_and_chance_reads_nothing(known):
    answers = [(BAD, right(prompt)) for prompt in ASKED]
    grades = zephyr.scored(known["base_grades"], ASKED, answers)
    assert all(1 <= grade <= 5 for row in grades for grade in row)
    assert len({row[0] for row in grades}) == 3              # another prompt, another grade
    chance = zephyr.scored(known["chance"], ASKED, [(BAD, BAD)] * 3)
    assert len({score for row in chance for score in row}) == 6


def test_a_prompts_answers_have_one_annotator(known, monkeypatch):
    drawn = []

    class Fixed:
        def utility(self, draw, gold, response, place):
            drawn.append(self)
            return gold
    monkeypatch.setattr(zephyr, "ANNOTATORS", [Fixed() for _ in range(50)])
    zephyr.scored(known["annotator"], ASKED, [(BAD,) * 4] * 3)
    assert [len(set(map(id, drawn[i:i + 4]))) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(map(id, drawn))) > 1


# ----------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def home(town, tmp_path_factory):
    """A run whose PPO model is its SFT model."""
    home = tmp_path_factory.mktemp("zephyr")
    for name in ("base", "sft", "rm", "data"):
        (home / name).symlink_to(town / name)
    (home / "ppo").symlink_to(town / "sft")
    if not (val := town / "data/sft_val.jsonl").exists():
        val.write_text((town / "data/sft.jsonl").read_text())
    return home


def config_of(home, **fields) -> zephyr.Config:
    return zephyr.Config(run=str(home), answers=60, prompts=30, steps=2, max_new_tokens=16,
                         **fields)


def test_the_command_end_to_end(home, capsys):
    found = zephyr.measure(config_of(home))
    out = home / "systems/zephyr"
    names = ["chance", "base_grades", "reward_model", "annotator", "oracle", "worst_other"]
    assert list(found["judges"]) == names
    assert list(found["table"]) == ["sft", "dsft", "no_dsft", *(f"ddpo_{name}" for name in names),
                                    "ppo"]
    assert json.loads((out / "table.json").read_text()) == found and (out / "zephyr.png").exists()
    assert "| oracle | " in capsys.readouterr().out
    for name, one in found["judges"].items():
        gold, before = (found["table"][of]["gold"] for of in (f"ddpo_{name}", "dsft"))
        assert one["gain, T = 1"] == pytest.approx(gold["1"] - before["1"], abs=2e-4)
    assert all(one["pairs"] >= 10 for one in found["judges"].values())
    # Nothing held out is trained on: each part of the pipeline has the split of its file.
    for path in out.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if path.stem == "dsft":
            assert {split_of(row["messages"][:-1]) for row in rows} == {"sft"}
        else:
            assert {split_of(row["messages"]) for row in rows} == {"rl"} and len(rows) <= 30
    # What is there is not trained anew; another judge's pairs are.
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/model.pt")}
    (out / "ddpo_chance.jsonl").write_text("")
    assert zephyr.measure(config_of(home)) == found
    again = {path.parent.name for path, stamp in stamps.items()
             if path.stat().st_mtime_ns != stamp}
    assert again == {"ddpo_chance"}


def test_prompts_without_a_pair():
    with pytest.raises(InputError, match="--prompts: no pair of unlike answers"):
        zephyr.feedback(ASKED, [(BAD, BAD)] * 3, [[1., 0.]] * 3, zephyr.best_against_random, 0)


def test_a_teacher_that_is_not_there(home):
    with pytest.raises(InputError, match="nobody"):
        zephyr.measure(config_of(home, teacher="nobody"))


def test_the_student_starts_from_what_it_distilled(home, tmp_path):
    """DPO's own start: with a step of nothing the policy is the model it began from."""
    text, _ = zephyr.feedback(ASKED, ANSWERS, [[1., 0.]] * 3, zephyr.best_against_random, 0)
    config = config_of(home, out=str(tmp_path), dpo_lr=1e-12)
    for init in ("base", "sft"):
        folder = zephyr.prefer(f"from_{init}", str(home / init), text, config)
        for one, other in zip(*(load_gpt(place)[0].parameters()
                                for place in (folder, str(home / init)))):
            assert torch.allclose(one, other, atol=1e-6)


MUTANTS = [
    (zephyr, "best_against_random", "the worst against a random other",
     Edit("max(scores)", "min(scores)"),
     test_the_best_meets_each_of_the_others_equally_often),
    (zephyr, "best_against_random", "itself may be the other", Edit("if k != best", "if True"),
     test_any_of_several_best_may_be_chosen_and_never_meets_itself),
    (zephyr, "best_against_random", "the first of several best",
     Edit("draw.choice([k for k, score in enumerate(scores) if score == max(scores)])",
          "scores.index(max(scores))"),
     test_any_of_several_best_may_be_chosen_and_never_meets_itself),
    (zephyr, "best_against_worst", "the second best", Edit("min((k", "max((k"),
     test_the_best_against_the_worst),
    (zephyr, "feedback", "ties kept", Edit("row[best] > row[other]", "row[best] >= row[other]"),
     test_nothing_is_learned_from_equal_texts_or_scores),
    (zephyr, "feedback", "equal texts kept", Edit(" and two[0].text != two[1].text", ""),
     test_nothing_is_learned_from_equal_texts_or_scores),
    (zephyr, "feedback", "equal gold counts", Edit("> 0.02", ">= 0"),
     test_equally_good_answers_say_nothing_of_the_judge),
    (zephyr, "feedback", "the loser preferred", Edit("[1.0, 0.0]", "[0.0, 1.0]"),
     test_an_endless_answer_is_never_chosen),
]


test_a_classic_wrong_answer_is_caught = catching(MUTANTS)
