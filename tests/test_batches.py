"""data/batches.py: padding, buckets, rows that are too long, rankings."""
import json
import math
import random
import re

import pytest
import torch

from common.errors import InputError
from data import batches
from data.batches import (PACKED, RankingRow, Row, buckets, by_length, demonstration_rows, pad_rows,
                          prompt_rows, ranking_batch, ranking_rows, ranking_splits, response_row)
from data.readers import Ranking
from data.tokenizer import get_tokenizer

TOKENIZER = get_tokenizer("tinytown")
PAD, END = TOKENIZER.pad, TOKENIZER.end


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SHORT = [user("Where does Ada live?"), assistant("Ada lives at the mill.")]
TURNS = [user("My name is Ada."), assistant("Nice to meet you, Ada."), user("Where do I live?"),
         assistant("You live at the mill.")]


def numbers(text):
    """All numbers in a message."""
    return [int(number) for number in re.findall(r"-?\d+", text)]


# ----------------------------------------------------------------------------- padding

def test_pad_rows():
    rows = [([1, 2, 3], [False, True, True]), ([4], [False]), ([5, 6], [False, True])]
    tokens, mask, lengths = pad_rows(rows, 9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9], [5, 6, 9]]
    assert mask.tolist() == [[False, True, True], [False, False, False], [False, True, False]]
    assert lengths.tolist() == [3, 1, 2]
    assert tokens.dtype == lengths.dtype == torch.long and mask.dtype == torch.bool
    assert rows[1] == ([4], [False])                        # the rows themselves stay as they are


def test_the_mask_survives_batching():
    """The batches train on what the conversations train on: nothing lost, moved or added."""
    conversations = [TURNS, SHORT, [*SHORT, *TURNS], [user("Hi."), assistant("")]] * 5
    rows = demonstration_rows(conversations, TOKENIZER, 64)
    places = {id(row): i for i, row in enumerate(rows)}
    seen = []
    for batch in buckets(rows, 3, 1, random.Random(0)):
        tokens, mask, lengths = pad_rows(batch, PAD)
        for one, row, marks, length in zip(batch, tokens, mask, lengths):
            i = places[id(one)]
            answers = [m["content"] for m in conversations[i] if m["role"] == "assistant"]
            assert TOKENIZER.decode(row[marks].tolist()) == "".join(f"{answer}<|end|>"
                                                                    for answer in answers)
            assert (not marks[length:].any() and (row[length:] == PAD).all()
                    and (row[:length] != PAD).all())
            seen.append(i)
    assert sorted(seen) == list(range(len(conversations)))


# ----------------------------------------------------------------------------- buckets

def numbered(lengths):
    """Rows of these lengths; the first id of each is its number."""
    return [Row([i] + [0] * (length - 1), [True] * length) for i, length in enumerate(lengths)]


def numbers_of(batches):
    return [[row.ids[0] for row in batch] for batch in batches]


@pytest.mark.parametrize("count, size", [(1, 4), (8, 4), (103, 4), (1000, 7), (450, 8)])
def test_buckets_use_every_row_once_an_epoch(count, size):
    draw = random.Random(1)
    rows = numbered(draw.randint(1, 100) for _ in range(count))
    batches = numbers_of(buckets(rows, size, 2, random.Random(0)))
    each = -(-count // size)                                    # at most one is not full
    assert len(batches) == 2 * each and all(1 <= len(batch) <= size for batch in batches)
    for epoch in (batches[:each], batches[each:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(count))


def test_buckets_hold_rows_of_similar_length():
    draw = random.Random(1)
    lengths = [draw.randint(1, 100) for _ in range(800)]
    batches = numbers_of(buckets(numbered(lengths), 8, 1, random.Random(0)))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    # A random order would pad by three quarters.
    assert sum(lengths) <= padded < 1.05 * sum(lengths)
    heights = [max(lengths[i] for i in batch) for batch in batches]
    for part in (heights[:25], heights[25:50], heights[50:75], heights[75:]):
        assert 30 < sum(part) / len(part) < 70                  # no curriculum of lengths


def test_buckets_are_decided_by_the_generator():
    rows = numbered(i % 17 + 1 for i in range(200))
    assert buckets(rows, 8, 1, random.Random(0)) == buckets(rows, 8, 1, random.Random(0))
    assert buckets(rows, 8, 1, random.Random(0)) != buckets(rows, 8, 1, random.Random(1))
    two = buckets(rows, 8, 2, random.Random(0))
    assert two[:25] != two[25:]                                         # a new order every epoch
    two = list(map(frozenset, numbers_of(buckets(numbered([5] * 64), 8, 2, random.Random(0)))))
    assert not set(two[:8]) & set(two[8:])                              # and new company


# --------------------------------------------------------------------------- rows that are too long

def test_demonstrations_are_cut_while_a_response_token_remains(capsys):
    ids, mask = TOKENIZER.render(SHORT)
    first = mask.index(True)
    kept = demonstration_rows([SHORT], TOKENIZER, len(ids))
    assert kept == [(ids, mask)] and capsys.readouterr().err == ""
    for size in range(first + 1, len(ids)):
        (tokens, marks), = demonstration_rows([SHORT], TOKENIZER, size)
        assert (tokens, marks) == (ids[:size], mask[:size]) and sum(marks) == size - first >= 1
        assert END not in tokens[first:]                # the answer does not end where it was cut
        assert numbers(capsys.readouterr().err) == [1, 0, 1, size]
    for size in (1, first):
        with pytest.raises(InputError, match=f"{size} tokens"):
            demonstration_rows([SHORT], TOKENIZER, size)


def test_demonstrations_cut_and_dropped_are_counted(capsys):
    long_answer = [user("Hi."), assistant("Ada keeps a goat. " * 10)]
    long_prompt = [user("Hi. " * 20), assistant("Hello.")]
    rows = demonstration_rows([SHORT, long_answer, long_prompt, SHORT, long_answer], TOKENIZER, 20)
    assert [len(tokens) for tokens, _ in rows] == [len(TOKENIZER.render(SHORT)[0]), 20] * 2
    assert all(len(tokens) == len(mask) and any(mask) for tokens, mask in rows)
    error = capsys.readouterr().err
    assert (numbers(error) == [5, 1, 2, 20] and "1 dropped" in error and "2 cut" in error
            and error.count("\n") == 1)


def test_a_conversation_cut_after_its_first_answer_keeps_that_answer(capsys):
    ids, mask = TOKENIZER.render(TURNS)
    size = len(TOKENIZER.render(TURNS[:3])[0])
    (tokens, marks), = demonstration_rows([TURNS], TOKENIZER, size)
    assert TOKENIZER.decode([id for id, mark in zip(tokens, marks) if mark]) == (
        "Nice to meet you, Ada.<|end|>")


def ranking(*responses, messages=None, **keywords):
    return Ranking(messages or SHORT[:1], list(responses),
                   [float(-i) for i in range(len(responses))], **keywords)


def test_rankings_with_a_row_that_is_too_long_are_dropped_whole(capsys):
    fits, too_long = ranking("At the mill.", "No."), ranking("No.", "At the mill. " * 10, "Yes.")
    kept = ranking_rows([fits, too_long, fits], TOKENIZER, 24)
    assert [len(row.responses) for row in kept] == [2, 2] and kept[0] == kept[1]
    assert kept[0].scores == fits.scores
    error = capsys.readouterr().err
    assert numbers(error) == [3, 1, 0, 24] and "1 dropped" in error
    longest = max(len(row.prompt + response) for row in kept for response in row.responses)
    assert len(ranking_rows([fits], TOKENIZER, longest)) == 1
    for limits in ((longest - 1,), (99, longest - 1)):                  # the context, --max_tokens
        with pytest.raises(InputError, match=f"{longest - 1} tokens"):
            ranking_rows([fits], TOKENIZER, *limits)


def test_rankings_without_a_pair_are_left_out_and_counted(tmp_path, capsys):
    rows = [{"prompt": "Who?", "responses": [{"text": "Ada.", "score": i % 3},
                                             {"text": "No.", "score": 1}]} for i in range(6)]
    path = tmp_path / "rankings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, held_out = ranking_splits((str(path),), "", TOKENIZER, 99)
    assert ([row.scores[0] for row in kept] == [2.0, 0.0, 2.0]
            and [row.scores[0] for row in held_out] == [0.0])
    assert "6 rankings: 2 left out" in capsys.readouterr().err
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(InputError, match="every ranking is tied"):
        ranking_splits((str(path),), "", TOKENIZER, 99)


def test_ten_folds_hold_out_every_ranking_once(tmp_path):
    rows = [{"prompt": f"Who is {i}?", "chosen": "Ada.", "rejected": "No."} for i in range(23)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def asked(kept):
        return [TOKENIZER.decode(row.prompt[1:-2]) for row in kept]

    seen = []
    for fold in range(10):
        kept, held_out = ranking_splits((str(path),), "", TOKENIZER, 99, fold)
        assert sorted(asked(kept) + asked(held_out)) == sorted(row["prompt"] for row in rows)
        seen += asked(held_out)
    assert sorted(seen) == sorted(row["prompt"] for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    with pytest.raises(InputError, match="--fold 4: there are 4 rankings"):
        ranking_splits((str(path),), "", TOKENIZER, 99, 4)
    with pytest.raises(InputError, match="--fold 4: has no meaning with --val"):
        ranking_splits((str(path),), str(path), TOKENIZER, 99, 4)


@pytest.mark.parametrize("prompt, responses", [(9, [3, 4]), (200, [60, 60, 7]), (400, [100, 100]),
                                               (10, [30] * 9), (1, [1])])
def test_the_shape_of_a_packed_ranking_is_known_before(prompt, responses):
    row = RankingRow([5] * prompt, [[6] * n for n in responses], [0.0] * len(responses))
    assert row.shape == tuple(ranking_batch([row], PAD).tokens.shape)
    assert len(row.ids) == prompt + sum(responses)


@pytest.mark.parametrize("prompt", [SHORT[:1], TURNS[:3]])
def test_ranked_responses_are_rendered_like_demonstrations(prompt):
    """The reward model reads what the policy is trained to write: same ids, same end token."""
    texts = ("At the mill.", "<|end|> no", "")
    row, = ranking_rows([ranking(*texts, messages=prompt)], TOKENIZER, 99)
    start, responses = row.prompt, row.responses
    assert start == TOKENIZER.render_prompt(prompt)
    for text, response in zip(texts, responses, strict=True):
        ids, marks = TOKENIZER.render([*prompt, assistant(text)])
        assert start + response == ids and all(marks[len(start):])
        assert len(response) == len(TOKENIZER.encode(text)) + 1 and response[-1] == END


def test_response_row():
    assert response_row([1, 2, 3], [4, 5]) == ([1, 2, 3, 4, 5], [False, False, False, True, True])
    assert response_row([1], []) == ([1], [False])


def test_prompts_that_leave_no_room_are_dropped_and_counted(capsys):
    long_prompt = [user("Hi. " * 20)]
    kept = prompt_rows([SHORT[:1], long_prompt, TURNS[:3]], TOKENIZER, 30)
    conversations, ids = map(list, zip(*kept))
    assert conversations == [SHORT[:1], TURNS[:3]]
    assert ids == [TOKENIZER.render_prompt(messages) for messages in conversations]
    assert all(row[-1] == TOKENIZER.role_ids["assistant"] for row in ids)
    error = capsys.readouterr().err
    assert numbers(error) == [3, 1, 0, 30] and "1 dropped" in error
    exact = len(ids[0])
    assert prompt_rows([SHORT[:1]], TOKENIZER, exact) == kept[:1]
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=f"{exact - 1} tokens"):
        prompt_rows([SHORT[:1]], TOKENIZER, exact - 1)


def test_when_nothing_fits_the_complaint_is_one_line_with_a_remedy():
    for read in (demonstration_rows, prompt_rows):
        with pytest.raises(InputError, match="all 2 exceed 3 tokens.*block_size") as caught:
            read([SHORT, TURNS], TOKENIZER, 3)
        assert len(str(caught.value).splitlines()) == 1


# ----------------------------------------------------------------------------- rankings

RANKINGS = [ranking("At the mill.", "No.", "Ada lives at the mill. Ada keeps a goat.", margin=0.5),
            ranking("I do not know Rex.", "Rex.", messages=[user("Who is Rex?")]),
            ranking("You live at the mill.", "Maybe.", "In a house", "", "At the inn.",
                    messages=TURNS[:3], margin=2.0)]


def the_batch(rankings=RANKINGS):
    rows = ranking_rows(rankings, TOKENIZER, 99)
    return ranking_batch(rows, PAD), [(row.prompt, row.responses) for row in rows]


def read(batch):
    """What the model reads when it stands at each response's last token.

    Returns {(ranking, response): ids by position}.
    """
    found = {}
    for (b, k), (r, t) in zip(batch.mask.nonzero().tolist(), batch.ends.nonzero().tolist(),
                              strict=True):
        columns = [s for s in range(t + 1) if batch.attention_mask[r, t, s]]
        place = dict(zip(batch.positions[r, columns].tolist(), batch.tokens[r, columns].tolist()))
        # The prompt's last token stands in the row once for every response; each sees one of them.
        assert len(place) == len(columns), "two tokens at one position"
        found[b, k] = [place[i] for i in range(len(place))]
    return found


@pytest.mark.parametrize("row_length", [1, 30, 60, PACKED])
def test_every_response_is_read_behind_its_prompt_and_alone(monkeypatch, row_length):
    monkeypatch.setattr(batches, "PACKED", row_length)
    batch, groups = the_batch()
    assert read(batch) == {(b, k): prompt + response for b, (prompt, responses) in enumerate(groups)
                           for k, response in enumerate(responses)}
    assert len(batch.tokens) >= 3 and (row_length > 1 or len(batch.tokens) == 10)
    longest = max(len(prompt + responses[0]) for prompt, responses in groups)
    assert batch.tokens.shape[1] <= max(row_length, longest)
    assert int(batch.response_mask.sum()) == sum(len(response) for _, responses in groups
                                                 for response in responses)


def test_ranking_batch_holds_whole_rankings():
    batch, _ = the_batch()
    assert batch.mask.tolist() == [[True] * 3 + [False] * 2, [True] * 2 + [False] * 3, [True] * 5]
    assert batch.scores.tolist() == [[0, -1, -2, 0, 0], [0, -1, 0, 0, 0], [0, -1, -2, -3, -4]]
    assert batch.margin.tolist() == [[0.5], [0.0], [2.0]]
    assert batch.mask.dtype == torch.bool and batch.scores.is_floating_point()


def test_prompts_and_responses_are_computed_once():
    """K responses cost their own tokens: not one row each, nor one for each of K(K − 1)/2 pairs."""
    batch, groups = the_batch()
    assert len(batch.tokens) == 3
    real = sum(len(prompt) - 1 + sum(1 + len(response) for response in responses)
               for prompt, responses in groups)
    # No row of softmax is empty.
    assert int((batch.attention_mask.sum(-1) > 0).sum()) == batch.tokens.numel()
    assert int((batch.tokens != PAD).sum()) == real


def test_sums_and_ends_of_responses():
    batch, groups = the_batch()
    sums = batch.sums(torch.where(batch.response_mask, batch.tokens.double(), math.nan))
    ends = batch.grid(torch.where(batch.response_mask, batch.tokens.double(), math.nan)[batch.ends])
    for b, (_, responses) in enumerate(groups):
        for k in range(5):
            assert sums[b, k] == (sum(responses[k]) if k < len(responses) else 0)
            assert ends[b, k] == (responses[k][-1] if k < len(responses) else 0)


def test_batch_mates_do_not_move_a_ranking():
    together = read(the_batch()[0])
    for b, one in enumerate(RANKINGS):
        alone = the_batch([one])[0]
        assert read(alone) == {(0, k): ids for (ranking, k), ids in together.items()
                               if ranking == b}
        assert alone.mask.all()


def test_by_length():
    assert by_length(numbered([3, 1, 2, 1]), 2) == [[1, 3], [2, 0]]
    assert by_length([], 2) == []
