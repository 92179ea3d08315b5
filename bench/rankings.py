"""The reward model on rankings of K = 9 against the same data as 36 pairs each: prompts of 64
tokens, responses of 32.

    python -m bench.rankings
"""
import itertools
import random

import torch

from bench.compare import emit, interleave, row
from data.batches import RankingRow, ranking_batch
from model import GPT, GPTConfig, RewardModel
from train_rm import ranking_loss, ranking_rewards

PROMPT, RESPONSE, RANKINGS, ROUNDS = 64, 32, 2, 7


def data(K: int) -> tuple[list[RankingRow], list[RankingRow]]:
    """Rankings of K random responses, and the same as C(K,2) pairs each."""
    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(500) for _ in range(length)]

    rankings = [RankingRow(ids(PROMPT), [ids(RESPONSE) for _ in range(K)],
                           [float(K - k) for k in range(K)]) for _ in range(RANKINGS)]
    pairs = [RankingRow(ranking.prompt, [better, worse], [1.0, 0.0]) for ranking in rankings
             for better, worse in itertools.combinations(ranking.responses, 2)]
    return rankings, pairs


def main() -> None:
    torch.manual_seed(0)
    model = RewardModel(GPT(GPTConfig(256, 512, 4, 4, 128)))

    def step(rows: list[RankingRow]) -> torch.Tensor:
        """Forward and backward; the loss."""
        model.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for start in range(0, len(rows), 36):       # 36 pairs a forward pass, as a ranking of 9 has
            some = rows[start:start + 36]
            batch = ranking_batch(some, pad=0)
            loss = ranking_loss(ranking_rewards(model, batch), batch.scores, batch.mask)
            loss = loss * len(some) / len(rows)
            loss.backward()
            total += loss.detach()
        return total

    rankings, pairs = data(9)
    # The same loss, so the same work.
    assert abs(step(rankings) - step(pairs)) < 1e-4
    seconds = interleave({"ours": lambda: step(rankings), "pairs": lambda: step(pairs)}, ROUNDS)
    emit(row("reward model, rankings of K = 9, prompt 64, responses 32",
             "the same as 36 pairs each (this project)",
             seconds["ours"], seconds["pairs"], RANKINGS * 36, "pairs/s", 4.0, 6.0))


if __name__ == "__main__":
    main()
