"""Rows of token ids to batches: length limits, bucketing, padding on the right, rankings kept together."""
import random
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from common import InputError
from data.readers import Ranking, read_rankings
from data.tokenizer import Tokenizer
from parallel import world

Row = tuple[list[int], list[bool]]              # token ids and response mask of one sequence, aligned
Group = tuple[list[int], list[list[int]]]       # ids of a prompt, and of each of its K responses, end token included
PACKED = 256     # tokens: a ranking's responses share a row up to this length. Longer rows would gain little from the prompt
                 # they share and lose more in attention, whose cost per token grows with the row.


def pad_rows(rows: list[Row], pad: int, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(tokens (B, T), response_mask (B, T) bool, lengths (B,)), padded on the right to the longest row."""
    longest = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens, _ in rows], device=device)
    mask = torch.tensor([list(mask) + [False] * (longest - len(mask)) for _, mask in rows], device=device)
    return tokens, mask, torch.tensor([len(tokens) for tokens, _ in rows], device=device)


def buckets(lengths: list[int], batch_size: int, draw: random.Random) -> list[list[int]]:
    """Indices 0…n−1 in batches of similar length, the batches in random order; the last may be smaller.

    Rows are shuffled, sorted by length within pools of 50 batches, and cut: little padding, still random. SFT on rows of 10
    to 120 tokens runs 1.6 times faster.
    """
    order = list(range(len(lengths)))
    draw.shuffle(order)
    pool = 50 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        part = sorted(order[start:start + pool], key=lambda i: lengths[i])
        batches += [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
    draw.shuffle(batches)
    return batches


def even(batches: list[list[int]], shard: bool) -> list[list[int]]:
    """The batches of a run. With shard, all processes must compute the same number of passes: what does not divide by their number
    is left out of each batch, and InputError raised if nothing remains."""
    if not shard or world() == 1 or not batches:
        return batches
    kept = [batch[:len(batch) // world() * world()] for batch in batches if len(batch) >= world()]
    rows, left = sum(map(len, batches)), sum(map(len, batches)) - sum(map(len, kept))
    if left:
        print(f"--shard: {left} of {rows} rows left out, as their batches do not divide by {world()} processes", file=sys.stderr)
    if not kept:
        raise InputError(f"--shard: no batch holds a row for each of the {world()} processes; raise --batch_size")
    return kept


def by_length(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Indices 0…n−1 in batches of similar length, shortest first: for passes that only measure."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]


def demonstration_rows(conversations: list[list[dict]], tokenizer: Tokenizer, block_size: int) -> list[Row]:
    """Render conversations for SFT, up to the last response token. A row longer than block_size is cut there if a response
    token remains, else dropped; both are counted on stderr. A cut row has lost its last end token, as it should: the text
    does not end there.
    """
    rows, cut = [], 0
    for messages in conversations:
        tokens, mask = tokenizer.render(messages)
        length = len(mask) - mask[::-1].index(True)
        tokens, mask = tokens[:length], mask[:length]
        if any(mask[:block_size]):
            cut += len(tokens) > block_size
            rows.append((tokens[:block_size], mask[:block_size]))
    report(len(conversations), len(conversations) - len(rows), cut, block_size)
    return rows


def ranking_groups(rankings: list[Ranking], tokenizer: Tokenizer, block_size: int) -> tuple[list[Ranking], list[Group]]:
    """Render the prompt and the responses of every ranking. One that has a response over block_size, prompt included, is
    dropped whole (a cut response would be scored without its end); the count goes to stderr. Returns the rankings kept
    and their ids.
    """
    kept, groups = [], []
    for ranking in rankings:
        prompt = tokenizer.render_prompt(ranking.messages)
        responses = [[*tokenizer.encode(text), tokenizer.end] for text in ranking.responses]
        if len(prompt) + max(map(len, responses)) <= block_size:
            kept.append(ranking)
            groups.append((prompt, responses))
    report(len(rankings), len(rankings) - len(kept), 0, block_size)
    return kept, groups


def group_size(group: Group) -> int:
    """Tokens of a prompt and all its responses."""
    prompt, responses = group
    return len(prompt) + sum(map(len, responses))


def read_untied(*paths: str) -> list[Ranking]:
    """The rankings of these files that hold a pair. Those whose responses are all tied are counted on stderr and left out;
    InputError if that leaves none."""
    rankings = read_rankings(*paths)
    kept = [ranking for ranking in rankings if ranking.untied]
    if len(kept) < len(rankings):
        print(f"{len(rankings)} rankings: {len(rankings) - len(kept)} left out, all their responses tied", file=sys.stderr)
    if not kept:
        raise InputError(f"{paths[0]}: nothing to learn from, every ranking is tied; give some response a higher score")
    return kept


def ranking_splits(data: tuple[str, ...], val: str, tokenizer: Tokenizer, block_size: int, fold: int = 0):
    """((rankings, groups) to train on, (rankings, groups) held out): the files of data and of val, or, without val, every
    tenth ranking of data held out, beginning with number `fold`. A single ranking is in both."""
    if val and fold:
        raise InputError(f"--fold {fold}: has no meaning with --val; leave one of them out")
    rankings, groups = ranking_groups(read_untied(*data), tokenizer, block_size)
    if val:
        return (rankings, groups), ranking_groups(read_untied(val), tokenizer, block_size)
    if len(groups) == 1:
        return (rankings, groups), (rankings, groups)
    if not fold < len(groups):
        raise InputError(f"--fold {fold}: there are {len(groups)} rankings; name a lower number")
    keep = [i for i in range(len(groups)) if i % 10 != fold]
    return ([rankings[i] for i in keep], [groups[i] for i in keep]), (rankings[fold::10], groups[fold::10])


def response_row(prompt: list[int], response: list[int]) -> Row:
    """A prompt and a response as one row; the mask is 1 on the response."""
    return prompt + response, [False] * len(prompt) + [True] * len(response)


def prompt_rows(conversations: list[list[dict]], tokenizer: Tokenizer, room: int) -> tuple[list[list[dict]], list[list[int]]]:
    """Render prompts; those over `room` tokens are dropped and counted. Returns the conversations kept and their ids."""
    pairs = [(messages, tokenizer.render_prompt(messages)) for messages in conversations]
    kept = [(messages, ids) for messages, ids in pairs if len(ids) <= room]
    report(len(pairs), len(pairs) - len(kept), 0, room)
    return [messages for messages, _ in kept], [ids for _, ids in kept]


def report(total: int, dropped: int, cut: int, limit: int) -> None:
    """Say on stderr how many rows were too long; InputError if none is left."""
    if dropped or cut:
        print(f"{total} rows: {dropped} dropped and {cut} cut, longer than {limit} tokens", file=sys.stderr)
    if total and dropped == total:
        raise InputError(f"no row fits: all {total} exceed {limit} tokens; raise --max_tokens if it was set, or use "
                         f"a model with a larger block_size")


@dataclass(frozen=True, slots=True)
class RankingBatch:
    """B rankings of up to K responses, each prompt and each response computed once.

        one row:   prompt … | <|assistant|> response 1 | <|assistant|> response 2 | …

    A step of the reward model takes about half of the time of one row a response (Tinytown, K = 4 to 9).
    Every response sees the prompt and itself, at the positions it would have alone. It begins with the prompt's last
    token, so that its first token, too, is predicted by the column before it.
    """
    tokens: Tensor               # (R, T); R ≥ B rows: a ranking too long for one takes several
    positions: Tensor            # (R, T)
    attention_mask: Tensor       # (R, T, T) bool; [r, t, s] is 1 where token t may see token s, if s ≤ t
    response_mask: Tensor        # (R, T) bool; 1 = response token, end token included
    cell: Tensor                 # (R, T) place in the flattened (B, K) grid of the response that a token belongs to
    ends: Tensor                 # (R, T) bool; 1 = the last token of a response
    scores: Tensor               # (B, K) what the annotator said, higher = better; 0 where there is no response
    mask: Tensor                 # (B, K) bool, 1 = a response
    margin: Tensor               # (B, 1)
    untied: int                  # rankings that hold at least one pair

    def grid(self, values: Tensor) -> Tensor:
        """One value a response (N,), in the order of their last tokens in the rows, as (B, K); 0 where there is none."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def sums(self, values: Tensor) -> Tensor:
        """Values (R, T) summed over the tokens of each response, (B, K); 0 where there is no response."""
        values = torch.where(self.response_mask, values, 0.0).flatten()
        return values.new_zeros(self.mask.numel()).index_add(0, self.cell.flatten(), values).view(self.mask.shape)


def packed_shape(prompt: list[int], responses: list[list[int]]) -> tuple[int, int]:
    """(rows, tokens of the longest) that `ranking_batch` makes of a prompt and its responses."""
    rows = []
    for response in responses:
        if not rows or rows[-1] + 1 + len(response) > PACKED:
            rows.append(len(prompt) - 1)
        rows[-1] += 1 + len(response)
    return len(rows), max(rows)


def ranking_batch(rankings: list[Ranking], groups: list[Group], pad: int, device="cpu") -> RankingBatch:
    """Pack whole rankings into one batch, padded on the right."""
    shape = len(rankings), max(len(ranking.scores) for ranking in rankings)                 # B, K
    scores, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    rows = []                                       # of (id, position, part of the row, response token?, cell, end?) a token
    for b, (prompt, responses) in enumerate(groups):
        start = [(id, position, 0, False, 0, False) for position, id in enumerate(prompt[:-1])]
        for k, response in enumerate(responses):
            if k == 0 or len(rows[-1]) + 1 + len(response) > PACKED:
                rows.append(list(start))
            rows[-1] += [(id, len(prompt) - 1 + i, k + 1, i > 0, b * shape[1] + k, i == len(response))
                         for i, id in enumerate([prompt[-1], *response])]
        scores[b, :len(responses)], mask[b, :len(responses)] = torch.tensor(rankings[b].scores), True
    width = max(map(len, rows))
    grid = torch.tensor([row + [(pad, 0, -1, False, 0, False)] * (width - len(row)) for row in rows], device=device)
    tokens, positions, part, response_mask, cell, ends = grid.unbind(-1)                    # (R, T) each
    sees = (part[:, :, None] == part[:, None, :]) | (part == 0)[:, None, :]                 # (R, T, T)
    return RankingBatch(tokens, positions, sees, response_mask.bool(), cell, ends.bool(), scores.to(device),
                        mask.to(device), torch.tensor([[ranking.margin] for ranking in rankings], device=device),
                        sum(ranking.untied for ranking in rankings))
