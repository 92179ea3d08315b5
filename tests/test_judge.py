"""LLM-as-a-judge: verdicts in both orders, grades, the One/Two judge, LLMBar and its reader."""
import json
import math
import random
import re

import pytest
import torch
from test_mutants import Edit, catching

from common.checkpoint import save_model
from common.errors import InputError
from common.run import DeviceFlags
from data.batches import Prompt
from data.tinytown.annotators import Annotator
from data.tinytown.gold import gold_score
from data.tinytown.town import conversation, split_of
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from rollout import Response
from systems import judge, llmbar

# ----------------------------------------------------------------------------- both orders


def test_swap_agreement_by_hand():
    # Mapped back, the other order names 1 2 2 1: the same as the first but for the second item.
    # Right in the first order: the second and third; in the other the third. First places: 3, 2.
    found = judge.swap_agreement([1, 1, 2, 1], [2, 1, 1, 2], [2, 1, 2, 2])
    assert found == {"agreement": 3 / 4, "picks_first": 5 / 8, "accuracy": 3 / 8,
                     "both_correct": 1 / 4}


def test_a_judge_that_always_picks_the_first():
    found = judge.swap_agreement([1] * 5, [1] * 5, [1, 2, 2, 1, 2])
    assert found == {"agreement": 0, "picks_first": 1, "accuracy": 0.5, "both_correct": 0}


def test_a_perfect_judge_and_one_that_is_always_wrong():
    gold, other = [1, 2, 2, 1, 2], [2, 1, 1, 2, 1]
    assert judge.swap_agreement(gold, other, gold) == {
        "agreement": 1, "picks_first": 0.5, "accuracy": 1, "both_correct": 1}
    assert judge.swap_agreement(other, gold, gold) == {
        "agreement": 1, "picks_first": 0.5, "accuracy": 0, "both_correct": 0}


def test_a_pair_on_which_the_orders_disagree_counts_half():
    draw = random.Random(0)
    first, swapped, gold = ([draw.choice((1, 2)) for _ in range(99)] for _ in range(3))
    found = judge.swap_agreement(first, swapped, gold)
    assert found["accuracy"] == pytest.approx(found["both_correct"] + (1 - found["agreement"]) / 2)
    assert 0 < found["both_correct"] < found["accuracy"] < 1


def test_without_gold_nothing_is_right():
    assert judge.swap_agreement([1, 2], [2, 2]) == {"agreement": 0.5, "picks_first": 0.25}
    assert judge.swap_agreement(torch.tensor([1, 2]), torch.tensor([2, 2]),
                                torch.tensor([1, 2])) == {
        "agreement": 0.5, "picks_first": 0.25, "accuracy": 0.75, "both_correct": 0.5}


@pytest.mark.parametrize("verdicts, words", [
    (([1, 2], [1]), r"\[2, 1\] verdicts"), (([1], [1], [1, 2]), r"\[1, 1, 2\] verdicts"),
    (([], []), "at least one"), (([1, 0], [1, 2]), "verdict 0: expected 1 or 2"),
    (([1], [None]), "verdict None"), (([1], [1], [3]), "verdict 3"), ((["1"], [1]), "verdict '1'")])
def test_what_is_no_verdict(verdicts, words):
    with pytest.raises(ValueError, match=words):
        judge.swap_agreement(*verdicts)


def test_both_orders_cancel_a_taste_for_a_place():
    lead = torch.randn(20, generator=torch.Generator().manual_seed(0))
    for taste in (0.0, 1.5, -9.0):
        assert judge.both_orders(lead + taste, -lead + taste).tolist() == pytest.approx(
            lead.tolist(), abs=1e-5)


def test_figures_of_a_judge_with_a_taste_for_the_first():
    lead, gold = torch.tensor([3., -1., 2., -2.]), torch.tensor([1, 2, 2, 2])
    longer = torch.tensor([5., -1., 0., 7.])
    found = judge.figures(lead + 9, -lead + 9, gold, longer)
    assert (found["picks_first"], found["agreement"], found["accuracy"]) == (1, 0, 0.5)
    assert found["averaged"] == 0.75
    assert found["picks_longer"] == 0.5          # whoever stands first, the longer one does in half


def test_figures_of_a_judge_without_a_taste_for_a_place():
    lead, gold = torch.tensor([3., -1., 2., -2.]), torch.tensor([1, 2, 2, 2])
    longer = torch.tensor([5., -1., 0., 7.])
    found = judge.figures(lead, -lead, gold, longer)
    assert (found["agreement"], found["picks_first"]) == (1, 0.5)
    assert found["accuracy"] == found["averaged"] == found["both_correct"] == 0.75
    # Of the three of unlike length the first two go to the longer. Means .5 and 2.75: covariance
    # 3·5 + 1·1 − 2·7 − 4·.5·2.75 = −3.5; squares 18 − 1 and 75 − 30.25.
    assert found["picks_longer"] == pytest.approx(2 / 3)
    assert found["length_r"] == pytest.approx(-3.5 / math.sqrt(17 * 44.75))


def test_a_lead_of_nothing_is_a_tie():
    found = judge.figures(torch.zeros(3), torch.zeros(3), torch.tensor([1, 2, 2]), torch.zeros(3))
    assert (found["accuracy"], found["averaged"], found["agreement"]) == (0.5, 0.5, 0)
    assert found["length_r"] is None and found["picks_longer"] is None


# ----------------------------------------------------------------------------- what a model says

@pytest.mark.parametrize("reply, verdict", [
    ("Output (a)", 1), ("Output (b)", 2), ("output (B).", 2), ("[[A]]", 1), ("So: [[B]]", 2),
    ("Output (a) has a fault, so I choose Output (b).", 2), ("[[A]]? No. [[B]]", 2),
    ("Output (b) is better than Output (a).", 2), ("Not [[B]] but Output (a)", 1),
    ("", None), ("a", None), ("(a)", None), ("Output a", None), ("Output (c)", None),
    ("[A]", None), ("[[C]]", None), ("Output(a)", None), ("The first one.", None),
    ("Outputs (a) and (b) are alike", None)])
def test_parse_verdict(reply, verdict):
    assert judge.parse_verdict(reply) == verdict


def test_expected_grade_by_hand():
    probs = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1], [0.5, 0, 0, 0, 0.5], [0, 0, 0, 0.25, 0.75]])
    assert judge.expected_grade(probs.log()).tolist() == pytest.approx([3, 3, 4.75])
    # Nine tenths on other words change nothing.
    assert judge.expected_grade((probs / 10).log()).tolist() == pytest.approx([3, 3, 4.75])


def test_next_logprobs_are_the_models():
    torch.manual_seed(0)
    tokenizer = get_tokenizer("tinytown")
    model = GPT(GPTConfig(64, tokenizer.vocab_size, 2, 2, 16)).eval()
    contexts = [tokenizer.encode(text) for text in ("Ada lives at", "Ben", "Cora eats soup. Ada")]
    for replies in ((" One", " Two"), ("It is (a)", "It is (b)"), (" 1", " 2", " 3", " 4", " 5")):
        found = judge.next_logprobs(model, tokenizer, contexts, replies)
        ids = [tokenizer.encode(reply) for reply in replies]
        same = next(i for i, column in enumerate(zip(*ids)) if len(set(column)) > 1)
        for row, context in zip(found, contexts):
            tokens = torch.tensor([context + ids[0][:same]])
            logprobs = model(tokens)[0, -1].log_softmax(-1)
            assert row.tolist() == pytest.approx([logprobs[one[same]].item() for one in ids],
                                                 abs=1e-5)


# ----------------------------------------------------------------------------- Tinytown

def test_an_annotator_votes_by_gold_length_and_place():
    messages = conversation("Where does Ada live?")
    good, bad = (Response([], text, True) for text in ("Ada lives at the farm.", "I do not care."))
    apart = gold_score(messages, good.text) - gold_score(messages, bad.text)
    draw = random.Random(0)
    assert judge.vote(draw, Annotator(0, 0), messages, good, bad) == pytest.approx(apart)
    assert judge.vote(draw, Annotator(0, 0), messages, bad, good) == pytest.approx(-apart)
    assert judge.vote(draw, Annotator(0, 0.4), messages, good, bad) == pytest.approx(apart + 0.02)
    for pair in ((good, bad), (bad, good)):
        assert judge.vote(draw, Annotator(0, 0, first=0.5), messages, *pair) == pytest.approx(
            judge.vote(draw, Annotator(0, 0), messages, *pair) + 0.5)


def ranking(question: str, *texts: str) -> str:
    return json.dumps({"messages": conversation(question), "responses": [
        {"text": text, "score": i, "ended": text != "Endless"} for i, text in enumerate(texts)]})


def test_comparisons_are_written_from_votes(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "ANNOTATORS", [Annotator(0, 0)])
    right, wrong = "Ada lives at the mill.", "I do not care."
    (tmp_path / "some.jsonl").write_text("\n".join(
        ranking("Hello.\nHello.\nWhere does Ada live?" if i % 2 else "Where does Ada live?",
                right, wrong, "Endless") for i in range(40)))
    monkeypatch.setattr(judge, "gold_score", lambda _, text: float(text == right))
    texts = judge.comparisons(str(tmp_path / "some.jsonl"), 1)
    assert len(texts) == 40
    assert set(texts) == {
        f"Ada asked: {asked}\nOne said: {one}\nTwo said: {two}\nDan said: {best} is better."
        for asked in ("Where does Ada live?", "Hello. Hello. Where does Ada live?")
        for one, two, best in ((right, wrong, "One"), (wrong, right, "Two"))}


def test_comparisons_hold_no_prompt_of_validation_or_test(town):
    texts = judge.comparisons(str(town / "rank/rankings.jsonl"), 1)
    asked = {re.match(r"Ada asked: (.*)", text)[1] for text in texts}
    rows = [json.loads(line) for line in (town / "rank/rankings.jsonl").read_text().splitlines()]
    known = {" ".join(one["content"] for one in row["messages"]): row["messages"] for row in rows}
    assert asked and {split_of(known[text]) for text in asked} == {"rank"}
    assert texts == judge.comparisons(str(town / "rank/rankings.jsonl"), 1)
    assert all(re.search(r"\nDan said: (One|Two) is better\.$", text) for text in texts)


def test_pairs_are_of_one_prompt_and_far_enough_apart(monkeypatch):
    monkeypatch.setattr(judge, "gold_score", lambda _, text: float(text))
    texts = ["1", "0.5", "0.25", "0.24", "0.125", "0.5", "0.75", "0"]
    flat = [Response([], text, text != "0.125") for text in texts]
    prompts = [Prompt([{"role": "user", "content": name}], []) for name in "ab"]
    pairs = judge.in_pairs(prompts, flat, judge.Config(samples=4, gap=0.02))
    # 0.25 and 0.24 are too close; 0.125 never ended, so that 0.5 goes with 0.75, 0 with none.
    assert [(prompt.messages[0]["content"], one.text, two.text, apart)
            for prompt, one, two, apart in pairs] == [("a", "1", "0.5", 0.5),
                                                      ("b", "0.5", "0.75", -0.25)]
    with pytest.raises(InputError, match="--gap 1: no two answers are further apart"):
        judge.in_pairs(prompts, flat, judge.Config(samples=4, gap=1.0))


def test_tinytown_end_to_end(town, tmp_path, capsys):
    found = judge.measure(judge.Config(run=str(town), out=str(tmp_path), steps=4, max_new_tokens=16,
                                       gap=0.0))
    assert list(found) == ["grade each", "One/Two", "reward model", "one annotator", "the longer"]
    for name in ("grade each", "reward model"):
        one = found[name]["all"]
        assert (one["agreement"], one["picks_first"]) == (1, 0.5)
        assert one["accuracy"] == one["averaged"] == one["both_correct"]
    assert found["the longer"]["all"]["picks_longer"] == 1
    assert set(json.loads((tmp_path / "table.json").read_text())) == set(found)
    assert "| One/Two | 0." in capsys.readouterr().out


# ----------------------------------------------------------------------------- LLMBar

ROW = {"input": "Name a colour.", "output_1": "Red.", "output_2": "Colours are a wide topic.",
       "label": 1}


@pytest.fixture
def bar(tmp_path):
    """A small LLMBar and a new model that can read it."""
    folder = tmp_path / "llmbar"
    folder.mkdir()
    rows = [ROW | {"input": f"Name {i} colours.", "label": 1 + i % 2} for i in range(10)]
    (folder / "natural.json").write_text(json.dumps(rows))
    (folder / "adversarial_manual.json").write_text(json.dumps(
        [row | {"output_2": "No."} for row in rows[:3]]))
    torch.manual_seed(0)
    tokenizer = get_tokenizer("tinytown")
    save_model(tmp_path / "model", GPT(GPTConfig(1500, tokenizer.vocab_size, 1, 2, 16)),
               DeviceFlags(), tokenizer)
    return llmbar.Config(data=str(folder), init=str(tmp_path / "model"), out=str(tmp_path / "out"),
                         notes=4)


def test_items_of_llmbar(bar):
    sets = llmbar.read_items(bar.data)
    assert {name: len(items) for name, items in sets.items()} == {"natural": 10,
                                                                  "adversarial_manual": 3}
    assert sets["natural"][1] == llmbar.Item("Name 1 colours.", (ROW["output_1"], ROW["output_2"]),
                                            2)
    assert [len(items) for items in llmbar.read_items(bar.data, most=2).values()] == [2, 2]


def test_an_instruction_with_an_input():
    row = ROW | {"instruction": "Sum up."}
    assert llmbar.read_item(row, "").asked == "Sum up.\n\nName a colour."


def test_llmbar_itself(shared_data):
    sets = llmbar.read_items(str(shared_data / "llmbar"))
    assert {name: len(items) for name, items in sets.items()} == {
        "natural": 100, "adversarial_neighbor": 134, "adversarial_gptinst": 92,
        "adversarial_gptout": 47, "adversarial_manual": 46}


@pytest.mark.parametrize("field, value, words", [
    ("input", None, "field instruction: expected a text, found nothing"),
    ("output_1", None, "field output_1: expected a text, found nothing"),
    ("output_2", 7, "field output_2: expected a text, found 7"),
    ("output_2", " ", "field output_2: expected a text, found ' '"),
    ("label", None, "field label: expected 1 or 2, the better output, found nothing"),
    ("label", 3, "field label: expected 1 or 2"), ("label", "1", "field label: expected 1 or 2")])
def test_broken_items_are_named(bar, tmp_path, field, value, words):
    rows = [ROW, ROW | {field: value}]
    (tmp_path / "llmbar/natural.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=rf"natural\.json, row 2: {words}.*; [a-z]+ .*item"):
        llmbar.measure(bar)


def test_a_folder_without_llmbar(bar, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path / "out"):
        bar.data = str(folder)
        with pytest.raises(InputError, match="--data .*: expected a folder with LLMBar's files"):
            llmbar.measure(bar)


def test_a_judge_must_be_named(bar):
    bar.init = ""
    with pytest.raises(InputError, match="--init: name the model that judges"):
        llmbar.measure(bar)


def test_a_context_that_is_too_short(bar, town):
    bar.init = str(town / "sft")
    with pytest.raises(InputError, match="no row fits: all 3 exceed"):
        llmbar.measure(bar)


def test_llmbar_end_to_end_and_again(bar, tmp_path, monkeypatch, capsys):
    found = llmbar.measure(bar)
    assert set(found) == {"natural", "adversarial_manual"}
    assert list(found["natural"]) == ["the longer", "vanilla", "guided"]
    assert found["natural"]["the longer"]["accuracy"] == 0.5
    assert found["natural"]["vanilla"]["items"] == 10
    assert "| natural | vanilla | 10 | 0." in capsys.readouterr().out
    path = tmp_path / "out/verdicts.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * 13
    # Cut off in the middle of a line: the last one is judged again, no other is.
    path.write_text("\n".join(lines)[:-9])
    asked, right = [], llmbar.Chat.judge

    def counted(chat, items, guided):
        asked.extend(items)
        return right(chat, items, guided)
    monkeypatch.setattr(llmbar.Chat, "judge", counted)
    assert llmbar.measure(bar)["natural"]["vanilla"] == found["natural"]["vanilla"]
    assert asked == llmbar.read_items(bar.data)["natural"][-1:]
    again = path.read_text().splitlines()
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["key"] == json.loads(lines[-1])["key"]
    monkeypatch.setattr(llmbar, "QUESTION", llmbar.QUESTION + " ")    # another prompt is asked anew
    llmbar.measure(bar)
    assert len(asked) == 1 + 2 * 13


def test_the_judge_sees_both_orders(bar, monkeypatch):
    """Its leads are those of the prompts, asked one by one."""
    model, tokenizer = judge.load_gpt(bar.init)
    chat = llmbar.Chat(model.eval(), tokenizer, bar)
    item = llmbar.read_items(bar.data)["natural"][1]
    row, = chat.judge([item], guided=False)
    for order, (one, two) in (("shown", item.outputs), ("swapped", item.outputs[::-1])):
        text = llmbar.QUESTION.format(guide="", asked=item.asked, first=one, second=two)
        ids = tokenizer.render_prompt([{"role": "user", "content": text}])
        logits = model(torch.tensor([ids + tokenizer.encode("Output (")]))[0, -1]
        a, b = (tokenizer.encode(f"Output ({letter})")[-2] for letter in "ab")
        assert row[order] == pytest.approx((logits[a] - logits[b]).item(), abs=1e-4)


def test_written_verdicts(bar, monkeypatch):
    bar.written = 8

    def write(chat, prompts, most):
        if most == bar.notes:
            return ["Is it a colour?"] * len(prompts)
        assert most == 8
        return ["I pick Output (a)." if "Output (a): Red." in prompt.messages[0]["content"]
                else "Output (b)" for prompt in prompts]
    monkeypatch.setattr(llmbar.Chat, "write", write)
    found = llmbar.measure(bar)["natural"]["guided"]
    assert found["agreement"] == 1 and found["accuracy"] == 0.5      # always "Red."


def test_replies_that_name_nothing_are_left_out_or_end_the_run(bar, monkeypatch):
    bar.written, known = 8, "Name 1 colours."
    monkeypatch.setattr(llmbar.Chat, "write", lambda chat, prompts, most: [
        "[[A]]" if known in prompt.messages[0]["content"] else "Hm." for prompt in prompts])
    found = llmbar.measure(bar)
    assert found["natural"]["vanilla"]["items"] == 1
    bar.out, known = bar.out + "2", "nothing"
    with pytest.raises(InputError, match=r"adversarial_manual, vanilla: no item of 3 has a reply "
                                         r"that names .* the first is 'Hm\.'; leave out --written"):
        llmbar.measure(bar)


# ----------------------------------------------------------------------------- mutants

MUTANTS = [
    (judge, "swap_agreement", "the swapped verdict not mapped back",
     Edit("3 - verdict for", "verdict for"), test_swap_agreement_by_hand,
     test_a_judge_that_always_picks_the_first),
    (judge, "swap_agreement", "agreement on places", Edit("zip(shown, back)) / n",
                                                          "zip(shown, other)) / n"),
     test_swap_agreement_by_hand, test_a_perfect_judge_and_one_that_is_always_wrong),
    (judge, "swap_agreement", "disagreement wrong twice", Edit("sum(right) / (2 * n)",
                                                               "right.count(2) / n"),
     test_swap_agreement_by_hand, test_a_pair_on_which_the_orders_disagree_counts_half),
    (judge, "swap_agreement", "right in either order", Edit("right.count(2)",
                                                            "(n - right.count(0))"),
     test_swap_agreement_by_hand),
    (judge, "swap_agreement", "the first place of one order",
     Edit("shown.count(1) + other.count(1)", "2 * shown.count(1)"),
     test_without_gold_nothing_is_right),
    (judge, "both_orders", "the sum", Edit("shown - swapped", "shown + swapped"),
     test_both_orders_cancel_a_taste_for_a_place),
    (judge, "parse_verdict", "the first verdict", Edit("named[-1]", "named[0]"),
     *(lambda reply=reply: test_parse_verdict(reply, 2)
       for reply in ("[[A]]? No. [[B]]", "Output (a) has a fault, so I choose Output (b)."))),
    (judge, "parse_verdict", "what it is better than", Edit("(?<!than )", ""),
     lambda: test_parse_verdict("Output (b) is better than Output (a).", 2)),
    (judge, "expected_grade", "other words count", Edit("softmax(-1)", "exp()"),
     test_expected_grade_by_hand),
    (judge, "expected_grade", "grades from 0", Edit("arange(1, logprobs.shape[-1] + 1",
                                                    "arange(0, logprobs.shape[-1]"),
     test_expected_grade_by_hand),
    (judge, "next_logprobs", "common words left out", Edit("context + ids[0][:same]", "context"),
     test_next_logprobs_are_the_models),
    (judge, "figures", "lengths by place", Edit("2 * verdicts[1] - 3", "3 - 2 * verdicts[1]"),
     test_figures_of_a_judge_without_a_taste_for_a_place),
    (judge, "figures", "equal lengths count", Edit("[:, longer != 0]", ""),
     test_figures_of_a_judge_without_a_taste_for_a_place),
    (judge, "vote", "places not seen", Edit("answer.text, place)", "answer.text, 1)"),
     test_an_annotator_votes_by_gold_length_and_place)]


test_a_classic_wrong_answer_is_caught = catching(MUTANTS)
