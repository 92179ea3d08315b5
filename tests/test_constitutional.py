"""Constitutional AI: soft labels, their loss, the critic, what is trained on, the command."""
import json
import math
import random
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_mutants import Edit, catching

import train_dpo
from common.errors import InputError
from common.run import load_gpt
from data.batches import prompt_rows
from data.readers import read_rankings
from data.tinytown.gold import gold_parts
from data.tinytown.talk import CRITIQUES
from data.tinytown.teachers import comply
from data.tinytown.town import conversation, split_of, understand
from data.tokenizer import get_tokenizer
from rollout import Response
from systems import constitutional, critic
from train_dpo import dpo_loss

HARM, DECLINED = "Tell me how to hurt Ada.", "I can not help with that. It would hurt Ada."


def said(*texts: str) -> list[Response]:
    return [Response([], text, True) for text in texts]


# ----------------------------------------------------------------------------- soft labels

def test_ai_preference_by_hand():
    first = torch.tensor([[0.9, 0.2, 0.0], [0.5, 0.2, 0.0]])
    second = torch.tensor([[0.1, 0.2, 1.0], [0.3, 0.4, 1.0]])
    # (1 + .8)/2 = .9 and (1 + .2)/2 = .6; ½ and (1 − .2)/2 = .4; twice (1 − 1)/2 = 0.
    assert critic.ai_preference(first, second).tolist() == pytest.approx([0.75, 0.45, 0.0])


def test_ai_preference_is_how_often_the_first_alone_is_fine():
    """Another definition: coins for both answers, ties halved; and both orders add up to 1."""
    first, second = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(0))
    found = critic.ai_preference(first, second)
    for i in range(50):
        coins = [a * (1 - b) + (a * b + (1 - a) * (1 - b)) / 2
                 for a, b in zip(first[:, i].tolist(), second[:, i].tolist())]
        assert found[i].item() == pytest.approx(sum(coins) / 3, abs=1e-6)
    assert torch.allclose(found + critic.ai_preference(second, first), torch.ones(50))


def test_of_two_that_harm_alike_none_is_preferred():
    q = torch.tensor([[0.001, 0.999, 0.3]])
    assert critic.ai_preference(q, q).tolist() == [0.5] * 3
    # Their odds are 1 to 9, yet both harm.
    assert critic.ai_preference(q[:, :1] * 9, q[:, :1]).item() == pytest.approx(0.504)


def test_soft_dpo_loss_by_hand():
    logprobs, ref = torch.tensor([[-1., -3.]]), torch.tensor([[-2., -3.5]])     # h = 1 − .5
    found = critic.soft_dpo_loss(logprobs, ref, torch.tensor([0.8]), beta=2.0)
    right = 0.8 * math.log(1 + math.exp(-1)) + 0.2 * math.log(1 + math.exp(1))
    assert found.tolist() == pytest.approx([right])


def test_soft_dpo_loss_of_sure_labels_is_dpo_and_orders_do_not_matter():
    logprobs, ref = torch.randn(2, 9, 2, generator=torch.Generator().manual_seed(0))
    p, loss = torch.linspace(0, 1, 9), critic.soft_dpo_loss
    sure = loss(logprobs, ref, torch.ones(9), 0.3)
    assert torch.allclose(sure, dpo_loss(*logprobs.T, *ref.T, 0.3)[0])
    assert torch.allclose(loss(logprobs, ref, p, 0.3),
                          loss(logprobs.flip(1), ref.flip(1), 1 - p, 0.3))
    other = loss(logprobs.flip(1), ref.flip(1), torch.ones(9), 0.3)
    assert torch.allclose(loss(logprobs, ref, p, 0.3), p * sure + (1 - p) * other)


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9])
def test_the_minimum_of_a_soft_label_is_finite(p):
    h = torch.tensor([[math.log(p / (1 - p)) / 0.15, 0.0]], requires_grad=True)
    critic.soft_dpo_loss(h, torch.zeros(1, 2), torch.tensor([p]), 0.15).sum().backward()
    assert h.grad.abs().max() < 1e-6


def test_labels_that_are_right_by_hand():
    p, lead = torch.tensor([0.9, 0.6, 0.2, 0.5, 0.9]), torch.tensor([1., -1., -1., 1., 0.])
    assert constitutional.right(p, lead) == (1 + 0 + 1 + 0.5) / 4
    assert constitutional.right(p[4:], lead[4:]) is None


def test_what_helps_with_harm():
    draw = random.Random(0)
    assert constitutional.helps(said(comply(draw, "mill"), DECLINED, "Ada likes red.")).tolist() \
        == [1, 0, 0]


# ----------------------------------------------------------------------------- the critic

@pytest.fixture(scope="module")
def asked_critic(town):
    model, tokenizer = load_gpt(str(town / "base"))
    return critic.Critic(model.eval(), tokenizer, 1.0, 16, seed=1)


def test_q_is_the_models(asked_critic):
    tokenizer, model = asked_critic.tokenizer, asked_critic.model
    asked = prompt_rows([conversation(HARM), conversation("Where does Ada live?")], tokenizer, 80)
    answers = said("Go to the mill at night and do it.", "Ada lives at the mill.")
    ends = ("Cora said: Does it hurt anyone?", "Cora gave it 1 of 5. It", "Cora gave it 3 of 5. It",
            "Cora said: Is it true?", "Cora said: Is it what was asked?",
            "Cora said: Is it said well?")
    words = (" No", " Yes"), (" was", " would"), (" was", " would"), *[(" Yes", " No")] * 3
    found = asked_critic.fine(critic.PRINCIPLES, asked, answers)
    for row, end, pair in zip(found, ends, words, strict=True):
        for q, prompt, answer in zip(row, asked, answers, strict=True):
            text = f"Ada asked: {prompt.messages[0]['content']}\nBen said: {answer.text}\n{end}"
            ids = torch.tensor([[tokenizer.endoftext, *tokenizer.encode(text)]])
            odds = model(ids)[0, -1, [tokenizer.encode(word)[0] for word in pair]].softmax(-1)
            assert q.item() == pytest.approx(odds[0].item(), abs=1e-5)


def test_words_of_a_principle_are_one_token_each():
    tokenizer = get_tokenizer("tinytown")
    for _, *words in critic.PRINCIPLES.values():
        assert [len(tokenizer.encode(word)) for word in words] == [1, 1]


def test_the_fault_is_told_and_an_endless_revision_is_none(asked_critic, monkeypatch):
    asked = prompt_rows([conversation(HARM)] * 3, asked_critic.tokenizer, 80)
    read = []

    def go_on(model, prompts, *_, **__):
        read.extend(asked_critic.tokenizer.decode(prompt.ids) for prompt in prompts)
        return [Response([], f" {DECLINED}", True), Response([], " It would", False),
                Response([], " ", True)]
    monkeypatch.setattr(critic, "respond", go_on)
    found = asked_critic.revise(asked, said("Do it.", "Take it.", "Go."), "round 0")
    assert [one.text for one in found] == [DECLINED, "Take it.", "Go."]
    assert read[0].endswith(f"Ada asked: {HARM}\nBen said: Do it.\nCora said: Does it hurt anyone? "
                            f"{CRITIQUES['harmless'][1]} Better say:")


def fake(faulty) -> SimpleNamespace:
    """A critic: faulty(answer, principle) says whether a fault is found; it revises to "+"."""
    return SimpleNamespace(
        seed=1, fine=lambda principles, _, answers: torch.tensor(
            [[0.0 if faulty(one.text, place) else 0.5 for one in answers]
             for place in range(len(principles))]),
        revise=lambda _, answers, title: said(*(one.text + "+" for one in answers)))


def test_only_what_has_a_fault_is_revised_and_judged_again():
    stages = critic.critique_and_revise(fake(lambda text, _: text.startswith("a") and "++"
                                             not in text), [None] * 3, said("a", "b", "a+"), 3)
    assert [[one.text for one in stage] for stage in stages] == [
        ["a", "b", "a+"], ["a+", "b", "a++"], ["a++", "b", "a++"], ["a++", "b", "a++"]]


def test_a_principle_is_drawn_for_each_answer():
    stages = critic.critique_and_revise(fake(lambda text, place: place == 1 and text == "a"),
                                        [None] * 900, said(*["a"] * 900), 2)
    revised = [sum(one.text == "a+" for one in stage) / 900 for stage in stages]
    assert revised == pytest.approx([0, 1 / 3, 5 / 9], abs=0.06)


def test_ai_labels_are_by_the_constitution_alone(tmp_path):
    tokenizer = get_tokenizer("tinytown")
    asked = prompt_rows([conversation(HARM), conversation(f"Hello! {HARM}")], tokenizer, 80)
    helper = SimpleNamespace(fine=lambda principles, _, answers: torch.tensor(
        [[float(("+" in one.text) == (place < 3)) for one in answers]
         for place in range(len(principles))]))
    lines, q = critic.ai_labels(helper, asked, said("a+", "b"), said("c", "d"))
    assert q.shape == (2, 6, 2) and q[0, :, 0].tolist() == [1, 1, 1, 0, 0, 0]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    assert [(one.messages, one.responses, one.scores)
            for one in read_rankings(tmp_path / "pairs.jsonl")] == [
        (asked[0].messages, ["a+", "c"], [1, 0]), (asked[1].messages, ["b", "d"], [0.5, 0.5])]


# ----------------------------------------------------------------------------- what is trained on

def test_helpful_only_helps_with_harm_and_changes_nothing_else(town):
    path = town / "data/sft.jsonl"
    rows = constitutional.helpful_only_rows(str(path), seed=1)
    harmful = 0
    for line, row in zip(path.read_text().splitlines(), rows, strict=True):
        messages = json.loads(line)["messages"]
        assert row["messages"][:-1] == messages[:-1]
        if understand(messages[:-1])[0].name == "refuse":
            harmful += 1
            assert gold_parts(messages[:-1], row["messages"][-1]["content"])["harmless"] == 0
        else:
            assert row["messages"] == messages
    assert harmful > 0


def test_peoples_labels_are_of_ordinary_prompts_the_better_answer_first(tmp_path):
    row = {"messages": conversation("Where does Ada live?"), "responses": [
        {"text": "Here.", "score": 0}, {"text": "There.", "score": 2, "ended": False},
        {"text": "Far.", "score": 2}]}
    tied = row | {"responses": row["responses"][1:]}
    path = tmp_path / "rankings.jsonl"
    path.write_text("\n".join(map(json.dumps, [row, row | {"messages": conversation(HARM)}, tied])))
    seen = set()
    for seed in range(20):
        lines = constitutional.helpfulness_labels(str(path), 5, seed)
        assert len(lines) == 1
        (tmp_path / "pair.jsonl").write_text(lines[0])
        pair, = read_rankings(tmp_path / "pair.jsonl")
        assert pair.messages == row["messages"] and pair.scores == [1, 0]
        assert pair.responses[1] == "Here." and pair.cut == (0,) * (pair.responses[0] == "There.")
        seen.add(pair.responses[0])
    assert seen == {"There.", "Far."}


def test_a_model_is_made_anew_for_other_rows_or_flags_alone(tmp_path):
    made = []

    def train(flags):
        made.append(flags)
        folder = Path(flags.out)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"run": asdict(flags)}))
        (folder / "final.json").write_text("{}")
    flags = train_dpo.Config(data=("rows.jsonl",), out=str(tmp_path / "policy"), beta=0.1)
    for rows, beta, times in (("a", 0.1, 1), ("a", 0.1, 1), ("a", 0.2, 2), ("b", 0.2, 3),
                              ("b", 0.2, 3)):
        assert constitutional.made(train, rows, replace(flags, beta=beta)) == flags.out
        assert len(made) == times and (tmp_path / "policy.jsonl").read_text() == rows
    (tmp_path / "policy/final.json").unlink()
    constitutional.made(train, "b", replace(flags, beta=0.2))
    assert [one.overwrite for one in made] == [False, True, True, False]


# ----------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def measured(town, tmp_path_factory):
    """A tiny run through all of it: (its config, its figures)."""
    run = tmp_path_factory.mktemp("constitutional")
    for stage in ("base", "sft", "rm", "rank"):
        (run / stage).symlink_to(town / stage)
    (run / "data").mkdir()
    for name in ("sft", "test", "rank_val", "harmful"):
        (run / f"data/{name}.jsonl").symlink_to(town / f"data/{name}.jsonl")
    (run / "data/base.txt").symlink_to(town / "data/base.txt")
    (run / "data/sft_val.jsonl").symlink_to(town / "data/sft.jsonl")
    config = constitutional.Config(
        run=str(run), out=str(run / "out"), epochs=6, lr=5e-3, red=8, rounds=1, ordinary=24,
        sl_epochs=1, rankings=12, max_new_tokens=32)
    return config, constitutional.measure(config)


def test_the_command_end_to_end_and_again(measured, town, capsys):
    config, found = measured
    policies = ["helpful_only", "sl_cai", "rlaif_alone", "sl_cai_rlaif"]
    assert list(found["outcomes"]) == policies and list(found["table"]) == ["sft", *policies]
    assert len(found["revisions"]) == 2 and len(found["principles"]) == 8
    assert all(0 <= value <= 1 for one in found["outcomes"].values() for value in one.values())
    home = Path(config.out)
    before = {name: (home / name / "model.pt").stat().st_mtime_ns for name in policies}
    assert constitutional.measure(config)["outcomes"] == found["outcomes"]
    assert before == {name: (home / name / "model.pt").stat().st_mtime_ns for name in policies}
    assert "| sl_cai_rlaif | 0." in capsys.readouterr().out
    assert json.loads((home / "table.json").read_text())["outcomes"].keys() == set(policies)


def test_nothing_of_validation_or_test_is_trained_on(measured, town):
    config, _ = measured
    for name in ("helpful_only", "sl_cai", "rlaif_alone", "sl_cai_rlaif"):
        lines = (Path(config.out) / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        asked = [row["messages"] if "responses" in row else row["messages"][:-1] for row in rows]
        splits = {"helpful_only": {"sft"}, "sl_cai": {"rl"}}.get(name, {"rl", "rank"})
        assert {split_of(messages) for messages in asked} == splits
        if "responses" in rows[0]:          # people label ordinary prompts alone, the AI the rest
            for row in rows:
                people = understand(row["messages"])[0].name != "refuse"
                assert split_of(row["messages"]) == ("rank" if people else "rl")
                scores = [one["score"] for one in row["responses"]]
                assert sum(scores) == pytest.approx(1) and (scores == [1, 0]) <= people


@pytest.mark.parametrize("flags, words", [
    (dict(red=1), "--red 1: must lie between 2 and"),
    (dict(beta=0.0), "--beta 0.0: must lie between"),
    (dict(run="nowhere"), "nowhere/base")])
def test_bad_input(flags, words, tmp_path):
    config = constitutional.Config(**{"out": str(tmp_path), **flags})
    with pytest.raises(InputError, match=words):
        constitutional.measure(config)


MUTANTS = [
    (critic, "ai_preference", "odds instead of coins",
     Edit("(0.5 + (first - second) / 2)", "(first / (first + second))"),
     test_of_two_that_harm_alike_none_is_preferred, test_ai_preference_by_hand),
    (critic, "ai_preference", "the other one", Edit("first - second", "second - first"),
     test_ai_preference_by_hand),
    (critic, "ai_preference", "the first principle alone", Edit(".mean(0)", "[0]"),
     test_ai_preference_by_hand),
    (critic, "soft_dpo_loss", "labels turned round", Edit("1 - p", "p"),
     test_soft_dpo_loss_by_hand),
    (critic, "soft_dpo_loss", "labels made hard", Edit("1 - p", "(p < 0.5).float()"),
     test_soft_dpo_loss_by_hand, lambda: test_the_minimum_of_a_soft_label_is_finite(0.6)),
    (critic, "critique_and_revise", "one principle for all",
     Edit("q[draw.randrange(len(q)), i]", "q[1, i]"), test_a_principle_is_drawn_for_each_answer),
    (critic, "critique_and_revise", "all are revised", Edit(" < 0.5]", " < 2]"),
     test_only_what_has_a_fault_is_revised_and_judged_again),
    (critic, "ai_labels", "all questions asked", Edit("[:, :len(CONSTITUTION)]", ""),
     lambda: test_ai_labels_are_by_the_constitution_alone(Path(tempfile.mkdtemp()))),
    (critic, "ai_labels", "the worse one first", Edit("[one, 1 - one]", "[1 - one, one]"),
     lambda: test_ai_labels_are_by_the_constitution_alone(Path(tempfile.mkdtemp()))),
    (constitutional, "helpfulness_labels", "harm is labelled by people",
     Edit("and not is_harmful(one.messages)", ""),
     lambda: test_peoples_labels_are_of_ordinary_prompts_the_better_answer_first(
         Path(tempfile.mkdtemp()))),
    (constitutional, "right", "ties are right", Edit("- 0.5).sign()", "- 0.499).sign()"),
     test_labels_that_are_right_by_hand)]


test_a_classic_wrong_answer_is_caught = catching(MUTANTS)
