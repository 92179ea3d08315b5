"""The reward model on rankings of K = 9 against the same data as 36 pairs each: prompts of 64 tokens, responses of 32.

    python -m bench.rankings
"""
import random

import torch

from bench.compare import emit, interleave, row
from data.batches import Group, ranking_batch
from data.readers import Ranking
from model import GPT, GPTConfig, RewardModel
from train_rm import ranking_loss, ranking_rewards

PROMPT, RESPONSE, RANKINGS, ROUNDS = 64, 32, 2, 7


def data(K: int) -> tuple[list[Ranking], list[Group], list[Ranking], list[Group]]:
    """Rankings of K random responses, and the same as C(K,2) pairs each."""
    draw = random.Random(0)
    rankings, groups, pairs, pair_groups = [], [], [], []
    for _ in range(RANKINGS):
        prompt = [draw.randrange(500) for _ in range(PROMPT)]
        responses = [[draw.randrange(500) for _ in range(RESPONSE)] for _ in range(K)]
        rankings.append(Ranking([], [""] * K, [float(K - k) for k in range(K)]))
        groups.append((prompt, responses))
        for i in range(K):
            for j in range(i + 1, K):
                pairs.append(Ranking([], ["", ""], [1.0, 0.0]))
                pair_groups.append((prompt, [responses[i], responses[j]]))
    return rankings, groups, pairs, pair_groups


def main() -> None:
    torch.manual_seed(0)
    model = RewardModel(GPT(GPTConfig(256, 512, 4, 4, 128)))

    def step(rankings, groups):
        model.zero_grad(set_to_none=True)
        total = 0.0
        for start in range(0, len(groups), 36):                    # 36 pairs a forward pass, as one ranking of 9 gives
            batch = ranking_batch(rankings[start:start + 36], groups[start:start + 36], 0)
            loss = ranking_loss(ranking_rewards(model, batch), batch.scores, batch.mask) * len(groups[start:start + 36]) / len(groups)
            loss.backward()
            total += loss.item()
        return total

    rankings, groups, pairs, pair_groups = data(9)
    assert abs(step(rankings, groups) - step(pairs, pair_groups)) < 1e-4             # the same loss, so the same work
    seconds = interleave({"ours": lambda: step(rankings, groups) and None, "pairs": lambda: step(pairs, pair_groups) and None},
                         ROUNDS)
    emit(row("reward model, rankings of K = 9, prompt 64, responses 32", "the same as 36 pairs each (this project)",
             seconds["ours"], seconds["pairs"], RANKINGS * 36, "pairs/s", 4.0, 6.0))


if __name__ == "__main__":
    main()
