"""LIMA's choice among the demonstrations of a file."""
import json
import random

import pytest
import torch
from test_mutants import Edit, catching

from common.errors import InputError
from common.run import load_gpt
from systems import lima_file as system


def row(case: str, answer: str) -> dict:
    return {"use_case": case, "messages": [{"role": "user", "content": f"{case} it."},
                                           {"role": "assistant", "content": answer}]}


POOL = [row("Say", "a"), row("Say", "a b c d"), row("Say", "a b"), row("Say", "a b c"),
        row("Add", "a b c d e"), row("Add", "a")]
GRADES = [1.0, 2.0, 5.0, 4.0, 3.0, 3.5]


def test_sets_by_hand():
    found = system.sets_of_file(POOL, GRADES, 3, random.Random(0))
    assert {name: len(rows) for name, rows in found.items()} == {
        "all_6": 6, "random_3": 3, "graded_3": 3, "longest_3": 3, "say_3": 3}
    assert found["graded_3"] == [POOL[2], POOL[3], POOL[5]]     # two of four, one of two
    assert found["longest_3"] == [POOL[4], POOL[1], POOL[3]]
    assert found["say_3"] == POOL[:3]
    assert all(one in POOL for one in found["random_3"])


def test_a_use_case_that_runs_out_is_named_by_its_size():
    assert "say_4" in system.sets_of_file(POOL, GRADES, 5, random.Random(0))


@pytest.mark.parametrize("said, case", [("Rewrite: this", "Rewrite"), ("what is it?", "What")])
def test_the_use_case_is_what_the_user_says_first(said, case):
    system_turn = {"role": "system", "content": "Be brief."}
    assert system.use_case([system_turn, {"role": "user", "content": said}]) == case


def test_grades_are_of_the_whole_pair(town):
    """Between 1 and 5; another answer or another instruction has another grade."""
    model, tokenizer = load_gpt(str(town / "sft"))
    same = [row("Say", "Fine."), row("Say", "Fine."), row("Say", "No."), row("Add", "Fine.")]
    found = system.grades(model.eval(), tokenizer, same)
    assert all(1 <= grade <= 5 for grade in found)
    assert torch.isclose(torch.tensor(found[0]), torch.tensor(found[1]))
    assert found[0] != found[2] and found[0] != found[3]


def test_the_command_end_to_end(town, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(system, "HELD_OUT", 20)
    config = system.Config(data=(str(town / "data/sft.jsonl"),), init=str(town / "sft"),
                           val=str(town / "data/sft.jsonl"), out=str(tmp_path), chosen=30, steps=4)
    found = system.measure(config)
    assert found == json.loads((tmp_path / "table.json").read_text())
    assert list(found)[:4] == ["before", "all_130", "random_30", "graded_30"]
    assert found["graded_30"]["grade"] > found["random_30"]["grade"]
    assert found["longest_30"]["words"] > found["random_30"]["words"]
    losses = [one["loss, held out"] for one in found.values()]
    assert len(set(losses)) == len(losses)                  # every set moves the model elsewhere
    assert "| before | 0 |" in capsys.readouterr().out
    held = (tmp_path / "held_out.jsonl").read_text().splitlines()
    assert len(held) == 20
    for name in list(found)[1:]:                            # nothing held out is trained on
        assert not set(held) & set((tmp_path / f"{name}.jsonl").read_text().splitlines())
    stamp = (tmp_path / "graded_30/model.pt").stat().st_mtime_ns
    system.measure(config)                                  # what is trained is not trained anew
    assert (tmp_path / "graded_30/model.pt").stat().st_mtime_ns == stamp


def test_too_few_rows_are_one_line(town, tmp_path):
    with pytest.raises(InputError, match="--data: 150 demonstrations; 100 are held out, so lower "
                                         "--chosen 250 to 50 at most"):
        system.measure(system.Config(data=(str(town / "data/sft.jsonl"),), out=str(tmp_path),
                                     init=str(town / "sft")))


def test_no_model_is_one_line(town):
    with pytest.raises(InputError, match="--init: .*name a chat model"):
        system.measure(system.Config(data=("rows.jsonl",)))


MUTANTS = [
    (system, "sets_of_file", "the shortest", Edit("-words[place]", "words[place]"),
     test_sets_by_hand),
    (system, "sets_of_file", "the first of the pool",
     Edit("stratified(pool, scores, count)", "pool[:count]"), test_sets_by_hand),
    (system, "sets_of_file", "named by what was asked for", Edit("len(alike)", "count"),
     test_a_use_case_that_runs_out_is_named_by_its_size),
    (system, "use_case", "the system's", Edit('if message["role"] == "user"', ""),
     lambda: test_the_use_case_is_what_the_user_says_first("what is it?", "What")),
]
test_mutants_are_caught = catching(MUTANTS)
