"""LIMA: votes, choice by use case, the sets of the table."""
import json
import os
import random

import pytest
from test_mutants import Edit, catching

from common.errors import InputError
from data.tinytown.teachers import demonstrations
from data.tinytown.town import split_of
from systems import lima


def rows_of(*cases: str) -> list[dict]:
    return [{"use_case": case, "place": place} for place, case in enumerate(cases)]


def places(rows: list[dict]) -> list[int]:
    return [row["place"] for row in rows]


ROWS = rows_of("a", "a", "a", "a", "b", "b", "b", "b", "c", "c")
SCORES = [9., 8., 7., 6., 5., 4., 3., 2., 1., 0.]


# ----------------------------------------------------------------------------- choosing

def test_use_cases_keep_their_shares():
    # Of 5 rows: 4/10, 4/10 and 2/10 of 5 are 2, 2 and 1.
    assert places(lima.stratified(ROWS, SCORES, 5)) == [0, 1, 4, 5, 8]


def test_equal_shares_of_use_cases():
    assert places(lima.stratified(ROWS, SCORES, 3, equal=True)) == [0, 4, 8]
    assert places(lima.stratified(ROWS, SCORES, 6, equal=True)) == [0, 1, 4, 5, 8, 9]


def test_what_a_use_case_lacks_goes_to_the_best_that_are_left():
    # Three of each are wanted, c has two: the ninth is the best of what is left, place 3.
    assert places(lima.stratified(ROWS, SCORES, 9, equal=True)) == [0, 1, 2, 4, 5, 6, 8, 9, 3]


def test_rounding_leaves_no_place_empty():
    # Of 4 rows: 1.6, 1.6 and 0.8 are 1, 1 and 0; two places are left.
    assert places(lima.stratified(ROWS, SCORES, 4)) == [0, 4, 1, 2]
    assert places(lima.stratified(ROWS, SCORES, 10)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_the_highest_scores_are_taken_in_any_order_of_rows():
    order = random.Random(3).sample(range(10), 10)
    shuffled = lima.stratified([ROWS[i] for i in order], [SCORES[i] for i in order], 5)
    assert sorted(places(shuffled)) == [0, 1, 4, 5, 8]


def test_more_rows_than_there_are():
    with pytest.raises(ValueError, match="11 of 10 rows"):
        lima.stratified(ROWS, SCORES, 11)


def test_careful_votes_order_rows_by_gold_and_careless_ones_do_not():
    pool = demonstrations("sft", 2000, 1)
    good = [row["quality"] == "good" for row in pool]

    def kept(careless: float) -> float:
        scores = lima.votes(pool, careless, random.Random(0))
        best = sorted(range(len(pool)), key=lambda place: -scores[place])[:200]
        return sum(good[place] for place in best) / 200
    share = sum(good) / len(good)
    assert kept(0) > 0.9
    assert kept(1) == pytest.approx(share, abs=0.1)          # votes for other rows say nothing
    # Of the votes that are high, those that are the row's own are for good rows.
    assert kept(0.5) == pytest.approx((kept(0) + share) / 2, abs=0.1)


# ----------------------------------------------------------------------------- the sets

@pytest.fixture(scope="module")
def sets() -> dict[str, list[dict]]:
    pool, draw = demonstrations("sft", 8000, 1), random.Random(0)
    return lima.sets_of(pool, lima.votes(pool, 0.25, draw), draw)


def test_the_sets_are_as_large_as_their_names_say(sets):
    for name in ("random_1000", "voted_equal_1000", "stories_1000", "voted_250", "voted_1000",
                 "voted_4000", "voted_8000"):
        assert len(sets[name]) == int(name.rpartition("_")[2])
    assert len(sets["all_10000"]) == 8000                   # all there are


def test_additions_are_the_only_rows_of_their_kind(sets):
    for name, kind, counts in (("turns", lima.several_turns, (0, 30, 100)),
                               ("lists", lima.asks_for_a_list, (0, 6, 30))):
        for count in counts:
            rows = sets[f"{name}_{count}"]
            assert sum(kind(row["messages"][:-1]) for row in rows) == count
            assert rows[:len(rows) - count] == sets[f"{name}_0"]
    assert all("story" in row["messages"][0]["content"] for row in sets["stories_1000"])


def test_no_set_holds_a_prompt_of_validation_or_test(sets):
    prompts = [row["messages"][:-1] for rows in sets.values() for row in rows]
    assert {split_of(messages) for messages in prompts} == {"sft"}


# ----------------------------------------------------------------------------- the command

def test_the_command_end_to_end(town, tmp_path, capsys):
    lines = (town / "data/sft.jsonl").read_text()
    for stage in ("base", "sft", "rm"):
        (tmp_path / stage).symlink_to(town / stage)
    (tmp_path / "data").mkdir()
    for name in ("test", "rank_val"):
        (tmp_path / f"data/{name}.jsonl").symlink_to(town / f"data/{name}.jsonl")
    (tmp_path / "data/base.txt").symlink_to(town / "data/base.txt")
    (tmp_path / "data/sft_val.jsonl").write_text(lines)
    config = lima.Config(run=str(tmp_path), pool=8000, steps=2, only=("voted_250", "lists_0"))
    lima.measure(config)
    home = tmp_path / "systems/lima"
    found = json.loads((home / "table.json").read_text())
    assert set(found["table"]) == {"sft", "voted_250", "lists_0"}
    assert found["sets"]["voted_250"]["rows"] == 250 and (home / "lima.png").exists()
    assert "| voted_250 | 250 |" in capsys.readouterr().out
    stamp = (home / "voted_250/model.pt").stat().st_mtime_ns
    lima.measure(config)                                    # what is trained is not trained anew
    assert (home / "voted_250/model.pt").stat().st_mtime_ns == stamp
    os.utime(town / "base/model.pt")                        # … unless the base is a newer one
    lima.measure(config)
    assert (home / "voted_250/model.pt").stat().st_mtime_ns > stamp
    with pytest.raises(InputError, match="--only nonsense: expected some of all_10000"):
        lima.measure(lima.Config(run=str(tmp_path), pool=8000, only=("nonsense",)))


MUTANTS = [
    (lima, "stratified", "the lowest scores", Edit("-scores[place]", "scores[place]"),
     test_use_cases_keep_their_shares),
    (lima, "stratified", "shares of the rows always", Edit("if equal else", "if False else"),
     test_equal_shares_of_use_cases),
    (lima, "stratified", "no shares", Edit('if quota[rows[place]["use_case"]]', "if count"),
     test_use_cases_keep_their_shares),
    (lima, "stratified", "places left empty", Edit("[:count - len(taken)]", "[:0]"),
     test_rounding_leaves_no_place_empty),
    (lima, "votes", "careless votes are careful", Edit("draw.random() < careless", "False"),
     test_careful_votes_order_rows_by_gold_and_careless_ones_do_not),
]


test_a_classic_wrong_answer_is_caught = catching(MUTANTS)
