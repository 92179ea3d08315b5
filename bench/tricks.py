"""What each trick in model.py, kernels.py and data/batches.py gains: with it against without it, all else equal, on the CPU.

    python -m bench.tricks
"""
import random
from unittest import mock

import torch
import torch.nn.functional as F

import model as model_module
from bench.compare import SIZES, emit, interleave, row
from common import adamw
from data import batches
from data.batches import buckets, pad_rows, ranking_batch
from data.readers import Ranking
from kernels import gelu, linear, token_logprobs
from model import GPT, GPTConfig, KVCache, RewardModel, before, sample_token
from train_rm import ranking_loss, ranking_rewards
from train_sft import sft_loss

ROUNDS = 7
draw = random.Random(0)


def small() -> GPT:
    """Tinytown's model, with a context that all cases fit into."""
    layers, heads, width, vocabulary, context = SIZES["0.86 M"]
    return GPT(GPTConfig(context, vocabulary, layers, heads, width))


def compare(what: str, with_it, without, amount: float, unit: str) -> None:
    """Print the row of one trick."""
    seconds = interleave({"with": with_it, "without": without}, ROUNDS)
    emit(row(what, "the same without it", seconds["with"], seconds["without"], amount, unit))


def times(count: int, function) -> None:
    for _ in range(count):
        function()


def ids(length: int) -> list[int]:
    return [draw.randrange(1, 500) for _ in range(length)]


def steps(loss, parameters) -> None:
    """Forward and backward of loss()."""
    loss().backward()
    for parameter in parameters:
        parameter.grad = None


# ----------------------------------------------------------------------------- kernels.py

def few_rows() -> None:
    x, weight = torch.randn(8, 768), torch.randn(50304, 768)
    with torch.no_grad():
        compare("linear as (W·xᵀ)ᵀ: 8 rows, GPT-2's head", lambda: times(8, lambda: linear(x, weight)),
                lambda: times(8, lambda: F.linear(x, weight)), 8, "products/s")


def logits_of_a_chunk() -> None:
    hidden, weight = torch.randn(256, 768), torch.randn(50257, 768)
    compare("logits as W·hᵀ, (V, n): 256 tokens, GPT-2's head", lambda: times(2, lambda: weight @ hidden.T),
            lambda: times(2, lambda: hidden @ weight.T), 2, "products/s")


def gelu_by_sigmoid() -> None:
    x = torch.randn(1000, 512, requires_grad=True)
    plain = lambda: times(30, lambda: steps(lambda: F.gelu(x, approximate="tanh").sum(), [x]))       # noqa: E731
    compare("gelu by σ: 1,000 × 512, forward and backward", lambda: times(30, lambda: steps(lambda: gelu(x).sum(), [x])), plain,
            30, "calls/s")


# ----------------------------------------------------------------------------- model.py: training

def last_block() -> None:
    model = RewardModel(small())
    tokens, parameters = torch.randint(0, 500, (32, 96)), list(model.parameters())
    ends = (torch.arange(96) == 95).expand(32, 96)
    whole = lambda: model.scalars(tokens)[ends].sum()                                                # noqa: E731
    compare("last block only where it is read: reward model, 32 × 96", lambda: times(4, lambda: steps(
        lambda: model.scalars(tokens, wanted=ends).sum(), parameters)), lambda: times(4, lambda: steps(whole, parameters)),
        4, "steps/s")


def head_only_where_masked() -> None:
    model = GPT(GPTConfig(256, 50304, 2, 2, 64))
    tokens, mask = torch.randint(0, 500, (8, 96)), (torch.arange(96) >= 64).expand(8, 96)
    everywhere, parameters = (torch.arange(96) >= 1).expand(8, 96), list(model.parameters())

    def loss(scored):                  # the whole last block on both sides
        states = model.hidden(tokens)[before(scored)]
        return -token_logprobs(states, model.wte.weight, tokens[scored], equal_weights=True)[0].mean()

    compare("output head only at response tokens: 8 × (64 + 32), GPT-2's vocabulary", lambda: steps(lambda: loss(mask), parameters),
            lambda: steps(lambda: loss(everywhere), parameters), 1, "steps/s")


def fused_adamw() -> None:
    models = [small(), small()]
    plain = torch.optim.AdamW(models[1].parameters(), 1e-4)
    for model in models:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    fused = adamw(models[0], 1e-4)
    compare("AdamW fused: 0.86 M parameters", lambda: times(50, fused.step), lambda: times(50, plain.step), 50, "steps/s")


# ----------------------------------------------------------------------------- data/batches.py

def packing() -> None:
    model, rankings, groups = RewardModel(small()), [], []
    parameters = list(model.parameters())
    for _ in range(16):
        K = draw.randint(4, 9)
        rankings.append(Ranking([], [""] * K, [float(k) for k in range(K)]))
        groups.append((ids(draw.randint(8, 40)), [ids(draw.randint(4, 30)) for _ in range(K)]))

    def step(packed):
        with mock.patch.object(batches, "PACKED", packed):
            batch = ranking_batch(rankings, groups, 0)
        steps(lambda: ranking_loss(ranking_rewards(model, batch), batch.scores, batch.mask), parameters)

    compare("a ranking in one row: 16 rankings of K = 4 to 9", lambda: times(3, lambda: step(batches.PACKED)),
            lambda: times(3, lambda: step(1)), 3, "steps/s")


def bucketing() -> None:
    model = small()
    rows = [(ids(length), [False] * (length // 2) + [True] * (length - length // 2)) for length in
            (draw.randint(10, 120) for _ in range(256))]
    parameters = list(model.parameters())
    order = list(range(256))
    draw.shuffle(order)
    similar, random_ = buckets([len(tokens) for tokens, _ in rows], 32, draw), [order[i:i + 32] for i in range(0, 256, 32)]

    def epoch(batches_of_indices):
        for indices in batches_of_indices:
            tokens, mask, _ = pad_rows([rows[i] for i in indices], 0)
            steps(lambda: sft_loss(model.logprobs(tokens, mask, equal_weights=True)[0], mask), parameters)

    compare("batches of similar length: SFT, rows of 10 to 120 tokens", lambda: epoch(similar), lambda: epoch(random_), 256, "rows/s")


# ----------------------------------------------------------------------------- model.py: generation

def sampling() -> None:
    logits = torch.randn(16, 50304)
    compare("a token by the inverse of the distribution: 16 × 50,304", lambda: times(4, lambda: sample_token(logits, torch.rand(len(logits)), 1.0, None, 1.0)),
            lambda: times(4, lambda: torch.multinomial(logits.softmax(-1), 1)), 64, "tokens/s")


class GrowingCache(KVCache):
    """The cache as it is usually written: grown by concatenation."""

    def append(self, layer, key, value):
        if self.length == 0:
            self.grown = getattr(self, "grown", {})
            self.grown[layer] = key, value
        else:
            self.grown[layer] = tuple(torch.cat([old, new], 2) for old, new in zip(self.grown[layer], (key, value)))
        return self.grown[layer]

    def take(self, rows):
        self.grown = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.grown.items()}


def take_by_copy(self, rows):
    self.keys, self.values = self.keys[:, rows], self.values[:, rows]


def generation() -> None:
    model = small().eval()
    same = [ids(64)] * 64
    different = [ids(64) for _ in range(64)]

    def generate(prompts, new=32, stop=None):
        return lambda: model.generate(prompts, new, stop_token=stop)

    def patched(name, value, run):
        def under():
            with mock.patch.object(*name, value):
                run()
        return under

    tokens = 64 * 32
    compare("a prompt sampled 64 times read once: 64 + 32 tokens", generate(same), generate(different), tokens, "tokens/s")
    compare("cache written in place: 64 × (64 + 32)", generate(different),
            patched((model_module, "KVCache"), GrowingCache, generate(different)), tokens, "tokens/s")
    with torch.no_grad():        # a logit of 4 everywhere for token 7, so that rows end after some 20 tokens, as Tinytown's do
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[7] = 4 / model.config.n_embd
    many = [ids(24) for _ in range(512)]

    def until_end(stop):
        def run():
            torch.manual_seed(0)
            return sum(map(len, model.generate(many, 48, stop_token=stop)))
        return run

    written = until_end(7)()
    compare(f"finished rows leave the batch in place: 512 responses of {written / 512:.0f} tokens", until_end(7),
            patched((KVCache, "take"), take_by_copy, until_end(7)), written, "tokens/s")


def main() -> None:
    torch.manual_seed(0)
    for trick in (few_rows, logits_of_a_chunk, gelu_by_sigmoid, last_block, head_only_where_masked, fused_adamw, packing, bucketing,
                  sampling, generation):
        trick()


if __name__ == "__main__":
    main()
