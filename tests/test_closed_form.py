"""PPO and DPO reach π*(y|x) ∝ π_ref(y|x)·exp(r(x,y)/β), and best-of-n its exact distribution.

Every response of a small vocabulary can be enumerated. The whole `train()` of each script runs, on
a toy tokenizer of eight ids.
"""
import itertools
import json
import math

import pytest
import torch

import rollout
import train_dpo
import train_ppo
from common import run as door
from data.batches import Prompt
from model import GPT, GPTConfig
from rollout import Response, sequence_logprobs
from systems import best_of_n

LETTERS = "abcd"


class ToyTokenizer:
    """Ids 0–3: pad, user, assistant, end; 4–7: the letters a–d.

    It has enough of Tokenizer's interface for both scripts.
    """
    name, pad, end, vocab_size, endoftext = "toy", 0, 3, 8, 0

    def encode(self, text):
        return [4 + LETTERS.index(letter) for letter in text]

    def render_prompt(self, messages):
        return [1, *self.encode(messages[0]["content"]), 3, 2]

    def response_text(self, ids):
        ended = self.end in ids
        return "".join("PUAEabcd"[id]
                       for id in (ids[:ids.index(self.end)] if ended else ids)), ended


def toy_policy() -> GPT:
    torch.manual_seed(3)
    gpt = GPT(GPTConfig(16, 8, 2, 2, 32))
    with torch.no_grad():
        # Flatter than at initialisation, so that no response is too rare to be sampled.
        gpt.wte.weight *= 0.3
    return gpt


def reward(text: str) -> float:
    """An arbitrary score in [−1, 1] for every text."""
    return ((sum((i + 2) * ord(c) for i, c in enumerate(text)) * 37) % 101) / 50 - 1


def sequence_probs(policy: GPT, responses: list[list[int]]) -> torch.Tensor:
    prompt = Prompt([], ToyTokenizer().render_prompt([{"content": "a"}]))
    answers = [Response(ids, "", True) for ids in responses]
    return sequence_logprobs(policy.eval(), [prompt] * len(answers), answers, 0).double().exp()


def optimum(ref_probs: torch.Tensor, rewards: torch.Tensor, beta: float) -> torch.Tensor:
    weights = ref_probs * (rewards / beta).exp()
    return weights / weights.sum()


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    """Total variation."""
    return 0.5 * (p - q).abs().sum().item()


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Both scripts load the toy policy; the last of `saved` is the model that a run ended with."""
    saved = []
    for script in (train_ppo, train_dpo):
        monkeypatch.setattr(script, "load_gpt", lambda folder: (toy_policy(), ToyTokenizer()))
    monkeypatch.setattr(door, "save_model", lambda out, model, *_: saved.append(model))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    return tmp_path, saved


def ppo_probs(toy, beta: float):
    """(reference, trained, optimum) over all 64 responses of at most two tokens."""
    folder, saved = toy
    everything = range(8)
    responses = [[3]] + [[x, y] for x, y in itertools.product(everything, everything) if x != 3]
    tokenizer = ToyTokenizer()
    scores = torch.tensor([reward(text) if ended else -0.5
                           for text, ended in map(tokenizer.response_text, responses)],
                          dtype=torch.double)
    config = train_ppo.Config(init="toy", data=(str(folder / "prompts.jsonl"),),
                              out=str(folder / "ppo"), overwrite=True, steps=100,
                              batch_size=256, minibatches=2, max_new_tokens=2, beta=beta,
                              ptx_coef=0, lr=1e-2, value_lr=1e-2,
                              lam=1.0, cliprange_value=10.0, missing_end_score=-0.5,
                              sample_every=10**6, device="cpu")
    train_ppo.train(config, reward=lambda conversations, texts: [reward(text) for text in texts])
    reference = sequence_probs(toy_policy(), responses)
    assert reference.sum().item() == pytest.approx(1, abs=1e-5)
    return reference, sequence_probs(saved[-1], responses), optimum(reference, scores, beta)


def test_ppo_reaches_the_optimum_and_doubled_beta_reaches_the_other(toy):
    reference, strong, strong_optimum = ppo_probs(toy, beta=0.2)
    _, weak, weak_optimum = ppo_probs(toy, beta=0.4)
    assert distance(reference, strong_optimum) > 0.5
    assert distance(strong_optimum, weak_optimum) > 0.15
    assert distance(strong, strong_optimum) < 0.08
    assert distance(weak, weak_optimum) < 0.08


def dpo_probs(toy, beta: float):
    """(reference, trained, optimum) over sixteen responses of two letters.

    The preferences occur in exact proportion.
    """
    folder, saved = toy
    texts = ["".join(pair) for pair in itertools.product(LETTERS, LETTERS)]
    responses = [[*ToyTokenizer().encode(text), 3] for text in texts]
    rows = []
    for first, second in itertools.combinations(texts, 2):
        # wins of `first` in 20 comparisons
        wins = round(20 * torch.sigmoid(torch.tensor(reward(first) - reward(second))).item())
        rows += [{"prompt": "a", "chosen": first, "rejected": second}] * wins
        rows += [{"prompt": "a", "chosen": second, "rejected": first}] * (20 - wins)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = str(folder / "pairs.jsonl")
    config = train_dpo.Config(init="toy", data=(pairs,), val=pairs, out=str(folder / "dpo"),
                              overwrite=True, beta=beta, epochs=12, lr=3e-3, batch_size=128,
                              device="cpu")
    train_dpo.train(config)
    reference = sequence_probs(toy_policy(), responses)
    trained = sequence_probs(saved[-1], responses)
    scores = torch.tensor([reward(text) for text in texts], dtype=torch.double)
    return reference / reference.sum(), trained / trained.sum(), optimum(reference, scores, beta)


def test_dpo_reaches_the_optimum_and_doubled_beta_reaches_the_other(toy):
    reference, strong, strong_optimum = dpo_probs(toy, beta=0.4)
    _, weak, weak_optimum = dpo_probs(toy, beta=0.8)
    assert distance(reference, strong_optimum) > 0.4
    assert distance(strong_optimum, weak_optimum) > 0.15
    assert distance(strong, strong_optimum) < 0.08
    assert distance(weak, weak_optimum) < 0.08


def test_best_of_n_follows_the_exact_order_statistics():
    generator = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.double)
    rewards = torch.tensor([0.0, 2.0, 1.0, 1.0, 3.0], dtype=torch.double)   # two responses tie
    n, trials = 4, 40_000
    exact = best_of_n.best_of_n_distribution(probs, rewards, n)
    assert exact.sum().item() == pytest.approx(1)
    assert exact[4].item() == pytest.approx(1 - 0.95 ** 4)          # the best: 1 − P(never drawn)
    assert exact[0].item() == pytest.approx(0.4 ** 4)               # the worst: drawn every time
    draws = torch.multinomial(probs, n * trials, replacement=True, generator=generator)
    pool = [[i] for i in draws.tolist()]
    chosen, best = best_of_n.choose(pool, rewards[draws], n)
    measured = torch.bincount(torch.tensor(chosen)[:, 0], minlength=5).double() / trials
    assert distance(measured, exact) < 0.01
    assert distance(probs, exact) > 0.3
    assert torch.equal(best, rewards[torch.tensor(chosen)[:, 0]])


def test_best_of_n_kl_meets_the_bound_where_rewards_are_distinct_and_many():
    R, n = 4000, 8
    probs = torch.full((R,), 1 / R, dtype=torch.double)
    exact = best_of_n.best_of_n_distribution(probs, torch.arange(R).double(), n)
    kl = (exact * (exact / probs).log()).sum().item()
    assert kl == pytest.approx(best_of_n.best_of_n_kl(n), abs=2e-3)
    chosen = torch.multinomial(exact, 20_000, replacement=True,
                               generator=torch.Generator().manual_seed(0))
    measured = best_of_n.measured_best_of_n_kl(probs[chosen].log(), chosen.double() / R, n).item()
    assert measured == pytest.approx(kl, abs=0.02)
    few = best_of_n.best_of_n_distribution(torch.tensor([0.5, 0.5]).double(),
                                          torch.tensor([0.0, 1.0]).double(), 8)
    # It saturates at −log p_max.
    assert (few * (few / 0.5).log()).sum().item() < best_of_n.best_of_n_kl(8) / 1.5


def test_best_of_n_kl_of_a_response_far_less_likely_than_the_others():
    """p = e⁻⁶⁰ vanishes beside F = 0.9 in float64; ((F + p)ⁿ − Fⁿ)/p → n·Fⁿ⁻¹."""
    measured = best_of_n.measured_best_of_n_kl(torch.tensor([-60.0]), torch.tensor([0.9]), 16)
    assert measured == pytest.approx(math.log(16) + 15 * math.log(0.9), abs=1e-6)


def test_what_never_ends_is_not_chosen():
    responses = [Response([1], "short", True), Response([1], "endless", False)]
    scored = torch.tensor(rollout.ended_scores(
        lambda prompts, responses: [{"short": 0.5, "endless": 9.0}[one.text] for one in responses],
        [None, None], responses, -3.0))
    assert scored.tolist() == [0.5, -3.0]
    assert best_of_n.choose(responses, scored, 2)[0] == responses[:1]
