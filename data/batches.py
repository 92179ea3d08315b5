"""Rows of token ids to batches: length limits, bucketing, padding on the right, whole rankings.

A row carries its ids: `Row` one sequence and its response mask, `Prompt` a conversation to be
answered, `RankingRow` a prompt with its K responses and their scores.
"""
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import InputError
from data.readers import Ranking, read_demonstrations, read_prompts, read_rankings
from data.tokenizer import Tokenizer

# Tokens: a ranking's responses share a row up to this length. Longer rows would gain little from
# the prompt they share and lose more in attention, whose cost per token grows with the row.
PACKED = 256


class Row(NamedTuple):
    """One sequence, prompt and response: token ids and their response mask, aligned."""
    ids: list[int]
    mask: list[bool]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens of the longest) that this takes in a batch."""
        return 1, len(self.ids)


class Prompt(NamedTuple):
    """A conversation that waits for an answer, and its ids up to where the answer begins."""
    messages: list[dict]
    ids: list[int]


@dataclass(slots=True)
class RankingRow:
    """A ranking in token ids: one prompt, K responses (end token included, if they ended), K
    scores."""
    prompt: list[int]
    responses: list[list[int]]     # at least a token each
    scores: list[float]            # higher = better, ties allowed
    margin: float = 0.0
    ref_logprobs: list[float] | None = None    # K, log π_ref(y|x), where an objective needs them

    @property
    def ids(self) -> list[int]:
        """The prompt and all responses, one after the other."""
        return self.prompt + sum(self.responses, [])

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens of the longest) that `ranking_batch` makes of it."""
        rows = []
        for response in self.responses:
            if not rows or rows[-1] + 1 + len(response) > PACKED:
                rows.append(len(self.prompt) - 1)
            rows[-1] += 1 + len(response)
        return len(rows), max(rows)

    @property
    def untied(self) -> bool:
        """Whether any response is better than another."""
        return len(set(self.scores)) > 1


# ----------------------------------------------------------------------------- text to rows

def demonstration_rows(conversations: list[list[dict]], tokenizer: Tokenizer, block_size: int,
                       max_tokens: int = 0) -> list[Row]:
    """Render conversations for SFT, up to the last response token.

    A row longer than block_size, or than max_tokens if that is set, is cut there if a response
    token remains, else dropped; both are counted on stderr. A cut row has lost its last end token,
    as it should: the text does not end there.
    """
    block_size = min(max_tokens or block_size, block_size)
    rows, cut = [], 0
    for messages in conversations:
        ids, mask = tokenizer.render(messages)
        length = len(mask) - mask[::-1].index(True)
        ids, mask = ids[:length], mask[:length]
        if any(mask[:block_size]):
            cut += len(ids) > block_size
            rows.append(Row(ids[:block_size], mask[:block_size]))
    report(len(conversations), len(conversations) - len(rows), cut, block_size)
    return rows


def prompt_rows(conversations: list[list[dict]], tokenizer: Tokenizer, room: int) -> list[Prompt]:
    """Render prompts; those over `room` tokens are dropped and counted on stderr."""
    rows = [Prompt(messages, tokenizer.render_prompt(messages)) for messages in conversations]
    kept = [row for row in rows if len(row.ids) <= room]
    report(len(rows), len(rows) - len(kept), 0, room)
    return kept


def read_prompt_rows(paths: tuple[str, ...], tokenizer: Tokenizer, room: int) -> list[Prompt]:
    """The prompts of these files, as `prompt_rows`."""
    return prompt_rows(read_prompts(*paths), tokenizer, room)


def ranking_rows(rankings: list[Ranking], tokenizer: Tokenizer, block_size: int,
                 max_tokens: int = 0) -> list[RankingRow]:
    """Render the prompt and the responses of every ranking.

    A ranking with a response over block_size (or max_tokens, if that is set), prompt included, is
    dropped whole, as a cut response would be scored without its end. The count goes to stderr.
    """
    block_size = min(max_tokens or block_size, block_size)
    kept = []
    for ranking in rankings:
        prompt = tokenizer.render_prompt(ranking.messages)
        responses = [[*tokenizer.encode(text), *[tokenizer.end] * (i not in ranking.cut)]
                     for i, text in enumerate(ranking.responses)]
        if len(prompt) + max(map(len, responses)) <= block_size:
            kept.append(RankingRow(prompt, responses, tied(responses, ranking.scores),
                                   ranking.margin))
    report(len(rankings), len(rankings) - len(kept), 0, block_size)
    return kept


def tied(responses: list[list[int]], scores: list[float]) -> list[float]:
    """The scores, the same for equal responses: a model can not tell them apart."""
    best: dict[tuple[int, ...], float] = {}
    for response, score in zip(responses, scores):
        best[tuple(response)] = max(score, best.get(tuple(response), score))
    return [best[tuple(response)] for response in responses]


def response_row(prompt: list[int], response: list[int]) -> Row:
    """A prompt and a response as one row; the mask is 1 on the response."""
    return Row(prompt + response, [False] * len(prompt) + [True] * len(response))


def report(total: int, dropped: int, cut: int, limit: int) -> None:
    """Say on stderr how many rows were too long; InputError if none is left."""
    if dropped or cut:
        print(f"{total} rows: {dropped} dropped and {cut} cut, longer than {limit} tokens",
              file=sys.stderr)
    if total and dropped == total:
        raise InputError(f"no row fits: all {total} exceed {limit} tokens; raise --max_tokens if "
                         f"it was set, or use a model with a larger block_size")


# ----------------------------------------------------------------------------- held-out rows

def read_untied(paths: tuple[str, ...], tokenizer: Tokenizer, block_size: int,
                max_tokens: int = 0) -> list[RankingRow]:
    """The rankings of these files that hold a pair, as rows; the others are counted on stderr.

    InputError if no ranking holds one.
    """
    rows = ranking_rows(read_rankings(*paths), tokenizer, block_size, max_tokens)
    kept = [row for row in rows if row.untied]
    if len(kept) < len(rows):
        print(f"{len(rows)} rankings: {len(rows) - len(kept)} left out, all their responses tied "
              f"or equal", file=sys.stderr)
    if not kept:
        raise InputError(f"{paths[0]}: nothing to learn from, every ranking is tied; give some "
                         f"response a higher score")
    return kept


def demonstration_splits(data: tuple[str, ...], val: str, tokenizer: Tokenizer, block_size: int,
                         max_tokens: int = 0) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows held out): the files of data and of val.

    Without val every twentieth row of data is held out; a single row is in both.
    """
    rows = demonstration_rows(read_demonstrations(*data), tokenizer, block_size, max_tokens)
    if val:
        held_out = read_demonstrations(val)
        return rows, demonstration_rows(held_out, tokenizer, block_size, max_tokens)
    return [row for i, row in enumerate(rows) if i % 20 or len(rows) == 1], rows[::20]


def ranking_splits(data: tuple[str, ...], val: str, tokenizer: Tokenizer, block_size: int,
                   fold: int = 0, max_tokens: int = 0) -> tuple[list[RankingRow], list[RankingRow]]:
    """(rows to train on, rows held out): the files of data and of val.

    Without val every tenth ranking of data is held out, beginning with number `fold`; a single
    ranking is in both.
    """
    if val and fold:
        raise InputError(f"--fold {fold}: has no meaning with --val; leave one of them out")
    rows = read_untied(data, tokenizer, block_size, max_tokens)
    if val:
        return rows, read_untied((val,), tokenizer, block_size, max_tokens)
    if len(rows) == 1:
        return rows, rows
    if not fold < len(rows):
        raise InputError(f"--fold {fold}: there are {len(rows)} rankings; name a lower number")
    return [row for i, row in enumerate(rows) if i % 10 != fold], rows[fold::10]


def read_ranking_rows(path: str, tokenizer: Tokenizer, block_size: int,
                      max_tokens: int = 0) -> list[RankingRow]:
    """The rankings of a file, those without a pair included, as rows."""
    return ranking_rows(read_rankings(path), tokenizer, block_size, max_tokens)


# ----------------------------------------------------------------------------- rows to batches

def buckets(rows: list, batch_size: int, epochs: int, draw: random.Random,
            processes: int = 1) -> list[list]:
    """The batches of a run, rows of similar length together, in random order.

    rows: of any kind that has `ids`. In every epoch the rows are shuffled, sorted by length within
    pools of 50 batches, and cut: little padding, still random (SFT on rows of 10 to 120 tokens
    runs 1.6 times faster). An epoch's last batch may be smaller. processes: as in `even`.
    """
    batches = []
    for _ in range(epochs):
        order = list(range(len(rows)))
        draw.shuffle(order)
        epoch, pool = [], 50 * batch_size
        for start in range(0, len(order), pool):
            part = sorted(order[start:start + pool], key=lambda i: len(rows[i].ids))
            epoch += [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
        draw.shuffle(epoch)
        batches += [[rows[i] for i in batch] for batch in epoch]
    return even(batches, processes)


def even(batches: list[list], processes: int) -> list[list]:
    """The batches, each cut to a multiple of `processes` rows; what is left out goes to stderr.

    Processes that share one model's weights must compute the same number of passes. InputError if
    nothing remains.
    """
    if processes == 1 or not batches:
        return batches
    kept = [batch[:len(batch) // processes * processes]
            for batch in batches if len(batch) >= processes]
    rows = sum(map(len, batches))
    if left := rows - sum(map(len, kept)):
        print(f"--shard: {left} of {rows} rows left out, as their batches do not divide by "
              f"{processes} processes", file=sys.stderr)
    if not kept:
        raise InputError(f"--shard: no batch holds a row for each of the {processes} processes; "
                         f"raise --batch_size")
    return kept


def by_length(rows: list, batch_size: int) -> list[list[int]]:
    """Places 0…n−1 of rows in batches of similar length, shortest first."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]


def pad_rows(rows: list[Row], pad: int, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(tokens (B, T), response_mask (B, T) bool, lengths (B,)), padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    tokens = [ids + [pad] * (longest - len(ids)) for ids, _ in rows]
    mask = [list(mask) + [False] * (longest - len(mask)) for _, mask in rows]
    lengths = [len(ids) for ids, _ in rows]
    return tuple(torch.tensor(x, device=device) for x in (tokens, mask, lengths))


def bias_batches(demonstrations: str, rankings: list[RankingRow], tokenizer: Tokenizer,
                 block_size: int, max_tokens: int = 0,
                 device="cpu") -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the mean reward shall be 0 of, as `pad_rows` of 64 each: the first 1,000 demonstrations
    of this file, or, without one, best responses of these rankings."""
    if demonstrations:
        conversations = read_demonstrations(demonstrations)
        rows = demonstration_rows(conversations, tokenizer, block_size, max_tokens)[:1000]
    else:
        rows = [response_row(row.prompt, row.responses[row.scores.index(max(row.scores))])
                for row in rankings[:1000]]
    return [pad_rows([rows[i] for i in places], tokenizer.pad, device)
            for places in by_length(rows, 64)]


@dataclass(frozen=True, slots=True)
class RankingBatch:
    """B rankings of up to K responses, each response computed once, a prompt once a row.

        one row:   prompt … | <|assistant|> response 1 | <|assistant|> response 2 | …

    A step of the reward model takes about half of the time of one row a response (Tinytown, K = 4
    to 9). Every response sees the prompt and itself, at the positions it would have alone. It
    begins with the prompt's last token, so that its first token, too, is predicted by the column
    before it.
    """
    tokens: Tensor               # (R, T); R ≥ B rows: a ranking too long for one takes several
    positions: Tensor            # (R, T)
    attention_mask: Tensor       # (R, T, T) bool; 1 where token t may see token s, if s ≤ t
    response_mask: Tensor        # (R, T) bool; 1 = response token, end token included
    cell: Tensor                 # (R, T) place in the flattened (B, K) grid of a token's response
    ends: Tensor                 # (R, T) bool; 1 = the last token of a response
    scores: Tensor               # (B, K) of the labeler, higher = better; 0 = no response
    mask: Tensor                 # (B, K) bool, 1 = a response
    margin: Tensor               # (B, 1)
    ref_logprobs: Tensor         # (B, K) log π_ref(y|x); 0 where there is none
    untied: int                  # rankings that hold at least one pair

    def grid(self, values: Tensor) -> Tensor:
        """One value a response (N,), in the order of their last tokens, as (B, K); else 0."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def sums(self, values: Tensor) -> Tensor:
        """Values (R, T) summed over the tokens of each response, (B, K); 0 without a response."""
        values = torch.where(self.response_mask, values, 0.0).flatten()
        sums = values.new_zeros(self.mask.numel()).index_add(0, self.cell.flatten(), values)
        return sums.view(self.mask.shape)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, its end token included, (B, K); 0 where there is none."""
        return self.sums(torch.ones_like(self.tokens, dtype=torch.float32))


def ranking_batch(rows: list[RankingRow], pad: int, device="cpu") -> RankingBatch:
    """Pack whole rankings into one batch, padded on the right."""
    B, K = len(rows), max(len(row.scores) for row in rows)
    scores, ref_logprobs = torch.zeros(B, K), torch.zeros(B, K)
    mask = torch.zeros(B, K, dtype=torch.bool)
    packed = []          # rows of (id, position, part of the row, response token?, cell, end?)
    for b, row in enumerate(rows):
        prompt, k_b = row.prompt, len(row.responses)
        start = [(id, place, 0, False, 0, False) for place, id in enumerate(prompt[:-1])]
        for k, response in enumerate(row.responses):
            if k == 0 or len(packed[-1]) + 1 + len(response) > PACKED:
                packed.append(list(start))
            packed[-1] += [
                (id, len(prompt) - 1 + i, k + 1, i > 0, b * K + k, i == len(response))
                for i, id in enumerate([prompt[-1], *response])]
        scores[b, :k_b], mask[b, :k_b] = torch.tensor(row.scores), True
        if row.ref_logprobs is not None:
            ref_logprobs[b, :k_b] = torch.tensor(row.ref_logprobs)
    width = max(map(len, packed))
    padding = (pad, 0, -1, False, 0, False)
    grid = torch.tensor([row + [padding] * (width - len(row)) for row in packed], device=device)
    tokens, positions, part, response_mask, cell, ends = grid.unbind(-1)           # (R, T) each
    sees = (part[:, :, None] == part[:, None, :]) | (part == 0)[:, None, :]        # (R, T, T)
    margin = torch.tensor([[row.margin] for row in rows], device=device)
    return RankingBatch(tokens, positions, sees, response_mask.bool(), cell, ends.bool(),
                        scores.to(device), mask.to(device), margin, ref_logprobs.to(device),
                        sum(row.untied for row in rows))


def ranking_batches(rows: list[RankingRow], pad: int, device="cpu",
                    size: int = 32) -> Iterator[RankingBatch]:
    """Rankings in batches of similar length, for passes that only measure."""
    for places in by_length(rows, size):
        yield ranking_batch([rows[i] for i in places], pad, device)
